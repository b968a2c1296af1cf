"""Where the size of a round shows: its prompts, its commits and the order of replay, all blocks' shards left out.

    python benchmarks/scale.py [--prompts 512000] [--rollouts 4] [--tokens 100] [--per-block 64]

Writes a prompts file and a round in which a student and a teacher have committed every block. Only block 0 is real:
the commits of the others are hard links to its own. Each step that reads or writes something of the whole round runs
in a separate process; printed are its seconds, CPU seconds and peak memory, imports included, and at the end the
number of objects in such a cache.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from toy_lab import measured

import cache_schema as cs
from pipeline.config import PromptsConfig
from pipeline.text.prompts import load_prompts
from pipeline.train.order import Order

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from helpers import cache_factory

STEPS = ("read the prompts file", "create the round", "check its prompts", "find committed blocks", "order an epoch")
PROMPTS_PER_STEP, WINDOW_BLOCKS = 64, 16
GROUPS = ("rollouts", "scores/student", "scores/teacher")
TEXT = "how many of the apples that were left on the table did she take home before it began to rain"


def write_prompts(path: Path, n_prompts: int) -> None:
    """Questions of 40 words, each with an answer and an id."""
    words = TEXT.split()
    with path.open("w") as file:
        for n in range(n_prompts):
            turned = words[n % len(words) :] + words[: n % len(words)]
            record = {"prompt": f"{n}: {' '.join(2 * turned)}?", "answer": str(n), "id": f"row-{n:09d}"}
            file.write(json.dumps(record) + "\n")


def create(url: Path, records: Sequence[dict[str, Any]], rollouts: int, tokens: int, per_block: int) -> cs.Round:
    sizes = {"rollouts_per_prompt": rollouts, "max_response_tokens": tokens, "prompts_per_block": per_block}
    return cs.create(url).start_round(cache_factory.round_manifest(list(records), **sizes), records)


def commit_all(url: Path) -> None:
    """Write block 0, and link its commits as those of all others."""
    rng, round_ = np.random.default_rng(0), cs.open(url, writable=True).round()
    student = round_.start_scores("student", cache_factory.scores_manifest("student"))
    teacher = round_.start_scores("teacher", cache_factory.scores_manifest("teacher"))
    block = cache_factory.rollout_block(round_.manifest, 0, rng)
    scored = cache_factory.score_block(student.manifest, block, rng)
    round_.rollouts.write(0, block)
    student.write(0, scored)
    teacher.write(0, cache_factory.score_block(teacher.manifest, block, rng, scored.candidate_ids))
    for group in GROUPS:
        commits = url / "rounds" / "00000" / group / "commit" / "c"
        for number in range(1, round_.n_blocks):
            (commits / str(number)).mkdir()
            os.link(commits / "0" / "0", commits / str(number) / "0")


def step(name: str, directory: Path, rollouts: int, tokens: int, per_block: int) -> None:
    """One of `STEPS`, in this process."""
    file, url = directory / "prompts.jsonl", directory / "cache.zarr"
    if name == "read the prompts file":
        load_prompts(PromptsConfig(path=str(file)))
    elif name == "create the round":
        create(url, load_prompts(PromptsConfig(path=str(file))), rollouts, tokens, per_block)
    elif name == "check its prompts":
        cs.open(url).round().prompts.check()
    elif name == "find committed blocks":
        round_ = cs.open(url).round()
        assert all(group.committed().all() for group in (round_.rollouts, *map(round_.scores, round_.scorer_names())))
    else:
        round_ = cs.open(url).round()
        Order(round_.n_prompts, per_block, PROMPTS_PER_STEP, WINDOW_BLOCKS, seed=0).step(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=512_000, help="a multiple of --per-block")
    parser.add_argument("--rollouts", type=int, default=4, help="of a prompt")
    parser.add_argument("--tokens", type=int, default=100, help="of a rollout")
    parser.add_argument("--per-block", type=int, default=64, help="prompts of a block")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--in", type=Path, dest="directory", help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = (args.rollouts, args.tokens, args.per_block)
    if args.step:
        step(args.step, args.directory, *sizes)
        return
    with tempfile.TemporaryDirectory() as name:
        directory, n_blocks = Path(name), args.prompts // args.per_block
        n_rollouts = args.prompts * args.rollouts
        write_prompts(directory / "prompts.jsonl", n_blocks * args.per_block)
        size = (directory / "prompts.jsonl").stat().st_size
        print(f"{args.prompts:,} prompts ({size / 1e6:,.0f} MB), {n_rollouts:,} rollouts, {n_blocks:,} blocks")
        print(f"{'':24}{'s':>8}{'CPU s':>8}{'GB':>8}")
        options = ("--rollouts", args.rollouts, "--tokens", args.tokens, "--per-block", args.per_block)
        for name in STEPS:
            cost = measured(__file__, "--step", name, "--in", directory, *options)
            print(f"{name:24}{cost.seconds:8.1f}{cost.cpu_seconds:8.1f}{cost.anonymous / 1e9:8.2f}", flush=True)
            if name == "create the round":
                commit_all(directory / "cache.zarr")
        cache = directory / "cache.zarr"
        once = sum(not {"c"} & set(path.relative_to(cache).parts) for path in cache.rglob("*") if path.is_file())
        block = [
            p for group in GROUPS for p in (cache / "rounds" / "00000" / group).glob("*/c/0/**/*") if p.is_file()
        ]
        print(f"objects: {once} of metadata, {len(block)} a block, {once + len(block) * n_blocks:,} in all")


if __name__ == "__main__":
    main()
