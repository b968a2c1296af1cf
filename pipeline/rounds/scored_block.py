"""The reader of a round with its scorers: blocks of rollouts, their scores, and reverse KL. numpy only.

Shapes: T response tokens of a block, its rollouts end to end; R rollouts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

import cache_schema as cs
from pipeline.rounds.metrics import Float64, scores_reverse_kl

Bool = npt.NDArray[np.bool_]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ScoredBlock:
    """A block of rollouts with the scores that exist.

    Attributes:
        block: its number in the round.
        numbers: [R] of its rollouts in the round.
        scores: by name, of the scorers that have scored the block, the student included.
        reverse_kl: KL(student || teacher) [T] by teacher, nats; NaN where a score is missing.
    """

    block: int
    rollouts: cs.RolloutBlock
    numbers: Int64
    scores: dict[str, cs.ScoreBlock]
    reverse_kl: dict[str, Float64]

    @property
    def has_student(self) -> bool:
        return cs.STUDENT in self.scores

    @property
    def student(self) -> cs.ScoreBlock:
        """The student's scores; `scored_blocks` yields only blocks that have them."""
        return self.scores[cs.STUDENT]

    @property
    def teachers(self) -> dict[str, cs.ScoreBlock]:
        return {name: scores for name, scores in self.scores.items() if name != cs.STUDENT}

    @property
    def trained(self) -> Bool:
        """[T]: the student's own tokens, those that training may use."""
        return np.asarray(self.rollouts.trained == 1)

    def mask(self, teacher: str) -> Bool:
        """[T]: the student's own tokens that this teacher has scored."""
        return np.asarray(self.trained & ~np.isnan(self.reverse_kl[teacher]))


class ScoredRound:
    """A round with its student's scores and those of `teachers` (default: all).

    Attributes:
        teachers: their names.
        scores: block groups by scorer.
        committed: bool [n_blocks] by scorer: the blocks that it has scored.
    """

    def __init__(self, round_: cs.Round, teachers: Sequence[str] | None = None):
        self.round = round_
        self.teachers = list(round_.teacher_names() if teachers is None else teachers)
        student = [cs.STUDENT] if cs.STUDENT in round_.scorer_names() else []
        self.scores = {name: round_.scores(name) for name in [*student, *self.teachers]}
        self.committed: dict[str, Bool] = {name: group.committed() for name, group in self.scores.items()}

    def scored(self) -> Int64:
        """Numbers of the blocks that the student and at least one teacher have scored, ascending."""
        nothing = np.zeros(self.round.n_blocks, np.bool_)
        by_teacher = np.any([nothing, *(self.committed[name] for name in self.teachers)], axis=0)
        return np.flatnonzero(self.committed.get(cs.STUDENT, nothing) & by_teacher)

    def sample(self, blocks: Int64, at_most_tokens: int) -> Int64:
        """As many of `blocks` as hold about so many tokens, evenly spaced; at least one."""
        if not len(blocks):
            return blocks
        mean_tokens = float(self.round.rollouts.commits()["tokens"][blocks].mean())
        n = max(1, int(at_most_tokens / max(mean_tokens, 1.0)))
        return blocks if n >= len(blocks) else blocks[np.linspace(0, len(blocks) - 1, n).round().astype(int)]

    def read(self, block: int) -> ScoredBlock:
        """A block of rollouts with the scores that exist. Raises `CacheError` if it is damaged."""
        rollouts: cs.RolloutBlock = self.round.rollouts.read(block)
        scores = {name: group.read(block) for name, group in self.scores.items() if self.committed[name][block]}
        student = scores.get(cs.STUDENT)
        missing = np.full(rollouts.n_tokens, np.nan)
        reverse_kl = {
            name: missing if student is None else scores_reverse_kl(student, scores[name])
            for name in self.teachers
            if name in scores
        }
        return ScoredBlock(block, rollouts, rollout_numbers(self.round, rollouts), scores, reverse_kl)


def scored_blocks(
    round_: cs.Round, teachers: Sequence[str] | None = None, *, at_most_tokens: int | None = None
) -> Iterator[ScoredBlock]:
    """The blocks that the student and any of `teachers` (default: all) have scored, in order.

    Args:
        at_most_tokens: read only as many blocks as hold about so many tokens, evenly spaced over the round.

    Raises:
        CacheError: a block is damaged.
    """
    if cs.STUDENT not in round_.scorer_names():
        return  # scores at the student's candidates cannot be read without its own
    reader = ScoredRound(round_, teachers)
    blocks = reader.scored()
    if at_most_tokens is not None:
        blocks = reader.sample(blocks, at_most_tokens)
    yield from cs.read_ahead(reader.read, blocks.tolist(), [round_.rollouts, *reader.scores.values()])


def rollout_numbers(round_: cs.Round, rollouts: cs.RolloutBlock) -> Int64:
    """[R]: numbers in the round, `prompt number * rollouts_per_prompt + sample number`, known before sampling."""
    per_prompt = round_.manifest.rollouts_per_prompt
    return np.asarray(rollouts.prompt_index[rollouts.row_prompt] * per_prompt + rollouts.sample_index, np.int64)


def prompts_without_rollouts(round_: cs.Round) -> Int64:
    """Numbers of the prompts in finished blocks that have no rollout: their environment failed in all of them."""
    group, per_prompt, found = round_.rollouts, round_.manifest.rollouts_per_prompt, [np.empty(0, np.int64)]
    rows = group.commits()["rows"]
    for block in np.flatnonzero(group.committed()).tolist():
        prompts = np.array(round_.block_prompts(block))
        if rows[block] <= (len(prompts) - 1) * per_prompt:
            with_one = group.read_arrays(block, ["row_prompt"])["row_prompt"]
            found.append(np.delete(prompts, np.unique(with_one)))
    return np.concatenate(found)


def part_of(scores: cs.ScoreBlock, span: slice) -> cs.ScoreBlock:
    """The scores of some tokens of a block, such as those of one rollout."""
    return cs.ScoreBlock(**{name: value[span] for name, value in vars(scores).items() if value is not None})
