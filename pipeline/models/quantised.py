"""Quantised checkpoints in this process: whether they can be scored, and their weights for `from_pretrained`."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.errors import ModelError, one_line
from pipeline.models._transformers_compat import check_quantiser
from pipeline.models.identity import weight_files
from pipeline.models.resolve import ResolvedModel
from pipeline.quantised.codecs import STORED_TYPES, Quantised
from pipeline.quantised.formats import find


def check_placement(source: ResolvedModel, placement: str) -> None:
    """Refuse a quantised checkpoint that cannot be scored in this process. Reads its configuration alone.

    Raises `ModelError` naming a placement that may do.
    """
    if source.formats or source.settings.quantisation or not (method := source.quantisation):
        return
    try:
        if placement == "streamed":
            source.require_formats()
        check_quantiser(source.config.quantization_config)
    except Exception as error:  # whatever a quantiser raises that lacks a library or a device
        cannot = "cannot be streamed: " if placement == "streamed" else "cannot be loaded here: "
        raise ModelError(
            f"{source.setting('model')}: quantised by {method}, {cannot}{one_line(error)}; use "
            'score.placement = "vllm" or "server" for a teacher, or an unquantised model'
        ) from None


@dataclass(frozen=True)
class _Stored:
    """A tensor in an open safetensors file."""

    file: Any
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self) -> Tensor:
        return self.file.get_tensor(self.name)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Lazy:
    """Stands for a slice of a safetensors file in `from_pretrained`: read and dequantised when it is looked at."""

    piece: _Stored | Quantised[_Stored]
    dtype: torch.dtype
    device: torch.device

    def get_dtype(self) -> str:
        dtype = self.dtype if isinstance(self.piece, Quantised) else self.piece.dtype
        return next(name for name, known in STORED_TYPES.items() if known == dtype)

    def get_shape(self) -> list[int]:
        return list(self.piece.shape)

    def __getitem__(self, _: Any) -> Tensor:
        if isinstance(self.piece, _Stored):
            return self.piece.read()
        weight = torch.empty(self.piece.shape, dtype=self.dtype, device=self.device)
        parts = {role: part.read().to(self.device) for role, part in self.piece.parts.items()}
        self.piece.dequantise(parts, weight)
        return weight


def lazy_state(source: ResolvedModel, device: torch.device, stack: ExitStack) -> dict[str, Any]:
    """A quantised checkpoint's weights by the names of an unquantised one, each dequantised on `device` when it is
    looked at; its files are open until `stack` is closed. Raises `ModelError`.
    """
    stored: dict[str, _Stored] = {}
    for path in weight_files(source.directory):
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
            for name in file.keys():  # noqa: SIM118  no mapping
                found = file.get_slice(name)
                stored[name] = _Stored(file, name, tuple(found.get_shape()), STORED_TYPES[found.get_dtype()])
        except (OSError, SafetensorError, KeyError) as error:
            raise ModelError(
                f"{path}: cannot be read ({one_line(error)}); download or copy the model again"
            ) from None
    dtype = getattr(torch, source.dtype)
    where = str(source.directory)
    pieces = find(stored, source.formats, where)
    for piece in pieces.values():
        if isinstance(piece, Quantised) and "groups" in piece.parts:
            piece.check_groups(piece.parts["groups"].read(), where)
    return {name: _Lazy(piece, dtype, device) for name, piece in pieces.items()}
