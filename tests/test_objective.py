"""The objective on a real student: every loss's gradient against its formula on full logits, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import cache_schema as cs
from helpers import cache_factory as factory
from helpers.caches import make_cache, small_recipe
from helpers.training import (
    buckets,
    columns,
    curve,
    distance,
    flat_gradient,
    kl,
    moved,
    naive_gradient_of,
    trainer_of,
)
from pipeline.config import Recipe
from pipeline.errors import ConfigError
from pipeline.train import checks, losses, stage
from pipeline.train.replay import Rollout

Make = Callable[..., Recipe]


@pytest.fixture(scope="module")
def warm_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rollouts at temperature 1.3, with three drawn candidates a position and the teacher's own top-k."""
    path = tmp_path_factory.mktemp("warm") / "c.zarr"
    drawn = ["score.candidates=4", "score.candidate_kind=sampled", "score.teacher_topk=2"]
    return make_cache(path, small_recipe("rollouts.temperature=1.3", "prompts.limit=8", *drawn))


def jsd(student: Tensor, teacher: Tensor) -> Tensor:
    mixture = (0.2 * teacher.exp() + 0.8 * student.exp()).log()
    return 0.2 * kl(teacher, mixture) + 0.8 * kl(student, mixture)


OVER_COLUMNS: dict[str, tuple[list[str], Callable[[Tensor, Tensor], Tensor]]] = {
    "forward_kl": ([], lambda s, t: kl(t, s)),
    "jsd": (["train.jsd_beta=0.2"], jsd),
    "mixed_kl": (["train.forward_weight=0.2"], lambda s, t: 0.2 * kl(t, s) + 0.8 * kl(s, t)),
}


def test_every_divergence_has_a_formula_here() -> None:
    assert losses.DIVERGENCES.keys() == OVER_COLUMNS.keys() | {"reverse_kl"}  # which test_train.py compares


@pytest.mark.parametrize("loss", OVER_COLUMNS)
def test_gradient_of_a_divergence_is_that_of_the_formula(loss: str, toy_cache: Path, recipe: Make) -> None:
    settings, formula = OVER_COLUMNS[loss]
    trainer, replay = trainer_of(toy_cache, recipe(f"train.loss={loss}", *settings))
    batch = replay.batch(1)
    sums = moved(trainer).gradient(batch)
    found = flat_gradient(trainer)
    expected = naive_gradient_of(trainer, batch, lambda r, logp: formula(*buckets(r, logp)))
    assert distance(found, expected) < 1e-5
    reference, _ = trainer_of(toy_cache, recipe())
    measured = moved(reference).gradient(batch).metrics()
    assert sums.metrics()["reverse_kl"] == pytest.approx(measured["reverse_kl"], rel=1e-6)
    assert sums.metrics()["loss"] != pytest.approx(measured["loss"], rel=1e-2)


def drawn_terms(loss: str, s: Tensor, t: Tensor) -> Tensor:
    """A draw's share, written out for its log-probs s and t; over v they sum to the divergence."""
    p, q = s.exp(), t.exp()
    return {
        "reverse_kl": p * (s - t) - p + q,
        "forward_kl": q * (t - s) - q + p,
        "mixed_kl": 0.5 * (q * (t - s) + p * (s - t)),
    }[loss]


@pytest.mark.parametrize("loss", ["reverse_kl", "forward_kl", "mixed_kl"])
def test_gradient_over_drawn_candidates_is_the_mean_over_draws(loss: str, warm_cache: Path, recipe: Make) -> None:
    """Repeats counted, the sampled token (of another temperature) and the teacher's top-k not."""
    trainer, replay = trainer_of(warm_cache, recipe(f"train.loss={loss}"))
    batch = replay.batch(0)

    def mean_over_draws(rollout: Rollout, logp: Tensor) -> Tensor:
        draws = columns(rollout, "student/candidate_ids").long()[:, 1:]
        old = columns(rollout, "student/candidate_logprobs")[:, 1:]
        teacher = columns(rollout, "teacher/candidate_logprobs")[:, 1:]
        return (drawn_terms(loss, logp.gather(1, draws), teacher) / old.exp()).mean(1).sum()

    sums = moved(trainer).gradient(batch)
    found = flat_gradient(trainer)
    assert distance(found, naive_gradient_of(trainer, batch, mean_over_draws)) < 1e-5
    assert sums.metrics()["loss"] != pytest.approx(sums.metrics()["reverse_kl"], rel=1e-3)
    drawn = [row for r in batch.rollouts for row in r.column("student/candidate_ids")[:, 1:].tolist()]
    assert {len(set(row)) for row in drawn} >= {1, 2}, "repeats, and not only repeats"


