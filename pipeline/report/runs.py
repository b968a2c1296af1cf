"""Runs as plain records for the report, and a table that compares them.

A record is made of the files that `redpen train` and `redpen eval` leave in a run. It serves while a run still
trains, and after something has happened to it: a file that cannot be read is left out with a warning.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import BaseModel, Field
from rich.table import Table
from rich.text import Text

from pipeline.console import escape_control, results, warn
from pipeline.credentials import masked
from pipeline.errors import RedpenError
from pipeline.files import parse_model, read_json, read_text
from pipeline.report.charts import thin
from pipeline.runs.files import (
    EVAL_FIGURES,
    LEDGER,
    MARKERS,
    METRICS,
    RECIPE,
    Record,
    check,
    is_run,
    parse_step,
    read_lines,
    read_record,
)

_T = TypeVar("_T")

#: Curves by name: a step's value from its line in metrics.jsonl. A step that has none is left out.
CURVES: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "reverse_kl": lambda line: line["reverse_kl"],
    "heldout_accuracy": lambda line: line["heldout_accuracy"],
    "heldout_format": lambda line: line["heldout_format"],
    "heldout_reverse_kl": lambda line: line["heldout_reverse_kl"],
    "ess": lambda line: line["ess"],
    "ratio_max": lambda line: line["ratio_max"],
    "response_tokens": lambda line: line["tokens"] / line["rows"],
    "entropy": lambda line: line["entropy"],
    "loss": lambda line: line["loss"],
    "grad_norm": lambda line: line["grad_norm"],
    "lr": lambda line: line["lr"],
    "tokens_per_second": lambda line: line["time"]["tokens_per_second"],
}

MEASURES = {
    "greedy": "greedy accuracy",
    "sampled": "sampled accuracy",
    "format": "legal format",
    "reverse_kl": "fresh reverse KL",
}
_NAME_WIDTH, _RUN_WIDTH, _GAP = 24, 23, 2  # three runs in 100 columns


def read_run(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a run's files tell, as JSON-able data.

    name, sentence and exit_code (None while it has not ended), recipe by dotted setting, curves by name as
    [[step, value], ...] of 400 points at most, figures (see `_figures`), ledger and eval as they are on disk, card
    (pairs of text), differs (see `differing`; empty for a run alone), notes (sentences on what was left out).

    Raises `RedpenError` where `path` is no run.
    """
    directory = Path(path)
    if not is_run(directory):
        raise RedpenError(
            f"run {path}: expected a directory that `redpen train` made, with one of {', '.join(MARKERS)}"
        )
    files = _Files(directory)
    result, cache = files.record.result, files.record.cache
    recipe = files.read(RECIPE, _recipe) or {}
    lines = list(files.read(METRICS, files.metrics) or ())
    ledger = files.read(LEDGER, _object)
    record = {
        "name": os.fspath(path).rstrip("/"),
        "sentence": None if result is None else result.sentence,
        "exit_code": None if result is None else result.exit_code,
        "recipe": recipe,
        "cache": cache,
        "curves": {name: [list(point) for point in thin(points)] for name, points in _curves(lines).items()},
        "figures": _figures(lines, ledger, int(recipe.get("train.stop_window", 5))),
        "ledger": ledger,
        "eval": files.read(EVAL_FIGURES, _evaluation),
        "card": _card(recipe, cache),
        "differs": [],
        "notes": files.notes,
    }
    return cast(dict[str, Any], masked(record))


def read_runs(paths: Sequence[str | os.PathLike[str]]) -> list[dict[str, Any]]:
    """Several runs, each with the settings in which they differ."""
    runs = [read_run(path) for path in paths]
    for run in runs:
        run["differs"] = differing(runs)
    return runs


