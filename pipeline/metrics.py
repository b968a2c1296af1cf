"""Figures computed from a cache with numpy alone, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]


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


def first_occurrence(ids_TK: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """[T, K]: True where an id stands in its row for the first time."""
    order = np.argsort(ids_TK, axis=1, kind="stable")
    ordered = np.take_along_axis(ids_TK, order, axis=1)
    first = np.ones(ids_TK.shape, np.bool_)
    np.put_along_axis(first, order[:, 1:], ordered[:, 1:] != ordered[:, :-1], axis=1)
    return first