SAMPLED: dict[str, list[str]] = {
    "truncated": ["train.ratio_truncation=1.02"],
    "ppo": ["train.ppo_clip=0.02"],
    "behaviour": ["train.behaviour_correction=true"],
    "decoupled": ["train.behaviour_correction=true", "train.ppo_clip=0.02", "train.ratio_truncation=1.5"],
}


@pytest.mark.parametrize("case", SAMPLED)
def test_gradient_of_corrected_importance_sampling_is_that_of_the_formula(
    case: str, warm_cache: Path, recipe: Make
) -> None:
    """As coefficients on the gradient of log p_S, with drawn candidates in the cache, which it does not look at."""
    settings = recipe("train.loss=importance_sampling", *SAMPLED[case])
    trainer, replay = trainer_of(warm_cache, settings)
    batch, coefficients = replay.batch(0), []

    def policy_gradient(rollout: Rollout, logp: Tensor) -> Tensor:
        where = rollout.response
        sampled = logp.gather(1, columns(rollout, "student/candidate_ids").long()[:, :1])[:, 0]
        old, teacher = columns(rollout, "student/logprobs"), columns(rollout, "teacher/logprobs")
        behaviour = torch.from_numpy(rollout.block.rollouts.rollout_logprobs[where])
        s, gain = sampled.detach(), (teacher - sampled.detach()).clamp(-10, 10)
        ratio = (s - old).exp()
        moving = ~((gain > 0) & (ratio > 1.02) | (gain < 0) & (ratio < 0.98))
        plain = torch.ones_like(ratio)
        coefficient = {
            "truncated": lambda: ratio.clamp(max=1.02),
            "ppo": lambda: ratio * moving,
            "behaviour": lambda: (s - behaviour).exp(),
            "decoupled": lambda: (old - behaviour).exp().clamp(max=1.5) * ratio.clamp(max=1.5) * moving,
        }[case]()
        coefficients.append((coefficient - plain).abs().max())
        return -(coefficient * gain * sampled).sum()

    moved(trainer).gradient(batch)
    found = flat_gradient(trainer)
    assert distance(found, naive_gradient_of(trainer, batch, policy_gradient)) < 1e-5
    assert max(coefficients) > 0.01, "the fixture would not notice a missing correction"


def test_a_constant_advantage_needs_no_teacher(unscored: Path, tmp_path: Path, recipe: Make) -> None:
    """-1 at tokens below the threshold for the student that sampled, whatever it thinks of them now."""
    control = ("train.loss=importance_sampling", "train.advantage=constant", "train.constant_below=0.6")
    trainer, replay = trainer_of(unscored, recipe(*control))
    batch, counts = replay.batch(0), []

    def formula(rollout: Rollout, logp: Tensor) -> Tensor:
        sampled = logp.gather(1, torch.from_numpy(rollout.token_ids).long()[len(rollout.prompt_ids) :, None])[:, 0]
        old = columns(rollout, "student/logprobs")
        counts.append(((old.exp() < 0.6).sum(), (old.exp() >= 0.6).sum()))
        return ((sampled - old).exp() * (old.exp() < 0.6)).sum()

    moved(trainer).gradient(batch)
    assert distance(flat_gradient(trainer), naive_gradient_of(trainer, batch, formula)) < 1e-5
    assert all(sum(kind) > 0 for kind in zip(*counts, strict=True))

    assert (
        stage.run(recipe(*control, "train.steps=6", "train.learning_rate=3e-3"), str(unscored), tmp_path / "r") == 0
    )
    steps = curve(tmp_path / "r")
    assert steps[-1]["loss"] < steps[0]["loss"] and "reverse_kl" not in steps[0]
    assert "a control" in (tmp_path / "r/adapter/README.md").read_text()


