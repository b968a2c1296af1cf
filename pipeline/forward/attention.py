"""Attention within each of several sequences that lie end to end, without a mask.

Shapes: S packed tokens (prompts and responses end to end), N sequences.

The attention function registered with transformers as "redpen_packed" never builds an S x S mask. With a `PackPlan`
(or `cu_seqlens`) among the model's keyword arguments it attends within each sequence: by torch's varlen flash
kernel on CUDA in half precision, else by causal SDPA over a few batches of sequences of similar length, padded on
the right, where causal attention does not look. Without one, as in `model(input_ids)` or `generate`, it is ordinary
causal attention.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import ModelError

ATTENTION = "redpen_packed"


class NotCausalError(ModelError):
    """A model whose tokens see later ones, which no layout can score."""


# Padding, in tokens, that costs less than one more attention call; beyond it padding may only take up a share.
_FREE_PADDING_TOKENS = 1024
_PADDING_SHARE = 0.125
_watchers: list[Callable[[], Any]] = []
# Queries at a time where scores need a mask (sliding window) or soft-capping: [block, keys], never [L, L].
_QUERY_BLOCK = 512


@dataclass(frozen=True)
class _Batch:
    """Sequences of similar length: `rows` [count * length] into S, padded with each sequence's last row.

    `key_rows` [count * (prefix + length)] are those of their keys, of which the queries are the last.
    """

    rows: Tensor
    key_rows: Tensor
    count: int


@dataclass(frozen=True)
class _Keys:
    """Whose keys each sequence sees, for the varlen kernel: rows into S end to end, as `PackPlan` has its queries."""

    rows: Tensor
    cu_seqlens: Tensor
    max_seqlen: int


@dataclass(frozen=True)
class PackPlan:
    """How attention goes about one pack; made once, shared by every layer.

    Attributes:
        cu_seqlens: i32 [N + 1], where each sequence starts in S, and S.
        max_seqlen: the longest sequence, in tokens.
        batches: for SDPA.
        order: [S], where each packed token's row is in the batches' outputs end to end; None if that is the packed
            order itself (one batch of equally long sequences).
        keys: None where every sequence sees itself alone.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    batches: tuple[_Batch, ...]
    order: Tensor | None
    keys: _Keys | None = None

    @classmethod
    def of(
        cls, lengths: Sequence[int], device: torch.device | str, prefixes: Sequence[range] | None = None
    ) -> PackPlan:
        """The plan for sequences of these lengths; it depends on nothing else.

        Args:
            prefixes: rows of S that each sequence continues, empty where it stands alone.
        """
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        prefixes = prefixes or [range(0)] * len(lengths)
        order = np.zeros(starts[-1], np.int64)
        batches: list[_Batch] = []
        offset = 0
        for prefix in dict.fromkeys(prefixes):
            among = [i for i, own in enumerate(prefixes) if own == prefix]
            for members in similar_lengths(lengths, among, _FREE_PADDING_TOKENS):
                length = lengths[members[0]]
                columns = np.arange(length)
                rows = np.stack([starts[i] + np.minimum(columns, lengths[i] - 1) for i in members])
                for row, i in enumerate(members):
                    order[starts[i] : starts[i + 1]] = offset + row * length + columns[: lengths[i]]
                queries = keys = torch.from_numpy(rows.ravel()).to(device)
                if prefix:
                    before = np.broadcast_to(np.asarray(prefix), (len(members), len(prefix)))
                    keys = torch.from_numpy(np.concatenate([before, rows], 1).ravel()).to(device)
                batches.append(_Batch(queries, keys, len(members)))
                offset += rows.size
        in_order = len(batches) == 1 and np.array_equal(order, np.arange(offset))
        return cls(
            cu_seqlens=torch.from_numpy(starts.astype(np.int32)).to(device),
            max_seqlen=max(lengths, default=0),
            batches=tuple(batches),
            order=None if in_order else torch.from_numpy(order).to(device),
            keys=_keys(starts, prefixes, device) if any(prefixes) else None,
        )


def _keys(starts: np.ndarray, prefixes: Sequence[range], device: torch.device | str) -> _Keys:
    rows = [np.r_[prefix, start:stop] for prefix, start, stop in zip(prefixes, starts, starts[1:], strict=False)]
    cu_seqlens = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    return _Keys(
        torch.from_numpy(np.concatenate(rows).astype(np.int64)).to(device),
        torch.from_numpy(cu_seqlens).to(device),
        max(map(len, rows)),
    )


