"""Scoring: every stored number against a naive float64 forward with full logits, and what scores depend
on.
"""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

import cache_schema as cs
import pipeline.rollouts.stage as rollouts_stage
from helpers.caches import arrays_of
from pipeline.config import Recipe, load_recipe
from pipeline.engines.resident import ResidentScorer
from pipeline.engines.scoring import ScoreOptions, TokenBatch
from pipeline.errors import ConfigError, ModelError
from pipeline.forward.attention import register_packed_attention
from pipeline.models import load as models
from pipeline.models.paths import find_directory
from pipeline.rounds.metrics import reverse_kl
from pipeline.score import stage
from pipeline.toy import asset_path

SMALL = ["prompts.limit=12", "rollouts.prompts_per_block=4", "score.tile_tokens=300"]


def recipe(*overrides: str) -> Recipe:
    return load_recipe("toy", [*SMALL, *overrides])


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the toy with rollouts (temperature 0.8) and no scores."""
    path = tmp_path_factory.mktemp("sampled") / "toy.zarr"
    rollouts_stage.run(recipe("rollouts.temperature=0.8"), str(path))
    return path


@pytest.fixture(scope="module")
def scored(sampled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, scored by student and teacher, the teacher's own top 5 included."""
    path = Path(shutil.copytree(sampled, tmp_path_factory.mktemp("scored") / "toy.zarr"))
    stage.run(recipe("score.teacher_topk=5"), str(path))
    return path


@pytest.fixture
def fresh(sampled: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sampled, tmp_path / "toy.zarr"))


def student_model() -> PreTrainedModel:
    return models.load_model(recipe().student)


@torch.inference_mode()
def oracle_logprobs(model: str, rollouts: cs.RolloutBlock, temperature: float = 1.0) -> np.ndarray:
    """float64 [T, V]: one rollout at a time, full logits, no packing, no cache."""
    cfg = recipe().student if model == "student" else recipe().teacher[0]
    double = models.load_model(cfg, attention="sampling").double()
    rows = []
    for row in range(rollouts.n_rows):
        ids = torch.from_numpy(np.concatenate([rollouts.prompt(row), rollouts.response(row)])).long()
        logits = double(ids[None], use_cache=False).logits[0, len(rollouts.prompt(row)) - 1 : -1]
        rows.append((logits / temperature).log_softmax(-1))
    return torch.cat(rows).numpy()


def log_rest(logprobs: np.ndarray, ids: np.ndarray) -> np.ndarray:
    outside = logprobs.copy()
    np.put_along_axis(outside, ids, -np.inf, axis=1)
    return np.logaddexp.reduce(outside, axis=1)


# -- values --------------------------------------------------------------------------------------------------


def test_the_students_numbers_are_those_of_a_naive_forward(scored: Path) -> None:
    round_ = cs.open(scored).round()
    rollouts, scores = round_.rollouts.read(1), round_.scores("student").read(1)
    expected = oracle_logprobs("student", rollouts)
    every = np.arange(rollouts.n_tokens)
    np.testing.assert_allclose(scores.logprobs, expected[every, rollouts.token_ids], atol=1e-5)
    np.testing.assert_allclose(scores.entropy, -(np.exp(expected) * expected).sum(1), atol=1e-5)
    tempered = oracle_logprobs("student", rollouts, temperature=0.8)[every, rollouts.token_ids]
    np.testing.assert_allclose(scores.sampling_logprobs, tempered, atol=2e-5)
    np.testing.assert_allclose(scores.sampling_logprobs, rollouts.rollout_logprobs, atol=2e-5)

    ids = scores.candidate_ids
    assert ids.shape == (rollouts.n_tokens, 8)
    np.testing.assert_array_equal(ids[:, 0], rollouts.token_ids)
    assert all(len(set(row)) == 8 for row in ids.tolist())
    others = expected.copy()
    others[every, rollouts.token_ids] = -np.inf
    likeliest = -np.sort(-others, axis=1)[:, :7]
    np.testing.assert_allclose(np.take_along_axis(expected, ids[:, 1:], 1), likeliest, atol=1e-5)
    np.testing.assert_allclose(scores.candidate_logprobs, np.take_along_axis(expected, ids, 1), atol=1e-5)
    np.testing.assert_allclose(scores.rest_logprob, log_rest(expected, ids), atol=1e-5)


