"""Evaluation: figures by hand on a small set, intervals against their formulas, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_recipe
from hypothesis import given
from hypothesis import strategies as st

from pipeline import models
from pipeline.answers import extract_answer, mean_per_token, share_right
from pipeline.config import Recipe
from pipeline.errors import ConfigError, ModelError, PromptError, RedpenError
from pipeline.evaluate import stage
from pipeline.prompts import load_prompts, render
from pipeline.rollouts import PromptBlock, Sampling
from pipeline.rollouts.transformers_sampler import TransformersSampler
from pipeline.toy import asset_path, world

N_PROMPTS = 20
SMALL = (f"eval.limit={N_PROMPTS}", "eval.candidates=259", "rollouts.max_response_tokens=24")


# -- answers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "pattern", "answer"),
    [
        ("3*5=15;487+15=502", r"=(\d+)\s*$", "502"),
        ("3*5=15;487+15=502\n", r"=(\d+)\s*$", "502"),
        ("3*5=15;487+15=", r"=(\d+)\s*$", None),
        (r"so \boxed{1} or rather \boxed{ 2 }.", r"\\boxed\{([^{}]*)\}", "2"),
        ("  Paris \n", None, "Paris"),
        ("", None, ""),
        ("a or nothing", r"(b)?nothing", None),
    ],
)
def test_the_answer_is_the_last_match(response: str, pattern: str | None, answer: str | None) -> None:
    assert extract_answer(response, pattern) == answer


def test_wilson_intervals() -> None:
    """5 and 0 of 10 as in the tables of Newcombe (1998) to four digits."""
    half = share_right(np.array([[True]] * 5 + [[False]] * 5))
    assert (half.value, half.low, half.high) == pytest.approx((0.5, 0.2366, 0.7634), abs=1e-4)
    none = share_right(np.zeros((10, 1), bool))
    assert (none.value, none.low, none.high) == pytest.approx((0, 0, 0.2775), abs=1e-4)


def test_samples_of_one_prompt_are_not_independent() -> None:
    once = np.array([[True], [False]] * 50)
    together = share_right(np.repeat(once, 8, axis=1))
    assert (together.low, together.high) == pytest.approx((share_right(once).low, share_right(once).high), abs=2e-3)
    mixed = share_right(np.tile([[True, False] * 4], (100, 1)))
    assert mixed.high - mixed.low < (together.high - together.low) / 2.5


@given(st.integers(1, 60), st.integers(1, 5), st.integers(0, 2**32))
def test_intervals_hold_their_value(n_prompts: int, n_samples: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    estimate = share_right(rng.random((n_prompts, n_samples)) < rng.random())
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1


def test_the_interval_of_a_mean_per_token_covers() -> None:
    """Prompts of very different lengths, tokens of a prompt correlated: 95 % of intervals hold the true mean."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        tokens = rng.integers(1, 60, 200).astype(float)
        level = rng.gamma(2.0, 0.05, 200)  # a prompt's own divergence, mean 0.1
        estimate = mean_per_token(level * tokens, tokens)
        covered += estimate.low <= 0.1 <= estimate.high
    assert 0.92 < covered / 400 < 0.98


# -- a run, by hand -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_dir(toy_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import pipeline.train.stage

    path = tmp_path_factory.mktemp("evaluated") / "run"
    settings = small_recipe("train.lora_rank=8", "train.prompts_per_step=24", "train.learning_rate=0.005")
    assert pipeline.train.stage.run(settings, str(toy_cache), path) == 0
    return path


@pytest.fixture(scope="module")
def figures(run_dir: Path) -> dict[str, dict[str, dict[str, float]]]:
    assert stage.run(str(run_dir), overrides=SMALL) == 0
    written: dict[str, dict[str, dict[str, float]]] = json.loads((run_dir / "eval.json").read_text())
    return written


def recipes_student(run_dir: Path, label: str) -> Recipe:
    adapter = [f"student.adapter={run_dir / 'adapter'}"] if label == "after" else []
    return small_recipe(*SMALL, *adapter)


@pytest.mark.parametrize("label", ["before", "after"])
@torch.inference_mode()
def test_greedy_accuracy_by_hand(label: str, run_dir: Path, figures: dict[str, dict[str, dict[str, float]]]) -> None:
    recipe = recipes_student(run_dir, label)
    model, tokenizer = models.load_model(recipe.student, attention="sdpa"), models.load_tokenizer(recipe.student)
    right = 0
    records = [json.loads(line) for line in asset_path("prompts/heldout.jsonl").read_text().splitlines()]
    for record in records[:N_PROMPTS]:
        ids = tokenizer(record["prompt"])["input_ids"]
        start = len(ids)
        while len(ids) < start + 24 and ids[-1] != tokenizer.eos_token_id:
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        text = tokenizer.decode(ids[start:], skip_special_tokens=True)
        right += str(world.read_answer(text)) == record["answer"]
    assert figures[label]["greedy"]["value"] == pytest.approx(right / N_PROMPTS)
    assert 0 < right < N_PROMPTS


