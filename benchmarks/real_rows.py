"""The rows of `benchmarks/real.py`: each runs redpen's commands on real models, and renders its part of the page."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import real_data as data
import real_plan
import tomlkit
import trl_trainer
from toy_lab import Results, curve, redpen, sampled
from trl_trainer import TrlRun

#: Prompts of a round, two rollouts each; held-out problems, and sums; tokens of a response.
PROMPTS, HELD_OUT, SUMS, LIMIT = 96, 96, 64, 256
Figures = dict[str, Any]


@dataclass(frozen=True)
class Lab:
    """What a row works with.

    Attributes:
        work: directory of caches, runs and figures.
        models: directory or Hub id of `student`, `teacher` and `small`.
        engine: "transformers" or "vllm", for rollouts.
        quick: a few prompts and steps, to try whether everything runs.
    """

    work: Path
    models: dict[str, str]
    engine: str
    quick: bool

    def count(self, full: int) -> int:
        return max(2, full // 16) if self.quick else full

    def tokens(self, full: int) -> int:
        return full // 4 if self.quick else full

    def recipe(self, path: Path, **sections: dict[str, Any]) -> Path:
        path.write_text(tomlkit.dumps(sections))
        return path

    def command(
        self, directory: Path, name: str, *args: object, settings: Sequence[str] = (), codes: Sequence[int] = (0,)
    ) -> Figures:
        """A command of redpen, once: `seconds`, `cpu_seconds`, `gb`, its `output`, and whether it was `continued`.

        What ended before is read from `directory`. A command that was cut is continued, and its seconds are then
        those of the last attempt.
        """
        return self.once(directory, name, lambda: asdict(redpen(*args, settings=settings, codes=codes)))

    def once(self, directory: Path, name: str, measure: Callable[[], Figures]) -> Figures:
        started = directory / f"{name}.started"

        def measured_once() -> Figures:
            continued = started.exists()
            started.touch()
            cost = measure()
            return cost | {"gb": cost["anonymous"] / 1e9, "continued": continued}

        directory.mkdir(parents=True, exist_ok=True)
        cost: Figures = Results(directory / "commands.json").get(name, measured_once)
        return cost

    def rates(self, directory: Path) -> Figures:
        """What `redpen plan` is given, measured when the row began."""
        rates: Figures = Results(directory / "rates.json").get("rates", real_plan.rates)
        return rates

    def evaluated(self, out: Path, recipe: Path, model: str, *settings: str, teacher: str | None = None) -> Figures:
        """`redpen eval MODEL` into a file, once."""
        to = ("--teacher", teacher) if teacher else ()
        arguments = ("eval", model, "--recipe", recipe, "--out", out, *to)
        self.command(out.parent, out.stem, *arguments, settings=settings)
        figures: Figures = json.loads(out.read_text())["model"]
        return figures


@dataclass(frozen=True)
class Row:
    """An experiment.

    Attributes:
        needs: roles of the models.
        measure: its figures for one seed, in a directory of that seed.
        render: Markdown from the figures by seed.
        directory: name of another row whose directory is this one's too, or None.
        packages: beside redpen's own, as they are imported.
    """

    title: str
    needs: tuple[str, ...]
    measure: Callable[[Lab, Path, int], Figures]
    render: Callable[[dict[int, Figures]], str]
    seeds: int | None = None
    directory: str | None = None
    packages: tuple[str, ...] = ()


def stages(lab: Lab, recipe: Path, directory: Path, settings: Sequence[str] = ()) -> dict[str, Figures]:
    """`rollouts`, `score` and `train` in processes of their own, into `cache.zarr` and `run`: the cost of each."""
    cache, run = directory / "cache.zarr", directory / "run"
    at = {name: (name, recipe, "--cache", cache) for name in ("rollouts", "score")}
    at["train"] = ("train", recipe, "--cache", cache, "--run", run)
    return {name: lab.command(directory, name, *args, settings=settings) for name, args in at.items()}


def planned(
    lab: Lab, directory: Path, recipe: Path, costs: Iterable[Figures], run: Path, settings: Sequence[str] = ()
) -> Figures:
    """The first round's steps beside `redpen plan`; `costs` are of the commands that sampled and scored it."""
    output = "".join(cost["output"] for cost in costs)
    return {"plan": real_plan.beside(lab.rates(directory), recipe, settings, directory / "cache.zarr", output, run)}


