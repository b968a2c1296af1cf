"""Opening and creating caches, rounds and score groups; prompts; the writer's lock."""

from __future__ import annotations

import hashlib
import itertools
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
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec
from zarr.storage import LocalStore

from . import locks
from .arrays import INNER_CHUNK
from .errors import (
    CacheError,
    FormatVersionError,
    NotACacheError,
    ProvenanceError,
    StorageError,
    metadata_errors,
    storage_errors,
)
from .group import BlockGroup, create_arrays
from .manifest import RoundManifest, ScoresManifest
from .s3 import S3Store
from .stores import entries, has_commits, is_empty, open_store

FORMAT = "redpen"
VERSION = 1
STUDENT = "student"

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
        root = _open_group(store, "", f"cache {label}", writable=writable)
    header = root.attrs.get("redpen") if root is not None else None
    if root is None or not isinstance(header, dict) or header.get("format") != FORMAT:
        raise NotACacheError(f"cache {label}: this is not a redpen cache (no Zarr group with a redpen attribute)")
    if not isinstance(header.get("version"), int) or header["version"] > VERSION:
        raise FormatVersionError(
            f"cache {label}: format version {header.get('version')}, this redpen reads up to {VERSION}; upgrade it"
        )
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
        with storage_errors(f"cache {self.url}"):
            if _open_group(self._store, "rounds", f"cache {self.url}", writable=False) is None:
                return []
            return sorted(int(n) for n in _described(self._store, "rounds", f"cache {self.url}") if n.isdigit())

    def lost_rounds(self) -> list[int]:
        """Numbers of rounds that hold committed blocks but whose own metadata is gone: damage, not a beginning."""
        known = self.round_indices()
        with storage_errors(f"cache {self.url}"):
            return [
                int(name)
                for name in sorted(entries(self._store, "rounds"))
                if name.isdigit() and int(name) not in known and has_commits(self._store, f"rounds/{name}/rollouts")
            ]

    def round(self, index: int | None = None) -> Round:
        """Round `index`, or the latest. Raises `CacheError` where there is none."""
        indices = self.round_indices()
        if not indices:
            raise CacheError(
                f"cache {self.url}: holds no rollouts yet; run `redpen rollouts RECIPE --cache {self.url}`"
            )
        index = indices[-1] if index is None else index
        if index not in indices:
            raise CacheError(f"cache {self.url}: there is no round {index}; it has {_listed(indices)}")
        group = _open_group(self._store, _round_path(index), f"cache {self.url}", writable=self._writable)
        assert group is not None
        manifest = RoundManifest.from_json(_attributes(group), f"{self.url} {_round_path(index)}")
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
            create_arrays(group.create_group("rollouts"), manifest, manifest)
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
        self.prompts = PromptTable(group)
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
        self._child("scores")
        path, label = f"{self._group.path}/scores", f"cache {self.cache.url}"
        with storage_errors(label):
            names = _described(self._group.store, path, label)
        return sorted(names, key=lambda name: (name != STUDENT, name))

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
        label = f"cache {self.cache.url}"
        with storage_errors(label):
            path = f"{self._group.path}/scores/{name}"
            group = _open_group(self._group.store, path, label, writable=not self._group.store.read_only)
        if group is None or "redpen" not in group.attrs:
            return None
        manifest = ScoresManifest.from_json(_attributes(group), f"{self.cache.url} {path}")
        student = self.scores(STUDENT) if manifest.role == "teacher" and manifest.candidates else None
        found = BlockGroup(group, f"scores/{name}", manifest, self.manifest, self.rollouts, student)
        known = self._opened.get(name)
        if known is None or known.manifest != manifest or known._student is not student:  # made anew
            self._opened[name] = known = found
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
        if self._scores(name) is None and has_commits(self._group.store, path):
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
            create_arrays(group, manifest, self.manifest)
            group.attrs.put({"redpen": manifest.to_json()})
        return self.scores(name)

    def _child(self, name: str) -> zarr.Group:
        label = f"cache {self.cache.url}, {self._group.path}/{name}"
        with storage_errors(label), metadata_errors(label):
            found = self._group[name]
            assert isinstance(found, zarr.Group)
            return found


