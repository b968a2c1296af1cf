"""The files of a run: what each is called, and what the run's record says about them.

    recipe.toml          the resolved recipe
    run.json             the record: the cache that the run learns from, an id and, once it has ended, its result
    metrics.jsonl        one object a step
    ledger.json          seconds, tokens and FLOPs by stage, once training has ended
    adapter/ or model/   what was trained: a PEFT adapter, or the whole model with train.method = "full"
    checkpoints/         see pipeline.runs.checkpoint
    tensorboard/ wandb/  curves (wandb: only if the recipe asks for it)
    data.zarr            `redpen sft`: the round of documents and chats that it learns from
    rounds/NNNNN/        `redpen distill`: the run of each round
    sft/ distill/        `redpen continual`: the runs of its two stages
    gate.json            `redpen continual`: what the gate measured
    eval.json            `redpen eval`: the figures
    eval.zarr            `redpen eval`: the rollouts that it sampled
    reread.safetensors   `redpen eval`: the trained student's scores of cached rollouts

A run has ended when `result` in its record says so, never because a file exists. From then on the record's `files`
holds a digest of every file that belongs to the result, and each reader checks the files that it uses:

    check(run, LEDGER)                                     raises `DamagedRunError` if it is not what was recorded

A command that adds to a finished run, as `redpen eval` does, holds the run's lock and names what it replaces:

    with locked(run), replacing(run, EVAL_FIGURES, EVAL_CACHE):
        ...                                                # write them with the functions of pipeline.files

A run from before there were digests has no `files`, and nothing of it is checked. The README.md of an adapter or a
model has no digest: people may edit it.
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

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from pipeline.config import Recipe, load_stored_recipe
from pipeline.errors import RedpenError
from pipeline.files import file_digest, parse_json, parse_model, read_bytes, read_json, refuse_link, write_atomically

RECIPE = "recipe.toml"
RECORD = "run.json"
METRICS = "metrics.jsonl"
LEDGER = "ledger.json"
ADAPTER, MODEL = TRAINED = ("adapter", "model")  # a run has one of these
CHECKPOINTS = "checkpoints"
TENSORBOARD = "tensorboard"
WANDB = "wandb"
LOCK = ".lock"
SFT_ROUND = "data.zarr"
ROUNDS, SFT, DISTILL = "rounds", "sft", "distill"  # runs within a run
GATE = "gate.json"
EVAL_FIGURES = "eval.json"
EVAL_CACHE = "eval.zarr"
REREAD = "reread.safetensors"

#: What training ends with, if the run has it, and what `redpen eval` adds.
RESULTS = (RECIPE, METRICS, LEDGER, GATE, *TRAINED)
EVALUATION = (EVAL_FIGURES, EVAL_CACHE, REREAD)
#: Any of these makes a directory a run; they exist before a run has ended.
MARKERS = (RECORD, RECIPE, METRICS)
_EDITABLE = "README.md"
_UNRECORDED = "ended later, or the command that replaces it was killed while it did so"
_MAX_METRICS_BYTES = 2**31  # a million steps have less


class DamagedRunError(RedpenError):
    """A file of a run differs from what the run recorded."""


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        step: optimizer steps of `redpen train`; for `redpen distill` the number of the student that is kept, 0 for
            the recipe's own.
        sentence: the same in words.
    """

    step: Annotated[int, Field(ge=0, le=2**53)]
    sentence: Annotated[str, Field(max_length=100_000)]
    exit_code: Annotated[int, Field(ge=0, le=255)]


class Step(BaseModel):
    """A line of metrics.jsonl: the step, and any metrics."""

    model_config = ConfigDict(extra="allow")

    step: int = Field(ge=1, le=2**53)


def _learned_from(cache: dict[str, Any]) -> dict[str, Any]:
    """Check the types of what is read of a record's `cache`; the rest is digests, which are compared only."""
    for name, kinds in (("url", str), ("round", int), ("teacher", str | list)):
        if (value := cache.get(name)) is not None and not isinstance(value, kinds):
            raise ValueError(f"{name}: expected another type, found {value!r:.80}")
    return cache


class Record(BaseModel):
    """The content of run.json.

    Attributes:
        cache: what the run learns from; see `pipeline.rounds.identity.cache_identity`.
        id: stays the same while training continues from the checkpoints here; trackers know the run by it.
        result: None until the run has ended.
        files: digests by path in the run; None until it has ended, and in a run from before there were digests.
    """

    model_config = ConfigDict(frozen=True)

    cache: Annotated[dict[str, Any], AfterValidator(_learned_from)] = {}
    id: Annotated[str, Field(max_length=1000)] = ""
    result: Result | None = None
    files: dict[str, str] | None = None


def is_run(path: str | os.PathLike[str]) -> bool:
    """Whether a directory is a run, finished or not."""
    return any((Path(path) / name).is_file() for name in MARKERS)


def read_record(run: Path) -> Record | None:
    """The record of a run, or None if it has none. Raises `DamagedRunError` if it is not what redpen wrote."""
    path = run / RECORD
    try:
        found = read_json(path, error=DamagedRunError, follow_links=False)
    except FileNotFoundError:
        return None
    if ("digest" in found or "files" in found) and found.get("digest") != digest_of(found):
        raise DamagedRunError(f"{path}: is not what redpen wrote (its digest differs); restore it from a copy")
    return parse_model(found, Record, str(path), error=DamagedRunError)


