"""What a user can get wrong, outside the cache: each message is one line that names what, where, and the remedy.

The cache has a root of its own, `cache_schema.errors.CacheError`. The command line prints one line for either and
exits with 1; any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import errno
import signal


class RedpenError(ValueError):
    """Root of every error that a user, rather than a bug, caused."""


class ConfigError(RedpenError):
    """A recipe or an override does not say something that redpen can do."""


class PromptError(RedpenError):
    """A prompts file cannot be read, or a line of it is not a prompt."""


class ModelError(RedpenError):
    """A model or tokenizer cannot be loaded, or does not fit the others."""


class ModelNotFoundError(ModelError):
    """A model is neither on this machine nor to be had from the Hub now."""


class Interrupted(BaseException):
    """A requested stop, raised at a safe point. Like KeyboardInterrupt, `except Exception` does not catch it.

    Attributes:
        signum: the signal that asked for the stop.
        progress: what is safely on disk, e.g. `12 of 32 blocks are committed`; empty if the stage did not say.
    """

    def __init__(self, signum: int, progress: str = ""):
        self.signum, self.progress = signum, progress
        detail = f": {progress}" if progress else ""
        super().__init__(f"stopped by {signal.Signals(signum).name}{detail}; the same command continues")

    @property
    def exit_code(self) -> int:
        """128 + signal number, as shells count: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.signum


#: What the storage may refuse without anyone having made a mistake in the code.
_STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO, errno.ENOTDIR}

_PATHS = {errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR}


def user_message(error: Exception) -> str | None:
    """One line for an error that is not a bug, None for one that is."""
    if isinstance(error, RedpenError):
        return str(error)
    from cache_schema.errors import CacheError

    if isinstance(error, CacheError):
        return str(error)
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return f"{str(error.filename)[:80]}...: this name is too long for the file system; choose a shorter one"
    if isinstance(error, OSError) and error.errno in _STORAGE:
        return f"{error.filename or 'storage'}: {error.strerror}; nothing that was finished is lost, run it again"
    if isinstance(error, OSError) and error.errno in _PATHS:
        return f"{error.filename or 'a path'}: {error.strerror}; choose another name"
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which must not be imported for this
        return (
            "the GPU's memory is full; lower rollouts.batch_size (sampling), score.rows_per_chunk (scoring, or use "
            'placement "streamed"), train.tokens_per_microbatch (training) or eval.batch_size, and run it again'
        )
    return None
