"""The report as one static page: `assets/report.html.j2` with its style, its script and the document as JSON.

Most of the text comes from models, so none of it may act. The document is JSON without a character that could end its
element; the script sets text and never markup; a content-security policy allows one script and one style by their
digests, and no network.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np

from pipeline.console import escape_control
from pipeline.files import read_text
from pipeline.report import charts
from pipeline.report.document import CorrectedToken, Document, RolloutSet, TeacherArrays
from pipeline.report.runs import MEASURES, RunRecord, estimates, interval, setting
from pipeline.report.string_table import MISSING, decode_array

ASSETS = Path(__file__).parent / "assets"
#: How a page begins.
BEGINS = b"<!doctype html>"
#: Parts of the one script, which share a scope.
SCRIPTS = ("tools.js", "data.js", "state.js", "list.js", "reader.js", "details.js", "actions.js")

#: Reverse KL in thousandths of a nat from which a token counts as marked in the summary; see LEVELS in data.js.
MARKED = 100

#: Titles and units of the curves, in the order of the page.
_CURVES = {
    "reverse_kl": ("Reverse KL on the cache", "nats per token"),
    "heldout_accuracy": ("Held-out accuracy", "fraction right"),
    "heldout_format": ("Held-out format", "fraction legal"),
    "heldout_reverse_kl": ("Held-out reverse KL", "nats per token"),
    "ess": ("Effective sample size", "fraction of tokens"),
    "ratio_max": ("Largest importance ratio", "ratio"),
    "response_tokens": ("Response length", "tokens"),
    "entropy": ("Entropy of the student", "nats"),
    "loss": ("Loss", "loss"),
    "grad_norm": ("Gradient norm", "norm"),
    "lr": ("Learning rate", "rate"),
    "tokens_per_second": ("Speed", "tokens/s"),
}
_COSTS = {"seconds": ",.1f", "tokens": ",", "flops": ".2e"}  # of a stage in the ledger, and how they are written
_MEANS = {"response_tokens": ("tokens per response", ",.1f"), "truncated": ("cut at the limit", ".1%")}


def render(document: Document) -> str:
    """The page of a document, ready to be written as UTF-8."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    sets, runs = document["sets"], document["runs"]
    style, script = _asset("report.css") + charts.STYLE, "\n".join(map(_asset, SCRIPTS))
    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        policy=Markup(_policy(style, script)),
        style=Markup(style),
        script=Markup(script),
        data=Markup(_data(document)),
        title=document["title"],
        created_by=document["created_by"],
        about=list(_about(sets, runs)),
        figures=list(_figures(sets, runs)),
        notes=[*document["notes"], *(f"{s['name']}: {s['left_out']}" for s in sets if s["left_out"])],
        has_rows=any(s["rows"] for s in sets),
        tokens=list(_corrected(sets)),
        positions=[Markup(chart) for chart in _positions(sets)],
        runs=[_run(run) for run in runs],
        compared=list(_compared(runs)),
        curves=[Markup(chart) for chart in _curves(runs)],
        provenance=list(_provenance(document)),
    )


# ------------------------------------------------------------------------------------------------------------ safety


def _asset(name: str) -> str:
    return read_text(ASSETS / name)


