"""Who works in a run directory: one process at a time, and its results are read and replaced as a whole."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pipeline.errors import RedpenError
from pipeline.files import open_lock

_LOCK = ".lock"


@contextmanager
def locked(run: str | os.PathLike[str], doing: str = "works in") -> Iterator[None]:
    """Hold a run against other processes that write to it; the kernel frees it when this one ends.

    Args:
        doing: what others are told of this process, such as "trains", of the run.

    Raises:
        RedpenError: another process holds it; the message names that one. OSError: the storage refuses the lock.
    """
    handle = open_lock(Path(run) / _LOCK)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RedpenError(f"run {run}: {_holder(handle)}; wait for it or stop it") from None
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
            os.ftruncate(handle, 0)
            mine = {"pid": os.getpid(), "host": socket.gethostname(), "doing": doing}
            os.pwrite(handle, json.dumps(mine).encode(), 0)
        yield
    finally:
        os.close(handle)


@contextmanager
def reading_results(paths: Iterable[str | os.PathLike[str]]) -> Iterator[None]:
    """Keep what `redpen eval` left in these runs from being replaced meanwhile."""
    with ExitStack() as held:
        for path in paths:
            held.enter_context(_directory_lock(Path(path), fcntl.LOCK_SH))
        yield


@contextmanager
def replacing_results(path: Path) -> Iterator[None]:
    """Wait until nobody reads a run's results, and keep others from it: for the few renames that replace them."""
    with _directory_lock(path, fcntl.LOCK_EX):
        yield


@contextmanager
def _directory_lock(path: Path, kind: int) -> Iterator[None]:
    """Of the directory itself, so that one which cannot be written can be read."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # a file system without such locks: the digests tell a mixture
            fcntl.flock(handle, kind)
        yield
    finally:
        os.close(handle)


def _holder(handle: int) -> str:
    """The process that holds the lock, and what it does."""
    try:
        found = json.loads(os.pread(handle, 1000, 0))
        pid, host, doing = int(found["pid"]), str(found["host"]), str(found["doing"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # it has not written its name yet
        return "another process works in it"
    return f"process {pid}{'' if host == socket.gethostname() else f' on {host}'} {doing} it"
