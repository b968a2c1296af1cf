"""Runs as records for the report, from the files that `redpen train` and `redpen eval` write.

Runs that still train can be read, and damaged ones: a file that cannot be read is left out with a warning.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, TypeVar, cast

import numpy.typing as npt
from pydantic import BaseModel, Field

import cache_schema as cs
from pipeline.config.toml import parse_toml
from pipeline.console import warn
from pipeline.credentials import masked
from pipeline.errors import RedpenError
from pipeline.files import parse_model, read_json, read_text
from pipeline.report.charts import thin
from pipeline.rounds.identity import cache_identity
from pipeline.runs.files import (
    EVAL_FIGURES,
    LEDGER,
    MARKERS,
    METRICS,
    RECIPE,
    REREAD,
    DamagedRunError,
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

#: Digests of the cache that these scores depend on. A teacher that was scored again changes nothing in them.
_DEPENDS_ON = ("rollouts digest", "student digest")
_PLACES, _SCORES = ("numbers", "start", "length"), ("logprobs", "entropy", "candidate_logprobs", "rest_logprob")


class RunRecord(TypedDict):
    """What a run's files hold, as JSON-able data."""

    name: str
    sentence: str | None  # how it ended
    exit_code: int | None
    recipe: dict[str, Any]  # by dotted setting
    cache: dict[str, Any]
    curves: dict[str, list[list[float]]]  # [step, value], 400 points at most
    figures: dict[str, Any]  # see `_figures`
    ledger: dict[str, Any] | None  # as on disk
    eval: dict[str, Any] | None  # as on disk
    card: list[list[str]]  # names and values
    differs: list[str]  # see `differing`; empty for a run alone
    notes: list[str]  # sentences on what was left out


def read_run(path: str | os.PathLike[str]) -> RunRecord:
    """The record of one run. Raises `RedpenError` if `path` is not a run."""
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
    return cast(RunRecord, masked(record))


def read_runs(paths: Sequence[str | os.PathLike[str]]) -> list[RunRecord]:
    """Several runs, each with the settings in which they differ."""
    runs = [read_run(path) for path in paths]
    for run in runs:
        run["differs"] = differing(runs)
    return runs


def differing(runs: Sequence[RunRecord]) -> list[str]:
    """Settings that are not the same in all runs, and `cache` if that is not; trackers aside."""
    keys = dict.fromkeys(key for run in runs for key in run["recipe"] if not key.startswith("track."))
    found = [key for key in keys if any(run["recipe"].get(key) != runs[0]["recipe"].get(key) for run in runs)]
    caches = [{key: value for key, value in run["cache"].items() if key != "url"} for run in runs]
    return ["cache", *found] if any(cache != caches[0] for cache in caches) else found


# ------------------------------------------------------------------------------------------------------------- files


class _Files:
    """A run's files, each checked before it is read. A file with an error is left out, with a warning and a note."""

    def __init__(self, run: Path):
        self._run, self.record, self._is_known = run, Record(), False
        self.notes: list[str] = []
        with self._noted():
            found = read_record(run)
            self.record, self._is_known = found or self.record, found is not None

    def read(self, name: str, parse: Callable[[Path], _T]) -> _T | None:
        """What `parse` makes of a file; None if it does not exist or is left out."""
        with contextlib.suppress(FileNotFoundError), self._noted():
            if self._is_known:
                check(self._run, name, record=self.record)
            return parse(self._run / name)
        return None

    def metrics(self, path: Path) -> list[dict[str, Any]]:
        """The valid lines of metrics.jsonl; the last may be one that is being written."""
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
    """The JSON object in a file, with null for infinities and NaN."""
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
    """The part of eval.json that must have this shape; of the rest, only figures are shown."""

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
    sections = parse_toml(read_text(path, follow_links=False), str(path))
    found: dict[str, Any] = {}
    for section, tables in sections.items():
        for table in tables if isinstance(tables, list) else [tables]:
            if not isinstance(table, dict):
                raise RedpenError(f"{path}: {section}: expected a table of settings")
            name = f"{section}.{table.get('name')}" if isinstance(tables, list) else section
            found |= {f"{name}.{key}": _plain(value) for key, value in table.items()}
    return found


