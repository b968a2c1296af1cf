"""Clean stops: the first SIGTERM or Ctrl-C asks for one, the second kills.

with graceful() as stop:
    for block in blocks:
        stop.check(f"{done} of {n} blocks are committed")   # raises Interrupted at a safe point
        ...
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from pipeline.errors import Interrupted

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_OTHERS_WAIT_SECONDS = 10


class Stop:
    """Whether a stop was requested, and by which signal."""

    def __init__(self) -> None:
        self.signum: int | None = None

    @property
    def requested(self) -> bool:
        return self.signum is not None

    def check(self, progress: str = "") -> None:
        """Raise `Interrupted` if a stop was requested; `progress` says what is safely on disk."""
        if self.signum is not None:
            raise Interrupted(self.signum, progress)

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """Signal handler: note the first, die of the second."""
        if self.requested:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        self.signum = signum
        if _ignore_repeated_signals():
            return
        gap = "\n" if os.isatty(2) else ""  # the cursor may stand behind a bar, which redraws its two lines
        # not print: the interrupted code may itself be inside a write to the buffered stream
        line = f"{gap}{signal.Signals(signum).name}: stopping at the next safe point; once more to kill\n{gap}"
        with contextlib.suppress(OSError):
            os.write(2, line.encode())


@contextlib.contextmanager
def graceful() -> Iterator[Stop]:
    """Turn SIGTERM and SIGINT into a request for the body to stop. Outside the main thread signals are left alone."""
    stop = Stop()
    with _handlers(stop.handle):
        yield stop


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Turn SIGTERM into `Interrupted` at once, as Python does with Ctrl-C: for whole commands, outside `graceful`."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        _ignore_repeated_signals()
        raise Interrupted(signum)

    with _handlers(interrupt):
        yield


@contextlib.contextmanager
def _handlers(handler: object) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {signum: signal.signal(signum, handler) for signum in _SIGNALS}  # type: ignore[arg-type]
    try:
        yield
    finally:
        for signum, before in previous.items():
            if signal.getsignal(signum) == handler:
                signal.signal(signum, before)


def _ignore_repeated_signals() -> bool:
    """Hear no second signal in a worker of torchrun: it gets Ctrl-C twice, from the terminal and from torchrun, which
    says what it does and kills what does not end.
    """
    is_worker = "TORCHELASTIC_RUN_ID" in os.environ
    for signum in _SIGNALS if is_worker else ():
        signal.signal(signum, signal.SIG_IGN)
    return is_worker


def defer_to_main_process() -> None:
    """In a rank of torchrun that found what the first rank finds too: wait to be ended by torchrun after its line.

    Returns after some seconds where the first rank has found nothing.
    """
    for signum in _SIGNALS:
        signal.signal(signum, signal.SIG_DFL)
    time.sleep(_OTHERS_WAIT_SECONDS)
