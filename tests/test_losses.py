"""The losses against dense float64 forms, and their expectations by enumeration over a small vocabulary."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from pipeline.train import losses
from pipeline.train.drift import drift, drift_from_sums, drift_sums, merge_drift_sums

T, V, C = 9, 12, 4


def distributions(seed: int, rows: int = T) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, V, dtype=torch.float64, generator=generator).mul_(2).log_softmax(1)


def split(logprobs: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """The first columns, and the rest."""
    return logprobs[:, :columns], logprobs[:, columns:].logsumexp(1)


def full_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return (student.exp() * (student - teacher)).sum(1)


def test_reverse_kl_is_the_kl_of_candidates_and_rest() -> None:
    student, teacher = distributions(0), distributions(1)
    loss, metrics = losses.reverse_kl(*split(student, C), *split(teacher, C))
    buckets = [torch.cat([part[0], part[1][:, None]], 1) for part in (split(student, C), split(teacher, C))]
    torch.testing.assert_close(loss, full_kl(*buckets))
    torch.testing.assert_close(metrics["student_rest"], student[:, C:].exp().sum(1))
    torch.testing.assert_close(metrics["teacher_rest"], teacher[:, C:].exp().sum(1))
    assert torch.equal(metrics["reverse_kl"], loss)


def test_reverse_kl_is_a_lower_bound_that_grows_with_the_candidates_and_ends_exact() -> None:
    student, teacher = distributions(0), distributions(1)
    exact = full_kl(student, teacher)
    bounds = [losses.reverse_kl(*split(student, n), *split(teacher, n))[0] for n in range(V + 1)]
    assert (bounds[0].abs() < 1e-12).all()
    for smaller, larger in pairwise(bounds):
        assert (smaller <= larger + 1e-12).all()
    torch.testing.assert_close(bounds[V], exact)
    torch.testing.assert_close(bounds[V - 1], exact)  # a rest of one token is that token


def test_reverse_kl_gradient() -> None:
    teacher = split(distributions(1), C)
    scores = distributions(0).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: losses.reverse_kl(*split(z.log_softmax(1), C), *teacher)[0], (scores,), fast_mode=True
    )
    same = scores.detach().log_softmax(1).requires_grad_()
    loss, _ = losses.reverse_kl(*split(same.log_softmax(1), C), *split(same.detach(), C))
    assert torch.autograd.grad(loss.sum(), same)[0].abs().max() < 1e-12


def test_without_the_rest_bucket_the_candidates_mass_drains() -> None:
    """Why there is one: at student == teacher the candidates' terms alone still push their logits down."""
    scores = distributions(0).requires_grad_()
    student, teacher = scores.log_softmax(1), scores.detach().log_softmax(1)
    truncated = (student[:, :C].exp() * (student[:, :C] - teacher[:, :C])).sum()
    assert (torch.autograd.grad(truncated, scores)[0][:, :C] > 0).all()


def test_padding_and_an_empty_rest_add_nothing() -> None:
    student, teacher = distributions(0), distributions(1)
    (student_C, student_rest), (teacher_C, teacher_rest) = split(student, C), split(teacher, C)
    expected, _ = losses.reverse_kl(student_C, student_rest, teacher_C, teacher_rest)
    padding = torch.full((T, 2), -torch.inf, dtype=torch.float64)
    leaf = torch.cat([student_C, padding], 1).requires_grad_()
    valid = torch.tensor([True] * C + [False] * 2).expand(T, C + 2)
    for filler in (-torch.inf, torch.nan, 0.0):
        padded, _ = losses.reverse_kl(
            leaf, student_rest, torch.cat([teacher_C, padding.fill_(filler)], 1), teacher_rest, valid
        )
        torch.testing.assert_close(padded, expected)
        gradient = torch.autograd.grad(padded.sum(), leaf)[0]
        assert torch.isfinite(gradient).all() and not gradient[:, C:].any()

    nothing = torch.full((T,), -torch.inf, dtype=torch.float64, requires_grad=True)
    full, _ = losses.reverse_kl(student, nothing, teacher, nothing.detach())
    torch.testing.assert_close(full, full_kl(student, teacher))
    assert not torch.autograd.grad(full.sum(), nothing)[0].any()


