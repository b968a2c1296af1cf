"""Tables of the text that a page's tokens are made of: each (token, text) once, however many rollouts say it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pipeline.report.encode import clean
from pipeline.text.detokenize import Decoder, labels, pieces

UInt32 = npt.NDArray[np.uint32]


class Pieces:
    """Collects what tokens add to a text, as `pipeline.text.detokenize.pieces` finds it, and gives each a number.

    Where a whole response is its tokens' own texts end to end, as with most vocabularies of bytes, each token is
    decoded once for all; otherwise, as with characters made of several tokens, the response piece by piece.
    """

    def __init__(self, tokenizer: Decoder):
        self._tokenizer = tokenizer
        self._alone: dict[int, str] = {}
        self._numbers: dict[tuple[int, str], int] = {}

    def add(self, token_ids: Sequence[int]) -> UInt32:
        """[T]: the number of each token's piece in `table`."""
        alone = [self._text(token) for token in token_ids]
        whole = "".join(alone) == self._tokenizer.decode(token_ids)
        texts = alone if whole else pieces(token_ids, self._tokenizer)
        numbers = self._numbers
        return np.array(
            [numbers.setdefault(pair, len(numbers)) for pair in zip(token_ids, texts, strict=True)], np.uint32
        )

    def table(self) -> list[list[int | str]]:
        """[[token id, text], ...]"""
        return [[token, clean(text)] for token, text in self._numbers]

    def _text(self, token: int) -> str:
        text = self._alone.get(token)
        if text is None:
            text = self._alone[token] = self._tokenizer.decode([token])
        return text


class Labels:
    """Single tokens as text, each once."""

    def __init__(self, tokenizer: Decoder):
        self.text = labels(tokenizer)
        self.table: list[str] = []

    def add(self, token_ids: npt.NDArray[np.int64]) -> UInt32:
        """[M]: the number of each token's text in `table`."""
        unique, place = np.unique(token_ids, return_inverse=True)
        first = len(self.table)
        self.table += [clean(self.text(token)) for token in unique.tolist()]
        return (first + place).astype(np.uint32)