class PromptTable:
    """The round's prompt records, read on demand: `len(table)`, `table[i]`."""

    def __init__(self, round_group: zarr.Group):
        self._group = round_group
        self._loaded: tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        return len(self._load()[1]) - 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        data, offsets = self._load()
        if not 0 <= index < len(offsets) - 1:
            raise IndexError(f"prompt {index}: there are {len(offsets) - 1}")
        line = data[offsets[index] : offsets[index + 1]].tobytes().decode("utf-8", "surrogatepass")
        record = json.loads(line)
        assert isinstance(record, dict)
        return record

    def sha256(self) -> str:
        """`prompts_sha256` of what is stored. Raises `CacheError` where it cannot be decoded."""
        data, offsets = self._load()
        digest = hashlib.sha256()
        for start, end in itertools.pairwise(offsets):
            digest.update(data[start:end].tobytes() + b"\n")
        return digest.hexdigest()

    def _load(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        if self._loaded is None:
            label = f"{self._group.path}/prompts"
            try:
                with storage_errors(f"{label}: cannot be read"):
                    self._loaded = (
                        np.asarray(self._group["prompts/bytes"][:]),  # type: ignore[index]
                        np.asarray(self._group["prompts/offsets"][:]),  # type: ignore[index]
                    )
            except StorageError:
                raise
            except (ValueError, KeyError) as error:
                raise CacheError(f"{label}: cannot be decoded ({error}); restore the cache from a copy") from error
        return self._loaded


def _write_prompts(group: zarr.Group, lines: list[bytes]) -> None:
    data = np.frombuffer(b"".join(lines), np.uint8)
    offsets = np.concatenate([[0], np.cumsum([len(line) for line in lines])]).astype(np.int64)
    for name, value, dimension, meaning in (
        ("bytes", data, "byte", "prompt records as canonical UTF-8 JSON, end to end"),
        ("offsets", offsets, "prompt_boundary", "record i is bytes[offsets[i]:offsets[i + 1]]"),
    ):
        array = group.create_array(
            name,
            shape=value.shape,
            chunks=(min(len(value), INNER_CHUNK * 16),),
            dtype=value.dtype.newbyteorder("<"),
            fill_value=0,
            serializer=BytesCodec(endian="little"),
            compressors=(ZstdCodec(level=1), Crc32cCodec()),
            dimension_names=(dimension,),
            attributes={"unit": "byte", "meaning": meaning},
        )
        array[:] = value


def _described(store: Store, path: str, label: str) -> list[str]:
    """Names of the groups directly below `path` that exist, i.e. whose `redpen` attribute was written."""
    groups = {name: _open_group(store, f"{path}/{name}", label, writable=False) for name in entries(store, path)}
    return [name for name, group in groups.items() if group is not None and "redpen" in group.attrs]


def _open_group(store: Store, path: str, label: str, *, writable: bool) -> zarr.Group | None:
    try:
        return zarr.open_group(store, path=path, mode="r+" if writable else "r", zarr_format=3)
    except (FileNotFoundError, zarr.errors.GroupNotFoundError, zarr.errors.ContainsArrayError):
        return None
    except (ValueError, KeyError, TypeError) as error:  # zarr.json that is no JSON, or not Zarr's
        where = f"{path}/zarr.json" if path else "zarr.json"
        raise NotACacheError(
            f"{label}: unreadable metadata in {where} ({error}); restore the cache from a copy, or start another"
        ) from error


def _attributes(group: zarr.Group) -> dict[str, Any]:
    value = dict(group.attrs["redpen"])  # type: ignore[arg-type]
    value.pop("slots", None)  # derived; stored for readers in other languages
    return value


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