def of_run(run: Path) -> dict[str, Figures]:
    """What `redpen eval RUN` wrote, before and after."""
    figures: dict[str, Figures] = json.loads((run / "eval.json").read_text())
    return {name: figures[name] for name in ("before", "after")}


# ------------------------------------------------------------------------------------------------------------ format


def percent(estimate: Figures) -> str:
    return f"{100 * estimate['value']:.1f} % ({100 * estimate['low']:.0f} to {100 * estimate['high']:.0f})"


def nats(estimate: Figures) -> str:
    interval = "" if estimate["low"] is None else f" ({estimate['low']:.3f} to {estimate['high']:.3f})"
    return f"{estimate['value']:.3f}{interval}"


MEASURES: dict[str, Callable[[Figures], str]] = {
    "accuracy, greedy": lambda f: percent(f["greedy"]),
    "accuracy, sampled": lambda f: percent(f["sampled"]),
    "reverse KL on fresh rollouts, nats a token": lambda f: nats(f["reverse_kl"]),
    "mean response, tokens": lambda f: f"{f['response_tokens']:.0f}",
    "cut off at the limit": lambda f: f"{100 * f['truncated']:.0f} %",
}


def table(columns: dict[str, Figures], measures: dict[str, Callable[[Figures], str]] = MEASURES) -> str:
    """A line a measure, a column a student."""
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, form in measures.items():
        cells = []
        for figures in columns.values():
            try:
                cells.append(form(figures))
            except KeyError:  # a teacher has no reverse KL to itself
                cells.append("")
        if any(cells):
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def per_seed(runs: dict[int, Figures], render: Callable[[Figures], str]) -> str:
    return "\n\n".join(f"Seed {seed}:\n\n{render(run)}" for seed, run in runs.items())


def listed(values: Sequence[float], form: str) -> str:
    return ", ".join(f"{value:{form}}" for value in values)


# ---------------------------------------------------------------------------------------------------- larger teacher


def pair_recipe(lab: Lab, directory: Path, seed: int, rounds: int, teacher: dict[str, Any] | None = None) -> Path:
    """Of the Qwen pair. With other `rounds` the recipe differs in nothing else, so `redpen distill` goes on."""
    prompts, most = lab.count(PROMPTS), 3
    data.write(directory / "train.jsonl", data.word_problems(most * prompts, 1000 + seed, data.TRAIN_NAMES))
    data.write(lab.work / "held_out.jsonl", data.word_problems(lab.count(HELD_OUT), 1, data.HELD_OUT_NAMES))
    data.write(lab.work / "sums.jsonl", data.bare_sums(lab.count(SUMS), 2))
    return lab.recipe(
        directory / f"recipe-{rounds}.toml",
        student={"model": lab.models["student"]},
        teacher=teacher or {"model": lab.models["teacher"]},
        prompts={"path": str(directory / "train.jsonl"), "limit": prompts, "template": "chat"},
        rollouts={
            "engine": lab.engine,
            "rollouts_per_prompt": 2,
            "max_response_tokens": lab.tokens(LIMIT),
            "prompts_per_block": 32,
            "batch_size": 64,
            "seed": seed,
        },
        vllm={"enforce_eager": True},
        score={"candidates": 16, "tile_tokens": 2048},
        train={
            "steps": 2 * prompts // 8 or 1,
            "prompts_per_step": 8,
            "learning_rate": 1e-4,
            "lora_rank": 32,
            "seed": seed,
            "stop_reverse_kl": 0,
            "tokens_per_microbatch": 2048,
        },
        distill={"rounds": rounds, "stop_reverse_kl": 0, "patience": most},
        eval={
            "path": str(lab.work / "held_out.jsonl"),
            "match": "number",
            "max_response_tokens": lab.tokens(LIMIT),
            "batch_size": 96,
        },
    )


