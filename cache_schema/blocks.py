"""The data of one block as frozen dataclasses of numpy arrays, and their validation.

Shapes: P prompts, PT prompt tokens, R rollouts (rows), T response tokens, K candidates, M teacher top-k.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .arrays import FINISH_LENGTH, FINISH_OTHER, FINISH_STOP, ArraySpec
from .errors import CacheError
from .manifest import RoundManifest, ScoresManifest

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
UInt8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]

#: Log-probabilities may exceed 0 by this much from rounding.
LOGPROB_TOLERANCE = 1e-3


class InvalidBlockError(CacheError):
    """The values of `array` are invalid."""

    def __init__(self, array: str, problem: str):
        self.array, self.problem = array, problem
        super().__init__(f"array {array}: {problem}")


def _require(condition: bool | np.bool_, array: str, problem: str) -> None:
    if not condition:
        raise InvalidBlockError(array, problem)


@dataclass(frozen=True)
class RolloutRow:
    """One rollout, to build a `RolloutBlock` from. `prompt` counts within the block; `trained` defaults to ones."""

    prompt: int
    sample_index: int
    token_ids: npt.ArrayLike
    logprobs: npt.ArrayLike
    finish_reason: int
    trained: npt.ArrayLike | None = None


@dataclass(frozen=True)
class RolloutBlock:
    """All rollouts of a block's prompts, in order of (row_prompt, sample_index), their tokens concatenated."""

    prompt_token_ids: Int32  # [PT]
    prompt_index: Int64  # [P]
    prompt_start: Int32  # [P]
    prompt_length: Int32  # [P]
    token_ids: Int32  # [T]
    rollout_logprobs: Float32  # [T]
    trained: UInt8  # [T]
    row_prompt: Int32  # [R]
    sample_index: Int32  # [R]
    response_start: Int32  # [R]
    response_length: Int32  # [R]
    finish_reason: UInt8  # [R]

    @classmethod
    def from_rows(cls, prompts: Sequence[tuple[int, npt.ArrayLike]], rows: Sequence[RolloutRow]) -> RolloutBlock:
        """Build a block from `(prompt index in the round, prompt token ids)` and its rollouts, in any order."""
        rows = sorted(rows, key=lambda row: (row.prompt, row.sample_index))
        prompt_ids = [np.asarray(ids, np.int32) for _, ids in prompts]
        token_ids = [np.asarray(row.token_ids, np.int32) for row in rows]
        prompt_length = np.array([len(ids) for ids in prompt_ids], np.int32)
        response_length = np.array([len(ids) for ids in token_ids], np.int32)
        return cls(
            prompt_token_ids=_join(prompt_ids, np.int32),
            prompt_index=np.array([index for index, _ in prompts], np.int64),
            prompt_start=_starts(prompt_length),
            prompt_length=prompt_length,
            token_ids=_join(token_ids, np.int32),
            rollout_logprobs=_join([np.asarray(row.logprobs, np.float32) for row in rows], np.float32),
            trained=_join(
                [
                    np.ones(len(ids), np.uint8) if row.trained is None else np.asarray(row.trained, np.uint8)
                    for row, ids in zip(rows, token_ids, strict=True)
                ],
                np.uint8,
            ),
            row_prompt=np.array([row.prompt for row in rows], np.int32),
            sample_index=np.array([row.sample_index for row in rows], np.int32),
            response_start=_starts(response_length),
            response_length=response_length,
            finish_reason=np.array([row.finish_reason for row in rows], np.uint8),
        )

    @property
    def n_rows(self) -> int:
        return len(self.row_prompt)

    @property
    def n_prompts(self) -> int:
        return len(self.prompt_index)

    @property
    def n_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def rollout_length(self) -> Int32:
        """i4 [R]: tokens of each rollout, its prompt included."""
        return self.prompt_length[self.row_prompt] + self.response_length

    def prompt(self, row: int) -> Int32:
        """Prompt token ids of rollout `row`."""
        return self.prompt_ids(int(self.row_prompt[row]))

    def prompt_ids(self, prompt: int) -> Int32:
        """Token ids of prompt `prompt`, counted within the block."""
        start = int(self.prompt_start[prompt])
        return self.prompt_token_ids[start : start + int(self.prompt_length[prompt])]

    @property
    def token_positions(self) -> npt.NDArray[np.int64]:
        """i8 [T]: position of every token in its response, from 0."""
        return np.arange(self.n_tokens) - np.repeat(self.response_start, self.response_length)

    @property
    def token_prompts(self) -> Int32:
        """i4 [T]: prompt of every token, counted in the round."""
        return np.repeat(self.prompt_index[self.row_prompt], self.response_length)

    def response_slice(self, row: int) -> slice:
        """Slice of rollout `row` in every [T] array of this block and of its scores."""
        start = int(self.response_start[row])
        return slice(start, start + int(self.response_length[row]))

    def response(self, row: int) -> Int32:
        """Response token ids of rollout `row`."""
        return self.token_ids[self.response_slice(row)]

    def counts(self) -> dict[str, int]:
        return {
            "rows": self.n_rows,
            "prompts": self.n_prompts,
            "tokens": self.n_tokens,
            "prompt_tokens": len(self.prompt_token_ids),
        }

    def validate(self, manifest: RoundManifest, block: int) -> None:
        """Raise `InvalidBlockError` naming the first array with invalid values."""
        _check_shapes(self, manifest.arrays(), self.counts(), {})
        expected = np.array(manifest.block_prompts(block), np.int64)
        _require(self.n_rows > 0, "row_prompt", "a block must hold at least one rollout")
        _require(
            np.array_equal(self.prompt_index, expected),
            "prompt_index",
            f"block {block} must hold the prompts {expected[0]} to {expected[-1]} in order",
        )
        _check_spans(
            self.prompt_start, self.prompt_length, len(self.prompt_token_ids), "prompt_start", "prompt_length"
        )
        _require((self.prompt_length > 0).all(), "prompt_length", "a prompt must have at least one token")
        _check_limit(self.prompt_length, manifest.max_prompt_tokens, "prompt_length", "max_prompt_tokens")
        _check_spans(self.response_start, self.response_length, self.n_tokens, "response_start", "response_length")
        _require((self.response_length > 0).all(), "response_length", "a response must have at least one token")
        _check_limit(self.response_length, manifest.max_response_tokens, "response_length", "max_response_tokens")
        _check_ids(self.prompt_token_ids, max(manifest.vocab_size, manifest.tokenizer.vocab_size), "prompt_token_ids")
        _check_ids(self.token_ids, manifest.vocab_size, "token_ids")
        _require(
            not (self.rollout_logprobs > LOGPROB_TOLERANCE).any() and not np.isinf(self.rollout_logprobs).any(),
            "rollout_logprobs",
            "must be at most 0 and finite (NaN: unknown)",
        )
        _require((self.trained <= 1).all(), "trained", "must be 0 or 1")
        _require(
            ((self.row_prompt >= 0) & (self.row_prompt < self.n_prompts)).all(),
            "row_prompt",
            f"must be in 0..{self.n_prompts - 1}",
        )
        _require(
            ((self.sample_index >= 0) & (self.sample_index < manifest.rollouts_per_prompt)).all(),
            "sample_index",
            f"must be in 0..{manifest.rollouts_per_prompt - 1}",
        )
        order = self.row_prompt.astype(np.int64) * manifest.rollouts_per_prompt + self.sample_index
        _require(
            (np.diff(order) > 0).all(),
            "sample_index",
            "rows must be in order of prompt and sample, none twice",
        )
        _require(
            np.isin(self.finish_reason, (FINISH_STOP, FINISH_LENGTH, FINISH_OTHER)).all(),
            "finish_reason",
            "must be 0 (stop), 1 (length) or 2 (other)",
        )
        last = self.token_ids[self.response_start + self.response_length - 1]
        stopped = self.finish_reason == FINISH_STOP
        _require(
            np.isin(last[stopped], manifest.stop_token_ids).all(),
            "finish_reason",
            "a rollout that finished by stop must end with one of the stop token ids",
        )