@pytest.mark.parametrize(
    "settings",
    [["train.loss=jsd"], ["train.loss=forward_kl"], ["train.loss=importance_sampling", *SAMPLED["decoupled"]]],
    ids=["jsd", "forward_kl", "decoupled"],
)
def test_micro_batches_do_not_change_the_gradient(settings: list[str], warm_cache: Path, recipe: Make) -> None:
    results = []
    for budget, chunk in ((10_000, 1024), (60, 7)):
        sizes = [f"train.tokens_per_microbatch={budget}", f"train.rows_per_chunk={chunk}"]
        trainer, replay = trainer_of(warm_cache, recipe(*settings, *sizes, "select.entropy_fraction=0.5"))
        sums = moved(trainer).gradient(replay.batch(0))
        results.append((flat_gradient(trainer), sums.metrics()))
    assert distance(results[1][0], results[0][0]) < 1e-5
    assert results[1][1] == pytest.approx(results[0][1], rel=1e-4, abs=1e-6)


def test_gradient_with_clips_is_that_of_the_formula(toy_cache: Path, recipe: Make) -> None:
    settings = recipe("train.loss=forward_kl", "train.entry_clip=0.02", "train.token_clip=0.01")
    trainer, replay = trainer_of(toy_cache, settings)
    batch, clipped = replay.batch(0), []

    def forward(rollout: Rollout, logp: Tensor) -> Tensor:
        student, teacher = buckets(rollout, logp)
        terms = teacher.exp() * (teacher - student)
        tokens = terms.clamp(max=0.02).sum(1)
        clipped.append(((terms > 0.02).any(1).sum(), (tokens > 0.01).sum()))
        return tokens.clamp(max=0.01).sum()

    moved(trainer).gradient(batch)
    # what is left of a clipped sum is small beside the terms that are rounded
    assert distance(flat_gradient(trainer), naive_gradient_of(trainer, batch, forward)) < 1e-4
    assert all(sum(counts) > 0 for counts in zip(*clipped, strict=True))


def test_every_divergence_learns(toy_cache: Path, tmp_path: Path, recipe: Make) -> None:
    """By the measure that is the same for all."""
    settings = ["train.steps=8", "train.learning_rate=3e-3", "train.prompts_per_step=12", "train.lora_rank=16"]
    for loss in OVER_COLUMNS:
        assert stage.run(recipe(f"train.loss={loss}", *settings), str(toy_cache), tmp_path / loss) == 0
        kls = [line["reverse_kl"] for line in curve(tmp_path / loss)]
        assert kls[-1] < 0.6 * kls[0], loss


# -- refusals -------------------------------------------------------------------------------------------------------


def edited(path: Path, to: Path, group: str = "", **attributes: object) -> Path:
    """A copy of a cache with other attributes of its round, or of a group in it."""
    shutil.copytree(path, to)
    file = to / "rounds/00000" / group / "zarr.json"
    metadata = json.loads(file.read_text())
    metadata["attributes"]["redpen"] |= attributes
    file.write_text(json.dumps(metadata))
    return to


def test_draws_that_a_teacher_did_not_score_are_refused(warm_cache: Path, tmp_path: Path, recipe: Make) -> None:
    cache = edited(warm_cache, tmp_path / "c.zarr", "scores/teacher", partial=True)
    for loss in ("reverse_kl", "jsd"):
        with pytest.raises(ConfigError, match=rf'"{loss}": the candidates were drawn .* no score by \'teacher\''):
            stage.run(recipe(f"train.loss={loss}"), str(cache), tmp_path / loss)
    sampled = recipe("train.loss=importance_sampling", "train.steps=1", "train.behaviour_correction=true")
    assert stage.run(sampled, str(cache), tmp_path / "is") == 0


