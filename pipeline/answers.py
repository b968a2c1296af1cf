"""Right or wrong, and how sure that makes one. numpy only.

Shapes: P prompts, S samples of each.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]

#: Standard normal quantile of a 95 % interval.
Z95 = 1.959963984540054


@dataclass(frozen=True)
class Estimate:
    """A measured value and its 95 % interval."""

    value: float
    low: float
    high: float


def extract_answer(response: str, pattern: str | None) -> str | None:
    """The group of the pattern's last match, stripped; None where nothing matches. Without a pattern the whole
    response."""
    if pattern is None:
        return response.strip()
    answer = None
    for match in re.finditer(pattern, response):
        answer = match[1]
    return None if answer is None else answer.strip()


def share_right(right_PS: npt.NDArray[np.bool_]) -> Estimate:
    """Share of right responses with Wilson's interval (Wilson 1927) over the effective number of responses.

    Samples of one prompt are right or wrong together, so they count for fewer than P S: with v the variance of the
    mean over prompts, p (1 - p) / v of them (Kish's design effect), at least P and at most P S. With one sample a
    prompt this is the plain Wilson interval.
    """
    n_prompts, n_samples = right_PS.shape
    p = float(right_PS.mean())
    variance = float(right_PS.mean(1).var(ddof=1)) / n_prompts if n_prompts > 1 else np.inf
    independent = n_prompts * n_samples if 0 < p < 1 else n_prompts  # all alike says nothing of how they depend
    n = float(np.clip(p * (1 - p) / variance, n_prompts, independent)) if variance else float(independent)
    centre = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * np.sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2))
    return Estimate(p, float(np.clip(centre - half, 0.0, p)), float(np.clip(centre + half, p, 1.0)))


def mean_per_token(totals_P: Floats, tokens_P: Floats) -> Estimate:
    """Mean over all tokens of a quantity summed over each prompt's tokens, with a normal interval.

    Tokens of one prompt's rollouts depend on one another, so the variance is that of a ratio of prompt totals:
    (P / (P - 1)) sum_i (total_i - mean tokens_i)^2 / (sum_i tokens_i)^2.
    """
    n_prompts, n_tokens = len(totals_P), float(tokens_P.sum())
    mean = float(totals_P.sum() / n_tokens)
    squares = float(np.square(totals_P - mean * tokens_P).sum())
    half = Z95 * float(np.sqrt(squares * n_prompts / max(n_prompts - 1, 1))) / n_tokens
    return Estimate(mean, mean - half, mean + half)
