"""A student in NF4 and Adam in 8 bits, by bitsandbytes: on the CPU for real, and on a GPU where there is one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import cache_schema as cs
import pipeline.rollouts.stage
import pipeline.score.stage
from helpers.caches import make_cache, small_recipe
from helpers.models import IDS, logits, plain, random_adapter, small_model
from helpers.training import assert_same_run, distance, stop_after_one_step, trainer_of
from pipeline import merge
from pipeline.config import ModelConfig, Recipe
from pipeline.errors import ConfigError, Interrupted, ModelError
from pipeline.forward.head import Head
from pipeline.models import load as models
from pipeline.models.resolve import resolve
from pipeline.runs import checkpoint
from pipeline.train import stage
from pipeline.train.trainer import StudentTrainer

pytest.importorskip("bitsandbytes")

Make = Callable[..., Recipe]

NF4 = "student.quantisation=nf4"
#: Rank 64 gives most LoRA weights of the toy the 4,096 elements that 8 bits want.
IN_BITS = ("train.optimizer=adamw_8bit", "train.lora_rank=64")


def dequantised(model: nn.Module, reference: nn.Module) -> nn.Module:
    """`reference` with the weights that `model` computes with."""
    from bitsandbytes.functional import dequantize_4bit

    for name, module in model.named_modules():
        if (state := getattr(getattr(module, "weight", None), "quant_state", None)) is not None:
            reference.get_submodule(name).weight.data = dequantize_4bit(module.weight.data, state)
    return reference


def quantised_layers(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}


@pytest.fixture(scope="module")
def nf4_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy cache of a student in NF4."""
    return make_cache(tmp_path_factory.mktemp("nf4") / "cache.zarr", small_recipe(NF4))


# -- NF4 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_in_nf4_computes_and_differentiates_as_its_dequantised_weights(dtype: str) -> None:
    """In eval mode, with and without autograd: on some CPUs bitsandbytes would answer with other kernels."""
    cfg = ModelConfig(model="toy:student", dtype=dtype)
    model = models.load_model(cfg.model_copy(update={"quantisation": "nf4"}), attention="sampling")
    oracle = dequantised(model, models.load_model(cfg, attention="sampling"))
    assert len(quantised_layers(model)) == 7 * 4 and Head.of(model).weight_VD.dtype == getattr(torch, dtype)
    assert torch.equal(logits(model), logits(oracle))
    assert not torch.allclose(logits(model), logits(models.load_model(cfg, attention="sampling")), atol=0.1)
    gradients = []
    for each in (model, oracle):
        embeddings = each.get_input_embeddings().weight.requires_grad_(True)
        out = each(input_ids=IDS).logits.float()
        assert torch.equal(out.detach(), logits(each))
        (gradient,) = torch.autograd.grad(out.logsumexp(-1).sum(), embeddings)
        gradients.append(gradient)
    assert torch.equal(*gradients)


def test_the_gradient_of_a_lora_on_nf4_is_that_on_its_dequantised_base(nf4_cache: Path) -> None:
    trainer, replay = trainer_of(nf4_cache, small_recipe(NF4))
    other, _ = trainer_of(nf4_cache, small_recipe())
    dequantised(trainer.model, other.model)
    gradients = []
    for each in (trainer, other):
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in each.parameters.values():
                assert parameter.dtype == torch.float32
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        each.gradient(replay.batch(0))
        gradients.append(torch.cat([p.grad.flatten() for p in each.parameters.values() if p.grad is not None]))
    assert gradients[0].norm() > 0 and distance(*gradients) < 1e-6


def test_scores_record_the_quantisation_and_training_keeps_to_it(
    nf4_cache: Path, toy_cache: Path, tmp_path: Path
) -> None:
    round_ = cs.open(nf4_cache).round()
    recorded = {name: round_.scores(name).manifest.quantisation for name in (cs.STUDENT, "teacher")}  # type: ignore[union-attr]
    assert recorded == {cs.STUDENT: "nf4", "teacher": None}
    unquantised = cs.open(toy_cache).round().scores(cs.STUDENT).read(0).logprobs
    assert not torch.equal(*(torch.from_numpy(a) for a in (round_.scores(cs.STUDENT).read(0).logprobs, unquantised)))
    with pytest.raises(
        ModelError, match=r"student\.quantisation: the student was scored in nf4 and would be trained unq"
    ):
        stage.run(small_recipe(), str(nf4_cache), tmp_path / "run")
    with pytest.raises(
        ModelError, match=r"was scored unquantised and would be trained in nf4, which is a different model"
    ):
        stage.run(small_recipe(NF4), str(toy_cache), tmp_path / "run")
    with pytest.raises(cs.ProvenanceError, match="quantisation"):
        pipeline.score.stage.run(small_recipe(), str(nf4_cache), only=cs.STUDENT)
    with pytest.raises(cs.ProvenanceError, match=r"sampler_settings\.quantisation: .*nf4"):
        pipeline.rollouts.stage.run(small_recipe(), str(nf4_cache), round_index=0)


