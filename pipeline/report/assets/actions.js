// Keys, clicks and filters; the start.

/** Show what the state says; `token` is kept if it is set. */
function refresh() {
  derive();
  find();
  fillFilters();
  drawCount();
  drawList(true);
  showInList();
  drawReader();
  const sought =
    now.sought === undefined ? -1 : now.tokens.findIndex(({ set, i }) => set === now.set && i === now.sought);
  delete now.sought;
  const at = sought >= 0 ? sought : state.token === "" ? null : Number(state.token);
  choose(at !== null && now.tokens[at] ? at : null);
}

function fillFilters() {
  const { set } = now;
  options(
    "set",
    sets.map((s) => [String(s.index), `${s.raw.name} (${number(s.raw.n_shown)})`]),
    String(set.index),
  );
  options(
    "teacher",
    set.teachers.map((teacher) => [teacher.name, teacher.label]),
    set.teachers[now.teacher]?.name ?? "",
  );
  options("view", viewsOf(set), now.view);
  const sources = [...new Set(set.rows.map((row) => row.source))].filter((source) => source !== null).sort();
  options("source", [["", "any"], ...sources.map((source) => [source, line(source)])], state.source);
  options(
    "sort",
    Object.entries(ORDERS).map(([key, [title]]) => [key, title]),
    state.sort,
  );
  for (const name of ["q", "right", "finish"]) if ($(name).value !== state[name]) $(name).value = state[name];
  for (const [name, fewest] of [
    ["set", 2],
    ["teacher", 2],
    ["view", 2],
    ["source", 3],
  ])
    $(name).closest("label").hidden = $(name).length < fewest;
  $("right").closest("label").hidden = !set.rows.some((row) => row.right !== null);
}

function options(id, pairs, chosen) {
  const key = JSON.stringify(pairs);
  if ($(id).dataset.key !== key) {
    $(id).replaceChildren(...pairs.map(([value, title]) => el("option", { value }, title)));
    $(id).dataset.key = key;
  }
  $(id).value = chosen;
}

function open(row) {
  const before = state.rollout;
  state.rollout = String(row.number);
  state.token = "";
  if (!before) setAddress("pushState"); // so that "back" leads to the list
  now.current = null;
  showInList();
  drawList();
  drawReader();
  $("reader").scrollTop = 0;
  if (document.body.classList.contains("reading") && narrow.matches) {
    $("rollouts").scrollIntoView();
    $("reading").focus({ preventScroll: true });
  }
  writeAddress();
}

/** Bring what the address points at before the reader's eyes. */
function goThere() {
  if (!now.row) return;
  $("rollouts").scrollIntoView();
  if (now.current !== null) choose(now.current, { focus: true });
}

function step(by) {
  const at = now.found.findIndex((row) => String(row.number) === state.rollout);
  const row = now.found[at < 0 ? 0 : at + by];
  if (row) open(row);
}

/** To the next (or previous) token at MARKED or above; the whole rollout's, both responses of a pair. */
function nextMark(by) {
  for (let at = (now.current ?? (by > 0 ? -1 : now.tokens.length)) + by; now.tokens[at]; at += by) {
    const { marks, i } = now.tokens[at];
    if (levelOf(marks[i]) >= MARKED) return choose(at, { focus: true, speak: true });
  }
  $("spoken").textContent = "No more marks.";
}

function back() {
  const left = state.rollout;
  Object.assign(state, { rollout: "", token: "" });
  refresh();
  writeAddress();
  $(`row-${left}`)?.scrollIntoView({ block: "nearest" });
  $("scroll").focus({ preventScroll: true });
}

const ACTIONS = {
  j: () => step(1),
  k: () => step(-1),
  n: () => nextMark(1),
  p: () => nextMark(-1),
  back,
  close: () => choose(null),
  "/": () => $("q").focus(),
  "?": () => $("keys").showModal(),
};

