"""Quantised checkpoints as released, scored resident and streamed, against weights dequantised by numpy alone."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    CompressedTensorsConfig,
    FineGrainedFP8Config,
    GptOssConfig,
    Mxfp4Config,
    PreTrainedConfig,
)

import cache_schema as cs
import pipeline.rollouts.stage
import pipeline.score.stage
from helpers.caches import make_cache, small_recipe
from helpers.models import FAMILIES, SMALL_CONFIG, random_adapter, random_model, small_model
from pipeline.config import ModelConfig
from pipeline.engines.resident import ResidentScorer
from pipeline.engines.scoring import ScoreOptions
from pipeline.errors import ModelError
from pipeline.models import load as models
from pipeline.models.resolve import resolve
from pipeline.quantised import codecs
from pipeline.streaming.streamed import StreamedScorer
from pipeline.streaming.weights import SafetensorsCheckpoint

OPTIONS = ScoreOptions(candidates=4, topk=3, tile_tokens=60, rows_per_chunk=32)
Stored = dict[str, np.ndarray]
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


@pytest.fixture(autouse=True)
def _on_cpu_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(codecs._CHUNK, "cpu", 300)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


# -- formats: random quantised values as they are stored, and the weight that they stand for ------------------------


def e4m3(bits: np.ndarray) -> np.ndarray:
    """Four bits of exponent with a bias of 7, three of mantissa."""
    sign, exponent, mantissa = np.where(bits >> 7, -1, 1), (bits >> 3) & 15, (bits & 7) / 8
    return (sign * np.where(exponent, (1 + mantissa) * 2.0 ** (exponent - 7.0), mantissa * 2.0**-6)).astype(
        np.float32
    )


def random_fp8(rng: np.random.Generator, *shape: int) -> np.ndarray:
    bits = rng.integers(0x20, 0x50, shape)  # 2^-3 to 10, no NaN
    return (bits | rng.integers(0, 2, shape) << 7).astype(np.uint8)


def spread(grid: np.ndarray, block: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    return np.kron(grid, np.ones(block, grid.dtype))[: shape[0], : shape[1]]


def scales(rng: np.random.Generator, *shape: int, size: float = 0.1) -> np.ndarray:
    return (size * rng.uniform(0.5, 1.5, shape)).astype(np.float32)


def pack(values: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """int32 along the last axis; place k of each int32, from its lowest bits on, is value `order[k]`."""
    n = 32 // bits
    groups = values.reshape(*values.shape[:-1], -1, n).astype(np.uint64)
    packed = sum(groups[..., value] << np.uint64(bits * place) for place, value in enumerate(order or range(n)))
    return packed.astype(np.uint32).view(np.int32)


def fp8(block: tuple[int, int] | None, suffix: str = "weight_scale_inv") -> Callable[..., tuple[Stored, np.ndarray]]:
    def make(rng: np.random.Generator, rows: int, columns: int) -> tuple[Stored, np.ndarray]:
        bits, size = random_fp8(rng, rows, columns), block or (rows, columns)
        size = (size[0], size[1] or columns)
        grid = scales(rng, -(-rows // size[0]), -(-columns // size[1]))
        stored = {"weight": bits, suffix: grid if block else grid.reshape(())}
        return stored, e4m3(bits) * spread(grid, size, bits.shape)

    return make


def awq(rng: np.random.Generator, rows: int, columns: int) -> tuple[Stored, np.ndarray]:
    values, zeros = rng.integers(0, 16, (columns, rows)), rng.integers(0, 16, (columns // 16, rows))
    grid = scales(rng, columns // 16, rows).astype(np.float16)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    stored = {"qweight": pack(values, 4, order), "qzeros": pack(zeros, 4, order), "scales": grid}
    whole = [np.repeat(each, 16, 0) for each in (zeros, grid.astype(np.float32))]
    return stored, ((values - whole[0]) * whole[1]).astype(np.float32).T


def gptq(bits: int, version: int, act_order: bool) -> Callable[..., tuple[Stored, np.ndarray]]:
    def make(rng: np.random.Generator, rows: int, columns: int) -> tuple[Stored, np.ndarray]:
        most, n_groups = 2**bits, columns // 16
        values, zeros = rng.integers(0, most, (columns, rows)), rng.integers(0, most, (n_groups, rows))
        zeros[0, 0] = 0  # version 1 stores it as the highest
        grid = scales(rng, n_groups, rows, size=1.6 / most).astype(np.float16)
        groups = (rng.permutation(columns) if act_order else np.arange(columns)) // 16
        stored = {
            "qweight": pack(values.T, bits).T,
            "qzeros": pack((zeros - 1) % most if version == 1 else zeros, bits),
            "scales": grid,
            "g_idx": groups.astype(np.int32),
        }
        return stored, ((values - zeros[groups]) * grid[groups].astype(np.float32)).astype(np.float32).T

    return make


def packed_int4(symmetric: bool) -> Callable[..., tuple[Stored, np.ndarray]]:
    def make(rng: np.random.Generator, rows: int, columns: int) -> tuple[Stored, np.ndarray]:
        values = rng.integers(-8, 8, (rows, columns))
        zeros = np.zeros((rows, columns // 16), int) if symmetric else rng.integers(-8, 8, (rows, columns // 16))
        grid = scales(rng, rows, columns // 16)
        shape = np.array([rows, columns], np.int64)
        stored = {"weight_packed": pack(values + 8, 4), "weight_scale": grid, "weight_shape": shape}
        if not symmetric:
            stored["weight_zero_point"] = pack((zeros + 8).T, 4).T
        return stored, (values - np.repeat(zeros, 16, 1)).astype(np.float32) * np.repeat(grid, 16, 1)

    return make


def int8(rng: np.random.Generator, rows: int, columns: int) -> tuple[Stored, np.ndarray]:
    values, grid = rng.integers(-128, 128, (rows, columns)).astype(np.int8), scales(rng, rows, 1, size=0.01)
    return {"weight": values, "weight_scale": grid}, values.astype(np.float32) * grid


def two_a_byte(rng: np.random.Generator, *shape: int) -> tuple[np.ndarray, np.ndarray]:
    codes = rng.integers(0, 16, shape)
    return (codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8), E2M1[codes]


def nvfp4(rng: np.random.Generator, rows: int, columns: int) -> tuple[Stored, np.ndarray]:
    values, dense = two_a_byte(rng, rows, columns)
    grid, whole = random_fp8(rng, rows, columns // 16) & 0x7F, np.array([16.0], np.float32)
    stored = {"weight_packed": values, "weight_scale": grid, "weight_global_scale": whole}
    return stored, dense * np.repeat(e4m3(grid) / whole, 16, 1)


def modelopt(rng: np.random.Generator, rows: int, columns: int) -> tuple[Stored, np.ndarray]:
    values, dense = two_a_byte(rng, rows, columns)
    grid, whole = random_fp8(rng, rows, columns // 16) & 0x7F, np.array(0.0625, np.float32)
    return {"weight": values, "weight_scale": grid, "weight_scale_2": whole}, dense * np.repeat(
        e4m3(grid) * whole, 16, 1
    )


def mxfp4(rng: np.random.Generator, experts: int, columns: int, rows: int) -> tuple[Stored, np.ndarray]:
    """gpt-oss: of experts whose weight is [columns, rows]."""
    values, dense = two_a_byte(rng, experts, rows, columns)
    exponents = rng.integers(122, 125, (experts, rows, columns // 32)).astype(np.uint8)
    stored = {"_blocks": values.reshape(experts, rows, columns // 32, 16), "_scales": exponents}
    dense = dense * np.repeat(2.0 ** (exponents.astype(np.float32) - 127), 32, 2)
    return stored, dense.transpose(0, 2, 1).astype(np.float32)


def compressed(layout: str, **weights: Any) -> dict[str, Any]:
    group = {
        "targets": ["Linear"],
        "weights": {"num_bits": 8, "symmetric": True, **weights},
        "input_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }


@dataclass(frozen=True)
class Case:
    """A family, how its weights are stored, and the quantization_config of such a release."""

    family: str
    make: Callable[..., tuple[Stored, np.ndarray]]
    settings: dict[str, Any]


BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [16, 8]}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": False}
INT4 = {"type": "int", "num_bits": 4, "strategy": "group", "group_size": 16}
CASES = {
    "fp8": Case("qwen3", fp8((16, 8)), BLOCKS),
    "fp8, ragged blocks": Case("qwen3", fp8((20, 12)), {**BLOCKS, "weight_block_size": [20, 12]}),
    "fp8, experts": Case("qwen3-moe", fp8((16, 8)), BLOCKS),
    "fp8, tensor": Case("mistral-window", fp8(None), {**BLOCKS, "weight_block_size": None}),
    "fbgemm_fp8": Case("llama", fp8((1, 0), "weight_scale"), {"quant_method": "fbgemm_fp8"}),
    "awq": Case("qwen2", awq, AWQ),
    "gptq": Case("llama", gptq(4, 1, False), GPTQ),
    "gptq, act order": Case("llama", gptq(4, 1, True), {**GPTQ, "desc_act": True}),
    "gptq_v2, 8 bits": Case("qwen2", gptq(8, 2, False), {**GPTQ, "bits": 8, "checkpoint_format": "gptq_v2"}),
    "int4": Case("qwen3", packed_int4(True), compressed("pack-quantized", **INT4)),
    "int4, zeros": Case("qwen3-moe", packed_int4(False), compressed("pack-quantized", **INT4, symmetric=False)),
    "int8": Case("llama", int8, compressed("int-quantized", type="int", strategy="channel")),
    "compressed fp8": Case(
        "qwen3", fp8((1, 0), "weight_scale"), compressed("float-quantized", type="float", strategy="channel")
    ),
    "compressed fp8, blocks": Case(
        "qwen3",
        fp8((16, 20), "weight_scale"),
        compressed("float-quantized", type="float", strategy="block", block_structure=[16, 20]),
    ),
    "nvfp4": Case(
        "llama",
        nvfp4,
        compressed("nvfp4-pack-quantized", type="float", num_bits=4, strategy="tensor_group", group_size=16),
    ),
    "modelopt": Case("llama", modelopt, {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}),
    "mxfp4": Case("gpt-oss", mxfp4, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}),
}


#: Of what is in one byte, what stands for e4m3.
FP8_PARTS = {"fp8": ("weight",), "nvfp4": ("weight_scale",), "modelopt": ("weight_scale",)}


def config_of(family: str) -> PreTrainedConfig:
    if family == "gpt-oss":
        sizes = {**SMALL_CONFIG, "intermediate_size": 32}
        return GptOssConfig(**sizes, head_dim=8, sliding_window=6, num_local_experts=4, num_experts_per_tok=2)
    return FAMILIES[family]


def is_quantised(case: Case, name: str, weight: torch.Tensor) -> bool:
    """What releases quantise: the decoder's linear layers except routers, of gpt-oss its experts; here a head too."""
    if case.family == "gpt-oss":
        return name.endswith(("experts.gate_up_proj", "experts.down_proj"))
    return name.endswith("_proj.weight") or (case.make is int8 and name == "lm_head.weight")


