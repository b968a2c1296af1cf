"""Where the tensors of a model lie in its checkpoint, found without reading any of them.

A checkpoint may name and cut its tensors otherwise than the model does: files of Mixtral and Qwen3-MoE hold every
expert by itself, their modules all experts in one tensor. transformers knows how to convert each layout. Its mapping
is applied to names and shapes first, so whatever is missing, left over or of another shape is known before a byte is
read. A conversion that only lays tensors end to end, as merging experts does, costs nothing: they are read to where
they belong. Weights of quantised checkpoints are found by the names that they have in unquantised ones, and are
dequantised on the way (`pipeline.quantised`).
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import mmap
import operator
import os
import re
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.errors import ModelError
from pipeline.models._transformers_compat import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    get_model_conversion_mapping,
    rename_source_key,
)
from pipeline.models.identity import weight_files
from pipeline.quantised.codecs import STORED_TYPES, Quantised
from pipeline.quantised.formats import Format, find

_HEADER_LIMIT = 100_000_000  # safetensors' own


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file: `nbytes` from `offset` of the checkpoint's file number `file`."""

    name: str
    file: int
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


#: What a weight, or a part of it, is made of.
Piece = Stored | Quantised[Stored]


def parts_of(piece: Piece) -> dict[str, Stored]:
    """The stored tensors of a piece, by their role in it."""
    return piece.parts if isinstance(piece, Quantised) else {"values": piece}


class SafetensorsCheckpoint:
    """The safetensors files of a model, open for reading from any thread.

    Args:
        formats: of its quantised weights.

    Attributes:
        stored: its tensors by name.
        pieces: the same, with its quantised weights in place of their parts.

    Raises:
        ModelError: a file cannot be read, or is no safetensors file; a quantised weight is incomplete.
    """

    def __init__(self, directory: Path, formats: Sequence[Format] = ()):
        self.directory = directory
        self._paths = weight_files(directory)
        self._files: list[int] = []
        weakref.finalize(self, _close, self._files)
        self.stored: dict[str, Stored] = {}
        for number, path in enumerate(self._paths):
            try:
                self._files.append(os.open(path, os.O_RDONLY))
                self.stored |= _header(self._files[number], number)
            except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
                reason = error.strerror if isinstance(error, OSError) else "no whole safetensors file"
                raise ModelError(f"{path}: cannot be read: {reason}; download or copy the model again") from None
        self.pieces: Mapping[str, Piece] = find(self.stored, formats, str(directory)) if formats else self.stored

    def read_into(self, stored: Stored, start: int, out: Tensor) -> None:
        """Fill `out` (u1, on the CPU) with bytes of a tensor from its byte `start` on. Raises `ModelError`."""
        view, position = memoryview(out.numpy().data), stored.offset + start
        try:
            while view:
                n = os.preadv(self._files[stored.file], [view], position)
                if not n:
                    raise ModelError(f"{self._paths[stored.file]}: ends in the middle of {stored.name}")
                view, position = view[n:], position + n
        except OSError as error:
            raise ModelError(f"{self._paths[stored.file]}: {stored.name} cannot be read: {error.strerror}") from None

    def read(self, piece: Piece) -> Tensor:
        """A tensor, on the CPU; in fp32 if it is dequantised. Raises `ModelError`."""
        if isinstance(piece, Stored):
            return self._read(piece)
        weight = torch.empty(piece.shape)
        piece.dequantise({role: self._read(part) for role, part in piece.parts.items()}, weight)
        return weight

    def check_groups(self) -> None:
        """Refuse quantised weights with groups out of bounds. Reads those alone. Raises `ModelError`."""
        for piece in self.pieces.values():
            if isinstance(piece, Quantised) and "groups" in piece.parts:
                piece.check_groups(self._read(piece.parts["groups"]), str(self.directory))

    def _read(self, stored: Stored) -> Tensor:
        out = torch.empty(stored.shape, dtype=stored.dtype)
        self.read_into(stored, 0, out.view(-1).view(torch.uint8))
        return out

    def mapped(self, stored: Stored) -> Tensor:
        """A tensor in memory that the system fills from the file when it is looked at, and may take back."""
        start = stored.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        within = stored.offset - start
        pages = mmap.mmap(self._files[stored.file], within + stored.nbytes, offset=start, access=mmap.ACCESS_COPY)
        return torch.frombuffer(pages, dtype=torch.uint8)[within:].view(stored.dtype).view(stored.shape)

    def uncache(self, stored: Iterable[Stored]) -> None:
        """Let the system drop its copy of tensors that will not be read again soon."""
        for tensor in stored:
            os.posix_fadvise(self._files[tensor.file], tensor.offset, tensor.nbytes, os.POSIX_FADV_DONTNEED)


