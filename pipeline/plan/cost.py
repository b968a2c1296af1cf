"""FLOPs, bytes of the cache and time of a recipe, by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import cache_schema as cs
from pipeline.config import Recipe
from pipeline.disk import bytes_per_token
from pipeline.models import flops
from pipeline.models import meta_model as shadow
from pipeline.plan.assumed import Device, Lengths
from pipeline.plan.memory import Models, Need

_STEP_SEQUENCES = 1024  # tokens of the sequence by which a cache's bytes for a token are found


@dataclass(frozen=True)
class Cost:
    """One step: tokens that a model reads or writes, what that costs, and how long it takes; None: done elsewhere."""

    step: str
    tokens: float
    flops: float
    seconds: float | None


@dataclass(frozen=True)
class Costs:
    """Of a round and the training on it.

    Attributes:
        prompts: prompts in the round; rollouts: samples in it.
        steps: as they run.
        cache: bytes of the cache before compression, by group of arrays.
        epochs: how often training reads each rollout.
    """

    prompts: int
    rollouts: int
    epochs: float
    steps: tuple[Cost, ...]
    cache: dict[str, float]
    student_flops: float
    teacher_flops: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def costs(recipe: Recipe, models: Models, device: Device, lengths: Lengths, needs: Sequence[Need]) -> Costs:
    """`needs` tell how many rollouts are sampled together, and how long a streamed wave is."""
    rollouts, train, student = recipe.rollouts, recipe.train, models.weights[cs.STUDENT]
    by_step = {need.step: need for need in needs}
    prompts = recipe.prompts.limit or train.steps * train.prompts_per_step
    samples = prompts * rollouts.rollouts_per_prompt
    computing = device.gpus * device.tflops * 1e12 * device.utilisation

    sampled = prompts * lengths.prompt + samples * lengths.response
    sampling = flops.forward(student.multiplied, sampled)
    together = by_step["sampling"].together or 1
    found = [
        Cost("sampling", sampled, sampling, _sampling_seconds(models, device, lengths, samples, together, sampling))
    ]
    read = samples * (lengths.prompt + lengths.response)
    teachers = 0.0
    for name, weights in models.weights.items():
        scoring = flops.forward(weights.multiplied, read)
        teachers += 0.0 if name == cs.STUDENT else scoring
        seconds: float | None = scoring / computing
        if need := by_step.get(f"scoring, {name}, streamed"):
            waves = read / (need.wave or recipe.score.tile_tokens) / device.gpus
            seconds = max(scoring / computing, waves * weights.nbytes / (device.link_gbps * 1e9))
        elif recipe.placement(models.configs[name]) == "server":
            seconds = None
        found.append(Cost(f"scoring, {name}", read, scoring, seconds))
    trained = train.steps * min(train.prompts_per_step, prompts) * read / prompts
    training = flops.training(student.multiplied, models.adapter, trained, recomputed=train.gradient_checkpointing)
    found.append(Cost("training", trained, training, training / computing))
    return Costs(
        prompts=prompts,
        rollouts=samples,
        epochs=trained / read,
        steps=tuple(found),
        cache=cache_bytes(recipe, samples * lengths.response, prompts * lengths.prompt),
        student_flops=sum(cost.flops for cost in found) - teachers,
        teacher_flops=teachers,
    )


def cache_bytes(recipe: Recipe, response_tokens: float, prompt_tokens: float) -> dict[str, float]:
    """Bytes of a round's tokens before compression, by group of arrays; what is of a row or a prompt is left out."""
    score = recipe.score
    sizes = {"candidate": score.candidates, "topk": score.teacher_topk}
    teacher = cs.teacher_arrays(topk=score.teacher_topk > 0)
    found = {
        "rollouts": response_tokens * bytes_per_token(cs.ROLLOUT_ARRAYS) + 4 * prompt_tokens,
        cs.STUDENT: response_tokens * bytes_per_token(cs.STUDENT_ARRAYS, sizes),
    }
    return found | {name: response_tokens * bytes_per_token(teacher, sizes) for name in recipe.teacher_names}


def _sampling_seconds(
    models: Models, device: Device, lengths: Lengths, samples: int, together: int, sampling_flops: float
) -> float:
    """Every token of a batch reads all weights and the batch's cache, half full on average, from memory."""
    weights = models.weights[cs.STUDENT].nbytes
    of_a_token = shadow.cache_bytes(models.shadows[cs.STUDENT], _STEP_SEQUENCES) / _STEP_SEQUENCES
    cached = together * (lengths.prompt + lengths.response / 2) * of_a_token
    reading = samples * lengths.response / together * (weights + cached) / (device.gbps * 1e9)
    computing = sampling_flops / (device.tflops * 1e12 * device.utilisation)
    return max(reading, computing) / device.gpus
