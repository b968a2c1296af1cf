"""The losses against dense float64 forms, and their expectations by enumeration over a small vocabulary."""

import functools
import itertools
from itertools import pairwise
from typing import get_args

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.config import TrainConfig
from pipeline.train import losses
from pipeline.train.metrics import drift_metrics, drift_sums, merge_drift_sums

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
    loss = losses.reverse_kl(*split(student, C), *split(teacher, C))
    buckets = [torch.cat([part[0], part[1][:, None]], 1) for part in (split(student, C), split(teacher, C))]
    torch.testing.assert_close(loss, full_kl(*buckets))


def test_reverse_kl_is_a_lower_bound_that_grows_with_the_candidates_and_ends_exact() -> None:
    student, teacher = distributions(0), distributions(1)
    exact = full_kl(student, teacher)
    bounds = [losses.reverse_kl(*split(student, n), *split(teacher, n)) for n in range(V + 1)]
    assert (bounds[0].abs() < 1e-12).all()
    for smaller, larger in pairwise(bounds):
        assert (smaller <= larger + 1e-12).all()
    torch.testing.assert_close(bounds[V], exact)
    torch.testing.assert_close(bounds[V - 1], exact)  # a rest of one token is that token


def test_reverse_kl_gradient() -> None:
    teacher = split(distributions(1), C)
    scores = distributions(0).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: losses.reverse_kl(*split(z.log_softmax(1), C), *teacher), (scores,), fast_mode=True
    )
    same = scores.detach().log_softmax(1).requires_grad_()
    loss = losses.reverse_kl(*split(same.log_softmax(1), C), *split(same.detach(), C))
    assert torch.autograd.grad(loss.sum(), same)[0].abs().max() < 1e-12


def test_without_the_rest_bucket_the_candidates_mass_drains() -> None:
    """Why there is one: at student == teacher the candidates' terms alone still push their logits down."""
    scores = distributions(0).requires_grad_()
    student, teacher = scores.log_softmax(1), scores.detach().log_softmax(1)
    truncated = (student[:, :C].exp() * (student[:, :C] - teacher[:, :C])).sum()
    assert (torch.autograd.grad(truncated, scores)[0][:, :C] > 0).all()


def oracle(name: str, student: Tensor, teacher: Tensor, weight: float) -> Tensor:
    """The definitions over probabilities, term by term, in float64."""
    p, q = student.exp(), teacher.exp()
    m = weight * q + (1 - weight) * p
    zero = torch.zeros_like(p)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(a > 0, a * (a / b).log(), zero).sum(1)

    return {
        "reverse_kl": lambda: kl(p, q),
        "forward_kl": lambda: kl(q, p),
        "jsd": lambda: weight * kl(q, m) + (1 - weight) * kl(p, m),
        "mixed_kl": lambda: weight * kl(q, p) + (1 - weight) * kl(p, q),
    }[name]()


def divergence(name: str, weight: float = 0.3) -> tuple[losses.Divergence, float]:
    """A loss over columns, and its slope where student and teacher agree."""
    return losses.DIVERGENCES[name](TrainConfig(jsd_beta=weight, forward_weight=weight))


DIVERGENCES = tuple(losses.DIVERGENCES)


def contributions(name: str, student: Tensor, teacher: Tensor, weight: float) -> Tensor:
    """What every token adds to a divergence, in float64."""
    p, q = student.exp(), teacher.exp()
    m = weight * q + (1 - weight) * p
    return {
        "reverse_kl": p * (p / q).log(),
        "forward_kl": q * (q / p).log(),
        "jsd": weight * q * (q / m).log() + (1 - weight) * p * (p / m).log(),
        "mixed_kl": weight * q * (q / p).log() + (1 - weight) * p * (p / q).log(),
    }[name]


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("clip", [0.02, 0.1])
def test_entry_clip_bounds_each_contribution_and_stops_its_gradient(name: str, clip: float) -> None:
    scores, teacher = distributions(0).requires_grad_(), distributions(1)
    buckets = [torch.cat([part[0], part[1][:, None]], 1) for part in (split(scores, C), split(teacher, C))]
    terms = contributions(name, *buckets, 0.3)
    assert (terms > clip).any() and (terms < clip).any()
    kept = torch.where(terms < clip, terms, 0.0).sum(1)
    expected = kept + clip * (terms >= clip).sum(1)
    loss = divergence(name)[0](*split(scores, C), *split(teacher, C), entry_clip=clip)
    torch.testing.assert_close(loss, expected)
    (found,) = torch.autograd.grad(loss.sum(), scores, retain_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(kept.sum(), scores)[0])


