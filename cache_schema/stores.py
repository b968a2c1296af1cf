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
from .s3 import S3Store, open_s3

#: A user before the host, or anything behind a `?`; S3 names hold neither.
_CREDENTIALS = re.compile(r"(?!file:)[A-Za-z][A-Za-z0-9+.-]*:/{1,2}([^/?#]+@|[^/?#:@]+:[^@]*@|[^?]*\?.*=)")


def open_store(location: str | os.PathLike[str] | Store, *, writable: bool) -> tuple[Store, str]:
    """The store at `location`, and what to call it. Raises `StorageError`, `NotACacheError`."""
    if isinstance(location, Store):
        return location if writable else location.with_read_only(True), str(location)
    label = os.fspath(location)
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
    path = Path(rest if separator else label)
    if path.exists() and not path.is_dir():
        raise NotACacheError(f"cache {label}: this is a file; a cache is a directory")
    return LocalStore(path, read_only=not writable), label


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


def has_commits(store: Store, path: str) -> bool:
    """Whether the block group at `path` holds any commit, with or without metadata to read it by."""
    return bool(_listed_keys(store.list_prefix(f"{path}/commit/c/"), at_most=1))


def _listed_keys(keys: AsyncIterator[str], at_most: int | None = None) -> list[str]:
    async def collect() -> list[str]:
        found: list[str] = []
        async for key in keys:
            found.append(key)
            if len(found) == at_most:
                break
        return found

    return sync(collect())
