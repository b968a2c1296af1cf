"""`redpen verify RUN`: check everything in a run against its digests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cache_schema as cs
from pipeline.config import load_stored_recipe
from pipeline.console import progress, show
from pipeline.errors import RedpenError
from pipeline.files import read_json
from pipeline.runs.files import (
    CHECKPOINTS,
    DISTILL,
    EVAL_CACHE,
    EVAL_FIGURES,
    EVALUATION,
    GATE,
    LEDGER,
    METRICS,
    RECIPE,
    RESULTS,
    ROUNDS,
    SFT,
    SFT_ROUND,
    Record,
    check,
    is_run,
    parse_step,
    read_lines,
    read_record,
    refuse_links,
)


def run(path: str) -> int:
    """Print a line for each fault of a run and of the runs within it; 1 if there is any, else 0."""
    runs = list(_runs(Path(path)))
    faults: list[str] = []
    with progress("verify", len(runs), "runs") as bar:
        for each in runs:
            faults += _faults(each)
            bar.advance()
    for fault in faults:
        show(fault)
    if faults:
        show(f"findings: {len(faults)}")
        return 1
    records = [read_record(each) or Record() for each in runs]
    n_files = sum(len(record.files or ()) for record in records)
    n_older = sum(record.result is not None and record.files is None for record in records)
    older = f"; {n_older} of them recorded no digests, as earlier versions of redpen did not" if n_older else ""
    show(f"{path}: {len(runs)} run{'s' * (len(runs) != 1)}, {n_files} files with digests{older}, no faults found")
    return 0


def _runs(path: Path) -> Iterator[Path]:
    """A run, and the runs within it of `redpen distill` and `redpen continual`."""
    yield path
    for within in (path / SFT, path / DISTILL, *sorted((path / ROUNDS).glob("*"))):
        if not within.is_symlink() and is_run(within):
            yield from _runs(within)


def _faults(run: Path) -> Iterator[str]:
    try:
        refuse_links(run)  # so that nothing outside the run is read
        record = read_record(run) or Record()
    except RedpenError as error:
        yield str(error)
        return
    faulty = set()
    recorded = (file.partition("/")[0] for file in record.files or ())
    for name in dict.fromkeys([*RESULTS, *EVALUATION, *recorded]):
        try:
            check(run, name, record=record)
            if name == RECIPE and (run / name).exists():
                load_stored_recipe(run / name)
            elif name in (LEDGER, GATE, EVAL_FIGURES) and (run / name).exists():
                read_json(run / name, follow_links=False)
        except RedpenError as error:
            faulty.add(name)
            yield str(error)
    if METRICS not in faulty:
        yield from _faulty_steps(run, record.result is not None)
    for name in (SFT_ROUND, EVAL_CACHE):
        if name not in faulty and (run / name).exists():
            try:
                yield from (f"{run / name}: {finding}" for finding in cs.verify(cs.open(run / name)))
            except cs.CacheError as error:
                yield str(error)
    if (run / CHECKPOINTS).is_dir():
        from pipeline.runs import checkpoint

        for path, problem in checkpoint.check_all(run / CHECKPOINTS):
            if problem is not None:
                yield f"{path}: damaged ({problem}); training continues from the checkpoint before it"


def _faulty_steps(run: Path, has_ended: bool) -> Iterator[str]:
    """Faulty lines of metrics.jsonl, without the last one of an unfinished run, which may be incomplete."""
    try:
        lines = read_lines(run / METRICS)
        for number, line in enumerate(lines, 1):
            if has_ended or number < len(lines):
                parse_step(line, f"{run / METRICS}, line {number}")
    except RedpenError as error:
        yield str(error)
