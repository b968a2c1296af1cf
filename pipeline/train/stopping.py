"""When training ends, and what it must remember to tell."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from pipeline.config import TrainConfig
from pipeline.runs.directory import Result

EXIT_STALE = 3
#: What is remembered of a step, where the loss has it.
GAUGES = ("loss", "reverse_kl", "ess")


@dataclass
class Memory:
    """What a run remembers beside weights and optimizer; it is part of every checkpoint.

    Attributes:
        window: the gauges of the last steps.
        heldout: `train.heldout_metric` by the step after which it was measured (text, as JSON keys are).
        seconds, tokens: what training has cost; tokens include prompts.
    """

    window: list[dict[str, float]] = field(default_factory=list)
    heldout: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    tokens: int = 0


def badness(train: TrainConfig, value: float) -> float:
    """A value of `train.heldout_metric` such that less is better; NaN is worse than any."""
    if math.isnan(value):
        return math.inf
    return value if train.heldout_metric == "reverse_kl" else -value


def best_step(train: TrainConfig, memory: Memory) -> int | None:
    """The first step with the best held-out metric; None before the first measurement."""
    steps = (int(step) for step in memory.heldout)
    return min(steps, key=lambda step: (badness(train, memory.heldout[str(step)]), step), default=None)


def told_metric(train: TrainConfig, value: float) -> str:
    """A value of `train.heldout_metric` in words."""
    if train.heldout_metric == "reverse_kl":
        return f"reverse KL {value:.5f}"
    return f"{train.heldout_metric} {value:.1%}"


def verdict(train: TrainConfig, step: int, memory: Memory) -> Result | None:
    """Whether, and how, training ends after `step` steps. Exit code 0, or `EXIT_STALE`."""
    n, best = len(memory.window), best_step(train, memory)
    full = n == train.stop_window
    told = memory.window[-1] if memory.window else {}
    means = {key: sum(gauges.get(key, 0.0) for gauges in memory.window) / n for key in told}
    reverse_kl, ess = means.get("reverse_kl", math.inf), means.get("ess", math.inf)
    over = f"mean of the last {n} step{'s' * (n != 1)}"
    code, kept, since = 0, "", 0
    if best is not None:
        since = sum(int(measured) > best for measured in memory.heldout)
        value = memory.heldout[str(best)]
        kept = f"; the result is step {best}, the best by held-out {told_metric(train, value)}"
    if full and reverse_kl < train.stop_reverse_kl:
        sentence = (
            f"round done after {step} steps: reverse KL on the cached rollouts is {reverse_kl:.5f} nats a token "
            f"({over}), below {train.stop_reverse_kl:g}; new rollouts are needed to learn more"
        )
    elif full and ess < train.stale_ess:
        code = EXIT_STALE
        sentence = (
            f"stale after {step} steps: the effective sample size is {ess:.3f} of the tokens ({over}), below "
            f"{train.stale_ess:g}; the student has left the one that sampled this cache, sample a new round from it"
        )
    elif since >= train.heldout_patience:
        sentence = f"plateau after {step} steps: no better in the last {since} measurements"
    elif step >= train.steps:
        where = "reverse KL on the cached rollouts"
        if "reverse_kl" not in means:
            where, reverse_kl = "the loss", means.get("loss", math.nan)
        sentence = f"max steps: {step} done; {where} is {reverse_kl:.5f} nats a token ({over})"
    else:
        return None
    return Result(step, sentence + kept, code)
