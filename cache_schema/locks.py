"""Locks that keep a second writer out: a kernel lock for a local cache, a lease on S3."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import logging
import os
import secrets
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import s3
from ._zarr_compat import sync
from .errors import CacheLockedError, StorageError, shown, storage_errors

if TYPE_CHECKING:
    import obstore

#: A lease ends this long after its last renewal; it is renewed six times as often.
LEASE_SECONDS = 120.0

#: Tokens of the leases that this process holds.
_held: set[str] = set()

_log = logging.getLogger(__name__)


@contextmanager
def local(root: Path, url: str, command: str) -> Iterator[None]:
    """Lock the cache at `root`; the kernel releases the lock when the process ends. Raises `CacheLockedError`."""
    path = root.resolve()  # one lock for all spellings of the path
    lock_path = path.with_name(f".{path.name}.lock")
    with storage_errors(f"cache {url}: lock file {lock_path}"):
        handle = _acquire(lock_path, url)
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(_myself(command)).encode(), 0)
    try:
        _sweep_partial_writes(root)
        yield
    finally:
        lock_path.unlink(missing_ok=True)
        os.close(handle)


@contextmanager
def leased(server: s3.Server, command: str) -> Iterator[None]:
    """Lock a cache on S3: an object beside it names the holder, which renews it, and deletes it at the end.

    The lease of a dead process of this machine is taken over immediately; any other one after `LEASE_SECONDS` without
    renewal, for which a job that was killed and restarted elsewhere waits. Every step is a conditional write, so only
    one of two processes gets the lease. Raises `CacheLockedError` naming a holder that is alive.
    """
    lease = _Lease(server, _myself(command))
    try:
        with storage_errors(f"cache {server.url}: lock"):
            sync(lease.acquire())
    except NotImplementedError:
        _log.warning("cache %s is not locked: AWS_CONDITIONAL_PUT is disabled", server.url)
        yield
        return
    try:
        yield
    finally:
        sync(lease.release())


class _Lease:
    def __init__(self, server: s3.Server, holder: dict[str, Any]):
        self._token = secrets.token_hex(8)
        self._server, self._holder = server, holder | {"machine": _machine(), "token": self._token}
        self._tag: str | None = None
        self._renewed = 0.0

    async def acquire(self) -> None:
        mode: obstore.PutMode = "create"
        watched, since = None, time.monotonic()
        while not await self._put(mode):
            holder, tag, age = await self._found()
            over, unchanged, lives = age > LEASE_SECONDS, time.monotonic() - since, _lives(holder)
            if tag is None:
                mode = "create"
            elif lives is False:
                mode = {"e_tag": tag}
            elif watched not in (None, tag) or (lives and not over):
                raise CacheLockedError(
                    f"cache {self._server.url} is being written by {_name(holder)}; wait for it or stop it"
                )
            # Its age compares two clocks, so we also wait until it misses a renewal.
            elif unchanged > (LEASE_SECONDS / 4 if over else LEASE_SECONDS):
                mode = {"e_tag": tag}
            else:
                if watched is None:
                    _log.warning(
                        "cache %s was locked by %s %.0f s ago; waiting at most %.0f s to see if it still is",
                        *(self._server.url, _name(holder), age, LEASE_SECONDS),
                    )
                watched = tag
                await asyncio.sleep(LEASE_SECONDS / 12)
        _held.add(self._token)
        self._server.lost_to = None
        self._renewal = asyncio.create_task(self._renew())

    async def release(self) -> None:
        self._renewal.cancel()
        _held.discard(self._token)
        surely_ours = time.monotonic() - self._renewed < LEASE_SECONDS / 2 and self._server.lost_to is None
        if surely_ours:
            with contextlib.suppress(OSError, TimeoutError):  # else it expires
                await asyncio.wait_for(self._server.delete_lock(), s3.PATIENCE_SECONDS / 2)

    async def _renew(self) -> None:
        while self._server.lost_to is None:
            await asyncio.sleep(LEASE_SECONDS / 6)
            with contextlib.suppress(OSError):  # reported by the next read or write
                if not await self._put({"e_tag": self._tag}):
                    self._server.lost_to = _name((await self._found())[0])

    async def _put(self, mode: obstore.PutMode) -> bool:
        """Write the lock if the condition `mode` holds; returns whether this process has it now."""
        import obstore.exceptions

        started = time.monotonic()
        # Each renewal has different content, so a different tag, which other processes wait for.
        body = json.dumps(self._holder | {"renewed": time.time_ns()}).encode()
        try:
            self._tag = await self._server.put_lock(body, mode)
        except (obstore.exceptions.PreconditionError, obstore.exceptions.AlreadyExistsError):
            holder, tag, _ = await self._found()
            if holder.get("token") != self._token:
                return False
            self._tag = tag  # our own write; its response was lost
        self._renewed = started
        return True

    async def _found(self) -> tuple[dict[str, Any], str | None, float]:
        """Holder, tag and age in seconds of the lock; the tag is None if there is no lock."""
        try:
            body, meta = await self._server.get_lock()
        except FileNotFoundError:
            return {}, None, 0.0
        return _parsed(body), meta["e_tag"], max(0.0, time.time() - meta["last_modified"].timestamp())


def _machine() -> str | None:
    """The boot of this machine and the PID namespace, in which process ids are unique. None: unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _lives(holder: dict[str, Any]) -> bool | None:
    """Whether the holder's process is alive; None: unknown, for example on another machine."""
    pid = holder.get("pid")
    if _machine() is None or holder.get("machine") != _machine() or not isinstance(pid, int):
        return None
    if pid == os.getpid():
        return holder.get("token") in _held
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2]
    except ProcessLookupError:
        return False
    except OSError:  # a process of another user
        return True
    return state.split()[:1] != ["Z"]  # a zombie is dead


def _myself(command: str) -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "command": command, "since": time.ctime()}


def _parsed(raw: bytes) -> dict[str, Any]:
    try:
        holder = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _name(holder: dict[str, Any]) -> str:
    known = {name: shown(holder[name]) for name in ("command", "pid", "host", "since") if name in holder}
    if len(known) < 4:
        return "another process"
    return f"`{known['command']}` (process {known['pid']} on {known['host']}, since {known['since']})"


def _acquire(lock_path: Path, label: str) -> int:
    while True:
        handle = _open(lock_path)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _parsed(os.pread(handle, 4096, 0))
            os.close(handle)
            raise CacheLockedError(
                f"cache {label} is being written by {_name(holder)}; wait for it or stop it"
            ) from None
        # The previous holder may have removed the file between our open and our lock.
        try:
            if os.stat(lock_path).st_ino == os.fstat(handle).st_ino:
                return handle
        except FileNotFoundError:
            pass
        os.close(handle)


def _open(lock_path: Path) -> int:
    """Open or create the lock file. Raises `StorageError` if something else is in its place."""
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        handle = os.open(lock_path, flags, 0o644)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise
        raise StorageError(f"{lock_path}: expected redpen's lock file, found something else; remove it") from None
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:  # a hard link to a file of somebody else
        os.close(handle)
        raise StorageError(f"{lock_path}: expected redpen's lock file, found something else; remove it")
    return handle


def _sweep_partial_writes(root: Path) -> None:
    """Remove temporary files that killed processes left; nothing else writes while the lock is held."""
    for directory, _, names in os.walk(root):
        for name in names:
            if name.endswith(".partial"):
                Path(directory, name).unlink(missing_ok=True)