def test_bounds_hide_no_infinity_and_no_nan() -> None:
    values = torch.tensor([-1.0, 2.0, torch.inf, torch.nan], requires_grad=True)
    bounded = losses.at_most(values, 1.0)
    torch.testing.assert_close(bounded, torch.tensor([-1.0, 1.0, torch.inf, torch.nan]), equal_nan=True)
    assert losses.at_most(values, None) is values
    assert torch.autograd.grad(bounded[:2].sum(), values)[0].tolist() == [1, 0, 0, 0]


def test_every_loss_of_a_recipe_has_an_implementation() -> None:
    others = {"importance_sampling", "cross_entropy"}
    assert {*get_args(TrainConfig.model_fields["loss"].annotation)} == {*DIVERGENCES} | others


@pytest.mark.parametrize("name", DIVERGENCES)
@hypothesis.settings(deadline=None)  # a busy machine is no failure
@given(
    seeds=st.tuples(st.integers(0, 999), st.integers(0, 999)), columns=st.integers(0, V), weight=st.floats(0.01, 0.99)
)
def test_divergences_are_their_definitions_over_candidates_and_rest(
    name: str, seeds: tuple[int, int], columns: int, weight: float
) -> None:
    student, teacher = distributions(seeds[0]), distributions(seeds[1])
    loss = divergence(name, weight)[0](*split(student, columns), *split(teacher, columns), None)
    buckets = [
        torch.cat([part[0], part[1][:, None]], 1) for part in (split(student, columns), split(teacher, columns))
    ]
    torch.testing.assert_close(loss, oracle(name, *buckets, weight), atol=1e-12, rtol=1e-9)
    assert (loss > -1e-12).all() and (loss <= oracle(name, student, teacher, weight) + 1e-9).all(), "a lower bound"


@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradients_of_divergences(name: str) -> None:
    loss_of, _ = divergence(name)
    teacher = split(distributions(1), C)
    scores = distributions(0).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: loss_of(*split(z.log_softmax(1), C), *teacher, None), (scores,), fast_mode=True
    )
    same = scores.detach().log_softmax(1).requires_grad_()
    loss = loss_of(*split(same.log_softmax(1), C), *split(same.detach(), C), None)
    assert loss.abs().max() < 1e-12 and torch.autograd.grad(loss.sum(), same)[0].abs().max() < 1e-12


def test_single_precision_is_as_good_as_its_inputs() -> None:
    """Error against float64 within that of rounding the log-probs, also where student and teacher hardly differ."""
    for name in DIVERGENCES:
        student = distributions(0, 200)
        for teacher in (distributions(1, 200), (student + 1e-2 * distributions(2, 200)).log_softmax(1)):
            exact = divergence(name)[0](*split(student, C), *split(teacher, C), None)
            halves = [part.float() for part in (*split(student, C), *split(teacher, C))]
            torch.testing.assert_close(divergence(name)[0](*halves, None).double(), exact, atol=3e-6, rtol=1e-5)