Edit = Callable[[dict[str, torch.Tensor]], None]


def write(
    case: Case, directory: Path, dtype: torch.dtype = torch.float32, edit: Edit = lambda stored: None
) -> tuple[Path, Path]:
    """The checkpoint of a case, and the same model with its weights dequantised."""
    dense, quantised = directory / "dense", directory / "quantised"
    for path in (dense, quantised):
        random_model(config_of(case.family), "eager").to(dtype).save_pretrained(path)
    tensors = quantise(case, quantised, dtype, edit)
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    return quantised, dense


def quantise(
    case: Case, directory: Path, dtype: torch.dtype = torch.float32, edit: Edit = lambda stored: None
) -> dict[str, torch.Tensor]:
    """Put random quantised weights into a checkpoint; returns what they stand for, among its other weights."""
    path = directory / "model.safetensors"
    tensors, rng, stored = load_file(path), np.random.default_rng(0), {}
    for name, weight in list(tensors.items()):
        if not is_quantised(case, name, weight):
            stored[name] = weight
            continue
        parts, value = case.make(rng, *weight.shape)
        assert value.shape == weight.shape and 0.05 < value.std() < 5
        tensors[name] = torch.from_numpy(np.ascontiguousarray(value)).to(dtype)
        for part, array in parts.items():
            tensor = torch.from_numpy(np.ascontiguousarray(array))
            if part in FP8_PARTS.get(case.make.__qualname__.partition(".")[0], ()):
                tensor = tensor.view(torch.float8_e4m3fn)
            stored[name + part if part.startswith("_") else f"{name.removesuffix('weight')}{part}"] = tensor
    edit(stored)
    save_file(stored, path, {"format": "pt"})
    settings = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(settings | {"quantization_config": case.settings}))
    return tensors


