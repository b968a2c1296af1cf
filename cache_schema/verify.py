"""Check every digest and value of a cache, and uncommit damaged blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .ahead import read_ahead
from .blocks import InvalidBlockError, RolloutBlock
from .cache import Cache, Round
from .errors import CacheError, CorruptBlockError, StorageError
from .group import BlockGroup
from .manifest import ScoresManifest


@dataclass(frozen=True)
class Finding:
    """One problem of a cache.

    Attributes:
        round: number of the round, or None for group "rounds".
        group: "rollouts", "scores/<name>", "prompts", "scores", "round" or "rounds".
        block: the damaged block, or None if the whole group is; only blocks can be repaired.
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
    """Yield every problem of the metadata, prompts and committed blocks of a cache.

    Args:
        progress: called with the number of blocks checked since the last call.

    A block that is not committed is not a problem: the stage that writes it has not finished.
    """
    found: list[Finding] = []
    with _reported(found, None, "rounds"):
        numbers = cache.round_entries()
    yield from found
    if found:
        return
    for index in numbers:
        round_, found = None, []
        with _reported(found, index, "round"):
            round_ = cache.round(index) if cache.has_round(index) else None
        yield from found
        if round_ is not None:
            yield from _verify_round(round_, progress)
    for index in sorted(set(range(min(len(numbers), max(numbers, default=0)))) - set(numbers)):
        yield Finding(index, "round", None, "attributes", "is missing, though there are later rounds")


def block_groups(cache: Cache) -> list[BlockGroup[Any]]:
    """Every group of blocks, of all rounds, with readable metadata."""
    groups: list[BlockGroup[Any]] = []
    with contextlib.suppress(CacheError):  # `verify` reports it
        for index in cache.round_entries():
            with contextlib.suppress(CacheError):
                if cache.has_round(index):
                    round_ = cache.round(index)
                    groups.append(round_.rollouts)
                    for name in round_.scorer_entries():
                        with contextlib.suppress(CacheError):
                            groups.append(round_.scores(name))
    return groups


def repair(cache: Cache, findings: Sequence[Finding]) -> int:
    """Uncommit the blocks of `findings`, and return how many there are.

    Scores of a repaired rollouts block need no repair: if sampling gives the same rollouts again they are valid, else
    they do not count as committed.
    """
    blocks = {(f.round, f.group, f.block) for f in findings if f.round is not None and f.block is not None}
    for index, name, block in sorted(blocks):
        round_ = cache.round(index)
        group = round_.rollouts if name == "rollouts" else round_.scores(name.removeprefix("scores/"))
        group.uncommit(block)
    return len(blocks)


@contextlib.contextmanager
def _reported(found: list[Finding], round_: int | None, group: str, array: str = "attributes") -> Iterator[None]:
    """Turn a `CacheError` into a finding, but not a `StorageError`: it says nothing about the cache."""
    try:
        yield
    except StorageError:
        raise
    except CacheError as error:
        found.append(Finding(round_, group, None, array, str(error)))


def _verify_round(round_: Round, progress: Callable[[int], None]) -> Iterator[Finding]:
    found: list[Finding] = []
    groups: list[BlockGroup[Any]] = [round_.rollouts]
    with _reported(found, round_.index, "prompts", "bytes"):
        round_.prompts.check()
    names: list[str] = []
    with _reported(found, round_.index, "scores"):
        names = round_.scorer_entries()
    for name in names:
        with _reported(found, round_.index, f"scores/{name}"):
            if round_.has_scores(name):
                groups.append(round_.scores(name))
    yield from found
    readable = []
    for group in groups:
        problems = list(group.check_metadata())
        for array, problem in problems:
            yield Finding(round_.index, group.name, None, array, problem)
        readable += [group] * (not problems)
    for problems_of_block in read_ahead(
        lambda block: _check_block(round_, readable, block), range(round_.n_blocks), readable
    ):
        yield from problems_of_block
        progress(len(readable))
    progress(round_.n_blocks * (len(groups) - len(readable)))


def _check_block(round_: Round, groups: Sequence[BlockGroup[Any]], block: int) -> list[Finding]:
    found: list[Finding] = []
    rollouts: RolloutBlock | None = None
    for group in groups:
        try:
            if group is round_.rollouts:
                rollouts = group.read_own(block)
                if rollouts is not None:
                    rollouts.validate(round_.manifest, block)
            elif not _is_stale(group, block):
                # Without valid rollouts, scores are checked for digests only.
                _check_scores(group, block, rollouts)
        except CorruptBlockError as error:
            found.append(Finding(round_.index, group.name, block, error.array, error.problem))
        except InvalidBlockError as error:
            rollouts = None if group is round_.rollouts else rollouts
            found.append(Finding(round_.index, group.name, block, error.array, error.problem))
    return found


def _is_stale(group: BlockGroup[Any], block: int) -> bool:
    """Whether the block scores rollouts or candidates that have changed since; False if that is unknown."""
    try:
        return not group.is_committed(block)
    except StorageError:
        raise
    except CacheError:
        return False


def _check_scores(group: BlockGroup[ScoresManifest], block: int, rollouts: RolloutBlock | None) -> None:
    scores = group.read_own(block)
    if scores is not None and rollouts is not None:
        scores.validate(group.manifest, rollouts)
