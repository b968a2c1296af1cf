"""Text and numbers as a page stores them: tables of distinct strings, and arrays in base64. numpy only.

Values in nats are 16-bit integers, thousandths of a nat.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.text.detokenize import Decoder, labels, pieces

UInt16 = npt.NDArray[np.uint16]
UInt32 = npt.NDArray[np.uint32]

#: The largest value in nats that a page stores; it stands for everything above.
MAX_NATS = 65.534
#: Stands for a missing value.
MISSING = 65_535
#: Characters of base64 for a byte.
TEXT_BYTES = 4 / 3


class StringTable:
    """Distinct (token, text) pairs of the responses, numbered.

    `pipeline.text.detokenize.pieces` gives the text that each token adds. If a response is its tokens' own texts end
    to end, as with most byte vocabularies, each token is decoded only once.
    """

    def __init__(self, tokenizer: Decoder):
        self._tokenizer = tokenizer
        self._alone: dict[int, str] = {}
        self._numbers: dict[tuple[int, str], int] = {}

    def add(self, token_ids: Sequence[int]) -> UInt32:
        """[T]: the index of each token of a response in `rows()`."""
        for token in set(token_ids) - self._alone.keys():
            self._alone[token] = self._tokenizer.decode([token])
        alone = [self._alone[token] for token in token_ids]
        whole = "".join(alone) == self._tokenizer.decode(token_ids)
        texts = alone if whole else pieces(token_ids, self._tokenizer)
        numbers = self._numbers
        return np.array(
            [numbers.setdefault(pair, len(numbers)) for pair in zip(token_ids, texts, strict=True)], np.uint32
        )

    def rows(self) -> list[list[int | str]]:
        """[[token id, text], ...]"""
        return [[token, clean(text)] for token, text in self._numbers]


class LabelTable:
    """Single tokens as text, such as candidates."""

    def __init__(self, tokenizer: Decoder):
        self.text = labels(tokenizer)
        self.rows: list[str] = []

    def add(self, token_ids: npt.NDArray[np.int64]) -> UInt32:
        """[M]: the index of each token's text in `rows`."""
        unique, place = np.unique(token_ids, return_inverse=True)
        first = len(self.rows)
        self.rows += [clean(self.text(token)) for token in unique.tolist()]
        return (first + place).astype(np.uint32)


def encode_nats(values: npt.ArrayLike) -> UInt16:
    """Thousandths of a nat, 0 to MAX_NATS: 1.234 is 1234; MISSING for NaN."""
    exact = np.asarray(values, np.float64)
    whole = np.round(1000 * np.clip(np.nan_to_num(exact, nan=0.0, posinf=MAX_NATS), 0.0, MAX_NATS))
    return np.where(np.isnan(exact), MISSING, whole).astype(np.uint16)


def encode_array(array: npt.NDArray[Any]) -> str:
    """The array's bytes, little-endian, in base64."""
    return base64.b64encode(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"))).tobytes()).decode()


def decode_array(text: str, dtype: type[np.integer[Any]]) -> npt.NDArray[Any]:
    """An array that `encode_array` encoded."""
    return np.frombuffer(base64.b64decode(text), np.dtype(dtype).newbyteorder("<"))


def clean(text: str) -> str:
    """Text that can be encoded as UTF-8: half of a surrogate pair becomes a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")


def as_text(value: Any) -> str | None:
    """A field of a prompt's record as text; None if it is missing."""
    return None if value is None else clean(value if isinstance(value, str) else str(value))
