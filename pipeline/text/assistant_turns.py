"""Finished conversations as token ids, and which of these the assistant wrote.

A chat template writes a conversation as one text. The tokens of an assistant turn are known if the template only ever
adds to what it wrote before:

    before    the messages up to the turn, with the generation prompt: what the model has read
    after     the messages up to and including the turn: what it wrote follows `before`
    whole     the conversation

`before` must be a prefix of `after`, and `after`, up to the token that ends the turn, of `whole`, all in token ids. A
template that leaves out the reasoning of earlier turns, for example, writes them differently once others follow, and
a model that is trained on that text learns what it never wrote.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.config import PromptsConfig
from pipeline.errors import PromptError
from pipeline.text.detokenize import Verbatim
from pipeline.text.rendering import chat_as_text, chat_ids, render_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Int32 = npt.NDArray[np.int32]
Messages = Sequence[dict[str, Any]]
#: Where turns start and end.
Turns = tuple[tuple[int, int], ...]

#: Tokens of either text that a fault shows.
_SHOWN = 12


@dataclass(frozen=True)
class ConversationTokens:
    """A conversation in token ids.

    Attributes:
        ids: i4 [T], with what the template writes after the last turn.
        turns: start and end in `ids` of the assistant turns whose tokens are known, in order. A turn includes the
            token that ends it, not the generation prompt.
        faults: for each other assistant turn one line that says why its tokens are not known.
    """

    ids: Int32
    turns: Turns
    faults: tuple[str, ...]

    @property
    def trained(self) -> npt.NDArray[np.bool_]:
        """bool [T]: the tokens of the turns."""
        marked = np.zeros(len(self.ids), np.bool_)
        for start, end in self.turns:
            marked[start:end] = True
        return marked


def render_conversation(
    messages: Messages,
    tokenizer: PreTrainedTokenizerBase,
    cfg: PromptsConfig,
    stop_ids: Sequence[int],
    *,
    tools: Sequence[Any] | None = None,
    at_most: int | None = None,
    written: Collection[int] | None = None,
) -> ConversationTokens:
    """Tokenize a conversation that ends with an assistant turn, and find the tokens of these turns.

    Args:
        stop_ids: tokens that end a turn.
        at_most: tokens; a text that certainly has more is not tokenized.
        written: the messages that the assistant wrote itself, by default all with its role.

    Raises:
        TooLongError: it has more than `at_most` tokens.
        PromptError: there is no template, it refuses the conversation, or it leaves out part of an assistant turn.
    """
    whole = render_chat(messages, tokenizer, cfg, tools=tools, at_most=at_most)
    turns, faults = [], []
    for number, message in enumerate(messages):
        if message["role"] != "assistant" or (written is not None and number not in written):
            continue
        before = render_chat(messages[:number], tokenizer, cfg, tools=tools, reply_follows=True)
        text = chat_as_text(messages[: number + 1], tokenizer, cfg, tools=tools)
        after = chat_ids(text, tokenizer)
        _check_complete(messages, number, text, tokenizer, cfg, tools)
        end = turn_end(after, len(before), stop_ids)
        if after[: len(before)] != before:
            what = "does not continue its generation prompt with the assistant's turn: the prompt has {}, the turn {}"
            faults.append(f"messages[{number}]: the chat template {_differing(what, before, after, tokenizer)}")
        elif whole[:end] != after[:end]:
            what = "writes this assistant turn in another way when other messages follow: {}, at the end {}"
            faults.append(f"messages[{number}]: the chat template {_differing(what, whole, after[:end], tokenizer)}")
        else:
            turns.append((len(before), end))
    return ConversationTokens(np.asarray(whole, np.int32), tuple(turns), tuple(faults))


def turn_end(ids: Sequence[int], start: int, stop_ids: Sequence[int]) -> int:
    """Where the turn that begins at `start` ends: after its last stop token, since a template may append text that no
    model samples; without one, at the end of `ids`."""
    ends = np.flatnonzero(np.isin(ids[start:], stop_ids))
    return start + int(ends[-1]) + 1 if len(ends) else len(ids)


def _check_complete(
    messages: Messages,
    number: int,
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    cfg: PromptsConfig,
    tools: Sequence[Any] | None,
) -> None:
    """Raise `PromptError` if the template writes the same text without a part of assistant turn `number`."""
    for label, rest in _without_parts(messages[number]):
        try:
            if chat_as_text([*messages[:number], rest], tokenizer, cfg, tools=tools) != text:
                continue
        except PromptError:  # so the part has an effect
            continue
        raise PromptError(
            f"messages[{number}].{label}: the chat template leaves it out of the assistant's turn, so the turn is "
            "not what the assistant wrote; remove it from the data, or name it as the template does"
        )


def _without_parts(message: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each part of a turn that has several, and the turn without it. A name is not part of what was written."""
    if message.keys() <= {"role", "name", "content"}:
        return
    for key, value in message.items():
        if key in ("role", "name") or value in (None, "", [], {}):
            continue
        yield key, {name: item for name, item in message.items() if name != key}
        if key == "tool_calls" and isinstance(value, list) and len(value) > 1:
            for index in range(len(value)):
                yield f"{key}[{index}]", {**message, key: value[:index] + value[index + 1 :]}


def _differing(what: str, ours: Sequence[int], theirs: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """`what` with both texts from the first token at which they differ."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    first = next((n for n, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
    shown = (Verbatim(tokenizer).decode(ids[first : first + _SHOWN]) for ids in (ours, theirs))
    return what.format(*(json.dumps(text, ensure_ascii=False) if text else "nothing" for text in shown))
