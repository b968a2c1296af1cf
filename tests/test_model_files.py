"""Files that come with a model: what they may say, what is refused in one line, and no tensor is dropped unseen."""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import struct
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
    BertConfig,
    DeepseekV3Config,
    LlamaConfig,
    PhimoeConfig,
    PreTrainedConfig,
)

import pipeline.models.load as models
from pipeline.config import ModelConfig, Recipe, RolloutsConfig, TrainConfig
from pipeline.errors import ModelError
from pipeline.models.architecture import choose_layout
from pipeline.models.files import ConfigFile, misplaced_tensors
from pipeline.models.paths import is_available
from pipeline.models.resolve import resolve
from pipeline.streaming.header_check import check_checkpoint
from pipeline.streaming.streamed import StreamedScorer
from pipeline.toy import asset_path

SHAPE: dict[str, Any] = dict(
    vocab_size=259, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
)


def config(path: Path, **settings: Any) -> ModelConfig:
    return ModelConfig(model=str(path), dtype="float32", device="cpu", **settings)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A tiny model with biases in its attention, and the toy's tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE, attention_bias=True, eos_token_id=256))
    return save(model, tmp_path / "tiny")


def save(model: Any, path: Path) -> Path:
    model.save_pretrained(path)
    for file in asset_path("student").glob("tokenizer*"):
        shutil.copy(file, path)
    return path


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 1500
    return text


def use(path: Path) -> None:
    """All that a stage asks of a model."""
    source = resolve(config(path))
    assert source.tokenizer and source.identity
    source.stop_token_ids(RolloutsConfig())
    model = models.load_model(source)
    assert model(torch.arange(4)[None]).logits.isfinite().all()


# -- tensors without a place ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "load",
    [models.load_model, functools.partial(models.load_model, attention="sampling"), StreamedScorer, check_checkpoint],
)
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"attention_bias": False}, "layers.0.self_attn.k_proj.bias"),
        ({"num_hidden_layers": 1}, "layers.1."),
        ({"num_hidden_layers": 3}, "layers.2."),
        ({"hidden_size": 18}, "lm_head.weight"),
    ],
)
def test_a_checkpoint_that_is_not_this_model_is_refused(
    tiny: Path, load: Callable[[ModelConfig], Any], changes: dict[str, Any], named: str
) -> None:
    edit(tiny / "config.json", **changes)
    with pytest.raises(ModelError) as error:
        load(config(tiny))
    assert str(tiny) in one_line(error) and named in one_line(error)


@pytest.mark.parametrize(
    ("name", "value"), [("vocab_size", 10**7), ("intermediate_size", 2**24), ("head_dim", 2**20)]
)
def test_a_model_far_larger_than_its_files_is_refused_before_memory_is_allocated(
    tiny: Path, name: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(tiny / "config.json", **{name: value})
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(ModelError, match=r"its config\.json describes") as error:
        models.load_model(config(tiny))
    assert str(tiny) in one_line(error)
    with pytest.raises(ModelError, match=r"(weight|bias): expected") as error:
        StreamedScorer(config(tiny))
    one_line(error)


@pytest.mark.parametrize("name", ["num_hidden_layers", "n_layer", "num_layers"])
def test_no_model_of_thousands_of_layers_is_made(tiny: Path, name: str) -> None:
    edit(tiny / "config.json", **{name: 3000})
    with pytest.raises(ModelError, match=rf"config\.json: {name}"):
        assert resolve(config(tiny)).config


def test_tensors_that_no_model_needs_may_be_left_over(tiny: Path) -> None:
    expected = models.load_model(config(tiny))(torch.arange(9)[None]).logits
    weights = load_file(tiny / "model.safetensors")
    extra = (
        "mtp.layers.0.mlp.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.2.eh_proj.weight",
    )
    save_file(
        weights | {name: torch.ones(2) for name in extra}, tiny / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(ModelError, match=r"no place in the model \(model\.layers\.2\.eh_proj\.weight\)"):
        models.load_model(config(tiny))
    edit(tiny / "config.json", num_nextn_predict_layers=1)
    assert torch.equal(models.load_model(config(tiny))(torch.arange(9)[None]).logits, expected)
    StreamedScorer(config(tiny))


def test_a_vision_tower_is_left_over_only_by_a_wrapper() -> None:
    names = ["model.visual.blocks.0.attn.qkv.weight", "model.layers.0.self_attn.q_proj.bias"]
    assert misplaced_tensors(names, ConfigFile()) == sorted(names)
    assert misplaced_tensors(names, ConfigFile(vision_config={})) == names[1:]


def test_an_adapter_with_tensors_for_other_layers_is_refused(tiny: Path, tmp_path: Path) -> None:
    deeper = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE | {"num_hidden_layers": 3}, attention_bias=True))
    get_peft_model(deeper, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"student\.adapter.* have no place in .*layers\.2\.") as error:
        models.load_model(config(tiny, adapter=str(tmp_path / "adapter")))
    one_line(error)
    with pytest.raises(ModelError, match=r"student\.adapter.* have no place"):
        StreamedScorer(config(tiny, adapter=str(tmp_path / "adapter")))


