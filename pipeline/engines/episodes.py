"""Rollouts of several turns: what a rollout holds so far, and its environment's replies.

A turn of the student ends with a stop token. Then the environment replies, and the token ids of its messages
(`pipeline.text.turns`), which are not the student's, stand between this turn and the next. The rollout ends with the
turn after which the environment has nothing to say, the last one of `rollouts.max_turns`, one that ends with a stop
token that no turn of the chat template ends with, or at `rollouts.max_response_tokens`, which counts all tokens. If a
reply does not fit there with a token to follow, it is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

import cache_schema as cs
from pipeline.config import Recipe
from pipeline.console import warn
from pipeline.engines.sampling import PromptBlock
from pipeline.errors import ConfigError, PromptError, RedpenError
from pipeline.models.resolve import ResolvedModel
from pipeline.text.environments import Environment, EnvironmentFailedError, Reply
from pipeline.text.turns import Conversation, TurnTemplate

#: Seconds between two looks at whether the sampling is to stop, while environments reply.
LOOK_EVERY = 0.5
# An environment that fails so often, and never does anything else, is not used further.
_NEVER_REPLIED = 8


@dataclass
class Rollout:
    """A rollout while it is sampled.

    Attributes:
        prompt, sample: its prompt, counted within the block, and its number among the prompt's.
        index: of the prompt in the round.
        prompt_ids: i4 [S]
        turn_start: where the student's latest turn starts.
        token_ids, logprobs, trained: of the response so far [T]; tokens of an environment have log-prob NaN.
        finish_reason: None while it goes on.
        failure: why it has no end: the environment failed.
    """

    prompt: int
    index: int
    sample: int
    prompt_ids: npt.NDArray[np.int32]
    token_ids: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    logprobs: npt.NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    trained: npt.NDArray[np.uint8] = field(default_factory=lambda: np.empty(0, np.uint8))
    n_turns: int = 0
    turn_start: int = 0
    finish_reason: int | None = None
    failure: str | None = None
    conversation: Conversation | None = None
    n_messages: list[int] = field(default_factory=list)  # after each turn of the student

    @property
    def context(self) -> npt.NDArray[np.int32]:
        """i4: what the student reads, prompt and response so far; at first the array of the prompt itself."""
        return np.concatenate([self.prompt_ids, self.token_ids]) if self.n_turns else self.prompt_ids

    def add_turn(
        self, token_ids: npt.NDArray[np.int32], logprobs: npt.NDArray[np.float32], finish_reason: int
    ) -> None:
        """Add a turn of the student, with which the rollout ends if nothing follows."""
        self.turn_start = len(self.token_ids)
        self._add(token_ids, logprobs, 1)
        self.n_turns, self.finish_reason = self.n_turns + 1, finish_reason

    def add_reply(self, token_ids: npt.NDArray[np.int32]) -> None:
        """Add what stands between the student's latest turn and its next one."""
        self._add(token_ids, np.full(len(token_ids), np.nan, np.float32), 0)
        self.finish_reason = None

    def row(self) -> cs.RolloutRow:
        assert self.finish_reason is not None
        return cs.RolloutRow(
            self.prompt, self.sample, self.token_ids, self.logprobs, self.finish_reason, self.trained
        )

    def _add(self, token_ids: npt.NDArray[np.int32], logprobs: npt.NDArray[np.float32], trained: int) -> None:
        self.token_ids = np.concatenate([self.token_ids, token_ids])
        self.logprobs = np.concatenate([self.logprobs, logprobs])
        self.trained = np.concatenate([self.trained, np.full(len(token_ids), trained, np.uint8)])


def rollouts_of(block: PromptBlock, per_prompt: int) -> list[Rollout]:
    """The rollouts of a block's prompts, to be sampled; those of a prompt follow one another."""
    return [
        Rollout(prompt, index, sample, ids)
        for prompt, (index, ids) in enumerate(block.prompts)
        for sample in range(per_prompt)
    ]