def test_an_adapter_trained_on_nf4_says_so_and_merges_into_the_unquantised_base(
    nf4_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert stage.run(small_recipe(NF4, "train.steps=2"), str(nf4_cache), run) == 0
    assert 'base_model_quantisation: "nf4"' in (run / "adapter/README.md").read_text()
    capsys.readouterr()
    assert merge.run(str(run / "adapter"), str(tmp_path / "merged")) == 0
    assert "was trained on a base in nf4 and is merged into the unquantised one" in capsys.readouterr().err
    merged = plain(tmp_path / "merged")
    assert not quantised_layers(merged)
    cfg = small_recipe().student.model_copy(update={"adapter": str(run / "adapter")})
    adapted = models.load_model(cfg, attention="sampling")
    assert torch.allclose(logits(merged), logits(adapted), atol=1e-5 * float(logits(adapted).abs().max()))


def test_an_adapter_goes_on_a_model_in_nf4(tmp_path: Path) -> None:
    base = small_model(tmp_path / "base")
    adapter = random_adapter(base, tmp_path / "adapter")
    cfg = ModelConfig(model=str(base), adapter=str(adapter), dtype="float32")
    model = models.load_model(cfg.model_copy(update={"quantisation": "nf4"}), attention="sampling")
    assert torch.allclose(
        logits(model), logits(dequantised(model, models.load_model(cfg, attention="sampling"))), atol=1e-5
    )


def test_vllm_samples_from_the_unquantised_student_with_a_warning() -> None:
    warned, silent = (small_recipe("rollouts.engine=vllm", *nf4).warnings() for nf4 in ([NF4], []))
    assert [line for line in warned if "vLLM samples from the unquantised student" in line] and not set(silent) - set(
        warned
    )


def test_what_cannot_be_in_nf4_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for placement, setting in (("streamed", NF4), ("vllm", "teacher.quantisation=nf4")):
        with pytest.raises(
            ConfigError, match=rf'quantisation = "nf4" of .* needs placement "resident", got "{placement}"'
        ):
            small_recipe(setting, f"score.placement={placement}")
    base = small_model(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ModelError, match=r'student\.quantisation = "nf4": .* is quantised already \(gptq\)'):
        _ = resolve(ModelConfig(model=str(base), quantisation="nf4")).quantisation
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        ConfigError, match=r'student\.quantisation = "nf4": needs bitsandbytes, .*install .*\[quant\]'
    ):
        models.load_model(ModelConfig(model="toy:student", quantisation="nf4"))


# -- 8 bits ---------------------------------------------------------------------------------------------------


def weights(trainer: StudentTrainer) -> torch.Tensor:
    return torch.cat([w.detach().flatten() for w in trainer.masters.values()])


@pytest.mark.parametrize(("method", "dtype"), [("lora", "float32"), ("full", "float32"), ("full", "bfloat16")])
def test_adam_in_8_bits_goes_on_bit_for_bit(method: str, dtype: str, toy_cache: Path, tmp_path: Path) -> None:
    recipe = small_recipe(*IN_BITS, f"train.method={method}", f"student.dtype={dtype}", "train.weight_decay=0.1")
    trainer, replay = trainer_of(toy_cache, recipe)
    for step in range(2):
        trainer.update(replay.batch(step))
    checkpoint.save(tmp_path, 2, trainer.tensors(), {}, keep=1)
    again, _ = trainer_of(toy_cache, recipe)
    again.restore(checkpoint.load(tmp_path / "step-00000002"))
    state = again.tensors()["optimizer"]
    kinds = {value.dtype for name, value in state.items() if name.endswith(("/state1", "/state2"))}
    assert kinds == {torch.uint8, torch.float32}, "large tensors in bytes, small ones not"
    assert {name: value.tolist() for name, value in state.items()} == {
        name: value.tolist() for name, value in trainer.tensors()["optimizer"].items()
    }
    for each in (trainer, again):
        each.update(replay.batch(2))
    assert torch.equal(weights(trainer), weights(again))


