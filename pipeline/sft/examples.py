"""Tokenize documents and chats, and mark the tokens that are trained on.

A line of a data file is one of

    text                 a document: every token is trained on, and the end token
    messages             a chat that ends with an assistant turn: every assistant turn is trained on; with `tools`
    prompt + response    a chat of one turn; without a chat template, plain text and its continuation

and may have `source` and `id`. Chats are rendered like prompts (`[prompts]`: template, template_args, system).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.config import PromptsConfig
from pipeline.errors import PromptError
from pipeline.text.assistant_turns import render_conversation
from pipeline.text.records import check_chat, check_text, check_tools, known_fields
from pipeline.text.rendering import TooLongError, plain_ids, render, uses_chat
from pipeline.text.template_effect import N_CHATS, warn_without_effect
from pipeline.text.token_length import least_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIELDS = ("text", "messages", "conversations", "tools", "prompt", "response", "source", "id")
_KINDS = "text, messages that end with an assistant turn, or prompt and response"
#: Tokens that a template may append to the last reply, which are cut off.
_MAX_SUFFIX_TOKENS = 1024


@dataclass(frozen=True)
class Example:
    """A rollout that no model sampled.

    Attributes:
        record: for the cache's prompts.
        prompt: i4 ids of the context, which is not trained on.
        response: i4 [T] ids after it.
        trained: bool [T], which of the response tokens are trained on.
    """

    record: dict[str, Any]
    prompt: npt.NDArray[np.int32]
    response: npt.NDArray[np.int32]
    trained: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class ExampleReader:
    """Turns lines of data files into examples.

    Attributes:
        stop_ids: tokens that end a turn. A document ends with the tokenizer's EOS if it is one of them, else with the
            first.
        max_tokens: of an example, including its prompt.
    """

    tokenizer: PreTrainedTokenizerBase
    rendering: PromptsConfig
    stop_ids: Sequence[int]
    max_tokens: int

    def read(self, value: Any, place: str, source: str) -> list[Example]:
        """The examples of a line; none if it is a chat longer than `max_tokens`.

        Raises:
            PromptError: it is neither a document nor a chat; the message names `place`.
        """
        if not isinstance(value, dict):
            raise PromptError(f"{place}: expected an object with {_KINDS}, got {type(value).__name__}")
        fields = known_fields(value, place, FIELDS)
        about = {"source": str(fields.get("source", source))} | ({"id": str(fields["id"])} if "id" in fields else {})
        kinds = sorted(fields.keys() & {"text", "messages", "prompt"})
        if len(kinds) != 1 or ("response" in fields) != ("prompt" in fields):
            raise PromptError(f"{place}: expected {_KINDS}, got {', '.join(map(str, value)) or 'no fields'}")
        tools = check_tools(fields["tools"], place) if "tools" in fields else []
        if kinds == ["messages"]:
            return self._chat(check_chat(fields["messages"], place), about, place, tools)
        for name in ("text",) if kinds == ["text"] else ("prompt", "response"):
            check_text(fields[name], name, place)
        if tools and (kinds == ["text"] or not uses_chat(self.tokenizer, self.rendering)):
            raise PromptError(f"{place}: tools: expected messages beside them and a chat template; remove them")
        if kinds == ["text"]:
            return list(self._document(fields["text"], about))
        if not uses_chat(self.tokenizer, self.rendering):
            return self._continuation(fields["prompt"], fields["response"], about, place)
        turns = [{"role": "user", "content": fields["prompt"]}, {"role": "assistant", "content": fields["response"]}]
        return self._chat(turns, about, place, tools)

    def warn_without_effect(self, examples: Iterable[Example]) -> None:
        """Warn of settings of [prompts] that have no effect on the first chats."""
        records = (example.record for example in examples)
        chats = ((record["messages"], record.get("tools")) for record in records if record.get("messages"))
        first = list(itertools.islice(chats, N_CHATS))
        if self.rendering.template != "none" and (first or not self.tokenizer.chat_template):
            warn_without_effect(first, self.tokenizer, self.rendering)

    def _document(self, text: str, about: dict[str, Any]) -> Iterator[Example]:
        """Pieces of `max_tokens` that overlap by one token, so that every token but the first is trained on once."""
        ids = np.array([*plain_ids(text, self.tokenizer), self._end], np.int32)
        for start in range(0, len(ids) - 1, self.max_tokens - 1):
            piece = ids[start : start + self.max_tokens]
            record = about | {"prompt": self.tokenizer.decode(piece[:1].tolist()) or "\ufffd"}
            yield Example(record, piece[:1], piece[1:], np.ones(len(piece) - 1, bool))

    def _continuation(self, prompt: str, response: str, about: dict[str, Any], place: str) -> list[Example]:
        try:
            ids = render({"prompt": prompt}, self.tokenizer, self.rendering, self.max_tokens)
            if least_tokens(response, self.tokenizer) > self.max_tokens:
                return []
        except TooLongError:
            return []
        reply = [*self.tokenizer(response, add_special_tokens=False)["input_ids"], self._end]
        if not ids:
            raise PromptError(f"{place}: prompt: expected at least one token, the tokenizer returned none")
        trained = np.arange(len(ids) + len(reply)) >= len(ids)
        return self._example(about | {"prompt": prompt}, np.array([*ids, *reply], np.int32), trained)

    def _chat(
        self, messages: list[dict[str, Any]], about: dict[str, Any], place: str, tools: Sequence[Any] = ()
    ) -> list[Example]:
        """The whole chat as rendered by the template, with the turns that it shows to be the assistant's trained.

        Some templates rewrite earlier turns, which are then context only, unless there are tool calls: in such a chat
        these turns are what is to be learnt.
        """
        try:
            at_most = self.max_tokens + _MAX_SUFFIX_TOKENS
            chat = render_conversation(
                messages, self.tokenizer, self.rendering, self.stop_ids, tools=list(tools) or None, at_most=at_most
            )
        except TooLongError:
            return []
        except PromptError as error:
            raise PromptError(f"{place}: {error}") from None
        if len(chat.ids) > at_most:
            return []
        if chat.faults and (not chat.turns or any("tool_calls" in message for message in messages)):
            raise PromptError(
                f"{place}: {chat.faults[-1] if not chat.turns else chat.faults[0]}, so its tokens are not known; set "
                "prompts.template_args, use a template that keeps every turn as it was written, or remove the line"
            )
        if not chat.trained.any() or not chat.turns[0][0]:
            found = "before the assistant's first turn" if chat.trained.any() else "of the assistant's turns"
            raise PromptError(
                f"{place}: messages: expected tokens {found}, the chat template writes none; use a template that "
                "writes every message and a generation prompt, or remove the line"
            )
        context = about | {"messages": messages[:-1]} | ({"tools": list(tools)} if tools else {})
        return self._example(context, chat.ids, chat.trained)

    def _example(
        self, record: dict[str, Any], ids: npt.NDArray[np.int32], trained: npt.NDArray[np.bool_]
    ) -> list[Example]:
        places = np.flatnonzero(trained)
        first, last = int(places[0]), int(places[-1]) + 1
        if last > self.max_tokens:
            return []
        return [Example(record, ids[:first], ids[first:last], trained[first:last])]

    @property
    def _end(self) -> int:
        eos = self.tokenizer.eos_token_id
        return int(eos if eos in self.stop_ids else self.stop_ids[0])


def mix(sources: Sequence[Sequence[Example]], shares: Sequence[float], count: int, seed: int) -> list[Example]:
    """`count` examples, interleaved so that each source has its share of the trained tokens at any time.

    Each source is used in shuffled order, and shuffled again when it is exhausted.
    """
    n_trained = np.zeros(len(sources))
    streams = [_shuffled(source, (seed, number)) for number, source in enumerate(sources)]
    chosen = []
    for _ in range(count):
        number = int(np.argmin(n_trained / np.asarray(shares)))
        example = next(streams[number])
        n_trained[number] += example.trained.sum()
        chosen.append(example)
    return chosen


def _shuffled(source: Sequence[Example], seed: tuple[int, int]) -> Iterator[Example]:
    rng = np.random.default_rng(seed)
    while True:
        yield from (source[i] for i in rng.permutation(len(source)))