def differing(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Settings that are not the same in all runs, and `cache` where that is not; trackers aside."""
    keys = dict.fromkeys(key for run in runs for key in run["recipe"] if not key.startswith("track."))
    found = [key for key in keys if any(run["recipe"].get(key) != runs[0]["recipe"].get(key) for run in runs)]
    caches = [{key: value for key, value in run["cache"].items() if key != "url"} for run in runs]
    return ["cache", *found] if any(cache != caches[0] for cache in caches) else found


def compare(runs: Sequence[Mapping[str, Any]]) -> None:
    """Print a table on stdout: a column for each run, as many beside one another as there is room for."""
    out = results()
    for run in runs:
        out.print(Text(escape_control(f"{run['name']}: {_ended(run)}")), soft_wrap=True)
    rows = [row for row in _rows(runs) if any(row[1])]
    width = out.width if out.is_terminal else 100
    fit = max(1, (width - _NAME_WIDTH) // (_GAP + _RUN_WIDTH))
    beside = math.ceil(len(runs) / math.ceil(len(runs) / fit))  # as even as can be
    for first in range(0, len(runs), beside):
        table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0))
        table.add_column("", width=_NAME_WIDTH, overflow="fold")
        for run in runs[first : first + beside]:
            table.add_column(_cell(run["name"]), justify="right", width=_RUN_WIDTH, overflow="fold")
        for title, cells in rows:
            table.add_row(_cell(title), *(_cell(cell or "-") for cell in cells[first : first + beside]))
        out.print()
        out.print(table)
    if any(run["eval"] for run in runs):
        out.print(
            "(95 % intervals, of tasks \u00b1 standard errors; fresh: on rollouts of the student that is measured)"
        )


# ------------------------------------------------------------------------------------------------------------- files


class _Files:
    """A run's files, each checked before it is read. What is wrong with one is a warning and a note, and it is left
    out.
    """

    def __init__(self, run: Path):
        self._run, self.record, self._is_known = run, Record(), False
        self.notes: list[str] = []
        with self._noted():
            found = read_record(run)
            self.record, self._is_known = found or self.record, found is not None

    def read(self, name: str, parse: Callable[[Path], _T]) -> _T | None:
        """What `parse` makes of a file; None where it is not there or left out."""
        with contextlib.suppress(FileNotFoundError), self._noted():
            if self._is_known:
                check(self._run, name, record=self.record)
            return parse(self._run / name)
        return None

    def metrics(self, path: Path) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl that are whole; the last may be one that is being written."""
        lines = read_lines(path)
        found, damaged = [], 0
        for number, line in enumerate(lines, 1):
            try:
                found.append(parse_step(line, ""))
            except RedpenError:
                damaged += number < len(lines)
        if damaged:
            self._note(f"{path}: {damaged} of {len(lines)} lines cannot be read; they are left out")
        return found

    @contextlib.contextmanager
    def _noted(self) -> Iterator[None]:
        try:
            yield
        except RedpenError as error:
            self._note(f"left out: {error}")

    def _note(self, sentence: str) -> None:
        self.notes.append(sentence)
        warn(sentence)


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, null for what JSON lacks: infinities, NaN."""
    value = _finite(read_json(path, follow_links=False))
    assert isinstance(value, dict)
    return value


class _Prompts(BaseModel):
    path: str
    count: int = Field(ge=0)


class _Measured(BaseModel):
    pass_at: dict[str, Any] = {}
    tasks: dict[str, dict[str, Any]] = {}


class _Evaluation(BaseModel):
    """As much of eval.json as has to be of one shape; of the rest, what is no figure is not shown."""

    prompts: _Prompts | None = None
    before: _Measured | None = None
    after: _Measured | None = None


def _evaluation(path: Path) -> dict[str, Any]:
    found = _object(path)
    parse_model(found, _Evaluation, str(path))
    return found


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _recipe(path: Path) -> dict[str, Any]:
    """Every setting by its dotted name; those of several teachers by `teacher.NAME.key`."""
    try:
        sections = tomllib.loads(read_text(path, follow_links=False))
    except (ValueError, RecursionError) as error:
        raise error if isinstance(error, RedpenError) else RedpenError(f"{path}: not valid TOML ({error})") from None
    found: dict[str, Any] = {}
    for section, tables in sections.items():
        for table in tables if isinstance(tables, list) else [tables]:
            if not isinstance(table, dict):
                raise RedpenError(f"{path}: {section}: expected a table of settings")
            name = f"{section}.{table.get('name')}" if isinstance(tables, list) else section
            found |= {f"{name}.{key}": _plain(value) for key, value in table.items()}
    return found


def _plain(value: Any) -> Any:
    """A TOML value as JSON has it: what JSON lacks, infinity or a date, becomes text."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    finite = isinstance(value, float) and math.isfinite(value)
    return value if finite or isinstance(value, str | int) else str(value)


# ----------------------------------------------------------------------------------------------------------- records


def _curves(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    found = {name: [(line["step"], _value(of, line)) for line in lines] for name, of in CURVES.items()}
    kept = {name: [(step, value) for step, value in points if value is not None] for name, points in found.items()}
    return {name: points for name, points in kept.items() if points}


def _value(of: Callable[[Mapping[str, Any]], Any], line: Mapping[str, Any]) -> float | None:
    try:
        value = float(of(line))
    except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError):
        return None
    return value if math.isfinite(value) else None


def _figures(lines: Sequence[Mapping[str, Any]], ledger: Mapping[str, Any] | None, window: int) -> dict[str, Any]:
    """Steps done; reverse KL and ESS as means of the last `window` steps, as the verdict on a run has them; best
    reverse KL and held-out values as [step, value]; seconds, tokens/s and FLOPs of training; FLOPs of all stages."""
    curves = _curves(lines)
    found: dict[str, Any] = {"steps": lines[-1]["step"]} if lines else {}
    for name in ("reverse_kl", "ess"):
        if last := [value for _, value in curves.get(name, ())][-window:]:
            found[name] = sum(last) / len(last)
    for name, sign in (
        ("reverse_kl", 1),
        ("heldout_accuracy", -1),
        ("heldout_format", -1),
        ("heldout_reverse_kl", 1),
    ):
        if points := curves.get(name):
            step, value = min(points, key=lambda point: sign * point[1])
            found[f"best_{name}"] = [step, value]
    seconds = [_value(lambda line: line["time"]["seconds"], line) or 0.0 for line in lines]
    tokens = [_value(lambda line: line["tokens_read"], line) or 0.0 for line in lines]
    if sum(seconds):
        found |= {"seconds": sum(seconds), "tokens_per_second": sum(tokens) / sum(seconds)}
    flops = {name: _value(lambda line: line["flops"], stage) for name, stage in (ledger or {}).items()}
    found["train_flops"] = flops.get("train")
    found["flops"] = None if None in flops.values() or not flops else sum(filter(None, flops.values()))
    return {name: value for name, value in found.items() if value is not None}


def learned_from(cache: Mapping[str, Any]) -> str:
    """Where a run's rollouts are; a run of several rounds names none."""
    return f"{cache.get('url', '')}, " + (f"round {cache['round']}" if "round" in cache else "all rounds")


def _card(recipe: Mapping[str, Any], cache: Mapping[str, Any]) -> list[list[str]]:
    """What a run is, in a few pairs of text."""
    teachers = [f"{value}" for key, value in recipe.items() if key.startswith("teacher.") and key.endswith(".model")]
    weights = f"LoRA of rank {recipe.get('train.lora_rank')}" if recipe.get("train.method") == "lora" else "all"
    told = {
        "student": recipe.get("student.model"),
        "teacher": ", ".join(teachers),
        "cache": learned_from(cache) if "url" in cache else None,
        "loss": recipe.get("train.loss"),
        "trained weights": weights if "train.method" in recipe else None,
        "learning rate": recipe.get("train.learning_rate"),
        "prompts a step": recipe.get("train.prompts_per_step"),
    }
    return [[name, str(value)] for name, value in told.items() if value]


# ------------------------------------------------------------------------------------------------------------- table


def _rows(runs: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[str]]]:
    """Title and a text for each run; empty where a run has nothing to tell."""

    def figure(title: str, name: str, shown: Callable[[Any], str]) -> tuple[str, list[str]]:
        values = [run["figures"].get(name) for run in runs]
        return title, ["" if value is None else shown(value) for value in values]

    yield figure("steps", "steps", str)
    yield figure("reverse KL at the end", "reverse_kl", "{:.5f}".format)
    yield figure("  lowest", "best_reverse_kl", lambda best: f"{best[1]:.5f} at {best[0]}")
    yield figure("ESS at the end", "ess", "{:.3f}".format)
    yield figure("held-out accuracy, best", "best_heldout_accuracy", lambda best: f"{best[1]:.1%} at {best[0]}")
    yield figure("held-out format, best", "best_heldout_format", lambda best: f"{best[1]:.1%} at {best[0]}")
    yield figure("held-out rev. KL, best", "best_heldout_reverse_kl", lambda best: f"{best[1]:.5f} at {best[0]}")
    for measure in dict.fromkeys(key for run in runs for key in estimates(run, "after")):
        for phase in ("before", "after"):
            found = [estimates(run, phase).get(measure) for run in runs]
            shown = ["" if estimate is None else interval(measure, estimate) for estimate in found]
            yield (f"{MEASURES.get(measure, measure)}, before" if phase == "before" else "  after"), shown
    asked = [(run["eval"] or {}).get("prompts") for run in runs]
    yield "  on prompts", [f"{told['count']:,} of {told['path']}" if told else "" for told in asked]
    yield figure("seconds of training", "seconds", "{:,.0f}".format)
    yield figure("tokens/s", "tokens_per_second", "{:,.0f}".format)
    yield figure("FLOPs of training", "train_flops", "{:.2e}".format)
    yield figure("FLOPs of all stages", "flops", "{:.2e}".format)
    for key in differing(runs):
        if key == "cache":
            yield key, [learned_from(run["cache"]) if run["cache"] else "" for run in runs]
        else:
            yield key, [setting(run["recipe"][key]) if key in run["recipe"] else "" for run in runs]