def test_the_limits_of_the_jsd_are_the_two_divergences() -> None:
    columns = *split(distributions(0), C), *split(distributions(1), C)
    forward, reverse = losses.forward_kl(*columns), losses.reverse_kl(*columns)
    torch.testing.assert_close(losses.jsd(*columns, beta=1e-7) / 1e-7, forward, rtol=1e-4, atol=0)
    torch.testing.assert_close(losses.jsd(*columns, beta=1 - 1e-7) / 1e-7, reverse, rtol=1e-4, atol=0)
    torch.testing.assert_close(losses.mixed_kl(*columns, forward_weight=1.0), forward)
    torch.testing.assert_close(losses.mixed_kl(*columns, forward_weight=0.0), reverse)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_padding_and_an_empty_rest_add_nothing(name: str) -> None:
    loss_of, _ = divergence(name)
    student, teacher = distributions(0), distributions(1)
    (student_C, student_rest), (teacher_C, teacher_rest) = split(student, C), split(teacher, C)
    expected = loss_of(student_C, student_rest, teacher_C, teacher_rest, None)
    padding = torch.full((T, 2), -torch.inf, dtype=torch.float64)
    leaf = torch.cat([student_C, padding], 1).requires_grad_()
    valid = torch.tensor([True] * C + [False] * 2).expand(T, C + 2)
    for filler in (-torch.inf, torch.nan, 0.0):
        padded = loss_of(leaf, student_rest, torch.cat([teacher_C, padding.fill_(filler)], 1), teacher_rest, valid)
        torch.testing.assert_close(padded, expected)
        gradient = torch.autograd.grad(padded.sum(), leaf)[0]
        assert torch.isfinite(gradient).all() and not gradient[:, C:].any()

    nothing = torch.full((T,), -torch.inf, dtype=torch.float64, requires_grad=True)
    full = loss_of(student, nothing, teacher, nothing.detach(), None)
    torch.testing.assert_close(full, oracle(name, student, teacher, 0.3))
    assert not torch.autograd.grad(full.sum(), nothing)[0].any()


#: Whether a divergence is infinite where the teacher, and where the student, has no mass and the other has some.
INFINITE = {
    "reverse_kl": (True, False),
    "forward_kl": (False, True),
    "jsd": (False, False),
    "mixed_kl": (True, True),
}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_an_impossible_token_is_infinite_where_it_should_be(name: str) -> None:
    """Mass on one side where the other has none: infinite where the definition is, else finite with its gradient."""
    loss_of, _ = divergence(name)
    without_teacher, without_student = INFINITE[name]
    full = distributions(0)
    some = full.clone()
    some[2, 1] = -torch.inf
    for student, teacher, infinite in ((full, some, without_teacher), (some, full, without_student)):
        leaf = student.clone().requires_grad_()
        loss = loss_of(*split(leaf, C), *split(teacher, C), None)
        assert torch.isfinite(loss).sum() == T - infinite and (loss[2] == torch.inf) == infinite
        if not infinite:
            torch.testing.assert_close(loss, oracle(name, *(bucketed(x) for x in (student, teacher)), 0.3))
            assert torch.isfinite(torch.autograd.grad(loss.sum(), leaf)[0]).all()
    leaf = some.clone().requires_grad_()
    neither = loss_of(*split(leaf, C), *split(some, C), None)
    assert neither.abs().max() < 1e-12 and torch.isfinite(torch.autograd.grad(neither.sum(), leaf)[0]).all()


def bucketed(logprobs: Tensor) -> Tensor:
    columns, rest = split(logprobs, C)
    return torch.cat([columns, rest[:, None]], 1)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_an_unscored_token_is_nan(name: str) -> None:
    student, (teacher_C, teacher_rest) = split(distributions(0), C), split(distributions(1), C)
    unscored = teacher_C.clone()
    unscored[4, 1] = torch.nan
    assert divergence(name)[0](*student, unscored, teacher_rest, None).isnan().nonzero().tolist() == [[4]]


# -- candidates drawn from the student ------------------------------------------------------------------------------


def every_draw(old: Tensor, m: int, loss_of_draws) -> Tensor:
    """Expectation over m independent draws from one row of log-probs, by enumeration of all V^m."""
    total = old.new_zeros(())
    for draws in itertools.product(range(len(old)), repeat=m):
        probability = torch.stack([old[v] for v in draws]).sum().exp()
        total = total + probability * loss_of_draws(draws)
    return total


