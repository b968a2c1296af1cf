"""The `redpen` command: arguments, and what every error becomes. Stages are imported when they run.

Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 the data or the recipe is wrong (one line),
2 usage, 3 the cache is stale, 4 a gate does not hold, 128 + n stopped by signal n. A traceback means a bug.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pipeline import credentials, output
from pipeline.distributed.signals import defer_to_main_process, interruptible
from pipeline.environment import ENVIRONMENT, RANK
from pipeline.errors import ConfigError, Interrupted, user_message

if TYPE_CHECKING:
    from pipeline.config import Recipe
    from pipeline.distributed.ranks import Launcher

_F = TypeVar("_F", bound=Callable[..., Any])


def main(args: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels that it can do without
    with output.of_a_command():
        return _run(list(sys.argv[1:] if args is None else args))


def _run(args: list[str]) -> int:
    try:
        with interruptible():
            for name, text in credentials.in_arguments(args):
                raise ConfigError(f"{name}: {credentials.message(text, name)}")
            code = cli.main(args, prog_name="redpen", standalone_mode=False)
            output.flush()  # a closed pipe or a full disk shows here, not in the interpreter's shutdown
        return code or 0
    except click.ClickException as error:
        if RANK:
            defer_to_main_process()
        return output.show_usage(error)
    except click.Abort as error:  # click's word for an EOFError
        raise error.__cause__ or error from None
    except Interrupted as error:
        return error.exit_code if RANK else _fail(str(error), error.exit_code)
    except BrokenPipeError:
        return 1
    except Exception as error:
        if (line := user_message(error)) is None:
            raise
        return _fail(line, 1)


def _fail(line: str, code: int) -> int:
    from pipeline.console import fail

    if RANK:
        defer_to_main_process()
    fail(line)
    return code


def _show(line: str) -> None:
    from pipeline.console import show

    show(line)


class _InOrder(click.Group):
    """Lists commands in the order of the work rather than of the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def _version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            _show(f"redpen {version('redpen')}")
        except PackageNotFoundError:
            _show("redpen, not installed (run from its source)")
        ctx.exit()


@click.group(cls=_InOrder, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version."
)
def cli() -> None:
    """On-policy distillation in two phases that meet in a cache on disk.

    \b
      redpen rollouts toy --cache toy.zarr               the student writes
      redpen score    toy --cache toy.zarr               student and teacher read what it wrote
      redpen diagnose toy.zarr                           whether this pair will work
      redpen train    toy --cache toy.zarr --run runs/a  the student learns, the teacher is no longer needed
      redpen eval     runs/a                             what it gained
      redpen report   runs/a                             where: a page to look at

    RECIPE is a TOML file or a shipped recipe (`redpen recipes`). Every command can be stopped at any time; the same
    command continues.
    """


# ----------------------------------------------------------------------------------------------------------- options


def _unless_dry_run(ctx: click.Context, param: click.Parameter, value: str | None) -> str:
    """A dry run needs neither cache nor run directory; everything else does."""
    if value is None and not ctx.params.get("dry_run"):
        raise click.MissingParameter(ctx=ctx, param=param)
    return value or ""


def _recipe_options(command: _F) -> _F:
    return _round_option(_recipe_and_cache(command))


def _recipe_and_cache(command: _F) -> _F:
    for option in (
        click.option(
            "--dry-run",
            is_flag=True,
            is_eager=True,
            help="Print the resolved recipe, every setting explained, and stop.",
        ),
        _set_option,
        click.option(
            "--cache",
            "cache_url",
            metavar="URL",
            callback=_unless_dry_run,
            help="The cache: a directory, or s3://BUCKET/NAME. [required]",
        ),
        click.argument("recipe", metavar="RECIPE"),
    ):
        command = option(command)
    return command


_set_option = click.option(
    "--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Override a setting; repeatable."
)
_POSITIVE = click.FloatRange(0, min_open=True)
_round_option = click.option(
    "--round", "round_index", type=click.IntRange(0), metavar="N", help="Round of the cache; default: the latest."
)


def _worker_options(command: _F) -> _F:
    for option in (
        click.option(
            "--workers",
            "n_workers",
            type=click.IntRange(1),
            metavar="N",
            callback=_with_launcher,
            help="Ray's workers; default: one a GPU, or one a machine without any.",
        ),
        click.option(
            "--launcher",
            type=click.Choice(["ray"]),
            is_eager=True,
            help="Do the blocks on a Ray cluster: RAY_ADDRESS, or one of this machine. Default: this process, or "
            "torchrun's.",
        ),
    ):
        command = option(command)
    return command