def similar_lengths(lengths: Sequence[int], among: Sequence[int], free_padding: int) -> list[list[int]]:
    """Those of `among` that are not empty, longest first, split where padding to the longest would cost too much:
    more than `free_padding` tokens and an eighth of the group.
    """
    groups: list[list[int]] = []
    padding = tokens = 0
    for i in sorted((i for i in among if lengths[i]), key=lambda i: (-lengths[i], i)):
        if groups:
            padding += lengths[groups[-1][0]] - lengths[i]
            tokens += lengths[i]
            if padding <= free_padding + _PADDING_SHARE * tokens:
                groups[-1].append(i)
                continue
        groups.append([i])
        padding, tokens = 0, lengths[i]
    return groups


@contextmanager
def watched(seen: Callable[[], Any]) -> Iterator[None]:
    """Calls `seen` whenever packed attention is asked for."""
    _watchers.append(seen)
    try:
        yield
    finally:
        _watchers.remove(seen)


def register_packed_attention() -> None:
    """Make "redpen_packed" known to transformers as an `attn_implementation`. Repeating it is harmless."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION, packed_attention)
    AttentionMaskInterface.register(ATTENTION, _packed_mask)


def _packed_mask(*, q_length: int, kv_length: int, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
    """None for whole, unpadded sequences, of which `packed_attention` knows the rest; else SDPA's mask."""
    from transformers.masking_utils import sdpa_mask

    if attention_mask is None and q_length == kv_length:
        config = kwargs.get("config")
        chunk = getattr(config, "attention_chunk_size", None)
        if kwargs.get("use_vmap") or (chunk and kwargs.get("local_size") == chunk < q_length):
            raise ModelError(
                f"{getattr(config, 'model_type', 'model')}: expected causal or sliding-window attention, got a mask "
                "of its own (chunked, or partly bidirectional), which redpen's packed attention does not have"
            )
        return None
    kwargs["allow_is_causal_skip"] = False
    return sdpa_mask(q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **kwargs)