def estimates(run: Mapping[str, Any], phase: str) -> dict[str, Any]:
    """Values with intervals that eval.json holds for the student `before` or `after` training, and the scores of
    lm-evaluation-harness's tasks with their standard errors."""
    measured = (run["eval"] or {}).get(phase) or {}
    found = {key: measured[key] for key in MEASURES if key in measured}
    found |= {f"pass@{k}": value for k, value in measured.get("pass_at", {}).items() if k != "1"}
    tasks = measured.get("tasks", {})
    found |= {f"{task}: {name}": score for task, scores in tasks.items() for name, score in scores.items()}
    return {name: estimate for name, estimate in found.items() if _is_estimate(estimate)}


def _is_estimate(value: Any) -> bool:
    """Whether it is a value with an interval or a standard error, as `redpen eval` writes them."""
    if not isinstance(value, dict) or not isinstance(value.get("value"), int | float):
        return False
    if "stderr" in value:
        return value["stderr"] is None or isinstance(value["stderr"], int | float)
    return all(isinstance(value.get(end, ""), int | float | None) for end in ("low", "high"))


def interval(measure: str, estimate: Mapping[str, Any]) -> str:
    """An estimate of `estimates` as text."""
    if "stderr" in estimate:
        error = "" if estimate["stderr"] is None else f" \u00b1 {estimate['stderr']:.4f}"
        return f"{estimate['value']:.4f}{error}"
    value, low, high = (estimate[name] for name in ("value", "low", "high"))
    if measure == "reverse_kl":
        return f"{value:.4f} ({low:.3f} to {high:.3f})"
    return f"{value:.1%} ({100 * low:.1f} to {100 * high:.1f})"


def _ended(run: Mapping[str, Any]) -> str:
    if run["sentence"] is None:
        return (
            f"has not ended, {run['figures'].get('steps', 0)} of {run['recipe'].get('train.steps', '?')} steps done"
        )
    return str(run["sentence"]) + (f" (exit code {run['exit_code']})" if run["exit_code"] else "")


def setting(value: Any) -> str:
    """A recipe's value as text; empty for None."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _cell(text: str) -> Text:
    return Text(escape_control(text))