def estimate(name: str, student: Tensor, teacher: Tensor, old: Tensor, token: int, draws: tuple[int, ...]) -> Tensor:
    """`over_draws` on the columns that a cache holds: the sampled token, then the draws, repeats as padding."""
    from pipeline.forward.head import without_repeats
    from pipeline.train.objective import log_draw_weights

    ids = torch.tensor([[token, *draws]])
    columns = without_repeats(ids)
    student_TC = student[None].gather(1, ids).masked_fill(columns < 0, -torch.inf)
    weights = log_draw_weights(ids, old[None].gather(1, ids))
    assert ((weights > -torch.inf) <= (columns >= 0)).all()
    return losses.over_draws(*divergence(name), student_TC, teacher[None].gather(1, ids), weights)[0]


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("stale", [False, True])
def test_draws_give_the_divergence_of_the_whole_vocabulary(name: str, stale: bool) -> None:
    """Value and gradient, repeats counted, whatever the sampled token; here C + rest would only bound it."""
    size, m = 4, 3
    z, teacher = distributions(0, 1)[0, :size].log_softmax(0).requires_grad_(), distributions(1, 1)[0, :size]
    teacher = teacher.log_softmax(0)
    old = (distributions(7, 1)[0, :size] if stale else z.detach()).log_softmax(0)
    exact = oracle(name, z.log_softmax(0)[None], teacher[None], 0.3)[0]
    for token in (0, 2):
        expected = every_draw(old, m, lambda d: estimate(name, z.log_softmax(0), teacher, old, token, d))  # noqa: B023
        torch.testing.assert_close(expected, exact)
        torch.testing.assert_close(
            torch.autograd.grad(expected, z, retain_graph=True), torch.autograd.grad(exact, z, retain_graph=True)
        )


@pytest.mark.parametrize("name", DIVERGENCES)
def test_no_draw_is_negative_or_pulls_where_both_agree(name: str) -> None:
    """The control variate: without it each draw would have a gradient at S = T, and only their mean none."""
    old, student, teacher = distributions(3)[0], distributions(0)[0], distributions(1)[0]
    for draws in itertools.product(range(V), repeat=2):
        assert estimate(name, student, teacher, old, 0, draws) > -1e-12
        z = student.clone().requires_grad_()
        at_agreement = estimate(name, z.log_softmax(0), student, old, 0, draws)
        assert at_agreement.abs() < 1e-12 and torch.autograd.grad(at_agreement, z)[0].abs().max() < 1e-12


@hypothesis.settings(deadline=None)  # a busy machine is no failure
@given(
    st.integers(2, 6).flatmap(lambda k: st.lists(st.lists(st.integers(0, 4), min_size=k, max_size=k), min_size=1)),
)
def test_draws_are_counted_at_the_first_column_of_their_token(rows: list[list[int]]) -> None:
    from pipeline.train.objective import log_draw_weights

    ids = torch.tensor(rows)
    logprobs = -(ids.double() + 1)
    weights = log_draw_weights(ids, logprobs)
    for t, row in enumerate(rows):
        for column, token in enumerate(row):
            n = row[1:].count(token) if column == row.index(token) else 0
            expected = torch.tensor(n / (len(row) - 1), dtype=torch.float64).log() - logprobs[t, column]
            torch.testing.assert_close(weights[t, column], expected)


# -- the sampled token ----------------------------------------------------------------------------------------------


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
        )

    expected = torch.autograd.grad(full_kl(scores.log_softmax(1), teacher).sum(), scores)[0]
    torch.testing.assert_close(expected_gradient(scores, old, loss_of_token), expected)