def _with_launcher(ctx: click.Context, param: click.Parameter, value: int | None) -> int | None:
    if value is not None and not ctx.params.get("launcher"):
        raise click.UsageError("--workers goes with --launcher ray; torchrun has --nproc-per-node", ctx)
    return value


def _resolve(recipe: str, overrides: Sequence[str], dry_run: bool) -> Recipe | None:
    """The checked recipe, its warnings said; None after a dry run."""
    from pipeline.config import load_recipe
    from pipeline.console import warn

    resolved = load_recipe(recipe, overrides)
    for line in resolved.warnings():
        warn(line)
    if not dry_run:
        return resolved
    for line in resolved.to_toml(explained=True).splitlines():
        _show(line)
    return None


# ---------------------------------------------------------------------------------------------------------- commands


@cli.command()
@_recipe_options
@_worker_options
def rollouts(
    recipe: str,
    overrides: tuple[str, ...],
    dry_run: bool,
    cache_url: str,
    round_index: int | None,
    launcher: Launcher,
    n_workers: int | None,
) -> int | None:
    """Stage one, sampling: the student answers every prompt.

    \b
    redpen rollouts toy --cache toy.zarr --set rollouts.rollouts_per_prompt=8
    """
    resolved = _resolve(recipe, overrides, dry_run)
    if resolved is None:
        return None
    from pipeline.rollouts import stage

    return stage.run(resolved, cache_url, round_index=round_index, launcher=launcher, n_workers=n_workers)


@cli.command()
@_recipe_options
@_worker_options
@click.option("--only", metavar="NAME", help="Only this scorer: student, or a teacher's name.")
def score(
    recipe: str,
    overrides: tuple[str, ...],
    dry_run: bool,
    cache_url: str,
    round_index: int | None,
    only: str | None,
    launcher: Launcher,
    n_workers: int | None,
) -> int | None:
    """Stage one, scoring: student and teachers read every rollout.

    \b
    redpen score toy --cache toy.zarr --only teacher
    """
    resolved = _resolve(recipe, overrides, dry_run)
    if resolved is None:
        return None
    from pipeline.score import stage

    return stage.run(resolved, cache_url, only, round_index=round_index, launcher=launcher, n_workers=n_workers)


@cli.command()
@_recipe_options
@click.option(
    "--run",
    "run_dir",
    metavar="DIR",
    callback=_unless_dry_run,
    help="Where metrics, checkpoints and the adapter go. [required]",
)
def train(
    recipe: str,
    overrides: tuple[str, ...],
    dry_run: bool,
    cache_url: str,
    round_index: int | None,
    run_dir: str,
) -> int | None:
    """Stage two: train the student on the cache.

    The teacher is not loaded, and the cache not changed: train as often as you like.

    \b
    redpen train toy --cache toy.zarr --run runs/rank8 --set train.lora_rank=8
    """
    resolved = _resolve(recipe, overrides, dry_run)
    if resolved is None:
        return None
    from pipeline.train import stage

    return stage.run(resolved, cache_url, run_dir, round_index=round_index)


@cli.command()
@_recipe_and_cache
@click.option(
    "--run",
    "run_dir",
    metavar="DIR",
    callback=_unless_dry_run,
    help="Where every round's run, and the result, go. [required]",
)
def distill(
    recipe: str,
    overrides: tuple[str, ...],
    dry_run: bool,
    cache_url: str,
    run_dir: str,
) -> int | None:
    """Rounds of rollouts, scores and training.

    Every round samples from the student that the one before made, until its fresh rollouts are the teacher's, the
    metric no longer rises, or after distill.rounds.

    \b
    redpen distill toy --cache rounds.zarr --run runs/rounds --set distill.rounds=3
    """
    resolved = _resolve(recipe, overrides, dry_run)
    if resolved is None:
        return None
    from pipeline import distill as distilling

    return distilling.run(resolved, cache_url, run_dir)


