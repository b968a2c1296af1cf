"""What an evaluation leaves in the run, as a cache: the fresh rollouts it read, with both models' scores.

RUN/eval.zarr has round 0, the student before, and round 1, after; prompts have the same numbers in both. It is an
ordinary cache, for `redpen inspect` and `redpen report`, and replaced as a whole by the next evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cache_schema as cs
from pipeline.config import ModelConfig, Recipe, TeacherConfig
from pipeline.engines.sampling import Sampling
from pipeline.engines.scoring import TokenBatch
from pipeline.models import load as models
from pipeline.models.identity import created_by
from pipeline.teachers.alignment import View, template_of
from pipeline.text.prompts import prompts_sha256, template_identity

EVAL_CACHE = "eval.zarr"
# A writer holds a block's widest array in memory, padded to its slot.
_SLOT_ELEMENTS = 2**26


class Keeper:
    """Writes the cache, a round at a time.

    Args:
        directory: an empty one, of `atomic_directory`.
        records: the prompts' records, as the rollouts number them.
    """

    def __init__(
        self, directory: Path, recipe: Recipe, teacher: TeacherConfig, records: Sequence[dict[str, Any]], view: View
    ):
        self._recipe, self._teacher, self._records, self._view = recipe, teacher, records, view
        self._cache = cs.create(directory, created_by=created_by())

    def add(
        self,
        cfg: ModelConfig,
        sampling: Sampling,
        rollouts: cs.RolloutBlock,
        student: cs.ScoreBlock,
        teacher: cs.ScoreBlock,
    ) -> None:
        """One student's rollouts at temperature 1 of all prompts, as the next round."""
        assert student.candidate_ids is not None and sampling.temperature == 1
        n_candidates = student.candidate_ids.shape[1]
        manifest = self._manifest(cfg, sampling, n_candidates)
        round_ = self._cache.start_round(manifest, self._records, sampled := len(self._cache.round_indices()))
        assert round_.index == sampled
        blocks = [_part(rollouts, manifest.block_prompts(block)) for block in range(manifest.n_blocks)]
        for number, block in enumerate(blocks):
            round_.rollouts.write(number, block)
        batch = TokenBatch(tuple(blocks))
        for name, model, scores in (
            (cs.STUDENT, cfg, replace(student, sampling_logprobs=student.logprobs)),
            (self._teacher.name, self._teacher, teacher),
        ):
            group = round_.start_scores(name, self._scores_manifest(name, model, manifest, n_candidates))
            for number, part in enumerate(batch.split(scores)):
                group.write(number, part)

    def _manifest(self, cfg: ModelConfig, sampling: Sampling, n_candidates: int) -> cs.RoundManifest:
        recipe = self._recipe
        tokenizer, facts = models.load_tokenizer(cfg), models.model_facts(cfg)
        per_prompt = sampling.rollouts_per_prompt * sampling.max_response_tokens * n_candidates
        return cs.RoundManifest(
            student=models.model_identity(cfg),
            tokenizer=models.tokenizer_identity(tokenizer, cfg.model),
            template=template_identity(tokenizer, recipe.prompts),
            stop_token_ids=sampling.stop_token_ids,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            rollouts_per_prompt=sampling.rollouts_per_prompt,
            max_prompt_tokens=recipe.rollouts.max_prompt_tokens,
            max_response_tokens=sampling.max_response_tokens,
            prompts_per_block=max(1, min(recipe.rollouts.prompts_per_block, _SLOT_ELEMENTS // per_prompt)),
            seed=sampling.seed,
            engine="eval",
            prompts_sha256=prompts_sha256(self._records),
            n_prompts=len(self._records),
            vocab_size=facts.vocab_size,
            dtype=facts.dtype,
            created_by=created_by(),
        )

    def _scores_manifest(
        self, name: str, cfg: ModelConfig, sampled: cs.RoundManifest, n_candidates: int
    ) -> cs.ScoresManifest:
        is_student, facts, template, partial = name == cs.STUDENT, models.model_facts(cfg), sampled.template, False
        if not is_student:
            template = template_of(self._recipe, self._teacher, sampled.template)
            partial = self._view.leaves_out(sampled.tokenizer.vocab_size)
        return cs.ScoresManifest(
            role="student" if is_student else "teacher",
            model=sampled.student if is_student else models.model_identity(cfg),
            tokenizer=sampled.tokenizer,
            template=template,
            dtype=facts.dtype,
            quantisation=facts.quantisation,
            engine="transformers",
            tile_tokens=self._recipe.score.tile_tokens,
            vocab_size=facts.vocab_size,
            candidate_kind="topk",
            candidates=n_candidates,
            sampling_temperature=1.0 if is_student else None,
            partial=partial,
            created_by=created_by(),
        )


def _part(rollouts: cs.RolloutBlock, prompts: range) -> cs.RolloutBlock:
    """The rollouts of some of a block's prompts, which it has from 0 on."""
    rows = [
        cs.RolloutRow(
            prompt=int(rollouts.row_prompt[row]) - prompts.start,
            sample_index=int(rollouts.sample_index[row]),
            token_ids=rollouts.response(row),
            logprobs=rollouts.rollout_logprobs[rollouts.response_slice(row)],
            finish_reason=int(rollouts.finish_reason[row]),
        )
        for row in range(rollouts.n_rows)
        if rollouts.row_prompt[row] in prompts
    ]
    return cs.RolloutBlock.from_rows([(prompt, rollouts.prompt_ids(prompt)) for prompt in prompts], rows)
