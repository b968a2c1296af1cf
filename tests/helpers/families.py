"""Families of models that are tried: a tiny configuration of each, and what redpen makes of it, step by step.

A new family is one line in `FAMILIES`; `helpers.every_family` writes docs/models.md.
"""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
)

import cache_schema as cs
import pipeline.merge
from helpers.caches import small_recipe
from helpers.tiny_configs import VOCAB, tiny_config
from pipeline.config.recipe import RewardConfig, StudentConfig, TrainConfig
from pipeline.engines.resident import ResidentScorer
from pipeline.engines.sampling import PromptBlock, Sampling
from pipeline.engines.scoring import ScoreOptions, sequences
from pipeline.engines.transformers_sampler import TransformersSampler
from pipeline.errors import ModelError, RedpenError
from pipeline.forward.head import unwrapped
from pipeline.forward.packing_check import settle_layout
from pipeline.forward.rows import attention_of, is_packed, native_attention, sampling_attention
from pipeline.models import load as models
from pipeline.models import lora
from pipeline.models.lora import make_trainable, trainable
from pipeline.plan import Device
from pipeline.plan.assumed import Lengths
from pipeline.plan.cost import costs
from pipeline.plan.memory import PlannedModels, by_step
from pipeline.train import in_memory
from pipeline.train.objective import PolicyGradient
from pipeline.train.replay import Batch
from pipeline.train.reward import ADVANTAGE
from pipeline.train.trainer import StudentTrainer

COLUMNS = ("rollouts", "score", "streamed", "train", "merge", "bf16", "plan")
#: Set to see where a step fails.
VERBOSE = "VERBOSE" in os.environ
RIGHT = "right"
PAGE = Path(__file__).parents[2] / "docs" / "models.md"

