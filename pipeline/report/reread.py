"""A trained student's reading of the rollouts that it learned from, as `redpen eval` leaves it in a run.

RUN/reread.safetensors: rollouts by their numbers in the round, tokens end to end, scores at the cache's candidates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

import cache_schema as cs
from pipeline.rounds.identity import cache_identity
from pipeline.runs.files import REREAD, DamagedRunError, check

#: What of the cache the reading depends on. A teacher that was scored again changes nothing in it.
_MADE_OF = ("rollouts digest", "student digest")
_PLACES, _SCORES = ("numbers", "start", "length"), ("logprobs", "entropy", "candidate_logprobs", "rest_logprob")


@dataclass(frozen=True)
class Reread:
    """Scores of a trained student by a rollout's number."""

    run: str
    _spans: Mapping[int, slice]
    _arrays: Mapping[str, npt.NDArray[Any]]

    @classmethod
    def load(cls, run: str, round_: cs.Round) -> Reread | str | None:
        """The run's, for this round; a sentence where it is of something else; None where there is none."""
        from safetensors import SafetensorError, safe_open

        path = Path(run) / REREAD
        if not path.is_file():
            return None
        try:
            check(run, REREAD)
            with safe_open(path, "numpy") as file:
                told = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in (*_PLACES, *_SCORES)}
            spans = _spans(arrays)
        except DamagedRunError as error:
            return f"the trained student's reading is left out: {error}"
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            return f"{path} cannot be read ({error}), so the trained student's reading is left out"
        if cs.STUDENT not in round_.scorer_names():
            return f"{path} is left out: the student's scores that it belongs to are not there"
        now = cache_identity(round_.cache.url, round_, [])
        if changed := [key for key in _MADE_OF if told.get(key) != now[key]]:
            return (
                f"{path} is left out: it is of another cache or round than the one shown ({', '.join(changed)}); "
                f"`redpen eval {run}` makes it again"
            )
        return cls(run, spans, arrays)

    def of(self, number: int, student: cs.ScoreBlock) -> cs.ScoreBlock | None:
        """The reading of a rollout, given the cached one; None where it was not read again."""
        span, shape = self._spans.get(number), None if student.candidate_ids is None else student.candidate_ids.shape
        if span is None or self._arrays["candidate_logprobs"][span].shape != shape:
            return None
        scores = {name: self._arrays[name][span] for name in _SCORES}
        return cs.ScoreBlock(candidate_ids=student.candidate_ids, **scores)


def _spans(arrays: Mapping[str, npt.NDArray[Any]]) -> dict[int, slice]:
    """Where each rollout's tokens are. Raises `ValueError` where the arrays do not fit together."""
    n_tokens = len(arrays["logprobs"])
    if any(arrays[name].shape[:1] != (n_tokens,) or arrays[name].dtype.kind != "f" for name in _SCORES):
        raise ValueError("its arrays do not fit together")
    found = {}
    for number, start, length in zip(*(arrays[name].tolist() for name in _PLACES), strict=True):
        if not 0 <= start <= start + length <= n_tokens:
            raise ValueError(f"rollout {number} is beyond its tokens")
        found[int(number)] = slice(start, start + length)
    return found
