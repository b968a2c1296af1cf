"""The streamed scorer: the resident one's bits, each layer read once a wave, and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3nTextConfig,
    MixtralConfig,
    Qwen3Config,
)
from transformers.core_model_loading import Chunk, WeightConverter

import cache_schema as cs
import pipeline.rollouts.stage as rollouts_stage
from helpers.caches import arrays_of, small_recipe
from helpers.models import FAMILIES, SMALL_CONFIG, random_model
from pipeline.config import ModelConfig, Recipe, load_recipe
from pipeline.engines.resident import ResidentScorer
from pipeline.engines.scoring import ScoreOptions, TokenBatch
from pipeline.errors import ConfigError, ModelError
from pipeline.forward.attention import PackPlan
from pipeline.models import load as models
from pipeline.models.peak_memory import PeakBytes, bytes_of
from pipeline.score import stage
from pipeline.streaming import layered, layers, streamed, weights
from pipeline.streaming.streamed import StreamedScorer

VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
CONFIGS = FAMILIES | {
    "qwen3-tied": Qwen3Config(**SMALL_CONFIG, head_dim=8, tie_word_embeddings=True),
    "mixtral": MixtralConfig(**SMALL_CONFIG, num_local_experts=4, num_experts_per_tok=2),
    "gemma3-multimodal": Gemma3Config(
        text_config=FAMILIES["gemma3"].to_dict(),
        vision_config={**VISION, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=70,
    ),
}
OPTIONS = ScoreOptions(candidates=4, topk=3, sampling_temperature=0.7, tile_tokens=60, rows_per_chunk=32)


@pytest.fixture(autouse=True)
def _on_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "gpu" not in request.keywords:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`saved(family, dtype)`: a checkpoint of random weights in several shards, made once; not to be changed."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def save(family: str, dtype: torch.dtype = torch.float32) -> Path:
        if (family, dtype) not in made:
            path = tmp_path_factory.mktemp(family) / "model"
            random_model(copy.deepcopy(CONFIGS[family]), "eager").to(dtype).save_pretrained(
                path, max_shard_size="20KB"
            )
            made[family, dtype] = path
        return made[family, dtype]

    return save


@pytest.fixture
def qwen3(saved: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint to change, in one file."""
    path = tmp_path / "qwen3"
    AutoModelForCausalLM.from_pretrained(saved("qwen3")).save_pretrained(path)
    return path


def config(path: Path, dtype: str = "float32", **settings: Any) -> ModelConfig:
    return ModelConfig(model=str(path), dtype=dtype, **settings)


def block(seed: int = 0, lengths: tuple[int, ...] = (5, 9, 30, 41, 1, 17, 60, 2)) -> cs.RolloutBlock:
    rng = np.random.default_rng(seed)
    rows = [cs.RolloutRow(0, i, rng.integers(3, 70, n), np.zeros(n), cs.FINISH_LENGTH) for i, n in enumerate(lengths)]
    return cs.RolloutBlock.from_rows([(0, rng.integers(3, 70, 4))], rows)


def assert_same_bits(scores: cs.ScoreBlock, expected: cs.ScoreBlock) -> None:
    assert arrays_of(scores).keys() == arrays_of(expected).keys()
    for name, value in arrays_of(scores).items():
        np.testing.assert_array_equal(value, getattr(expected, name), err_msg=name)


def resident(cfg: ModelConfig, batch: TokenBatch | cs.RolloutBlock, options: ScoreOptions = OPTIONS) -> cs.ScoreBlock:
    return ResidentScorer(models.load_model(cfg), options).compute_logprobs(batch)


