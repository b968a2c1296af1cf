"""From hidden rows to log-probs without a [T, V] tensor; `pipeline.forward.loss_head` makes losses of the same parts.

Shapes: T rows (response positions), n rows of one chunk, V vocabulary, D hidden, C columns asked for at a row,
K candidates. Log-probs are natural, in fp32 (fp64 for fp64 weights); entropies are in nats.

Every row is split into the C columns that are asked for and the *rest*, everything else:

    rest_lse = logsumexp of the logits outside C     (under its own maximum, so a rest of 1e-9 keeps its digits)
    lse      = logsumexp(logits at C, rest_lse)
    log p_C  = logits at C - lse,    log p_rest = rest_lse - lse     (both <= 0 by construction)

`log(1 - sum p_C)` is never taken: in fp32 it is noise, or NaN, once the rest is below 1e-7. Where C covers V the
rest is empty and its log-prob exactly -inf. Work on [n, C] is in fp64: it costs nothing beside [n, V] in fp32, and an
error in a row's own constants would be shared by all its V gradients instead of averaging out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import ModelError

# Config fields by which architectures multiply (1) or divide (-1) their logits: Cohere, Falcon-H1, Granite, Inkling.
_LOGIT_SCALES = {"logit_scale": 1, "lm_head_multiplier": 1, "logits_scaling": -1, "logits_mup_width_multiplier": -1}
# Columns that elementwise work takes at a time, where it needs a temporary: [n, 16384] instead of another [n, V].
_COLUMN_BLOCK = 16384
# Rows whose cumulative distribution is held (in fp64) while candidates are drawn.
_DRAW_ROWS = 64


def unwrapped(model: nn.Module) -> Any:
    """The transformers model itself, whether or not PEFT is around it."""
    wrapped: Any = model
    return wrapped.get_base_model() if hasattr(wrapped, "get_base_model") else wrapped


@dataclass(frozen=True)
class Head:
    """The last map of a causal language model: `logits = cap(scale * (hidden @ weight.T + bias))`.

    Attributes:
        weight_VD: in the model's own dtype; scoring and training make no fp32 copy of it.
        bias_V: or None.
        softcap: c in `c * tanh(x / c)` (final logit soft-capping, Gemma 2), or None.
        scale: factor on the logits (`logit_scale` of Cohere, 1 / `logits_scaling` of Granite).
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    @property
    def vocab_size(self) -> int:
        return self.weight_VD.shape[0]

    @property
    def logits_dtype(self) -> torch.dtype:
        return torch.float64 if self.weight_VD.dtype == torch.float64 else torch.float32

    @classmethod
    def of(cls, model: nn.Module) -> Head:
        """The head of a transformers causal LM, also inside a PEFT wrapper.

        Raises:
            ModelError: the head carries an adapter, is quantised, or is no plain linear layer.
        """
        base = unwrapped(model)
        linear = base.get_output_embeddings()
        if any(hasattr(linear, name) for name in ("base_layer", "modules_to_save", "token_adapter")):
            raise ModelError(
                "lm_head: expected a plain linear layer, found a PEFT adapter on it; take lm_head (and embeddings "
                "tied to it) out of the adapter's target_modules and modules_to_save, or merge the adapter"
            )
        if not isinstance(linear, nn.Linear) or not linear.weight.is_floating_point():
            dtype = getattr(getattr(linear, "weight", None), "dtype", None)
            raise ModelError(
                f"lm_head: expected a floating-point nn.Linear, found {type(linear).__name__} of {dtype}; "
                "load the model with its head unquantised"
            )
        config = base.config.get_text_config()
        scale = 1.0
        for name, exponent in _LOGIT_SCALES.items():
            # HyperCLOVA X multiplies by the field by which Granite divides.
            exponent = 1 if config.model_type.startswith("hyperclovax") else exponent
            scale *= float(getattr(config, name, None) or 1.0) ** exponent
        softcap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
        return cls(linear.weight, linear.bias, float(softcap) if softcap else None, scale)


