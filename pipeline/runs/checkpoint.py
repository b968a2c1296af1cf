"""Checkpoints: tensors as safetensors, the rest as JSON, written in a thread and renamed into place, so that a kill
never leaves half of one.

checkpoints/step-00000040/
    weights.safetensors, optimizer.safetensors, ...      one file for each group of tensors
    state.json                                           {step, state, digests of those files, own digest}
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.errors import RedpenError, shorten
from pipeline.files import PARTIAL, atomic_directory, file_digest, parse_model, read_json
from pipeline.runs.files import digest_of

Tensors = dict[str, Tensor]

_STATE = "state.json"
_PREFIX = "step-"


class DamagedCheckpointError(RedpenError):
    """A checkpoint differs from what was saved."""


class _CheckpointRecord(BaseModel):
    """The content of state.json. Older checkpoints have no `digest`, which covers the rest."""

    model_config = ConfigDict(extra="forbid")

    step: int = Field(ge=0, le=2**53)
    digests: dict[Annotated[str, Field(pattern=r"^\w{1,100}$")], str]
    state: dict[str, Any]
    digest: str | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A state that training can continue from.

    Attributes:
        step: optimizer steps done.
        tensors: by group and name, on the CPU.
        state: everything else that was saved, parsed from JSON.
    """

    step: int
    tensors: dict[str, Tensors]
    state: dict[str, Any]

    def outline(self) -> Checkpoint:
        """The same checkpoint with meta tensors: shapes and dtypes only."""
        empty = {group: {n: v.to("meta") for n, v in values.items()} for group, values in self.tensors.items()}
        return Checkpoint(self.step, empty, self.state)


class Checkpoints:
    """Saves checkpoints in a thread, one at a time; training only waits for the copy that it hands over.

    With 504 MB (fp32 weights of 42 M parameters and their moments) training pauses for 0.2 s instead of 1.8 s, and
    never waited longer than 0.07 s for the interpreter. When the CPU trains on all cores, nothing is gained.

    Args:
        before: called in the thread before each save, to write what the checkpoint refers to.
    """

    def __init__(self, directory: Path, keep: int, before: Callable[[], None]):
        self._directory, self._keep, self._before = directory, keep, before
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._saving: Future[None] | None = None

    def save(self, step: int, tensors: Mapping[str, Tensors], state: Mapping[str, Any], best: int | None) -> None:
        """Start saving tensors, which must not change any more. Waits for the previous save and raises its error."""
        self.wait()

        def begin() -> None:
            self._before()
            save(self._directory, step, tensors, state, keep=self._keep, best=best)

        self._saving = self._thread.submit(begin)

    def wait(self) -> None:
        """Wait until the save in progress is on disk, and raise its error."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def close(self) -> None:
        """Finish the save in progress, and ignore its error."""
        self._thread.shutdown()


def save(
    directory: Path,
    step: int,
    tensors: Mapping[str, Tensors],
    state: Mapping[str, Any],
    *,
    keep: int,
    best: int | None = None,
) -> Path:
    """Write the checkpoint of `step` under `directory`; remove all but the newest `keep` and that of step `best`."""
    path = path_of(directory, step)
    with atomic_directory(path) as partial:
        for group, values in tensors.items():
            save_file(
                {name: value.detach().cpu().contiguous() for name, value in values.items()}, _file(partial, group)
            )
        digests = {group: file_digest(_file(partial, group)) for group in tensors}
        record = {"step": step, "digests": digests, "state": dict(state)}
        record |= {"digest": digest_of(record)}
        (partial / _STATE).write_text(json.dumps(record, indent=1), encoding="utf-8")
    # Later steps belong to a damaged checkpoint that training went back from: they must not replace good ones.
    paths = _paths(directory)
    earlier = [other for other in paths if other.name <= path.name]
    kept = [*earlier[-keep:], *([] if best is None else [path_of(directory, best)])]
    for old in [*(set(paths) - set(kept)), *directory.glob(f".{_PREFIX}*{PARTIAL}")]:
        shutil.rmtree(old)
    return path


def latest(directory: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest intact checkpoint, or None; each damaged one that is skipped gives a warning."""
    for path in reversed(_paths(directory)):
        try:
            return load(path)
        except DamagedCheckpointError as error:
            warn(f"checkpoint {path} is damaged ({error}); trying the one before it")
    return None


def load(path: Path) -> Checkpoint:
    """Read a checkpoint and check its digests. Raises `DamagedCheckpointError`."""
    record = _check(path)
    try:
        tensors = {group: load_file(_file(path, group)) for group in record.digests}
    except (OSError, ValueError, SafetensorError) as error:
        raise DamagedCheckpointError(shorten(error) or type(error).__name__) from error
    return Checkpoint(record.step, tensors, record.state)


def check_all(directory: Path) -> Iterator[tuple[Path, str | None]]:
    """Every checkpoint under `directory` with the fault found in it, or None."""
    for path in _paths(directory):
        try:
            _check(path)
            yield path, None
        except DamagedCheckpointError as error:
            yield path, str(error)


def _check(path: Path) -> _CheckpointRecord:
    try:
        found = read_json(path / _STATE, error=DamagedCheckpointError, follow_links=False)
        record = parse_model(found, _CheckpointRecord, _STATE, error=DamagedCheckpointError)
        if record.digest is not None and record.digest != digest_of(found):
            raise DamagedCheckpointError(f"{_STATE} is not what was saved")
        if path.name != path_of(path.parent, record.step).name:
            raise DamagedCheckpointError(f"{_STATE} is that of step {record.step}")
        for group, digest in record.digests.items():
            if file_digest(_file(path, group), error=DamagedCheckpointError) != digest:
                raise DamagedCheckpointError(f"{group}.safetensors is not what was saved")
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"{Path(error.filename).name} is missing") from None
    return record


def _paths(directory: Path) -> list[Path]:
    """The checkpoints under `directory`, oldest first, without unfinished ones."""
    found: Iterable[Path] = directory.glob(f"{_PREFIX}*") if directory.exists() else ()
    return sorted(path for path in found if path.name.removeprefix(_PREFIX).isdigit())


def path_of(directory: Path, step: int) -> Path:
    return directory / f"{_PREFIX}{step:08d}"


def _file(directory: Path, group: str) -> Path:
    return directory / f"{group}.safetensors"
