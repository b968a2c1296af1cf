"""What of a teacher's difference from the student follows from token and position alone: habits of another model.

A student that was fine-tuned on one model's answers and is distilled from another finds many tokens marked that are
only worded otherwise. The residual baseline estimates that part from the cached scores and subtracts it:

    d_t = log p_T(x_t) - log p_ref(x_t),   ref the student that sampled
    b(v, s) = sum of d over tokens v at positions of bin s / (their number + 8)
    A_t = clip(log p_T(x_t) - log p_S(x_t) - b(x_t, s_t))

after "teacher consistency" of on-policy distillation (arXiv:2607.28449). Cross-fitted: prompts are dealt into 5
folds, and a rollout's b is of the other folds, so that no token is explained by itself. The baseline depends on the
action, so it is no variance reduction: it changes what is learnt, to what is particular to a context. The 8
counts pull rare pairs to 0. Positions fall into bins that double in width. numpy only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

import cache_schema as cs

#: Column of a loaded block.
RESIDUAL = "baseline/residual"
FOLDS, PRIOR_COUNT = 5, 8.0

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Baseline:
    """Sums over a round by pair of token and bin, and by fold.

    Attributes:
        pairs: i8 [N], ascending.
        sums, counts: f8 [N, FOLDS] of d, and of tokens.
    """

    pairs: Int64
    sums: npt.NDArray[np.float64]
    counts: npt.NDArray[np.float64]

    @classmethod
    def of(cls, round_: cs.Round, teacher: str) -> Baseline:
        """From every committed block."""
        found = cls(np.zeros(0, np.int64), np.zeros((0, FOLDS)), np.zeros((0, FOLDS)))
        for block in np.flatnonzero(round_.scores(teacher).committed()).tolist():
            rollouts = round_.rollouts.read(block)
            groups = [round_.scores(name) for name in (teacher, cs.STUDENT)]
            told, own = (group.read_arrays(block, ("logprobs",))["logprobs"] for group in groups)
            difference = told.astype(np.float64) - own
            counts = np.isfinite(difference) & (rollouts.trained == 1)
            pairs, places = np.unique(_pairs(rollouts)[counts], return_inverse=True)
            cells = places * FOLDS + _folds(rollouts)[counts]
            shape = (len(pairs), FOLDS)
            sums, number = (
                np.bincount(cells, values, minlength=len(pairs) * FOLDS).astype(np.float64).reshape(shape)
                for values in (difference[counts], None)
            )
            found = found._merged(cls(pairs, sums, number))
        return found

    def _merged(self, other: Baseline) -> Baseline:
        pairs = np.union1d(self.pairs, other.pairs)
        sums, counts = np.zeros((len(pairs), FOLDS)), np.zeros((len(pairs), FOLDS))
        for part in (self, other):
            places = np.searchsorted(pairs, part.pairs)
            sums[places] += part.sums
            counts[places] += part.counts
        return Baseline(pairs, sums, counts)

    def columns(self, rollouts: cs.RolloutBlock) -> Mapping[str, npt.NDArray[np.float32]]:
        """`RESIDUAL` f4 [T] of a block: b of each token, in nats, from the other folds."""
        places, folds = np.searchsorted(self.pairs, _pairs(rollouts)), _folds(rollouts)
        places = np.minimum(places, max(len(self.pairs) - 1, 0))
        known = self.pairs[places] == _pairs(rollouts)  # else the token was not scored anywhere
        sums = self.sums.sum(1)[places] - self.sums[places, folds]
        counts = self.counts.sum(1)[places] - self.counts[places, folds]
        return {RESIDUAL: np.where(known, sums / (counts + PRIOR_COUNT), 0.0).astype(np.float32)}


def _pairs(rollouts: cs.RolloutBlock) -> Int64:
    """i8 [T]: token and bin of its position: 0, 1, 2-3, 4-7, ..."""
    bins = np.frexp(rollouts.token_positions.astype(np.float64))[1]
    return np.asarray(rollouts.token_ids.astype(np.int64) << 6 | bins)


def _folds(rollouts: cs.RolloutBlock) -> Int64:
    """i8 [T]: the fold of each token's prompt."""
    return (rollouts.token_prompts % FOLDS).astype(np.int64)