const narrow = matchMedia("(max-width: 759px)");

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || $("keys").open) return;
  const target = event.target;
  if (event.key === "Escape") {
    if (target.id === "q") target.blur();
    else if (now.current !== null) choose(null);
    else if (state.rollout) back();
    return;
  }
  if (target.closest("input, select, textarea")) return;
  if (target.closest(".response") && now.tokens.length) {
    const move = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
    if (move !== undefined) {
      const forwards = target.dir === "rtl" && Number.isFinite(move) ? -move : move;
      const first = Number(target.querySelector(".t")?.dataset.at ?? 0);
      const at = now.current === null ? first : Math.min(Math.max(now.current + forwards, 0), now.tokens.length - 1);
      event.preventDefault();
      return choose(at, { focus: true, speak: true });
    }
  }
  if (target.id === "scroll") {
    const move = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (move || event.key === "Enter") {
      event.preventDefault();
      if (move) step(move);
      else if (now.row) document.querySelector(".response").focus();
      return;
    }
  }
  if ($("single").checked && ACTIONS[event.key] && event.key.length === 1) {
    event.preventDefault();
    ACTIONS[event.key]();
  }
}

function listen() {
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("filters").addEventListener("input", (event) => {
    const name = event.target.id;
    if (!FILTERS.includes(name)) return;
    state[name] = event.target.value;
    if (name === "set") {
      const first = sets.find((set) => String(set.index) === state.set).rows[0];
      Object.assign(state, { rollout: narrow.matches ? "" : String(first.number), token: "", source: "" });
    }
    if (name === "q") {
      find();
      drawCount();
      $("scroll").scrollTop = 0;
      drawList(true);
    } else refresh();
    writeAddress();
  });
  $("scroll").addEventListener("scroll", () => requestAnimationFrame(() => drawList()), { passive: true });
  $("list").addEventListener("click", (event) => {
    const item = event.target.closest(".item");
    if (item) open(now.set.byNumber.get(Number(item.dataset.number)));
  });
  document.addEventListener("click", (event) => ACTIONS[event.target.closest("[data-do]")?.dataset.do]?.());
  $("details").addEventListener("click", (event) => {
    const at = event.target.closest("[data-token]")?.dataset.token;
    if (at !== undefined) choose(Number(at), { focus: true, speak: true });
  });
  $("help").addEventListener("click", ACTIONS["?"]);
  const reader = $("reader");
  reader.addEventListener("pointerover", (event) => {
    const node = event.pointerType === "mouse" ? event.target.closest(".t, ruby") : null;
    if (node) drawDetails(Number((node.matches(".t") ? node : node.querySelector(".t")).dataset.at));
  });
  reader.addEventListener("pointerleave", () => drawDetails());
  reader.addEventListener("click", (event) => {
    const track = event.target.closest(".track");
    const node = event.target.closest(".t") ?? event.target.closest("ruby")?.querySelector(".t");
    if (node) choose(Number(node.dataset.at), { focus: true });
    else if (track) {
      const first = now.tokens.findIndex(({ set }) => String(set.index) === track.dataset.set);
      const { row } = now.tokens[first];
      choose(first + Math.min(row.length - 1, Math.floor(event.offsetX / scaleOf(row, track.clientWidth))), {
        focus: true,
      });
    }
  });
  document.addEventListener("keydown", onKey);
  addEventListener("hashchange", () => {
    if (!readAddress()) return;
    refresh();
    goThere();
  });
  const redraw = () => {
    drawList(true);
    drawTracks();
  };
  new ResizeObserver(redraw).observe($("scroll"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    palette = null;
    redraw();
  });
}

if (sets.length) {
  $("workspace").hidden = false;
  now.current = null;
  const linked = readAddress() && state.rollout !== "";
  const trained = sets.find((set) => set.raw.phase === "after");
  if (location.hash.length < 2 && trained) state.set = String(trained.index); // what is new, unless a link says more
  derive();
  if (!state.rollout && !narrow.matches) state.rollout = String(now.set.rows[0].number);
  listen();
  refresh();
  if (linked) goThere();
  sets.forEach(prepareSearch);
}
