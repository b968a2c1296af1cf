"""What the source (on-policy distillation by importance sampling) found, looked at on the toy: one command a row.

    pip install matplotlib
    python benchmarks/ablations.py ROW [--seeds 2] [--work DIR] [--figures docs/figures]

    rank            LoRA rank 8, 32, 128                        the source: small ranks lose accuracy
    temperature     rollouts at temperature 0, 0.3, 1.0         the source: 0.3 stabilises convergence
    single_prompt   20 epochs on one prompt                     the source: nothing is memorised
    teacher_time    teacher read once, or live at every step    the source: replay from disk is 3 times faster

Prints a table and draws DIR/ablation_ROW.svg. Each figure has reverse KL on fresh rollouts of the student as it then
is beside that on the cached ones, on which alone a stale cache looks good. Runs are those of the recipe `toy`, with
reverse KL over 8 candidates where nothing else is said.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import re
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from toy_lab import BLUE, GREEN, ORANGE, Results, figure, median_curve, spread
from toy_training import Measured, Replayed, make_cache, toy_recipe

from pipeline.api import Trainer
from pipeline.text.prompts import load_prompts
from pipeline.toy import asset_path

STEPS = (0, 5, 10, 20, 40, 80)
#: the toy recipe's learning rate, and redpen's default
RATES = ("1e-3", "1e-4")
KEYS = {
    "cached_kl": "reverse KL on cached rollouts",
    "fresh_kl": "reverse KL on fresh rollouts",
    "accuracy": "held-out accuracy",
}
Runs = dict[str, list[list[dict[str, float]]]]


class Row:
    """One row's runs: what is measured where, kept in `work`."""

    def __init__(self, work: Path, seeds: int, drawing: Path):
        self.work, self.seeds, self.drawing = work, range(seeds), drawing
        self.results = Results(work / "results.json")

    def runs(self, name: str, curve: Callable[[int], Any]) -> list[Any]:
        """`curve` of every seed."""
        return [self.results.get(f"{name} {seed}", partial(curve, seed)) for seed in self.seeds]

    def replayed(self, cache: str, steps: Sequence[int], seed: int, *settings: str) -> list[dict[str, float]]:
        recipe = toy_recipe(seed, *settings)
        return Replayed(recipe, make_cache(self.work / f"{cache}-{seed}.zarr", recipe)).curve(steps)

    def show(self, runs: Runs, styles: dict[str, tuple[str, str]]) -> None:
        """A line for each setting, after the last step, and its curves."""
        first = next(iter(runs.values()))[0][0]
        print(f"before: accuracy {first['accuracy']:.1%}, fresh reverse KL {first['fresh_kl']:.4f}\n")
        print(f"| after {next(iter(runs.values()))[0][-1]['step']} steps | " + " | ".join(KEYS.values()) + " |")
        print("|---|---|---|---|")
        for name, curves in runs.items():
            last = {key: [run[-1][key] for run in curves] for key in KEYS}
            kls = " | ".join(spread(last[key], "{:.4f}") for key in ("cached_kl", "fresh_kl"))
            print(f"| {name} | {kls} | {spread([100 * a for a in last['accuracy']], '{:.1f}')} % |")
        with figure(self.drawing, 1, 3) as axes:
            for axis, (key, title) in zip(axes, KEYS.items(), strict=True):
                for name, curves in runs.items():
                    median_curve(axis, curves, key, name, *styles[name])
                axis.set(title=title, xlabel="optimizer step")
                axis.xaxis.get_major_locator().set_params(integer=True)
                if key != "accuracy":
                    axis.set(yscale="log", ylabel="nats a token")
            limits = [axis.get_ylim() for axis in axes[:2]]
            for axis in axes[:2]:
                axis.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
            axes[2].set_ylim(min(0.5, axes[2].get_ylim()[0]), 1)
            axes[2].legend(frameon=False)


def rank(row: Row) -> None:
    def curve(rank: int, seed: int) -> list[dict[str, float]]:
        return row.replayed("cache", STEPS, seed, f"train.lora_rank={rank}")

    runs = {f"rank {r}": row.runs(f"rank {r}", partial(curve, r)) for r in (8, 32, 128)}
    row.show(runs, dict(zip(runs, ((ORANGE, "-"), (BLUE, "-"), (GREEN, "-")), strict=True)))


def temperature(row: Row) -> None:
    """Both losses: it is importance sampling that the source tempers."""
    runs: Runs = {}
    styles = {}
    for loss, dashes in (("reverse_kl", "-"), ("importance_sampling", "--")):
        for value, colour in ((0.0, ORANGE), (0.3, GREEN), (1.0, BLUE)):
            settings = (f"train.loss={loss}", f"rollouts.temperature={value}")

            def curve(seed: int, cache: str = f"T{value:g}", settings: tuple[str, ...] = settings) -> Any:
                return row.replayed(cache, STEPS, seed, *settings)

            name = f"T {value:g}, {loss.replace('_', ' ')}"
            runs[name], styles[name] = row.runs(name, curve), (colour, dashes)
    row.show(runs, styles)


