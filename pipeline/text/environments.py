"""Environments: a user's code that answers the student's turns, in worker processes.

    class Calculator:                                   # rollouts.environment = "calculator:Calculator"
        def __init__(self, row): ...                    # the prompt's record, with its answer and other columns
        def env_response(self, messages): ...           # the chat so far, ending with the student's turn
            return [{"role": "tool", "content": "4"}]   # what to add to it; None or [] ends the rollout

A process ends a call that takes too long, and with it every process that the call has started.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipeline.config.messages import show_value
from pipeline.errors import ConfigError, RedpenError, shorten
from pipeline.files import file_digest
from pipeline.text.worker import Worker, WorkerEndedError

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
        digest: what `source_digest` of its module must be; by default it is imported once to find out.
    """

    def __init__(self, name: str, seconds: float, n_workers: int, digest: str | None = None):
        self.name, self._seconds, self._digest = name, seconds, digest
        self._workers = [Worker("environment_worker.py", seconds) for _ in range(n_workers)]
        self._threads: list[ThreadPoolExecutor] = []

    @property
    def source_digest(self) -> str:
        """blake2b of the module's file. Raises `ConfigError` if it cannot be imported or has no such factory."""
        if self._digest is None:
            try:
                self._digest = self._import(self._workers[0])
            except EnvironmentFailedError as error:
                raise ConfigError(
                    f'rollouts.environment = "{self.name}": expected a factory that can be imported, as '
                    f"module:factory: {error}"
                ) from None
        return self._digest

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

        The future raises `EnvironmentFailedError`, and `ConfigError` if the module has another digest.
        """
        self._threads = self._threads or [ThreadPoolExecutor(1, "environment") for _ in self._workers]
        number = sum(rollout) % len(self._workers)
        return self._threads[number].submit(
            self._reply, self._workers[number], str(rollout), row, list(messages), list(turns)
        )

    def close(self) -> None:
        """End the processes; a call that is running fails. The next call starts them again."""
        threads, self._threads = self._threads, []
        for thread in threads:
            thread.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.close(patience=0.2)

    def _reply(
        self,
        worker: Worker,
        key: str,
        row: Mapping[str, Any],
        messages: Sequence[Mapping[str, Any]],
        turns: Sequence[int],
    ) -> Reply:
        if not worker.is_running:
            self._import(worker)
            if not worker.is_running:  # closed meanwhile
                raise EnvironmentFailedError("it was ended")
        limit = f"rollouts.environment_timeout = {self._seconds:g} s"

        def reply_to(turn: int) -> dict[str, Any]:
            question = {"key": key, "row": row, "messages": messages[: turns[turn]], "n_earlier": turn}
            return self._ask(worker, question, self._seconds, limit)

        found = reply_to(len(turns) - 1)
        if "lacks" in found:  # another rollout has ended the process, with this one's object
            for turn in range(len(turns)):
                found = reply_to(turn)
        return _messages(found["messages"])

    def _import(self, worker: Worker) -> str:
        """Start a worker with the module; returns the digest of its file."""
        file = Path(self._ask(worker, {}, _IMPORT_SECONDS, f"{_IMPORT_SECONDS:g} s to import")["file"]).resolve()
        digest = file_digest(file, error=ConfigError)
        if self._digest not in (None, digest):
            worker.close()
            raise ConfigError(
                f'rollouts.environment = "{self.name}": {file} is not the module that the command started with: it '
                "was edited since, or is another one on this machine; set it back and run the same command again, or "
                "start a new round"
            )
        return digest

    def _ask(self, worker: Worker, question: Mapping[str, Any], seconds: float, limit: str) -> dict[str, Any]:
        """The worker's reply to a question, or to {} the file of the module. Raises `EnvironmentFailedError`."""
        sent = {"environment": self.name, "seconds": seconds + _LATER, **question}
        try:
            reply: dict[str, Any] = worker.ask(sent, within=seconds)
        except WorkerEndedError as error:
            raise EnvironmentFailedError(f"it ended its process ({error})") from None
        except TimeoutError:
            raise EnvironmentFailedError(f"it took longer than {limit}") from None
        if "error" in reply:
            raise EnvironmentFailedError(shorten(reply["error"], 300))
        return reply


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