def test_an_impossible_token_is_infinite_and_an_unscored_one_nan() -> None:
    student, (teacher_C, teacher_rest) = split(distributions(0), C), split(distributions(1), C)
    impossible = teacher_rest.clone()
    impossible[2] = -torch.inf
    loss, _ = losses.reverse_kl(*student, teacher_C, impossible)
    assert loss[2] == torch.inf and torch.isfinite(loss).sum() == T - 1
    unscored = teacher_C.clone()
    unscored[4, 1] = torch.nan
    assert losses.reverse_kl(*student, unscored, teacher_rest)[0].isnan().nonzero().tolist() == [[4]]


def test_advantage_is_clipped_and_carries_no_gradient() -> None:
    student = torch.tensor([-1.0, -1.0, -40.0, -0.1], requires_grad=True)
    teacher = torch.tensor([-1.5, -30.0, -0.1, torch.nan])
    result = losses.advantage(student, teacher)
    torch.testing.assert_close(result, torch.tensor([-0.5, -10.0, 10.0, torch.nan]), equal_nan=True)
    assert not result.requires_grad
    assert losses.advantage(student, teacher, clip=0.25)[0] == -0.25


def expected_gradient(scores: Tensor, sampler_logprobs: Tensor, loss_of_token) -> Tensor:
    """Gradient of the expected loss: every token of every row, weighted by the probability that it is sampled."""
    student = scores.log_softmax(1)
    total = scores.new_zeros(())
    for token in range(V):
        chosen = torch.full((len(scores),), token)
        loss = loss_of_token(student.gather(1, chosen[:, None])[:, 0], chosen)
        total = total + (sampler_logprobs.exp()[:, token] * loss).sum()
    return torch.autograd.grad(total, scores)[0]


@pytest.mark.parametrize("stale", [False, True])
def test_importance_sampling_with_the_current_advantage_is_the_gradient_of_the_kl(stale: bool) -> None:
    scores, teacher = distributions(0).requires_grad_(), distributions(1)
    old = distributions(5) if stale else scores.detach().log_softmax(1)

    def loss_of_token(student: Tensor, token: Tensor) -> Tensor:
        def at_token(logprobs: Tensor) -> Tensor:
            return logprobs.gather(1, token[:, None])[:, 0]

        return losses.importance_sampling(
            student, at_token(old), losses.advantage(student, at_token(teacher), clip=torch.inf)
        )[0]

    expected = torch.autograd.grad(full_kl(scores.log_softmax(1), teacher).sum(), scores)[0]
    torch.testing.assert_close(expected_gradient(scores, old, loss_of_token), expected)


def test_importance_sampling_reports_ratio_and_advantage() -> None:
    current = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss, metrics = losses.importance_sampling(current, torch.tensor([-1.0, -1.0]), torch.tensor([0.5, -2.0]))
    torch.testing.assert_close(metrics["importance_ratio"], torch.tensor([0.0, -1.0]).exp())
    torch.testing.assert_close(loss, -metrics["importance_ratio"] * torch.tensor([0.5, -2.0]))
    assert not metrics["importance_ratio"].requires_grad


