// What is shown, and its part in the address.

const report = JSON.parse($("document").textContent);
const sets = report.sets.map((raw, index) => new RolloutSet(raw, index)).filter((set) => set.rows.length);

/** What is shown, as in the address. All are strings; "" is the default. */
const START = {
  set: "",
  teacher: "",
  view: "",
  q: "",
  right: "",
  finish: "",
  source: "",
  sort: "",
  rollout: "",
  token: "",
};
const state = { ...START };
const FILTERS = ["set", "teacher", "view", "q", "right", "finish", "source", "sort"];

/** Derived from the state: set, teacher (its index), marks, measured, found (rows), row and tokens that are open. */
const now = {};

function derive() {
  now.set = sets.find((set) => String(set.index) === state.set) ?? sets[0];
  now.teacher = Math.max(
    0,
    now.set.teachers.findIndex((teacher) => teacher.name === state.teacher),
  );
  const views = viewsOf(now.set).map(([value]) => value);
  now.view = views.includes(state.view) ? state.view : "before";
  now.key = `${now.teacher} ${now.view}`;
  now.marks = now.set.marks(now.key);
  now.measured = now.set.measured(now.key);
}

const viewsOf = (set) => [
  ["before", "reverse KL" + (set.raw.after.length ? ", before training" : "")],
  ...set.raw.after.flatMap((after, i) => [
    [`after:${i}`, `after ${after.run}`],
    [`change:${i}`, `change by ${after.run}`],
  ]),
];

/** To sort by: rollouts without scores come last. */
const size = (row, figure) => {
  const measured = now.measured.get(row);
  return measured ? Math.abs(measured[figure]) : -1;
};

const ORDERS = {
  "": ["most informative", null],
  worst: ["worst token", (row) => -size(row, "worst")],
  mean: ["mean KL", (row) => -size(row, "mean")],
  total: ["total KL", (row) => -size(row, "total")],
  length: ["length", (row) => -row.length],
  number: ["number", (row) => row.number],
};

function find() {
  const words = state.q.toLowerCase();
  const right = { right: true, wrong: false, unknown: null }[state.right];
  now.found = now.set.rows.filter(
    (row) =>
      (right === undefined || row.right === right) &&
      (!state.finish || row.finish === state.finish) &&
      (!state.source || row.source === state.source) &&
      (!words || now.set.haystack(row).includes(words)),
  );
  const order = ORDERS[state.sort]?.[1];
  if (order) {
    const keys = new Map(now.found.map((row) => [row, order(row)]));
    now.found.sort((a, b) => keys.get(a) - keys.get(b));
  }
}

/** Build the texts to search while the browser is idle, so that the first search is fast. */
function prepareSearch(set) {
  const rows = set.rows.values();
  const idle = window.requestIdleCallback ?? ((work) => setTimeout(() => work({ timeRemaining: () => 8 }), 20));
  idle(function work(deadline) {
    let row;
    do {
      row = rows.next().value;
      if (!row) return;
      set.haystack(row);
    } while (deadline.timeRemaining() > 1);
    idle(work);
  });
}

/** Put the state into the address; `method` is of history. A page inside another one may have none to change. */
function setAddress(method) {
  const changed = Object.entries(state).filter(([, value]) => value !== "");
  const hash = changed.length ? `#${new URLSearchParams(changed)}` : "";
  if (hash === location.hash) return;
  try {
    history[method](null, "", hash || location.pathname + location.search);
  } catch (error) {
    if (error.name !== "SecurityError") throw error;
  }
}
const writeAddress = later(150, () => setAddress("replaceState")); // browsers refuse hundreds of changes a minute

/** Read the state from the address. `seek` is the id of a token, to be shown where its KL is highest. */
function readAddress() {
  const address = new URLSearchParams(location.hash.slice(1));
  if (location.hash.length > 1 && ![...address.keys()].some((key) => key in START)) return false;
  for (const key in START) state[key] = address.get(key) ?? "";
  derive();
  const row = state.rollout === "" ? undefined : now.set.byNumber.get(Number(state.rollout));
  if (row) state.rollout = String(row.number); // of several identical ones, the one that is shown
  if (address.has("seek") && row) {
    const places = now.set.span(row).filter((i) => now.set.id(i) === Number(address.get("seek")) && now.marks[i] >= 0);
    now.sought = places.reduce((a, b) => (now.marks[b] > now.marks[a] ? b : a), places[0]);
  }
  return true;
}
