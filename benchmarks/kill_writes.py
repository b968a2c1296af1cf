"""Kill commands before each of their writes, run them again, and compare with undisturbed ones.

    python benchmarks/kill_writes.py [--command train eval ...] [--every 1]

A write is a file or directory that is put in place; for commands whose result is a run, one outside its caches, which
benchmarks/kill_trials.py is for. For each command: one undisturbed, to count them; then for every n a new directory,
killed by SIGKILL before the n-th write, and the same command once more. Compared is everything that it leaves,
without times, and nothing temporary may remain; `redpen verify` must find nothing in runs and caches. Prints a line
a command; exits 1 where anything differs.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pyarrow import parquet

import cache_schema as cs
from pipeline.cli import main as redpen

SMALL = ("prompts.limit=8", "rollouts.prompts_per_block=4", "train.prompts_per_step=4", "train.steps=2")
SMALL += ("train.checkpoint_every=1", "train.stop_reverse_kl=0", "distill.rounds=2", "distill.stop_reverse_kl=0")
SMALL += ("sft.steps=2", "sft.examples_per_step=4")
FIGURES = ("eval.limit=4", "eval.reread_rollouts=4", "eval.candidates=8")
#: Each works in a directory of its own, which has the scored cache.zarr, rows.parquet of it, and the evaluated run
#: `made`.
COMMANDS = {
    "rollouts": ("rollouts toy --cache new.zarr", SMALL),
    "score": ("score toy --cache sampled.zarr", SMALL),
    "train": ("train toy --cache cache.zarr --run run", SMALL),
    "distill": ("distill toy --cache new.zarr --run run", SMALL),
    "sft": ("sft company --run run", SMALL),
    "continual": ("continual company --cache new.zarr --run run", SMALL),
    "eval": ("eval made", FIGURES),
    "report": ("report made -o new.html", ()),
    "merge": ("merge made -o new", ()),
    "export-cache": ("export-cache cache.zarr -o new.parquet", ()),
    "import": ("import rows.parquet toy --cache new.zarr", SMALL),
}
#: Exit codes of a command that did its work; the gate need not hold.
DONE = (0, 4)
_RUNS = ("train", "distill", "sft", "continual", "eval")
_BYTES = (".safetensors", ".toml", "gate.json", ".html", "adapter_config.json")


def arguments(line: str, settings: Sequence[str]) -> list[str]:
    return [*line.split(), *(part for setting in settings for part in ("--set", setting))]


def in_child(args: list[str], where: Path, dies_before: int | None = None, *, caches: bool = True) -> tuple[int, int]:
    """The exit code of `redpen ARGS` in a forked process, and how many writes it began within `where`.

    Args:
        caches: whether writes within caches count.
    """
    counter = where.parent / f"{where.name}.writes"
    if not (child := os.fork()):
        os.chdir(where)
        with open(os.devnull, "w") as nowhere, open(where.parent / f"{where.name}.err", "w") as errors:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(errors.fileno(), 2)
        count = 0

        def counted(move: Callable[..., Any]) -> Callable[..., Any]:
            def moved(source: Any, target: Any, **kwargs: Any) -> Any:
                nonlocal count
                path = os.path.relpath(os.fspath(target), where)
                if not path.startswith("..") and (caches or not re.search(r"\.(zarr|partial)/", path)):
                    count += 1
                    if count == dies_before:
                        os.kill(os.getpid(), signal.SIGKILL)
                return move(source, target, **kwargs)

            return moved

        os.replace, os.rename = counted(os.replace), counted(os.rename)
        code = 70
        try:
            code = redpen(args)
            counter.write_text(str(count))
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), int(counter.read_text()) if counter.exists() else 0


def curve(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


def arrays(path: Path) -> dict[str, Any]:
    """Digests of everything in a cache but times."""
    found: dict[str, Any] = {}
    cache = cs.open(path)
    for index in cache.round_indices():
        round_ = cache.round(index)
        found[f"{index} prompts"] = [round_.prompts[i] for i in range(len(round_.prompts))]
        for group in (round_.rollouts, *(round_.scores(name) for name in round_.scorer_names())):
            for block in range(group.n_blocks):
                record = group.read(block)
                values = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
                found[f"{index} {group.name} {block}"] = {
                    name: hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
                    for name, value in values.items()
                    if value is not None
                }
    return found


def left(where: Path) -> dict[str, Any]:
    """Whatever a command left that is compared, by path.

    It is read in a forked process: what zarr and pyarrow start on reading would not survive in later forks.
    """
    answer = where.parent / f"{where.name}.left"
    if not (child := os.fork()):
        code = 1
        try:
            answer.write_text(json.dumps(_read(where)))
            code = 0
        finally:
            os._exit(code)
    if os.waitpid(child, 0)[1]:
        raise SystemExit(f"what is left in {where} cannot be read")
    found: dict[str, Any] = json.loads(answer.read_text())
    return found


def _read(where: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for root, directories, names in os.walk(where):
        here = Path(root)
        for name in [name for name in directories if name.endswith(".zarr")]:
            found[str((here / name).relative_to(where))] = arrays(here / name)
        directories[:] = [name for name in directories if not name.endswith(".zarr") and name != "checkpoints"]
        for path in (here / name for name in names):
            label = str(path.relative_to(where))
            if path.name == "metrics.jsonl":
                found[label] = curve(path)
            elif path.name == "eval.json":
                found[label] = json.loads(path.read_text()) | {"seconds": 0}
            elif path.suffix == ".parquet":
                found[label] = hashlib.sha256(str(parquet.read_table(path).to_pydict()).encode()).hexdigest()
            elif path.name.endswith(_BYTES):
                found[label] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def faults(calm: dict[str, Any], where: Path) -> list[str]:
    """What of a directory is not as an undisturbed command leaves it."""
    found = left(where)
    wrong = [f"{path} differs" for path in sorted(calm.keys() | found.keys()) if calm.get(path) != found.get(path)]
    wrong += [f"{path.name} remains" for path in where.rglob("*.partial")]
    for path in where.iterdir():
        if path.suffix == ".zarr" or (path / "run.json").exists():
            wrong += [f"redpen verify {path.name} finds something"] * bool(in_child(["verify", path.name], where)[0])
    return wrong


def trials(name: str, root: Path, made: Path, every: int) -> tuple[int, list[str]]:
    """The number of writes, and what is wrong after a kill before one of them and the same command again."""
    command, caches = arguments(*COMMANDS[name]), name not in _RUNS
    calm = Path(shutil.copytree(made, root / f"{name}-calm"))
    code, n_writes = in_child(command, calm, caches=caches)
    if code not in DONE:
        sys.exit(f"undisturbed {name} ended with {code}: {(root / f'{calm.name}.err').read_text()}")
    expected, wrong = left(calm), []
    for n in range(1, n_writes + 1, every):
        where = Path(shutil.copytree(made, root / f"{name}-{n}"))
        died, _ = in_child(command, where, n, caches=caches)
        ended, _ = in_child(command, where)
        found = [] if died == -signal.SIGKILL else [f"expected a death, got {died}"]
        if ended in DONE:
            found += faults(expected, where)
        else:
            found.append(f"the same command ended with {ended}: {(root / f'{where.name}.err').read_text()[-300:]}")
        wrong += [f"before write {n}: {text}" for text in found]
        shutil.rmtree(where)
    return n_writes, wrong


def prepared(root: Path) -> Path:
    """The directory that every command starts from."""
    made = root / "made"
    made.mkdir()
    for line, settings in (
        ("rollouts toy --cache cache.zarr", SMALL),
        ("score toy --cache cache.zarr", SMALL),
        ("train toy --cache cache.zarr --run made", SMALL),
        ("eval made", FIGURES),
        ("export-cache cache.zarr -o rows.parquet", ()),
        ("rollouts toy --cache sampled.zarr", SMALL),
    ):
        code, _ = in_child(arguments(line, settings), made)
        assert code == 0, f"{line}: {(root / 'made.err').read_text()}"
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--command", nargs="+", choices=list(COMMANDS), default=list(COMMANDS))
    parser.add_argument("--every", type=int, default=1, help="kill before every so-manieth write")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # a forked process has none of the threads that torch would have started
    for module in (
        *("pipeline.continual", "pipeline.merge", "pipeline.report.stage", "pipeline.interchange.importing"),
        *("pipeline.interchange.exporting", "pipeline.engines.transformers_sampler", "pipeline.engines.resident"),
        "torch._dynamo",
    ):
        importlib.import_module(module)
    root = Path(tempfile.mkdtemp(prefix="redpen-writes-"))
    failures = 0
    try:
        made = prepared(root)
        for name in args.command:
            n_writes, wrong = trials(name, root, made, args.every)
            failures += bool(wrong)
            said = "; ".join(wrong) or "equal to the undisturbed command after every kill"
            print(f"{name}: {n_writes} writes; {said}", flush=True)
    finally:
        shutil.rmtree(root)
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