@pytest.mark.parametrize("changes", [{"r": 10**6}, {"rank_pattern": {"q_proj": 10**6}}], ids=str)
def test_an_adapter_of_a_rank_far_beyond_its_file_is_refused(
    tiny: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    edit(tmp_path / "adapter/adapter_config.json", **changes)
    with pytest.raises(ModelError, match=r"student\.adapter.* rank 1,000,000") as error:
        models.load_model(config(tiny, adapter=str(tmp_path / "adapter")))
    one_line(error)


@pytest.mark.parametrize(
    "changes", [{"target_modules": r"((\w|\.)+)+#"}, {"rank_pattern": {r"((\w|\.)+)+#": 2}}], ids=["modules", "ranks"]
)
def test_a_regular_expression_of_an_adapter_that_takes_for_ever_is_refused(
    tiny: Path, tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "_PATTERN_SECONDS", 0.2)
    model = AutoModelForCausalLM.from_pretrained(tiny)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    edit(tmp_path / "adapter/adapter_config.json", **changes)
    for load in (models.load_model, StreamedScorer):
        with pytest.raises(ModelError, match=r"student\.adapter.* takes longer than 0\.2 s to find modules") as error:
            load(config(tiny, adapter=str(tmp_path / "adapter")))
        one_line(error)


def test_an_adapter_beside_the_model_is_not_applied_unseen(tiny: Path) -> None:
    (tiny / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"adapter_config\.json"):
        models.load_model(config(tiny))


# -- settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("generation_config.json", b"{", "generation_config.json: not valid JSON"),
        ("generation_config.json", b'{"eos_token_id": "</s>"}', "generation_config.json: eos_token_id"),
        ("generation_config.json", b'{"eos_token_id": [[256]]}', "generation_config.json: eos_token_id"),
        ("generation_config.json", b'{"eos_token_id": 99999}', "generation_config.json names 99999"),
        ("generation_config.json", b"[]", "generation_config.json: expected a JSON object"),
        ("tokenizer.json", b"[]", "tokenizer.json: expected a JSON object"),
        ("tokenizer.json", b'{"model": 3}', "tokenizer.json: model"),
        ("tokenizer.json", b"\xff\xfe", "tokenizer.json: not valid JSON"),
        ("tokenizer_config.json", b'{"tokenizer_class": 7}', "tokenizer_config.json: tokenizer_class"),
        ("tokenizer_config.json", b'{"model_max_length": "512"}', "tokenizer_config.json: model_max_length"),
        ("config.json", b'\xef\xbb\xbf{"model_type": "llama"}', "config.json: begins with a byte order mark"),
        ("config.json", b'{"model_type": ["llama"]}', "config.json: model_type"),
        ("config.json", b"[" * 100_000, "config.json: not valid JSON"),
        ("config.json", b'{"model_type": "llama", "vocab_size": "259"}', "config.json: vocab_size"),
        ("config.json", b'{"model_type": "llama", "num_hidden_layers": 2.5}', "config.json: num_hidden_layers"),
        ("config.json", b'{"model_type": "llama", "rope_parameters": {"rope_theta": -Infinity}}', "rope_parameters"),
        ("config.json", b'{"model_type": "llama", "rms_norm_eps": NaN}', "rms_norm_eps"),
        ("config.json", b'{"model_type": "llama", "text_config": {"rope_theta": Infinity}}', "rope_theta"),
        ("config.json", b'{"model_type": "llama", "transformers_weights": "x.safetensors"}', "transformers_weights"),
    ],
)
def test_a_setting_of_another_kind_names_its_file(tiny: Path, file: str, content: bytes, named: str) -> None:
    (tiny / file).write_bytes(content)
    with pytest.raises(ModelError) as error:
        use(tiny)
    assert named in one_line(error)