@pytest.mark.parametrize("below", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("stale", [False, True])
def test_a_constant_advantage_is_the_gradient_of_the_mass_of_unlikely_tokens(stale: bool, below: float) -> None:
    scores = distributions(0).requires_grad_()
    old = distributions(5) if stale else scores.detach().log_softmax(1)

    def loss_of_token(student: Tensor, token: Tensor) -> Tensor:
        old_T = old.gather(1, token[:, None])[:, 0]
        return losses.importance_sampling(student, old_T, losses.constant_advantage(old_T, below))

    unlikely = old.exp() < below
    assert unlikely.any() and (below == 1) == bool(unlikely.all())
    mass = (scores.log_softmax(1).exp() * unlikely).sum()
    torch.testing.assert_close(
        expected_gradient(scores, old, loss_of_token), torch.autograd.grad(mass, scores)[0], rtol=1e-7, atol=1e-12
    )


@pytest.mark.parametrize("stale", [False, True])
def test_k2_is_the_gradient_of_the_kl(stale: bool) -> None:
    scores, teacher = distributions(0).requires_grad_(), distributions(1)
    old = distributions(5) if stale else scores.detach().log_softmax(1)

    def loss_of_token(student: Tensor, token: Tensor) -> Tensor:
        return losses.k2(student, old.gather(1, token[:, None])[:, 0], teacher.gather(1, token[:, None])[:, 0])

    expected = torch.autograd.grad(full_kl(scores.log_softmax(1), teacher).sum(), scores)[0]
    torch.testing.assert_close(expected_gradient(scores, old, loss_of_token), expected)


@pytest.mark.parametrize("ppo_clip", [None, 0.999])
@pytest.mark.parametrize("temperature", [0.6, 1.5])
def test_behaviour_correction_undoes_the_sampling_temperature(temperature: float, ppo_clip: float | None) -> None:
    """Against p_old the expectation under a tempered sampler is another gradient; against what was really sampled
    from it is that of the KL, in one ratio or (where no clip binds) in two."""
    scores, teacher = distributions(0).requires_grad_(), distributions(1)
    near = (scores.detach() + 0.1 * distributions(5)).log_softmax(1)
    sampler = (near / temperature).log_softmax(1)
    exact = torch.autograd.grad(full_kl(scores.log_softmax(1), teacher).sum(), scores)[0]

    def found(behaviour: Tensor | None) -> Tensor:
        def loss_of_token(student: Tensor, token: Tensor) -> Tensor:
            def at_token(logprobs: Tensor) -> Tensor:
                return logprobs.gather(1, token[:, None])[:, 0]

            return losses.importance_sampling(
                student,
                at_token(near),
                losses.advantage(student, at_token(teacher), clip=torch.inf),
                behaviour_logprobs_T=None if behaviour is None else at_token(behaviour),
                ppo_clip=ppo_clip,
            )

        return expected_gradient(scores, sampler, loss_of_token)

    torch.testing.assert_close(found(sampler), exact)
    assert (found(None) - exact).norm() > 0.1 * exact.norm()


def test_a_truncated_ratio_keeps_the_gradient_of_its_bound() -> None:
    logprobs, old = torch.tensor([-1.0, -1.0, -90.0], requires_grad=True), torch.tensor([-1.5, -9.0, -0.1])
    gain = torch.tensor([2.0, -3.0, 1.0])
    loss = losses.importance_sampling(logprobs, old, gain, truncation=2.0)
    weight = torch.tensor([0.5, torch.inf, -89.9]).exp().clamp(max=2.0)
    torch.testing.assert_close(loss, -weight * gain)
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), logprobs)[0], -weight * gain)


@pytest.mark.parametrize("behaviour", [False, True])
def test_ppo_stops_only_what_has_gone_far_enough(behaviour: bool) -> None:
    """Table of the four corners of equation 7: ratio above or below the clip, advantage of either sign."""
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1], dtype=torch.float64)
    gain = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0], dtype=torch.float64)
    old = torch.full((5,), -2.0, dtype=torch.float64)
    logprobs = (old + ratio.log()).requires_grad_()
    sampled = old - torch.tensor([0.3, 0.3, 0.3, 0.3, 9.0]) if behaviour else None
    weight = torch.tensor([0.3, 0.3, 0.3, 0.3, 0.0], dtype=torch.float64).exp() if behaviour else torch.ones(5)
    weight[4] = 3.0 if behaviour else 1.0  # e^9, truncated
    loss = losses.importance_sampling(logprobs, old, gain, behaviour_logprobs_T=sampled, truncation=3.0, ppo_clip=0.2)
    used = torch.tensor([1.2, 1.5, 0.5, 0.8, 1.1], dtype=torch.float64)
    torch.testing.assert_close(loss, -weight * used * gain)
    moving = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), logprobs)[0], -weight * moving * ratio * gain)


