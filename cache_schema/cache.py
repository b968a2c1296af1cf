"""Opening and creating caches, rounds and score groups; prompts; the writer's lock."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import zarr
import zarr.errors
from zarr.abc.store import Store
from zarr.storage import LocalStore

from . import layout, locks
from .errors import (
    CacheError,
    FormatVersionError,
    NotACacheError,
    ProvenanceError,
    storage_errors,
)
from .group import BlockGroup
from .manifest import Header, RoundManifest, ScoresManifest, parse, shown
from .nodes import damaged, open_group
from .s3 import S3Store
from .stores import entries, holds_blocks, is_empty, open_store

FORMAT = "redpen"
VERSION = 1
STUDENT = "student"
#: The most that the prompts of a round may hold together, in bytes.
MOST_PROMPT_BYTES = 2**36

_M = TypeVar("_M", RoundManifest, ScoresManifest)


def create(location: str | os.PathLike[str] | Store, *, created_by: str = "") -> Cache:
    """Open a cache for writing; where there is nothing yet, create an empty one.

    Args:
        location: local path, or any zarr `Store`.
        created_by: software and version, for people.

    Raises:
        NotACacheError: something else is there. StorageError: it cannot be written.
    """
    store, label = open_store(location, writable=True)
    with storage_errors(f"cache {label}"):
        if is_empty(store):
            header = {"format": FORMAT, "version": VERSION, "created_by": created_by}
            with suppress(zarr.errors.ContainsGroupError):  # another process was first: its cache is as good
                zarr.create_group(store, attributes={"redpen": header})
    return open(location, writable=True)


def open(location: str | os.PathLike[str] | Store, *, writable: bool = False) -> Cache:
    """Open a cache.

    Raises:
        NotACacheError: nothing, or something else, is there. FormatVersionError: it is newer than this package.
    """
    store, label = open_store(location, writable=writable)
    with storage_errors(f"cache {label}"):
        if is_empty(store):
            raise NotACacheError(
                f"cache {label}: nothing is there; `redpen rollouts RECIPE --cache {label}` makes one"
            )
        try:
            root = open_group(store, "")
            lost = root is None and holds_blocks(store, "rounds")
        except CacheError as error:
            raise NotACacheError(f"cache {label}: {error}") from None
    if lost:
        raise NotACacheError(f"cache {label}: {damaged('', 'is missing, though there are rounds')}")
    header = root.attrs.get("redpen") if root is not None else None
    if root is None or not isinstance(header, dict) or header.get("format") != FORMAT:
        raise NotACacheError(f"cache {label}: this is not a redpen cache (no Zarr group with a redpen attribute)")
    version = header.get("version")
    if isinstance(version, int) and version > VERSION:
        raise FormatVersionError(
            f"cache {label}: format version {shown(version)}, this redpen reads up to {VERSION}; upgrade it"
        )
    parse(Header, header, f"cache {label}: zarr.json: attribute redpen")
    return Cache(store, label, root, writable)


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


class Cache:
    """A redpen cache: numbered rounds of rollouts, each with scores by any number of models."""

    def __init__(self, store: Store, label: str, root: zarr.Group, writable: bool):
        self._store, self._root, self._writable = store, root, writable
        self.url = label

    def __repr__(self) -> str:
        return f"Cache({self.url!r}, rounds={self.round_indices()})"

    @property
    def path(self) -> Path | None:
        """Its directory, if it is local."""
        return Path(self._store.root) if isinstance(self._store, LocalStore) else None

    def round_indices(self) -> list[int]:
        """Numbers of the rounds, ascending. A round whose creation was cut short is not there."""
        return [number for number in self.round_numbers() if self._described(number) is not None]

    def round_numbers(self) -> list[int]:
        """Numbers below `rounds`, ascending, whether or not what is there is a round."""
        return [int(name) for name in self._names("rounds") if _is_number(name)]

    def lost_rounds(self) -> list[int]:
        """Numbers of rounds that hold blocks but whose own metadata are gone: damage, not a beginning."""
        found = []
        for number in self.round_numbers():
            with suppress(CacheError):  # damaged, but there
                if self._described(number) is None and self._holds_blocks(number):
                    found.append(number)
        return found

    def _holds_blocks(self, number: int) -> bool:
        with storage_errors(f"cache {self.url}"):
            return any(holds_blocks(self._store, f"{_round_path(number)}/{name}") for name in ("rollouts", "scores"))

    def _names(self, path: str) -> list[str]:
        """Names below the group at `path`, sorted. Raises `CacheError` where only its metadata are gone."""
        with storage_errors(f"cache {self.url}"):
            names = sorted(entries(self._store, path))
            if open_group(self._store, path) is None:
                if any(holds_blocks(self._store, f"{path}/{name}") for name in names):
                    raise CacheError(
                        f"cache {self.url}: {damaged(path, 'is missing, though there is data below it')}"
                    )
                return []
        return names

    def _described(self, number: int) -> zarr.Group | None:
        """The group of a round, None where its attributes were never written."""
        with storage_errors(f"cache {self.url}"):
            group = open_group(self._store, _round_path(number))
        return group if group is not None and "redpen" in group.attrs else None

    def is_described(self, number: int) -> bool:
        """Whether there is a round of this number, and not the remains of an interrupted creation."""
        return self._described(number) is not None

    def round(self, index: int | None = None) -> Round:
        """Round `index`, or the latest. Raises `CacheError` where there is none."""
        numbers = self.round_numbers()
        for number in reversed(numbers) if index is None else [index]:
            if number in numbers and (group := self._described(number)) is not None:
                return self._open_round(number, group)
        if index is None or not self.round_indices():
            raise CacheError(
                f"cache {self.url}: holds no rollouts yet; run `redpen rollouts RECIPE --cache {self.url}`"
            )
        raise CacheError(f"cache {self.url}: there is no round {index}; it has {_listed(self.round_indices())}")

    def _open_round(self, index: int, group: zarr.Group) -> Round:
        found, where = group.attrs["redpen"], f"{self.url} {_round_path(index)}"
        slots = found.get("slots") if isinstance(found, dict) else None
        fields = {name: v for name, v in found.items() if name != "slots"} if isinstance(found, dict) else found
        manifest = RoundManifest.from_json(fields, where)
        if slots != manifest.slots():  # derived; stored for readers in other languages
            raise CacheError(
                f"{where}: attribute redpen.slots: expected {shown(manifest.slots(), 200)}, found {shown(slots)}"
            )
        return Round(self, index, group, manifest)

    def start_round(
        self, manifest: RoundManifest, prompts: Sequence[dict[str, Any]], index: int | None = None
    ) -> Round:
        """The round of this provenance: the latest (or `index`) where it agrees, a new one where `index` is the next.

        A round that holds nothing yet is made anew rather than refused.

        Raises `ProvenanceError` listing the fields in which the round that is there differs.
        """
        if manifest.prompts_sha256 != prompts_sha256(prompts) or manifest.n_prompts != len(prompts):
            raise CacheError("round manifest: prompts_sha256 and n_prompts must be those of the prompts given")
        indices = self.round_indices()
        following = indices[-1] + 1 if indices else 0
        index = (indices[-1] if indices else 0) if index is None else index
        if index in indices:
            existing = self.round(index)
            if existing.manifest.differences(manifest) and not existing.holds_anything():
                return self._create_round(index, manifest, prompts)  # nothing was sampled yet, so nothing is lost
            _require_same(
                existing.manifest,
                manifest,
                f"cache {self.url} round {index}",
                f"start a new round with --round {following}",
            )
            return existing
        if index != following:
            raise CacheError(f"cache {self.url}: the next round is {following}, got {index}")
        return self._create_round(index, manifest, prompts)

    def _create_round(self, index: int, manifest: RoundManifest, prompts: Sequence[dict[str, Any]]) -> Round:
        if index in self.lost_rounds():
            raise CacheError(
                f"cache {self.url}: round {index} holds blocks, but its metadata is gone; "
                f"restore {_round_path(index)}/zarr.json from a copy, or start another cache"
            )
        with storage_errors(f"cache {self.url}"):
            rounds = self._root.require_group("rounds")
            # A round exists from the moment its attributes do, so they are written last.
            group = rounds.create_group(f"{index:05d}", overwrite=True)
            _write_prompts(group.create_group("prompts"), encode_prompts(prompts))
            layout.create(group.create_group("rollouts"), layout.block_layouts(manifest, manifest))
            group.create_group("scores")
            group.attrs.put({"redpen": manifest.to_json() | {"slots": manifest.slots()}})
        return self.round(index)

    def lock(self, command: str) -> AbstractContextManager[None]:
        """Hold the cache for writing, against every other process that does.

        A local cache is locked by the kernel: the lock ends with the process, however it ends. On S3 it is a lease
        that ends soon after its holder; other stores have none, and their readers rely on the digests. Entering
        raises `CacheLockedError` naming the holder.
        """
        if self.path is not None:
            return locks.local(self.path, self.url, command)
        if isinstance(self._store, S3Store):
            return locks.leased(self._store.server, command)
        return nullcontext()


class Round:
    """One sampling pass: prompts, rollouts, and scores of them by the student and any number of teachers."""

    def __init__(self, cache: Cache, index: int, group: zarr.Group, manifest: RoundManifest):
        self.cache, self.index, self.manifest = cache, index, manifest
        self._group = group
        self._opened: dict[str, BlockGroup] = {}
        self.prompts = PromptTable(group, manifest)
        self.rollouts = BlockGroup(self._child("rollouts"), "rollouts", manifest, manifest, None, None)

    @property
    def n_blocks(self) -> int:
        return self.manifest.n_blocks

    @property
    def n_prompts(self) -> int:
        return self.manifest.n_prompts

    def block_prompts(self, block: int) -> range:
        """Indices of the prompts that block `block` holds; known before anything is sampled."""
        return self.manifest.block_prompts(block)

    def holds_anything(self) -> bool:
        """Whether any block of rollouts or scores is there, readable now or not."""
        groups = [self.rollouts, *(self.scores(name) for name in self.scorer_names())]
        return any(bool(group.commits()["rows"].any()) for group in groups)

    def scorer_names(self) -> list[str]:
        """Names of the score groups, the student's first."""
        return [name for name in self.scorer_entries() if self._scores_group(name) is not None]

    def scorer_entries(self) -> list[str]:
        """Names below `scores`, the student's first, whether or not what is there are scores."""
        self._child("scores")
        with storage_errors(f"cache {self.cache.url}"):
            names = entries(self._group.store, f"{self._group.path}/scores")
        return sorted(names, key=lambda name: (name != STUDENT, name))

    def is_described(self, name: str) -> bool:
        """Whether there are scores of this name, and not the remains of an interrupted creation."""
        return self._scores_group(name) is not None

    def lost_scorers(self) -> list[str]:
        """Names of scores that hold blocks but whose own metadata are gone: damage, not a beginning."""
        found = []
        for name in self.scorer_entries():
            with suppress(CacheError):  # damaged, but there
                if self._scores_group(name) is None and self._holds_scores(name):
                    found.append(name)
        return found

    def _holds_scores(self, name: str) -> bool:
        with storage_errors(f"cache {self.cache.url}"):
            return holds_blocks(self._group.store, f"{self._group.path}/scores/{name}")

    def _scores_group(self, name: str) -> zarr.Group | None:
        """The group of a scorer, None where its attributes were never written."""
        label = f"cache {self.cache.url}"
        with storage_errors(label):
            group = open_group(self._group.store, f"{self._group.path}/scores/{name}")
        return group if group is not None and "redpen" in group.attrs else None

    def teacher_names(self) -> list[str]:
        return [name for name in self.scorer_names() if name != STUDENT]

    def scores(self, name: str) -> BlockGroup:
        """Scores by `name`. Raises `CacheError` where there are none."""
        self._child("scores")
        found = self._scores(name)
        if found is None:
            raise CacheError(
                f"cache {self.cache.url} round {self.index}: not scored by {name!r} (scored by "
                f"{_listed(self.scorer_names())}); run `redpen score RECIPE --cache {self.cache.url}`"
            )
        return found

    def _scores(self, name: str) -> BlockGroup | None:
        group = self._scores_group(name)
        if group is None:
            return None
        where = f"{self.cache.url} {self._group.path}/scores/{name}"
        manifest = ScoresManifest.from_json(group.attrs["redpen"], where)
        if (name == STUDENT) != (manifest.role == "student"):
            raise CacheError(
                f"{where}: attribute redpen.role: expected {'student' if name == STUDENT else 'teacher'}, "
                f"found {manifest.role}"
            )
        student = self.scores(STUDENT) if manifest.role == "teacher" and manifest.candidates else None
        for field in ("candidates", "candidate_kind") if student is not None else ():
            expected, found = getattr(student.manifest, field), getattr(manifest, field)  # type: ignore[union-attr]
            if expected != found:
                raise CacheError(
                    f"{where}: attribute redpen.{field}: expected {expected} as in the student's, found {found}"
                )
        known = self._opened.get(name)
        if known is None or known.manifest != manifest or known._student is not student:  # made anew
            known = BlockGroup(group, f"scores/{name}", manifest, self.manifest, self.rollouts, student)
            self._opened[name] = known
        return known

    def start_scores(self, name: str, manifest: ScoresManifest) -> BlockGroup:
        """Create the scores of `name`, or return them where their provenance agrees.

        Raises `ProvenanceError` listing the differing fields.
        """
        if (name == STUDENT) != (manifest.role == "student"):
            raise CacheError(f"scores {name!r}: the name {STUDENT!r} is for the student and for it alone")
        existing = self._scores(name)
        if existing is not None:
            assert isinstance(existing.manifest, ScoresManifest)
            if existing.manifest.differences(manifest) and not existing.commits()["rows"].any():
                return self._create_scores(name, manifest)  # nothing was scored yet, so nothing is lost
            _require_same(
                existing.manifest, manifest, f"cache {self.cache.url} scores {name!r}", "name the scorer differently"
            )
            return existing
        return self._create_scores(name, manifest)

    def _create_scores(self, name: str, manifest: ScoresManifest) -> BlockGroup:
        path = f"{self._group.path}/scores/{name}"
        if self._scores(name) is None and self._holds_scores(name):
            raise CacheError(
                f"cache {self.cache.url}: scores {name!r} hold blocks, but their metadata is gone; "
                f"restore {path}/zarr.json from a copy, or name the scorer differently"
            )
        if manifest.role == "teacher" and manifest.candidates:
            student = self.scores(STUDENT).manifest
            assert isinstance(student, ScoresManifest)
            for field in ("candidates", "candidate_kind"):
                if getattr(student, field) != getattr(manifest, field):
                    raise ProvenanceError(
                        f"scores {name!r}: {field} is {getattr(manifest, field)}, the student's scores have "
                        f"{getattr(student, field)}; a round's candidates never change, so start another round"
                    )
        with storage_errors(f"cache {self.cache.url}"):
            group = self._child("scores").create_group(name, overwrite=True)
            layout.create(group, layout.block_layouts(manifest, self.manifest))
            group.attrs.put({"redpen": manifest.to_json()})
        return self.scores(name)

    def _child(self, name: str) -> zarr.Group:
        path = f"{self._group.path}/{name}"
        with storage_errors(f"cache {self.cache.url}, {path}"):
            found = open_group(self._group.store, path)
        if found is None:
            raise CacheError(f"cache {self.cache.url}: {damaged(path, 'is missing')}")
        return found


