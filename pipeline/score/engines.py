"""Teachers that an inference engine scores, vLLM in this process or a server: started, and checked before they write.

An engine is another implementation of the model: another attention, another head, perhaps another checkpoint under
the same name. So the forward in this process scores a few rollouts first, and the engine must agree with it; with an
adapter, also in what the adapter changes. It scores them twice and must agree with itself, too: a second answer, from
a prefix cache, may be another.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing

import numpy as np
import torch

import cache_schema as cs
from pipeline.config import Recipe, TeacherConfig
from pipeline.console import say, warn
from pipeline.engines.adapter_check import check_effect
from pipeline.engines.prompt_logprobs import check_agreement, sample_of
from pipeline.engines.resident import ResidentScorer
from pipeline.engines.scoring import ScoreOptions, Scorer, TokenBatch
from pipeline.errors import ModelError
from pipeline.models import load as models
from pipeline.models.paths import is_available
from pipeline.models.resolve import ResolvedModel, resolve
from pipeline.teachers.alignment import View, longest_of


def open_engine(
    recipe: Recipe,
    model: ResolvedModel,
    round_: cs.Round,
    view: View,
    options: ScoreOptions,
    on_tile: Callable[[int], None],
    stack: ExitStack,
) -> Scorer:
    """The teacher in the engine that the recipe asks for, closed with `stack`.

    At least one block must have the student's scores.

    Raises `ModelError` if the engine's log-probs are not the model's, and whatever starting it raises.
    """
    teacher, student = model.settings, round_.scores(cs.STUDENT)
    assert isinstance(teacher, TeacherConfig)
    placement = recipe.placement(teacher)
    ready = np.flatnonzero(round_.rollouts.committed() & student.committed()).tolist()
    candidate_ids = student.read_arrays(ready[0], ["candidate_ids"])["candidate_ids"]
    first = view.of(TokenBatch((round_.rollouts.read(ready[0]),), candidate_ids))
    assert first.candidate_ids is not None
    sample = sample_of(first.blocks[0], first.candidate_ids, model.vocab_size)
    expected: cs.ScoreBlock | None = None
    unadapted: cs.ScoreBlock | None = None
    try:
        if placement == "vllm" or is_available(teacher):
            expected = _score_here(recipe, model, sample)
            if teacher.adapter is not None:
                models.free_memory()
                unadapted = _score_here(recipe, resolve(teacher.model_copy(update={"adapter": None})), sample)
        else:
            warn(f"{teacher.name}: its weights are not on this machine, so the server cannot be checked against them")
    except (ModelError, torch.OutOfMemoryError) as error:
        # A quantised checkpoint may be for engines alone, and a server may leave no memory for a second copy.
        if placement == "vllm" and model.quantisation is None:
            raise
        reason = str(error).splitlines()[0]
        warn(f"{teacher.name}: its weights cannot be loaded here to check the engine against them ({reason})")
    models.free_memory()  # for the engine
    longest = max(longest_of(round_, block, view) for block in ready)
    scorer: Scorer
    if placement == "server":
        from pipeline.engines.served import ServerScorer

        engine, dtype = "the server", "served"
        scorer = ServerScorer(teacher, recipe.score, options, max_length=longest, on_tile=on_tile)
    else:
        from pipeline.engines.vllm_scorer import VllmScorer

        engine, dtype = "vLLM", model.dtype
        vllm = VllmScorer(teacher, recipe.vllm, options, max_length=longest, on_tile=on_tile)
        scorer = stack.enter_context(closing(vllm))
    found = scorer.compute_logprobs(sample)
    if unadapted is not None and expected is not None:
        who = f"{model.setting('adapter')}: {engine}"
        check_effect(found.logprobs, expected.logprobs, unadapted.logprobs, who)
    others = {"a second call of it": scorer.compute_logprobs(sample)}
    if expected is not None:
        others["the training forward"] = expected
    for other, scores in others.items():
        try:
            say(f"{teacher.name}: {engine} and {other} agree {check_agreement(found, scores, dtype)}")
        except ModelError as error:
            raise ModelError(
                f"{teacher.name}: {engine} and {other} {error}; compare the model, revision, adapter and "
                "quantisation that it runs, or set score.placement to resident or streamed"
            ) from error
    return scorer


def _score_here(recipe: Recipe, model: ResolvedModel, sample: TokenBatch) -> cs.ScoreBlock:
    """The sample's scores by the training forward, streamed on a GPU, so that the model fits on any."""
    options = ScoreOptions(tile_tokens=recipe.score.tile_tokens, rows_per_chunk=recipe.score.rows_per_chunk)
    if models.pick_device(model.settings).type == "cuda" and (model.formats or model.quantisation is None):
        from pipeline.streaming.streamed import StreamedScorer

        longest = max(int(rollouts.rollout_length.max()) for rollouts in sample.blocks)
        scorer = StreamedScorer(model, options, memory_gib=recipe.score.memory_gib, longest=longest)
        return scorer.compute_logprobs(sample)
    return ResidentScorer(models.load_model(model), options).compute_logprobs(sample)