_LONGROPE = {
    "original_max_position_embeddings": 400,
    "max_position_embeddings": 800,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
    },
}
# Two layers that keep keys and values, and two that use theirs.
_SHARED_KV = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}
_ZAMBA = {"attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4, "mamba_headdim": 8}
_QSA = {
    "ple_layer_ids": [1],
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}

#: family: (model type of transformers, settings other than tiny sizes, `helpers.tiny_configs`)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2": ("qwen2", {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]}),
    "Qwen3": ("qwen3", {}),
    "Qwen3-MoE": ("qwen3_moe", {}),
    "Qwen3-Next": ("qwen3_next", {}),
    "Qwen3-VL": ("qwen3_vl", {}),
    "Qwen3.5 (text)": ("qwen3_5_text", {}),
    "Qwen3.5": ("qwen3_5", {}),
    "Qwen3.5-MoE": ("qwen3_5_moe", {}),
    "Qwen4-Exp": ("qwen4_exp", _QSA),
    "Llama": ("llama", {}),
    "Llama 4": ("llama4", {"layer_types": ["chunked_attention", "full_attention"]}),
    "Mistral": ("mistral", {}),
    "Mistral 3": ("mistral3", {}),
    "Ministral": ("ministral", {"head_dim": 8}),
    "Mixtral": ("mixtral", {}),
    "gpt-oss": ("gpt_oss", {}),
    "Gemma 2": ("gemma2", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}),
    "Gemma 3": ("gemma3", {}),
    "Gemma 3n": ("gemma3n_text", dict(_SHARED_KV, intermediate_size=48)),
    "Gemma 4 (text)": ("gemma4_text", dict(_SHARED_KV, global_head_dim=16)),
    "Gemma 4": ("gemma4", dict(_SHARED_KV, global_head_dim=16)),
    "GLM-4": ("glm4", {}),
    "GLM-4.5": ("glm4_moe", {}),
    "GLM-5": ("glm_moe_dsa", {}),
    "DeepSeek-V2": ("deepseek_v2", {"num_experts_per_tok": 2}),
    "DeepSeek-V3": ("deepseek_v3", {}),
    "DeepSeek-V3.2": ("deepseek_v32", {}),
    "DeepSeek-V4": ("deepseek_v4", {}),
    "Kimi Linear": ("kimi_linear", {}),
    "Cohere": ("cohere", {}),
    "Cohere 2": ("cohere2", {}),
    "OLMo 2": ("olmo2", {}),
    "OLMo 3": ("olmo3", {}),
    "OLMo hybrid": ("olmo_hybrid", {}),
    "OLMoE": ("olmoe", {}),
    "Exaone 4": ("exaone4", {}),
    "SmolLM3": ("smollm3", {}),
    "Phi-3 (LongRoPE)": ("phi3", _LONGROPE),
    "Phi-4-mini": ("phi3", dict(_LONGROPE, partial_rotary_factor=0.5)),
    "PhiMoE": ("phimoe", {}),
    "Granite": ("granite", {"logits_scaling": 2.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5}),
    "Granite 4 hybrid": (
        "granitemoehybrid",
        {"layer_types": ["mamba", "attention", "mamba"], "num_hidden_layers": 3, "shared_intermediate_size": 48},
    ),
    "LFM2": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "LFM2-MoE": ("lfm2_moe", {"layer_types": ["conv", "full_attention"]}),
    "Bamba": ("bamba", {"attn_layer_indices": [1]}),
    "Falcon-H1": ("falcon_h1", {}),
    "Nemotron": ("nemotron", {"head_dim": 8, "num_key_value_heads": 2}),
    "Nemotron-H": ("nemotron_h", {}),
    "Mamba": ("mamba", {}),
    "Mamba 2": ("mamba2", {"num_heads": 8}),
    "Jamba": ("jamba", {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False}),
    "Zamba2": (
        "zamba2",
        {"layers_block_type": ["mamba", "hybrid"] * 2, "num_hidden_layers": 4, "n_mamba_heads": 8, **_ZAMBA},
    ),
    "MiniMax": ("minimax", {}),
    "MiniMax-M2": ("minimax_m2", {}),
    "RecurrentGemma": ("recurrent_gemma", {}),
    "RWKV": ("rwkv", {"rescale_every": 1}),
    "Hunyuan": ("hunyuan_v1_dense", {"head_dim": 8}),
    "Ernie 4.5": ("ernie4_5", {}),
    "MiMo-V2": ("mimo_v2_flash", {}),
    "Seed-OSS": ("seed_oss", {}),
    "Apertus": ("apertus", {}),
    "Arcee": ("arcee", {}),
    "BitNet": ("bitnet", {}),
    "DBRX": (
        "dbrx",
        {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}, "ffn_config": {"ffn_hidden_size": 48}},
    ),
    "NeoX": ("gpt_neox", {}),
    "StableLM": ("stablelm", {}),
    "Starcoder2": ("starcoder2", {}),
    "OPT": ("opt", {}),
    "BLOOM": ("bloom", {}),
    "MPT": ("mpt", {}),
    "GPT-2": ("gpt2", {}),
    "GPT-J": ("gptj", {}),
    "GPT-Neo": ("gpt_neo", {"attention_types": [[["global", "local"], 1]]}),
    "CodeGen": ("codegen", {}),
    "XGLM": ("xglm", {}),
    "BioGPT": ("biogpt", {}),
    "Falcon": ("falcon", {}),
    "Falcon, ALiBi": ("falcon", {"alibi": True}),
    "Doge": ("doge", {}),
    "Youtu": ("youtu", {}),
    "CTRL": ("ctrl", {}),
    "JetMoE": ("jetmoe", {}),
    "Laguna": ("laguna", {}),
    "AFMoE": ("afmoe", {}),
    "A.X-K2": ("axk2", {}),
    "Cohere 2 MoE": ("cohere2_moe", {}),
    "Ernie 4.5 MoE": ("ernie4_5_moe", {}),
    "EXAONE MoE": ("exaone_moe", {}),
    "Gemma": ("gemma", {}),
    "GLM": ("glm", {}),
    "GPT-BigCode": ("gpt_bigcode", {}),
    "Granite MoE": ("granitemoe", {}),
    "Granite, sliding window": ("granite_swa", {}),
    "Helium": ("helium", {}),
    "Hy 3": ("hy_v3", {}),
    "HyperCLOVA X": ("hyperclovax", {}),
    "Jais 2": ("jais2", {}),
}

