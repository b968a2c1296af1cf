"""The manifests of rounds and of scores: what each command records about what it writes.

redpen rollouts   sampled_round      redpen score    scores
redpen import     imported_round                     imported_scores
redpen eval       evaluated_round                    evaluated_scores
redpen sft        examples_round
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import cache_schema as cs
from pipeline.config import Recipe, RolloutsConfig, TeacherConfig
from pipeline.models.architecture import choose_layout
from pipeline.models.identity import DATA, IMPORTED, created_by
from pipeline.text.rendering import template_identity

if TYPE_CHECKING:
    from pipeline.engines.sampling import Sampling
    from pipeline.models.resolve import ResolvedModel

Records = Sequence[dict[str, Any]]


def sampled_round(
    recipe: Recipe, student: ResolvedModel, records: Records, environment: dict[str, Any] | None = None
) -> cs.RoundManifest:
    """A round that `recipe.rollouts` samples.

    Args:
        environment: its identity, if the recipe has one.
    """
    settings = recipe.rollouts
    # vLLM loads the student unquantised.
    quantised = recipe.student.quantisation is not None and settings.engine != "vllm"
    return _round(
        student,
        records,
        template=template_identity(student.tokenizer, recipe.prompts),
        stop_token_ids=student.stop_token_ids(settings),
        rollouts_per_prompt=settings.rollouts_per_prompt,
        engine=settings.engine,
        sampler_settings=({"quantisation": recipe.student.quantisation} if quantised else {})
        | ({} if environment is None else {"environment": environment}),
        **_sampling(settings),
    )


def imported_round(
    recipe: Recipe,
    student: ResolvedModel,
    records: Records,
    *,
    template: dict[str, Any],
    rollouts_per_prompt: int,
    file_sha256: str,
) -> cs.RoundManifest:
    """A round of finished rollouts from a file, which the recipe's settings describe."""
    return _round(
        student,
        records,
        template=template,
        stop_token_ids=student.stop_token_ids(recipe.rollouts),
        rollouts_per_prompt=rollouts_per_prompt,
        engine=IMPORTED,
        sampler_settings={"file_sha256": file_sha256},
        **_sampling(recipe.rollouts),
    )


def examples_round(
    recipe: Recipe,
    student: ResolvedModel,
    records: Records,
    *,
    max_prompt_tokens: int,
    max_response_tokens: int,
    data: dict[str, Any],
) -> cs.RoundManifest:
    """A round of examples that nobody sampled: documents and chats, described by `data`."""
    return _round(
        student,
        records,
        template=template_identity(student.tokenizer, recipe.prompts),
        stop_token_ids=student.stop_token_ids(recipe.rollouts),
        temperature=1.0,
        top_p=1.0,
        rollouts_per_prompt=1,
        max_prompt_tokens=max_prompt_tokens,
        max_response_tokens=max_response_tokens,
        prompts_per_block=min(recipe.rollouts.prompts_per_block, len(records)),
        seed=recipe.train.seed,
        engine=DATA,
        sampler_settings=data,
    )


def evaluated_round(
    recipe: Recipe,
    student: ResolvedModel,
    records: Records,
    sampling: Sampling,
    *,
    prompts_per_block: int,
    environment: dict[str, Any] | None = None,
) -> cs.RoundManifest:
    """A round of the fresh rollouts that an evaluation measured."""
    return _round(
        student,
        records,
        template=template_identity(student.tokenizer, recipe.prompts),
        stop_token_ids=sampling.stop_token_ids,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        rollouts_per_prompt=sampling.rollouts_per_prompt,
        max_prompt_tokens=recipe.rollouts.max_prompt_tokens,
        max_response_tokens=sampling.max_response_tokens,
        prompts_per_block=prompts_per_block,
        seed=sampling.seed,
        engine="eval",
        sampler_settings={} if environment is None else {"environment": environment},
    )


