"""Equality of mathematical expressions, by math-verify (extra `eval`) in a process of its own.

math-verify stops its own work by signals, which only a main thread gets, and only between two steps of Python; text
by a model can keep it busy or fill the memory for ever. So it works in `pipeline.text.math_worker`, which may be used
from any thread and may die: what killed it counts as not equal, and the next question starts another.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import json
import subprocess
import sys
import threading
from pathlib import Path

from pipeline.errors import ConfigError

_EXTRA = "eval.match = \"math\" needs math-verify: pip install 'redpen[eval]'"


class MathJudge:
    """Asks the process, and starts it when it is first needed.

    Args:
        seconds: of CPU time that one question may take.
    """

    def __init__(self, seconds: float = 5.0):
        self._seconds = seconds
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def require(self) -> None:
        """Raises `ConfigError` where math-verify is not installed."""
        if importlib.util.find_spec("math_verify") is None:
            raise ConfigError(_EXTRA)

    def answer(self, response: str) -> str | None:
        """What the response gives as its answer, as math-verify writes it; None where it finds none."""
        return self._ask(response, None)[0]

    def is_right(self, response: str, wanted: str) -> bool:
        """Whether the response's answer equals `wanted`."""
        return self._ask(response, boxed(wanted))[1]

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _ask(self, response: str, wanted: str | None) -> tuple[str | None, bool]:
        with self._lock:
            process = self._process
            if process is None or process.poll() is not None:
                process = self._start()
            assert process.stdin is not None and process.stdout is not None
            reply = ""
            try:
                process.stdin.write(json.dumps([response, wanted]) + "\n")
                process.stdin.flush()
                reply = process.stdout.readline()
            except BrokenPipeError:
                pass
            finally:
                if not reply:  # it died; or this was interrupted, and what it says later is no answer to anything
                    self.close()
        answer, right = json.loads(reply or "[null, false]")
        return answer, right

    def _start(self) -> subprocess.Popen[str]:
        self.close()
        # -P: the modules beside the script are redpen's, and not to be found under bare names
        command = [sys.executable, "-P", str(Path(__file__).with_name("math_worker.py")), str(self._seconds)]
        pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=nowhere, text=True)
        assert self._process.stdout is not None
        error = json.loads(self._process.stdout.readline() or '"it ended while it started"')
        if error is not None:
            self.close()
            raise ConfigError(f"{_EXTRA} ({error})")
        return self._process


@functools.cache
def judge() -> MathJudge:
    """This process's judge."""
    made = MathJudge()
    atexit.register(made.close)
    return made


def boxed(answer: str) -> str:
    """An answer alone as math-verify finds one in a text."""
    return answer if "\\boxed" in answer else f"\\boxed{{{answer}}}"
