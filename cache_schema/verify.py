"""Recompute every digest of a cache and check that its values mean something; take back what is bad."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .blocks import InvalidBlockError, RolloutBlock
from .cache import Cache, Round
from .errors import CacheError, CorruptBlockError, StorageError
from .group import BlockGroup
from .manifest import ScoresManifest


@dataclass(frozen=True)
class Finding:
    """One thing wrong with a cache.

    Attributes:
        round: None where it is about what lies above the rounds.
        group: "rollouts", "scores/<name>", "prompts", "scores", "round" or "rounds".
        block: the bad block, or None where the whole group is concerned; only blocks can be repaired.
    """

    round: int | None
    group: str
    block: int | None
    array: str
    problem: str

    def __str__(self) -> str:
        where = self.group if self.round is None else f"round {self.round} {self.group}"
        where += "" if self.block is None else f" block {self.block}"
        return f"{where}, array {self.array}: {self.problem}"


def verify(cache: Cache, *, progress: Callable[[int], None] = lambda blocks: None) -> Iterator[Finding]:
    """Yield everything that is wrong with the committed blocks of every round.

    Args:
        progress: called with the number of blocks done since the last call.

    Blocks that are not committed are not findings: the stage that writes them has not finished.
    """
    try:
        numbers, lost = cache.round_numbers(), cache.lost_rounds()
    except StorageError:
        raise
    except CacheError as error:
        yield Finding(None, "rounds", None, "attributes", str(error))
        return
    for index in numbers:
        if index in lost:
            yield Finding(index, "round", None, "attributes", "holds blocks, but its metadata (zarr.json) is gone")
            continue
        try:
            round_ = cache.round(index) if cache.is_described(index) else None
        except StorageError:
            raise
        except CacheError as error:
            yield Finding(index, "round", None, "attributes", str(error))
        else:
            if round_ is not None:
                yield from _verify_round(round_, progress)
    gaps = sorted(set(range(min(len(numbers), max(numbers, default=0)))) - set(numbers))
    for index in gaps:
        yield Finding(index, "round", None, "attributes", "is missing, though there are later rounds")


def block_groups(cache: Cache) -> list[BlockGroup]:
    """Every group of blocks whose metadata can be read, over all rounds."""
    groups: list[BlockGroup] = []
    with contextlib.suppress(CacheError):  # what cannot be read is a finding of `verify`
        for index in cache.round_numbers():
            with contextlib.suppress(CacheError):
                if cache.is_described(index):
                    round_ = cache.round(index)
                    groups.append(round_.rollouts)
                    for name in round_.scorer_entries():
                        with contextlib.suppress(CacheError):
                            groups.append(round_.scores(name))
    return groups


def repair(cache: Cache, findings: Sequence[Finding]) -> int:
    """Uncommit the blocks that `findings` name, and only those; returns how many there were.

    Scores of a repaired rollouts block need no repair: they read as uncommitted once the block is sampled again
    differently, and stay good where it is sampled again the same.
    """
    blocks = {(f.round, f.group, f.block) for f in findings if f.round is not None and f.block is not None}
    for index, name, block in sorted(blocks):
        round_ = cache.round(index)
        group = round_.rollouts if name == "rollouts" else round_.scores(name.removeprefix("scores/"))
        group.uncommit(block)
    return len(blocks)


def _verify_round(round_: Round, progress: Callable[[int], None]) -> Iterator[Finding]:
    try:
        round_.prompts.check()
    except StorageError:
        raise
    except CacheError as error:
        yield Finding(round_.index, "prompts", None, "bytes", str(error))
    groups: list[BlockGroup] = [round_.rollouts]
    try:
        names, lost = round_.scorer_entries(), round_.lost_scorers()
    except StorageError:
        raise
    except CacheError as error:
        yield Finding(round_.index, "scores", None, "attributes", str(error))
        names, lost = [], []
    for name in names:
        if name in lost:
            problem = "holds blocks, but its metadata (zarr.json) is gone"
            yield Finding(round_.index, f"scores/{name}", None, "attributes", problem)
            continue
        try:
            if round_.is_described(name):
                groups.append(round_.scores(name))
        except StorageError:
            raise
        except CacheError as error:
            yield Finding(round_.index, f"scores/{name}", None, "attributes", str(error))
    readable = []
    for group in groups:
        problems = list(group.check_metadata())
        for array, problem in problems:
            yield Finding(round_.index, group.name, None, array, problem)
        readable += [group] * (not problems)
    for block in range(round_.n_blocks):
        rollouts: RolloutBlock | None = None
        for group in readable:
            try:
                if group is round_.rollouts:
                    rollouts = group.read_own(block)
                    if rollouts is not None:
                        rollouts.validate(round_.manifest, block)
                elif not _is_stale(group, block):
                    # Bad rollouts make it impossible to check what scores mean, not whether they are whole.
                    _check_scores(group, block, rollouts)
            except CorruptBlockError as error:
                yield Finding(round_.index, group.name, block, error.array, error.problem)
            except InvalidBlockError as error:
                rollouts = None if group is round_.rollouts else rollouts
                yield Finding(round_.index, group.name, block, error.array, error.problem)
            progress(1)
    progress(round_.n_blocks * (len(groups) - len(readable)))


def _is_stale(group: BlockGroup, block: int) -> bool:
    """Whether the block scores what the cache no longer holds. Not where that cannot be known."""
    try:
        return not group.is_committed(block)
    except StorageError:
        raise
    except CacheError:
        return False


def _check_scores(group: BlockGroup, block: int, rollouts: RolloutBlock | None) -> None:
    scores = group.read_own(block)
    if scores is not None and rollouts is not None:
        assert isinstance(group.manifest, ScoresManifest)
        scores.validate(group.manifest, rollouts)
