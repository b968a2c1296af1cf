"""Rewards alone, without a teacher: REINFORCE and GRPO on cached rollouts, as the baseline that it is.

    loss = -mean_t( r_t A_t ),   r_t = p_S(x_t) / p_old(x_t)

with the advantages of `pipeline.train.reward`, and the truncation, PPO's clip and correction of
`pipeline.train.losses.importance_sampling`. Shapes: T response positions of a micro-batch, n of a chunk of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import cache_schema as cs
from pipeline.config import RewardConfig, TrainConfig
from pipeline.forward.head import HeadLoss
from pipeline.train import losses
from pipeline.train.drift import drift_sums
from pipeline.train.objective import Sums, surrogate, weighted_total
from pipeline.train.replay import BEHAVIOUR, MicroBatch
from pipeline.train.reward import ADVANTAGE


@dataclass(frozen=True)
class Sampled:
    """A micro-batch's sampled tokens on the training device, in nats: `ids_TC` i8 [T, 1]; the others fp32 [T]."""

    ids_TC: Tensor
    old_T: Tensor
    behaviour_T: Tensor | None
    advantage_T: Tensor
    weights_T: Tensor
    copies_T: Tensor


@dataclass(frozen=True)
class PolicyGradient:
    """What is minimised: of the cache it needs the student's own log-probs."""

    train: TrainConfig
    reward: RewardConfig

    @property
    def arrays(self) -> dict[str, tuple[str, ...]]:
        return {cs.STUDENT: ("logprobs",)}

    def targets(self, micro_batch: MicroBatch, device: torch.device | str) -> Sampled:
        def on_device(name: str) -> Tensor:
            return torch.from_numpy(micro_batch.column(name)).to(device).nan_to_num()  # NaN where nothing counts

        behaviour_T = None
        if self.train.behaviour_correction:
            behaviour_T = on_device(BEHAVIOUR)
        return Sampled(
            ids_TC=torch.from_numpy(micro_batch.token_ids).long()[:, None].to(device),
            old_T=on_device(f"{cs.STUDENT}/logprobs"),
            behaviour_T=behaviour_T,
            advantage_T=self.reward.coefficient * on_device(ADVANTAGE),
            weights_T=torch.from_numpy(micro_batch.weights).to(device),
            copies_T=torch.from_numpy(micro_batch.copies_T).to(device),
        )

    def loss(self, targets: Sampled, n_tokens: float, rows: slice, student_nC: Tensor, rest_n: Tensor) -> Tensor:
        """A chunk's share of the mean over the global batch's `n_tokens`; a pure function for `chunked_head_loss`."""
        behaviour_n = None if targets.behaviour_T is None else targets.behaviour_T[rows]
        loss_n = surrogate(self.train, student_nC[:, 0], targets.old_T[rows], targets.advantage_T[rows], behaviour_n)
        return losses.token_sum(loss_n, targets.weights_T[rows], n_tokens)

    def measure(self, targets: Sampled, result: HeadLoss) -> Sums:
        assert result.entropy_T is not None
        weights_T = targets.weights_T.double()
        zero = weights_T.new_zeros(())
        totals = [result.loss.detach().double(), weights_T.sum(), zero, zero]
        totals.append(weighted_total(result.entropy_T, weights_T))
        every = (
            v.repeat_interleave(targets.copies_T)
            for v in (result.logprobs_TC[:, 0], targets.old_T, targets.weights_T)
        )
        return Sums(torch.stack(totals), drift_sums(*every))

    def metrics(self, sums: Sums) -> dict[str, float]:
        """Means over the trained tokens, and how far the student is from the one that sampled them."""
        of_teachers = ("reverse_kl", "sampled_logprob_gap")
        return {name: value for name, value in sums.metrics().items() if name not in of_teachers}