def logits(hidden_nD: Tensor, head: Head, out_nV: Tensor) -> Tensor:
    """Fill `out_nV` (of `head.logits_dtype`) with the logits of a few rows, and return it. No autograd.

    Half-precision weights are multiplied with fp32 accumulation and output: on CUDA by the matmul itself, elsewhere
    by upcasting one block of the vocabulary at a time.
    """
    weight = head.weight_VD.detach()
    hidden_nD = hidden_nD.detach().to(weight.dtype)
    if weight.dtype == out_nV.dtype:
        torch.mm(hidden_nD, weight.t(), out=out_nV)
    elif weight.is_cuda:
        torch.mm(hidden_nD, weight.t(), out_dtype=out_nV.dtype, out=out_nV)
    else:
        hidden_nD = hidden_nD.to(out_nV.dtype)
        for block in column_blocks(out_nV):
            torch.mm(hidden_nD, weight[block].to(out_nV.dtype).t(), out=out_nV[:, block])
    if head.bias_V is not None:
        out_nV += head.bias_V.detach()
    if head.scale != 1.0:
        out_nV *= head.scale
    if head.softcap is not None:
        out_nV.div_(head.softcap).tanh_().mul_(head.softcap)
    return out_nV


def check_ids(ids: Tensor, vocab_size: int, what: str, lowest: int = 0) -> None:
    """Refuse ids for which the head has no row: a vocabulary padded to another size, a cache of other models."""
    if ids.numel():
        low, high = torch.stack(ids.aminmax()).tolist()
        if low < lowest or high >= vocab_size:
            raise ModelError(
                f"{what}: expected {lowest}..{vocab_size - 1}, since the model's head has {vocab_size} rows, got "
                f"{low if low < lowest else high}; the cache was made with another vocabulary or padding of it"
            )


def without_repeats(ids_TC: Tensor) -> Tensor:
    """`ids_TC` with every id that stands further left in its row already replaced by -1, the padding column."""
    ordered, order = ids_TC.sort(dim=1, stable=True)
    repeated = torch.zeros_like(ids_TC, dtype=torch.bool)
    repeated.scatter_(1, order[:, 1:], ordered[:, 1:] == ordered[:, :-1])
    return ids_TC.masked_fill(repeated, -1)


@dataclass(frozen=True)
class RowScores:
    """What a model thinks of T tokens: the fields of `cache_schema.ScoreBlock`, as tensors on the model's device."""

    logprobs: Tensor
    entropy: Tensor
    sampling_logprobs: Tensor | None = None
    candidate_ids: Tensor | None = None
    candidate_logprobs: Tensor | None = None
    rest_logprob: Tensor | None = None
    topk_ids: Tensor | None = None
    topk_logprobs: Tensor | None = None
    topk_rest_logprob: Tensor | None = None

    @staticmethod
    def cat(parts: Sequence[RowScores]) -> RowScores:
        """Chunks end to end; all of them hold the same fields."""

        def column(name: str) -> Any:
            values = [getattr(part, name) for part in parts]
            return None if values[0] is None else torch.cat(values)

        return RowScores(**{field.name: column(field.name) for field in fields(RowScores)})

    def numpy(self) -> dict[str, np.ndarray | None]:
        """The same fields as f4 / i4 arrays: `ScoreBlock(**scores.numpy())`."""

        def array(value: Tensor | None) -> np.ndarray | None:
            if value is None:
                return None
            return value.to("cpu", torch.float32 if value.is_floating_point() else torch.int32).numpy()

        return {field.name: array(getattr(self, field.name)) for field in fields(self)}


