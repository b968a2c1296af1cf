"""What training minimises: which cached columns it needs, and the loss of every token.

    targets       MicroBatch -> Targets                        cached columns as tensors on the device
    token_loss    (Targets, student's log-probs) -> loss [n]   pure; `pipeline.train.losses` has the formulas

Shapes: T response positions of a micro-batch, n of a chunk of them, C columns of the vocabulary at each.

With teachers the columns are the cached candidates (the sampled token first) and, if the teacher's own top-k was
stored, those of its tokens that are not candidates already; everything else is one rest bucket. All losses share
these columns, so `reverse_kl` is measured alike whichever of them trains. Without teachers the sampled token is the
only column.

Candidates that were drawn from the student are columns too, each once; a divergence is then estimated without bias
from the draws (`losses.over_draws`), and the measured reverse KL is still the bound over columns and rest.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

import cache_schema as cs
from pipeline.config import RewardConfig, TrainConfig
from pipeline.train import losses
from pipeline.train.metrics import DRIFT_METRICS, TEACHER_METRICS
from pipeline.train.replay import BEHAVIOUR, MicroBatch
from pipeline.train.reward import ADVANTAGE
from pipeline.train.teachers import Teachers

Device = torch.device | str


@dataclass(frozen=True)
class Targets:
    """A micro-batch's cached columns on the training device; everything in nats, in packed order.

    Attributes:
        ids_TC: token ids, the sampled one first, -1 in rows with fewer columns.
        weights_T: what each token counts for, all copies of its rollout together.
        copies_T: the number of these copies.
        old_T: log-prob of the sampled token by the student that sampled it.
        behaviour_T: its log-prob under the distribution that it was really sampled from, to correct for that.
        reward_T: the task reward's advantage, times its coefficient.
        teacher_TC, teacher_rest_T: the teacher's log-probs of the columns and of everything else.
        log_draws_TC: see `log_draw_weights`; None unless the candidates are draws.
    """

    ids_TC: Tensor
    weights_T: Tensor
    copies_T: Tensor
    old_T: Tensor | None = None
    behaviour_T: Tensor | None = None
    reward_T: Tensor | None = None
    teacher_TC: Tensor | None = None
    teacher_rest_T: Tensor | None = None
    log_draws_TC: Tensor | None = None

    def __getitem__(self, rows: slice) -> Targets:
        """The targets of a chunk of positions."""
        chunk: dict[str, Any] = {}
        for field in fields(self):
            values = getattr(self, field.name)
            chunk[field.name] = None if values is None else values[rows]
        return Targets(**chunk)


@dataclass(frozen=True)
class CrossEntropy:
    """-log p_S(x_t | x_<t) of a round's own tokens: supervised fine-tuning. No scores are needed."""

    reported: ClassVar = ("loss", "entropy")
    arrays: ClassVar[dict[str, tuple[str, ...]]] = {}

    def targets(self, micro_batch: MicroBatch, device: Device) -> Targets:
        return _sampled_tokens(micro_batch, device)

    def token_loss(self, targets: Targets, student_nC: Tensor, rest_n: Tensor) -> Tensor:
        return -student_nC[:, 0]


@dataclass(frozen=True)
class PolicyGradient:
    """A policy gradient without a teacher: of rewards alone (REINFORCE and GRPO on cached rollouts), or a control.

        -(r_t A_t),   r_t = p_S(x_t) / p_old(x_t)

    with the advantages of `pipeline.train.reward` or `losses.constant_advantage`, and the truncation, PPO clip and
    behaviour correction of `losses.importance_sampling`.
    """

    train: TrainConfig
    reward: RewardConfig

    reported: ClassVar = ("loss", "entropy", *DRIFT_METRICS)
    arrays: ClassVar[dict[str, tuple[str, ...]]] = {cs.STUDENT: ("logprobs",)}

    def targets(self, micro_batch: MicroBatch, device: Device) -> Targets:
        return _policy_targets(self.train, self.reward, micro_batch, device)

    def token_loss(self, targets: Targets, student_nC: Tensor, rest_n: Tensor) -> Tensor:
        assert targets.old_T is not None
        advantage_n = targets.reward_T
        if self.train.advantage == "constant":
            advantage_n = losses.constant_advantage(targets.old_T, self.train.constant_below)
        assert advantage_n is not None
        return _policy_gradient(self.train, targets, student_nC[:, 0], advantage_n)


