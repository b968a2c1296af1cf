"""The held-out metric while training: what it measures, what it ends, which step becomes the adapter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.config import Recipe
from pipeline.engines.heldout import HeldOutPrompts
from pipeline.errors import ConfigError
from pipeline.models import load as models
from pipeline.runs.files import read_record, write_record
from pipeline.text.answers import Checker
from pipeline.train import stage
from pipeline.train.stopping import TrainingHistory, best_step, stop_result

Make = Callable[..., Recipe]
REVERSE_KL = ("train.heldout_metric=reverse_kl", "train.heldout_prompts=6", "train.heldout_every=2")
ACCURACY = ("train.heldout_metric=accuracy", "train.heldout_prompts=20", "train.heldout_every=2")
# What is legal here depends on what was learnt: an answer of three digits that do not begin with 4.
FORMAT = ("train.heldout_metric=format", *ACCURACY[1:], r"eval.format='.*=[^4]\d\d'")


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_it_is_measured_at_its_steps_and_at_the_last(toy_cache: Path, tmp_path: Path, recipe: Make) -> None:
    wanted = ((REVERSE_KL, "heldout_reverse_kl"), (ACCURACY, "heldout_accuracy"), (FORMAT, "heldout_format"))
    for settings, name in wanted:
        run = tmp_path / name
        assert stage.run(recipe(*settings), str(toy_cache), run) == 0
        measured = {line["step"]: line[name] for line in lines(run) if name in line}
        assert sorted(measured) == [2, 4, 5]
        assert all(0 < value < 1 for value in measured.values())


def test_reverse_kl_is_that_of_the_prompts_held_back(toy_cache: Path, tmp_path: Path, recipe: Make) -> None:
    """With a learning rate that moves nothing, it is that of training on those prompts."""
    still = "train.learning_rate=1e-30"
    stage.run(recipe(*REVERSE_KL, still), str(toy_cache), tmp_path / "held")
    held_back = lines(tmp_path / "held")[1]["heldout_reverse_kl"]
    # One step over all 24 prompts, and one over the 18 that are not held back.
    parts = {}
    for name, settings in {
        "all": ("train.prompts_per_step=24",),
        "replayed": ("train.prompts_per_step=18", *REVERSE_KL),
    }.items():
        stage.run(recipe(*settings, still, "train.steps=1"), str(toy_cache), tmp_path / name)
        line = lines(tmp_path / name)[0]
        parts[name] = (line["reverse_kl"] * line["tokens"], line["tokens"])
    total, tokens = (a - b for a, b in zip(parts["all"], parts["replayed"], strict=True))
    assert held_back == pytest.approx(total / tokens, rel=1e-5)


def test_the_best_step_becomes_the_adapter(
    toy_cache: Path, tmp_path: Path, recipe: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    """A learning rate that ruins the student: the first measurement stays the best, and a plateau ends the run."""
    ruin = ("train.learning_rate=1", "train.heldout_patience=2", "train.steps=50", "train.keep_checkpoints=1")
    run = tmp_path / "run"
    assert stage.run(recipe(*REVERSE_KL, *ruin), str(toy_cache), run) == 0
    measured = {line["step"]: line["heldout_reverse_kl"] for line in lines(run) if "heldout_reverse_kl" in line}
    best = min(measured, key=lambda step: measured[step])
    assert f"the result is step {best}, the best by held-out reverse KL" in capsys.readouterr().out
    assert len(lines(run)) == best + 4 < 50
    checkpoints = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert checkpoints == [f"step-{best:08d}", f"step-{best + 4:08d}"]
    saved = load_file(run / "checkpoints" / f"step-{best:08d}" / "weights.safetensors")
    adapter = load_file(run / "adapter/adapter_model.safetensors")
    for name, value in adapter.items():
        assert torch.equal(value, saved[name.replace(".weight", ".default.weight")])


def test_an_interrupted_run_remembers_what_was_measured(toy_cache: Path, tmp_path: Path, recipe: Make) -> None:
    whole = recipe(*REVERSE_KL, "train.steps=6")
    assert stage.run(whole, str(toy_cache), tmp_path / "whole") == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed/checkpoints/step-00000006")
    ended = read_record(tmp_path / "resumed")
    assert ended is not None and ended.result is not None
    write_record(tmp_path / "resumed", ended.model_copy(update={"result": None, "files": None}))
    assert stage.run(whole, str(toy_cache), tmp_path / "resumed") == 0
    keys = ("step", "loss", "heldout_reverse_kl")
    first, second = ([{k: line.get(k) for k in keys} for line in lines(tmp_path / n)] for n in ("whole", "resumed"))
    assert first == second


def test_right_and_legal_are_those_of_eval(recipe: Make) -> None:
    """`eval.match` and `eval.format` decide what is counted: here every answer, as a number, is out by a zero."""
    prompts = HeldOutPrompts.load(recipe(), "accuracy", 6)
    model = models.load_model(recipe().student)
    zeros = tuple((ids, [f"0{answer}" for answer in answers]) for ids, answers in prompts.prompts)
    exact, n_right = replace(prompts, prompts=zeros), 0
    for match in ("exact", "number"):
        n_right = replace(exact, checker=Checker(match, exact.checker.pattern)).count(model)
        assert (n_right > 0) == (match == "number")
    assert n_right == prompts.count(model)
    assert replace(prompts, metric="format", checker=Checker(format=r".*=\d+")).count(model) == 6


def test_the_best_by_format_is_the_highest(recipe: Make) -> None:
    memory = TrainingHistory(heldout={"2": 0.5, "4": 0.9, "6": 0.7})
    assert best_step(recipe(*FORMAT).train, memory) == 4
    assert "held-out format 90.0%" in str(stop_result(recipe(*FORMAT, "train.steps=6").train, 6, memory))


def test_a_metric_without_its_settings_is_refused(recipe: Make) -> None:
    for settings, missing in ((("eval.path=",), r"eval\.path"), (("eval.format=",), r"eval\.format")):
        with pytest.raises(ConfigError, match=rf'train\.heldout_metric = "format" needs {missing}'):
            recipe(*FORMAT, *settings)


def test_too_many_prompts_held_back(toy_cache: Path, tmp_path: Path, recipe: Make) -> None:
    with pytest.raises(ConfigError, match=r"train\.heldout_prompts = 24"):
        stage.run(recipe(*REVERSE_KL, "train.heldout_prompts=24"), str(toy_cache), tmp_path / "run")
