"""The residual baseline: the mean of other prompts' tokens, what it changes in a gradient, and when it is offered."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import cache_factory as factory
import pytest
from conftest import small_recipe
from test_objective import columns, naive_gradient
from test_reward import made, policy_gradient, sampled_gap
from test_train import distance, flat_gradient, moved
from torch import Tensor

from pipeline.config import Recipe
from pipeline.errors import ConfigError
from pipeline.train.baseline import FOLDS, RESIDUAL, Baseline
from pipeline.train.replay import Rollout

Make = Callable[..., Recipe]
BASELINE = ("train.loss=importance_sampling", "train.residual_baseline=true")


def test_it_is_the_mean_of_the_same_token_and_position_of_other_folds(tmp_path: Path) -> None:
    round_ = factory.filled(tmp_path / "c.zarr", n_prompts=40).round()
    seen: dict[tuple[int, int], list[tuple[int, float]]] = defaultdict(list)
    tokens = []
    for block in range(round_.n_blocks):
        rollouts = round_.rollouts.read(block)
        student, teacher = (round_.scores(name).read(block).logprobs for name in ("student", "teacher"))
        for row in range(rollouts.n_rows):
            fold = int(rollouts.prompt_index[rollouts.row_prompt[row]]) % FOLDS
            span = rollouts.response_slice(row)
            for position, t in enumerate(range(span.start, span.stop)):
                pair = (int(rollouts.token_ids[t]), position.bit_length())
                tokens.append((block, t, fold, pair))
                if rollouts.trained[t] == 1:
                    seen[pair].append((fold, float(teacher[t]) - float(student[t])))
    baseline = Baseline.of(round_, "teacher")
    found = [baseline.columns(round_.rollouts.read(block))[RESIDUAL] for block in range(round_.n_blocks)]
    assert len(tokens) == sum(map(len, found))
    for block, t, fold, pair in tokens:
        others = [difference for other, difference in seen[pair] if other != fold]
        assert found[block][t] == pytest.approx(sum(others) / (len(others) + 8), rel=1e-5, abs=1e-7)


def without_habits(rollout: Rollout, logp: Tensor) -> Tensor:
    advantage = (sampled_gap(rollout, logp) - columns(rollout, RESIDUAL)).clamp(-10, 10)
    return policy_gradient(rollout, logp, advantage)


def test_gradient_is_that_of_the_formula(toy_cache: Path, recipe: Make) -> None:
    trainer, replay = made(toy_cache, recipe(*BASELINE))
    batch = replay.batch(1)
    moved(trainer).gradient(batch)
    found = flat_gradient(trainer)
    assert distance(found, naive_gradient(trainer, batch, without_habits)) < 1e-5
    with_habits, _ = made(toy_cache, recipe("train.loss=importance_sampling"))
    moved(with_habits).gradient(batch)
    assert distance(found, flat_gradient(with_habits)) > 1e-3


def test_another_sft_teacher_is_warned_of_and_the_baseline_offered(recipe: Make) -> None:
    advised = "train.lora_rank=32"
    assert not recipe("student.sft_teacher=toy:teacher", advised).warnings()
    (line,) = recipe("student.sft_teacher=big/model", advised).warnings()
    assert "toy:teacher" in line and "big/model" in line and "train.residual_baseline = true" in line
    assert not recipe("student.sft_teacher=big/model", *BASELINE, advised).warnings()


def test_where_it_does_not_belong(recipe: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'train\.residual_baseline = true belongs to train\.loss = "importance'):
        recipe("train.residual_baseline=true")
    cache = factory.filled(tmp_path / "c.zarr")
    scores = cache.round().start_scores("second", factory.scores_manifest("teacher"))
    for block in range(cache.round().n_blocks):
        rollouts = cache.round().rollouts.read(block)
        scores.write(block, cache.round().scores("teacher").read(block), rollouts=rollouts)
    several = small_recipe(*BASELINE, 'train.teacher=["teacher", "second"]')
    with pytest.raises(ConfigError, match=r"train\.residual_baseline: expected one teacher, got teacher, second"):
        made(Path(cache.url), several)
