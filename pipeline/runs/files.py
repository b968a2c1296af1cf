"""What a run says about itself, for every command that reads one: how it ended, and the digests of what it made.

run.json is the record. A run has ended when its `result` says so, never because some file exists. From then on
`files` holds a digest of every file that is part of the result, and each reader checks the ones that it uses:

    check(run, "ledger.json")                              raises `DamagedRunError` where it is not what was recorded

A command that adds to a finished run, as `redpen eval` does, holds the run's lock and says what it replaces:

    with locked(run), replacing(run, "eval.json", "eval.zarr"):
        ...                                                # write them by the doors of pipeline.files

A run that was made before there were digests has no `files`, and nothing of it is checked. README.md of an adapter or
a model has no digest: it is for people to edit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from pipeline.errors import RedpenError
from pipeline.files import file_digest, parse_json, parse_model, read_bytes, read_json, refuse_link, write_atomically
from pipeline.runs.lock import locked as locked

RUN, RECIPE, METRICS, LEDGER = "run.json", "recipe.toml", "metrics.jsonl", "ledger.json"
#: What training makes: one of these.
MADE = ("adapter", "model")
#: Any of these makes a directory a run.
MARKS = (RUN, RECIPE, METRICS)
#: These are there before a run has ended too.
_EARLY = frozenset({RUN, RECIPE, METRICS})
_EDITABLE = "README.md"
#: Bytes of metrics.jsonl at most: a million steps have less.
_METRICS_AT_MOST = 2**31


class DamagedRunError(RedpenError):
    """A file of a run is not what the run ended with."""


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        step: optimizer steps of `redpen train`; of `redpen distill` the number of the student that is kept, where 0
            is the one that it began with.
        sentence: says it in words.
    """

    step: Annotated[int, Field(ge=0, le=2**53)]
    sentence: Annotated[str, Field(max_length=100_000)]
    exit_code: Annotated[int, Field(ge=0, le=255)]


class Step(BaseModel):
    """A line of metrics.jsonl: the step, and whatever was measured."""

    model_config = ConfigDict(extra="allow")

    step: int = Field(ge=1, le=2**53)


class Record(BaseModel):
    """What run.json holds.

    Attributes:
        cache: what the run learns from; see `pipeline.rounds.identity.cache_identity`.
        id: the same for as long as training goes on from what is here.
        result: None until the run has ended.
        files: digests by path in the run; None until it has ended, and in a run made before there were digests.
    """

    model_config = ConfigDict(frozen=True)

    cache: dict[str, Any] = {}
    id: Annotated[str, Field(max_length=1000)] = ""
    result: Result | None = None
    files: dict[str, str] | None = None


def is_run(path: str | os.PathLike[str]) -> bool:
    """Whether a directory is a run, finished or not."""
    return any((Path(path) / name).is_file() for name in MARKS)


def read_record(run: Path) -> Record | None:
    """What run.json holds; None where there is none. Raises `DamagedRunError` where it is not what was written."""
    path = run / RUN
    try:
        found = read_json(path, error=DamagedRunError, follow_links=False)
    except FileNotFoundError:
        return None
    if ("digest" in found or "files" in found) and found.get("digest") != digest_of(found):
        raise DamagedRunError(f"{path}: is not what redpen wrote (its digest differs); restore it from a copy")
    return parse_model(found, Record, str(path), error=DamagedRunError)


def write_record(run: Path, record: Record) -> None:
    """Replace run.json."""
    value = record.model_dump(exclude={"result"}) | {"result": asdict(record.result) if record.result else None}
    write_atomically(run / RUN, json.dumps(value | {"digest": digest_of(value)}, indent=1) + "\n")