def test_clips_of_draws_are_refused(warm_cache: Path, tmp_path: Path, recipe: Make) -> None:
    for name in ("entry_clip", "token_clip"):
        with pytest.raises(ConfigError, match=rf"train\.{name} = 0\.1 needs .* drawn candidates"):
            stage.run(recipe(f"train.{name}=0.1"), str(warm_cache), tmp_path / name)


def test_a_geometric_mixture_has_no_draws(warm_cache: Path, tmp_path: Path, recipe: Make) -> None:
    cache = Path(shutil.copytree(warm_cache, tmp_path / "c.zarr"))
    scores = cache / "rounds/00000/scores"
    shutil.copytree(scores / "teacher", scores / "second")
    both = ['train.teacher=["teacher", "second"]', "train.steps=1"]
    with pytest.raises(ConfigError, match=r'train\.mixture = "geometric": the candidates were drawn'):
        stage.run(recipe(*both, "train.mixture=geometric"), str(cache), tmp_path / "geometric")
    assert stage.run(recipe(*both), str(cache), tmp_path / "arithmetic") == 0


def test_behaviour_correction_silences_the_temperature_warning(
    warm_cache: Path, tmp_path: Path, recipe: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tempered round is what it corrects; greedy decoding and a nucleus are beyond it."""
    wanted = ["train.loss=importance_sampling", "train.steps=1"]
    assert stage.run(recipe(*wanted), str(warm_cache), tmp_path / "plain") == 0
    assert "was sampled at temperature 1.3" in capsys.readouterr().err
    corrected = recipe(*wanted, "train.behaviour_correction=true")
    assert stage.run(corrected, str(warm_cache), tmp_path / "corrected") == 0
    assert "was sampled at temperature" not in capsys.readouterr().err
    greedy = edited(warm_cache, tmp_path / "was-greedy.zarr", temperature=0.0)
    greedy = edited(greedy, tmp_path / "greedy.zarr", "scores/student", sampling_temperature=1.0)
    with pytest.raises(ConfigError, match=r"train\.behaviour_correction: round 0 of the cache was decoded greedily"):
        stage.run(corrected, str(greedy), tmp_path / "greedy")
    nucleus = edited(warm_cache, tmp_path / "nucleus.zarr", top_p=0.9)
    with pytest.raises(ConfigError, match=r"was sampled at top_p 0\.9"):
        stage.run(corrected, str(nucleus), tmp_path / "nucleus")


def test_unknown_behaviour_is_no_denominator(tmp_path: Path, recipe: Make) -> None:
    cache = factory.filled(tmp_path / "c.zarr", n_prompts=10, engine="import")
    round_, settings = cache.round(), recipe("train.loss=importance_sampling", "train.behaviour_correction=true")
    checks.check_round(settings, round_)
    block = round_.rollouts.read(2)
    block.rollout_logprobs[3:5] = np.nan
    block.trained[4] = 0  # a tool's
    round_.rollouts.write(2, block)
    with pytest.raises(ConfigError, match=r"block 2 of the imported round 0 has no rollout_logprobs of 1 "):
        checks.check_round(settings, cs.open(tmp_path / "c.zarr").round())


def test_a_nucleus_rules_out_k2(toy_cache: Path, tmp_path: Path, recipe: Make) -> None:
    cache = edited(toy_cache, tmp_path / "c.zarr", top_p=0.9)
    edited_round = cs.open(cache, writable=True).round()
    teacher = edited_round.scores("teacher")
    manifest = dataclasses.replace(teacher.manifest, candidates=0, entropy=False, engine="import")
    alone = edited_round.start_scores("alone", manifest)
    for index in range(edited_round.n_blocks):
        alone.write(index, cs.ScoreBlock(logprobs=teacher.read(index).logprobs))
    with pytest.raises(ConfigError, match=r"top_p 0\.9, .* which reverse_kl without candidates needs"):
        stage.run(recipe("train.teacher=alone"), str(cache), tmp_path / "run")
