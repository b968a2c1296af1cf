"""Packed rollouts have the log-probs and gradients they have alone, in every family; nothing of S x S is built."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    GptOssConfig,
    Lfm2Config,
    Llama4TextConfig,
)

from helpers.models import (
    FAMILIES,
    LENGTHS,
    SMALL_CONFIG,
    STARTS,
    STARTS_OF_FEW,
    largest_output,
    of_few_prompts,
    random_model,
    random_sequences,
)
from pipeline.errors import ModelError
from pipeline.forward import attention
from pipeline.forward.attention import ATTENTION, PackPlan, packed_attention, register_packed_attention
from pipeline.forward.head import Head
from pipeline.forward.loss_head import chunked_head_loss
from pipeline.forward.packing import pack, packed_hidden, tiles
from pipeline.forward.packing_check import check_layout, choose_checked, settle_layout
from pipeline.forward.rows import RowTokens, is_packed, native_attention


@pytest.fixture(autouse=True)
def _registered() -> None:
    register_packed_attention()


@pytest.mark.parametrize("share_prompts_from", [None, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logprobs_are_those_of_each_rollout_alone(family: str, share_prompts_from: int | None) -> None:
    model = random_model(FAMILIES[family])
    assert check_layout(model, random_sequences(), STARTS, 1e-5) <= 1e-5
    worst = check_layout(model, of_few_prompts(), STARTS_OF_FEW, 1e-5, share_prompts_from=share_prompts_from)
    assert 0 < worst <= 1e-5
    assert model.config._attn_implementation == ATTENTION


def test_a_shared_prompt_is_read_once() -> None:
    sequences = of_few_prompts()
    apart, shared = (pack(sequences, STARTS_OF_FEW, share_prompts_from=share) for share in (None, 1))
    assert apart.input_ids.shape[1] - shared.input_ids.shape[1] == 2 * 4 + 10 + 1
    only_long = pack(sequences, STARTS_OF_FEW, share_prompts_from=5)
    assert apart.input_ids.shape[1] - only_long.input_ids.shape[1] == 10
    assert torch.equal(apart.target_ids, shared.target_ids)
    of_prompt = [shared.predict_rows[0], shared.predict_rows[sum(LENGTHS[:2]) - sum(STARTS_OF_FEW[:2])]]
    assert of_prompt == [3, 3], "both first tokens are predicted by the prompt's last"


@pytest.mark.parametrize("share_prompts_from", [None, 1])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "mistral-window"])
def test_packed_gradients_are_the_sum_of_each_rollouts_own(
    family: str, checkpointing: bool, share_prompts_from: int | None
) -> None:
    model = random_model(FAMILIES[family]).train()
    sequences, all_starts = (of_few_prompts(), STARTS_OF_FEW) if share_prompts_from else (random_sequences(), STARTS)

    def gradients(packs: list[tuple[list[np.ndarray], tuple[int, ...]]]) -> list[Tensor]:
        model.zero_grad()
        for members, starts in packs:
            packed = pack(members, starts, share_prompts_from=share_prompts_from)
            chunked_head_loss(
                packed_hidden(model, packed),
                Head.of(model),
                packed.target_ids[:, None],
                lambda rows, logprobs, rest: -logprobs.sum() / 100,
                16,
            ).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    alone = gradients([([sequence], (start,)) for sequence, start in zip(sequences, all_starts, strict=True)])
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    together = gradients([(sequences, all_starts)])
    assert len(alone) == len(together) == len(list(model.parameters()))
    scale = max(float(g.abs().max()) for g in alone)
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("family", ["qwen3", "qwen2-window", "gemma2", "gemma3"])
@torch.no_grad()
def test_ordinary_calls_and_generate_are_unchanged(family: str) -> None:
    ours, theirs = random_model(FAMILIES[family]), random_model(FAMILIES[family], "eager")
    ids = torch.from_numpy(np.stack(random_sequences((17, 17, 17)))).long()
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
    left_padding = torch.ones_like(ids)
    left_padding[0, :5] = 0
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for mask in (left_padding, torch.ones_like(ids)):
        made = [model.generate(ids, attention_mask=mask, **options) for model in (ours, theirs)]
        assert torch.equal(*made)
    # Positions that start again say where sequences begin, as they do for transformers itself.
    positions = torch.cat([torch.arange(8), torch.arange(9)])[None]
    packed = [model(ids[:1], position_ids=positions, use_cache=False).logits for model in (ours, theirs)]
    torch.testing.assert_close(*packed, rtol=1e-4, atol=1e-4)


def test_check_packing_notices_a_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    model, one_sequence = random_model(FAMILIES["qwen3"]), PackPlan.of([sum(LENGTHS)], "cpu")
    monkeypatch.setattr(PackPlan, "of", lambda *_: one_sequence)
    with pytest.raises(ModelError, match=r"packing: expected .* within 0\.0001 .* Qwen3ForCausalLM"):
        check_layout(model, random_sequences(), STARTS)


def test_check_packing_notices_a_head_that_does_more() -> None:
    model = random_model(FAMILIES["qwen3"])
    hook = model.lm_head.register_forward_hook(lambda module, inputs, out: 1.01 * out)
    with pytest.raises(ModelError, match="packing"):
        check_layout(model, random_sequences(), STARTS)
    hook.remove()
    check_layout(model, random_sequences(), STARTS)


def test_check_packing_leaves_training_modes_alone() -> None:
    model = random_model(FAMILIES["qwen3"]).train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    check_layout(model, random_sequences(), STARTS)
    assert [module.training for module in model.modules()] == before


def test_adapters_are_packed_too() -> None:
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False, r=2, task_type="CAUSAL_LM")
    model = get_peft_model(random_model(FAMILIES["qwen3"]), config)
    packed = pack(random_sequences(), STARTS)
    with_adapter = packed_hidden(model, packed)
    with model.disable_adapter():
        assert not torch.allclose(packed_hidden(model, packed), with_adapter)
    assert check_layout(model, random_sequences(), STARTS, 1e-4) <= 1e-4


def test_attention_that_cannot_be_packed_is_refused() -> None:
    packed = pack(random_sequences(), STARTS)
    with pytest.raises(ModelError, match="attn_implementation='redpen_packed', got 'sdpa'"):
        packed_hidden(random_model(FAMILIES["qwen3"], "sdpa"), packed)
    sinks = GptOssConfig(**SMALL_CONFIG, head_dim=8, num_local_experts=2, num_experts_per_tok=1)
    with pytest.raises(ModelError, match="attention sinks"):
        packed_hidden(random_model(sinks), packed)
    chunked = Llama4TextConfig(
        **SMALL_CONFIG, head_dim=8, intermediate_size_mlp=16, attention_chunk_size=16, num_local_experts=2
    )
    with pytest.raises(ModelError, match="chunked"):
        packed_hidden(random_model(chunked), packed)
    with pytest.raises(ModelError, match="llama4_text: expected causal or sliding-window attention"):
        attention._packed_mask(q_length=17, kv_length=17, config=chunked, local_size=16)
    with pytest.raises(ModelError, match="bidirectional"):
        attend(random_qkv(10), lengths=(4, 6), is_causal=False)
    with pytest.raises(ModelError, match="attention mask of its own"):
        attend(random_qkv(10), lengths=(4, 6), attention_mask=torch.ones(1, 1, 10, 10, dtype=torch.bool))


def random_qkv(tokens: int, heads: int = 4, groups: int = 2, size: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(1, tokens, heads, size), *[(1, tokens, groups, size)] * 2]
    return [torch.randn(shape, dtype=torch.float64, generator=generator).transpose(1, 2) for shape in shapes]


def attend(qkv: list[Tensor], *, lengths: tuple[int, ...], attention_mask: Tensor | None = None, **kwargs) -> Tensor:
    plan = PackPlan.of(lengths, "cpu")
    return packed_attention(torch.nn.Identity(), *qkv, attention_mask, pack_plan=plan, **kwargs)[0]


def dense(qkv: list[Tensor], lengths: tuple[int, ...], *, sliding_window=None, softcap=None, scaling=None) -> Tensor:
    """One softmax under a block-diagonal causal mask."""
    q, k, v = qkv
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    back = torch.arange(len(sequence))[:, None] - torch.arange(len(sequence))
    visible = (sequence[:, None] == sequence) & (back >= 0) & (back < (sliding_window or len(sequence)))
    return (scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize(
    "settings",
    [{}, {"scaling": 0.1}, {"sliding_window": 3}, {"softcap": 1.5}, {"softcap": 1.5, "sliding_window": 4}],
    ids=str,
)
@pytest.mark.parametrize("lengths", [(13,), (4, 4, 4), (1, 9, 2, 5, 1, 9), (0, 3, 0, 7)], ids=str)
@pytest.mark.parametrize("free_padding", [0, 4, 1024])
def test_attention_equals_a_dense_mask(
    settings: dict, lengths: tuple[int, ...], free_padding: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_FREE_PADDING_TOKENS", free_padding)
    monkeypatch.setattr(attention, "_QUERY_BLOCK", 4)
    qkv = [x.requires_grad_() for x in random_qkv(sum(lengths))]
    ours, theirs = attend(qkv, lengths=lengths, **settings), dense(qkv, lengths, **settings)
    torch.testing.assert_close(ours, theirs)
    weights = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(0))
    gradients = [torch.autograd.grad((out * weights).sum(), qkv) for out in (ours, theirs)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_boundaries_alone_will_do() -> None:
    qkv, lengths = random_qkv(12), (5, 7)
    cu_seqlens = torch.tensor([0, 5, 12], dtype=torch.int32)
    out, _ = packed_attention(torch.nn.Identity(), *qkv, None, cu_seqlens=cu_seqlens, max_seqlen=7)
    torch.testing.assert_close(out, dense(qkv, lengths))


@pytest.mark.parametrize("settings", [{}, {"scaling": 0.1}, {"sliding_window": 3}], ids=str)
def test_the_varlen_kernel_is_asked_for_the_same(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's kernel, by a stand-in with its documented meaning: (w, 0) sees w tokens back, (-1, 0) all of them."""

    def varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
        assert cu_q.dtype == torch.int32 and max_q == max_k == 9 and enable_gqa and window_size[1] == 0
        window = None if window_size[0] < 0 else window_size[0] + 1
        batched = [x.transpose(0, 1)[None] for x in (q, k, v)]
        return dense(batched, tuple(cu_q.diff().tolist()), scaling=scale, sliding_window=window)[0]

    monkeypatch.setattr(attention, "_varlen_fits", lambda *_: True)
    monkeypatch.setattr(attention, "_varlen_kernel", lambda: varlen)
    qkv, lengths = random_qkv(15), (4, 9, 2)
    torch.testing.assert_close(attend(qkv, lengths=lengths, **settings), dense(qkv, lengths, **settings))
    narrow = [*qkv[:2], qkv[2][..., :5]]
    torch.testing.assert_close(attend(narrow, lengths=lengths), dense(narrow, lengths))


