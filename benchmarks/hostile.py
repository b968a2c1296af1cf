"""Damage everything that redpen reads from outside, run its commands on it, and see what they make of it.

    python benchmarks/hostile.py [--tries 2000] [--seed 0] [--part 1/1] [--family NAME ...] [--only N] [--keep DIR]

The toy pipeline is run once, small. Each try copies what it left, damages one thing, runs a command, and is one of:

    right      exit code 0, and the result is the undisturbed one, or the damage is another valid value
    refused    exit code 1 or 2 with one line that says why (`verify`: with findings)
    traceback  an exception left `main`, a signal ended the process, or a thread died
    hang       10 s of CPU time, or nothing done any more
    memory     1 GB more than the undisturbed command
    silent     exit code 0 and no warning, but another result; `verify` found nothing though something is wrong
    other      control characters or a secret shown or stored, a file outside or of a finished run changed, no line or
               several for an error

Prints a line for every fault, how to repeat it included, and a table; exits with 1 if there is any fault. --part
I/N is every N-th try of each family, from the I-th: the tables of all N parts add up. Commands run in forks of this
process, which has imported everything: a try takes half a second.
"""

from __future__ import annotations

import argparse
import gc
import random
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path

from hostile_families import FAMILIES
from hostile_tries import COMMANDS, OUTCOMES, Base, Ended, Try, cli, judge, run_try


def preload() -> None:
    """Everything that commands import, once."""
    import logging

    import peft  # noqa: F401
    import torch
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401

    import pipeline.diagnose.stage
    import pipeline.engines.served
    import pipeline.engines.transformers_sampler
    import pipeline.evaluate.stage
    import pipeline.interchange.exporting
    import pipeline.interchange.importing
    import pipeline.merge
    import pipeline.plan
    import pipeline.report.stage
    import pipeline.report.terminal
    import pipeline.rollouts.stage
    import pipeline.score.stage
    import pipeline.sft.stage
    import pipeline.train.stage  # noqa: F401

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # or the first collection of each fork copies all of it
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def part(text: str) -> slice:
    """`I/N` as the slice of every N-th, from the I-th."""
    first, number = map(int, text.split("/"))
    if not 1 <= first <= number:
        raise ValueError(text)
    return slice(first - 1, None, number)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--tries", type=int, default=2000, help="in all, shared out among the families")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--part", type=part, default=slice(0, None, 1), metavar="I/N", help="every N-th try, from the I-th"
    )
    parser.add_argument("--family", action="append", choices=list(FAMILIES), help="only this one; repeatable")
    parser.add_argument("--only", type=int, metavar="N", help="only try N of a family")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the directories of faults here")
    arguments = parser.parse_args()
    names = arguments.family or list(FAMILIES)
    share = arguments.tries / sum(FAMILIES[name][1] for name in names)
    started = time.monotonic()
    counts = {name: Counter[str]() for name in names}
    preload()
    root = Path(tempfile.mkdtemp(prefix="hostile-"))
    try:
        print(f"redpen of {Path(cli.__file__).parent.parent}, seed {arguments.seed}", flush=True)
        base = Base(root)
        for name in names:
            family, weight = FAMILIES[name]
            every = range(max(round(share * weight), 1))
            numbers = every[arguments.part] if arguments.only is None else [arguments.only]
            for n in numbers:
                wanted = family(random.Random(f"{arguments.seed} {name} {n}"), base)
                outcome, why = one(base, name, n, wanted, arguments.keep, verbose=arguments.only is not None)
                counts[name]["tried"] += outcome != "left out"
                counts[name][outcome] += 1
                if why:
                    print(f"{outcome.upper()} {name} {n}: {wanted.command} | {wanted.what} | {why}"
                          .encode("unicode_escape").decode(), flush=True)  # fmt: skip
    finally:
        shutil.rmtree(root, ignore_errors=True)
    columns = ("tried", *OUTCOMES)
    print(f"\n{'family':14}" + "".join(f"{column:>11}" for column in columns))
    for name, count in (*counts.items(), ("in all", sum(counts.values(), Counter()))):
        print(f"{name:14}" + "".join(f"{count[column]:>11}" for column in columns))
    print(f"{time.monotonic() - started:.0f} s")
    return int(any(count[outcome] for count in counts.values() for outcome in OUTCOMES[2:]))


def one(base: Base, name: str, n: int, wanted: Try, keep: Path | None, *, verbose: bool = False) -> tuple[str, str]:
    """A try and its outcome."""
    honest = Ended(0, "", "", 0, None, "", [])
    if wanted.command in COMMANDS:
        found = base.undisturbed(wanted)
        if found is None:
            return "left out", ""
        honest = found
    else:
        honest.peak = max((each.peak for each in base.known.values()), default=2**30)
    ended, directory = run_try(base, f"{name}-{n}", wanted, keep=True)
    outcome, why = judge(wanted, ended, honest)
    if verbose:
        print(f"{wanted.command}\n{wanted.what}\nexit code {ended.code}, {outcome}: {why}\n{ended.out}{ended.err}")
    if why and keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(keep / directory.name, ignore_errors=True)
        shutil.move(directory, keep / directory.name)
    shutil.rmtree(directory, ignore_errors=True)
    return outcome, why


if __name__ == "__main__":
    raise SystemExit(main())
