"""The figures of an evaluation as a table on stdout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from pipeline import console
from pipeline.console import escape_control, results

#: The bounds are None for the reverse KL of too few prompts to give an interval.
Estimates = list[dict[str, Any]]


def show(figures: dict[str, dict[str, Any]], about: dict[str, Any]) -> None:
    """Print one row a measure and one column a student, with rules and colours only on a terminal.

    Args:
        figures: estimates by student and measure; two students are compared.
        about: what was measured; see `eval.json`.
    """
    labels = list(figures)
    out = results()
    plain: dict[str, Any] = {} if out.is_terminal else {"box": None, "padding": (0, 2, 0, 0)}
    table = Table(**plain)
    of = about["prompts"]
    table.add_column("" if of is None else escape_control(f"{of['count']:,} prompts of {of['path']}"))
    for label in [*labels, *(["change"] if len(labels) == 2 else [])]:
        table.add_column(label, justify="right")
    for title, is_fraction, estimates in _rows(list(figures.values()), about["samples"]):
        cells = [percent(e) if is_fraction else _nats(e) for e in estimates]
        table.add_row(title, *cells, *_change(is_fraction, *(e["value"] for e in estimates)))
    students = list(figures.values())
    if all("response_tokens" in measured for measured in students):
        lengths = [measured["response_tokens"] for measured in students]
        cut = [measured["truncated"] for measured in students]
        table.add_row("length, mean tokens", *(f"{length:.1f}" for length in lengths), *_change(False, *lengths))
        limit = f"cut at {about['max_response_tokens']:,} tokens"
        table.add_row(limit, *(f"{fraction:.1%}" for fraction in cut), *_change(True, *cut))
    for title, scores in _task_rows([figures[label].get("tasks", {}) for label in labels]):
        table.add_row(escape_control(title), *(_score(score) for score in scores), *_difference(scores))
    if out.is_terminal:
        out.print(table)
    else:
        with out.capture() as printed:
            out.print(table)
        for line in printed.get().splitlines():
            console.show(line.rstrip())
    if any("tasks" in measured for measured in figures.values()):
        console.show("(tasks: lm-evaluation-harness's own metrics and standard errors)")
    if of is None:
        return
    samples = f"{about['samples']} a prompt at T = {about['temperature']:g}"
    teacher = about["teacher"] or ""
    measured = any("reverse_kl" in of_student for of_student in figures.values())
    fresh = f"; reverse KL to {teacher} on fresh rollouts at T = 1" if measured else ""
    if any(of_student.get("reverse_kl", {}).get("low", 0) is None for of_student in figures.values()):
        fresh += ", of too few prompts for an interval"
    console.show(f"(95 % intervals; sampled: {samples}{fresh})")


def _rows(students: list[dict[str, Any]], n_samples: int) -> Iterator[tuple[str, bool, Estimates]]:
    """Title, whether it is a fraction, and each student's estimate, of every measure."""
    measured = {key: value for key, value in students[0].items() if all(key in figures for figures in students)}
    if "greedy" in measured:
        yield "accuracy, greedy", True, [figures["greedy"] for figures in students]
        same = " (pass@1)" if n_samples > 1 else ""
        yield f"accuracy, sampled{same}", True, [figures["sampled"] for figures in students]
        for k in list(measured["pass_at"])[1:]:
            yield f"pass@{k}", True, [figures["pass_at"][k] for figures in students]
    if "format" in measured:
        yield "legal format, sampled", True, [figures["format"] for figures in students]
    if "reverse_kl" in measured:
        yield "reverse KL, nats a token", False, [figures["reverse_kl"] for figures in students]


def _task_rows(students: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Title and each student's score of every metric of every task."""
    for task, metrics in students[0].items():
        for metric in metrics:
            if all(metric in tasks.get(task, ()) for tasks in students):
                yield f"{task}: {metric}", [tasks[task][metric] for tasks in students]


def _score(score: dict[str, Any]) -> str:
    return f"{score['value']:.4f}" + ("" if score["stderr"] is None else f" \u00b1 {score['stderr']:.4f}")


def _difference(scores: list[dict[str, Any]]) -> list[str]:
    return [f"{scores[1]['value'] - scores[0]['value']:+.4f}"] if len(scores) == 2 else []


def percent(estimate: dict[str, float]) -> str:
    """A fraction with its interval, in percent."""
    value, low, high = (estimate[name] for name in ("value", "low", "high"))
    return f"{value:.1%} ({low:.1%} to {high:.1%})"


def _nats(estimate: dict[str, Any]) -> str:
    value, low, high = (estimate[name] for name in ("value", "low", "high"))
    return f"{value:.4f}" if low is None or high is None else f"{value:.4f} ({low:.4f} to {high:.4f})"


def _change(is_fraction: bool, *values: float) -> list[str]:
    """The change by training: points of a fraction, percent of anything else."""
    if len(values) == 1:
        return []
    before, after = values
    if is_fraction:
        return [f"{(after - before) * 100:+.1f} points"]
    return [f"{after / before - 1:+.0%}" if before else ""]