def test_adam_in_8_bits_does_nearly_what_adam_does(toy_cache: Path) -> None:
    moved = []
    for optimizer in ("adamw", "adamw_8bit"):
        trainer, replay = trainer_of(toy_cache, small_recipe("train.lora_rank=64", f"train.optimizer={optimizer}"))
        start = weights(trainer).clone()
        for step in range(5):
            trainer.update(replay.batch(step))
        moved.append(weights(trainer) - start)
    assert 0 < distance(moved[1], moved[0]) < 0.2


def test_interrupted_after_every_step_nf4_and_8_bits_are_those_of_the_undisturbed_run(
    nf4_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small_recipe(NF4, *IN_BITS, "train.steps=3")
    assert stage.run(recipe, str(nf4_cache), tmp_path / "undisturbed") == 0
    monkeypatch.setattr(stage, "graceful", stop_after_one_step)
    for _ in range(3):
        with pytest.raises(Interrupted):
            stage.run(recipe, str(nf4_cache), tmp_path / "run")
    assert stage.run(recipe, str(nf4_cache), tmp_path / "run") == 0
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed")


def test_missing_bitsandbytes_is_one_line(toy_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim.adamw", None)
    with pytest.raises(
        ConfigError, match=r'train\.optimizer = "adamw_8bit": needs bitsandbytes, .*install .*\[quant\]'
    ):
        trainer_of(toy_cache, small_recipe("train.optimizer=adamw_8bit"))


# -- on a GPU -------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnCuda:
    def test_a_model_in_nf4_computes_as_its_dequantised_weights(self) -> None:
        cfg = ModelConfig(model="toy:student", dtype="bfloat16", device="cuda")
        model = models.load_model(cfg.model_copy(update={"quantisation": "nf4"}), attention="sampling")
        oracle, exact = (models.load_model(cfg, attention="sampling") for _ in range(2))
        dequantised(model, oracle)
        with torch.no_grad():
            logp, expected, unquantised = (
                each(input_ids=IDS.cuda()).logits.float().log_softmax(-1) for each in (model, oracle, exact)
            )
        rounding = (expected - unquantised).abs().mean()
        assert rounding > 0 and (logp - expected).abs().mean() < 0.2 * rounding

    def test_nf4_and_8_bits_go_on_bit_for_bit(self, nf4_cache: Path, tmp_path: Path) -> None:
        recipe = small_recipe(NF4, *IN_BITS, "student.device=cuda")
        trainer, replay = trainer_of(nf4_cache, recipe)
        for step in range(2):
            trainer.update(replay.batch(step))
        checkpoint.save(tmp_path, 2, trainer.tensors(), {}, keep=1)
        again, _ = trainer_of(nf4_cache, recipe)
        again.restore(checkpoint.load(tmp_path / "step-00000002"))
        for name, value in trainer.tensors()["optimizer"].items():
            assert torch.equal(value, again.tensors()["optimizer"][name]), name
        gradients = [weight.grad for weight in trainer.masters.values()]
        for theirs, ours in zip(again.masters.values(), gradients, strict=True):
            theirs.grad = ours  # the backward pass need not be deterministic there
        for each in (trainer, again):
            each.optimizer.step()
        assert torch.equal(weights(trainer), weights(again))

    def test_8_bits_take_a_quarter_of_the_memory(self) -> None:
        from pipeline.config import TrainConfig
        from pipeline.train.optimizer import make_optimizer, state_tensors

        def state_bytes(optimizer: str) -> int:
            parameters = {"w": nn.Parameter(torch.zeros(2048, 2048, device="cuda"))}
            parameters["w"].grad = torch.ones_like(parameters["w"])
            made = make_optimizer(parameters, TrainConfig.model_validate({"optimizer": optimizer}))
            made.step()
            return sum(value.nbytes for value in state_tensors(made, parameters).values())

        assert state_bytes("adamw_8bit") < 0.27 * state_bytes("adamw")