# Rollouts of a cache: prompt and response of so many tokens, of which the response begins there.
_LENGTHS, _STARTS = (9, 30, 304, 2, 41), (4, 10, 4, 1, 40)
# A model with logits of the size of a real one's, but this small, computes to a few 1e-6.
_FP32, _FP32_GRADIENT = 1e-5, 1e-5
# A recurrent state that is updated token by token has its sums in another order than a scan by chunks.
_RECURRENT = 5e-5
_TILE_TOKENS = 100
_LORA = TrainConfig(lora_rank=2, lora_alpha=4, tokens_per_microbatch=128, gradient_checkpointing=True)


@dataclass
class Row:
    """What a family does.

    Attributes:
        layout: "packed" or "rows"; "" of a model that cannot be scored, of which nothing else is tried.
        cells: by column, `RIGHT` or why not.
        worst: by column, how far apart what is compared there was.
    """

    layout: str = ""
    cells: dict[str, str] = field(default_factory=dict)
    worst: dict[str, float] = field(default_factory=dict)


def config_of(family: str) -> PreTrainedConfig:
    model_type, settings = FAMILIES[family]
    return tiny_config(model_type, **settings)


def save_model(config: PreTrainedConfig, directory: Path) -> None:
    """A random model, with activations, attention scores and logits of the size of a real one's."""
    torch.manual_seed(0)
    model = auto_class(config).from_config(config).eval()
    randomize(model)
    model.save_pretrained(directory)


def randomize(model: nn.Module) -> None:
    """Weights under which every sum is about as large as its terms; the library's 0.02 makes tiny models uniform."""
    ends = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}  # type: ignore
    wide = {id(m.weight): m.weight.shape[0] for m in model.modules() if type(m).__name__ == "Conv1D"}
    wide |= {id(m.weight): m.weight.shape[1] for m in model.modules() if isinstance(m, nn.Linear)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if id(parameter) in ends or "embed" in name:
                parameter.normal_(std=0.3)
            elif id(parameter) in wide:
                parameter.normal_(std=wide[id(parameter)] ** -0.5)
            elif parameter.ndim == 3 and "conv" not in name:  # experts, of which some are transposed
                parameter.normal_(std=32**-0.5)
            elif parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)


def auto_class(config: PreTrainedConfig) -> Any:
    """Of transformers, which class has all of a model: a vision wrapper's has its vision tower, too."""
    return (
        AutoModelForImageTextToText if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING else AutoModelForCausalLM
    )


def make_rollouts(lengths: tuple[int, ...] = _LENGTHS, starts: tuple[int, ...] = _STARTS) -> cs.RolloutBlock:
    generator = np.random.default_rng(0)
    ids = [generator.integers(3, VOCAB, length).astype(np.int32) for length in lengths]
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


def all_alone(model: Any, block: cs.RolloutBlock) -> np.ndarray:
    """The log-probs [T] of every response of a block by `alone`."""
    with torch.no_grad():
        parts = [alone(model, s, start) for s, start in zip(*sequences(block, range(block.n_rows)), strict=True)]
    found: np.ndarray = torch.cat(parts).numpy()
    return found


def in_batches(model: Any, block: cs.RolloutBlock) -> np.ndarray:
    """The same in two batches of transformers': all rollouts padded on the right under a mask, and beside others of
    their length. [2, T]
    """
    found = []
    ids, starts = sequences(block, range(block.n_rows))
    longest = max(map(len, ids))
    padded = torch.from_numpy(np.stack([np.pad(s, (0, longest - len(s))) for s in ids]).astype(np.int64))
    mask = torch.from_numpy(np.stack([np.arange(longest) < len(s) for s in ids]).astype(np.int64))
    with torch.no_grad():
        together = model(input_ids=padded, attention_mask=mask, use_cache=False).logits
        for row, (s, start) in enumerate(zip(ids, starts, strict=True)):
            tokens = padded[row, : len(s)]
            beside = model(input_ids=torch.stack([tokens, tokens.flip(0), tokens.roll(1)]), use_cache=False).logits[0]
            logits = torch.stack([together[row, start - 1 : len(s) - 1], beside[start - 1 : -1]])
            found.append(logits.float().log_softmax(2).gather(2, tokens[None, start:, None].expand(2, -1, 1))[..., 0])
    return torch.cat(found, 1).numpy()