# -- equal bits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize(
    ("stored", "loaded"),
    [(torch.float32, "float32"), (torch.float32, "bfloat16"), (torch.bfloat16, "bfloat16")],
    ids=["fp32", "cast", "bf16"],
)
def test_scores_are_the_resident_scorers(
    family: str, stored: torch.dtype, loaded: str, saved: Callable[..., Path]
) -> None:
    cfg = config(saved(family, stored), loaded)
    assert len(list(Path(cfg.model).glob("*.safetensors"))) > 1
    scorer = StreamedScorer(cfg, OPTIONS)
    assert_same_bits(scorer.compute_logprobs(block()), resident(cfg, block()))
    sequences = [np.concatenate([block().prompt(row), block().response(row)]) for row in (0, 1, 5)]
    assert scorer.check_layout(sequences, [4, 4, 4]) < (1e-5 if loaded == "float32" else 0.3)


def test_checkpoints_of_experts_hold_each_by_itself(saved: Callable[..., Path]) -> None:
    """What the tests above stream is the layout of the published checkpoints."""
    for family, name in (("qwen3-moe", "mlp.experts.3.up_proj"), ("mixtral", "block_sparse_moe.experts.3.w1")):
        assert f"model.layers.2.{name}.weight" in weights.SafetensorsCheckpoint(saved(family)).stored


@pytest.mark.parametrize("tile_tokens", [1, 25, 1000])
def test_waves_of_any_length_give_the_same_bits(tile_tokens: int, saved: Callable[..., Path]) -> None:
    """Tiles of one rollout each have products of one row, whose bits depend on how the weights are aligned."""
    cfg = config(saved("qwen3"))
    options = ScoreOptions(tile_tokens=tile_tokens, candidate_kind="sampled", rows_per_chunk=1)
    batch = TokenBatch((block(0), block(1, (3, 8, 1)), block(2)), keys=((0, 0), (0, 1), (0, 2)))
    expected = resident(cfg, batch, options)
    scorer = StreamedScorer(cfg, options)
    for wave_tokens in (tile_tokens, 70, 16_384):
        scorer.wave_tokens = wave_tokens
        assert_same_bits(scorer.compute_logprobs(batch), expected)


def test_candidates_that_are_given_are_read(saved: Callable[..., Path]) -> None:
    cfg = config(saved("llama"))
    batch = TokenBatch((block(),), np.random.default_rng(0).integers(0, 71, (block().n_tokens, 5)).astype(np.int32))
    assert_same_bits(StreamedScorer(cfg, OPTIONS).compute_logprobs(batch), resident(cfg, batch))


@pytest.mark.parametrize("unaligned", [0, 1, 2])
def test_weights_lie_as_they_would_in_a_mapped_file(
    unaligned: int, saved: Callable[..., Path], tmp_path: Path
) -> None:
    cfg = config(tmp_path)
    shutil.copy(saved("qwen3") / "config.json", tmp_path)
    state = AutoModelForCausalLM.from_pretrained(saved("qwen3")).state_dict()
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt", "filler": "x" * 8 * unaligned})
    model, scorer = models.load_model(cfg), StreamedScorer(cfg, ScoreOptions(tile_tokens=1))
    with scorer._stream.passes(1) as items:
        for _, tensors in items:
            for name, tensor in tensors.items():
                parameter = model.get_parameter(name)
                assert torch.equal(tensor, parameter) and (tensor.data_ptr() - parameter.data_ptr()) % 512 == 0
    assert_same_bits(scorer.compute_logprobs(block()), resident(cfg, block(), ScoreOptions(tile_tokens=1)))


