"""Joins what the cache says of a micro-batch's tokens to what the student says now: the loss, and what is measured.

Shapes: T response positions of a micro-batch, n of a chunk of them, C columns of the vocabulary at each.

The columns are the cached candidates (the sampled token first) and, where the teacher's own top-k was stored, those
of its tokens that are not candidates already; everything else is one rest bucket. Both losses read the same
columns, so `reverse_kl` is measured alike whichever of them trains.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import cache_schema as cs
from pipeline.config import TrainConfig
from pipeline.logprobs import HeadLoss, without_repeats
from pipeline.metrics import rest_of
from pipeline.train import losses
from pipeline.train.drift import drift_from_sums, drift_sums, merge_drift_sums
from pipeline.train.replay import MicroBatch


@dataclass(frozen=True)
class Targets:
    """A micro-batch's cached columns on the training device; everything in nats, in packed order.

    Attributes:
        ids_TC: token ids, the sampled one first, -1 where a row has fewer columns.
        teacher_TC, teacher_rest_T: the teacher's log-probs of them and of everything else.
        old_T, teacher_T: log-probs of the sampled token by the student that sampled it and by the teacher.
        weights_T: what each token counts for, all copies of its rollout together.
        copies_T: how many those are.
    """

    ids_TC: Tensor
    teacher_TC: Tensor
    teacher_rest_T: Tensor
    old_T: Tensor
    teacher_T: Tensor
    weights_T: Tensor
    copies_T: Tensor


@dataclass(frozen=True)
class Sums:
    """Totals over a micro-batch, on its device; they add up over micro-batches (and ranks) by `merge`.

    Attributes:
        totals: fp64 [loss, weight, weighted reverse KL, weighted log p_S - log p_T of the sampled token, weighted
        entropy]. drift: see `drift_sums`.
    """

    totals: Tensor
    drift: Tensor

    @staticmethod
    def zero(device: torch.device | str) -> Sums:
        empty = torch.zeros(0, dtype=torch.float64, device=device)
        return Sums(torch.zeros(5, dtype=torch.float64, device=device), drift_sums(empty, empty, empty))

    @staticmethod
    def merge(parts: list[Sums]) -> Sums:
        return Sums(torch.stack([p.totals for p in parts]).sum(0), merge_drift_sums([p.drift for p in parts]))

    def metrics(self) -> dict[str, float]:
        """Means over the trained tokens. `reverse_kl` is KL(S || T) over candidates + rest at the cached prefixes;
        `sampled_logprob_gap` is mean(log p_S - log p_T) of cached tokens, no KL once the student has moved."""
        loss, weight, reverse_kl, gap, entropy = self.totals.tolist()
        weight = max(weight, 1.0)
        return {
            "loss": loss,
            "reverse_kl": reverse_kl / weight,
            "sampled_logprob_gap": gap / weight,
            "entropy": entropy / weight,
            **drift_from_sums(self.drift),
        }


@dataclass(frozen=True)
class Objective:
    """What is minimised, over which columns.

    Attributes:
        teacher: name of the teacher's scores.
        scores: what those hold. The teacher's own top-k, if stored, joins the candidates; candidates that it did not
            tell belong to the rest; where it told none, the sampled token is the only column.
        vocab_size: of the student's head. A teacher's vocabulary may be padded further; what it gives those ids is
            outside the columns and outside its rest, as it should be.
    """

    train: TrainConfig
    teacher: str
    scores: cs.ScoresManifest
    vocab_size: int

    @property
    def arrays(self) -> dict[str, tuple[str, ...]]:
        """The arrays to read from the cache, by scorer."""
        unused = {"entropy", "rest_logprob"} if self.scores.topk else {"entropy"}
        told = tuple(spec.name for spec in self.scores.arrays() if spec.name not in unused)
        return {cs.STUDENT: ("logprobs", "candidate_ids"), self.teacher: told}

    def targets(self, micro_batch: MicroBatch, device: torch.device | str) -> Targets:
        """The micro-batch's columns as tensors."""

        def column(name: str) -> Tensor:
            return torch.from_numpy(micro_batch.column(name)).to(device)

        ids, sampled = column(f"{cs.STUDENT}/candidate_ids").long(), column(f"{self.teacher}/logprobs")
        if self.scores.candidates:
            teacher = column(f"{self.teacher}/candidate_logprobs")
            untold = teacher.isnan()
            untold[:, 0] = False  # the sampled token: where it is unscored, the row weighs nothing
            ids = ids.masked_fill(untold, -1)
        else:
            ids, teacher = ids[:, :1], sampled[:, None]
        if self.scores.topk:
            ids = torch.cat([ids, column(f"{self.teacher}/topk_ids").long()], 1)
            teacher = torch.cat([teacher, column(f"{self.teacher}/topk_logprobs")], 1)
            rest = column(f"{self.teacher}/topk_rest_logprob")
        elif self.scores.candidates:
            rest = column(f"{self.teacher}/rest_logprob")
        else:
            rest = torch.from_numpy(rest_of(sampled.cpu().numpy())).to(sampled)
        ids = without_repeats(ids)
        weights_T = torch.from_numpy(micro_batch.weights).to(device)
        ignored_T = weights_T == 0

        def finite(teacher_T: Tensor) -> Tensor:
            # NaN (not scored) times a weight of 0 would still be a NaN gradient; columns without an id are not read.
            return teacher_T.masked_fill(ignored_T.view(-1, *[1] * (teacher_T.ndim - 1)), 0.0)

        return Targets(
            ids_TC=ids.masked_fill(ids >= self.vocab_size, -1),
            teacher_TC=finite(teacher),
            teacher_rest_T=finite(rest),
            old_T=finite(column(f"{cs.STUDENT}/logprobs")),
            teacher_T=finite(sampled),
            weights_T=weights_T,
            copies_T=torch.from_numpy(micro_batch.copies_T).to(device),
        )

    def loss(self, targets: Targets, n_tokens: float, rows: slice, student_nC: Tensor, rest_n: Tensor) -> Tensor:
        """A chunk's share of the mean over the global batch's `n_tokens`; a pure function for `chunked_head_loss`."""
        teacher_n, old_n = targets.teacher_T[rows], targets.old_T[rows]
        if self.train.loss == "reverse_kl":
            loss_n, _ = losses.reverse_kl(
                student_nC, rest_n, targets.teacher_TC[rows], targets.teacher_rest_T[rows], targets.ids_TC[rows] >= 0
            )
        else:
            sampled_n = student_nC[:, 0]
            reference_n = old_n if self.train.advantage == "cached" else sampled_n
            advantage_n = losses.advantage(reference_n, teacher_n, self.train.advantage_clip)
            loss_n, _ = losses.importance_sampling(sampled_n, old_n, advantage_n)
        return losses.token_sum(loss_n, targets.weights_T[rows], n_tokens)

    def measure(self, targets: Targets, result: HeadLoss) -> Sums:
        """What is reported of a micro-batch, from log-probs that the loss already made."""
        assert result.entropy_T is not None
        reverse_kl_T, _ = losses.reverse_kl(
            result.logprobs_TC, result.rest_logprob_T, targets.teacher_TC, targets.teacher_rest_T, targets.ids_TC >= 0
        )
        sampled_T, weights_T = result.logprobs_TC[:, 0], targets.weights_T.double()

        def total(values_T: Tensor) -> Tensor:
            return torch.where(weights_T > 0, weights_T * values_T.double(), 0.0).sum()

        totals = [result.loss.detach().double(), weights_T.sum()]
        totals += [total(v) for v in (reverse_kl_T, sampled_T - targets.teacher_T, result.entropy_T)]
        every = (v.repeat_interleave(targets.copies_T) for v in (sampled_T, targets.old_T, targets.weights_T))
        return Sums(torch.stack(totals), drift_sums(*every))