def test_the_naive_mean_difference_is_blind_to_the_teacher() -> None:
    """`mean(log p_S - log p_T)`, differentiated as it stands: why it is not offered."""
    scores = distributions(0).requires_grad_()

    def naive(teacher: Tensor):
        return lambda student, token: student - teacher.gather(1, token[:, None])[:, 0]

    on_policy = scores.detach().log_softmax(1)
    assert expected_gradient(scores, on_policy, naive(distributions(1))).abs().max() < 1e-12

    cached = distributions(5)
    gradients = [expected_gradient(scores, cached, naive(distributions(seed))) for seed in (1, 2)]
    torch.testing.assert_close(gradients[0], gradients[1])
    # Descent pushes the student away from the cached samples: their mean log-prob falls.
    moved = (scores - 0.1 * gradients[0]).log_softmax(1)
    assert ((cached.exp() * (moved - on_policy)).sum(1) < 0).all()


def test_token_sum_does_not_depend_on_micro_batches() -> None:
    loss = torch.randn(T, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([1.0, 0, 1, 0.5, 1, 1, 0, 0, 1], dtype=torch.float64)
    whole = losses.token_sum(loss, weights, float(weights.sum()))
    torch.testing.assert_close(whole, (loss * weights).sum() / weights.sum())
    for bounds in ([0, 2, 9], [0, 1, 1, 8, 9]):
        parts = [slice(*ends) for ends in pairwise(bounds)]
        total = sum(losses.token_sum(loss[rows], weights[rows], float(weights.sum())) for rows in parts)
        torch.testing.assert_close(total, whole)


def test_what_is_not_trained_cannot_spoil_the_sum() -> None:
    loss = torch.tensor([1.0, torch.nan, torch.inf], requires_grad=True)
    total = losses.token_sum(loss, torch.tensor([1.0, 0.0, 0.0]), 2.0)
    assert total == 0.5 and torch.autograd.grad(total, loss)[0].tolist() == [0.5, 0.0, 0.0]
    assert losses.token_sum(loss, torch.zeros(3), 0.0) == 0
    assert losses.token_sum(loss[:0], torch.zeros(0), 0.0) == 0


def test_empty_rows_survive() -> None:
    empty, none = torch.zeros(0, C, requires_grad=True), torch.zeros(0)
    loss, _ = losses.reverse_kl(empty, none, empty, none, torch.zeros(0, C, dtype=torch.bool))
    losses.token_sum(loss, none, 0.0).backward()
    assert loss.shape == (0,) and losses.importance_sampling(none, none, none)[0].shape == (0,)
    assert losses.reverse_kl(torch.zeros(2, 0), torch.zeros(2), torch.zeros(2, 0), torch.zeros(2))[0].tolist() == [
        0,
        0,
    ]


def test_drift_of_chosen_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    new, old = (torch.randn(50, generator=generator) for _ in range(2))
    weights = torch.rand(50, generator=generator) * (torch.arange(50) % 3 > 0)
    ratio = (new.double() - old.double()).exp()[weights > 0]
    gauge = drift(new, old, weights)
    assert gauge["ratio_mean"] == pytest.approx(float(ratio.mean()))
    assert gauge["ratio_std"] == pytest.approx(float(ratio.std(unbiased=False)))
    assert gauge["ratio_max"] == pytest.approx(float(ratio.max()))
    assert gauge["ess"] == pytest.approx(float(ratio.sum() ** 2 / (ratio.square().sum() * len(ratio))))
    assert gauge["chi_square"] == pytest.approx(float((ratio - 1).square().mean()))
    parts = [drift_sums(new[rows], old[rows], weights[rows]) for rows in (slice(0, 7), slice(7, 7), slice(7, 50))]
    assert drift_from_sums(merge_drift_sums(parts)) == pytest.approx(gauge)


def test_drift_without_tokens_or_movement_is_none() -> None:
    still = {"ratio_mean": 1.0, "ratio_std": 0.0, "ratio_max": 1.0, "ess": 1.0, "chi_square": 0.0}
    assert drift(torch.zeros(0), torch.zeros(0), torch.zeros(0)) == still
    assert drift(torch.full((3,), torch.nan), torch.zeros(3), torch.zeros(3)) == still
    assert drift(torch.full((3,), -2.0), torch.full((3,), -2.0), torch.ones(3)) == still
