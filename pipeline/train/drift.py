"""How far the student has moved from the one that sampled the cached tokens.

The gauge sees token drift only. Prefixes at which the student would not arrive any more look the same to it, which
is why rounds are refreshed, not trained until the gauge objects.
"""

from __future__ import annotations

import torch
from torch import Tensor


def drift_sums(logprobs_T: Tensor, old_logprobs_T: Tensor, weights_T: Tensor) -> Tensor:
    """[token count, sum r, sum r^2, max r] in fp64, r = p_S / p_old over positions of positive weight.

    The first three add up over micro-batches and ranks, the last is a maximum; see `merge_drift_sums`.
    """
    chosen = weights_T > 0
    log_ratio = (logprobs_T.detach().double() - old_logprobs_T.detach().double()).masked_fill(~chosen, -torch.inf)
    ratio = log_ratio.exp()
    largest = ratio.max() if ratio.numel() else ratio.new_zeros(())
    return torch.stack([chosen.sum().double(), ratio.sum(), ratio.square().sum(), largest])


def merge_drift_sums(parts: list[Tensor]) -> Tensor:
    """One `drift_sums` for the union of the parts' tokens."""
    stacked = torch.stack(parts)
    return torch.cat([stacked[:, :3].sum(0), stacked[:, 3:].amax(0)])


def drift_from_sums(sums: Tensor) -> dict[str, float]:
    """`drift`, from `drift_sums`. Without tokens: the values of a student that has not moved."""
    count, total, squares, largest = sums.tolist()
    if count == 0:
        return {"ratio_mean": 1.0, "ratio_std": 0.0, "ratio_max": 1.0, "ess": 1.0, "chi_square": 0.0}
    mean, mean_square = total / count, squares / count
    return {
        "ratio_mean": mean,
        "ratio_std": max(mean_square - mean * mean, 0.0) ** 0.5,
        "ratio_max": largest,
        "ess": total * total / (count * squares) if squares else 0.0,
        "chi_square": max(mean_square - 2.0 * mean + 1.0, 0.0),
    }


def drift(logprobs_T: Tensor, old_logprobs_T: Tensor, weights_T: Tensor) -> dict[str, float]:
    """Importance ratios r = p_S / p_old of the trained tokens (weight > 0), summarised.

    Returns:
        ratio_mean (1 in expectation on fresh tokens), ratio_std, ratio_max; ess, the effective sample size
        (sum r)^2 / (n sum r^2) as a fraction of n (Kong 1992); chi_square, mean (r - 1)^2, which estimates
        chi^2(S || old).
    """
    return drift_from_sums(drift_sums(logprobs_T, old_logprobs_T, weights_T))
