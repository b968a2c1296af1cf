"""A pair under examination: what its checks share."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.diagnose import Finding, Severity
from pipeline.diagnose.figures import Figures, percent
from pipeline.diagnose.reading import Pair
from pipeline.diagnose.token_names import Words

#: Of the probability that the student gives to its own candidates, what the teacher gives to them at the median
#: position: below it, the teacher mostly considers other tokens. Pairs that succeed come to share 97 % and more
#: (arXiv 2604.13016).
SAME_TOKENS = 0.5


@dataclass(frozen=True)
class Case:
    """A teacher's reading, its key figures, and the names of tokens."""

    pair: Pair
    figures: Figures
    words: Words

    def finding(
        self, key: str, severity: Severity, verdict: str, evidence: Sequence[str], remedy: str, explains: float
    ) -> Finding:
        return Finding(key, severity, verdict, tuple(evidence), remedy, explains, self.pair.teacher)

    @property
    def chance_logprob(self) -> float:
        """Of a uniform guess over the vocabulary."""
        return -math.log(self.pair.sampled.vocab_size)

    @property
    def agreement(self) -> float | None:
        """On the likeliest candidate, 0 as by chance and 1 always (Cohen's kappa for K equal candidates)."""
        if self.figures.agreement is None:
            return None
        chance = 1 / self.pair.scored.candidates
        return (self.figures.agreement - chance) / (1 - chance)

    @property
    def same_tokens(self) -> bool:
        """Whether the teacher mostly considers what the student considers."""
        if self.figures.shared_median is None:
            return self.figures.logprob > 0.5 * self.chance_logprob
        return self.figures.shared_median >= SAME_TOKENS * self.figures.student_shared

    def share_of_kl(self, chosen: npt.NDArray[np.bool_]) -> float:
        total = float(self.pair.reading.reverse_kl.sum())
        return float(self.pair.reading.reverse_kl[chosen].sum()) / total if total > 0 else 0.0

    def preferred(self, chosen: npt.NDArray[np.bool_]) -> str:
        """What the teacher most often finds the likeliest at these tokens, as far as the scores tell."""
        reading = self.pair.reading
        sure = chosen & reading.is_preference
        if sure.sum() < 0.5 * chosen.sum():
            return "tokens that are not among the student's candidates (score.teacher_topk would tell)"
        most = Counter(reading.prefers[sure].tolist()).most_common(3)
        shown = ", ".join(f"{self.words(token)} ({percent(count / int(chosen.sum()))})" for token, count in most)
        return f"{shown} of the time"
