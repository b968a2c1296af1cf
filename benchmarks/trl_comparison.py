"""Offline distillation beside TRL's online `DistillationTrainer`, on the toy pair: time, memory and accuracy.

    pip install trl==1.16.0
    python benchmarks/trl_comparison.py [--seeds 3] [--steps 60] [--work DIR]

Both train a LoRA of rank 32 on the same student in fp32 with reverse KL, the same optimizer and 256 rollouts a step.
TRL samples new rollouts at every step beside a teacher in memory and sees the full vocabulary; redpen replays rounds
of 2,048 cached rollouts with 8 candidates. Every command has a process of its own and both cores, one after the
other, seed by seed. `redpen eval` measures every adapter: greedy on 2,048 held-out prompts.

    TRL                  512 prompts; every one is answered anew in each of 7.5 epochs of 4 answers
    redpen (a)           the same prompts, 4 rollouts each: rollouts + score + train
    redpen (b)           train again from that cache
    TRL, 8,192 prompts   nearly every rollout has a prompt of its own
    redpen, 2 rounds     1,024 prompts, 2 rollouts each, then 1,024 others answered by the student so far

Results are kept in DIR/results.json, and a run that was cut goes on from there; DIR may be removed afterwards.
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import trl_trainer
from toy_lab import Cost, Results, curve, evaluate, redpen
from trl_trainer import TrlRun

from pipeline.toy import asset_path

STEP_ROLLOUTS, ROUND_ROLLOUTS = 256, 2048
RANK, LEARNING_RATE, RESPONSE_TOKENS = 32, 1e-3, 32
LINES = asset_path("prompts/train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)


def run_trl(out: Path, seed: int, steps: int, prompts: int) -> dict[str, Any]:
    rows = out / "prompts.jsonl"
    rows.write_text("".join(LINES[:prompts] * max(1, ROUND_ROLLOUTS // prompts)), encoding="utf-8")
    run = TrlRun(
        student=str(asset_path("student")),
        teacher=str(asset_path("teacher")),
        dtype="float32",
        prompts=str(rows),
        rollouts=STEP_ROLLOUTS,
        max_response_tokens=RESPONSE_TOKENS,
        rank=RANK,
        learning_rate=LEARNING_RATE,
        steps=steps,
        seed=seed,
    )
    cost = trl_trainer.train(out, run)
    seconds = trl_trainer.step_seconds(out)
    figures = {"total": cost.seconds, "work": sum(seconds), "step": statistics.median(seconds)}
    return figures | {"anonymous": cost.anonymous} | evaluate(out / "eval.json", out / "adapter")


def run_redpen(out: Path, seed: int, steps: int, rounds: int, rollouts_per_prompt: int) -> dict[str, Any]:
    """Rounds of 2,048 rollouts, each with prompts of its own, and the first one trained once more."""
    cache, prompts = out / "cache.zarr", ROUND_ROLLOUTS // rollouts_per_prompt
    fixed = [
        f"prompts.limit={prompts}",
        f"rollouts.rollouts_per_prompt={rollouts_per_prompt}",
        f"rollouts.max_response_tokens={RESPONSE_TOKENS}",
        f"rollouts.seed={seed}",
        f"train.seed={seed}",
        f"train.steps={steps}",
        f"train.prompts_per_step={STEP_ROLLOUTS // rollouts_per_prompt}",
        f"train.learning_rate={LEARNING_RATE}",
        f"train.lora_rank={RANK}",
        f"train.lora_alpha={RANK}",
        "train.stop_reverse_kl=0",
    ]
    figures: dict[str, Any] = {}
    adapter: list[str] = []
    for index, name in enumerate(("first", "second")[:rounds]):
        path = out / f"{name}.jsonl"
        path.write_text("".join(LINES[index * prompts : (index + 1) * prompts]), encoding="utf-8")
        settings = [*fixed, *adapter, f"prompts.path={path}"]
        where = ("--cache", cache, "--round", index)
        costs = {stage: redpen(stage, "toy", *where, settings=settings) for stage in ("rollouts", "score")}
        costs["train"] = redpen("train", "toy", *where, "--run", out / name, settings=settings)
        figures[name] = recorded(costs, out / name)
        if index == 0:
            again = redpen("train", "toy", *where, "--run", out / "again", settings=settings)
            figures["again"] = recorded({"train": again}, out / "again")
        adapter = [f"student.adapter={out / name / 'adapter'}"]
    for name in figures:
        figures[name] |= evaluate(out / f"{name}.json", out / name / "adapter")
    return figures


def recorded(costs: dict[str, Cost], run: Path) -> dict[str, Any]:
    """What the commands cost, and what of it was work: sampling, scoring and steps, without imports and loading."""
    seconds = [metrics["time"]["seconds"] for metrics in curve(run)]
    stage_one = "".join(cost.output for name, cost in costs.items() if name != "train")
    return {
        "total": sum(cost.seconds for cost in costs.values()),
        "work": sum(seconds) + sum(map(float, re.findall(r" (?:rollouts|tokens) in ([\d.]+) s", stage_one))),
        "step": statistics.median(seconds),
        "anonymous": max(cost.anonymous for cost in costs.values()),
    }


#: what to run, and its arguments beside directory, seed and steps
RUNS: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "trl": (run_trl, (512,)),
    "redpen": (run_redpen, (1, 4)),
    "trl many": (run_trl, (8192,)),
    "redpen many": (run_redpen, (2, 2)),
}


def table(runs: dict[str, list[Any]]) -> None:
    """A line a form: medians over the seeds, ratios to TRL within a seed, and every seed's accuracy."""
    both = [{key: run["first"][key] + run["second"][key] for key in ("total", "work")} for run in runs["redpen many"]]
    forms = {
        "TRL": runs["trl"],
        "redpen (a), first run": [run["first"] for run in runs["redpen"]],
        "redpen (b), from the cache": [run["again"] for run in runs["redpen"]],
        "TRL, 8,192 prompts": runs["trl many"],
        "redpen, 1 round of 1,024 prompts": [run["first"] for run in runs["redpen many"]],
        "redpen, 2 rounds of 1,024": [r["second"] | b for r, b in zip(runs["redpen many"], both, strict=True)],
    }
    print(
        "| | s a step (TRL's / it) | s in all (it / TRL's) | s of work (it / TRL's) | GB | accuracy, % | fresh KL |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, figures in forms.items():
        middle = {key: statistics.median(f[key] for f in figures) for key in figures[0]}
        pairs = list(zip(figures, runs["trl"], strict=True))
        ratio = {key: statistics.median(f[key] / t[key] for f, t in pairs) for key in ("step", "total", "work")}
        accuracies = ", ".join(f"{100 * f['accuracy']:.1f}" for f in figures)
        costs = f"{middle['step']:.3f} ({1 / ratio['step']:.1f}) | {middle['total']:.0f} ({ratio['total']:.2f})"
        costs += f" | {middle['work']:.0f} ({ratio['work']:.2f}) | {middle['anonymous'] / 1e9:.2f}"
        print(f"| {name} | {costs} | {accuracies} | {middle['fresh_kl']:.4f} |")
    print("\nwork: sampling, scoring and steps, without imports and loading; GB: anonymous memory at its peak")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each form (default: 3)")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of a round (default: 60)")
    parser.add_argument("--work", type=Path, default=Path("trl_comparison"), help="caches, runs and results.json")
    args = parser.parse_args()
    work = args.work.resolve()

    def measure(name: str, seed: int) -> Any:
        run, arguments = RUNS[name]
        out = work / f"{name.replace(' ', '-')}-{seed}"
        shutil.rmtree(out, ignore_errors=True)  # what a cut run left
        out.mkdir(parents=True)
        return run(out, seed, args.steps, *arguments)

    results, runs = Results(work / "results.json"), {name: [] for name in RUNS}
    for seed in range(args.seeds):
        for name, done in runs.items():
            done.append(results.get(f"{name} {seed}", partial(measure, name, seed)))
    table(runs)


if __name__ == "__main__":
    main()
