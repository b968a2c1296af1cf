"""What can go wrong with a cache, each as a `CacheError` whose message is one line: what, where, and the remedy."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager


class CacheError(ValueError):
    """Root of every error that a cache raises for its user."""


class NotACacheError(CacheError):
    """Nothing, or something other than a redpen cache, is at the given place."""


class FormatVersionError(CacheError):
    """The cache was written by a newer format version than this reader knows."""


class ProvenanceError(CacheError):
    """What would be appended was made by other models, prompts or settings than what the cache holds."""


class UncommittedError(CacheError):
    """The block was asked for, but it is not (or no longer) committed."""


class CorruptBlockError(CacheError):
    """A committed block does not decode to the data that was committed.

    Attributes:
        block: index of the block within its group.
        array: name of the array at fault.
    """

    def __init__(self, group: str, block: int, array: str, problem: str):
        self.group, self.block, self.array, self.problem = group, block, array, problem
        super().__init__(
            f"{group} block {block}, array {array}: {problem}; `redpen verify CACHE --repair` uncommits the block, "
            "then the same stage writes it again"
        )


class CacheLockedError(CacheError):
    """Another process is writing to the cache."""


class StorageError(CacheError):
    """The storage refused a read or write (full disk, read-only directory, permissions, unreachable server)."""


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
    """Turn an `OSError` from the storage into one line; committed blocks are never affected by a failed write."""
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, f"{error.strerror or error}")
        raise StorageError(
            f"{what}: {remedy}, then run the same command again (committed blocks are untouched)"
        ) from error
