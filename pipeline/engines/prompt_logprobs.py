"""Scores from the prompt log-probs of an inference engine: those of some tokens at every position, never of all.

Engines return the log-prob (fp32, always at temperature 1) of the prompt's own token, of their N likeliest tokens
and, in vLLM's newer runner, of any requested ids. With p the next-token distribution, W the tokens returned at a
position and C the student's candidates, this gives a *partial* `ScoreBlock`:

    logprobs = log p(y_t),  candidate_logprobs = log p(v) if v in W, else NaN,
    rest_logprob = log( sum_{v in W, not in C} p(v) + max(1 - sum_{v in W} p(v), 0) ), at least log REST_FLOOR

and no entropy. A difference from 1 below about 1e-6 is rounding, hence the floor: no probability is 0 because it was
not returned. `topk_rest_logprob` is likewise that of the tokens outside C and the engine's own likeliest.

Shapes: T response tokens of a rollout, N tokens returned at a position, K candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

import cache_schema as cs
from cache_schema.blocks import LOGPROB_TOLERANCE
from pipeline.engines.scoring import TokenBatch, sequences
from pipeline.errors import ModelError
from pipeline.rounds.metrics import REST_FLOOR, first_occurrence

#: Likeliest tokens requested from an engine that does not support requests for given ids; vLLM's own limit.
LIKELIEST = 20
#: vLLM's server writes this for -inf, which JSON lacks.
_MINUS_INFINITY = -9999.0
_CHECKED_ROLLOUTS, _CHECKED_TOKENS = 4, 128
#: Largest mean and single difference, nats, between two correct scorings of the same tokens. Measured on the toy
#: teacher, vLLM against the forward pass here: 1e-7 and 4e-6 in fp32, 7e-4 and 0.07 in bf16 (0.05 and 0.5 on random
#: tokens). A different model differs by 0.1 and more.
_BOUNDS = {"float32": (1e-3, 0.05), "other": (0.1, 3.0)}

Float64 = npt.NDArray[np.float64]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ScoreRequest:
    """One rollout to be scored.

    Attributes:
        token_ids: i4, prompt and response.
        start: index of the first response token.
        candidate_ids: i4 [T, K], the sampled token first; None for the response alone.
    """

    token_ids: Int32
    start: int
    candidate_ids: Int32 | None

    @property
    def response(self) -> Int32:
        return self.token_ids[self.start :]

    @property
    def n_candidates(self) -> int:
        return 1 if self.candidate_ids is None else self.candidate_ids.shape[1]

    def given_ids(self, limit: int, vocab_size: int) -> Int32:
        """i4 [T, n]: up to `limit` tokens to request at each position, the response's first; -1 for ids that a
        vocabulary of this size lacks.
        """
        ids = self.response[:, None] if self.candidate_ids is None else self.candidate_ids[:, :limit]
        assert np.array_equal(ids[:, 0], self.response)
        return np.where(ids < vocab_size, ids, -1).astype(np.int32)


def score_requests(batch: TokenBatch, vocab_size: int, who: str) -> list[ScoreRequest]:
    """Every rollout of the batch, in order. Raises `ModelError` if a rollout holds ids that the model lacks."""
    requests = []
    offset = 0
    for rollouts in batch.blocks:
        for token_ids, start in zip(*sequences(rollouts, range(rollouts.n_rows)), strict=True):
            if len(token_ids) and int(token_ids.max()) >= vocab_size:
                raise ModelError(
                    f"{who}: its vocabulary has {vocab_size} ids, a rollout holds {int(token_ids.max())}; choose a "
                    "teacher with the student's tokenizer"
                )
            end = offset + len(token_ids) - start
            ids = None if batch.candidate_ids is None else batch.candidate_ids[offset:end]
            requests.append(ScoreRequest(token_ids, start, ids))
            offset = end
    return requests


@dataclass(frozen=True)
class EngineLogprobs:
    """Tokens that an engine returned at the response's positions, with their log-probs in nats.

    Attributes:
        ids: i8 [T, N]; -1 for no token. An id may occur twice.
        logprobs: f8 [T, N]; NaN if unknown.
    """

    ids: Int64
    logprobs: Float64

    @classmethod
    def of_given_ids(cls, ids: Int32, logprobs: npt.ArrayLike) -> EngineLogprobs:
        """Log-probs [T, N] of the requested ids."""
        returned = np.asarray(logprobs, np.float64)
        if returned.shape != ids.shape:
            raise ModelError(f"returned log-probs of shape {returned.shape}, asked for {ids.shape}")
        refuse_nan(returned[ids >= 0])
        return cls(ids.astype(np.int64), np.where(ids < 0, np.nan, returned))

    @classmethod
    def from_positions(
        cls,
        returned: Sequence[Mapping[str, Any] | None],
        request: ScoreRequest,
        *,
        vocab_size: int = 2**31,
        at_most: int = 2**16,
    ) -> EngineLogprobs:
        """From the JSON of `prompt_logprobs`: at each position of prompt and response, `{id: {"logprob": x}}`.

        Raises `ModelError` if its tokens are not those that were sent, if it has ids that a vocabulary of this size
        lacks, more than `at_most` tokens at a position, or a log-prob that is NaN.
        """
        if len(returned) != len(request.token_ids):
            raise ModelError(f"returned {len(returned)} positions, {len(request.token_ids)} tokens were sent")
        rows = [position or {} for position in returned[request.start :]]
        width = max(1, *map(len, rows))
        if width > at_most:
            raise ModelError(f"returned {width} tokens at a position, asked for {at_most} at most")
        ids = np.full((len(rows), width), -1, np.int64)
        logprobs = np.full((len(rows), width), np.nan)
        for row, position in enumerate(rows):
            if position and str(request.response[row]) not in position:
                raise misaligned(request.start + row, int(request.response[row]), ", ".join(list(position)[:3]))
            for column, (token, entry) in enumerate(position.items()):
                value = entry.get("logprob", "nothing") if isinstance(entry, Mapping) else "nothing"
                if not (token.isascii() and token.isdigit() and len(token) < 11 and int(token) < vocab_size):
                    raise ModelError(f"returned token {token[:40]!r}; its vocabulary has ids below {vocab_size}")
                ids[row, column] = int(token)
                if value is not None:
                    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
                        raise ModelError(
                            f"returned {value!r:.40} as the log-prob of token {token}; expected a number"
                        )
                    if value > LOGPROB_TOLERANCE:
                        raise ModelError(f"returned a log-prob of {min(value, 1e99):.3g}; log-probs are at most 0")
                    logprobs[row, column] = -np.inf if value <= _MINUS_INFINITY else value
        return cls(ids, logprobs)

    def joined_with(self, other: EngineLogprobs) -> EngineLogprobs:
        """The tokens of both, at each position."""
        return EngineLogprobs(np.hstack([self.ids, other.ids]), np.hstack([self.logprobs, other.logprobs]))


def refuse_nan(logprobs: npt.ArrayLike) -> None:
    """Raise `ModelError` if a log-prob is NaN, which means that the model's logits are not finite."""
    if np.isnan(np.asarray(logprobs, np.float64)).any():
        raise ModelError(
            "returned log-probs that are not numbers, since its logits are not finite; most likely its values "
            "overflow its dtype, or its weights are damaged: serve it in bfloat16 or float32, or download it again"
        )


