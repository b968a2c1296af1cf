"""The standard streams of a command: what may be wrong with them, and what libraries write to them by themselves."""

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
def of_a_command() -> Iterator[None]:
    """Streams that a command can rely on: closed ones lead nowhere, letters that an encoding lacks become escapes,
    and so do the control characters of what libraries warn of and log.
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
        _give_up_unwritten()


def flush() -> None:
    """Have the results written. Raises `BrokenPipeError`, or `RedpenError` where there is no room for them."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise RedpenError(f"standard output: cannot be written ({error.strerror}); what was done is kept") from None


def show_usage(error: click.ClickException) -> int:
    """A mistake in the arguments, on stderr as click has it, but with what was typed made harmless; its exit code."""
    from pipeline.console import clipped, console, escape_control

    message = escape_control(clipped(error.format_message()))
    click.UsageError(message, getattr(error, "ctx", None)).show(console.file)
    return error.exit_code


def _open_closed() -> None:
    """Null devices in the place of closed streams: else a file that is opened later would take their descriptors, and
    be written to by whatever writes to these.
    """
    for descriptor in _DESCRIPTORS:
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest that is free: this one
            os.set_inheritable(descriptor, True)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, "w", encoding="utf-8", closefd=False))
    if sys.stdin is None:
        sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)


def _give_up_unwritten() -> None:
    """Send nowhere what cannot be written: else the interpreter complains at its end, and changes the exit code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)


def _warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> str:
    from pipeline.console import clipped, escape_control

    return f"warning: {escape_control(clipped(f'{category.__name__}: {message}'))}\n"


class _Record(logging.LogRecord):
    """A log record that shows control characters, line breaks excepted, as escapes."""

    def getMessage(self) -> str:
        from pipeline.console import escape_control

        return "\n".join(map(escape_control, super().getMessage().split("\n")))


def _record(*args: object, **kwargs: object) -> logging.LogRecord:
    return _Record(*args, **kwargs)  # type: ignore[arg-type]
