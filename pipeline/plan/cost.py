"""FLOPs and time of a recipe by step, and the size of its cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import cache_schema as cs
from pipeline.config import Recipe
from pipeline.disk import bytes_per_token
from pipeline.models import flops, meta_model
from pipeline.plan.assumed import Device, Lengths, n_prompts
from pipeline.plan.memory import PlannedModels, StepMemory

_STEP_SEQUENCES = 1024  # length of the sequence that measures the KV cache per token


@dataclass(frozen=True)
class StepCost:
    """One step: tokens that a model processes, FLOPs and time; `seconds` is None if a server does the work."""

    step: str
    tokens: float
    flops: float
    seconds: float | None


@dataclass(frozen=True)
class RecipeCost:
    """The cost of one round and the training on it.

    Attributes:
        prompts, rollouts: how many the round has.
        epochs: how often training uses each rollout.
        steps: in the order in which they run.
        cache: bytes of the cache before compression, by group of arrays.
    """

    prompts: int
    rollouts: int
    epochs: float
    steps: tuple[StepCost, ...]
    cache: dict[str, float]
    student_flops: float
    teacher_flops: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def costs(
    recipe: Recipe, models: PlannedModels, device: Device, lengths: Lengths, needs: Sequence[StepMemory]
) -> RecipeCost:
    """The cost of a recipe; `needs` has the batch size of sampling and the wave length of streamed scoring."""
    rollouts, train, student = recipe.rollouts, recipe.train, models.weights[cs.STUDENT]
    by_step = {need.step: need for need in needs}
    prompts, _ = n_prompts(recipe)
    samples = prompts * rollouts.rollouts_per_prompt
    flops_per_second = device.gpus * device.tflops * 1e12 * device.utilisation

    sampled = prompts * lengths.prompt + samples * lengths.response
    sampling = flops.forward(student.multiplied, sampled)
    together = by_step["sampling"].together or 1
    steps = [
        StepCost(
            "sampling", sampled, sampling, _sampling_seconds(models, device, lengths, samples, together, sampling)
        )
    ]
    teachers = 0.0
    for name, weights in models.weights.items():
        read = samples * (models.prompt_tokens(name, lengths.prompt) + lengths.response)
        scoring = flops.forward(weights.multiplied, read)
        teachers += 0.0 if name == cs.STUDENT else scoring
        seconds: float | None = scoring / flops_per_second
        if need := by_step.get(f"scoring, {name}, streamed"):
            waves = read / (need.wave or recipe.score.tile_tokens) / device.gpus
            seconds = max(scoring / flops_per_second, waves * weights.nbytes / (device.link_gbps * 1e9))
        elif recipe.placement(models.configs[name]) == "server":
            seconds = None
        steps.append(StepCost(f"scoring, {name}", read, scoring, seconds))
    replayed = samples * (lengths.prompt + lengths.response)
    trained = train.steps * min(train.prompts_per_step, prompts) * replayed / prompts
    training = flops.training(student.multiplied, models.adapter, trained, recomputed=train.gradient_checkpointing)
    steps.append(StepCost("training", trained, training, training / flops_per_second))
    return RecipeCost(
        prompts=prompts,
        rollouts=samples,
        epochs=trained / replayed,
        steps=tuple(steps),
        cache=cache_bytes(recipe, samples * lengths.response, prompts * lengths.prompt),
        student_flops=sum(cost.flops for cost in steps) - teachers,
        teacher_flops=teachers,
    )


def cache_bytes(recipe: Recipe, response_tokens: float, prompt_tokens: float) -> dict[str, float]:
    """Bytes of a round's per-token arrays before compression, by group; arrays by row or prompt are left out."""
    score = recipe.score
    sizes = {"candidate": score.candidates, "topk": score.teacher_topk}
    teacher = cs.teacher_arrays(topk=score.teacher_topk > 0)
    found = {
        "rollouts": response_tokens * bytes_per_token(cs.ROLLOUT_ARRAYS) + 4 * prompt_tokens,
        cs.STUDENT: response_tokens * bytes_per_token(cs.STUDENT_ARRAYS, sizes),
    }
    return found | {name: response_tokens * bytes_per_token(teacher, sizes) for name in recipe.teacher_names}


def _sampling_seconds(
    models: PlannedModels, device: Device, lengths: Lengths, samples: int, together: int, sampling_flops: float
) -> float:
    """Each decoding step reads all weights and the batch's KV cache, half full on average, from the GPU's memory."""
    weights = models.weights[cs.STUDENT].nbytes
    per_token = meta_model.cache_bytes(models.meta_models[cs.STUDENT], _STEP_SEQUENCES) / _STEP_SEQUENCES
    cached = together * (lengths.prompt + lengths.response / 2) * per_token
    reading = samples * lengths.response / together * (weights + cached) / (device.gbps * 1e9)
    computing = sampling_flops / (device.tflops * 1e12 * device.utilisation)
    return max(reading, computing) / device.gpus
