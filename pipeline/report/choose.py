"""Which rollouts of a round a page shows, when it cannot show all of them. numpy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.report.scan import WRONG, Int64, Scan

_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Choice:
    """Rollouts by their place in the scan, most informative first, and what was left out (None: nothing)."""

    rows: Int64
    left_out: str | None


def choose(scan: Scan, wanted: int, at_most_tokens: int, examples: Int64) -> Choice:
    """The `wanted` most informative rollouts, or as many of them as have `at_most_tokens`.

    Half are those with the highest reverse KL at a token; a quarter are wrong answers, and the rest any others, both
    spread evenly over the round and its sources, so that what is healthy is seen as well. Where reverse KL or right
    and wrong are not known, their part goes to the others.

    Args:
        examples: numbers of rollouts that are wanted first, of what a table tells.
    """
    n = len(scan.number)
    rows, parts = _choose(scan, min(wanted, n), examples)
    while scan.length[rows].sum() > at_most_tokens and len(rows) > 1:
        fitting = int(len(rows) * at_most_tokens / scan.length[rows].sum())
        rows, parts = _choose(scan, max(1, min(fitting, len(rows) - 1)), examples)
    return Choice(_in_order(scan, rows), None if len(rows) == scan.total else _told(scan, parts))


def of_numbers(scan: Scan, numbers: Int64) -> Choice:
    """The rollouts of these numbers, chosen from another student's as well."""
    rows = np.flatnonzero(np.isin(scan.number, numbers))
    told = f"{len(rows):,} of {scan.total:,} rollouts are shown, those that were chosen of either student"
    return Choice(_in_order(scan, rows), None if len(rows) == scan.total else told)


def _in_order(scan: Scan, rows: Int64) -> Int64:
    return np.asarray(rows[np.lexsort([scan.number[rows], -scan.highest[rows]])])


def _choose(scan: Scan, wanted: int, examples: Int64) -> tuple[Int64, dict[str, int]]:
    highest, free = scan.highest, np.ones(len(scan.number), bool)
    parts: dict[str, Int64] = {}

    def take(name: str, ordered: Int64, quota: int) -> None:
        parts[name] = ordered[free[ordered]][:quota]
        free[parts[name]] = False

    order = np.argsort(-highest, kind="stable")
    known = order[highest[order] >= 0]
    take("examples", np.flatnonzero(np.isin(scan.number, examples)), wanted // 2)
    take("worst", known, -(-wanted // 2) - len(parts["examples"]))
    take("wrong", _spread(scan, np.flatnonzero(scan.right == WRONG)), wanted // 4)
    take("others", _spread(scan, np.flatnonzero(free)), wanted - sum(map(len, parts.values())))
    return np.concatenate(list(parts.values())), {name: len(part) for name, part in parts.items()}


def _spread(scan: Scan, rows: Int64) -> Int64:
    """`rows` in an order of which every beginning is spread over their sources, and within each over the round."""
    ordered = rows[np.argsort((np.arange(len(rows)) * _GOLDEN) % 1.0, kind="stable")]
    by_source = np.argsort(scan.source[ordered], kind="stable")
    counts = np.bincount(scan.source[ordered])
    turn = np.empty(len(ordered), np.int64)  # a rollout's number among those of its source
    turn[by_source] = np.arange(len(ordered)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.asarray(ordered[np.lexsort([scan.source[ordered], turn])])


def _told(scan: Scan, parts: dict[str, int]) -> str:
    shown, n_sources = sum(parts.values()), len(scan.sources)
    over = f"the round and its {n_sources} sources" if n_sources > 1 else "the round"
    worst = parts["worst"] + parts["examples"]
    reasons = {
        f"{worst:,} with the highest reverse KL at a token": worst,
        f"{parts['wrong']:,} more wrong answers": parts["wrong"],
        f"{parts['others']:,} others spread evenly over {over}": parts["others"],
    }
    return f"{shown:,} of {scan.total:,} rollouts are shown: " + ", ".join(
        reason for reason, count in reasons.items() if count
    )
