"""Wording of messages about values and names that a user typed."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from typing import Any

from pipeline.credentials import mask


def did_you_mean(given: str, known: Sequence[str]) -> str:
    """`; did you mean X?` with the most similar of the dotted names, or an empty string.

    The same key in another section is preferred to a similar key in the same section, and that to any other.
    """
    section, _, leaf = given.rpartition(".")
    leaves = [name.rpartition(".") for name in known]
    same_leaf = {parts[0]: "".join(parts) for parts in leaves if parts[2] == leaf}
    near = [same_leaf[match] for match in difflib.get_close_matches(section, same_leaf, 1, 0.6)]
    near = near or [*same_leaf.values()][:1]
    for group in ([parts for parts in leaves if parts[0] == section], leaves):
        by_leaf = {parts[2]: "".join(parts) for parts in reversed(group)}
        near = near or [by_leaf[match] for match in difflib.get_close_matches(leaf, by_leaf, 1, 0.6)]
    return f"; did you mean {near[0]}?" if near else ""


def show_value(value: Any) -> str:
    """A value as JSON, shortened to 80 characters, credentials masked."""
    value = clip(value, 200) if isinstance(value, str) else value
    text = mask(json.dumps(value, ensure_ascii=False, default=str))
    return text if len(text) <= 80 else text[:77] + "..."


def clip(text: str, at_most: int = 80) -> str:
    """The text; if it is longer than `at_most`, without its middle."""
    return text if len(text) <= at_most else f"{text[: at_most // 2]}...{text[-(at_most // 4) :]}"