@dataclass(frozen=True)
class ScoreBlock:
    """One model's scores of a block's response tokens. Arrays that its group does not have are None.

    In partial scores NaN means "missing": a token without a log-prob has no other score either, and a candidate
    without one is part of the rest.
    """

    logprobs: Float32  # [T] nats
    entropy: Float32 | None = None  # [T] nats
    candidate_logprobs: Float32 | None = None  # [T, K]
    rest_logprob: Float32 | None = None  # [T]; -inf if the candidates are the whole vocabulary
    candidate_ids: Int32 | None = None  # [T, K], student only
    sampling_logprobs: Float32 | None = None  # [T], student only
    topk_ids: Int32 | None = None  # [T, M], teacher only
    topk_logprobs: Float32 | None = None  # [T, M]
    topk_rest_logprob: Float32 | None = None  # [T]

    @property
    def n_tokens(self) -> int:
        return len(self.logprobs)

    def validate(self, manifest: ScoresManifest, rollouts: RolloutBlock) -> None:
        """Raise `InvalidBlockError` naming the first array with values that are invalid as scores of `rollouts`."""
        specs = manifest.arrays()
        for field in dataclasses.fields(self):
            belongs = any(spec.name == field.name for spec in specs)
            _require(
                belongs == (getattr(self, field.name) is not None),
                field.name,
                "is missing" if belongs else f"does not belong to the scores of a {manifest.role}",
            )
        sizes = {"candidate": manifest.candidates, "topk": manifest.topk}
        _check_shapes(self, specs, {"tokens": rollouts.n_tokens}, sizes)
        scored = np.isfinite(self.logprobs) if manifest.partial else np.ones(self.n_tokens, bool)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None or value.dtype != np.float32:
                continue
            if manifest.partial:
                _require(np.isnan(value[~scored]).all(), field.name, "must be NaN for tokens without a log-prob")
                value = value[scored]
            if field.name == "entropy":
                at_least_0 = np.isfinite(value) & (value >= -LOGPROB_TOLERANCE)
                _require(at_least_0.all(), field.name, "must be finite and at least 0")
            else:
                if manifest.partial and field.name == "candidate_logprobs":
                    value = value[~np.isnan(value)]
                _check_logprobs(value, field.name, lowest_finite=field.name in ("logprobs", "sampling_logprobs"))
        if manifest.candidate_kind == "topk" and self.candidate_logprobs is not None:
            assert self.rest_logprob is not None
            of_candidates = np.exp(self.candidate_logprobs[scored].astype(np.float64))
            total = np.nansum(of_candidates, -1) + np.exp(self.rest_logprob[scored].astype(np.float64))
            _require(
                (np.abs(total - 1) < 1e-2).all(),
                "rest_logprob",
                "the candidates and the rest must add up to probability 1",
            )
        if self.candidate_ids is not None:
            _check_ids(self.candidate_ids, manifest.vocab_size, "candidate_ids")
            _require(
                np.array_equal(self.candidate_ids[:, 0], rollouts.token_ids),
                "candidate_ids",
                "the first candidate must be the sampled token",
            )
            if manifest.candidate_kind == "topk":
                _check_no_repeats(self.candidate_ids, "candidate_ids")
        if self.topk_ids is not None:
            _check_ids(self.topk_ids, manifest.vocab_size, "topk_ids")
            _check_no_repeats(self.topk_ids, "topk_ids")


