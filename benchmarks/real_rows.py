"""The rows of `benchmarks/real.py`: each runs redpen's commands on real models and returns its part of the page."""

from __future__ import annotations

import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import real_data as data
from toy_lab import Cost, Results, measured, redpen

#: Prompts of a round, two rollouts each; held-out problems; tokens of a response in training and in evaluation.
PROMPTS, HELD_OUT, SUMS, LIMIT, EVAL_LIMIT = 96, 96, 64, 192, 320
Figures = dict[str, Any]


@dataclass(frozen=True)
class Lab:
    """What a row works with.

    Attributes:
        models: directory or Hub id of `student`, `teacher` and `small`.
        engine: "transformers" or "vllm", for rollouts.
        quick: a few prompts and steps, to try whether everything runs.
    """

    work: Path
    models: dict[str, str]
    seeds: int
    engine: str
    quick: bool
    results: Results

    def runs(self, name: str, measure: Callable[[Path, int], Figures]) -> list[Figures]:
        """What `measure` finds for every seed, in a directory of its own, with its seconds."""

        def timed(seed: int) -> Figures:
            directory = self.work / f"{name}-{seed}"
            directory.mkdir(parents=True, exist_ok=True)
            started = time.perf_counter()
            found = measure(directory, seed)
            return found | {"seconds": time.perf_counter() - started}

        return [self.results.get(f"{name} {seed}", partial(timed, seed)) for seed in range(self.seeds)]

    def count(self, full: int) -> int:
        return max(2, full // 16) if self.quick else full

    def recipe(self, path: Path, **sections: dict[str, Any]) -> Path:
        path.write_text(
            "".join(
                f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in section.items()) + "\n"
                for name, section in sections.items()
            )
        )
        return path


def evaluated(out: Path, recipe: Path, model: str, *settings: str, teacher: str | None = None) -> Figures:
    """`redpen eval MODEL`; what was measured before is read."""
    if not out.exists():
        to = ("--teacher", teacher) if teacher else ()
        redpen("eval", model, "--recipe", recipe, "--out", out, *to, settings=settings)
    figures: Figures = json.loads(out.read_text())["model"]
    return figures


def seconds_of(cost: Cost) -> float:
    """Of work alone, as the command prints it."""
    return sum(map(float, re.findall(r" in ([\d.]+) s", cost.output)))


