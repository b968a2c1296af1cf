"""Scoring with a model that is on the device as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

import cache_schema as cs
from pipeline.engines.scoring import ScoreOptions, TokenBatch, as_batch
from pipeline.engines.tiles import joined, score_tile, tiles_of
from pipeline.forward.head import Head
from pipeline.forward.packing import decoder_body
from pipeline.forward.rows import lay_out, response_hidden


class ResidentScorer:
    """Scores tokens with one forward pass for each tile; no [T, V] tensor, no backward pass.

        teacher = ResidentScorer(models.load_model(recipe.teacher[0]))
        scores = teacher.compute_logprobs(round_.rollouts.read(0))       # ScoreBlock

    Args:
        model: on its device, as `load_model` loads it for scoring.
        on_tile: called before each forward pass, and on a CPU after each decoder layer, with the response tokens that
            the work since the last call amounts to; what it raises stops the scoring.
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
        device, progress = self._head.weight_VD.device, _TileProgress(self._on_tile)
        with progress.by_layer(decoder_body(self._model) if device.type == "cpu" else None):
            for tile in tiles_of(as_batch(batch), self._options.tile_tokens):
                tokens = lay_out(self._model, tile.sequences, tile.response_starts, device)
                progress.begin(len(tokens.target_ids))
                hidden_TD = response_hidden(self._model, tokens)
                parts.append(score_tile(hidden_TD, self._head, tokens.target_ids, tile, self._options, self._model))
                progress.end()
        return joined(parts)


class _TileProgress:
    """Reports a tile's response tokens, on request layer by layer: a tile takes a CPU minutes."""

    def __init__(self, report: Callable[[int], None]):
        self._report, self._tokens, self._reported, self._layers_done = report, 0, 0, 0

    def begin(self, n_tokens: int) -> None:
        self._tokens, self._reported, self._layers_done = n_tokens, 0, 0
        self._report(0)

    def end(self) -> None:
        self._report(self._tokens - self._reported)

    @contextmanager
    def by_layer(self, body: nn.Module | None) -> Iterator[None]:
        """Report within tiles while `body`, a decoder, is called; the head counts as one more layer."""
        lists = [] if body is None else [m for m in body.children() if isinstance(m, nn.ModuleList)]
        layers: nn.ModuleList | list[nn.Module] = max(lists, key=len, default=[])

        def on_layer(*_: object) -> None:
            self._layers_done += 1
            reached = self._tokens * min(self._layers_done, len(layers)) // (len(layers) + 1)
            self._report(reached - self._reported)
            self._reported = reached

        hooks = [layer.register_forward_hook(on_layer) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
