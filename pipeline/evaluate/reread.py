"""The trained student's scores of cached rollouts, for the report: the same tokens before and after training.

RUN/reread.safetensors holds the `eval.reread_rollouts` rollouts of the run's round with the highest reverse KL at a
token, in order of their numbers. Shapes: R rollouts, T tokens end to end, K candidates of the cache.

    numbers i8 [R], start i8 [R], length i8 [R]           the rollout's number in its round, its tokens' place
    logprobs, entropy, rest_logprob f4 [T], candidate_logprobs f4 [T, K]

Its metadata are the cache's identity in run.json, as text: url, round, teacher, and the digests.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save
from transformers import PreTrainedModel

import cache_schema as cs
from pipeline.config import Recipe
from pipeline.console import progress, warn
from pipeline.engines.resident import ResidentScorer
from pipeline.engines.scoring import ScoreOptions, TokenBatch
from pipeline.errors import RedpenError
from pipeline.rounds.identity import cache_identity
from pipeline.rounds.scored_block import rollout_numbers, scored_blocks
from pipeline.runs.files import read_record


def reread(run: Path, model: PreTrainedModel, recipe: Recipe) -> bytes | None:
    """The trained model's scores of cached rollouts, as the file's content; None, with a warning, if the rollouts are
    not there any more.

    A run of several rounds has no such rollouts, since each round trained a different student, nor has fine-tuning.
    """
    try:
        if recipe.eval.reread_rollouts and (cached := _cached(run, recipe.eval.reread_rollouts)) is not None:
            arrays, metadata = _score(model, recipe, *cached)
            return bytes(save(arrays, metadata))
    except (cs.CacheError, RedpenError) as error:
        warn(f"the cached rollouts are not scored again: {error}")
    return None


def _cached(run: Path, n_wanted: int) -> tuple[dict[str, Any], cs.Round, npt.NDArray[np.int64]] | None:
    """The cache that the run learned from: its identity, the round, and the numbers of the rollouts to score,
    ascending. None if that is not one round scored by a teacher."""
    try:
        record = read_record(run)
        known = {} if record is None else record.cache
        if known.keys() <= {"url", "teacher"} or known["teacher"] == "":
            return None
        url, index, names = known["url"], known["round"], known["teacher"].split(", ")
    except (KeyError, AttributeError):
        raise RedpenError(f"{run / 'run.json'} does not name their cache") from None
    round_ = cs.open(url).round(index)
    now = cache_identity(url, round_, names)
    if changed := [key for key in now if now[key] != known.get(key)]:
        raise RedpenError(f"cache {url} round {index} has changed since ({', '.join(changed)})")
    return known, round_, worst_rollouts(round_, names, n_wanted)


def worst_rollouts(round_: cs.Round, teachers: Sequence[str], n_wanted: int) -> npt.NDArray[np.int64]:
    """Numbers of the rollouts with the highest reverse KL at one token, to any of the teachers, ascending."""
    numbers, worst = [], []
    with progress("cached rollouts: worst tokens", round_.n_blocks) as bar:
        for scored in scored_blocks(round_, teachers):
            kl_T = np.max([np.where(scored.mask(t), scored.reverse_kl[t], 0.0) for t in scored.teachers], axis=0)
            rollouts = scored.rollouts
            numbers.append(scored.numbers)
            worst.append(np.maximum.reduceat(kl_T, rollouts.response_start))
            bar.advance()
    order = np.argsort(-np.concatenate(worst), kind="stable")[:n_wanted]
    return np.sort(np.concatenate(numbers)[order])


def _score(
    model: PreTrainedModel, recipe: Recipe, identity: dict[str, Any], round_: cs.Round, numbers: npt.NDArray[np.int64]
) -> tuple[dict[str, npt.NDArray[Any]], dict[str, str]]:
    """The file's arrays and metadata."""
    chosen, candidate_ids = _rollouts(round_, numbers)
    options = ScoreOptions(tile_tokens=recipe.score.tile_tokens, rows_per_chunk=recipe.score.rows_per_chunk)
    with progress("cached rollouts: scoring", chosen.n_tokens, "tokens") as bar:
        scorer = ResidentScorer(model, options, on_tile=bar.advance)
        scores = scorer.compute_logprobs(TokenBatch((chosen,), candidate_ids))
    values = {name: getattr(scores, name) for name in ("logprobs", "entropy", "candidate_logprobs", "rest_logprob")}
    spans = {"start": chosen.response_start.astype(np.int64), "length": chosen.response_length.astype(np.int64)}
    return {"numbers": numbers, **spans, **values}, {key: str(value) for key, value in identity.items()}


def _rollouts(round_: cs.Round, numbers: npt.NDArray[np.int64]) -> tuple[cs.RolloutBlock, npt.NDArray[np.int32]]:
    """The rollouts of these numbers as one block, and their cached candidates [T, K]."""
    per_prompt = round_.manifest.rollouts_per_prompt
    block_of = numbers // per_prompt // round_.manifest.prompts_per_block
    prompts: dict[int, npt.NDArray[np.int32]] = {}
    rows, candidates = [], []
    for block in np.unique(block_of).tolist():
        rollouts = round_.rollouts.read(block)
        ids_TK = round_.scores(cs.STUDENT).read_arrays(block, ["candidate_ids"])["candidate_ids"]
        for row in np.flatnonzero(np.isin(rollout_numbers(round_, rollouts), numbers)).tolist():
            span, index = rollouts.response_slice(row), int(rollouts.prompt_index[rollouts.row_prompt[row]])
            prompts.setdefault(index, rollouts.prompt(row))
            place, sample = list(prompts).index(index), int(rollouts.sample_index[row])
            ids, logprobs = rollouts.token_ids[span], rollouts.rollout_logprobs[span]
            rows.append(cs.RolloutRow(place, sample, ids, logprobs, int(rollouts.finish_reason[row])))
            candidates.append(ids_TK[span])
    return cs.RolloutBlock.from_rows(list(prompts.items()), rows), np.concatenate(candidates)
