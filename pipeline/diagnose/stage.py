"""Will this pair work? What a scored cache says of student, teacher and rollouts before any gradient.

On-policy distillation fails in few ways, and most of them show in the teacher's reading of the student's responses:
other token ids, another prompt template, another end of text, a teacher that does not know the task, responses that
are cut, or that are no samples at all. Everything is measured over the student's own tokens with numpy alone, at
reverse KL as training means it (candidates and one rest); `pair.py` and `written.py` say what is compared with which
bound and why. Right and wrong answers are not known here: that is `redpen eval`.

Literature that the verdicts rest on: pairs that succeed come to share 97 to 99 % of their probability on a small set
of tokens (Li et al., "Rethinking On-Policy Distillation", arXiv 2604.13016); mismatched special tokens are among the
failures of sampled-token distillation (Fu et al., "Revisiting On-Policy Distillation", arXiv 2603.25562); few tokens
carry the signal (TIP, arXiv 2604.14084).

    redpen diagnose CACHE
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import numpy as np

import cache_schema as cs
from pipeline import console
from pipeline.console import warn
from pipeline.diagnose import Finding, pair, worst_first
from pipeline.diagnose import rollout_checks as written
from pipeline.diagnose.figures import Figures
from pipeline.diagnose.reading import Look, look
from pipeline.diagnose.teacher_disagreement import compare
from pipeline.diagnose.terminal import show
from pipeline.diagnose.token_names import Words
from pipeline.errors import RedpenError

#: Tokens named as those that the teacher corrects most.
CORRECTED = 5


def run(cache_url: str, round_index: int | None = None, teacher: str | None = None, as_json: bool = False) -> int:
    """Show on stdout what is wrong with a round's pairs; returns 1 where one cannot work as it is, else 0.

    Args:
        round_index: the latest round by default.
        teacher: only this one; all by default.

    Raises:
        RedpenError: no such teacher, or nothing that student and teacher have both scored.
        CacheError: not a cache, or a damaged block.
    """
    round_ = cs.open(cache_url).round(round_index)
    where = f"cache {cache_url} round {round_.index}"
    names = round_.teacher_names()
    if teacher is not None and teacher not in names:
        raise RedpenError(f"--teacher: expected one of {', '.join(names) or 'none yet'} in {where}, got {teacher!r}")
    names = list(names) if teacher is None else [teacher]
    score = f"run `redpen score RECIPE --cache {cache_url}`"
    if not names:
        raise RedpenError(f"{where}: no teacher has scored it, so there is no pair to look at; {score}")
    seen = look(round_, names)
    if seen is None:
        raise RedpenError(f"{where}: no block is scored by both the student and {' or '.join(names)}; {score}")
    for name in (cs.STUDENT, *names):
        committed = int(round_.scores(name).committed().sum())
        if committed < round_.n_blocks:
            warn(f"{name} has scored {committed} of {round_.n_blocks} blocks; these are looked at")
    found = diagnosis(seen)
    if as_json:
        console.show(json.dumps(found, allow_nan=False))
    else:
        show(found)
    return 1 if any(finding["severity"] == "blocks" for finding in found["findings"]) else 0


def diagnosis(seen: Look) -> dict[str, Any]:
    """Findings, worst first, figures by teacher, and the tokens that training would correct most, as plain data."""
    words, round_ = Words(seen.round), seen.round
    figures = {name: Figures.of(scored) for name, scored in seen.pairs.items()}
    findings = [f for name, scored in seen.pairs.items() for f in pair.findings(scored, figures[name], words)]
    findings = worst_first([*written.findings(seen), *findings])
    return {
        "cache": round_.cache.url,
        "round": round_.index,
        "student": round_.manifest.student.name,
        "teachers": {name: scored.scored.model.name for name, scored in seen.pairs.items()},
        "blocks": {"read": seen.blocks, "scored": seen.scored_blocks, "total": round_.n_blocks},
        "responses": len(seen.responses.prompt),
        "distinct_responses": written.distinct_share(seen),
        "mean_response_tokens": float(seen.responses.length.mean()),
        "findings": [asdict(finding) for finding in findings],
        "figures": {name: asdict(values) for name, values in figures.items()},
        "between": compare(seen, words),
        "corrected": {name: _corrected(seen, name, words) for name in seen.pairs if not _blocked(findings, name)},
    }


def _blocked(findings: list[Finding], teacher: str) -> bool:
    return any(finding.severity == "blocks" and finding.teacher == teacher for finding in findings)


def _corrected(seen: Look, teacher: str, words: Words) -> list[dict[str, Any]]:
    """The student's tokens by their share of the reverse KL, with what the teacher most often prefers there."""
    reading = seen.pairs[teacher].reading
    ids, which = np.unique(reading.token, return_inverse=True)
    sums = np.bincount(which, weights=reading.reverse_kl)
    total = float(sums.sum())
    if total <= 0:
        return []
    found = []
    for index in np.argsort(-sums, kind="stable")[:CORRECTED]:
        at = which == index
        others = reading.prefers[at & reading.is_preference & (reading.prefers != reading.token)]
        others, counts = np.unique(others, return_counts=True)
        found.append(
            {
                "token": words(int(ids[index])),
                "id": int(ids[index]),
                "share": float(sums[index]) / total,
                "prefers": words(int(others[counts.argmax()])) if len(others) else None,
            }
        )
    return found
