"""Which cached response tokens are trained on. The cache itself is never changed. numpy only.

Shapes: T response tokens of a block or of a global batch, end to end.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

import cache_schema as cs
from pipeline.config import SelectConfig

Weights = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Selection:
    """The recipe's `select` with this round's token ids.

    Attributes:
        stop_ids: the round's stop tokens, for `select.eos`.
        special_ids: the tokenizer's other special tokens, for `select.special_tokens`.
    """

    settings: SelectConfig = field(default_factory=SelectConfig)
    stop_ids: tuple[int, ...] = ()
    special_ids: tuple[int, ...] = ()

    @property
    def by_entropy(self) -> bool:
        """Whether the selection depends on the student's entropy, compared over a global batch."""
        return self.settings.entropy_fraction < 1

    def of_block(self, rollouts: cs.RolloutBlock) -> npt.NDArray[np.bool_]:
        """[T]: which tokens are selected by position, id and response."""
        settings, keep = self.settings, np.ones(rollouts.n_tokens, np.bool_)
        if settings.first_tokens is not None:
            keep &= rollouts.token_positions < settings.first_tokens
        if not settings.special_tokens:
            keep &= ~np.isin(rollouts.token_ids, self.special_ids)
        if not settings.eos:
            keep &= ~np.isin(rollouts.token_ids, self.stop_ids)
        if not settings.truncated:
            keep &= np.repeat(rollouts.finish_reason != cs.FINISH_LENGTH, rollouts.response_length)
        return keep

    def of_batch(self, weights_T: Weights, entropy_T: npt.NDArray[Any]) -> Weights:
        """The weights, 0 outside the `entropy_fraction` of counted tokens with the highest entropy. Ties with the
        last one stay in, so the order of the tokens does not matter."""
        counted = entropy_T[weights_T > 0]
        n_kept = max(round(self.settings.entropy_fraction * len(counted)), 1)
        if n_kept >= len(counted):
            return weights_T
        lowest = np.partition(counted, len(counted) - n_kept)[len(counted) - n_kept]
        return np.where(entropy_T >= lowest, weights_T, np.float32(0))

    def __str__(self) -> str:
        """The settings that exclude tokens, as in a recipe."""
        defaults = SelectConfig()
        return ", ".join(
            f"select.{name} = {str(value).lower()}"
            for name, value in self.settings
            if value != getattr(defaults, name)
        )
