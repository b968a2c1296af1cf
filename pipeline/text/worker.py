"""A script that answers questions in a separate process, one line of JSON each way.

The process starts with the first question. One that ends it (too much CPU time, a crash) raises `WorkerEndedError`,
and the next question starts another. Questions may come from any thread. With the process ends every process that it
has started.
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
import threading
import time
from pathlib import Path
from typing import Any


class WorkerEndedError(Exception):
    """A question ended the process.

    Attributes:
        exit_code: of the process; the negative number of a signal.
    """

    def __init__(self, exit_code: int):
        self.exit_code = exit_code
        super().__init__(f"exit code {exit_code}")


class Worker:
    """Asks the process.

    Args:
        script: a file beside this module. Its argument is `seconds`.
        seconds: that one question may take, which the script sees to.
    """

    def __init__(self, script: str, seconds: float):
        self.seconds = seconds
        self._script = Path(__file__).with_name(script)
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        atexit.register(self.close)

    @property
    def is_running(self) -> bool:
        """Whether there is a process that the next question would go to."""
        return self._process is not None and self._process.poll() is None

    def ask(self, question: Any, within: float | None = None) -> Any:
        """The answer.

        Args:
            within: seconds by the clock after which the process is ended.

        Raises:
            WorkerEndedError: the process has ended. TimeoutError: it took longer than `within`.
        """
        text, reply, exit_code, started = json.dumps(question), "", 0, time.monotonic()
        with self._lock:
            process = self._process
            if process is None or process.poll() is not None:
                process = self._start()
            assert process.stdin is not None and process.stdout is not None
            try:
                with contextlib.suppress(BrokenPipeError, ValueError):  # it has ended, or another thread closed it
                    process.stdin.write(text + "\n")
                    process.stdin.flush()
                    if within is None or _has_output(process, within):
                        reply = process.stdout.readline()
            finally:
                if not reply.endswith("\n"):  # it died; or this was interrupted, and its answer would be mistaken
                    late = within is not None and time.monotonic() - started >= within
                    exit_code = self.close(patience=0.0 if late else 0.2)
        if not reply.endswith("\n"):
            if late:
                raise TimeoutError(f"longer than {within:g} s")
            raise WorkerEndedError(exit_code)
        return json.loads(reply)

    def close(self, patience: float = 0.0) -> int:
        """End the process, after waiting `patience` seconds for it to end by itself; its exit code, 0 without one."""
        process, self._process = self._process, None
        if process is None:
            return 0
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        exit_code = process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        return exit_code

    def _start(self) -> subprocess.Popen[str]:
        self.close()
        # -P: the modules beside the script belong to redpen, and must not be found under their bare names
        command = [sys.executable, "-P", str(self._script), str(self.seconds)]
        pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=nowhere, text=True, start_new_session=True
        )
        return self._process


def _has_output(process: subprocess.Popen[str], seconds: float) -> bool:
    """Whether the process writes something, or ends, within this time."""
    assert process.stdout is not None
    waiting = select.poll()
    waiting.register(process.stdout, select.POLLIN)
    return bool(waiting.poll(seconds * 1000))
