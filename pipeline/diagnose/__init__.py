"""Whether a pair will work, told from its scored cache before any gradient: what is wrong, why, and what to set."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

#: blocks: the pair cannot work as it is; harms: it can, but learns less or something else; note: worth knowing.
Severity = Literal["blocks", "harms", "note"]
_WORST_FIRST: tuple[Severity, ...] = ("blocks", "harms", "note")


@dataclass(frozen=True)
class Finding:
    """Something wrong with a pair, or with its rollouts.

    Attributes:
        key: what was found, a word for programs; a teacher has each key at most once.
        verdict: one sentence in plain words.
        evidence: numbers and tokens that it rests on, a line each.
        remedy: what to set or do.
        explains: share of what is wrong (of reverse KL, or of rollouts) that it accounts for; orders findings of one
            severity.
        teacher: whose it is; None for what lies in the rollouts.
    """

    key: str
    severity: Severity
    verdict: str
    evidence: tuple[str, ...]
    remedy: str
    explains: float
    teacher: str | None = None


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """By severity, then by how much they explain."""
    return sorted(findings, key=lambda finding: (_WORST_FIRST.index(finding.severity), -finding.explains))