def of_pair(lab: Lab, directory: Path, recipe: Path, name: str, adapter: Path | None) -> dict[str, Figures]:
    """The student on problems like those of training, and on bare sums; the untrained one is one for all seeds."""
    at = (lab.work if adapter is None else directory) / f"eval-{name.replace(' ', '-')}"
    settings = () if adapter is None else (f"student.adapter={adapter}",)
    of_sums, sums = at.with_name(f"{at.name}-sums.json"), f"eval.path={lab.work / 'sums.jsonl'}"
    student, teacher = lab.models["student"], lab.models["teacher"]
    return {
        name: lab.evaluated(at.with_suffix(".json"), recipe, student, *settings, teacher=teacher),
        f"{name}, sums": lab.evaluated(of_sums, recipe, student, *settings, sums, teacher=teacher),
    }


def larger_teacher(lab: Lab, directory: Path, seed: int) -> Figures:
    """The student before and after one round."""
    recipe, run = pair_recipe(lab, directory, seed, 1), directory / "run"
    cost = lab.command(directory, "one round", "distill", recipe, "--cache", directory / "cache.zarr", "--run", run)
    found = of_pair(lab, directory, recipe, "after one round", run / "rounds" / "00000" / "adapter")
    steps = curve(run / "rounds" / "00000")
    return {
        **found,
        **of_pair(lab, directory, recipe, "before", None),
        **planned(lab, directory, recipe, [cost], run / "rounds" / "00000"),
        "engine": lab.engine,
        "cached": [step["reverse_kl"] for step in steps],
        "ess": min(step["ess"] for step in steps),
        "step": statistics.median(step["time"]["seconds"] for step in steps),
    }


def more_rounds(lab: Lab, directory: Path, seed: int) -> Figures:
    """Two rounds more, from where `larger_teacher` has ended."""
    first = larger_teacher(lab, directory, seed)
    recipe, run = pair_recipe(lab, directory, seed, 3), directory / "run"
    lab.command(directory, "three rounds", "distill", recipe, "--cache", directory / "cache.zarr", "--run", run)
    adapter = run / "rounds" / "00002" / "adapter"
    return first | of_pair(lab, directory, recipe, "after three rounds", adapter)


def rendered_pair(names: Sequence[str]) -> Callable[[dict[int, Figures]], str]:
    """Students as columns, the last of them the one that the summary is about."""

    def render(runs: dict[int, Figures]) -> str:
        gains = [
            100 * (run[names[-1]]["greedy"]["value"] - run["before"]["greedy"]["value"]) for run in runs.values()
        ]
        falls = [
            100 * (1 - run[names[-1]]["reverse_kl"]["value"] / run["before"]["reverse_kl"]["value"])
            for run in runs.values()
        ]
        summary = (
            f"{names[-1].capitalize()}, {listed(gains, '+.1f')} points of greedy accuracy on held-out problems; "
            f"reverse KL on fresh rollouts fell by {listed(falls, '.0f')} %."
        )

        def one(run: Figures) -> str:
            own = table({name: run[name] for name in names})
            other = table({name: run[f"{name}, sums"] for name in names})
            cached = run["cached"]
            return (
                f"Held-out word problems:\n\n{own}\n\n"
                f"Bare sums, of another form than those of training:\n\n{other}\n\n"
                f"In the first round, reverse KL on cached rollouts went from {cached[0]:.3f} to "
                f"{statistics.mean(cached[-5:]):.3f} (mean of the last 5 of {len(cached)} steps), the effective "
                f"sample size to {run['ess']:.2f} at the lowest."
            )

        return f"{summary}\n\n{per_seed(runs, one)}"

    return render


def teacher_alone(lab: Lab, directory: Path, seed: int) -> Figures:
    recipe, teacher = pair_recipe(lab, directory, seed, 1), lab.models["teacher"]
    sums = f"eval.path={lab.work / 'sums.jsonl'}"
    return {
        "word problems": lab.evaluated(directory / "eval-teacher.json", recipe, teacher),
        "bare sums": lab.evaluated(directory / "eval-teacher-sums.json", recipe, teacher, sums),
    }


def render_teacher(runs: dict[int, Figures]) -> str:
    return "\n\n".join(table({name: run[name] for name in ("word problems", "bare sums")}) for run in runs.values())


# ---------------------------------------------------------------------------------------------------- the assistant


