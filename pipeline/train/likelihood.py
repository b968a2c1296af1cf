"""Cross-entropy on the tokens of a round, whoever wrote them: supervised fine-tuning. No scores are needed.

    loss = -mean_t log p_S(x_t | x_<t)

over the tokens that count, as everywhere normalised once by their number in the global batch. Shapes: T response
positions of a micro-batch, n of a chunk of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.forward.loss_head import HeadLoss
from pipeline.train import losses
from pipeline.train.objective import Sums, weighted_total
from pipeline.train.replay import MicroBatch


@dataclass(frozen=True)
class Tokens:
    """A micro-batch's tokens on the training device: `ids_TC` i8 [T, 1], and what each counts for, `weights_T`."""

    ids_TC: Tensor
    weights_T: Tensor


@dataclass(frozen=True)
class CrossEntropy:
    """What is minimised: the student's own log-probs are all that it needs."""

    @property
    def arrays(self) -> dict[str, tuple[str, ...]]:
        return {}

    def targets(self, micro_batch: MicroBatch, device: torch.device | str) -> Tokens:
        ids_T = torch.from_numpy(micro_batch.token_ids).long()
        return Tokens(ids_T[:, None].to(device), torch.from_numpy(micro_batch.weights).to(device))

    def loss(self, targets: Tokens, n_tokens: float, rows: slice, student_nC: Tensor, rest_n: Tensor) -> Tensor:
        """A chunk's share of the mean over the global batch's `n_tokens`; a pure function for `chunked_head_loss`."""
        return losses.token_sum(-student_nC[:, 0], targets.weights_T[rows], n_tokens)

    def measure(self, targets: Tokens, result: HeadLoss) -> Sums:
        assert result.entropy_T is not None
        weights_T = targets.weights_T.double()
        zero = weights_T.new_zeros(())
        totals = [result.loss.detach().double(), weights_T.sum(), zero, zero]
        return Sums.of(torch.stack([*totals, weighted_total(result.entropy_T, weights_T)]))

    def metrics(self, sums: Sums) -> dict[str, float]:
        """Means over the trained tokens, in nats."""
        measured = sums.metrics()
        return {name: measured[name] for name in ("loss", "entropy")}
