"""A script that answers questions in a process with bounded time and memory, a line of JSON each way.

The process starts with the first question. One that ends it (too much CPU time, a crash) raises `WorkerEndedError`,
and the next question starts another. Questions may come from any thread.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import subprocess
import sys
import threading
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
        seconds: CPU time that one question may take.
    """

    def __init__(self, script: str, seconds: float):
        self.seconds = seconds
        self._script = Path(__file__).with_name(script)
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        atexit.register(self.close)

    def ask(self, question: Any) -> Any:
        """The answer. Raises `WorkerEndedError`."""
        text, reply, exit_code = json.dumps(question), "", 0
        with self._lock:
            process = self._process
            if process is None or process.poll() is not None:
                process = self._start()
            assert process.stdin is not None and process.stdout is not None
            try:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write(text + "\n")
                    process.stdin.flush()
                    reply = process.stdout.readline()
            finally:
                if not reply.endswith("\n"):  # it died; or this was interrupted, and its answer would be mistaken
                    exit_code = self.close(patience=0.2)
        if not reply.endswith("\n"):
            raise WorkerEndedError(exit_code)
        return json.loads(reply)

    def close(self, patience: float = 0.0) -> int:
        """End the process, after waiting `patience` seconds for it to end by itself; its exit code, 0 without one."""
        process, self._process = self._process, None
        if process is None:
            return 0
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
        process.kill()
        process.communicate()
        return process.returncode

    def _start(self) -> subprocess.Popen[str]:
        self.close()
        # -P: the modules beside the script belong to redpen, and must not be found under their bare names
        command = [sys.executable, "-P", str(self._script), str(self.seconds)]
        pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=nowhere, text=True)
        return self._process