def _plain(value: Any) -> Any:
    """A TOML value as JSON: infinities and dates, which JSON lacks, become text."""
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
    """Steps done; reverse KL and ESS as means of the last `window` steps, as the stopping rule computes them; best
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
    """The cache and round that a run learned from; a run of several rounds names none."""
    return f"{cache.get('url', '')}, " + (f"round {cache['round']}" if "round" in cache else "all rounds")


def _card(recipe: Mapping[str, Any], cache: Mapping[str, Any]) -> list[list[str]]:
    """What a run is, in a few pairs of text."""
    weights = f"LoRA of rank {recipe.get('train.lora_rank')}" if recipe.get("train.method") == "lora" else "all"
    student = recipe.get("student.model")
    card = {
        "student": student and model_title(str(student)),
        "teacher": ", ".join(_teachers(recipe, cache)),
        "cache": learned_from(cache) if "url" in cache else None,
        "loss": recipe.get("train.loss"),
        "trained weights": weights if "train.method" in recipe else None,
        "learning rate": recipe.get("train.learning_rate"),
        "prompts per step": recipe.get("train.prompts_per_step"),
    }
    return [[name, str(value)] for name, value in card.items() if value]


def _teachers(recipe: Mapping[str, Any], cache: Mapping[str, Any]) -> list[str]:
    """The teachers that a run learned from, of all that its recipe may have; with their names if it has several."""
    models = {}
    for key, value in recipe.items():
        if key.startswith("teacher.") and key.endswith(".model"):
            single = key == "teacher.model"
            name = recipe.get("teacher.name", "teacher") if single else key.split(".", 1)[1].removesuffix(".model")
            models[str(name)] = model_title(str(value))
    chosen = cache.get("teacher")
    names = list(models) if chosen is None else chosen if isinstance(chosen, list) else str(chosen).split(", ")
    return [models[name] if len(models) == 1 else f"{name} ({models[name]})" for name in names if name in models]


def model_title(model: str) -> str:
    """A model's name for titles: of a directory the last part of its path, anything else unchanged."""
    return Path(model).name or model if model.startswith(("/", "~", ".")) else model


def estimates(run: RunRecord, phase: str) -> dict[str, Any]:
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
    known = low is not None and high is not None  # few prompts have no interval
    if measure == "reverse_kl":
        return f"{value:.4f}" + (f" ({low:.3f} to {high:.3f})" if known else "")
    return f"{value:.1%}" + (f" ({100 * low:.1f} to {100 * high:.1f})" if known else "")


def setting(value: Any) -> str:
    """A recipe's value as text; empty for None."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


# ------------------------------------------------------------------------------------------------- trained student


@dataclass(frozen=True)
class Reread:
    """Scores of cached rollouts by the trained student, by the rollout's number; see `pipeline.evaluate.reread`."""

    run: str
    _spans: Mapping[int, slice]
    _arrays: Mapping[str, npt.NDArray[Any]]

    @classmethod
    def load(cls, run: str, round_: cs.Round) -> Reread | str | None:
        """The run's scores of this round; a sentence on why they are left out; None if the run has none."""
        from safetensors import SafetensorError, safe_open

        path = Path(run) / REREAD
        if not path.is_file():
            return None
        try:
            check(run, REREAD)
            with safe_open(path, "numpy") as file:
                metadata = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in (*_PLACES, *_SCORES)}
            spans = _spans(arrays)
        except DamagedRunError as error:
            return f"scores by the trained student are left out: {error}"
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            return f"{path} cannot be read ({error}), so scores by the trained student are left out"
        if cs.STUDENT not in round_.scorer_names():
            return f"{path} is left out: the cache does not hold the student's scores, which it belongs to"
        now = cache_identity(round_.cache.url, round_, [])
        if changed := [key for key in _DEPENDS_ON if metadata.get(key) != now[key]]:
            return (
                f"{path} is left out: it is of another cache or round than the one shown ({', '.join(changed)}); "
                f"run `redpen eval {run}` to make it again"
            )
        return cls(run, spans, arrays)

    def scores_of(self, number: int, student: cs.ScoreBlock) -> cs.ScoreBlock | None:
        """The scores of a rollout at the candidates of its cached ones; None if it was not scored again."""
        span, shape = self._spans.get(number), None if student.candidate_ids is None else student.candidate_ids.shape
        if span is None or self._arrays["candidate_logprobs"][span].shape != shape:
            return None
        scores = {name: self._arrays[name][span] for name in _SCORES}
        return cs.ScoreBlock(candidate_ids=student.candidate_ids, **scores)


def _spans(arrays: Mapping[str, npt.NDArray[Any]]) -> dict[int, slice]:
    """The tokens of each rollout. Raises `ValueError` if the arrays do not fit together."""
    n_tokens = len(arrays["logprobs"])
    if any(arrays[name].shape[:1] != (n_tokens,) or arrays[name].dtype.kind != "f" for name in _SCORES):
        raise ValueError("its arrays do not fit together")
    found = {}
    for number, start, length in zip(*(arrays[name].tolist() for name in _PLACES), strict=True):
        if not 0 <= start <= start + length <= n_tokens:
            raise ValueError(f"rollout {number} is beyond its tokens")
        found[int(number)] = slice(start, start + length)
    return found
