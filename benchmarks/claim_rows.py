"""The rows of `benchmarks/claims.py`: each measures its runs and compares them with a published claim."""

from __future__ import annotations

import contextlib
import io
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ablations
from toy_lab import BLUE, GREEN, ORANGE, Results, evaluate, figure, median_curve, spread
from toy_training import Replayed, make_cache, toy_recipe

import cache_schema as cs
import pipeline.rollouts.stage
from pipeline import continual, distill
from pipeline.config import Recipe, load_recipe
from pipeline.engines.heldout import HeldOutPrompts
from pipeline.models import load as models
from pipeline.sft import stage as sft
from pipeline.text.detokenize import load_decoder
from pipeline.train import stage as train

#: Of one-cache routes: prompts, with four responses each, and steps of 256 responses.
BUDGETS, STEPS = (64, 256, 1024), (15, 30, 60)
GRPO_ROUNDS = (1, 2, 3, 4, 5, 6, 8, 10, 12)
TARGET = 0.95
CURVE_STEPS = (0, 10, 20, 40, 60, 80, 100, 125, 150)

Point = dict[str, float]


@dataclass(frozen=True)
class Claim:
    """A line of the page's first table."""

    claim: str
    source: str
    ours: str
    seeds: int
    holds: str


@dataclass(frozen=True)
class Found:
    """What a row says: its lines of the first table, and its own table."""

    claims: list[Claim]
    table: str


class Work:
    """Where results are, and how often what is measured."""

    def __init__(self, path: Path, seeds: int, figures: Path):
        self.path, self.seeds, self.figures = path, seeds, figures
        self.results = Results(path / "results.json")

    def runs(self, name: str, measure: Callable[[int], Any]) -> list[Any]:
        """`measure` of every seed; its time is kept too."""

        def timed(seed: int) -> Any:
            started = time.perf_counter()
            with contextlib.redirect_stdout(sys.stderr):
                found = measure(seed)
            return {"found": found, "seconds": time.perf_counter() - started}

        return [self.results.get(f"{name} {seed}", partial(timed, seed))["found"] for seed in range(self.seeds)]


def yes_if(holds: bool, otherwise: str = "no") -> str:
    return "yes" if holds else otherwise


# ------------------------------------------------------------------------------------------------------------- routes


def accuracy(recipe: Recipe, adapter: Path) -> float:
    """Greedy, on 1,024 held-out sums."""
    cfg = recipe.student.model_copy(update={"adapter": str(adapter)})
    prompts = HeldOutPrompts.load(recipe, "accuracy", 1024)
    return prompts.count(models.load_model(cfg)) / len(prompts.prompts)


def flops(ledger: Path, teacher: str | None = None) -> dict[str, float]:
    """Of a run, and the `teacher` line's part of them."""
    costs = json.loads(ledger.read_text())
    return {
        "flops": sum(cost["flops"] for cost in costs.values()),
        "teacher": costs[teacher]["flops"] if teacher else 0.0,
    }


def opd(work: Path, n_prompts: int, seed: int) -> list[Point]:
    """One cache, replayed for some numbers of steps."""
    points = []
    for steps in STEPS:
        recipe = toy_recipe(seed, f"prompts.limit={n_prompts}", f"train.steps={steps}", "train.stop_reverse_kl=0")
        name = f"opd-{n_prompts}-{seed}"
        cache, run = make_cache(work / f"{name}.zarr", recipe), work / f"{name}-{steps}"
        train.run(recipe, str(cache), run)
        point = {"samples": 4.0 * n_prompts, "accuracy": accuracy(recipe, run / "adapter")}
        points.append(point | flops(run / "ledger.json", "score teacher"))
    return points


