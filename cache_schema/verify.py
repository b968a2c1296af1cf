"""Recompute every digest of a cache and check that its values mean something; take back what is bad."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .blocks import InvalidBlockError, RolloutBlock
from .cache import Cache, Round
from .errors import CacheError, CorruptBlockError, StorageError
from .group import BlockGroup
from .manifest import RoundManifest, ScoresManifest


@dataclass(frozen=True)
class Finding:
    """One thing wrong with a cache.

    Attributes:
        group: "rollouts", "scores/<name>" or "prompts".
        block: the bad block, or None where the whole group is concerned; only blocks can be repaired.
    """

    round: int
    group: str
    block: int | None
    array: str
    problem: str

    def __str__(self) -> str:
        where = f"round {self.round} {self.group}" + ("" if self.block is None else f" block {self.block}")
        return f"{where}, array {self.array}: {self.problem}"


def verify(cache: Cache, *, progress: Callable[[int], None] = lambda blocks: None) -> Iterator[Finding]:
    """Yield everything that is wrong with the committed blocks of every round.

    Args:
        progress: called with the number of blocks done since the last call.

    Blocks that are not committed are not findings: the stage that writes them has not finished.
    """
    for index in cache.lost_rounds():
        yield Finding(index, "round", None, "attributes", "holds blocks, but its metadata (zarr.json) is gone")
    for index in cache.round_indices():
        try:
            round_ = cache.round(index)
        except StorageError:
            raise
        except CacheError as error:
            yield Finding(index, "round", None, "attributes", str(error))
        else:
            yield from _verify_round(round_, progress)


def block_groups(cache: Cache) -> list[BlockGroup]:
    """Every group of blocks whose metadata can be read, over all rounds."""
    groups: list[BlockGroup] = []
    for index in cache.round_indices():
        with contextlib.suppress(CacheError):  # what cannot be read is a finding of `verify`
            round_ = cache.round(index)
            groups.append(round_.rollouts)
            groups += [round_.scores(name) for name in round_.scorer_names()]
    return groups


def repair(cache: Cache, findings: Sequence[Finding]) -> int:
    """Uncommit the blocks that `findings` name, and only those; returns how many there were.

    Scores of a repaired rollouts block need no repair: they read as uncommitted once the block is sampled again
    differently, and stay good where it is sampled again the same.
    """
    blocks = {(f.round, f.group, f.block) for f in findings if f.block is not None}
    for index, name, block in sorted(blocks):
        round_ = cache.round(index)
        group = round_.rollouts if name == "rollouts" else round_.scores(name.removeprefix("scores/"))
        group.uncommit(block)
    return len(blocks)


def _verify_round(round_: Round, progress: Callable[[int], None]) -> Iterator[Finding]:
    try:
        if round_.prompts.sha256() != round_.manifest.prompts_sha256:
            yield Finding(
                round_.index,
                "prompts",
                None,
                "bytes",
                "differs from prompts_sha256 in the round's attributes",
            )
    except CacheError as error:
        yield Finding(round_.index, "prompts", None, "bytes", str(error))
    groups: list[BlockGroup] = [round_.rollouts]
    try:
        names = round_.scorer_names()
    except CacheError as error:
        yield Finding(round_.index, "scores", None, "attributes", str(error))
        names = []
    for name in names:
        try:
            groups.append(round_.scores(name))
        except CacheError as error:
            yield Finding(round_.index, f"scores/{name}", None, "attributes", str(error))
    unreadable: set[str] = set()
    for block in range(round_.n_blocks):
        rollouts: RolloutBlock | None = None
        for group in groups:
            try:
                # A bad block of one group makes the check of what hangs on it impossible, not wrong.
                if group is round_.rollouts:
                    rollouts = _checked_rollouts(group, block)
                elif rollouts is not None:
                    _check_scores(group, block, rollouts)
                else:
                    group.commit(block)
            except StorageError:
                raise
            except CorruptBlockError as error:
                yield _finding(round_, group, error)
            except InvalidBlockError as error:
                yield Finding(round_.index, group.name, block, error.array, error.problem)
            except CacheError as error:  # an array's metadata: every block would say the same
                if str(error) not in unreadable:
                    unreadable.add(str(error))
                    yield Finding(round_.index, group.name, None, "metadata", str(error))
            progress(1)


def _finding(round_: Round, group: BlockGroup, error: CorruptBlockError) -> Finding:
    # The error may come from a group that `group` depends on; it names its own.
    name = error.group.split("/", 2)[-1] if error.group.startswith("rounds/") else group.name
    return Finding(round_.index, name, error.block, error.array, error.problem)


def _checked_rollouts(group: BlockGroup, block: int) -> RolloutBlock | None:
    if not group.is_committed(block):
        return None
    record = group.read(block)
    assert isinstance(record, RolloutBlock) and isinstance(group.manifest, RoundManifest)
    record.validate(group.manifest, block)
    return record


def _check_scores(group: BlockGroup, block: int, rollouts: RolloutBlock) -> None:
    if group.is_committed(block):
        assert isinstance(group.manifest, ScoresManifest)
        group.read(block).validate(group.manifest, rollouts)
