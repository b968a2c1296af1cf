"""Quantised copies of a checkpoint by rounding to nearest, in the layouts of FP8 and AWQ releases, for benchmarks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_FP8_MAX = 448.0
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def fp8(weight: Tensor, block: int) -> dict[str, Tensor]:
    """e4m3 with an fp32 scale for each square block, as DeepSeek and Qwen release."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % block, 0, -rows % block))
    blocks = padded.view(padded.shape[0] // block, block, padded.shape[1] // block, block)
    scales = blocks.abs().amax((1, 3)).clamp(min=1e-12) / _FP8_MAX
    values = (blocks / scales[:, None, :, None]).view(padded.shape)[:rows, :columns]
    return {"weight": values.to(torch.float8_e4m3fn).contiguous(), "weight_scale_inv": scales}


def awq(weight: Tensor, group: int) -> dict[str, Tensor]:
    """4 bits with fp16 scales and zeros for groups of input features; without AWQ's search for better scales."""
    groups = weight.float().view(len(weight), -1, group)
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    scales = ((high - low) / 15).clamp(min=1e-6).half().float()
    zeros = (-low / scales).round().clamp(0, 15)
    values = (groups / scales[..., None] + zeros[..., None]).round().clamp(0, 15).view(weight.shape)
    return {"qweight": _packed(values.T), "qzeros": _packed(zeros.T), "scales": scales.T.half().contiguous()}


def _packed(values: Tensor) -> Tensor:
    eights = values.to(torch.int64).view(len(values), -1, 8)
    packed = sum(eights[..., row] << 4 * nibble for nibble, row in enumerate(_AWQ_ORDER))
    assert isinstance(packed, Tensor)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32).contiguous()


METHODS: dict[str, tuple[Callable[[Tensor, int], dict[str, Tensor]], Callable[[int], dict[str, object]]]] = {
    "fp8": (fp8, lambda size: {"quant_method": "fp8", "weight_block_size": [size, size]}),
    "awq": (awq, lambda size: {"quant_method": "awq", "bits": 4, "group_size": size, "version": "gemm"}),
}


def quantised_copy(source: Path, target: Path, method: str, size: int = 128) -> None:
    """A copy of a checkpoint whose linear layers, except the head, are quantised in blocks or groups of `size`."""
    quantise, settings = METHODS[method]
    shutil.copytree(source, target)
    for path in target.glob("*.safetensors"):
        stored = {}
        for name, weight in load_file(path).items():
            if name.endswith("_proj.weight"):
                parts = quantise(weight, size)
                stored |= {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in parts.items()}
            else:
                stored[name] = weight
        save_file(stored, path, {"format": "pt"})
        (target / "model.safetensors.index.json").unlink(missing_ok=True)
    names = sorted(target.glob("*.safetensors"))
    if len(names) > 1:
        places = {name: path.name for path in names for name in load_file(path)}
        (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": settings(size)}))
