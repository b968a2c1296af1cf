"""What the source of the method claims, measured on the toys: `make claims`, or one row: `make claims ROW=company`.

    python benchmarks/claims.py [ROW ...] [--seeds 3] [--work .claims] [--page docs/claims.md]

    routes         distillation, more fine-tuning on teacher samples, or reinforcement learning, at equal accuracy
    curve          accuracy and reverse KL by step
    company        a company's facts by fine-tuning, its assistant's formats back by self-distillation
    rank           LoRA rank 8, 32, 128                        )
    temperature    rollouts at temperature 0, 0.3, 1           ) as benchmarks/ablations.py has them,
    single_prompt  20 epochs on one prompt                     ) with one seed
    teacher_time   cached replay against a live teacher        )

Every run's figures are kept in WORK/results.json as soon as they are there, so a run that is cut goes on; the page is
written from all of them. Everything is done by redpen's own stages.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import ablations
import torch
from toy_lab import BLUE, GREEN, ORANGE, ROOT, Results, figure, spread
from toy_training import Replayed, make_cache, toy_recipe

import cache_schema as cs
import pipeline.rollouts.stage
from pipeline import continual, distill, models
from pipeline.config import Recipe, load_recipe
from pipeline.evaluate.accuracy import HeldOutPrompts
from pipeline.sft import stage as sft
from pipeline.text import load_decoder
from pipeline.train import stage as train

ABLATIONS = ("rank", "temperature", "single_prompt", "teacher_time")
BUDGETS = (64, 128, 256, 512, 1024)  # prompts, with four responses each
GRPO_ROUNDS = (1, 2, 3, 4, 6, 8, 10, 14, 20)
TARGET = 0.95
CURVE_STEPS = (0, 10, 20, 40, 60, 80, 100, 125, 150)


@dataclass(frozen=True)
class Claim:
    """A line of the page's first table."""

    claim: str
    source: str
    ours: str
    seeds: int
    holds: str


class Work:
    """Where results are, and how often what is measured."""

    def __init__(self, path: Path, seeds: int, figures: Path):
        self.path, self.seeds, self.figures = path, seeds, figures
        self.results = Results(path / "results.json")

    def runs(self, name: str, measure: Callable[[int], Any], seeds: int | None = None) -> list[Any]:
        """`measure` of every seed; its time is kept too."""

        def timed(seed: int) -> Any:
            started = time.perf_counter()
            with contextlib.redirect_stdout(sys.stderr):
                found = measure(seed)
            return {"found": found, "seconds": time.perf_counter() - started}

        chosen = range(self.seeds if seeds is None else seeds)
        return [self.results.get(f"{name} {seed}", partial(timed, seed))["found"] for seed in chosen]

    def there(self, name: str, seeds: int | None = None) -> bool:
        return all(f"{name} {seed}" in self.results.figures for seed in range(self.seeds if seeds is None else seeds))


# ------------------------------------------------------------------------------------------------------------- routes


def accuracy(recipe: Recipe, adapter: Path) -> float:
    """Greedy, on 1,024 held-out sums."""
    cfg = recipe.student.model_copy(update={"adapter": str(adapter)})
    prompts = HeldOutPrompts.load(recipe, "accuracy", 1024)
    return prompts.count(models.load_model(cfg)) / len(prompts.prompts)


def flops(ledger: Path, *teachers: str) -> dict[str, float]:
    """Of a run, by whose they are."""
    costs = json.loads(ledger.read_text())
    of_teacher = sum(costs[name]["flops"] for name in teachers)
    return {"student": sum(cost["flops"] for cost in costs.values()) - of_teacher, "teacher": of_teacher}


def opd(work: Path, n_prompts: int, seed: int) -> dict[str, Any]:
    recipe = toy_recipe(seed, f"prompts.limit={n_prompts}", "train.steps=60", "train.stop_reverse_kl=0")
    name = f"opd-{n_prompts}-{seed}"
    cache = make_cache(work / f"{name}.zarr", recipe)
    train.run(recipe, str(cache), work / name)
    found = {"samples": 4 * n_prompts, "accuracy": accuracy(recipe, work / name / "adapter")}
    return found | flops(work / name / "ledger.json", "score teacher")


