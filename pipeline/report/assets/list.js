// The list of rollouts, each with its line of reverse KL.

let palette = null; // of the style sheet, for what is drawn on a canvas
const colours = () => {
  const style = getComputedStyle(document.documentElement);
  palette ??= ["rule", "fallen", "accent", "ink-1", "ink-2", "ink-3", "ink-4", "ink-5"].map((name) =>
    style.getPropertyValue(`--${name}`),
  );
  return palette;
};
const strength = (kl) => Math.min(1, Math.max(0, Math.log(Math.abs(kl) / 0.01) / Math.log(10 / 0.01)));

const scaleOf = (row, width) => Math.min(width / row.length, 8); // pixels a token

/** The line of KL along a rollout: the highest of each column, its height and colour on a logarithmic scale. */
function drawStrip(canvas, row, marks, current = null) {
  const [width, height, ratio] = [canvas.clientWidth, canvas.clientHeight, devicePixelRatio || 1];
  if (!width) return;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  const [rule, fallen, accent, ...levels] = colours();
  const scale = scaleOf(row, width);
  const each = Math.max(1, Math.ceil(2 / scale)); // tokens a column
  pen.fillStyle = rule;
  pen.fillRect(0, height - 1, scale * row.length, 1);
  for (let from = 0; from < row.length; from += each) {
    let worst = 0;
    for (let i = from; i < Math.min(from + each, row.length); i++) {
      const kl = marks[row.start + i];
      if (Math.abs(kl) > Math.abs(worst)) worst = kl;
    }
    const level = levelOf(worst);
    if (!level) continue;
    const tall = 2 + strength(worst) * (height - 2);
    pen.fillStyle = worst < 0 ? fallen : levels[level - 1];
    pen.fillRect(from * scale, height - tall, Math.max(each * scale - (each * scale > 4 ? 1 : 0), 1), tall);
  }
  if (current === null) return;
  pen.fillStyle = accent;
  pen.fillRect((current - row.start + 0.5) * scale - 1, 0, 2, height);
}

const ROW = 78; // pixels, as in the style sheet

const verdict = (right) =>
  right === null ? null : el("span", { class: right ? "right" : "wrong" }, right ? "✓ right" : "✗ wrong");

/** Which rollouts are identical to the one that is shown, itself included. */
const copiesTitle = (copies) => {
  const more = copies.length > 20 ? `, and ${copies.length - 20} more` : "";
  return `${copies.length} identical rollouts: ${copies.slice(0, 20).map((n) => `#${n}`).join(", ")}${more}`;
};

/** A few tokens around the one at `at`, which is marked. */
function excerpt(row, at) {
  const between = (from, to) => {
    let text = "";
    for (let i = Math.max(from, row.start); i < Math.min(to, row.start + row.length); i++) text += now.set.piece(i);
    const letters = [...line(text)];
    return el("bdi", {}, to === at && letters.length > 15 ? `…${letters.slice(-14).join("")}` : letters.join(""));
  };
  if (at === null) return [between(row.start, row.start + 40)];
  const preferred = now.set.preferred(at, now.teacher);
  return [
    between(at - 12, at),
    el("mark", { class: markClass(now.marks[at]) }, el("bdi", {}, label(now.set.piece(at)))),
    preferred !== null && el("span", { class: "pen" }, el("bdi", {}, label(preferred))),
    between(at + 1, at + 24),
  ];
}

function listItem(row, i) {
  const measured = now.measured.get(row);
  const copies = now.set.copies.get(row.number);
  const item = el(
    "div",
    {
      class: "item",
      role: "option",
      id: `row-${row.number}`,
      "data-number": row.number,
      "aria-setsize": now.found.length,
      "aria-posinset": i + 1,
    },
    el(
      "div",
      { class: "meta" },
      el("b", {}, `#${row.number}`),
      copies.length > 1 && el("span", { class: "copies", title: copiesTitle(copies) }, `×${copies.length}`),
      verdict(row.right),
      row.finish !== "stop" && el("span", { class: "cut" }, row.finish === "length" ? "✂ cut" : "other end"),
      row.source && el("span", { class: "source" }, el("bdi", {}, line(row.source))),
      measured &&
        el(
          "span",
          { class: "worst", title: "worst token, nats" },
          el("span", { class: "unseen" }, "worst "),
          now.view.startsWith("change") ? signed(measured.worst, 2) : measured.worst.toFixed(2),
        ),
      measured && el("span", { class: "mean", title: "mean, nats per token" }, `mean ${meanOf(row)}`),
    ),
    el("div", { class: "excerpt", dir: "ltr" }, ...excerpt(row, measured?.at ?? null)),
    el("canvas", { "aria-hidden": "true" }),
  );
  item.style.transform = `translateY(${i * ROW}px)`;
  return item;
}

const meanOf = (row) => {
  const measured = now.measured.get(row);
  if (now.view.startsWith("change")) return signed(measured.mean, 3);
  const exact = now.view === "before" ? row.kl[now.set.teachers[now.teacher].name] : null;
  return (exact ?? measured.mean).toFixed(3);
};

let drawn = "";
/** Put the rows that can be seen, and a few around them, into the list. */
function drawList(force = false) {
  const scroll = $("scroll");
  const first = Math.max(0, Math.floor(scroll.scrollTop / ROW) - 3);
  const last = Math.min(now.found.length, Math.ceil((scroll.scrollTop + scroll.clientHeight) / ROW) + 3);
  const range = `${first} ${last}`;
  if (force || range !== drawn) fillList(first, last);
  drawn = range;
  for (const item of $("list").children) item.setAttribute("aria-selected", item.dataset.number === state.rollout);
  const chosen = $(`row-${state.rollout}`);
  if (chosen) scroll.setAttribute("aria-activedescendant", chosen.id);
  else scroll.removeAttribute("aria-activedescendant");
}

function fillList(first, last) {
  $("list").style.height = `${now.found.length * ROW}px`;
  const items = now.found.slice(first, last).map((row, i) => listItem(row, first + i));
  $("list").replaceChildren(...items);
  items.forEach((item, i) => drawStrip(item.lastChild, now.found[first + i], now.marks));
}

function showInList() {
  const at = now.found.findIndex((row) => String(row.number) === state.rollout);
  const scroll = $("scroll");
  if (at < 0) return;
  if (at * ROW < scroll.scrollTop) scroll.scrollTop = at * ROW;
  else if ((at + 1) * ROW > scroll.scrollTop + scroll.clientHeight)
    scroll.scrollTop = (at + 1) * ROW - scroll.clientHeight;
}

function drawCount() {
  const { raw } = now.set;
  const of = raw.n_shown < raw.n_total ? ` (of ${number(raw.n_total)} in the set)` : "";
  const found = now.found.reduce((sum, row) => sum + now.set.copies.get(row.number).length, 0);
  const distinct = now.found.length < found ? `, ${number(now.found.length)} distinct` : "";
  $("count").textContent = found
    ? `${number(found)} of ${number(raw.n_shown)} rollouts${of}${distinct}`
    : "No rollout matches";
}
