"""A cache in a local directory: zarr's `LocalStore`, hardened against directories that somebody else prepared.

Reads only regular files: a link to a device, or a pipe, is an error and does not block. No write follows a symbolic
link out of the directory. Temporary files have unpredictable names.
"""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from zarr.abc.buffer import Buffer, BufferPrototype
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.buffer import default_buffer_prototype
from zarr.storage import LocalStore

from .errors import StorageError


class LocalDirectory(LocalStore):
    """zarr's `LocalStore`. Raises `ValueError` for what is not a regular file, `StorageError` for a write that a
    symbolic link would redirect."""

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
        return list(await asyncio.gather(*(self.get(key, prototype, byte_range) for key, byte_range in key_ranges)))

    async def set(self, key: str, value: Buffer) -> None:
        await asyncio.to_thread(self._write, key, value)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        with suppress(FileExistsError):
            await asyncio.to_thread(self._write, key, value, exclusive=True)

    def set_sync(self, key: str, value: Buffer) -> None:
        self._write(key, value)

    async def delete(self, key: str) -> None:
        self._inside(key)
        await super().delete(key)

    def delete_sync(self, key: str) -> None:
        self._inside(key)
        super().delete_sync(key)

    async def delete_dir(self, prefix: str) -> None:
        self._inside(f"{prefix}/x")
        await super().delete_dir(prefix)

    def _read(self, key: str, prototype: BufferPrototype | None, byte_range: ByteRequest | None) -> Buffer | None:
        path = self.root / key
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # without NONBLOCK, a pipe would block
        except (FileNotFoundError, NotADirectoryError):
            self._refuse_lost_link(path)
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
            start, end = _span(byte_range, found.st_size)
            with open(handle, "rb", closefd=False) as file:
                file.seek(start)
                content = file.read(end - start)
        finally:
            os.close(handle)
        return (prototype or default_buffer_prototype()).buffer.from_bytes(content)

    def _refuse_lost_link(self, path: Path) -> None:
        """Raise `ValueError` if a symbolic link on the way to a missing file points to nothing: what was there is
        lost, and not absent."""
        for here in (path, *path.parents):
            if here == self.root or here.parent.exists():
                if here.is_symlink():
                    raise ValueError(f"{here}: expected a file or directory, found a symbolic link to nothing")
                return

    def _write(self, key: str, value: Buffer, *, exclusive: bool = False) -> None:
        self._check_writable()
        path = self._inside(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name[:100]}.{secrets.token_hex(16)}.partial")
        try:
            with partial.open("xb") as file:  # "x" follows no link
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
        """The path of `key`. Raises `StorageError` if a symbolic link on the way points out of the cache."""
        path = self.root / key
        root, parent = os.path.realpath(self.root), os.path.realpath(path.parent)
        if os.path.commonpath([root, parent]) != root:
            raise StorageError(
                f"{path.parent}: expected a directory inside the cache, found a symbolic link to {parent}; replace "
                "the link with the directory it points to"
            )
        return path


def _span(byte_range: ByteRequest | None, size: int) -> tuple[int, int]:
    """Start and end of a request within a file of this size."""
    if isinstance(byte_range, RangeByteRequest):
        return min(byte_range.start, size), min(max(byte_range.end, byte_range.start), size)
    if isinstance(byte_range, SuffixByteRequest):
        return max(0, size - byte_range.suffix), size
    return min(byte_range.offset, size) if isinstance(byte_range, OffsetByteRequest) else 0, size
