"""Turns: the token ids that the chat template writes between the end of the student's turn and the start of its next.

The student's ids stay as they were sampled, its stop token included, and are never tokenized again. What follows them
is a part of the chat with a placeholder for each of the student's turns, rendered once more with the new messages:

    <|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n                   what the student read
    <|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\nPLACEHOLDER<|im_end|>\n<|im_start|>tool\n4...
                                                                               ^ from here on: what follows

It is used only if the second text continues the first with the student's turn, and if its token ids do, up to the
stop token. So the student reads what the template writes for the whole chat, with its own turns as it wrote them. Its
reasoning stays too, unless the template begins turns with it and leaves it out of earlier ones: that is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.config import PromptsConfig
from pipeline.config.messages import show_value
from pipeline.errors import ConfigError, PromptError
from pipeline.text.rendering import chat_as_text, chat_ids, chat_of, uses_chat
from pipeline.text.template_effect import with_system

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]

_ANSWER, _REASONING = "redpen", "reasons"
# What stands for the student's turn: an answer, or one after reasoning if the template begins the turn with it.
_PLACEHOLDERS: tuple[Message, ...] = (
    {"role": "assistant", "content": _ANSWER},
    {"role": "assistant", "content": _ANSWER, "reasoning_content": _REASONING},
    {"role": "assistant", "content": f"<think>\n{_REASONING}\n</think>\n\n{_ANSWER}"},
)
_BEGINS_WITH_REASONING = re.compile(rf"\s*(<think>\s*)?{_REASONING}")
# What the template must be able to write after the student's turn, twice: messages of one of these roles.
_PROBED_ROLES = ("tool", "user")


class TurnError(PromptError):
    """The chat template cannot continue a chat after the student's turn."""


class TurnTemplate:
    """What the chat template writes after the student's turns.

    Args:
        stop_token_ids: of the student.
        record: a prompt, with which it is checked that the template can continue a chat.

    Attributes:
        turn_ends: the stop tokens that the template writes after a turn. After another one nothing follows.

    Raises:
        ConfigError: it cannot.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        cfg: PromptsConfig,
        stop_token_ids: Sequence[int],
        record: Mapping[str, Any],
    ):
        self.tokenizer, self._system = tokenizer, cfg.system
        self._cfg = cfg.model_copy(update={"system": None})  # `messages` have it, which the environment reads too
        if not uses_chat(tokenizer, cfg):
            raise ConfigError(
                "rollouts.environment needs a chat template, which writes its messages, and the student's tokenizer "
                "has none; use an instruct model"
            )
        faults = [self._fault(record, token) for token in stop_token_ids]
        self.turn_ends = frozenset(
            token for token, fault in zip(stop_token_ids, faults, strict=True) if fault is None
        )
        if not self.turn_ends:
            raise ConfigError(
                f"rollouts.environment: after the student's turn {faults[0]}; use a chat template that only adds "
                "to a chat, and one of its ends of a turn in rollouts.stop_token_ids"
            )

    def begin(self, record: Mapping[str, Any]) -> Conversation:
        """The chat of a prompt. Raises `PromptError` if the template refuses it."""
        return Conversation(self, record)

    def text(self, messages: Sequence[Message], tools: Any) -> str:
        """The chat as the template writes it, ready for the student's turn. Raises `PromptError`."""
        return chat_as_text(messages, self.tokenizer, self._cfg, tools=tools, reply_follows=True)

    def messages(self, record: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The messages of a prompt, the recipe's system message included."""
        return with_system(chat_of(dict(record)), self._system)

    def _fault(self, record: Mapping[str, Any], stop_token: int) -> str | None:
        """Why no chat can go on after this token; None if it can."""
        problem = ""
        for role in _PROBED_ROLES:
            conversation = self.begin(record)
            try:
                for _ in range(2):
                    conversation.student([stop_token])
                    conversation.reply([{"role": role, "content": "4"}])
                return None
            except PromptError as error:
                problem = str(error)
        return problem


class Conversation:
    """A chat between the student and an environment.

    Attributes:
        messages: so far, the student's turns as text.
    """

    def __init__(self, template: TurnTemplate, record: Mapping[str, Any]):
        self._template, self._tools = template, record.get("tools")
        self.messages: list[dict[str, Any]] = template.messages(record)
        self._shown: list[Message] = list(self.messages)  # the student's turns as placeholders
        self._text = template.text(self._shown, self._tools)
        self._stop_token = -1

    def student(self, token_ids: Sequence[int] | npt.NDArray[np.int32]) -> None:
        """Add the student's turn: its ids as sampled, of which the last is a stop token."""
        ids = [int(token) for token in token_ids]
        text: str = self._template.tokenizer.decode(ids[:-1], skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": text})
        self._stop_token = ids[-1]

    def reply(self, messages: Sequence[Message]) -> npt.NDArray[np.int32]:
        """Add the environment's messages after the student's turn.

        Returns the token ids i4 [N] between the turn's stop token and the student's next turn.

        Raises:
            PromptError: the template refuses the messages; `TurnError`: it leaves them out, or does not continue what
                it wrote before.
        """
        problem: PromptError | None = None
        for placeholder in _PLACEHOLDERS:
            shown = [*self._shown, placeholder, *messages]
            try:
                text = self._template.text(shown, self._tools)
                ids = self._following(text)
                break
            except PromptError as error:
                problem = problem or error
        else:
            assert problem is not None
            raise problem
        for message in messages:
            self._check_read(text, shown, message)
        self.messages += [dict(message) for message in messages]
        self._shown, self._text = shown, text
        return np.asarray(ids, np.int32)

    def _following(self, text: str) -> list[int]:
        """The ids after the placeholder's stop token in the text of the whole chat."""
        template, read = self._template, self._text
        if not text.startswith(read):
            same = next(n for n, (a, b) in enumerate(zip(read, text + "\0", strict=False)) if a != b)
            raise TurnError(
                f"the chat template writes what came before in another way: expected {_quote(read[same:])}, "
                f"got {_quote(text[same:])}"
            )
        before, found, after = text[len(read) :].partition(_ANSWER)
        if not found or (before.strip() and not _BEGINS_WITH_REASONING.match(before)):
            raise TurnError(
                f"the chat template begins it with {_quote(before or text[len(read) :])}, which the student was not "
                "given"
            )
        stop = self._template.tokenizer.decode([self._stop_token], skip_special_tokens=False)
        if not stop:
            raise TurnError(f"the stop token {self._stop_token} has no text, so the chat template does not write it")
        spaces, found, following = after.partition(stop)
        if not found or spaces.strip():
            raise TurnError(f"the chat template writes {_quote(after)}, expected the stop token {show_value(stop)}")
        tokenizer = template.tokenizer
        ids, until_stop = chat_ids(text, tokenizer), chat_ids(text[: len(text) - len(following)], tokenizer)
        if ids[: len(until_stop)] != until_stop or until_stop[-1] != self._stop_token:
            raise TurnError(f"text that follows the stop token {show_value(stop)} changes the token ids before it")
        return ids[len(until_stop) :]

    def _check_read(self, text: str, shown: Sequence[Message], message: Message) -> None:
        """Raise `TurnError` if the template does not write a message."""
        other = [{**m, "content": m["content"] + _ANSWER} if m is message else m for m in shown]
        try:
            is_read = self._template.text(other, self._tools) != text
        except PromptError:  # so it is looked at
            return
        if not is_read:
            raise TurnError(f"the chat template leaves out messages of the role {show_value(message['role'])}")


def _quote(text: str) -> str:
    return show_value(text if len(text) <= 60 else text[:57] + "...")
