// The document: sets of rollouts, decoded when they are asked for. pipeline/report/collect.py describes it.

const UNTOLD = 65535;
/** Reverse KL (nats) from which a token is marked at levels 1 to 5. */
const LEVELS = [0.03, 0.1, 0.3, 1, 3];
const MARKED = 2; // levels from here on are stops of n and p, and are told to a screen reader
const levelOf = (kl) => LEVELS.filter((bound) => Math.abs(kl) >= bound).length;

const logprob = (array, i) => (array === null || array[i] === UNTOLD ? null : -array[i] / 1000);
const positive = (array, i) => (array === null || array[i] === UNTOLD ? null : array[i] / 1000);

/** A set of rollouts; arrays are decoded when they are first asked for. */
class RolloutSet {
  constructor(raw, index) {
    Object.assign(this, { raw, index, rows: raw.rows, pieces: raw.pieces, readers: raw.readers });
    this.byNumber = new Map(raw.rows.map((row) => [row.number, row]));
    /** The array at a path into the document, as "readers/0/kl"; null where there is none. */
    this.array = memo((path) => {
      const value = path.split("/").reduce((at, key) => at?.[key], raw);
      if (value === null || value === undefined) return null;
      const decode = {
        trained: bytes,
        tokens: u32,
        "candidates/at": u32,
        "candidates/start": u32,
        "candidates/piece": u32,
      };
      return (decode[path] ?? u16)(value);
    });
    /** By "INDEX-OF-TEACHER VIEW": what tokens are marked by; of each row its mean, total and worst token. */
    this.marks = memo((key) => this.#marks(...key.split(" ")));
    this.measured = memo((key) => new Map(this.rows.map((row) => [row, this.#measure(row, key)])));
    this.text = memo((row) => this.pieceTexts(row).join(""));
    /** What is searched for a text. */
    this.haystack = memo((row) =>
      [row.prompt, row.answer ?? "", this.text(row), `#${row.number}`].join("\n").toLowerCase(),
    );
  }
  span(row) {
    return Array.from({ length: row.length }, (_, i) => row.start + i);
  }
  pieceTexts(row) {
    return this.span(row).map((i) => this.piece(i));
  }
  id(i) {
    return this.pieces[this.array("tokens")[i]][0];
  }
  piece(i) {
    return this.pieces[this.array("tokens")[i]][1];
  }

  /** Nats [T], NaN where nothing is told: KL before, after a training, or the change. */
  #marks(teacher, view) {
    const before = this.array(`readers/${teacher}/kl`);
    const trained = this.array("trained");
    const [kind, run] = view.split(":");
    const after = kind === "before" ? null : this.array(`after/${run}/kl/${this.readers[teacher]?.name}`);
    return Float32Array.from(trained, (counts, i) => {
      const old = positive(before, i);
      const kl = kind === "before" ? old : positive(after, i);
      if (!counts || old === null || kl === null) return NaN;
      return kind === "change" ? kl - old : kl;
    });
  }

  /** Mean, total, and worst token of a row under marks; null where no token is told. */
  #measure(row, key) {
    const marks = this.marks(key);
    let [total, told, worst, at] = [0, 0, 0, null];
    for (let i = row.start; i < row.start + row.length; i++) {
      if (Number.isNaN(marks[i])) continue;
      total += marks[i];
      told += 1;
      if (at === null || Math.abs(marks[i]) > Math.abs(worst)) [worst, at] = [marks[i], i];
    }
    return told ? { total, mean: total / told, worst, at } : null;
  }

  /** Candidates of a token with log-probs of student and readers, the token first; empty where none are stored. */
  candidates(i) {
    const at = this.array("candidates/at");
    if (at === null) return [];
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
        text: this.raw.labels[this.array("candidates/piece")[c]],
        student: logprob(this.array("candidates/student"), c),
        readers: this.readers.map((_, r) => logprob(this.array(`candidates/readers/${r}`), c)),
      };
    });
  }

  /** What a teacher would rather have written; null where that is the token itself, or one that it did not tell of. */
  preferred(i, teacher) {
    const [own, ...others] = this.candidates(i);
    if (!own) return null;
    const p = (candidate) => Math.exp(candidate.readers[teacher] ?? -Infinity);
    const best = others.reduce((a, b) => (p(b) > p(a) ? b : a), own);
    const told = others.reduce((sum, candidate) => sum + p(candidate), p(own));
    return best === own || p(best) < 1 - told ? null : best.text;
  }
}
