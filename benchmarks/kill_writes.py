"""Kill train, distill and continual before each of their writes, run them again, and compare with undisturbed runs.

    python benchmarks/kill_writes.py [--command train distill continual] [--every 1]

A write is a file or directory that is put in place within the run. For each command: one undisturbed run, to count
them; then for every n a new directory, killed by SIGKILL before the n-th write, and the same command once more.
Compared are the curve (timings aside) and the bytes of adapter and recipe, and `redpen verify` must find nothing.
Prints a line a command; exits 1 where anything differs.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.runs.files import digests

SMALL = ("prompts.limit=8", "rollouts.prompts_per_block=4", "train.prompts_per_step=4", "train.steps=2")
SMALL += ("train.checkpoint_every=1", "train.stop_reverse_kl=0", "distill.rounds=2", "distill.stop_reverse_kl=0")
COMPANY = (*SMALL, "sft.steps=2", "sft.examples_per_step=4")
RECIPES = {"train": ("toy", SMALL), "distill": ("toy", SMALL), "continual": ("company", COMPANY)}
#: Exit codes of a command that did its work; the gate need not hold.
DONE = (0, 4)


def command(name: str, where: Path) -> list[str]:
    recipe, settings = RECIPES[name]
    overrides = [part for setting in settings for part in ("--set", setting)]
    return [name, recipe, "--cache", str(where / "cache.zarr"), "--run", str(where / "run"), *overrides]


def in_child(args: list[str], run: Path, dies_before: int | None = None) -> tuple[int, int]:
    """The exit code of `redpen ARGS` in a forked process, and how many writes it began within `run`."""
    counter = run.parent / "writes"
    if not (child := os.fork()):
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        count = 0

        def counted(move: Callable[..., Any]) -> Callable[..., Any]:
            def moved(source: Any, target: Any, **kwargs: Any) -> Any:
                nonlocal count
                if os.fspath(target).startswith(f"{run}/") and ".zarr/" not in os.fspath(target):
                    count += 1
                    if count == dies_before:
                        os.kill(os.getpid(), signal.SIGKILL)
                return move(source, target, **kwargs)

            return moved

        os.replace, os.rename = counted(os.replace), counted(os.rename)
        from pipeline.cli import main

        code = main(args)
        counter.write_text(str(count))
        os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), int(counter.read_text()) if counter.exists() else 0


def curve(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"  # `continual` itself has none
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


def differing(calm: Path, killed: Path) -> list[str]:
    found = [] if curve(calm) == curve(killed) else ["metrics.jsonl"]
    names = ("adapter", "recipe.toml", "gate.json")
    return found + ([] if digests(calm, names) == digests(killed, names) else ["adapter, recipe or gate"])


def trial(name: str, root: Path, n: int, calm: Path) -> list[str]:
    """What is wrong after a kill before the n-th write and the same command again."""
    where = root / f"{name}-{n}"
    where.mkdir()
    run = where / "run"
    if name == "train":
        shutil.copytree(calm.parent / "cache.zarr", where / "cache.zarr")
    died, _ = in_child(command(name, where), run, n)
    ended, _ = in_child(command(name, where), run)
    wrong = [] if died == -signal.SIGKILL else [f"expected a death, got {died}"]
    wrong += differing(calm, run) if ended in DONE else [f"the same command ended with {ended}"]
    if in_child(["verify", str(run)], run)[0]:
        wrong.append("redpen verify finds something")
    shutil.rmtree(where)
    return [f"before write {n}: {text}" for text in wrong]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--command", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--every", type=int, default=1, help="kill before every so-manieth write")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # a forked process has none of the threads that torch would have started
    once = (
        "pipeline.continual",
        "pipeline.engines.transformers_sampler",
        "pipeline.engines.resident",
        "torch._dynamo",
    )
    for module in (*once, "torch._dynamo"):
        importlib.import_module(module)
    root = Path(tempfile.mkdtemp(prefix="redpen-writes-"))
    failures = 0
    for name in args.command:
        where = root / name
        where.mkdir()
        if name == "train":
            for stage in ("rollouts", "score"):
                at = command("train", where)
                assert in_child([stage, *at[1:4], *at[6:]], where / "run")[0] == 0
        code, n_writes = in_child(command(name, where), where / "run")
        assert code in DONE, f"undisturbed {name} ended with {code}"
        wrong = [line for n in range(1, n_writes + 1, args.every) for line in trial(name, root, n, where / "run")]
        failures += bool(wrong)
        verdict = "; ".join(wrong) or "equal to the undisturbed run after every kill"
        print(f"{name}: {n_writes} writes; {verdict}", flush=True)
    shutil.rmtree(root)
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
