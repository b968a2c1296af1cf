"""Teachers read by an inference engine: vLLM in this process, or a server. Started, and checked before they write.

An engine is another implementation of the model: another attention, another head, perhaps another checkpoint behind
the same name. So the forward of this machine reads a few rollouts first, and the engine must say the same of them.
Where the weights are not here, the engine must at least say the same twice.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing

import numpy as np
import torch

import cache_schema as cs
from pipeline.config import Recipe, TeacherConfig
from pipeline.console import say, warn
from pipeline.engines.prompt_logprobs import check_agreement, sample_of
from pipeline.engines.resident import ResidentScorer
from pipeline.engines.scoring import ScoreOptions, Scorer, TokenBatch
from pipeline.errors import ModelError
from pipeline.models import load as models
from pipeline.teachers.alignment import View, longest_of


def open_engine(
    recipe: Recipe,
    teacher: TeacherConfig,
    round_: cs.Round,
    view: View,
    options: ScoreOptions,
    on_tile: Callable[[int], None],
    stack: ExitStack,
) -> Scorer:
    """The teacher in the engine that the recipe asks for, which ends with the stack. At least one block must have the
    student's scores.

    Raises `ModelError` where the engine's log-probs are not the model's, and whatever starting it raises.
    """
    facts, student, placement = models.model_facts(teacher), round_.scores(cs.STUDENT), recipe.placement(teacher)
    readable = np.flatnonzero(round_.rollouts.committed() & student.committed()).tolist()
    candidate_ids = student.read_arrays(readable[0], ["candidate_ids"])["candidate_ids"]
    first = view.of(TokenBatch((round_.rollouts.read(readable[0]),), candidate_ids))
    assert first.candidate_ids is not None
    sample = sample_of(first.blocks[0], first.candidate_ids, facts.vocab_size)
    expected: cs.ScoreBlock | None = None
    try:
        if placement == "vllm" or models.is_here(teacher):
            expected = _read_here(recipe, teacher, facts, sample)
        else:
            warn(f"{teacher.name}: its weights are not here to check the server against")
    except (ModelError, torch.OutOfMemoryError) as error:
        # A quantised checkpoint may be for engines alone, and a server may leave no room for a second reading.
        if placement == "vllm" and facts.quantisation is None:
            raise
        reason = str(error).splitlines()[0]
        warn(f"{teacher.name}: its weights cannot be read here to check the engine against ({reason})")
    models.free_memory()  # the engine wants what the forward here had
    longest = max(longest_of(round_, block, view) for block in readable)
    scorer: Scorer
    if placement == "server":
        from pipeline.engines.served import ServerScorer

        who, dtype = "the server", "served"
        scorer = ServerScorer(teacher, recipe.score, options, max_length=longest, on_tile=on_tile)
    else:
        from pipeline.engines.vllm_scorer import VllmScorer

        who, dtype = "vLLM", facts.dtype
        vllm = VllmScorer(teacher, recipe.vllm, options, max_length=longest, on_tile=on_tile)
        scorer = stack.enter_context(closing(vllm))
    told, other = scorer.compute_logprobs(sample), "the forward here"
    if expected is None:
        expected, other = scorer.compute_logprobs(sample), "itself, asked twice,"
    try:
        say(f"{teacher.name}: {who} and {other} agree {check_agreement(told, expected, dtype)}")
    except ModelError as error:
        raise ModelError(
            f"{teacher.name}: {who} and {other} {error}; look at the model, revision, adapter and quantisation that "
            "it runs, or set score.placement to resident or streamed"
        ) from error
    return scorer


def _read_here(recipe: Recipe, teacher: TeacherConfig, facts: models.ModelFacts, sample: TokenBatch) -> cs.ScoreBlock:
    """The sample by the training forward, streamed where there is a card, so that it fits on any."""
    options = ScoreOptions(tile_tokens=recipe.score.tile_tokens, rows_per_chunk=recipe.score.rows_per_chunk)
    if models.pick_device(teacher).type == "cuda" and facts.quantisation is None:
        from pipeline.streaming.streamed import StreamedScorer

        return StreamedScorer(teacher, options, memory_gib=recipe.score.memory_gib).compute_logprobs(sample)
    return ResidentScorer(models.load_model(teacher), options).compute_logprobs(sample)
