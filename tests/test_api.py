"""The Python API: the four lines do what they say, and say why where they must not be run."""

from __future__ import annotations

import json
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import cache_schema as cs
from helpers.caches import make_cache
from pipeline.api import Rollouts, Student, Teacher, Trainer
from pipeline.config import ModelConfig, Recipe, RolloutsConfig, TrainConfig
from pipeline.errors import ConfigError, ModelError, PromptError, RedpenError
from pipeline.rounds.metrics import scores_reverse_kl
from pipeline.toy import asset_path

ROOT = Path(__file__).parent.parent
PROMPTS = ["487+3*5=", "96+4*4=", "10+1*1="]
FEW = RolloutsConfig(rollouts_per_prompt=4, max_response_tokens=24)
TRAIN = TrainConfig(
    learning_rate=1e-3, lora_rank=4, tokens_per_microbatch=100, gradient_checkpointing=False, max_grad_norm=1e6
)
FP32 = {"dtype": "float32"}


def toy_student() -> Student:
    return Student(ModelConfig(model="toy:student", **FP32), template="none")


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return Teacher(ModelConfig(model="toy:teacher", **FP32))


def alone(model: torch.nn.Module, rollouts: Rollouts) -> Tensor:
    """[T]: log-probs by an ordinary forward over one rollout at a time, with a graph."""
    block, parts = rollouts.block, []
    for row in range(block.n_rows):
        prompt, response = (torch.from_numpy(ids).long() for ids in (block.prompt(row), block.response(row)))
        logits = model(input_ids=torch.cat([prompt, response])[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
        parts.append(logits.log_softmax(1).gather(1, response[:, None])[:, 0])
    return torch.cat(parts)


def test_the_example_learns_the_toy(tmp_path: Path) -> None:
    loop = runpy.run_path(str(ROOT / "docs" / "plain_loop.py"))
    before, after = loop["main"](passes=10, adapter=tmp_path / "adapter", prompts_per_pass=32, heldout_prompts=256)
    assert before < 0.65 and after > before + 0.15
    saved = Student(ModelConfig(model="toy:student", adapter=str(tmp_path / "adapter"), **FP32), template="none")
    assert loop["accuracy"](saved, loop["problems"]("heldout")[:256]) == after


def test_logprobs_are_those_of_the_model_at_temperature_1(teacher: Teacher) -> None:
    student = toy_student()
    cool = FEW.model_copy(update={"temperature": 0.5})
    rollouts = student.sample(PROMPTS, cool)
    assert len(rollouts) == len(rollouts.texts) == 12 and rollouts.texts[0].startswith("3*5=15")
    for values, model in ((rollouts.logprobs, student.model), (teacher.compute_logprobs(rollouts), teacher.model)):
        np.testing.assert_allclose(values, alone(model, rollouts).detach(), atol=2e-5)
    assert np.abs(rollouts.logprobs - rollouts.block.rollout_logprobs).max() > 1e-2


@pytest.mark.parametrize("as_tensor", [False, True])
def test_update_is_the_formula(teacher: Teacher, as_tensor: bool) -> None:
    student = toy_student()
    trainer = Trainer(student, TRAIN)
    for _ in range(2):  # the second with a student that has moved since it sampled
        rollouts = student.sample(PROMPTS, FEW)
        advantage = -(rollouts.logprobs - teacher.compute_logprobs(rollouts))
        advantage[::3] *= 2  # equal rollouts need not have equal advantages
        trainer.update(rollouts, torch.from_numpy(advantage) if as_tensor else advantage, "importance_sampling")

        again = -(student.compute_logprobs(rollouts) - teacher.compute_logprobs(rollouts)) * 0.5
        ratio = torch.exp(alone(student.model, rollouts) - torch.from_numpy(rollouts.logprobs))
        loss = -(ratio * torch.from_numpy(again)).mean()
        gradients = torch.autograd.grad(loss, [p for p in student.model.parameters() if p.requires_grad])
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        metrics = trainer.update(rollouts, again, "importance_sampling")
        assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-3, abs=1e-6)
        assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
        assert metrics["ratio_std"] > 0 and "reverse_kl" not in metrics


def test_the_student_that_samples_is_the_one_that_moved(teacher: Teacher) -> None:
    student = toy_student()
    trainer = Trainer(student, TRAIN)
    first, second = student.sample(PROMPTS, FEW), student.sample(PROMPTS, FEW)
    assert first.block.token_ids.tobytes() != second.block.token_ids.tobytes()
    np.testing.assert_array_equal(student.compute_logprobs(first), first.logprobs)
    trainer.update(first, teacher.compute_logprobs(first) - first.logprobs)
    assert np.abs(student.compute_logprobs(first) - first.logprobs).max() > 1e-3
    moved = student.sample(PROMPTS, FEW)
    np.testing.assert_allclose(moved.logprobs, alone(student.model, moved).detach(), atol=2e-5)
    gap = moved.logprobs - moved.block.rollout_logprobs  # sampler and training forward are the same student
    assert np.abs(gap).max() < 1e-4


def test_an_advantage_is_for_one_pass(teacher: Teacher) -> None:
    student = toy_student()
    trainer = Trainer(student, TRAIN)
    rollouts = student.sample(PROMPTS, FEW)
    teacher_logp = teacher.compute_logprobs(rollouts)
    advantage = -(rollouts.logprobs - teacher_logp)
    trainer.update(rollouts, advantage, loss_fn="importance_sampling")
    moved = student.compute_logprobs(rollouts)
    with pytest.raises(RedpenError, match=r"right for one pass only: replayed, its optimum is a point mass.*Sample"):
        trainer.update(rollouts, advantage.copy(), loss_fn="importance_sampling")
    np.testing.assert_array_equal(student.compute_logprobs(rollouts), moved)
    assert trainer.step == 1
    trainer.update(rollouts, -(moved - teacher_logp), loss_fn="importance_sampling")
    assert trainer.step == 2


def nan_in_one(values: Any) -> Any:
    values = values.copy()
    values[3] = np.nan
    return values


@pytest.mark.parametrize(
    ("spoil", "loss_fn", "message"),
    [
        (
            lambda a: a[:-1],
            "importance_sampling",
            r"one value for each of the rollouts' \d+ response tokens, got shape",
        ),
        (lambda a: a[None], "importance_sampling", r"pass one value a token"),
        (lambda a: a.mean(), "importance_sampling", r"got shape \(\)"),
        (nan_in_one, "importance_sampling", r"expected finite numbers, got 1 of \d+ that are not"),
        (lambda a: a, "reverse_kl", r"expected the result of teacher\.compute_scores\(rollouts\)"),
        (lambda a: a, "ppo", r"loss_fn: expected \"importance_sampling\" or \"reverse_kl\", got 'ppo'"),
    ],
)
def test_an_invalid_signal_is_refused(
    teacher: Teacher, spoil: Callable[[Any], Any], loss_fn: Any, message: str
) -> None:
    student = toy_student()
    trainer = Trainer(student, TRAIN)
    rollouts = student.sample(PROMPTS, FEW)
    with pytest.raises(RedpenError, match=message):
        trainer.update(rollouts, spoil(teacher.compute_logprobs(rollouts) - rollouts.logprobs), loss_fn)
    assert trainer.step == 0


def test_reverse_kl_over_candidates(teacher: Teacher) -> None:
    student = toy_student()
    trainer = Trainer(student, TRAIN)
    rollouts = student.sample(PROMPTS, FEW)
    scores = teacher.compute_scores(rollouts)
    expected = scores_reverse_kl(rollouts.scores, scores).mean()
    first = trainer.update(rollouts, scores, loss_fn="reverse_kl")
    assert first["loss"] == pytest.approx(expected, rel=1e-4) and first["reverse_kl"] == pytest.approx(first["loss"])
    for _ in range(5):  # no advantage: the same scores may be used again
        last = trainer.update(rollouts, scores, loss_fn="reverse_kl")
    assert last["loss"] < first["loss"]
    with pytest.raises(RedpenError, match=r"score these rollouts"):
        trainer.update(student.sample(PROMPTS[:1], FEW), scores, loss_fn="reverse_kl")


def test_a_nucleus_has_no_ratios(teacher: Teacher) -> None:
    student = toy_student()
    rollouts = student.sample(PROMPTS, FEW.model_copy(update={"top_p": 0.9}))
    with pytest.raises(RedpenError, match=r"sampled at top_p 0\.9, .*use loss_fn=\"reverse_kl\""):
        Trainer(student, TRAIN).update(rollouts, teacher.compute_logprobs(rollouts) - rollouts.logprobs)


def another_teacher(path: Path, change: Callable[[dict[str, Any]], None]) -> Teacher:
    """The toy's with its tokenizer's model changed."""
    shutil.copytree(asset_path("teacher"), path)
    data = json.loads((path / "tokenizer.json").read_text())
    change(data["model"])
    (path / "tokenizer.json").write_text(json.dumps(data))
    return Teacher(ModelConfig(model=str(path), **FP32))


def test_other_ids_of_the_same_tokens_are_no_matter(teacher: Teacher, tmp_path: Path) -> None:
    def swap(model: dict[str, Any]) -> None:
        model["vocab"]["+"], model["vocab"]["*"] = model["vocab"]["*"], model["vocab"]["+"]

    other = another_teacher(tmp_path / "other", swap)
    with torch.no_grad():
        for weight in (other.model.get_input_embeddings().weight, other.model.get_output_embeddings().weight):
            weight[[ord("+"), ord("*")]] = weight[[ord("*"), ord("+")]]
    student = toy_student()
    rollouts = student.sample(PROMPTS, FEW)
    expected, found = teacher.compute_scores(rollouts), other.compute_scores(rollouts)
    for name in ("logprobs", "candidate_logprobs", "rest_logprob"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=1e-5)
    assert Trainer(student, TRAIN).update(rollouts, found, "reverse_kl")["loss"] > 0


def test_a_candidate_that_the_teacher_lacks_is_in_its_rest(teacher: Teacher, tmp_path: Path) -> None:
    student = toy_student()
    rollouts = student.sample(PROMPTS[2:], FEW)
    candidates = rollouts.scores.candidate_ids
    assert candidates is not None
    read = np.concatenate([rollouts.block.token_ids, rollouts.block.prompt_token_ids, np.arange(256, 259)])
    lacking = int(np.setdiff1d(candidates, read)[0])
    token = str(teacher.tokenizer.convert_ids_to_tokens(lacking))
    other = another_teacher(tmp_path / "other", lambda model: model["vocab"].update(other=model["vocab"].pop(token)))
    expected, found = teacher.compute_scores(rollouts), other.compute_scores(rollouts)
    assert expected.candidate_logprobs is not None and expected.rest_logprob is not None
    absent, recorded = candidates == lacking, found.candidate_logprobs
    assert recorded is not None and found.rest_logprob is not None and np.isnan(recorded[absent]).all()
    rest = np.logaddexp(expected.rest_logprob, np.where(absent, expected.candidate_logprobs, -np.inf).max(1))
    np.testing.assert_allclose(np.exp(found.rest_logprob), np.exp(rest), atol=1e-6)
    metrics = Trainer(student, TRAIN).update(rollouts, found, "reverse_kl")
    assert np.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0


def test_a_teacher_that_tokenizes_text_differently_is_refused(tmp_path: Path) -> None:
    def merge(model: dict[str, Any]) -> None:
        model["vocab"]["12"], model["merges"] = 259, [["1", "2"]]

    rollouts = toy_student().sample(PROMPTS, FEW)
    with pytest.raises(ModelError, match="it tokenizes text differently from the student"):
        another_teacher(tmp_path / "other", merge).compute_logprobs(rollouts)


def test_prompts_that_do_not_fit_are_refused() -> None:
    student = toy_student()
    with pytest.raises(PromptError, match=r"expected at least one, got none"):
        student.sample([])
    with pytest.raises(PromptError, match=r"prompt 2: prompt: expected text, got an empty one"):
        student.sample(["1+1*1=", " "])
    with pytest.raises(RedpenError, match=r"max_response_tokens: expected at most 506 .*, got 2048"):
        student.sample(["1+1*1="])


def test_an_environment_is_refused_here() -> None:
    with pytest.raises(ConfigError, match=r"rollouts\.environment: expected none, .* use `redpen rollouts`"):
        toy_student().sample(PROMPTS, RolloutsConfig(environment="calculator:Calculator"))


def test_a_cached_round_is_read_as_rollouts(toy_cache: Path, recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    round_ = cs.open(str(toy_cache)).round(0)
    student = toy_student()
    rollouts = student.cached(round_, 2)
    np.testing.assert_allclose(rollouts.logprobs, student.compute_logprobs(rollouts), atol=1e-6)
    teacher_logp = round_.scores("teacher").read(2).logprobs
    trainer = Trainer(student, TRAIN)
    trainer.update(rollouts, -(rollouts.logprobs - teacher_logp), loss_fn="importance_sampling")
    with pytest.raises(RedpenError, match=r"one pass only"):  # read anew, they are still the same rollouts
        trainer.update(student.cached(round_, 2), -(rollouts.logprobs - teacher_logp), loss_fn="importance_sampling")
    with pytest.raises(ModelError, match=r"was sampled by a different student, toy:student"):
        Student(ModelConfig(model="toy:teacher", **FP32)).cached(round_, 2)
    drawn = make_cache(tmp_path / "drawn.zarr", recipe("score.candidate_kind=sampled", "prompts.limit=4"))
    with pytest.raises(ModelError, match=r'expected candidates of kind "topk", got "sampled"; use `redpen train`'):
        student.cached(cs.open(str(drawn)).round(0), 0)
