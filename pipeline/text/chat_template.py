"""Chats as text, by the tokenizer's chat template, in a process with bounded time and memory.

The process is `pipeline.text.template_worker`; it is started when first needed and serves every template. What kills
it is an error of the template that it was rendering, and the next chat starts another.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import PromptError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Chat = Sequence[Mapping[str, str]]


def chat_text(chat: Chat, tokenizer: PreTrainedTokenizerBase, args: Mapping[str, Any], *, reply_follows: bool) -> str:
    """A chat as the tokenizer's template writes it, special tokens included; as `apply_chat_template` has it.

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
            # no template but code of a tokenizer's class, which was trusted when it was loaded
            return str(
                tokenizer.apply_chat_template(messages, add_generation_prompt=reply_follows, tokenize=False, **args)
            )
        template = tokenizer.get_chat_template(None, args.get("tools"))
        variables = {"tools": None, "documents": None, **_special_tokens(tokenizer), **args}
        variables |= {"messages": messages, "add_generation_prompt": reply_follows}
        reply = renderer().ask(template, variables)
    except PromptError:
        raise
    except Exception as error:
        reply = {"error": f"{type(error).__name__}: {error}"}
    if "error" in reply:
        text = " ".join(reply["error"].split())
        raise PromptError(f"the chat template refuses it: {text if len(text) <= 200 else text[:197] + '...'}")
    return str(reply["text"])


def variables_read(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The names of the variables that the tokenizer's chat template reads; empty where that is not known."""
    try:
        return list(renderer().ask(tokenizer.get_chat_template(), None).get("names", ()))
    except (PromptError, ValueError):
        return []


class Renderer:
    """Asks the process, and starts it when it is first needed.

    Args:
        seconds: of CPU time that one chat may take.
    """

    def __init__(self, seconds: float = 10.0):
        self._seconds = seconds
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def ask(self, template: str, variables: Mapping[str, Any] | None) -> dict[str, Any]:
        """`{"text": ...}` or `{"error": ...}`; `{"names": [...]}` of the template's variables where none are given.

        Raises `PromptError` where it ended the process.
        """
        question = json.dumps([template, variables])
        with self._lock:
            process = self._process
            if process is None or process.poll() is not None:
                process = self._start()
            assert process.stdin is not None and process.stdout is not None
            reply, code = "", 0
            try:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write(question + "\n")
                    process.stdin.flush()
                    reply = process.stdout.readline()
            finally:
                if not reply.endswith("\n"):  # it died; or this was interrupted, and its answer is to nothing
                    code = self.close()
        if not reply.endswith("\n"):
            raise PromptError(
                f"the chat template takes more than {self._seconds:g} s for one chat"
                if code == -signal.SIGPROF
                else f"the chat template ends the process that renders it (exit code {code})"
            )
        return dict(json.loads(reply))

    def close(self) -> int:
        """End the process; its exit code, 0 if there is none."""
        process, self._process = self._process, None
        if process is None:
            return 0
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.2)  # one that died by itself says of what
        process.kill()
        process.communicate()
        return process.returncode

    def _start(self) -> subprocess.Popen[str]:
        self.close()
        # -P: the modules beside the script are redpen's, and not to be found under bare names
        command = [sys.executable, "-P", str(Path(__file__).with_name("template_worker.py")), str(self._seconds)]
        pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=nowhere, text=True)
        return self._process


@functools.cache
def renderer() -> Renderer:
    """This process's renderer."""
    made = Renderer()
    atexit.register(made.close)
    return made


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        return [plain(one) for one in value] if isinstance(value, list | tuple) else str(value)

    return {name: plain(value) for name, value in tokenizer.special_tokens_map.items()}
