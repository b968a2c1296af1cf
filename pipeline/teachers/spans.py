"""A teacher with another tokenizer: it scores the same text, and spans between common token boundaries are compared.

Token boundaries of both tokenizers are positions in a response's text. Between two common boundaries lies a span:
student tokens a..b and teacher tokens c..d with the same text. Its log-probs are comparable,

    L_S = sum_{a..b} log p_S,    L_T = sum_{c..d} log p_T,

as those of this tokenization: the teacher may tokenize the same text otherwise too, so exp(L_T) is a lower bound of
its probability of the text. Single tokens within a span are not comparable. Each of the span's m tokens gets an equal
part of its log-ratio,

    log p_T(x_t) := min(0, log p_S(x_t) + c),    c such that they add up to L_T,

with the cached student's log-probs; c = (L_T - L_S) / m if that leaves none above 0, and otherwise the excess goes to
the tokens of which the student was less sure. The policy gradient of each of m tokens is then 1 / m of that of the
span as one action. Spans of more than `LONGEST` student tokens, which determine too little about each, are left out
(NaN), as are responses with special tokens before their end, and those that the teacher's tokenizer changes (lower
case, Unicode normal forms). There are no candidates: training is by importance sampling, or k2.

Shapes: T response tokens of the student's, U of the teacher's.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

import cache_schema as cs
from pipeline.engines.scoring import Scorer, TokenBatch, as_batch
from pipeline.errors import ModelError
from pipeline.teachers.prompts import TeacherPrompts
from pipeline.text.detokenize import Verbatim, pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST = 16

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Spans:
    """One response in both tokenizations.

    Attributes:
        ids: i4 [U] the teacher's tokens.
        of_student, of_teacher: i8 [T] and [U], the number of the span that each token is in; -1: in none.
    """

    ids: Int32
    of_student: Int64
    of_teacher: Int64


@dataclass(frozen=True)
class SpanView:
    """The input of a teacher with another tokenizer; see `alignment.View`.

    Attributes:
        prompts: the teacher's token ids of every prompt of the round.
        stop_ids: of the student; the teacher's stop_id replaces them at a response's end.
        made_of: what its prompts are made of, see `TeacherPrompts`.
        shared: None; single tokens are not scored.
    """

    student: PreTrainedTokenizerBase
    teacher: PreTrainedTokenizerBase
    prompts: Sequence[Int32]
    stop_ids: frozenset[int]
    stop_id: int
    made_of: dict[str, Any]
    shared: None = None

    def scorer(self, scorer: Scorer) -> Scorer:
        """The same scorer, for batches and scores in the student's ids."""
        return _SpanScorer(scorer, self)

    def lacks_tokens(self, n_tokens: int) -> bool:
        """A token may be in no span."""
        return True

    def of(self, batch: TokenBatch) -> TokenBatch:
        """The batch in the teacher's tokens."""
        return self.in_spans(batch, [self.spans(block) for block in batch.blocks])

    def in_spans(self, batch: TokenBatch, spans: Sequence[Sequence[Spans]]) -> TokenBatch:
        """The same, with the known spans of every block."""
        return TokenBatch(tuple(map(self._block, batch.blocks, spans)), keys=batch.keys)

    def spans(self, block: cs.RolloutBlock) -> list[Spans]:
        """The spans of every response of a block."""
        return [self._spans(block.response(row)) for row in range(block.n_rows)]

    def _spans(self, response: Int32) -> Spans:
        ended = int(response[-1]) in self.stop_ids
        body = response[: len(response) - ended].tolist()
        text = pieces(body, Verbatim(self.student))
        written = "".join(text)
        encoded = self.teacher(written, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = list(encoded["input_ids"]), list(encoded["offset_mapping"])
        ours, theirs = _ends_of_pieces(text), _ends_of_offsets(offsets)
        special = set(body) & set(self.student.all_special_ids) or set(ids) & set(self.teacher.all_special_ids)
        if special or "\ufffd" in written or Verbatim(self.teacher).decode(ids) != written:
            ours = {}  # the teacher would score another text
        of_student, of_teacher = np.full(len(response), -1), np.full(len(ids) + ended, -1)
        number, (a, c) = 0, (0, 0)
        for position in sorted(ours.keys() & theirs.keys()):
            b, d = ours[position], theirs[position]
            if b - a <= LONGEST:
                of_student[a:b], of_teacher[c:d] = number, number
                number += 1
            a, c = b, d
        if ended:
            ids.append(self.stop_id)
            of_student[-1] = of_teacher[-1] = number
        return Spans(np.asarray(ids, np.int32), of_student, of_teacher)

    def _block(self, block: cs.RolloutBlock, spans: Sequence[Spans]) -> cs.RolloutBlock:
        rows = [
            cs.RolloutRow(
                int(block.row_prompt[row]),
                int(block.sample_index[row]),
                spans[row].ids,
                np.full(len(spans[row].ids), np.nan, np.float32),
                int(block.finish_reason[row]),
            )
            for row in range(block.n_rows)
        ]
        return cs.RolloutBlock.from_rows([(int(index), self.prompts[index]) for index in block.prompt_index], rows)


class _SpanScorer:
    """A scorer behind a `SpanView`."""

    def __init__(self, scorer: Scorer, view: SpanView):
        self._scorer, self._view = scorer, view
        self.batch_tokens = scorer.batch_tokens

    def compute_logprobs(self, batch: TokenBatch | cs.RolloutBlock) -> cs.ScoreBlock:
        batch = as_batch(batch)
        assert batch.student_logprobs is not None
        spans = [self._view.spans(block) for block in batch.blocks]
        teacher_U = self._scorer.compute_logprobs(self._view.in_spans(batch, spans)).logprobs
        every = [*itertools.chain(*spans)]
        return cs.ScoreBlock(logprobs=spread_over_tokens(every, batch.student_logprobs, teacher_U))


def spread_over_tokens(
    spans: Sequence[Spans], student_T: npt.NDArray[np.float32], teacher_U: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """f4 [T]: every span's log-prob by the teacher, spread over its tokens (see the module); NaN outside of spans.

    Args:
        spans: of responses end to end.
        student_T, teacher_U: nats.
    """
    found, t, u = [], 0, 0
    for one in spans:
        own = student_T[t : t + len(one.of_student)].astype(np.float64)
        scored = teacher_U[u : u + len(one.of_teacher)].astype(np.float64)
        t, u = t + len(own), u + len(scored)
        n = int(one.of_student.max(initial=-1)) + 1
        if not n:
            found.append(np.full(len(own), np.nan, np.float32))
            continue
        inside, theirs = one.of_student >= 0, one.of_teacher >= 0
        length = np.bincount(one.of_student[inside], minlength=n)
        by_student = np.bincount(one.of_student[inside], own[inside], minlength=n)
        by_teacher = np.bincount(one.of_teacher[theirs], scored[theirs], minlength=n)
        shift = (by_teacher - by_student) / np.maximum(length, 1)
        above = inside & (own + shift[one.of_student] > 0)
        for span in np.unique(one.of_student[above]):
            shift[span] = _shift(own[one.of_student == span], by_teacher[span])
        spread = np.minimum(own + shift[one.of_student], 0.0)
        found.append(np.where(inside, spread, np.nan).astype(np.float32))
    return np.concatenate(found)


def _shift(own_M: npt.NDArray[np.float64], total: float) -> float:
    """The c at which min(0, own + c) adds up to `total`, at most 0."""
    ordered = np.sort(own_M)
    below = np.cumsum(ordered)
    for n in range(len(ordered), 1, -1):  # the n lowest stay below 0
        shift = (total - below[n - 1]) / n
        if ordered[n - 1] + shift <= 0:
            return float(shift)
    return float(total - ordered[0])


def span_view(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    name: str,
    prompts: TeacherPrompts,
    stop_ids: Sequence[int],
    stop_id: int | None,
) -> SpanView:
    """Raises `ModelError` if the teacher's tokenizer has no EOS, or returns no positions of tokens in the text."""
    if not teacher.is_fast:
        raise ModelError(
            f'{name}: score.alignment = "spans" needs a tokenizer that knows where its tokens are in the text (a '
            "tokenizer.json); this one does not"
        )
    alone = "".join(teacher.convert_ids_to_tokens(teacher("a", add_special_tokens=False)["input_ids"]))
    if alone != "a":
        raise ModelError(
            f"{name}: its tokenizer reads {alone!r} for 'a', so a response would begin with what the student did not "
            'write; score.alignment = "spans" needs one that adds nothing (byte-level BPE without a prefix space)'
        )
    if stop_id is None:
        raise ModelError(f"{name}: its tokenizer names no EOS token; set teacher.stop_token")
    return SpanView(student, teacher, prompts.ids, frozenset(stop_ids), stop_id, prompts.made_of)


def _ends_of_pieces(text: Sequence[str]) -> dict[int, int]:
    """The number of tokens up to each position at which one ends; one that only begins a character has no end."""
    ends, position = {}, 0
    for number, piece in enumerate(text, 1):
        position += len(piece)
        if piece:
            ends[position] = number
    return ends


def _ends_of_offsets(offsets: Sequence[tuple[int, int]]) -> dict[int, int]:
    """The same from (start, end) of each token; several tokens of one character have the same."""
    following = [start for start, _ in offsets[1:]] + [None]
    return {
        end: number
        for number, ((_, end), start) in enumerate(zip(offsets, following, strict=True), 1)
        if start is None or start >= end
    }