@pytest.mark.parametrize("label", ["before", "after"])
@torch.inference_mode()
def test_reverse_kl_by_hand(label: str, run_dir: Path, figures: dict[str, dict[str, dict[str, float]]]) -> None:
    """The whole vocabulary in float64, each fresh rollout alone, and the sampled accuracy of the same rollouts."""
    recipe = recipes_student(run_dir, label)
    student, tokenizer = models.load_model(recipe.student, attention="sdpa"), models.load_tokenizer(recipe.student)
    teacher = models.load_model(recipe.teacher[0], attention="sdpa")
    prompts = recipe.prompts.model_copy(update={"path": "toy:heldout", "limit": N_PROMPTS})
    records = load_prompts(prompts)
    ids = [np.array(render(record, tokenizer, prompts), np.int32) for record in records]
    sampling = Sampling(1.0, 1.0, (256, 258), 1, 24, seed=0, round_index=-1)
    rollouts = TransformersSampler(student, sampling).sample_block(PromptBlock(0, list(enumerate(ids))))
    divergence, right = [], 0
    for row in range(rollouts.n_rows):
        prompt, response = rollouts.prompt(row), rollouts.response(row)
        sequence = torch.from_numpy(np.concatenate([prompt, response])).long()[None]
        s, t = (
            model(input_ids=sequence, use_cache=False).logits[0, len(prompt) - 1 : -1].double().log_softmax(1)
            for model in (student, teacher)
        )
        divergence += (s.exp() * (s - t)).sum(1).tolist()
        text = tokenizer.decode(response, skip_special_tokens=True)
        right += str(world.read_answer(text)) == records[row]["answer"]
    measured = figures[label]["reverse_kl"]
    assert measured["value"] == pytest.approx(np.mean(divergence), rel=1e-4)
    assert measured["low"] < measured["value"] < measured["high"]
    assert figures[label]["sampled"]["value"] == pytest.approx(right / N_PROMPTS)


