"""The weights of one decoder layer after the other, in memory that is used again.

Each layer's weights go into one of a few slots on the device while an earlier layer computes. On the CPU a slot is
read into straight from the files. On CUDA a few threads read into pinned buffers, a stream of its own copies those to
the slot, and events keep apart who writes and who reads:

    copy stream      waits for `free` (the slot's last user is done with it), copies, records `ready`
    compute stream   waits for `ready`, computes, records `free`

so that nothing is allocated for a layer, and the host never waits for the device but for a pinned buffer. Quantised
weights travel as they are stored; the compute stream dequantises those of one layer at a time, into a buffer that all
layers share.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections import deque
from collections.abc import Callable, Container, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import ModelError
from pipeline.streaming.weights import Conversion, Places, SafetensorsCheckpoint, Stored, Weight, parts_of

SLOTS = 2
_cuda: Any = torch.cuda  # its streams and events have no types
# What CUDA's allocator aligns tensors to; kernels choose by alignment.
_ALIGNMENT = 512
_MAPPED_BYTES = 2**20
_CHUNK_BYTES = 16 * 2**20
_STAGED_CHUNKS_PER_READER = 2


@dataclass(frozen=True)
class Group:
    """Weights that are on the device together.

    Attributes:
        offsets: where in their slot each begins, in bytes; by name, of quantised ones those of their parts.
        nbytes: of the slot.
        dequantised: where each quantised weight begins, once dequantised, in a buffer of `dequantised_nbytes`.
    """

    weights: tuple[Weight, ...]
    conversions: tuple[Conversion, ...]
    offsets: dict[str, int]
    nbytes: int
    dequantised: dict[str, int]
    dequantised_nbytes: int

    @classmethod
    def of(cls, weights: Sequence[Weight], conversions: Sequence[Conversion], device: torch.device) -> Group:
        """Raises `ModelError` for a conversion that makes other weights as well."""
        offsets: dict[str, int] = {}
        dequantised: dict[str, int] = {}
        end = buffer_end = 0
        for weight in weights:
            if not weight.is_quantised:
                offsets[weight.name] = _aligned(end) + _phase(weight, device)
                end = offsets[weight.name] + weight.nbytes
                continue
            dequantised[weight.name] = _aligned(buffer_end)
            buffer_end = dequantised[weight.name] + weight.nbytes
            for part in _parts(weight):
                offsets[part.name] = _aligned(end)
                end = offsets[part.name] + part.nbytes
        names = {weight.name for weight in weights}
        for conversion in conversions:
            if outside := set(conversion.names) - names:
                raise ModelError(f"{conversion.sources[0][1].name} is part of {min(names)} and of {min(outside)}")
        return cls(tuple(weights), tuple(conversions), offsets, _aligned(end), dequantised, _aligned(buffer_end))

    @classmethod
    def partition(
        cls, places: Places, layer_of: Callable[[str], int | None], device: torch.device
    ) -> tuple[dict[int, Group], list[Group]]:
        """The weights of each layer, and, as small as can be, groups of those outside the layers."""
        maker = {name: conversion for conversion in places.conversions for name in conversion.names}
        members: dict[int | str, list[Weight]] = {}
        for name, weight in places.weights.items():
            layer = layer_of(name)
            alone = maker[name].target if name in maker else name
            members.setdefault(alone if layer is None else layer, []).append(weight)
        makers = {key: {maker[w.name].target for w in weights if w.name in maker} for key, weights in members.items()}
        groups = {
            key: cls.of(weights, [c for c in places.conversions if c.target in makers[key]], device)
            for key, weights in members.items()
        }
        layers = {key: group for key, group in groups.items() if isinstance(key, int)}
        return layers, [group for key, group in groups.items() if isinstance(key, str)]

    @property
    def stored(self) -> list[Stored]:
        """What is read for them."""
        direct = [part for weight in self.weights for part in _parts(weight)]
        converted = [piece for conversion in self.conversions for _, piece in conversion.sources]
        return direct + [part for piece in converted for part in parts_of(piece).values()]

    def views(self, slot: Tensor) -> dict[str, Tensor]:
        """The weights, or parts of quantised ones, in a slot (u1 [nbytes])."""
        held = [part for w in self.weights for part in (_parts(w) if w.is_quantised else [w])]
        return {one.name: _view(slot, self.offsets[one.name], one) for one in held}

    def dequantise(self, views: Mapping[str, Tensor], buffer: Tensor) -> dict[str, Tensor]:
        """The weights of views of a slot; quantised ones are written into a buffer (u1 [dequantised_nbytes])."""
        found = {}
        for weight in self.weights:
            if not weight.is_quantised:
                found[weight.name] = views[weight.name]
                continue
            out = found[weight.name] = _view(buffer, self.dequantised[weight.name], weight)
            start = 0
            for piece in weight.pieces:
                own = out.view(-1)[start : start + math.prod(piece.shape)].view(piece.shape)
                start += own.numel()
                parts = {role: views[part.name] for role, part in parts_of(piece).items()}
                if isinstance(piece, Stored):
                    own.copy_(parts["values"])
                else:
                    piece.dequantise(parts, own)
        return found


def _parts(weight: Weight) -> list[Stored]:
    return [part for piece in weight.pieces for part in parts_of(piece).values()]


def _view(memory: Tensor, offset: int, held: Weight | Stored) -> Tensor:
    return memory[offset : offset + held.nbytes].view(held.dtype).view(held.shape)


def _aligned(position: int) -> int:
    return -(-position // _ALIGNMENT) * _ALIGNMENT


def _mapped(weight: Weight, device: torch.device) -> bool:
    """Whether transformers would leave the weight in a mapped file: on the CPU, as it is."""
    if device.type != "cpu" or len(weight.pieces) != 1:
        return False
    piece = weight.pieces[0]
    if not isinstance(piece, Stored):
        return False
    return piece.dtype == weight.dtype and piece.offset % weight.dtype.itemsize == 0


def _phase(weight: Weight, device: torch.device) -> int:
    """How far from alignment transformers would have the weight: the last bits of products depend on that."""
    return _parts(weight)[0].offset % _ALIGNMENT if _mapped(weight, device) else 0


def empty_slot(nbytes: int, device: torch.device) -> Tensor:
    """u1 [nbytes] of zeros, aligned."""
    buffer = torch.zeros(nbytes + _ALIGNMENT, dtype=torch.uint8, device=device)
    return buffer[-buffer.data_ptr() % _ALIGNMENT :][:nbytes]


class Transfer:
    """Brings weights from a checkpoint's files to a device, by a few threads."""

    def __init__(self, checkpoint: SafetensorsCheckpoint, device: torch.device):
        self.checkpoint, self.device = checkpoint, device
        n_readers = max(1, min(8, (os.cpu_count() or 1) // 2))
        self._readers = ThreadPoolExecutor(n_readers, "redpen-reader")
        self.stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self.stream = _cuda.Stream(device)
            self._staging: SimpleQueue[tuple[Tensor, torch.cuda.Event]] = SimpleQueue()
            for _ in range(n_readers * _STAGED_CHUNKS_PER_READER):
                chunk = torch.empty(_CHUNK_BYTES, dtype=torch.uint8, pin_memory=True)
                self._staging.put((chunk, _cuda.Event(blocking=True)))

    def load(self, group: Group, slot: Tensor) -> dict[str, Tensor]:
        """Fill a slot, and return its views; on CUDA the copies may still be under way in `stream`. Raises
        `ModelError`.
        """
        views = group.views(slot)
        chunks: list[Future[None]] = []
        for weight in group.weights:
            start = 0
            for part in _parts(weight):
                if weight.is_quantised:
                    chunks += self._submit(part, views[part.name].view(-1))
                    continue
                values = part.nbytes // part.dtype.itemsize
                chunks += self._submit(part, views[weight.name].view(-1)[start : start + values])
                start += values
        try:
            for conversion in group.conversions:
                for name, value in conversion.run(self.checkpoint.read).items():
                    with torch.cuda.stream(self.stream):
                        views[name].copy_(value)
            for chunk in chunks:
                chunk.result()
        finally:
            for chunk in chunks:
                chunk.cancel()
        return views

    def place(self, group: Group) -> dict[str, Tensor]:
        """Weights in memory of their own, ready for use; mapped if they are large and can be. Raises `ModelError`."""
        if group.nbytes >= _MAPPED_BYTES and all(_mapped(weight, self.device) for weight in group.weights):
            return {weight.name: self.checkpoint.mapped(_parts(weight)[0]) for weight in group.weights}
        slot = empty_slot(group.nbytes, self.device)
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        views = self.load(group, slot)
        self.finish()
        return group.dequantise(views, empty_slot(group.dequantised_nbytes, self.device))

    def finish(self) -> None:
        """Wait for copies that are under way."""
        if self.stream is not None:
            self.stream.synchronize()

    def _submit(self, piece: Stored, out: Tensor) -> list[Future[None]]:
        step = _CHUNK_BYTES // piece.dtype.itemsize
        return [
            self._readers.submit(self._copy, piece, start, out[start : start + step])
            for start in range(0, len(out), step)
        ]

    def _copy(self, piece: Stored, start: int, out: Tensor) -> None:
        """Values of a stored tensor from value `start` on, cast to the type of `out` [n]."""
        start, nbytes = start * piece.dtype.itemsize, len(out) * piece.dtype.itemsize
        if self.stream is None:
            if piece.dtype == out.dtype:
                self.checkpoint.read_into(piece, start, out.view(torch.uint8))
            else:
                raw = torch.empty(nbytes, dtype=torch.uint8)
                self.checkpoint.read_into(piece, start, raw)
                out.copy_(raw.view(piece.dtype))
            return
        chunk, copied = self._staging.get()
        try:
            copied.synchronize()
            self.checkpoint.read_into(piece, start, chunk[:nbytes])
            raw = chunk[:nbytes].view(piece.dtype)
            with torch.cuda.stream(self.stream):
                if piece.dtype != out.dtype:  # cast on the device
                    raw = raw.to(self.device, non_blocking=True)
                out.copy_(raw, non_blocking=True)
                copied.record()
        finally:
            self._staging.put((chunk, copied))


class LayerStream:
    """Layers' weights in order, the next ones on their way while the caller works with one.

    Args:
        uncached: layers that the system's file cache need not keep, since it has no room for all of them.
    """

    def __init__(self, transfer: Transfer, layers: Sequence[Group], uncached: Container[int] = ()):
        self._transfer, self._layers, self._uncached = transfer, layers, uncached
        nbytes = max(layer.nbytes for layer in layers)
        self.slots = [empty_slot(nbytes, transfer.device) for _ in range(SLOTS)]
        self.buffer = empty_slot(max(layer.dequantised_nbytes for layer in layers), transfer.device)
        on_cuda = transfer.stream is not None
        self._ready, self._free = ([_cuda.Event() for _ in self.slots if on_cuda] for _ in range(2))

    @contextlib.contextmanager
    def passes(self, n: int) -> Iterator[Iterator[tuple[int, dict[str, Tensor]]]]:
        """Each layer's number and weights, `n` times over all layers.

        Weights are good until the next ones are asked for. Work on them that is on the current CUDA stream by then is
        waited for. Raises `ModelError`.
        """
        order = list(range(len(self._layers))) * n
        for free in self._free:  # once what is enqueued is done
            free.record()
        with ThreadPoolExecutor(1, "redpen-layers") as loader:
            coming = deque(loader.submit(self._load, layer, slot) for slot, layer in enumerate(order[:SLOTS]))
            items = self._take(order, coming, loader)
            try:
                yield items
            finally:
                items.close()
                loader.shutdown(cancel_futures=True)
                self._transfer.finish()

    def _take(
        self, order: list[int], coming: deque[Future[dict[str, Tensor]]], loader: ThreadPoolExecutor
    ) -> Generator[tuple[int, dict[str, Tensor]], None, None]:
        for step, layer in enumerate(order):
            slot, views = step % SLOTS, coming.popleft().result()
            if self._ready:
                self._ready[slot].wait()
            try:
                yield layer, self._layers[layer].dequantise(views, self.buffer)
            finally:
                if self._free:
                    self._free[slot].record()
            if step + SLOTS < len(order):
                coming.append(loader.submit(self._load, order[step + SLOTS], slot))

    def _load(self, layer: int, slot: int) -> dict[str, Tensor]:
        stream, group = self._transfer.stream, self._layers[layer]
        if stream is not None:
            stream.wait_event(self._free[slot])
        weights = self._transfer.load(group, self.slots[slot])
        if stream is not None:
            self._ready[slot].record(stream)
        if layer in self._uncached:
            self._transfer.checkpoint.uncache(group.stored)
        return weights
