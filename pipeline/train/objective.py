"""Joins what the cache says of a micro-batch's tokens to what the student says now: the loss, and what is measured.

Shapes: T response positions of a micro-batch, n of a chunk of them, C columns of the vocabulary at each.

The columns are the cached candidates (the sampled token first) and, where the teacher's own top-k was stored, those
of its tokens that are not candidates already; everything else is one rest bucket. All losses read the same columns,
so `reverse_kl` is measured alike whichever of them trains.

Candidates that were drawn from the student are columns too, each once; a divergence is then estimated without bias
from the draws (`losses.over_draws`), and what is measured is still the bound over columns and rest.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import cache_schema as cs
from pipeline.config import RewardConfig, TrainConfig
from pipeline.forward.head import HeadLoss
from pipeline.train import losses
from pipeline.train.drift import drift_from_sums, drift_sums, merge_drift_sums
from pipeline.train.mixture import Teachers
from pipeline.train.replay import BEHAVIOUR, MicroBatch
from pipeline.train.reward import ADVANTAGE


@dataclass(frozen=True)
class Targets:
    """A micro-batch's cached columns on the training device; everything in nats, in packed order.

    Attributes:
        ids_TC: token ids, the sampled one first, -1 where a row has fewer columns.
        teacher_TC, teacher_rest_T: the teacher's log-probs of them and of everything else.
        old_T, teacher_T: log-probs of the sampled token by the student that sampled it and by the teacher.
        behaviour_T: its log-prob under the distribution that it was really sampled from, if that is corrected for.
        reward_T: the task reward's advantage, times its coefficient; None without one.
        log_draws_TC: see `log_draw_weights`; None where candidates are no draws.
        weights_T: what each token counts for, all copies of its rollout together.
        copies_T: how many those are.
    """

    ids_TC: Tensor
    teacher_TC: Tensor
    teacher_rest_T: Tensor
    old_T: Tensor
    teacher_T: Tensor
    behaviour_T: Tensor | None
    reward_T: Tensor | None
    log_draws_TC: Tensor | None
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
    def of(totals: Tensor) -> Sums:
        """Without drift."""
        empty = totals.new_zeros(0)
        return Sums(totals, drift_sums(empty, empty, empty))

    @staticmethod
    def zero(device: torch.device | str) -> Sums:
        return Sums.of(torch.zeros(5, dtype=torch.float64, device=device))

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
        teachers: what their scores hold. A teacher's own top-k, if stored, joins the candidates; candidates that it
            did not tell belong to the rest; where it told none, the sampled token is the only column.
        vocab_size: of the student's head. A teacher's vocabulary may be padded further; what it gives those ids is
            outside the columns and outside its rest, as it should be.
        draws: how many of the candidates were drawn from the student; 0: they are its likeliest.
        reward: the task's, whose advantages are then a column (`pipeline.train.reward`).
    """

    train: TrainConfig
    teachers: Teachers
    vocab_size: int
    draws: int = 0
    reward: RewardConfig = RewardConfig()  # noqa: RUF009  frozen

    @property
    def arrays(self) -> dict[str, tuple[str, ...]]:
        """The arrays to read from the cache, by scorer."""
        of_draws = ("candidate_logprobs",) if self._over_draws else ()
        return {cs.STUDENT: ("logprobs", "candidate_ids", *of_draws)} | self.teachers.arrays

    @property
    def _over_draws(self) -> bool:
        divergence = self.train.loss != "importance_sampling" and not self.teachers.only_sampled
        return divergence and self.draws > 0

    def targets(self, micro_batch: MicroBatch, device: torch.device | str) -> Targets:
        """The micro-batch's columns as tensors."""

        def column(name: str) -> Tensor:
            return torch.from_numpy(micro_batch.column(name)).to(device)

        candidates = column(f"{cs.STUDENT}/candidate_ids").long()
        told = self.teachers.told(column, candidates, micro_batch.prompts_T)
        weights_T = torch.from_numpy(micro_batch.weights).to(device)
        ignored_T = weights_T == 0

        def finite(values_T: Tensor) -> Tensor:
            # NaN (not scored) times a weight of 0 would still be a NaN gradient; columns without an id are not read.
            return values_T.masked_fill(ignored_T.view(-1, *[1] * (values_T.ndim - 1)), 0.0)

        behaviour_T = reward_T = log_draws_TC = None
        if self.reward.coefficient:
            reward_T = self.reward.coefficient * column(ADVANTAGE)
        if self.train.behaviour_correction:
            behaviour_T = finite(column(BEHAVIOUR))
        if self._over_draws:
            log_draws_TC = log_draw_weights(candidates, column(f"{cs.STUDENT}/candidate_logprobs"))
            log_draws_TC = F.pad(log_draws_TC, (0, told.ids_TC.shape[1] - candidates.shape[1]), value=-torch.inf)
        teacher_TC = finite(told.logprobs_TC)
        return Targets(
            ids_TC=told.ids_TC.masked_fill(told.ids_TC >= self.vocab_size, -1),
            teacher_TC=teacher_TC,
            teacher_rest_T=finite(told.rest_T),
            old_T=finite(column(f"{cs.STUDENT}/logprobs")),
            teacher_T=teacher_TC[:, 0],
            behaviour_T=behaviour_T,
            reward_T=reward_T,
            log_draws_TC=log_draws_TC,
            weights_T=weights_T,
            copies_T=torch.from_numpy(micro_batch.copies_T).to(device),
        )

    def loss(self, targets: Targets, n_tokens: float, rows: slice, student_nC: Tensor, rest_n: Tensor) -> Tensor:
        """A chunk's share of the mean over the global batch's `n_tokens`; a pure function for `chunked_head_loss`."""
        sampled_n, old_n, teacher_n = student_nC[:, 0], targets.old_T[rows], targets.teacher_T[rows]
        behaviour_n = None if targets.behaviour_T is None else targets.behaviour_T[rows]
        reward_n, teacher_weight = (
            None if targets.reward_T is None else targets.reward_T[rows],
            self.reward.teacher_weight,
        )
        if self.train.loss == "importance_sampling":
            reference_n = old_n if self.train.advantage == "cached" else sampled_n
            advantage_n = teacher_weight * losses.advantage(reference_n, teacher_n, self.train.advantage_clip)
            if reward_n is not None:
                advantage_n = advantage_n + reward_n
            loss_n = surrogate(self.train, sampled_n, old_n, advantage_n, behaviour_n)
            return losses.token_sum(loss_n, targets.weights_T[rows], n_tokens)
        if self.teachers.only_sampled:
            loss_n, _ = losses.k2(sampled_n, old_n, teacher_n)
        else:
            divergence, slope = _divergence(self.train)
            teacher_nC = targets.teacher_TC[rows]
            if targets.log_draws_TC is None:
                valid_nC = targets.ids_TC[rows] >= 0
                loss_n, _ = divergence(student_nC, rest_n, teacher_nC, targets.teacher_rest_T[rows], valid_nC)
            else:
                loss_n, _ = losses.over_draws(divergence, slope, student_nC, teacher_nC, targets.log_draws_TC[rows])
        loss_n = teacher_weight * loss_n
        if reward_n is not None:
            loss_n = loss_n + surrogate(self.train, sampled_n, old_n, reward_n, behaviour_n)
        return losses.token_sum(loss_n, targets.weights_T[rows], n_tokens)

    def measure(self, targets: Targets, result: HeadLoss) -> Sums:
        """What is reported of a micro-batch, from log-probs that the loss already made."""
        assert result.entropy_T is not None
        reverse_kl_T, _ = losses.reverse_kl(
            result.logprobs_TC, result.rest_logprob_T, targets.teacher_TC, targets.teacher_rest_T, targets.ids_TC >= 0
        )
        sampled_T, weights_T = result.logprobs_TC[:, 0], targets.weights_T.double()
        totals = [result.loss.detach().double(), weights_T.sum()]
        measured = (reverse_kl_T, sampled_T - targets.teacher_T, result.entropy_T)
        totals += [weighted_total(values_T, weights_T) for values_T in measured]
        every = (v.repeat_interleave(targets.copies_T) for v in (sampled_T, targets.old_T, targets.weights_T))
        return Sums(torch.stack(totals), drift_sums(*every))

    def metrics(self, sums: Sums) -> dict[str, float]:
        """What a step reports: means over the trained tokens, and how far the student is from the one that sampled
        them."""
        return sums.metrics()


