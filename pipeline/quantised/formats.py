"""Which tensors of a checkpoint are a quantised weight, by what its config.json says."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.errors import ModelError
from pipeline.quantised.codecs import FP8, Awq, Codec, Fp4, Gptq, Packed, Quantised, T

# Quantise activations; weights do not depend on them.
_OF_ACTIVATIONS = re.compile(r"(^|[._])(input|output|activation)_(global_)?(scale|zero_point)(_inv|_ub)?$")


@dataclass(frozen=True)
class Format:
    """A method's quantised weights.

    Attributes:
        values: what the name of the stored values ends in.
        weight: what the name of the weight ends in instead.
        siblings: how the other parts are called, by role; several names are alternatives.
        scheme: of a module, by its name.
        types: that mark quantised values; others are plain weights.
    """

    values: str
    weight: str
    siblings: Mapping[str, tuple[str, ...]]
    scheme: Callable[[str], Scheme]
    types: tuple[torch.dtype, ...]


@dataclass(frozen=True)
class Scheme:
    """How a module's weight is quantised.

    Attributes:
        block: rows and columns with one scale, 0 for all; None: a row or all, by the number of scales.
        needs: roles of parts without which the weight would be another.
    """

    codec: Codec
    block: tuple[int, int] | None
    needs: tuple[str, ...] = ("scales",)


def formats_of(settings: Mapping[str, Any]) -> list[Format]:
    """The formats that a config.json's `quantization_config` announces.

    Raises `ModelError` with the reason why they cannot be dequantised here.
    """
    method = settings.get("quant_method", "unknown")
    try:
        if method in _METHODS:
            return _METHODS[method](settings)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, re.error) as error:
        raise ModelError(f"its {method} settings are not understood ({type(error).__name__}: {error})") from None
    raise ModelError(f"{method} is not one of the methods that can be dequantised here ({', '.join(_METHODS)})")


def find(stored: Mapping[str, T], formats: Sequence[Format], where: str) -> dict[str, T | Quantised[T]]:
    """A quantised checkpoint's tensors by the names that an unquantised one has.

    Raises:
        ModelError: parts are missing, or have not the shape and type that belong to the weight. Begins with `where`.
    """
    found: dict[str, T | Quantised[T]] = {}
    used: set[str] = set()
    try:
        for format_ in formats:
            for weight, names in _found_by(format_, stored):
                found[weight.name] = weight
                used |= names
        if not found:
            raise ModelError("its config.json says that it is quantised, but none of its weights are; correct it")
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from None
    for name, tensor in stored.items():
        if name in used or _OF_ACTIVATIONS.search(name):
            continue
        if tensor.dtype in FP8:
            raise ModelError(f"{where}: {name}: is in 8 bits and has no scales; download the model again")
        found[name] = tensor
    return found


def _found_by(format_: Format, stored: Mapping[str, T]) -> Iterator[tuple[Quantised[T], set[str]]]:
    for name, values in stored.items():
        stem = name.removesuffix(format_.values)
        if not name.endswith(format_.values) or values.dtype not in format_.types:
            continue
        names = {"values": name}
        for role, endings in format_.siblings.items():
            there = next((stem + ending for ending in endings if stem + ending in stored), None)
            if there is not None:
                names[role] = there
        scheme = format_.scheme(stem.removesuffix(".weight"))
        if lacking := [role for role in scheme.needs if role not in names]:
            wanted = " or ".join(stem + ending for ending in format_.siblings[lacking[0]])
            raise ModelError(
                f"{name}: expected {lacking[0]} beside it ({wanted}), found none; download the model again"
            )
        parts = {role: stored[part] for role, part in names.items() if role != "unused"}
        yield _weight(stem + format_.weight, parts, scheme.codec, scheme.block), set(names.values())


def _weight(name: str, parts: dict[str, T], codec: Codec, block: tuple[int, int] | None) -> Quantised[T]:
    """A weight whose parts fit together. Raises `ModelError`."""
    values, scales = parts["values"], parts["scales"]
    if values.dtype not in codec.types:
        raise ModelError(
            f"{name}: expected quantised values of type {_names(codec.types)}, got {_names([values.dtype])}"
        )
    if len(values.shape) not in (2, 3, 4):
        raise ModelError(f"{name}: expected a matrix of quantised values, got shape {values.shape}")
    shape = codec.shape(values.shape)
    experts, (n_rows, n_columns) = shape[:-2], shape[-2:]
    if block is None:
        block = (n_rows, n_columns) if math.prod(scales.shape) == math.prod(experts) else (1, n_columns)
    block = (block[0] if block[0] > 0 else n_rows, block[1] if block[1] > 0 else n_columns)
    grid = (-(-n_rows // block[0]), -(-n_columns // block[1]))
    wanted = {"scales": codec.grid_shape(grid), "zeros": codec.zeros_shape(grid), "groups": (n_columns,), "scale": ()}
    for role, part in parts.items():
        if role != "values" and not _fits(part.shape, experts, wanted[role]):
            raise ModelError(
                f"{name}: expected {role} of shape {(*experts, *wanted[role])} for {n_rows} x {n_columns} values in "
                f"blocks of {block[0]} x {block[1]}, got {part.shape}"
            )
    for role, types in (("zeros", (torch.int32, torch.int8)), ("groups", (torch.int32, torch.int64))):
        if role in parts and parts[role].dtype not in types:
            raise ModelError(f"{name}: expected {role} of type {_names(types)}, got {_names([parts[role].dtype])}")
    if not (scales.dtype.is_floating_point or scales.dtype == torch.uint8):
        raise ModelError(f"{name}: expected scales of a floating type, got {_names([scales.dtype])}")
    shape = (*experts, n_columns, n_rows) if codec.transposed else shape
    return Quantised(name, shape, parts, codec, block)


def _fits(shape: tuple[int, ...], experts: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a part has a shape, where dimensions of 1 at the end may be left out."""
    shape, wanted = tuple(shape), (*experts, *wanted)
    while wanted and wanted[-1] == 1 and len(wanted) > len(shape):
        wanted = wanted[:-1]
    while shape and shape[-1] == 1 and len(shape) > len(wanted):
        shape = shape[:-1]
    return shape == wanted


