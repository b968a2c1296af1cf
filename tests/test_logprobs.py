"""The head in row chunks: against a dense float64 oracle, with the naive fp32 form's own error as the yardstick."""

import math

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, Qwen2Config

from helpers.models import largest_output
from pipeline.errors import ModelError
from pipeline.forward.head import Head, logits, score_rows, without_repeats
from pipeline.forward.loss_head import chunked_head_loss
from pipeline.forward.packing import decoder_body
from pipeline.models.peak_memory import PeakBytes
from pipeline.train import losses

T, D, V, C = 23, 12, 97, 5

HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 4.0},
    "all": {"bias": True, "softcap": 4.0, "scale": 0.6},
}


def random_head(
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float64,
    bias: bool = False,
    softcap: float | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Head]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(T, D, dtype=torch.float64, generator=generator)
    weight = torch.randn(V, D, dtype=torch.float64, generator=generator)
    offset = torch.randn(V, dtype=torch.float64, generator=generator).to(dtype) if bias else None
    return hidden.to(dtype).requires_grad_(), Head(weight.to(dtype), offset, softcap, scale)


def random_columns(seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    columns = torch.rand(T, V, generator=generator).argsort(1)[:, :C]
    columns[3, 2:] = -1
    columns[5, 1] = -1
    columns[6] = -1  # nothing asked for: the rest is everything
    columns[7, :2] = torch.tensor([0, -1])  # padding is clamped to column 0, which is also a column here
    return columns


def dense_logits(hidden: Tensor, head: Head, dtype: torch.dtype = torch.float64) -> Tensor:
    z = hidden.to(dtype) @ head.weight_VD.to(dtype).t()
    z = (z if head.bias_V is None else z + head.bias_V.to(dtype)) * head.scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def dense_split(logprobs: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    valid = columns >= 0
    inside = torch.zeros(*logprobs.shape[:-1], logprobs.shape[1] + 1, dtype=torch.bool)
    inside.scatter_(1, torch.where(valid, columns, logprobs.shape[1]), True)
    at_columns = logprobs.gather(1, columns.clamp_min(0)).masked_fill(~valid, -torch.inf)
    return at_columns, logprobs.masked_fill(inside[:, :-1], -torch.inf).logsumexp(1)


def entropy_of(logprobs: Tensor) -> Tensor:
    return torch.special.entr(logprobs.exp()).sum(1)


def kl_to(teacher_logprobs: Tensor, columns: Tensor):
    """A loss over columns and rest, as the trainer's."""
    teacher_C, teacher_rest = dense_split(teacher_logprobs, columns)

    def loss_fn(rows: slice, logprobs: Tensor, rest: Tensor) -> Tensor:
        teacher = teacher_C[rows].to(rest.dtype), teacher_rest[rows].to(rest.dtype)
        loss = losses.reverse_kl(logprobs, rest, *teacher, columns[rows] >= 0)
        return loss.sum() / T

    return loss_fn


def teacher_logprobs(seed: int = 2) -> Tensor:
    return torch.randn(T, V, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).log_softmax(1)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("rows_per_chunk", [1, 7, 1024])
def test_scores_equal_the_dense_oracle(kind: str, rows_per_chunk: int) -> None:
    hidden, head = random_head(**HEADS[kind])
    tokens = random_columns()[:, 0].clamp_min(0)
    scores = score_rows(
        hidden, head, tokens, candidates=4, sampling_temperature=0.3, topk=6, rows_per_chunk=rows_per_chunk
    )
    z = dense_logits(hidden, head).detach()
    exact = z.log_softmax(1)
    torch.testing.assert_close(scores.logprobs, exact.gather(1, tokens[:, None])[:, 0])
    torch.testing.assert_close(scores.entropy, entropy_of(exact))
    torch.testing.assert_close(scores.sampling_logprobs, (z / 0.3).log_softmax(1).gather(1, tokens[:, None])[:, 0])

    others = exact.scatter(1, tokens[:, None], -torch.inf).topk(3, dim=1).indices
    assert torch.equal(scores.candidate_ids, torch.cat([tokens[:, None], others], 1))
    candidates, rest = dense_split(exact, scores.candidate_ids)
    torch.testing.assert_close(scores.candidate_logprobs, candidates)
    torch.testing.assert_close(scores.rest_logprob, rest)
    assert torch.equal(scores.topk_ids, exact.topk(6, dim=1).indices)
    torch.testing.assert_close(scores.topk_logprobs, exact.topk(6, dim=1).values)
    union = without_repeats(torch.cat([scores.candidate_ids, scores.topk_ids], 1))
    torch.testing.assert_close(scores.topk_rest_logprob, dense_split(exact, union)[1])


def test_scoring_given_candidates_is_the_teacher_at_the_students() -> None:
    hidden, head = random_head()
    tokens = torch.arange(T)
    ids = torch.stack([tokens, tokens + 3, tokens + 3, tokens + 7], 1)  # a repeat, as sampled candidates have
    scores = score_rows(hidden, head, tokens, candidate_ids_TK=ids, rows_per_chunk=5)
    exact = dense_logits(hidden, head).detach().log_softmax(1)
    assert torch.equal(scores.candidate_ids, ids)
    torch.testing.assert_close(scores.candidate_logprobs, exact.gather(1, ids))
    torch.testing.assert_close(scores.rest_logprob, dense_split(exact, without_repeats(ids))[1])
    plain = score_rows(hidden, head, tokens)
    assert plain.rest_logprob is None and plain.candidate_ids is None and plain.sampling_logprobs is None
    torch.testing.assert_close(plain.logprobs, scores.logprobs)


def dense(
    hidden: Tensor, head: Head, tokens: Tensor, columns: Tensor, loss_fn, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Log-probs of the tokens, entropies and the loss's gradient, by the naive form in one precision throughout."""
    inputs = hidden.detach().to(dtype).requires_grad_()
    logprobs = dense_logits(inputs, head, dtype).log_softmax(1)
    gradient = torch.autograd.grad(loss_fn(slice(0, T), *dense_split(logprobs, columns)), inputs)[0]
    logprobs = logprobs.detach()
    return logprobs.gather(1, tokens[:, None])[:, 0], entropy_of(logprobs), gradient


def test_fp32_error_is_within_the_naive_forms() -> None:
    squares = torch.zeros(2, 3, dtype=torch.float64)
    for seed in range(8):
        hidden, head = random_head(seed, dtype=torch.float32)
        columns, tokens = random_columns(seed), torch.arange(T)
        loss_fn = kl_to(teacher_logprobs(seed), columns)
        exact = dense(hidden, head, tokens, columns, loss_fn, torch.float64)
        naive = dense(hidden, head, tokens, columns, loss_fn, torch.float32)
        scores = score_rows(hidden, head, tokens, candidates=4)
        gradient = torch.autograd.grad(chunked_head_loss(hidden, head, columns, loss_fn, 7).loss, hidden)[0]
        for form, results in enumerate([(scores.logprobs, scores.entropy, gradient), naive]):
            squares[form] += torch.stack([(x - y).square().sum() for x, y in zip(results, exact, strict=True)])
    ours, theirs = squares.sqrt()
    assert (ours <= theirs).all()


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("rows_per_chunk", [1, 7, 1024])
def test_loss_and_gradient_equal_naive_autograd(kind: str, rows_per_chunk: int) -> None:
    hidden, head = random_head(**HEADS[kind])
    columns = random_columns()
    trained = [hidden, head.weight_VD.requires_grad_()]
    if head.bias_V is not None:
        trained.append(head.bias_V.requires_grad_())
    loss_fn = kl_to(teacher_logprobs(), columns)
    result = chunked_head_loss(hidden, head, columns, loss_fn, rows_per_chunk, entropy=True)
    exact = dense_logits(hidden, head).log_softmax(1)
    at_columns, rest = dense_split(exact, columns)
    expected = loss_fn(slice(0, T), at_columns, rest)
    torch.testing.assert_close(result.loss, expected)
    torch.testing.assert_close(result.logprobs_TC, at_columns.detach())
    torch.testing.assert_close(result.rest_logprob_T, rest.detach())
    torch.testing.assert_close(result.entropy_T, entropy_of(exact.detach()))
    assert not result.logprobs_TC.requires_grad and not result.rest_logprob_T.requires_grad
    ours = torch.autograd.grad(3.0 * result.loss, trained)
    for mine, theirs in zip(ours, torch.autograd.grad(3.0 * expected, trained), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("kind", HEADS)
def test_gradcheck(kind: str) -> None:
    hidden, head = random_head(**HEADS[kind])
    columns = random_columns()[:8]
    loss_fn = kl_to(teacher_logprobs(), random_columns())
    inputs = (hidden[:8].detach().requires_grad_(), head.weight_VD.requires_grad_())

    def loss(rows: Tensor, weight: Tensor) -> Tensor:
        part = Head(weight, head.bias_V, head.softcap, head.scale)
        return chunked_head_loss(rows, part, columns, loss_fn, 3).loss

    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)


def test_a_frozen_head_gets_no_gradient_and_no_grad_means_none() -> None:
    hidden, head = random_head()
    columns = random_columns()
    loss_fn = kl_to(teacher_logprobs(), columns)
    chunked_head_loss(hidden, head, columns, loss_fn, 7).loss.backward()
    assert hidden.grad is not None and head.weight_VD.grad is None
    with torch.no_grad():
        assert not chunked_head_loss(hidden, head, columns, loss_fn, 7).loss.requires_grad


def test_a_frozen_head_costs_no_buffer_of_its_size() -> None:
    """Few rows and a large head: its gradient alone would be 32 times the logits."""
    rows, vocab, size = 4, 2000, 128
    hidden, columns = torch.randn(rows, size, requires_grad=True), torch.arange(rows)[:, None]
    taken = {}
    for trained in (False, True):
        head = Head(torch.randn(vocab, size, requires_grad=trained))
        with PeakBytes() as peak:
            chunked_head_loss(hidden, head, columns, lambda rows, lp, rest: -lp.sum(), rows).loss.backward()
        taken[trained] = peak.nbytes
    assert taken[False] < 4 * 4 * rows * vocab < 4 * vocab * size < taken[True]


def test_losses_that_need_only_some_log_probs() -> None:
    hidden, head = random_head()
    tokens = torch.arange(T)[:, None]
    exact = dense_logits(hidden, head).log_softmax(1).gather(1, tokens).mean()
    ours = chunked_head_loss(hidden, head, tokens, lambda rows, logprobs, rest: logprobs.sum() / T, 4).loss
    torch.testing.assert_close(torch.autograd.grad(ours, hidden)[0], torch.autograd.grad(exact, hidden)[0])
    nothing = chunked_head_loss(hidden, head, tokens, lambda rows, logprobs, rest: logprobs.new_zeros(()), 4).loss
    assert not torch.autograd.grad(nothing, hidden)[0].any()


def test_no_rows_give_a_zero_loss_with_a_graph() -> None:
    hidden, head = random_head()
    result = chunked_head_loss(hidden[:0], head, random_columns()[:0], kl_to(teacher_logprobs(), random_columns()), 7)
    result.loss.backward()
    assert result.loss == 0 and hidden.grad is not None and not hidden.grad.any()
    scores = score_rows(hidden[:0], head, torch.arange(0), candidates=3, topk=2, sampling_temperature=1.0)
    assert scores.logprobs.shape == (0,) and scores.candidate_ids.shape == (0, 3) and scores.topk_ids.shape == (0, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_columns_that_cover_the_vocabulary_are_exact(dtype: torch.dtype) -> None:
    hidden, head = random_head(dtype=dtype)
    columns = torch.rand(T, V, generator=torch.Generator().manual_seed(3)).argsort(1)
    teacher = teacher_logprobs().to(dtype)
    result = chunked_head_loss(hidden, head, columns, kl_to(teacher, columns), 7, entropy=True)
    student = dense_logits(hidden, head, dtype).log_softmax(1)
    full = (student.exp() * (student - teacher)).sum() / T
    assert (result.rest_logprob_T == -torch.inf).all()
    torch.testing.assert_close(result.loss, full)
    torch.testing.assert_close(result.entropy_T, entropy_of(student.detach()))
    torch.testing.assert_close(torch.autograd.grad(result.loss, hidden)[0], torch.autograd.grad(full, hidden)[0])
    scores = score_rows(hidden, head, torch.arange(T), candidates=V)
    assert (scores.rest_logprob == -torch.inf).all() and torch.isfinite(scores.candidate_logprobs).all()


@pytest.fixture(scope="module")
def peaked() -> tuple[Tensor, Head, Tensor, Tensor]:
    """Rows over 151,936 tokens whose token 0 leaves 1e-1 ... 1e-9, and the exact log of what it leaves."""
    vocab = 151_936
    rests = torch.logspace(-1, -9, 17, dtype=torch.float64)
    weight = torch.zeros(vocab, 2)
    weight[1:, 1] = torch.randn(vocab - 1, generator=torch.Generator().manual_seed(0))
    weight[0, 0] = 1.0
    others = (2.0 * weight[1:, 1].double()).logsumexp(0)
    hidden = torch.stack([others + (1 - rests).log() - rests.log(), torch.full_like(rests, 2.0)], 1).float()
    exact = (hidden.double() @ weight.double().t()).log_softmax(1)
    return hidden.requires_grad_(), Head(weight), exact, exact[:, 1:].logsumexp(1)


def test_log_rest_is_right_where_log_of_one_minus_sum_is_not(peaked: tuple[Tensor, Head, Tensor, Tensor]) -> None:
    hidden, head, _, exact_rest = peaked
    tokens = torch.zeros(len(hidden), dtype=torch.int64)
    for rest in (
        score_rows(hidden, head, tokens, candidates=1).rest_logprob,
        chunked_head_loss(hidden, head, tokens[:, None], lambda rows, lp, rest: rest.sum(), 6).rest_logprob_T,
    ):
        assert (rest - exact_rest).abs().max() <= 1e-4
    naive = (1 - score_rows(hidden, head, tokens).logprobs.exp()).log()
    assert naive.isinf().any() and ((naive - exact_rest).abs() > 1e-4).sum() >= 5


def test_gradient_is_finite_and_right_where_the_rest_is_tiny(peaked: tuple[Tensor, Head, Tensor, Tensor]) -> None:
    hidden, head, _, _ = peaked
    columns = torch.arange(8).repeat(len(hidden), 1)
    teacher = torch.full((len(hidden), 9), 1 / 9).log()

    def loss_fn(rows: slice, logprobs: Tensor, rest: Tensor) -> Tensor:
        uniform = teacher[rows].to(rest.dtype)
        return losses.reverse_kl(logprobs, rest, uniform[:, :8], uniform[:, 8]).sum()

    ours = torch.autograd.grad(chunked_head_loss(hidden, head, columns, loss_fn, 6).loss, hidden)[0]
    exact_hidden = hidden.detach().double().requires_grad_()
    exact = dense_split((exact_hidden @ head.weight_VD.double().t()).log_softmax(1), columns)
    expected = torch.autograd.grad(loss_fn(slice(None), *exact), exact_hidden)[0]
    # What is left is the matmul's: fp32 sums over 151,936 terms.
    torch.testing.assert_close(ours.double(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_heads_accumulate_in_fp32(dtype: torch.dtype) -> None:
    hidden, head = random_head(dtype=dtype)
    columns = random_columns()
    exact_hidden = hidden.detach().double().requires_grad_()
    exact = dense_logits(exact_hidden, head).log_softmax(1)
    scores = score_rows(hidden, head, torch.arange(T), candidates=4)
    assert scores.logprobs.dtype == torch.float32
    torch.testing.assert_close(
        scores.logprobs.double(), exact.detach().gather(1, torch.arange(T)[:, None])[:, 0], rtol=1e-6, atol=1e-5
    )
    # A global count of millions of tokens: gradients of 1e-8, which fp16 itself cannot hold.
    tokens = 1e6
    kl = kl_to(teacher_logprobs(), columns)

    def loss_fn(rows: slice, logprobs: Tensor, rest: Tensor) -> Tensor:
        return kl(rows, logprobs, rest) / tokens

    fp32_hidden = hidden.detach().float().requires_grad_()
    ours = torch.autograd.grad(chunked_head_loss(fp32_hidden, head, columns, loss_fn, 7).loss, fp32_hidden)[0]
    expected = torch.autograd.grad(loss_fn(slice(0, T), *dense_split(exact, columns)), exact_hidden)[0]
    torch.testing.assert_close(ours.double(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_chunk_size_changes_rounding_only() -> None:
    hidden, head = random_head(dtype=torch.float32)
    columns = random_columns()
    loss_fn = kl_to(teacher_logprobs(), columns)
    whole = chunked_head_loss(hidden, head, columns, loss_fn, T)
    gradient = torch.autograd.grad(whole.loss, hidden)[0]
    for rows_per_chunk in (1, 4, 16):
        part = chunked_head_loss(hidden, head, columns, loss_fn, rows_per_chunk)
        torch.testing.assert_close(part.loss, whole.loss, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(torch.autograd.grad(part.loss, hidden)[0], gradient, rtol=1e-5, atol=1e-7)


def test_nothing_of_rows_times_vocabulary_is_allocated() -> None:
    rows, vocab, chunk = 64, 5000, 8
    hidden = torch.randn(rows, 4, requires_grad=True)
    head = Head(torch.randn(vocab, 4))
    tokens = torch.arange(rows)
    with largest_output() as scoring:
        score_rows(hidden, head, tokens, candidates=5, topk=5, sampling_temperature=0.5, rows_per_chunk=chunk)
    with largest_output() as training:
        result = chunked_head_loss(
            hidden, head, tokens[:, None], lambda rows, lp, rest: -lp.sum() + rest.sum(), chunk, entropy=True
        )
        result.loss.backward()
    assert scoring.numel == training.numel == chunk * vocab
    with largest_output() as naive:
        (hidden @ head.weight_VD.t()).log_softmax(1)
    assert naive.numel == rows * vocab


def test_student_equal_to_teacher_gives_no_advantage_and_no_gradient() -> None:
    hidden, head = random_head(dtype=torch.float32)
    tokens = torch.arange(T)
    student = score_rows(hidden, head, tokens, candidates=C, rows_per_chunk=9)
    columns = student.candidate_ids
    # Scored as a teacher, in other chunks, at the student's candidates.
    teacher = score_rows(hidden, head, tokens, candidate_ids_TK=columns, rows_per_chunk=1024)
    other = score_rows(hidden.flip(1), head, tokens, candidate_ids_TK=columns)
    assert losses.advantage(student.logprobs, teacher.logprobs).abs().max() <= 1e-5

    def gradient_norms(scores) -> tuple[float, float]:
        def kl(rows: slice, logprobs: Tensor, rest: Tensor) -> Tensor:
            loss = losses.reverse_kl(logprobs, rest, scores.candidate_logprobs[rows], scores.rest_logprob[rows])
            return losses.token_sum(loss, torch.ones_like(loss), T)

        def policy(rows: slice, logprobs: Tensor, rest: Tensor) -> Tensor:
            sampled = logprobs[:, 0]
            loss = losses.importance_sampling(
                sampled, student.logprobs[rows], losses.advantage(sampled, scores.logprobs[rows])
            )
            return losses.token_sum(loss, torch.ones_like(loss), T)

        runs = (chunked_head_loss(hidden, head, columns, loss_fn, 5).loss for loss_fn in (kl, policy))
        first, second = (float(torch.autograd.grad(loss, hidden)[0].norm()) for loss in runs)
        return first, second

    for same, normal in zip(gradient_norms(teacher), gradient_norms(other), strict=True):
        assert same <= 1e-6 * normal


def test_sampled_candidates_follow_the_softmax_and_the_key_alone() -> None:
    hidden, head = random_head()
    one_row = hidden[:1].expand(T, D)
    tokens = torch.arange(T)
    options = {"candidates": 3001, "candidate_kind": "sampled"}
    head_of_20 = Head(head.weight_VD[:20].repeat(200, 1))  # 4,000 tokens in 20 kinds, so that K <= V
    scores = score_rows(one_row, head_of_20, tokens, generator_key=(7, 0, 3), rows_per_chunk=4, **options)
    draws = scores.candidate_ids[:, 1:].reshape(-1) % 20
    assert torch.equal(scores.candidate_ids[:, 0], tokens)
    exact = (one_row[0].detach() @ head.weight_VD[:20].t()).softmax(0)
    observed = torch.bincount(draws, minlength=20) / draws.numel()
    assert (observed - exact).abs().max() <= 5 * 0.5 / math.sqrt(draws.numel())
    again = score_rows(one_row, head_of_20, tokens, generator_key=[7, 0, 3], rows_per_chunk=1000, **options)
    assert torch.equal(again.candidate_ids, scores.candidate_ids)
    other = score_rows(one_row, head_of_20, tokens, generator_key=(7, 0, 4), **options)
    assert not torch.equal(other.candidate_ids, scores.candidate_ids)
    distinct = dense_split((one_row @ head_of_20.weight_VD.t()).log_softmax(1), without_repeats(scores.candidate_ids))
    torch.testing.assert_close(scores.rest_logprob, distinct[1].detach())


def test_a_token_of_no_probability_is_never_drawn() -> None:
    weight = torch.zeros(10, 1)
    weight[3] = weight[8] = 1e4
    hidden = torch.ones(200, 1)
    scores = score_rows(
        hidden, Head(weight), torch.full((200,), 3), candidates=5, candidate_kind="sampled", generator_key=1
    )
    assert set(scores.candidate_ids[:, 1:].unique().tolist()) == {3, 8}


def test_sampling_at_temperature_zero_is_a_point_mass() -> None:
    hidden, head = random_head()
    best = dense_logits(hidden, head).argmax(1)
    for candidates in (0, 3):
        greedy = score_rows(hidden, head, best, candidates=candidates, sampling_temperature=0.0)
        assert (greedy.sampling_logprobs == 0).all()
        other = score_rows(hidden, head, (best + 1) % V, candidates=candidates, sampling_temperature=0.0)
        assert (other.sampling_logprobs == -torch.inf).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"candidates": V + 1}, "candidates: expected at most 97"),
        ({"topk": V + 1}, "topk: expected at most 97"),
        ({"candidates": 3, "candidate_kind": "nucleus"}, "candidate_kind"),
        ({"candidates": 3, "candidate_kind": "sampled"}, "generator_key"),
        ({"candidate_ids_TK": torch.full((T, 2), V)}, r"candidate id: expected 0\.\.96, .* got 97"),
        ({"candidate_ids_TK": torch.full((T, 2), -1)}, r"candidate id: expected 0\.\.96, .* got -1"),
    ],
)
def test_what_cannot_be_scored_is_refused(arguments: dict, message: str) -> None:
    hidden, head = random_head()
    with pytest.raises(ModelError, match=message):
        score_rows(hidden, head, torch.arange(T), **arguments)


def test_columns_are_checked() -> None:
    hidden, head = random_head()
    columns = torch.arange(T)[:, None].repeat(1, 2)
    with pytest.raises(AssertionError, match="repeated"):
        chunked_head_loss(hidden, head, columns, lambda rows, lp, rest: lp.sum(), 7)
    columns[0, 1] = V
    with pytest.raises(ModelError, match=r"column id: expected -1\.\.96"):
        chunked_head_loss(hidden, head, columns, lambda rows, lp, rest: lp.sum(), 7)


def test_without_repeats_keeps_the_first() -> None:
    ids = torch.tensor([[5, 3, 5, 5, 0], [1, 2, 3, 4, 5], [-1, -1, 2, 2, -1]])
    assert without_repeats(ids).tolist() == [[5, 3, -1, -1, 0], [1, 2, 3, 4, 5], [-1, -1, 2, -1, -1]]
    assert without_repeats(ids[:, :0]).shape == (3, 0)


def test_scores_become_the_records_arrays() -> None:
    hidden, head = random_head()
    arrays = score_rows(hidden, head, torch.arange(T), candidates=2).numpy()
    assert arrays["logprobs"].dtype == "float32" and arrays["candidate_ids"].dtype == "int32"
    assert arrays["topk_ids"] is None and arrays["rest_logprob"].shape == (T,)


SMALL = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.mark.parametrize(
    "config",
    [
        Qwen2Config(**SMALL, tie_word_embeddings=True),
        Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=2.0),
        GraniteConfig(**SMALL, logits_scaling=4.0),
        CohereConfig(**SMALL, logit_scale=0.25),
    ],
    ids=lambda config: config.model_type,
)
@torch.no_grad()
def test_head_of_a_model_makes_its_logits(config) -> None:
    model = AutoModelForCausalLM.from_config(config)
    ids = torch.arange(7)[None]
    hidden = decoder_body(model)(input_ids=ids, use_cache=False).last_hidden_state[0]
    head = Head.of(model)
    torch.testing.assert_close(logits(hidden, head, torch.empty(7, V)), model(input_ids=ids).logits[0])
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert Head.of(adapted).weight_VD is head.weight_VD


@pytest.mark.parametrize(
    "where", [{"target_modules": ["lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}]
)
def test_an_adapted_head_is_refused(where: dict) -> None:
    model = AutoModelForCausalLM.from_config(Qwen2Config(**SMALL))
    with pytest.raises(ModelError, match="lm_head: expected a plain linear layer"):
        Head.of(get_peft_model(model, LoraConfig(**where)))


def test_prompt_learning_is_refused() -> None:
    model = AutoModelForCausalLM.from_config(Qwen2Config(**SMALL))
    prompted = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ModelError, match="prompt learning"):
        decoder_body(prompted)


def test_padding_rows_of_the_head_are_no_candidates() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator) for n in (40, 64))
    weight[60:] *= 5  # padding that would be likely
    head, tokens = Head(weight), torch.randint(0, 64, (40,), generator=generator)
    for kind in ("topk", "sampled"):
        options = {"candidates": 9, "candidate_kind": kind, "generator_key": (1, 2)}
        free = score_rows(hidden, head, tokens, **options).candidate_ids  # type: ignore[arg-type]
        kept = score_rows(hidden, head, tokens, candidate_vocab=60, **options).candidate_ids  # type: ignore[arg-type]
        assert free is not None and kept is not None
        assert int(free[:, 1:].max()) >= 60 > int(kept[:, 1:].max()) and torch.equal(kept[:, 0], tokens)
    with pytest.raises(ModelError, match="expected at most 60"):
        score_rows(hidden, head, tokens, candidates=61, candidate_vocab=60)
