"""Whether several teachers would pull a student the same way: where they prefer different tokens."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from pipeline.diagnose.reading import Look
from pipeline.diagnose.token_names import Words

#: Tokens of the student's that are named where two teachers differ most.
NAMED = 3


def compare(seen: Look, words: Words) -> list[dict[str, Any]]:
    """Each two teachers that read the same tokens, as plain data.

    `differ` is the share of tokens at which each is more than half sure of another token than the other is; `at` has
    the tokens of the student's at which that happens most, with what either wants there.
    """
    found = []
    for (a, first), (b, second) in itertools.combinations(seen.pairs.items(), 2):
        one, other = first.reading, second.reading
        if not np.array_equal(one.token, other.token):
            continue  # they have not read the same part of the round
        differ = one.is_preference & other.is_preference & (one.prefers != other.prefers)
        written, counts = np.unique(one.token[differ], return_counts=True)
        at = []
        for index in np.argsort(-counts, kind="stable")[:NAMED]:
            here = differ & (one.token == written[index])
            wants, times = np.unique(np.stack([one.prefers[here], other.prefers[here]]), axis=1, return_counts=True)
            most = wants[:, times.argmax()]
            named = {a: words(int(most[0])), b: words(int(most[1]))}
            at.append({"token": words(int(written[index])), "wants": named})
        found.append(
            {
                "teachers": [a, b],
                "tokens": len(one.token),
                "differ": float(differ.mean()) if len(differ) else 0.0,
                "at": at,
            }
        )
    return found
