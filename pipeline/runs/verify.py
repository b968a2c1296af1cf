"""Everything in a run against its digests: `redpen verify RUN`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cache_schema as cs
from pipeline.config import load_stored_recipe
from pipeline.console import progress, show
from pipeline.errors import RedpenError
from pipeline.files import read_json
from pipeline.runs.files import (
    LEDGER,
    METRICS,
    RECIPE,
    Record,
    check,
    is_run,
    parse_step,
    read_lines,
    read_record,
    refuse_links,
)

#: What belongs to a result, so that a file that is there without a digest is of another one.
_OF_RESULT = (LEDGER, "gate.json", "adapter", "model", "eval.json", "eval.zarr", "reread.safetensors")
_CACHES = ("data.zarr", "eval.zarr")


def run(path: str) -> int:
    """Print a line for everything that is wrong with a run and the runs within it; 1 if something is, else 0."""
    runs = list(_runs(Path(path)))
    found: list[str] = []
    with progress("verify", len(runs), "runs") as bar:
        for each in runs:
            found += _findings(each)
            bar.advance()
    for finding in found:
        show(finding)
    if found:
        show(f"findings: {len(found)}")
        return 1
    records = [read_record(each) or Record() for each in runs]
    n_files = sum(len(record.files or ()) for record in records)
    older = sum(record.result is not None and record.files is None for record in records)
    without = f"; {older} of them recorded no digests, as earlier versions of redpen did not" if older else ""
    of = f"{len(runs)} run{'s' * (len(runs) != 1)}, {n_files} files with digests{without}"
    show(f"{path}: {of}, nothing wrong with them")
    return 0


def _runs(path: Path) -> Iterator[Path]:
    """A run, and the runs within it of `redpen distill` and `redpen continual`."""
    yield path
    for within in (path / "sft", path / "distill", *sorted((path / "rounds").glob("*"))):
        if not within.is_symlink() and is_run(within):
            yield from _runs(within)


def _findings(run: Path) -> Iterator[str]:
    try:
        refuse_links(run)  # what follows reads nothing from elsewhere
        record = read_record(run)
    except RedpenError as error:
        yield str(error)
        return
    record = record or Record()
    names = dict.fromkeys([RECIPE, METRICS, *_OF_RESULT, *(file.partition("/")[0] for file in record.files or ())])
    bad = set()
    for name in names:
        try:
            check(run, name, record=record)
            if name == RECIPE and (run / name).exists():
                load_stored_recipe(run / name)
            elif name in (LEDGER, "gate.json", "eval.json") and (run / name).exists():
                read_json(run / name, follow_links=False)
        except RedpenError as error:
            bad.add(name)
            yield str(error)
    if METRICS not in bad:
        yield from _lines(run, record.result is not None)
    for name in _CACHES:
        if name not in bad and (run / name).exists():
            yield from _cache(run / name)
    if (run / "checkpoints").is_dir():
        from pipeline.runs import checkpoint

        for path, problem in checkpoint.check_all(run / "checkpoints"):
            if problem is not None:
                yield f"{path}: damaged ({problem}); training goes on from the one before"


def _lines(run: Path, has_ended: bool) -> Iterator[str]:
    """Lines that are no step's; of a run that has not ended the last may be one that is being written."""
    try:
        lines = read_lines(run / METRICS)
        for number, line in enumerate(lines, 1):
            if has_ended or number < len(lines):
                parse_step(line, f"{run / METRICS}, line {number}")
    except RedpenError as error:
        yield str(error)


def _cache(path: Path) -> Iterator[str]:
    try:
        yield from (f"{path}: {finding}" for finding in cs.verify(cs.open(path)))
    except cs.CacheError as error:
        yield str(error)
