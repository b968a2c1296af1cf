// The open rollout: every token with its marks, and above it what the teacher prefers.

const markClass = (kl) => `l${levelOf(kl)}${kl < 0 ? " fallen" : ""}`;

/** A token as its span; a marked one is a <mark> with its KL for screen readers, and the teacher's preference above it. */
function tokenNode(set, marks, i, at) {
  const kl = marks[i];
  const level = levelOf(kl);
  const text = set.piece(i);
  const parts = text === "" ? [el("span", { class: "sign" }, "◦")] : visible(text);
  const node = el(level ? "mark" : "span", { class: level ? `t ${markClass(kl)}` : "t", "data-at": at }, ...parts);
  if (!set.array("trained")[i]) node.classList.add("untrained");
  if (level < MARKED) return node;
  const preferred = set.preferred(i, now.teacher);
  node.append(el("span", { class: "unseen" }, ` (${inWords(kl, preferred)}) `));
  if (level <= MARKED || preferred === null) return node;
  const pen = text.startsWith(" ") && preferred.startsWith(" ") ? preferred.trimStart() : preferred;
  return el("ruby", {}, node, el("rt", { "aria-hidden": "true" }, el("bdi", {}, label(pen))));
}

/** A token's mark in words. */
const inWords = (kl, preferred) => {
  if (Number.isNaN(kl)) return "not marked";
  const what = now.view.startsWith("change")
    ? `reverse KL ${signed(kl, 2)} nats`
    : `reverse KL ${kl.toFixed(2)} nats`;
  return preferred === null ? what : `${what}, teacher prefers ${label(preferred)}`;
};

/** Row and set of the same prompt on the other side of training, for rollouts that `eval` kept. */
function twin(set, row) {
  const other = set.raw.pair === null ? null : sets.find((s) => s !== set && s.raw.pair === set.raw.pair);
  const found = other?.raw.rows.filter((r) => r.prompt_index === row.prompt_index) ?? [];
  const same = found.find((r) => r.sample_index === row.sample_index) ?? found[0];
  return same ? [other, same] : null;
}

function drawReader() {
  const reader = $("reader");
  const row = now.set.byNumber.get(Number(state.rollout));
  document.body.classList.toggle("reading", state.rollout !== "" && row !== undefined);
  now.tokens = [];
  now.row = state.rollout === "" ? undefined : row;
  if (!now.row) {
    reader.replaceChildren(
      el(
        "p",
        { class: "empty", id: "reading" },
        now.found.length
          ? "Choose a rollout to see it with the teacher's marks."
          : "No rollout matches these filters.",
      ),
    );
    return drawDetails();
  }
  const pair = twin(now.set, row);
  const copies = now.set.copies.get(row.number);
  const teacher = now.set.teachers[now.teacher]?.name;
  const shown = pair
    ? [[now.set, row], pair].sort(([a], [b]) => (a.raw.phase === "after") - (b.raw.phase === "after"))
    : [[now.set, row]];
  reader.replaceChildren(
    el(
      "header",
      {},
      el("button", { type: "button", class: "back", "data-do": "back", "aria-label": "all rollouts" }, "☰"),
      el("h3", { id: "reading", tabindex: "-1" }, `Rollout ${row.number}`),
      el("p", { class: "place" }, `prompt ${row.prompt_index}, sample ${row.sample_index}`),
      copies.length > 1 && el("p", { class: "place", title: copiesTitle(copies) }, `${copies.length} identical rollouts`),
      el(
        "div",
        { class: "steps" },
        el(
          "button",
          { type: "button", "data-do": "k", title: "previous rollout (k)", "aria-label": "previous rollout" },
          "↑",
        ),
        el(
          "button",
          { type: "button", "data-do": "j", title: "next rollout (j)", "aria-label": "next rollout" },
          "↓",
        ),
        el(
          "button",
          { type: "button", "data-do": "p", title: "previous mark (p)", "aria-label": "previous mark" },
          "‹",
          el("span", { class: "word" }, " mark"),
        ),
        el(
          "button",
          { type: "button", "data-do": "n", title: "next mark (n)", "aria-label": "next mark" },
          el("span", { class: "word" }, "mark "),
          "›",
        ),
      ),
    ),
    legend(shown),
    ...prompt("Prompt", row.prompt),
    ...(teacher in row.read ? prompt(`What ${teacher} read instead`, row.read[teacher]) : []),
    ...shown.flatMap(([set, one]) => response(set, one)),
  );
  drawDetails();
  drawTracks();
}