def more_sft(work: Path, n_prompts: int, seed: int) -> list[Point]:
    """Four responses of the teacher to each prompt, at temperature 1, trained on for some numbers of steps."""
    recipe = toy_recipe(seed, f"prompts.limit={n_prompts}", "sft.examples_per_step=256", "sft.learning_rate=1e-3")
    teacher = recipe.model_copy(update={"student": recipe.student.model_copy(update={"model": "toy:teacher"})})
    name = f"sft-{n_prompts}-{seed}"
    pipeline.rollouts.stage.run(teacher, str(work / f"{name}.zarr"))
    round_ = cs.open(str(work / f"{name}.zarr")).round()
    data = work / f"{name}.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in answers(round_)))
    sampling = train.ledger.table(train.ledger.stage_one(teacher, round_))["rollouts"]["flops"]
    assert sampling is not None
    points = []
    for steps in STEPS:
        run = work / f"{name}-{steps}"
        sft.run(recipe.model_copy(update={"sft": recipe.sft.model_copy(update={"steps": steps})}), [str(data)], run)
        learning = flops(run / "ledger.json")["flops"]
        point = {"samples": 4.0 * n_prompts, "accuracy": accuracy(recipe, run / "adapter")}
        points.append(point | {"flops": learning + sampling, "teacher": sampling})
    return points


def answers(round_: cs.Round) -> Iterable[dict[str, str]]:
    """Prompts and responses of a round, as text."""
    decoder = load_decoder(round_.manifest)
    for block in map(round_.rollouts.read, range(round_.n_blocks)):
        for row in range(block.n_rows):
            prompt = round_.prompts[int(block.prompt_index[block.row_prompt[row]])]["prompt"]
            text = decoder.decode(block.response(row).tolist()).removesuffix("<|endoftext|>")
            yield {"prompt": str(prompt), "response": text}


def grpo(work: Path, seed: int) -> list[Point]:
    """Rounds of rewards; the student of each."""
    settings = (f"rollouts.seed={seed}", f"train.seed={seed}", f"distill.rounds={GRPO_ROUNDS[-1]}")
    recipe, run = load_recipe("toy-grpo", settings), work / f"grpo-{seed}"
    distill.run(recipe, str(work / f"grpo-{seed}.zarr"), run)
    points, spent = [], 0.0
    for index in range(GRPO_ROUNDS[-1]):
        of_round = run / "rounds" / f"{index:05d}"
        spent += flops(of_round / "ledger.json")["flops"]
        if index + 1 in GRPO_ROUNDS:
            samples = (index + 1) * (recipe.prompts.limit or 0) * recipe.rollouts.rollouts_per_prompt
            point = {"samples": float(samples), "accuracy": accuracy(recipe, of_round / "adapter")}
            points.append(point | {"flops": spent, "teacher": 0.0})
    return points


def reached(points: Sequence[Point], key: str) -> float:
    """What it takes to reach `TARGET`, log-linear between the points before and after; infinite where none does."""
    before = None
    for point in points:
        if point["accuracy"] >= TARGET:
            if before is None:
                return point[key]
            part = (TARGET - before["accuracy"]) / (point["accuracy"] - before["accuracy"])
            return math.exp((1 - part) * math.log(before[key]) + part * math.log(point[key]))
        before = point
    return math.inf


def least(curves: Sequence[Sequence[Point]], key: str) -> float:
    """Over curves by steps, and across them by samples."""
    return min(reached(points, key) for points in [*curves, *zip(*curves, strict=True)])


def routes(work: Work) -> Found:
    series: dict[str, list[list[list[Point]]]] = {}  # by route, seed and budget
    for name, measure in {"distillation": opd, "fine-tuning on teacher samples": more_sft}.items():
        by_budget = [work.runs(f"{name} {n}", partial(measure, work.path, n)) for n in BUDGETS]
        series[name] = [list(curves) for curves in zip(*by_budget, strict=True)]
    series["reinforcement learning"] = [[points] for points in work.runs("grpo", partial(grpo, work.path))]
    draw_routes(work.figures / "claims_routes.svg", series)
    lines = [
        f"| to reach {TARGET:.0%} | samples | x distillation | FLOPs, both models | x distillation | best accuracy |",
        "|---|---|---|---|---|---|",
    ]
    ratios: dict[tuple[str, str], list[float]] = {}
    for name, runs in series.items():
        cells = []
        for key, form in (("samples", "{:,.0f}"), ("flops", "{:.1e}")):
            needed = [least(curves, key) for curves in runs]
            base = [least(curves, key) for curves in series["distillation"]]
            ratios[name, key] = [own / other for own, other in zip(needed, base, strict=True)]
            cells += [spread(needed, form), spread(ratios[name, key], "{:.1f}")]
        best = [100 * max(point["accuracy"] for points in curves for point in points) for curves in runs]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {spread(best, '{:.1f}')} % |")

    def claim(title: str, source: str, name: str) -> Claim:
        by_samples, by_flops = ratios[name, "samples"], ratios[name, "flops"]
        ours = f"{spread(by_samples, '{:.1f}')} x the samples, {spread(by_flops, '{:.1f}')} x the FLOPs"
        fewer = [statistics.median(values) > 1.2 for values in (by_samples, by_flops)]
        holds = {(True, True): "yes", (True, False): "in samples", (False, True): "in FLOPs", (False, False): "no"}
        return Claim(title, source, ours, work.seeds, holds[fewer[0], fewer[1]])

    return Found(
        [
            claim(
                "distillation is cheaper than RL", "0.11 x its cost; 5 to 30 times cheaper", "reinforcement learning"
            ),
            claim(
                "distillation is cheaper than more SFT",
                "77 k x 4 samples do what 2 M do",
                "fine-tuning on teacher samples",
            ),
        ],
        "\n".join(lines),
    )