@pytest.fixture
def fused_gate_up(qwen3: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A layout that transformers converts by more than laying tensors end to end: one tensor is cut in two."""
    state = load_file(qwen3 / "model.safetensors")
    for name in [name for name in state if "gate_proj" in name]:
        up = state.pop(name.replace("gate", "up"))
        state[name.replace("gate", "gate_up")] = torch.cat([state.pop(name), up])
    save_file(state, qwen3 / "model.safetensors", metadata={"format": "pt"})

    def mapping(*args: Any, **kwargs: Any) -> list[WeightConverter]:
        targets = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
        return [WeightConverter("mlp.gate_up_proj.weight", targets, [Chunk(dim=0)])]

    for module in ("transformers.modeling_utils", "pipeline.streaming.weights"):
        monkeypatch.setattr(f"{module}.get_model_conversion_mapping", mapping)
    return qwen3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layouts_that_need_arithmetic_are_converted_by_transformers(fused_gate_up: Path, dtype: str) -> None:
    cfg = config(fused_gate_up, dtype)
    assert_same_bits(StreamedScorer(cfg, OPTIONS).compute_logprobs(block()), resident(cfg, block()))


def adapter(model: Path, path: Path, **settings: Any) -> Path:
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(r=4, **settings))
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.2)
    adapted.save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("qwen3", {"target_modules": "all-linear"}),
        ("gemma2", {"target_modules": "all-linear", "use_dora": True}),
        ("qwen3", {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["norm"]}),
        ("qwen3-moe", {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_adapters_are_applied_unmerged(
    family: str, settings: dict[str, Any], dtype: str, saved: Callable[..., Path], tmp_path: Path
) -> None:
    path = adapter(saved(family), tmp_path / "adapter", **settings)
    cfg = config(saved(family), dtype, adapter=str(path))
    scores = StreamedScorer(cfg, OPTIONS).compute_logprobs(block())
    assert_same_bits(scores, resident(cfg, block()))
    assert not np.array_equal(scores.logprobs, resident(config(saved(family), dtype), block()).logprobs)


# -- moving weights ------------------------------------------------------------------------------------------


def test_each_weight_is_read_once_a_wave(saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    read: Counter[str] = Counter()
    read_into = weights.SafetensorsCheckpoint.read_into

    def counting(self: weights.SafetensorsCheckpoint, stored: weights.Stored, start: int, out: torch.Tensor) -> None:
        read[stored.name] += out.nbytes
        read_into(self, stored, start, out)

    monkeypatch.setattr(weights.SafetensorsCheckpoint, "read_into", counting)
    monkeypatch.setattr(layers, "_CHUNK_BYTES", 1000)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    for family, dtype in (("qwen3-moe", "float32"), ("qwen3", "bfloat16")):
        cfg = config(saved(family), dtype)
        scorer = StreamedScorer(cfg, OPTIONS)
        stored = weights.SafetensorsCheckpoint(saved(family)).stored
        outside = {name for name in stored if ".layers." not in name}
        assert read == {name: stored[name].nbytes for name in outside}
        for n_waves, wave_tokens in ((1, 1000), (4, 70)):
            read.clear()
            scorer.wave_tokens = wave_tokens
            scorer.compute_logprobs(block())
            assert read == {name: n_waves * stored[name].nbytes for name in stored.keys() - outside}
        assert_same_bits(scorer.compute_logprobs(block()), resident(cfg, block()))
        read.clear()


@pytest.mark.parametrize(("stored", "n_mapped"), [(torch.float32, 0), (torch.bfloat16, 3)])
def test_large_weights_outside_the_layers_stay_in_their_file_if_they_are_not_cast(
    stored: torch.dtype, n_mapped: int, saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped: list[str] = []
    look = weights.SafetensorsCheckpoint.mapped
    monkeypatch.setattr(layers, "_MAPPED_BYTES", 0)
    monkeypatch.setattr(
        weights.SafetensorsCheckpoint, "mapped", lambda self, w: mapped.append(w.name) or look(self, w)
    )
    cfg = config(saved("llama", stored), "bfloat16")
    assert_same_bits(StreamedScorer(cfg, OPTIONS).compute_logprobs(block()), resident(cfg, block()))
    assert len(mapped) == n_mapped


@pytest.mark.parametrize(
    ("family", "name"), [("qwen3-tied", None), ("gemma3", None), ("llama", "model.embed_tokens.weight")]
)
def test_tokens_may_be_looked_up_in_host_memory(family: str, name: str | None, saved: Callable[..., Path]) -> None:
    cfg = config(saved(family), "bfloat16")
    scorer = StreamedScorer(cfg, OPTIONS)
    assert layered.LayeredModel(models.load_skeleton(cfg)).embedding_alone() == name
    scorer._layered.embed_on_host(torch.device("cpu"))
    assert_same_bits(scorer.compute_logprobs(block()), resident(cfg, block()))


def test_waves_are_few_and_of_like_size() -> None:
    def waves(sizes: list[int], wave_tokens: int) -> list[list[int]]:
        rows = [block(lengths=(size - 4,)) for size in sizes]
        found = streamed._waves(streamed.tiles_of(TokenBatch(tuple(rows)), 1), wave_tokens)
        return [[sum(map(len, tile.sequences)) for tile in wave] for wave in found]

    assert waves([10] * 7, 60) == [[10] * 4, [10] * 3]
    assert waves([10] * 6, 60) == [[10] * 6]
    assert waves([100, 10, 10], 60) == [[100], [10, 10]]
    assert waves([10, 30, 30, 10], 5) == [[10], [30], [30], [10]]
    assert waves([], 60) == []


def test_what_the_file_cache_cannot_keep_is_dropped(
    saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped: list[str] = []

    def uncache(self: weights.SafetensorsCheckpoint, stored: list[weights.Stored]) -> None:
        dropped.extend(tensor.name for tensor in stored)

    monkeypatch.setattr(weights.SafetensorsCheckpoint, "uncache", uncache)
    cfg = config(saved("qwen3"))
    one_layer = sum(
        s.nbytes for s in weights.SafetensorsCheckpoint(saved("qwen3")).stored.values() if ".layers.0." in s.name
    )
    monkeypatch.setattr(streamed, "free_bytes", lambda device: 2.5 * one_layer)
    scorer = StreamedScorer(cfg, OPTIONS)
    assert_same_bits(scorer.compute_logprobs(block()), resident(cfg, block()))
    assert {name.split(".")[2] for name in dropped} == {"2"} and len(set(dropped)) == len(dropped)


def test_progress_adds_up_and_may_stop_the_work(saved: Callable[..., Path]) -> None:
    reported: list[int] = []

    def on_tile(tokens: int) -> None:
        reported.append(tokens)
        if stop_after and len(reported) > stop_after:
            raise KeyboardInterrupt

    stop_after = 0
    scorer = StreamedScorer(config(saved("qwen3")), OPTIONS, on_tile=on_tile)
    scorer.wave_tokens = 70
    expected = scorer.compute_logprobs(block())
    assert sum(reported) == block().n_tokens and len(reported) > 12 and min(reported) >= 0
    for stop_after in (1, 9, 17):  # in a layer, at the end of a wave, in the second
        reported.clear()
        with pytest.raises(KeyboardInterrupt):
            scorer.compute_logprobs(block())
        stop_after = 0
        assert_same_bits(scorer.compute_logprobs(block()), expected)


def test_a_resident_scorer_reports_within_a_tile(saved: Callable[..., Path]) -> None:
    reported: list[int] = []
    cfg, options = config(saved("qwen3")), dataclasses.replace(OPTIONS, tile_tokens=10**6)
    model = models.load_model(cfg)
    expected = ResidentScorer(model, options).compute_logprobs(block())
    scores = ResidentScorer(model, options, on_tile=reported.append).compute_logprobs(block())
    layers = model.config.num_hidden_layers
    assert len(reported) == layers + 2, "a tile: its beginning, its layers, its end"
    assert sum(reported) == block().n_tokens and min(reported[1:]) > 0
    assert_same_bits(scores, expected)

    def stop(tokens: int) -> None:
        if tokens:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ResidentScorer(model, options, on_tile=stop).compute_logprobs(block())
    assert_same_bits(ResidentScorer(model, options).compute_logprobs(block()), expected)


def test_the_wave_follows_from_the_memory(saved: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    cfg = config(saved("qwen3"))
    waves = [StreamedScorer(cfg, OPTIONS, memory_gib=gib).wave_tokens for gib in (0.0635, 0.0640, 0.0650, 8)]
    assert 60 <= waves[0] < waves[1] < waves[2] < waves[3] == 16_384
    said = capsys.readouterr().err
    assert (
        "3 layers of 36.0 KiB through 2 slots, waves of up to 16,384 tokens, each with 90.9 KiB of weights, at"
        in said
    )
    assert "of 8.0 GiB expected in use" in said


def test_a_wave_has_room_for_a_rollout_that_is_longer_than_a_tile(saved: Callable[..., Path]) -> None:
    cfg, short = config(saved("qwen3")), ScoreOptions(tile_tokens=16, rows_per_chunk=32)
    assert StreamedScorer(cfg, short, memory_gib=0.0635).wave_tokens < 6000
    with pytest.raises(ConfigError, match=r"score\.memory_gib = 0\.0635: .* a tile of 6,000 tokens"):
        StreamedScorer(cfg, short, memory_gib=0.0635, longest=6000)
    assert StreamedScorer(cfg, short, memory_gib=0.1, longest=6000).wave_tokens >= 6000


def test_scoring_takes_the_longest_rollout_into_account(
    toy_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a teacher that reads more than the student, the longest that it reads."""
    found: list[int] = []

    class Recorded(StreamedScorer):
        def __init__(self, *args: Any, longest: int = 0, **kwargs: Any):
            found.append(longest)
            super().__init__(*args, longest=longest, **kwargs)

    monkeypatch.setattr(streamed, "StreamedScorer", Recorded)
    cache = shutil.copytree(toy_cache, tmp_path / "c.zarr")
    own = ["teacher.name=other", "teacher.placement=streamed", "teacher.prompt_prefix=0123456789"]
    assert stage.run(small_recipe(*own, "score.tile_tokens=16"), str(cache), only="other") == 0
    blocks = [cs.open(cache).round().rollouts.read(block) for block in range(cs.open(cache).round().n_blocks)]
    assert found == [max(int((b.prompt_length[b.row_prompt] + b.response_length).max()) for b in blocks) + 10]


def test_measured_memory_is_what_a_layer_takes() -> None:
    """5 tensors of 1 MB, of which 3 at once, beside what is only looked at."""
    a, b = torch.ones(250_000), torch.ones(500, 500)
    with PeakBytes() as peak:
        c = a + 1
        d = (c * 2).view(500, 500)
        del c
        e = (d.t() + b).relu_()
        del d, e
        (a * 3).sum()
    assert peak.nbytes == pytest.approx(2e6, rel=0.01)
    assert bytes_of([a, {"same": a[:3]}, (b, PackPlan.of([3, 3], "cpu"))]) == 2_000_000 + 12 + 6 * 8


# -- refusals ------------------------------------------------------------------------------------------------


def without(name: str) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        state = load_file(model / "model.safetensors")
        del state[name]
        save_file(state, model / "model.safetensors", metadata={"format": "pt"})

    return damage


def with_another(name: str, *shape: int) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        state = load_file(model / "model.safetensors")
        save_file(state | {name: torch.zeros(shape)}, model / "model.safetensors", metadata={"format": "pt"})

    return damage


def quantised(model: Path) -> None:
    settings = json.loads((model / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (model / "config.json").write_text(json.dumps(settings))


def truncated(model: Path) -> None:
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            without("model.layers.1.mlp.up_proj.weight"),
            r"missing from its files \(model\.layers\.1\.mlp\.up_proj\.weight\)",
        ),
        (without("lm_head.weight"), r"missing from its files \(lm_head\.weight\)"),
        (
            with_another("model.layers.1.mlp.extra.weight", 3),
            r"have no place in the model \(model\.layers\.1\.mlp\.extra\.weight\)",
        ),
        (with_another("model.layers.0.self_attn.q_proj.weight", 3, 5), r"expected \(32, 32\), got \(3, 5\)"),
        (quantised, r"qwen3: its config.json says that it is quantised, but none of its weights are"),
        (truncated, r"model\.safetensors: cannot be read: no whole safetensors file; download or copy"),
    ],
)
def test_what_cannot_be_streamed_is_refused_in_one_line(
    qwen3: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(qwen3)
    with pytest.raises(ModelError, match=message) as caught:
        StreamedScorer(config(qwen3), OPTIONS)
    assert "\n" not in str(caught.value)


def test_tensors_outside_the_layers_may_be_left_over(qwen3: Path) -> None:
    """Such as the layers that predict further tokens, behind the last one, of some checkpoints."""
    settings = json.loads((qwen3 / "config.json").read_text())
    (qwen3 / "config.json").write_text(json.dumps(settings | {"num_nextn_predict_layers": 1}))
    expected = resident(config(qwen3), block())
    with_another("model.layers.3.mlp.extra.weight", 3)(qwen3)
    assert_same_bits(StreamedScorer(config(qwen3), OPTIONS).compute_logprobs(block()), expected)


def test_experts_must_be_complete(saved: Callable[..., Path], tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(saved("qwen3-moe")).save_pretrained(tmp_path)
    without("model.layers.1.mlp.experts.2.up_proj.weight")(tmp_path)
    with pytest.raises(
        ModelError, match=r"layers\.1\.mlp\.experts\.\S+ and what belongs to it cannot be converted to"
    ):
        StreamedScorer(config(tmp_path), OPTIONS)


def test_too_little_memory_says_how_much_is_needed(saved: Callable[..., Path]) -> None:
    for gib, options in ((0.01, OPTIONS), (0.07, ScoreOptions(tile_tokens=8192))):
        with pytest.raises(ConfigError, match=r"score\.memory_gib = 0\.0\d: expected at least 0\.\d\d GiB .*, got"):
            StreamedScorer(config(saved("qwen3")), options, memory_gib=gib)


def test_a_file_that_is_cut_short_while_it_is_read(qwen3: Path) -> None:
    scorer = StreamedScorer(config(qwen3), OPTIONS)
    truncated(qwen3)
    with pytest.raises(ModelError, match=r"model\.safetensors: ends in the middle of model\.layers\."):
        scorer.compute_logprobs(block())


def test_decoders_that_do_more_than_call_their_layers(tmp_path: Path) -> None:
    gemma3n = Gemma3nTextConfig(
        **SMALL_CONFIG,
        head_dim=8,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=71,
        num_kv_shared_layers=1,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
        activation_sparsity_pattern=[0.0] * 3,
    )
    AutoModelForCausalLM.from_config(gemma3n).save_pretrained(tmp_path)
    with pytest.raises(
        ModelError, match=r"Gemma3nForCausalLM cannot be streamed: its decoder has 3 lists of 3 layers"
    ):
        StreamedScorer(config(tmp_path), OPTIONS)


def test_what_happens_between_layers_is_noticed(qwen3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

    call = Qwen3DecoderLayer.__call__
    monkeypatch.setattr(Qwen3DecoderLayer, "__call__", lambda self, *args, **kwargs: 2 * call(self, *args, **kwargs))
    with pytest.raises(ModelError, match="its decoder does something between its layers"):
        StreamedScorer(config(qwen3), OPTIONS)


def test_adapters_that_change_the_weights_are_refused(qwen3: Path, tmp_path: Path) -> None:
    path = adapter(qwen3, tmp_path / "adapter", target_modules="all-linear", init_lora_weights="pissa")
    with pytest.raises(ModelError, match=r"the adapter .* changes model\.layers\.0\.\S+; use score\.placement"):
        StreamedScorer(config(qwen3, adapter=str(path)), OPTIONS)


def test_a_leak_between_packed_rollouts_is_noticed(qwen3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = StreamedScorer(config(qwen3), OPTIONS)
    sequences = [np.concatenate([block().prompt(row), block().response(row)]) for row in (0, 1, 5)]
    one_sequence = PackPlan.of([sum(map(len, sequences))], "cpu")
    monkeypatch.setattr(PackPlan, "of", lambda *_: one_sequence)
    with pytest.raises(ModelError, match=r"packing: expected .* \(Qwen3ForCausalLM\)"):
        scorer.check_layout(sequences, [4, 4, 4])


# -- the stage -----------------------------------------------------------------------------------------------


def toy(*overrides: str) -> Recipe:
    small = ["prompts.limit=12", "rollouts.prompts_per_block=4", "score.tile_tokens=300", "score.teacher_topk=5"]
    return load_recipe("toy", [*small, *overrides])


def test_a_cache_may_be_scored_resident_and_streamed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rollouts_stage.run(toy(), str(tmp_path / "resident"))
    shutil.copytree(tmp_path / "resident", tmp_path / "streamed")
    stage.run(toy(), str(tmp_path / "resident"))
    shutil.copytree(tmp_path / "resident", tmp_path / "half")
    half = cs.open(tmp_path / "half", writable=True).round()
    half.scores("student").uncommit(1)
    half.scores("teacher").uncommit(2)
    expected = cs.open(tmp_path / "resident").round()
    for name in ("streamed", "half"):
        capsys.readouterr()
        stage.run(toy("score.placement=streamed", "score.memory_gib=1"), str(tmp_path / name))
        said = capsys.readouterr().err
        assert "toy:student streamed to cpu" in said and said.count("packing check: packed and unpacked") == 2
        round_ = cs.open(tmp_path / name).round()
        for scorer in ("student", "teacher"):
            assert round_.scores(scorer).manifest == expected.scores(scorer).manifest
            for index in range(round_.n_blocks):
                assert_same_bits(round_.scores(scorer).read(index), expected.scores(scorer).read(index))


# -- CUDA ----------------------------------------------------------------------------------------------------

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@on_cuda
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_scores_are_the_resident_scorers_on_cuda(
    family: str, stored: torch.dtype, saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(saved(family, stored), "bfloat16", device="cuda")
    expected = resident(cfg, block())
    for share in (1.0, 0.0):  # the embedding on the device, and in host memory
        monkeypatch.setattr(streamed, "_EMBEDDING_SHARE", share)
        scorer = StreamedScorer(cfg, OPTIONS, memory_gib=2)
        for wave_tokens in (1000, 70):
            scorer.wave_tokens = wave_tokens
            assert_same_bits(scorer.compute_logprobs(block()), expected)
        sequences = [np.concatenate([block().prompt(row), block().response(row)]) for row in (0, 1, 5)]
        assert scorer.check_layout(sequences, [4, 4, 4]) < 0.5


@pytest.mark.gpu
@on_cuda
def test_slots_are_not_overwritten_while_they_are_in_use(tmp_path: Path) -> None:
    """Layers that compute longer than they are copied, and many waves."""
    shape = {**SMALL_CONFIG, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8}
    random_model(Qwen3Config(**shape, head_dim=256), "eager").to(torch.bfloat16).save_pretrained(tmp_path)
    cfg, options = config(tmp_path, "bfloat16", device="cuda"), ScoreOptions(tile_tokens=4096)
    batch = TokenBatch(tuple(block(seed, (2000, 90, 1000, 900)) for seed in range(8)))
    expected = resident(cfg, batch, options)
    scorer = StreamedScorer(cfg, options, memory_gib=4)
    for wave_tokens in (5000, 20_000, 40_000):
        scorer.wave_tokens = wave_tokens
        assert_same_bits(scorer.compute_logprobs(batch), expected)
