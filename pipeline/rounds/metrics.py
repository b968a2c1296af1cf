"""Figures computed from a cache with numpy alone, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

import cache_schema as cs

Float64 = npt.NDArray[np.float64]

#: The least probability that is left outside tokens whose fp32 log-probs are known: below it, it is their rounding.
REST_FLOOR = 2.0**-24


def reverse_kl(
    student_logprobs_TK: npt.ArrayLike,
    student_rest_T: npt.ArrayLike,
    teacher_logprobs_TK: npt.ArrayLike,
    teacher_rest_T: npt.ArrayLike,
    candidate_ids_TK: npt.NDArray[Any] | None = None,
) -> Float64:
    """KL(student || teacher) at each position [T], nats: over the K candidates and one bucket for everything else.

    A lower bound of the divergence over the whole vocabulary, exact where the candidates cover it. `candidate_ids_TK`
    is needed where candidates may repeat (sampled ones): each id then counts once.
    """
    student, teacher = (
        np.concatenate([np.asarray(logprobs, np.float64), np.asarray(rest, np.float64)[:, None]], axis=1)
        for logprobs, rest in ((student_logprobs_TK, student_rest_T), (teacher_logprobs_TK, teacher_rest_T))
    )
    counts = student != -np.inf  # no mass of the student's: the term is 0
    if candidate_ids_TK is not None:
        counts[:, :-1] &= first_occurrence(candidate_ids_TK)
    terms = np.exp(student) * (np.where(counts, student, 0.0) - np.where(counts, teacher, 0.0))
    return np.asarray(np.where(counts, terms, 0.0).sum(axis=1))


#: The arrays of either scorer that `scores_reverse_kl` looks at.
REVERSE_KL_ARRAYS = ("logprobs", "candidate_ids", "candidate_logprobs", "rest_logprob")


def scores_reverse_kl(student: cs.ScoreBlock, teacher: cs.ScoreBlock) -> Float64:
    """KL(student || teacher) at each position [T], nats, from their scores; NaN where the teacher's are missing.

    Candidates without a teacher score count as rest. A teacher without candidates leaves two buckets: the token
    itself, and everything else.
    """
    if teacher.candidate_logprobs is None:
        of_student, of_teacher = ((s.logprobs[:, None], rest_of(s.logprobs)) for s in (student, teacher))
        return reverse_kl(*of_student, *of_teacher)
    assert student.candidate_logprobs is not None and student.rest_logprob is not None
    assert student.candidate_ids is not None and teacher.rest_logprob is not None
    first = first_occurrence(student.candidate_ids)
    missing = np.isnan(teacher.candidate_logprobs)
    own = student.candidate_logprobs.astype(np.float64)
    rest = np.logaddexp.reduce(np.where(missing & first, own, -np.inf), axis=1, initial=-np.inf)
    rest = np.logaddexp(rest, student.rest_logprob)
    own = np.where(missing | ~first, -np.inf, own)
    return reverse_kl(own, rest, teacher.candidate_logprobs, teacher.rest_logprob)


def teacher_prefers(student: cs.ScoreBlock, teacher: cs.ScoreBlock) -> npt.NDArray[np.int64]:
    """[T]: the teacher's likeliest token, of the student's candidates and its own top-k; -1 where a token without a
    score may be likelier.
    """
    ids, logprobs, rest = [], [], None
    if teacher.candidate_logprobs is not None and student.candidate_ids is not None:
        ids, logprobs, rest = [student.candidate_ids], [teacher.candidate_logprobs], teacher.rest_logprob
    if teacher.topk_ids is not None and teacher.topk_logprobs is not None:
        ids, logprobs, rest = [*ids, teacher.topk_ids], [*logprobs, teacher.topk_logprobs], teacher.topk_rest_logprob
    if rest is None:
        return np.full(teacher.n_tokens, -1)
    known = np.nan_to_num(np.concatenate(logprobs, axis=1), nan=-np.inf)
    best = known.argmax(axis=1)[:, None]
    chosen, logprob = (np.take_along_axis(v, best, axis=1)[:, 0] for v in (np.concatenate(ids, axis=1), known))
    return np.where(logprob >= np.nan_to_num(rest, nan=np.inf), chosen, -1).astype(np.int64)


def rest_of(logprobs: npt.ArrayLike) -> Float64:
    """log(1 - sum of exp(logprobs) over the last axis, if there are two), at least log(REST_FLOOR); NaN stays NaN."""
    known = np.exp(np.asarray(logprobs, np.float64))
    return np.asarray(np.log(np.maximum(1.0 - (known if known.ndim == 1 else known.sum(-1)), REST_FLOOR)))


@dataclass(frozen=True)
class SamplerGap:
    """How much sampler and training forward differ: the ratio p_trainer / p_sampler of the sampled tokens.

    Its mean is 1 if both compute the same distribution, and not 1 if the sampler's log-probs are of another one
    (another temperature, renormalised, another model). Rounding spreads it: bf16 puts up to a few % outside 0.9..1.1.
    """

    mean: float
    p99: float
    outside: float  # fraction of the tokens outside 0.9..1.1

    @classmethod
    def of(cls, log_ratio_T: npt.NDArray[np.float32]) -> SamplerGap | None:
        """From log p_trainer - log p_sampler; None without tokens."""
        if not len(log_ratio_T):
            return None
        ratio = np.exp(log_ratio_T)
        outside = (ratio < 0.9) | (ratio > 1.1)
        return cls(float(ratio.mean(dtype=np.float64)), float(np.quantile(ratio, 0.99)), float(outside.mean()))

    @property
    def is_wide(self) -> bool:
        """Whether the gap is larger than the rounding of half precision explains."""
        return abs(self.mean - 1) > 0.02 or self.outside > 0.1

    def __str__(self) -> str:
        return f"mean {self.mean:.4f}, p99 {self.p99:.3f}, {self.outside:.2%} outside 0.9..1.1"


def first_occurrence(ids_TK: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """[T, K]: True where an id stands in its row for the first time."""
    order = np.argsort(ids_TK, axis=1, kind="stable")
    ordered = np.take_along_axis(ids_TK, order, axis=1)
    first = np.ones(ids_TK.shape, np.bool_)
    np.put_along_axis(first, order[:, 1:], ordered[:, 1:] != ordered[:, :-1], axis=1)
    return first
