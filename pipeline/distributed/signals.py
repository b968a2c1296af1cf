"""Clean stops: the first SIGTERM or Ctrl-C requests one, the second ends the process.

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
_MAIN_PROCESS_SECONDS = 10


class Stop:
    """A request to stop, and the signal that made it."""

    def __init__(self) -> None:
        self.signum: int | None = None

    @property
    def requested(self) -> bool:
        return self.signum is not None

    def check(self, progress: str = "") -> None:
        """Raise `Interrupted` if a stop was requested; `progress` describes what is on disk."""
        if self.signum is not None:
            raise Interrupted(self.signum, progress)

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """Signal handler: request a stop, or end the process if one was requested before."""
        if self.requested:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        self.signum = signum
        if ignore_repeated_signals():
            return
        gap = "\n" if os.isatty(2) else ""  # the cursor may be after a progress bar, which redraws its two lines
        again = "press Ctrl-C again" if signum == signal.SIGINT else "send it again"
        # not print: the interrupted code may itself be inside a write to the buffered stream
        line = f"{gap}{signal.Signals(signum).name}: stopping at the next safe point; {again} to force quit\n{gap}"
        with contextlib.suppress(OSError):
            os.write(2, line.encode())


@contextlib.contextmanager
def graceful() -> Iterator[Stop]:
    """Turn SIGTERM and SIGINT into a stop request for the body. Does nothing outside the main thread."""
    stop = Stop()
    with _handlers(stop.handle):
        yield stop


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Raise `Interrupted` on SIGTERM and SIGINT at once: for whole commands, outside `graceful`."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        ignore_repeated_signals()
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


def ignore_repeated_signals() -> bool:
    """In a rank of torchrun, ignore further signals; whether this is one.

    A rank gets Ctrl-C twice, from the terminal and from torchrun, which prints what it does and kills ranks that do
    not end.
    """
    is_worker = "TORCHELASTIC_RUN_ID" in os.environ
    for signum in _SIGNALS if is_worker else ():
        signal.signal(signum, signal.SIG_IGN)
    return is_worker


def defer_to_main_process() -> None:
    """Wait for the main process to report an error that this rank met too; torchrun then ends this rank.

    Returns after some seconds if the main process met no error.
    """
    for signum in _SIGNALS:
        signal.signal(signum, signal.SIG_DFL)
    time.sleep(_MAIN_PROCESS_SECONDS)