def read_recipe(run: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a run. Raises `ConfigError`, or `DamagedRunError` if it has changed since the run has ended."""
    check(run, RECIPE)
    return load_stored_recipe(Path(run) / RECIPE, overrides)


def write_record(run: Path, record: Record) -> None:
    """Replace run.json."""
    value = record.model_dump(exclude={"result"}) | {"result": asdict(record.result) if record.result else None}
    write_atomically(run / RECORD, json.dumps(value | {"digest": digest_of(value)}, indent=1) + "\n")


def read_steps(run: Path) -> Iterator[dict[str, Any]]:
    """The steps in a run's metrics.jsonl, if it exists. Raises `RedpenError` at a line that is not a step."""
    path = run / METRICS
    for number, line in enumerate(read_lines(path), 1):
        yield parse_step(line, f"{path}, line {number}")


def read_lines(path: Path) -> list[bytes]:
    """The unparsed lines of a metrics.jsonl, if it exists."""
    try:
        return read_bytes(path, at_most=_MAX_METRICS_BYTES, follow_links=False).splitlines()
    except FileNotFoundError:
        return []


def parse_step(line: bytes, name: str) -> dict[str, Any]:
    """Parse a line of metrics.jsonl. Raises `RedpenError` naming the place `name` if it is not a step."""
    return parse_model(parse_json(line, name), Step, name).model_dump()


def digest_of(value: dict[str, Any]) -> str:
    """Digest of a JSON object without its own `digest` key: 32 hexadecimal digits."""
    rest = {key: item for key, item in value.items() if key != "digest"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def digests(run: Path, names: Sequence[str]) -> dict[str, str]:
    """Digests of those of these files and directories that exist, by path in the run.

    Each file of a directory has one. A cache has one, without the chunks that its commits have digests of.
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
    """Check files and directories of a run against its record. One that neither exists nor is recorded passes.

    Args:
        record: the run's, if it has been read already.

    Raises:
        DamagedRunError: one is damaged or missing, or does not belong to the result, because training has continued
            since or the command that wrote it was killed.
    """
    run = Path(run)
    record = record or read_record(run)
    if record is None:
        return
    for name in names:
        if record.result is None or (record.files is not None and not _recorded(record.files, name)):
            if name not in MARKERS and (run / name).exists():
                why = "has not ended yet" if record.result is None else _UNRECORDED
                raise DamagedRunError(
                    f"{run / name}: does not belong to the result of the run, which {why}; {_remedy(run, name)}"
                )
        elif record.files is not None:
            expected, found = _recorded(record.files, name), digests(run, [name])
            for file, digest in expected.items():
                if found.get(file) != digest:
                    problem = "does not have the digest that the run recorded" if file in found else "is missing"
                    raise DamagedRunError(f"{run / file}: {problem}; {_remedy(run, name)}")


def check_trained(directory: Path) -> None:
    """`check` an adapter or model if it is that of a run; any other directory passes."""
    run = directory.resolve().parent
    if directory.name in TRAINED and (run / RECORD).is_file() and (run / RECIPE).is_file():
        check(run, directory.name)


def fault(run: str | os.PathLike[str], name: str) -> str | None:
    """The message of `check` for a file; None if it passes, or if run.json cannot be read."""
    try:
        record = read_record(Path(run))
    except DamagedRunError:
        return None  # reported for run.json
    try:
        check(run, name, record=record)
    except RedpenError as error:
        return str(error)
    return None


@contextmanager
def replacing(run: str | os.PathLike[str], *names: str) -> Iterator[None]:
    """Record the digests of files and directories of a finished run that the body writes or removes.

    Meanwhile they belong to no result, so that a kill leaves no wrong record. If the body raises, the files that it
    has not changed are recorded as before.
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
                stack.enter_context(contextlib.suppress(OSError, RedpenError))  # the body's error matters more
            now = digests(run, names)
            if not succeeded:
                now = {file: digest for file, digest in now.items() if before.get(file) == digest}
            write_record(run, record.model_copy(update={"files": others | now}))


def _recorded(files: dict[str, str], name: str) -> dict[str, str]:
    return {file: digest for file, digest in files.items() if file == name or file.startswith(f"{name}/")}


def _remedy(run: Path, name: str) -> str:
    if name in TRAINED:
        return f"remove {run / name} and repeat the command that made the run, which writes it from a checkpoint"
    if name in EVALUATION:
        return f"`redpen eval {run}` writes it again"
    if name == LEDGER:
        return "remove it and repeat the command that made the run"
    return "restore it from a copy"


def _cache_digest(path: Path) -> str:
    """Digest of a cache's metadata, prompts and commits; reading it checks other chunks against the commits."""
    digest = hashlib.blake2b(digest_size=16)
    for directory, subdirectories, names in os.walk(path):
        here = Path(directory)
        subdirectories.sort()
        if "c" in subdirectories and here.name != "commit" and (here.parent / "commit").is_dir():
            subdirectories.remove("c")
        for name in sorted(names):
            digest.update(f"{(here / name).relative_to(path).as_posix()}\0{file_digest(here / name)}\n".encode())
    return digest.hexdigest()


def refuse_links(run: Path) -> None:
    """Raise `RedpenError` if there is a symbolic link in a run, except in its caches and wandb directory."""
    for directory, subdirectories, names in os.walk(run):
        here = Path(directory)
        for name in (*subdirectories, *names):
            refuse_link(here / name)
        subdirectories[:] = [name for name in subdirectories if name != WANDB and not name.endswith(".zarr")]