@cli.command()
@click.option(
    "--dry-run", is_flag=True, is_eager=True, help="Print the resolved recipe, every setting explained, and stop."
)
@_set_option
@click.option(
    "--run",
    "run_dir",
    metavar="DIR",
    callback=_unless_dry_run,
    help="Where the examples, metrics, checkpoints and the adapter go. [required]",
)
@click.option(
    "--data",
    multiple=True,
    metavar="FILE[=SHARE]",
    help="Documents and chats (JSONL, Parquet), several mixed by shares of the tokens; default: sft.data.",
)
@click.argument("recipe", metavar="RECIPE")
def sft(recipe: str, data: tuple[str, ...], run_dir: str, overrides: tuple[str, ...], dry_run: bool) -> int | None:
    """New knowledge: fine-tune the student on documents and chats.

    A line holds a text (a document), messages that end with the assistant's, or a prompt and a response.

    \b
    redpen sft my.toml --data documents.jsonl=0.7 --data chats.jsonl=0.3 --run runs/sft
    """
    resolved = _resolve(recipe, overrides, dry_run)
    if resolved is None:
        return None
    from pipeline.sft import stage

    return stage.run(resolved, data, run_dir)


@cli.command()
@_recipe_and_cache
@click.option("--run", "run_dir", metavar="DIR", callback=_unless_dry_run, help="Where all of it goes. [required]")
@click.option(
    "--data",
    multiple=True,
    metavar="FILE[=SHARE]",
    help="Documents and chats (JSONL, Parquet), several mixed by shares of the tokens; default: sft.data.",
)
def continual(
    recipe: str,
    data: tuple[str, ...],
    overrides: tuple[str, ...],
    dry_run: bool,
    cache_url: str,
    run_dir: str,
) -> int | None:
    """New knowledge, old behaviour: sft, distillation from the weights as they were, and a gate.

    Exits with 4 where an evaluation of the gate does not hold.

    \b
    redpen continual company --cache company.zarr --run runs/company
    """
    resolved = _resolve(recipe, overrides, dry_run)
    if resolved is None:
        return None
    from pipeline import continual as learning

    return learning.run(resolved, cache_url, run_dir, data)


@cli.command("eval")
@click.argument("target", metavar="MODEL_OR_RUN")
@click.option("--prompts", metavar="FILE", help="Prompts with an answer; default: eval.path of the recipe.")
@click.option("--teacher", metavar="MODEL", help="Reverse KL to this teacher; default: the run's.")
@click.option("--tasks", metavar="NAME,...", help="Also these tasks of lm-evaluation-harness, e.g. ifeval,aime24.")
@click.option("--recipe", metavar="RECIPE", help="Settings for a bare model; a run brings its own.")
@click.option("--out", metavar="FILE", help="The figures as JSON; default: eval.json in the run.")
@_set_option
def evaluate(
    target: str,
    prompts: str | None,
    teacher: str | None,
    tasks: str | None,
    recipe: str | None,
    out: str | None,
    overrides: tuple[str, ...],
) -> int | None:
    """Accuracy on held-out prompts, reverse KL on fresh rollouts.

    \b
    redpen eval runs/a --teacher toy:teacher --set eval.limit=500
    """
    from pipeline.evaluate import stage

    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    return stage.run(
        target, prompts=prompts, teacher=teacher, tasks=names, overrides=overrides, recipe=recipe, out=out
    )


@cli.command()
@click.argument("target", metavar="RUN_OR_ADAPTER")
@click.option("-o", "--output", required=True, metavar="DIR", help="Where the model goes; must be new or empty.")
@click.option("--base", metavar="MODEL", help="What the adapter goes on; default: what it was trained on.")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    help="Type of the merged weights; default: the base model's.",
)
def merge(target: str, output: str, base: str | None, dtype: str | None) -> int:
    """An adapter and its base as one model.

    Every weight is added up in float32 and rounded once. The result needs no peft: transformers and vLLM load it, and
    so does student.model.

    \b
    redpen merge runs/a -o merged --dtype bfloat16
    """
    from pipeline import merge as merging

    return merging.run(target, output, base=base, dtype=dtype)