#: Of SmolLM2's rows.
SMALL_ROLLOUTS = {"rollouts_per_prompt": 2, "prompts_per_block": 32, "batch_size": 64}
SMALL_TRAIN = {
    "lora_rank": 32,
    "learning_rate": 2e-4,
    "stop_reverse_kl": 0,
    "tokens_per_microbatch": 1024,
    "gradient_checkpointing": False,
}


def rescue(lab: Lab, directory: Path, seed: int) -> Figures:
    """A company's facts by fine-tuning; following instructions before, after it, and after distillation."""
    base = lab.models["small"]
    data.write(directory / "documents.jsonl", data.documents(seed, lab.count(400)))
    data.write(directory / "chats.jsonl", data.chats(seed, lab.count(300)))
    data.write(lab.work / "knowledge.jsonl", data.knowledge())
    data.write(lab.work / "instructions.jsonl", data.instructions(lab.count(64), 3))
    prompts = [{"prompt": row["prompt"]} for row in data.instructions(lab.count(64), 1000 + seed)]
    data.write(directory / "prompts.jsonl", prompts)
    ifeval_task(lab.work / "tasks", lab.work / "instructions.jsonl")
    recipe = lab.recipe(
        directory / "recipe.toml",
        student={"model": base},
        teacher={"model": base},
        prompts={"path": str(directory / "prompts.jsonl"), "limit": len(prompts), "template": "chat"},
        rollouts=SMALL_ROLLOUTS | {"max_response_tokens": lab.tokens(96), "seed": seed},
        score={"candidates": 16, "tile_tokens": 2048},
        train=SMALL_TRAIN | {"steps": lab.count(8), "prompts_per_step": 16, "seed": seed},
        sft={"steps": lab.count(80), "examples_per_step": 8, "learning_rate": 3e-4, "max_tokens": 256},
        distill={"rounds": 1, "stop_reverse_kl": 0},
        eval={
            "path": str(lab.work / "knowledge.jsonl"),
            "match": "contains",
            "max_response_tokens": lab.tokens(128),
            "batch_size": 64,
            "tasks": ["own_ifeval"],
            "task_path": str(lab.work / "tasks"),
        },
        continual={
            "gate": [
                {
                    "name": "knowledge",
                    "path": str(lab.work / "knowledge.jsonl"),
                    "rise": 0.3,
                    "fall_since_sft": 0.1,
                }
            ]
        },
    )
    run = directory / "run"
    sources = ("--data", f"{directory / 'documents.jsonl'}=0.6", "--data", f"{directory / 'chats.jsonl'}=0.4")
    arguments = ("continual", recipe, *sources, "--cache", directory / "cache.zarr", "--run", run)
    lab.command(directory, "continual", *arguments, codes=(0, 4))  # 4: the gate does not hold; the figures show it
    found: Figures = {}
    for name, adapter in {
        "before": None,
        "fine-tuned": run / "sft" / "adapter",
        "distilled": run / "adapter",
    }.items():
        settings = () if adapter is None else (f"student.adapter={adapter}",)
        at = (lab.work if adapter is None else directory) / f"eval-small-{name}.json"
        found[name] = lab.evaluated(at, recipe, base, *settings)
    return found


def render_rescue(runs: dict[int, Figures]) -> str:
    def strict(figures: Figures) -> float:
        return float(figures["tasks"]["own_ifeval"]["strict_acc"]["value"])

    def with_error(figures: Figures) -> str:
        error = figures["tasks"]["own_ifeval"]["strict_acc"]["stderr"]
        return f"{100 * strict(figures):.1f} % (+- {196 * error:.0f})"

    measures: dict[str, Callable[[Figures], str]] = {
        "knowledge, greedy": MEASURES["accuracy, greedy"],
        "IFEval's checkers (strict)": with_error,
    }
    names = ("before", "fine-tuned", "distilled")
    lines = []
    for seed, run in runs.items():
        before, tuned, after = (strict(run[name]) for name in names)
        known = [run[name]["greedy"]["value"] for name in names]
        lost, gained = 100 * (before - tuned), 100 * (known[1] - known[0])
        recovered = f", of which {100 * (after - tuned) / (before - tuned):.0f} % came back" if lost > 0 else ""
        lines.append(
            f"* seed {seed}: fine-tuning cost {lost:.1f} points of instruction following{recovered}; it brought "
            f"{gained:.1f} points of knowledge, of which {100 * (known[2] - known[0]):.1f} stayed"
        )
    summary = "\n".join(lines)
    return f"{summary}\n\n{per_seed(runs, lambda run: table({name: run[name] for name in names}, measures))}"


