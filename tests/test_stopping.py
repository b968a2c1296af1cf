"""When training ends, with which message and which exit code."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pipeline.config import Recipe
from pipeline.train.stopping import TrainingHistory, best_step, stop_result

Make = Callable[..., Recipe]


def after(*values: tuple[float, float], heldout: dict[str, float] | None = None) -> TrainingHistory:
    """Steps that ended with these reverse KLs and effective sample sizes."""
    return TrainingHistory([{"reverse_kl": kl, "ess": ess} for kl, ess in values], heldout or {})


LOW, HIGH = (0.0015, 0.9), (0.1, 0.9)


def test_when_training_ends(recipe: Make) -> None:
    train = recipe("train.stop_reverse_kl=0.002", "train.stop_window=2", "train.stale_ess=0.5").train
    assert stop_result(train, 1, after(LOW)) is None, "one step is not a window"
    assert stop_result(train, 3, after(LOW, HIGH)) is None
    done = stop_result(train, 3, after(LOW, LOW))
    assert done is not None and done.exit_code == 0
    assert done.sentence.startswith("round done after 3 steps: reverse KL")
    stale = stop_result(train, 4, after((0.1, 0.4), (0.1, 0.5)))
    assert stale is not None and stale.exit_code == 3 and "0.450 of the tokens" in stale.sentence
    ended = stop_result(train, 5, after(HIGH, HIGH))
    assert ended is not None and ended.exit_code == 0 and ended.sentence.startswith("max steps: 5 done")
    control = recipe("train.loss=importance_sampling", "train.advantage=constant").train
    without = stop_result(control, control.steps, TrainingHistory([{"loss": 0.5, "ess": 0.9}], {}))
    assert without is not None and "the loss is 0.50000 a token" in without.sentence, "of an advantage without a unit"
    off = recipe("train.stop_reverse_kl=0").train
    assert stop_result(off, 3, after(*[(0.0, 0.0)] * off.stop_window)) is None


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [
        ("accuracy", {"2": 0.5, "4": 0.9, "10": 0.9}, 4),
        ("reverse_kl", {"2": 0.5, "10": 0.1, "4": 0.9}, 10),
        ("accuracy", {}, None),
        ("accuracy", {"2": float("nan"), "4": 0.1}, 4),
        ("reverse_kl", {"2": float("nan"), "4": 0.1, "6": 0.2}, 4),
    ],
)
def test_the_best_step_is_the_first_with_the_best_value(
    recipe: Make, metric: str, values: dict[str, float], best: int | None
) -> None:
    train = recipe(f"train.heldout_metric={metric}", "eval.path=toy:heldout").train
    assert best_step(train, TrainingHistory(heldout=values)) == best


def test_a_plateau_is_several_measurements_without_a_new_best(recipe: Make) -> None:
    train = recipe("train.heldout_metric=accuracy", "train.heldout_patience=2", "train.steps=50").train
    rising = {"10": 0.5, "20": 0.7}
    assert stop_result(train, 20, after(HIGH, heldout=rising)) is None
    assert stop_result(train, 30, after(HIGH, heldout=rising | {"30": 0.7})) is None, "one is not a plateau"
    ended = stop_result(train, 40, after(HIGH, heldout=rising | {"30": 0.6, "40": 0.7}))
    assert ended is not None and ended.exit_code == 0
    assert ended.sentence == (
        "plateau after 40 steps: no improvement in the last 2 measurements; the result is step 20, the best by "
        "held-out accuracy 70.0%"
    )
    last = stop_result(train, 50, after(HIGH, heldout=rising | {"50": 0.9}))
    assert last is not None and last.sentence.endswith("the result is step 50, the best by held-out accuracy 90.0%")
