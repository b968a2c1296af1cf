"""Rendering: from prompt records to token ids, through the tokenizer's chat template or as plain text."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.config import PromptsConfig
from pipeline.config.messages import show_value
from pipeline.errors import PromptError, one_line
from pipeline.text.chat_template import chat_text
from pipeline.text.records import unique_keys
from pipeline.text.template_effect import N_CHATS, warn_without_effect, with_system
from pipeline.text.token_length import least_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TooLongError(PromptError):
    """A prompt that cannot fit, found without tokenizing it.

    Attributes:
        least: a lower bound of its tokens.
    """

    def __init__(self, least: int, at_most: int):
        self.least = least
        super().__init__(f"expected at most {at_most} tokens, got at least {least}")


def render(
    record: dict[str, Any], tokenizer: PreTrainedTokenizerBase, cfg: PromptsConfig, at_most: int | None = None
) -> list[int]:
    """Token ids of one prompt: through the chat template, ready for the student's turn, or as plain text.

    Args:
        at_most: tokens; a text that certainly has more is not tokenized.

    Raises:
        TooLongError: it has more than `at_most` tokens. One that is only slightly longer is returned.
        PromptError: the template is missing or refuses the record.
    """
    if not uses_chat(tokenizer, cfg):
        if "messages" in record:
            return render_chat(record["messages"], tokenizer, cfg)  # which raises
        if "tools" in record:
            raise PromptError(f"tools need a chat template, {_no_template(cfg)}; remove them")
        if cfg.system is not None:
            raise PromptError(f"prompts.system needs a chat template, {_no_template(cfg)}; remove it")
        return plain_ids(record["prompt"], tokenizer, at_most)
    tools = record.get("tools")
    return render_chat(chat_of(record), tokenizer, cfg, tools=tools, reply_follows=True, at_most=at_most)


def render_chat(
    messages: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    cfg: PromptsConfig,
    *,
    tools: Sequence[Any] | None = None,
    reply_follows: bool = False,
    at_most: int | None = None,
) -> list[int]:
    """Token ids of a chat through the chat template, ready for the assistant's turn if `reply_follows`.

    Raises as `render`.
    """
    text = chat_as_text(messages, tokenizer, cfg, tools=tools, reply_follows=reply_follows)
    check_length(text, tokenizer, at_most)
    return chat_ids(text, tokenizer)


def chat_as_text(
    messages: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    cfg: PromptsConfig,
    *,
    tools: Sequence[Any] | None = None,
    reply_follows: bool = False,
) -> str:
    """The text of `render_chat`. Raises `PromptError`."""
    if not uses_chat(tokenizer, cfg):
        raise PromptError(f"messages need a chat template, {_no_template(cfg)}; give plain text as prompt")
    chat = with_system(messages, cfg.system)
    args = cfg.template_args if tools is None else {**cfg.template_args, "tools": tools}
    in_parts = {n: parts for n, one in enumerate(messages) if isinstance(parts := one.get("content"), list)}
    try:
        text = chat_text(chat, tokenizer, args, reply_follows=reply_follows)
        if any(json.dumps(call["arguments"], ensure_ascii=False) in text for _, call in _calls_with_text(messages)):
            # OpenAI's API has arguments as text, which templates that write them as JSON would quote
            chat = with_system(_with_argument_objects(messages), cfg.system)
            text = chat_text(chat, tokenizer, args, reply_follows=reply_follows)
    except PromptError as error:
        if not in_parts:
            raise
        raise PromptError(f"{error}; messages[{min(in_parts)}].content is a list of parts: give it as text") from None
    for number, parts in in_parts.items():
        if _written(parts, text):
            raise PromptError(
                f"messages[{number}].content: the chat template writes parts as code, {str(parts)[:40]}...; give the "
                "content as text"
            )
    return text


def chat_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of what a chat template wrote, every special token included. Raises `PromptError`."""
    try:
        return [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    except Exception as error:  # for text such as half a surrogate pair
        raise PromptError(f"the tokenizer refuses what the chat template writes: {one_line(error)}") from None


def render_all(
    records: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    cfg: PromptsConfig,
    max_prompt_tokens: int,
    context: int | None = None,
    *,
    reader: str = "student",
    named: Mapping[str, str] | None = None,
) -> list[npt.NDArray[np.int32]]:
    """Token ids of every prompt, checked against the longest accepted and the reader's `context` length (tokens).

    Warns of settings without effect on the first prompts. Prompts that are much too long are not tokenized.

    Args:
        reader: whose prompts they are, for messages.
        named: names of `system` and `template_args` in the recipe, if they are not in [prompts].

    Raises:
        PromptError: names the first prompt at fault, its length, the limit, how many there are in all, and the
            setting to change.
    """
    if cfg.template != "none":
        warn_without_effect(
            [(chat_of(record), record.get("tools")) for record in _first(records)], tokenizer, cfg, named
        )
    limit = max_prompt_tokens if context is None else min(max_prompt_tokens, context - 1)
    rendered, lengths, least = [], [], False
    for number, record in enumerate(records, 1):
        try:
            ids = np.asarray(render(record, tokenizer, cfg, limit), np.int32)
        except TooLongError as error:
            lengths.append(error.least)
            least = True
            continue
        except PromptError as error:
            raise PromptError(f"{cfg.path}: prompt {number}: {error}") from None
        if not len(ids):
            raise PromptError(f"{cfg.path}: prompt {number}: expected at least one token, the tokenizer gives none")
        rendered.append(ids)
        lengths.append(len(ids))
    long = [number for number, length in enumerate(lengths, 1) if length > limit]
    if long:
        longest = max(lengths)
        if context is not None and longest >= context:
            remedy = f"the {reader}'s context is {context} tokens, so shorten or remove them"
        elif least:
            remedy = "remove them, or set rollouts.max_prompt_tokens higher"
        else:
            remedy = f"set rollouts.max_prompt_tokens to {longest} or remove them"
        raise PromptError(
            f"{cfg.path}: prompt {long[0]}: expected at most {limit} tokens, got {lengths[long[0] - 1]} "
            f"({len(long)} of {len(lengths)} prompts are too long, the longest has {longest}"
            f"{' or more' if least else ''}); {remedy}"
        )
    return rendered


def template_identity(tokenizer: PreTrainedTokenizerBase, cfg: PromptsConfig) -> dict[str, Any]:
    """How prompts become tokens, as JSON for the cache's provenance."""
    if not uses_chat(tokenizer, cfg):
        return {"kind": "none"}
    template = json.dumps(tokenizer.chat_template, sort_keys=True)
    return {
        "kind": "chat",
        "sha256": hashlib.sha256(template.encode()).hexdigest(),
        "args": cfg.template_args,
        "system": cfg.system,
    }


def uses_chat(tokenizer: PreTrainedTokenizerBase, cfg: PromptsConfig) -> bool:
    """Whether prompts go through the tokenizer's chat template. Raises `PromptError` if it needs one and has none."""
    has_template = bool(tokenizer.chat_template)
    if cfg.template == "chat" and not has_template:
        raise PromptError(
            'prompts.template = "chat" needs a tokenizer with a chat template, the student\'s has none; '
            'set it to "none", or use an instruct model'
        )
    return has_template and cfg.template != "none"


def plain_ids(text: str, tokenizer: PreTrainedTokenizerBase, at_most: int | None = None) -> list[int]:
    """Tokens of `text`, after a BOS if the tokenizer adds one; never with an EOS, which would end it.

    Raises `TooLongError` if it certainly has more than `at_most`.
    """
    check_length(text, tokenizer, at_most)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:1] != [bos] and tokenizer("a")["input_ids"][:1] == [bos]:
        ids = [bos, *ids]
    return ids


