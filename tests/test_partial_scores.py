"""Teachers with some scores only: served ones score their likeliest tokens, imported ones the token alone."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import cache_schema as cs
from helpers import cache_factory as factory
from helpers.caches import add_partial_teachers
from helpers.training import (
    distance,
    flat_gradient,
    gradient,
    moved,
    naive_gradient_of,
    partial_kl,
    teacher_columns,
    trainer_of,
)
from pipeline.config import Recipe
from pipeline.errors import ConfigError
from pipeline.report import inspect
from pipeline.rounds.metrics import REST_FLOOR, SamplerGap, rest_of, reverse_kl, scores_reverse_kl
from pipeline.train import stage

Make = Callable[..., Recipe]


@pytest.fixture
def partial_cache(toy_cache: Path, tmp_path: Path) -> Path:
    """The toy cache with two more teachers: "partial" returns less, "alone" the sampled token only."""
    path = tmp_path / "partial.zarr"
    shutil.copytree(toy_cache, path)
    add_partial_teachers(path, 7)
    return path


def test_missing_scores_read_back_as_missing(partial_cache: Path) -> None:
    cache = cs.open(partial_cache)
    round_ = cache.round()
    assert not list(cs.verify(cache))
    alone = round_.scores("alone").read(0)
    assert {name for name, value in vars(alone).items() if value is not None} == {"logprobs"}
    partial = round_.scores("partial").read(0)
    unscored = np.isnan(partial.logprobs)
    assert unscored.any() and np.isnan(partial.candidate_logprobs[unscored]).all()
    assert np.isnan(partial.candidate_logprobs[~unscored]).any() and partial.entropy is None


def test_a_teacher_without_candidates_does_not_wait_for_the_student(tmp_path: Path) -> None:
    records = factory.prompts(4)
    cache = cs.create(tmp_path / "c")
    round_ = cache.start_round(factory.round_manifest(records), records)
    rng = np.random.default_rng(0)
    for block in range(round_.n_blocks):
        round_.rollouts.write(block, factory.rollout_block(round_.manifest, block, rng))
    imported = round_.start_scores("teacher", factory.scores_manifest("teacher", candidates=0, entropy=False))
    imported.write(0, cs.ScoreBlock(logprobs=np.full(round_.rollouts.read(0).n_tokens, -1, np.float32)))
    assert imported.committed().tolist() == [True] + [False] * (round_.n_blocks - 1)
    assert not list(cs.verify(cache))


BAD = {
    "a whole teacher may leave nothing out": ({"partial": False}, {}, "logprobs"),
    "an unscored token has no candidates": ({}, {"rest_logprob": 0.0}, "rest_logprob"),
    "above 0": ({}, {"candidate_logprobs": 0.5}, "candidate_logprobs"),
}


@pytest.mark.parametrize("case", BAD)
def test_partial_scores_are_checked_too(case: str, partial_cache: Path) -> None:
    changes, values, array = BAD[case]
    round_ = cs.open(partial_cache, writable=True).round()
    group = round_.scores("partial")
    record = group.read(0)
    for name, value in values.items():
        setattr_on = getattr(record, name).copy()
        setattr_on[np.isnan(record.logprobs) if array == "rest_logprob" else slice(None)] = value
        record = dataclasses.replace(record, **{name: setattr_on})
    with pytest.raises(cs.InvalidBlockError, match=array):
        record.validate(dataclasses.replace(group.manifest, **changes), round_.rollouts.read(0))


def test_the_student_scores_everything() -> None:
    for change in ({"partial": True}, {"entropy": False}, {"candidates": 0}):
        with pytest.raises(cs.CacheError):
            factory.scores_manifest("student", **change)


# -- figures -------------------------------------------------------------------------------------------------------


def test_missing_candidates_count_as_rest(partial_cache: Path) -> None:
    round_ = cs.open(partial_cache).round()
    student, scores = round_.scores("student").read(1), round_.scores("partial").read(1)
    found = scores_reverse_kl(student, scores)
    for t in range(student.n_tokens):
        recorded = ~np.isnan(scores.candidate_logprobs[t])
        own = student.candidate_logprobs[t].astype(np.float64)
        rest = np.log(np.exp(own[~recorded]).sum() + np.exp(np.float64(student.rest_logprob[t])))
        expected = reverse_kl(
            [own[recorded]], [rest], [scores.candidate_logprobs[t][recorded]], [scores.rest_logprob[t]]
        )[0]
        if np.isnan(scores.logprobs[t]):
            assert np.isnan(found[t])
        else:
            assert found[t] == pytest.approx(expected, abs=1e-12)
    whole = scores_reverse_kl(student, round_.scores("teacher").read(1))
    scored = ~np.isnan(found)
    assert (found[scored] <= whole[scored] + 1e-5).all(), "a coarser partition has the smaller divergence"
    alone = scores_reverse_kl(student, round_.scores("alone").read(1))
    assert (alone[scored] <= whole[scored] + 1e-5).all() and (alone[scored] >= -1e-12).all()
    assert np.isnan(alone[~scored]).all()


def test_the_rest_of_a_sure_teacher_is_small_and_not_zero() -> None:
    rest = rest_of(np.array([0.0, -1e-9, -0.5, np.nan], np.float32))
    assert rest[0] == rest[1] == np.log(REST_FLOOR)
    assert rest[2] == pytest.approx(np.log1p(-np.exp(-0.5))) and np.isnan(rest[3])
    assert rest_of(np.log([[0.25, 0.5]])) == pytest.approx(np.log([0.25]))


def test_the_views_show_what_was_scored(partial_cache: Path) -> None:
    cache = cs.open(partial_cache)
    shown = {scores["name"]: scores for scores in inspect.summary(cache)["rounds"][0]["scores"]}
    assert 0 < shown["partial"]["reverse_kl_tokens"] < shown["teacher"]["reverse_kl_tokens"]
    assert shown["alone"]["reverse_kl"] > 0

    class Decoder:
        def decode(self, token_ids: object) -> str:
            return "x"

    for name in ("partial", "alone"):
        tokens = inspect.rollout(cache.round(), 3, name, Decoder)["tokens"]
        assert any(token["reverse_kl"] is not None for token in tokens)


def test_a_sampler_of_another_distribution_is_detected() -> None:
    rng = np.random.default_rng(0)
    rounding = SamplerGap.of(rng.normal(0, 0.02, 100_000).astype(np.float32))
    tempered = SamplerGap.of(rng.normal(0.05, 0.2, 100_000).astype(np.float32))
    assert rounding is not None and not rounding.is_wide and rounding.mean == pytest.approx(1, abs=1e-2)
    assert tempered is not None and tempered.is_wide and tempered.outside > 0.5
    assert SamplerGap.of(np.empty(0, np.float32)) is None


# -- training ------------------------------------------------------------------------------------------------------


def test_gradient_of_partial_scores_is_that_of_the_formula(partial_cache: Path, recipe: Make) -> None:
    trainer, replay = trainer_of(partial_cache, recipe(), "partial")
    batch = replay.batch(1)
    found = gradient(moved(trainer), batch)
    scored = [np.isfinite(rollout.column("partial/logprobs")) for rollout in batch.rollouts]
    for rollout, expected in zip(batch.rollouts, scored, strict=True):
        assert rollout.weights.tolist() == expected.tolist()
    assert batch.n_tokens == sum(map(np.count_nonzero, scored)) < sum(map(len, scored))
    formula = naive_gradient_of(
        trainer, batch, lambda rollout, logp: partial_kl(rollout, logp, *teacher_columns(rollout, "partial"))
    )
    assert distance(found, formula) < 1e-5


def test_imported_log_probs_allow_no_divergence_over_candidates(
    partial_cache: Path, tmp_path: Path, recipe: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("train.teacher=alone", "train.steps=3")
    for loss in ("forward_kl", "jsd", "mixed_kl"):
        with pytest.raises(ConfigError, match=rf'"{loss}": .*hold no candidates \(engine import\); set it to'):
            stage.run(recipe(*settings, f"train.loss={loss}"), str(partial_cache), tmp_path / loss)
    capsys.readouterr()
    for loss in ("reverse_kl", "importance_sampling"):
        sampled = recipe(*settings, f"train.loss={loss}")
        assert stage.run(sampled, str(partial_cache), tmp_path / loss) == 0
        warned = [line for line in capsys.readouterr().err.splitlines() if "hold no candidates" in line]
        assert len(warned) == 1 and ("(k2)" in warned[0]) == (loss == "reverse_kl")
        trainer, replay = trainer_of(partial_cache, sampled, "alone")
        assert torch.isfinite(moved(trainer).gradient(replay.batch(0)).totals).all()
        assert torch.isfinite(flat_gradient(trainer)).all()


def test_without_candidates_reverse_kl_has_the_gradient_of_importance_sampling(
    partial_cache: Path, recipe: Make
) -> None:
    """k2 is the direct form of the policy gradient with the current advantage, as long as that is not clipped."""
    gradients = []
    for loss in ("train.loss=reverse_kl", "train.loss=importance_sampling"):
        trainer, replay = trainer_of(
            partial_cache, recipe(loss, "train.teacher=alone", "train.advantage_clip=1e3"), "alone"
        )
        batch = replay.batch(1)
        moved(trainer).gradient(batch)
        gradients.append(flat_gradient(trainer))
    assert float((gradients[0] - gradients[1]).norm() / gradients[1].norm()) < 1e-5
