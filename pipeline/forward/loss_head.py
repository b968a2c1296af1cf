"""A loss over log-probs at chosen columns and its gradient, in one pass over chunks of rows.

Shapes and the split of a row into columns and rest are those of `pipeline.forward.head`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.forward.head import (
    Head,
    Partition,
    check_ids,
    chunks,
    column_blocks,
    logits,
    partition,
    without_repeats,
)

LossFn = Callable[[slice, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class HeadLoss:
    """A loss with its gradient to the hidden rows, and the log-probs that it was made of (detached).

    Attributes:
        loss: scalar, the sum of `loss_fn` over the chunks.
        logprobs_TC: at the columns; -inf at padding columns.
        rest_logprob_T: of everything outside them.
        entropy_T: in nats, if it was asked for.
    """

    loss: Tensor
    logprobs_TC: Tensor
    rest_logprob_T: Tensor
    entropy_T: Tensor | None = None


def chunked_head_loss(
    hidden_TD: Tensor,
    head: Head,
    column_ids_TC: Tensor,
    loss_fn: LossFn,
    rows_per_chunk: int = 512,
    *,
    entropy: bool = False,
) -> HeadLoss:
    """A loss over log-probs at chosen columns and the rest, with its gradient taken in the same pass over chunks.

    Args:
        hidden_TD: after the model's final norm; receives the gradient.
        column_ids_TC: token ids, -1 for padding; the others are distinct within a row (see `without_repeats`).
        loss_fn: `(rows, logprobs_nC, rest_logprob_n) -> scalar`, a pure function of a chunk's log-probs, normalised
            already (the global token count is known beforehand). It must mask padding columns, which hold -inf.
        entropy: also give each row's entropy, for one more elementwise pass.

    With e_v = exp(z_v - m), s the sum of e outside C, and G = sum over C of dL/dlog p_v, plus dL/dlog p_rest:

        dL/dz_v = e_v ((dL/dlog p_rest) / s - G exp(m - lse))    outside C
        dL/dz_v = dL/dlog p_v - G p_v                            at C

    A head that is trained gets its gradient too, accumulated over chunks in fp32; a frozen one costs nothing. With
    no rows the loss is a zero that still has a graph.

    Raises:
        ModelError: an id outside the head's vocabulary.
    """
    columns = column_ids_TC.to(hidden_TD.device, torch.int64)
    check_ids(columns, head.vocab_size, "column id", lowest=-1)
    assert torch.equal(without_repeats(columns), columns), "column_ids_TC: repeated ids within a row"
    apply: Callable[..., Any] = _ChunkedHeadLoss.apply
    loss, logprobs_TC, rest_T, entropy_T = apply(
        hidden_TD,
        head.weight_VD,
        head.bias_V,
        head,
        columns,
        loss_fn,
        rows_per_chunk,
        entropy,
        torch.is_grad_enabled(),
    )
    return HeadLoss(loss, logprobs_TC, rest_T, entropy_T)


class _ChunkedHeadLoss(torch.autograd.Function):
    """See `chunked_head_loss`. Forward makes the gradient, backward only scales it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        head: Head,
        columns_TC: Tensor,
        loss_fn: LossFn,
        rows_per_chunk: int,
        entropy: bool,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        n_rows, vocab = len(hidden_TD), head.vocab_size
        to_hidden, to_weight, to_bias = (grad_enabled and needed for needed in ctx.needs_input_grad[:3])
        backward = to_hidden or to_weight or to_bias
        like = hidden_TD.new_empty(0, dtype=head.logits_dtype)
        loss, logprobs_TC, rest_T = like.new_zeros(()), like.new_empty(columns_TC.shape), like.new_empty(n_rows)
        entropy_T = like.new_empty(n_rows) if entropy else None
        grad_hidden = torch.zeros_like(hidden_TD) if to_hidden else None
        grad_weight = like.new_zeros(weight_VD.shape) if to_weight else None
        grad_bias = like.new_zeros(vocab) if to_bias else None

        buffer_nV = like.new_empty(min(rows_per_chunk, n_rows), vocab)
        for rows in chunks(n_rows, rows_per_chunk):
            z = logits(hidden_TD[rows], head, buffer_nV[: rows.stop - rows.start])
            part = partition(z, columns_TC[rows], entropy=entropy, exponentiate=True)
            logprobs_TC[rows], rest_T[rows] = part.logprobs_C, part.rest_logprob
            if entropy_T is not None:
                entropy_T[rows] = part.entropy
            leaves = part.logprobs_C.requires_grad_(backward), part.rest_logprob.requires_grad_(backward)
            with torch.set_grad_enabled(backward):
                chunk_loss = loss_fn(rows, *leaves)
            loss += chunk_loss.detach()
            if not chunk_loss.requires_grad:
                continue
            g_C, g_rest = torch.autograd.grad(chunk_loss, leaves, allow_unused=True, materialize_grads=True)
            size_n1 = _logit_gradient(z, part, columns_TC[rows], g_C, g_rest, head)
            if grad_hidden is not None:
                grad_hidden[rows] = _times_weight(z, weight_VD).mul_(size_n1)
            if grad_weight is not None or grad_bias is not None:
                z *= size_n1
            if grad_weight is not None:
                for block in column_blocks(z):
                    grad_weight[block].addmm_(z[:, block].t(), hidden_TD[rows].to(z.dtype))
            if grad_bias is not None:
                grad_bias += z.sum(0)

        ctx.save_for_backward(
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight_VD.dtype),
            None if grad_bias is None or bias_V is None else grad_bias.to(bias_V.dtype),
        )
        ctx.mark_non_differentiable(*(out for out in (logprobs_TC, rest_T, entropy_T) if out is not None))
        return loss, logprobs_TC, rest_T, entropy_T

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        gradients = (None if g is None else g * grad_loss.to(g.dtype) for g in ctx.saved_tensors)
        return (*gradients, None, None, None, None, None, None)


