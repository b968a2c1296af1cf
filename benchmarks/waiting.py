"""What people wait for around the arithmetic: starting, finding nothing to do, reading, checking many small blocks.

    python benchmarks/waiting.py [--before CHECKOUT] [--blocks 256] [--tokens 4000000] [--repeats 3]

Prints CPU seconds (user and system, imports included), which another load on the machine disturbs less than time on
the wall: the median of `--repeats`. With `--before`, the same of another checkout, taken in turn with this one, and
the ratio. Both run in this environment; each checkout makes its own caches. Needs the extra `dev`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE / "tests"))
from helpers import s3_server  # noqa: E402

SETTINGS = (
    "prompts.limit=64",
    "rollouts.prompts_per_block=16",
    "train.prompts_per_step=8",
    "train.steps=6",
    "train.lora_rank=4",
    "train.stop_reverse_kl=0",
)

# Both import what they measure from PYTHONPATH, and its helpers from this checkout. Only what `measured` runs counts.
_THROUGHPUT = """
import sys, tempfile, time
from pathlib import Path
sys.path.insert(0, {here!r} + "/benchmarks")
import cache_throughput as c
tokens, size = {tokens}, 262_144
blocks = c.made_up_blocks(tokens, size)
with tempfile.TemporaryDirectory() as directory:
    cache, rows = Path(directory, "cache"), Path(directory, "rows.parquet")
    c.write_cache(cache, blocks[:1], size), c.read_cache(cache, 1, size, check=True)
    for name, run in {{
        "write": lambda: c.write_cache(Path(directory, "measured"), blocks, size),
        "write Parquet": lambda: c.write_parquet(rows, blocks, 512),
        "read": lambda: c.read_cache(Path(directory, "measured"), len(blocks), size, check=True),
        "read without digests": lambda: c.read_cache(Path(directory, "measured"), len(blocks), size, check=False),
        "read Parquet": lambda: c.read_parquet(rows),
    }}.items():
        started = time.process_time()
        run()
        print(name, time.process_time() - started, sep="=")
"""
_SMALL_BLOCKS = """
import sys
sys.path.insert(0, {here!r} + "/tests")
from helpers import cache_factory
cache_factory.filled({path!r}, {blocks}, prompts_per_block=1)
"""


class Checkout:
    """A checkout of redpen, and where it keeps what it makes."""

    def __init__(self, root: Path, work: Path):
        self.root, self.work = root, work
        work.mkdir()
        home = str(work / "home")
        self._environment = {"PYTHONPATH": str(root), "REDPEN_CACHE_HOME": home, "OMP_NUM_THREADS": "1"}

    def python(self, *arguments: str) -> tuple[float, str]:
        """Run Python there; its CPU seconds, and what it prints. Raises `CalledProcessError`."""
        with tempfile.TemporaryFile("w+") as out:
            environment = {**os.environ, **self._environment}
            process = subprocess.Popen([sys.executable, *arguments], cwd=self.work, stdout=out, env=environment)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                raise subprocess.CalledProcessError(process.returncode, arguments)
            out.seek(0)
            return usage.ru_utime + usage.ru_stime, out.read()

    def redpen(self, command: str, *arguments: str) -> float:
        settings = [part for setting in SETTINGS for part in ("--set", setting)]
        recipe = ("toy", *settings) if command in ("rollouts", "score", "train") else ()
        return self.python("-m", "pipeline", command, *recipe, *arguments)[0]


Rows = Iterator[tuple[str, float]]


def commands(checkout: Checkout) -> Rows:
    """The stages on a new cache, and again when nothing is left to do."""
    for name in ("cache.zarr", "run"):
        shutil.rmtree(checkout.work / name, ignore_errors=True)
    where = ("--cache", "cache.zarr")
    for command, more in (("rollouts", ()), ("score", ()), ("train", ("--run", "run"))):
        yield f"{command}: first run", checkout.redpen(command, *where, *more)
    yield from nothing_to_do(checkout, "cache.zarr", "")
    for command in ("inspect", "verify"):
        yield f"{command}: 4 blocks", checkout.redpen(command, "cache.zarr")


def on_s3(checkout: Checkout) -> Rows:
    """The same with the cache on S3: moto in this process, whose CPU time is not counted."""
    url = f"s3://{s3_server.BUCKET}/{checkout.work.name}.zarr"
    for command in ("rollouts", "score"):
        checkout.redpen(command, "--cache", url)
    yield from nothing_to_do(checkout, url, " on S3")


def nothing_to_do(checkout: Checkout, url: str, where: str) -> Rows:
    for command in ("rollouts", "score"):
        checkout.redpen(command, "--cache", url)  # whatever it remembers is there from now on
        yield f"{command}: nothing to do{where}", checkout.redpen(command, "--cache", url)


def throughput(checkout: Checkout, tokens: int) -> Rows:
    printed = checkout.python("-c", _THROUGHPUT.format(here=str(HERE), tokens=tokens))[1]
    for line in printed.splitlines():
        name, _, seconds = line.partition("=")
        yield f"{name}, {tokens / 1e6:g}M tokens", float(seconds)


def small_blocks(checkout: Checkout, blocks: int) -> Rows:
    path = checkout.work / "small.zarr"
    if not path.exists():
        checkout.python("-c", _SMALL_BLOCKS.format(here=str(HERE), path=str(path), blocks=blocks))
    for command in ("verify", "inspect"):
        yield f"{command}: {blocks:,} small blocks", checkout.redpen(command, str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="another checkout, for the ratios")
    parser.add_argument("--blocks", type=int, default=256, help="small blocks to check")
    parser.add_argument("--tokens", type=int, default=4_000_000, help="tokens to write and read")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    kinds: list[Callable[[Checkout], Rows]] = [
        commands,
        on_s3,
        lambda checkout: throughput(checkout, args.tokens),
        lambda checkout: small_blocks(checkout, args.blocks),
    ]
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(s3_server.serving())
        checkouts = {"now": Checkout(HERE, work / "now")}
        if args.before is not None:
            checkouts = {"before": Checkout(args.before.resolve(), work / "before"), **checkouts}
        print(f"CPU seconds, median of {args.repeats}")
        print(f"{'':36}{''.join(f'{name:>10}' for name in checkouts)}{'ratio' if args.before else '':>8}")
        for kind in kinds:
            seconds: dict[str, dict[str, list[float]]] = {}
            for _ in range(args.repeats):
                for name, checkout in checkouts.items():
                    for row, value in kind(checkout):
                        seconds.setdefault(row, {}).setdefault(name, []).append(value)
            for row, by_checkout in seconds.items():
                medians = [statistics.median(by_checkout[name]) for name in checkouts]
                ratio = f"{medians[1] / medians[0]:7.2f}x" if args.before else ""
                print(f"{row:36}{''.join(f'{value:10.2f}' for value in medians)}{ratio}", flush=True)


if __name__ == "__main__":
    main()
