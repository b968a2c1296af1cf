"""Small random models of many families, adapters, and the largest tensor of a computation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
)

from helpers.caches import small_recipe
from pipeline.forward.attention import ATTENTION
from pipeline.models.resolve import resolve

V = 71


SMALL_CONFIG = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


FAMILIES = {
    "qwen2": Qwen2Config(**SMALL_CONFIG),
    "qwen2-window": Qwen2Config(**SMALL_CONFIG, use_sliding_window=True, sliding_window=6, max_window_layers=1),
    "qwen3": Qwen3Config(**SMALL_CONFIG, head_dim=8),
    "llama": LlamaConfig(**SMALL_CONFIG),
    "mistral-window": MistralConfig(**SMALL_CONFIG, sliding_window=5),
    "gemma2": Gemma2Config(
        **SMALL_CONFIG, head_dim=8, sliding_window=6, query_pre_attn_scalar=8, attn_logit_softcapping=2.0
    ),
    "gemma3": Gemma3TextConfig(**SMALL_CONFIG, head_dim=8, sliding_window=6, query_pre_attn_scalar=8),
    "qwen3-moe": Qwen3MoeConfig(**SMALL_CONFIG, head_dim=8, **MOE),
}


LENGTHS, STARTS = (12, 30, 5, 41, 30, 2, 7, 1), (4, 10, 5, 1, 29, 1, 3, 1)


def random_model(config: PreTrainedConfig, attention: str = ATTENTION):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:  # the library's 0.02 makes attention uniform, which hides mistakes
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def random_sequences(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(3, V, length).astype(np.int32) for length in lengths]


def of_few_prompts() -> list[np.ndarray]:
    """The same with rollouts 1 and 3, 4 and 7, and 0, 2 and 6 beginning alike, as far as `STARTS_OF_FEW` says."""
    sequences = random_sequences()
    for copy, first in ((3, 1), (7, 4), (2, 0), (6, 0)):
        shared = STARTS_OF_FEW[copy]
        sequences[copy][:shared] = sequences[first][:shared]
    return sequences


STARTS_OF_FEW = (4, 10, 4, 10, 1, 1, 4, 1)


IDS = torch.arange(40)[None] * 5 % 259


LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model.eval()(input_ids=IDS).logits.float()
    return out


def plain(path: str | Path, dtype: torch.dtype = torch.float32) -> Qwen3ForCausalLM:
    """A model as anyone would load it."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


def small_model(path: Path, *, tied: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    """A random student with the toy's tokenizer."""
    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=128,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        eos_token_id=256,
    )
    Qwen3ForCausalLM(config).to(dtype).save_pretrained(path)
    resolve(small_recipe().student).tokenizer.save_pretrained(path)
    return path


def random_adapter(base: Path | str, path: Path, **settings: object) -> Path:
    """A LoRA that changes its base a lot."""
    torch.manual_seed(4)
    options = {"r": 4, "lora_alpha": 8, "target_modules": LAYERS} | settings
    adapted = get_peft_model(plain(base), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options))
    adapted.save_pretrained(path, save_embedding_layers=False)
    return path


class _LargestOutput(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return out


@contextmanager
def largest_output() -> Iterator[_LargestOutput]:
    """Everything inside is watched; `.numel` is that of the largest tensor that came out of an operation."""
    with _LargestOutput() as mode:
        yield mode
