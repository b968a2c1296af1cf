"""The prompt records of a round: JSON records, stored as their bytes and offsets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from . import layout
from .errors import CacheError, storage_errors
from .manifest import RoundManifest
from .nodes import damaged, open_group

#: Limit of the prompts of a round, in bytes.
MOST_PROMPT_BYTES = 2**36
# The digest is computed over so many prompts at a time, since their bytes are copied for it.
_HASHED_AT_ONCE = 2**16


def encode_prompts(prompts: Sequence[dict[str, Any]]) -> list[bytes]:
    """Each record as canonical JSON: UTF-8, sorted keys, no spaces."""
    return [
        json.dumps(record, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode("utf-8", "surrogatepass")
        for record in prompts
    ]


def prompts_sha256(prompts: Sequence[dict[str, Any]]) -> str:
    """SHA-256 over the records' canonical JSON, each followed by a newline."""
    digest = hashlib.sha256()
    for line in encode_prompts(prompts):
        digest.update(line + b"\n")
    return digest.hexdigest()


def write_prompts(group: zarr.Group, prompts: Sequence[dict[str, Any]]) -> None:
    """Write the prompts of a round into its empty group `prompts`."""
    lines = encode_prompts(prompts)
    data = np.frombuffer(b"".join(lines), np.uint8)
    offsets = np.concatenate([[0], np.cumsum([len(line) for line in lines])]).astype(np.int64)
    layouts = layout.prompt_layouts(len(data), len(lines))
    layout.create(group, layouts)
    for name, value in (("bytes", data), ("offsets", offsets)):
        layouts[name].open(group.store, f"{group.path}/{name}")[:] = value


class PromptTable:
    """A round's prompt records, read on first use: `len(table)`, `table[i]`.

    Raises `CacheError` if they do not match `prompts_sha256` of the round.
    """

    def __init__(self, round_group: zarr.Group, manifest: RoundManifest):
        self._group, self._manifest = round_group, manifest
        self._loaded: tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        return len(self._load()[1]) - 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        data, offsets = self._load()
        if not 0 <= index < len(offsets) - 1:
            raise IndexError(f"prompt {index}: there are {len(offsets) - 1}")
        try:
            record = json.loads(data[offsets[index] : offsets[index + 1]].tobytes().decode("utf-8", "surrogatepass"))
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise CacheError(f"{self._path}: prompt {index}: expected a JSON object, found something else")
        return record

    def check(self) -> None:
        """Raise `CacheError` if the prompts are missing or damaged."""
        self._load()

    @property
    def _path(self) -> str:
        return f"{self._group.path}/prompts"

    def _load(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        if self._loaded is None:
            n_prompts = self._manifest.n_prompts
            with storage_errors(f"{self._path}: cannot be read"):
                if open_group(self._group.store, self._path) is None:
                    raise damaged(self._path, "is missing")
                offsets = self._read("offsets", layout.prompt_layouts(1, n_prompts)["offsets"]).astype(np.int64)
                # Checked before an array of this size is allocated.
                if offsets[0] != 0 or (np.diff(offsets) <= 0).any() or offsets[-1] > MOST_PROMPT_BYTES:
                    raise self._damage("offsets", "expected ascending numbers from 0, found others")
                data = self._read("bytes", layout.prompt_layouts(int(offsets[-1]), n_prompts)["bytes"])
            digest = hashlib.sha256()
            for first in range(0, n_prompts, _HASHED_AT_ONCE):
                ends = offsets[first : first + _HASHED_AT_ONCE + 1]
                lines = np.insert(data[ends[0] : ends[-1]], ends[1:] - ends[0], ord("\n"))
                digest.update(lines.data)
            if digest.hexdigest() != self._manifest.prompts_sha256:
                raise self._damage("bytes", "does not match prompts_sha256 of the round")
            self._loaded = data, offsets
        return self._loaded

    def _read(self, name: str, expected: layout.Layout) -> npt.NDArray[Any]:
        array = layout.open_array(self._group.store, f"{self._path}/{name}", expected)
        try:
            with layout.decoding_errors():
                return np.asarray(array[:])
        except CacheError:
            raise
        except ValueError as error:
            raise self._damage(name, f"cannot be decoded: {error}") from error

    def _damage(self, name: str, problem: str) -> CacheError:
        return CacheError(f"{self._path}/{name}: {problem}; restore the cache from a copy")
