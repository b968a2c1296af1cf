"""Whether settings have an effect through a chat template: the first chats are rendered with and without them.

A template may drop the system message, ignore the generation prompt, or not use a variable, tools or a field of
messages. Nothing fails then, and the student samples from other prompts than the recipe or the data say.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.config import PromptsConfig, messages
from pipeline.console import warn
from pipeline.errors import PromptError
from pipeline.text.chat_template import Chat, chat_text, template_variables

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Chats that are rendered, and messages of each.
N_CHATS, _N_MESSAGES = 8, 16
_OTHER = "\nredpen looks whether this is read"


#: A chat, and its tools.
Asked = tuple[Chat, Sequence[Any] | None]


def warn_without_effect(
    chats: Sequence[Asked],
    tokenizer: PreTrainedTokenizerBase,
    cfg: PromptsConfig,
    named: Mapping[str, str] | None = None,
) -> None:
    """One warning for each setting that changes none of the first chats; each once in a process.

    Args:
        chats: as in the data, ending before the assistant's turn; at most a few beyond `N_CHATS`.
        named: names of `system` and `template_args` in the recipe, if they are not in [prompts].
    """
    for line in without_effect(chats, tokenizer, cfg, named):
        _warn_once(line)


@functools.cache
def _warn_once(line: str) -> None:
    warn(line)


def without_effect(
    chats: Sequence[Asked],
    tokenizer: PreTrainedTokenizerBase,
    cfg: PromptsConfig,
    named: Mapping[str, str] | None = None,
) -> list[str]:
    """The lines of `warn_without_effect`."""
    names = {"system": "prompts.system", "template_args": "prompts.template_args"} | dict(named or {})
    if not tokenizer.chat_template:
        if not cfg.template_args:
            return []
        return [f"{names['template_args']} has no effect: the tokenizer has no chat template; remove it"]
    chats = [(chat, tools) for chat, tools in chats if chat]
    try:
        look = _Look(chats, tokenizer, cfg)
    except PromptError:  # rendering the prompts will raise it, with the place
        return []
    found = [*look.system(names["system"]), *look.arguments(names["template_args"]), *look.fields()]
    return [*found, *look.generation_prompt()]


class _Look:
    """The first chats, rendered in several ways."""

    def __init__(self, chats: Sequence[Asked], tokenizer: PreTrainedTokenizerBase, cfg: PromptsConfig):
        self._bare, self._tokenizer, self._cfg = [chat for chat, _ in chats], tokenizer, cfg
        self._chats = [with_system(chat, cfg.system) for chat in self._bare]
        self._tools = [{} if tools is None else {"tools": tools} for _, tools in chats]
        self._args = [{**cfg.template_args, **tools} for tools in self._tools]
        self._texts = [self._text(chat, args) for chat, args in zip(self._chats, self._args, strict=True)]
        self._first = "the first prompt" if len(chats) == 1 else f"the first {len(chats)} prompts"

    def system(self, name: str) -> Iterator[str]:
        own = [chat[0]["role"] == "system" for chat in self._bare]
        if self._cfg.system is not None and own and all(own):
            yield f"{name} is not used in {self._first}, which have a system message already; remove one of them"
        ignored: dict[str, bool] = {}
        for chat, text, args in self._rendered():
            for number, message in enumerate(chat[:_N_MESSAGES]):
                if "content" in message and ignored.get(message["role"], True):
                    more = {**message, "content": _more(message["content"])}
                    other = [*chat[:number], more, *chat[number + 1 :]]
                    ignored[message["role"]] = not self._changes(other, text, args)
        for role, is_ignored in ignored.items():
            if is_ignored and role == "system" and self._cfg.system is not None and not all(own):
                yield (
                    f"{name} has no effect: the chat template leaves out system messages; put its text into the "
                    "prompts, or remove it"
                )
            elif is_ignored:
                remedy = "use another template" if role == "user" else "put their text into the user's message"
                yield (
                    f"the chat template leaves out messages with the role {messages.show_value(role)} in "
                    f"{self._first}, so the model does not see them; {remedy}"
                )

    def arguments(self, name: str) -> Iterator[str]:
        args = self._cfg.template_args
        for key, value in args.items():
            without = {other: item for other, item in args.items() if other != key}
            probes = [without, *({**args, key: other} for other in _others(value))]
            if any(
                self._changes(chat, text, probe | tools)
                for probe in probes
                for chat, text, tools in zip(self._chats, self._texts, self._tools, strict=True)
            ):
                continue
            read = template_variables(self._tokenizer)
            # a hint only if a variable is spelled similarly: others are tools, messages, tokens
            hint = messages.did_you_mean(key, read) or "; see the model's card for its name, or remove it"
            yield (
                f"{name}.{key} = {messages.show_value(value)} changes nothing in {self._first}"
                + ("" if key in read else f", and the chat template uses no such variable{hint}")
            )

    def fields(self) -> Iterator[str]:
        """Fields of messages other than role and content, and tools."""
        ignored: dict[str, bool] = {}
        for (chat, text, args), tools in zip(self._rendered(), self._tools, strict=True):
            if tools and ignored.get("tools", True):
                ignored["tools"] = not self._changes(chat, text, self._cfg.template_args)
            # the id and the name in a tool's message only name the call, which comes right before in any case
            keys = {key for message in chat for key in message if (message["role"], key) != ("tool", "name")}
            for key in keys - {"role", "content", "tool_call_id"}:
                if ignored.get(f"{key} of messages", True):
                    other = [{name: item for name, item in message.items() if name != key} for message in chat]
                    ignored[f"{key} of messages"] = not self._changes(other, text, args)
        for key in sorted(key for key, is_ignored in ignored.items() if is_ignored):
            yield (
                f"the chat template leaves out {key} in {self._first}, so the model does not see them; put what "
                "matters into the content, or use a model whose template knows them"
            )

    def generation_prompt(self) -> Iterator[str]:
        for chat, text, args in self._rendered():
            with contextlib.suppress(PromptError):
                if chat_text(chat, self._tokenizer, args, reply_follows=False) != text:
                    return
                replied = [*chat, {"role": "assistant", "content": _OTHER.strip()}]
                whole = chat_text(replied, self._tokenizer, args, reply_follows=False)
                between, found, _ = whole.removeprefix(text).partition(_OTHER.strip())
                if not whole.startswith(text) or not found:
                    yield (
                        "the chat template writes prompts the same with and without add_generation_prompt: that is "
                        "right only if a reply follows the user's message directly, which the template does not "
                        "show; look at a response, and use the template of the model's instruct version if it "
                        "continues the user's turn"
                    )
                elif between.strip():
                    yield (
                        f"the chat template ignores add_generation_prompt: prompts end without the "
                        f"{messages.show_value(between)} that it writes before a reply, so the student goes on with "
                        "the user's turn; use a chat template that writes it"
                    )
                return  # else a reply follows the user's message directly, as in Llama 2 and Mistral

    def _rendered(self) -> Iterator[tuple[Chat, str, dict[str, Any]]]:
        yield from zip(self._chats, self._texts, self._args, strict=True)

    def _changes(self, chat: Chat, text: str, args: Mapping[str, Any]) -> bool:
        try:
            return self._text(chat, args) != text
        except PromptError:  # so it has an effect
            return True

    def _text(self, chat: Chat, args: Mapping[str, Any]) -> str:
        return chat_text(chat, self._tokenizer, args, reply_follows=True)


def _more(content: str | list[Any]) -> str | list[Any]:
    return content + _OTHER if isinstance(content, str) else [*content, {"type": "text", "text": _OTHER}]


def with_system(chat: Chat, system: str | None) -> list[dict[str, Any]]:
    """The chat after a system message, if there is one to add and it has none."""
    messages = [dict(message) for message in chat]
    if system is not None and messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    return messages


def _others(value: Any) -> list[Any]:
    """Other values of an argument, in case the given one is the template's default and so has no effect."""
    match value:
        case bool():
            return [not value]
        case int() | float():
            return [value + 1, 0]
        case str():
            return [value + "_", ""]
    return [type(value)()]