def more_sft(work: Path, n_prompts: int, seed: int) -> dict[str, Any]:
    """On what the teacher samples at temperature 1, four responses to each prompt."""
    recipe = toy_recipe(seed, f"prompts.limit={n_prompts}", "sft.steps=60", "sft.examples_per_step=256")
    recipe = recipe.model_copy(update={"sft": recipe.sft.model_copy(update={"learning_rate": 1e-3})})
    teacher = recipe.model_copy(update={"student": recipe.student.model_copy(update={"model": "toy:teacher"})})
    name = f"sft-{n_prompts}-{seed}"
    pipeline.rollouts.stage.run(teacher, str(work / f"{name}.zarr"))
    round_ = cs.open(str(work / f"{name}.zarr")).round()
    decoder, lines = load_decoder(round_.manifest), []
    for block in map(round_.rollouts.read, range(round_.n_blocks)):
        for row in range(block.n_rows):
            prompt = round_.prompts[int(block.prompt_index[block.row_prompt[row]])]["prompt"]
            response = decoder.decode(block.response(row).tolist()).removesuffix("<|endoftext|>")
            lines.append(json.dumps({"prompt": prompt, "response": response}) + "\n")
    (work / f"{name}.jsonl").write_text("".join(lines))
    sft.run(recipe, [str(work / f"{name}.jsonl")], work / name)
    told = train.ledger.table(train.ledger.stage_one(teacher, round_))
    found = {"samples": 4 * n_prompts, "accuracy": accuracy(recipe, work / name / "adapter")}
    return found | {"student": flops(work / name / "ledger.json")["student"], "teacher": told["rollouts"]["flops"]}


def grpo(work: Path, seed: int) -> list[dict[str, Any]]:
    """Rounds of rewards; the student of each."""
    settings = (f"rollouts.seed={seed}", f"train.seed={seed}", f"distill.rounds={GRPO_ROUNDS[-1]}")
    recipe = load_recipe("toy-grpo", settings)
    run = work / f"grpo-{seed}"
    distill.run(recipe, str(work / f"grpo-{seed}.zarr"), run)
    points, spent = [], 0.0
    for index in range(GRPO_ROUNDS[-1]):
        of_round = run / "rounds" / f"{index:05d}"
        spent += flops(of_round / "ledger.json")["student"]
        if index + 1 in GRPO_ROUNDS:
            samples = (index + 1) * (recipe.prompts.limit or 0) * recipe.rollouts.rollouts_per_prompt
            point = {"samples": samples, "accuracy": accuracy(recipe, of_round / "adapter")}
            points.append(point | {"student": spent, "teacher": 0.0})
    return points


def reached(points: Sequence[dict[str, float]], key: Callable[[dict[str, float]], float]) -> float | None:
    """What it takes to reach `TARGET`, log-linear between the points before and after; None where none does."""
    before = None
    for point in points:
        if point["accuracy"] >= TARGET:
            if before is None:
                return key(point)
            part = (TARGET - before["accuracy"]) / (point["accuracy"] - before["accuracy"])
            return math.exp((1 - part) * math.log(key(before)) + part * math.log(key(point)))
        before = point
    return None


def routes(work: Work) -> tuple[list[Claim], str]:
    names = {"distillation": opd, "fine-tuning on teacher samples": more_sft}
    series: dict[str, list[list[dict[str, float]]]] = {}
    for name, measure in names.items():
        by_budget = [work.runs(f"{name} {n}", partial(measure, work.path, n)) for n in BUDGETS]
        series[name] = [list(points) for points in zip(*by_budget, strict=True)]
    series["reinforcement learning"] = work.runs("grpo", partial(grpo, work.path))
    colours = dict(zip(series, (BLUE, GREEN, ORANGE), strict=True))
    with figure(work.figures / "claims_routes.svg", 1, 2) as axes:
        for name, runs in series.items():
            for axis, key in zip(axes, (lambda p: p["samples"], total), strict=True):
                for number, points in enumerate(runs):
                    label = name if number == 0 else None
                    axis.plot(
                        [key(p) for p in points],
                        [p["accuracy"] for p in points],
                        "o-",
                        color=colours[name],
                        alpha=0.7,
                        linewidth=1.2,
                        markersize=3,
                        label=label,
                    )
        axes[0].set(xscale="log", xlabel="samples", ylabel="held-out accuracy, greedy", title="by samples")
        axes[1].set(xscale="log", xlabel="FLOPs, student and teacher", title="by compute")
        axes[0].legend(frameon=False)
    lines = [
        f"| to reach {TARGET:.0%} | samples | student FLOPs | teacher FLOPs | all, x distillation | best accuracy |",
        "|---|---|---|---|---|---|",
    ]
    ours = {}
    for name, runs in series.items():
        cells = [[reached(points, key) for points in runs] for key in (of_samples, of_student, of_teacher, total)]
        ours[name] = cells[3]
        base = ours["distillation"]
        ratios = [c / b for c, b in zip(cells[3], base, strict=True) if c is not None and b is not None]
        told = [shown(cell) for cell in cells[:3]] + [spread(ratios, "{:.1f}") if ratios else "not reached"]
        best = spread([100 * max(p["accuracy"] for p in points) for points in runs], "{:.1f}")
        lines.append(f"| {name} | " + " | ".join(told) + f" | {best} % |")
    text = "\n".join(lines)

    def ratio(name: str) -> tuple[str, float | None]:
        found = [c / b for c, b in zip(ours[name], ours["distillation"], strict=True) if c and b]
        return (spread(found, "{:.1f}") + " x its FLOPs" if found else f"{TARGET:.0%} not reached"), (
            statistics.median(found) if found else None
        )

    rl, rl_ratio = ratio("reinforcement learning")
    more, more_ratio = ratio("fine-tuning on teacher samples")
    return [
        Claim(
            "distillation is cheaper than RL at equal accuracy",
            "0.11 x its cost; 5 to 30 times cheaper",
            f"RL needs {rl}",
            work.seeds,
            "yes" if rl_ratio is None or rl_ratio > 2 else "no",
        ),
        Claim(
            "distillation is cheaper than more SFT",
            "2 M samples against 77 k x 4",
            f"SFT needs {more}",
            work.seeds,
            "yes" if more_ratio is None or more_ratio > 1.2 else "no",
        ),
    ], text