def draw_routes(path: Path, series: dict[str, list[list[list[Point]]]]) -> None:
    """By samples across the budgets, after all steps; by compute every budget's steps."""
    with figure(path, 1, 2) as axes:
        for colour, (name, runs) in zip((BLUE, GREEN, ORANGE), series.items(), strict=True):
            style = {"color": colour, "alpha": 0.6, "linewidth": 1, "markersize": 3}
            for curves in runs:
                longest = curves[0] if len(curves) == 1 else [points[-1] for points in curves]
                for axis, key, lines in ((axes[0], "samples", [longest]), (axes[1], "flops", curves)):
                    for points in lines:
                        axis.plot([p[key] for p in points], [p["accuracy"] for p in points], "o-", **style)
            axes[1].plot([], [], "o-", label=name, **style)
        axes[0].set(xscale="log", xlabel="samples", ylabel="held-out accuracy, greedy", title="by samples")
        axes[1].set(xscale="log", xlabel="FLOPs of student and teacher", title="by compute")
        for axis in axes:
            axis.axhline(TARGET, color="#777777", linewidth=0.8)
            axis.xaxis.set_minor_formatter("")
        axes[1].legend(frameon=False, loc="lower right")


# -------------------------------------------------------------------------------------------------------------- curve


def curve(work: Work) -> Found:
    def measure(seed: int) -> list[Point]:
        recipe = toy_recipe(seed)
        return Replayed(recipe, make_cache(work.path / f"curve-{seed}.zarr", recipe)).curve(CURVE_STEPS)

    runs = work.runs("curve", measure)
    with figure(work.figures / "claims_curve.svg", 1, 2) as axes:
        median_curve(axes[0], runs, "accuracy", "accuracy", BLUE)
        median_curve(axes[1], runs, "fresh_kl", "fresh rollouts", BLUE)
        median_curve(axes[1], runs, "cached_kl", "cached rollouts", ORANGE, "--")
        axes[0].set(title="held-out accuracy, greedy", xlabel="optimizer step")
        axes[1].set(title="reverse KL", xlabel="optimizer step", ylabel="nats a token", yscale="log")
        axes[1].axhline(0.002, color="#777777", linewidth=0.8)
        axes[1].legend(frameon=False)
    lines = ["| step | accuracy, % | cached KL | fresh KL |", "|---|---|---|---|"]
    for row, step in enumerate(CURVE_STEPS):
        at = [run[row] for run in runs]
        cells = [spread([100 * point["accuracy"] for point in at], "{:.1f}")]
        cells += [spread([point[key] for point in at], "{:.4f}") for key in ("cached_kl", "fresh_kl")]
        lines.append(f"| {step} | " + " | ".join(cells) + " |")
    best = [max(point["accuracy"] for point in run) for run in runs]
    near = [next(p["step"] for p in run if p["accuracy"] >= top - 0.01) for run, top in zip(runs, best, strict=True)]
    cached, fresh = ([min(point[key] for point in run) for run in runs] for key in ("cached_kl", "fresh_kl"))
    holds = yes_if(max(fresh) < 0.002, yes_if(max(cached) < 0.002, "no").replace("yes", "on the cached rollouts"))
    return Found(
        [
            Claim(
                "it saturates within 150 steps",
                "under 150 steps",
                f"within 1 point of the best after {spread(near, '{:.0f}')}",
                work.seeds,
                yes_if(max(near) < 150),
            ),
            Claim(
                "reverse KL falls below 0.002",
                "below 0.002",
                f"cached {spread(cached, '{:.4f}')}, fresh {spread(fresh, '{:.4f}')}",
                work.seeds,
                holds,
            ),
        ],
        "\n".join(lines),
    )


