"""The toy from end to end, over seeds and losses: what `make train` shows, with its spread.

    python benchmarks/toy_seeds.py [--seeds 0 1 2] [--losses reverse_kl importance_sampling] [--set KEY=VALUE ...]
    python benchmarks/toy_seeds.py --losses forward_kl forward_kl,entry_clip=0.05

A loss may have settings of [train] after it. A seed decides the rollouts, the replay order and the new LoRA weights;
all losses of a seed replay one cache. One line a run: greedy and sampled accuracy on held-out prompts and fresh
reverse KL, before and after, optimizer steps, and seconds by command (start-up and imports included).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def redpen(*args: str) -> float:
    """Run a command of redpen; its seconds."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "pipeline", *args], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"redpen {' '.join(args)} failed:\n{done.stdout}{done.stderr}")
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--losses", nargs="+", default=["reverse_kl", "importance_sampling"])
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    print(
        "| loss | seed | greedy accuracy | sampled | fresh reverse KL | steps | rollouts + score + train + eval, s |"
    )
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as root:
        for seed in args.seeds:
            cache = f"{root}/{seed}.zarr"
            own = [*args.settings, f"rollouts.seed={seed}", f"train.seed={seed}"]
            settings = [part for setting in own for part in ("--set", setting)]
            stage_one = [redpen(stage, "toy", "--cache", cache, *settings) for stage in ("rollouts", "score")]
            for loss in args.losses:
                run = Path(root, f"{loss}-{seed}")
                name, *more = loss.split(",")
                chosen = [*settings, "--set", f"train.loss={name}"]
                chosen += [part for setting in more for part in ("--set", f"train.{setting}")]
                train = redpen("train", "toy", "--cache", cache, "--run", str(run), *chosen)
                seconds = [*stage_one, train, redpen("eval", str(run))]
                figures = json.loads((run / "eval.json").read_text())
                before, after = figures["before"], figures["after"]
                accuracy, kl = (
                    (before[key]["value"], after[key]["value"], after[key]["low"], after[key]["high"])
                    for key in ("greedy", "reverse_kl")
                )
                print(
                    f"| {loss} | {seed} "
                    f"| {accuracy[0]:.1%} -> {accuracy[1]:.1%} ({accuracy[2]:.1%} to {accuracy[3]:.1%}) "
                    f"| {before['sampled']['value']:.1%} -> {after['sampled']['value']:.1%} "
                    f"| {kl[0]:.4f} -> {kl[1]:.4f} ({kl[1] / kl[0] - 1:+.0%}) "
                    f"| {len((run / 'metrics.jsonl').read_bytes().splitlines())} "
                    f"| {' + '.join(f'{s:.0f}' for s in seconds)} = {sum(seconds):.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
