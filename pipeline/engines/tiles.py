"""The arithmetic of resident and streamed scoring: which rollouts go into one forward pass, and the head.

Shapes: T response tokens of a tile, D hidden, K candidates. Only the decoder between `tiles_of` and
`score_tile` differs between scorers, so equal tiles give equal bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

import cache_schema as cs
from pipeline.engines.scoring import ScoreOptions, TokenBatch, sequences
from pipeline.forward.finite import check_scores
from pipeline.forward.head import Head, score_rows
from pipeline.forward.packing import tiles


@dataclass(frozen=True)
class Tile:
    """Whole rollouts of one block that go through the model together.

    Attributes:
        candidate_ids: i4 [T, K] to score, or None to choose them.
        key: integers that name the tile.
    """

    sequences: list[npt.NDArray[np.int32]]
    response_starts: list[int]
    candidate_ids: npt.NDArray[np.int32] | None
    key: tuple[int, ...]


def tiles_of(batch: TokenBatch, tile_tokens: int) -> list[Tile]:
    """Every block's rollouts in order, about `tile_tokens` prompt and response tokens at a time."""
    found: list[Tile] = []
    offset = 0
    for index, rollouts in enumerate(batch.blocks):
        for number, rows in enumerate(tiles(rollouts.rollout_length.tolist(), tile_tokens)):
            joined, starts = sequences(rollouts, rows)
            n_tokens = sum(map(len, joined)) - sum(starts)
            ids = None if batch.candidate_ids is None else batch.candidate_ids[offset : offset + n_tokens]
            key = batch.keys[index] if batch.keys is not None else (index,)
            found.append(Tile(joined, starts, ids, (*key, number)))
            offset += n_tokens
    return found


def score_tile(
    hidden_TD: Tensor, head: Head, target_ids_T: Tensor, tile: Tile, options: ScoreOptions, model: nn.Module
) -> dict[str, npt.NDArray[np.generic]]:
    """The arrays of `ScoreBlock` for one tile, from the hidden rows that predict its response tokens.

    Raises `ModelError` if the logits of `model` are not finite.
    """
    given = tile.candidate_ids
    scores = score_rows(
        hidden_TD,
        head,
        target_ids_T,
        candidates=options.candidates if given is None else 0,
        candidate_kind=options.candidate_kind,
        candidate_vocab=options.candidate_vocab,
        candidate_ids_TK=None if given is None else torch.from_numpy(given),
        sampling_temperature=options.sampling_temperature,
        topk=options.topk,
        topk_among=None if options.topk_among is None else torch.from_numpy(options.topk_among),
        rows_per_chunk=options.rows_per_chunk,
        generator_key=tile.key,
    ).numpy()
    check_scores(scores, model)
    if given is not None:
        scores["candidate_ids"] = None  # stored once, with the student's scores
    return {name: value for name, value in scores.items() if value is not None}


def joined(parts: Sequence[dict[str, npt.NDArray[np.generic]]]) -> cs.ScoreBlock:
    """The scores of tiles, end to end."""
    return cs.ScoreBlock(**{name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
