"""Locks of a run directory: one process works in it at a time, and its results are read and replaced as a whole.

`filelock` does not serve: it truncates the lock file on opening it, so that no message could name the holder, and has
no shared locks on `flock`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pipeline.errors import RedpenError
from pipeline.files import open_lock
from pipeline.runs.files import LOCK


@contextmanager
def locked(run: str | os.PathLike[str], activity: str = "works in") -> Iterator[None]:
    """Hold a run against other processes that write to it; the kernel releases the lock when this process ends.

    Args:
        activity: completes "process 1 ... it" in the message that other processes print, such as "trains".

    Raises:
        RedpenError: another process holds the lock; the message names it. OSError: the storage refuses the lock.
    """
    handle = open_lock(Path(run) / LOCK)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RedpenError(f"run {run}: {_holder(handle)}; wait for it or stop it") from None
        with contextlib.suppress(OSError):  # on a full disk the lock still holds
            os.ftruncate(handle, 0)
            holder = {"pid": os.getpid(), "host": socket.gethostname(), "doing": activity}
            os.pwrite(handle, json.dumps(holder).encode(), 0)
        yield
    finally:
        os.close(handle)


@contextmanager
def reading_results(runs: Iterable[str | os.PathLike[str]]) -> Iterator[None]:
    """Keep the results of `redpen eval` in these runs from being replaced while the body reads them."""
    with ExitStack() as stack:
        for run in runs:
            stack.enter_context(_directory_lock(Path(run), fcntl.LOCK_SH))
        yield


@contextmanager
def replacing_results(run: Path) -> Iterator[None]:
    """Wait until no process reads a run's results, and block new readers: for the few renames that replace them."""
    with _directory_lock(run, fcntl.LOCK_EX):
        yield


@contextmanager
def _directory_lock(path: Path, kind: int) -> Iterator[None]:
    """A lock on the directory itself, so that a run on read-only storage can be read."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: digests show a mixture of results
            fcntl.flock(handle, kind)
        yield
    finally:
        os.close(handle)


def _holder(handle: int) -> str:
    for patience in (0.0, 0.2):  # who has just locked it has perhaps not written its name yet
        time.sleep(patience)
        try:
            found = json.loads(os.pread(handle, 1000, 0))
            pid, host, activity = int(found["pid"]), str(found["host"]), str(found["doing"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
        return f"process {pid}{'' if host == socket.gethostname() else f' on {host}'} {activity} it"
    return "another process is working on it"
