"""Confidence intervals of a mean per token. numpy only.

Shapes: P prompts, B resamples.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from pipeline.text.answers import Z95, Estimate

Floats = npt.NDArray[np.floating]
Float64 = npt.NDArray[np.float64]

#: Resamples of the prompts, and how many numbers of them are in memory at the same time.
RESAMPLES, _AT_ONCE = 2000, 4_000_000


def mean_per_token(totals_P: Floats, tokens_P: Floats) -> Estimate:
    """Mean over all tokens of a quantity summed over each prompt's tokens, with a 95 % interval over prompts.

    Tokens of one prompt's rollouts depend on one another, and a few hard prompts hold most of a divergence: its
    distribution over prompts is skewed, and mean +- 1.96 standard errors of 30 prompts would hold the truth in 80 to
    90 % of cases. So the interval is a bootstrap-t (Efron and Tibshirani 1993, "An Introduction to the Bootstrap",
    chapter 12.5): prompts are drawn again with replacement, and quantiles of (mean* - mean) / error* take the place
    of +-1.96, at the level that a normal distribution has beyond Student's t with P - 1 degrees of freedom; it is
    never narrower than Student's interval. For 30 skewed prompts it holds the truth in 93 to 95 %
    (tests/test_intervals.py). The seed is fixed: equal figures have equal intervals. One prompt has no interval: NaN
    at both ends.

    Args:
        totals_P, tokens_P: of each prompt; prompts without tokens count for nothing.
    """
    asked = np.asarray(tokens_P) > 0
    totals, tokens = np.asarray(totals_P, np.float64)[asked], np.asarray(tokens_P, np.float64)[asked]
    mean, error = (float(value[0]) for value in _ratios(totals[None], tokens[None]))
    n_prompts = len(totals)
    if n_prompts < 2:
        return Estimate(mean, math.nan, math.nan)
    t = student_t(n_prompts - 1)
    beyond = NormalDist().cdf(-t)
    low, high = np.quantile(_bootstrap_t(totals, tokens, mean, error), [beyond, 1 - beyond]).tolist()
    return Estimate(mean, mean - max(high, t) * error, mean - min(low, -t) * error)


def student_t(freedom: int) -> float:
    """Quantile 0.975 of Student's t, by its Cornish-Fisher expansion: to 0.3 % from 4 degrees of freedom on."""
    z, n = Z95, freedom
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )


def _ratios(totals_BP: Float64, tokens_BP: Float64) -> tuple[Float64, Float64]:
    """[B] mean per token, and its standard error, that of a ratio of sums over P independent prompts:

    sqrt(P / (P - 1) sum_i (total_i - mean tokens_i)^2) / sum_i tokens_i
    """
    n_prompts, n_tokens_B = totals_BP.shape[1], tokens_BP.sum(1)
    mean_B = totals_BP.sum(1) / n_tokens_B
    squares_B = np.square(totals_BP - mean_B[:, None] * tokens_BP).sum(1)
    return mean_B, np.sqrt(squares_B * n_prompts / max(n_prompts - 1, 1)) / n_tokens_B


def _bootstrap_t(totals_P: Float64, tokens_P: Float64, mean: float, error: float) -> Float64:
    """(mean* - mean) / error* of every resample that has an error: one that drew a single prompt has none."""
    rng, n_prompts, found = np.random.default_rng(0), len(totals_P), []
    at_once = max(1, _AT_ONCE // n_prompts)
    for start in range(0, RESAMPLES, at_once):
        drawn = rng.integers(0, n_prompts, (min(at_once, RESAMPLES - start), n_prompts))
        mean_B, error_B = _ratios(totals_P[drawn], tokens_P[drawn])
        has_error = error_B > 1e-9 * error
        found.append((mean_B[has_error] - mean) / error_B[has_error])
    return np.concatenate([np.zeros(1), *found])
