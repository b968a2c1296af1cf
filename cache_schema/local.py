"""Caches in a local directory: zarr's own store, for directories that anybody may have made.

Only regular files are read, and metadata only up to a size: a `zarr.json` that is a link to a device, or a pipe, is a
damaged cache and not a process that hangs. Writing never leaves the directory through a symbolic link.
"""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path

from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.storage import LocalStore

from .errors import StorageError

#: The most that a `zarr.json` may hold, in bytes; the largest that redpen writes have a few thousand.
METADATA_BYTES = 2**24


class LocalDirectory(LocalStore):
    """zarr's `LocalStore`. What cannot be a part of a cache raises `ValueError`, one line, on reading, and
    `StorageError` on writing."""

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        return await asyncio.to_thread(self._read, key, prototype, byte_range)

    def get_sync(
        self, key: str, *, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        return self._read(key, prototype, byte_range)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return list(await asyncio.gather(*(self.get(key, prototype, wanted) for key, wanted in key_ranges)))

    def set_sync(self, key: str, value: Buffer) -> None:
        self._check_writable()
        self._write(key, value, exclusive=False)

    async def _set(self, key: str, value: Buffer, exclusive: bool = False) -> None:
        self._check_writable()
        await asyncio.to_thread(self._write, key, value, exclusive)

    def delete_sync(self, key: str) -> None:
        self._check_writable()
        path = self._inside(key)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    async def delete(self, key: str) -> None:
        await asyncio.to_thread(self.delete_sync, key)

    async def delete_dir(self, prefix: str) -> None:
        self._inside(f"{prefix}/x")
        await super().delete_dir(prefix)

    def _read(self, key: str, prototype: BufferPrototype | None, wanted: ByteRequest | None) -> Buffer | None:
        path = self.root / key
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would block for ever
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO):
                raise ValueError(f"{path}: expected a regular file, found a link to itself or a socket") from None
            raise
        try:
            found = os.fstat(handle)
            if stat.S_ISDIR(found.st_mode):
                return None
            if not stat.S_ISREG(found.st_mode):
                kind = "a pipe" if stat.S_ISFIFO(found.st_mode) else "a device"
                raise ValueError(f"{path}: expected a regular file, found {kind}")
            start, end = _range(wanted, found.st_size)
            if key.endswith("zarr.json") and end - start > METADATA_BYTES:
                raise ValueError(f"{path}: expected at most {METADATA_BYTES:,} bytes, found {found.st_size:,}")
            with open(handle, "rb", closefd=False) as file:
                file.seek(start)
                content = file.read(end - start)
        finally:
            os.close(handle)
        return (prototype or default_buffer_prototype()).buffer.from_bytes(content)

    def _write(self, key: str, value: Buffer, exclusive: bool) -> None:
        path = self._inside(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name[:100]}.{secrets.token_hex(16)}.partial")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with open(os.open(partial, flags, 0o666), "wb") as file:
                file.write(value.as_buffer_like())
            if exclusive:
                os.link(partial, path)
                partial.unlink()
            else:
                partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def _inside(self, key: str) -> Path:
        """Where to write `key`. Raises `StorageError` where a symbolic link would lead out of the cache."""
        path = self.root / key
        root, parent = os.path.realpath(self.root), os.path.realpath(path.parent)
        if os.path.commonpath([root, parent]) != root:
            raise StorageError(
                f"{path.parent}: expected a directory of the cache, found a symbolic link that leads out of it to "
                f"{parent}; replace the link by what it points to"
            )
        return path


def _range(wanted: ByteRequest | None, size: int) -> tuple[int, int]:
    """The first byte of a request and the one after its last, within a file of this size."""
    if isinstance(wanted, RangeByteRequest):
        return min(wanted.start, size), min(max(wanted.end, wanted.start), size)
    if isinstance(wanted, SuffixByteRequest):
        return max(0, size - wanted.suffix), size
    return min(wanted.offset, size) if isinstance(wanted, OffsetByteRequest) else 0, size
