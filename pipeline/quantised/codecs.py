"""How the values of quantised weights are stored, and dequantised.

    W[i, j] = (values[i, j] - zeros[g]) * scales[g],    g = (i // rows of a block, j // columns of a block)

computed in fp32 and rounded once, to the type of the model. Formats differ in how values are packed and in how blocks
are cut:

    method                           stored beside a weight X
    fp8, fbgemm_fp8                  X (e4m3), X_scale_inv or X_scale: a block (128 x 128), row or tensor
    compressed-tensors               X (e4m3, int8) or X_packed (int32, or two e2m1 a byte), X_scale, X_zero_point
    awq, gptq                        qweight, qzeros (int32), scales, g_idx: transposed, groups of input features
    mxfp4 (gpt-oss)                  X_blocks (two e2m1 a byte), X_scales (exponents), 32 values each
    modelopt (NVFP4, FP8)            X (two e2m1 a byte, or e4m3), X_scale, X_scale_2

Activations are never quantised, whatever a checkpoint's config.json says about them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from pipeline.errors import ModelError


class Described(Protocol):
    """A tensor, stored or in memory."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...


T = TypeVar("T", bound=Described)

#: Types by their names in safetensors files.
STORED_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# Values that are dequantised at a time, in fp32: on the CPU few enough for its caches.
_CHUNK = {"cpu": 2**19, "cuda": 2**24}
# Nibble k of AWQ's int32 is column `_AWQ_COLUMNS[k]` of eight.
_AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Quantised(Generic[T]):
    """A weight of a quantised checkpoint.

    Attributes:
        name: as an unquantised checkpoint has it.
        shape: dequantised: [rows, columns], or [experts, rows, columns].
        parts: what is stored: "values", "scales", and some of "zeros", "groups" (of each column), "scale" (one more).
        codec: how it is stored.
        block: rows and columns with one scale.
    """

    name: str
    shape: tuple[int, ...]
    parts: dict[str, T]
    codec: Codec
    block: tuple[int, int]

    def dequantise(self, parts: Mapping[str, Tensor], out: Tensor) -> None:
        """Write the weight into `out` [*shape], of any floating type, on the device of its parts."""
        if len(self.shape) == 2:
            self._matrix(parts, out.mT if self.codec.transposed else out)
            return
        for expert in range(self.shape[0]):
            own = {role: part[expert] for role, part in parts.items()}
            self._matrix(own, out[expert].mT if self.codec.transposed else out[expert])

    def _matrix(self, parts: Mapping[str, Tensor], out: Tensor) -> None:
        n_rows, n_columns = out.shape
        scales, zeros = self.codec.grid(parts["scales"]), None
        if "scale" in parts:
            scale = parts["scale"].float()
            scales = scales / scale if self.codec.divides else scales * scale
        if "zeros" in parts:
            zeros = self.codec.zeros(parts["zeros"], len(scales))
        width = self.block[1]
        even = "groups" not in parts and n_columns % width == 0
        groups = parts.get("groups", torch.arange(n_columns, device=out.device) // width).long()
        step = max(8, _CHUNK[out.device.type] // n_columns // 8 * 8)
        for start in range(0, n_rows, step):
            end = min(start + step, n_rows)
            blocks = torch.arange(start, end, device=out.device) // self.block[0]
            values = self.codec.values(parts["values"], start, end, n_columns)

            def spread(grid: Tensor, blocks: Tensor = blocks) -> Tensor:
                return grid[blocks][..., None] if even else grid[blocks][:, groups]

            blocked = values.view(end - start, -1, width) if even else values
            if zeros is not None:
                blocked -= spread(zeros)
            blocked *= spread(scales)
            out[start:end] = values

    def check_groups(self, groups: Tensor, where: str) -> None:
        """Refuse groups of columns that have no scales; on CUDA an index out of bounds ends the process. Raises
        `ModelError` that begins with `where`.
        """
        n_groups = self.codec.n_groups(self.parts["scales"].shape)
        if len(groups) and not 0 <= int(groups.min()) <= int(groups.max()) < n_groups:
            raise ModelError(
                f"{where}: {self.name}: its g_idx has groups beyond its {n_groups} scales; download it again"
            )


# -- how values are stored -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Codec:
    """Values of one byte each (e4m3, int8), scales and zeros as a grid of blocks.

    Attributes:
        types: of stored values.
        transposed: the weight is the transpose of its values.
        divides: by a second scale, instead of multiplying.
    """

    types: tuple[torch.dtype, ...] = (*FP8, torch.int8)
    transposed: bool = False
    divides: bool = False

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """[..., rows, columns] of values that are stored with this shape."""
        return stored

    def grid_shape(self, grid: tuple[int, int]) -> tuple[int, ...]:
        """How the scales of `grid` blocks are stored."""
        return grid

    def zeros_shape(self, grid: tuple[int, int]) -> tuple[int, ...]:
        return self.grid_shape(grid)

    def n_groups(self, scales: tuple[int, ...]) -> int:
        return scales[-1]

    def grid(self, scales: Tensor) -> Tensor:
        """fp32 [rows, columns] of blocks."""
        scales = torch.exp2(scales.float() - 127) if scales.dtype == torch.uint8 else scales.float()
        return scales.reshape(1, 1) if scales.numel() == 1 else scales[:, None] if scales.ndim == 1 else scales

    def zeros(self, zeros: Tensor, n_rows: int) -> Tensor:
        return self.grid(zeros.to(torch.int32))

    def values(self, values: Tensor, start: int, end: int, n_columns: int) -> Tensor:
        """fp32 [end - start, columns], of rows from `start`, a multiple of 8."""
        return values[start:end].float()


@dataclass(frozen=True)
class Packed(Codec):
    """compressed-tensors' int32 of `32 // bits` values along columns, lowest bits first, half the range added."""

    types: tuple[torch.dtype, ...] = (torch.int32,)
    bits: int = 4

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        return (*stored[:-1], stored[-1] * (32 // self.bits))

    def zeros_shape(self, grid: tuple[int, int]) -> tuple[int, ...]:
        return (-(-grid[0] // (32 // self.bits)), grid[1])

    def zeros(self, zeros: Tensor, n_rows: int) -> Tensor:
        found = _unpacked(zeros.mT, self.bits)[:, :n_rows].mT
        return (found - (1 << self.bits - 1)).float()

    def values(self, values: Tensor, start: int, end: int, n_columns: int) -> Tensor:
        return (_unpacked(values[start:end], self.bits) - (1 << self.bits - 1)).float()


@dataclass(frozen=True)
class Gptq(Codec):
    """int32 [columns / n, rows] of n values each, the lowest bits first; scales and zeros [groups, rows]."""

    types: tuple[torch.dtype, ...] = (torch.int32,)
    bits: int = 4
    zeros_less_one: bool = False

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        return (stored[1], stored[0] * (32 // self.bits))

    def grid_shape(self, grid: tuple[int, int]) -> tuple[int, ...]:
        return (grid[1], grid[0])

    def zeros_shape(self, grid: tuple[int, int]) -> tuple[int, ...]:
        return (grid[1], grid[0] // (32 // self.bits))

    def n_groups(self, scales: tuple[int, ...]) -> int:
        return scales[0]

    def grid(self, scales: Tensor) -> Tensor:
        return scales.float().mT

    def zeros(self, zeros: Tensor, n_rows: int) -> Tensor:
        found = _unpacked(zeros, self.bits)
        if self.zeros_less_one:
            found = (found + 1) & ((1 << self.bits) - 1)
        return found.float().mT

    def values(self, values: Tensor, start: int, end: int, n_columns: int) -> Tensor:
        return _unpacked(values[:, start:end].mT, self.bits).float()


@dataclass(frozen=True)
class Awq(Gptq):
    """int32 [columns, rows / 8], whose nibbles are rows in AWQ's order; scales [groups, rows]."""

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        return (stored[1] * 8, stored[0])

    def zeros(self, zeros: Tensor, n_rows: int) -> Tensor:
        return _unpacked(zeros, 4, _AWQ_COLUMNS).float().mT

    def values(self, values: Tensor, start: int, end: int, n_columns: int) -> Tensor:
        return _unpacked(values[:, start // 8 : -(-end // 8)], 4, _AWQ_COLUMNS).mT.float()


@dataclass(frozen=True)
class Fp4(Codec):
    """Two e2m1 values a byte, the lower half first.

    Attributes:
        blocked: the last dimension is cut into [blocks, bytes].
    """

    types: tuple[torch.dtype, ...] = (torch.uint8,)
    blocked: bool = False

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        if self.blocked:
            stored = (*stored[:-2], stored[-2] * stored[-1])
        return (*stored[:-1], 2 * stored[-1])

    def values(self, values: Tensor, start: int, end: int, n_columns: int) -> Tensor:
        packed = values[start:end].reshape(end - start, -1)
        table = _e2m1(packed.device)
        return torch.stack([table[(packed & 15).int()], table[(packed >> 4).int()]], -1).flatten(1)


@functools.cache
def _e2m1(device: torch.device) -> Tensor:
    return torch.tensor([*_E2M1, *(-value for value in _E2M1)], device=device)


def _unpacked(packed: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """int32 [..., n] as unsigned values, int32 [..., n * (32 // bits)]; value `order[k]` has the k-th lowest bits."""
    order = order or tuple(range(32 // bits))
    shifts = [bits * order.index(k) for k in range(len(order))]
    shift = torch.tensor(shifts, dtype=torch.int32, device=packed.device)
    return ((packed[..., None] >> shift) & ((1 << bits) - 1)).flatten(-2)
