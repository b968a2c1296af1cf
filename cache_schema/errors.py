"""Errors of a cache. Each is a `CacheError` with a message of one line: what, where, and what to do."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class CacheError(ValueError):
    """Base class of every error of this package."""


class NotACacheError(CacheError):
    """The location is empty or holds something other than a redpen cache."""


class FormatVersionError(CacheError):
    """The cache has a newer format version than this package supports."""


class ProvenanceError(CacheError):
    """The round or scores to continue were made with different models, prompts or settings."""


class UncommittedError(CacheError):
    """The block to read is not, or no longer, committed."""


class CorruptBlockError(CacheError):
    """A committed block does not decode to the data that was written.

    Attributes:
        block: index of the block within its group.
        array: name of the damaged array.
    """

    def __init__(self, group: str, block: int, array: str, problem: str):
        self.group, self.block, self.array, self.problem = group, block, array, problem
        super().__init__(
            f"{group} block {block}, array {array}: {problem}; `redpen verify CACHE --repair` uncommits the block, "
            "then the same stage writes it again"
        )


class CacheLockedError(CacheError):
    """Another process holds the lock of the cache."""


class StorageError(CacheError):
    """A read or write failed (full disk, read-only directory, permissions, unreachable server)."""


def shown(value: Any, at_most: int = 60) -> str:
    """A JSON value for a message: one line, clipped to `at_most` characters."""
    if not (isinstance(value, str) and value.isprintable()):
        parts, value = json.JSONEncoder(default=str).iterencode(value), ""
        while len(value) <= at_most and (part := next(parts, None)) is not None:
            value += part[: 4 * at_most]
    return value if len(value) <= at_most else f"{value[: at_most - 3]}..."


_REMEDIES = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EROFS: "the file system is read-only; choose a writable --cache",
    errno.EACCES: "permission denied; choose a writable --cache or change its permissions",
    errno.EPERM: "operation not permitted; choose a writable --cache or change its permissions",
    errno.EFBIG: "the file-size limit of this process was reached; raise it (ulimit -f)",
}


@contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Turn an `OSError` into a `StorageError` that says what to do."""
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, f"{error.strerror or error}")
        raise StorageError(
            f"{what}: {remedy}, then run the same command again (committed blocks are untouched)"
        ) from error