def with_fp32_head(model: Any) -> Any:
    """The model with logits in fp32 from half-precision weights, as everything in redpen has them."""
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().float())
    if head.bias is not None:
        head.bias = nn.Parameter(head.bias.detach().float())
    head.register_forward_pre_hook(lambda module, args: (args[0].to(model.dtype).float(),))
    return model


class Trial:
    """A family's model in one dtype, and what transformers' own forward makes of the rollouts one by one."""

    def __init__(self, directory: Path, dtype: str):
        self.cfg = StudentConfig(model=str(directory), dtype=dtype, device="cpu")
        self.block = make_rollouts()
        self.ids, self.starts = sequences(self.block, range(self.block.n_rows))
        self.directory, self.dtype = directory, dtype

    def plain(self, directory: Path) -> Any:
        """A model as anyone would load it."""
        found = auto_class(AutoConfig.from_pretrained(directory))
        model = found.from_pretrained(directory, dtype=getattr(torch, self.dtype))
        model.set_attn_implementation(native_attention(model))
        return model.eval()

    @cached_property
    def oracle(self) -> Any:
        model = self.plain(self.directory)
        return model if self.dtype == "float32" else with_fp32_head(model)

    @cached_property
    def expected(self) -> np.ndarray:
        return all_alone(self.oracle, self.block)

    @cached_property
    def model(self) -> Any:
        """The model as redpen loads it to score."""
        return models.load_model(self.cfg)

    def sample(self) -> tuple[np.ndarray, np.ndarray]:
        """Log-probs of sampled tokens by the sampler and by the oracle."""
        with attention_of(self.model, sampling_attention(self.model)):
            sampler = TransformersSampler(self.model, Sampling(1.0, 1.0, (2,), 2, 12, seed=0))
            prompts = [(i, self.ids[i][: self.starts[i]]) for i in (0, 1)]
            block = sampler.sample_block(PromptBlock(0, [*prompts, (2, self.ids[0][:1])]))
        return block.rollout_logprobs, all_alone(self.oracle, block)

    def score(self, checked: Sequence[int] = (0, 1, 3)) -> tuple[str, np.ndarray]:
        """The layout, and the log-probs of a resident scorer."""
        settle_layout(self.model, [self.ids[i] for i in checked], [self.starts[i] for i in checked])
        scorer = ResidentScorer(self.model, ScoreOptions(tile_tokens=_TILE_TOKENS))
        return "packed" if is_packed(self.model) else "rows", scorer.compute_logprobs(self.block).logprobs

    def stream(self) -> np.ndarray:
        """The log-probs of a streamed scorer."""
        from pipeline.streaming.streamed import StreamedScorer

        scorer = StreamedScorer(self.cfg, ScoreOptions(tile_tokens=_TILE_TOKENS), memory_gib=1)
        return scorer.compute_logprobs(self.block).logprobs

    @cached_property
    def trainer(self) -> StudentTrainer:
        """A trainer whose loss is the mean negative log-prob, as long as the student is that of `batch`. It makes a
        PEFT model of `model`."""
        can = bool(self.model.supports_gradient_checkpointing)
        train = _LORA.model_copy(update={"gradient_checkpointing": can})
        model = make_trainable(self.model, train)
        return StudentTrainer(model, PolicyGradient(train, RewardConfig(coefficient=1.0)), train)

    def batch(self, logprobs: np.ndarray) -> Batch:
        return in_memory.batch(0, self.block, logprobs, {ADVANTAGE: np.ones(len(logprobs), np.float32)})