@cli.command()
@click.argument("cache_url", metavar="CACHE_OR_RUN")
@click.option("--repair", is_flag=True, help="Take back the bad blocks of a cache, and only those.")
def verify(cache_url: str, repair: bool) -> int:
    """Recompute every checksum of a cache or of a run.

    Also checks that the values mean something. Exits with 1 if something is wrong. A repaired block is written again
    by the next run of its stage. Of a run it checks what it ended with, its checkpoints, and the runs within it.

    \b
    redpen verify toy.zarr --repair
    """
    import contextlib

    import cache_schema as cs
    from pipeline.console import progress, show
    from pipeline.runs.files import is_run

    if is_run(cache_url):
        if repair:
            raise click.UsageError(f"--repair is for caches, and {cache_url} is a run: see what `redpen verify` says")
        from pipeline.runs import verify as verify_run

        return verify_run.run(cache_url)
    cache = cs.open(cache_url, writable=repair)
    with cache.lock("redpen verify --repair") if repair else contextlib.nullcontext():
        groups = cs.block_groups(cache)
        with progress("verify", sum(group.n_blocks for group in groups)) as bar:
            findings = list(cs.verify(cache, progress=bar.advance))
        for finding in findings:
            show(str(finding))
        repaired = cs.repair(cache, findings) if repair else 0
    if not findings:
        total = sum(group.n_blocks for group in groups)
        committed = sum(int(group.committed().sum()) for group in groups)
        show(f"{cache_url}: {committed} of {total} blocks are committed, nothing wrong with them")
        return 0
    beyond = sum(finding.block is None for finding in findings)
    if repair:
        show(f"taken back: {repaired} of the blocks; run the same stages again to write them")
        if beyond:
            show(f"beyond repair: {beyond} of the findings; restore the cache from a copy, or make another")
    else:
        show(f"findings: {len(findings)}; `redpen verify {cache_url} --repair` takes the bad blocks back")
    return 1 if beyond or not repair else 0


@cli.command()
@click.argument("cache_url", metavar="CACHE")
@_round_option
@click.option("--rollout", type=click.IntRange(0), metavar="N", help="One rollout, token by token.")
@click.option("--teacher", metavar="NAME", help="Whose red pen to show; default: each teacher's. --json takes one.")
@click.option("--json", "as_json", is_flag=True, help="The same as JSON.")
def inspect(cache_url: str, round_index: int | None, rollout: int | None, teacher: str | None, as_json: bool) -> None:
    """What a cache holds, or one rollout under the red pen.

    A rollout is shown with the tokens marked at which the teacher disagrees. With R rollouts a prompt, rollout N is
    sample N % R of prompt N // R.

    \b
    redpen inspect toy.zarr --rollout 17
    """
    from pipeline.report import terminal

    terminal.run(cache_url, round_index, rollout, teacher, as_json)


@cli.command()
@click.argument("cache_url", metavar="CACHE")
@_round_option
@click.option("--teacher", metavar="NAME", help="Only this teacher; default: all, side by side.")
@click.option("--json", "as_json", is_flag=True, help="The same as JSON.")
def diagnose(cache_url: str, round_index: int | None, teacher: str | None, as_json: bool) -> int:
    """Whether a scored pair will work, before any training.

    What is wrong with student, teacher and rollouts, worst first, with the setting that answers it. Exits with 1 if
    a pair cannot work as it is.

    \b
    redpen diagnose toy.zarr
    """
    from pipeline.diagnose import stage

    return stage.run(cache_url, round_index, teacher, as_json)


@cli.command()
@click.argument("targets", metavar="RUN_OR_CACHE...", nargs=-1, required=True)
@click.option("-o", "--output", default="report.html", show_default=True, metavar="FILE", help="Where the page goes.")
@_round_option
@click.option("--recipe", metavar="RECIPE", help="Its [eval] says which answers are right; a run brings its own.")
@click.option(
    "--rollouts", type=click.IntRange(1), default=2000, show_default=True, metavar="N", help="To show at most."
)
def report(targets: tuple[str, ...], output: str, round_index: int | None, recipe: str | None, rollouts: int) -> int:
    """A page to look at: every token under the red pen.

    Of runs it shows curves, the same rollouts before and after training, and the cache they learned from, or the one
    that is given. Several runs are also compared in a table. The page is one file that needs no network.

    \b
    redpen report runs/a -o report.html
    """
    from pipeline.report import stage

    return stage.run(targets, output, round_index=round_index, recipe=recipe, rollouts=rollouts)


