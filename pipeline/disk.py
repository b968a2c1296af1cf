"""Free disk, checked before hours are spent."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

import cache_schema as cs


def bytes_per_token(arrays: Iterable[cs.ArraySpec], sizes: Mapping[str, int] | None = None) -> int:
    """Bytes that one response token takes in these arrays before compression; `sizes` gives candidate and
    topk axes.
    """
    sizes = sizes or {}
    return sum(
        np.dtype(spec.dtype).itemsize * math.prod(sizes[dim] for dim in spec.dims[1:])
        for spec in arrays
        if spec.dims[0] == "token"
    )


def require_free(location: str, needed: int, what: str) -> None:
    """Refuse to start what would fill the disk. Remote caches are not asked.

    Raises:
        StorageError: fewer than `needed` bytes are free where the cache at `location` is, or would be.
    """
    scheme, separator, rest = location.partition("://")
    if separator and scheme != "file":
        return
    path = Path(rest if separator else location).absolute()
    while not path.exists():
        path = path.parent
    free = shutil.disk_usage(path).free
    if needed > free:
        raise cs.StorageError(
            f"cache {location}: {what} may need {readable(needed)}, {readable(free)} are free; "
            "free some space or choose another --cache"
        )


def readable(n_bytes: float) -> str:
    """A number of bytes for people: 3.2 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.1f} {unit}" if unit != "B" else f"{n_bytes:.0f} B"
        n_bytes /= 1024
    return f"{n_bytes:.1f} TiB"