@pytest.mark.parametrize("instead", ["a pipe", "a link to a device", "a huge file"])
@pytest.mark.parametrize(
    "name",
    [
        *("adapter_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
        *("chat_template.jinja", "additional_chat_templates/a.jinja", "tokenizer.model", "tokenizer.json"),
    ],
)
def test_no_library_reads_a_file_that_has_no_end(tiny: Path, name: str, instead: str) -> None:
    """Whichever of them a library would look for."""
    path = tiny / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if instead == "a pipe":
        os.mkfifo(path)
    elif instead == "a link to a device":
        path.symlink_to("/dev/zero")
    else:
        path.touch()
        os.truncate(path, 2**40)
    for read in (lambda: resolve(config(tiny)).directory, lambda: resolve(config(tiny)).tokenizer):
        with pytest.raises(ModelError) as error:
            read()
        assert str(path) in one_line(error)


@pytest.mark.parametrize(
    "weight_map", [[], {}, {"a": 3}, {"a": "../x.safetensors"}, {"a": "/x.safetensors"}, {"a": "pytorch_model.bin"}]
)
def test_an_index_names_files_beside_it(tiny: Path, weight_map: object) -> None:
    (tiny / "model.safetensors").rename(tiny.parent / "x.safetensors")
    (tiny / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json: weight_map") as error:
        assert resolve(config(tiny)).identity
    one_line(error)


@pytest.mark.parametrize("name", ["x" * 4000, "/" + "x/" * 2000, "toy:" + "x" * 4000, "file://host/x", "a\0b"])
def test_an_invalid_name_is_not_repeated_in_full(name: str) -> None:
    for cfg in (ModelConfig(model=name), ModelConfig(model="toy:student", adapter=name)):
        with pytest.raises(ModelError) as error:
            assert resolve(cfg).directory
            assert resolve(cfg).adapter_directory
        assert len(one_line(error)) < 500
        assert not is_available(ModelConfig(model=name))


def test_whatever_is_changed_there_is_one_line_or_a_model(tiny: Path, tmp_path: Path) -> None:
    """Values of each JSON file are exchanged for others, and bytes for any, by one seed."""
    rng = random.Random(0)
    values = (None, -1, 0, 2**70, 1.5, "x", [], {}, [[1]], True, "../x", float("nan"), {"a": {}}, [None], "\0")
    files = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors")
    refused = 0
    for trial in range(60):
        copy = Path(shutil.copytree(tiny, tmp_path / f"copy{trial}"))
        path = copy / files[trial % len(files)]
        content = path.read_bytes()
        if path.suffix == ".safetensors":
            (n,) = struct.unpack("<Q", content[:8])
            header = _changed(json.loads(content[8 : 8 + n]), rng, values)
            encoded = json.dumps(header).encode()
            path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + n :])
        elif trial % 3:
            path.write_text(json.dumps(_changed(json.loads(content), rng, values)))
        else:
            at = rng.randrange(len(content))
            path.write_bytes(content[:at] + rng.randbytes(3) + content[at + 3 :])
        for act in (use, lambda model: StreamedScorer(config(model))):
            try:
                act(copy)
            except ModelError as error:
                assert "\n" not in str(error), path
                refused += 1
        shutil.rmtree(copy)
    assert 20 < refused < 120


