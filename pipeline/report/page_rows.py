"""The rollouts of a page token by token, in a second pass over their blocks. numpy only.

Only tokens that are shown are ever in memory together. Shapes: T tokens shown, K candidates of the student, C of
student and teachers, N positions with candidates, M candidates end to end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

import cache_schema as cs
from pipeline.console import progress
from pipeline.errors import PromptError
from pipeline.report.inspect import json_number
from pipeline.report.read import RIGHT, UNKNOWN, RoundScan, clip_kl
from pipeline.report.runs import Reread
from pipeline.report.string_table import (
    MISSING,
    TEXT_BYTES,
    LabelTable,
    StringTable,
    UInt16,
    as_text,
    clean,
    encode_array,
    encode_nats,
)
from pipeline.rounds.metrics import Float64, first_occurrence, scores_reverse_kl
from pipeline.rounds.scored_block import Int64, ScoredBlock, part_of
from pipeline.text.answers import answers_of
from pipeline.text.detokenize import Decoder
from pipeline.text.teacher_prompt import has_own_text, read_text

#: Fraction of a set's bytes for prompts.
PROMPT_FRACTION = 0.1
#: Characters of a prompt that are shown, at most and at least.
PROMPT_CHARACTERS = (8_000, 200)
#: Candidates are left out if no model gives them this probability.
UNLIKELY = 1e-3


class ListedRollout(TypedDict):
    """A rollout of the page. `start` and `length` place its tokens; `kl` (mean) and `worst` are by teacher, nats."""

    number: int
    same_as: int | None  # number of an earlier row with the same prompt, tokens and scores after training
    prompt_index: int
    sample_index: int
    prompt: str
    read: dict[str, str]  # by teacher, what it read in place of the prompt
    answer: str | None
    source: str | None
    finish: str
    right: bool | None
    start: int
    length: int
    kl: dict[str, float | None]
    worst: dict[str, float | None]


class CandidateArrays(TypedDict):
    """Candidates of N positions, end to end; the token itself comes first."""

    at: str  # u32 [N]: the token
    start: str  # u32 [N + 1]: its first candidate
    label: str  # u32 [M] into the set's labels
    student: str  # u16 [M]
    teachers: list[str]  # u16 [M] each


class PageRows:
    """The rollouts of a page, in its order, with the scores of their tokens.

    Args:
        rows: of the scan, those to show.
        page_bytes: how much of a page they may fill.
        rereads: scores of their tokens by students that were trained on them.
    """

    def __init__(self, scan: RoundScan, rows: Int64, page_bytes: int, rereads: Sequence[Reread], tokenizer: Decoder):
        self._scan, self._rows, self.rereads, self._tokenizer = scan, rows, rereads, tokenizer
        self.numbers: list[int] = scan.number[rows].tolist()
        self._teachers = scan.reader.teachers
        self._start = np.concatenate([[0], np.cumsum(scan.length[rows])]).astype(np.int64)
        self.labels, self.strings = LabelTable(tokenizer), StringTable(tokenizer)
        most, least = PROMPT_CHARACTERS
        texts = 1 + sum(has_own_text(group.manifest.template) for group in scan.reader.scores.values())
        self._prompt_characters = max(least, min(most, int(PROMPT_FRACTION * page_bytes / max(texts * len(rows), 1))))
        self._n_cut_prompts = 0
        n = int(self._start[-1])
        self.tokens, self.trained = np.zeros(n, np.uint32), np.zeros(n, np.uint8)
        self._u16: dict[tuple[str, ...], UInt16] = {}  # [T] by scorer, value and teacher
        self._worth = np.zeros(n)  # tokens with the highest get candidates first
        self._records: dict[int, ListedRollout] = {}
        self._contents: dict[int, tuple[object, ...]] = {}  # equal for rollouts that differ in their number alone
        self._candidates: list[Candidates] = []
        self._unreadable: dict[str, str] = {}  # by teacher: why its text cannot be shown, looked at once

    def read(self, label: str) -> None:
        """Read the blocks that hold the rollouts. Raises `CacheError` if one is damaged."""
        place = {number: index for index, number in enumerate(self.numbers)}
        manifest = self._scan.reader.round.manifest
        per_block = manifest.prompts_per_block * manifest.rollouts_per_prompt
        blocks = sorted({number // per_block for number in self.numbers})
        with progress(f"{label}: reading", len(blocks)) as bar:
            for scored in map(self._scan.reader.read, blocks):
                for row, number in enumerate(scored.numbers.tolist()):
                    if number in place:
                        self._add(scored, row, place[number])
                bar.advance()

    def _add(self, scored: ScoredBlock, row: int, index: int) -> None:
        rollouts = scored.rollouts
        span, at = rollouts.response_slice(row), slice(int(self._start[index]), int(self._start[index + 1]))
        ids, trained = rollouts.token_ids[span], rollouts.trained[span]
        self.tokens[at], self.trained[at] = self.strings.add(ids.tolist()), trained
        record = self._records[index] = self._record(rollouts, row, index, at)
        content: list[object] = [record["prompt_index"], record["finish"], ids.tobytes(), trained.tobytes()]
        teachers = {name: part_of(scores, span) for name, scores in scored.teachers.items()}
        worth = np.zeros(len(ids))
        for name, scores in teachers.items():
            kl = clip_kl(scored.reverse_kl[name][span])
            self._store(at, ("teacher", name), scores, {"": kl})
            worth = np.maximum(worth, np.where(trained == 1, np.nan_to_num(kl), 0.0))
        if scored.has_student:
            student = part_of(scored.student, span)
            assert student.entropy is not None
            self._store(at, ("student",), student, {})
            own = np.where(trained == 1, 1e-9 * student.entropy.astype(np.float64), 0.0)
            worth = np.maximum(worth, own)  # decides only without a teacher
            self._candidates.append(Candidates.of(at.start, student, teachers, self._teachers))
            for reread in self.rereads:
                after = reread.scores_of(self.numbers[index], student)
                content.append(after is not None)
                if after is not None:
                    kl_by_teacher = {n: clip_kl(scores_reverse_kl(after, scores)) for n, scores in teachers.items()}
                    self._store(at, ("after", reread.run), after, kl_by_teacher)
        self._worth[at] = worth
        self._contents[index] = tuple(content)

    def _store(self, at: slice, scorer: tuple[str, ...], scores: cs.ScoreBlock, kl: Mapping[str, Float64]) -> None:
        self._array(*scorer, "logprob")[at] = encode_nats(-scores.logprobs)
        if scores.entropy is not None:
            self._array(*scorer, "entropy")[at] = encode_nats(scores.entropy)
        for teacher, kl_T in kl.items():
            self._array(*scorer, "kl", teacher)[at] = encode_nats(kl_T)

    def _array(self, *key: str) -> UInt16:
        return self._u16.setdefault(key, np.full(len(self.tokens), MISSING, np.uint16))

    def column(self, *key: str) -> str:
        """A value of every token, such as ("teacher", NAME, "kl", ""), encoded."""
        return encode_array(self._array(*key))

    def _record(self, rollouts: cs.RolloutBlock, row: int, index: int, at: slice) -> ListedRollout:
        scan, place = self._scan, int(self._rows[index])
        prompt_index = int(rollouts.prompt_index[rollouts.row_prompt[row]])
        line = scan.reader.round.prompts[prompt_index]
        right = int(scan.right[place])
        return {
            "number": self.numbers[index],
            "same_as": None,
            "prompt_index": prompt_index,
            "sample_index": int(rollouts.sample_index[row]),
            "prompt": self._shortened(clean(self._tokenizer.decode(rollouts.prompt(row).tolist()))),
            "read": {name: text for name in self._teachers if (text := self._read_by(name, line)) is not None},
            "answer": None if (accepted := answers_of(line)) is None else clean(" or ".join(accepted)),
            "source": as_text(line.get("source")),
            "finish": cs.FINISH_NAMES[int(rollouts.finish_reason[row])],
            "right": None if right == UNKNOWN else right == RIGHT,
            "start": at.start,
            "length": at.stop - at.start,
            "kl": {name: json_number(scan.mean[name][place]) for name in self._teachers},
            "worst": {name: json_number(scan.worst[name][place]) for name in self._teachers},
        }

    def _read_by(self, teacher: str, line: dict[str, Any]) -> str | None:
        if teacher not in self._unreadable:
            try:
                text = read_text(self._scan.reader.scores[teacher].manifest.template, line)
                return None if text is None else self._shortened(clean(text))
            except PromptError as error:
                self._unreadable[teacher] = f"[{error}]"
        return self._unreadable[teacher]

    def _shortened(self, prompt: str) -> str:
        most = self._prompt_characters
        if len(prompt) <= most:
            return prompt
        self._n_cut_prompts += 1
        tail = most // 2  # a question stands at the end as often as at the beginning
        return f"{prompt[: most - tail]} [... {len(prompt) - most:,} characters ...] {prompt[-tail:]}"

    @property
    def cut_prompts(self) -> str | None:
        cut, most = self._n_cut_prompts, self._prompt_characters
        return f"{cut:,} of the prompts shown are cut in the middle to {most:,} characters" if cut else None

    def records(self) -> list[ListedRollout]:
        """The rollouts in the order of the page; those that repeat an earlier one say so in `same_as`."""
        first: dict[tuple[object, ...], int] = {}
        for index, number in enumerate(self.numbers):
            earlier = first.setdefault(self._contents[index], number)
            self._records[index]["same_as"] = None if earlier == number else earlier
        return [self._records[index] for index in range(len(self.numbers))]

    def candidates(self, page_bytes: int) -> tuple[CandidateArrays, str | None]:
        """As many candidates as have room, at the positions of the highest reverse KL, and what was left out."""
        every = Candidates.joined(self._candidates, len(self._teachers))
        cost = TEXT_BYTES * (8 + every.count * (6 + 2 * len(self._teachers)))
        order = np.argsort(-self._worth[every.at], kind="stable")
        kept = every.only(np.sort(order[np.cumsum(cost[order]) <= page_bytes]))
        arrays: CandidateArrays = {
            "at": encode_array(kept.at.astype(np.uint32)),
            "start": encode_array(np.concatenate([[0], np.cumsum(kept.count)]).astype(np.uint32)),
            "label": encode_array(self.labels.add(kept.ids)),
            "student": encode_array(kept.student),
            "teachers": [encode_array(teacher) for teacher in kept.teachers],
        }
        if len(kept.at) == len(every.at):
            return arrays, None
        by = "reverse KL" if self._teachers else "entropy"
        shown = f"{len(kept.at):,} of {len(every.at):,}"
        return arrays, f"candidates are there for the {shown} tokens with the highest {by}"


@dataclass(frozen=True)
class Candidates:
    """Candidates of some positions, end to end: `count` [N] of them at each token `at` [N]."""

    at: Int64
    count: Int64
    ids: Int64
    student: UInt16
    teachers: list[UInt16]

    @classmethod
    def of(
        cls, first: int, student: cs.ScoreBlock, teachers: Mapping[str, cs.ScoreBlock], names: Sequence[str]
    ) -> Candidates:
        """At every token of a rollout that begins at token `first` of the page: the student's candidates, then the
        teachers' top-k; without those that no model gives UNLIKELY."""
        assert student.candidate_ids is not None and student.candidate_logprobs is not None
        own = student.candidate_ids
        tops = [scores.topk_ids for scores in teachers.values() if scores.topk_ids is not None]
        ids = np.concatenate([own, *tops], axis=1)
        by_student = np.full(ids.shape, np.nan)
        by_student[:, : own.shape[1]] = student.candidate_logprobs
        by_teacher = {name: _logprobs_of(ids, own, scores) for name, scores in teachers.items()}
        likely = np.any([np.exp(known) >= UNLIKELY for known in (by_student, *by_teacher.values())], axis=0)
        likely[:, 0] = True  # the token itself
        keep = first_occurrence(ids) & likely
        missing = np.full(int(keep.sum()), MISSING, np.uint16)
        of_teachers = [encode_nats(-by_teacher[name][keep]) if name in by_teacher else missing for name in names]
        at = first + np.arange(len(ids), dtype=np.int64)
        return cls(at, keep.sum(axis=1), ids[keep].astype(np.int64), encode_nats(-by_student[keep]), of_teachers)

    @classmethod
    def joined(cls, parts: Sequence[Candidates], n_teachers: int) -> Candidates:
        """In order of `at`."""
        nothing, none = np.zeros(0, np.int64), np.zeros(0, np.uint16)
        parts = [
            cls(nothing, nothing, nothing, none, [none] * n_teachers),
            *sorted(parts, key=lambda p: int(p.at[0])),
        ]
        at, count, ids = (np.concatenate([getattr(part, name) for part in parts]) for name in ("at", "count", "ids"))
        teachers = [np.concatenate([part.teachers[index] for part in parts]) for index in range(n_teachers)]
        return cls(at, count, ids, np.concatenate([part.student for part in parts]), teachers)

    def only(self, positions: Int64) -> Candidates:
        """Those of some positions, by their index in `at`, ascending."""
        chosen = np.zeros(len(self.at), np.bool_)
        chosen[positions] = True
        keep = np.repeat(chosen, self.count)
        teachers = [teacher[keep] for teacher in self.teachers]
        return Candidates(self.at[chosen], self.count[chosen], self.ids[keep], self.student[keep], teachers)


def _logprobs_of(
    ids_TC: npt.NDArray[np.int32], own_TK: npt.NDArray[np.int32], teacher: cs.ScoreBlock
) -> npt.NDArray[np.float64]:
    """[T, C]: a teacher's log-probs of these tokens; NaN if missing."""
    found = np.full(ids_TC.shape, np.nan)
    for known_ids, logprobs in ((own_TK, teacher.candidate_logprobs), (teacher.topk_ids, teacher.topk_logprobs)):
        if known_ids is None or logprobs is None:
            continue
        for column in range(known_ids.shape[1]):
            here = (ids_TC == known_ids[:, column, None]) & ~np.isnan(logprobs[:, column, None])
            found = np.where(here, logprobs[:, column, None], found)
    found[:, 0] = teacher.logprobs
    return found
