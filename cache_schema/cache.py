"""Caches, rounds and score groups: opening, creating, continuing; the writer's lock."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

import zarr
import zarr.errors
from zarr.abc.store import Store
from zarr.storage import LocalStore

from . import layout, locks
from .digests import VERSION
from .errors import (
    CacheError,
    FormatVersionError,
    NotACacheError,
    ProvenanceError,
    StorageError,
    shown,
    storage_errors,
)
from .group import BlockGroup
from .hub import HubStore
from .manifest import Header, RoundManifest, ScoresManifest, parse
from .nodes import damaged, open_complete_group, open_group
from .prompts import PromptTable, prompts_sha256, write_prompts
from .s3 import S3Store
from .stores import entries, holds_blocks, is_empty, open_store

FORMAT = "redpen"
STUDENT = "student"

_M = TypeVar("_M", RoundManifest, ScoresManifest)


def create(location: str | os.PathLike[str] | Store, *, created_by: str = "") -> Cache:
    """Open a cache for writing, and create it if the location is empty.

    Args:
        location: local path, `s3://BUCKET/NAME`, or any zarr `Store`.
        created_by: software and version, for information.

    Raises:
        NotACacheError: something else is at the location. StorageError: it cannot be written.
    """
    store, label = open_store(location, writable=True)
    with storage_errors(f"cache {label}"):
        if is_empty(store):
            header = {"format": FORMAT, "version": VERSION, "created_by": created_by}
            with suppress(zarr.errors.ContainsGroupError):  # another process created it first
                zarr.create_group(store, attributes={"redpen": header})
    return open(location, writable=True)


def open(location: str | os.PathLike[str] | Store, *, writable: bool = False) -> Cache:
    """Open a cache.

    Args:
        location: as in `create`; to read also `hf://datasets/OWNER/NAME[@REVISION]`.

    Raises:
        NotACacheError: the location is empty or holds something else. FormatVersionError: upgrade this package.
    """
    store, label = open_store(location, writable=writable)
    with storage_errors(f"cache {label}"):
        if is_empty(store):
            raise NotACacheError(
                f"cache {label}: nothing is there; `redpen rollouts RECIPE --cache {label}` creates it"
            )
        try:
            root = open_group(store, "")
            lost = root is None and holds_blocks(store, "rounds")
        except StorageError:
            raise
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
            f"cache {label}: expected format version {VERSION} at most, found {shown(version)}; upgrade redpen"
        )
    version = parse(Header, header, f"cache {label}: zarr.json: attribute redpen").version
    return Cache(store, label, root, writable, version)


class Cache:
    """A redpen cache: numbered rounds of rollouts, each with scores by any number of models.

    Attributes:
        version: its format version. What is added to it has the same one.
    """

    def __init__(self, store: Store, label: str, root: zarr.Group, writable: bool, version: int):
        self._store, self._root, self._writable = store, root, writable
        self.url, self.version = label, version

    def __repr__(self) -> str:
        return f"Cache({self.url!r}, rounds={self.round_indices()})"

    @property
    def path(self) -> Path | None:
        """Its directory, if it is local."""
        return Path(self._store.root) if isinstance(self._store, LocalStore) else None

    @property
    def fetched(self) -> tuple[int, int] | None:
        """Bytes that have been fetched of a published cache, and bytes of all of it; None of any other."""
        store = self._store
        if not isinstance(store, HubStore):
            return None
        return sum(store.sizes[key] for key in store.fetched), sum(store.sizes.values())

    def round_indices(self) -> list[int]:
        """Round numbers in ascending order. A round that was not completely created is left out."""
        return [number for number in self.round_entries() if self._open_group(number) is not None]

    def round_entries(self) -> list[int]:
        """Numbers of everything below `rounds`, ascending, whether or not it is a complete round."""
        return [int(name) for name in self._names("rounds") if _is_number(name)]

    def _names(self, path: str) -> list[str]:
        """Names below the group at `path`, sorted. Raises `CacheError` if only its own metadata are missing."""
        with storage_errors(f"cache {self.url}"):
            names = sorted(entries(self._store, path))
            if open_group(self._store, path) is not None:
                return names
            if any(holds_blocks(self._store, f"{path}/{name}") for name in names):
                raise CacheError(f"cache {self.url}: {damaged(path, 'is missing, though there is data below it')}")
        return []

    def _open_group(self, number: int) -> zarr.Group | None:
        with storage_errors(f"cache {self.url}"):
            return open_complete_group(self._store, _round_path(number), "rollouts", "scores")

    def has_round(self, number: int) -> bool:
        """Whether there is a round with this number; not if its creation was interrupted."""
        return self._open_group(number) is not None

    def round(self, index: int | None = None) -> Round:
        """Round `index`, or the latest. Raises `CacheError` if there is none."""
        numbers = self.round_entries()
        for number in reversed(numbers) if index is None else [index]:
            if number in numbers and (group := self._open_group(number)) is not None:
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
        """Continue the latest round (or round `index`), or create it if it is the next.

        A round without any block is created again if its manifest differs.

        Raises `ProvenanceError` listing the fields in which the manifest of the existing round differs.
        """
        if manifest.prompts_sha256 != prompts_sha256(prompts) or manifest.n_prompts != len(prompts):
            raise CacheError("round manifest: prompts_sha256 and n_prompts must match the prompts")
        indices = self.round_indices()
        following = indices[-1] + 1 if indices else 0
        index = (indices[-1] if indices else 0) if index is None else index
        if index in indices:
            existing = self.round(index)
            if existing.manifest.differences(manifest) and not existing.has_blocks():
                return self._create_round(index, manifest, prompts)
            _require_same(
                existing.manifest,
                manifest,
                f"cache {self.url} round {index}",
                f"start a new round with --round {following}",
            )
            return existing
        if index != following:
            raise CacheError(f"cache {self.url}: expected round {following} next, got {index}")
        return self._create_round(index, manifest, prompts)

    def _create_round(self, index: int, manifest: RoundManifest, prompts: Sequence[dict[str, Any]]) -> Round:
        with storage_errors(f"cache {self.url}"):
            if open_group(self._store, "rounds") is None:
                self._root.create_group("rounds")
            group = self._root.create_group(_round_path(index), overwrite=True)
            write_prompts(group.create_group("prompts"), prompts)
            layout.create(group.create_group("rollouts"), layout.block_layouts(manifest, manifest, self.version))
            group.create_group("scores")
            group.attrs.put({"redpen": manifest.to_json() | {"slots": manifest.slots()}})  # last: now it is a round
        return self.round(index)

    def lock(self, command: str) -> AbstractContextManager[None]:
        """Lock the cache for writing. Raises `CacheLockedError` naming the process that holds the lock.

        A local cache uses a kernel lock, which ends with its process, however that ends; a cache on S3 a lease, which
        ends two minutes after its last renewal. Other stores have no lock, and rely on digests.
        """
        if self.path is not None:
            return locks.local(self.path, self.url, command)
        if isinstance(self._store, S3Store):
            return locks.leased(self._store.server, command)
        return nullcontext()


class Round:
    """One sampling pass: prompts, rollouts, and their scores by the student and any number of teachers."""

    def __init__(self, cache: Cache, index: int, group: zarr.Group, manifest: RoundManifest):
        self.cache, self.index, self.manifest = cache, index, manifest
        self._group = group
        self._opened: dict[str, BlockGroup[ScoresManifest]] = {}
        self.prompts = PromptTable(group, manifest)
        version = cache.version
        self.rollouts = BlockGroup(self._child("rollouts"), "rollouts", manifest, manifest, None, None, version)

    @property
    def n_blocks(self) -> int:
        return self.manifest.n_blocks

    @property
    def n_prompts(self) -> int:
        return self.manifest.n_prompts

    def block_prompts(self, block: int) -> range:
        """Indices of the prompts of block `block`."""
        return self.manifest.block_prompts(block)

    def has_blocks(self) -> bool:
        """Whether any block of rollouts or scores was written, committed now or not."""
        groups: list[BlockGroup[Any]] = [self.rollouts, *(self.scores(name) for name in self.scorer_names())]
        return any(bool(group.commits()["rows"].any()) for group in groups)

    def scorer_names(self) -> list[str]:
        """Names of the score groups, the student's first."""
        return [name for name in self.scorer_entries() if self.has_scores(name)]

    def scorer_entries(self) -> list[str]:
        """Names of everything below `scores`, the student's first, whether or not it is a complete group."""
        self._child("scores")
        with storage_errors(f"cache {self.cache.url}"):
            names = entries(self._group.store, f"{self._group.path}/scores")
        return sorted(names, key=lambda name: (name != STUDENT, name))

    def has_scores(self, name: str) -> bool:
        """Whether there are scores with this name; not if their creation was interrupted."""
        return self._open_group(name) is not None

    def _open_group(self, name: str) -> zarr.Group | None:
        with storage_errors(f"cache {self.cache.url}"):
            return open_complete_group(self._group.store, f"{self._group.path}/scores/{name}")

    def teacher_names(self) -> list[str]:
        return [name for name in self.scorer_names() if name != STUDENT]

    def scores(self, name: str) -> BlockGroup[ScoresManifest]:
        """Scores by `name`. Raises `CacheError` if there are none."""
        self._child("scores")
        found = self._scores(name)
        if found is None:
            raise CacheError(
                f"cache {self.cache.url} round {self.index}: not scored by {name!r} (scored by "
                f"{_listed(self.scorer_names())}); run `redpen score RECIPE --cache {self.cache.url}`"
            )
        return found

    def _scores(self, name: str) -> BlockGroup[ScoresManifest] | None:
        group = self._open_group(name)
        if group is None:
            return None
        where = f"{self.cache.url} {self._group.path}/scores/{name}"
        manifest = ScoresManifest.from_json(group.attrs["redpen"], where)
        if (name == STUDENT) != (manifest.role == "student"):
            raise CacheError(
                f"{where}: attribute redpen.role: expected {'student' if name == STUDENT else 'teacher'}, "
                f"found {manifest.role}"
            )
        for field, expected in self._implied(manifest).items():
            if (found := getattr(manifest, field)) != expected:
                raise CacheError(
                    f"{where}: attribute redpen.{field}: expected {shown(expected)} for a {manifest.role} of this "
                    f"round, found {shown(found)}"
                )
        student = self.scores(STUDENT) if manifest.role == "teacher" and manifest.candidates else None
        for field in ("candidates", "candidate_kind") if student is not None else ():
            expected, found = getattr(student.manifest, field), getattr(manifest, field)  # type: ignore[union-attr]
            if expected != found:
                raise CacheError(
                    f"{where}: attribute redpen.{field}: expected {expected} as in the student's, found {found}"
                )
        known = self._opened.get(name)
        if known is None or known.manifest != manifest or known._student is not student:  # created again
            version = self.cache.version
            known = BlockGroup(group, f"scores/{name}", manifest, self.manifest, self.rollouts, student, version)
            self._opened[name] = known
        return known

    def _implied(self, manifest: ScoresManifest) -> dict[str, Any]:
        """Fields of a scores manifest that can have only one value in this round; greedy decoding counts as 1."""
        if manifest.role == "teacher":
            return {"sampling_temperature": None}
        temperature = self.manifest.temperature or 1.0
        return {"sampling_temperature": temperature, "vocab_size": self.manifest.vocab_size, "topk": 0}

    def start_scores(self, name: str, manifest: ScoresManifest) -> BlockGroup[ScoresManifest]:
        """Continue the scores of `name`, or create them. Without any block, they are created again if they differ.

        Raises `ProvenanceError` listing the differing fields.
        """
        if (name == STUDENT) != (manifest.role == "student"):
            raise CacheError(f"scores {name!r}: the student, and no other model, has the name {STUDENT!r}")
        existing = self._scores(name)
        if existing is not None:
            if existing.manifest.differences(manifest) and not existing.commits()["rows"].any():
                return self._create_scores(name, manifest)
            _require_same(
                existing.manifest, manifest, f"cache {self.cache.url} scores {name!r}", "name the scorer differently"
            )
            return existing
        return self._create_scores(name, manifest)

    def _create_scores(self, name: str, manifest: ScoresManifest) -> BlockGroup[ScoresManifest]:
        if manifest.role == "teacher" and manifest.candidates:
            student = self.scores(STUDENT).manifest
            for field in ("candidates", "candidate_kind"):
                if getattr(student, field) != getattr(manifest, field):
                    raise ProvenanceError(
                        f"scores {name!r}: expected {field} {getattr(student, field)}, as the student has, got "
                        f"{getattr(manifest, field)}; the candidates of a round never change, so start another round"
                    )
        with storage_errors(f"cache {self.cache.url}"):
            group = self._child("scores").create_group(name, overwrite=True)
            layout.create(group, layout.block_layouts(manifest, self.manifest, self.cache.version))
            group.attrs.put({"redpen": manifest.to_json()})
        return self.scores(name)

    def _child(self, name: str) -> zarr.Group:
        path = f"{self._group.path}/{name}"
        with storage_errors(f"cache {self.cache.url}, {path}"):
            found = open_group(self._group.store, path)
        if found is None:
            raise CacheError(f"cache {self.cache.url}: {damaged(path, 'is missing')}")
        return found


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit() and name == f"{int(name[:9]):05d}"


def _require_same(existing: _M, wanted: _M, label: str, remedy: str) -> None:
    differences = existing.differences(wanted)
    if differences:
        raise ProvenanceError(
            f"{label} was made with other settings: {'; '.join(differences)}; "
            f"set the recipe back, use another --cache, or {remedy}"
        )


def _round_path(index: int) -> str:
    return f"rounds/{index:05d}"


def _listed(items: Sequence[object]) -> str:
    return ", ".join(str(item) for item in items) or "none"