def _join(parts: list[npt.NDArray[Any]], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.empty(0, dtype)


def _starts(lengths: Int32) -> Int32:
    return (np.cumsum(lengths, dtype=np.int64) - lengths).astype(np.int32)


_COUNT_OF_DIM = {"prompt_token": "prompt_tokens", "prompt": "prompts", "row": "rows", "token": "tokens"}


def used_shape(spec: ArraySpec, counts: dict[str, int], sizes: dict[str, int]) -> tuple[int, ...]:
    """Shape of the used part of `spec` in a block with these counts; `sizes` has the candidate and topk axes."""
    return tuple(counts[_COUNT_OF_DIM[dim]] if dim in _COUNT_OF_DIM else sizes[dim] for dim in spec.dims)


def _check_shapes(
    record: RolloutBlock | ScoreBlock,
    specs: tuple[ArraySpec, ...],
    counts: dict[str, int],
    sizes: dict[str, int],
) -> None:
    for spec in specs:
        value, shape = getattr(record, spec.name), used_shape(spec, counts, sizes)
        _require(
            isinstance(value, np.ndarray) and value.dtype == np.dtype(spec.dtype) and value.shape == shape,
            spec.name,
            f"must be a {np.dtype(spec.dtype)} array of shape {shape}, got "
            + (f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__),
        )


def _check_spans(start: Int32, length: Int32, total: int, start_name: str, length_name: str) -> None:
    _require((length >= 0).all() and int(length.sum()) == total, length_name, f"must add up to {total} tokens")
    _require(np.array_equal(start, _starts(length)), start_name, "spans must lie end to end")


def _check_limit(length: Int32, limit: int, name: str, setting: str) -> None:
    _require((length <= limit).all(), name, f"{int(length.max(initial=0))} exceeds {setting} = {limit}")


def _check_ids(ids: Int32, vocab_size: int, name: str) -> None:
    _require(((ids >= 0) & (ids < vocab_size)).all(), name, f"token ids must be in 0..{vocab_size - 1}")


def _check_no_repeats(ids: Int32, name: str) -> None:
    _require((np.diff(np.sort(ids, axis=-1), axis=-1) > 0).all(), name, "no token may appear twice at a position")


def _check_logprobs(value: Float32, name: str, *, lowest_finite: bool) -> None:
    bad = np.isnan(value) | (value > LOGPROB_TOLERANCE)
    if lowest_finite:
        bad |= np.isneginf(value)
    _require(not bad.any(), name, f"log-probabilities must be {'finite and ' if lowest_finite else ''}at most 0")
