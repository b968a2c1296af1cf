"""Kill every stage again and again, run the same command each time, and compare with runs that nobody disturbed.

    python benchmarks/kill_trials.py [--kills 20] [--signal KILL] [--stage rollouts score train] [--seed 0]
                                     [--processes 1] [--recipe toy] [--set section.key=value ...]

For each stage: one undisturbed run; then the same command, killed at `--kills` random moments spread over its working
time, and once more to its end. With `--processes`, training is a torchrun job of so many, and a kill meets one of its
ranks. Compared are the decoded arrays of the caches (commit times aside), the training curve (timings aside) and the
bytes of the final adapter. Prints counts; exits 1 where anything differs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import cache_schema as cs

SETTINGS = (
    "prompts.limit=2048",
    "rollouts.prompts_per_block=8",
    "rollouts.batch_size=32",
    "score.tile_tokens=512",
    "train.steps=60",
    "train.prompts_per_step=16",
    "train.checkpoint_every=2",
    "train.stop_reverse_kl=0",
)


def command(stage: str, cache: Path, run: Path, args: argparse.Namespace) -> list[str]:
    processes = args.processes
    settings = [part for setting in (*SETTINGS, *args.set) for part in ("--set", setting)]
    where = ["--cache", str(cache), *(("--run", str(run)) if stage == "train" else ())]
    job = stage == "train" and processes > 1
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if job else []
    return [sys.executable, *torchrun, "-m", "pipeline", "--", stage, args.recipe, *where, *settings]


def victim(process: subprocess.Popen[bytes], processes: int, rng: random.Random) -> int:
    """The process to kill: the command's own, or one of the ranks that it has started."""
    with contextlib.suppress(OSError):
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        if processes > 1 and children:
            return int(rng.choice(children))
    return process.pid


def progress(stage: str, cache: Path, run: Path) -> int:
    """Committed blocks, or finished steps."""
    if stage == "train":
        metrics = run / "metrics.jsonl"
        return len(metrics.read_bytes().splitlines()) if metrics.exists() else 0
    try:
        round_ = cs.open(cache).round()
        groups = [round_.rollouts] if stage == "rollouts" else [round_.scores(name) for name in round_.scorer_names()]
        return sum(int(group.committed().sum()) for group in groups)
    except cs.CacheError:
        return 0


def undisturbed(stage: str, cache: Path, run: Path, args: argparse.Namespace) -> tuple[float, float]:
    """Run a stage to its end; seconds until its first progress, and until its end."""
    start = time.monotonic()
    before = progress(stage, cache, run)
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command(stage, cache, run, args), stdout=output, stderr=output)
        first = None
        while process.poll() is None:
            if first is None and progress(stage, cache, run) > before:
                first = time.monotonic() - start
            time.sleep(0.05)
        if process.returncode:
            output.seek(0)
            sys.exit(f"{stage} failed undisturbed:\n{output.read()}")
    end = time.monotonic() - start
    return first or end, end


def disturbed(
    stage: str, cache: Path, run: Path, times: tuple[float, float], total: int, args: argparse.Namespace
) -> list[int]:
    """Kill the stage `args.kills` times, then let it finish; its progress after each kill.

    A quarter of the kills fall anywhere into start-up. The others wait until the work has come as far as their number
    among the kills, and then a random moment, so that the last ones still find work.
    """
    rng = random.Random(f"{args.seed} {stage}")
    first, end = times
    share = (end - first) / (args.kills + 1) / 2
    reached = []
    for kill in range(args.kills):
        due = total * (kill + 0.5) / (args.kills + 1)
        process = subprocess.Popen(
            command(stage, cache, run, args), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        if rng.random() < 0.25:
            wait(process, rng.uniform(0, first))
        else:
            while process.poll() is None and progress(stage, cache, run) < due:
                time.sleep(0.01)
            wait(process, rng.uniform(0, share))
        met = process.poll() is None
        if met:
            os.kill(victim(process, args.processes if stage == "train" else 1, rng), args.signal)
        process.wait()
        reached.append(progress(stage, cache, run) if met else -1)
    finish = subprocess.run(command(stage, cache, run, args), capture_output=True, text=True)
    if finish.returncode:
        sys.exit(f"{stage} does not finish after the kills:\n{finish.stdout}{finish.stderr}")
    return reached


def wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)


def differing_arrays(a: Path, b: Path) -> list[str]:
    """Names of the arrays whose decoded values differ between two caches, times of commits aside."""
    one, two = cs.open(a).round(), cs.open(b).round()
    groups = [("rollouts", one.rollouts, two.rollouts)]
    groups += [(f"scores/{name}", one.scores(name), two.scores(name)) for name in one.scorer_names()]
    differing = set() if one.scorer_names() == two.scorer_names() else {"scores"}
    for label, left, right in groups:
        for block in range(left.n_blocks):
            x, y = left.read(block), right.read(block)
            for spec in left.specs:
                if not np.array_equal(getattr(x, spec.name), getattr(y, spec.name), equal_nan=spec.dtype == "f4"):
                    differing.add(f"{label}/{spec.name}")
            fields = [name for name in left.commits().dtype.names if name not in cs.TIME_FIELDS]
            if any(left.commit(block)[name] != right.commit(block)[name] for name in fields):
                differing.add(f"{label}/commit")
    return sorted(differing)


def differing_runs(a: Path, b: Path) -> list[str]:
    def curve(run: Path) -> list[dict[str, object]]:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in line.items() if key != "time"} for line in lines]

    adapter = "adapter/adapter_model.safetensors"
    differing = [] if curve(a) == curve(b) else ["metrics.jsonl"]
    return differing + ([] if (a / adapter).read_bytes() == (b / adapter).read_bytes() else [adapter])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="a stage")
    parser.add_argument("--signal", type=lambda name: signal.Signals[f"SIG{name}"], default=signal.SIGKILL)
    parser.add_argument("--stage", nargs="+", default=["rollouts", "score", "train"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="that train together")
    parser.add_argument("--recipe", default="toy")
    parser.add_argument("--set", action="append", default=[], help="as of redpen; the last of a setting counts")
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="redpen-kills-"))
    calm, killed = root / "calm", root / "killed"
    failures = 0
    for stage in ("rollouts", "score", "train"):
        times = undisturbed(stage, calm / "cache", calm / "run", args)
        if stage not in args.stage:
            undisturbed(stage, killed / "cache", killed / "run", args)
            continue
        reached = disturbed(
            stage, killed / "cache", killed / "run", times, progress(stage, calm / "cache", calm / "run"), args
        )
        if stage == "train":
            differing = differing_runs(calm / "run", killed / "run")
        else:
            differing = differing_arrays(calm / "cache", killed / "cache")
            differing += [str(finding) for finding in cs.verify(cs.open(killed / "cache"))]
        failures += bool(differing)
        hits = [n for n in reached if n >= 0]
        unit = "steps logged" if stage == "train" else "blocks committed"
        print(f"{stage}: {len(hits)} of {args.kills} {args.signal.name} met it running; {unit} after each: {hits}")
        print(f"{stage}: {'equal to the undisturbed run' if not differing else 'DIFFERS: ' + ', '.join(differing)}")
        sys.stdout.flush()
    shutil.rmtree(root)
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