def _policy(style: str, script: str) -> str:
    """Allows this script and this style by their digests, no other source, and no sink for markup."""
    script_digest, style_digest = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (script, style)
    )
    return (
        f"default-src 'none'; script-src 'sha256-{script_digest}'; style-src 'sha256-{style_digest}'; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )


def _data(document: Document) -> str:
    """JSON in ASCII without a character that an HTML parser interprets; lone surrogates are escapes in it."""
    text = json.dumps(document, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _visible(value: Any) -> Any:
    """Plain text of the template with its control characters as escapes."""
    from markupsafe import Markup

    return escape_control(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _spaces(text: str | None) -> str | None:
    """A token's text with visible spaces."""
    return None if text is None else text.replace(" ", "␣") or "(nothing)"


# ----------------------------------------------------------------------------------------------------------- summary


def _about(sets: Sequence[RolloutSet], runs: Sequence[RunRecord]) -> Iterator[str]:
    """Sentences on what the page shows."""
    for shown in (s for s in sets if s["kind"] == "cache"):
        teachers = " and ".join(teacher["label"] for teacher in shown["teachers"])
        scored = f"scored by {teachers}" if teachers else "not yet scored by a teacher"
        yield f"{shown['n_total']:,} rollouts of {shown['student']['label']}, {scored} ({shown['name']})."
    for run in runs:
        yield f"{run['name']}: {run['sentence'] or 'has not ended'}."


def _figures(sets: Sequence[RolloutSet], runs: Sequence[RunRecord]) -> Iterator[dict[str, str]]:
    """The few numbers at the top."""
    shown = next((s for s in sets if s["kind"] == "cache"), None)
    if shown is not None:
        several = len(shown["teachers"]) > 1
        part = "" if shown["n_shown"] == shown["n_total"] else ", of those shown"
        for teacher in shown["teachers"]:
            total = shown["totals"].get(teacher["name"])
            to = f" to {teacher['name']}" if several else ""
            if total:
                yield _figure(f"mean reverse KL{to}", f"{total['kl']:.4f}", "nats per token")
            if (fraction := _marked(shown, teacher)) is not None:
                yield _figure(f"tokens marked{to}", f"{fraction:.1%}", f"at {MARKED / 1000:g} nats or more{part}")
        if (answers := shown["answers"]) and answers["known"]:
            fraction = answers["right"] / answers["known"]
            yield _figure("right answers", f"{fraction:.1%}", f"of {answers['known']:,}")
    for run in runs:
        before, after = (estimates(run, phase) for phase in ("before", "after"))
        name = f" of {run['name']}" if len(runs) > 1 else ""
        measure = "greedy" if "greedy" in after else "sampled"
        if measure in before and measure in after:
            gain = 100 * (after[measure]["value"] - before[measure]["value"])
            change = f"{before[measure]['value']:.1%} → {after[measure]['value']:.1%}"
            yield _figure(f"held-out accuracy{name}", change, f"{gain:+.1f} points")
        if "reverse_kl" in before and "reverse_kl" in after:
            change = f"{before['reverse_kl']['value']:.4f} → {after['reverse_kl']['value']:.4f}"
            yield _figure(f"held-out reverse KL{name}", change, "nats per token, on fresh rollouts")


def _figure(name: str, value: str, note: str) -> dict[str, str]:
    return {"name": name, "value": value, "note": note}


def _marked(shown: RolloutSet, teacher: TeacherArrays) -> float | None:
    """The fraction of marked tokens among the scored ones that are shown."""
    kl = decode_array(teacher["kl"], np.uint16)
    scored = (decode_array(shown["trained"], np.uint8) == 1) & (kl != MISSING)
    return float((kl[scored] >= MARKED).mean()) if scored.any() else None


# ---------------------------------------------------------------------------------------------- tokens and positions


def _corrected(sets: Sequence[RolloutSet]) -> Iterator[dict[str, Any]]:
    for at, shown in enumerate(sets):
        for teacher, tokens in shown["most_corrected"].items():
            if tokens:
                title = f"{shown['name']}, by {teacher}"
                yield {"title": title, "rows": [_corrected_row(at, teacher, token) for token in tokens]}


def _corrected_row(at: int, teacher: str, token: CorrectedToken) -> dict[str, Any]:
    place = {"set": at, "teacher": teacher, "rollout": token["example"], "seek": token["id"]}
    return {
        "token": _spaces(token["token"]),
        "prefers": _spaces(token["prefers"]),
        "count": f"{token['count']:,}",
        "mean": f"{token['kl_mean']:.3f}",
        "share": f"{token['share']:.1%}",
        "width": f"{100 * token['share']:.1f}",
        "href": None if token["example"] is None else f"#{urlencode(place)}",
    }


def _positions(sets: Sequence[RolloutSet]) -> Iterator[str]:
    """Mean KL by position: a chart for each set of a cache, and one for each run's held-out sets together."""
    together: dict[str, list[RolloutSet]] = {}
    for shown in sets:
        together.setdefault(shown["pair"] or shown["name"], []).append(shown)
    for title, group in together.items():
        bins = [
            (f"{shown['phase']}, {teacher}" if shown["phase"] else teacher, found)
            for shown in group
            for teacher, found in shown["by_position"].items()
        ]
        starts: Sequence[int] = max((found["start"] for _, found in bins), key=len, default=[])
        series = {label: found["kl"] for label, found in bins}
        yield charts.bar_chart(
            f"Reverse KL by position: {title}", _ranges(starts), series, x_label="token", y_label="nats"
        )


def _ranges(starts: Sequence[int]) -> list[str]:
    """Names of bins that begin at `starts`; the last is open."""
    ends = [following - 1 for following in starts[1:]]
    closed = [str(start) if start == end else f"{start} to {end}" for start, end in zip(starts, ends, strict=False)]
    return [*closed, f"{starts[-1]}+"] if starts else []


# -------------------------------------------------------------------------------------------------------------- runs


def _curves(runs: Sequence[RunRecord]) -> Iterator[str]:
    for name, (title, unit) in _CURVES.items():
        series = {run["name"]: run["curves"].get(name, []) for run in runs}
        yield charts.line_chart(title, series, x_label="step", y_label=unit)


def _compared(runs: Sequence[RunRecord]) -> Iterator[dict[str, Any]]:
    """Rows that describe the runs and their different settings, with a cell for each run."""
    titles = dict.fromkeys(name for run in runs for name, _ in run["card"])
    differs = [key for key in (runs[0]["differs"] if runs else ()) if key != "cache"]
    yield _cells("ended", [run["sentence"] or "not yet" for run in runs])
    for title in titles:
        yield _cells(title, [dict(run["card"]).get(title, "") for run in runs])
    for key in differs:
        yield _cells(key, [setting(run["recipe"].get(key)) for run in runs])


def _cells(name: str, cells: list[str]) -> dict[str, Any]:
    return {"name": name, "cells": cells}


def _run(run: RunRecord) -> dict[str, Any]:
    """A run with the tables of its evaluation and its ledger."""
    prompts = (run["eval"] or {}).get("prompts") or {}
    stages = [(name, stage) for name, stage in (run["ledger"] or {}).items() if isinstance(stage, dict)]
    return {
        "name": run["name"],
        "prompts": f"{prompts['count']:,} prompts of {prompts['path']}" if prompts else None,
        "measures": list(_measures(run)),
        "stages": [[name, *(_count(stage.get(key), form) for key, form in _COSTS.items())] for name, stage in stages],
    }


def _measures(run: RunRecord) -> Iterator[tuple[str, str, str]]:
    """Title of a measure, and its value before and after training."""
    both = [estimates(run, phase) for phase in ("before", "after")]
    for name in dict.fromkeys(name for found in both for name in found):
        before, after = (interval(name, found[name]) if name in found else "" for found in both)
        yield MEASURES.get(name, name), before, after
    evaluation = run["eval"] or {}
    for name, (title, form) in _MEANS.items():
        before, after = (_count((evaluation.get(phase) or {}).get(name), form) for phase in ("before", "after"))
        if before or after:
            yield title, before, after


def _count(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else ""


# -------------------------------------------------------------------------------------------------------- provenance


def _provenance(document: Document) -> Iterator[dict[str, Any]]:
    """Tables of the sets, the cache, and the whole recipes of the runs."""
    for shown in document["sets"]:
        if shown["provenance"]:
            yield {"title": shown["name"], "rows": shown["provenance"]}
    if document["cache"]:
        yield {"title": "cache", "rows": list(_flat(document["cache"]))}
    for run in document["runs"]:
        if run["recipe"]:
            yield {"title": f"recipe of {run['name']}", "rows": [(k, setting(v)) for k, v in run["recipe"].items()]}


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Nested records as rows of a dotted name and a text."""
    items: Sequence[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    elif value is not None:
        yield name, setting(value)
    for key, item in items:
        yield from _flat(item, f"{name}.{key}" if name else str(key))
