"""Distillation losses: pure functions from log-probs to the loss of every token.

Shapes: T positions, C candidate columns. Everything is at temperature 1 and in nats. S is the current student, `old`
the student that sampled the tokens (scored by the training forward pass), and p_T the teacher. No loss normalises:
`token_sum` weights the positions and divides by the token count of the *global* batch, so that neither micro-batches
nor ranks change the gradient.

`mean(log p_S - log p_T)`, differentiated directly, is deliberately not among them. The teacher is a constant in it,
so its gradient is that of `mean(log p_S)`: zero in expectation on policy, and on cached tokens a push away from the
student's own samples (both shown in tests/test_losses.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import TrainConfig

#: A function with the arguments of `reverse_kl`.
Divergence = Callable[..., Tensor]


def reverse_kl(
    student_logprobs_TC: Tensor,
    student_rest_T: Tensor,
    teacher_logprobs_TC: Tensor,
    teacher_rest_T: Tensor,
    valid_TC: Tensor | None = None,
    *,
    entry_clip: float | None = None,
) -> Tensor:
    """KL(S || T) over a candidate set C and one bucket for everything else, at each position.

        sum over v in C of p_S(v) (log p_S(v) - log p_T(v)), plus p_S(rest) (log p_S(rest) - log p_T(rest))

    Differentiated directly, as the reverse KL of GKD (Agarwal et al. 2024, arXiv:2306.13649) is, on a coarser
    vocabulary: by the log-sum inequality a lower bound of the full KL, exact where C covers V. The rest bucket keeps
    the candidates' mass from draining, the known collapse of plain top-k reverse KL (arXiv:2605.11182).

    Args:
        student_logprobs_TC, teacher_logprobs_TC: log-probs of the same, distinct token ids.
        student_rest_T, teacher_rest_T: log-prob of everything outside C; -inf if C covers V.
        valid_TC: False at padding columns; their values are ignored.
        entry_clip: a term of the sum counts as at most this and has no gradient above it, as in OPSD
            (arXiv:2601.18734): no divergence any more, but single entries cannot dominate.

    A token without student mass adds 0. If the teacher gives none (-inf) and the student does, the divergence is
    infinite and so is the result, never hidden behind a floor; two softmax heads over one vocabulary cannot cause
    it. A NaN of the teacher (not scored) stays NaN.
    """
    student, teacher, ignored = _buckets(
        student_logprobs_TC, student_rest_T, teacher_logprobs_TC, teacher_rest_T, valid_TC
    )
    return _sum(_kl_terms(student, teacher, ignored), entry_clip)


def forward_kl(
    student_logprobs_TC: Tensor,
    student_rest_T: Tensor,
    teacher_logprobs_TC: Tensor,
    teacher_rest_T: Tensor,
    valid_TC: Tensor | None = None,
    *,
    entry_clip: float | None = None,
) -> Tensor:
    """KL(T || S) over C and the rest; arguments, bound and infinities as in `reverse_kl`, with S and T exchanged.

        sum over v in C and rest of p_T(v) (log p_T(v) - log p_S(v))

    The forward KL of GKD (arXiv:2306.13649); with C the teacher's own likeliest tokens, top-k
    distillation with a tail bucket. It covers the teacher's mass, so C should hold it.
    """
    student, teacher, ignored = _buckets(
        student_logprobs_TC, student_rest_T, teacher_logprobs_TC, teacher_rest_T, valid_TC
    )
    return _sum(_kl_terms(teacher, student, ignored), entry_clip)


def jsd(
    student_logprobs_TC: Tensor,
    student_rest_T: Tensor,
    teacher_logprobs_TC: Tensor,
    teacher_rest_T: Tensor,
    valid_TC: Tensor | None = None,
    *,
    beta: float,
    entry_clip: float | None = None,
) -> Tensor:
    """The generalised Jensen-Shannon divergence of GKD (arXiv:2306.13649) over C and the rest.

        beta KL(T || M) + (1 - beta) KL(S || M),   M = beta T + (1 - beta) S,   0 < beta < 1

    Divided by beta it tends to KL(T || S) as beta falls to 0, divided by 1 - beta to KL(S || T) as it rises to 1.
    At most log 2, even without mass on one side, so it is never infinite; a NaN of the teacher stays NaN.
    Arguments as in `reverse_kl`.
    """
    student, teacher, ignored = _buckets(
        student_logprobs_TC, student_rest_T, teacher_logprobs_TC, teacher_rest_T, valid_TC
    )
    # Neither has mass: nothing to add, and logaddexp(-inf, -inf) has a NaN gradient.
    ignored = ignored | ((student.detach() == -torch.inf) & (teacher == -torch.inf))
    student, teacher = student.masked_fill(ignored, 0.0), teacher.masked_fill(ignored, 0.0)
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    terms = beta * _kl_terms(teacher, mixture, ignored) + (1 - beta) * _kl_terms(student, mixture, ignored)
    return _sum(terms, entry_clip)


def mixed_kl(
    student_logprobs_TC: Tensor,
    student_rest_T: Tensor,
    teacher_logprobs_TC: Tensor,
    teacher_rest_T: Tensor,
    valid_TC: Tensor | None = None,
    *,
    forward_weight: float,
    entry_clip: float | None = None,
) -> Tensor:
    """forward_weight KL(T || S) + (1 - forward_weight) KL(S || T) over C and the rest.

    At 1/2 half of Jeffreys' symmetric divergence. Arguments as in `reverse_kl`.
    """
    student, teacher, ignored = _buckets(
        student_logprobs_TC, student_rest_T, teacher_logprobs_TC, teacher_rest_T, valid_TC
    )
    # A term of weight 0 is left out: times an infinity it would be NaN.
    terms = torch.zeros_like(student)
    if forward_weight > 0:
        terms = terms + forward_weight * _kl_terms(teacher, student, ignored)
    if forward_weight < 1:
        terms = terms + (1 - forward_weight) * _kl_terms(student, teacher, ignored)
    return _sum(terms, entry_clip)


#: Divergences by their name in `train.loss`: the function with its settings, and the slope f'(1) for `over_draws`.
DIVERGENCES: dict[str, Callable[[TrainConfig], tuple[Divergence, float]]] = {
    "reverse_kl": lambda train: (reverse_kl, 1.0),
    "forward_kl": lambda train: (forward_kl, -1.0),
    "jsd": lambda train: (partial(jsd, beta=train.jsd_beta), 0.0),
    "mixed_kl": lambda train: (partial(mixed_kl, forward_weight=train.forward_weight), 1 - 2 * train.forward_weight),
}


def over_draws(
    divergence: Divergence,
    slope: float,
    student_logprobs_TC: Tensor,
    teacher_logprobs_TC: Tensor,
    log_weights_TC: Tensor,
) -> Tensor:
    """Unbiased estimate of a divergence over the whole vocabulary from m tokens v_i that were drawn from p_old.

        D = sum over v of d(p_S(v), p_T(v))
        estimate: 1/m sum over i of [ d(p_S(v_i), p_T(v_i)) + slope (p_T(v_i) - p_S(v_i)) ] / p_old(v_i)

    Importance sampling with p_old as the proposal: value and gradient have those of D as their expectation over the
    draws, repeats counted, however far S has moved, while candidates + rest over a fixed set bound D from below. The
    second term sums to 0 over v and is a control variate. With `slope` = f'(1), where D = sum of p_T f(p_S / p_T), a
    draw at which S and T agree has no gradient, and no estimate is below 0 for `reverse_kl` (slope 1: then it is
    w log(p_S / p_T) - w + p_T / p_old with w = p_S / p_old, which at S = old is the k3 of Schulman 2020,
    "Approximating KL divergence"), `forward_kl` (slope -1) and `jsd` (slope 0).

    Args:
        divergence, slope: of `DIVERGENCES`.
        log_weights_TC: log(n / (m p_old)) of each distinct token that was drawn n times; -inf at other columns. The
            response's own token is a column, but no draw.
    """
    drawn_TC = log_weights_TC > -torch.inf
    # All of these divergences are homogeneous, so weights on the terms are weights on both measures.
    student = torch.where(drawn_TC, student_logprobs_TC + log_weights_TC, -torch.inf)
    teacher = torch.where(drawn_TC, teacher_logprobs_TC.detach() + log_weights_TC, -torch.inf)
    no_rest_T = student.new_full((len(student),), -torch.inf)
    loss_T = divergence(student, no_rest_T, teacher, no_rest_T, drawn_TC)
    return loss_T + slope * (teacher.exp().sum(1) - student.exp().sum(1))


def k2(logprobs_T: Tensor, old_logprobs_T: Tensor, teacher_logprobs_T: Tensor) -> Tensor:
    """Reverse KL from the sampled token alone, differentiated directly.

        sg(r) (log p_S(x_t) - log p_T(x_t))^2 / 2,   r = p_S(x_t) / p_old(x_t),   sg: without gradient

    The k2 of Schulman (2020, "Approximating KL divergence"), whose gradient, unlike that of k1 and k3, is that of
    KL(S || T) in expectation over x_t ~ p_S; the ratio makes that x_t ~ p_old. It is the gradient of
    `importance_sampling` with the current advantage, unclipped. Its value is no KL.
    """
    ratio_T = torch.exp(logprobs_T - old_logprobs_T).detach()
    return 0.5 * ratio_T * (logprobs_T - teacher_logprobs_T.detach()).square()


def advantage(student_logprobs_T: Tensor, teacher_logprobs_T: Tensor, clip: float = 10.0) -> Tensor:
    """A_t = -(log p_S(x_t) - log p_T(x_t)), clipped to +-clip, without gradient: a reward with discount 0.

    With the current student's log-probs ("current") the policy gradient built on it is that of the per-token KL at
    cached prefixes; with the cached student's ("cached") this holds for one pass over a round only.
    """
    return (teacher_logprobs_T - student_logprobs_T).detach().clamp(-clip, clip)


def constant_advantage(old_logprobs_T: Tensor, below: float) -> Tensor:
    """-1 at tokens with p_old(x_t) < below, 0 at the others: a control without a teacher (arXiv:2608.31046).

    With `importance_sampling` the gradient's expectation over x_t ~ p_old is that of the mass that S gives to all
    tokens with p_old < below. Which tokens these are does not change while a round is replayed.
    """
    return -(old_logprobs_T < math.log(below)).to(old_logprobs_T)


def importance_sampling(
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    advantage_T: Tensor,
    *,
    behaviour_logprobs_T: Tensor | None = None,
    truncation: float | None = None,
    ppo_clip: float | None = None,
) -> Tensor:
    """The policy gradient over tokens that an older student sampled, corrected by the importance ratio.

        -(r A_t),   r = p_S(x_t) / p_old(x_t)

    Thinking Machines, "On-Policy Distillation" (2025), with `advantage`. At A_t = -(log p_S(x_t) - log p_T(x_t)) its
    gradient's expectation over x_t ~ p_old is the gradient of KL(S || T) at that prefix.

    Args:
        behaviour_logprobs_T: log-probs under the distribution b that the tokens were really sampled from (another
            temperature, another engine's rounding). The ratio is then r = p_S / b, with the same expectation over
            x_t ~ b.
        truncation: c, and ratios count as min(r, c): truncated importance sampling (Ionides 2008, "Truncated
            importance sampling"). A larger ratio still has a gradient, that of a token of ratio c; biased towards 0,
            and bounded.
        ppo_clip: epsilon of PPO (Schulman et al. 2017, arXiv:1707.06347, equation 7):

                -min(r A_t, clip(r, 1 - epsilon, 1 + epsilon) A_t)

            so a token that has moved further than that in the right direction has no gradient. `truncation` bounds
            the ratios that are left: it never takes a token back inside the clip. With `behaviour_logprobs_T`
            the two roles of the old student come apart (decoupled objective, Hilton et al. 2021, arXiv:2110.00641):
            r = p_S / p_old is clipped, and the whole weighted by p_old / b, without gradient and also
            truncated at c.
    """
    advantage_T, old_logprobs_T, weight_T = advantage_T.detach(), old_logprobs_T.detach(), None
    if behaviour_logprobs_T is not None:
        behaviour_logprobs_T = behaviour_logprobs_T.detach()
        if ppo_clip is None:
            old_logprobs_T = behaviour_logprobs_T
        else:
            weight_T = _ratio(old_logprobs_T - behaviour_logprobs_T, truncation)
    log_ratio_T = logprobs_T - old_logprobs_T
    if ppo_clip is not None:
        log_ratio_T = _clipped(log_ratio_T, advantage_T, ppo_clip)
    gain_T = _ratio(log_ratio_T, truncation) * advantage_T
    return -gain_T if weight_T is None else -(weight_T * gain_T)


def token_sum(loss_T: Tensor, weights_T: Tensor, global_token_count: float) -> Tensor:
    """`sum(weights * loss) / global_token_count`: what these positions add to the mean over the global batch.

    Positions of weight 0 add exactly 0, even if their loss is infinite or NaN (its gradient must be finite: a NaN
    gradient times 0 is NaN). With no positions, or a count of 0, the result is 0.
    """
    weighted = torch.where(weights_T > 0, weights_T * loss_T, 0.0)
    return weighted.sum() / max(global_token_count, 1.0)


def _buckets(
    student_TC: Tensor, student_rest_T: Tensor, teacher_TC: Tensor, teacher_rest_T: Tensor, valid_TC: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Columns and rest side by side: the student's, the teacher's (a constant), and a mask of those to ignore."""
    student = torch.cat([student_TC, student_rest_T[:, None]], 1)
    teacher = torch.cat([teacher_TC, teacher_rest_T[:, None]], 1).detach()
    if valid_TC is None:
        return student, teacher, torch.zeros_like(student, dtype=torch.bool)
    return student, teacher, F.pad(~valid_TC, (0, 1), value=False)


def _kl_terms(p: Tensor, q: Tensor, ignored: Tensor) -> Tensor:
    """p (log p - log q) from log-probs, 0 where p is 0 or `ignored`."""
    ignored = ignored | (p.detach() == -torch.inf)
    # Masked before the arithmetic as well: 0 * inf in the branch not taken would still be a NaN gradient.
    p, q = p.masked_fill(ignored, 0.0), q.masked_fill(ignored, 0.0)
    return (p.exp() * (p - q)).masked_fill(ignored, 0.0)


def at_most(values: Tensor, bound: float | None) -> Tensor:
    """Values above the bound are the bound, without gradient. An infinite one stays: it ends training."""
    if bound is None:
        return values
    return torch.where(values.detach() == torch.inf, values, values.clamp(max=bound))


def _sum(terms_TC: Tensor, entry_clip: float | None) -> Tensor:
    return at_most(terms_TC, entry_clip).sum(1)


def _clipped(log_ratio_T: Tensor, advantage_T: Tensor, epsilon: float) -> Tensor:
    """log r; past the clip on the side that the advantage pushes to, the constant bound."""
    low, high = math.log1p(-epsilon), math.log1p(epsilon)
    is_past_T = torch.where(advantage_T > 0, log_ratio_T > high, (advantage_T < 0) & (log_ratio_T < low))
    return torch.where(is_past_T, log_ratio_T.detach().clamp(low, high), log_ratio_T)


def _ratio(log_ratio_T: Tensor, truncation: float | None) -> Tensor:
    """exp(log_ratio), at most `truncation`; the gradient is always that value times the gradient of the log."""
    if truncation is not None:
        log_ratio_T = log_ratio_T + (log_ratio_T.clamp(max=math.log(truncation)) - log_ratio_T).detach()
    return log_ratio_T.exp()
