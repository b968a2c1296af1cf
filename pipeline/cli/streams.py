"""The standard streams of a command: closed or full ones, and what libraries write to them."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator

import click

from pipeline.errors import RedpenError

_DESCRIPTORS = (0, 1, 2)


@contextlib.contextmanager
def command_streams() -> Iterator[None]:
    """Make standard streams usable for the duration of a command.

    Closed streams are replaced by /dev/null, characters that the encoding lacks become escapes, and control
    characters in warnings and log records of libraries become escapes too.
    """
    _open_closed()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    format_before, record_before = warnings.formatwarning, logging.getLogRecordFactory()
    warnings.formatwarning = _warning
    logging.setLogRecordFactory(_record)
    try:
        yield
    finally:
        warnings.formatwarning = format_before
        logging.setLogRecordFactory(record_before)
        _discard_unwritten()


def flush() -> None:
    """Flush stdout. Raises `BrokenPipeError`, or `RedpenError` if it cannot be written, e.g. to a full disk."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise RedpenError(f"standard output: cannot be written ({error.strerror}); finished work is kept") from None


def show_usage(error: click.ClickException) -> int:
    """Print a usage error as click does, with control characters escaped, and return its exit code."""
    from pipeline.console import clipped, console, escape_control

    message = escape_control(clipped(error.format_message()))
    click.UsageError(message, getattr(error, "ctx", None)).show(console.file)
    return error.exit_code


def _open_closed() -> None:
    """Open /dev/null for closed streams, or the next opened file would get their descriptors and their output."""
    for descriptor in _DESCRIPTORS:
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor: this one
            os.set_inheritable(descriptor, True)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, "w", encoding="utf-8", closefd=False))
    if sys.stdin is None:
        sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)


def _discard_unwritten() -> None:
    """Redirect streams that cannot be flushed to /dev/null, or the interpreter's exit would report an error."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, stream.fileno())
                os.close(null)


def _warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> str:
    from pipeline.console import clipped, escape_control

    return f"warning: {escape_control(clipped(f'{category.__name__}: {message}'))}\n"


class _Record(logging.LogRecord):
    """A log record with control characters, except line breaks, as escapes."""

    def getMessage(self) -> str:
        from pipeline.console import escape_control

        return "\n".join(map(escape_control, super().getMessage().split("\n")))


def _record(*args: object, **kwargs: object) -> logging.LogRecord:
    return _Record(*args, **kwargs)  # type: ignore[arg-type]