class Episodes:
    """Continues rollouts by the replies of their environment.

    Args:
        record: a prompt, with which it is checked that the chat template can write the replies.
        keep_failed: a rollout whose environment fails ends there, with finish_reason other; else it is left out.
        has_replied: whether it did so for an earlier part of the round.
        source_digest: of the environment's module, if it is known, and checked when it is first asked.

    Raises:
        ConfigError: the template cannot continue a chat, or the environment cannot be imported.
    """

    def __init__(
        self,
        recipe: Recipe,
        student: ResolvedModel,
        record: Mapping[str, Any],
        *,
        keep_failed: bool = False,
        has_replied: bool = False,
        source_digest: str | None = None,
    ):
        settings = recipe.rollouts
        assert settings.environment is not None
        if recipe.score.alignment == "spans":
            raise ConfigError(
                'rollouts.environment needs score.alignment = "tokens", got "spans": a teacher with another '
                "tokenizer does not know the student's chat template, which is a part of such responses"
            )
        self.keep_failed = keep_failed
        self._settings, self._failures, self._n_ended = settings, list[str](), 0
        self._has_replied, self._had_replied = False, has_replied  # now, and before
        self._n_in_a_row = 0  # failures since its last reply
        self._template = TurnTemplate(student.tokenizer, recipe.prompts, student.stop_token_ids(settings), record)
        seconds, n_workers = settings.environment_timeout, settings.environment_workers
        self._environment = Environment(settings.environment, seconds, n_workers, source_digest)
        try:
            self._digest = self._environment.source_digest
        except BaseException:
            self.close()
            raise

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the replies, as JSON for the round's provenance."""
        name, max_turns = self._settings.environment, self._settings.max_turns
        return {"name": name, "max_turns": max_turns, "source_digest": self._digest}

    def close(self) -> None:
        """End the environment's processes, until it is asked again."""
        self._environment.close()

    def ask(self, rollout: Rollout, row: Mapping[str, Any]) -> Future[Reply] | None:
        """Ask for the reply to a rollout's latest turn; None if the rollout has ended with it."""
        last = int(rollout.token_ids[-1])
        ended = rollout.finish_reason != cs.FINISH_STOP or last not in self._template.turn_ends
        if ended or rollout.n_turns == self._settings.max_turns:
            return None
        if rollout.conversation is None:
            rollout.conversation = self._template.begin(row)
        rollout.conversation.student(rollout.token_ids[rollout.turn_start :])
        rollout.n_messages.append(len(rollout.conversation.messages))
        return self._environment.submit(
            (rollout.index, rollout.sample), row, rollout.conversation.messages, rollout.n_messages
        )

    def add(self, rollout: Rollout, reply: Future[Reply], longest: int) -> bool:
        """Add a reply; whether the student has another turn.

        Args:
            longest: tokens that a response may have.

        Raises `ConfigError` if the environment's module has another digest.
        """
        assert rollout.conversation is not None
        try:
            messages = reply.result()
            self._has_replied, self._n_in_a_row = True, 0
            if not messages:
                return False
            token_ids = rollout.conversation.reply(messages)
        except (EnvironmentFailedError, PromptError) as error:
            self._failures.append(str(error))
            self._n_in_a_row += 1
            rollout.failure = str(error)
            rollout.finish_reason = cs.FINISH_OTHER
            return False
        if len(rollout.token_ids) + len(token_ids) >= longest:
            rollout.finish_reason = cs.FINISH_LENGTH
            return False
        rollout.add_reply(token_ids)
        return True

    def next_turns(
        self,
        rollouts: Sequence[Rollout],
        rows: Sequence[Mapping[str, Any]],
        longest: int,
        look: Callable[[], None],
    ) -> list[Rollout]:
        """The rollouts that go on after their latest turn, replies added.

        Args:
            rows: the records of the block's prompts.
            look: called now and then while environments reply; what it raises stops the waiting.
        """
        asked = [(rollout, self.ask(rollout, rows[rollout.prompt])) for rollout in rollouts]
        waiting = {reply for _, reply in asked if reply is not None}
        while waiting:
            look()
            waiting = wait(waiting, LOOK_EVERY).not_done
        return [rollout for rollout, reply in asked if reply is not None and self.add(rollout, reply, longest)]

    def kept(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """A block's rollouts without those that are left out.

        If none is left of a block of one prompt, while the environment replies to others, all are kept as they ended:
        a block cannot be empty, and the round could never be finished.

        Raises `RedpenError` if none is left of a larger block, or if the environment has never replied.
        """
        if self.keep_failed:
            return list(rollouts)
        kept = [rollout for rollout in rollouts if rollout.failure is None]
        if kept and (self._has_replied or self._n_in_a_row < _NEVER_REPLIED):
            return kept
        one_prompt = len({rollout.prompt for rollout in rollouts}) == 1
        is_down = self._n_in_a_row >= max(_NEVER_REPLIED, 2 * len(rollouts))
        if not kept and one_prompt and (self._has_replied or self._had_replied) and not is_down:
            self._n_ended += len(rollouts)
            return list(rollouts)
        failed = f"{self._n_in_a_row:,} rollouts that asked it" if kept else f"{len(rollouts):,} rollouts of a block"
        first = self._failures[0] if kept else rollouts[0].failure
        raise RedpenError(
            f'rollouts.environment = "{self._settings.environment}" failed in all of the {failed}, the first: '
            f"{first}; correct it, and run the same command again (a round with finished blocks goes on only with an "
            "unedited module)"
        )

    def report_failures(self, what: str = "rollouts") -> None:
        """Warn, in one line, of environments that failed since the last call.

        Args:
            what: the samples are called.
        """
        failures, n_ended = self._failures, self._n_ended
        self._failures, self._n_ended = [], 0
        if self.keep_failed:
            n_ended = len(failures)
        counts = [(len(failures) - n_ended, "are left out"), (n_ended, "ended there")]
        if failures:
            happened = " and ".join(f"{count:,} {what} {how}" for count, how in counts if count)
            warn(
                f'rollouts.environment = "{self._settings.environment}" failed, and {happened}, the first: '
                f"{failures[0]}"
            )
