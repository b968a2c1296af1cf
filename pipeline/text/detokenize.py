"""Token ids as text for people: the text that each token adds, and a label for a single token."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

import cache_schema as cs
from pipeline import toy
from pipeline.console import warn


class Decoder(Protocol):
    """The part of a tokenizer that the views need."""

    def decode(self, token_ids: Sequence[int]) -> str: ...


@functools.cache
def local_tokenizer(name: str, revision: str | None) -> Any | None:
    """The tokenizer of a model (`toy:NAME`, path or Hub id) if it is on this machine, else None.

    The name may come from another person's cache, so its code is never run, nor offered to be.
    """
    from transformers import AutoTokenizer

    try:
        path = str(toy.asset_path(name.removeprefix("toy:"))) if name.startswith("toy:") else name
        return AutoTokenizer.from_pretrained(path, revision=revision, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError, AttributeError):  # not here, or not a tokenizer
        return None


def load_decoder(manifest: cs.RoundManifest) -> Decoder:
    """The student's tokenizer, if it is on this machine; otherwise token ids stand for the text."""
    from pipeline.models.identity import tokenizer_digest

    name = manifest.tokenizer.name
    tokenizer = local_tokenizer(name, manifest.student.revision)
    if tokenizer is None:
        warn(f'tokenizer {name} is not on this machine, so ids are shown (hf download {name} --include "*token*")')
        return Ids()
    if tokenizer_digest(tokenizer) != manifest.tokenizer.digest:
        warn(f"tokenizer {name} differs from the one that the cache was made with; the text may be wrong")
    return Verbatim(tokenizer)


def response_texts(rollouts: cs.RolloutBlock, tokenizer: Any) -> list[str]:
    """The response of every row as text, without special tokens; of several turns the student's last one."""
    ids = [rollouts.response(row)[last_turn(rollouts, row)] for row in range(rollouts.n_rows)]
    texts: list[str] = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return texts


def last_turn(rollouts: cs.RolloutBlock, row: int) -> slice:
    """Where the student's last turn lies in a response: its own tokens after the last that are not. If none are its
    own, the whole response.
    """
    trained = rollouts.trained[rollouts.response_slice(row)] == 1
    own = np.flatnonzero(trained)
    if len(own) in (0, len(trained)):
        return slice(0, len(trained))
    end = int(own[-1]) + 1
    others = np.flatnonzero(~trained[:end])
    return slice(int(others[-1]) + 1 if len(others) else 0, end)


def pieces(token_ids: Sequence[int], tokenizer: Decoder) -> list[str]:
    """The text that each token adds. A character of several tokens belongs to the last one; the others are empty."""
    found, start, read = [], 0, 0
    for end in range(1, len(token_ids) + 1):
        # decoded together with the piece before, so that a tokenizer's leading space survives
        text = tokenizer.decode(token_ids[start:end])
        if text.endswith("\ufffd") and end < len(token_ids) and end - read < 8:
            found.append("")
            continue
        found.append(text[len(tokenizer.decode(token_ids[start:read])) :])
        start, read = read, end
    return found


def labels(tokenizer: Decoder) -> Callable[[int], str]:
    """Text of single tokens; the id if it is only a part of a character."""

    def label(token: int) -> str:
        text = tokenizer.decode([token])
        return f"<{token}>" if not text or "\ufffd" in text else text

    return label


class Verbatim:
    """A tokenizer that shows special tokens and changes no spaces."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer

    def decode(self, token_ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text


class Ids:
    """Stands in for a tokenizer: tokens as their ids."""

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(f"<{token}>" for token in token_ids)
