"""When training ends, and what it must remember to tell."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.config import TrainConfig
from pipeline.train.run_directory import Result

EXIT_STALE = 3


@dataclass
class Memory:
    """What a run remembers beside weights and optimizer: the gauges of its last steps, and what training has cost."""

    window: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0


def verdict(train: TrainConfig, step: int, window: list[dict[str, float]]) -> Result | None:
    """Whether, and how, training ends after `step` steps; `window` holds the gauges of the last of them."""
    n = len(window)
    reverse_kl, ess = (sum(gauges[key] for gauges in window) / max(n, 1) for key in ("reverse_kl", "ess"))
    over = f"mean of the last {n} step{'s' * (n != 1)}"
    if n == train.stop_window and reverse_kl < train.stop_reverse_kl:
        return Result(
            step,
            f"round done after {step} steps: reverse KL on the cached rollouts is {reverse_kl:.5f} nats a token "
            f"({over}), below {train.stop_reverse_kl:g}; new rollouts are needed to learn more",
            0,
        )
    if n == train.stop_window and ess < train.stale_ess:
        return Result(
            step,
            f"stale after {step} steps: the effective sample size is {ess:.3f} of the tokens ({over}), below "
            f"{train.stale_ess:g}; the student has left the one that sampled this cache, sample a new round from it",
            EXIT_STALE,
        )
    if step >= train.steps:
        return Result(
            step,
            f"max steps: {step} done; reverse KL on the cached rollouts is {reverse_kl:.5f} nats a token ({over})",
            0,
        )
    return None