class PromptTable:
    """The round's prompt records, read on demand: `len(table)`, `table[i]`.

    Raises `CacheError` where they are not those that the round's `prompts_sha256` is of.
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
        """Raise `CacheError` where the prompts are not those that were written."""
        self._load()

    @property
    def _path(self) -> str:
        return f"{self._group.path}/prompts"

    def _load(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        if self._loaded is None:
            store, n_prompts = self._group.store, self._manifest.n_prompts
            with storage_errors(f"{self._path}: cannot be read"):
                if open_group(store, self._path) is None:
                    raise damaged(self._path, "is missing")
                offsets = self._read("offsets", layout.prompt_layouts(1, n_prompts)["offsets"]).astype(np.int64)
                # The sizes are known from one another before anything is allocated.
                if offsets[0] != 0 or (np.diff(offsets) <= 0).any() or offsets[-1] > MOST_PROMPT_BYTES:
                    raise self._damage("offsets", "expected ascending numbers from 0, found others")
                data = self._read("bytes", layout.prompt_layouts(int(offsets[-1]), n_prompts)["bytes"])
            lines = np.insert(data, offsets[1:], ord("\n"))
            if hashlib.sha256(lines.data).hexdigest() != self._manifest.prompts_sha256:
                raise self._damage("bytes", "differs from prompts_sha256 in the round's attributes")
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


def _write_prompts(group: zarr.Group, lines: list[bytes]) -> None:
    data = np.frombuffer(b"".join(lines), np.uint8)
    offsets = np.concatenate([[0], np.cumsum([len(line) for line in lines])]).astype(np.int64)
    layouts = layout.prompt_layouts(len(data), len(lines))
    layout.create(group, layouts)
    for name, value in (("bytes", data), ("offsets", offsets)):
        layout.open_array(group.store, f"{group.path}/{name}", layouts[name])[:] = value


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit() and name == f"{int(name[:9]):05d}"


def _require_same(existing: _M, wanted: _M, label: str, remedy: str) -> None:
    differences = existing.differences(wanted)
    if differences:
        raise ProvenanceError(
            f"{label} was made differently: {'; '.join(differences)}; "
            f"set the recipe back, use another --cache, or {remedy}"
        )


def _round_path(index: int) -> str:
    return f"rounds/{index:05d}"


def _listed(items: Sequence[object]) -> str:
    return ", ".join(str(item) for item in items) or "none"
