"""Task rewards: who earns them, the advantage that they make, its gradient beside a teacher's and alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import cache_schema as cs
import pipeline.rollouts.stage
import pipeline.score.stage
from helpers import cache_factory as factory
from helpers.caches import make_cache, small_recipe
from helpers.training import buckets, columns, distance, flat_gradient, kl, moved, naive_gradient_of, trainer_of
from pipeline import distill
from pipeline.cli import main
from pipeline.config import Recipe
from pipeline.errors import ConfigError
from pipeline.models import load as models
from pipeline.toy import world
from pipeline.train import checks, stage
from pipeline.train.replay import Rollout
from pipeline.train.reward import ADVANTAGE, VALUE, group_advantages

Make = Callable[..., Recipe]
REWARD = ("reward.coefficient=0.5", "rollouts.temperature=2")
ALONE = (*REWARD, "reward.teacher_weight=0", "train.loss=importance_sampling")


@pytest.fixture(scope="module")
def mixed_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rollouts warm enough that some of a prompt's are right and others wrong."""
    return make_cache(tmp_path_factory.mktemp("warm") / "c.zarr", small_recipe(*REWARD))


def is_right(rollout: Rollout) -> bool:
    """By the world itself."""
    said = [token for token in rollout.block.rollouts.response(rollout.row) if token < 256]
    response = bytes(said).decode(errors="replace")
    problem = world.Problem.parse(bytes(rollout.prompt_ids.tolist()).decode())
    return world.read_answer(response) == world.solve(problem)[1]


@pytest.mark.parametrize("normalise", ["std", "mean"])
def test_advantages_are_of_right_rollouts_against_their_prompts_others(
    normalise: str, mixed_cache: Path, recipe: Make
) -> None:
    _, replay = trainer_of(mixed_cache, recipe(*REWARD, f"reward.normalise={normalise}"))
    rollouts = [rollout for step in range(6) for rollout in replay.batch(step).rollouts]
    by_prompt: dict[int, list[Rollout]] = {}
    for rollout in rollouts:
        by_prompt.setdefault(rollout.prompt_index, []).append(rollout)
    n_mixed = 0
    for group in by_prompt.values():
        values = np.array([is_right(rollout) for rollout in group], np.float64)
        scale = values.std() + 1e-4 if normalise == "std" else 1.0
        n_mixed += bool(0 < values.mean() < 1)
        for rollout, value in zip(group, values, strict=True):
            assert set(rollout.column(VALUE).tolist()) == {value}
            np.testing.assert_allclose(
                rollout.column(ADVANTAGE), (value - values.mean()) / scale, rtol=1e-5, atol=1e-6
            )
    assert len(by_prompt) == 24 and n_mixed >= 5


@given(
    values=st.lists(st.sampled_from([0.0, 1.0, float("nan")]), min_size=1, max_size=12),
    size=st.integers(1, 4),
    scaled=st.booleans(),
)
def test_advantages_of_a_group_add_up_to_nothing(values: list[float], size: int, scaled: bool) -> None:
    groups = np.arange(len(values), dtype=np.int32) // size
    found = group_advantages(np.array(values, np.float32), groups, scaled=scaled)
    assert np.isfinite(found).all() and (found[np.isnan(values)] == 0).all()
    for group in np.unique(groups):
        of_group, known = found[groups == group], np.array(values)[groups == group]
        assert abs(of_group.sum()) < 1e-4
        if len(set(known[~np.isnan(known)])) < 2:
            assert (of_group == 0).all()


def said(rollout: Rollout) -> Tensor:
    """[T, 1]: up to its last token that counts."""
    return torch.from_numpy(rollout.block.rollouts.token_ids[rollout.response]).long()[:, None]


def policy_gradient(rollout: Rollout, logp: Tensor, advantage: Tensor) -> Tensor:
    sampled = logp.gather(1, said(rollout))[:, 0]
    return -((sampled - columns(rollout, "student/logprobs")).exp() * advantage.detach()).sum()


def sampled_gap(rollout: Rollout, logp: Tensor) -> Tensor:
    return columns(rollout, "teacher/logprobs") - logp.gather(1, said(rollout))[:, 0]


def over_columns(rollout: Rollout, logp: Tensor) -> Tensor:
    reward = 0.5 * columns(rollout, ADVANTAGE)
    return 0.25 * kl(*buckets(rollout, logp)) + policy_gradient(rollout, logp, reward)


def in_the_advantage(rollout: Rollout, logp: Tensor) -> Tensor:
    of_teacher = sampled_gap(rollout, logp).clamp(-10, 10)
    return policy_gradient(rollout, logp, 0.25 * of_teacher + 0.5 * columns(rollout, ADVANTAGE))


def alone(rollout: Rollout, logp: Tensor) -> Tensor:
    return policy_gradient(rollout, logp, 0.5 * columns(rollout, ADVANTAGE))


@pytest.mark.parametrize(
    ("settings", "formula"),
    [
        ((*REWARD, "reward.teacher_weight=0.25"), over_columns),
        ((*REWARD, "reward.teacher_weight=0.25", "train.loss=importance_sampling"), in_the_advantage),
        (ALONE, alone),
        ((*ALONE, "select.first_tokens=1", "train.prompts_per_step=24"), alone),
    ],
    ids=["beside a divergence", "in the advantage", "alone", "of responses that only differ after what counts"],
)
def test_gradient_is_that_of_the_formula(
    settings: tuple[str, ...], formula: Callable[[Rollout, Tensor], Tensor], mixed_cache: Path, recipe: Make
) -> None:
    trainer, replay = trainer_of(mixed_cache, recipe(*settings))
    batch = replay.batch(1)
    assert any(rollout.column(ADVANTAGE).any() for rollout in batch.rollouts)
    assert len(batch.distinct) < len(batch.rollouts) or "select.first_tokens=1" not in settings
    moved(trainer).gradient(batch)
    found = flat_gradient(trainer)
    assert distance(found, naive_gradient_of(trainer, batch, formula)) < 1e-5


