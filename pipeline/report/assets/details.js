// The current token: scores by each model, and its candidates.

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
      !trained && el("span", {}, "not trained on: in no figure"),
    ),
    scoreTable(set, i),
    candidateTable(set, i),
  );
}

/** The tokens of the open rollout that are marked most, to go to. */
function worstTokens() {
  const marked = now.tokens.map(({ marks, i }, at) => [at, marks[i]]).filter(([, kl]) => levelOf(kl) >= MARKED);
  if (!marked.length)
    return [el("p", { class: "empty" }, "No token is marked. Point at one to see its scores.")];
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
      "Point at a token to see its scores; ",
      el("kbd", {}, "n"),
      " goes to the next mark.",
    ),
  ];
}

/** Each model's probability of the token and its entropy, and the reverse KL to each teacher. */
function scoreTable(set, i) {
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
      positive(set.array(`after/${a}/kl/${set.teachers[now.teacher]?.name}`), i),
    ),
  );
  const teachers = set.teachers.map((teacher, t) =>
    line(
      teacher.name,
      teacher.label,
      set.array(`teachers/${t}/logprob`),
      set.array(`teachers/${t}/entropy`),
      positive(set.array(`teachers/${t}/kl`), i),
    ),
  );
  const student = set.raw.student;
  return el(
    "table",
    { class: "scores" },
    el("caption", { class: "unseen" }, "Scores of the token by each model"),
    el(
      "thead",
      {},
      el("tr", {}, ...["model", "p", "log p", "entropy", "KL"].map((title) => el("th", { scope: "col" }, title))),
    ),
    el(
      "tbody",
      {},
      line("student", student.label, set.array("student/logprob"), set.array("student/entropy"), null),
      ...after,
      ...teachers,
    ),
  );
}

function candidateTable(set, i) {
  const candidates = set.candidates(i);
  if (!candidates.length)
    return el("p", { class: "facts" }, set.teachers.length ? "This report leaves out its candidates, for its size." : "");
  const bar = (lp) => {
    const p = lp === null ? null : Math.exp(lp);
    const cell = el("td", { class: "bar" }, p === null ? "missing" : percent(p));
    cell.style.setProperty("--p", p ?? 0);
    return cell;
  };
  const names = ["student", ...set.teachers.map((teacher) => teacher.name)];
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
            candidate === candidates[0] ? { class: "own", title: "the sampled token" } : {},
            el(
              "th",
              { scope: "row" },
              el("bdi", {}, label(candidate.text)),
              candidate === candidates[0] && el("span", { class: "unseen" }, " (sampled)"),
            ),
            bar(candidate.student),
            ...candidate.teachers.map(bar),
          ),
        ),
    ),
  );
}
const peak = (candidate) => Math.max(...[candidate.student, ...candidate.teachers].map((lp) => lp ?? -Infinity));
