"""Training batches from rollouts in memory and the caller's own advantages or teacher scores; see `pipeline.api`.

Shapes: T response tokens of all rollouts end to end, K candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

import cache_schema as cs
from pipeline.errors import RedpenError
from pipeline.forward.head import without_repeats
from pipeline.rounds.metrics import rest_of
from pipeline.train.mixture import TeacherColumns
from pipeline.train.replay import Batch, LoadedBlock, Rollout
from pipeline.train.teachers import Teachers

Float32 = npt.NDArray[np.float32]
Columns = dict[str, npt.NDArray[Any]]

_SCORES, _REST = "signal/candidate_logprobs", "signal/rest_logprob"


class InMemoryTeacher(Teachers):
    """A teacher whose log-probs are columns of the batch, not scores in a cache."""

    def columns(self, column: Callable[[str], Tensor], candidate_ids_TK: Tensor, prompts_T: object) -> TeacherColumns:
        logprobs_TK = column(_SCORES)
        ids_TK = candidate_ids_TK.masked_fill(
            logprobs_TK.isnan(), -1
        )  # tokens that the teacher lacks are in the rest
        return TeacherColumns(without_repeats(ids_TK), logprobs_TK, column(_REST))


def read_advantage(signal: object, rollouts: cs.RolloutBlock) -> Float32:
    """The advantage as f4 [T], from whatever numpy understands or a tensor. Raises `RedpenError`."""
    values = np.asarray(signal.detach().cpu() if isinstance(signal, Tensor) else signal, np.float32)
    if values.shape != (rollouts.n_tokens,):
        raise RedpenError(
            f"advantage: expected one value for each of the rollouts' {rollouts.n_tokens} response tokens, got "
            f"shape {values.shape}; pass one value a token, of these rollouts"
        )
    if n_bad := int((~np.isfinite(values[rollouts.trained == 1])).sum()):
        raise RedpenError(f"advantage: expected finite numbers, got {n_bad} of {len(values)} that are not")
    return values


def as_teacher(advantage: Float32, rollouts: cs.RolloutBlock, logprobs: Float32) -> Columns:
    """An advantage as teacher columns: the teacher's log-prob of every sampled token is log p_old + A."""
    teacher_T = logprobs + advantage
    return {
        f"{cs.STUDENT}/candidate_ids": rollouts.token_ids[:, None],
        _SCORES: teacher_T[:, None],
        _REST: rest_of(teacher_T).astype(np.float32),
    }


def at_candidates(signal: object, candidate_ids: npt.NDArray[np.int32]) -> Columns:
    """A teacher's scores of the student's candidates as teacher columns. Raises `RedpenError`."""
    if not isinstance(signal, cs.ScoreBlock) or signal.candidate_logprobs is None or signal.rest_logprob is None:
        raise RedpenError(
            "reverse_kl: expected the result of teacher.compute_scores(rollouts); an advantage is for "
            'loss_fn="importance_sampling"'
        )
    if signal.candidate_logprobs.shape != candidate_ids.shape:
        raise RedpenError(
            f"reverse_kl: expected scores of these rollouts' candidates, {candidate_ids.shape}, got "
            f"{signal.candidate_logprobs.shape}; score these rollouts"
        )
    return {
        f"{cs.STUDENT}/candidate_ids": candidate_ids,
        _SCORES: signal.candidate_logprobs,
        _REST: signal.rest_logprob,
    }


def batch(step: int, rollouts: cs.RolloutBlock, logprobs: Float32, columns: Mapping[str, npt.NDArray[Any]]) -> Batch:
    """All rollouts as the global batch of a step; `logprobs` are those of the student that sampled them."""
    weights = (rollouts.trained == 1).astype(np.float32)
    block = LoadedBlock(rollouts, {**columns, f"{cs.STUDENT}/logprobs": logprobs}, weights)
    return Batch(step, tuple(Rollout(block, row) for row in range(rollouts.n_rows)))
