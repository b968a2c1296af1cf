// The current token: what each model thinks of it.

/** Make the token at `at` of the open rollout the current one (null: none). */
function choose(at, { focus = false, speak = false } = {}) {
  document.querySelector(".t.current")?.classList.remove("current");
  now.current = at;
  state.token = at === null ? "" : String(at);
  const node = at === null ? null : document.querySelector(`.t[data-at="${at}"]`);
  if (node) {
    node.classList.add("current");
    const response = node.closest(".response");
    if (focus && document.activeElement !== response) response.focus({ preventScroll: true });
    drawDetails();
    keepInSight(node);
    if (speak) {
      const { set, i, marks } = now.tokens[at];
      $("spoken").textContent = `${label(set.piece(i))}, ${inWords(marks[i], set.preferred(i, now.teacher))}`;
    }
  } else drawDetails();
  drawTracks();
  writeAddress();
}

/** Scroll no more than it takes, and never under the sheet of a small screen. */
function keepInSight(node) {
  const sheet = getComputedStyle($("details")).position === "fixed" ? $("details").offsetHeight : 0;
  node.style.scrollMarginBlock = `3.5rem ${sheet + 24}px`;
  node.scrollIntoView({ block: "nearest" });
}

function drawDetails(at = now.current) {
  const details = $("details");
  const token = at == null ? undefined : now.tokens[at];
  document.body.classList.toggle("detailed", token !== undefined);
  if (!token) {
    return details.replaceChildren(...(now.row ? worstTokens() : []));
  }
  const { set, row, i, marks } = token;
  const kl = marks[i];
  const close = el(
    "button",
    { type: "button", class: "close", "data-do": "close", "aria-label": "close the token" },
    "✕",
  );
  const preferred = set.preferred(i, now.teacher);
  const trained = set.array("trained")[i];
  details.replaceChildren(
    el(
      "header",
      {},
      el("h3", {}, el("mark", { class: `token ${markClass(kl)}` }, el("bdi", {}, label(set.piece(i))))),
      preferred !== null && el("span", { class: "pen" }, "→ ", el("bdi", {}, label(preferred))),
      close,
    ),
    el(
      "p",
      { class: "facts" },
      el("span", {}, `id ${set.id(i)}`),
      el("span", {}, `position ${i - row.start}`),
      !trained && el("span", {}, "not trained on, counts nowhere"),
    ),
    readings(set, i),
    candidateTable(set, i),
  );
}

/** The tokens of the open rollout that are marked most, to go to. */
function worstTokens() {
  const marked = now.tokens.map(({ marks, i }, at) => [at, marks[i]]).filter(([, kl]) => levelOf(kl) >= MARKED);
  if (!marked.length)
    return [el("p", { class: "empty" }, "No token is marked. Point at one to see what the models think of it.")];
  const worst = marked.sort(([, a], [, b]) => Math.abs(b) - Math.abs(a)).slice(0, 12);
  return [
    el("h3", { class: "lead" }, "Marked most"),
    el(
      "ol",
      { class: "worst-tokens" },
      ...worst.map(([at, kl]) => {
        const { set, i } = now.tokens[at];
        const preferred = set.preferred(i, now.teacher);
        return el(
          "li",
          {},
          el(
            "button",
            { type: "button", "data-token": at },
            el("mark", { class: `token ${markClass(kl)}` }, el("bdi", {}, label(set.piece(i)))),
            preferred !== null && el("span", { class: "pen" }, "→ ", el("bdi", {}, label(preferred))),
            el("span", { class: "amount" }, now.view.startsWith("change") ? signed(kl, 2) : kl.toFixed(2)),
          ),
        );
      }),
    ),
    el(
      "p",
      { class: "hint" },
      "Point at a token to see what the models think of it; ",
      el("kbd", {}, "n"),
      " goes to the next mark.",
    ),
  ];
}

/** Each reader's probability of the token, its entropy, and the reverse KL to each teacher. */
function readings(set, i) {
  const line = (name, title, array, entropy, kl) => {
    const lp = logprob(array, i);
    return el(
      "tr",
      { title },
      el("th", { scope: "row" }, el("bdi", {}, name)),
      el("td", {}, lp === null ? "" : percent(Math.exp(lp))),
      el("td", {}, lp === null ? "" : fixed(lp, 3)),
      el("td", {}, nats(positive(entropy, i))),
      el("td", { class: "kl" }, nats(kl)),
    );
  };
  const after = set.raw.after.map((one, a) =>
    line(
      `after ${one.run}`,
      `the student trained by ${one.run}`,
      set.array(`after/${a}/logprob`),
      set.array(`after/${a}/entropy`),
      positive(set.array(`after/${a}/kl/${set.readers[now.teacher]?.name}`), i),
    ),
  );
  const teachers = set.readers.map((reader, r) =>
    line(
      reader.name,
      reader.label,
      set.array(`readers/${r}/logprob`),
      set.array(`readers/${r}/entropy`),
      positive(set.array(`readers/${r}/kl`), i),
    ),
  );
  const student = set.raw.student;
  return el(
    "table",
    { class: "readings" },
    el("caption", { class: "unseen" }, "What each model thinks of the token"),
    el(
      "thead",
      {},
      el("tr", {}, ...["model", "p", "log p", "entropy", "KL"].map((title) => el("th", { scope: "col" }, title))),
    ),
    el(
      "tbody",
      {},
      line("student", student?.label ?? "", set.array("student/logprob"), set.array("student/entropy"), null),
      ...after,
      ...teachers,
    ),
  );
}

function candidateTable(set, i) {
  const candidates = set.candidates(i);
  if (!candidates.length)
    return el("p", { class: "facts" }, set.readers.length ? "Its candidates are not kept in this report." : "");
  const bar = (lp) => {
    const p = lp === null ? null : Math.exp(lp);
    const cell = el("td", { class: "bar" }, p === null ? "not told" : percent(p));
    cell.style.setProperty("--p", p ?? 0);
    return cell;
  };
  const names = ["student", ...set.readers.map((reader) => reader.name)];
  const likely = [...candidates].sort((a, b) => peak(b) - peak(a));
  return el(
    "table",
    { class: "candidates" },
    el("caption", {}, "Candidates"),
    el(
      "thead",
      {},
      el(
        "tr",
        {},
        el("th", { scope: "col" }, "token"),
        ...names.map((name) => el("th", { scope: "col" }, el("bdi", {}, name))),
      ),
    ),
    el(
      "tbody",
      {},
      ...likely
        .slice(0, 12)
        .map((candidate) =>
          el(
            "tr",
            candidate === candidates[0] ? { class: "own", title: "the student's choice" } : {},
            el(
              "th",
              { scope: "row" },
              el("bdi", {}, label(candidate.text)),
              candidate === candidates[0] && el("span", { class: "unseen" }, " (written)"),
            ),
            bar(candidate.student),
            ...candidate.readers.map(bar),
          ),
        ),
    ),
  );
}
const peak = (candidate) => Math.max(...[candidate.student, ...candidate.readers].map((lp) => lp ?? -Infinity));
