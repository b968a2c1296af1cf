"""redpen killed by SIGKILL just before chosen writes, one after another, and then run to its end."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

import preloaded

# What takes long to import, or is imported late; the children have it from their parent.
_ONCE = (
    *("pipeline.distill", "pipeline.rollouts.transformers_sampler", "pipeline.score.resident"),
    *("torch._dynamo", "torch.utils.tensorboard"),
)


def before_each(writes: Sequence[str], *command: str) -> None:
    """`redpen COMMAND` once for every path in `writes`, killed when it is about to put that file or directory in
    place, and once more to its end. Raises `AssertionError` where it lives on, or does not end with 0.
    """
    process = preloaded.Process(_main, list(writes), *command)
    _, errors = process.communicate()
    assert process.returncode == 0, errors


def _main(writes: Sequence[str], *command: str) -> None:
    for module in _ONCE:
        importlib.import_module(module)
    from pipeline.cli import main

    for path in writes:
        if not (child := os.fork()):
            os.replace, os.rename = _deadly(os.replace, path), _deadly(os.rename, path)
            os._exit(main(command))
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
            sys.exit(f"before {path}: expected a death, got {os.waitstatus_to_exitcode(status)}")
    sys.exit(main(command))


def _deadly(move: Callable[..., Any], path: str) -> Callable[..., Any]:
    def moved(source: Any, target: Any, **kwargs: Any) -> Any:
        if os.fspath(target).endswith(path):
            os.kill(os.getpid(), signal.SIGKILL)
        return move(source, target, **kwargs)

    return moved
