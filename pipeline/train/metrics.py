"""What a step reports: sums over tokens, which add up over micro-batches and ranks, and the means made of them.

Drift compares the student with the one that sampled the cached tokens. It measures tokens only: prefixes that the
student would no longer reach look unchanged, which is why rounds are refreshed before drift gets large.

Shapes: T response positions of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.forward.loss_head import HeadLoss
from pipeline.train import losses

if TYPE_CHECKING:
    from pipeline.train.objective import Targets

TEACHER_METRICS = ("reverse_kl", "sampled_logprob_gap")
DRIFT_METRICS = ("ratio_mean", "ratio_std", "ratio_max", "ess", "chi_square")


@dataclass(frozen=True)
class MetricSums:
    """Sums over a micro-batch, on its device.

    Attributes:
        totals: fp64 [loss, weight, weighted reverse KL, weighted log p_S - log p_T of the sampled token, weighted
            entropy].
        drift: fp64, see `drift_sums`.
    """

    totals: Tensor
    drift: Tensor

    @staticmethod
    def zero(device: torch.device | str) -> MetricSums:
        nothing = torch.zeros(0, device=device)
        totals = torch.zeros(5, dtype=torch.float64, device=device)
        return MetricSums(totals, drift_sums(nothing, nothing, nothing))

    @staticmethod
    def merge(parts: Sequence[MetricSums]) -> MetricSums:
        return MetricSums(torch.stack([p.totals for p in parts]).sum(0), merge_drift_sums([p.drift for p in parts]))

    def metrics(self) -> dict[str, float]:
        """Means over the trained tokens, and the drift. `reverse_kl` is KL(S || T) over candidates + rest at the
        cached prefixes; `sampled_logprob_gap` is mean(log p_S - log p_T) of cached tokens, which is no KL once the
        student has moved."""
        loss, weight, reverse_kl, gap, entropy = self.totals.tolist()
        weight = max(weight, 1.0)
        return {
            "loss": loss,
            "reverse_kl": reverse_kl / weight,
            "sampled_logprob_gap": gap / weight,
            "entropy": entropy / weight,
            **drift_metrics(self.drift),
        }


def measure(targets: Targets, result: HeadLoss) -> MetricSums:
    """The sums of a micro-batch, from log-probs that the loss already computed; zeros for what it has no target."""
    assert result.entropy_T is not None
    sampled_T, weights_T = result.logprobs_TC[:, 0], targets.weights_T.double()
    reverse_kl = gap = weights_T.new_zeros(())
    if targets.teacher_TC is not None and targets.teacher_rest_T is not None:
        reverse_kl_T = losses.reverse_kl(
            result.logprobs_TC, result.rest_logprob_T, targets.teacher_TC, targets.teacher_rest_T, targets.ids_TC >= 0
        )
        reverse_kl = _weighted_sum(reverse_kl_T, weights_T)
        gap = _weighted_sum(sampled_T - targets.teacher_TC[:, 0], weights_T)
    entropy = _weighted_sum(result.entropy_T, weights_T)
    totals = torch.stack([result.loss.detach().double(), weights_T.sum(), reverse_kl, gap, entropy])
    if targets.old_T is None:
        return MetricSums(totals, MetricSums.zero(totals.device).drift)
    every_copy = torch.repeat_interleave(targets.copies_T)  # once: the host waits for its length
    return MetricSums(
        totals, drift_sums(sampled_T[every_copy], targets.old_T[every_copy], targets.weights_T[every_copy])
    )


def drift_sums(logprobs_T: Tensor, old_logprobs_T: Tensor, weights_T: Tensor) -> Tensor:
    """fp64 [token count, sum r, sum r^2, max r], r = p_S / p_old over positions of positive weight.

    The first three add up over micro-batches and ranks, the last is a maximum; see `merge_drift_sums`.
    """
    counted = weights_T > 0
    log_ratio = (logprobs_T.detach().double() - old_logprobs_T.detach().double()).masked_fill(~counted, -torch.inf)
    ratio = log_ratio.exp()
    largest = ratio.max() if ratio.numel() else ratio.new_zeros(())
    return torch.stack([counted.sum().double(), ratio.sum(), ratio.square().sum(), largest])


def merge_drift_sums(parts: Sequence[Tensor]) -> Tensor:
    """One `drift_sums` for the tokens of all parts."""
    stacked = torch.stack(list(parts))
    return torch.cat([stacked[:, :3].sum(0), stacked[:, 3:].amax(0)])


def drift_metrics(sums: Tensor) -> dict[str, float]:
    """Importance ratios r = p_S / p_old of the trained tokens, summarised from `drift_sums`.

    ratio_mean (1 in expectation on fresh tokens), ratio_std, ratio_max; ess, the effective sample size
    (sum r)^2 / (n sum r^2) as a fraction of n (Kong 1992); chi_square, mean (r - 1)^2, which estimates
    chi^2(S || old). Without tokens: the values of a student that has not moved.
    """
    count, total, squares, largest = sums.tolist()
    if count == 0:
        return dict(zip(DRIFT_METRICS, (1.0, 0.0, 1.0, 1.0, 0.0), strict=True))
    mean, mean_square = total / count, squares / count
    return {
        "ratio_mean": mean,
        "ratio_std": max(mean_square - mean * mean, 0.0) ** 0.5,
        "ratio_max": largest,
        "ess": total * total / (count * squares) if squares else 0.0,
        "chi_square": max(mean_square - 2.0 * mean + 1.0, 0.0),
    }


def _weighted_sum(values_T: Tensor, weights_T: Tensor) -> Tensor:
    """fp64 []: sum of values times weights; a value of weight 0 may be NaN."""
    return torch.where(weights_T > 0, weights_T * values_T.double(), 0.0).sum()
