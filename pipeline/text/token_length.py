"""The fewest tokens that a text can have, without tokenizing it.

Let L(b) be the length of the longest token with the byte b. In a token of l bytes every L(b) is l or more, so the sum
of 1 / L(b) over its bytes is at most 1, and the sum over a whole text at most the number of its tokens. This holds
if a tokenizer covers every byte (byte-level BPE, or byte fallback) and drops none. Others have no bound: a long word
may be one unknown token (WordPiece, Unigram). So that tokenizing is bounded all the same, every text counts for a
token each 256 characters at least.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: A text with fewer characters is tokenized right away.
_CHEAP = 2**15
_MAX_CHARACTERS = 256  # a token; the longest of common vocabularies are runs of 128 spaces
_KEEPING = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Prepend", "Replace"}
_SPLITTING = {"ByteLevel", "Split", "Digits", "Metaspace", "Punctuation"}
_VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
#: The character for each byte in a byte-level vocabulary.
_LETTERS = dict(zip(_VISIBLE, map(chr, _VISIBLE), strict=True)) | {
    byte: chr(256 + place) for place, byte in enumerate(sorted(set(range(256)) - set(_VISIBLE)))
}


def least_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """A lower bound of the tokens of `text`; 0 if it is short."""
    if len(text) <= _CHEAP:
        return 0
    least = len(text) // _MAX_CHARACTERS
    lengths = _lengths(tokenizer)
    if lengths is None:
        return least
    if lengths.strips:
        text = "".join(text.split())
    backend: Any = tokenizer.backend_tokenizer
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    counts = np.bincount(np.frombuffer(text.encode(), np.uint8), minlength=256)
    return max(least, int(np.floor(counts @ (1 / lengths.longest))))


@dataclass(frozen=True)
class _Lengths:
    """Of a tokenizer's tokens.

    Attributes:
        longest: [256] bytes of the longest token with this byte.
        strips: whether some token takes any amount of white space beside it.
    """

    longest: npt.NDArray[np.int64]
    strips: bool


@functools.lru_cache(4)
def _lengths(tokenizer: PreTrainedTokenizerBase) -> _Lengths | None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    spec = json.loads(backend.to_str())
    splitters, model = list(_parts(spec["pre_tokenizer"])), spec["model"]
    if not {part["type"] for part in _parts(spec["normalizer"])} <= _KEEPING:
        return None
    if any(part["type"] not in _SPLITTING or part.get("behavior") == "Removed" for part in splitters):
        return None
    byte_level = any(part["type"] == "ByteLevel" for part in splitters) and model["type"] == "BPE"
    tokens = set(tokenizer.get_vocab())
    complete = _LETTERS.values() if byte_level else [f"<0x{byte:02X}>" for byte in range(256)]
    if not tokens.issuperset(complete) or not (byte_level or model.get("byte_fallback")):
        return None
    longest = np.ones(256, np.int64)
    of_letter = {letter: byte for byte, letter in _LETTERS.items()}
    added = [token["content"] for token in spec["added_tokens"]]
    normalise = (lambda text: text) if backend.normalizer is None else backend.normalizer.normalize_str
    whole = {form for content in added for form in (content, normalise(content))}
    for token in tokens | whole:
        if byte_level and token not in whole and all(letter in of_letter for letter in token):
            forms = [bytes(of_letter[letter] for letter in token)]
        else:  # sentencepiece writes spaces as ▁, before or after normalising
            forms = [token.encode(), token.replace("▁", " ").encode()]
        for form in forms:
            held = list(set(form))
            longest[held] = np.maximum(longest[held], len(token.encode()) if not byte_level else len(form))
    return _Lengths(longest, any(token["lstrip"] or token["rstrip"] for token in spec["added_tokens"]))


def _parts(part: Any) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer."""
    if part is not None and part["type"] == "Sequence":
        for inner in part.get("normalizers", part.get("pretokenizers", [])):
            yield from _parts(inner)
    elif part is not None:
        yield part
