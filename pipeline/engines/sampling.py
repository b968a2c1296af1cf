"""Stage one, sampling: inputs and outputs of a sampler. The stage itself is `pipeline.rollouts.stage`.

A sampler has one method. It may return blocks in any order, each as soon as its last rollout has ended:

    sample(blocks: Iterable[PromptBlock]) -> Iterator[tuple[int, RolloutBlock, float]]    # block, rollouts, seconds
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

import cache_schema as cs
from pipeline.console import Bar, speed
from pipeline.errors import ConfigError


class DecodingProgress:
    """Shows the progress of sampling on a bar of rollouts.

    Responses that reach the length limit end together, so rollouts that ended do not say how much is done; decoded
    tokens do if all responses have full length. The time left is by whichever of both is further.

    Args:
        n_rollouts: that will be sampled, of at most `longest` tokens each.
    """

    def __init__(self, bar: Bar, n_rollouts: int, longest: int):
        self._bar, self._n_rollouts, self._most = bar, n_rollouts, n_rollouts * longest
        self._ended = self._tokens = 0

    def __call__(self, ended: int, tokens: int) -> None:
        """Count rollouts that ended and tokens that were decoded."""
        self._ended, self._tokens = self._ended + ended, self._tokens + tokens
        fraction = max(self._ended / self._n_rollouts, self._tokens / self._most)
        note = speed(self._tokens / self._bar.seconds, "tokens")
        self._bar.advance(ended, note=note, fraction=min(fraction, 1.0))


@dataclass(frozen=True)
class PromptBlock:
    """The prompts of one block: `(index in the round, token ids)` each, and for an environment their records."""

    block: int
    prompts: list[tuple[int, npt.NDArray[np.int32]]]
    records: Sequence[Mapping[str, Any]] = ()

    def part(self, numbers: Sequence[int]) -> PromptBlock:
        """Some of the prompts, counted within the block."""
        records = [self.records[number] for number in numbers] if self.records else ()
        return PromptBlock(self.block, [self.prompts[number] for number in numbers], records)


@dataclass(frozen=True)
class Sampling:
    """What determines a rollout, in addition to the student and the prompt.

    Attributes:
        temperature: 0 is greedy: the likeliest token, sampled with probability 1.
        top_p: the smallest set of likeliest tokens that holds this much probability, renormalised.
        stop_token_ids: a response ends with the first of these, which is kept.
        max_response_tokens: a response is truncated there (finish_reason length).
        seed, round_index: with the prompt's index and the sample's number, they determine a rollout's random numbers.
    """

    temperature: float
    top_p: float
    stop_token_ids: tuple[int, ...]
    rollouts_per_prompt: int
    max_response_tokens: int
    seed: int
    round_index: int = 0

    @classmethod
    def of(cls, manifest: cs.RoundManifest, round_index: int) -> Sampling:
        return cls(
            temperature=manifest.temperature,
            top_p=manifest.top_p,
            stop_token_ids=manifest.stop_token_ids,
            rollouts_per_prompt=manifest.rollouts_per_prompt,
            max_response_tokens=manifest.max_response_tokens,
            seed=manifest.seed,
            round_index=round_index,
        )

    def key(self, prompt_index: int, sample_index: int, turn: int = 0) -> int:
        """128 bits that name one rollout, or a later turn of it."""
        name = f"{self.seed}/{self.round_index}/{prompt_index}/{sample_index}" + (f"/{turn}" if turn else "")
        return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16).digest(), "little")

    def uniforms(self, prompt_index: int, sample_index: int) -> npt.NDArray[np.float64]:
        """A number in [0, 1) for every position of one rollout: 53 bits of each raw draw of Philox, keyed by `key`, a
        stream that numpy guarantees.
        """
        raw = np.random.Philox(key=self.key(prompt_index, sample_index)).random_raw(self.max_response_tokens)
        return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53


class Sampler(Protocol):
    """Samples every rollout of blocks of prompts."""

    def sample(self, blocks: Iterable[PromptBlock]) -> Iterator[tuple[int, cs.RolloutBlock, float]]: ...


def require_room(
    prompts: Sequence[npt.NDArray[np.int32]],
    max_response_tokens: int,
    context: int | None,
    setting: str,
    whose: str = "the student's",
) -> None:
    """Raise `ConfigError` naming `setting` if the longest prompt with the longest response does not fit a context.

    Beyond it a model with rotary positions writes nonsense, and one with learned positions fails.

    Args:
        context: tokens, of a model that samples or scores; None if its config does not specify it.
    """
    longest = max(map(len, prompts), default=0)
    if context is not None and longest + max_response_tokens > context:
        raise ConfigError(
            f"{setting}: expected at most {context - longest} ({whose} context of {context} tokens less the longest "
            f"prompt's {longest}), got {max_response_tokens}"
        )
