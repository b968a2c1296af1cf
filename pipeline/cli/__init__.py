"""The `redpen` command: exit codes, and one line for every error.

Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 the data or the recipe is wrong (one line),
2 usage, 3 the cache is stale, 4 a gate of `redpen continual` failed, 128 + n stopped by signal n. A traceback is a
bug.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

import click

from pipeline import credentials
from pipeline.cli import streams
from pipeline.cli.commands import cli
from pipeline.cli.recipes import recipes
from pipeline.distributed.signals import defer_to_main_process, interruptible
from pipeline.environment import RANK
from pipeline.errors import ConfigError, Interrupted, one_line, user_message

__all__ = ["cli", "main"]

cli.add_command(recipes)


def main(args: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of optional kernels
    with streams.command_streams():
        return _run(list(sys.argv[1:] if args is None else args))


def _run(args: list[str]) -> int:
    try:
        with interruptible():
            for name, text in credentials.in_arguments(args):
                raise ConfigError(f"{name}: {credentials.message(text, name)}")
            if any("\0" in arg for arg in args):
                raise ConfigError("an argument has a NUL character, which neither a path nor a setting can have")
            code = cli.main(args, prog_name="redpen", standalone_mode=False)
            streams.flush()  # a closed pipe or a full disk is found here, not at the interpreter's exit
        return code or 0
    except click.ClickException as error:
        if RANK:
            defer_to_main_process()
        return streams.show_usage(error)
    except click.Abort as error:  # click raises it for EOFError
        raise error.__cause__ or error from None
    except Interrupted as error:
        return error.exit_code if RANK else _fail(str(error), error.exit_code)
    except BrokenPipeError:
        return 1
    except Exception as error:
        if (line := user_message(error)) is None:
            raise
        return _fail(line, 1)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of the tokenizers library (Rust), which is not an Exception
            raise
        return _fail(f"a model's tokenizer.json cannot be used: {one_line(error)}; choose another model", 1)


def _fail(line: str, code: int) -> int:
    from pipeline.console import fail

    if RANK:
        defer_to_main_process()
    fail(line)
    return code
