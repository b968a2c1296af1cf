"""On a GPU every tensor of scoring and training is on it, and few values are read back: shown without one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, PreTrainedConfig, Qwen3_5TextConfig, Qwen3Config

import cache_schema as cs
from helpers.fake_cuda import MixedDevicesError, fake_cuda
from helpers.models import FAMILIES, small_model
from pipeline.config import ModelConfig, Recipe
from pipeline.engines.resident import ResidentScorer
from pipeline.engines.sampling import PromptBlock, Sampling
from pipeline.engines.scoring import ScoreOptions, TokenBatch
from pipeline.engines.transformers_sampler import TransformersSampler
from pipeline.forward import head, rows
from pipeline.forward.attention import ATTENTION, PackPlan, register_packed_attention
from pipeline.forward.rows import native_attention, sampling_attention, set_can_pack
from pipeline.models import load as models
from pipeline.models.lora import make_trainable
from pipeline.streaming import layers, streamed
from pipeline.train import losses
from pipeline.train.build import make_objective, make_replay
from pipeline.train.trainer import StudentTrainer

#: Of the toy, with more layers than one.
SIZES = {"vocab_size": 259, "eos_token_id": 256}
ONE_OF_EACH = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
CONFIGS: dict[str, PreTrainedConfig] = {
    "qwen3": Qwen3Config(**FAMILIES["qwen3"].to_diff_dict() | SIZES),
    "gemma2": Gemma2Config(**FAMILIES["gemma2"].to_diff_dict() | SIZES),
    # one layer of each type: the fallback of the linear one is slow in fake tensors
    "qwen3.5": Qwen3_5TextConfig(**SIZES, **ONE_OF_EACH),
}


def on_cuda(family: str, dtype: torch.dtype) -> Any:
    """A model that was loaded to the GPU for scoring."""
    register_packed_attention()
    packed = family != "qwen3.5"
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(
            CONFIGS[family], dtype=dtype, attn_implementation=ATTENTION if packed else None
        )
    set_can_pack(model, packed)
    if not packed:
        model.set_attn_implementation(native_attention(model))
    return model.eval().requires_grad_(False)


def trained(
    recipe: Recipe, cache: Path, family: str = "qwen3", dtype: torch.dtype = torch.bfloat16, *, check: bool = False
) -> Counter[str]:
    """Makes an update of a recipe on the first batch of a cache; returns where values were read."""
    round_ = cs.open(cache).round()
    objective = make_objective(recipe, round_, ("teacher",))
    batch = make_replay(recipe, round_, objective).batch(0)
    with fake_cuda() as cuda:
        trainer = StudentTrainer(make_trainable(on_cuda(family, dtype), recipe.train), objective, recipe.train)
        if check:
            packed = "packed and unpacked" in trainer.check(batch.rollouts)
            assert packed == (family != "qwen3.5"), "an error in the check is a warning, and rows"
        cuda.reads.clear()
        trainer.update(batch)
        assert all(parameter.is_cuda for parameter in trainer.parameters.values())
        assert all(master.grad is not None and master.grad.is_cuda for master in trainer.masters.values())
    return cuda.reads


SMALL = "train.prompts_per_step=2", "train.tokens_per_microbatch=1000"
LOSSES = {
    "forward_kl": ("train.loss=forward_kl",),
    "jsd": ("train.loss=jsd",),
    "mixed_kl": ("train.loss=mixed_kl",),
    "importance_sampling": (
        "train.loss=importance_sampling",
        "train.ppo_clip=0.2",
        "train.behaviour_correction=true",
        "train.ratio_truncation=2.0",
    ),
    "reward": ("reward.coefficient=1.0",),
    "all weights": ("train.method=full",),
    "dropout": ("train.gradient_checkpointing=true", "train.lora_dropout=0.1", "train.share_prompts_from=1"),
}


@pytest.mark.parametrize("settings", LOSSES.values(), ids=LOSSES)
def test_training_is_on_the_gpu(settings: tuple[str, ...], toy_cache: Path, recipe: Callable[..., Recipe]) -> None:
    trained(recipe(*SMALL, *settings), toy_cache)


@pytest.mark.parametrize("family", CONFIGS)
def test_training_of_a_family(family: str, toy_cache: Path, recipe: Callable[..., Recipe]) -> None:
    """In bf16 packed rollouts take the flash kernel, in fp32 SDPA; the check runs what is not packed, too."""
    settings = recipe(*SMALL, "train.share_prompts_from=1")
    trained(settings, toy_cache, family, torch.float32, check=True)
    if family == "qwen3":
        trained(settings, toy_cache, family, torch.bfloat16, check=True)


def test_training_seldom_waits_for_the_gpu(toy_cache: Path, recipe: Callable[..., Recipe]) -> None:
    """Whatever its layers and chunks are: a wait in each would leave the GPU idle."""
    few, many = (trained(recipe(*SMALL, f"train.rows_per_chunk={rows}"), toy_cache) for rows in (1000, 20))
    assert few == many
    assert sum(few.values()) <= 8, few


OPTIONS = ScoreOptions(candidates=4, topk=3, sampling_temperature=0.7, tile_tokens=100, rows_per_chunk=32)


@pytest.fixture(scope="module")
def block(toy_cache: Path) -> cs.RolloutBlock:
    return cs.open(toy_cache).round().rollouts.read(0)


@pytest.mark.parametrize("family", CONFIGS)
def test_scoring_is_on_the_gpu(family: str, block: cs.RolloutBlock) -> None:
    with fake_cuda():
        scorer = ResidentScorer(on_cuda(family, torch.bfloat16), OPTIONS)
        student = scorer.compute_logprobs(block)
        scorer.compute_logprobs(TokenBatch((block,), student.candidate_ids))
        options = replace(OPTIONS, candidate_kind="sampled", topk_among=np.arange(259) < 200)
        ResidentScorer(on_cuda(family, torch.float32), options).compute_logprobs(block)


@pytest.fixture
def without_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies and computation in turn: which of them waits for the other needs a GPU, where tensors are does not."""
    monkeypatch.setattr(models, "pick_device", lambda cfg: torch.device("cuda", 0))
    monkeypatch.setattr(layers, "_cuda", mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", mock.MagicMock())


@pytest.mark.parametrize("embedding", ["on the GPU", "in host memory"])
def test_streamed_scoring_is_on_the_gpu(
    embedding: str, block: cs.RolloutBlock, tmp_path: Path, without_streams: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed, "_EMBEDDING_SHARE", 0.0 if embedding == "in host memory" else 1.0)
    directory = small_model(tmp_path, dtype=torch.bfloat16)
    with fake_cuda():
        cfg = ModelConfig(model=str(directory), dtype="bfloat16")
        scorer = streamed.StreamedScorer(cfg, OPTIONS, memory_gib=0.9)
        scores = scorer.compute_logprobs(block)
        scorer.compute_logprobs(TokenBatch((block,), scores.candidate_ids))


@pytest.mark.parametrize("family", CONFIGS)
def test_sampling_is_on_the_gpu(family: str, block: cs.RolloutBlock) -> None:
    prompts = PromptBlock(0, [(index, block.prompt_ids(index)) for index in range(2)])
    sampling = Sampling(0.7, 0.9, (256,), 2, 3, seed=0)
    with fake_cuda():
        model = on_cuda(family, torch.bfloat16)
        model.set_attn_implementation(sampling_attention(model))
        sampler = TransformersSampler(model, sampling)
        rollouts = sampler.sample_block(prompts)
    assert rollouts.n_tokens == 12


def test_scoring_seldom_waits_for_the_gpu(block: cs.RolloutBlock) -> None:
    def reads(rows_per_chunk: int) -> Counter[str]:
        with fake_cuda() as cuda:
            options = replace(OPTIONS, tile_tokens=10_000, rows_per_chunk=rows_per_chunk)
            ResidentScorer(on_cuda("qwen3", torch.bfloat16), options).compute_logprobs(block)
        return cuda.reads

    assert reads(20) == reads(1000)
    assert sum(reads(20).values()) <= 12


def plant_in_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    real = head.partition
    monkeypatch.setattr(head, "partition", lambda z, ids, **options: real(z + torch.ones(len(z), 1), ids, **options))


def plant_in_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = PackPlan.of
    monkeypatch.setattr(PackPlan, "of", lambda lengths, device, prefixes=None: real(lengths, "cpu", prefixes))


def plant_in_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    real = rows.gather_hidden
    monkeypatch.setattr(
        rows, "gather_hidden", lambda tokens, parts: real(replace(tokens, order=tokens.order.cpu()), parts)
    )


@pytest.mark.parametrize(
    ("plant", "family"), [(plant_in_the_head, "qwen3"), (plant_in_packing, "qwen3"), (plant_in_rows, "qwen3.5")]
)
def test_a_tensor_left_on_the_cpu_is_found(
    plant: Callable[[pytest.MonkeyPatch], None],
    family: str,
    block: cs.RolloutBlock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch)
    with fake_cuda(), pytest.raises(MixedDevicesError):
        ResidentScorer(on_cuda(family, torch.bfloat16), OPTIONS).compute_logprobs(block)


def test_a_tensor_of_a_loss_left_on_the_cpu_is_found(
    toy_cache: Path, recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = losses.reverse_kl
    monkeypatch.setattr(
        losses, "reverse_kl", lambda *columns, **clip: real(*columns, **clip) * torch.ones(len(columns[0]))
    )
    with pytest.raises(MixedDevicesError):
        trained(recipe(*SMALL), toy_cache)