def test_no_square_mask_is_built() -> None:
    model = random_model(FAMILIES["qwen2-window"])
    packed = pack(random_sequences((32,) * 64), (8,) * 64)
    with largest_output() as largest, torch.no_grad():
        packed_hidden(model, packed)
    # the MLP's; S x S is 42 times that
    assert largest.numel <= packed.input_ids.numel() * SMALL_CONFIG["intermediate_size"]


def test_a_long_windowed_sequence_builds_no_square_mask() -> None:
    qkv = [x.float() for x in random_qkv(8192, heads=2, groups=1, size=4)]
    with largest_output() as largest:
        attend(qkv, lengths=(8192,), sliding_window=64)
    assert largest.numel <= attention._QUERY_BLOCK * (attention._QUERY_BLOCK + 64) * 2


def test_short_sequences_take_few_calls_and_little_padding() -> None:
    generator = np.random.default_rng(0)
    toy = PackPlan.of(generator.integers(15, 45, 256).tolist(), "cpu")
    assert len(toy.batches) <= 3
    mixed = generator.integers(1, 4096, 64).tolist()
    plan = PackPlan.of(mixed, "cpu")
    padding = sum(len(batch.rows) for batch in plan.batches) - sum(mixed)
    assert padding <= attention._FREE_PADDING_TOKENS * len(plan.batches) + attention._PADDING_SHARE * sum(mixed)
    assert len(plan.batches) < 40
    assert PackPlan.of([7, 7, 7], "cpu").order is None