function prompt(title, text) {
  const about = { class: "prompt", tabindex: "0", role: "group", "aria-label": title, dir: direction(text) };
  return [el("h4", {}, title), el("div", about, ...visible(text))];
}

function legend(shown) {
  const change = now.view.startsWith("change");
  const levels = LEVELS.map((bound, i) => el("mark", { class: `l${i + 1}` }, change ? `+${bound}` : String(bound)));
  const falls = change
    ? LEVELS.slice(1).map((bound, i) => el("mark", { class: `l${i + 2} fallen` }, `−${bound}`))
    : [];
  const text = change ? "change of reverse KL by training, nats from" : "reverse KL, nats from";
  const pen = el("span", {}, "above a token: ", el("span", { class: "pen" }, "what the teacher prefers"));
  const untrained = shown.some(([set, row]) => set.untrained(row) > 0);
  return el(
    "p",
    { class: "legend" },
    now.set.teachers.length ? text : "No teacher has scored this rollout: no token is marked.",
    ...(now.set.teachers.length ? [...falls.reverse(), ...levels, pen] : []),
    untrained && el("span", { class: "untrained" }, "not written by the student, not trained on"),
  );
}

function response(set, row) {
  const marks = set === now.set ? now.marks : set.marks(`${now.teacher} before`);
  const measured = set.measured(set === now.set ? now.key : `${now.teacher} before`).get(row);
  const base = now.tokens.length;
  const trained = set.array("trained");
  const nodes = set.span(row).flatMap((i, k) => {
    now.tokens.push({ set, row, i, marks });
    const changes = k === 0 ? !trained[i] : trained[i] !== trained[i - 1];
    const word = changes && el("span", { class: "unseen" }, trained[i] ? " (trained on:) " : " (not trained on:) ");
    return [...(word ? [word] : []), tokenNode(set, marks, i, base + k)];
  });
  const untrained = set.untrained(row);
  const title = set.raw.phase ? `Response, ${set.raw.phase} training` : "Response";
  const facts = [
    verdict(row.right),
    row.answer !== null && el("span", {}, "answer ", el("bdi", { class: "mono" }, line(row.answer))),
    el("span", {}, `${number(row.length)} tokens`),
    untrained > 0 && el("span", {}, `${number(row.length - untrained)} of them trained on`),
    el("span", {}, { stop: "stopped", length: "✂ cut at the limit" }[row.finish] ?? "other end"),
    row.source && el("span", {}, el("bdi", {}, line(row.source))),
    measured && el("span", {}, `mean ${fixed(measured.mean, 3)} nats, worst ${fixed(measured.worst, 2)}`),
  ];
  return [
    el("h4", {}, title),
    el("p", { class: "facts" }, ...facts),
    el("canvas", { class: "track", "aria-hidden": "true", "data-set": set.index }),
    el(
      "div",
      {
        class: "response",
        tabindex: "0",
        role: "group",
        "aria-label": `${title}, token by token`,
        dir: direction(set.text(row)),
      },
      ...nodes,
    ),
  ];
}

function drawTracks() {
  for (const canvas of document.querySelectorAll(".track")) {
    const first = now.tokens.find(({ set }) => String(set.index) === canvas.dataset.set);
    const current = now.tokens[now.current];
    drawStrip(canvas, first.row, first.marks, current?.set === first.set ? current.i : null);
  }
}
