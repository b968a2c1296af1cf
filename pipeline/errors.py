"""Errors that a user can correct. Each message is one line: the thing, what was expected and found, what to do.

Errors of the cache derive from `cache_schema.errors.CacheError` instead. The command line prints one line for either
and exits with 1; any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import errno
import os
import signal


class RedpenError(ValueError):
    """Base class of errors that are no bugs of redpen."""


class ConfigError(RedpenError):
    """A recipe, an override or an argument is invalid."""


class PromptError(RedpenError):
    """A prompts file cannot be read, or one of its lines is not a prompt."""


class ModelError(RedpenError):
    """A model or tokenizer cannot be loaded, or is incompatible with the others."""


class ModelNotFoundError(ModelError):
    """A model is not a local directory, and could not be fetched from the Hub."""


class Interrupted(BaseException):
    """A requested stop, raised at a safe point. Like KeyboardInterrupt, `except Exception` does not catch it.

    Attributes:
        signum: the signal that requested the stop.
        progress: what is on disk, e.g. `12 of 32 blocks are committed`; may be empty.
    """

    def __init__(self, signum: int, progress: str = ""):
        self.signum, self.progress = signum, progress
        detail = f": {progress}" if progress else ""
        super().__init__(f"stopped by {signal.Signals(signum).name}{detail}; the same command continues")

    @property
    def exit_code(self) -> int:
        """128 + signal number, as in shells: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.signum


#: Errors of the file system that are no bugs: full, read-only, no permission.
_STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO, errno.ENOTDIR}

_PATHS = {errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR}


def user_message(error: Exception) -> str | None:
    """The line to print for an error that is no bug of redpen, or None."""
    if isinstance(error, RedpenError):
        return str(error)
    from cache_schema.errors import CacheError

    if isinstance(error, CacheError):
        return str(error)
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return f"{str(error.filename)[:80]}...: the file system does not allow names this long; choose a shorter one"
    if isinstance(error, OSError) and error.errno in _STORAGE:
        return f"{error.filename or 'storage'}: {error.strerror}; finished work is kept, run it again"
    if isinstance(error, OSError) and error.errno in _PATHS:
        return f"{error.filename or 'a path'}: {error.strerror}; choose another name"
    if isinstance(error, FileNotFoundError) and not _directory_exists():
        return "the current directory does not exist any more; change to another one, and run it again"
    if type(error).__name__ == "OutOfMemoryError":  # torch's; torch may not be installed or imported yet
        return (
            "the GPU's memory is full; lower rollouts.batch_size (sampling), score.rows_per_chunk (scoring, or use "
            'placement "streamed"), train.tokens_per_microbatch (training) or eval.batch_size, and run it again'
        )
    return None


def _directory_exists() -> bool:
    try:
        return bool(os.getcwd())
    except FileNotFoundError:
        return False


def one_line(error: object, at_most: int = 200) -> str:
    """A library's exception on one line, its class first, for a message of redpen's."""
    return shorten(f"{type(error).__name__}: {error}", at_most)


def shorten(text: object, at_most: int = 200) -> str:
    """A text on one line; what exceeds `at_most` characters becomes "..."."""
    line = " ".join(str(text).split())
    return line if len(line) <= at_most else line[: at_most - 3] + "..."
