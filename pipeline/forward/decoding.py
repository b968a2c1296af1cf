"""Attention while sampling: one new query a sequence, and the keys of all its tokens so far.

For grouped queries, transformers' SDPA repeats the keys and values of the whole cache for every query head, in every
layer, for each sampled token. On a CPU this module avoids it: the G query heads of a key head are read as G queries
of one head,

    [B, H, 1, D]  ->  [B, H / G, G, D]

which attend to the same keys under the same mask. In fp32 SDPA's `enable_gqa` is as fast, and gives the bits that
repeated keys give.

Shapes: B sequences, H query heads, D dimensions of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

DECODING_ATTENTION = "redpen_decoding"


def decoding_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' SDPA, without repeated keys if there is one query a sequence, on a CPU.

    Returns [B, queries, H, D], and None for the weights, as transformers' attention functions do.
    """
    batch, heads, queries, _ = query.shape
    groups = heads // key.shape[1]
    masks_alike = attention_mask is None or attention_mask.shape[1] == 1
    if queries > 1 or groups == 1 or not masks_alike or kwargs.get("position_bias") is not None or query.is_cuda:
        attended: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return attended
    scale = kwargs.get("scaling")
    if query.dtype == torch.float32:
        out = F.scaled_dot_product_attention(query, key, value, attention_mask, scale=scale, enable_gqa=True)
    else:
        mask = None if attention_mask is None else attention_mask.expand(-1, -1, groups, -1)
        grouped = query.reshape(batch, -1, groups, query.shape[-1])
        out = F.scaled_dot_product_attention(grouped, key, value, mask, scale=scale)
    return out.reshape(batch, 1, heads, -1), None


def register_decoding_attention() -> None:
    """Make it known to transformers as an `attn_implementation`. Repeating it is harmless."""
    AttentionInterface.register(DECODING_ATTENTION, decoding_attention)
    AttentionMaskInterface.register(DECODING_ATTENTION, sdpa_mask)
