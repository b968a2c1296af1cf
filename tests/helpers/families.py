"""Every family of models that is tried: a tiny configuration of each, and what redpen makes of it, step by step.

A new family is one line in `FAMILIES`. `python -m helpers.families` (in tests/) writes docs/models.md.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

import cache_schema as cs
from pipeline.config.recipe import StudentConfig, TrainConfig
from pipeline.engines.resident import ResidentScorer
from pipeline.engines.sampling import PromptBlock, Sampling
from pipeline.engines.scoring import ScoreOptions, sequences
from pipeline.engines.transformers_sampler import TransformersSampler
from pipeline.errors import RedpenError
from pipeline.forward.head import Head, unwrapped
from pipeline.forward.loss_head import chunked_head_loss
from pipeline.forward.packing_check import settle_layout
from pipeline.forward.rows import is_packed, lay_out, native_attention, response_hidden
from pipeline.merge import merge
from pipeline.models import load as models
from pipeline.models.lora import make_trainable, trainable, training_mode

V = 71
COLUMNS = ("rollouts", "score", "streamed", "train", "merge")
RIGHT = "right"
PAGE = Path(__file__).parents[2] / "docs" / "models.md"

_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_S = dict(
    _IDS,
    vocab_size=V,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LOCAL_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
_GDN = dict(
    _S,
    num_hidden_layers=2,
    head_dim=8,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    layer_types=["linear_attention", "full_attention"],
)
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
_SLIDING = ["sliding_attention", "full_attention"] * 2
_PER_LAYER = dict(
    _S,
    num_hidden_layers=4,
    head_dim=8,
    sliding_window=6,
    layer_types=_SLIDING,
    hidden_size_per_layer_input=8,
    vocab_size_per_layer_input=V,
    num_kv_shared_layers=2,
)
_OLD = dict(_IDS, vocab_size=V, n_embd=32, n_layer=3, n_head=4, n_positions=512)
_CONV = ["conv", "full_attention", "conv"]
_LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}

#: family: (configuration class, settings)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3": ("Qwen3Config", dict(_S, head_dim=8)),
    "Qwen3-MoE": ("Qwen3MoeConfig", dict(_S, **_MOE, head_dim=8)),
    "Qwen3-Next": ("Qwen3NextConfig", dict(_GDN, **_MOE, shared_expert_intermediate_size=16)),
    "Qwen3.5": ("Qwen3_5TextConfig", _GDN),
    "Qwen3.5-MoE": ("Qwen3_5MoeTextConfig", dict(_GDN, **_MOE, shared_expert_intermediate_size=16)),
    "Llama": ("LlamaConfig", _S),
    "Llama 4 (text)": (
        "Llama4TextConfig",
        dict(
            _S, num_hidden_layers=4, head_dim=8, intermediate_size_mlp=48, num_local_experts=4, attention_chunk_size=8
        ),
    ),
    "Mistral, sliding window": ("MistralConfig", dict(_S, sliding_window=5)),
    "gpt-oss": ("GptOssConfig", dict(_S, **_LOCAL_MOE, head_dim=8, sliding_window=6)),
    "Gemma 2": (
        "Gemma2Config",
        dict(_S, head_dim=8, sliding_window=6, query_pre_attn_scalar=8, attn_logit_softcapping=2.0),
    ),
    "Gemma 3": ("Gemma3TextConfig", dict(_S, head_dim=8, sliding_window=6, query_pre_attn_scalar=8)),
    "Gemma 3n (text)": ("Gemma3nTextConfig", dict(_PER_LAYER, laurel_rank=4, altup_num_inputs=2)),
    "Gemma 4 (text)": ("Gemma4TextConfig", dict(_PER_LAYER, global_head_dim=16)),
    "LFM2": ("Lfm2Config", dict(_S, layer_types=_CONV)),
    "LFM2-MoE": ("Lfm2MoeConfig", dict(_S, **_MOE, num_dense_layers=1, layer_types=_CONV)),
    "Granite 4 hybrid": (
        "GraniteMoeHybridConfig",
        dict(
            _S,
            **_MAMBA,
            layer_types=["mamba", "attention", "mamba"],
            num_local_experts=0,
            shared_intermediate_size=48,
        ),
    ),
    "Bamba": ("BambaConfig", dict(_S, **_MAMBA, attn_layer_indices=[1])),
    "Falcon-H1": ("FalconH1Config", dict(_S, **_MAMBA, mamba_d_ssm=64)),
    "Nemotron-H": (
        "NemotronHConfig",
        dict(
            _S,
            num_hidden_layers=4,
            hybrid_override_pattern="M-*M",
            head_dim=8,
            mamba_num_heads=8,
            mamba_head_dim=8,
            ssm_state_size=8,
            n_groups=1,
        ),
    ),
    "Mamba": ("MambaConfig", dict(_IDS, vocab_size=V, hidden_size=32, state_size=8, num_hidden_layers=3)),
    "Mamba 2": (
        "Mamba2Config",
        dict(
            _IDS, vocab_size=V, hidden_size=32, num_heads=8, head_dim=8, state_size=8, n_groups=1, num_hidden_layers=3
        ),
    ),
    "Jamba": (
        "JambaConfig",
        dict(
            _S,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            num_experts=4,
            num_experts_per_tok=2,
            use_mamba_kernels=False,
            mamba_d_state=8,
        ),
    ),
    "Zamba2": (
        "Zamba2Config",
        dict(
            _S,
            num_hidden_layers=4,
            num_key_value_heads=4,
            layers_block_type=["mamba", "hybrid"] * 2,
            mamba_d_state=8,
            mamba_ngroups=1,
            mamba_headdim=8,
            n_mamba_heads=8,
            num_mem_blocks=1,
            use_mamba_kernels=False,
        ),
    ),
    "MiniMax": (
        "MiniMaxConfig",
        dict(
            _S,
            **_LOCAL_MOE,
            head_dim=8,
            block_size=8,
            layer_types=["linear_attention", "full_attention", "linear_attention"],
        ),
    ),
    "Kimi Linear": (
        "KimiLinearConfig",
        dict(
            _S | {"num_key_value_heads": 4},
            **_LOCAL_MOE,
            moe_intermediate_size=16,
            kv_lora_rank=16,
            qk_rope_head_dim=4,
            qk_nope_head_dim=8,
            v_head_dim=8,
            linear_head_dim=8,
            linear_num_heads=4,
            layer_types=["linear_attention", "full_attention", "linear_attention"],
        ),
    ),
    "RecurrentGemma": ("RecurrentGemmaConfig", dict(_S, lru_width=32, attention_window_size=6, head_dim=8)),
    "RWKV": ("RwkvConfig", {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 3, "context_length": 512}),
    "Phi-3 (LongRoPE)": (
        "Phi3Config",
        dict(
            _S,
            num_key_value_heads=4,
            original_max_position_embeddings=400,
            max_position_embeddings=800,
            rope_parameters=_LONGROPE,
        ),
    ),
    "PhiMoE": ("PhimoeConfig", dict(_S, **_LOCAL_MOE)),
    "OPT": (
        "OPTConfig",
        dict(
            _IDS,
            vocab_size=V,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            word_embed_proj_dim=32,
            max_position_embeddings=512,
        ),
    ),
    "BLOOM": ("BloomConfig", dict(_IDS, vocab_size=V, hidden_size=32, n_layer=3, n_head=4)),
    "MPT": ("MptConfig", {"vocab_size": V, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 512}),
    "GPT-2": ("GPT2Config", _OLD),
    "GPT-J": ("GPTJConfig", dict(_OLD, rotary_dim=4)),
    "GPT-Neo": (
        "GPTNeoConfig",
        dict(
            _IDS,
            vocab_size=V,
            hidden_size=32,
            num_layers=3,
            num_heads=4,
            window_size=6,
            max_position_embeddings=512,
            attention_types=[[["global", "local", "global"], 1]],
        ),
    ),
    "CodeGen": ("CodeGenConfig", dict(_OLD, rotary_dim=4)),
    "XGLM": (
        "XGLMConfig",
        dict(vocab_size=V, d_model=32, ffn_dim=48, num_layers=3, attention_heads=4, max_position_embeddings=512),
    ),
    "BioGPT": (
        "BioGptConfig",
        dict(
            vocab_size=V,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=512,
        ),
    ),
    "Falcon": ("FalconConfig", dict(_IDS, vocab_size=V, hidden_size=32, num_hidden_layers=3, num_attention_heads=4)),
    "Falcon, ALiBi": (
        "FalconConfig",
        dict(_IDS, vocab_size=V, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, alibi=True),
    ),
    "Doge": ("DogeConfig", _S),
}
#: Rollouts that are scored: prompt + response of so many tokens.
_LENGTHS, _STARTS = (9, 30, 260, 2, 41), (4, 10, 12, 1, 40)
# A model this small computes to 1e-6; what it is off by when it is wrong is a tenth and more.
_FP32 = 2e-5


@dataclass
class Row:
    """What a family does.

    Attributes:
        layout: "packed" or "rows".
        cells: by column, `RIGHT` or why not.
    """

    layout: str = ""
    cells: dict[str, str] = field(default_factory=dict)


def make_config(family: str) -> PreTrainedConfig:
    name, settings = FAMILIES[family]
    config: PreTrainedConfig = getattr(transformers, name)(**settings)
    return config


def save_family(family: str, directory: Path, dtype: torch.dtype = torch.float32) -> None:
    """A random model whose attention is not uniform, and whose rounding is small."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config(family)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.to(dtype).save_pretrained(directory)


