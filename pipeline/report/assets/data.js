// The document: sets of rollouts, decoded when they are asked for. pipeline/report/document.py describes it.

const MISSING = 65535;
/** Reverse KL (nats) from which a token is marked at levels 1 to 5. */
const LEVELS = [0.03, 0.1, 0.3, 1, 3];
const MARKED = 2; // levels from here on are stops of n and p, and are read out by a screen reader
const levelOf = (kl) => LEVELS.filter((bound) => Math.abs(kl) >= bound).length;

const logprob = (array, i) => (array === null || array[i] === MISSING ? null : -array[i] / 1000);
const positive = (array, i) => (array === null || array[i] === MISSING ? null : array[i] / 1000);

/** A set of rollouts; arrays are decoded when they are first asked for. */
class RolloutSet {
  constructor(raw, index) {
    // Rollouts that repeat an earlier one are shown with it.
    const rows = raw.rows.filter((row) => row.same_as === null);
    Object.assign(this, { raw, index, rows, strings: raw.strings, teachers: raw.teachers });
    this.copies = new Map(rows.map((row) => [row.number, [row.number]]));
    for (const row of raw.rows) if (row.same_as !== null) this.copies.get(row.same_as).push(row.number);
    const byNumber = new Map(rows.map((row) => [row.number, row]));
    this.byNumber = new Map(raw.rows.map((row) => [row.number, byNumber.get(row.same_as ?? row.number)]));
    /** The array at a path into the document, as "teachers/0/kl"; null if there is none. */
    this.array = memo((path) => {
      const value = path.split("/").reduce((at, key) => at?.[key], raw);
      if (value === null || value === undefined) return null;
      const decode = {
        trained: bytes,
        tokens: u32,
        "candidates/at": u32,
        "candidates/start": u32,
        "candidates/label": u32,
      };
      return (decode[path] ?? u16)(value);
    });
    /** By "INDEX-OF-TEACHER VIEW": what tokens are marked by; of each row its mean, total and worst token. */
    this.marks = memo((key) => this.#marks(...key.split(" ")));
    this.measured = memo((key) => new Map(this.rows.map((row) => [row, this.#measure(row, key)])));
    this.text = memo((row) => this.pieceTexts(row).join(""));
    /** What is searched for a text. */
    this.haystack = memo((row) =>
      [row.prompt, row.answer ?? "", this.text(row), ...this.copies.get(row.number).map((n) => `#${n}`)].join("\n").toLowerCase(),
    );
  }
  span(row) {
    return Array.from({ length: row.length }, (_, i) => row.start + i);
  }
  /** Tokens of a row that the student did not write, such as results of tools. */
  untrained(row) {
    const trained = this.array("trained");
    return this.span(row).filter((i) => !trained[i]).length;
  }
  pieceTexts(row) {
    return this.span(row).map((i) => this.piece(i));
  }
  id(i) {
    return this.strings[this.array("tokens")[i]][0];
  }
  piece(i) {
    return this.strings[this.array("tokens")[i]][1];
  }

  /** Nats [T], NaN if missing: KL before, after a training, or the change. */
  #marks(teacher, view) {
    const before = this.array(`teachers/${teacher}/kl`);
    const trained = this.array("trained");
    const [kind, run] = view.split(":");
    const after = kind === "before" ? null : this.array(`after/${run}/kl/${this.teachers[teacher]?.name}`);
    return Float32Array.from(trained, (counts, i) => {
      const old = positive(before, i);
      const kl = kind === "before" ? old : positive(after, i);
      if (!counts || old === null || kl === null) return NaN;
      return kind === "change" ? kl - old : kl;
    });
  }

  /** Mean, total, and worst token of a row under marks; null if no token is scored. */
  #measure(row, key) {
    const marks = this.marks(key);
    let [total, scored, worst, at] = [0, 0, 0, null];
    for (let i = row.start; i < row.start + row.length; i++) {
      if (Number.isNaN(marks[i])) continue;
      total += marks[i];
      scored += 1;
      if (at === null || Math.abs(marks[i]) > Math.abs(worst)) [worst, at] = [marks[i], i];
    }
    return scored ? { total, mean: total / scored, worst, at } : null;
  }

  /** Candidates of a token with log-probs of student and teachers, the token first; empty if none are stored. */
  candidates(i) {
    const at = this.array("candidates/at");
    let [low, high] = [0, at.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (at[middle] < i) low = middle + 1;
      else high = middle;
    }
    if (at[low] !== i) return [];
    const start = this.array("candidates/start");
    return Array.from({ length: start[low + 1] - start[low] }, (_, k) => {
      const c = start[low] + k;
      return {
        text: this.raw.labels[this.array("candidates/label")[c]],
        student: logprob(this.array("candidates/student"), c),
        teachers: this.teachers.map((_, t) => logprob(this.array(`candidates/teachers/${t}`), c)),
      };
    });
  }

  /** The token that a teacher prefers; null if that is the token itself, or may be one without a score. */
  preferred(i, teacher) {
    const [own, ...others] = this.candidates(i);
    if (!own) return null;
    const p = (candidate) => Math.exp(candidate.teachers[teacher] ?? -Infinity);
    const best = others.reduce((a, b) => (p(b) > p(a) ? b : a), own);
    const known = others.reduce((sum, candidate) => sum + p(candidate), p(own));
    return best === own || p(best) < 1 - known ? null : best.text;
  }
}
