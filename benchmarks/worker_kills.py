"""Kill workers of stage one again and again, and compare what they leave with a run that nobody disturbed.

    python benchmarks/worker_kills.py [--launcher torchrun ray] [--kills 20] [--workers 4] [--seed 0]
    python benchmarks/worker_kills.py --launcher none --engine vllm --kills 5 [--set student.model=DIR ...]

Half of a launcher's kills meet `rollouts`, half `score`. Each is a SIGKILL for one worker, taken at random when the
work has come as far as the kill's number among them, and then a random moment later. A killed worker ends a torchrun
job, so the same command is run again; a Ray run is to finish by itself. Everything has one thread, since another
number of threads moves the last bits. Compared are the decoded arrays of both caches (commit times aside), and
`verify` reads the one that was disturbed. With vLLM, whose rollouts depend on what shares a batch, it need only
verify. Prints a table; exits 1 where anything is wrong.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kill_trials import differing_arrays, wait

import cache_schema as cs

ROOT = Path(__file__).parent.parent
SETTINGS = ("prompts.limit=2048", "rollouts.prompts_per_block=8", "rollouts.batch_size=32", "score.tile_tokens=512")


def command(launcher: str, stage: str, cache: Path, args: argparse.Namespace) -> list[str]:
    overrides = [*SETTINGS, f"rollouts.engine={args.engine}", *args.set]
    settings = [part for setting in overrides for part in ("--set", setting)]
    ranks = ["-m", "torch.distributed.run", "--nproc-per-node", str(args.workers)] if launcher == "torchrun" else []
    ray = ["--launcher", "ray", "--workers", str(args.workers)] if launcher == "ray" else []
    return [sys.executable, *ranks, "-m", "pipeline", stage, "toy", "--cache", str(cache), *settings, *ray]


def progress(stage: str, cache: Path) -> int:
    """Committed blocks: each is a file."""
    groups = {"rollouts": "rollouts", "score": "scores/*"}[stage]
    return sum(len(list(chunks.iterdir())) for chunks in cache.glob(f"rounds/00000/{groups}/commit/c"))


def start(launcher: str, stage: str, cache: Path, args: argparse.Namespace) -> subprocess.Popen[bytes]:
    log = cache.with_suffix(".log").open("ab")
    return subprocess.Popen(command(launcher, stage, cache, args), cwd=ROOT, stdout=log, stderr=log)


def workers(launcher: str, process: subprocess.Popen[bytes]) -> list[int]:
    """The processes that do blocks now."""
    if launcher == "none":
        return [process.pid]
    if launcher == "torchrun":
        return [pid for pid, _ in children(process.pid)]
    return [pid for pid, line in descendants(process.pid) if line.startswith("ray::_Worker.run")]


def children(pid: int) -> list[tuple[int, str]]:
    try:
        pids = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [(int(child), Path(f"/proc/{child}/cmdline").read_text()) for child in pids]
    except OSError:  # it has just ended
        return []


def descendants(pid: int) -> list[tuple[int, str]]:
    below = children(pid)
    return below + [found for child, _ in below for found in descendants(child)]


def disturb(launcher: str, stage: str, cache: Path, kills: int, total: int, args: argparse.Namespace) -> list[int]:
    """Kill workers until `kills` were met at work, then let the stage finish; blocks committed at each kill."""
    rng = random.Random(f"{args.seed} {launcher} {stage}")
    reached: list[int] = []
    process = start(launcher, stage, cache, args)
    for kill in range(kills):
        due = total * (kill + rng.uniform(0.3, 0.7)) / (kills + 1)
        while process.poll() is None and progress(stage, cache) < due:
            time.sleep(0.01)
        wait(process, rng.uniform(0, 0.3))
        while process.poll() is None and not (pids := workers(launcher, process)):
            time.sleep(0.01)
        if process.poll() is not None:
            break
        os.kill(rng.choice(pids), signal.SIGKILL)
        reached.append(progress(stage, cache))
        if launcher != "ray":
            process.wait()
            process = start(launcher, stage, cache, args)
    if process.wait():
        sys.exit(f"{stage} by {launcher} does not finish:\n{cache.with_suffix('.log').read_text()}")
    return reached


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launcher", nargs="+", choices=["none", "torchrun", "ray"], default=["torchrun", "ray"])
    parser.add_argument("--engine", choices=["transformers", "vllm"], default="transformers")
    parser.add_argument("--kills", type=int, default=20, help="for each launcher")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], help="more settings of the recipe")
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1"}
    os.environ.pop("RAY_ADDRESS", None)
    root = Path(tempfile.mkdtemp(prefix="redpen-workers-"))
    calm, stages = root / "calm.zarr", ["rollouts"] if args.engine == "vllm" else ["rollouts", "score"]
    for stage in stages:
        if start("none", stage, calm, args).wait():
            sys.exit(f"{stage} fails undisturbed:\n{calm.with_suffix('.log').read_text()}")
    total = {stage: progress(stage, calm) for stage in stages}
    print("| workers | stage | killed at work | blocks committed at each kill | seconds | cache |")
    print("|---|---|---|---|---|---|", flush=True)
    failed = False
    for launcher in args.launcher:
        cache = root / f"{launcher}.zarr"
        for stage in stages:
            started, kills = time.monotonic(), args.kills // len(stages)
            reached = disturb(launcher, stage, cache, kills, total[stage], args)
            wrong = [str(finding) for finding in cs.verify(cs.open(cache))]
            if args.engine == "transformers" and stage == stages[-1]:
                wrong += differing_arrays(calm, cache)
            complete = progress(stage, cache) == total[stage]
            n_total, seconds = total[stage], time.monotonic() - started
            failed |= bool(wrong) or not complete
            equal = " and equals the undisturbed one" if args.engine == "transformers" and stage == stages[-1] else ""
            verdict = "WRONG: " + ", ".join(wrong) if wrong else f"verifies{equal}" if complete else "INCOMPLETE"
            at = " ".join(map(str, reached))
            who = f"{args.workers} by {launcher}" if launcher != "none" else "1"
            met = f"{len(reached)} of {kills}"
            print(f"| {who} | {stage} | {met} | {at} of {n_total} | {seconds:.0f} | {verdict} |", flush=True)
    shutil.rmtree(root)
    sys.exit(failed)


if __name__ == "__main__":
    main()