def stages(recipe: Path, cache: Path, run: Path, *, again: str | None = None) -> Figures:
    """`rollouts`, `score` and `train` in processes of their own: seconds, peak memory and what they print."""
    costs = {stage: redpen(stage, recipe, "--cache", cache) for stage in ("rollouts", "score")}
    costs["train"] = redpen("train", recipe, "--cache", cache, "--run", run)
    if again:
        costs["again"] = redpen("train", recipe, "--cache", cache, "--run", run.with_name(again))
    steps = [json.loads(line)["time"]["seconds"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "seconds_of": {name: cost.seconds for name, cost in costs.items()},
        "gb_of": {name: cost.anonymous / 1e9 for name, cost in costs.items()},
        "step": statistics.median(steps),
        "tokens": json.loads((run / "ledger.json").read_text()),
    }


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


def per_seed(runs: Sequence[Figures], render: Callable[[Figures], str]) -> str:
    return "\n\n".join(f"Seed {seed}:\n\n{render(run)}" for seed, run in enumerate(runs))


# ---------------------------------------------------------------------------------------------------- larger teacher


def pair_recipe(lab: Lab, directory: Path, seed: int, rounds: int = 3) -> Path:
    prompts = lab.count(PROMPTS)
    train = data.word_problems(rounds * prompts, 1000 + seed, data.TRAIN_NAMES)
    data.write(directory / "train.jsonl", train)
    data.write(lab.work / "held_out.jsonl", data.word_problems(lab.count(HELD_OUT), 1, data.HELD_OUT_NAMES))
    data.write(lab.work / "sums.jsonl", data.bare_sums(lab.count(SUMS), 2))
    return lab.recipe(
        directory / "recipe.toml",
        student={"model": lab.models["student"]},
        teacher={"model": lab.models["teacher"]},
        prompts={"path": str(directory / "train.jsonl"), "limit": prompts, "template": "chat"},
        rollouts={
            "engine": lab.engine,
            "rollouts_per_prompt": 2,
            "max_response_tokens": LIMIT,
            "prompts_per_block": 16,
            "batch_size": 32,
            "seed": seed,
        },
        score={"candidates": 16, "tile_tokens": 2048},
        train={
            "steps": 2 * prompts // 8,
            "prompts_per_step": 8,
            "lora_rank": 32,
            "seed": seed,
            "stop_reverse_kl": 0,
            "tokens_per_microbatch": 2048,
        },
        distill={"rounds": rounds, "stop_reverse_kl": 0, "patience": rounds},
        eval={
            "path": str(lab.work / "held_out.jsonl"),
            "match": "number",
            "max_response_tokens": EVAL_LIMIT,
            "batch_size": 32,
        },
    )


def larger_teacher(lab: Lab) -> str:
    """The student before, after one round and after three, on problems like those of training and on bare sums."""
    student, teacher = lab.models["student"], lab.models["teacher"]
    sums = f"eval.path={lab.work / 'sums.jsonl'}"

    def measure(directory: Path, seed: int) -> Figures:
        recipe, run = pair_recipe(lab, directory, seed), directory / "run"
        rounds = redpen("distill", recipe, "--cache", directory / "cache.zarr", "--run", run)
        found: Figures = {"gb": rounds.anonymous / 1e9, "distill_seconds": rounds.seconds}
        for name, adapter in {
            "before": None,
            "one round": run / "rounds" / "00000" / "adapter",
            "three rounds": run / "rounds" / "00002" / "adapter",
        }.items():
            settings = () if adapter is None else (f"student.adapter={adapter}",)
            # The untrained student is one for all seeds.
            at = (lab.work if adapter is None else directory) / f"eval-{name.replace(' ', '-')}"
            of_sums = at.with_name(f"{at.name}-sums.json")
            found[name] = evaluated(at.with_suffix(".json"), recipe, student, *settings, teacher=teacher)
            found[f"{name}, sums"] = evaluated(of_sums, recipe, student, *settings, sums, teacher=teacher)
        return found

    runs = lab.runs("larger_teacher", measure)
    recipe = lab.work / "larger_teacher-0" / "recipe.toml"
    of_teacher = evaluated(lab.work / "eval-teacher.json", recipe, teacher)
    sums_of_teacher = evaluated(lab.work / "eval-teacher-sums.json", recipe, teacher, sums)
    names = ("before", "one round", "three rounds")

    def render(run: Figures) -> str:
        own = table({**{name: run[name] for name in names}, "teacher": of_teacher})
        other = table({**{name: run[f"{name}, sums"] for name in names}, "teacher": sums_of_teacher})
        return f"Held-out word problems:\n\n{own}\n\nBare sums, of another form than those of training:\n\n{other}"

    gains = [100 * (run["one round"]["greedy"]["value"] - run["before"]["greedy"]["value"]) for run in runs]
    falls = [
        [100 * (1 - run[name]["reverse_kl"]["value"] / run["before"]["reverse_kl"]["value"]) for run in runs]
        for name in names[1:]
    ]
    summary = (
        f"Greedy accuracy {listed(gains, '+.1f')} points after one round; fresh reverse KL falls by "
        f"{listed(falls[0], '.0f')} % in one round and {listed(falls[1], '.0f')} % in three. Three rounds took "
        f"{listed([run['distill_seconds'] / 60 for run in runs], '.0f')} minutes and "
        f"{listed([run['gb'] for run in runs], '.1f')} GB."
    )
    return f"{summary}\n\n{per_seed(runs, render)}"


def listed(values: Sequence[float], form: str) -> str:
    return ", ".join(f"{value:{form}}" for value in values)


# ---------------------------------------------------------------------------------------------------- the assistant


def rescue(lab: Lab) -> str:
    """A company's facts by fine-tuning; following instructions before, after it, and after distillation."""
    base = lab.models["small"]

    def measure(directory: Path, seed: int) -> Figures:
        data.write(directory / "documents.jsonl", data.documents(seed, lab.count(400)))
        data.write(directory / "chats.jsonl", data.chats(seed, lab.count(300)))
        data.write(lab.work / "knowledge.jsonl", data.knowledge())
        data.write(lab.work / "instructions.jsonl", data.instructions(lab.count(200), 3))
        prompts = [{"prompt": row["prompt"]} for row in data.instructions(lab.count(256), 1000 + seed)]
        data.write(directory / "prompts.jsonl", prompts)
        ifeval_task(lab.work / "tasks", lab.work / "instructions.jsonl")
        recipe = lab.recipe(
            directory / "recipe.toml",
            student={"model": base, "dtype": "float32"},
            teacher={"model": base, "dtype": "float32"},
            prompts={
                "path": str(directory / "prompts.jsonl"),
                "limit": len(prompts) // 2,
                "template": "chat",
            },
            rollouts={
                "rollouts_per_prompt": 2,
                "max_response_tokens": 128,
                "prompts_per_block": 32,
                "batch_size": 64,
                "seed": seed,
            },
            score={"candidates": 16, "tile_tokens": 2048},
            train={
                "steps": 16,
                "prompts_per_step": 16,
                "lora_rank": 32,
                "learning_rate": 2e-4,
                "seed": seed,
                "stop_reverse_kl": 0,
                "tokens_per_microbatch": 2048,
            },
            sft={"steps": lab.count(160), "examples_per_step": 16, "learning_rate": 3e-4, "max_tokens": 256},
            distill={"rounds": 2, "stop_reverse_kl": 0},
            eval={
                "path": str(lab.work / "knowledge.jsonl"),
                "match": "contains",
                "max_response_tokens": 192,
                "batch_size": 64,
                "tasks": ["own_ifeval"],
                "task_path": str(lab.work / "tasks"),
            },
        )
        run = directory / "run"
        sources = ("--data", f"{directory / 'documents.jsonl'}=0.6", "--data", f"{directory / 'chats.jsonl'}=0.4")
        found: Figures = {}
        redpen("continual", recipe, *sources, "--cache", directory / "cache.zarr", "--run", run)
        for name, adapter in {
            "before": None,
            "fine-tuned": run / "sft" / "adapter",
            "distilled": run / "adapter",
        }.items():
            settings = () if adapter is None else (f"student.adapter={adapter}",)
            at = (lab.work if adapter is None else directory) / f"eval-small-{name}.json"
            found[name] = evaluated(at, recipe, base, *settings)
        return found

    runs = lab.runs("rescue", measure)

    def strict(figures: Figures, level: str) -> float:
        return float(figures["tasks"]["own_ifeval"][f"{level}_level_strict_acc"]["value"])

    measures: dict[str, Callable[[Figures], str]] = {
        "knowledge, greedy": MEASURES["accuracy, greedy"],
        "IFEval, prompts (strict)": lambda f: f"{100 * strict(f, 'prompt'):.1f} %",
        "IFEval, instructions (strict)": lambda f: f"{100 * strict(f, 'inst'):.1f} %",
    }
    names = ("before", "fine-tuned", "distilled")
    lines = []
    for run in runs:
        before, tuned, after = (strict(run[name], "prompt") for name in names)
        known = [run[name]["greedy"]["value"] for name in names]
        lines.append(
            f"lost {100 * (before - tuned):.1f} points of instruction following, recovered "
            f"{100 * (after - tuned) / max(before - tuned, 1e-9):.0f} % of them; gained "
            f"{100 * (known[1] - known[0]):.1f} points of knowledge, kept {100 * (known[2] - known[0]):.1f}"
        )
    summary = "\n".join(f"* seed {seed}: {line}" for seed, line in enumerate(lines))
    return f"{summary}\n\n{per_seed(runs, lambda run: table({n: run[n] for n in names}, measures))}"


def ifeval_task(directory: Path, prompts: Path) -> None:
    """A task of lm-evaluation-harness with IFEval's own checkers on other prompts."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "own_ifeval.py").write_text(
        "from lm_eval.tasks.ifeval.utils import agg_inst_level_acc, process_results\n"
    )
    metrics = "".join(
        f"  - metric: {level}_level_strict_acc\n    aggregation: {how}\n    higher_is_better: true\n"
        for level, how in (("prompt", "mean"), ("inst", "!function own_ifeval.agg_inst_level_acc"))
    )
    (directory / "own_ifeval.yaml").write_text(
        "task: own_ifeval\n"
        "dataset_path: json\n"
        f"dataset_kwargs:\n  data_files: {json.dumps(str(prompts))}\n"
        "output_type: generate_until\ntest_split: train\nnum_fewshot: 0\n"
        'doc_to_text: prompt\ndoc_to_target: ""\n'
        "generation_kwargs:\n  until: []\n  do_sample: false\n  temperature: 0.0\n  max_gen_toks: 192\n"
        "process_results: !function own_ifeval.process_results\n"
        f"metric_list:\n{metrics}"
    )


# ----------------------------------------------------------------------------------------------------------- context


SYSTEM = "You are a terse assistant. Answer in one short sentence."


def small_recipe(lab: Lab, directory: Path, seed: int, teacher: dict[str, Any], **score: Any) -> Path:
    prompts = [
        {"prompt": row["prompt"].split(". ")[0] + "."} for row in data.instructions(lab.count(192), 2000 + seed)
    ]
    held_out = [{"prompt": row["prompt"].split(". ")[0] + "."} for row in data.instructions(lab.count(96), 4)]
    data.write(directory / "train.jsonl", prompts)
    data.write(lab.work / "topics.jsonl", held_out)
    return lab.recipe(
        directory / "recipe.toml",
        student={"model": lab.models["small"], "dtype": "float32"},
        teacher={"dtype": "float32"} | teacher,
        prompts={"path": str(directory / "train.jsonl"), "limit": lab.count(96), "template": "chat"},
        rollouts={
            "rollouts_per_prompt": 2,
            "max_response_tokens": 128,
            "prompts_per_block": 32,
            "batch_size": 64,
            "seed": seed,
        },
        score={"candidates": 16, "tile_tokens": 2048} | score,
        train={
            "steps": 24,
            "prompts_per_step": 8,
            "lora_rank": 32,
            "learning_rate": 2e-4,
            "seed": seed,
            "stop_reverse_kl": 0,
            "tokens_per_microbatch": 2048,
        },
        eval={"path": str(lab.work / "topics.jsonl"), "max_response_tokens": 128, "batch_size": 64},
    )


def context(lab: Lab) -> str:
    """The same model, with a system message that the student is not given."""

    def measure(directory: Path, seed: int) -> Figures:
        recipe = small_recipe(lab, directory, seed, {"model": lab.models["small"], "system": SYSTEM})
        run = directory / "run"
        found = stages(recipe, directory / "cache.zarr", run)
        redpen("eval", run)
        return found | json.loads((run / "eval.json").read_text())

    runs = lab.runs("context", measure)
    return f"The teacher's system message: *{SYSTEM}*\n\n" + per_seed(
        runs, lambda run: table({name: run[name] for name in ("before", "after")})
    )


def other_tokenizer(lab: Lab) -> str:
    """A teacher with another tokenizer, by spans of text: accuracy on bare sums, which both know."""

    def measure(directory: Path, seed: int) -> Figures:
        prompts = lab.count(PROMPTS)
        data.write(directory / "train.jsonl", data.bare_sums(prompts, 1000 + seed))
        data.write(lab.work / "sums.jsonl", data.bare_sums(lab.count(SUMS), 2))
        recipe = small_recipe(lab, directory, seed, {"model": lab.models["teacher"]}, alignment="spans")
        settings = [
            f"prompts.path={directory / 'train.jsonl'}",
            "rollouts.rollouts_per_prompt=4",
            "rollouts.max_response_tokens=48",
            "train.loss=importance_sampling",
            "eval.match=number",
            f"eval.path={lab.work / 'sums.jsonl'}",
        ]
        cache, run = directory / "cache.zarr", directory / "run"
        costs = [redpen(stage, recipe, "--cache", cache, settings=settings) for stage in ("rollouts", "score")]
        redpen("train", recipe, "--cache", cache, "--run", run, settings=settings)
        redpen("eval", run)
        curve = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        covered = re.search(r"spans[^\n]*", costs[1].output)
        return json.loads((run / "eval.json").read_text()) | {
            "covered": covered[0] if covered else "",
            "curve": curve,
        }

    runs = lab.runs("other_tokenizer", measure)
    return per_seed(
        runs, lambda run: f"{table({name: run[name] for name in ('before', 'after')})}\n\n{run['covered']}"
    )


# ----------------------------------------------------------------------------------------------------------- engines


def engines(lab: Lab) -> str:
    """The same rollouts by transformers and by vLLM."""

    def measure(directory: Path, seed: int) -> Figures:
        recipe, found = pair_recipe(lab, directory, seed, rounds=1), {}
        for engine in ("transformers", "vllm"):
            cost = redpen(
                "rollouts",
                recipe,
                "--cache",
                directory / f"{engine}.zarr",
                settings=[f"rollouts.engine={engine}", "vllm.enforce_eager=true"],
            )
            match = re.search(r"([\d,]+) tokens[^\n]* in ([\d.]+) s", cost.output)
            if match is None:
                sys.exit(f"no line about tokens and seconds in:\n{cost.output}")
            gap = redpen("score", recipe, "--cache", directory / f"{engine}.zarr", "--only", "student")
            found[engine] = {
                "tokens": int(match[1].replace(",", "")),
                "seconds": float(match[2]),
                "command_seconds": cost.seconds,
                "gb": cost.anonymous / 1e9,
                "gap": next((line for line in gap.output.splitlines() if "sampler" in line), ""),
            }
        return found

    run = lab.runs("engines", measure)[0]
    lines = ["| | tokens | tokens/s | seconds, start included | GB | sampled against scored |", "|---" * 6 + "|"]
    for engine in ("transformers", "vllm"):
        figures = run[engine]
        lines.append(
            f"| {engine} | {figures['tokens']:,} | {figures['tokens'] / figures['seconds']:.0f} | "
            f"{figures['command_seconds']:.0f} | {figures['gb']:.1f} | {figures['gap']} |"
        )
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------------- TRL


STEP_ROLLOUTS, TRL_STEPS = 16, 24


def child_trl(student: str, teacher: str, prompts: str, out: str, seed: int, steps: int) -> None:
    """TRL's trainer in this process; the seconds of its steps are written as they come."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    loaded = [AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16) for name in (student, teacher)]
    rows = [json.loads(line) for line in Path(prompts).read_text().splitlines()]
    chats = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    config = DistillationConfig(
        output_dir=out,
        max_steps=steps,
        per_device_train_batch_size=STEP_ROLLOUTS,
        max_completion_length=LIMIT,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        beta=1.0,
        bf16=False,
        gradient_checkpointing=True,
        use_cpu=True,
        seed=seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    clock: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            clock.append(time.perf_counter())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.append(time.perf_counter())
            steps = [b - a for a, b in pairwise(clock)]
            (Path(out) / "steps.json").write_text(json.dumps(steps))

    trainer = DistillationTrainer(
        model=loaded[0],
        teacher_model=loaded[1],
        args=config,
        train_dataset=Dataset.from_list(chats * 2),
        processing_class=AutoTokenizer.from_pretrained(student),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=32, lora_alpha=32, target_modules="all-linear"),
        callbacks=[Clock()],
    )
    trainer.train()
    trainer.save_model(f"{out}/adapter")


def trl(lab: Lab) -> str:
    """The same prompts, LoRA and rollouts a step by TRL and by redpen, which trains once more from its cache."""
    student, teacher = lab.models["student"], lab.models["teacher"]

    def measure(directory: Path, seed: int) -> Figures:
        recipe = pair_recipe(lab, directory, seed, rounds=1)
        steps = 2 if lab.quick else TRL_STEPS
        found = stages(recipe, directory / "cache.zarr", directory / "run", again="again")
        for name in ("run", "again"):
            adapter = f"student.adapter={directory / name / 'adapter'}"
            found[name] = evaluated(directory / f"eval-{name}.json", recipe, student, adapter, teacher=teacher)
        out = directory / "trl"
        out.mkdir(exist_ok=True)
        prompts = directory / "train.jsonl"
        cost = measured(__file__, student, teacher, prompts, out, seed, steps)
        seconds = json.loads((out / "steps.json").read_text())
        adapter = f"student.adapter={out / 'adapter'}"
        of_trl = evaluated(directory / "eval-trl.json", recipe, student, adapter, teacher=teacher)
        found["trl"] = of_trl | {
            "step": statistics.median(seconds),
            "total": cost.seconds,
            "gb": cost.anonymous / 1e9,
        }
        return found

    runs = lab.runs("trl", measure)

    def render(run: Figures) -> str:
        first = sum(run["seconds_of"][name] for name in ("rollouts", "score", "train"))
        forms = {
            "TRL": (run["trl"]["step"], run["trl"]["total"], run["trl"]["gb"], run["trl"]),
            "redpen, first run": (run["step"], first, max(run["gb_of"].values()), run["run"]),
            "redpen, again from the cache": (
                run["step"],
                run["seconds_of"]["again"],
                run["gb_of"]["again"],
                run["again"],
            ),
        }
        lines = [
            "| | s a step | TRL's / it | s in all | it / TRL's | GB | it / TRL's | greedy | fresh reverse KL |",
            "|---" * 9 + "|",
        ]
        step, total, memory, _ = forms["TRL"]
        for name, (own_step, own_total, own_memory, figures) in forms.items():
            lines.append(
                f"| {name} | {own_step:.1f} | {step / own_step:.1f} | {own_total:.0f} | {own_total / total:.2f} | "
                f"{own_memory:.1f} | {own_memory / memory:.2f} | {percent(figures['greedy'])} | "
                f"{nats(figures['reverse_kl'])} |"
            )
        return "\n".join(lines)

    return per_seed(runs, render)


ROWS: dict[str, Callable[[Lab], str]] = {
    "larger_teacher": larger_teacher,
    "trl": trl,
    "rescue": rescue,
    "context": context,
    "other_tokenizer": other_tokenizer,
    "engines": engines,
}

if __name__ == "__main__":  # TRL's process
    student, teacher, prompts, out, seed, steps = sys.argv[1:]
    child_trl(student, teacher, prompts, out, int(seed), int(steps))
