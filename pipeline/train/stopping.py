"""When training ends, and the history that decides it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.config import TrainConfig
from pipeline.runs.directory import Result

EXIT_STALE = 3
#: Metrics kept for the last `stop_window` steps, if the loss has them.
WINDOW_METRICS = ("loss", "reverse_kl", "ess")


@dataclass
class TrainingHistory:
    """What a run keeps besides weights and optimizer state; part of every checkpoint.

    Attributes:
        window: `WINDOW_METRICS` of the last steps.
        heldout: `train.heldout_metric` by the step after which it was measured (text, as JSON keys are).
        seconds, tokens: cost of the training so far; tokens include prompts.
    """

    window: list[dict[str, float]] = field(default_factory=list)
    heldout: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    tokens: int = 0

    def add(self, train: TrainConfig, metrics: Mapping[str, float], seconds: float, tokens: int) -> None:
        """Record a step."""
        kept = {name: metrics[name] for name in WINDOW_METRICS if name in metrics}
        self.window = [*self.window, kept][-train.stop_window :]
        self.seconds, self.tokens = self.seconds + seconds, self.tokens + tokens


def heldout_loss(train: TrainConfig, value: float) -> float:
    """A value of `train.heldout_metric` with the sign that makes lower better; infinite for NaN."""
    if math.isnan(value):
        return math.inf
    return value if train.heldout_metric == "reverse_kl" else -value


def best_step(train: TrainConfig, history: TrainingHistory) -> int | None:
    """The first step with the best held-out metric; None before the first measurement."""
    steps = (int(step) for step in history.heldout)
    return min(steps, key=lambda step: (heldout_loss(train, history.heldout[str(step)]), step), default=None)


def format_metric(train: TrainConfig, value: float) -> str:
    """A value of `train.heldout_metric` with its name."""
    if train.heldout_metric == "reverse_kl":
        return f"reverse KL {value:.5f}"
    return f"{train.heldout_metric} {value:.1%}"


def stop_result(train: TrainConfig, step: int, history: TrainingHistory) -> Result | None:
    """How training ends after `step` steps, with exit code 0 or `EXIT_STALE`; None if it goes on."""
    n = len(history.window)
    window_is_full = n == train.stop_window
    names = history.window[-1] if history.window else {}
    means = {name: sum(metrics.get(name, 0.0) for metrics in history.window) / n for name in names}
    reverse_kl, ess = means.get("reverse_kl", math.inf), means.get("ess", math.inf)
    over = f"mean of the last {n} step{'s' * (n != 1)}"
    code, kept, since_best = 0, "", 0
    if (best := best_step(train, history)) is not None:
        since_best = sum(int(measured) > best for measured in history.heldout)
        value = history.heldout[str(best)]
        kept = f"; the result is step {best}, the best by held-out {format_metric(train, value)}"
    if window_is_full and reverse_kl < train.stop_reverse_kl:
        sentence = (
            f"round done after {step} steps: reverse KL on the cached rollouts is {reverse_kl:.5f} nats a token "
            f"({over}), below {train.stop_reverse_kl:g}; sample a new round to learn more"
        )
    elif window_is_full and ess < train.stale_ess:
        code = EXIT_STALE
        sentence = (
            f"stale after {step} steps: the effective sample size is {ess:.3f} of the tokens ({over}), below "
            f"{train.stale_ess:g}; the student has moved too far from the one that sampled this cache, sample a new "
            "round with it"
        )
    elif since_best >= train.heldout_patience:
        sentence = f"plateau after {step} steps: no improvement in the last {since_best} measurements"
    elif step >= train.steps:
        name = "reverse KL on the cached rollouts" if "reverse_kl" in means else "the loss"
        mean = means.get("reverse_kl", means.get("loss", math.nan))
        unit = " nats" if "reverse_kl" in means or train.loss == "cross_entropy" else ""  # an advantage has none
        sentence = f"max steps: {step} done; {name} is {mean:.5f}{unit} a token ({over})"
    else:
        return None
    return Result(step, sentence + kept, code)
