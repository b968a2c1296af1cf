"""A group of block arrays and their commits: rollouts, or one model's scores of them.

A block is written as whole padded slots, one shard per array, and its commit last. The commit has a digest of every
array, by which a reader notices missing shards and shards of two writers; crc32c catches flipped bits.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import zarr

from .arrays import ArraySpec
from .blocks import InvalidBlockError, RolloutBlock, ScoreBlock, used_shape
from .digests import VERSION, array_digest, digest, digest_bytes
from .errors import CacheError, CorruptBlockError, StorageError, UncommittedError, storage_errors
from .layout import block_layouts, commit_type, decoding_errors, open_array, write_only
from .manifest import RoundManifest, ScoresManifest
from .shards import read_block
from .stores import cancel_requests

_T = TypeVar("_T")
_R = TypeVar("_R")
_M = TypeVar("_M", bound=RoundManifest | ScoresManifest, covariant=True)

#: Response tokens of a block from which its arrays are read and written in threads.
_WORTH_THREADS = 8192

_COUNTS = ("rows", "prompts", "tokens", "prompt_tokens")


class BlockGroup(Generic[_M]):
    """The arrays of one group (`rollouts` or `scores/<name>`) of a round, read and written block by block.

    Attributes:
        name: path below the round, e.g. `scores/student`.
        manifest: `RoundManifest` for rollouts, `ScoresManifest` for scores.
        specs: the group's arrays.
        version: the cache's format version, which decides its digests.
        is_near: whether it is in memory or on a local disk, and not on a server.
    """

    def __init__(
        self,
        group: zarr.Group,
        name: str,
        manifest: _M,
        round_manifest: RoundManifest,
        rollouts: BlockGroup[RoundManifest] | None,
        student: BlockGroup[ScoresManifest] | None,
        version: int = VERSION,
    ):
        self._group = group
        self.name = name
        self.manifest = manifest
        self.specs: tuple[ArraySpec, ...] = manifest.arrays()
        self._round = round_manifest
        self._rollouts = rollouts
        self._student = student
        self.version = version
        self._layouts = block_layouts(manifest, round_manifest, version)
        self._dtype = commit_type(self.specs, version)
        self._arrays: dict[str, zarr.Array[Any]] = {}
        self.is_near = hasattr(group.store, "get_sync")

    @property
    def n_blocks(self) -> int:
        return self._round.n_blocks

    @property
    def block_bytes(self) -> int:
        """Bytes of a block's arrays, at most."""
        return sum(layout.object_bytes() for layout in self._layouts.values())

    def commits(self) -> npt.NDArray[Any]:
        """Every block's commit record, [n_blocks], as a structured array; rows == 0: not committed.

        Digests are opaque bytes; `digests` has those of whole blocks as numbers. Raises `CorruptBlockError` if a
        record fails its checksum.
        """
        try:
            raw = self._load_commits()
        except CacheError:
            raise
        except ValueError:  # a record fails its checksum; read one by one to find which
            raw = np.stack([self._raw_commit(block) for block in range(self.n_blocks)])
        return self._checked(raw.view(self._dtype)[:, 0])

    def commit(self, block: int) -> Any:
        """One block's commit record."""
        return self._checked(self._raw_commit(block).view(self._dtype), block)[0]

    def digests(self) -> list[int]:
        """The digest of every block that `committed` has; 0 for the others."""
        commits, ready = self.commits()["digest"], self.committed()
        return [_number(commit) if done else 0 for commit, done in zip(commits, ready, strict=True)]

    def _checked(self, commits: npt.NDArray[Any], first: int = 0) -> npt.NDArray[Any]:
        """Raise `CorruptBlockError` if a commit, the first of block `first`, has more than its slots hold."""
        slots = self._round.slots()
        for dim in ("row", "prompt", "token", "prompt_token"):
            for block in np.flatnonzero(commits[f"{dim}s"] > slots[dim])[:1]:
                problem = f"{dim}s: expected at most {slots[dim]}, found {commits[f'{dim}s'][block]}"
                raise CorruptBlockError(self._label, first + int(block), "commit", problem)
        return commits

    def check_metadata(self) -> Iterator[tuple[str, str]]:
        """Pairs of an array with missing or damaged metadata, and the problem."""
        for name in self._layouts:
            try:
                self._array(name)
            except StorageError:
                raise
            except CacheError as error:
                yield name, str(error)

    def read_own(self, block: int) -> Any:
        """`read`, even if what was scored has changed since; None if the block was not written."""
        commit = self.commit(block)
        if commit["rows"] == 0:
            return None
        values = self._read_committed(block, commit, {spec.name for spec in self.specs}, check=True)
        return RolloutBlock(**values) if isinstance(self.manifest, RoundManifest) else ScoreBlock(**values)

    def committed(self) -> npt.NDArray[np.bool_]:
        """[n_blocks]: which blocks can be read.

        Scores are committed only while the rollouts, and for a teacher the candidates, are those that were scored.
        """
        return self._committed(None if self._rollouts is None else self._rollouts.commits())[1]

    def _committed(self, rollouts: npt.NDArray[Any] | None) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
        commits = self.commits()
        ready: npt.NDArray[np.bool_] = commits["rows"] > 0
        if rollouts is not None:
            ready &= commits["rollouts_digest"] == rollouts["digest"]
        if self._student is not None:
            candidates, there = self._student._committed(rollouts)
            ready &= there & (commits["candidates_digest"] == candidates["digest.candidate_ids"])
        return commits, ready

    def is_committed(self, block: int) -> bool:
        """`committed()[block]`, from that block's records alone."""
        return self._why_uncommitted(*self._commits_of(block)) is None

    def _commits_of(self, block: int) -> list[Any]:
        """Commits of the block here, in the rollouts and in the student's scores (None: not depended on)."""
        groups = (self, self._rollouts, self._student)
        return self._together(lambda group: None if group is None else group.commit(block), groups, 0)

    def _why_uncommitted(self, commit: Any, rollouts: Any, candidates: Any) -> str | None:
        if commit["rows"] == 0:
            return "not written yet"
        if rollouts is not None and commit["rollouts_digest"] != rollouts["digest"]:
            return "the rollouts have changed since it was scored"
        if self._student is not None:
            if self._student._why_uncommitted(candidates, rollouts, None) is not None:
                return "the student's scores, which choose its candidates, are missing"
            if commit["candidates_digest"] != candidates["digest.candidate_ids"]:
                return "the candidates have changed since it was scored"
        return None

    def uncommit(self, block: int) -> None:
        """Mark a block as not committed; the next run of its stage writes it again."""
        self._store("commit", block, np.zeros(self._dtype.itemsize // 8, np.uint64))

    def read(self, block: int, *, check: bool = True) -> Any:
        """The block's record: `RolloutBlock` for rollouts, `ScoreBlock` for scores.

        `check=False` skips the digests (the crc32c of every chunk is always checked).
        Raises `UncommittedError`, `CorruptBlockError`.
        """
        values = self.read_arrays(block, [spec.name for spec in self.specs], check=check)
        if not isinstance(self.manifest, RoundManifest):
            return ScoreBlock(**values)
        record = RolloutBlock(**values)
        if check:  # readers use these values as indices
            try:
                record.validate(self.manifest, block)
            except InvalidBlockError as error:
                raise CorruptBlockError(self._label, block, error.array, error.problem) from None
        return record

    def read_arrays(self, block: int, names: Iterable[str], *, check: bool = True) -> dict[str, npt.NDArray[Any]]:
        """The used part of some of the block's arrays. Raises what `read` raises."""
        self._require_block(block)
        commits = self._commits_of(block)
        why = self._why_uncommitted(*commits)
        if why is not None:
            raise UncommittedError(f"{self._label} block {block}: {why}; run the stage that writes it")
        return self._read_committed(block, commits[0], set(names), check=check)

    def _read_committed(
        self, block: int, commit: Any, names: set[str], *, check: bool
    ) -> dict[str, npt.NDArray[Any]]:
        if check and _number(commit["digest"]) != self._block_digest(commit):
            raise CorruptBlockError(
                self._label, block, "commit", "the digest of the commit record does not match its fields"
            )
        specs = [spec for spec in self.specs if spec.name in names]
        n_tokens = int(commit["tokens"])
        values = self._together(lambda spec: self._read_array(block, commit, spec, check=check), specs, n_tokens)
        return {spec.name: value for spec, value in zip(specs, values, strict=True)}

    def _read_array(self, block: int, commit: Any, spec: ArraySpec, *, check: bool) -> npt.NDArray[Any]:
        shape = used_shape(spec, {name: int(commit[name]) for name in _COUNTS}, self._sizes)
        try:
            value = self._load_block(spec.name, block, shape[0])
        except CacheError:
            raise
        except ValueError as error:
            raise CorruptBlockError(self._label, block, spec.name, _one_line(error)) from error
        if value.shape != shape:
            raise CorruptBlockError(self._label, block, spec.name, f"has shape {value.shape}, expected {shape}")
        if check and self._digest(value) != _number(commit[f"digest.{spec.name}"]):
            missing = value.size and _is_fill(value, spec)
            problem = "its shard is missing" if missing else "does not match the digest of the commit (two writers?)"
            raise CorruptBlockError(self._label, block, spec.name, problem)
        return value

    def write(
        self,
        block: int,
        record: RolloutBlock | ScoreBlock,
        *,
        rollouts: RolloutBlock | None = None,
        candidate_ids: npt.NDArray[np.int32] | None = None,
        elapsed_seconds: float = 0.0,
    ) -> None:
        """Validate, write and commit a block. A committed block is uncommitted first.

        Args:
            rollouts, candidate_ids: what was scored; by default what the cache holds now. If it has changed in the
                cache since, the scores do not count as committed.

        Raises `CacheError` if the record is invalid, `StorageError` if a write fails.
        """
        self._require_block(block)
        links = {"rollouts_digest": 0, "candidates_digest": 0}
        try:
            if isinstance(record, RolloutBlock):
                assert isinstance(self.manifest, RoundManifest)
                record.validate(self.manifest, block)
                counts = record.counts()
            else:
                assert isinstance(self.manifest, ScoresManifest) and self._rollouts is not None
                rollouts = self._rollouts.read(block) if rollouts is None else rollouts
                record.validate(self.manifest, rollouts)
                counts = rollouts.counts()
                links["rollouts_digest"] = self._rollouts.record_digest(rollouts)
                if record.candidate_ids is not None:
                    links["candidates_digest"] = self._digest(record.candidate_ids)
                elif self._student is not None:
                    if candidate_ids is None:
                        candidate_ids = self._student.read_arrays(block, ["candidate_ids"])["candidate_ids"]
                    links["candidates_digest"] = self._digest(candidate_ids)
        except InvalidBlockError as error:
            raise CacheError(f"{self._label} block {block} cannot be written: {error}") from error

        values = {spec.name: getattr(record, spec.name) for spec in self.specs}
        self._commit_arrays(block, values, counts | links, elapsed_seconds)

    def _commit_arrays(
        self, block: int, values: dict[str, npt.NDArray[Any]], fields: dict[str, int], elapsed_seconds: float
    ) -> None:
        if self.commit(block)["rows"]:
            self.uncommit(block)
        commit = np.zeros((), self._dtype)
        n_tokens = fields["tokens"]
        digests = self._together(lambda spec: self._write_array(block, spec, values[spec.name]), self.specs, n_tokens)
        fields |= {f"digest.{spec.name}": number for spec, number in zip(self.specs, digests, strict=True)}
        for name, number in (fields | {"digest": self._block_digest(fields)}).items():
            is_digest = self._dtype[name].kind == "V"
            commit[name] = np.void(number.to_bytes(self._dtype[name].itemsize, "little")) if is_digest else number
        commit["elapsed_us"] = max(0, round(elapsed_seconds * 1e6))
        commit["committed_at_us"] = max(0, time.time_ns() // 1000)  # the clock may be before 1970
        self._store("commit", block, commit.reshape(1).view(np.uint64))

    def _write_array(self, block: int, spec: ArraySpec, value: npt.NDArray[Any]) -> int:
        """Write the whole slot; returns the digest of `value`."""
        slot = np.full(self._layouts[spec.name].shape[1:], spec.fill, np.dtype(spec.dtype))
        slot[: value.shape[0]] = value
        self._store(spec.name, block, slot)
        return self._digest(value)

    def record_digest(
        self, record: RolloutBlock | ScoreBlock, rollouts: RolloutBlock | None = None, version: int | None = None
    ) -> int:
        """The `digest` that a commit of this record has; of scores with the `rollouts` that were scored.

        Args:
            version: format version of the cache that it is or was in; default: this one's.
        """
        counted, version = record if isinstance(record, RolloutBlock) else rollouts, version or self.version
        assert counted is not None
        arrays = {f"digest.{spec.name}": array_digest(getattr(record, spec.name), version) for spec in self.specs}
        return self._block_digest(counted.counts() | arrays, version)

    def _together(self, do: Callable[[_T], _R], items: Iterable[_T], n_tokens: int) -> list[_R]:
        """`map` over arrays of a block with so many tokens, in threads: codecs release the GIL, and servers are far
        away. Few tokens near by are faster without.

        All calls end before an error is raised, so that nothing is written after the lock is released.
        """
        if self.is_near and n_tokens < _WORTH_THREADS:
            return [do(item) for item in items]
        begun = [_threads().submit(do, item) for item in items]
        try:
            wait(begun)
        except BaseException:  # Ctrl-C
            self.cancel_requests()
            raise
        return [item.result() for item in begun]

    def cancel_requests(self) -> None:
        """Cancel requests to a server that wait for a response."""
        cancel_requests(self._group.store)

    @property
    def _label(self) -> str:
        return str(self._group.path)

    @property
    def _sizes(self) -> dict[str, int]:
        if isinstance(self.manifest, RoundManifest):
            return {}
        return {"candidate": self.manifest.candidates, "topk": self.manifest.topk}

    def _digest(self, value: npt.NDArray[Any]) -> int:
        return array_digest(value, self.version)

    def _block_digest(self, commit: Any, version: int | None = None) -> int:
        version = version or self.version
        counts = [int(commit[name]).to_bytes(8, "little") for name in _COUNTS]
        digests = [_number(commit[f"digest.{spec.name}"]) for spec in self.specs]
        return digest(b"".join([*counts, *(d.to_bytes(digest_bytes(version), "little") for d in digests)]), version)

    def _require_block(self, block: int) -> None:
        if not 0 <= block < self.n_blocks:
            raise CacheError(f"{self._label}: block must be in 0..{self.n_blocks - 1}, got {block}")

    def _raw_commit(self, block: int) -> npt.NDArray[np.uint64]:
        self._require_block(block)
        try:
            raw: npt.NDArray[np.uint64] = self._load_block("commit", block, self._dtype.itemsize // 8)
        except CacheError:
            raise
        except ValueError as error:
            raise CorruptBlockError(self._label, block, "commit", _one_line(error)) from error
        return raw

    def _array(self, name: str) -> zarr.Array[Any]:
        if name not in self._arrays:
            with storage_errors(f"{self._label}: cannot read {name}"):
                self._arrays[name] = open_array(
                    self._group.store, f"{self._group.path}/{name}".lstrip("/"), self._layouts[name]
                )
        return self._arrays[name]

    def _load_commits(self) -> npt.NDArray[Any]:
        """Every commit record as stored. Raises `CacheError` if metadata are damaged, `ValueError` if values are."""
        if self.is_near:
            n_columns = self._dtype.itemsize // 8
            return np.stack([self._load_block("commit", block, n_columns) for block in range(self.n_blocks)])
        array = self._array("commit")
        with storage_errors(f"{self._label}: cannot read commit"), decoding_errors():
            return np.ascontiguousarray(array[:])  # with many requests at a time

    def _load_block(self, name: str, block: int, used: int) -> npt.NDArray[Any]:
        """The used part of a block's values. Raises as `_load_commits`."""
        self._array(name)  # its metadata are as the layout says
        with storage_errors(f"{self._label}: cannot read {name}"), decoding_errors():
            path = f"{self._group.path}/{name}".lstrip("/")
            return read_block(self._group.store, path, self._layouts[name], block, used)

    def _store(self, name: str, block: int, value: npt.NDArray[Any]) -> None:
        with storage_errors(f"{self._label}: cannot write block {block}, array {name}"):
            write_only(self._array(name))[block] = value


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(8, thread_name_prefix="cache-arrays")


def _number(value: Any) -> int:
    """A digest of a commit record as a number."""
    return value if isinstance(value, int) else int.from_bytes(value.tobytes(), "little")


def _is_fill(value: npt.NDArray[Any], spec: ArraySpec) -> bool:
    return bool(np.isnan(value).all() if spec.fill != spec.fill else (value == spec.fill).all())


def _one_line(error: Exception) -> str:
    return f"cannot be decoded ({' '.join(str(error).split())[:160] or type(error).__name__})"