@torch.no_grad()
def score_rows(
    hidden_TD: Tensor,
    head: Head,
    token_ids_T: Tensor,
    *,
    candidates: int = 0,
    candidate_kind: str = "topk",
    candidate_vocab: int | None = None,
    candidate_ids_TK: Tensor | None = None,
    sampling_temperature: float | None = None,
    topk: int = 0,
    topk_among: Tensor | None = None,
    rows_per_chunk: int = 1024,
    generator_key: int | Sequence[int] | None = None,
) -> RowScores:
    """Log-prob, entropy and candidates of every row, through one reused [rows_per_chunk, V] buffer.

    Args:
        hidden_TD: after the model's final norm, at the rows that predict `token_ids_T`.
        candidates: K, the sampled token included; 0 for none.
        candidate_kind: "topk": the sampled token, then the K - 1 likeliest others; "sampled": the sampled token,
            then K - 1 independent draws from the softmax, repeats kept (a mean over them is unbiased).
        candidate_vocab: choose candidates below this id only (the sampled token stays, whatever it is). Rows of the
            head beyond the tokenizer's ids are padding, which another model of the same tokenizer may not have.
        candidate_ids_TK: score at these ids instead of choosing any: a teacher at the student's candidates.
        sampling_temperature: also give the sampled token's log-prob at this temperature. 0 is greedy decoding, a
            point mass on the likeliest token: 0 where the sampled token is that (or ties), -inf where it is not.
        topk: M, also give the M likeliest tokens, and what is outside them and the candidates together.
        topk_among: bool [V], choose those among these tokens only.
        generator_key: integers that name this call (seed, round, block, tile). Draws are a function of them and of
            the logits, whatever the device and `rows_per_chunk`.

    Returns:
        RowScores; `rest_logprob` is outside the *distinct* candidates, -inf if they cover V.

    Raises:
        ModelError: an id outside the head's vocabulary, more candidates than tokens in it, or sampled candidates
            without a key.
    """
    vocab, device = head.vocab_size, hidden_TD.device
    candidate_vocab = min(candidate_vocab or vocab, vocab)
    excluded_V = None if topk_among is None else ~topk_among.to(device)
    choice = vocab if excluded_V is None else vocab - int(excluded_V.sum())
    for name, count, limit in (("candidates", candidates, candidate_vocab), ("topk", topk, choice)):
        if count > limit:
            raise ModelError(f"{name}: expected at most {limit}, the size of the model's vocabulary, got {count}")
    token_ids_T = token_ids_T.to(device, torch.int64)
    check_ids(token_ids_T, vocab, "token id")
    uniforms_TK = None
    if candidate_ids_TK is not None:
        candidate_ids_TK = candidate_ids_TK.to(device, torch.int64)
        check_ids(candidate_ids_TK, vocab, "candidate id")
    elif candidates and candidate_kind == "sampled":
        if generator_key is None:
            raise ModelError("generator_key: expected the integers that seed sampled candidates, got None")
        uniforms_TK = _uniforms(generator_key, len(token_ids_T), candidates - 1)
    elif candidate_kind not in ("topk", "sampled"):
        raise ModelError(f'candidate_kind: expected "topk" or "sampled", got {candidate_kind!r}')

    parts: list[RowScores] = []
    buffer_nV = hidden_TD.new_empty(min(rows_per_chunk, len(hidden_TD)), vocab, dtype=head.logits_dtype)
    for rows in chunks(len(hidden_TD), rows_per_chunk) or [slice(0, 0)]:
        z = logits(hidden_TD[rows], head, buffer_nV[: rows.stop - rows.start])
        tokens_n1 = token_ids_T[rows, None]
        if candidate_ids_TK is not None:
            ids_nK = candidate_ids_TK[rows]
        elif uniforms_TK is not None:
            ids_nK = torch.cat([tokens_n1, _draw(z[:, :candidate_vocab], uniforms_TK[rows].to(device))], 1)
        elif candidates:
            ids_nK = torch.cat([tokens_n1, _likeliest_others(z, tokens_n1, candidates - 1, candidate_vocab)], 1)
        else:
            ids_nK = None
        parts.append(_score(z, tokens_n1, ids_nK, sampling_temperature, topk, excluded_V))
    return RowScores.cat(parts)


def _score(
    z: Tensor,
    tokens_n1: Tensor,
    ids_nK: Tensor | None,
    sampling_temperature: float | None,
    topk: int,
    excluded_V: Tensor | None,
) -> RowScores:
    """One chunk of `score_rows`. Leaves z changed."""
    columns = tokens_n1 if ids_nK is None else ids_nK
    token_logit, column_logits = z.gather(1, tokens_n1), z.gather(1, columns)
    part = partition(z, without_repeats(columns), entropy=True)

    def logprobs(values: Tensor) -> Tensor:
        return (values - part.lse[:, None]).to(z.dtype)

    sampling = top_ids = top_logprobs = top_rest = None
    if sampling_temperature is not None:
        sampling = _tempered(z, part, token_logit[:, 0], sampling_temperature)
    if topk:
        z.scatter_(1, columns, column_logits)
        shown = z if excluded_V is None else z.masked_fill(excluded_V, -torch.inf)
        top_logits, top_ids = shown.topk(topk, dim=1)
        top_logprobs = logprobs(top_logits)
        covered = top_ids if ids_nK is None else torch.cat([ids_nK, top_ids], 1)
        top_rest = partition(z, without_repeats(covered)).rest_logprob
    return RowScores(
        logprobs=logprobs(token_logit)[:, 0],
        entropy=part.entropy,
        sampling_logprobs=sampling,
        candidate_ids=ids_nK,
        # Not the partition's, where repeated draws are padding.
        candidate_logprobs=None if ids_nK is None else logprobs(column_logits),
        rest_logprob=None if ids_nK is None else part.rest_logprob,
        topk_ids=top_ids,
        topk_logprobs=top_logprobs,
        topk_rest_logprob=top_rest,
    )


