"""redpen killed by SIGKILL just before chosen writes, one after another, and then run to its end."""

from __future__ import annotations

import gc
import importlib
import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from helpers import preloaded

# What is imported late; the children have it from their parent.
_ONCE = ("pipeline.distill", "pipeline.engines.transformers_sampler", "pipeline.engines.resident")


def before_each(
    writes: Sequence[tuple[str, int]],
    *command: str,
    code: int = 0,
    after: tuple[Callable[..., object], str] | None = None,
) -> None:
    """`redpen COMMAND` once for every (path, n) in `writes`, killed when it is about to put a file or directory that
    ends with `path` in place for the n-th time, and once more to its end. Raises `AssertionError` where it lives on,
    or does not end with `code`.

    Args:
        after: a function and its argument, called after each death.
    """
    process = preloaded.Process(_main, list(writes), after, *command)
    _, errors = process.communicate()
    assert process.returncode == code, errors


def _main(writes: Sequence[tuple[str, int]], after: tuple[Callable[..., object], str] | None, *command: str) -> None:
    for module in _ONCE:
        importlib.import_module(module)
    from pipeline.cli import main

    gc.freeze()
    for path, n in writes:
        if not (child := os.fork()):
            os.replace, os.rename = (_deadly(move, path, itertools.count(1), n) for move in (os.replace, os.rename))
            os._exit(main(command))
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
            sys.exit(f"before {path}: expected a death, got {os.waitstatus_to_exitcode(status)}")
        if after is not None:
            after[0](after[1])
    sys.exit(main(command))


def _deadly(move: Callable[..., Any], path: str, count: Iterator[int], n: int) -> Callable[..., Any]:
    def moved(source: Any, target: Any, **kwargs: Any) -> Any:
        if os.fspath(target).endswith(path) and next(count) == n:
            os.kill(os.getpid(), signal.SIGKILL)
        return move(source, target, **kwargs)

    return moved
