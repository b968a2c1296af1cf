"""Start two commands on one run at once, again and again: no traceback, no lost result.

    python benchmarks/pairs.py [--times 10] [--pair eval/eval eval/train eval/report report/report]

A run of the toy is made and evaluated once. For each pair both commands start together on a copy of it. Each has to
exit with 0, or with 1 and one line that names the process that holds the run; afterwards the run's evaluation must be
one that its record knows. Prints counts; exits 1 where anything is otherwise.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from pipeline.runs.files import fault

PAIRS = ("eval/eval", "eval/train", "eval/report", "report/report")
KEPT = ("eval.json", "eval.zarr", "reread.safetensors")
SETTINGS = ("prompts.limit=64", "train.steps=4", "train.stop_reverse_kl=0")


def command(name: str, cache: Path, run: Path) -> list[str]:
    of_training = [part for setting in SETTINGS for part in ("--set", setting)]
    arguments = {
        "rollouts": ["toy", "--cache", str(cache), *of_training],
        "score": ["toy", "--cache", str(cache), *of_training],
        "train": ["toy", "--cache", str(cache), "--run", str(run), *of_training],
        "eval": [str(run), "--set", "eval.limit=8", "--set", "eval.reread_rollouts=8"],
        "report": [str(run), "-o", str(run.parent / "report.html")],
    }
    return [sys.executable, "-m", "pipeline", "--", name, *arguments[name]]


def fault_of(name: str, code: int, err: str, out: str) -> str | None:
    """What of a command's end is not as it should be."""
    if "Traceback" in err or code not in (0, 1):
        return f"{name} ended with {code}: {err[-2000:]}"
    refusals = [line for line in err.splitlines() if line.startswith("redpen: ")]
    if code and not (len(refusals) == 1 and ("process " in refusals[0] or "is working on it" in refusals[0])):
        return f"{name} ended with 1: {refusals or err[-2000:]}"
    return None if code or out else f"{name} printed nothing"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--pair", nargs="+", choices=PAIRS, default=PAIRS)
    args = parser.parse_args()
    n_bad = 0
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        cache, made = root / "cache.zarr", root / "made"
        for name in ("rollouts", "score", "train", "eval"):
            subprocess.run(command(name, cache, made), check=True, capture_output=True)
        for pair in args.pair:
            codes: list[tuple[int, ...]] = []
            for _ in range(args.times):
                run = Path(shutil.copytree(made, root / "pair" / "run"))
                names = pair.split("/")
                started = [
                    subprocess.Popen(
                        command(name, cache, run), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
                    )
                    for name in names
                ]
                ends = [(*process.communicate(), process.returncode) for process in started]
                faults = [fault_of(name, code, err, out) for name, (out, err, code) in zip(names, ends, strict=True)]
                faults += [fault(run, name) for name in KEPT]
                faults += [f"{name} is lost" for name in KEPT if not (run / name).exists()]
                for found in filter(None, faults):
                    n_bad += 1
                    print(f"{pair}: {found}")
                codes.append(tuple(code for _, _, code in ends))
                shutil.rmtree(root / "pair")
            print(f"{pair}: " + ", ".join(f"{codes.count(code)} x {code}" for code in sorted(set(codes))))
    return 1 if n_bad else 0


if __name__ == "__main__":
    sys.exit(main())
