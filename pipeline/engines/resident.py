"""Scoring with a model that is on the device as a whole."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

import cache_schema as cs
from pipeline.engines.scoring import ScoreOptions, TokenBatch, as_batch
from pipeline.engines.tiles import joined, score_tile, tiles_of
from pipeline.forward.head import Head
from pipeline.forward.rows import lay_out, response_hidden


class ResidentScorer:
    """Scores tokens with one forward pass for each tile; no [T, V] tensor, no backward pass.

        teacher = ResidentScorer(models.load_model(recipe.teacher[0]))
        scores = teacher.compute_logprobs(round_.rollouts.read(0))       # ScoreBlock

    Args:
        model: on its device, as `load_model` loads it for scoring.
        on_tile: called before each forward pass with the response tokens scored since the last call; what it raises
            stops the scoring.
    """

    batch_tokens = 1

    def __init__(
        self,
        model: PreTrainedModel,
        options: ScoreOptions = ScoreOptions(),  # noqa: B008  frozen
        *,
        on_tile: Callable[[int], None] = lambda tokens: None,
    ):
        self._model, self._head = model, Head.of(model)
        self._options, self._on_tile = options, on_tile

    @torch.inference_mode()
    def compute_logprobs(self, batch: TokenBatch | cs.RolloutBlock) -> cs.ScoreBlock:
        """Scores of every response token of the batch, [T] end to end.

        Raises `ModelError` for ids that the head lacks.
        """
        parts = []
        n_scored = 0
        for tile in tiles_of(as_batch(batch), self._options.tile_tokens):
            self._on_tile(n_scored)
            tokens = lay_out(self._model, tile.sequences, tile.response_starts, self._head.weight_VD.device)
            hidden_TD = response_hidden(self._model, tokens)
            parts.append(score_tile(hidden_TD, self._head, tokens.target_ids, tile, self._options, self._model))
            n_scored = len(tokens.target_ids)
        self._on_tile(n_scored)
        return joined(parts)
