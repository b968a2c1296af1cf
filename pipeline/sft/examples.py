"""Documents and chats as token ids, with what of them is learnt.

A line of a data file is one of

    text                 a document: every token is learnt, and its end
    messages             a chat that ends with the assistant: every turn of the assistant's is learnt
    prompt + response    one turn of a chat, or, without a chat template, plain text and what follows it

and may have `source` and `id`. Chats are rendered as prompts are (`[prompts]`: template, template_args, system).
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
from pipeline.text.prompts import (
    TooLongError,
    check_chat,
    check_text,
    named_messages,
    plain_ids,
    render,
    render_chat,
    uses_chat,
)
from pipeline.text.template_effect import N_CHATS, warn_without_effect
from pipeline.text.token_length import least_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIELDS = ("text", "messages", "conversations", "prompt", "response", "source", "id")
_KINDS = "text, messages that end with the assistant's, or prompt and response"
#: Tokens that a template may write after the last reply, which are cut off.
_AFTER_THE_LAST = 1024


@dataclass(frozen=True)
class Example:
    """A rollout that somebody else wrote.

    Attributes:
        record: for the cache's prompts.
        prompt: i4 ids that are read, and not learnt.
        response: i4 [T] ids after them.
        learnt: bool [T] which of these are.
    """

    record: dict[str, Any]
    prompt: npt.NDArray[np.int32]
    response: npt.NDArray[np.int32]
    learnt: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Reader:
    """Makes examples of the lines of data files.

    Attributes:
        stop_ids: tokens that end a turn; a document ends with the tokenizer's own EOS, or else the first of these.
        max_tokens: of an example, its prompt included.
    """

    tokenizer: PreTrainedTokenizerBase
    rendering: PromptsConfig
    stop_ids: Sequence[int]
    max_tokens: int

    def read(self, value: Any, place: str, source: str) -> list[Example]:
        """The examples of a line; none where it is a chat that is too long.

        Raises:
            PromptError: it is neither a document nor a chat; names `place`.
        """
        if not isinstance(value, dict):
            raise PromptError(f"{place}: expected an object with {_KINDS}, got {type(value).__name__}")
        given = named_messages({name: value[name] for name in FIELDS if value.get(name) is not None}, place)
        about = {"source": str(given.get("source", source))} | ({"id": str(given["id"])} if "id" in given else {})
        kinds = sorted(given.keys() & {"text", "messages", "prompt"})
        if len(kinds) != 1 or ("response" in given) != ("prompt" in given):
            raise PromptError(f"{place}: expected {_KINDS}, got {', '.join(map(str, value)) or 'no fields'}")
        if kinds == ["text"]:
            check_text(given["text"], "text", place)
            return list(self._document(given["text"], about))
        if kinds == ["messages"]:
            return self._chat(check_chat(given["messages"], place), about, place)
        for name in ("prompt", "response"):
            check_text(given[name], name, place)
        if not uses_chat(self.tokenizer, self.rendering):
            return self._continuation(given["prompt"], given["response"], about, place)
        turns = [{"role": "user", "content": given["prompt"]}, {"role": "assistant", "content": given["response"]}]
        return self._chat(turns, about, place)

    def warn_without_effect(self, examples: Iterable[Example]) -> None:
        """Warn of settings of [prompts] that change nothing in the first chats."""
        chats = (example.record.get("messages") for example in examples)
        first = list(itertools.islice((chat for chat in chats if chat), N_CHATS))
        if self.rendering.template != "none" and (first or not self.tokenizer.chat_template):
            warn_without_effect(first, self.tokenizer, self.rendering)

    def _document(self, text: str, about: dict[str, Any]) -> Iterator[Example]:
        """Pieces of `max_tokens`, each after the last token of the one before: so all but the first are learnt."""
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
            raise PromptError(f"{place}: prompt: expected at least one token, the tokenizer gives none")
        return self._fitting(about | {"prompt": prompt}, np.array([*ids, *reply], np.int32), [(len(ids), None)])

    def _chat(self, messages: list[dict[str, str]], about: dict[str, Any], place: str) -> list[Example]:
        """The chat as the template renders it whole. A turn is learnt where the template renders the chat up to it as
        the beginning of that: some rewrite earlier turns, which are then only read."""
        try:
            at_most = self.max_tokens + _AFTER_THE_LAST
            whole = np.array(render_chat(messages, self.tokenizer, self.rendering, at_most=at_most), np.int32)
            if len(whole) > at_most:
                return []
            turns = []
            for number, message in enumerate(messages):
                if message["role"] != "assistant":
                    continue
                before = render_chat(messages[:number], self.tokenizer, self.rendering, reply_follows=True)
                after = render_chat(messages[: number + 1], self.tokenizer, self.rendering)
                if whole[: len(before)].tolist() == before and whole[: len(after)].tolist() == after:
                    turns.append((len(before), len(after)))
        except TooLongError:
            return []
        except PromptError as error:
            raise PromptError(f"{place}: {error}") from None
        if not turns:
            raise PromptError(
                f"{place}: the chat template does not render the assistant's last turn as what follows its own "
                "generation prompt, so what is to be learnt is not known; set prompts.template_args, or give prompt "
                "and response"
            )
        return self._fitting(about | {"messages": messages[:-1]}, whole, turns)

    def _fitting(
        self, record: dict[str, Any], ids: npt.NDArray[np.int32], turns: Iterable[tuple[int, int | None]]
    ) -> list[Example]:
        learnt = np.zeros(len(ids), bool)
        for start, end in turns:
            # a template may write more after the token that ends the turn, which no student samples
            ends = np.flatnonzero(np.isin(ids[start:end], self.stop_ids))
            learnt[start : start + ends[-1] + 1 if len(ends) else end] = True
        places = np.flatnonzero(learnt)
        first, last = int(places[0]), int(places[-1]) + 1
        if last > self.max_tokens:
            return []
        return [Example(record, ids[:first], ids[first:last], learnt[first:last])]

    @property
    def _end(self) -> int:
        eos = self.tokenizer.eos_token_id
        return int(eos if eos in self.stop_ids else self.stop_ids[0])


def mixed(sources: Sequence[Sequence[Example]], shares: Sequence[float], count: int, seed: int) -> list[Example]:
    """`count` examples, such that at any time each source has had its share of the learnt tokens.

    Each source is gone through in a shuffled order, as often as it takes.
    """
    learnt = np.zeros(len(sources))
    streams = [_shuffled(source, (seed, number)) for number, source in enumerate(sources)]
    chosen = []
    for _ in range(count):
        number = int(np.argmin(learnt / np.asarray(shares)))
        example = next(streams[number])
        learnt[number] += example.learnt.sum()
        chosen.append(example)
    return chosen


def _shuffled(source: Sequence[Example], seed: tuple[int, int]) -> Iterator[Example]:
    rng = np.random.default_rng(seed)
    while True:
        yield from (source[i] for i in rng.permutation(len(source)))
