"""Stage one, scoring: inputs and outputs of a scorer. The stage itself is `pipeline.score.stage`.

A scorer is a model that computes log-probs of given tokens. The student is the first one: it chooses the candidates,
which every teacher scores too. Shapes: T response tokens of all rollouts end to end, K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

import cache_schema as cs

_Scalar = TypeVar("_Scalar", bound=np.generic)


@dataclass(frozen=True)
class ScoreOptions:
    """What to compute for every token, in addition to its log-prob and the entropy.

    Attributes:
        candidates: K alternatives a position, the sampled token included; if a batch has candidate ids, those are
            scored instead.
        candidate_kind: "topk" or "sampled" (see `pipeline.forward.head.score_rows`).
        candidate_vocab: candidates are ids below it, those of the tokenizer. None: the whole head.
        sampling_temperature: also the token's log-prob at this temperature.
        topk: also the model's own likeliest tokens, this many.
        topk_among: bool [V], tokens that those are chosen from; None: all.
        tile_tokens: prompt and response tokens in one forward. It affects the last bits, so manifests record it.
        rows_per_chunk: positions whose logits exist at the same time.
    """

    candidates: int = 8
    candidate_kind: str = "topk"
    candidate_vocab: int | None = None
    sampling_temperature: float | None = None
    topk: int = 0
    topk_among: npt.NDArray[np.bool_] | None = None
    tile_tokens: int = 8192
    rows_per_chunk: int = 1024


@dataclass(frozen=True)
class TokenBatch:
    """Rollouts of one or more blocks, to be scored.

    Attributes:
        blocks: the rollouts. A tile of the forward never spans two, so scores do not depend on the batch.
        candidate_ids: i4 [T, K] over all blocks, or None to choose candidates.
        keys: integers that name each block, for drawing candidates.
        student_logprobs: f4 [T] of the cached student, for a teacher.
    """

    blocks: tuple[cs.RolloutBlock, ...]
    candidate_ids: npt.NDArray[np.int32] | None = None
    keys: tuple[tuple[int, ...], ...] | None = None
    student_logprobs: npt.NDArray[np.float32] | None = None

    @property
    def n_tokens(self) -> int:
        return sum(block.n_tokens for block in self.blocks)

    def part(self, values: npt.NDArray[_Scalar], index: int) -> npt.NDArray[_Scalar]:
        """The part of an array [T, ...] over all blocks that belongs to block number `index` of the batch."""
        start = sum(block.n_tokens for block in self.blocks[:index])
        return values[start : start + self.blocks[index].n_tokens]

    def split(self, scores: cs.ScoreBlock) -> list[cs.ScoreBlock]:
        """The scores of each block."""
        arrays = {name: value for name, value in vars(scores).items() if value is not None}
        return [
            cs.ScoreBlock(**{name: self.part(value, index) for name, value in arrays.items()})
            for index in range(len(self.blocks))
        ]


class Scorer(Protocol):
    """Scores tokens, [T] end to end in the order of the batch.

    Attributes:
        batch_tokens: response tokens in a batch that keep the scorer busy. The stage never splits a block.
    """

    batch_tokens: int

    def compute_logprobs(self, batch: TokenBatch | cs.RolloutBlock) -> cs.ScoreBlock: ...


def as_batch(tokens: TokenBatch | cs.RolloutBlock) -> TokenBatch:
    return tokens if isinstance(tokens, TokenBatch) else TokenBatch((tokens,))


def sequences(
    rollouts: cs.RolloutBlock, rows: Sequence[int] | range
) -> tuple[list[npt.NDArray[np.int32]], list[int]]:
    """Prompt + response of some rollouts, and where each response starts."""
    joined = [np.concatenate([rollouts.prompt(row), rollouts.response(row)]) for row in rows]
    return joined, [len(rollouts.prompt(row)) for row in rows]
