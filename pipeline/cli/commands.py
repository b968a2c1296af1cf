"""Commands and their options. Stages are imported when they run, so that `redpen --help` is fast."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from pipeline import __version__
from pipeline.cli import options
from pipeline.cli.options import FRACTION, POSITIVE, InOrder

if TYPE_CHECKING:
    from pipeline.config import Recipe


@click.group(cls=InOrder, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, message="%(prog)s %(version)s")
def cli() -> None:
    """On-policy distillation in two stages, with a cache on disk between them.

    \b
      redpen rollouts toy --cache toy.zarr               sample responses from the student
      redpen score    toy --cache toy.zarr               score them with student and teacher
      redpen diagnose toy.zarr                           check whether this pair can work
      redpen train    toy --cache toy.zarr --run runs/a  train the student, without the teacher
      redpen eval     runs/a                             measure the result
      redpen chat     runs/a                             talk to it, before and after training
      redpen report   runs/a                             write a page with a per-token view

    RECIPE is a TOML file or the name of a shipped recipe (`redpen recipes`). Every command can be stopped at any
    time; run the same command again to continue.
    """


@cli.command()
@options.with_recipe
@options.cache_option
@options.round_option
@options.launcher_options
@options.check_option
def rollouts(recipe: Recipe, cache_url: str, check: bool, round_index: int | None, **chosen: Any) -> int | None:
    """Stage one, sampling: the student answers every prompt.

    \b
    redpen rollouts toy --cache toy.zarr --set rollouts.rollouts_per_prompt=8
    """
    from pipeline.rollouts.finished import report_finished

    if not check and report_finished(recipe, cache_url, round_index):
        return 0
    from pipeline.rollouts import stage

    return stage.run(recipe, cache_url, round_index=round_index, **chosen)


@cli.command()
@options.with_recipe
@options.cache_option
@options.round_option
@options.launcher_options
@options.check_option
@click.option("--only", metavar="NAME", help="Score with one model: student, or a teacher's name.")
def score(
    recipe: Recipe, cache_url: str, check: bool, only: str | None, round_index: int | None, **chosen: Any
) -> int | None:
    """Stage one, scoring: student and teachers score every rollout.

    \b
    redpen score toy --cache toy.zarr --only teacher
    """
    from pipeline.score.finished import report_finished

    if not check and report_finished(recipe, cache_url, only, round_index):
        return 0
    from pipeline.score import stage

    return stage.run(recipe, cache_url, only=only, round_index=round_index, **chosen)


@cli.command()
@options.with_recipe
@options.cache_option
@options.round_option
@options.run_option("metrics, checkpoints and the adapter")
def train(recipe: Recipe, cache_url: str, round_index: int | None, run_dir: str) -> int | None:
    """Stage two: train the student on the cache.

    The teacher is not loaded and the cache is not changed: one cache serves any number of runs.

    \b
    redpen train toy --cache toy.zarr --run runs/rank8 --set train.lora_rank=8
    """
    from pipeline.train import stage

    return stage.run(recipe, cache_url, run_dir, round_index=round_index)


@cli.command()
@options.with_recipe
@options.cache_option
@options.run_option("the runs of all rounds, and the result")
def distill(recipe: Recipe, cache_url: str, run_dir: str) -> int | None:
    """Repeat sampling, scoring and training, round by round.

    Every round samples from the student of the round before. It ends when reverse KL on fresh rollouts is at most
    distill.stop_reverse_kl, when the metric stops improving, or after distill.rounds.

    \b
    redpen distill toy --cache rounds.zarr --run runs/rounds --set distill.rounds=3
    """
    from pipeline import distill as workflow

    return workflow.run(recipe, cache_url, run_dir)


@cli.command()
@options.with_recipe
@options.run_option("examples, metrics, checkpoints and the adapter")
@options.data_option
def sft(recipe: Recipe, run_dir: str, data: tuple[str, ...]) -> int | None:
    """Fine-tune the student on documents and chats.

    A line of a file holds a text (a document), messages that end with an assistant's message, or a prompt and a
    response.

    \b
    redpen sft my.toml --data documents.jsonl=0.7 --data chats.jsonl=0.3 --run runs/sft
    """
    from pipeline.sft import stage

    return stage.run(recipe, data, run_dir)


@cli.command()
@options.with_recipe
@options.cache_option
@options.run_option("the runs of all steps, and the result")
@options.data_option
def continual(recipe: Recipe, cache_url: str, run_dir: str, data: tuple[str, ...]) -> int | None:
    """Learn new knowledge and keep old behaviour: sft, then distillation from the original weights, then gates.

    Exits with 4 if a gate fails.

    \b
    redpen continual company --cache company.zarr --run runs/company
    """
    from pipeline import continual as workflow

    return workflow.run(recipe, cache_url, run_dir, data)


@cli.command("eval")
@click.argument("target", metavar="MODEL_OR_RUN")
@click.option("--prompts", metavar="FILE", help="Prompts with an answer; default: eval.path of the recipe.")
@click.option("--teacher", metavar="MODEL", help="Measure reverse KL to this teacher; default: the recipe's.")
@click.option("--tasks", metavar="NAME,...", help="Tasks of lm-evaluation-harness to add, e.g. ifeval,aime24.")
@click.option("--recipe", metavar="RECIPE", help="Settings and teacher for a bare model; a run has its recipe.")
@options.output_option(
    "--out", metavar="FILE", help="Where to write the figures, as JSON; default: eval.json in the run."
)
@options.set_option
def evaluate(target: str, tasks: str | None, **chosen: Any) -> int | None:
    """Measure accuracy on held-out prompts and reverse KL on fresh rollouts.

    \b
    redpen eval runs/a --teacher toy:teacher --set eval.limit=500
    """
    from pipeline.evaluate import stage

    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    return stage.run(target, tasks=names, **chosen)


@cli.command()
@click.argument("run")
@click.argument("prompt")
@options.set_option
def sample(run: str, prompt: str, overrides: tuple[str, ...]) -> int:
    """Print a response to a prompt, of the student before and after training.

    \b
    redpen sample runs/a "642+3*4=" --set rollouts.temperature=0
    """
    from pipeline import chat as workflow

    return workflow.sample(run, prompt, overrides)


@cli.command()
@click.argument("run")
@options.set_option
def chat(run: str, overrides: tuple[str, ...]) -> int:
    """Converse with the student of a run, before and after training.

    Every line is answered by both; each sees its own replies. Prompts and sampling are as in the recipe.

    \b
    redpen chat runs/a --set rollouts.temperature=0.7
    """
    from pipeline import chat as workflow

    return workflow.chat(run, overrides)


@cli.command()
@click.argument("target", metavar="RUN_OR_ADAPTER")
@options.output_option(
    "-o", "--output", required=True, metavar="DIR", help="Directory for the model; must be new or empty."
)
@click.option("--base", metavar="MODEL", help="The model to merge into; default: the one the adapter was trained on.")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    help="dtype of the merged weights; default: the base model's.",
)
def merge(target: str, output: str, base: str | None, dtype: str | None) -> int:
    """Merge an adapter into its base model.

    Weights are added in float32 and rounded once. The result loads without peft in transformers and vLLM, and can be
    a student.model.

    \b
    redpen merge runs/a -o merged --dtype bfloat16
    """
    from pipeline import merge as workflow

    return workflow.run(target, output, base=base, dtype=dtype)


@cli.command()
@click.argument("target", metavar="RUN_OR_MODEL_OR_CACHE")
@click.argument("hub_id", metavar="HUB_ID")
@click.option("--base", metavar="HUB_ID", help="The base model's name on the Hub, if it was a local directory.")
@click.option("--public", is_flag=True, help="Make a new repository that everybody can read; default: private.")
def push(target: str, hub_id: str, base: str | None, public: bool) -> int:
    """Publish a run's adapter or model, or a cache, on the Hub, with a card.

    A run goes with its recipe, curve and figures. A cache goes to a data set, from which others train.

    \b
    redpen push runs/a me/my-model
    redpen push toy.zarr hf://datasets/me/my-cache
    """
    if hub_id.startswith("hf:"):
        from pipeline.report import publish as of_cache

        if base is not None:
            raise click.UsageError("--base belongs to a model, and HUB_ID is a data set; leave it out")
        return of_cache.run(target, hub_id, public=public)
    from pipeline.models import push as publishing

    return publishing.run(target, hub_id, base=base, public=public)


@cli.command()
@click.argument("target", metavar="CACHE_OR_RUN")
@click.option(
    "--repair", is_flag=True, help="Invalidate bad blocks of a cache; the next run of a stage rewrites them."
)
def verify(target: str, repair: bool) -> int:
    """Check a cache or a run against its checksums.

    Of a cache, also checks that values are in their ranges; of a run, also its checkpoints and the runs inside it.
    Exits with 1 if something is wrong.

    \b
    redpen verify toy.zarr --repair
    """
    from pipeline.rounds import verify as cache
    from pipeline.runs import verify as run
    from pipeline.runs.files import is_run

    if not is_run(target):
        return cache.run(target, repair)
    if repair:
        raise click.UsageError(f"--repair needs a cache, and {target} is a run; `redpen verify {target}` checks it")
    return run.run(target)


@cli.command()
@options.cache_argument
@options.round_option
@click.option("--rollout", type=click.IntRange(0), metavar="N", help="Show one rollout, token by token.")
@click.option("--teacher", metavar="NAME", help="Teacher to show; default: all. With --json, one.")
@options.json_option
def inspect(cache_url: str, round_index: int | None, rollout: int | None, teacher: str | None, as_json: bool) -> None:
    """Show what a cache holds, or the tokens of a rollout that the teacher disagrees with.

    With R rollouts for each prompt, rollout N is sample N % R of prompt N // R.

    \b
    redpen inspect toy.zarr --rollout 17
    """
    from pipeline.report import terminal

    options.refuse_run(cache_url)
    terminal.run(cache_url, round_index, rollout, teacher, as_json)


@cli.command()
@options.cache_argument
@options.round_option
@click.option("--teacher", metavar="NAME", help="Teacher to check; default: all, side by side.")
@options.json_option
def diagnose(cache_url: str, round_index: int | None, teacher: str | None, as_json: bool) -> int:
    """Check before training whether a scored student and teacher can work together.

    Lists problems with student, teacher and rollouts, worst first, each with the setting to change. Exits with 1 if
    the pair cannot work.

    \b
    redpen diagnose toy.zarr
    """
    from pipeline.diagnose import stage

    options.refuse_run(cache_url)
    return stage.run(cache_url, round_index, teacher, as_json)


@cli.command()
@click.argument("targets", metavar="RUN_OR_CACHE...", nargs=-1, required=True)
@options.output_option(
    "-o", "--output", default="report.html", show_default=True, metavar="FILE", help="The page to write."
)
@options.round_option
@click.option("--recipe", metavar="RECIPE", help="Its [eval] decides which answers are right; default: the run's.")
@click.option(
    "--rollouts", type=click.IntRange(1), default=2000, show_default=True, metavar="N", help="Most rollouts to show."
)
def report(targets: tuple[str, ...], output: str, **chosen: Any) -> int:
    """Write a page with a per-token view of rollouts, scores and training.

    For runs it shows curves, rollouts before and after training, and their cache, or the one that is given. Several
    runs are compared in a table. The page is one file and needs no network.

    \b
    redpen report runs/a -o report.html
    """
    from pipeline.report import stage

    return stage.run(targets, output, **chosen)


@cli.command()
@options.with_recipe
@click.option("--gpu-memory", type=POSITIVE, default=24.0, show_default=True, metavar="GIB", help="Memory of a GPU.")
@click.option(
    "--gpus", type=click.IntRange(1, 1_000_000), default=1, show_default=True, metavar="N", help="Number of GPUs."
)
@click.option("--mean-prompt-tokens", type=POSITIVE, metavar="N", help="Default: the longest allowed.")
@click.option("--mean-response-tokens", type=POSITIVE, metavar="N", help="Default: the longest allowed.")
@click.option(
    "--device-tflops", type=POSITIVE, default=165.0, show_default=True, help="Peak bf16 TFLOP/s (RTX 4090)."
)
@click.option("--device-gbps", type=POSITIVE, default=1008.0, show_default=True, help="Memory bandwidth, GB/s.")
@click.option(
    "--utilisation",
    type=FRACTION,
    default=0.4,
    show_default=True,
    help="Fraction of the TFLOP/s that is reached.",
)
@options.json_option
def plan(
    recipe: Recipe,
    gpu_memory: float,
    gpus: int,
    device_tflops: float,
    device_gbps: float,
    utilisation: float,
    **chosen: Any,
) -> None:
    """Estimate memory, FLOPs, disk and time that a recipe takes.

    From the models' configs, and the prompts of teachers that read their own: no weights are downloaded or loaded.
    For each step, memory by part, whether it fits, and the largest micro-batch that does.

    \b
    redpen plan qwen3-8b-from-32b --gpu-memory 24 --mean-response-tokens 900
    """
    from pipeline import plan

    device = plan.Device(gib=gpu_memory, gpus=gpus, tflops=device_tflops, gbps=device_gbps, utilisation=utilisation)
    plan.run(recipe, device, **chosen)


@cli.command("import")
@click.argument("file", metavar="FILE")
@options.with_recipe
@options.cache_option
@options.round_option
@click.option("--teacher", metavar="NAME", help="Teacher of the log-probs in FILE; default: the only one in RECIPE.")
def import_(recipe: Recipe, file: str, cache_url: str, **chosen: Any) -> int | None:
    """Import finished rollouts from a file, as a round.

    FILE is Parquet or JSONL, one rollout a row: prompt or messages, response_tokens (ids), and optionally
    rollout_logprobs, teacher_log_probs, loss_mask, finish_reason; files of Lightning-OPD need no conversion. A row
    may also be a finished conversation: messages with tool calls or without, of which the assistant's are trained,
    and a line an episode in the traces.jsonl of the library verifiers.
    RECIPE names the student that sampled them. Columns that FILE lacks remain to be scored. A file of `redpen
    export-cache` is restored whole, scores included.

    \b
    redpen import rollouts.parquet my.toml --cache my.zarr
    """
    from pipeline.interchange import importing

    return importing.run(file, recipe, cache_url, **chosen)


@cli.command("export-cache")
@options.cache_argument
@options.output_option(
    "-o", "--output", required=True, metavar="DIR_OR_FILE", help="A .parquet file, or a directory for it."
)
@options.round_option
def export_cache(cache_url: str, output: str, round_index: int | None) -> int:
    """Export a round to Parquet, one rollout a row.

    `datasets`, pandas and DuckDB load it; scores that are missing are null.

    \b
    redpen export-cache toy.zarr -o toy.parquet
    """
    from pipeline.interchange import exporting

    options.refuse_run(cache_url)
    return exporting.run(cache_url, output, round_index=round_index)


@cli.command()
@options.json_option
def doctor(as_json: bool) -> int:
    """Show what this machine has, and which shipped recipes fit it.

    Python, torch, cards and their memory, disk, packages and extras, whether the Hub answers. Add the output to a bug
    report.

    \b
    redpen doctor --json
    """
    from pipeline import doctor as examination

    return examination.run(as_json)