def test_pack_lays_sequences_end_to_end() -> None:
    packed = pack([np.array([5, 6, 7, 8]), np.array([9]), np.array([10, 11])], (2, 1, 1))
    assert packed.input_ids.tolist() == [[5, 6, 7, 8, 9, 10, 11]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 0, 0, 1]]
    assert packed.cu_seqlens.tolist() == [0, 4, 5, 7] and packed.cu_seqlens.dtype == torch.int32
    assert packed.max_seqlen == 4
    assert packed.predict_rows.tolist() == [1, 2, 5] and packed.target_ids.tolist() == [7, 8, 11]


@pytest.mark.parametrize(("sequence", "start"), [([1, 2, 3], 0), ([1, 2, 3], 4), ([], 0), ([], 1)])
def test_pack_needs_a_prompt(sequence: list[int], start: int) -> None:
    with pytest.raises(ModelError, match="sequence 1: expected its response to start after"):
        pack([np.array([1, 2]), np.array(sequence, np.int64)], (1, start))


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([], []),
        ([3], [range(1)]),
        ([4, 4, 4], [range(2), range(2, 3)]),
        ([9, 1, 9, 20, 2], [range(1), range(1, 2), range(2, 3), range(3, 4), range(4, 5)]),
        ([2, 2, 2, 2, 8], [range(4), range(4, 5)]),
    ],
)
def test_tiles(lengths: list[int], expected: list[range]) -> None:
    assert tiles(lengths, 8) == expected


