"""Options that several commands share."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

Command = Callable[..., Any]

#: Sections whose warnings a command shows, so that stages of one recipe do not repeat them; other commands show all.
_WARNED_OF = {
    "rollouts": ("student", "teacher", "prompts", "rollouts", "vllm", "eval"),
    "score": ("score",),
    "train": ("train", "reward", "select"),
}


class _Finite(click.FloatRange):
    """A range without NaN, which is within every range by comparison, and infinity."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"expected a finite number, got {value}", param, ctx)
        return number


POSITIVE = _Finite(0, min_open=True)
FRACTION = _Finite(0, 1, min_open=True)


class InOrder(click.Group):
    """A group that lists its commands in the order of definition, which is that of the work."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def output_option(*names: str, **settings: Any) -> Callable[[Command], Command]:
    """An option for a file or directory to write."""
    return click.option(*names, callback=_local_path, **settings)


def _local_path(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Refuse a URL, which would become directories such as `s3:/bucket` here."""
    if value is not None and re.match(r"(?i)[a-z][a-z0-9+.-]*://", value):
        raise click.BadParameter(f"expected a local path, got the URL {value}", ctx, param)
    return value


def run_option(contents: str) -> Callable[[Command], Command]:
    help = f"Directory for {contents}; default: runs/NAME, of the recipe."
    return click.option("--run", "run_dir", metavar="DIR", callback=_run_directory, help=help)


def _run_directory(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    return _local_path(ctx, param, _not_empty(ctx, param, value))


def _not_empty(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value == "":
        raise click.BadParameter("expected a directory, got an empty text", ctx, param)
    return value


cache_option = click.option(
    "--cache",
    "cache_url",
    metavar="URL",
    callback=_not_empty,
    help="The cache: a directory, s3://BUCKET/NAME, or hf://datasets/OWNER/NAME to read; default: cache/NAME.zarr, "
    "of the recipe.",
)
cache_argument = click.argument("cache_url", metavar="CACHE")
round_option = click.option(
    "--round", "round_index", type=click.IntRange(0), metavar="N", help="Round of the cache; default: the latest."
)
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Override a setting; repeatable."
)
data_option = click.option(
    "--data",
    multiple=True,
    metavar="FILE[=SHARE]",
    help="Documents and chats (JSONL, Parquet), mixed by their shares of the tokens; repeatable; default: sft.data.",
)
check_option = click.option(
    "--check", is_flag=True, help="Take the digests of models and prompts again, even if their files look unchanged."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the same as JSON.")


def launcher_options(command: Command) -> Command:
    launcher = click.option(
        "--launcher",
        type=click.Choice(["ray"]),
        is_eager=True,
        help="Distribute blocks over a Ray cluster: RAY_ADDRESS, or a local one. Default: this process, or "
        "torchrun's.",
    )
    workers = click.option(
        "--workers",
        "n_workers",
        type=click.IntRange(1),
        metavar="N",
        callback=_only_with_launcher,
        help="Number of Ray workers; default: one for each GPU, or for each machine without GPUs.",
    )
    return launcher(workers(command))


def _only_with_launcher(ctx: click.Context, param: click.Parameter, value: int | None) -> int | None:
    if value is not None and not ctx.params.get("launcher"):
        raise click.UsageError("--workers needs --launcher ray; for torchrun, use its --nproc-per-node", ctx)
    return value


def with_recipe(command: Command) -> Command:
    """Add RECIPE, --set and --dry-run. The command gets the checked recipe, and does not run in a dry run."""

    @functools.wraps(command)
    def run(recipe: str, overrides: Sequence[str], dry_run: bool, **options: Any) -> Any:
        from pipeline.config import load_recipe
        from pipeline.console import warn

        resolved = load_recipe(recipe, overrides)
        sections = None if dry_run else _WARNED_OF.get(command.__name__)
        for line in resolved.warnings():
            if sections is None or line.partition(".")[0] in sections:
                warn(line)
        if dry_run:
            return show_lines(resolved.to_toml(explained=True))
        name = Path(recipe).stem
        for option, default in (("cache_url", f"cache/{name}.zarr"), ("run_dir", f"runs/{name}")):
            if option in options and options[option] is None:
                options[option] = default
        return command(resolved, **options)

    dry_run = "Print the resolved recipe, every setting explained, and stop."
    run = click.option("--dry-run", is_flag=True, is_eager=True, help=dry_run)(run)
    return click.argument("recipe", metavar="RECIPE")(set_option(run))


def refuse_run(cache_url: str) -> None:
    """Raise `RedpenError` if a run is given in place of a cache."""
    from pipeline.errors import RedpenError
    from pipeline.runs.files import is_run, read_record

    if is_run(cache_url):
        record = read_record(Path(cache_url))
        learned = "" if record is None or not record.cache.get("url") else f"; it learned from {record.cache['url']}"
        raise RedpenError(
            f"{cache_url} is a run, expected a cache{learned}; `redpen report {cache_url}` shows the run"
        )


def show_lines(text: str) -> None:
    """Print text as results on stdout."""
    from pipeline.console import show

    for line in text.splitlines():
        show(line)
