"""Token selection: each setting against its words, the same global batch on any layout, and what is left unread."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cache_schema as cs
from helpers import cache_factory as factory
from helpers.training import distance, flat_gradient, moved, trainer_of
from pipeline.config import Recipe, SelectConfig
from pipeline.errors import ConfigError
from pipeline.models.resolve import resolve
from pipeline.train import stage
from pipeline.train.build import make_objective, make_replay
from pipeline.train.order import Order
from pipeline.train.replay import Batch, Replay
from pipeline.train.selection import Selection

Make = Callable[..., Recipe]
SPECIAL = (9, 11, 30)


@pytest.fixture(scope="module")
def round_(tmp_path_factory: pytest.TempPathFactory) -> cs.Round:
    return factory.filled(tmp_path_factory.mktemp("select") / "c.zarr", n_prompts=12).round()


def replay_of(round_: cs.Round, prompts_per_step: int = 12, held_back: int = 0, **settings: object) -> Replay:
    selection = Selection(SelectConfig(**settings), (factory.EOS,), SPECIAL)  # type: ignore[arg-type]
    columns = {"student": ("logprobs", "candidate_ids"), "teacher": ("logprobs",)}
    return Replay(round_, columns, Order(12, 4, prompts_per_step, 2, 0, held_back), selection=selection)


def kept(batch: Batch) -> dict[tuple[int, int, int], float]:
    """Weight of every token that counts, by prompt, sample and place in the response."""
    return {
        (r.prompt_index, int(r.block.rollouts.sample_index[r.row]), place): float(weight)
        for r in batch.rollouts
        for place, weight in enumerate(r.weights)
        if weight
    }


def response(round_: cs.Round, prompt: int, sample: int) -> tuple[list[int], int]:
    block = round_.rollouts.read(prompt // 4)
    row = (prompt % 4) * 3 + sample
    return block.response(row).tolist(), int(block.finish_reason[row])


SETTINGS: dict[str, tuple[dict[str, object], Callable[[int, int, int], bool]]] = {
    "everything": ({}, lambda place, token, reason: True),
    "first tokens": ({"first_tokens": 3}, lambda place, token, reason: place < 3),
    "no special tokens": ({"special_tokens": False}, lambda place, token, reason: token not in SPECIAL),
    "no eos": ({"eos": False}, lambda place, token, reason: token != factory.EOS),
    "no truncated": ({"truncated": False}, lambda place, token, reason: reason != cs.FINISH_LENGTH),
    "together": (
        {"first_tokens": 5, "special_tokens": False, "eos": False, "truncated": False},
        lambda place, token, reason: (
            place < 5 and token not in (*SPECIAL, factory.EOS) and reason != cs.FINISH_LENGTH
        ),
    ),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_each_setting_leaves_in_what_it_says(case: str, round_: cs.Round) -> None:
    settings, wanted = SETTINGS[case]
    batch = replay_of(round_, **settings).batch(0)
    expected = {}
    for prompt in range(12):
        for sample in range(3):
            tokens, reason = response(round_, prompt, sample)
            for place, token in enumerate(tokens):
                if wanted(place, token, reason):
                    expected[prompt, sample, place] = 1.0
    assert kept(batch) == expected
    assert batch.n_tokens == len(expected)
    everything = replay_of(round_).batch(0)
    assert (batch.n_tokens < everything.n_tokens) == bool(settings), "the fixture would not notice this setting"


def test_what_follows_the_last_token_that_counts_is_not_read(round_: cs.Round) -> None:
    batch = replay_of(round_, first_tokens=2, truncated=False).batch(0)
    for rollout, _ in batch.distinct:
        tokens, reason = response(round_, rollout.prompt_index, int(rollout.block.rollouts.sample_index[rollout.row]))
        assert reason != cs.FINISH_LENGTH
        assert rollout.token_ids[len(rollout.prompt_ids) :].tolist() == tokens[:2]
        assert rollout.n_tokens == len(rollout.token_ids)
        assert len(rollout.column("student/candidate_ids")) == len(rollout.weights) == len(tokens[:2])


@hypothesis.settings(deadline=None)  # a busy machine is no failure
@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.5, 0.7, 1.0, 2.0]), st.booleans()), min_size=1, max_size=40),
    st.floats(0.01, 1.0),
    st.randoms(use_true_random=False),
)
def test_the_highest_entropies_stay_whatever_the_order(
    tokens: list[tuple[float, bool]], fraction: float, rng
) -> None:
    """As a set: a token of lower entropy than one left out never stays, equal ones stay together."""
    entropy = np.array([e for e, _ in tokens], np.float32)
    weights = np.array([counts for _, counts in tokens], np.float32)
    selection = Selection(SelectConfig(entropy_fraction=fraction))
    found = selection.of_batch(weights, entropy)
    stays, out = (found > 0), (weights > 0) & (found == 0)
    assert not found[weights == 0].any()
    if weights.any():
        n = int(weights.sum())
        assert stays.sum() >= max(round(fraction * n), 1)
        assert entropy[stays].min() > entropy[out].max(initial=-1)
        without_last = (entropy[stays] > entropy[stays].min()).sum()
        assert without_last < max(round(fraction * n), 1), "more than ties stay"
    order = list(range(len(tokens)))
    rng.shuffle(order)
    np.testing.assert_array_equal(selection.of_batch(weights[order], entropy[order]), found[order])


@pytest.mark.parametrize("settings", [{"entropy_fraction": 0.3}, {"entropy_fraction": 0.3, "first_tokens": 4}])
def test_the_entropy_fraction_is_of_the_global_batch(round_: cs.Round, settings: dict[str, object]) -> None:
    rest = {name: value for name, value in settings.items() if name != "entropy_fraction"}
    candidates = {}
    for key in kept(replay_of(round_, 5, **rest).batch(1)):
        block, row = round_.scores("student").read(key[0] // 4), (key[0] % 4) * 3 + key[1]
        assert block.entropy is not None
        candidates[key] = float(block.entropy[round_.rollouts.read(key[0] // 4).response_slice(row)][key[2]])
    highest = sorted(candidates, key=lambda key: -candidates[key])[: round(0.3 * len(candidates))]
    replay = replay_of(round_, 5, **settings)
    batch = replay.batch(1)
    assert set(kept(batch)) == set(highest) and batch.n_tokens == len(highest)
    for world, budget in ((1, 1000), (3, 30)):
        shares = [m for rank in range(world) for m in batch.micro_batches(budget, rank, world)]
        assert sum(float(m.weights.sum()) for m in shares) == batch.n_tokens


def test_held_back_prompts_are_selected_alike(round_: cs.Round) -> None:
    replay = replay_of(round_, 4, held_back=5, first_tokens=1, eos=False)
    measured = [batch for batch in replay.held_back(2) if kept(batch)]
    assert {key[0] for batch in measured for key in kept(batch)} <= set(range(7, 12))
    assert all(place == 0 for batch in measured for _, _, place in kept(batch))


def test_a_batch_without_tokens_is_an_error(tmp_path: Path) -> None:
    """Not a loss of 0, and no step on momentum alone."""
    round_ = factory.filled(tmp_path / "c.zarr", n_prompts=12).round()
    for index in range(round_.n_blocks):
        block = round_.rollouts.read(index)
        rows = [
            cs.RolloutRow(int(p), int(s), [SPECIAL[0]], [-1.0], cs.FINISH_OTHER)
            for p, s in zip(block.row_prompt, block.sample_index, strict=True)
        ]
        prompts = [(int(p), block.prompt_ids(i)) for i, p in enumerate(block.prompt_index)]
        round_.rollouts.write(index, cs.RolloutBlock.from_rows(prompts, rows))
        rollouts, rng = round_.rollouts.read(index), np.random.default_rng(index)
        student, teacher = round_.scores("student"), round_.scores("teacher")
        scored = factory.score_block(student.manifest, rollouts, rng)  # type: ignore[arg-type]
        student.write(index, scored)
        teacher.write(index, factory.score_block(teacher.manifest, rollouts, rng, scored.candidate_ids))  # type: ignore[arg-type]
    replay = replay_of(round_, 4, held_back=4, special_tokens=False)
    named = r"select\.special_tokens = false: none of the "
    with pytest.raises(ConfigError, match=named + "12 rollouts of step 3 has a token left to train on"):
        replay.batch(2)
    with pytest.raises(ConfigError, match=named + "4 prompts held back has a token left"):
        list(replay.held_back(2))


# -- with a student -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [["select.first_tokens=6"], ["select.entropy_fraction=0.25", "select.eos=false"]]
)
def test_the_gradient_is_of_the_selected_tokens_alone(settings: list[str], toy_cache: Path, recipe: Make) -> None:
    """Weights set by hand over whole responses, against the selection that reads only what it needs."""
    whole, loader = trainer_of(toy_cache, recipe())
    selected, replay = trainer_of(toy_cache, recipe(*settings))
    batch, by_hand = replay.batch(1), loader.batch(1)
    chosen = kept(batch)
    for rollout in by_hand.rollouts:
        key = rollout.prompt_index, int(rollout.block.rollouts.sample_index[rollout.row])
        for place in range(len(rollout.weights)):
            rollout.weights[place] = float((*key, place) in chosen)
    assert by_hand.n_tokens == batch.n_tokens == len(chosen)
    moved(whole).gradient(by_hand)
    moved(selected).gradient(batch)
    assert distance(flat_gradient(selected), flat_gradient(whole)) < 1e-5
    read = [sum(r.n_tokens for r, _ in b.distinct) for b in (batch, by_hand)]
    assert read[0] < read[1]
    assert torch.isfinite(flat_gradient(selected)).all()


def test_special_tokens_are_the_tokenizers(toy_cache: Path, recipe: Make) -> None:
    settings, round_ = recipe("select.special_tokens=false"), cs.open(toy_cache).round()
    selection = make_replay(settings, round_, make_objective(settings, round_, ["teacher"])).selection
    assert selection.stop_ids == round_.manifest.stop_token_ids
    every = set(resolve(settings.student).tokenizer.all_special_ids)
    assert set(selection.special_ids) == every - set(selection.stop_ids) != every


def test_a_run_needs_prompts_that_are_not_held_back(toy_cache: Path, tmp_path: Path, recipe: Make) -> None:
    held = recipe("train.heldout_metric=reverse_kl", "train.heldout_prompts=24")
    with pytest.raises(ConfigError, match=r"^train\.heldout_prompts = 24: the round holds 24 prompts"):
        stage.run(held, str(toy_cache), tmp_path / "run")