def misaligned(position: int, sent: int, returned: object) -> ModelError:
    """The error for an engine that scored other tokens than it was sent."""
    return ModelError(
        f"returned other tokens than were sent: at position {position} token {sent} was sent, {returned} came back; "
        "something between here and the model rewrites prompts"
    )


def partial_scores(
    request: ScoreRequest, returned: EngineLogprobs, topk: int = 0, among: npt.NDArray[np.bool_] | None = None
) -> cs.ScoreBlock:
    """The returned log-probs as the scores of one rollout; see the module's docstring.

    Args:
        topk: also the engine's likeliest tokens; `returned` must hold as many at least.
        among: bool [V], the tokens that those are chosen from.

    Raises:
        ModelError: the values are no probabilities, or too few.
    """
    ids, known = returned.ids, first_occurrence(returned.ids) & (returned.ids >= 0) & ~np.isnan(returned.logprobs)
    if (returned.logprobs[known] > LOGPROB_TOLERANCE).any():
        raise ModelError(f"returned a log-prob of {returned.logprobs[known].max():.3g}; log-probs are at most 0")
    mass = np.exp(np.where(known, returned.logprobs, -np.inf))
    total = mass.sum(1)
    if (total > 1 + LOGPROB_TOLERANCE).any():
        raise ModelError(f"returned probabilities that add up to {total.max():.4g}; they are of no one distribution")

    table = _LogprobTable(ids, returned.logprobs, known)
    arrays: dict[str, npt.NDArray[Any]] = {"logprobs": table.at(request.response[:, None])[:, 0]}
    # A token of probability 0 has no log-prob to learn from, and nothing else is stored for its position.
    unscored = ~np.isfinite(arrays["logprobs"])
    left = np.maximum(1 - total, 0)
    outside = known.copy()
    if request.candidate_ids is not None:
        arrays["candidate_logprobs"] = table.at(request.candidate_ids)
        outside &= ~table.among(request.candidate_ids)
        arrays["rest_logprob"] = _log_rest(mass, outside, left)
    if topk:
        wanted = known if among is None else known & among[np.maximum(ids, 0)]
        order = np.argsort(np.where(wanted, -returned.logprobs, np.inf), axis=1, kind="stable")[:, :topk]
        enough = wanted.sum(1) >= topk
        if not (enough | unscored).all():
            raise ModelError(
                f"returned {wanted.sum(1)[~enough].min()} tokens at a position, expected {topk} likeliest"
            )
        likeliest = np.take_along_axis(ids, order, 1)
        arrays["topk_logprobs"] = np.take_along_axis(returned.logprobs, order, 1)
        arrays["topk_rest_logprob"] = _log_rest(mass, outside & ~table.among(likeliest), left)
        # ids must be valid, also at positions without scores
        arrays["topk_ids"] = np.where((unscored & ~enough)[:, None], np.arange(topk), likeliest).astype(np.int32)
    for name, value in arrays.items():
        if name != "topk_ids":
            value[unscored] = np.nan
            arrays[name] = value.astype(np.float32)
    return cs.ScoreBlock(**arrays)


