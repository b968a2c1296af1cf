"""Environments: a user's code that answers the student's turns, in worker processes.

    class Calculator:                                   # rollouts.environment = "calculator:Calculator"
        def __init__(self, row): ...                    # the prompt's record, with its answer and other columns
        def env_response(self, messages): ...           # the chat so far, ending with the student's turn
            return [{"role": "tool", "content": "4"}]   # what to add to it; None or [] ends the rollout

A process ends a call that takes too long, and with it every process that the call has started.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipeline.config.messages import show_value
from pipeline.errors import ConfigError, RedpenError, shorten

_SCRIPT = Path(__file__).with_name("environment_worker.py")
# The worker ends itself this much later than it is ended, in case nobody is left to do so, in seconds.
_LATER = 5.0
# That importing its module may take, in seconds.
_IMPORT_SECONDS = 600.0

Reply = list[dict[str, Any]]


class EnvironmentFailedError(RedpenError):
    """An environment raised, took too long, ended its process, or returned what are no messages."""


class Environment:
    """An environment in `n_workers` processes, which start with the first call.

    Args:
        name: "module:factory"; the module is imported from the current directory or as usual.
        seconds: that one call may take.
    """

    def __init__(self, name: str, seconds: float, n_workers: int):
        self.name = name
        self._workers = [_Worker(name, seconds) for _ in range(n_workers)]
        self._threads: list[ThreadPoolExecutor] = []
        atexit.register(self.close)

    def source_file(self) -> Path:
        """The file of the module. Raises `ConfigError` if it cannot be imported or has no such factory."""
        try:
            found = self._workers[0].ask({})["file"]
        except EnvironmentFailedError as error:
            raise ConfigError(
                f'rollouts.environment = "{self.name}": expected a factory that can be imported, as module:factory: '
                f"{error}"
            ) from None
        return Path(found)

    def submit(
        self,
        rollout: tuple[int, int],
        row: Mapping[str, Any],
        messages: Sequence[Mapping[str, Any]],
        turns: Sequence[int],
    ) -> Future[Reply]:
        """Ask for the reply to the student's latest turn; [] if the rollout ends with it.

        Args:
            rollout: prompt and sample number, which name its object.
            turns: for each turn of the student, how many messages there were after it.

        The future raises `EnvironmentFailedError`.
        """
        self._threads = self._threads or [ThreadPoolExecutor(1, "environment") for _ in self._workers]
        worker = sum(rollout) % len(self._workers)
        question = {"key": str(rollout), "row": row, "messages": list(messages), "turns": list(turns)}
        return self._threads[worker].submit(lambda: _messages(self._workers[worker].ask(question)["messages"]))

    def close(self) -> None:
        """End the processes; a call that is running fails. The next call starts them again."""
        threads, self._threads = self._threads, []
        for thread in threads:
            thread.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.close()


class _Worker:
    """One process."""

    def __init__(self, name: str, seconds: float):
        self._name, self._seconds = name, seconds
        self._process: subprocess.Popen[str] | None = None

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """The worker's reply to a question, or to {} the file of the module. Raises `EnvironmentFailedError`."""
        if self._process is None:
            self._start()
            found = self._exchange({}, _IMPORT_SECONDS)
            if not question:
                return found
        return self._exchange(question, self._seconds)

    def _exchange(self, question: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        process = self._process
        if process is None:  # closed meanwhile
            raise EnvironmentFailedError("it was ended")
        assert process.stdin is not None and process.stdout is not None
        started, line = time.monotonic(), ""
        with contextlib.suppress(BrokenPipeError, ValueError):  # it has ended, or was closed
            sent = {"environment": self._name, "seconds": seconds + _LATER, **question}
            process.stdin.write(json.dumps(sent) + "\n")
            process.stdin.flush()
            waiting = select.poll()
            waiting.register(process.stdout, select.POLLIN)
            if waiting.poll(seconds * 1000):
                line = process.stdout.readline()
        if not line.endswith("\n"):
            took_too_long = time.monotonic() - started >= seconds
            self.close()
            if not took_too_long:
                raise EnvironmentFailedError(f"it ended its process (exit code {process.returncode})")
            limit = f"{seconds:g} s to import" if not question else f"rollouts.environment_timeout = {seconds:g} s"
            raise EnvironmentFailedError(f"it took longer than {limit}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise EnvironmentFailedError(shorten(reply["error"], 300))
        return reply

    def close(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.2)  # for its exit code, if it ends by itself
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()

    def _start(self) -> None:
        # -P: the modules beside the script belong to redpen, and must not be found under their bare names
        command = [sys.executable, "-P", str(_SCRIPT)]
        pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=nowhere, text=True, start_new_session=True
        )


def _messages(reply: Any) -> Reply:
    """What an environment returned, checked. Raises `EnvironmentFailedError`."""
    if reply is None:
        return []
    if not isinstance(reply, list):
        raise EnvironmentFailedError(f"expected a list of messages, or None, got {show_value(reply)}")
    for message in reply:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise EnvironmentFailedError(
                f"expected messages with role and content, both text, got {show_value(message)}"
            )
        if message["role"] in ("", "assistant"):
            raise EnvironmentFailedError(
                f'expected messages of the role "tool" or "user", got "{message["role"]}", whose turns are the '
                "student's"
            )
    return reply
