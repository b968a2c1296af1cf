"""Several teachers: mixtures against float64 over the whole vocabulary, routes, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import cache_schema as cs
import pipeline.score.stage
from helpers.caches import add_partial_teachers, small_recipe
from helpers.training import (
    curve,
    distance,
    flat_gradient,
    moved,
    naive_gradient_of,
    partial_kl,
    teacher_columns,
    trainer_of,
)
from pipeline.config import Recipe
from pipeline.errors import ConfigError
from pipeline.train import stage
from pipeline.train.build import make_objective
from pipeline.train.mixture import TeacherColumns, mixed, routed
from pipeline.train.teachers import load_teachers, select_teachers

Make = Callable[..., Recipe]
T, V, C = 7, 12, 4


def distributions(seed: int) -> Tensor:
    return (
        torch.randn(T, V, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).mul_(2).log_softmax(1)
    )


def recorded(logprobs: Tensor, unscored: Tensor | None = None) -> TeacherColumns:
    """The first C tokens of a teacher, some of them unscored and so in its rest."""
    ids = torch.arange(C).repeat(T, 1)
    hidden = torch.zeros(T, C, dtype=torch.bool) if unscored is None else unscored
    rest = torch.cat([logprobs[:, :C].masked_fill(~hidden, -torch.inf), logprobs[:, C:]], 1).logsumexp(1)
    return TeacherColumns(ids.masked_fill(hidden, -1), logprobs[:, :C].masked_fill(hidden, torch.nan), rest)


weights = st.lists(st.floats(0.05, 1), min_size=2, max_size=3).map(lambda drawn: [w / sum(drawn) for w in drawn])


@hypothesis.settings(deadline=None)  # a busy machine is no failure
@given(weights, st.integers(0, 99))
def test_an_arithmetic_mixture_is_that_of_the_whole_vocabulary(weights: list[float], seed: int) -> None:
    teachers = [distributions(seed + i) for i in range(len(weights))]
    expected = torch.stack([w * t.exp() for w, t in zip(weights, teachers, strict=True)]).sum(0)
    found = mixed([recorded(t) for t in teachers], weights, "arithmetic")
    torch.testing.assert_close(found.logprobs_TC.exp(), expected[:, :C])
    torch.testing.assert_close(found.rest_T.exp(), expected[:, C:].sum(1))


@hypothesis.settings(deadline=None)  # a busy machine is no failure
@given(weights, st.integers(0, 99))
def test_a_geometric_mixture_has_mass_1_and_the_ratios_of_the_product(weights: list[float], seed: int) -> None:
    teachers = [distributions(seed + i) for i in range(len(weights))]
    found = mixed([recorded(t) for t in teachers], weights, "geometric")
    masses = torch.cat([found.logprobs_TC, found.rest_T[:, None]], 1)
    torch.testing.assert_close(masses.exp().sum(1), torch.ones(T, dtype=torch.float64))
    buckets = [torch.cat([t[:, :C].exp(), t[:, C:].exp().sum(1, keepdim=True)], 1) for t in teachers]
    product = torch.stack([b**w for w, b in zip(weights, buckets, strict=True)]).prod(0)
    torch.testing.assert_close(masses.exp(), product / product.sum(1, keepdim=True))


@pytest.mark.parametrize("mixture", ["arithmetic", "geometric"])
def test_a_mixture_of_equal_teachers_is_that_teacher(mixture: str) -> None:
    """In particular its reverse KL can reach 0; the weighted log-probs of two that differ have less mass than 1."""
    one = recorded(distributions(0))
    found = mixed([one, one], [0.3, 0.7], mixture)  # type: ignore[arg-type]
    torch.testing.assert_close(found.logprobs_TC, one.logprobs_TC)
    torch.testing.assert_close(found.rest_T, one.rest_T)


def test_a_column_that_one_did_not_score_is_in_the_rest_of_all() -> None:
    teachers = [distributions(i) for i in range(2)]
    unscored = [torch.rand(T, C, generator=torch.Generator().manual_seed(i)) < 0.4 for i in range(2)]
    for hidden in unscored:
        hidden[:, 0] = False
    found = mixed([recorded(t, u) for t, u in zip(teachers, unscored, strict=True)], [0.25, 0.75], "arithmetic")
    expected = 0.25 * teachers[0].exp() + 0.75 * teachers[1].exp()
    common = ~(unscored[0] | unscored[1])
    assert torch.equal(found.ids_TC >= 0, common) and not common.all() and common.any()
    torch.testing.assert_close(found.logprobs_TC.exp()[common], expected[:, :C][common])
    rest = expected[:, C:].sum(1) + torch.where(common, 0, expected[:, :C]).sum(1)
    torch.testing.assert_close(found.rest_T.exp(), rest)


def test_tokens_without_mass_in_a_mixture() -> None:
    teachers = [distributions(i) for i in range(2)]
    teachers[0][2, 1] = -torch.inf
    columns = [recorded(t) for t in teachers]
    arithmetic, geometric = mixed(columns, [0.5, 0.5], "arithmetic"), mixed(columns, [0.5, 0.5], "geometric")
    torch.testing.assert_close(arithmetic.logprobs_TC[2, 1], teachers[1][2, 1] + np.log(0.5))
    assert geometric.logprobs_TC[2, 1] == -torch.inf and not geometric.logprobs_TC.isnan().any()


def test_a_route_takes_each_position_from_its_teacher() -> None:
    teachers = [recorded(distributions(i)) for i in range(3)]
    route = torch.tensor([0, 2, 1, 1, 0, 2, 2])
    found = routed(teachers, route)
    for t, number in enumerate(route.tolist()):
        assert torch.equal(found.ids_TC[t], teachers[number].ids_TC[t])
        assert torch.equal(found.logprobs_TC[t], teachers[number].logprobs_TC[t])
        assert found.rest_T[t] == teachers[number].rest_T[t]


# -- on a cache -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(toy_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy cache with more teachers: "other" (the student itself, with a top-k of its own), "partial", "alone"."""
    path = tmp_path_factory.mktemp("two") / "c.zarr"
    shutil.copytree(toy_cache, path)
    other = small_recipe("teacher.name=other", "teacher.model=toy:student", "score.teacher_topk=3")
    pipeline.score.stage.run(other, str(path), "other")
    add_partial_teachers(path, 3)
    return path