class _LogprobTable:
    """Log-probs by position and id."""

    def __init__(self, ids: Int64, logprobs: Float64, known: npt.NDArray[np.bool_]):
        self._ids, self._known = ids, known
        keys = _keys(ids)[known]
        order = np.argsort(keys, kind="stable")
        self._keys, self._logprobs = keys[order], logprobs[known][order]

    def at(self, ids: npt.NDArray[Any]) -> Float64:
        """[T, M] log-probs of ids [T, M]; NaN if not returned."""
        keys = _keys(ids)
        if not len(self._keys):
            return np.full(keys.shape, np.nan)
        place = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return np.where(self._keys[place] == keys, self._logprobs[place], np.nan)

    def among(self, ids: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """[T, N]: which returned tokens are among the ids [T, M] of their position."""
        return self._known & np.isin(_keys(self._ids), _keys(ids))


def _keys(ids: npt.NDArray[Any]) -> Int64:
    """One number for each (position, id)."""
    return np.asarray(np.arange(len(ids), dtype=np.int64)[:, None] * 2**32 + ids)


def _log_rest(mass: Float64, counted: npt.NDArray[np.bool_], left: Float64) -> Float64:
    return np.asarray(np.log(np.maximum(np.where(counted, mass, 0).sum(1) + left, REST_FLOOR)))


def joined(parts: Sequence[cs.ScoreBlock]) -> cs.ScoreBlock:
    """The scores of rollouts, end to end."""
    names = [name for name, value in vars(parts[0]).items() if value is not None]
    return cs.ScoreBlock(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


# -- checks --------------------------------------------------------------------------------------------------


def sample_of(rollouts: cs.RolloutBlock, candidate_ids: Int32, vocab_size: int) -> TokenBatch:
    """A few rollouts of medium length, with shortened responses, to check a scorer on."""
    order = np.argsort(rollouts.response_length, kind="stable")
    middle = max(len(order) // 2 - _CHECKED_ROLLOUTS // 2, 0)
    prompts, rows, ids = [], [], []
    for number, row in enumerate(order[middle : middle + _CHECKED_ROLLOUTS].tolist()):
        tokens = rollouts.response_slice(row)
        tokens = slice(tokens.start, min(tokens.stop, tokens.start + _CHECKED_TOKENS))
        response = rollouts.token_ids[tokens]
        prompts.append((number, rollouts.prompt(row)))
        rows.append(cs.RolloutRow(number, 0, response, rollouts.rollout_logprobs[tokens], cs.FINISH_OTHER))
        given = candidate_ids[tokens]
        ids.append(np.where(given < vocab_size, given, response[:, None]))
    return TokenBatch((cs.RolloutBlock.from_rows(prompts, rows),), np.concatenate(ids))


def check_agreement(returned: cs.ScoreBlock, expected: cs.ScoreBlock, dtype: str) -> str:
    """The difference between two scorings of the same tokens, as text. Raises `ModelError` past a bound.

    Candidates count by their probability: the log-probs of unlikely ones differ between any two implementations.
    """
    apart = np.abs(returned.logprobs.astype(np.float64) - expected.logprobs)
    mean, largest = float(apart.mean()), float(apart.max())
    if expected.candidate_logprobs is not None and returned.candidate_logprobs is not None:
        both = np.isfinite(returned.candidate_logprobs) & np.isfinite(expected.candidate_logprobs)
        between = np.abs(
            np.where(both, returned.candidate_logprobs, 0) - np.where(both, expected.candidate_logprobs, 0)
        )
        mean = max(mean, float((np.exp(expected.candidate_logprobs) * between).sum(1).mean()))
    mean_bound, bound = _BOUNDS.get(dtype, _BOUNDS["other"])
    # a NaN is a difference too
    if not (mean <= mean_bound and largest <= bound):
        raise ModelError(
            f"differ by {mean:.2g} nats a token on average, {largest:.2g} at most, on {len(apart)} tokens; expected "
            f"{mean_bound:g} and {bound:g} at most"
        )
    return f"to {mean:.1g} nats a token on average, {largest:.1g} at most, on {len(apart)} tokens"