def read_steps(run: Path) -> Iterator[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; none where there is no such file. Raises `RedpenError` at one that is not
    a step's.
    """
    path = run / METRICS
    for number, line in enumerate(read_lines(path), 1):
        yield parse_step(line, f"{path}, line {number}")


def read_lines(path: Path) -> list[bytes]:
    """The lines of a metrics.jsonl as they are; none where there is no such file."""
    try:
        return read_bytes(path, at_most=_METRICS_AT_MOST, follow_links=False).splitlines()
    except FileNotFoundError:
        return []


def parse_step(line: bytes, name: str) -> dict[str, Any]:
    """A line of metrics.jsonl. Raises `RedpenError` that names its place `name` where it is not a step's."""
    return parse_model(parse_json(line, name), Step, name).model_dump()


def digest_of(value: dict[str, Any]) -> str:
    """Digest of a JSON object but for its own `digest`, 32 hexadecimal digits."""
    rest = {key: item for key, item in value.items() if key != "digest"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


# ------------------------------------------------------------------------------------------------------------ digests


def digests(run: Path, names: Sequence[str]) -> dict[str, str]:
    """Digests of these files and directories of a run, as far as they are there, by path in the run.

    Each file of a directory has one; a cache has one, of everything but the chunks that its commits check.
    """
    found = {}
    for name in names:
        path = run / name
        refuse_link(path)
        if path.is_file():
            found[name] = file_digest(path)
        elif name.endswith(".zarr") and path.is_dir():
            found[name] = _cache_digest(path)
        elif path.is_dir():
            files = (file for file in sorted(path.rglob("*")) if file.name != _EDITABLE and not file.is_dir())
            found |= {file.relative_to(run).as_posix(): file_digest(file) for file in files}
    return found


def check(run: str | os.PathLike[str], *names: str, record: Record | None = None) -> None:
    """Check files and directories of a run against its record; those that are neither there nor recorded are right.

    Args:
        record: what run.json holds, where it has been read already.

    Raises:
        DamagedRunError: one is damaged or missing, or does not belong to the result: the run has gone on since, or
            the command that wrote it was killed.
    """
    run = Path(run)
    record = record or read_record(run)
    if record is None:
        return
    for name in names:
        if record.result is None or (record.files is not None and not _recorded(record.files, name)):
            if name not in _EARLY and (run / name).exists():
                raise DamagedRunError(
                    f"{run / name}: does not belong to the run's result, which was "
                    f"{'not reached yet' if record.result is None else 'reached later'}; {_remedy(run, name)}"
                )
        elif record.files is not None:
            expected, found = _recorded(record.files, name), digests(run, [name])
            for file, digest in expected.items():
                if found.get(file) != digest:
                    what = (
                        "is missing" if file not in found else "is not what the run ended with (its digest differs)"
                    )
                    raise DamagedRunError(f"{run / file}: {what}; {_remedy(run, name)}")


def check_made(directory: Path) -> None:
    """The same for an adapter or a model that may be a run's; any other directory is right."""
    run = directory.resolve().parent
    if directory.name in MADE and (run / RUN).is_file() and (run / RECIPE).is_file():
        check(run, directory.name)


def fault(run: str | os.PathLike[str], name: str) -> str | None:
    """What `check` finds wrong with a file, in one line. None where nothing is, or where run.json cannot be read."""
    try:
        record = read_record(Path(run))
    except DamagedRunError:
        return None  # which is told of run.json
    try:
        check(run, name, record=record)
    except RedpenError as error:
        return str(error)
    return None


@contextmanager
def replacing(run: str | os.PathLike[str], *names: str) -> Iterator[None]:
    """Record the digests of files and directories of a finished run that the body writes or removes.

    While it runs they belong to no result, so that a kill leaves none that is recorded wrongly. If it raises, those
    that it has not replaced are recorded as before.
    """
    run = Path(run)
    record = read_record(run)
    if record is None or record.result is None or record.files is None:
        yield
        return
    before = {file: digest for name in names for file, digest in _recorded(record.files, name).items()}
    others = {file: digest for file, digest in record.files.items() if file not in before}
    write_record(run, record.model_copy(update={"files": others}))
    succeeded = False
    try:
        yield
        succeeded = True
    finally:
        with contextlib.ExitStack() as stack:
            if not succeeded:
                stack.enter_context(contextlib.suppress(OSError, RedpenError))  # what the body raised is told instead
            now = digests(run, names)
            if not succeeded:
                now = {file: digest for file, digest in now.items() if before.get(file) == digest}
            write_record(run, record.model_copy(update={"files": others | now}))


def _recorded(files: dict[str, str], name: str) -> dict[str, str]:
    return {file: digest for file, digest in files.items() if file == name or file.startswith(f"{name}/")}


def _remedy(run: Path, name: str) -> str:
    if name in MADE:
        return f"remove {run / name} and run the command that made the run again, which writes it from its checkpoint"
    if name.startswith(("eval.", "reread.")):
        return f"`redpen eval {run}` makes it again"
    if name == LEDGER:
        return "remove it and run the command that made the run again"
    return "restore it from a copy"


def _cache_digest(path: Path) -> str:
    """Of a cache's metadata, prompts and commits; those have digests of all other chunks, which reading checks."""
    digest = hashlib.blake2b(digest_size=16)
    for directory, subdirectories, names in os.walk(path):
        here = Path(directory)
        subdirectories.sort()
        if "c" in subdirectories and here.name != "commit" and (here.parent / "commit").is_dir():
            subdirectories.remove("c")
        for name in sorted(names):
            digest.update(f"{(here / name).relative_to(path).as_posix()}\0{file_digest(here / name)}\n".encode())
    return digest.hexdigest()


# -------------------------------------------------------------------------------------------------------------- links


def refuse_links(run: Path) -> None:
    """Raise `RedpenError` if a symbolic link is anywhere in a run, but for caches and what Weights & Biases keeps."""
    for directory, subdirectories, names in os.walk(run):
        here = Path(directory)
        for name in (*subdirectories, *names):
            refuse_link(here / name)
        subdirectories[:] = [name for name in subdirectories if name != "wandb" and not name.endswith(".zarr")]
