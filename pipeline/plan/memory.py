"""GPU memory of each step of a recipe, by part, in bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from pipeline.config import ModelConfig, Recipe, TrainConfig
from pipeline.errors import ConfigError
from pipeline.forward.head import unwrapped
from pipeline.forward.packing import decoder_body
from pipeline.models import meta_model
from pipeline.models.lora import checkpoint_gradients, make_trainable, trainable, training_mode
from pipeline.models.peak_memory import PeakBytes, bytes_of
from pipeline.plan.assumed import Device, OwnPrompts, own_prompts
from pipeline.streaming.layered import LayeredModel
from pipeline.streaming.layers import SLOTS
from pipeline.streaming.memory import WaveBudget

GIB = 2**30
# CUDA context, kernels and cuBLAS workspaces.
CONTEXT_BYTES = 0.75 * GIB
# Logits of a chunk, and as much again for intermediate results.
_SCORED_LOGITS = 2.0
# Columns that the loss processes at a time when it needs a temporary tensor.
_COLUMN_BLOCK = 16_384
# For each position and column: an int64 id, log-probs of teacher and student in fp32, and a mask.
_COLUMN_BYTES = 8 + 3 * 4 + 1
# bitsandbytes keeps moments of smaller tensors in fp32, and of others one fp32 scale for each block.
_SMALLEST_IN_8_BITS, _BLOCK_IN_8_BITS = 4096, 256
# Tokens that vLLM prefills at a time.
_PREFILL_TOKENS = 8192
_STEP = 256


@dataclass(frozen=True)
class StepMemory:
    """The peak GPU memory of one step.

    Attributes:
        parts: bytes by purpose, in use at the same time.
        refused: why the step cannot run at all.
        largest: the largest tokens_per_microbatch that fits (training).
        wave: tokens that go through the layers together (streamed scoring).
        together: rollouts that are sampled together.
    """

    step: str
    parts: Mapping[str, float]
    refused: str | None = None
    largest: int | None = None
    wave: int | None = None
    together: int | None = None

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    def as_dict(self) -> dict[str, Any]:
        found = {name: value for name, value in vars(self).items() if value is not None}
        return found | {"total": self.total}


@dataclass
class PlannedModels:
    """A recipe's models on torch's meta device, their weight counts and teachers' own prompts, by name.

    Attributes:
        own_prompts: see the function of that name.
        adapter: parameters of the LoRA; None with train.method = "full".
        trainer: the student with its LoRA or trainable weights.
    """

    configs: dict[str, ModelConfig]
    meta_models: dict[str, Any]
    weights: dict[str, meta_model.Weights]
    own_prompts: dict[str, OwnPrompts | None]
    adapter: int | None
    trainer: Any = field(repr=False)

    @classmethod
    def of(cls, recipe: Recipe) -> PlannedModels:
        """Build them from their configs. Raises `ModelError`, and `PromptError` as `own_prompts`."""
        configs: dict[str, ModelConfig] = {"student": recipe.student} | {t.name: t for t in recipe.teacher}
        meta_models = {name: meta_model.load_meta_model(cfg) for name, cfg in configs.items()}
        weights = {name: meta_model.Weights.of(meta_models[name], cfg.quantisation) for name, cfg in configs.items()}
        trainer = make_trainable(meta_model.load_meta_model(recipe.student), recipe.train)
        if recipe.train.gradient_checkpointing:
            checkpoint_gradients(trainer)
        training_mode(trainer)
        adapter = sum(p.numel() for p in trainable(trainer).values()) if recipe.train.method == "lora" else None
        return cls(configs, meta_models, weights, own_prompts(recipe), adapter, trainer)

    def prompt_tokens(self, name: str, students: float) -> float:
        """Mean tokens of a prompt as this model reads it; `students`: as the student does."""
        own = self.own_prompts.get(name)
        return students if own is None else own.mean

    def tile_tokens(self, recipe: Recipe, name: str) -> int:
        """Tokens of the largest tile that this model scores: a rollout that is longer than a tile has one alone."""
        own, rollouts = self.own_prompts.get(name), recipe.rollouts
        prompt = rollouts.max_prompt_tokens if own is None else own.longest
        return max(recipe.score.tile_tokens, prompt + rollouts.max_response_tokens)

    def parameters(self) -> dict[str, dict[str, float]]:
        found = {
            name: {"parameters": weights.parameters, "multiplied": weights.multiplied, "bytes": weights.nbytes}
            for name, weights in self.weights.items()
        }
        return found | ({} if self.adapter is None else {"adapter": {"parameters": self.adapter}})


def by_step(recipe: Recipe, models: PlannedModels, device: Device) -> list[StepMemory]:
    """Sampling, each scorer that runs on this machine, and training."""
    found = [_sampling(recipe, models, device)]
    for name, cfg in models.configs.items():
        match recipe.placement(cfg):
            case "resident":
                found.append(_resident(recipe, models, name))
            case "streamed":
                found.append(_streamed(recipe, models, device, name))
    return [*found, training(recipe, models, device)]


# -- stage one -----------------------------------------------------------------------------------------------


def _sampling(recipe: Recipe, models: PlannedModels, device: Device) -> StepMemory:
    model, weights, rollouts = models.meta_models["student"], models.weights["student"], recipe.rollouts
    longest = rollouts.max_prompt_tokens + rollouts.max_response_tokens
    a_rollout = meta_model.cache_bytes(model, longest)
    parts = {"context and libraries": CONTEXT_BYTES, "weights": weights.nbytes}
    together = min(rollouts.batch_size, rollouts.prompts_per_block * rollouts.rollouts_per_prompt)
    if rollouts.engine == "vllm":
        reserved = (recipe.vllm.gpu_memory_utilization or 0.9) * device.gib * GIB
        together = rollouts.batch_size
        working = meta_model.forward_bytes(model, _PREFILL_TOKENS) + together * _vocabulary(model) * 4
        room = reserved - sum(parts.values()) - working
        together = min(together, int(room / a_rollout))
        if together < 1:
            return StepMemory("sampling", parts | {"one rollout's cache": a_rollout, "activations": working})
    else:
        prefilled = -(-together // rollouts.rollouts_per_prompt) * rollouts.max_prompt_tokens
        if rollouts.environment is not None:  # a later turn reads all that came before, for each rollout
            prefilled = together * longest
        logits = together * _vocabulary(model) * 4
        working = max(meta_model.forward_bytes(model, prefilled), 2 * logits)
    cache = f"cache of {together} rollouts of {longest:,} tokens"
    return StepMemory("sampling", parts | {cache: together * a_rollout, "activations": working}, together=together)


def _resident(recipe: Recipe, models: PlannedModels, name: str) -> StepMemory:
    model, tile = models.meta_models[name], models.tile_tokens(recipe, name)
    parts = {
        "context and libraries": CONTEXT_BYTES,
        "weights": models.weights[name].nbytes,
        f"activations of a tile of {tile:,} tokens": meta_model.forward_bytes(model, tile),
        "logits of a chunk": _scored_logits(recipe, model),
    }
    return StepMemory(f"scoring, {name}", parts)


def _streamed(recipe: Recipe, models: PlannedModels, device: Device, name: str) -> StepMemory:
    """Scoring layer by layer, with the memory budget of `pipeline.streaming.streamed`."""
    model, weights = models.meta_models[name], models.weights[name]
    layered = LayeredModel(model)
    memory = WaveBudget(torch.device("cuda"), recipe.score.memory_gib or 0.9 * device.gib)
    step = f"scoring, {name}, streamed"
    try:
        embedding = bytes_of(model.get_input_embeddings().weight)
        outside = bytes_of(list(model.parameters())) - bytes_of([list(x.parameters()) for x in layered.layers])
        if layered.embedding_alone() and not models.configs[name].adapter and embedding > 0.05 * memory.budget:
            outside -= embedding  # stays on the host
        memory.take("weights outside the layers", outside)
        memory.take(f"{SLOTS} layers", SLOTS * weights.largest_layer)
        tokens = min(recipe.score.tile_tokens, 4096)
        body, ids = decoder_body(model), torch.zeros(1, tokens, dtype=torch.int64, device="meta")
        with torch.no_grad(), meta_model.WithoutValues():
            noted = layered.note(partial(body, input_ids=ids, use_cache=False))
            with PeakBytes() as peak:
                layered.step(0, noted)
        waiting = bytes_of([noted.hidden, noted.calls]) / tokens
        head = _scored_logits(recipe, model)
        wave = memory.take_wave(models.tile_tokens(recipe, name), waiting, peak.nbytes / tokens, head)
    except ConfigError as error:
        return StepMemory(step, memory.taken, refused=str(error))
    parts: dict[str, float] = {"context": CONTEXT_BYTES - memory.taken["libraries"], **memory.taken}
    return StepMemory(step, parts, wave=wave)


def _scored_logits(recipe: Recipe, model: Any) -> float:
    rows = min(recipe.score.rows_per_chunk, recipe.score.tile_tokens)
    return _SCORED_LOGITS * rows * _vocabulary(model) * 4


def _vocabulary(model: Any) -> int:
    return int(model.get_output_embeddings().weight.shape[0])


# -- training ------------------------------------------------------------------------------------------------


def training(recipe: Recipe, models: PlannedModels, device: Device) -> StepMemory:
    """Training on one rank. Memory grows linearly with the micro-batch, so two sizes are measured."""
    rollouts, train = recipe.rollouts, recipe.train
    longest = rollouts.max_prompt_tokens + rollouts.max_response_tokens
    batch = train.prompts_per_step * rollouts.rollouts_per_prompt * longest
    tokens = max(longest, min(train.tokens_per_microbatch, batch))
    resting = _resting(recipe, models, device.gpus)
    one, two = (meta_model.training_bytes(models.trainer, n) for n in (tokens, 2 * tokens))

    def parts(n: int) -> dict[str, float]:
        grown = (n - tokens) / tokens
        forward, kept, backward = (
            a + grown * (b - a) for a, b in zip(vars(one).values(), vars(two).values(), strict=True)
        )
        head = head_bytes(models.trainer, train, n)
        highest = max(forward, kept + head, backward)
        return resting | {
            "candidate columns": n * (recipe.score.candidates + recipe.score.teacher_topk) * _COLUMN_BYTES,
            f"activations kept for backward, {n:,} tokens": kept,
            "the head and its loss" if highest == kept + head else "a layer at work": highest - kept,
        }

    fitting = _largest(lambda n: sum(parts(n).values()) <= device.gib * GIB, limit=batch)
    return StepMemory("training", parts(tokens), largest=fitting if fitting >= longest else 0)


def head_bytes(model: Any, train: TrainConfig, tokens: int) -> float:
    """Memory of `chunked_head_loss` on CUDA: logits of a chunk, intermediate results, gradients."""
    weight = unwrapped(model).get_output_embeddings().weight
    vocabulary, hidden = weight.shape
    rows = min(train.rows_per_chunk, tokens)
    temporary = rows * min(_COLUMN_BLOCK, vocabulary) * 4
    rounded = weight.element_size() if weight.element_size() < 4 else 0  # copies in the dtype of the head
    temporary = max(temporary, rows * vocabulary * rounded)
    gradient_of_head = vocabulary * hidden * (4 + rounded) if weight.requires_grad else 0
    # hidden states that predict a token, their gradient, and that gradient scaled
    rows_of_hidden = 3 * tokens * hidden * weight.element_size()
    return float(rows * vocabulary * 4 + temporary + gradient_of_head + rows_of_hidden)


def _resting(recipe: Recipe, models: PlannedModels, gpus: int) -> dict[str, float]:
    """Memory that does not depend on the micro-batch: weights, gradients, optimizer state."""
    train, weights = recipe.train, models.weights["student"]
    moved = list(trainable(models.trainer).values())
    count = float(sum(p.numel() for p in moved))
    state = sum(map(partial(_state_bytes, train), moved))
    masters = sum(4.0 * p.numel() for p in moved if p.element_size() < 4)
    shards = gpus if train.parallel == "fsdp" else 1
    gathered = 0.0
    if shards > 1:  # two layers at a time, and weights outside the layers throughout
        in_layers = bytes_of([list(x.parameters()) for x in LayeredModel(models.meta_models["student"]).layers])
        gathered = 2 * weights.largest_layer + weights.nbytes - in_layers
    found = {"context and libraries": CONTEXT_BYTES, "weights": weights.nbytes / shards}
    if models.adapter is None:  # weights, fp32 copies and optimizer state are sharded
        found |= {"fp32 copies of the weights": masters / shards} if masters else {}
        count, state = count / shards, state / shards
    else:
        found["adapter, fp32"] = 4.0 * count
    if recipe.student.quantisation:
        found["a dequantised matrix"] = _largest_matrix(models.meta_models["student"])
    if gathered:
        found["weights gathered from other ranks"] = gathered
    return found | {"gradients, fp32": 4.0 * count, f"optimizer, {train.optimizer}": state}


def _state_bytes(train: TrainConfig, parameter: torch.Tensor) -> float:
    if train.optimizer == "adamw_8bit" and parameter.numel() >= _SMALLEST_IN_8_BITS:
        return 2 * parameter.numel() * (1 + 4 / _BLOCK_IN_8_BITS)
    return 8.0 * parameter.numel()


def _largest_matrix(model: Any) -> float:
    head = model.get_output_embeddings().weight
    linear = (m.weight for m in model.modules() if isinstance(m, meta_model.LINEAR) and m.weight is not head)
    return float(max((weight.nbytes for weight in linear), default=0))


def _largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest multiple of 256 up to about `limit` that fits, or 0."""
    low, high = 0, -(-limit // _STEP)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * _STEP) else (low, middle - 1)
    return low * _STEP