def _names(types: Any) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in types)


# -- what config.json says about each method -----------------------------------------------------------------------

_ONE_BYTE = (*FP8, torch.int8)


def _in_all(values: str, weight: str, siblings: Mapping[str, tuple[str, ...]], scheme: Scheme) -> Format:
    return Format(values, weight, siblings, lambda module: scheme, scheme.codec.types)


def _fp8(settings: Mapping[str, Any]) -> list[Format]:
    block = settings.get("weight_block_size")
    scheme = Scheme(Codec(FP8), None if block is None else (int(block[0]), int(block[1])))
    return [_in_all("", "", {"scales": ("_scale_inv", "_scale")}, scheme)]


def _mxfp4(settings: Mapping[str, Any]) -> list[Format]:
    return [_in_all("_blocks", "", {"scales": ("_scales",)}, Scheme(Fp4(blocked=True, transposed=True), (1, 32)))]


def _modelopt(settings: Mapping[str, Any]) -> list[Format]:
    match settings.get("quant_algo"):
        case "FP8":
            return _fp8({})
        case "NVFP4":
            scheme = Scheme(Fp4(), (1, int(settings.get("group_size") or 16)), ("scales", "scale"))
            siblings = {"scales": (".weight_scale",), "scale": (".weight_scale_2",)}
            return [_in_all(".weight", ".weight", siblings, scheme)]
        case other:
            raise ModelError(f"modelopt's {other} cannot be dequantised here (FP8 and NVFP4 can)")


def _awq(settings: Mapping[str, Any]) -> list[Format]:
    version = str(settings.get("version") or settings.get("format") or "gemm").lower()
    if (bits := settings.get("bits", settings.get("w_bit", 4))) != 4 or version != "gemm":
        raise ModelError(f"AWQ with {bits} bits in version {version!r} cannot be dequantised here (4 in 'gemm' can)")
    group = int(settings.get("group_size", settings.get("q_group_size", 128)))
    return [_of_int32(Scheme(Awq(), (1, group), ("scales", "zeros")))]