def scores(
    recipe: Recipe,
    scorer: ResolvedModel,
    sampled: cs.RoundManifest,
    *,
    template: dict[str, Any],
    lacks_tokens: bool = False,
    spans: bool = False,
) -> cs.ScoresManifest:
    """Manifest of a scorer's scores of a round by `redpen score`.

    Args:
        template: how the scorer's prompts became text.
        lacks_tokens: a teacher whose vocabulary lacks some of the student's tokens.
        spans: a teacher that is compared on spans of text, so that it has neither candidates nor entropies.
    """
    placement, is_student = recipe.placement(scorer.settings), not isinstance(scorer.settings, TeacherConfig)
    in_engine = placement in ("vllm", "server")
    return cs.ScoresManifest(
        role="student" if is_student else "teacher",
        model=scorer.served_identity if placement == "server" else scorer.identity,
        tokenizer=scorer.tokenizer_identity,
        template=template | ({"alignment": "spans"} if spans else {}),
        dtype="served" if placement == "server" else scorer.dtype,
        quantisation=scorer.quantisation if in_engine else scorer.scored_quantisation,
        engine=placement if in_engine else "transformers",
        tile_tokens=0 if in_engine else recipe.score.tile_tokens,
        vocab_size=scorer.vocab_size,
        candidate_kind=recipe.score.candidate_kind,
        candidates=0 if spans else recipe.score.candidates,
        # greedy decoding has no log-probs to compare with
        sampling_temperature=(sampled.temperature or 1.0) if is_student else None,
        topk=0 if is_student or spans else recipe.score.teacher_topk,
        entropy=not (in_engine or spans),
        partial=in_engine or lacks_tokens,
        created_by=created_by() + ("" if in_engine or choose_layout(scorer).packed else ", rollouts as padded rows"),
    )


def imported_scores(sampled: cs.RoundManifest, teacher: TeacherConfig, file_sha256: str) -> cs.ScoresManifest:
    """A teacher's log-probs from a file: of the sampled tokens alone, and perhaps not of all."""
    return cs.ScoresManifest(
        role="teacher",
        model=cs.ModelIdentity(teacher.model, None, f"imported:{file_sha256[:32]}"),
        tokenizer=sampled.tokenizer,
        template=sampled.template,
        dtype="unknown",
        quantisation=None,
        engine=IMPORTED,
        tile_tokens=0,
        vocab_size=sampled.vocab_size,
        candidate_kind="topk",
        candidates=0,
        sampling_temperature=None,
        entropy=False,
        partial=True,
        created_by=created_by(),
    )


def evaluated_scores(
    recipe: Recipe,
    scorer: ResolvedModel,
    sampled: cs.RoundManifest,
    *,
    template: dict[str, Any],
    candidates: int,
    lacks_tokens: bool = False,
) -> cs.ScoresManifest:
    """Manifest of a scorer's scores of an evaluation's fresh rollouts, by the forward in this process."""
    is_student = not isinstance(scorer.settings, TeacherConfig)
    return cs.ScoresManifest(
        role="student" if is_student else "teacher",
        model=scorer.identity,
        tokenizer=sampled.tokenizer,
        template=template,
        dtype=scorer.dtype,
        quantisation=scorer.scored_quantisation,
        engine="transformers",
        tile_tokens=recipe.score.tile_tokens,
        vocab_size=scorer.vocab_size,
        candidate_kind="topk",
        candidates=candidates,
        sampling_temperature=1.0 if is_student else None,
        partial=lacks_tokens,
        created_by=created_by(),
    )


def _sampling(settings: RolloutsConfig) -> dict[str, Any]:
    names = ("temperature", "top_p", "max_prompt_tokens", "max_response_tokens", "prompts_per_block", "seed")
    return {name: getattr(settings, name) for name in names}


def _round(student: ResolvedModel, records: Records, **settings: Any) -> cs.RoundManifest:
    return cs.RoundManifest(
        student=student.identity,
        tokenizer=student.tokenizer_identity,
        prompts_sha256=cs.prompts_sha256(records),
        n_prompts=len(records),
        vocab_size=student.vocab_size,
        dtype=student.dtype,
        created_by=created_by(),
        **settings,
    )