def test_the_teacher_is_read_at_the_students_candidates(scored: Path) -> None:
    round_ = cs.open(scored).round()
    rollouts, scores = round_.rollouts.read(2), round_.scores("teacher").read(2)
    ids = round_.scores("student").read(2).candidate_ids
    expected = oracle_logprobs("teacher", rollouts)
    np.testing.assert_allclose(scores.logprobs, expected[np.arange(len(ids)), rollouts.token_ids], atol=1e-5)
    np.testing.assert_allclose(scores.candidate_logprobs, np.take_along_axis(expected, ids, 1), atol=1e-5)
    np.testing.assert_allclose(scores.rest_logprob, log_rest(expected, ids), atol=1e-5)
    top = np.take_along_axis(expected, scores.topk_ids, 1)
    np.testing.assert_allclose(top, -np.sort(-expected, axis=1)[:, :5], atol=1e-5)
    np.testing.assert_allclose(scores.topk_logprobs, top, atol=1e-5)
    both = np.concatenate([ids, scores.topk_ids], axis=1)
    np.testing.assert_allclose(scores.topk_rest_logprob, log_rest(expected, both), atol=1e-5)
    assert scores.candidate_ids is None and scores.sampling_logprobs is None


def test_the_reverse_kl_of_a_student_to_itself_is_0(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage.run(recipe("teacher.model=toy:student"), str(fresh))
    round_ = cs.open(fresh).round()
    for block in range(round_.n_blocks):
        student, teacher = round_.scores("student").read(block), round_.scores("teacher").read(block)
        assert np.abs(student.logprobs - teacher.logprobs).max() <= 1e-5
        pair = (
            student.candidate_logprobs,
            student.rest_logprob,
            teacher.candidate_logprobs,
            teacher.rest_logprob,
        )
        assert np.abs(reverse_kl(*pair)).max() <= 1e-5
    assert "trainer/sampler ratio: mean 1.0000" in capsys.readouterr().out


# -- what scores depend on -----------------------------------------------------------------------------------


def test_a_block_is_scored_the_same_in_any_batch(sampled: Path) -> None:
    round_ = cs.open(sampled).round()
    blocks = tuple(round_.rollouts.read(block) for block in range(3))
    for kind in ("topk", "sampled"):
        scorer = ResidentScorer(student_model(), ScoreOptions(candidate_kind=kind, tile_tokens=300))
        batch = TokenBatch(blocks, keys=((0, 0), (0, 1), (0, 2)))
        together = batch.split(scorer.compute_logprobs(batch))
        for number, block in enumerate(blocks):
            alone = arrays_of(scorer.compute_logprobs(TokenBatch((block,), keys=((0, number),))))
            for name, value in arrays_of(together[number]).items():
                np.testing.assert_array_equal(value, alone[name])


def test_other_tiles_and_chunks_give_the_same_up_to_rounding(sampled: Path) -> None:
    rollouts, model = cs.open(sampled).round().rollouts.read(0), student_model()
    reference = arrays_of(ResidentScorer(model).compute_logprobs(rollouts))
    for options in (ScoreOptions(tile_tokens=1), ScoreOptions(tile_tokens=100, rows_per_chunk=7)):
        for name, value in arrays_of(ResidentScorer(model, options).compute_logprobs(rollouts)).items():
            if value.dtype.kind == "f":  # candidates of equal probability may change places
                np.testing.assert_allclose(value, reference[name], atol=1e-5)


def test_drawn_candidates_may_repeat_and_the_rest_is_outside_the_distinct_ones(fresh: Path) -> None:
    stage.run(recipe("score.candidate_kind=sampled", "score.candidates=6"), str(fresh))
    round_ = cs.open(fresh).round()
    for name in ("student", "teacher"):
        rollouts, ids = round_.rollouts.read(0), round_.scores("student").read(0).candidate_ids
        assert any(len(set(row)) < 6 for row in ids.tolist())
        expected = oracle_logprobs(name, rollouts)
        scores = round_.scores(name).read(0)
        np.testing.assert_allclose(scores.candidate_logprobs, np.take_along_axis(expected, ids, 1), atol=1e-5)
        np.testing.assert_allclose(scores.rest_logprob, log_rest(expected, ids), atol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Records the elements of the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return out


def test_logits_never_exist_for_more_than_a_chunk_of_rows() -> None:
    vocab, width, chunk, n_tokens = 5000, 16, 16, 500
    shape = dict(vocab_size=vocab, hidden_size=width, intermediate_size=width, num_hidden_layers=1)
    register_packed_attention()
    heads = dict(num_attention_heads=2, num_key_value_heads=2, head_dim=8)
    config = Qwen3Config(**shape, **heads, attn_implementation="redpen_packed")
    rng = np.random.default_rng(0)
    rows = [cs.RolloutRow(0, i, rng.integers(0, vocab, 50), np.zeros(50), cs.FINISH_LENGTH) for i in range(10)]
    rollouts = cs.RolloutBlock.from_rows([(0, rng.integers(0, vocab, 5))], rows)
    for kind in ("topk", "sampled"):
        options = ScoreOptions(candidate_kind=kind, rows_per_chunk=chunk, topk=4, sampling_temperature=0.7)
        scorer = ResidentScorer(Qwen3ForCausalLM(config).eval(), options)
        with LargestTensor() as largest:
            assert scorer.compute_logprobs(rollouts).n_tokens == n_tokens
        assert largest.elements == chunk * vocab


# -- the stage -----------------------------------------------------------------------------------------------


def test_finished_scores_load_no_model(
    scored: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(models, "load_model", forbidden)
    before = {path: path.read_bytes() for path in scored.rglob("*") if path.is_file()}
    stage.run(recipe("score.teacher_topk=5"), str(scored))
    out = capsys.readouterr().out
    assert out.count("nothing to do") == 2 and "792 tokens of 48 rollouts" in out
    assert before == {path: path.read_bytes() for path in scored.rglob("*") if path.is_file()}


def test_models_are_in_memory_one_at_a_time(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[weakref.ref[PreTrainedModel]] = []
    load = models.load_model

    def loading(*args: Any, **kwargs: Any) -> PreTrainedModel:
        assert all(earlier() is None for earlier in loaded)
        model = load(*args, **kwargs)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(models, "load_model", loading)
    stage.run(recipe(), str(fresh))
    assert len(loaded) == 2


def test_teachers_are_added_one_by_one(fresh: Path) -> None:
    data = recipe().model_dump()
    data["teacher"].append(data["teacher"][0] | {"name": "second", "dtype": "bfloat16"})
    two = Recipe.from_dict(data)
    with pytest.raises(cs.CacheError, match=r"not scored by 'student'"):
        stage.run(two, str(fresh), only="second")
    stage.run(two, str(fresh), only="student")
    stage.run(two, str(fresh), only="second")
    round_ = cs.open(fresh).round()
    assert round_.scorer_names() == ["student", "second"] and round_.scores("second").committed().all()
    assert round_.scores("second").manifest.dtype == "bfloat16"
    with pytest.raises(ConfigError, match=r"--only: expected one of student, teacher, second, got 'third'"):
        stage.run(two, str(fresh), only="third")


def test_a_finished_cache_does_not_ask_for_its_teacher_again(
    fresh: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = Path(shutil.copytree(asset_path("teacher"), tmp_path / "teacher"))
    stage.run(recipe(f"teacher.model={teacher}"), str(fresh))
    shutil.rmtree(teacher)
    find_directory.cache_clear()  # the next command is another process
    capsys.readouterr()
    assert stage.run(recipe(f"teacher.model={teacher}"), str(fresh)) == 0
    assert f"nothing to do ({teacher} is not on this machine)" in capsys.readouterr().out
    with pytest.raises(ModelError, match="no such directory"):
        stage.run(recipe(f"teacher.model={teacher}2"), str(fresh))


def test_a_missing_teacher_is_reported_before_the_student_is_loaded(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ModelError, match="no such directory"):
        stage.run(recipe(f"teacher.model={tmp_path / 'nowhere'}"), str(fresh))


def test_half_a_cache_is_scored_as_far_as_it_goes(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cs.open(fresh, writable=True).round().rollouts.uncommit(1)
    assert stage.run(recipe(), str(fresh)) == 0
    err = capsys.readouterr().err
    assert "1 of 3 blocks have no rollouts yet" in err and "next:" not in err
    round_ = cs.open(fresh).round()
    for name in ("student", "teacher"):
        assert round_.scores(name).committed().tolist() == [True, False, True]
    rollouts_stage.run(recipe("rollouts.temperature=0.8"), str(fresh))
    stage.run(recipe(), str(fresh))
    assert cs.open(fresh).round().scores("teacher").committed().all()


def test_a_resampled_block_is_scored_again(fresh: Path) -> None:
    stage.run(recipe(), str(fresh))
    round_ = cs.open(fresh, writable=True).round()
    old = round_.rollouts.read(2)
    changed = old.rollout_logprobs.copy()
    changed[0] = -1.0
    round_.rollouts.write(2, cs.RolloutBlock(**(vars(old) | {"rollout_logprobs": changed})))
    assert round_.scores("teacher").committed().tolist() == [True, True, False]
    stage.run(recipe(), str(fresh))
    assert cs.open(fresh).round().scores("teacher").committed().all()


def test_greedy_rollouts_are_scored_at_temperature_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = recipe("rollouts.temperature=0", "rollouts.rollouts_per_prompt=1", "prompts.limit=4")
    rollouts_stage.run(settings, str(tmp_path / "toy.zarr"))
    stage.run(settings, str(tmp_path / "toy.zarr"), only="student")
    scores = cs.open(tmp_path / "toy.zarr").round().scores("student")
    assert scores.manifest.sampling_temperature == 1.0
    np.testing.assert_array_equal(scores.read(0).sampling_logprobs, scores.read(0).logprobs)
    assert "sampler" not in capsys.readouterr().out


def other_student(path: Path) -> Recipe:
    return recipe("student.model=toy:teacher")


def other_vocabulary(path: Path) -> Recipe:
    teacher = Path(shutil.copytree(asset_path("teacher"), path / "teacher"))
    data = json.loads((teacher / "tokenizer.json").read_text())
    data["model"]["vocab"]["12"], data["model"]["merges"] = 259, [["1", "2"]]
    data["model"]["vocab"].pop("z")
    (teacher / "tokenizer.json").write_text(json.dumps(data))
    return recipe(f"teacher.model={teacher}")


def short_context(path: Path) -> Recipe:
    teacher = Path(shutil.copytree(asset_path("teacher"), path / "teacher"))
    config = json.loads((teacher / "config.json").read_text()) | {"max_position_embeddings": 20}
    (teacher / "config.json").write_text(json.dumps(config))
    return recipe(f"teacher.model={teacher}")


def too_many_candidates(path: Path) -> Recipe:
    return recipe("score.candidates=300")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            other_student,
            cs.ProvenanceError,
            r"sampled by a different student \(student\.digest: cached .*--round 1",
        ),
        (
            other_vocabulary,
            ModelError,
            r"tokenizes text differently .*\(of 259 tokens 1 differ, and it has 1 more\).* choose a teacher",
        ),
        (short_context, ModelError, r"its context is 20 tokens, a rollout of block 0 has 2\d"),
        (
            too_many_candidates,
            ConfigError,
            r"score\.candidates: expected at most 259, the student's vocabulary, got 300",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    fresh: Path, tmp_path: Path, make: Callable[[Path], Recipe], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        stage.run(make(tmp_path), str(fresh))
    assert "\n" not in str(caught.value)
    assert not list(cs.verify(cs.open(fresh)))
    assert "teacher" not in cs.open(fresh).round().scorer_names(), "else the right one would be refused"


def test_what_cannot_be_scored_is_refused(fresh: Path, tmp_path: Path) -> None:
    with pytest.raises(cs.NotACacheError, match="nothing is there; `redpen rollouts"):
        stage.run(recipe(), str(tmp_path / "missing.zarr"))
    stage.run(recipe(), str(fresh))
    with pytest.raises(cs.ProvenanceError, match=r"candidates: cached 8, now 4"):
        stage.run(recipe("score.candidates=4"), str(fresh))
    round_ = cs.open(fresh, writable=True).round()
    for block in range(round_.n_blocks):
        round_.rollouts.uncommit(block)
    with pytest.raises(cs.CacheError, match="no block of rollouts is finished; run `redpen rollouts"):
        stage.run(recipe(), str(fresh))
