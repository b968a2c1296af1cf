"""One pass over a scored round: columns with a value per token or per rollout, for the figures and checks.

Shapes: T tokens (the student's own that this teacher has scored), R rollouts, K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import numpy.typing as npt

import cache_schema as cs
from pipeline.rounds.metrics import Float64, first_occurrence
from pipeline.rounds.scored_block import Bool, Int64, ScoredBlock, ScoredRound, scored_blocks

#: Tokens that are read; of a larger round evenly spaced blocks.
TOKENS = 500_000
#: A response ends in a loop if its last LOOP_TOKENS or more are LOOP_TURNS or more repeats of the same tokens.
LOOP_TOKENS, LOOP_TURNS, LOOP_PERIOD = 24, 4, 64


@dataclass(frozen=True)
class _Table:
    """A record of equally long arrays."""

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        names = [field.name for field in fields(cls)]
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


@dataclass(frozen=True)
class ResponseColumns(_Table):
    """The rollouts and their scores by the student.

    Attributes:
        response: hash of the token ids: equal responses, equal hashes.
        logprob: of the response's trained tokens at the sampling temperature, nats.
        entropy: summed over the response's trained tokens, nats; likewise
        surprise: of log-prob + entropy at temperature 1, 0 on average if the student itself was sampled from;
        spread: the variance that this then has (the rest outside the candidates as one token).
    """

    prompt: Int64
    length: Int64
    finish: Int64
    loops: Bool
    response: Int64
    logprob: Float64
    entropy: Float64
    surprise: Float64
    spread: Float64


@dataclass(frozen=True)
class TokenColumns(_Table):
    """Scores of student and teacher of each token. Natural logarithms.

    Attributes:
        position, length: of the token in its response, and of the response.
        stop: whether it is a stop token: it ends the response, or one of several turns.
        shared, student_shared: probability that the teacher, and the student, gives to the student's candidates
            together; NaN without candidates.
        agrees: 1 if both give the same candidate the highest log-prob, else 0; NaN with fewer than two candidates.
        prefers, prefers_logprob: the teacher's likeliest token as far as known: of the candidates and of its top-k.
        overlap: fraction of the student's K candidates among the teacher's own K likeliest; NaN without them.
    """

    token: Int64
    position: Int64
    length: Int64
    stop: Bool
    reverse_kl: Float64
    student_logprob: Float64
    student_entropy: Float64
    logprob: Float64
    entropy: Float64
    shared: Float64
    student_shared: Float64
    agrees: Float64
    prefers: Int64
    prefers_logprob: Float64
    overlap: Float64

    @property
    def is_preference(self) -> Bool:
        """[T]: whether `prefers` is the likeliest of all tokens, not just of those with a score."""
        return np.asarray(self.prefers_logprob >= np.log(0.5))


@dataclass(frozen=True)
class PairScores:
    """A teacher's scores of a round, and the manifests of both.

    Attributes:
        scored_share: fraction of the student's own tokens that the teacher has scored.
    """

    teacher: str
    sampled: cs.RoundManifest
    scored: cs.ScoresManifest
    tokens: TokenColumns
    scored_share: float


@dataclass(frozen=True)
class RoundSample:
    """The part of a round that was read: its rollouts, and the scores of each teacher."""

    round: cs.Round
    blocks: int
    scored_blocks: int  # those that student and teachers have scored
    responses: ResponseColumns
    log_ratio: npt.NDArray[np.float32]  # [tokens] trainer against sampler; empty if the sampler reported none
    pairs: dict[str, PairScores]


def read_round(round_: cs.Round, teachers: Sequence[str]) -> RoundSample | None:
    """Read the round, or TOKENS of it; None if no teacher has scored any of the student's own tokens.

    Raises:
        CacheError: a block is damaged.
    """
    responses: list[ResponseColumns] = []
    ratios: list[npt.NDArray[np.float32]] = []
    columns: dict[str, list[TokenColumns]] = {}
    own: dict[str, int] = {}  # tokens of the student's own in the blocks that a teacher scored
    for block in scored_blocks(round_, teachers, at_most_tokens=TOKENS):
        responses.append(_responses(block))
        ratios.append(_log_ratio(block))
        for name in block.teachers:
            own[name] = own.get(name, 0) + int(block.trained.sum())
            if block.mask(name).any():
                columns.setdefault(name, []).append(_columns(block, name, round_.manifest.stop_token_ids))
    if not columns:
        return None
    pairs = {}
    for name, parts in columns.items():
        scored, tokens = round_.scores(name).manifest, TokenColumns.joined(parts)
        pairs[name] = PairScores(name, round_.manifest, scored, tokens, len(tokens.token) / own[name])
    n_scored = len(ScoredRound(round_, teachers).scored())
    return RoundSample(
        round_, len(responses), n_scored, ResponseColumns.joined(responses), np.concatenate(ratios), pairs
    )


def _responses(block: ScoredBlock) -> ResponseColumns:
    rollouts, student = block.rollouts, block.student
    assert student.sampling_logprobs is not None and student.entropy is not None
    starts, trained = rollouts.response_start, block.trained
    cut = rollouts.finish_reason == cs.FINISH_LENGTH
    loops = [bool(cut[row]) and ends_in_a_loop(rollouts.response(row)) for row in range(rollouts.n_rows)]
    return ResponseColumns(
        prompt=rollouts.prompt_index[rollouts.row_prompt],
        length=rollouts.response_length.astype(np.int64),
        finish=rollouts.finish_reason.astype(np.int64),
        loops=np.array(loops),
        response=np.array([hash(rollouts.response(row).tobytes()) for row in range(rollouts.n_rows)]),
        logprob=np.add.reduceat(trained * student.sampling_logprobs.astype(np.float64), starts),
        entropy=np.add.reduceat(trained * student.entropy.astype(np.float64), starts),
        surprise=np.add.reduceat(trained * (student.logprobs.astype(np.float64) + student.entropy), starts),
        spread=np.add.reduceat(trained * spread(student), starts),
    )


def spread(student: cs.ScoreBlock) -> Float64:
    """[T]: variance of log p(v) over v sampled from the student, with its rest as one token."""
    assert student.candidate_logprobs is not None and student.candidate_ids is not None
    assert student.rest_logprob is not None and student.entropy is not None
    logprobs = np.concatenate([student.candidate_logprobs, student.rest_logprob[:, None]], axis=1).astype(np.float64)
    counts = np.isfinite(logprobs)
    counts[:, :-1] &= first_occurrence(student.candidate_ids)
    logprobs = np.where(counts, logprobs, 0.0)
    squares = np.where(counts, np.exp(logprobs) * np.square(logprobs), 0.0).sum(axis=1)
    return np.asarray(np.maximum(squares - np.square(student.entropy.astype(np.float64)), 0.0))


def _log_ratio(block: ScoredBlock) -> npt.NDArray[np.float32]:
    assert block.student.sampling_logprobs is not None
    log_ratio: npt.NDArray[np.float32] = block.student.sampling_logprobs - block.rollouts.rollout_logprobs
    return np.asarray(log_ratio[block.trained & np.isfinite(log_ratio)])


def ends_in_a_loop(ids: npt.NDArray[Any]) -> bool:
    """Whether a response ends in repeats of the same few tokens."""
    for period in range(1, LOOP_PERIOD + 1):
        n = max(LOOP_TURNS * period, LOOP_TOKENS)
        if n > len(ids):
            return False
        if np.array_equal(ids[-n:-period], ids[-n + period :]):
            return True
    return False


def _columns(block: ScoredBlock, name: str, stop_token_ids: Sequence[int]) -> TokenColumns:
    rollouts, student, teacher = block.rollouts, block.student, block.teachers[name]
    counts, n = block.mask(name), rollouts.n_tokens
    assert student.candidate_ids is not None and student.candidate_logprobs is not None
    assert student.rest_logprob is not None and student.entropy is not None
    unknown = np.full(n, np.nan)
    shared, agrees, prefers, best = unknown, unknown, student.candidate_ids[:, 0], teacher.logprobs
    if teacher.candidate_logprobs is not None:
        assert teacher.rest_logprob is not None
        known = np.where(np.isnan(teacher.candidate_logprobs), -np.inf, teacher.candidate_logprobs)
        shared = 1 - np.exp(teacher.rest_logprob.astype(np.float64))
        theirs, own = known.argmax(axis=1), student.candidate_logprobs.argmax(axis=1)
        prefers, best = _at(student.candidate_ids, theirs), _at(known, theirs)
        if known.shape[1] > 1:
            agrees = (prefers == _at(student.candidate_ids, own)).astype(np.float64)
    if teacher.topk_ids is not None:
        assert teacher.topk_logprobs is not None
        likeliest = np.nan_to_num(teacher.topk_logprobs, nan=-np.inf)
        first = likeliest.argmax(axis=1)
        prefers = np.where(_at(likeliest, first) > best, _at(teacher.topk_ids, first), prefers)
        best = np.maximum(best, _at(likeliest, first))
    values = TokenColumns(
        token=rollouts.token_ids.astype(np.int64),
        position=rollouts.token_positions,
        length=np.repeat(rollouts.response_length, rollouts.response_length).astype(np.int64),
        stop=np.isin(rollouts.token_ids, stop_token_ids),
        reverse_kl=block.reverse_kl[name],
        student_logprob=student.logprobs.astype(np.float64),
        student_entropy=student.entropy.astype(np.float64),
        logprob=teacher.logprobs.astype(np.float64),
        entropy=unknown if teacher.entropy is None else teacher.entropy.astype(np.float64),
        shared=shared,
        student_shared=1 - np.exp(student.rest_logprob.astype(np.float64)),
        agrees=agrees,
        prefers=prefers.astype(np.int64),
        prefers_logprob=best.astype(np.float64),
        overlap=_overlap(student, teacher),
    )
    return TokenColumns(**{field.name: getattr(values, field.name)[counts] for field in fields(values)})


def _at(values_TK: npt.NDArray[Any], index_T: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.take_along_axis(values_TK, index_T[:, None], axis=1)[:, 0]


def _overlap(student: cs.ScoreBlock, teacher: cs.ScoreBlock) -> Float64:
    """[T]: of the student's k likeliest candidates, the fraction that is among the teacher's k likeliest."""
    assert student.candidate_ids is not None and student.candidate_logprobs is not None
    if teacher.topk_ids is None or teacher.topk_logprobs is None:
        return np.full(student.n_tokens, np.nan)
    k = min(student.candidate_ids.shape[1], teacher.topk_ids.shape[1])
    own = _likeliest(student.candidate_ids, student.candidate_logprobs, k)
    theirs = _likeliest(teacher.topk_ids, teacher.topk_logprobs, k)
    row = np.arange(len(own), dtype=np.int64)[:, None] << 32  # ids of different positions must not meet
    return np.asarray(np.isin(own + row, theirs + row).mean(axis=1))


def _likeliest(ids_TK: npt.NDArray[Any], logprobs_TK: npt.NDArray[Any], k: int) -> npt.NDArray[Any]:
    order = np.argsort(-np.nan_to_num(logprobs_TK, nan=-np.inf), axis=1, kind="stable")[:, :k]
    return np.take_along_axis(ids_TK, order, axis=1)