def _close(files: list[int]) -> None:
    for file in files:
        os.close(file)


def _header(file: int, number: int) -> dict[str, Stored]:
    """The tensors of an open safetensors file. Raises `ValueError`, `KeyError` or `TypeError` if it is none."""
    length = int.from_bytes(os.pread(file, 8, 0), "little")
    if length > min(_HEADER_LIMIT, os.fstat(file).st_size - 8):
        raise ValueError("its header is longer than the file")
    found: dict[str, Stored] = {}
    for name, entry in json.loads(os.pread(file, length, 8)).items():
        if name == "__metadata__":
            continue
        start, end = map(operator.index, entry["data_offsets"])
        if any(not isinstance(size, int) or size < 0 for size in entry["shape"]):
            raise ValueError(f"{name} has no shape")
        stored = Stored(name, number, 8 + length + start, STORED_TYPES[entry["dtype"]], tuple(entry["shape"]))
        if stored.nbytes != end - start or not 0 <= start <= end <= os.fstat(file).st_size - 8 - length:
            raise ValueError(f"{name} is outside the file")
        found[name] = stored
    return found


@dataclass(frozen=True)
class Weight:
    """A parameter, or buffer, of the model.

    Attributes:
        pieces: tensors of the checkpoint whose values, end to end, are the weight's; none where `Conversion.run`
            makes it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...] = ()

    @property
    def is_quantised(self) -> bool:
        return any(isinstance(piece, Quantised) for piece in self.pieces)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Conversion:
    """Weights that transformers makes of stored tensors by more than laying them end to end.

    Attributes:
        sources: the tensors, each with the pattern of the converter that it matches.
        target: the weight's name, the first one's if there are several.
        dtype: into which tensors are cast first.
        names: of all the weights.
    """

    converter: WeightConverter
    sources: tuple[tuple[str, Piece], ...]
    target: str
    dtype: torch.dtype
    model: PreTrainedModel
    names: tuple[str, ...] = ()

    def run(self, read: Callable[[Piece], Tensor]) -> dict[str, Tensor]:
        """The weights, by name."""
        converter = copy.deepcopy(self.converter)
        for pattern, stored in self.sources:
            converter.add_tensor(self.target, stored.name, pattern, read(stored).to(self.dtype))
        made = converter.convert(self.target, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def shapes(self) -> dict[str, Tensor]:
        """The weights on the meta device."""
        return self.run(lambda piece: torch.empty(piece.shape, dtype=self.dtype, device="meta"))

    def pieces(self) -> tuple[Piece, ...]:
        """The sources in an order in which, end to end, they are the weight; none if they are not."""
        columns: dict[str, list[Piece]] = {}
        for pattern, stored in self.sources:
            columns.setdefault(pattern, []).append(stored)
        operations = [(type(op), getattr(op, "dim", None)) for op in self.converter.operations]
        if operations == [(MergeModulelist, 0)] and len(columns) == 1:
            return tuple(next(iter(columns.values())))
        if operations == [(MergeModulelist, 0), (Concatenate, 1)]:
            ordered = [columns[pattern] for pattern in self.converter.source_patterns if pattern in columns]
            return tuple(stored for expert in zip(*ordered, strict=True) for stored in expert)
        return ()


@dataclass(frozen=True)
class Places:
    """Where the whole state of a model lies.

    Attributes:
        weights: by name, as in `model.state_dict()`.
        conversions: what makes those of them that have no pieces.
        missing: names that no stored tensor gives.
        unexpected: stored tensors that no name takes, by the name that they would have in the model.
    """

    weights: dict[str, Weight]
    conversions: list[Conversion]
    missing: set[str]
    unexpected: set[str]

    def lacking(self, model: PreTrainedModel) -> set[str]:
        """Those of the missing that are not tied to a weight which is there."""
        ties = [pair for pair in model.all_tied_weights_keys.items() if not self.missing.issuperset(pair)]
        return {name for name in self.missing if not any(name in pair for pair in ties)}


def locate(model: PreTrainedModel, checkpoint: SafetensorsCheckpoint) -> Places:
    """Find every weight of a model (on the meta device) in a checkpoint, by the rules of `from_pretrained`.

    Raises:
        ModelError: a tensor has another shape than the model gives it, or cannot be converted.
    """
    state = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    dtypes = _dtypes(model, state)
    prefix = model.base_model_prefix
    weights: dict[str, Weight] = {}
    converted: dict[str, list[tuple[str, Piece]]] = {}
    unexpected: set[str] = set()
    for name, stored in sorted(checkpoint.pieces.items(), key=lambda item: dot_natural_key(item[0])):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        if target not in state:
            unexpected.add(target)
        elif pattern is not None:
            converted.setdefault(target, []).append((pattern, stored))
        else:
            weights[target] = _checked(Weight(target, stored.shape, dtypes[target], (stored,)), state, checkpoint)
    conversions: list[Conversion] = []
    for target, sources in converted.items():
        conversion = Conversion(converter_of[sources[0][0]], tuple(sources), target, dtypes[target], model)
        try:
            made, pieces = conversion.shapes(), conversion.pieces()
        except Exception as error:  # whatever a conversion raises for tensors that it does not fit
            raise ModelError(
                f"{checkpoint.directory}: {sources[0][1].name} and what belongs to it cannot be converted to "
                f"{target} ({type(error).__name__}: {error})"
            ) from error
        for name, value in made.items():
            weights[name] = _checked(Weight(name, tuple(value.shape), value.dtype, pieces), state, checkpoint)
        if not pieces:
            conversions.append(dataclasses.replace(conversion, names=tuple(made)))
    return Places(weights, conversions, state.keys() - weights.keys(), _relevant(model, unexpected))


def _checked(weight: Weight, state: Mapping[str, Tensor], checkpoint: SafetensorsCheckpoint) -> Weight:
    if weight.name not in state or tuple(state[weight.name].shape) != weight.shape:
        wanted = tuple(state[weight.name].shape) if weight.name in state else "no such weight"
        raise ModelError(f"{checkpoint.directory}: {weight.name}: expected {wanted}, got {weight.shape}")
    return weight


def _dtypes(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
    """The type of each weight: the model's, or what the architecture insists on (routers in fp32)."""
    plan = model._get_dtype_plan(model.dtype)
    patterns = {re.compile(name.replace("*", ".*")): dtype for name, dtype in plan.items()}

    def dtype(name: str) -> torch.dtype:
        return next((kept for pattern, kept in patterns.items() if pattern.search(name)), state[name].dtype)

    return {name: dtype(name) for name in state}


def _relevant(model: PreTrainedModel, unexpected: set[str]) -> set[str]:
    """What is left of unexpected names without those that the architecture says to ignore."""
    ignored = [*(model._keys_to_ignore_on_load_unexpected or []), r"rotary_emb\.inv_freq"]
    return {name for name in unexpected if not any(re.search(pattern, name) for pattern in ignored)}