def config(path: Path, dtype: str = "float32") -> ModelConfig:
    return ModelConfig(model=str(path), dtype=dtype)


def block(seed: int = 0) -> cs.RolloutBlock:
    rng = np.random.default_rng(seed)
    rows = [
        cs.RolloutRow(0, i, rng.integers(3, 70, n), np.zeros(n), cs.FINISH_LENGTH) for i, n in enumerate((5, 30, 41))
    ]
    return cs.RolloutBlock.from_rows([(0, rng.integers(3, 70, 4))], rows)


def resident(cfg: ModelConfig) -> cs.ScoreBlock:
    return ResidentScorer(models.load_model(cfg), OPTIONS).compute_logprobs(block())


def assert_same_bits(scores: cs.ScoreBlock, expected: cs.ScoreBlock) -> None:
    for name, value in vars(expected).items():
        np.testing.assert_array_equal(getattr(scores, name), value, err_msg=name)


@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_the_weights_that_numpy_dequantises(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, resident and streamed; and a layer is read as it is stored."""
    quantised, dense = write(CASES[name], tmp_path)
    cfg, expected = config(quantised), resident(config(dense))
    assert resolve(cfg).scored_quantisation == f"{CASES[name].settings['quant_method']}, dequantised"
    assert_same_bits(resident(cfg), expected)
    checkpoint, weights = (
        SafetensorsCheckpoint(quantised, resolve(cfg).formats),
        load_file(dense / "model.safetensors"),
    )
    assert checkpoint.pieces.keys() == weights.keys()
    for key, weight in weights.items():  # as read for transformers to convert
        assert torch.equal(checkpoint.read(checkpoint.pieces[key]), weight)
    streamed = StreamedScorer(cfg, OPTIONS)
    read: list[int] = []
    read_into = SafetensorsCheckpoint.read_into

    def counted(self: SafetensorsCheckpoint, stored: Any, start: int, out: torch.Tensor) -> None:
        read.append(out.numel())
        read_into(self, stored, start, out)

    monkeypatch.setattr(SafetensorsCheckpoint, "read_into", counted)
    assert_same_bits(streamed.compute_logprobs(block()), expected)
    in_layers = [t for n, t in load_file(quantised / "model.safetensors").items() if ".layers." in n]
    unread = [t for t in in_layers if t.dtype == torch.int64]  # shapes
    assert sum(read) == sum(t.nbytes for t in in_layers) - sum(t.nbytes for t in unread)


@pytest.mark.parametrize("name", ["fp8", "fp8, experts", "mxfp4", "int4", "compressed fp8"])
def test_weights_are_those_of_transformers_own_dequantisation(name: str, tmp_path: Path) -> None:
    """In bf16, by FineGrainedFP8Config, Mxfp4Config and CompressedTensorsConfig with `dequantize=True`."""
    case, method = CASES[name], CASES[name].settings["quant_method"]
    if method == "compressed-tensors":
        pytest.importorskip("compressed_tensors")

    def as_released(stored: dict[str, torch.Tensor]) -> None:
        """With scales in bf16, to which transformers would round others."""
        stored |= {n: t.bfloat16() for n, t in stored.items() if n.endswith("weight_scale")}

    quantised, _ = write(case, tmp_path, torch.bfloat16, as_released)
    kind = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config, "compressed-tensors": CompressedTensorsConfig}[method]
    settings = {key: value for key, value in case.settings.items() if key != "quant_method"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the configuration is given twice
        theirs = AutoModelForCausalLM.from_pretrained(
            quantised, dtype=torch.bfloat16, quantization_config=kind(**settings, dequantize=True)
        ).state_dict()
    ours = models.load_model(config(quantised, "bfloat16")).state_dict()
    assert any(weight.dtype == torch.bfloat16 for weight in ours.values())
    for key, weight in ours.items():
        torch.testing.assert_close(theirs[key].to(weight.dtype), weight, rtol=0, atol=0, msg=key)


def test_an_adapter_works_on_a_quantised_teacher(tmp_path: Path) -> None:
    quantised, dense = write(CASES["awq"], tmp_path)
    adapter = random_adapter(dense, tmp_path / "adapter")
    cfgs = [config(path).model_copy(update={"adapter": str(adapter)}) for path in (dense, quantised)]
    expected = resident(cfgs[0])
    assert not np.array_equal(expected.logprobs, resident(config(dense)).logprobs)
    assert_same_bits(StreamedScorer(cfgs[1], OPTIONS).compute_logprobs(block()), expected)


# -- what is refused -----------------------------------------------------------------------------------------------

Q = "model.layers.1.self_attn.q_proj."


def change(name: str, new: Callable[[torch.Tensor], torch.Tensor | None]) -> Edit:
    def edit(stored: dict[str, torch.Tensor]) -> None:
        tensor = new(stored.pop(name))
        if tensor is not None:
            stored[name] = tensor.contiguous()

    return edit


def drop(tensor: torch.Tensor) -> None:
    return None


DAMAGED = {
    "fp8, no scales": ("fp8", change(f"{Q}weight_scale_inv", drop), r"expected scales .*weight_scale_inv"),
    "fp8, scales transposed": (
        "fp8",
        change(f"{Q}weight_scale_inv", lambda t: t.T),
        r"q_proj.weight: expected scales",
    ),
    "fp8, one scale": ("fp8", change(f"{Q}weight_scale_inv", lambda t: t[:1, :1]), r"blocks of 16 x 8, got \(1, 1\)"),
    "fp8, a layer short": ("fp8", change(f"{Q}weight", drop), r"q_proj.weight"),
    "fp8, another shape": ("fp8", change(f"{Q}weight", lambda t: t[:, :-8]), r"q_proj.weight"),
    "awq, no zeros": ("awq", change(f"{Q}qzeros", drop), r"expected zeros .*qzeros"),
    "awq, groups lost": ("awq", change(f"{Q}scales", lambda t: t[:1]), r"expected scales of shape \(2, 32\)"),
    "awq, columns lost": ("awq", change(f"{Q}qweight", lambda t: t[:, :-1]), r"q_proj.weight: expected"),
    "awq, another type": ("awq", change(f"{Q}scales", lambda t: t.int()), r"expected scales of a floating type"),
    "gptq, no groups": ("gptq, act order", change(f"{Q}g_idx", drop), r"expected groups .*g_idx"),
    "gptq, wild groups": ("gptq, act order", change(f"{Q}g_idx", lambda t: t + 1), r"groups beyond its 2 scales"),
    "int4, zeros of another shape": (
        "int4, zeros",
        change(f"{Q}weight_zero_point", lambda t: t[:-1]),
        r"q_proj.weight: expected zeros of shape",
    ),
    "mxfp4, an expert lost": (
        "mxfp4",
        change("model.layers.1.mlp.experts.down_proj_scales", lambda t: t[1:]),
        r"down_proj: expected scales of shape \(4, 32, 1\)",
    ),
    "nvfp4, no second scale": (
        "nvfp4",
        change(f"{Q}weight_global_scale", drop),
        r"expected scale .*global_scale",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_checkpoints_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    case, edit, message = DAMAGED[name]
    quantised, _ = write(CASES[case], tmp_path, edit=edit)
    for load in (lambda: StreamedScorer(config(quantised), OPTIONS), lambda: models.load_model(config(quantised))):
        with pytest.raises(ModelError, match=message) as caught:
            load()
        assert str(quantised) in str(caught.value) and "\n" not in str(caught.value)


UNKNOWN = {
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "awq": {**AWQ, "version": "gemv"},
    "gptq": {**GPTQ, "bits": 3},
    "gptq, mixed": {**GPTQ, "dynamic": {r"-:.*down.*": {}}},
    "sparse": {**compressed("pack-quantized", **INT4), "sparsity_config": {"format": "sparse-24-bitmask"}},
    "rotated": {**compressed("pack-quantized", **INT4), "transform_config": {"config_groups": {"u": {}}}},
    "marlin": compressed("marlin-24", **INT4),
    "nonsense": {"quant_method": "awq", "group_size": "many"},
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_cannot_be_streamed_is_refused_before_rollouts_are_sampled(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = small_model(tmp_path / "teacher")
    settings = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(settings | {"quantization_config": UNKNOWN[name]}))
    recipe = small_recipe(f"teacher.model={teacher}", "teacher.placement=streamed")
    monkeypatch.setattr(models, "load_model", None)  # nothing is loaded
    with pytest.raises(ModelError, match=r"cannot be streamed: .*use score\.placement = .*vllm") as caught:
        pipeline.rollouts.stage.run(recipe, str(tmp_path / "cache"))
    assert str(teacher) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ModelError, match=r"cannot be streamed"):
        StreamedScorer(config(teacher), OPTIONS)


def test_what_transformers_cannot_load_here_is_refused_before_rollouts_are_sampled(tmp_path: Path) -> None:
    teacher = small_model(tmp_path / "teacher")
    settings = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(settings | {"quantization_config": UNKNOWN["awq"]}))
    with pytest.raises(ModelError, match=r"quantised by awq, cannot be loaded here: .*use score\.placement"):
        pipeline.rollouts.stage.run(small_recipe(f"teacher.model={teacher}"), str(tmp_path / "cache"))


def test_gguf_is_refused_with_the_way_to_convert_it(tmp_path: Path) -> None:
    (tmp_path / "model-q4_k_m.gguf").touch()
    with pytest.raises(ModelError, match=r"gguf_file='model-q4_k_m.gguf'\)\.save_pretrained") as caught:
        _ = resolve(config(tmp_path)).config
    assert "\n" not in str(caught.value)


# -- in a cache ----------------------------------------------------------------------------------------------------


def test_scores_record_that_they_are_of_dequantised_weights(tmp_path: Path) -> None:
    """And resident and streamed scorers continue each other's."""
    teacher = small_model(tmp_path / "teacher")
    quantise(CASES["fp8"], teacher)
    recipe = small_recipe(f"teacher.model={teacher}", "prompts.limit=8")
    cache = make_cache(tmp_path / "cache", recipe)
    scores = cs.open(cache).round().scores("teacher")
    assert scores.manifest.quantisation == "fp8, dequantised"  # type: ignore[union-attr]
    streamed = small_recipe(f"teacher.model={teacher}", "prompts.limit=8", "teacher.placement=streamed")
    assert pipeline.score.stage.run(streamed, str(cache)) == 0
