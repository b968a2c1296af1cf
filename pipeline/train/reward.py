"""Task rewards: which cached rollouts `[eval]` grades as right or legal, as an advantage for every token.

A rollout's reward r is 1 or 0. Its tokens' advantage compares it with the other rollouts of its prompt,

    std     (r - mean) / (std + 1e-4)     group-relative, Shao et al. 2024, "DeepSeekMath" (GRPO), arXiv:2402.03300
    mean    r - mean                      without the bias towards easy and hard prompts, Liu et al. 2025,
                                          "Understanding R1-Zero-Like Training" (Dr. GRPO), arXiv:2503.20783

and is 0 if all of them are equal. `std` is that of the population: squares are divided by the number n of rollouts,
not by n - 1, which would make every advantage smaller by sqrt((n - 1) / n). Shapes: T response positions of a block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

import cache_schema as cs
from pipeline.config import RewardConfig
from pipeline.text.answers import Checker, answers_of
from pipeline.text.detokenize import response_texts
from pipeline.train.replay import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Columns of a loaded block: the reward of each token's rollout (NaN where its prompt has no answer), its advantage.
VALUE, ADVANTAGE = "reward/value", "reward/advantage"
_EPSILON = 1e-4

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Rewards:
    """Grades a round's rollouts."""

    round_: cs.Round
    tokenizer: PreTrainedTokenizerBase
    checker: Checker
    settings: RewardConfig

    def columns(self, rollouts: cs.RolloutBlock) -> Mapping[str, Float32]:
        """`VALUE` and `ADVANTAGE` f4 [T] of a block."""
        values = self._values(rollouts)
        advantages = group_advantages(values, rollouts.row_prompt, scaled=self.settings.normalise == "std")
        lengths = rollouts.response_length
        return {VALUE: np.repeat(values, lengths), ADVANTAGE: np.repeat(advantages, lengths)}

    def _values(self, rollouts: cs.RolloutBlock) -> Float32:
        """f4 [rows]"""
        texts = response_texts(rollouts, self.tokenizer)
        if self.settings.verifier == "format":
            return np.array([self.checker.is_legal(text) for text in texts], np.float32)
        wanted = [answers_of(self.round_.prompts[int(rollouts.prompt_index[p])]) for p in rollouts.row_prompt]
        return np.array(
            [
                np.nan if answer is None else self.checker.is_right(text, answer)
                for text, answer in zip(texts, wanted, strict=True)
            ],
            np.float32,
        )


def group_advantages(values: Float32, groups: npt.NDArray[np.int32], *, scaled: bool) -> Float32:
    """f4 [rows]: each value minus its group's mean, in standard deviations if `scaled`; 0 for NaN.

    Args:
        values: f4 [rows] rewards.
        groups: i4 [rows] the prompt of each.
    """
    known = ~np.isnan(values)
    filled = np.where(known, values, 0.0).astype(np.float64)
    count = np.maximum(np.bincount(groups, known), 1)
    centred = np.where(known, filled - (np.bincount(groups, filled) / count)[groups], 0.0)
    if scaled:
        centred /= np.sqrt(np.bincount(groups, centred**2) / count)[groups] + _EPSILON
    return centred.astype(np.float32)


def mean_reward(batch: Batch) -> float | None:
    """Mean over the rollouts of a step with a known reward; None without rewards."""
    if not batch.rollouts or VALUE not in batch.rollouts[0].block.columns:
        return None
    values = np.array([rollout.column(VALUE)[0] for rollout in batch.rollouts])
    return float(np.nanmean(values)) if np.isfinite(values).any() else None