@dataclass(frozen=True)
class Partition:
    """Rows split into columns and rest.

    m is the rest's largest logit (0 if it is empty), s the sum of exp(z - m) over it; lse, in fp64, that of the row.
    `z_C` and `logprobs_C` are -inf at padding. `entropy` means something only where it was asked for.
    """

    z_C: Tensor
    logprobs_C: Tensor
    rest_logprob: Tensor
    lse: Tensor
    m: Tensor
    s: Tensor
    entropy: Tensor


def partition(z: Tensor, columns: Tensor, *, entropy: bool = False, exponentiate: bool = False) -> Partition:
    """Split rows of logits at `columns` (distinct, -1 for padding).

    Overwrites z: with -inf at the columns or, with `exponentiate`, with e = exp(z - m), which is 0 there.
    """
    valid, index = columns >= 0, columns.clamp_min(0)
    z_C = z.gather(1, index)
    # Adding, not writing, keeps padding harmless: it adds 0 to column 0, which may be a column of its own.
    z.scatter_add_(1, index, torch.where(valid, -torch.inf, 0.0).to(z.dtype))
    m = z.amax(1)
    m = torch.where(m == -torch.inf, 0.0, m)
    s, within = torch.zeros_like(m), torch.zeros_like(m)
    for block in column_blocks(z):
        e = torch.sub(z[:, block], m[:, None], out=z[:, block] if exponentiate else None).exp_()
        s += e.sum(1)
        if entropy:
            within += torch.special.entr(e).sum(1)
    z_C = torch.where(valid, z_C, -torch.inf)
    rest_lse = m.double() + s.double().log()
    lse = torch.cat([z_C, rest_lse[:, None]], 1).logsumexp(1)
    logprobs_C, rest_logprob = (z_C - lse[:, None]).to(z.dtype), (rest_lse - lse).to(z.dtype)
    # The entropy of (columns, rest), plus p_rest times that within the rest: every term is >= 0, nothing cancels.
    p_rest = rest_logprob.exp()
    within = torch.where(s > 0, s.log() + within / s, 0.0)
    nats = torch.special.entr(logprobs_C.exp()).sum(1) + torch.special.entr(p_rest) + p_rest * within
    return Partition(z_C, logprobs_C, rest_logprob, lse, m, s, nats)


def _tempered(z: Tensor, part: Partition, token_logit: Tensor, temperature: float) -> Tensor:
    """Log-prob of the sampled token under softmax(z / temperature); z holds -inf at the partition's columns."""
    if temperature == 1.0:
        return (token_logit - part.lse).to(z.dtype)
    if temperature == 0.0:
        likeliest = torch.cat([part.z_C, z.amax(1, keepdim=True)], 1).amax(1)
        return torch.where(token_logit >= likeliest, 0.0, -torch.inf).to(z.dtype)
    s = torch.zeros_like(part.s)
    for block in column_blocks(z):
        s += ((z[:, block] - part.m[:, None]) / temperature).exp_().sum(1)
    rest_lse = part.m.double() / temperature + s.double().log()
    lse = torch.cat([part.z_C.double() / temperature, rest_lse[:, None]], 1).logsumexp(1)
    return (token_logit.double() / temperature - lse).to(z.dtype)


def _likeliest_others(z: Tensor, tokens_n1: Tensor, count: int, vocab: int) -> Tensor:
    """The `count` likeliest ids of each row, below `vocab`, that are not its token; z is left as it was."""
    token_logit = z.gather(1, tokens_n1)
    others = z.scatter_(1, tokens_n1, -torch.inf)[:, :vocab].topk(count, dim=1).indices
    z.scatter_(1, tokens_n1, token_logit)
    return others


def _draw(z: Tensor, uniforms_nm: Tensor) -> Tensor:
    """m independent draws a row from softmax(z), by inverting its cumulative distribution in fp64."""
    draws = torch.empty_like(uniforms_nm, dtype=torch.int64)
    for rows in chunks(len(z), _DRAW_ROWS):
        cumulative = z[rows].softmax(1, dtype=torch.float64).cumsum_(1)
        # right=True: the first token whose cumulative mass exceeds u, so one of probability 0 is never drawn.
        draws[rows] = torch.searchsorted(cumulative, uniforms_nm[rows] * cumulative[:, -1:], right=True)
    return draws.clamp_max_(z.shape[1] - 1)


def _uniforms(key: int | Sequence[int], rows: int, columns: int) -> Tensor:
    """fp64 uniforms in [0, 1), a function of the key alone: made on the CPU, whatever device they are for."""
    numbers = [int(number) for number in (key if isinstance(key, Sequence) else [key])]
    seed = int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest(), "little")
    return torch.rand(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def chunks(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def column_blocks(z: Tensor) -> list[slice]:
    return chunks(z.shape[1], _COLUMN_BLOCK)