def ifeval_task(directory: Path, prompts: Path) -> None:
    """A task of lm-evaluation-harness with IFEval's own checkers on other prompts, of one instruction each."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "own_ifeval.py").write_text(
        "from lm_eval.tasks.ifeval import utils\n\n\n"
        "def process_results(doc, results):\n"
        '    return {"strict_acc": utils.process_results(doc, results)["prompt_level_strict_acc"]}\n'
    )
    (directory / "own_ifeval.yaml").write_text(
        "task: own_ifeval\n"
        "dataset_path: json\n"
        f"dataset_kwargs:\n  data_files: {json.dumps(str(prompts))}\n"
        "output_type: generate_until\ntest_split: train\nnum_fewshot: 0\n"
        'doc_to_text: prompt\ndoc_to_target: ""\n'
        "generation_kwargs:\n  until: []\n  do_sample: false\n  temperature: 0.0\n  max_gen_toks: 192\n"
        "process_results: !function own_ifeval.process_results\n"
        "metric_list:\n  - metric: strict_acc\n    aggregation: mean\n    higher_is_better: true\n"
    )


# ----------------------------------------------------------------------------------------------------------- context


SYSTEM = "You are a terse assistant. Answer in one short sentence."


def small_recipe(lab: Lab, directory: Path, seed: int, teacher: dict[str, Any], **score: Any) -> Path:
    """Of SmolLM2: prompts about topics, without a wish about the form of the answer."""
    prompts, held_out = data.topics(lab.count(64), lab.count(48), 2000 + seed)
    data.write(directory / "train.jsonl", prompts)
    data.write(lab.work / "topics.jsonl", held_out)
    return lab.recipe(
        directory / "recipe.toml",
        student={"model": lab.models["small"]},
        teacher=teacher,
        prompts={"path": str(directory / "train.jsonl"), "limit": len(prompts), "template": "chat"},
        rollouts=SMALL_ROLLOUTS | {"max_response_tokens": lab.tokens(64), "seed": seed},
        score={"candidates": 16, "tile_tokens": 2048} | score,
        train=SMALL_TRAIN | {"steps": lab.count(16), "prompts_per_step": 8, "seed": seed},
        eval={"path": str(lab.work / "topics.jsonl"), "max_response_tokens": lab.tokens(64), "batch_size": 64},
    )


def context(lab: Lab, directory: Path, seed: int) -> Figures:
    """The same model, with a system message that the student is not given."""
    small = lab.models["small"]
    recipe = small_recipe(lab, directory, seed, {"model": small, "system": SYSTEM})
    costs = stages(lab, recipe, directory)
    lab.command(directory, "eval", "eval", directory / "run")
    with_message = lab.evaluated(lab.work / "eval-small-message.json", recipe, small, f"prompts.system={SYSTEM}")
    beside = planned(lab, directory, recipe, costs.values(), directory / "run")
    return of_run(directory / "run") | {"with the message": with_message} | beside


def render_context(runs: dict[int, Figures]) -> str:
    names = ("before", "after", "with the message")
    return f"The teacher's system message: *{SYSTEM}*\n\n" + per_seed(
        runs, lambda run: table({name: run[name] for name in names})
    )


# --------------------------------------------------------------------------------------------------- other tokenizer


def other_tokenizer(lab: Lab, directory: Path, seed: int) -> Figures:
    """A teacher with another tokenizer, by spans of text: accuracy on bare sums, which both know."""
    prompts = lab.count(PROMPTS)
    recipe = small_recipe(lab, directory, seed, {"model": lab.models["teacher"]}, alignment="spans")
    data.write(directory / "sums.jsonl", data.bare_sums(prompts, 1000 + seed))
    data.write(lab.work / "sums.jsonl", data.bare_sums(lab.count(SUMS), 2))
    settings = (
        f"prompts.path={directory / 'sums.jsonl'}",
        f"prompts.limit={prompts}",
        "rollouts.rollouts_per_prompt=4",
        "rollouts.max_response_tokens=48",
        "train.loss=importance_sampling",
        "eval.match=number",
        f"eval.path={lab.work / 'sums.jsonl'}",
        "eval.max_response_tokens=48",
    )
    costs = stages(lab, recipe, directory, settings)
    lab.command(directory, "eval", "eval", directory / "run")
    scored = re.search(r"teacher: ([^\n;]*)", costs["score"]["output"])
    beside = planned(lab, directory, recipe, costs.values(), directory / "run", settings)
    return of_run(directory / "run") | {"scored": scored[1] if scored else ""} | beside


def render_other_tokenizer(runs: dict[int, Figures]) -> str:
    def one(run: Figures) -> str:
        columns = table({name: run[name] for name in ("before", "after")})
        return f"{columns}\n\nThe teacher on the student's rollouts, by spans: {run['scored']}."

    return per_seed(runs, one)


# ----------------------------------------------------------------------------------------------------------- engines


def engines(lab: Lab, directory: Path, seed: int) -> Figures:
    """The same rollouts by transformers and by vLLM."""
    recipe, found = pair_recipe(lab, directory, seed, rounds=1), {}
    for engine in ("transformers", "vllm"):
        settings, cache = [f"rollouts.engine={engine}"], ("--cache", directory / f"{engine}.zarr")
        cost = lab.command(directory, engine, "rollouts", recipe, *cache, settings=settings)
        tokens, seconds = sampled(cost["output"])
        gap = lab.command(directory, f"{engine}-gap", "score", recipe, *cache, "--only", "student", settings=settings)
        found[engine] = {
            "tokens": tokens,
            "seconds": seconds,
            "cost": cost,
            "gap": next((line.strip() for line in gap["output"].splitlines() if "sampler" in line), ""),
        }
    return found


def render_engines(runs: dict[int, Figures]) -> str:
    lines = [
        "| | tokens | tokens/s | tokens a CPU second, start included | GB | sampled against scored |",
        "|---" * 6 + "|",
    ]
    for run in runs.values():
        for engine in ("transformers", "vllm"):
            figures, cost = run[engine], run[engine]["cost"]
            lines.append(
                f"| {engine} | {figures['tokens']:,} | {figures['tokens'] / figures['seconds']:.0f} | "
                f"{figures['tokens'] / cost['cpu_seconds']:.0f} | {cost['gb']:.1f} | {figures['gap']} |"
            )
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------------- TRL


STEP_ROLLOUTS, TRL_STEPS = 16, 24


def trl(lab: Lab, directory: Path, seed: int) -> Figures:
    """The same prompts, LoRA and rollouts a step by TRL and by redpen, which trains once more from its cache."""
    student, teacher = lab.models["student"], lab.models["teacher"]
    recipe = pair_recipe(lab, directory, seed, rounds=1)
    costs = stages(lab, recipe, directory)
    cache, again, out = directory / "cache.zarr", directory / "again", directory / "trl"
    costs["again"] = lab.command(directory, "again", "train", recipe, "--cache", cache, "--run", again)
    prompts = directory / "trl.jsonl"
    rows = (directory / "train.jsonl").read_text().splitlines()[: lab.count(PROMPTS)]
    chats = [{"prompt": [{"role": "user", "content": json.loads(row)["prompt"]}]} for row in rows]
    prompts.write_text("".join(json.dumps(chat) + "\n" for chat in chats * 2))
    run = TrlRun(
        student=student,
        teacher=teacher,
        dtype="bfloat16",
        prompts=str(prompts),
        rollouts=STEP_ROLLOUTS,
        max_response_tokens=lab.tokens(LIMIT),
        rank=32,
        learning_rate=1e-4,
        steps=2 if lab.quick else TRL_STEPS,
        seed=seed,
        gradient_checkpointing=True,
    )
    costs["trl"] = lab.once(directory, "trl", lambda: asdict(trl_trainer.train(out, run)))
    seconds = trl_trainer.step_seconds(out)
    found: Figures = {"costs": costs, "steps": {"TRL": seconds}}
    for name, trained in {"TRL": out, "first": directory / "run", "again": again}.items():
        at = directory / f"eval-{name}.json"
        found[name] = lab.evaluated(at, recipe, student, f"student.adapter={trained / 'adapter'}", teacher=teacher)
        if trained is not out:
            found["steps"][name] = [step["time"]["seconds"] for step in curve(trained)]
    return found


def render_trl(runs: dict[int, Figures]) -> str:
    def one(run: Figures) -> str:
        costs = run["costs"]
        first = [costs[name] for name in ("rollouts", "score", "train")]
        forms = {
            "TRL": (run["TRL"], "TRL", [costs["trl"]]),
            "redpen, first run": (run["first"], "first", first),
            "redpen, again from the cache": (run["again"], "again", [costs["again"]]),
        }
        lines = [
            "| | s a step | TRL's / it | CPU s in all | it / TRL's | GB | it / TRL's | greedy | fresh reverse KL |",
            "|---" * 9 + "|",
        ]
        trl_step, trl_cpu, trl_gb = (
            statistics.median(run["steps"]["TRL"]),
            costs["trl"]["cpu_seconds"],
            costs["trl"]["gb"],
        )
        for name, (figures, key, parts) in forms.items():
            step = statistics.median(run["steps"][key])
            cpu, gb = sum(part["cpu_seconds"] for part in parts), max(part["gb"] for part in parts)
            lines.append(
                f"| {name} | {step:.1f} | {trl_step / step:.1f} | {cpu:.0f} | {cpu / trl_cpu:.2f} | {gb:.1f} | "
                f"{gb / trl_gb:.2f} | {percent(figures['greedy'])} | {nats(figures['reverse_kl'])} |"
            )
        return "\n".join(lines)

    return per_seed(runs, one)


# ---------------------------------------------------------------------------------------------------------- solution

#: What the teacher reads in place of a problem.
SOLVED = "{{ prompt }}\n\nA correct solution, for you alone: {{ solution }}"


def solution(lab: Lab, directory: Path, seed: int) -> Figures:
    """The same model, which is shown the worked solution; and what it does when it is."""
    student = lab.models["student"]
    recipe = pair_recipe(lab, directory, seed, rounds=1, teacher={"model": student, "prompt": SOLVED})
    costs = stages(lab, recipe, directory)
    lab.command(directory, "eval", "eval", directory / "run")
    rows = [json.loads(line) for line in (lab.work / "held_out.jsonl").read_text().splitlines()]
    form = SOLVED.replace("{{ prompt }}", "{prompt}").replace("{{ solution }}", "{solution}")
    data.write(lab.work / "solved.jsonl", [{"prompt": form.format(**row), "answer": row["answer"]} for row in rows])
    shown = lab.evaluated(lab.work / "eval-solved.json", recipe, student, f"eval.path={lab.work / 'solved.jsonl'}")
    beside = planned(lab, directory, recipe, costs.values(), directory / "run")
    return of_run(directory / "run") | {"shown the solution": shown} | beside


def render_solution(runs: dict[int, Figures]) -> str:
    names = ("before", "after", "shown the solution")
    return per_seed(runs, lambda run: table({name: run[name] for name in names}))


PAIR = ("student", "teacher")
ROWS = {
    "larger_teacher": Row("A larger teacher", PAIR, larger_teacher, rendered_pair(("before", "after one round"))),
    "rounds": Row(
        "Three rounds",
        PAIR,
        more_rounds,
        rendered_pair(("before", "after one round", "after three rounds")),
        directory="larger_teacher",
    ),
    "teacher": Row("The teacher alone", PAIR, teacher_alone, render_teacher, seeds=1),
    "trl": Row("Beside TRL", PAIR, trl, render_trl, packages=("trl",)),
    "rescue": Row(
        "New facts, old behaviour",
        ("small",),
        rescue,
        render_rescue,
        packages=("lm_eval", "langdetect", "immutabledict"),
    ),
    "context": Row("A system message, learnt", ("small",), context, render_context),
    "solution": Row("From itself, shown the solution", ("student",), solution, render_solution),
    "other_tokenizer": Row(
        "A teacher with another tokenizer", ("small", "teacher"), other_tokenizer, render_other_tokenizer
    ),
    "engines": Row("transformers and vLLM as samplers", PAIR, engines, render_engines, seeds=1, packages=("vllm",)),
}
