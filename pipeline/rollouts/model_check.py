"""The model check: before the first rollout, whether student and teachers can do what the recipe asks of them.

`redpen score` checks each model on real rollouts, hours after sampling began. The same checks run here first,
with responses made of the prompts' tokens, the longest and the shortest that the recipe allows, so that windows and
frequencies that depend on the length come into play. The sampler's log-probs are compared with the scoring forward's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from pipeline.config import Recipe, TeacherConfig
from pipeline.console import say, warn
from pipeline.engines.resident import ResidentScorer
from pipeline.engines.sampling import PromptBlock, Sampling
from pipeline.engines.scoring import ScoreOptions, TokenBatch
from pipeline.engines.transformers_sampler import TransformersSampler
from pipeline.errors import ModelError, ModelNotFoundError
from pipeline.forward.attention import ATTENTION
from pipeline.forward.head import unwrapped
from pipeline.forward.packing_check import longest_checked, settle_layout
from pipeline.forward.rows import attention_of, native_attention, pads_left
from pipeline.models import load as models
from pipeline.models.lora import checkpoint_gradients, make_trainable
from pipeline.models.resolve import ResolvedModel, resolve

Prompts = Sequence[npt.NDArray[np.int32]]

# What the sampler is compared on: prompts of at most so many tokens, and so many sampled ones of each.
_SAMPLED_PROMPT, _SAMPLED_TOKENS = 1024, 8
# At a temperature that draws tokens of which the model is not certain, whose log-probs are sensitive.
_TEMPERATURE = 2.0
# Nats that they may be apart: rounding, in half precision that of one token at a time instead of all.
_FP32, _HALF = 1e-4, 1.0
#: Teachers that this process has checked: rounds of one process often have the same ones.
_checked: set[str] = set()


def check_architectures(recipe: Recipe) -> None:
    """Refuse models that could not score, and a student that could not be trained on, what is about to be sampled.

    Reads configurations alone. A teacher that is not available yet is checked by `redpen score`. Raises `ModelError`.
    """
    from pipeline.models.architecture import choose_layout
    from pipeline.models.quantised import check_placement

    check_placement(resolve(recipe.student), recipe.placement(recipe.student))
    choose_layout(recipe.student)
    student = make_trainable(models.load_skeleton(recipe.student, torch.device("meta")), recipe.train)
    if recipe.train.gradient_checkpointing:
        checkpoint_gradients(student)
    if recipe.rollouts.engine == "vllm":
        from pipeline.streaming.header_check import check_checkpoint

        check_checkpoint(recipe.student)
    for teacher in _teachers_here(recipe):
        with contextlib.suppress(ModelNotFoundError):
            check_placement(resolve(teacher), recipe.placement(teacher))
            choose_layout(teacher)


def check_teachers(recipe: Recipe, prompts: Prompts) -> None:
    """Load each teacher that is scored in this process, as `redpen score` will, and check it.

    One that is not available yet, or has no room here beside other work, is left to `redpen score`. Raises
    `ModelError`.
    """
    for teacher in _teachers_here(recipe):
        key = f"{recipe.placement(teacher)} {teacher.model_dump_json(exclude={'name'})}"
        if key in _checked:
            continue
        try:
            source = resolve(teacher)
            sample = _made_up(recipe, source, prompts)
            if recipe.placement(teacher) == "streamed":
                from pipeline.streaming.streamed import StreamedScorer

                options = ScoreOptions(tile_tokens=recipe.score.tile_tokens)
                found = StreamedScorer(source, options, memory_gib=recipe.score.memory_gib).settle_layout(*sample)
            else:
                found = settle_layout(models.load_model(source), *sample)
        except ModelNotFoundError:
            continue
        except torch.OutOfMemoryError:
            warn(f"{teacher.name}: has no room on this machine, so it is checked by redpen score only")
            continue
        finally:
            models.free_memory()
        say(f"{teacher.name}: {found}")
        _checked.add(key)


def check_student(recipe: Recipe, model: torch.nn.Module, prompts: Prompts) -> None:
    """Check a student that is loaded for sampling: its layout for scoring, and its sampler against that.

    Raises `ModelError`.
    """
    source = resolve(recipe.student)
    prompts = sorted((p for p in prompts if len(p) <= _SAMPLED_PROMPT), key=len) or [min(prompts, key=len)]
    with attention_of(unwrapped(model), ATTENTION if pads_left(model) else native_attention(model)):
        found = settle_layout(model, *_made_up(recipe, source, prompts))
    sampler = TransformersSampler(model, Sampling(_TEMPERATURE, 1.0, (), 2, _SAMPLED_TOKENS, seed=0))
    block = sampler.sample_block(PromptBlock(0, [(0, prompts[0]), (1, prompts[-1])]))
    with attention_of(unwrapped(model), unwrapped(model).config._attn_implementation):
        scorer = ResidentScorer(model, ScoreOptions(candidates=1, sampling_temperature=_TEMPERATURE))
        expected = scorer.compute_logprobs(TokenBatch((block,))).sampling_logprobs
    assert expected is not None
    apart = float(np.abs(block.rollout_logprobs - expected).max())
    bound = _FP32 if source.dtype == "float32" else _HALF
    if not apart <= bound:  # a NaN is apart, too
        raise ModelError(
            f"{source.setting('model')}: expected the same log-probs from its sampler and its scoring forward, to "
            f'{bound:g} nats, got a difference of {apart:.3g}; set rollouts.engine = "vllm", or choose another model'
        )
    say(f"student: {found}; its sampler agrees to {apart:.1g} nats")


def check_scoring(recipe: Recipe, prompts: Prompts) -> None:
    """Load the student for scoring and check its layout, before an engine that samples takes the memory. Raises
    `ModelError`.
    """
    source = resolve(recipe.student)
    try:
        say(f"student: {settle_layout(models.load_model(source), *_made_up(recipe, source, prompts))}")
    finally:
        models.free_memory()


def _teachers_here(recipe: Recipe) -> list[TeacherConfig]:
    return [teacher for teacher in recipe.teacher if recipe.placement(teacher) in ("resident", "streamed")]


def _made_up(
    recipe: Recipe, source: ResolvedModel, prompts: Prompts
) -> tuple[list[npt.NDArray[np.int32]], list[int]]:
    """Four sequences, and where their responses start: the longest and the shortest that could be sampled, and two
    in between.
    """
    settings, device = recipe.rollouts, models.pick_device(source.settings)
    ordered = sorted(prompts, key=len)
    limit = min(longest_checked(device), source.context or longest_checked(device))
    tokens = np.concatenate([*ordered[:64], *ordered[-8:]]) % source.vocab_size
    found: list[npt.NDArray[np.int32]] = []
    starts: list[int] = []
    for prompt, response in zip(
        (ordered[-1], ordered[0], ordered[len(ordered) // 2], ordered[0]),
        (settings.max_response_tokens, 1, settings.max_response_tokens // 3 + 1, 7),
        strict=True,
    ):
        start = min(len(prompt), limit - 1)
        length = min(start + min(response, settings.max_response_tokens), limit)
        rest = np.resize(np.roll(tokens, 7 * len(found) + 1), length - start)
        found.append(np.concatenate([prompt[-start:] % source.vocab_size, rest]).astype(np.int32))
        starts.append(start)
    return found, starts
