"""A scored round under the red pen, block by block: its rollouts with what every scorer thinks of them. numpy only.

Shapes: T response tokens of a block, its rollouts end to end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

import cache_schema as cs
from pipeline.rounds.metrics import Float64, scores_reverse_kl


@dataclass(frozen=True)
class ScoredBlock:
    """One block that the student and at least one of the teachers have scored.

    Attributes:
        block: its number in the round.
        teachers: scores by name, of those that have scored the block.
        reverse_kl: KL(student || teacher) [T] by teacher, nats; NaN where the teacher told nothing of a token.
    """

    block: int
    rollouts: cs.RolloutBlock
    student: cs.ScoreBlock
    teachers: dict[str, cs.ScoreBlock]
    reverse_kl: dict[str, Float64]

    def mask(self, teacher: str) -> npt.NDArray[np.bool_]:
        """[T]: the student's own tokens (`trained`) of which this teacher told something."""
        return np.asarray((self.rollouts.trained == 1) & ~np.isnan(self.reverse_kl[teacher]))


def scored_blocks(
    round_: cs.Round, teachers: Sequence[str] | None = None, *, at_most_tokens: int | None = None
) -> Iterator[ScoredBlock]:
    """The round's blocks that the student and any of `teachers` (default: all) have scored, in order.

    Args:
        at_most_tokens: read only as many blocks as hold about so many tokens, evenly spaced over the round.

    Raises:
        CacheError: a block is damaged.
    """
    names = list(round_.teacher_names() if teachers is None else teachers)
    if cs.STUDENT not in round_.scorer_names():
        return  # a teacher's imported scores may be there first
    student = round_.scores(cs.STUDENT)
    groups = {name: round_.scores(name) for name in names}
    scored = {name: group.committed() for name, group in groups.items()}
    blocks = np.flatnonzero(student.committed() & np.any([*scored.values(), np.zeros(round_.n_blocks, bool)], axis=0))
    if at_most_tokens is not None and len(blocks):
        mean_tokens = float(round_.rollouts.commits()["tokens"][blocks].mean())
        affordable = max(1, int(at_most_tokens / max(mean_tokens, 1.0)))
        if affordable < len(blocks):
            blocks = blocks[np.linspace(0, len(blocks) - 1, affordable).round().astype(int)]
    for block in map(int, blocks):
        own = student.read(block)
        told = {name: groups[name].read(block) for name in names if scored[name][block]}
        kl = {name: scores_reverse_kl(own, scores) for name, scores in told.items()}
        yield ScoredBlock(block, round_.rollouts.read(block), own, told, kl)