class FamilyTest:
    """Sample, score, stream, train and merge, each against transformers' forward of every rollout alone, and plan."""

    def __init__(self, config: PreTrainedConfig, directory: Path):
        self.directory = directory / "model"
        save_model(config, self.directory)
        self.fp32, self.bf16, self.row = Trial(self.directory, "float32"), Trial(self.directory, "bfloat16"), Row()

    def run(self) -> Row:
        for column, step in _STEPS.items():
            try:
                self.row.cells[column] = step(self) or RIGHT
            except AssertionError as error:
                self.row.cells[column] = f"wrong: {' '.join(str(error).split())[:160]}"
            except RedpenError as error:
                reason = str(error).replace(str(self.directory), "MODEL").partition(": ")[2]
                self.row.cells[column] = f"refused: {reason.partition('; ')[0]}"
            except Exception as error:  # a defect, to be seen in the table
                self.row.cells[column] = f"fails: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
                if VERBOSE:
                    traceback.print_exc()
            if column == "score" and not self.row.layout:  # `redpen rollouts` checks that first, too
                self.row.cells = dict.fromkeys(COLUMNS, self.row.cells[column])
                break
        return self.row

    def close(self, found: np.ndarray, expected: np.ndarray, column: str, bound: float = _FP32) -> None:
        worst = self.row.worst[column] = float(np.abs(found - expected).max())
        assert worst <= bound, f"log-probs differ by {worst:.1e} nats"

    def score(self) -> None:
        self.row.layout, found = self.fp32.score()
        self.close(found, self.fp32.expected, "score")

    def rollouts(self) -> None:
        bound = _RECURRENT if self.row.layout == "rows" else _FP32  # sums of a state, in another order
        self.close(*self.fp32.sample(), "rollouts", bound)

    def streamed(self) -> None:
        self.close(self.fp32.stream(), self.fp32.expected, "streamed")

    def train(self) -> str | None:
        trainer = self.fp32.trainer
        drift = trainer.gradient(self.fp32.batch(self.fp32.expected)).metrics()
        for name in ("ess", "ratio_mean", "ratio_max"):  # the student is the one that was sampled
            assert abs(drift[name] - 1) <= _FP32, f"{name} is {drift[name]}"
        ours = {name: p.grad.clone() for name, p in trainable(trainer.model).items() if p.grad is not None}
        self.row.worst["train"] = worst = gradients_apart(ours, gradients_alone(trainer.model, self.fp32))
        assert worst <= _FP32_GRADIENT, f"gradients differ by {worst:.1e} of the largest"
        return None if trainer.train.gradient_checkpointing else "right, without train.gradient_checkpointing"

    def merge(self) -> None:
        """An adapter of the trainer, saved; plain peft applies it to the plain model, and redpen merges it."""
        model, fp32 = self.fp32.trainer.model, self.fp32
        for parameter in trainable(model).values():
            torch.nn.init.normal_(parameter, std=0.1)
        adapter, merged = self.directory.parent / "adapter", self.directory.parent / "merged"
        lora.save(model, trainable(model), adapter, fp32.cfg, "")
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")
            applied = PeftModel.from_pretrained(fp32.oracle, adapter).eval()
        with torch.no_grad():
            expected = alone(applied, fp32.ids[1], fp32.starts[1]).numpy()
            effect = float(np.abs(expected - fp32.expected[5:25]).max())
            assert effect > 1e-2, "the adapter does nothing"
            pipeline.merge.run(str(adapter), str(merged), base=str(self.directory))
            found = alone(fp32.plain(merged), fp32.ids[1], fp32.starts[1]).numpy()
            self.close(found, expected, "merge", _FP32 * max(1.0, effect))  # W + B A is rounded once more

    def half(self) -> str | None:
        bf16 = self.bf16
        scored = bf16.score((1, 3))[1]
        noise = np.abs(in_batches(bf16.oracle, bf16.block) - bf16.expected)
        rounding = np.abs(self.fp32.expected - bf16.expected)
        bound, not_streamed = max(float(noise.mean(1).max()), 0.05 * float(rounding.mean())), None
        found = {"score": scored}
        try:
            found["streamed"] = bf16.stream()
        except ModelError as error:
            not_streamed = str(error)
        # Eager attention rounds alike in any batch, but packed attention is another kernel.
        is_eager = bf16.oracle.config.get_text_config()._attn_implementation == "eager"
        for name, ours in found.items():
            apart = np.abs(ours - bf16.expected)
            if not (is_eager and np.abs(ours - self.fp32.expected).mean() <= 1.1 * rounding.mean()):
                assert apart.mean() <= bound, f"{name}: {apart.mean():.1e} nats a token, in another batch {bound:.1e}"
            assert apart.max() <= rounding.max(), f"{name}: {apart.max():.1e} nats, rounding {rounding.max():.1e}"
        sampled, expected = bf16.sample()
        apart = np.abs(sampled - expected)
        assert apart.mean() <= rounding.mean(), f"rollouts: {apart.mean():.1e} nats a token"
        if self.row.cells["train"].startswith(RIGHT):
            drift = bf16.trainer.measure(bf16.batch(scored)).metrics()
            assert drift["ess"] >= 1 - 1e-4, f"ess is {drift['ess']}"
        if not_streamed is not None and self.row.cells["streamed"] == RIGHT:
            return f"right; streamed is refused: {not_streamed}"
        return None

    def plan(self) -> None:
        """The parameters that a plan counts are those of the model, and it has figures for every step."""
        can = str(bool(self.bf16.model.supports_gradient_checkpointing)).lower()
        models = (f"student.model={self.directory}", f"teacher.model={self.directory}")
        recipe = small_recipe(*models, f"train.gradient_checkpointing={can}")
        planned = PlannedModels.of(recipe)
        needs = by_step(recipe, planned, Device())
        costs(recipe, planned, Device(), Lengths.of(recipe, None, None), needs)
        real = sum(p.numel() for name, p in self.bf16.model.named_parameters() if "lora_" not in name)
        counted = planned.weights[cs.STUDENT].parameters
        assert counted == real, f"{counted} parameters are planned for, the model has {real}"


