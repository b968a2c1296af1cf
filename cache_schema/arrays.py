"""Every array of a cache: name, type, dimensions, fill value, unit and meaning.

Dimensions after `block` are slots: capacities fixed by the round, of which a block uses the first part.
"""

from __future__ import annotations

from dataclasses import dataclass

NAN = float("nan")

#: finish_reason codes
FINISH_STOP, FINISH_LENGTH, FINISH_OTHER = 0, 1, 2
FINISH_NAMES = {FINISH_STOP: "stop", FINISH_LENGTH: "length", FINISH_OTHER: "other"}


@dataclass(frozen=True)
class ArraySpec:
    """One array of a block group. `dims` excludes the leading `block`; `dtype` is numpy's code, little-endian."""

    name: str
    dtype: str
    dims: tuple[str, ...]
    fill: int | float
    unit: str
    meaning: str

    @property
    def dimension_names(self) -> tuple[str, ...]:
        return ("block", *self.dims)


ROLLOUT_ARRAYS = (
    ArraySpec("prompt_token_ids", "i4", ("prompt_token",), -1, "token id", "each prompt once, end to end"),
    ArraySpec("prompt_index", "i8", ("prompt",), -1, "index", "position of the prompt in the round's prompts"),
    ArraySpec("prompt_start", "i4", ("prompt",), -1, "token", "first token of the prompt in prompt_token_ids"),
    ArraySpec("prompt_length", "i4", ("prompt",), -1, "token", "number of prompt tokens"),
    ArraySpec("token_ids", "i4", ("token",), -1, "token id", "responses end to end, as sampled, EOS included"),
    ArraySpec(
        "rollout_logprobs", "f4", ("token",), NAN, "nat",
        "log-probability of the token under the distribution it was sampled from (after temperature and top-p); "
        "NaN: unknown (imported)",
    ),
    ArraySpec("trained", "u1", ("token",), 255, "flag", "1: the student's own token; 0: never part of a loss"),
    ArraySpec("row_prompt", "i4", ("row",), -1, "index", "prompt of the rollout, counted within the block"),
    ArraySpec("sample_index", "i4", ("row",), -1, "index", "number of the rollout among its prompt's"),
    ArraySpec("response_start", "i4", ("row",), -1, "token", "first token of the response in token_ids"),
    ArraySpec("response_length", "i4", ("row",), -1, "token", "number of response tokens"),
    ArraySpec("finish_reason", "u1", ("row",), 255, "code", "0 stop token, 1 length limit, 2 other"),
)  # fmt: skip

_LOGPROBS = ArraySpec("logprobs", "f4", ("token",), NAN, "nat", "log-probability of the token, temperature 1")
_ENTROPY = ArraySpec("entropy", "f4", ("token",), NAN, "nat", "entropy of the next-token distribution, temperature 1")
_CANDIDATE_LOGPROBS = ArraySpec(
    "candidate_logprobs", "f4", ("token", "candidate"), NAN, "nat",
    "log-probability of each of the student's candidates, temperature 1; NaN: missing, so part of the rest",
)  # fmt: skip
_REST = ArraySpec(
    "rest_logprob",
    "f4",
    ("token",),
    NAN,
    "nat",
    "log of the probability outside the candidates; -inf: none is left",
)

STUDENT_ARRAYS = (
    _LOGPROBS,
    ArraySpec(
        "sampling_logprobs", "f4", ("token",), NAN, "nat",
        "the same forward at the round's sampling temperature, without top-p",
    ),
    _ENTROPY,
    ArraySpec(
        "candidate_ids", "i4", ("token", "candidate"), -1, "token id",
        "the sampled token first, then the student's alternatives",
    ),
    _CANDIDATE_LOGPROBS,
    _REST,
)  # fmt: skip

TOPK_ARRAYS = (
    ArraySpec("topk_ids", "i4", ("token", "topk"), -1, "token id", "the teacher's own likeliest tokens"),
    ArraySpec("topk_logprobs", "f4", ("token", "topk"), NAN, "nat", "their log-probabilities, temperature 1"),
    ArraySpec(
        "topk_rest_logprob", "f4", ("token",), NAN, "nat",
        "log of the probability outside the candidates and the teacher's top-k together",
    ),
)  # fmt: skip


def teacher_arrays(*, entropy: bool = True, candidates: bool = True, topk: bool = False) -> tuple[ArraySpec, ...]:
    """The arrays of a teacher: log-probs of the sampled tokens, and what else it provides."""
    return (
        _LOGPROBS,
        *((_ENTROPY,) if entropy else ()),
        *((_CANDIDATE_LOGPROBS, _REST) if candidates else ()),
        *(TOPK_ARRAYS if topk else ()),
    )


#: First fields of a commit record; a `digest.<array>` of each array of the group follows, in table order. Those with
#: "digest" in their name are digests, of the size that the format version says.
COMMIT_FIELDS = (
    "rows",  # rollouts in the block; 0: the block is not committed
    "prompts",
    "tokens",  # response tokens
    "prompt_tokens",
    "digest",  # over the counts above and the array digests
    "rollouts_digest",  # scores: digest of the rollouts that were scored
    "candidates_digest",  # scores: digest of the student's candidate_ids
    "elapsed_us",  # time spent computing the block
    "committed_at_us",  # Unix time
)

#: Fields that differ between two otherwise identical runs.
TIME_FIELDS = ("elapsed_us", "committed_at_us")

INNER_CHUNK = 65_536
WIDE_INNER_CHUNK = 8_192  # tokens per inner chunk of arrays with a candidate or topk axis


def slot_size(elements: int) -> int:
    """Capacity of a slot for `elements`: rounded up to a multiple of the inner chunk."""
    for chunk in (WIDE_INNER_CHUNK, INNER_CHUNK):
        if elements <= chunk:
            unit = 1 if chunk == WIDE_INNER_CHUNK else WIDE_INNER_CHUNK
            return -(-elements // unit) * unit
    return -(-elements // INNER_CHUNK) * INNER_CHUNK


def inner_chunk(spec: ArraySpec, slot: int) -> int:
    """Elements of an inner chunk along the slot axis, at most the slot."""
    return min(slot, WIDE_INNER_CHUNK if len(spec.dims) > 1 else INNER_CHUNK)