@dataclass(frozen=True)
class DistillationObjective:
    """A divergence from the teachers' scores, or a policy gradient on their advantage, with a task reward or without.

    Attributes:
        teachers: a teacher's own top-k, if stored, joins the candidates; candidates without a score of the teacher
            belong to the rest; if it scored none, the sampled token is the only column.
        vocab_size: of the student's head. A teacher's vocabulary may be padded further; the mass of those ids is
            outside the columns and outside the teacher's rest.
        draws: how many candidates were drawn from the student; 0 if they are its likeliest tokens.
    """

    train: TrainConfig
    teachers: Teachers
    vocab_size: int
    draws: int = 0
    reward: RewardConfig = RewardConfig()  # noqa: RUF009  frozen

    reported: ClassVar = ("loss", "entropy", *TEACHER_METRICS, *DRIFT_METRICS)

    @property
    def arrays(self) -> dict[str, tuple[str, ...]]:
        """The arrays to read from the cache, by scorer."""
        of_draws = ("candidate_logprobs",) if self._over_draws else ()
        return {cs.STUDENT: ("logprobs", "candidate_ids", *of_draws)} | self.teachers.arrays

    @property
    def _over_draws(self) -> bool:
        divergence = self.train.loss != "importance_sampling" and not self.teachers.only_sampled
        return divergence and self.draws > 0

    def targets(self, micro_batch: MicroBatch, device: Device) -> Targets:
        sampled = _policy_targets(self.train, self.reward, micro_batch, device)
        column = functools.partial(_column, micro_batch, device)
        candidates = column(f"{cs.STUDENT}/candidate_ids").long()
        teacher = self.teachers.columns(column, candidates, micro_batch.prompts_T)
        log_draws_TC = None
        if self._over_draws:
            log_draws_TC = log_draw_weights(candidates, column(f"{cs.STUDENT}/candidate_logprobs"))
            log_draws_TC = F.pad(log_draws_TC, (0, teacher.ids_TC.shape[1] - candidates.shape[1]), value=-torch.inf)
        return replace(
            sampled,
            ids_TC=teacher.ids_TC.masked_fill(teacher.ids_TC >= self.vocab_size, -1),
            teacher_TC=_of_counted(teacher.logprobs_TC, sampled.weights_T),
            teacher_rest_T=_of_counted(teacher.rest_T, sampled.weights_T),
            log_draws_TC=log_draws_TC,
        )

    def token_loss(self, targets: Targets, student_nC: Tensor, rest_n: Tensor) -> Tensor:
        assert targets.old_T is not None and targets.teacher_TC is not None
        sampled_n, teacher_n, teacher_weight = student_nC[:, 0], targets.teacher_TC[:, 0], self.reward.teacher_weight
        if self.train.loss == "importance_sampling":
            reference_n = targets.old_T if self.train.advantage == "cached" else sampled_n
            advantage_n = teacher_weight * losses.advantage(reference_n, teacher_n, self.train.advantage_clip)
            if targets.reward_T is not None:
                advantage_n = advantage_n + targets.reward_T
            return _policy_gradient(self.train, targets, sampled_n, advantage_n)
        if self.teachers.only_sampled:
            loss_n = losses.k2(sampled_n, targets.old_T, teacher_n)
        else:
            loss_n = self._divergence(targets, student_nC, rest_n)
        loss_n = teacher_weight * loss_n
        if targets.reward_T is not None:
            loss_n = loss_n + _policy_gradient(self.train, targets, sampled_n, targets.reward_T)
        return loss_n

    def _divergence(self, targets: Targets, student_nC: Tensor, rest_n: Tensor) -> Tensor:
        assert targets.teacher_TC is not None and targets.teacher_rest_T is not None
        divergence, slope = losses.DIVERGENCES[self.train.loss](self.train)
        if targets.log_draws_TC is not None:
            return losses.over_draws(divergence, slope, student_nC, targets.teacher_TC, targets.log_draws_TC)
        columns = student_nC, rest_n, targets.teacher_TC, targets.teacher_rest_T, targets.ids_TC >= 0
        return losses.at_most(divergence(*columns, entry_clip=self.train.entry_clip), self.train.token_clip)


Objective = DistillationObjective | PolicyGradient | CrossEntropy


def log_draw_weights(candidate_ids_TK: Tensor, logprobs_TK: Tensor) -> Tensor:
    """[T, K] log(n / (m p_old)) of every token that occurs n times among the m = K - 1 draws, for `over_draws`.

    At the first column that holds the token, which may be that of the sampled token (column 0, itself no draw); -inf
    at the others.
    """
    ordered, order = candidate_ids_TK.sort(dim=1, stable=True)
    first = F.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0), value=True)
    group = first.cumsum(1) - 1
    times = torch.zeros_like(logprobs_TK).scatter_add_(1, group, (order > 0).to(logprobs_TK))
    times = torch.where(first, times.gather(1, group), 0.0)
    times_TK = torch.empty_like(times).scatter_(1, order, times)
    return (times_TK / (candidate_ids_TK.shape[1] - 1)).log() - logprobs_TK


def _column(micro_batch: MicroBatch, device: Device, name: str) -> Tensor:
    return torch.from_numpy(micro_batch.column(name)).to(device)


def _of_counted(values_T: Tensor, weights_T: Tensor) -> Tensor:
    """The values with 0 at tokens of weight 0: an unscored NaN times that weight would still be a NaN gradient."""
    return values_T.masked_fill((weights_T == 0).view(-1, *[1] * (values_T.ndim - 1)), 0.0)


def _sampled_tokens(micro_batch: MicroBatch, device: Device) -> Targets:
    return Targets(
        ids_TC=torch.from_numpy(micro_batch.token_ids).long()[:, None].to(device),
        weights_T=torch.from_numpy(micro_batch.weights).to(device),
        copies_T=torch.from_numpy(micro_batch.copies_T).to(device),
    )


def _policy_targets(train: TrainConfig, reward: RewardConfig, micro_batch: MicroBatch, device: Device) -> Targets:
    """The sampled tokens with what a policy gradient needs of them."""
    targets = _sampled_tokens(micro_batch, device)

    def counted(name: str) -> Tensor:
        return _of_counted(_column(micro_batch, device, name), targets.weights_T)

    return replace(
        targets,
        old_T=counted(f"{cs.STUDENT}/logprobs"),
        behaviour_T=counted(BEHAVIOUR) if train.behaviour_correction else None,
        reward_T=reward.coefficient * counted(ADVANTAGE) if reward.coefficient else None,
    )


def _policy_gradient(train: TrainConfig, targets: Targets, sampled_n: Tensor, advantage_n: Tensor) -> Tensor:
    assert targets.old_T is not None
    return losses.importance_sampling(
        sampled_n,
        targets.old_T,
        advantage_n,
        behaviour_logprobs_T=targets.behaviour_T,
        truncation=train.ratio_truncation,
        ppo_clip=train.ppo_clip,
    )