# ------------------------------------------------------------------------------------------------------------- rounds


def rounds(work: Work) -> Found:
    """`redpen train toy` against `redpen distill toy`, both as `redpen eval` sees them."""

    def measure(seed: int) -> dict[str, Any]:
        recipe, name = toy_recipe(seed), f"rounds-{seed}"
        one, many = work.path / f"one-{seed}", work.path / name
        train.run(recipe, str(make_cache(work.path / f"one-{seed}.zarr", recipe)), one)
        distill.run(recipe, str(work.path / f"{name}.zarr"), many)
        found: dict[str, Any] = {
            key: evaluate(work.path / f"{path.name}.json", path / "adapter")
            for key, path in {"one": one, "many": many}.items()
        }
        ended = json.loads((many / "run.json").read_text())["result"]["sentence"]
        return found | {"rounds": len(list((many / "rounds").iterdir())), "ended": ended}

    runs = work.runs("rounds", measure)
    lines = ["| | accuracy, % | fresh KL | rounds |", "|---|---|---|---|"]
    for key, title in (("one", "`redpen train toy`"), ("many", "`redpen distill toy`")):
        cells = [spread([100 * run[key]["accuracy"] for run in runs], "{:.1f}")]
        cells.append(spread([run[key]["fresh_kl"] for run in runs], "{:.4f}"))
        cells.append("1" if key == "one" else spread([run["rounds"] for run in runs], "{:.0f}"))
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    lines += ["", "How they ended:", "", *(f"* {run['ended']}" for run in runs)]
    more = [100 * (run["many"]["accuracy"] - run["one"]["accuracy"]) for run in runs]
    less = [run["one"]["fresh_kl"] / run["many"]["fresh_kl"] for run in runs]
    fresh = [run["many"]["fresh_kl"] for run in runs]
    return Found(
        [
            Claim(
                "new rollouts help once the old are used up",
                "-",
                f"{spread(more, '{:+.1f}')} points, fresh reverse KL {spread(less, '{:.1f}')} times smaller",
                work.seeds,
                yes_if(min(more) > 0 and min(less) > 1),
            ),
            Claim(
                "they bring reverse KL on fresh rollouts below 0.002",
                "below 0.002",
                spread(fresh, "{:.4f}"),
                work.seeds,
                yes_if(max(fresh) < 0.002),
            ),
        ],
        "\n".join(lines),
    )


# ------------------------------------------------------------------------------------------------------------ company


def company(work: Work) -> Found:
    def measure(seed: int) -> dict[str, Any]:
        recipe = load_recipe("company", [f"rollouts.seed={seed}", f"train.seed={seed}"])
        run = work.path / f"company-{seed}"
        continual.run(recipe, str(work.path / f"company-{seed}.zarr"), run)
        recorded: dict[str, Any] = json.loads((run / "gate.json").read_text())
        return recorded

    runs = work.runs("company", measure)
    stages = (continual.BEFORE, continual.TUNED, continual.AFTER)
    values = {
        name: {stage: [100 * run[name][stage]["value"] for run in runs] for stage in stages} for name in runs[0]
    }
    source = {"knowledge": ("18 %", "36 %", "41 %"), "formats": ("85 %", "79 %", "83 %")}
    lines = ["| | before | after SFT | after self-distillation |", "|---|---|---|---|"]
    for name, by_stage in values.items():
        lines.append(f"| {name}, published | " + " | ".join(source[name]) + " |")
        lines.append(f"| {name}, here | " + " | ".join(spread(v, "{:.1f}") + " %" for v in by_stage.values()) + " |")

    def changes(name: str, since: str, until: str) -> list[float]:
        return [b - a for a, b in zip(values[name][since], values[name][until], strict=True)]

    up, down = changes("knowledge", *stages[:2]), changes("formats", *stages[:2])
    back, kept = changes("formats", stages[0], stages[2]), changes("knowledge", *stages[1:])
    return Found(
        [
            Claim(
                "fine-tuning raises knowledge and costs format",
                "+18 and -6 points",
                f"{spread(up, '{:+.1f}')} and {spread(down, '{:+.1f}')} points",
                work.seeds,
                yes_if(min(up) >= 30 and max(down) <= -5, "in part"),
            ),
            Claim(
                "self-distillation brings format back and keeps knowledge",
                "-2 points of the original; +5",
                f"{spread(back, '{:+.1f}')} points of the original; {spread(kept, '{:+.1f}')}",
                work.seeds,
                yes_if(min(back) >= -2 and min(kept) >= -2, "in part"),
            ),
        ],
        "\n".join(lines),
    )