def _changed(value: Any, rng: random.Random, values: tuple[Any, ...]) -> Any:
    """The JSON value with one of its parts exchanged."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        return value | {key: _changed(value[key], rng, values)}
    if isinstance(value, list) and value and rng.random() < 0.5:
        at = rng.randrange(len(value))
        return [*value[:at], _changed(value[at], rng, values), *value[at + 1 :]]
    return rng.choice(values)


# -- what a model cannot do ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family", ["Falcon", "Doge", "BioGpt", "Mamba", "MiniMax", "RecurrentGemma", "GptOss", "Llama4Text"]
)
def test_an_architecture_that_cannot_be_packed_takes_rows(family: str, tmp_path: Path) -> None:
    import transformers

    made: PreTrainedConfig = getattr(transformers, f"{family}Config")(
        **SHAPE, num_key_value_heads=2, eos_token_id=2, bos_token_id=1, pad_token_id=0
    )
    made.save_pretrained(tmp_path)
    choice = choose_layout(config(tmp_path))
    assert not choice.packed and choice.reason


@pytest.mark.parametrize(
    "made", [LlamaConfig(**SHAPE), PhimoeConfig(**SHAPE), DeepseekV3Config(**SHAPE, n_routed_experts=8)]
)
def test_a_packable_architecture_is_packed(made: PreTrainedConfig, tmp_path: Path) -> None:
    made.save_pretrained(tmp_path)
    assert choose_layout(config(tmp_path)).packed


def test_a_teacher_that_sees_later_tokens_is_refused_before_anything_is_sampled(
    tmp_path: Path, recipe: Callable[..., Recipe]
) -> None:
    from pipeline.rollouts.stage import run

    made = BertConfig(
        vocab_size=259,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        is_decoder=False,
    )
    save(AutoModelForCausalLM.from_config(made), tmp_path / "m")
    with pytest.raises(ModelError, match=r"teacher\.model = .*BertLMHeadModel"):
        run(recipe(f"teacher.model={tmp_path / 'm'}"), str(tmp_path / "cache.zarr"))
    assert not (tmp_path / "cache.zarr").exists()


# -- logits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sampling_stops_where_logits_are_not_finite(tiny: Path, temperature: float) -> None:
    from pipeline.engines.sampling import PromptBlock, Sampling
    from pipeline.engines.transformers_sampler import TransformersSampler

    damage(tiny)
    model = models.load_model(config(tiny), attention="sampling")
    sampling = Sampling(temperature, 0.9, (256,), rollouts_per_prompt=2, max_response_tokens=3, seed=0)
    block = PromptBlock(0, [(0, np.array([5, 6, 7], np.int32))])
    with pytest.raises(ModelError, match=r"tiny' in float32: its logits are not finite") as error:
        TransformersSampler(model, sampling).sample_block(block)
    one_line(error)


def test_scoring_stops_where_logits_are_not_finite(tiny: Path) -> None:
    from pipeline.engines.resident import ResidentScorer
    from pipeline.forward.packing_check import check_layout

    damage(tiny)
    model, sequences = models.load_model(config(tiny)), [np.arange(5, dtype=np.int32), np.arange(9, dtype=np.int32)]
    with pytest.raises(ModelError, match="its logits are not finite"):
        check_layout(model, sequences, [1, 2])
    for scorer in (ResidentScorer(model), StreamedScorer(config(tiny))):
        with pytest.raises(ModelError, match=r"tiny' in float32: its logits are not finite") as error:
            scorer.compute_logprobs(rollouts(sequences))
        one_line(error)


def test_a_token_that_the_teacher_has_no_row_for_is_named(tiny: Path) -> None:
    from pipeline.engines.resident import ResidentScorer
    from pipeline.engines.sampling import PromptBlock, Sampling
    from pipeline.engines.transformers_sampler import TransformersSampler

    sampler = TransformersSampler(
        models.load_model(config(tiny), attention="sampling"),
        Sampling(1.0, 1.0, (256,), rollouts_per_prompt=1, max_response_tokens=3, seed=0),
    )
    with pytest.raises(ModelError, match=r"tiny'.*0\.\.258.* 259"):
        sampler.sample_block(PromptBlock(0, [(0, np.array([259], np.int32))]))
    sequences = [np.array([5, 6, 300, 7], np.int32)]
    for scorer in (ResidentScorer(models.load_model(config(tiny))), StreamedScorer(config(tiny))):
        with pytest.raises(ModelError, match=r"tiny'.*0\.\.258.* 300") as error:
            scorer.compute_logprobs(rollouts(sequences))
        one_line(error)


def test_an_engine_that_returns_no_numbers_is_refused() -> None:
    from pipeline.engines.prompt_logprobs import EngineLogprobs, ScoreRequest

    with pytest.raises(ModelError, match="not finite"):
        EngineLogprobs.of_given_ids(np.array([[2, -1]], np.int32), [[np.nan, np.nan]])
    EngineLogprobs.of_given_ids(np.array([[2, -1]], np.int32), [[-1.0, np.nan]])
    with pytest.raises(ModelError, match="log-prob of token 2"):
        EngineLogprobs.from_positions(
            [None, {"2": {"logprob": float("nan")}}], ScoreRequest(np.array([1, 2], np.int32), 1, None)
        )


def test_training_stops_where_logits_are_not_finite(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.train.metrics import MetricSums
    from pipeline.train.objective import CrossEntropy
    from pipeline.train.trainer import StudentTrainer

    train = TrainConfig(method="full")
    trainer = StudentTrainer(models.load_model(config(tiny)).requires_grad_(True), CrossEntropy(), train)
    totals = torch.tensor([torch.nan, 1, 0, 0, torch.nan], dtype=torch.float64)
    monkeypatch.setattr(trainer, "gradient", lambda batch: MetricSums(totals, MetricSums.zero("cpu").drift))
    with pytest.raises(ModelError, match=r"tiny' in float32: its logits are not finite"):
        trainer.update(None)  # type: ignore[arg-type]


def damage(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"][7, 3] = torch.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def rollouts(sequences: list[np.ndarray]) -> Any:
    import cache_schema as cs

    rows = [
        cs.RolloutRow(i, 0, ids[1:], np.zeros(len(ids) - 1, np.float32), cs.FINISH_LENGTH)
        for i, ids in enumerate(sequences)
    ]
    return cs.RolloutBlock.from_rows([(i, ids[:1]) for i, ids in enumerate(sequences)], rows)
