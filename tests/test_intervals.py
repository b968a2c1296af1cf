"""How sure a mean per token makes one: intervals that hold the truth as often as they say, of skewed prompts too."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from pipeline.evaluate import table
from pipeline.report import runs
from pipeline.rounds.intervals import mean_per_token, student_t

#: A prompt's own divergence per token: the distribution over prompts, and its mean.
LEVELS: dict[str, tuple[Callable[[np.random.Generator, int], np.ndarray], float]] = {
    "even": (lambda rng, n: rng.gamma(2.0, 0.05, n), 0.1),
    "skewed": (lambda rng, n: rng.exponential(0.1, n), 0.1),
    "very skewed": (lambda rng, n: rng.gamma(0.5, 0.2, n), 0.1),
}


def coverage(level: str, n_prompts: int, trials: int) -> float:
    """Share of intervals that hold the true mean, of prompts of very different lengths."""
    rng, covered = np.random.default_rng(0), 0
    draw, truth = LEVELS[level]
    for _ in range(trials):
        tokens = np.ceil(rng.lognormal(3, 0.7, n_prompts))
        found = mean_per_token(draw(rng, n_prompts) * tokens, tokens)
        assert found.low < found.value < found.high
        covered += found.low <= truth <= found.high
    return covered / trials


@pytest.mark.parametrize("level", LEVELS)
def test_thirty_prompts_are_enough(level: str) -> None:
    assert 0.93 <= coverage(level, 30, 600) <= 0.98


def test_many_prompts_give_the_normal_interval() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 60, 4000).astype(float)
    totals = rng.gamma(2.0, 0.05, 4000) * tokens
    found = mean_per_token(totals, tokens)
    mean = totals.sum() / tokens.sum()
    half = 1.96 * math.sqrt(np.square(totals - mean * tokens).sum()) / tokens.sum()
    assert found.value == pytest.approx(mean, rel=1e-12)
    assert (found.high - found.value, found.value - found.low) == (
        pytest.approx(half, rel=0.1),
        pytest.approx(half, rel=0.1),
    )
    assert found == mean_per_token(totals, tokens), "from a fixed seed"


def test_few_prompts_give_a_wide_interval_or_none() -> None:
    one = mean_per_token(np.array([0.3, 0.0]), np.array([3.0, 0.0]))
    assert one.value == pytest.approx(0.1) and math.isnan(one.low) and math.isnan(one.high)
    two = mean_per_token(np.array([0.1, 0.3]), np.array([1.0, 1.0]))
    assert two.value == pytest.approx(0.2) and two.high - two.value > 0.9  # Student's, one degree of freedom
    alike = mean_per_token(np.array([0.2, 0.4]), np.array([1.0, 2.0]))
    assert alike.low == pytest.approx(0.2) and alike.high == pytest.approx(0.2)


@pytest.mark.parametrize(("freedom", "quantile"), [(4, 2.7764), (9, 2.2622), (29, 2.0452), (1000, 1.9623)])
def test_students_quantile(freedom: int, quantile: float) -> None:
    assert student_t(freedom) == pytest.approx(quantile, rel=3e-3)


def test_one_prompt_is_shown_without_an_interval() -> None:
    one = {"value": 0.1, "low": None, "high": None}
    assert runs.estimates({"eval": {"after": {"reverse_kl": one}}}, "after") == {"reverse_kl": one}
    assert runs.interval("reverse_kl", one) == table._nats(one) == "0.1000"