def test_the_table_is_on_stdout(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert stage.run(str(run_dir), overrides=[*SMALL, "eval.limit=4", "eval.samples=2"]) == 0
    out, _ = capsys.readouterr()
    lines = out.splitlines()
    assert [line.split("  ")[0] for line in lines[:4]] == [
        "4 prompts of toy:heldout", "accuracy, greedy", "accuracy, sampled", "reverse KL, nats a token",
    ]  # fmt: skip
    assert "points" in lines[1] and lines[4].startswith(
        "(95 % intervals; sampled: 2 a prompt at T = 1; reverse KL to toy"
    )
    assert "\x1b" not in out and "─" not in out


def test_fewer_candidates_give_a_lower_bound(
    run_dir: Path, figures: dict[str, dict[str, dict[str, float]]], tmp_path: Path
) -> None:
    assert stage.run(str(run_dir), overrides=[*SMALL, "eval.candidates=4"], out=tmp_path / "few.json") == 0
    few = json.loads((tmp_path / "few.json").read_text())
    for label in ("before", "after"):
        bound, exact = few[label]["reverse_kl"]["value"], figures[label]["reverse_kl"]["value"]
        assert 0 < bound <= exact * (1 + 1e-6) and few[label]["greedy"] == figures[label]["greedy"]


def test_a_tempered_sample_does_not_change_the_reverse_kl(
    run_dir: Path, figures: dict[str, dict[str, dict[str, float]]], tmp_path: Path
) -> None:
    """It is on rollouts at temperature 1, whatever the accuracy is sampled at."""
    assert stage.run(str(run_dir), overrides=[*SMALL, "eval.temperature=0.5"], out=tmp_path / "cool.json") == 0
    cool = json.loads((tmp_path / "cool.json").read_text())
    assert cool["before"]["reverse_kl"] == figures["before"]["reverse_kl"]


def test_models_are_never_in_memory_together(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gc
    import weakref

    alive: list[weakref.ref[object]] = []
    real = models.load_model

    def alone(*args: object, **kwargs: object) -> object:
        gc.collect()
        assert not [ref for ref in alive if ref() is not None]
        model = real(*args, **kwargs)  # type: ignore[arg-type]
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(models, "load_model", alone)
    assert stage.run(str(run_dir), overrides=[*SMALL, "eval.limit=2"]) == 0
    assert len(alive) == 3


# -- one model ----------------------------------------------------------------------------------------------------


def test_a_bare_model_with_prompts(
    figures: dict[str, dict[str, dict[str, float]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student, heldout = models.resolve_path("toy:student"), asset_path("prompts/heldout.jsonl")
    settings = [*SMALL, "prompts.template=none", r"eval.answer_pattern=''=(\d+)\s*$''".replace("''", "'")]
    out = tmp_path / "eval.json"
    assert stage.run(student, prompts=str(heldout), overrides=settings, out=out) == 0
    measured = json.loads(out.read_text())
    assert measured["model"]["greedy"] == figures["before"]["greedy"] and "reverse_kl" not in measured["model"]
    assert "change" not in capsys.readouterr().out


def test_the_embedded_models_need_nothing_else(
    figures: dict[str, dict[str, dict[str, float]]], tmp_path: Path
) -> None:
    out = tmp_path / "eval.json"
    assert stage.run("toy:student", teacher="toy:teacher", overrides=SMALL, out=out) == 0
    measured = json.loads(out.read_text())["model"]
    assert measured["greedy"] == figures["before"]["greedy"]
    assert measured["reverse_kl"]["value"] == pytest.approx(figures["before"]["reverse_kl"]["value"], rel=1e-6)


# -- what is refused ----------------------------------------------------------------------------------------------


def unfinished(run: Path, tmp_path: Path) -> Path:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    shutil.rmtree(copy / "adapter")
    return copy


REFUSED: dict[str, tuple[Callable[[Path, Path], str | Path], dict[str, object], type[Exception], str]] = {
    "an unfinished run": (unfinished, {}, RedpenError, "has no adapter yet; finish it with the same `redpen train`"),
    "a recipe beside a run": (lambda run, _: run, {"recipe": "toy"}, ConfigError, "brings its own recipe"),
    "an unknown setting": (
        lambda run, _: run,
        {"overrides": ["eval.sample=3"]},
        ConfigError,
        "did you mean eval.samples",
    ),
    "no such model": (lambda _, tmp: tmp / "nowhere", {"prompts": "toy:heldout"}, ModelError, "no such directory"),
    "a model without prompts": (
        lambda *_: models.resolve_path("toy:student"),
        {},
        ConfigError,
        "--prompts: expected",
    ),
    "no such prompts": (lambda run, _: run, {"prompts": "nowhere.jsonl"}, PromptError, "nowhere.jsonl"),
    "prompts too long": (
        lambda run, _: run,
        {"overrides": ["rollouts.max_prompt_tokens=3"]},
        PromptError,
        "set rollouts.max_prompt_tokens to",
    ),
}


@pytest.mark.parametrize(("target", "options", "kind", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_measured_is_one_line(
    target: Callable[[Path, Path], str | Path],
    options: dict[str, object],
    kind: type[Exception],
    message: str,
    run_dir: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(kind) as caught:
        stage.run(str(target(run_dir, tmp_path)), **options)  # type: ignore[arg-type]
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_prompts_without_answers_need_a_teacher(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps({"prompt": p.prompt}) + "\n" for p in world.sample("heldout", 4, 0)]
    (tmp_path / "p.jsonl").write_text("".join(lines))
    with pytest.raises(ConfigError, match="no prompt has an answer"):
        stage.run("toy:student", prompts=str(tmp_path / "p.jsonl"))
    assert stage.run(str(run_dir), prompts=str(tmp_path / "p.jsonl")) == 0
    said = capsys.readouterr()
    assert "reverse KL" in said.out and "accuracy" not in said.out
    assert "4 of 4 prompts have no answer" in said.err


def test_a_run_outlives_its_teacher(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Accuracy needs no teacher; one that was asked for by name is still required."""
    gone = f"teacher.model={tmp_path / 'gone'}"
    out = tmp_path / "eval.json"
    assert stage.run(str(run_dir), overrides=[*SMALL, "eval.limit=4", gone], out=out) == 0
    said = capsys.readouterr()
    assert "no such directory" in said.err and "reverse KL is left out" in said.err
    assert "accuracy" in said.out and "reverse_kl" not in json.loads(out.read_text())["after"]
    with pytest.raises(ModelError, match="no such directory"):
        stage.run(str(run_dir), teacher=str(tmp_path / "gone"), overrides=SMALL)
