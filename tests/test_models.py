"""Where models lie, who they are, and what is said when they are not what the recipe says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import pipeline.models.load as models
from pipeline.config import ModelConfig, RolloutsConfig, TeacherConfig
from pipeline.errors import ModelError
from pipeline.models.identity import hub_commit, tokenizer_digest
from pipeline.models.resolve import resolve
from pipeline.toy import asset_path


@pytest.fixture
def student_copy(tmp_path: Path) -> Path:
    """The toy student in a directory of its own."""
    return Path(shutil.copytree(asset_path("student"), tmp_path / "student"))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return resolve(ModelConfig(model="toy:student")).tokenizer


def identity(path: Path, adapter: Path | None = None) -> tuple[str, str | None]:
    found = resolve(ModelConfig(model=str(path), adapter=str(adapter) if adapter else None)).identity
    return found.digest, found.adapter_digest


def edit(path: Path, **changes: object) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# -- identity ------------------------------------------------------------------------------------------------


def test_a_copy_saved_by_other_software_is_the_same_model(student_copy: Path) -> None:
    before = identity(student_copy)
    edit(student_copy / "config.json", transformers_version="4.0.0", _name_or_path="elsewhere", use_cache=False)
    assert identity(student_copy) == before == identity(asset_path("student"))


def test_one_weight_or_one_setting_makes_another_model(student_copy: Path) -> None:
    before = identity(student_copy)
    edit(student_copy / "config.json", rms_norm_eps=1e-5)
    other_config = identity(student_copy)
    weights = load_file(student_copy / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, student_copy / "model.safetensors", metadata={"format": "pt"})
    assert len({before, other_config, identity(student_copy)}) == 3


def test_shards_are_read_through_the_index_and_one_that_is_missing_is_named(student_copy: Path) -> None:
    weights = load_file(student_copy / "model.safetensors")
    (student_copy / "model.safetensors").unlink()
    names = sorted(weights)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in files.items():
        save_file({key: weights[key] for key in keys}, student_copy / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: file for file, keys in files.items() for key in keys}}
    (student_copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert identity(student_copy) != identity(asset_path("student"))
    loaded = models.load_model(ModelConfig(model=str(student_copy), dtype="float32"))
    assert torch.equal(loaded.lm_head.weight, weights["lm_head.weight"])
    (student_copy / "b.safetensors").unlink()
    with pytest.raises(ModelError, match=r"b\.safetensors: named by model\.safetensors\.index\.json, but not there"):
        identity(student_copy)


def test_blobs_of_the_hub_are_taken_by_their_name(student_copy: Path, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / commit
    blobs.mkdir()
    shutil.copytree(student_copy, snapshot)
    blob = blobs / ("ab" * 32)  # not its SHA-256, so whoever reads the file finds another digest
    shutil.move(snapshot / "model.safetensors", blob)
    (snapshot / "model.safetensors").symlink_to(blob)
    by_name = identity(snapshot)
    blob.rename(blobs / "notahash")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(blobs / "notahash")
    assert by_name != identity(snapshot) == identity(student_copy)
    assert hub_commit(snapshot) == commit and hub_commit(student_copy) is None
    assert resolve(ModelConfig(model=str(snapshot))).identity.revision == commit


def test_tokenizers_are_compared_by_their_map(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    found = tokenizer_digest(tokenizer)
    identity = resolve(ModelConfig(model="toy:student")).tokenizer_identity
    assert (identity.digest, identity.vocab_size) == (found, 259)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    again.chat_template = "another"
    assert tokenizer_digest(again) == found
    again.add_tokens(["<tool>"])
    assert tokenizer_digest(again) != found


# -- facts ---------------------------------------------------------------------------------------------------


def test_facts_need_no_weights(student_copy: Path) -> None:
    (student_copy / "model.safetensors").unlink()
    edit(student_copy / "config.json", dtype="float16", quantization_config={"quant_method": "gptq"})
    facts = resolve(ModelConfig(model=str(student_copy), dtype="auto"))
    assert (facts.vocab_size, facts.context, facts.dtype, facts.quantisation) == (259, 512, "float16", "gptq")


def test_every_eos_of_the_model_and_its_tokenizer_stops(
    student_copy: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    cfg, default = ModelConfig(model=str(student_copy)), RolloutsConfig()
    assert resolve(cfg).stop_token_ids(default) == (256, 258)
    assert resolve(cfg).stop_token_ids(RolloutsConfig(stop_token_ids=[5, 3, 5])) == (3, 5)
    (student_copy / "generation_config.json").unlink()
    assert resolve(cfg).stop_token_ids(default) == (256,)
    edit(student_copy / "config.json", eos_token_id=None)
    nameless = resolve(cfg)
    nameless.tokenizer.eos_token = None
    with pytest.raises(ModelError, match=r"names an EOS token; set rollouts\.stop_token_ids"):
        nameless.stop_token_ids(default)


# -- loading -------------------------------------------------------------------------------------------------


def remove_config(path: Path) -> None:
    (path / "config.json").unlink()


def only_adapter(path: Path) -> None:
    (path / "config.json").rename(path / "adapter_config.json")


def pickled(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def truncated(path: Path) -> None:
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[: len(data) // 2])


def headless(path: Path) -> None:
    weights = load_file(path / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def other_shape(path: Path) -> None:
    edit(path / "config.json", intermediate_size=100)


def no_language_model(path: Path) -> None:
    edit(path / "config.json", model_type="vit", architectures=["ViTModel"])


def unknown_type(path: Path) -> None:
    edit(path / "config.json", model_type="frobnicator")


def bad_json(path: Path) -> None:
    (path / "config.json").write_text("{")


def no_tokenizer(path: Path) -> None:
    for file in path.glob("tokenizer*"):
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_config, "no config.json in .*; expected a model saved by save_pretrained"),
        (
            only_adapter,
            "this is a PEFT adapter: set student.adapter to it and student.model to its base model",
        ),
        (
            pickled,
            "expected model.safetensors or model.safetensors.index.json, found neither; only safetensors",
        ),
        (truncated, "cannot be loaded as a causal language model"),
        (headless, r"1 weights are missing from its files \(lm_head\.weight\)"),
        (other_shape, "have another shape than its config.json says"),
        (no_language_model, "student.model = "),
        (unknown_type, "config.json cannot be used .*frobnicator"),
        (bad_json, "config.json"),
        (no_tokenizer, "its tokenizer cannot be loaded"),
    ],
)
def test_a_bad_model_gets_one_line(student_copy: Path, damage, message: str) -> None:  # type: ignore[no-untyped-def]
    damage(student_copy)
    cfg = ModelConfig(model=str(student_copy), dtype="float32")
    with pytest.raises(ModelError, match=message) as error:
        assert resolve(cfg).tokenizer
        models.load_model(cfg)
    assert "\n" not in str(error.value)


def test_a_model_that_cannot_be_had_is_named_with_its_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "file").touch()
    cases = {
        ModelConfig(model=str(tmp_path / "missing")): r"student\.model = .*: there is no such directory",
        ModelConfig(model=str(tmp_path / "file")): r"student\.model = .*: this is a file",
        ModelConfig(model="toy:pupil"): r"toy:pupil.* expected one of student, teacher",
        TeacherConfig(
            model="nobody/nothing", revision="v2"
        ): r"teacher\.model = 'nobody/nothing': .*not be fetched .*'v2'",
        TeacherConfig(
            model="./missing", name="big"
        ): r"teacher\.big\.model = './missing': there is no such directory",
        ModelConfig(model="toy:student", adapter=str(tmp_path)): r"student\.adapter = .*: no adapter_config\.json",
    }
    for cfg, message in cases.items():
        with pytest.raises(ModelError, match=message) as error:
            assert resolve(cfg).identity
        assert "\n" not in str(error.value)
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match=r'student\.device = "cuda": torch sees no CUDA device'):
            models.pick_device(ModelConfig(model="toy:student", device="cuda"))


def test_models_load_frozen_in_the_dtype_asked_for() -> None:
    for dtype in ("float32", "bfloat16"):
        model = models.load_model(ModelConfig(model="toy:teacher", dtype=dtype))
        assert not model.training and not any(p.requires_grad for p in model.parameters())
        assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
        assert model.config._attn_implementation == "redpen_packed"


def test_adapters_are_applied_trained_and_distinguished(tmp_path: Path) -> None:
    plain = ModelConfig(model="toy:student", dtype="float32")
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(models.load_model(plain, attention="sampling"), config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    cfg = ModelConfig(model="toy:student", dtype="float32", adapter=str(tmp_path / "adapter"))
    ids = torch.arange(20)[None]
    loaded = models.load_model(cfg, attention="sampling")
    assert torch.equal(loaded(ids).logits, adapted(ids).logits)
    assert not any(p.requires_grad for p in loaded.parameters())
    trainable = {n for n, p in models.load_model(cfg, trainable=True).named_parameters() if p.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)

    first = resolve(cfg).identity
    assert first.digest == resolve(plain).identity.digest and first.adapter_digest
    shutil.copytree(tmp_path / "adapter", tmp_path / "copy")
    saved = json.loads((tmp_path / "copy/adapter_config.json").read_text())
    edit(
        tmp_path / "copy/adapter_config.json",
        base_model_name_or_path="elsewhere",
        target_modules=saved["target_modules"][::-1],
    )
    assert identity(asset_path("student"), tmp_path / "copy")[1] == first.adapter_digest
    edit(tmp_path / "copy/adapter_config.json", lora_alpha=99)
    assert identity(asset_path("student"), tmp_path / "copy")[1] != first.adapter_digest


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    shape = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    other = LlamaForCausalLM(LlamaConfig(**shape))
    get_peft_model(other, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="student") as error:
        models.load_model(ModelConfig(model="toy:student", adapter=str(tmp_path)))
    assert "\n" not in str(error.value)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"expected adapter_model\.safetensors, found none"):
        models.load_model(ModelConfig(model="toy:student", adapter=str(tmp_path)))