def _gptq(settings: Mapping[str, Any]) -> list[Format]:
    layout = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    bits = settings["bits"]
    if bits not in (2, 4, 8) or layout not in ("gptq", "gptq_v2") or settings.get("dynamic"):
        unusual = "with settings for single modules" if settings.get("dynamic") else f"in {layout!r}"
        raise ModelError(f"GPTQ with {bits} bits {unusual} cannot be dequantised here (2, 4 and 8 in 'gptq' can)")
    needs = ("scales", "zeros", "groups") if settings.get("desc_act") else ("scales", "zeros")
    codec = Gptq(bits=bits, zeros_less_one=layout == "gptq")
    return [_of_int32(Scheme(codec, (1, int(settings.get("group_size", 128))), needs))]


def _of_int32(scheme: Scheme) -> Format:
    siblings = {"scales": (".scales",), "zeros": (".qzeros",), "groups": (".g_idx",)}
    return _in_all(".qweight", ".weight", siblings, scheme)


def _compressed_tensors(settings: Mapping[str, Any]) -> list[Format]:
    if settings.get("transform_config"):
        raise ModelError("compressed-tensors with a transform_config cannot be dequantised here")
    if (settings.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise ModelError("compressed-tensors with sparse weights cannot be dequantised here")
    groups = list(settings["config_groups"].values())
    schemes = [_compressed_scheme(group, settings.get("format")) for group in groups]
    targets = [list(map(_target_pattern, group["targets"])) for group in groups]

    def scheme(module: str) -> Scheme:
        """By the module's name, else by its class, which a checkpoint does not say: it is linear."""
        if len(schemes) == 1:
            return schemes[0]
        for found, patterns in zip(schemes, targets, strict=True):
            if any(pattern.match(module) for pattern in patterns):
                return found
        for found, group in zip(schemes, groups, strict=True):
            if "Linear" in group["targets"]:
                return found
        raise ModelError(f"{module}: none of the config_groups has it as a target")

    siblings = {
        "scales": (".weight_scale",),
        "zeros": (".weight_zero_point",),
        "groups": (".weight_g_idx",),
        "scale": (".weight_global_scale",),
        "unused": (".weight_shape",),
    }
    return [
        Format(".weight_packed", ".weight", siblings, scheme, (torch.int32, torch.uint8)),
        Format(".weight", ".weight", siblings, scheme, _ONE_BYTE),
    ]


def _target_pattern(target: str) -> re.Pattern[str]:
    return re.compile(target.removeprefix("re:") if target.startswith("re:") else re.escape(target) + "$")


def _compressed_scheme(group: Mapping[str, Any], layout: str | None) -> Scheme:
    weights, layout, codec = group["weights"], group.get("format") or layout, Codec()
    needs = ["scales"]
    if weights is None:
        raise ModelError("compressed-tensors with activations quantised alone cannot be dequantised here")
    if layout == "pack-quantized":
        codec = Packed(bits=range(1, 9).index(int(weights["num_bits"])) + 1)
    elif layout in ("nvfp4-pack-quantized", "mxfp4-pack-quantized"):
        codec = Fp4(divides=True)
        needs += ["scale"] if layout.startswith("nv") else []
    elif layout not in ("float-quantized", "int-quantized", "naive-quantized"):
        raise ModelError(f"compressed-tensors in {layout!r} cannot be dequantised here")
    needs += ["zeros"] if not weights.get("symmetric", True) else []
    needs += ["groups"] if weights.get("actorder") == "group" else []
    match weights["strategy"]:
        case "tensor":
            return Scheme(codec, (0, 0), tuple(needs))
        case "channel":
            return Scheme(codec, (1, 0), tuple(needs))
        case "group" | "tensor_group":
            return Scheme(codec, (1, int(weights["group_size"])), tuple(needs))
        case "block":
            rows, columns = weights["block_structure"]
            return Scheme(codec, (int(rows), int(columns)), tuple(needs))
        case other:
            raise ModelError(f"compressed-tensors with one scale a {other} cannot be dequantised here")


_METHODS: dict[str, Callable[[Mapping[str, Any]], list[Format]]] = {
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
    "awq": _awq,
    "gptq": _gptq,
    "mxfp4": _mxfp4,
    "modelopt": _modelopt,
}
