"""Files and directories that a kill leaves as they were or as they were meant to be."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: End of the name of what is not finished.
PARTIAL = ".partial"


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """An empty directory to fill, which takes the place of `path` once the body is through and all is on disk."""
    partial = path.with_name(path.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    mode = partial.stat().st_mode & 0o666  # by the umask; safetensors gives its files to their owner alone
    for file in sorted(partial.rglob("*")):
        if file.is_file():
            file.chmod(mode)
        sync(file)
    sync(partial)
    if path.exists():
        shutil.rmtree(path)
    partial.rename(path)
    sync(path.parent)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file's content at once: after a kill it is the old or the new. Text is written as UTF-8."""
    partial = path.with_name(path.name + PARTIAL)
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    sync(partial)
    partial.replace(path)


def sync(path: Path) -> None:
    """Have what was written to a file, or renamed in a directory, on the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
