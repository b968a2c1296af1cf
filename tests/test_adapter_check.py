"""Whether an engine applies an adapter: the measure on known numbers, and `redpen rollouts` with a fake of vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import cache_schema as cs
import pipeline.engines.vllm
import pipeline.rollouts.stage
from helpers.caches import small_recipe
from helpers.models import random_adapter, small_model
from pipeline.engines.adapter_check import AdapterEffect, changes_nothing, check_effect
from pipeline.errors import ModelError
from pipeline.models import load as models
from pipeline.models.resolve import resolve

PROMPTS = [np.arange(3, 3 + n, dtype=np.int32) for n in (4, 9, 6)]


def readings(effect: float, noise: float, part: float, n: int = 160) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An engine's log-probs, and the forward's with and without an adapter."""
    rng = np.random.default_rng(0)
    base = rng.normal(-3, 1, n)
    change = rng.normal(0, effect, n)
    return base + part * change + rng.normal(0, noise, n), base + change, base


@pytest.mark.parametrize(
    ("effect", "noise", "part"),
    [(1.0, 0.02, 1.0), (0.05, 0.02, 1.0), (1e-3, 1e-6, 1.0), (0.0, 0.02, 0.0), (1e-4, 0.02, 0.0)],
    ids=["large", "as small as rounding", "small in fp32", "none", "below what can be seen"],
)
def test_an_adapter_that_is_applied_passes(effect: float, noise: float, part: float) -> None:
    check_effect(*readings(effect, noise, part), "engine")


@pytest.mark.parametrize(
    ("effect", "noise", "part"), [(1.0, 0.02, 0.0), (0.05, 0.02, 0.0), (1e-3, 1e-6, 0.5), (1.0, 0.02, 4.0)]
)
def test_the_part_that_is_applied_is_found(effect: float, noise: float, part: float) -> None:
    found, adapted, base = readings(effect, noise, part)
    found[3] = np.nan  # what an engine does not return
    with pytest.raises(ModelError, match=r"student.adapter: it shows (-?\d+)% of the effect") as caught:
        check_effect(found, adapted, base, "student.adapter: it")
    shown = int(str(caught.value).partition("shows ")[2].partition("%")[0]) / 100
    assert shown == pytest.approx(part, abs=0.15) and "\n" not in str(caught.value)


class FakeEngine:
    """vLLM as far as the check goes: the training forward's log-probs, through the adapter or not.

    Attributes:
        applies: whether requests through the adapter go through it.
    """

    applies = True

    def __init__(self, model: Any, *_: object, **__: object):
        self.model = models.load_model(model, attention="sampling")

    def next_logprobs(self, prompts: list[np.ndarray], *, adapted: bool = True) -> list[dict[int, float]]:
        found = []
        for prompt in prompts:
            ids = torch.from_numpy(prompt.astype(np.int64))[None]
            with torch.no_grad():
                if adapted and self.applies:
                    logits = self.model(input_ids=ids).logits
                else:
                    with self.model.disable_adapter():
                        logits = self.model(input_ids=ids).logits
            values, tokens = logits[0, -1].log_softmax(0).topk(5)
            found.append(dict(zip(tokens.tolist(), values.tolist(), strict=True)))
        return found

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def adapted(tmp_path: Path) -> list[str]:
    student = small_model(tmp_path / "student")
    adapter = random_adapter(student, tmp_path / "adapter")
    return [f"student.model={student}", f"student.adapter={adapter}"]


def test_rollouts_refuses_an_adapter_that_vllm_ignores(
    adapted: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.engines.vllm, "Engine", FakeEngine)
    monkeypatch.setattr(FakeEngine, "applies", False)
    recipe = small_recipe(*adapted, "rollouts.engine=vllm", "eval.format=null")
    with pytest.raises(ModelError, match=r"student\.adapter = .*in vLLM it has no effect.*redpen merge") as caught:
        pipeline.rollouts.stage.run(recipe, str(tmp_path / "cache"))
    assert "\n" not in str(caught.value)
    assert not cs.open(tmp_path / "cache").round().rollouts.committed().any()


def test_an_adapter_is_compared_with_the_training_forward(
    adapted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    student = small_recipe(*adapted).student
    effect = AdapterEffect.of(student, PROMPTS)
    assert effect is not None and effect.adapted is not None and effect.base is not None
    assert np.abs(effect.adapted - effect.base).mean() > 0.1
    engine: Any = FakeEngine(student)
    effect.check(engine, "it")
    for name, module in engine.model.named_modules():
        if "layers.0." in name and isinstance(getattr(module, "scaling", None), dict):
            module.scaling = dict.fromkeys(module.scaling, 0.0)
    with pytest.raises(ModelError, match=r"it shows -?\d+% of the effect"):
        effect.check(engine, "it")


def test_an_adapter_as_initialised_is_not_expected_to_have_an_effect(tmp_path: Path) -> None:
    student = small_model(tmp_path / "student")
    settings = [f"student.model={student}", f"student.adapter={tmp_path / 'adapter'}"]
    random_adapter(student, tmp_path / "adapter")
    weights = tmp_path / "adapter/adapter_model.safetensors"
    trained = load_file(weights)
    untrained = {name: torch.zeros_like(t) if "lora_B" in name else t for name, t in trained.items()}
    save_file(untrained, weights, {"format": "pt"})
    directory = resolve(small_recipe(*settings).student).adapter_directory
    assert directory is not None and changes_nothing(directory)
    assert AdapterEffect.of(small_recipe(*settings).student, PROMPTS) is None
    save_file(trained, weights, {"format": "pt"})
    assert not changes_nothing(directory)