def surrogate(
    train: TrainConfig, sampled_n: Tensor, old_n: Tensor, advantage_n: Tensor, behaviour_n: Tensor | None
) -> Tensor:
    """[n] the policy gradient's loss, with the corrections that `train` asks for."""
    loss_n, _ = losses.importance_sampling(
        sampled_n,
        old_n,
        advantage_n,
        behaviour_logprobs_T=behaviour_n,
        truncation=train.ratio_truncation,
        ppo_clip=train.ppo_clip,
    )
    return loss_n


def weighted_total(values_T: Tensor, weights_T: Tensor) -> Tensor:
    """fp64 []: sum of values times weights; a value of weight 0 may be NaN."""
    return torch.where(weights_T > 0, weights_T * values_T.double(), 0.0).sum()


def log_draw_weights(candidate_ids_TK: Tensor, logprobs_TK: Tensor) -> Tensor:
    """[T, K] log(n / (m p_old)) of every token that stands n times among the m = K - 1 draws, for `over_draws`.

    At the first column that holds the token, which may be the sampled one's (column 0, no draw of its own); -inf at
    the others.
    """
    ordered, order = candidate_ids_TK.sort(dim=1, stable=True)
    first = F.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0), value=True)
    group = first.cumsum(1) - 1
    times = torch.zeros_like(logprobs_TK).scatter_add_(1, group, (order > 0).to(logprobs_TK))
    times = torch.where(first, times.gather(1, group), 0.0)
    times_TK = torch.empty_like(times).scatter_(1, order, times)
    return (times_TK / (candidate_ids_TK.shape[1] - 1)).log() - logprobs_TK


def _divergence(train: TrainConfig) -> tuple[losses.Divergence, float]:
    """The divergence over columns that `train` names, and its slope where S and T agree (see `over_draws`)."""
    match train.loss:
        case "forward_kl":
            return losses.forward_kl, -1.0
        case "jsd":
            return functools.partial(losses.jsd, beta=train.jsd_beta), 0.0
        case "mixed_kl":
            forward = train.forward_weight
            return functools.partial(losses.mixed_kl, forward_weight=forward), 1 - 2 * forward
        case _:
            return losses.reverse_kl, 1.0
