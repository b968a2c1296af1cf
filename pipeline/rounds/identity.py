"""The identity of the data that a run learns from, recorded in its run.json."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import cache_schema as cs


def cache_identity(cache_url: str, round_: cs.Round, teachers: Sequence[str]) -> dict[str, Any]:
    """What a run learns from: the round, the teachers' names, and digests of every block's content.

    Reading a block checks it against its commit, so equal digests of the commits mean equal data to the end.
    """
    scored = [cs.STUDENT] if cs.STUDENT in round_.scorer_names() else []
    groups: dict[str, list[cs.BlockGroup[Any]]] = {
        "rollouts": [round_.rollouts],
        "student": [round_.scores(name) for name in scored],
        "teacher": [round_.scores(name) for name in teachers],
    }
    digests = {
        f"{name} digest": hashlib.blake2b(
            b"".join(group.commits()["digest"].tobytes() for group in members), digest_size=8
        ).hexdigest()
        for name, members in groups.items()
    }
    return {"url": cache_url, "round": round_.index, "teacher": ", ".join(teachers)} | digests
