"""Room for a long job: free disk space, checked before it starts, and the memory that a container may use."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

import cache_schema as cs
from pipeline.files import read_text


def bytes_per_token(arrays: Iterable[cs.ArraySpec], sizes: Mapping[str, int] | None = None) -> int:
    """Uncompressed bytes of one response token in these arrays. `sizes` gives the lengths of other axes."""
    sizes = sizes or {}
    return sum(
        np.dtype(spec.dtype).itemsize * math.prod(sizes[dim] for dim in spec.dims[1:])
        for spec in arrays
        if spec.dims[0] == "token"
    )


def require_free(location: str, needed: int, what: str) -> None:
    """Check that a job fits on the disk of the cache at `location`. Remote caches are not checked.

    Raises:
        StorageError: fewer than `needed` bytes are free.
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
    """A number of bytes with a unit, e.g. 3.2 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.1f} {unit}" if unit != "B" else f"{n_bytes:.0f} B"
        n_bytes /= 1024
    return f"{n_bytes:.1f} TiB"


def memory_limits() -> list[int]:
    """Bytes of host memory that this container may use, if it has a limit."""
    files = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
    return [int(text) for limit in files if limit.is_file() and (text := read_text(limit).strip()).isdigit()]