def single_prompt(row: Row) -> None:
    """64 rollouts of one prompt are a step and an epoch; a seed is another prompt with a carry."""
    problems = [json.loads(line) for line in asset_path("prompts/train.jsonl").read_text().splitlines()]
    hard = [problem for problem in problems if problem["source"] == "toy/carry"]

    def curve(rate: str, seed: int) -> list[dict[str, float]]:
        path = row.work / f"prompt-{seed}.jsonl"
        path.write_text(json.dumps(hard[seed]) + "\n")
        settings = ("rollouts.rollouts_per_prompt=64", "rollouts.prompts_per_block=1", "train.prompts_per_step=1")
        where = (f"prompts.path={path}", f"train.learning_rate={rate}")
        return row.replayed("one", (0, 2, 5, 10, 20), seed, *settings, *where)

    runs = {f"one prompt, lr {rate}": row.runs(f"one prompt, lr {rate}", partial(curve, rate)) for rate in RATES}
    row.show(runs, dict(zip(runs, ((ORANGE, "-"), (BLUE, "-")), strict=True)))


def teacher_time(row: Row) -> None:
    """A loop that samples and asks the teacher at every step, and a cache that is replayed, for as many updates."""
    parts = {"student samples and reads": BLUE, "teacher reads": ORANGE, "updates": GREEN}

    def live(seed: int) -> dict[str, Any]:
        recipe = toy_recipe(seed)
        measured, points, seconds = Measured(recipe), [], [0.0, 0.0, 0.0]
        trainer = Trainer(measured.student, recipe.train)
        prompts = [str(record["prompt"]) for record in load_prompts(recipe.prompts)]
        chosen = random.Random(seed)
        for step in range(1 + STEPS[-1]):
            if step in STEPS:
                points.append({"step": step, **measured.now()})
            clock = [time.perf_counter()]
            rollouts = measured.student.sample(chosen.sample(prompts, recipe.train.prompts_per_step), recipe.rollouts)
            clock.append(time.perf_counter())
            scores = measured.teacher.compute_scores(rollouts)
            clock.append(time.perf_counter())
            trainer.update(rollouts, scores, loss_fn="reverse_kl")
            clock.append(time.perf_counter())
            seconds = [total + b - a for total, a, b in zip(seconds, clock[:-1], clock[1:], strict=True)]
        return {"seconds": seconds, "curve": points}

    def replayed(seed: int) -> dict[str, Any]:
        recipe, cache = toy_recipe(seed), row.work / f"timed-{seed}.zarr"
        shutil.rmtree(cache, ignore_errors=True)
        with contextlib.redirect_stdout(io.StringIO()) as recorded:
            make_cache(cache, recipe, sys.stdout)
        sampled, student, teacher = map(float, re.findall(r" (?:rollouts|tokens) in ([\d.]+) s", recorded.getvalue()))
        replayed, seconds = Replayed(recipe, cache), 0.0
        points = []
        for step in STEPS:
            started = time.perf_counter()
            replayed.advance(step)
            seconds += time.perf_counter() - started
            points.append({"step": step, **replayed.now()})
        return {"seconds": [sampled + student, teacher, seconds], "curve": points}

    recorded = {"live": row.runs("live", live), "from a cache": row.runs("replayed", replayed)}
    middle = {
        name: [statistics.median(run["seconds"][part] for run in runs) for part in range(len(parts))]
        for name, runs in recorded.items()
    }
    again = [0.0, 0.0, middle["from a cache"][2]]
    print(f"| {STEPS[-1]} steps, s | " + " | ".join(parts) + " | in all | accuracy |\n|---|---|---|---|---|---|")
    for name, seconds in (middle | {"from the same cache again": again}).items():
        runs = recorded.get(name, recorded["from a cache"])
        accuracy = spread([100 * run["curve"][-1]["accuracy"] for run in runs], "{:.1f}")
        print(f"| {name} | " + " | ".join(f"{s:.1f}" for s in [*seconds, sum(seconds)]) + f" | {accuracy} % |")
    live_s, first_s, again_s = sum(middle["live"]), sum(middle["from a cache"]), sum(again)
    ratios = ", ".join(f"{n}: {n * live_s / (first_s + (n - 1) * again_s):.1f}" for n in (1, 2, 4, 8))
    print(f"\ntimes faster than live, by runs from one cache: {ratios}")
    with figure(row.drawing, 1, 2) as axes:
        for place, seconds in enumerate([*middle.values(), again]):
            below = 0.0
            for (part, colour), value in zip(parts.items(), seconds, strict=True):
                axes[0].bar(place, value, 0.6, below, color=colour, label=part if place == 0 else None)
                below += value
        axes[0].set(title=f"{STEPS[-1]} steps of 256 rollouts", ylabel="seconds", xticks=range(3))
        axes[0].set_xticklabels(["live teacher", "first run\nfrom a cache", "again from\nthe same cache"])
        axes[0].legend(frameon=False)
        curves = {name: [run["curve"] for run in runs] for name, runs in recorded.items()}
        median_curve(axes[1], curves["live"], "fresh_kl", "live: fresh", BLUE)
        median_curve(axes[1], curves["from a cache"], "fresh_kl", "from a cache: fresh", ORANGE)
        median_curve(axes[1], curves["from a cache"], "cached_kl", "from a cache: cached", ORANGE, "--")
        axes[1].set(title="reverse KL", xlabel="optimizer step", ylabel="nats a token", yscale="log")
        axes[1].legend(frameon=False)


ROWS = {row.__name__: row for row in (rank, temperature, single_prompt, teacher_time)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", choices=ROWS)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("ablations"), help="caches, and results.json")
    parser.add_argument("--figures", type=Path, default=Path("docs/figures"))
    args = parser.parse_args()
    ROWS[args.row](Row(args.work, args.seeds, args.figures / f"ablation_{args.row}.svg"))


if __name__ == "__main__":
    main()
