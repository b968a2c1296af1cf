"""The figures of an evaluation as a table on stdout."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

_ROWS = (("greedy", "accuracy, greedy"), ("sampled", "accuracy, sampled"), ("reverse_kl", "reverse KL, nats a token"))


def show(figures: dict[str, dict[str, Any]], about: dict[str, Any]) -> None:
    """Print one row a measure and one column a student, with rules and colours only on a terminal.

    Args:
        figures: estimates by student and measure; two students are compared.
        about: what was measured; see `eval.json`.
    """
    labels = list(figures)
    out = Console(highlight=False)
    plain: dict[str, Any] = {} if out.is_terminal else {"box": None, "padding": (0, 2, 0, 0)}
    table = Table(**plain)
    table.add_column(f"{about['prompts']['count']:,} prompts of {about['prompts']['path']}")
    for label in [*labels, *(["change"] if len(labels) == 2 else [])]:
        table.add_column(label, justify="right")
    for key, title in _ROWS:
        if key in figures[labels[0]]:
            estimates = [figures[label][key] for label in labels]
            table.add_row(title, *(_cell(key, e) for e in estimates), *_change(key, *(e["value"] for e in estimates)))
    if not out.is_terminal:
        out.width = 160  # a pipe has no edge to wrap at
    out.print(table)
    samples = f"{about['samples']} a prompt at T = {about['temperature']:g}"
    fresh = f"; reverse KL to {about['teacher']} on fresh rollouts at T = 1" if about["teacher"] else ""
    print(f"(95 % intervals; sampled: {samples}{fresh})")


def _cell(key: str, estimate: dict[str, float]) -> str:
    value, low, high = (estimate[name] for name in ("value", "low", "high"))
    if key == "reverse_kl":
        return f"{value:.4f} ({low:.4f} to {high:.4f})"
    return f"{value:.1%} ({low:.1%} to {high:.1%})"


def _change(key: str, *values: float) -> list[str]:
    """What training did: points of accuracy, percent of divergence."""
    if len(values) == 1:
        return []
    before, after = values
    if key != "reverse_kl":
        return [f"{(after - before) * 100:+.1f} points"]
    return [f"{after / before - 1:+.0%}" if before else ""]
