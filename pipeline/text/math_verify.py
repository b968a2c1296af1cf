"""Equality of mathematical expressions, by math-verify (extra `eval`) in another process.

math-verify limits its own time by signals, which only a main thread receives, and only between two steps of Python;
text by a model can keep it busy or fill the memory for ever. So it runs in `pipeline.text.math_worker`. A question
that ends the process counts as not equal.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import subprocess

from pipeline.environment import install_hint
from pipeline.errors import ConfigError
from pipeline.text.worker import Worker, WorkerEndedError


def _missing() -> str:
    return f'eval.match = "math" needs math-verify: {install_hint("eval")}'


class MathJudge(Worker):
    """Compares answers.

    Args:
        seconds: CPU time that one question may take.
    """

    def __init__(self, seconds: float = 5.0):
        super().__init__("math_worker.py", seconds)

    def require(self) -> None:
        """Raise `ConfigError` if math-verify is not installed."""
        if importlib.util.find_spec("math_verify") is None:
            raise ConfigError(_missing())

    def answer(self, response: str) -> str | None:
        """What the response gives as its answer, as math-verify writes it; None if it finds none."""
        return self._judge(response, None)[0]

    def is_right(self, response: str, wanted: str) -> bool:
        """Whether the response's answer equals `wanted`."""
        return self._judge(response, boxed(wanted))[1]

    def _judge(self, response: str, wanted: str | None) -> tuple[str | None, bool]:
        try:
            answer, right = self.ask([response, wanted])
        except WorkerEndedError:
            return None, False
        return answer, right

    def _start(self) -> subprocess.Popen[str]:
        process = super()._start()
        assert process.stdout is not None
        error = json.loads(process.stdout.readline() or '"it ended while it started"')
        if error is not None:
            self.close()
            raise ConfigError(f"{_missing()} ({error})")
        return process


@functools.cache
def judge() -> MathJudge:
    """This process's judge."""
    return MathJudge()


def boxed(answer: str) -> str:
    """An answer alone as math-verify finds one in a text."""
    return answer if "\\boxed" in answer else f"\\boxed{{{answer}}}"