def _logit_gradient(z: Tensor, part: Partition, columns: Tensor, g_C: Tensor, g_rest: Tensor, head: Head) -> Tensor:
    """Turn z, which holds e = exp(z - m), into dL/d(hidden @ weight.T + bias), each row divided by its size.

    Returns size_n1, the factors to multiply rows by that are made of it. A loss divided by a global token count has
    gradients of 1e-8 and less, which a cast to half precision would not survive.
    """
    valid, index = columns >= 0, columns.clamp_min(0)
    g_C, g_rest = torch.where(valid, g_C, 0.0).double(), torch.where(part.s > 0, g_rest, 0.0).double()
    size = torch.cat([g_C.abs(), g_rest.abs()[:, None]], 1).amax(1)
    size = torch.where(size == 0, 1.0, size)
    g_C, g_rest = g_C / size[:, None], g_rest / size
    p_C, p_rest = part.logprobs_C.double().exp(), part.rest_logprob.double().exp()
    # Divided by the sum of p, which rounding keeps from 1: the row's gradient has to sum to 0.
    total = (g_C.sum(1) + g_rest) / (p_C.sum(1) + p_rest)
    # p_v = e_v exp(m - lse), and exp(m - lse) = p_rest / s.
    outside = torch.where(part.s > 0, (g_rest - total * p_rest) / part.s, 0.0).to(z.dtype)
    at_C = (g_C - total[:, None] * p_C).to(z.dtype)
    if head.softcap is None:
        z *= outside[:, None]
    else:
        # dz/du = 1 - (z / c)^2 for z = c tanh(u / c), and z = m + log e; where e is 0 so is the gradient.
        for block in column_blocks(z):
            e = z[:, block]
            capped = e.clamp_min(torch.finfo(z.dtype).tiny).log_().add_(part.m[:, None]).div_(head.softcap)
            e.mul_(outside[:, None]).mul_(capped.square_().neg_().add_(1.0))
        at_C *= 1.0 - (part.z_C / head.softcap).square()
    z.scatter_add_(1, index, torch.where(valid, at_C, 0.0))
    return (size * head.scale).to(z.dtype)[:, None]


def _times_weight(dz_nV: Tensor, weight_VD: Tensor) -> Tensor:
    """dz @ W, accumulated and returned in dz's precision, with dz cast to a half-precision weight's on CUDA."""
    weight = weight_VD.detach()
    if weight.dtype == dz_nV.dtype:
        return dz_nV @ weight
    if weight.is_cuda:
        return torch.mm(dz_nV.to(weight.dtype), weight, out_dtype=dz_nV.dtype)
    product = dz_nV.new_zeros(len(dz_nV), weight.shape[1])
    for block in column_blocks(dz_nV):
        product.addmm_(dz_nV[:, block], weight[block].to(dz_nV.dtype))
    return product
