"""Whether a pair will work, by its scored cache and before any gradient.

On-policy distillation fails in few ways, and most of them show in the teacher's scores of the student's responses:
other token ids, another prompt template, another end of text, a teacher that does not know the task, responses that
are cut, or that are not samples. Everything is measured over the student's own tokens with numpy alone, with reverse
KL as in training (candidates and one rest); `checks.py` and `rollout_checks.py` have the bounds and their reasons.
Which answers are right is not known here: see `redpen eval`.

Literature behind the checks: pairs that succeed come to share 97 to 99 % of their probability on a small set
of tokens (Li et al., "Rethinking On-Policy Distillation", arXiv 2604.13016); mismatched special tokens are among the
failures of sampled-token distillation (Fu et al., "Revisiting On-Policy Distillation", arXiv 2603.25562); few tokens
carry the signal (TIP, arXiv 2604.14084).

    redpen diagnose CACHE
"""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict
from typing import Any

import numpy as np

import cache_schema as cs
from pipeline import console
from pipeline.console import warn
from pipeline.diagnose.checks import check_pair, worst_first
from pipeline.diagnose.figures import Figures
from pipeline.diagnose.read import PairScores, RoundSample, read_round
from pipeline.diagnose.rollout_checks import check_rollouts, distinct_fraction
from pipeline.diagnose.show import show
from pipeline.diagnose.token_names import TokenNames
from pipeline.errors import RedpenError

#: Tokens named as those that the teacher corrects most.
CORRECTED = 5
#: Tokens named as those at which two teachers differ most.
NAMED = 3


def run(cache_url: str, round_index: int | None = None, teacher: str | None = None, as_json: bool = False) -> int:
    """Print what is wrong with a round's pairs; returns 1 if one cannot work, else 0.

    Args:
        round_index: the latest round by default.
        teacher: only this one; all by default.

    Raises:
        RedpenError: no such teacher, or no block that student and teacher have both scored.
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
        raise RedpenError(f"{where}: no teacher has scored it, so there is no pair to check; {score}")
    sample = read_round(round_, names)
    if sample is None:
        raise RedpenError(f"{where}: no block is scored by both the student and {' or '.join(names)}; {score}")
    for name in (cs.STUDENT, *names):
        committed = int(round_.scores(name).committed().sum())
        if committed < round_.n_blocks:
            warn(f"{name} has scored {committed} of {round_.n_blocks} blocks; only these are checked")
    found = diagnosis(sample)
    if as_json:
        console.show(json.dumps(found, allow_nan=False))
    else:
        show(found)
    return 1 if any(finding["severity"] == "blocks" for finding in found["findings"]) else 0


def diagnosis(sample: RoundSample) -> dict[str, Any]:
    """Results of the checks, worst first, figures by teacher, and the most corrected tokens, as plain data."""
    names, round_ = TokenNames(sample.round), sample.round
    figures = {name: Figures.of(pair) for name, pair in sample.pairs.items()}
    results = check_rollouts(sample)
    for name, pair in sample.pairs.items():
        results += check_pair(pair, figures[name], names)
    results = worst_first(results)
    silent = {result.teacher for result in results if result.severity == "blocks" or result.key == "few-tokens"}
    return {
        "cache": round_.cache.url,
        "round": round_.index,
        "student": round_.manifest.student.name,
        "teachers": {name: pair.scored.model.name for name, pair in sample.pairs.items()},
        "blocks": {"read": sample.blocks, "scored": sample.scored_blocks, "total": round_.n_blocks},
        "responses": len(sample.responses.prompt),
        "distinct_responses": distinct_fraction(sample),
        "mean_response_tokens": float(sample.responses.length.mean()),
        "findings": [asdict(result) for result in results],
        "figures": {name: asdict(values) for name, values in figures.items()},
        "between": disagreements(sample, names),
        "corrected": {name: _corrected(pair, names) for name, pair in sample.pairs.items() if name not in silent},
    }


def _corrected(pair: PairScores, names: TokenNames) -> list[dict[str, Any]]:
    """The student's tokens by their part of the reverse KL, with what the teacher most often prefers there."""
    tokens = pair.tokens
    ids, which = np.unique(tokens.token, return_inverse=True)
    sums = np.bincount(which, weights=tokens.reverse_kl)
    total = float(sums.sum())
    if total <= 0:
        return []
    found = []
    for index in np.argsort(-sums, kind="stable")[:CORRECTED]:
        at = which == index
        others = tokens.prefers[at & tokens.is_preference & (tokens.prefers != tokens.token)]
        others, counts = np.unique(others, return_counts=True)
        found.append(
            {
                "token": names(int(ids[index])),
                "id": int(ids[index]),
                "share": float(sums[index]) / total,
                "prefers": names(int(others[counts.argmax()])) if len(others) else None,
            }
        )
    return found


def disagreements(sample: RoundSample, names: TokenNames) -> list[dict[str, Any]]:
    """Every two teachers that scored the same tokens, as plain data.

    `differ` is the fraction of tokens at which each gives more than half of its probability to a different token;
    `at` has the student's tokens at which that happens most, with the token that each prefers there.
    """
    found = []
    for (a, first), (b, second) in itertools.combinations(sample.pairs.items(), 2):
        one, other = first.tokens, second.tokens
        if not np.array_equal(one.token, other.token):
            continue  # they scored different parts of the round
        differ = one.is_preference & other.is_preference & (one.prefers != other.prefers)
        written, counts = np.unique(one.token[differ], return_counts=True)
        at = []
        for index in np.argsort(-counts, kind="stable")[:NAMED]:
            here = differ & (one.token == written[index])
            wants, times = np.unique(np.stack([one.prefers[here], other.prefers[here]]), axis=1, return_counts=True)
            most = wants[:, times.argmax()]
            named = {a: names(int(most[0])), b: names(int(most[1]))}
            at.append({"token": names(int(written[index])), "wants": named})
        found.append(
            {
                "teachers": [a, b],
                "tokens": len(one.token),
                "differ": float(differ.mean()) if len(differ) else 0.0,
                "at": at,
            }
        )
    return found
