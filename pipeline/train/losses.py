"""Distillation losses: pure functions of log-probs, each returning `(loss_T, metrics)`.

Shapes: T positions, C candidate columns. `loss_T` carries the gradient; metrics are detached tensors [T]. Everything
is at temperature 1 and in nats. S is the current student, `old` the student that sampled the tokens (its scores by
the training forward), and p_T the teacher. No loss normalises: `token_sum` weights the positions and divides by the
token count of the *global* batch, so that neither micro-batches nor ranks change the gradient.

`mean(log p_S - log p_T)`, differentiated as it stands, is deliberately not among them. The teacher is a constant in
it, so its gradient is that of `mean(log p_S)`: on-policy zero in expectation, on cached tokens a push away from the
student's own samples (both shown in tests/test_losses.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Metrics = dict[str, Tensor]


def reverse_kl(
    student_logprobs_TC: Tensor,
    student_rest_T: Tensor,
    teacher_logprobs_TC: Tensor,
    teacher_rest_T: Tensor,
    valid_TC: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """KL(S || T) over a candidate set C and one bucket for everything else, at each position.

        sum over v in C of p_S(v) (log p_S(v) - log p_T(v)), plus p_S(rest) (log p_S(rest) - log p_T(rest))

    Differentiated directly, as the reverse KL of GKD (Agarwal et al. 2024, arXiv:2306.13649) is, on a coarser
    vocabulary: by the log-sum inequality a lower bound of the full KL, exact where C covers V. The rest bucket keeps
    the candidates' mass from draining, the known collapse of plain top-k reverse KL (arXiv:2605.11182).

    Args:
        student_logprobs_TC, teacher_logprobs_TC: at the same, distinct token ids.
        student_rest_T, teacher_rest_T: log-prob of everything outside C; -inf where nothing is.
        valid_TC: False at padding columns, whose values are then ignored.

    What the student gives no mass adds 0. Where the teacher gives none (-inf) and the student does, the divergence
    is infinite and so is `loss_T`, never hidden behind a floor; two softmax heads over one vocabulary cannot cause
    it. A NaN of the teacher (not scored) stays NaN.

    Metrics: reverse_kl; student_rest and teacher_rest, the probability outside C.
    """
    student = torch.cat([student_logprobs_TC, student_rest_T[:, None]], 1)
    teacher = torch.cat([teacher_logprobs_TC, teacher_rest_T[:, None]], 1).detach()
    ignored = student.detach() == -torch.inf
    if valid_TC is not None:
        ignored = ignored | F.pad(~valid_TC, (0, 1), value=False)
    # Masked before the arithmetic as well: 0 * inf in the branch not taken would still be a NaN gradient.
    student, teacher = student.masked_fill(ignored, 0.0), teacher.masked_fill(ignored, 0.0)
    loss_T = (student.exp() * (student - teacher)).masked_fill(ignored, 0.0).sum(1)
    return loss_T, {
        "reverse_kl": loss_T.detach(),
        "student_rest": student_rest_T.detach().exp(),
        "teacher_rest": teacher_rest_T.detach().exp(),
    }


def advantage(student_logprobs_T: Tensor, teacher_logprobs_T: Tensor, clip: float = 10.0) -> Tensor:
    """A_t = -(log p_S(x_t) - log p_T(x_t)), clipped to +-clip, without gradient: a reward with discount 0.

    With the current student's log-probs ("current") the policy gradient built on it is that of the per-token KL at
    cached prefixes; with the cached student's ("cached") this holds for one pass over a round only.
    """
    return (teacher_logprobs_T - student_logprobs_T).detach().clamp(-clip, clip)


def importance_sampling(logprobs_T: Tensor, old_logprobs_T: Tensor, advantage_T: Tensor) -> tuple[Tensor, Metrics]:
    """The policy gradient over tokens that an older student sampled, corrected by the importance ratio.

        -(exp(log p_S(x_t) - log p_old(x_t)) A_t)

    Thinking Machines, "On-Policy Distillation" (2025), with `advantage`. At A_t = -(log p_S(x_t) - log p_T(x_t)) its
    gradient's expectation over x_t ~ p_old is the gradient of KL(S || T) at that prefix.

    Metrics: importance_ratio, advantage.
    """
    ratio_T, advantage_T = torch.exp(logprobs_T - old_logprobs_T.detach()), advantage_T.detach()
    return -(ratio_T * advantage_T), {"importance_ratio": ratio_T.detach(), "advantage": advantage_T}


def token_sum(loss_T: Tensor, weights_T: Tensor, global_token_count: float) -> Tensor:
    """`sum(weights * loss) / global_token_count`: what these positions add to the mean over the global batch.

    Positions of weight 0 add exactly 0, whatever their loss (but keep it finite: a NaN gradient stays one); with no
    positions, or a count of 0, the result is 0.
    """
    weighted = torch.where(weights_T > 0, weights_T * loss_T, 0.0)
    return weighted.sum() / max(global_token_count, 1.0)
