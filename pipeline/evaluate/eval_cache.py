"""What an evaluation leaves in the run: a cache of the fresh rollouts that it measured, with both models' scores.

RUN/eval.zarr has round 0, the student before, and round 1, after; prompts have the same numbers in both. It is an
ordinary cache, for `redpen inspect` and `redpen report`, and the next evaluation replaces it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cache_schema as cs
from pipeline.config import Recipe, TeacherConfig
from pipeline.engines.episodes import Episodes
from pipeline.engines.sampling import Sampling
from pipeline.engines.scoring import TokenBatch
from pipeline.models.identity import created_by
from pipeline.models.resolve import ResolvedModel
from pipeline.rounds.manifests import evaluated_round, evaluated_scores
from pipeline.teachers.alignment import View
from pipeline.teachers.prompts import template_of

# A writer holds a block's widest array in memory, padded to its slot.
_SLOT_ELEMENTS = 2**26


class EvalCacheWriter:
    """Writes the cache, a round at a time.

    Args:
        directory: an empty one, of `atomic_directory`.
        episodes: with the environment that replied to the students, if any.
        records: the prompts' records, in the order of the rollouts' prompt numbers.
    """

    def __init__(
        self,
        directory: Path,
        recipe: Recipe,
        teacher: ResolvedModel,
        records: Sequence[dict[str, Any]],
        view: View,
        episodes: Episodes | None = None,
    ):
        self._environment = None if episodes is None else episodes.identity
        self._recipe, self._teacher, self._records, self._view = recipe, teacher, records, view
        self._cache = cs.create(directory, created_by=created_by())

    def add(
        self,
        student: ResolvedModel,
        sampling: Sampling,
        rollouts: cs.RolloutBlock,
        student_scores: cs.ScoreBlock,
        teacher_scores: cs.ScoreBlock,
    ) -> None:
        """Write one student's rollouts of all prompts, sampled at temperature 1, as the next round."""
        assert student_scores.candidate_ids is not None and sampling.temperature == 1
        recipe, cfg, candidates = self._recipe, self._teacher.settings, student_scores.candidate_ids.shape[1]
        assert isinstance(cfg, TeacherConfig)
        per_prompt = sampling.rollouts_per_prompt * sampling.max_response_tokens * candidates
        prompts_per_block = max(1, min(recipe.rollouts.prompts_per_block, _SLOT_ELEMENTS // per_prompt))
        manifest = evaluated_round(
            recipe,
            student,
            self._records,
            sampling,
            prompts_per_block=prompts_per_block,
            environment=self._environment,
        )
        round_ = self._cache.start_round(manifest, self._records, index := len(self._cache.round_indices()))
        assert round_.index == index
        batch = TokenBatch(
            tuple(_part(rollouts, manifest.block_prompts(block)) for block in range(manifest.n_blocks))
        )
        for number, block in enumerate(batch.blocks):
            round_.rollouts.write(number, block)
        by_student = evaluated_scores(recipe, student, manifest, template=manifest.template, candidates=candidates)
        by_teacher = evaluated_scores(
            recipe,
            self._teacher,
            manifest,
            template=template_of(recipe, self._teacher, manifest.template, self._view.made_of),
            candidates=candidates,
            lacks_tokens=self._view.lacks_tokens(manifest.tokenizer.vocab_size),
        )
        student_scores = replace(student_scores, sampling_logprobs=student_scores.logprobs)
        for name, scores_manifest, scores in (
            (cs.STUDENT, by_student, student_scores),
            (cfg.name, by_teacher, teacher_scores),
        ):
            group = round_.start_scores(name, scores_manifest)
            for number, part in enumerate(batch.split(scores)):
                group.write(number, part)


def _part(rollouts: cs.RolloutBlock, prompts: range) -> cs.RolloutBlock:
    """The rollouts of some of a block's prompts, as a block that numbers its prompts from 0."""
    rows = [
        cs.RolloutRow(
            prompt=int(rollouts.row_prompt[row]) - prompts.start,
            sample_index=int(rollouts.sample_index[row]),
            token_ids=rollouts.response(row),
            logprobs=rollouts.rollout_logprobs[rollouts.response_slice(row)],
            finish_reason=int(rollouts.finish_reason[row]),
            trained=rollouts.trained[rollouts.response_slice(row)],
        )
        for row in range(rollouts.n_rows)
        if rollouts.row_prompt[row] in prompts
    ]
    return cs.RolloutBlock.from_rows([(prompt, rollouts.prompt_ids(prompt)) for prompt in prompts], rows)
