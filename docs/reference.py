"""Write docs/cli.md and docs/recipe.md from the command line and the settings themselves.

    make docs        (or: python docs/reference.py)

tests/test_docs.py fails while the pages are older than what they are made from.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click

from pipeline.cli import cli
from pipeline.config import Recipe
from pipeline.config.schema import Described, described
from pipeline.config.toml import toml_value

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 110

CLI = """# The command line

Written by `make docs` from the commands themselves. Settings that change results are in the [recipe](recipe.md);
options say where to read and write, and how much. Results go to stdout, everything else to stderr.

| exit code | means |
|---|---|
| 0 | done |
| 1 | an error in one line, about the data, the recipe or the machine ([messages](operations.md#error-messages)) |
| 1 | also if `verify` finds damage, or `diagnose` finds that a pair cannot work |
| 2 | usage: an unknown command or option |
| 3 | `train`: the cache is stale, sample a new round ([when training ends](stage-two.md#when-training-ends)) |
| 4 | `continual`: a gate does not hold ([gates](continual.md#gates)) |
| 128 + n | stopped by signal n: 130 Ctrl-C, 143 SIGTERM. The same command continues |

A traceback is a bug of redpen. Under `torchrun` the exit code is torchrun's own, 1 for any failure.

`make` runs the same commands in its own environment, `.venv`:

| target | does |
|---|---|
"""

RECIPE = """# The recipe

Written by `make docs` from the settings themselves. A recipe is a TOML file with one table for each section;
`[student]`, `[teacher]` and `[prompts]` are required, everything else has a default. For several teachers, write
several `[[teacher]]` tables with names. `redpen recipes` lists the shipped recipes, `redpen recipes show NAME` prints
one to start from, and `redpen rollouts RECIPE --dry-run` prints a recipe with every setting resolved and explained.

On the command line `--set section.key=value` overrides a setting; the option can be repeated. The value is TOML; if
it is not valid TOML, it is taken as text. An empty value restores the default. `--set teacher.NAME.key=value` is for
one of several teachers. Unknown settings, values of another type and values out of bounds are errors, in one line.
"""


def pages() -> dict[str, str]:
    """The generated pages: file name within docs/, and text."""
    return {"cli.md": _cli_page(), "recipe.md": _recipe_page()}


def _cli_page() -> str:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    rows = [f"| `make {name}` | {does} |" for name, does in re.findall(r"^([a-z-]+):.*?## (.*)$", makefile, re.M)]
    variables = "".join(re.findall(r"echo '  (with .*)'", makefile))
    targets = "\n".join(rows) + f"\n\n```text\n{variables}\n```\n"
    return CLI + targets + "".join(_commands(cli, click.Context(cli, info_name="redpen", **cli.context_settings)))


def _commands(command: click.Command, context: click.Context) -> Iterator[str]:
    """The help of a command, as a terminal of WIDTH columns shows it, then of those below it."""
    context.terminal_width = WIDTH
    yield f"\n## {context.command_path}\n\n```text\n{command.get_help(context)}\n```\n"
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            yield from _commands(below, click.Context(below, parent=context, info_name=name))


def _recipe_page() -> str:
    header = "| setting | default | accepts | meaning |\n|---|---|---|---|\n"
    sections = [
        f"\n## [{name}]\n\n{' '.join(purpose.split())}\n\n{header}{''.join(map(_row, settings))}"
        for name, purpose, settings in described(Recipe)
    ]
    return RECIPE + "".join(sections)


def _row(setting: Described) -> str:
    default = "" if setting.default is None else f"`{toml_value(setting.default)}`"
    default = "required" if setting.is_required else default
    cells = [f"`{setting.key}`", default, setting.accepts, setting.meaning]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"


if __name__ == "__main__":
    for name, text in pages().items():
        (ROOT / "docs" / name).write_text(text, encoding="utf-8")
