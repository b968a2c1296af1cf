"""Chats as text, by the tokenizer's chat template, in another process (`pipeline.text.template_worker`)."""

from __future__ import annotations

import functools
import signal
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.errors import PromptError, shorten
from pipeline.text.worker import Worker, WorkerEndedError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Chat = Sequence[Mapping[str, Any]]


def chat_text(chat: Chat, tokenizer: PreTrainedTokenizerBase, args: Mapping[str, Any], *, reply_follows: bool) -> str:
    """A chat as the tokenizer's template writes it, special tokens included; the same text as `apply_chat_template`.

    Args:
        args: further variables of the template.
        reply_follows: end with the beginning of the assistant's turn.

    Raises:
        PromptError: the template refuses the chat, or takes too long, too much memory or too many characters.
    """
    from transformers import PreTrainedTokenizerBase

    messages = [dict(message) for message in chat]
    try:
        if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
            # not a template but code of a tokenizer's class, which was trusted when it was loaded
            return str(
                tokenizer.apply_chat_template(messages, add_generation_prompt=reply_follows, tokenize=False, **args)
            )
        template = tokenizer.get_chat_template(None, args.get("tools"))
        variables = {"tools": None, "documents": None, **_special_tokens(tokenizer), **args}
        variables |= {"messages": messages, "add_generation_prompt": reply_follows}
        reply = renderer().render(template, variables)
    except PromptError:
        raise
    except Exception as error:
        reply = {"error": f"{type(error).__name__}: {error}"}
    if "error" in reply:
        raise PromptError(f"the chat template refuses it: {shorten(reply['error'])}")
    return str(reply["text"])


def template_variables(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The names of the variables that the tokenizer's chat template uses; empty if they are not known."""
    try:
        return list(renderer().render(tokenizer.get_chat_template(), None).get("names", ()))
    except (PromptError, ValueError):
        return []


class Renderer(Worker):
    """Renders templates.

    Args:
        seconds: CPU time that one text may take.
    """

    def __init__(self, seconds: float = 3.0):
        super().__init__("template_worker.py", seconds)

    def render(
        self, template: str, variables: Mapping[str, Any] | None, setting: str | None = None
    ) -> dict[str, Any]:
        """`{"text": ...}` or `{"error": ...}`; without variables `{"names": [...]}`, those that the template uses.

        Args:
            setting: the template is this setting of a recipe, not a chat template; undefined variables are errors.

        Raises `PromptError` if the template ended the process.
        """
        try:
            return dict(self.ask([template, variables, setting is None]))
        except WorkerEndedError as error:
            what, one = ("the chat template", "chat") if setting is None else (setting, "prompt")
            raise PromptError(
                f"{what} takes more than {self.seconds:g} s for one {one}"
                if error.exit_code == -signal.SIGPROF
                else f"{what} ends the process that renders it ({error})"
            ) from None


@functools.cache
def renderer() -> Renderer:
    """This process's renderer."""
    return Renderer()


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        return [plain(one) for one in value] if isinstance(value, list | tuple) else str(value)

    return {name: plain(value) for name, value in tokenizer.special_tokens_map.items()}