def _first(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first records, and those that are the first with a field of messages or tools."""
    found, seen = list(records[:N_CHATS]), set[str]()
    for number, record in enumerate(records):
        fields = {key for message in record.get("messages", ()) for key in message} | record.keys() & {"tools"}
        if number >= N_CHATS and not fields <= seen:
            found.append(record)
        seen |= fields
    return found


def _calls_with_text(messages: Sequence[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every tool call whose arguments are text: its place and the object that holds its name and arguments."""
    for number, message in enumerate(messages):
        calls = message.get("tool_calls")
        for index, call in enumerate(calls if isinstance(calls, list) else ()):
            called = call.get("function", call) if isinstance(call, dict) else None
            if isinstance(called, dict) and isinstance(called.get("arguments"), str):
                yield f"messages[{number}].tool_calls[{index}]", called


def _with_argument_objects(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with objects in place of the text of arguments. Raises `PromptError` if it is not that of one."""
    made = copy.deepcopy(list(messages))
    for place, call in _calls_with_text(made):
        text, arguments = call["arguments"], None
        with contextlib.suppress(ValueError, RecursionError):
            arguments = json.loads(text or "{}", object_pairs_hook=unique_keys)
        if not isinstance(arguments, dict):
            raise PromptError(
                f"{place}: arguments: expected an object or the text of one in JSON, got {show_value(text)}; correct "
                "the arguments, which the chat template would quote"
            )
        call["arguments"] = arguments
    return made


def _written(parts: Sequence[dict[str, str]], text: str) -> bool:
    """Whether a template that does not know content parts wrote them as Python or JSON."""
    return any(str(part) in text or json.dumps(part, ensure_ascii=False) in text for part in parts)


def chat_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    return record.get("messages") or [{"role": "user", "content": record["prompt"]}]


def _no_template(cfg: PromptsConfig) -> str:
    return 'got prompts.template = "none"' if cfg.template == "none" else "the tokenizer has none"


def check_length(text: str, tokenizer: PreTrainedTokenizerBase, at_most: int | None) -> None:
    """Raise `TooLongError` if the text cannot have as few as `at_most` tokens."""
    if at_most is not None and len(text) > at_most and (least := least_tokens(text, tokenizer)) > at_most:
        raise TooLongError(least, at_most)