def test_rewards_alone_need_no_teacher_and_make_right_responses_likelier(tmp_path: Path) -> None:
    recipe = small_recipe(*ALONE, "train.steps=8", "train.learning_rate=3e-3", "train.ppo_clip=0.2")
    cache, run = tmp_path / "c.zarr", tmp_path / "run"
    assert pipeline.rollouts.stage.run(recipe, str(cache)) == 0
    assert pipeline.score.stage.run(recipe, str(cache), only=cs.STUDENT) == 0
    assert stage.run(recipe, str(cache), run) == 0
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 8 and all(0 < step["reward"] < 1 and step["ess"] > 0 for step in steps)
    assert "reverse_kl" not in steps[0]
    card = (run / "adapter/README.md").read_text()
    assert "trained on rewards" in card and "- reinforcement" not in card
    _, replay = trainer_of(cache, recipe)
    learnt = models.load_model(recipe.student.model_copy(update={"adapter": str(run / "adapter")}))
    gains: dict[bool, list[float]] = {True: [], False: []}
    for rollout in (rollout for step in range(6) for rollout in replay.batch(step).rollouts):
        if rollout.column(ADVANTAGE).any():
            ids = torch.from_numpy(rollout.token_ids).long()
            logits = learnt(input_ids=ids[None]).logits[0, len(rollout.prompt_ids) - 1 : -1].log_softmax(1)
            sampled = logits.gather(1, ids[len(rollout.prompt_ids) :, None])[:, 0]
            gain = float((sampled.detach() - columns(rollout, "student/logprobs")).sum())
            gains[rollout.column(ADVANTAGE)[0] > 0].append(gain)
    assert np.mean(gains[True]) > np.mean(gains[False]) + 0.5


def test_rounds_of_rewards(tmp_path: Path) -> None:
    recipe = small_recipe(*ALONE, "distill.rounds=2", "prompts.limit=8", "train.steps=2")
    assert distill.run(recipe, str(tmp_path / "c.zarr"), tmp_path / "run") == 0
    cache = cs.open(tmp_path / "c.zarr")
    assert [round_.teacher_names() for round_ in map(cache.round, cache.round_indices())] == [[], []]
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["reward.teacher_weight=0"], r"reward\.teacher_weight = 0 needs reward\.coefficient"),
        ([*REWARD, "rollouts.rollouts_per_prompt=1"], r"rollouts\.rollouts_per_prompt of 2 or more"),
        ([*REWARD, "rollouts.top_p=0.9"], r"rollouts\.top_p must be 1 for rewards"),
        ([*REWARD, "train.loss=cross_entropy"], "needs rollouts of the student"),
        ([*REWARD, "rollouts.temperature=0"], r"needs rollouts\.temperature above 0"),
        ([*ALONE, "train.heldout_metric=reverse_kl"], r"heldout_metric .* got reward\.teacher_weight = 0"),
        ([*REWARD, "reward.verifier=format", "eval.format="], r"needs eval\.format"),
        (["train.ppo_clip=0.2"], 'belongs to train.loss = "importance_sampling"'),
    ],
)
def test_settings_that_do_not_fit_are_named(settings: list[str], message: str, recipe: Make) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(*settings)


@pytest.mark.parametrize("sampled", [{"rollouts_per_prompt": 1}, {"temperature": 0.0}], ids=str)
def test_a_round_with_nothing_to_compare_is_refused(sampled: dict[str, float], tmp_path: Path, recipe: Make) -> None:
    """Whatever the recipe says of sampling: every advantage would be 0."""
    round_ = factory.filled(tmp_path / "c.zarr", **sampled).round()
    with pytest.raises(ConfigError, match=r"^reward\.coefficient: round 0 "):
        checks.check_round(recipe(*REWARD), round_)


@pytest.mark.parametrize("settings", [[], ["train.loss=importance_sampling"], [*ALONE[2:]], [ALONE[1]]], ids=str)
def test_a_tempered_round_makes_the_gradient_of_rewards_biased(
    settings: list[str], tmp_path: Path, recipe: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a teacher there is no reverse KL that could rise, nor does the part of a reward raise it. Above 1 the
    recipe says nothing of it."""
    temperature = 2.0 if ALONE[1] in settings else 0.5
    records = factory.prompts(2)
    manifest = factory.round_manifest(records, temperature=temperature)
    round_ = cs.create(tmp_path / "c.zarr").start_round(manifest, records)
    checks.check_round(recipe("reward.coefficient=0.5", *settings), round_)
    said = " ".join(capsys.readouterr().err.split())
    of_teacher = settings == ["train.loss=importance_sampling"]
    assert f"was sampled at temperature {temperature:g}" in said
    assert ("reverse KL" in said) == of_teacher and ("biased, unless train.behaviour" in said) != of_teacher


def test_without_answers_nothing_can_be_rewarded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "1+2*3="}\n{"prompt": "2+2*3="}\n')
    recipe = small_recipe(f"prompts.path={prompts}")
    make_cache(tmp_path / "c.zarr", recipe)
    settings = ["--set", f"prompts.path={prompts}", "--set", "reward.coefficient=1"]
    command = ["train", "toy", "--cache", str(tmp_path / "c.zarr"), "--run", str(tmp_path / "run"), *settings]
    assert main(command) == 1
    assert "no prompt of round 0 has an answer" in capsys.readouterr().err
    assert main([*command, "--set", "reward.verifier=format", "--set", "train.steps=1"]) == 0