@cli.command()
@click.argument("recipe", metavar="RECIPE")
@_set_option
@click.option("--gpu-memory", type=_POSITIVE, default=24.0, show_default=True, metavar="GIB", help="Of a card.")
@click.option("--gpus", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="How many cards.")
@click.option("--mean-prompt-tokens", type=_POSITIVE, metavar="N", help="Default: the longest allowed.")
@click.option("--mean-response-tokens", type=_POSITIVE, metavar="N", help="Default: the longest allowed.")
@click.option(
    "--device-tflops", type=_POSITIVE, default=165.0, show_default=True, help="Of bf16 products; an RTX 4090's."
)
@click.option("--device-gbps", type=_POSITIVE, default=1008.0, show_default=True, help="GB/s of the card's memory.")
@click.option(
    "--utilisation",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.4,
    show_default=True,
    help="Share of the TFLOP/s that is reached.",
)
@click.option("--json", "as_json", is_flag=True, help="The same as JSON, in bytes and seconds.")
def plan(
    recipe: str,
    overrides: tuple[str, ...],
    gpu_memory: float,
    gpus: int,
    mean_prompt_tokens: float | None,
    mean_response_tokens: float | None,
    device_tflops: float,
    device_gbps: float,
    utilisation: float,
    as_json: bool,
) -> None:
    """What a recipe will take: memory, FLOPs, bytes, time.

    From the models' configs alone: no weights are read or downloaded. Memory is by part, for each step, with a
    verdict and the largest micro-batch that fits.

    \b
    redpen plan qwen3-8b-from-32b --gpu-memory 24 --mean-response-tokens 900
    """
    resolved = _resolve(recipe, overrides, False)
    assert resolved is not None
    from pipeline import plan

    device = plan.Device(gib=gpu_memory, gpus=gpus, tflops=device_tflops, gbps=device_gbps, utilisation=utilisation)
    plan.run(
        resolved,
        device,
        mean_prompt_tokens=mean_prompt_tokens,
        mean_response_tokens=mean_response_tokens,
        as_json=as_json,
    )


@cli.command("import")
@click.argument("file", metavar="FILE")
@_recipe_options
@click.option("--teacher", metavar="NAME", help="Whose log-probs FILE holds; default: the recipe's only teacher's.")
def import_(
    file: str,
    recipe: str,
    overrides: tuple[str, ...],
    dry_run: bool,
    cache_url: str,
    round_index: int | None,
    teacher: str | None,
) -> int | None:
    """Finished rollouts from a file, as a round.

    FILE is Parquet or JSONL, one rollout a row: prompt or messages, response_tokens (ids), and perhaps
    rollout_logprobs, teacher_log_probs, loss_mask, finish_reason; Lightning-OPD's files are read as they are. RECIPE
    names the student that wrote them. What FILE does not tell stays unscored.

    \b
    redpen import rollouts.parquet my.toml --cache my.zarr
    """
    resolved = _resolve(recipe, overrides, dry_run)
    if resolved is None:
        return None
    from pipeline.interchange import importing

    return importing.run(file, resolved, cache_url, teacher=teacher, round_index=round_index)


@cli.command("export-cache")
@click.argument("cache_url", metavar="CACHE")
@click.option(
    "-o", "--output", required=True, metavar="DIR_OR_FILE", help="A name in .parquet, or a directory for one."
)
@_round_option
def export_cache(cache_url: str, output: str, round_index: int | None) -> int:
    """A round as Parquet, one rollout a row.

    `datasets`, pandas and DuckDB load it; what is not scored is null.

    \b
    redpen export-cache toy.zarr -o toy.parquet
    """
    from pipeline.interchange import exporting

    return exporting.run(cache_url, output, round_index=round_index)


@cli.group(cls=_InOrder, invoke_without_command=True)
@click.pass_context
def recipes(ctx: click.Context) -> None:
    """The shipped recipes.

    \b
    redpen recipes show toy > my.toml
    """
    if ctx.invoked_subcommand is None:
        from pipeline.config import recipe_names, recipe_text

        width = max(len(name) for name in recipe_names())
        for name in recipe_names():
            _show(f"{name:{width}}  {recipe_text(name).splitlines()[0].lstrip('# ')}")


@recipes.command()
@click.argument("name")
def show(name: str) -> None:
    """Print a shipped recipe, comments included."""
    from pipeline.config import recipe_text

    for line in recipe_text(name).splitlines():
        _show(line)
