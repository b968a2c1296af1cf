"""Finished conversations in a file of rollouts: rows of messages with assistant turns, without a response's ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.config import Recipe
from pipeline.errors import PromptError, RedpenError
from pipeline.interchange.rows import FileRow
from pipeline.interchange.verifiers_traces import SampledTurns
from pipeline.text.assistant_turns import ConversationTokens, Turns, render_conversation
from pipeline.text.records import check_conversation, content_text
from pipeline.text.rendering import TooLongError, render_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


#: What to do if messages of a trace are not enough.
RECORD_IDS = "sample with `vf-eval --client.type train`, which records the ids"


@dataclass(frozen=True)
class FinishedChat:
    """A conversation of a file.

    Attributes:
        place: for messages.
        record: of its prompt, the messages before the first assistant turn.
        messages: all of them, up to the last assistant turn.
        is_longer: whether the file has more messages after that.
        sampled: of a trace, which messages the assistant wrote, and the tokens that the server counted.
    """

    place: str
    record: dict[str, Any]
    messages: list[dict[str, Any]]
    is_longer: bool
    sampled: SampledTurns | None = None

    def tokens(
        self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], turns: Turns | None = None
    ) -> ConversationTokens:
        """The conversation in token ids, with the assistant's turns.

        Args:
            turns: where they are, if an earlier call has found them: to find them, each is tokenized twice.

        Raises:
            RedpenError: the chat template does not show which tokens they are.
        """
        try:
            if turns is not None:
                ids = render_chat(self.messages, tokenizer, recipe.prompts, tools=self.record.get("tools"))
                return ConversationTokens(np.asarray(ids, np.int32), turns, ())
            found = self._render(recipe, tokenizer, stop_ids)
        except TooLongError as error:
            raise RedpenError(
                f"{self.place}: messages: {error}; remove the row, or set rollouts.max_response_tokens higher"
            ) from None
        except PromptError as error:
            raise RedpenError(f"{self.place}: {error}") from None
        if found.faults:
            remedy = "give response_tokens and loss_mask" if self.sampled is None else RECORD_IDS
            raise RedpenError(
                f"{self.place}: {found.faults[0]}; so the tokens that the assistant wrote are not known: {remedy}"
            )
        self._check_prompts(found.turns)
        return found

    def is_rewritten(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> bool:
        """Whether the turns of a trace can be imported one by one only: the chat template changes earlier ones."""
        if self.sampled is None or len(self.sampled.counts) < 2:
            return False
        try:
            return bool(self._render(recipe, tokenizer, stop_ids).faults)
        except (PromptError, TooLongError):  # `tokens` will raise it, with the place
            return False

    def n_retokenized(self, turns: Turns) -> int:
        """How many turns have another number of tokens than the server counted."""
        counts = () if self.sampled is None else self.sampled.counts.values()
        return sum(
            count is not None and count[1] != end - start for count, (start, end) in zip(counts, turns, strict=False)
        )

    def _render(
        self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]
    ) -> ConversationTokens:
        limits = recipe.rollouts
        return render_conversation(
            self.messages,
            tokenizer,
            recipe.prompts,
            stop_ids,
            tools=self.record.get("tools"),
            at_most=limits.max_prompt_tokens + limits.max_response_tokens,
            written=None if self.sampled is None else self.sampled.counts,
        )

    def _check_prompts(self, turns: Turns) -> None:
        """What precedes each turn has as many tokens as the server counted."""
        counts = {} if self.sampled is None else self.sampled.counts
        for (number, count), (start, _) in zip(counts.items(), turns, strict=False):
            if count is not None and count[0] != start:
                raise RedpenError(
                    f"{self.place}: messages[{number}]: expected {count[0]} tokens before it, as the server counted, "
                    f"got {start} by the chat template of the recipe, so the student read another text; set "
                    f"student.model and [prompts] to what was served, or {RECORD_IDS}"
                )


def finished_chat(row: FileRow, columns: Sequence[str] = ()) -> FinishedChat | None:
    """The row's conversation; None if it has ids of a response, or no messages by an assistant.

    Raises `RedpenError`, naming the row.
    """
    if row.get("response_tokens")[1] is not None:
        return None
    written = () if row.sampled is None else row.sampled.counts
    checked = check_conversation(row.values, row.place, columns, min(written, default=None))
    if checked is None:
        return None
    for name in ("prompt_tokens", "rollout_logprobs", "teacher_logprobs", "trained"):
        called, value = row.get(name)
        if value is not None:
            raise row.fault(called, "response_tokens beside it", "none", "give both, or neither")
    called, reason = row.get("finish_reason")
    if reason == "length":  # the template would end a turn that the assistant did not end
        raise row.fault(called, "a conversation that ended", reason, "remove the row, or give response_tokens")
    record, messages = checked
    last = max(written or (number for number, message in enumerate(messages) if message["role"] == "assistant"))
    return FinishedChat(row.place, record, messages[: last + 1], last + 1 < len(messages), row.sampled)


def turn_rows(row: FileRow) -> list[FileRow]:
    """A row of a trace for each turn that the model wrote, with all before it as the prompt; none for an empty turn.

    The last alone has the task's answer.
    """
    assert row.sampled is not None
    rows, counts = [], row.sampled.counts
    for number, count in counts.items():
        messages = row.values["messages"][: number + 1]
        if not ("tool_calls" in messages[-1] or content_text(messages[-1]).strip()):
            continue
        values = {name: value for name, value in row.values.items() if name != "answer" or number == max(counts)}
        sampled = SampledTurns({number: count}, row.sampled.settings)
        rows.append(FileRow(row.place, values | {"messages": messages}, sampled))
    return rows
