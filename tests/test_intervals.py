"""How sure a mean per token makes one: intervals that hold the truth as often as they say, of skewed prompts too."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from pipeline.evaluate import table
from pipeline.report import runs
from pipeline.rounds.intervals import _robust_error, mean_per_token, student_t

#: A prompt's own divergence per token: the distribution over prompts, with the mean 0.1.
LEVELS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda rng, n: rng.normal(0.1, 0.03, n),
    "gamma": lambda rng, n: rng.gamma(2.0, 0.05, n),
    "exponential": lambda rng, n: rng.exponential(0.1, n),
    "lognormal": lambda rng, n: 0.1 * rng.lognormal(-0.5, 1.0, n),
}
TRUTH = 0.1


def coverage(level: str, n_prompts: int, trials: int) -> tuple[float, float]:
    """Of prompts of very different lengths, the fraction of samples that give an interval, and of these intervals the
    fraction that holds the true mean."""
    rng, found = np.random.default_rng(0), []
    for _ in range(trials):
        tokens = np.ceil(rng.lognormal(3, 0.7, n_prompts))
        found.append(mean_per_token(LEVELS[level](rng, n_prompts) * tokens, tokens))
    given = [each for each in found if not math.isnan(each.low)]
    assert all(each.value / 10.001 < each.low < each.value < each.high < each.value * 10.001 for each in given)
    return len(given) / trials, sum(each.low <= TRUTH <= each.high for each in given) / len(given)


@pytest.mark.parametrize("n_prompts", [5, 8, 15, 30, 100])
@pytest.mark.parametrize("level", LEVELS)
def test_few_prompts_are_as_sure_as_many(level: str, n_prompts: int) -> None:
    given, covered = coverage(level, n_prompts, 300)
    assert 0.90 <= covered <= 0.99
    assert given >= {5: 0.7, 8: 0.9}.get(n_prompts, 0.98)


def test_many_prompts_give_the_normal_interval() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 60, 4000).astype(float)
    totals = rng.gamma(2.0, 0.05, 4000) * tokens
    found = mean_per_token(totals, tokens)
    mean = totals.sum() / tokens.sum()
    half = 1.96 * math.sqrt(np.square(totals - mean * tokens).sum()) / tokens.sum()
    assert found.value == pytest.approx(mean, rel=1e-12)
    assert (found.high - found.value, found.value - found.low) == (
        pytest.approx(half, rel=0.03),
        pytest.approx(half, rel=0.03),
    )


def test_the_error_is_that_of_its_matrices() -> None:
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.ones(7))
    means = rng.normal(size=7)
    centre = np.eye(7) - np.outer(np.ones(7), weights)
    matrix = centre.T @ np.diag(weights**2 / (1 - weights)) @ centre
    freedom = np.trace(matrix) ** 2 / np.trace(matrix @ matrix)
    assert _robust_error(means, weights) == pytest.approx((math.sqrt(means @ matrix @ means), freedom))
    _, even = _robust_error(means, np.full(7, 1 / 7))
    assert even == pytest.approx(6), "Student's"


def test_too_few_prompts_give_no_interval() -> None:
    for totals, tokens in (
        ([0.3, 0.0], [3.0, 0.0]),
        ([0.1, 0.3], [1.0, 1.0]),
        ([0.0, 0.0, 0.0, 0.0, 0.0, 1.0], [1.0] * 6),  # one prompt has all of it
    ):
        found = mean_per_token(np.array(totals), np.array(tokens))
        assert found.value == pytest.approx(sum(totals) / sum(tokens))
        assert math.isnan(found.low) and math.isnan(found.high)
    alike = mean_per_token(np.arange(1, 7) / 5, np.arange(1.0, 7.0))
    assert alike.low == pytest.approx(0.2) and alike.high == pytest.approx(0.2)
    none = mean_per_token(np.zeros(6), np.ones(6))
    assert (none.value, none.low, none.high) == (0, 0, 0), "two models that are the same"


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.7062), (1.5, 6.01666), (2, 4.30265), (3.3, 3.02487), (29, 2.04523), (1e4, 1.9602)],
)
def test_students_quantile(freedom: float, quantile: float) -> None:
    assert student_t(freedom) == pytest.approx(quantile, rel=1e-4)


def test_a_mean_without_an_interval_is_shown_without_one() -> None:
    one = {"value": 0.1, "low": None, "high": None}
    assert runs.estimates({"eval": {"after": {"reverse_kl": one}}}, "after") == {"reverse_kl": one}
    assert runs.interval("reverse_kl", one) == table._nats(one) == "0.1000"