# ---------------------------------------------------------------------------------------------------------- ablations


def ablation(name: str, work: Work) -> Found:
    """A row of benchmarks/ablations.py, with one seed: its table, and what it says of the claim."""
    row = ablations.Row(work.path / "ablations", 1, work.figures / f"claims_{name}.svg")
    with contextlib.redirect_stdout(io.StringIO()) as recorded:
        ablations.ROWS[name](row)
    table = "\n".join(line for line in recorded.getvalue().splitlines() if not line.startswith("figure:"))
    found = {key.rpartition(" ")[0]: value for key, value in row.results.figures.items()}

    def percent(run: str, point: int = -1) -> float:
        return float(100 * found[run][point]["accuracy"])

    if name == "rank":
        ranks = {rank: percent(f"rank {rank}") for rank in (8, 32, 128)}
        ours = ", ".join(f"{rank}: {value:.1f} %" for rank, value in ranks.items())
        holds = yes_if(ranks[8] < ranks[128] - 2)
        claim = Claim("a small LoRA rank costs accuracy", "rank 8: -15 points, rank 32: -6", ours, 1, holds)
    elif name == "temperature":
        by = {t: percent(f"T {t}, importance sampling") for t in ("0", "0.3", "1")}
        ours = "importance sampling: " + ", ".join(f"T {t} {value:.1f} %" for t, value in by.items())
        holds = yes_if(by["0.3"] > by["0"] + 1)
        claim = Claim("temperature 0.3 is better than 0", "0.3 stabilises convergence", ours, 1, holds)
    elif name == "single_prompt":
        ends = {
            rate: (found[f"one prompt, lr {rate}"][0], found[f"one prompt, lr {rate}"][-1])
            for rate in ablations.RATES
        }
        ours = "; ".join(
            f"lr {rate}: {100 * a['accuracy']:.1f} to {100 * b['accuracy']:.1f} %, fresh reverse KL "
            f"{a['fresh_kl']:.3f} to {b['fresh_kl']:.3f}"
            for rate, (a, b) in ends.items()
        )
        harmless = [
            rate
            for rate, (a, b) in ends.items()
            if b["accuracy"] >= a["accuracy"] - 0.01 and b["fresh_kl"] <= 1.1 * a["fresh_kl"]
        ]
        holds = yes_if(len(harmless) == len(ends), f"at lr {harmless[-1]}" if harmless else "no")
        claim = Claim("20 epochs on one prompt do no harm", "it copies the style, memorises nothing", ours, 1, holds)
    else:
        live, replayed = (sum(found[run]["seconds"]) for run in ("live", "replayed"))
        ours = f"{live / replayed:.1f} times faster for a first run"
        holds = yes_if(live / replayed > 1.5)
        claim = Claim("a cache is faster than a live teacher", "3 times end to end", ours, 1, holds)
    return Found([claim], table)


ROWS: dict[str, Callable[[Work], Found]] = {
    "routes": routes,
    "curve": curve,
    "rounds": rounds,
    "company": company,
    **{name: partial(ablation, name) for name in ("rank", "temperature", "single_prompt", "teacher_time")},
}
