"""Where a cache is: a location becomes a zarr `Store`; what lies in one, without opening it."""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator
from pathlib import Path

from zarr.abc.store import Store
from zarr.core.sync import sync
from zarr.storage import LocalStore

from .errors import NotACacheError, StorageError
from .local import LocalDirectory
from .s3 import S3Store, open_s3

#: Bytes of a name in a path, beside which a lock `.NAME.lock` must be possible; of a path, below which arrays lie.
NAME_BYTES, PATH_BYTES = 255 - len("..lock"), 4096 - 512
#: A user before the host, or anything behind a `?`; S3 names hold neither.
_CREDENTIALS = re.compile(r"(?!file:)[A-Za-z][A-Za-z0-9+.-]*:/{1,2}([^/?#]+@|[^/?#:@]+:[^@]*@|[^?]*\?.*=)")


def open_store(location: str | os.PathLike[str] | Store, *, writable: bool) -> tuple[Store, str]:
    """The store at `location`, and what to call it. Raises `StorageError`, `NotACacheError`."""
    if isinstance(location, Store):
        return location if writable else location.with_read_only(True), str(location)
    label = os.fspath(location)
    _require_possible(label)
    if _CREDENTIALS.match(label):
        raise StorageError(
            f"cache {label.partition(':')[0]}://...: holds a password, a key or a query, which would be stored and "
            "shown; credentials come from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment"
        )
    scheme, separator, rest = label.partition("://")
    if separator and scheme == "s3":
        return open_s3(label, read_only=not writable), label
    if separator and scheme != "file":
        raise StorageError(
            f"cache {label}: {scheme}:// is not supported; give a local path, s3://BUCKET/NAME or a zarr Store"
        )
    if separator and not rest.startswith("/"):
        raise StorageError(f"cache {label}: expected file:///PATH, found a host; this machine's files have none")
    path = Path(rest if separator else label)
    if path.exists() and not path.is_dir():
        raise NotACacheError(f"cache {label}: this is a file; a cache is a directory")
    return LocalDirectory(path, read_only=not writable), label


def _require_possible(label: str) -> None:
    """Raise `StorageError` where no file system or server takes such a name."""
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


def hang_up(store: Store) -> None:
    """Give up the requests that wait for an answer."""
    if isinstance(store, S3Store):
        store.server.hang_up()


def is_empty(store: Store) -> bool:
    if isinstance(store, LocalStore):
        # what a kill during the very first write may leave is nothing yet
        return not store.root.exists() or all(name.endswith(".partial") for name in os.listdir(store.root))
    return not _listed_keys(store.list_dir(""), at_most=1)


def entries(store: Store, path: str) -> list[str]:
    """Names directly below `path`. zarr's own listing of a group would warn of those that hold no metadata."""
    return [name.rstrip("/") for name in _listed_keys(store.list_dir(path)) if not name.startswith("zarr.json")]


def holds_blocks(store: Store, path: str) -> bool:
    """Whether anything below `path` holds values, with or without metadata to read them by."""

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
