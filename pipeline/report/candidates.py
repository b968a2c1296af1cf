"""What student and teachers might have said at each position, for the page. numpy only.

Shapes: T tokens of a rollout, K candidates of the student, C of all, N positions, M candidates end to end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

import cache_schema as cs
from pipeline.report.encode import NOT_TOLD, UInt16, nats
from pipeline.report.scan import Int64
from pipeline.rounds.metrics import first_occurrence

#: Probability below which a candidate is left out where no model gives it more.
UNLIKELY = 1e-3


@dataclass(frozen=True)
class Candidates:
    """Candidates of some positions, end to end: `count` [N] of them at each token `at` [N]."""

    at: Int64
    count: Int64
    ids: Int64
    student: UInt16
    readers: list[UInt16]

    @classmethod
    def of(
        cls, first: int, student: cs.ScoreBlock, teachers: Mapping[str, cs.ScoreBlock], names: Sequence[str]
    ) -> Candidates:
        """At every token of a rollout that begins at token `first` of the page: the student's candidates, then what
        the teachers told besides; without those that no model gives UNLIKELY."""
        assert student.candidate_ids is not None and student.candidate_logprobs is not None
        own = student.candidate_ids
        tops = [scores.topk_ids for scores in teachers.values() if scores.topk_ids is not None]
        ids = np.concatenate([own, *tops], axis=1)
        by_student = np.full(ids.shape, np.nan)
        by_student[:, : own.shape[1]] = student.candidate_logprobs
        by_reader = {name: _told(ids, own, scores) for name, scores in teachers.items()}
        likely = np.any([np.exp(told) >= UNLIKELY for told in (by_student, *by_reader.values())], axis=0)
        likely[:, 0] = True  # the token itself
        keep = first_occurrence(ids) & likely
        unknown = np.full(int(keep.sum()), NOT_TOLD, np.uint16)
        readers = [nats(-by_reader[name][keep]) if name in by_reader else unknown for name in names]
        at = first + np.arange(len(ids), dtype=np.int64)
        return cls(at, keep.sum(axis=1), ids[keep].astype(np.int64), nats(-by_student[keep]), readers)

    @classmethod
    def joined(cls, parts: Sequence[Candidates], n_readers: int) -> Candidates:
        """In order of `at`."""
        nothing, none = np.zeros(0, np.int64), np.zeros(0, np.uint16)
        parts = [cls(nothing, nothing, nothing, none, [none] * n_readers), *sorted(parts, key=lambda p: int(p.at[0]))]
        at, count, ids = (np.concatenate([getattr(part, name) for part in parts]) for name in ("at", "count", "ids"))
        readers = [np.concatenate([part.readers[index] for part in parts]) for index in range(n_readers)]
        return cls(at, count, ids, np.concatenate([part.student for part in parts]), readers)

    def only(self, positions: Int64) -> Candidates:
        """Those of some positions, by their place in `at`, ascending."""
        chosen = np.zeros(len(self.at), np.bool_)
        chosen[positions] = True
        keep = np.repeat(chosen, self.count)
        readers = [reader[keep] for reader in self.readers]
        return Candidates(self.at[chosen], self.count[chosen], self.ids[keep], self.student[keep], readers)


def _told(
    ids_TC: npt.NDArray[np.int32], own_TK: npt.NDArray[np.int32], teacher: cs.ScoreBlock
) -> npt.NDArray[np.float64]:
    """[T, C]: what a teacher told of these tokens; NaN where it told nothing."""
    told = np.full(ids_TC.shape, np.nan)
    known = [(own_TK, teacher.candidate_logprobs), (teacher.topk_ids, teacher.topk_logprobs)]
    for known_ids, logprobs in known:
        if known_ids is None or logprobs is None:
            continue
        for column in range(known_ids.shape[1]):
            here = (ids_TC == known_ids[:, column, None]) & ~np.isnan(logprobs[:, column, None])
            told = np.where(here, logprobs[:, column, None], told)
    told[:, 0] = teacher.logprobs
    return told


def part_of(scores: cs.ScoreBlock, span: slice) -> cs.ScoreBlock:
    """The scores of one rollout of a block."""
    arrays = {name: value[span] for name, value in vars(scores).items() if value is not None}
    return cs.ScoreBlock(**arrays)