def of_samples(point: dict[str, float]) -> float:
    return point["samples"]


def of_student(point: dict[str, float]) -> float:
    return point["student"]


def of_teacher(point: dict[str, float]) -> float:
    return max(point["teacher"], 1e-9)


def total(point: dict[str, float]) -> float:
    return point["student"] + point["teacher"]


def shown(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "not reached"
    if max(known) < 1:
        return "0"
    text = spread(known, "{:,.0f}" if max(known) < 1e6 else "{:.1e}")
    return text + ("" if len(known) == len(values) else f", {len(known)} of {len(values)} seeds")


# -------------------------------------------------------------------------------------------------------------- curve


def curve(work: Work) -> tuple[list[Claim], str]:
    def measure(seed: int) -> list[dict[str, float]]:
        recipe = toy_recipe(seed, "prompts.limit=2048", "train.learning_rate=5e-4")
        return Replayed(recipe, make_cache(work.path / f"curve-{seed}.zarr", recipe)).curve(CURVE_STEPS)

    runs = work.runs("curve", measure)
    with figure(work.figures / "claims_curve.svg", 1, 2) as axes:
        ablations.median_curve(axes[0], runs, "accuracy", "accuracy", BLUE)
        ablations.median_curve(axes[1], runs, "fresh_kl", "fresh rollouts", BLUE)
        ablations.median_curve(axes[1], runs, "cached_kl", "cached rollouts", ORANGE, "--")
        axes[0].set(title="held-out accuracy, greedy", xlabel="optimizer step")
        axes[1].set(title="reverse KL", xlabel="optimizer step", ylabel="nats a token", yscale="log")
        axes[1].axhline(0.002, color="#777777", linewidth=0.8)
        axes[1].legend(frameon=False)
    lines = ["| step | accuracy, % | cached KL | fresh KL |", "|---|---|---|---|"]
    for row, step in enumerate(CURVE_STEPS):
        at = [run[row] for run in runs]
        cells = [spread([100 * p["accuracy"] for p in at], "{:.1f}")]
        cells += [spread([p[key] for p in at], "{:.4f}") for key in ("cached_kl", "fresh_kl")]
        lines.append(f"| {step} | " + " | ".join(cells) + " |")
    near = [next(p["step"] for p in run if p["accuracy"] >= run[-1]["accuracy"] - 0.01) for run in runs]
    cached, fresh = ([min(p[key] for p in run) for run in runs] for key in ("cached_kl", "fresh_kl"))
    return [
        Claim(
            "the curve is flat within 150 steps",
            "under 150 steps",
            f"within 1 point of the last after {spread(near, '{:.0f}')}",
            work.seeds,
            "yes" if max(near) < 150 else "no",
        ),
        Claim(
            "reverse KL falls below 0.002",
            "below 0.002",
            f"cached {spread(cached, '{:.4f}')}, fresh {spread(fresh, '{:.4f}')}",
            work.seeds,
            verdict(max(cached) < 0.002, max(fresh) < 0.002),
        ),
    ], "\n".join(lines)


def verdict(cached: bool, fresh: bool) -> str:
    return "yes" if cached and fresh else "on the cached rollouts only" if cached else "no"


# ------------------------------------------------------------------------------------------------------------ company


def company(work: Work) -> tuple[list[Claim], str]:
    def measure(seed: int) -> dict[str, Any]:
        recipe = load_recipe("company", [f"rollouts.seed={seed}", f"train.seed={seed}"])
        run = work.path / f"company-{seed}"
        continual.run(recipe, str(work.path / f"company-{seed}.zarr"), run)
        told: dict[str, Any] = json.loads((run / "gate.json").read_text())
        return told

    runs = work.runs("company", measure)
    stages = (continual.BEFORE, continual.TUNED, continual.AFTER)
    values = {
        name: {stage: [100 * run[name][stage]["value"] for run in runs] for stage in stages} for name in runs[0]
    }
    source = {"knowledge": ("18 %", "36 %", "41 %"), "formats": ("85 %", "79 %", "83 %")}
    lines = ["| | before | after SFT | after self-distillation |", "|---|---|---|---|"]
    for name, by_stage in values.items():
        lines.append(f"| {name}, the source | " + " | ".join(source[name]) + " |")
        lines.append(f"| {name}, here | " + " | ".join(spread(v, "{:.1f}") + " %" for v in by_stage.values()) + " |")

    def changes(name: str, since: str, until: str) -> list[float]:
        return [b - a for a, b in zip(values[name][since], values[name][until], strict=True)]

    up, down = changes("knowledge", *stages[:2]), changes("formats", *stages[:2])
    back, kept = changes("formats", stages[0], stages[2]), changes("knowledge", *stages[1:])
    return [
        Claim(
            "fine-tuning raises knowledge and costs format",
            "+18 and -6 points",
            f"{spread(up, '{:+.1f}')} and {spread(down, '{:+.1f}')} points",
            work.seeds,
            "yes" if min(up) >= 30 and max(down) <= -5 else "in part",
        ),
        Claim(
            "self-distillation brings format back and keeps knowledge",
            "-2 points of the original; +5",
            f"{spread(back, '{:+.1f}')} points of the original; {spread(kept, '{:+.1f}')}",
            work.seeds,
            "yes" if min(back) >= -2 and min(kept) >= -2 else "in part",
        ),
    ], "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------- ablations


def ablation(name: str, work: Work) -> tuple[list[Claim], str]:
    """A row of benchmarks/ablations.py: its table, and what it says of the claim."""
    row = ablations.Row(work.path / "ablations", 1, work.figures / f"claims_{name}.svg")
    with contextlib.redirect_stdout(io.StringIO()) as told:
        ablations.ROWS[name](row)
    table = "\n".join(line for line in told.getvalue().splitlines() if not line.startswith("figure:"))
    found = {key.rpartition(" ")[0]: value for key, value in row.results.figures.items()}

    def last(run: str) -> float:
        return float(100 * found[run][-1]["accuracy"])

    if name == "rank":
        ours = ", ".join(f"{r}: {last(f'rank {r}'):.1f} %" for r in (8, 32, 128))
        holds = "yes" if last("rank 8") < last("rank 128") - 2 else "no"
        return [Claim("a small LoRA rank costs accuracy", "rank 8: -15 points, rank 32: -6", ours, 1, holds)], table
    if name == "temperature":
        by = {t: last(f"T {t}, importance sampling") for t in ("0", "0.3", "1")}
        ours = "importance sampling: " + ", ".join(f"T {t} {a:.1f} %" for t, a in by.items())
        return [
            Claim(
                "temperature 0.3 is better than 0",
                "0.3 stabilises convergence",
                ours,
                1,
                "yes" if by["0.3"] > by["0"] + 1 else "no",
            )
        ], table
    if name == "single_prompt":
        rates = {rate: found[f"one prompt, lr {rate}"] for rate in ablations.RATES}
        ours = ", ".join(
            f"lr {r}: {100 * p[0]['accuracy']:.1f} to {100 * p[-1]['accuracy']:.1f} %" for r, p in rates.items()
        )
        kept = rates[ablations.RATES[-1]]
        return [
            Claim(
                "20 epochs on one prompt do no harm",
                "copies the style, memorises nothing",
                ours,
                1,
                "at the default rate" if kept[-1]["accuracy"] >= kept[0]["accuracy"] - 0.01 else "no",
            )
        ], table
    live, replayed = (sum(found[run]["seconds"]) for run in ("live", "replayed"))
    ours = f"{live / replayed:.1f} times faster for a first run"
    return [
        Claim(
            "a cache is faster than a live teacher",
            "3 times end to end",
            ours,
            1,
            "yes" if live / replayed > 1.5 else "no",
        )
    ], table


ROWS: dict[str, Callable[[Work], tuple[list[Claim], str]]] = {
    "routes": routes,
    "curve": curve,
    "company": company,
    **{name: partial(ablation, name) for name in ABLATIONS},
}
TITLES = {
    "routes": "Distillation, more fine-tuning, or reinforcement learning",
    "curve": "Learning curve and reverse KL",
    "company": "The company's assistant",
    "rank": "LoRA rank",
    "temperature": "Temperature of the rollouts",
    "single_prompt": "20 epochs on one prompt",
    "teacher_time": "Cached replay or a live teacher",
}


# --------------------------------------------------------------------------------------------------------------- page


def page(done: dict[str, tuple[list[Claim], str]], work: Work) -> str:
    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    changed = [line for line in git("status", "--porcelain").splitlines() if not line.endswith(("claims.md", ".svg"))]
    tree = "a clean tree" if not changed else f"a tree with {len(changed)} changed files"
    seconds = sum(figure["seconds"] for figure in work.results.figures.values())
    made = f"{git('rev-parse', '--short=8', 'HEAD')}, {tree}, on {datetime.now(UTC):%Y-%m-%d}"
    where = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    lines = [
        "# The claims, in miniature",
        "",
        f"Written by `make claims` at {made}: {where}; {seconds / 60:.0f} minutes and the ablations' own. The",
        "models are the embedded toys of 0.2 to 0.8 M parameters, so what is compared is the direction of a claim,",
        "never its size. Figures are medians, with the lowest and highest of the seeds.",
        "",
        "| claim of the source | the source | here | seeds | holds here |",
        "|---|---|---|---|---|",
        *(
            f"| {c.claim} | {c.source} | {c.ours} | {c.seeds} | {c.holds} |"
            for claims, _ in done.values()
            for c in claims
        ),
        "",
    ]
    for name, (_, table) in done.items():
        drawing = work.figures / f"claims_{name}.svg"
        lines += [f"## {TITLES[name]}", "", f"    make claims ROW={name}", "", *NOTES[name], ""]
        if drawing.exists():
            lines += [f"![{TITLES[name]}: the table below as curves](figures/{drawing.name})", ""]
        lines += [table.strip(), ""]
    return "\n".join(lines).rstrip() + "\n"


NOTES = {
    "routes": [
        "One round of rollouts and reverse KL over 8 candidates; fine-tuning on what the teacher sampled for",
        "the same prompts; GRPO (`toy-grpo`) in rounds of 256 prompts x 8. The first two have 60 steps of 256",
        "responses, and 64 to 1,024 prompts x 4. FLOPs are the ledgers': sampling, scoring and training. The",
        "student fails for one reason, a forgotten carry, which the teacher's own answers show as well as its",
        "corrections do: a world in which fine-tuning is at its best.",
    ],
    "curve": [
        "2,048 prompts x 4 once, then replayed for 150 steps of 64 prompts at learning rate 5e-4.",
    ],
    "company": [
        "`redpen continual company`: a base model that follows instructions on form, 43 private facts in",
        "documents (70 % of the tokens) and ordinary chats (30 %), then rounds of self-distillation on",
        "instructions without answers.",
    ],
    "rank": [
        "80 steps on 2,048 rollouts.",
    ],
    "temperature": [
        "80 steps on 2,048 rollouts at each temperature, with both losses.",
    ],
    "single_prompt": [
        "64 rollouts of one prompt are an epoch and a step.",
    ],
    "teacher_time": [
        "80 steps of 256 rollouts, with a teacher that answers at every step, or from a cache.",
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", choices=[*ROWS, []], help="default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=ROOT / ".claims", help="runs, and results.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "claims.md")
    args = parser.parse_args()
    work = Work(args.work, args.seeds, args.page.parent / "figures")
    done = {}
    for name in args.rows or ROWS:
        print(f"{name} ...", file=sys.stderr, flush=True)
        done[name] = ROWS[name](work)
        for claim in done[name][0]:
            print(f"{claim.claim}: {claim.ours}; holds: {claim.holds}", flush=True)
    if not args.rows:
        args.page.write_text(page(done, work), encoding="utf-8")
        print(f"{args.page}: {len(done)} rows")


if __name__ == "__main__":
    main()
