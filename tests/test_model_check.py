"""The model check of `redpen rollouts`: what cannot be scored or trained is refused before sampling."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import cache_schema as cs
from helpers.caches import small_recipe
from helpers.families import config_of, save_model
from pipeline.engines.transformers_sampler import TransformersSampler
from pipeline.errors import ModelError
from pipeline.forward import attention
from pipeline.models.resolve import resolve
from pipeline.rollouts import model_check, stage

SHORT = ("prompts.limit=4", "rollouts.max_response_tokens=12", "rollouts.format_check_prompts=0")


@pytest.fixture(autouse=True)
def _nothing_is_checked_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_check, "_checked", set())


def family(name: str, path: Path) -> Path:
    """A tiny model of a family with the toy's tokenizer."""
    config = config_of(name)
    config.vocab_size = 259
    save_model(config, path)
    resolve(small_recipe().student).tokenizer.save_pretrained(path)
    return path


def refused(cache: Path, match: str, *settings: str) -> None:
    recipe = small_recipe(*SHORT, *settings)
    with pytest.raises(ModelError, match=match) as error:
        stage.run(recipe, str(cache))
    assert "\n" not in str(error.value)
    assert not cache.exists() or not cs.open(str(cache)).round().rollouts.committed().any()


def test_both_models_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = small_recipe(*SHORT)
    stage.run(recipe, str(tmp_path / "c.zarr"))
    said = capsys.readouterr().err
    assert "teacher: packing check: packed and unpacked log-probs agree" in said
    assert "student: packing check: packed and unpacked log-probs agree" in said
    assert "its sampler agrees to" in said
    stage.run(recipe, str(tmp_path / "d.zarr"))
    said = capsys.readouterr().err
    assert "teacher: packing check" not in said and "student: packing check" in said


def test_a_teacher_that_cannot_be_streamed_is_refused(tmp_path: Path) -> None:
    teacher = family("RWKV", tmp_path / "teacher")
    refused(tmp_path / "c.zarr", "cannot be streamed", f"teacher.model={teacher}", "score.placement=streamed")


def test_a_student_that_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "c.zarr", "rescale_every", f"student.model={family('RWKV', tmp_path / 'student')}")
    refused(tmp_path / "c.zarr", r"train\.lora_targets", 'train.lora_targets=["no_such_layer"]')


def test_a_teacher_whose_window_is_ignored_is_padded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Packed attention with a defect: made-up responses are longer than the window, so it is found."""
    attend = attention._attend

    def without_window(query: Any, key: Any, value: Any, mask: Any, settings: attention._Settings) -> Any:
        return attend(query, key, value, mask, replace(settings, window=None))

    monkeypatch.setattr(attention, "_attend", without_window)
    teacher = family("Mistral", tmp_path / "teacher")
    stage.run(small_recipe(*SHORT, f"teacher.model={teacher}"), str(tmp_path / "c.zarr"))
    assert "teacher: packing check: not packed" in capsys.readouterr().err


def test_a_sampler_that_sees_its_padding_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = TransformersSampler._forward

    def blind(self: Any, ids: Any, mask: Any, positions: Any, cache: Any) -> Any:
        return forward(self, ids, torch.ones_like(mask), positions, cache)

    monkeypatch.setattr(TransformersSampler, "_forward", blind)
    refused(tmp_path / "c.zarr", "from its sampler and its scoring forward")
