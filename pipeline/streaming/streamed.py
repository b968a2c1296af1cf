"""Scoring with one decoder layer on the device at a time: for models that do not fit.

A *wave* is a list of tiles. Their hidden states stay on the device while the layers pass by, so each layer's weights
are moved once for all of them (`pipeline.streaming.layers`), while the layer before computes. With P parameters of
two bytes in a layer, a link of B bytes a second and a device of F operations a second, W tokens take 2 P W / F
seconds to compute and 2 P / B to bring the weights for: streaming is as fast as a resident model from W = F / B on,
some thousand tokens on any card. The layers get the same tiles and run the same kernels as in the resident scorer
(`pipeline.streaming.layered`), so equal tiles give equal bits.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

import cache_schema as cs
from pipeline.config import ModelConfig
from pipeline.console import say
from pipeline.disk import readable
from pipeline.engines.scoring import ScoreOptions, TokenBatch, as_batch
from pipeline.engines.tiles import Tile, joined, score_tile, tiles_of
from pipeline.errors import ModelError
from pipeline.forward.head import Head
from pipeline.forward.packing import tiles
from pipeline.forward.packing_check import check_layout, settle_layout
from pipeline.forward.rows import forwards, gather_hidden, is_packed, lay_out
from pipeline.models import load as models
from pipeline.models._transformers_compat import initialize_as_loaded
from pipeline.models.files import check_model_files
from pipeline.models.load import free_bytes, with_adapter
from pipeline.models.peak_memory import PeakBytes, bytes_of
from pipeline.models.quantised import check_placement
from pipeline.models.resolve import ResolvedModel, resolve, setting_name
from pipeline.streaming.layered import LayeredModel
from pipeline.streaming.layers import SLOTS, Group, LayerStream, Transfer
from pipeline.streaming.memory import WaveBudget
from pipeline.streaming.weights import SafetensorsCheckpoint, locate

# What activations take is measured on so many tokens, in sequences of at most this length.
_PROBE_TOKENS = {"cuda": 4096, "cpu": 128}
_PROBE_LENGTH = 2048
# `check_layout` runs over every rollout so many times; rollouts shorter than this are not cut for it.
_CHECKED_TIMES, _CHECKED_SHORTEST = 8, 64
# Rows take so many times their tokens, with their padding.
_ROWS_PADDING = 1.2
# An embedding that is not the head as well stays in host memory if it would take more than this of the device's.
_EMBEDDING_SHARE = 0.05
# Of the host's free memory, for the checkpoint's files in the system's cache.
_FILE_CACHE_SHARE = 0.8


class StreamedScorer:
    """Reads tokens layer by layer; scores are bit for bit those of `ResidentScorer` at equal tiles.

        teacher = StreamedScorer(recipe.teacher[0], memory_gib=10)
        scores = teacher.compute_logprobs(round_.rollouts.read(0))       # ScoreBlock

    Args:
        model: a decoder of the transformers library, its weights in safetensors.
        memory_gib: what it may take of the device's memory, or of the host's on the CPU; most of what is free
            where None.
        longest: tokens of the longest rollout, prompt included, which is a tile by itself if it is longer than one.
        on_tile: called before each tile of each layer with the response tokens that the work since the last call
            amounts to; what it raises stops it.

    Attributes:
        wave_tokens: prompt and response tokens that may go through the layers together.
        batch_tokens: the same; a batch with so many response tokens fills its waves.
        layer_bytes: of all layers as they are stored, which every wave brings to the device.

    Raises:
        ModelError: weights that are missing or of an unknown layout; quantised in a way that is not known; a decoder
            that does more than call its layers.
        ConfigError: memory too small for one tile.
    """

    def __init__(
        self,
        model: ModelConfig | ResolvedModel,
        options: ScoreOptions = ScoreOptions(),  # noqa: B008  frozen
        *,
        memory_gib: float | None = None,
        longest: int = 0,
        on_tile: Callable[[int], None] = lambda tokens: None,
    ):
        self._source = source = resolve(model)
        self._options, self._on_tile, cfg = options, on_tile, source.settings
        self._device = models.pick_device(cfg)
        self._memory = WaveBudget(self._device, memory_gib)
        if method := source.settings.quantisation:
            raise ModelError(
                f"{source.setting('model')}: cannot be streamed and quantised to {method} while loading; use "
                'score.placement = "resident"'
            )
        check_placement(source, "streamed")
        check_model_files(source.directory)
        skeleton = models.load_skeleton(source)
        self._layered = LayeredModel(skeleton)
        transfer = Transfer(SafetensorsCheckpoint(source.directory, source.formats), self._device)
        transfer.checkpoint.check_groups()
        layers = self._load_others(skeleton, transfer)
        slot_bytes = max(layer.nbytes for layer in layers)
        self.layer_bytes = sum(stored.nbytes for layer in layers for stored in layer.stored)
        self._memory.take(f"{SLOTS} layers", SLOTS * slot_bytes)
        if buffer_bytes := max(layer.dequantised_nbytes for layer in layers):
            self._memory.take("a layer, dequantised", buffer_bytes)
        self._stream = LayerStream(transfer, layers, _beyond_file_cache(layers))
        self._model = self._with_adapter(skeleton, layers)
        self._head = Head.of(self._model)
        most = max(options.tile_tokens, longest)
        self.batch_tokens = self.wave_tokens = self._memory.take_wave(most, *self._measure(layers, most))
        in_bits = f" in {source.quantisation}, dequantised to {source.dtype}," if source.formats else ""
        say(
            f"{setting_name(cfg, 'model').rpartition('.')[0]}: {cfg.model} streamed to {self._device.type}: "
            f"{len(layers)} layers of {readable(slot_bytes)}{in_bits} through {SLOTS} slots, waves of up to "
            f"{self.wave_tokens:,} tokens, each with {readable(self.layer_bytes)} of weights, "
            f"at most {readable(sum(self._memory.taken.values()))} of "
            f"{readable(self._memory.budget)} expected in use"
        )

    @torch.inference_mode()
    def compute_logprobs(self, batch: TokenBatch | cs.RolloutBlock) -> cs.ScoreBlock:
        """Scores of every response token of the batch, [T] end to end.

        Raises `ModelError` for ids that the head lacks, and for weights that cannot be read any more.
        """
        waves = _waves(tiles_of(as_batch(batch), self._options.tile_tokens), self.wave_tokens)
        parts = []
        with self._stream.passes(len(waves)) as weights:
            for wave in waves:
                laid_out = [lay_out(self._model, t.sequences, t.response_starts, self._device) for t in wave]
                runs = [forwards(self._model, tokens) for tokens in laid_out]
                steps = self._steps(sum(len(tokens.target_ids) for tokens in laid_out), sum(map(len, runs)))
                hidden = self._layered.run([forward for run in runs for forward in run], weights, steps.__next__)
                for tile, tokens, run in zip(wave, laid_out, runs, strict=True):
                    hidden_TD = gather_hidden(tokens, [next(hidden) for _ in run])
                    parts.append(
                        score_tile(hidden_TD, self._head, tokens.target_ids, tile, self._options, self._model)
                    )
                next(steps)
        return joined(parts)

    def check_layout(self, sequences: Sequence[np.ndarray], response_starts: Sequence[int]) -> float:
        """`pipeline.forward.packing_check.check_layout`, all of it as one wave. Raises `ModelError`."""
        return check_layout(self._model, sequences, response_starts, run=self._in_one_wave)

    def settle_layout(self, sequences: Sequence[np.ndarray], response_starts: Sequence[int]) -> str:
        """`pipeline.forward.packing_check.settle_layout` of rollouts cut so that all of it is one wave. Raises
        `ModelError`.
        """
        limit = max(_CHECKED_SHORTEST, self.wave_tokens // (_CHECKED_TIMES * len(sequences)))
        rollouts = list(zip(sequences, response_starts, strict=True))
        cut = [(s[:limit], start) for s, start in rollouts if start < limit] or [
            min(rollouts, key=lambda r: len(r[0]))
        ]
        return settle_layout(self._model, *zip(*cut, strict=True), run=self._in_one_wave)

    def _in_one_wave(self, forwards: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
        with self._stream.passes(1) as weights:
            return list(self._layered.run(forwards, weights))

    def _steps(self, n_tokens: int, n_forwards: int) -> Iterator[None]:
        """Reports each step of a wave as its share of the wave's response tokens."""
        n_steps = n_forwards * (len(self._layered.layers) + 1)
        reported = 0
        for step in range(n_steps + 1):
            done = n_tokens * step // n_steps
            self._on_tile(done - reported)
            reported = done
            yield

    # -- preparing ---------------------------------------------------------------------------------------------

    def _load_others(self, skeleton: PreTrainedModel, transfer: Transfer) -> list[Group]:
        """Load what is outside the layers; returns what is in them. Refuses a checkpoint of an unknown layout."""
        checkpoint, layer_of = transfer.checkpoint, self._layered.layer_of
        places = locate(skeleton, checkpoint)
        in_layers = {name for name in places.missing if layer_of(name) is not None}
        models.check_weight_names(self._source, in_layers | places.lacking(skeleton), places.unexpected)
        layers, others = Group.partition(places, layer_of, self._device)
        # An adapter belongs to the device, and may be on the embedding.
        may_split = self._device.type == "cuda" and not self._source.settings.adapter
        aside = self._layered.embedding_alone() if may_split else None
        for group in others:
            if aside in group.offsets and group.nbytes > _EMBEDDING_SHARE * self._memory.budget:
                self._layered.embed_on_host(self._device)
                self._layered.install(Transfer(checkpoint, torch.device("cpu")).place(group))
            else:
                self._memory.take("weights outside the layers", group.nbytes + group.dequantised_nbytes)
                self._layered.install(transfer.place(group))
        skeleton.tie_weights(missing_keys=set(places.missing), recompute_mapping=False)
        initialize_as_loaded(skeleton)
        return [layers[index] for index in range(len(self._layered.layers))]

    def _with_adapter(self, skeleton: PreTrainedModel, layers: Sequence[Group]) -> Any:
        """The model with its adapter, which stays on the device. Refuses one that changes what it adapts."""
        if self._source.settings.adapter is None:
            return skeleton
        own = set(skeleton.parameters())
        # PEFT puts an adapter where the weights are: these are there, and take up one element each.
        stand_ins = {
            weight.name: torch.zeros((), dtype=weight.dtype, device=self._device).expand(weight.shape)
            for layer in layers
            for weight in layer.weights
        }
        empty = self._layered.install(stand_ins)
        model = with_adapter(skeleton, self._source)
        for name, weight in self._layered.install(empty).items():
            if weight.data_ptr() != stand_ins[name].data_ptr():
                raise self._layered.refusal(f"the adapter {self._source.settings.adapter} changes {name}")
        self._memory.take("adapter", sum(weight.nbytes for weight in set(model.parameters()) - own))
        return model.eval().requires_grad_(False)

    @torch.inference_mode()
    def _measure(self, layers: Sequence[Group], tile_tokens: int) -> tuple[float, float, float]:
        """Bytes of a token that waits, of one that a layer works on besides, and of the logits of a chunk."""
        n_tokens = min(tile_tokens, _PROBE_TOKENS[self._device.type])
        lengths = [min(_PROBE_LENGTH, n_tokens - start) for start in range(0, n_tokens, _PROBE_LENGTH)]
        probes = [np.zeros(length, np.int32) for length in lengths]
        tokens = lay_out(self._model, probes, [1] * len(lengths), self._device, one_forward=True)
        noted = self._layered.note(forwards(self._model, tokens)[0])
        n_tokens = n_tokens if is_packed(self._model) else int(n_tokens / _ROWS_PADDING)
        working = most = 0
        kinds = {tuple((w.shape, w.dtype) for w in layer.weights): index for index, layer in enumerate(layers)}
        for index in kinds.values():
            with PeakBytes() as dequantising:
                weights = layers[index].dequantise(layers[index].views(self._stream.slots[0]), self._stream.buffer)
            for weight in weights.values():  # a layer may divide by integers that it stores
                if not weight.is_floating_point():
                    weight.fill_(1)
            before = self._layered.install(weights)
            with PeakBytes() as peak:
                self._layered.step(index, noted)
            self._layered.install(before)
            working, most = max(working, peak.nbytes), max(most, dequantising.nbytes)
        if most:
            self._memory.take("dequantising", most)
        rows = min(self._options.rows_per_chunk, tile_tokens)
        logits = rows * self._head.vocab_size * self._head.logits_dtype.itemsize
        return bytes_of([noted.hidden, noted.calls]) / n_tokens, working / n_tokens, 2.0 * logits


def _beyond_file_cache(layers: Sequence[Group]) -> list[int]:
    """Layers for which the host has no room. Keeping the others cached keeps them from being read again in every
    wave; a cache of whatever was read last would lose all of them.
    """
    room = _FILE_CACHE_SHARE * free_bytes(torch.device("cpu"))
    ends = np.cumsum([sum(stored.nbytes for stored in layer.stored) for layer in layers])
    return [index for index, end in enumerate(ends) if end > room]


def _waves(batch: Sequence[Tile], wave_tokens: int) -> list[list[Tile]]:
    """Tiles in order, in as few waves as can be, and those of like size."""
    sizes = [sum(map(len, tile.sequences)) for tile in batch]
    fewest = len(tiles(sizes, wave_tokens))
    least = bisect_left(range(wave_tokens), True, key=lambda limit: len(tiles(sizes, limit)) <= fewest)
    return [[batch[i] for i in wave] for wave in tiles(sizes, least)]
