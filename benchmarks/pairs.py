"""Start two commands on the same cache or run at once, again and again: no traceback, no lost result.

    python benchmarks/pairs.py [--times 10] [--pair eval/eval train/merge ...]

A cache of the toy is sampled and scored, a run is trained and evaluated once. For each pair both commands start
together on a copy of all that. Each has to exit with 0, or with 1 and one line; then both are repeated, one after the
other, and have to exit with 0, and `redpen verify` has to find nothing in what is there. Prints the exit codes; exits
with 1 where anything is otherwise.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

SETTINGS = ("prompts.limit=16", "rollouts.prompts_per_block=4", "train.prompts_per_step=8", "train.steps=4")
SETTINGS += ("train.stop_reverse_kl=0", "distill.rounds=2", "distill.stop_reverse_kl=0", "sft.steps=2")
SETTINGS += ("sft.examples_per_step=4",)
FIGURES = ("eval.limit=8", "eval.reread_rollouts=8")
#: Exit codes of a command that did its work; the gate of `continual` need not hold.
DONE = {0, 4}
#: Each in a directory that has cache.zarr, scored, sampled.zarr, which is not, and the evaluated run `made`.
COMMANDS = {
    "sample": ("rollouts toy --cache new.zarr", SETTINGS),
    "score": ("score toy --cache sampled.zarr", SETTINGS),
    "score-new": ("score toy --cache new.zarr", SETTINGS),
    "train": ("train toy --cache cache.zarr --run made", SETTINGS),
    "longer": ("train toy --cache cache.zarr --run made", (*SETTINGS, "train.steps=6")),
    "train-new": ("train toy --cache cache.zarr --run new", SETTINGS),
    "distill": ("distill toy --cache rounds.zarr --run rounds", SETTINGS),
    "continual": ("continual company --cache company.zarr --run company", SETTINGS),
    "eval": ("eval made", FIGURES),
    "report": ("report made -o new.html", ()),
    "merge": ("merge made -o merged", ()),
    "export": ("export-cache cache.zarr -o new.parquet", ()),
    "inspect": ("inspect sampled.zarr", ()),
}
PAIRS = (
    *("sample/sample", "sample/score-new", "score/score", "score/inspect", "train-new/train-new", "train/train"),
    *("distill/distill", "continual/continual", "eval/eval", "eval/train", "eval/report", "eval/merge"),
    *(
        "longer/eval",
        "longer/longer",
        "longer/merge",
        "longer/report",
        "report/report",
        "merge/merge",
        "export/export",
    ),
)


def arguments(name: str) -> list[str]:
    line, settings = COMMANDS[name]
    of_settings = [part for setting in settings for part in ("--set", setting)]
    return [sys.executable, "-m", "pipeline", "--", *line.split(), *of_settings]


def fault_of(name: str, code: int, err: str, out: str) -> str | None:
    """What of a command's end is not as it should be."""
    if "Traceback" in err or code not in DONE | {1}:
        return f"{name} ended with {code}: {err[-2000:]}"
    refusals = [line for line in err.splitlines() if line.startswith("redpen: ") and ": warning: " not in line]
    if code == 1 and len(refusals) != 1:
        return f"{name} ended with 1: {refusals or err[-2000:]}"
    return None if code or out else f"{name} printed nothing"


def repeated(names: list[str], where: Path) -> list[str]:
    """What is wrong after the same commands, one after the other."""
    wrong = []
    shutil.rmtree(where / "merged", ignore_errors=True)  # `redpen merge` replaces nothing
    evaluated = ["eval"] * ("longer" in names)  # the evaluation from before is of another student
    for name in dict.fromkeys(names + evaluated):
        done = subprocess.run(arguments(name), cwd=where, capture_output=True, text=True)
        if done.returncode not in DONE:
            wrong.append(f"{name}, repeated, ended with {done.returncode}: {done.stderr[-2000:]}")
    for path in sorted(where.iterdir()):
        if path.suffix == ".zarr" or (path / "run.json").exists():
            checked = [sys.executable, "-m", "pipeline", "--", "verify", path.name]
            done = subprocess.run(checked, cwd=where, capture_output=True, text=True)
            if done.returncode:
                wrong.append(f"verify {path.name} ended with {done.returncode}: {done.stdout[-2000:]}{done.stderr}")
    return wrong + [f"{path.name} remains" for path in where.rglob("*.partial")]


def one(pair: str, made: Path, where: Path) -> tuple[tuple[int, ...], list[str]]:
    """The exit codes of a pair started together on a copy of `made`, and what is wrong."""
    shutil.copytree(made, where)
    names = pair.split("/")
    started = [
        subprocess.Popen(arguments(name), cwd=where, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for name in names
    ]
    ends = [(*process.communicate(), process.returncode) for process in started]
    faults = [fault_of(name, code, err, out) for name, (out, err, code) in zip(names, ends, strict=True)]
    wrong = [found for found in faults if found is not None] + repeated(names, where)
    shutil.rmtree(where)
    return tuple(code for _, _, code in ends), wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--pair", nargs="+", choices=PAIRS, default=PAIRS)
    args = parser.parse_args()
    n_wrong = 0
    with tempfile.TemporaryDirectory() as directory:
        made = Path(directory) / "made"
        made.mkdir()
        for name in ("sample", "score-new", "train", "eval"):
            done = [part.replace("new.zarr", "cache.zarr") for part in arguments(name)]
            subprocess.run(done, cwd=made, check=True, capture_output=True)
        sampled = [part.replace("new.zarr", "sampled.zarr") for part in arguments("sample")]
        subprocess.run(sampled, cwd=made, check=True, capture_output=True)
        for pair in args.pair:
            codes = Counter[tuple[int, ...]]()
            for n in range(args.times):
                ended, wrong = one(pair, made, Path(directory) / f"{pair.replace('/', '-')}-{n}")
                codes[ended] += 1
                n_wrong += len(wrong)
                for found in wrong:
                    print(f"{pair}: {found}", flush=True)
            print(f"{pair}: " + ", ".join(f"{count} x {ended}" for ended, count in sorted(codes.items())), flush=True)
    return 1 if n_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