def test_truncation_below_the_clip_does_not_switch_it_off() -> None:
    """Ratios 0.5, 1.05, 1.15 and 5, each with both signs of the advantage; the clip is at 0.8 and 1.2, c at 1.1."""
    old = torch.zeros(8, dtype=torch.float64)
    logprobs = torch.tensor([0.5, 1.05, 1.15, 5.0] * 2, dtype=torch.float64).log().requires_grad_()
    gain = torch.tensor([2.0] * 4 + [-2.0] * 4, dtype=torch.float64)
    loss = losses.importance_sampling(logprobs, old, gain, truncation=1.1, ppo_clip=0.2)
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    up, down = [0.5, 1.05, 1.1, 0.0], [0.0, 1.05, 1.1, 1.1]
    torch.testing.assert_close(gradient, -gain * torch.tensor(up + down, dtype=torch.float64))


def test_a_ratio_beyond_all_numbers_has_a_finite_gradient() -> None:
    logprobs = torch.zeros(2, requires_grad=True)
    loss = losses.importance_sampling(logprobs, torch.full((2,), -200.0), torch.ones(2), ppo_clip=0.2)
    assert torch.autograd.grad(loss.sum(), logprobs)[0].tolist() == [0.0, 0.0]


def test_gradients_of_the_sampled_token_losses() -> None:
    old, teacher, sampled = (distributions(seed)[:, 0] for seed in (5, 1, 6))
    gain = (teacher - old).clamp(-1, 1)
    for options in ({}, {"behaviour_logprobs_T": sampled}, {"ppo_clip": 0.2, "behaviour_logprobs_T": sampled}):
        loss_of = functools.partial(losses.importance_sampling, old_logprobs_T=old, advantage_T=gain, **options)
        leaf = (old + 0.5 * torch.linspace(-1, 1, T)).requires_grad_()
        assert torch.autograd.gradcheck(lambda x, loss_of=loss_of: loss_of(x), (leaf,))


def test_importance_sampling_is_minus_ratio_times_advantage() -> None:
    current, gain = torch.tensor([-1.0, -2.0], requires_grad=True), torch.tensor([0.5, -2.0])
    loss = losses.importance_sampling(current, torch.tensor([-1.0, -1.0]), gain)
    torch.testing.assert_close(loss, -torch.tensor([0.0, -1.0]).exp() * gain)


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
    loss = losses.reverse_kl(empty, none, empty, none, torch.zeros(0, C, dtype=torch.bool))
    losses.token_sum(loss, none, 0.0).backward()
    assert loss.shape == (0,) and losses.importance_sampling(none, none, none).shape == (0,)
    no_columns = torch.zeros(2, 0)
    assert losses.reverse_kl(no_columns, torch.zeros(2), no_columns, torch.zeros(2)).tolist() == [0, 0]


def test_drift_of_chosen_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    new, old = (torch.randn(50, generator=generator) for _ in range(2))
    weights = torch.rand(50, generator=generator) * (torch.arange(50) % 3 > 0)
    ratio = (new.double() - old.double()).exp()[weights > 0]
    gauge = drift_metrics(drift_sums(new, old, weights))
    assert gauge["ratio_mean"] == pytest.approx(float(ratio.mean()))
    assert gauge["ratio_std"] == pytest.approx(float(ratio.std(unbiased=False)))
    assert gauge["ratio_max"] == pytest.approx(float(ratio.max()))
    assert gauge["ess"] == pytest.approx(float(ratio.sum() ** 2 / (ratio.square().sum() * len(ratio))))
    assert gauge["chi_square"] == pytest.approx(float((ratio - 1).square().mean()))
    parts = [drift_sums(new[rows], old[rows], weights[rows]) for rows in (slice(0, 7), slice(7, 7), slice(7, 50))]
    assert drift_metrics(merge_drift_sums(parts)) == pytest.approx(gauge)


def test_drift_without_tokens_or_movement_is_none() -> None:
    still = {"ratio_mean": 1.0, "ratio_std": 0.0, "ratio_max": 1.0, "ess": 1.0, "chi_square": 0.0}
    assert drift_metrics(drift_sums(torch.zeros(0), torch.zeros(0), torch.zeros(0))) == still
    assert drift_metrics(drift_sums(torch.full((3,), torch.nan), torch.zeros(3), torch.zeros(3))) == still
    assert drift_metrics(drift_sums(torch.full((3,), -2.0), torch.full((3,), -2.0), torch.ones(3))) == still