def rollouts_of(lengths: tuple[int, ...] = _LENGTHS, starts: tuple[int, ...] = _STARTS) -> cs.RolloutBlock:
    generator = np.random.default_rng(0)
    ids = [generator.integers(3, V, length).astype(np.int32) for length in lengths]
    prompts = [(i, s[:start]) for i, (s, start) in enumerate(zip(ids, starts, strict=True))]
    rows = [
        cs.RolloutRow(i, 0, s[start:], np.zeros(len(s) - start, np.float32), cs.FINISH_OTHER)
        for i, (s, start) in enumerate(zip(ids, starts, strict=True))
    ]
    return cs.RolloutBlock.from_rows(prompts, rows)


def alone(model: Any, ids: np.ndarray, start: int) -> Tensor:
    """Log-probs of one response by transformers' own forward, differentiable."""
    tokens = torch.from_numpy(ids.astype(np.int64))
    logits: Tensor = model(input_ids=tokens[None], use_cache=False).logits[0, start - 1 : -1]
    return logits.float().log_softmax(1).gather(1, tokens[start:, None])[:, 0]


def try_family(family: str, directory: Path) -> Row:
    """Sample, score, stream, train and merge in fp32, each against transformers' forward of every rollout alone."""
    save_family(family, directory)
    cfg = StudentConfig(model=str(directory), dtype="float32", device="cpu")
    oracle = AutoModelForCausalLM.from_pretrained(directory).eval()
    oracle.set_attn_implementation(native_attention(oracle))
    block = rollouts_of()
    ids, starts = sequences(block, range(block.n_rows))
    with torch.no_grad():
        expected = torch.cat([alone(oracle, s, start) for s, start in zip(ids, starts, strict=True)]).numpy()
    row = Row()

    def cell(column: str, work: Callable[[], None]) -> None:
        try:
            work()
            row.cells[column] = RIGHT
        except AssertionError:
            row.cells[column] = "wrong"
        except RedpenError as error:
            reason = str(error).replace(str(directory), "MODEL").partition(": ")[2]
            row.cells[column] = f"refused: {reason.partition('; ')[0]}"

    def sample() -> None:
        sampler = TransformersSampler(
            models.load_model(cfg, attention="sampling"), Sampling(1.0, 1.0, (2,), 2, 12, seed=0)
        )
        prompts = [(i, s[:start]) for i, (s, start) in enumerate(zip(ids[:2], starts[:2], strict=True))]
        found = sampler.sample_block(PromptBlock(0, [*prompts, (2, ids[0][:1])]))
        with torch.no_grad():
            parts = [alone(oracle, s, start) for s, start in zip(*sequences(found, range(found.n_rows)), strict=True)]
        close(found.rollout_logprobs, torch.cat(parts).numpy(), 3e-4)  # a cache adds up in another order

    def score() -> None:
        model = models.load_model(cfg)
        settle_layout(model, ids[:2] + ids[3:], starts[:2] + starts[3:])
        row.layout = "packed" if is_packed(model) else "rows"
        close(ResidentScorer(model, ScoreOptions(tile_tokens=100)).compute_logprobs(block).logprobs, expected)

    def stream() -> None:
        from pipeline.streaming.streamed import StreamedScorer

        scorer = StreamedScorer(cfg, ScoreOptions(tile_tokens=100), memory_gib=1)
        close(scorer.compute_logprobs(block).logprobs, expected)

    def train() -> None:
        settings = TrainConfig(lora_rank=2, lora_alpha=4)
        model = make_trainable(models.load_model(cfg, trainable=True), settings)
        unwrapped(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        training_mode(model)
        tokens = lay_out(model, ids, starts)
        result = chunked_head_loss(
            response_hidden(model, tokens),
            Head.of(model),
            tokens.target_ids[:, None],
            lambda rows, logprobs, rest: -logprobs.sum() / len(expected),
        )
        close(result.logprobs_TC[:, 0].numpy(), expected)  # the first step's ratio, and ESS, are 1
        result.loss.backward()
        ours = {name: p.grad.clone() for name, p in trainable(model).items() if p.grad is not None}
        model.zero_grad()
        model.eval()
        unwrapped(model).set_attn_implementation(native_attention(model))
        for s, start in zip(ids, starts, strict=True):
            torch.autograd.backward(-alone(model, s, start).sum() / len(expected))
        theirs = {name: p.grad for name, p in trainable(model).items() if p.grad is not None}
        assert ours.keys() == theirs.keys() and ours
        size = max(float(g.abs().max()) for g in theirs.values())
        assert size > 0
        worst = max(float((ours[name] - g).abs().max()) for name, g in theirs.items())
        assert worst <= 1e-4 * size, f"gradients differ by {worst / size:.1e}"

    def merged() -> None:
        model = make_trainable(models.load_model(cfg, trainable=True), TrainConfig(lora_rank=2, lora_alpha=4))
        for parameter in trainable(model).values():
            torch.nn.init.normal_(parameter, std=0.1)
        model.eval()
        unwrapped(model).set_attn_implementation(native_attention(model))
        with torch.no_grad():
            before = alone(model, ids[1], starts[1])
            after = alone(merge(model, torch.float32), ids[1], starts[1])
        close(after.numpy(), before.numpy())
        assert (before.numpy() - expected[5:25]).any(), "the adapter does something"

    for column, work in zip(COLUMNS, (sample, score, stream, train, merged), strict=True):
        cell(column, work)
    return row


def close(found: np.ndarray, expected: np.ndarray, bound: float = _FP32) -> None:
    worst = float(np.abs(found - expected).max())
    assert worst <= bound, f"log-probs differ by {worst:.1e} nats"


def line(family: str, row: Row) -> str:
    """The family's line in docs/models.md."""
    cells = [row.cells[column] for column in COLUMNS]
    return f"| {family} | {row.layout or '-'} | {' | '.join(cells)} | not tried |"


def write_page() -> None:
    lines = []
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as directory:
            lines.append(line(family, try_family(family, Path(directory))))
            print(lines[-1], flush=True)
    start = "| family |"
    head = PAGE.read_text(encoding="utf-8").partition(start)[0]
    header = [f"| family | layout | {' | '.join(COLUMNS)} | vLLM |", "|---" * (len(COLUMNS) + 3) + "|"]
    PAGE.write_text(head + "\n".join([*header, *lines]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_page()