@pytest.mark.parametrize(
    ("softcap", "has_sdpa", "expected"), [(None, True, "sdpa"), (None, False, "eager"), (50.0, True, "eager")]
)
def test_a_model_is_compared_with_an_attention_that_computes_all_of_it(
    softcap: float | None, has_sdpa: bool, expected: str
) -> None:
    text = SimpleNamespace(attn_logit_softcapping=softcap)
    config = SimpleNamespace(get_text_config=lambda: text)
    assert native_attention(SimpleNamespace(config=config, _supports_sdpa=has_sdpa)) == expected


# -- rows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("one_group", [False, True])
def test_rows_predict_the_responses_in_order(one_group: bool) -> None:
    lengths = [2, 900, 30, 41, 5, 1, 800]
    sequences, starts = random_sequences(tuple(lengths)), [1, 400, 10, 1, 5, 1, 799]
    tokens = RowTokens.of(sequences, starts, one_group=one_group)
    assert len(tokens.groups) == (1 if one_group else 2)
    read = torch.cat([group.input_ids.flatten()[group.predict_rows] for group in tokens.groups])[tokens.order]
    assert read.tolist() == [t for s, n in zip(sequences, starts, strict=True) for t in s[n - 1 : -1]]
    assert tokens.target_ids.tolist() == [t for s, n in zip(sequences, starts, strict=True) for t in s[n:]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_that_leaks_is_caught_and_the_model_takes_rows(dtype: torch.dtype) -> None:
    """A convolution forgets: in bf16 what leaks is hardly more than rounding."""
    config = Lfm2Config(**SMALL_CONFIG, layer_types=["conv", "full_attention", "conv"])
    model = random_model(config).to(dtype)
    with pytest.raises(ModelError, match=r"packing: .* exchanged"):
        check_layout(model, random_sequences(), STARTS)
    assert "not packed" in settle_layout(model, random_sequences(), STARTS)
    assert not is_packed(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_packing_in_half_precision_is_no_false_alarm(family: str) -> None:
    model = random_model(FAMILIES[family]).to(torch.bfloat16)
    check_layout(model, random_sequences(), STARTS)
    check_layout(model, of_few_prompts(), STARTS_OF_FEW, share_prompts_from=1)


def test_rollouts_are_checked_that_differ() -> None:
    assert choose_checked([5, 900, 3, 40, 7, 5000], "cpu") == [1, 2, 3, 0]  # the last would cost too much
    assert choose_checked([9], "cpu") == [0] and choose_checked([9000, 8000], "cpu") == [1]
