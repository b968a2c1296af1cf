"""Attention of one new query a sequence, against transformers' SDPA and in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from helpers.models import FAMILIES
from pipeline.forward.decoding import DECODING_ATTENTION, decoding_attention
from pipeline.forward.rows import sampling_attention, set_can_pack

SIZE, KEY_HEADS = 16, 2


class Layer(nn.Module):
    """What an attention function reads of a layer."""

    def __init__(self, groups: int):
        super().__init__()
        self.num_key_value_groups, self.is_causal = groups, True


def states(groups: int, queries: int = 1, length: int = 23) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(groups)
    shapes = (KEY_HEADS * groups, queries), (KEY_HEADS, length), (KEY_HEADS, length)
    query, key, value = (torch.randn(3, *shape, SIZE, generator=generator) for shape in shapes)
    return query, key, value


def left_padded(length: int = 23, heads: int = 1) -> Tensor:
    """Of three sequences, of which one has all tokens."""
    return (torch.arange(length) >= torch.tensor([0, 4, 9])[:, None])[:, None, None].expand(-1, heads, -1, -1)


@pytest.mark.parametrize("mask", [None, left_padded()], ids=["whole", "padded"])
@pytest.mark.parametrize("groups", [1, 3, 7])
def test_fp32_has_the_bits_of_repeated_keys(groups: int, mask: Tensor | None) -> None:
    expected, _ = sdpa_attention_forward(Layer(groups), *states(groups), mask, scaling=0.3)
    found, weights = decoding_attention(Layer(groups), *states(groups), mask, scaling=0.3, dropout=0.0)
    assert weights is None and torch.equal(found, expected)


@pytest.mark.parametrize("mask", [None, left_padded()], ids=["whole", "padded"])
@pytest.mark.parametrize("groups", [3, 7])
def test_bf16_is_as_close_to_float64_as_with_repeated_keys(groups: int, mask: Tensor | None) -> None:
    half = [state.bfloat16() for state in states(groups)]
    exact, _ = sdpa_attention_forward(Layer(groups), *(state.double() for state in half), mask)
    errors = [
        float((attend(Layer(groups), *half, mask)[0].double() - exact).abs().max())
        for attend in (decoding_attention, sdpa_attention_forward)
    ]
    assert errors[0] <= max(1.5 * errors[1], 0.01)


@pytest.mark.parametrize(
    ("queries", "mask", "settings"),
    [
        (5, None, {}),
        (1, left_padded(heads=6), {}),
        (1, left_padded(), {"position_bias": torch.randn(1, 6, 1, 23, generator=torch.Generator().manual_seed(0))}),
    ],
    ids=["several queries", "a mask a head", "a bias"],
)
def test_all_else_is_transformers(queries: int, mask: Tensor | None, settings: dict[str, Tensor]) -> None:
    half = [state.bfloat16() for state in states(3, queries)]
    expected, _ = sdpa_attention_forward(Layer(3), *half, mask, **settings)
    found, _ = decoding_attention(Layer(3), *half, mask, **settings)
    assert torch.equal(found, expected)


def test_it_is_for_models_that_are_padded_and_have_sdpa() -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(FAMILIES["qwen3"])
    assert sampling_attention(model) == DECODING_ATTENTION
    set_can_pack(model, False)
    assert sampling_attention(model) == "sdpa"
    assert sampling_attention(AutoModelForCausalLM.from_config(FAMILIES["gemma2"])) == "redpen_packed"