_STEPS: dict[str, Callable[[FamilyTest], str | None]] = {
    "score": FamilyTest.score,
    "rollouts": FamilyTest.rollouts,
    "streamed": FamilyTest.streamed,
    "train": FamilyTest.train,
    "merge": FamilyTest.merge,
    "bf16": FamilyTest.half,
    "plan": FamilyTest.plan,
}


def try_model(config: PreTrainedConfig, directory: Path) -> Row:
    return FamilyTest(config, directory).run()


Gradients = dict[str, Tensor]


def gradients_alone(model: Any, trial: Trial) -> Gradients:
    """Gradients of the mean log-prob, of rollouts that transformers' own forward runs one by one."""
    model.zero_grad()
    model.eval()
    unwrapped(model).set_attn_implementation(native_attention(model))
    for s, start in zip(trial.ids, trial.starts, strict=True):
        torch.autograd.backward(-alone(model, s, start).sum() / len(trial.expected))
    return {name: p.grad for name, p in trainable(model).items() if p.grad is not None}


def gradients_apart(ours: Gradients, theirs: Gradients) -> float:
    """The largest difference, relative to the largest gradient."""
    assert theirs.keys() <= ours.keys(), "some weights have no gradient"
    size = max(float(g.abs().max()) for g in theirs.values())
    assert size > 0
    return max(float((g - theirs.get(name, torch.zeros(()))).abs().max()) for name, g in ours.items()) / size


def line(family: str, row: Row) -> str:
    """The family's line in docs/models.md, but for what vLLM does."""
    return f"| {family} | {row.layout} | {' | '.join(row.cells[column] for column in COLUMNS)} |"


def rows_of_page() -> dict[str, tuple[str, str]]:
    """Of every family in docs/models.md its `line`, and what vLLM does."""
    found = {}
    for row in PAGE.read_text(encoding="utf-8").splitlines():
        family = row.split("|")[1].strip() if row.startswith("| ") else ""
        if family in FAMILIES:
            before, _, in_vllm = row.removesuffix(" |").rpartition(" | ")
            found[family] = f"{before} |", in_vllm
    return found