def carries(cache: Path) -> np.ndarray:
    """[n_prompts]: whether a prompt is from the source toy/carry; the others are from toy/no-carry."""
    round_ = cs.open(cache).round()
    found = np.array([round_.prompts[i]["source"] == "toy/carry" for i in range(round_.n_prompts)])
    assert found.any() and not found.all()
    return found


def test_training_on_a_mixture_is_training_on_the_mixed_teacher(two: Path, recipe: Make) -> None:
    """Over the candidates: the other teacher's own top-k, at which this one was not asked, is left alone."""
    settings = recipe('train.teacher=["teacher", "other"]', "train.teacher_weights={teacher = 3, other = 1}")
    trainer, replay = trainer_of(two, settings, "teacher", "other")
    assert not [name for name in replay.batch(0).rollouts[0].block.columns if "topk" in name]
    batch = replay.batch(1)
    moved(trainer).gradient(batch)
    found = flat_gradient(trainer)

    def mean(rollout) -> tuple[Tensor, Tensor]:
        both = [teacher_columns(rollout, name) for name in ("teacher", "other")]
        return tuple(torch.log(0.75 * a.exp() + 0.25 * b.exp()) for a, b in zip(*both, strict=True))  # type: ignore

    assert distance(found, naive_gradient_of(trainer, batch, lambda r, logp: partial_kl(r, logp, *mean(r)))) < 1e-5


def test_training_on_a_route_is_training_each_prompt_on_its_teacher(two: Path, recipe: Make) -> None:
    """A partial teacher's unscored tokens are lost on its own prompts only."""
    settings = recipe('train.route={"toy/carry" = "teacher", "*" = "partial"}')
    trainer, replay = trainer_of(two, settings, "partial", "teacher")
    batch = replay.batch(1)
    moved(trainer).gradient(batch)
    found, is_carry = flat_gradient(trainer), carries(two)

    def own(rollout) -> tuple[Tensor, Tensor]:
        return teacher_columns(rollout, "teacher" if is_carry[rollout.prompt_index] else "partial")

    for rollout in batch.rollouts:
        scored = np.isfinite(rollout.column("partial/logprobs"))
        expected = np.ones(len(scored)) if is_carry[rollout.prompt_index] else scored
        assert rollout.weights.tolist() == expected.tolist()
    assert distance(found, naive_gradient_of(trainer, batch, lambda r, logp: partial_kl(r, logp, *own(r)))) < 1e-5