@dataclass(frozen=True)
class _Settings:
    """What a layer asks of its attention. A window of w lets a token see itself and the w - 1 before it."""

    scaling: float | None
    dropout: float
    window: int | None
    softcap: float | None


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    pack_plan: PackPlan | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: [batch, heads, tokens, size] in, [batch, tokens, heads, size] out.

    Without a plan, `cu_seqlens` (or positions that start again in a batch of one) say where sequences begin, at the
    price of working that out in every layer.

    Raises:
        ModelError: attention of a kind that no path here has (sinks, position bias, not causal), or a mask beside
            packed rollouts.
    """
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if not causal:
        raise NotCausalError(f"{type(module).__name__}: expected causal attention, got bidirectional attention")
    if s_aux is not None or kwargs.get("position_bias") is not None:
        raise ModelError(
            f"{type(module).__name__}: expected causal attention, plain, windowed or soft-capped, got attention "
            "sinks or a position bias, which redpen's packed attention does not have"
        )
    settings = _Settings(scaling, dropout, sliding_window, softcap)
    if pack_plan is None:
        pack_plan = _plan_from(cu_seqlens, position_ids if attention_mask is None and len(query) == 1 else None)
    if pack_plan is None:
        return _attend(query, key, value, attention_mask, settings).transpose(1, 2).contiguous(), None
    for watcher in _watchers:
        watcher()
    if attention_mask is not None:
        raise ModelError(
            f"{type(module).__name__} makes an attention mask of its own, by which rollouts would see one another"
        )
    if _varlen_fits(query, settings):
        return _varlen(query, key, value, pack_plan, settings)[None], None
    packed = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]  # [S, heads, size], as projected
    outputs = []
    for batch in pack_plan.batches:
        inputs = packed
        if pack_plan.order is not None:
            rows = (batch.rows, batch.key_rows, batch.key_rows)
            inputs = [tensor.index_select(0, index) for tensor, index in zip(packed, rows, strict=True)]
        q, k, v = (x.view(batch.count, -1, *x.shape[1:]).transpose(1, 2) for x in inputs)
        outputs.append(_attend(q, k, v, None, settings).transpose(1, 2).flatten(0, 1))
    if pack_plan.order is None:
        return outputs[0][None].contiguous(), None  # some architectures take a view of it
    return torch.cat(outputs).index_select(0, pack_plan.order)[None], None


def _plan_from(cu_seqlens: Tensor | None, position_ids: Tensor | None) -> PackPlan | None:
    """A plan made of what a caller gave instead of one; None for a single sequence."""
    if cu_seqlens is not None:
        return PackPlan.of(cu_seqlens.diff().tolist(), cu_seqlens.device)
    if position_ids is None or position_ids.ndim != 2 or position_ids.shape[1] == 1:
        return None
    restarts = (position_ids[0].diff() != 1).nonzero()[:, 0].add(1).tolist()
    lengths = np.diff([0, *restarts, position_ids.shape[1]]).tolist()
    return PackPlan.of(lengths, position_ids.device) if restarts else None


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, settings: _Settings) -> Tensor:
    """Attention of a batch under a mask, or causal, the queries being the last tokens of the keys."""
    n_queries, n_keys = query.shape[2], key.shape[2]
    window = n_keys if settings.window is None else min(settings.window, n_keys)
    if settings.softcap is None and (mask is not None or n_queries == n_keys == window):
        return _sdpa(query, key, value, mask, settings)
    outputs = []
    for start in range(0, n_queries, _QUERY_BLOCK):
        stop = min(start + _QUERY_BLOCK, n_queries)
        if mask is None:
            # The block's queries are keys [first, last); the first of them sees no further back than `oldest`.
            first, last = start + n_keys - n_queries, stop + n_keys - n_queries
            oldest = max(0, first - window + 1)
            back = torch.arange(first, last, device=query.device)[:, None]
            back = back - torch.arange(oldest, last, device=query.device)
            visible = (back >= 0) & (back < window)
        else:
            oldest, last, visible = 0, n_keys, mask[:, :, start:stop]
        attend = _sdpa if settings.softcap is None else _softcapped
        outputs.append(
            attend(query[:, :, start:stop], key[:, :, oldest:last], value[:, :, oldest:last], visible, settings)
        )
    return torch.cat(outputs, 2)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, settings: _Settings) -> Tensor:
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=visible,
        dropout_p=settings.dropout,
        is_causal=visible is None,
        scale=settings.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _softcapped(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, settings: _Settings) -> Tensor:
    """softmax(c tanh(scale q.k / c)) v, which no fused kernel of torch offers (Gemma 2, arXiv:2408.00118)."""
    assert settings.softcap is not None and visible is not None
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scale = query.shape[-1] ** -0.5 if settings.scaling is None else settings.scaling
    scores = settings.softcap * torch.tanh(query @ key.transpose(2, 3) * scale / settings.softcap)
    # A finite floor: a padded query sees nothing, and its row of NaN would reach real tokens through 0 * NaN.
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    return F.dropout(weights, settings.dropout) @ value


@cache
def _varlen_kernel() -> Callable[..., Any] | None:
    """torch's varlen attention, if this torch's takes what is needed: its signature still moves."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    takes = inspect.signature(varlen_attn).parameters.keys()
    return varlen_attn if {"scale", "window_size", "enable_gqa"} <= takes else None


def _varlen_fits(query: Tensor, settings: _Settings) -> bool:
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] <= 256
        and not settings.dropout
        and settings.softcap is None
        and _varlen_kernel() is not None
    )


def _varlen(query: Tensor, key: Tensor, value: Tensor, plan: PackPlan, settings: _Settings) -> Tensor:
    """The flash kernel over [S, heads, size]; a value head narrower than the query's (MLA) is padded, then cut."""
    kernel, size, grouped = _varlen_kernel(), value.shape[-1], query.shape[1] != key.shape[1]
    assert kernel is not None
    value = F.pad(value, (0, query.shape[-1] - size))
    query, key, value = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
    keys = plan.keys or _Keys(plan.cu_seqlens, plan.cu_seqlens, plan.max_seqlen)
    if plan.keys is not None:
        key, value = key.index_select(0, keys.rows), value.index_select(0, keys.rows)
    out: Tensor = kernel(
        query,
        key,
        value,
        plan.cu_seqlens,
        keys.cu_seqlens,
        plan.max_seqlen,
        keys.max_seqlen,
        scale=settings.scaling,
        window_size=(-1 if settings.window is None else settings.window - 1, 0),
        enable_gqa=grouped,
    )
    return out[..., :size]
