"""Reverse KL over 8 candidates beside importance sampling on the sampled token: curves and gradient noise.

    pip install matplotlib
    python benchmarks/loss_comparison.py [--seeds 3] [--work DIR] [--figure docs/figures/loss_comparison.svg]

Both replay the same 2,048 cached rollouts of the toy student (512 prompts x 4, T = 1) with LoRA rank 32, 256 rollouts
a step, importance sampling with the advantage of the current student. Measured after 0 to 80 steps: reverse KL on the
cached rollouts, on fresh ones of the student as it then is (512 held-out prompts), and greedy held-out accuracy.

Gradient noise is trace(Cov g) / |E g|^2 of the gradient g of a step, over 32 disjoint batches of 256 rollouts at
fixed weights: those of the sampling student, and those after 20 steps of reverse KL. Both losses have the same E g
where 8 candidates hold nearly all of the student's mass, so noise is given in units of one signal, reverse KL's.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from toy_lab import BLUE, ORANGE, Results, figure, median_curve, spread
from toy_training import Replayed, make_cache, toy_recipe

from pipeline.train.build import make_objective

LOSSES = {"reverse_kl": ("reverse KL, 8 candidates", BLUE), "importance_sampling": ("importance sampling", ORANGE)}
STEPS = (0, 5, 10, 20, 40, 80)
NOISE_BATCHES = 32


def curve(work: Path, loss: str, seed: int) -> list[dict[str, float]]:
    recipe = toy_recipe(seed, f"train.loss={loss}")
    return Replayed(recipe, make_cache(work / f"cache-{seed}.zarr", recipe)).curve(STEPS)


def noise(work: Path, seed: int) -> dict[str, Any]:
    """trace(Cov g), by steps taken and loss, in units of the squared length of reverse KL's mean gradient."""
    recipe = toy_recipe(seed, f"prompts.limit={NOISE_BATCHES * 64}")
    replayed = Replayed(recipe, make_cache(work / f"noise-{seed}.zarr", recipe))
    trainer, recorded = replayed.trainer, {}
    objectives = {
        loss: make_objective(toy_recipe(seed, f"train.loss={loss}"), replayed.round, ["teacher"]) for loss in LOSSES
    }
    for steps in (0, 20):
        replayed.curve([steps])
        means, traces = {}, {}
        for loss, objective in objectives.items():
            trainer.objective = objective
            total, squares = torch.zeros(()), torch.zeros(())
            for batch in range(NOISE_BATCHES):
                trainer.gradient(replayed.replay.batch(batch))
                gradients = (p.grad for p in trainer.parameters.values() if p.grad is not None)
                gradient = torch.cat([g.flatten() for g in gradients]).double()
                total, squares = total + gradient, squares + gradient.square()
            means[loss] = total / NOISE_BATCHES
            traces[loss] = float((squares - total * means[loss]).sum() / (NOISE_BATCHES - 1))
        trainer.objective = objectives["reverse_kl"]
        # The mean of n batches is longer than E g by its own noise.
        signal = float(means["reverse_kl"].square().sum()) - traces["reverse_kl"] / NOISE_BATCHES
        cosine = float(torch.cosine_similarity(*means.values(), dim=0))
        recorded[str(steps)] = {loss: trace / signal for loss, trace in traces.items()} | {"cosine": cosine}
    return recorded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("loss_comparison"), help="caches and results.json")
    parser.add_argument("--figure", type=Path, default=Path("docs/figures/loss_comparison.svg"))
    args = parser.parse_args()
    results, seeds = Results(args.work / "results.json"), range(args.seeds)
    noises = [results.get(f"noise {seed}", partial(noise, args.work, seed)) for seed in seeds]
    curves = {
        loss: [results.get(f"{loss} {seed}", partial(curve, args.work, loss, seed)) for seed in seeds]
        for loss in LOSSES
    }

    print("| step | " + " | ".join(f"{name}: cached KL, fresh KL, accuracy" for name, _ in LOSSES.values()) + " |")
    print("|---|" + "---|" * len(LOSSES))
    for row, step in enumerate(STEPS):
        cells = []
        for runs in curves.values():
            points = [run[row] for run in runs]
            kls = ", ".join(spread([p[key] for p in points], "{:.4f}") for key in ("cached_kl", "fresh_kl"))
            cells.append(f"{kls}, {spread([100 * p['accuracy'] for p in points], '{:.1f}')} %")
        print(f"| {step} | {' | '.join(cells)} |")
    print(
        "\n| gradient noise | " + " | ".join(name for name, _ in LOSSES.values()) + " | ratio | cosine of the means |"
    )
    print("|---|---|---|---|---|")
    for steps in ("0", "20"):
        recorded = [n[steps] for n in noises]
        ratio = spread([t["importance_sampling"] / t["reverse_kl"] for t in recorded], "{:.1f}")
        both = " | ".join(spread([t[loss] for t in recorded], "{:.2f}") for loss in LOSSES)
        print(f"| after {steps} steps | {both} | {ratio} | {spread([t['cosine'] for t in recorded], '{:.3f}')} |")

    with figure(args.figure, 2, 2) as axes:
        panels = {"cached_kl": "reverse KL on cached rollouts", "fresh_kl": "reverse KL on fresh rollouts"}
        for axis, (key, title) in zip(axes, (panels | {"accuracy": "held-out accuracy"}).items(), strict=False):
            for loss, (name, colour) in LOSSES.items():
                median_curve(axis, curves[loss], key, name, colour)
            axis.set(title=title, xlabel="optimizer step")
            if key in panels:
                axis.set(yscale="log", ylabel="nats a token", ylim=(5e-4, 0.2))
        axes[2].set_ylim(0.5, 1)
        for place, (loss, (name, colour)) in enumerate(LOSSES.items()):
            for group, steps in enumerate(("0", "20")):
                values = [n[steps][loss] for n in noises]
                axes[3].bar(group + 0.36 * place, sum(values) / len(values), 0.34, color=colour, label=name)
                axes[3].plot([group + 0.36 * place] * len(values), values, "k.", markersize=4)
        axes[3].set(title="gradient noise, trace(Cov) / signal²", xticks=(0.18, 1.18), yscale="log")
        axes[3].set_xticklabels(("student that sampled", "after 20 steps"))
        axes[0].legend(frameon=False)


if __name__ == "__main__":
    main()
