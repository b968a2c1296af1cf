"""From a location (a path, `s3://`, `hf://`, a zarr `Store`) to a `Store`, and what a store lists or may return."""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
from zarr.abc.buffer import Buffer, BufferPrototype
from zarr.abc.store import ByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.storage import LocalStore, WrapperStore

from ._zarr_compat import sync
from .errors import NotACacheError, StorageError
from .hub import open_hub
from .local import LocalDirectory
from .s3 import S3Store, open_s3

#: Limits of a name (leaves room for the lock `.NAME.lock`) and of a path (leaves room for arrays).
NAME_BYTES, PATH_BYTES = 255 - len("..lock"), 4096 - 512
#: A user before the host, or a query after `?`: no valid location has either.
_CREDENTIALS = re.compile(
    r"(?i)(?!file:)[a-z][a-z0-9+.-]*:/{1,2}([^/?#]+(@|%40)|[^/?#:@]+:[^@]*(@|%40)|[^?]*(\?|%3f).*(=|%3d))"
)


def open_store(location: str | os.PathLike[str] | Store, *, writable: bool) -> tuple[Store, str]:
    """The store at `location`, and its name for messages. Raises `StorageError`, `NotACacheError`."""
    if isinstance(location, Store):
        return location if writable else location.with_read_only(True), str(location)
    label = os.fspath(location)
    _require_possible(label)
    if _CREDENTIALS.match(label):
        raise StorageError(
            f"cache {label.partition(':')[0]}://...: expected a location without password, key or query, since it is "
            "stored and printed; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment"
        )
    scheme, separator, rest = label.partition("://")
    if separator and scheme == "s3":
        return open_s3(label, read_only=not writable), label
    if separator and scheme == "hf":
        if writable:
            raise StorageError(f"cache {label}: a published cache cannot be written; choose a local path or s3://")
        return open_hub(label), label
    if separator and scheme != "file":
        raise StorageError(
            f"cache {label}: {scheme}:// is not supported; give a local path, s3://BUCKET/NAME, "
            "hf://datasets/OWNER/NAME or a zarr Store"
        )
    if separator and not rest.startswith("/"):
        raise StorageError(f"cache {label}: expected file:///PATH, found a host name; use three slashes")
    path = Path(rest if separator else label)
    if path.exists() and not path.is_dir():
        raise NotACacheError(f"cache {label}: expected a directory, found a file")
    return LocalDirectory(path, read_only=not writable), label


def _require_possible(label: str) -> None:
    """Raise `StorageError` for a name that no file system or server accepts."""
    name = max(label.split("/"), key=_bytes)
    shown = label if len(label) <= 100 else f"{label[:60]}...{label[-20:]}"
    if "\0" in label:
        raise StorageError(f"cache {shown!r}: expected a path, found one with a NUL character; remove it")
    if (size := _bytes(name)) > NAME_BYTES:
        raise StorageError(f"cache {shown}: expected names of at most {NAME_BYTES} bytes, found {size}; shorten it")
    if (size := _bytes(label)) > PATH_BYTES:
        raise StorageError(f"cache {shown}: expected a path of at most {PATH_BYTES} bytes, found {size}; shorten it")


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def cancel_requests(store: Store) -> None:
    """Cancel requests to a server that wait for a response."""
    if isinstance(store, S3Store):
        store.server.cancel_requests()


def is_empty(store: Store) -> bool:
    if isinstance(store, LocalStore):
        # A process killed during the very first write leaves only partial files.
        return not store.root.exists() or all(name.endswith(".partial") for name in os.listdir(store.root))
    return not _listed_keys(store.list_dir(""), at_most=1)


def entries(store: Store, path: str) -> list[str]:
    """Names directly below `path`. (`Group.keys` would warn about those without metadata.)"""
    return [name.rstrip("/") for name in _listed_keys(store.list_dir(path)) if not name.startswith("zarr.json")]


def holds_blocks(store: Store, path: str) -> bool:
    """Whether any chunk or shard is stored below `path`, with or without metadata to read it by."""

    async def data() -> AsyncIterator[str]:
        async for key in store.list_prefix(f"{path}/"):
            if "/c/" in key.removeprefix(path) and not key.endswith("zarr.json"):
                yield key

    return bool(_listed_keys(data(), at_most=1))


def _listed_keys(keys: AsyncIterator[str], at_most: int | None = None) -> list[str]:
    async def collect() -> list[str]:
        found: list[str] = []
        async for key in keys:
            found.append(key)
            if len(found) == at_most:
                break
        return found

    return sync(collect())


class BoundedStore(WrapperStore[Store]):
    """A store that refuses to return more than `limit` bytes of one object, or of the chunks in one shard."""

    def __init__(self, store: Store, limit: int = 0):
        super().__init__(store)
        self.limit = limit

    def _with_store(self, store: Store) -> BoundedStore:
        return BoundedStore(store, self.limit)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        if isinstance(byte_range, RangeByteRequest) and byte_range.end - byte_range.start > self.limit:
            raise ValueError(f"expected at most {self.limit:,} bytes, its index says more")
        found = await self._store.get(key, prototype, byte_range or RangeByteRequest(0, self.limit + 1))
        if found is not None and len(found) > self.limit:
            raise ValueError(f"expected at most {self.limit:,} bytes, found more")
        if found is not None and isinstance(byte_range, SuffixByteRequest):
            self._check_index(found.to_bytes())
        return found

    def _check_index(self, index: bytes) -> None:
        """Raise `ValueError` if a shard's index (offset, length of every chunk; crc32c) has chunks that overlap."""
        lengths = np.frombuffer(index[:-4], "<u8")[1::2]
        lengths = lengths[lengths != 2**64 - 1]  # not stored
        if (lengths > self.limit).any() or lengths.sum() > self.limit:
            raise ValueError(f"expected chunks of at most {self.limit:,} bytes together, its index says more")


class WriteOnlyStore(WrapperStore[Store]):
    """A store that finds nothing: zarr would read the shard it is about to replace, and fail if it is damaged."""

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        return None