def test_a_routed_teachers_own_top_k_joins_on_its_prompts(two: Path, recipe: Make) -> None:
    settings = recipe('train.route={"toy/carry" = "teacher", "toy/no-carry" = "other"}')
    trainer, replay = trainer_of(two, settings, "other", "teacher")
    for micro_batch in replay.batch(0).micro_batches(10_000):
        targets = trainer.objective.targets(micro_batch, "cpu")
        from_teacher = torch.from_numpy(carries(two)[micro_batch.prompts_T])
        assert targets.ids_TC.shape[1] == 8 + 3
        assert (targets.ids_TC[from_teacher, 8:] == -1).all()
        masses = torch.cat([targets.teacher_TC.exp(), targets.teacher_rest_T.exp()[:, None]], 1)
        valid = torch.nn.functional.pad(targets.ids_TC >= 0, (0, 1), value=True)
        torch.testing.assert_close(torch.where(valid, masses, 0).sum(1), torch.ones(len(masses)), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [
        ['train.teacher=["teacher", "other"]'],
        ['train.teacher=["teacher", "partial"]', "train.mixture=geometric", "train.loss=jsd"],
        ['train.teacher=["partial", "teacher"]', "train.loss=importance_sampling"],
        ['train.teacher=["other", "teacher", "alone"]', "train.mixture=geometric"],
        ['train.route={"toy/carry" = "teacher", "toy/no-carry" = "other"}'],
        ['train.route={"toy/carry" = "alone", "*" = "teacher"}', 'train.teacher=["teacher", "alone"]'],
    ],
    ids=lambda settings: " ".join(settings),
)
def test_several_teachers_train(
    settings: list[str], two: Path, tmp_path: Path, recipe: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stage.run(recipe(*settings, "train.steps=3"), str(two), tmp_path / "run") == 0
    first, *_, last = curve(tmp_path / "run")
    assert all(np.isfinite(value) for line in (first, last) for value in line.values())
    assert ("(k2)" in capsys.readouterr().err) == ("alone" in str(settings))
    learnt_from = json.loads((tmp_path / "run/run.json").read_text())["cache"]["teacher"]
    assert sorted(learnt_from.split(", ")) == sorted(re.findall(r'"(teacher|other|partial|alone)"', str(settings[0])))


def test_a_weight_of_0_leaves_a_teacher_out(two: Path, recipe: Make) -> None:
    settings = recipe('train.teacher=["teacher", "other"]', "train.teacher_weights={teacher = 0, other = 2}")
    round_ = cs.open(two).round()
    assert select_teachers(settings, round_, "c") == ("other",)
    objective = make_objective(settings, round_, ("other",))
    assert not objective.teachers.mixed and "topk_ids" in objective.arrays["other"]
    three = recipe(
        'train.teacher=["teacher", "other", "partial"]', "train.teacher_weights={teacher = 1, other = 0, partial = 3}"
    )
    names = select_teachers(three, round_, "c")
    assert names == ("teacher", "partial") and load_teachers(three, round_, names).weights == (0.25, 0.75)


REFUSED = {
    "unknown weight": (
        ['train.teacher=["teacher", "other"]', "train.teacher_weights={teacher = 1, othr = 1}"],
        r"train\.teacher_weights: 'othr' is not among the teachers teacher, other; did you mean other\?",
    ),
    "a weight is missing": (
        ['train.teacher=["teacher", "other"]', "train.teacher_weights={teacher = 1}"],
        r"train\.teacher_weights: expected a weight for every teacher, got none for 'other'",
    ),
    "no weight": (
        ['train.teacher=["teacher", "other"]', "train.teacher_weights={teacher = 0, other = 0}"],
        r"train\.teacher_weights: expected one above 0, got 0 for every teacher",
    ),
    "weight of one": (
        ["train.teacher=teacher", "train.teacher_weights={teacher = 1}"],
        r"train\.teacher_weights: needs several teachers for each prompt, got the one teacher 'teacher'",
    ),
    "mixture of one": (
        ["train.teacher=teacher", "train.mixture=geometric"],
        r"train\.mixture: needs several teachers for each prompt, got the one teacher 'teacher'",
    ),
    "mixture and route": (
        ['train.route={"*" = "teacher"}', "train.mixture=geometric"],
        r"train\.mixture: needs several teachers for each prompt, got train\.route",
    ),
    "none": (["train.teacher=[]"], r"train\.teacher: expected one name or a list of different ones, got \[\]"),
    "twice": (['train.teacher=["other", "other"]'], r"train\.teacher: expected one name or a list of different ones"),
    "not scored": (
        ['train.teacher=["teacher", "huge"]'],
        r"train\.teacher = 'huge': .* is scored by .*teacher; run `redpen score .* --only huge`",
    ),
    "route to nobody": (['train.route={"toy/carry" = "huge"}'], r"train\.route = 'huge': .* is scored by"),
    "route elsewhere": (
        ['train.route={"toy/carry" = "teacher", "*" = "other"}', 'train.teacher=["teacher"]'],
        r"train\.teacher: expected the teachers of train\.route, other, teacher, or nothing, got teacher",
    ),
    "no route": (
        ['train.route={"toy/carry" = "teacher"}'],
        r"train\.route: prompt \d+ of round 0 is from 'toy/no-carry', which has no route; add 'toy/no-carry' or '\*'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_one_line(case: str, two: Path, tmp_path: Path, recipe: Make) -> None:
    settings, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message) as caught:
        stage.run(recipe(*settings), str(two), tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_prompts_without_a_source_need_the_route_of_all_others(
    two: Path, tmp_path: Path, recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cs.PromptTable, "__getitem__", lambda self, index: {"prompt": "1+1="})
    with pytest.raises(ConfigError, match=r"prompt 0 of round 0 has no source, which has no route; add '\*'"):
        stage.run(recipe('train.route={None = "teacher"}'), str(two), tmp_path / "run")


def test_a_route_without_rollouts_is_reported(
    two: Path, tmp_path: Path, recipe: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = recipe('train.route={"*" = "teacher", math = "other"}', "train.steps=1")
    assert stage.run(settings, str(two), tmp_path / "run") == 0
    assert "train.route: no prompt of round 0 goes to 'other'" in capsys.readouterr().err
