"""Replay: a pure order, global batches that nothing about the hardware changes, and blocks read safely."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cache_schema as cs
from helpers import cache_factory as factory
from pipeline.errors import ConfigError
from pipeline.train import order as order_module
from pipeline.train import replay
from pipeline.train.order import Order
from pipeline.train.packs import PackedRow, deal, pack_rows, tokens_of
from pipeline.train.replay import Replay

COLUMNS = {"student": ("logprobs", "candidate_ids"), "teacher": ("logprobs", "candidate_logprobs", "rest_logprob")}

orders = st.builds(
    Order,
    n_prompts=st.integers(1, 70),
    prompts_per_block=st.integers(1, 9),
    prompts_per_step=st.integers(1, 30),
    window_blocks=st.integers(1, 5),
    seed=st.integers(0, 2**40),
)
held_back = st.tuples(orders, st.integers(0, 69)).map(
    lambda drawn: dataclasses.replace(drawn[0], held_back=min(drawn[1], drawn[0].n_prompts - 1))
)


@given(orders, st.integers(0, 3))
def test_an_epoch_holds_every_prompt_once(order: Order, epoch: int) -> None:
    assert sorted(order.epoch(epoch).tolist()) == list(range(order.n_prompts))


@given(orders, st.integers(0, 3))
def test_an_epoch_shuffles_within_windows_of_whole_blocks(order: Order, epoch: int) -> None:
    blocks = order.epoch(epoch) // order.prompts_per_block
    n_blocks = -(-order.n_prompts // order.prompts_per_block)
    seen: set[int] = set()
    position = 0
    for start in range(0, n_blocks, order.window_blocks):
        members: set[int] = set()
        count = min(order.window_blocks, n_blocks - start)
        while position < len(blocks) and (blocks[position] in members or len(members) < count):
            members.add(int(blocks[position]))
            position += 1
        assert not members & seen
        seen |= members
    assert position == order.n_prompts


@given(orders, st.integers(0, 5))
def test_steps_are_consecutive_pieces_of_the_stream_of_epochs(order: Order, n_steps: int) -> None:
    stream = [p for s in range(n_steps) for p in order.step(s).tolist()]
    n_epochs = -(-n_steps * order.prompts_per_step // order.n_prompts)
    epochs = [p for e in range(n_epochs) for p in order.epoch(e).tolist()]
    assert stream == epochs[: len(stream)]


@given(orders, st.lists(st.integers(0, 20), min_size=1, max_size=5))
def test_a_step_does_not_depend_on_what_was_asked_before(order: Order, others: list[int]) -> None:
    expected = {step: order.step(step).tolist() for step in others}
    order_module._epoch_order.cache_clear()
    for step in reversed(others):
        assert order.step(step).tolist() == expected[step]


@given(held_back, st.integers(0, 3))
def test_what_is_held_back_is_never_replayed(order: Order, epoch: int) -> None:
    assert sorted(order.epoch(epoch).tolist()) == list(range(order.n_prompts - order.held_back))
    stream = [p for s in range(3) for p in order.step(s).tolist()]
    assert len(stream) == 3 * order.prompts_per_step and max(stream) < order.n_replayed


def test_something_must_be_left_to_train_on() -> None:
    with pytest.raises(ConfigError, match=r"heldout_prompts = 8: the round holds 8 prompts, so none is left"):
        Order(8, 4, 4, 2, seed=0, held_back=8)


def test_the_order_is_the_same_on_every_machine() -> None:
    """It is part of what a run can be continued by, so it must not change with a release of numpy or of redpen."""
    order = Order(n_prompts=10, prompts_per_block=2, prompts_per_step=4, window_blocks=2, seed=7)
    assert order.epoch(0).tolist() == [7, 9, 8, 6, 5, 4, 1, 0, 2, 3]
    assert order.epoch(1).tolist() == [6, 7, 2, 3, 8, 5, 4, 9, 1, 0]


def test_epochs_and_seeds_differ() -> None:
    order = Order(64, 4, 8, 4, seed=0)
    other = Order(64, 4, 8, 4, seed=1)
    drawn = {tuple(o.epoch(e).tolist()) for o in (order, other) for e in range(3)}
    assert len(drawn) == 6


def apart(lengths: Iterable[int]) -> list[PackedRow]:
    """Rows with a prompt of one token each, of their own."""
    return [PackedRow(i, 1, int(length) - 1) for i, length in enumerate(lengths)]


def reasoning(seed: int = 0) -> list[PackedRow]:
    """4 responses to each of 64 prompts, of very different lengths, as reasoning models give them."""
    rng = np.random.default_rng(seed)
    responses = np.clip(rng.lognormal(6.5, 0.8, 256), 50, 4096).astype(int)
    prompts = np.repeat(rng.integers(50, 400, 64), 4)
    return [PackedRow(i // 4, int(p), int(r)) for i, (p, r) in enumerate(zip(prompts, responses, strict=True))]


ROWS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 20)), max_size=60).map(
    lambda rows: [PackedRow(prompt, (3, 1, 10, 7, 25, 2)[prompt], response) for prompt, response in rows]
)


@given(ROWS, st.integers(1, 80), st.integers(1, 5))
def test_packs_hold_every_row_once_within_the_budget(rows: list[PackedRow], budget: int, ranks: int) -> None:
    packs = pack_rows(rows, budget, ranks)
    assert sorted(row for pack in packs for row in pack) == list(range(len(rows)))
    for pack in packs:
        assert pack and (tokens_of([rows[i] for i in pack]) <= budget or len(pack) == 1)
    assert packs == pack_rows(rows, budget, ranks)
    least = pack_rows(rows, budget)
    assert len(packs) <= -(-len(least) // ranks) * ranks


def test_packs_are_well_filled() -> None:
    rows = apart(row.tokens for row in reasoning())
    assert tokens_of(rows) / (8192 * len(pack_rows(rows, 8192))) > 0.97


def test_prompts_are_shared_where_they_can_be() -> None:
    """Nearly every prompt is read once, and packs are still full."""
    rows = reasoning()
    packs = pack_rows(rows, 8192)
    read, least = sum(tokens_of([rows[i] for i in pack]) for pack in packs), tokens_of(rows)
    assert least <= read < 1.03 * least < sum(row.tokens for row in rows)
    assert read / (8192 * len(packs)) > 0.93


@pytest.mark.parametrize("world", [2, 4, 8])
def test_ranks_are_loaded_evenly(world: int) -> None:
    """Else the others wait: with packs dealt as they are full, the last ones are on some ranks only."""
    rows = reasoning()
    packs = pack_rows(rows, 8192, world)
    loads = [
        sum(tokens_of([rows[i] for i in pack]) for pack in deal(packs, rank, world) if pack) for rank in range(world)
    ]
    assert sum(loads) / world / max(loads) > 0.97


def test_a_step_that_fits_one_pack_is_shared_by_all_ranks() -> None:
    assert sorted(map(len, pack_rows(apart([10] * 8), 8192, 4))) == [2, 2, 2, 2]


@given(st.integers(0, 12), st.integers(1, 5))
def test_every_rank_gets_as_many_packs(n_packs: int, world: int) -> None:
    packs = [[i] for i in range(n_packs)]
    dealt = [deal(packs, rank, world) for rank in range(world)]
    assert len({len(mine) for mine in dealt}) == 1
    assert sorted(pack for mine in dealt for pack in mine if pack is not None) == packs
    assert all(len(mine) == -(-n_packs // world) for mine in dealt)


# -- from a cache -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def round_(tmp_path_factory: pytest.TempPathFactory) -> cs.Round:
    return factory.filled(tmp_path_factory.mktemp("replay") / "c.zarr", n_prompts=22).round()


def order_of(round_: cs.Round, prompts_per_step: int = 5, window_blocks: int = 2) -> Order:
    return Order(round_.n_prompts, round_.manifest.prompts_per_block, prompts_per_step, window_blocks, seed=3)


def rows_of(rollouts: tuple[replay.Rollout, ...]) -> list[tuple[int, int]]:
    return [(r.prompt_index, int(r.block.rollouts.sample_index[r.row])) for r in rollouts]


def test_a_batch_holds_its_prompts_with_all_their_rollouts(round_: cs.Round) -> None:
    loader = Replay(round_, COLUMNS, order_of(round_))
    for step in range(7):
        batch = loader.batch(step)
        expected = [(int(p), s) for p in loader.order.step(step) for s in range(3)]
        assert rows_of(batch.rollouts) == expected


def test_columns_are_those_of_the_cache(round_: cs.Round) -> None:
    loader = Replay(round_, COLUMNS, order_of(round_))
    for rollout in loader.batch(1).rollouts:
        block, within = divmod(rollout.prompt_index, round_.manifest.prompts_per_block)
        cached, teacher = round_.rollouts.read(block), round_.scores("teacher").read(block)
        where = cached.response_slice(rollout.row)
        assert int(cached.row_prompt[rollout.row]) == within
        np.testing.assert_array_equal(
            rollout.token_ids, np.concatenate([cached.prompt(rollout.row), cached.response(rollout.row)])
        )
        np.testing.assert_array_equal(rollout.column("teacher/candidate_logprobs"), teacher.candidate_logprobs[where])
        assert rollout.n_tokens == len(rollout.token_ids)


@settings(max_examples=30, deadline=None)
@given(step=st.integers(0, 9), budget=st.integers(5, 400), world=st.integers(1, 4))
def test_the_global_batch_does_not_depend_on_budget_or_ranks(
    round_: cs.Round, step: int, budget: int, world: int
) -> None:
    batch = Replay(round_, COLUMNS, order_of(round_)).batch(step)
    shares = [batch.micro_batches(budget, rank, world) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    counted = [m for share in shares for m in share if m.counts]
    dealt = [(r, n) for m in counted for r, n in zip(m.rollouts, m.copies, strict=True)]
    assert sorted(rows_of(tuple(r for r, _ in dealt))) == sorted(rows_of(tuple(r for r, _ in batch.distinct)))
    assert sum(n for _, n in dealt) == len(batch.rollouts)
    padding = [m for share in shares for m in share if not m.counts]
    assert all(len(m.rollouts) == 1 and not m.weights.any() for m in padding)
    assert sum(float(m.weights.sum()) for m in counted) == batch.n_tokens


def test_tokens_that_are_not_trained_weigh_nothing(tmp_path: Path) -> None:
    cache = factory.filled(tmp_path / "c.zarr", n_prompts=4)
    round_ = cache.round()
    block = round_.rollouts.read(0)
    block.trained[::2] = 0
    round_.rollouts.write(0, block)
    student = round_.scores("student")
    assert isinstance(student.manifest, cs.ScoresManifest)
    rng = np.random.default_rng(0)
    student.write(0, factory.score_block(student.manifest, block, rng))
    batch = Replay(round_, {"student": ("logprobs",)}, order_of(round_, 4)).batch(0)
    assert batch.n_tokens == block.trained.sum()


def test_equal_rollouts_are_read_once_and_weigh_as_often_as_they_occur(tmp_path: Path) -> None:
    """Equal where they teach the same: drawn candidates that differ keep two rollouts apart."""
    round_ = factory.filled(tmp_path / "c.zarr", n_prompts=4).round()
    block = round_.rollouts.read(0)
    ids, trained = np.arange(8, 13), np.array([1, 1, 0, 1, 1])
    rows = [
        cs.RolloutRow(p, s, ids + (p == 1 and s == 2), -np.ones(5), 1, trained) for p in range(4) for s in range(3)
    ]
    prompts = [(i, block.prompt_ids(i)) for i in range(4)]
    round_.rollouts.write(0, cs.RolloutBlock.from_rows(prompts, rows))
    student = round_.scores("student")
    assert isinstance(student.manifest, cs.ScoresManifest)
    scores = factory.score_block(student.manifest, round_.rollouts.read(0), np.random.default_rng(0))
    assert scores.candidate_ids is not None
    scores.candidate_ids[:] = scores.candidate_ids[:, :1] + np.arange(4)
    scores.candidate_ids[-1, 1:] = [1, 2, 3]  # last token of the last prompt's last sample
    student.write(0, scores)

    order = Order(4, 4, 4, 1, seed=0)
    batch = Replay(round_, {"student": ("candidate_ids",)}, order).batch(0)
    by_prompt = {p: sorted(n for r, n in batch.distinct if r.prompt_index == p) for p in range(4)}
    assert by_prompt == {0: [3], 1: [1, 2], 2: [3], 3: [1, 2]}
    (micro_batch,) = batch.micro_batches(1000)
    assert micro_batch.weights.sum() == batch.n_tokens == 12 * 4
    assert micro_batch.copies_T.sum() == 12 * 5
    assert set(micro_batch.weights[micro_batch.copies_T == 3]) == {0, 3}


def test_held_back_prompts_come_in_order_and_disturb_no_block(round_: cs.Round) -> None:
    order = dataclasses.replace(order_of(round_), held_back=7)
    loader = Replay(round_, COLUMNS, order)
    loader.batch(0)
    resident = list(loader._loaded)
    held = list(loader.held_back(3))
    assert [sorted({r.prompt_index for r in batch.rollouts}) for batch in held] == [[15, 16, 17], [18, 19, 20], [21]]
    assert list(loader._loaded) == resident
    alone = Replay(round_, COLUMNS, order_of(round_, prompts_per_step=22)).batch(0)
    by_row = {(r.prompt_index, int(r.block.rollouts.sample_index[r.row])): r for r in alone.rollouts}
    for rollout, row in zip(held[0].rollouts, rows_of(held[0].rollouts), strict=True):
        np.testing.assert_array_equal(rollout.token_ids, by_row[row].token_ids)
        np.testing.assert_array_equal(rollout.column("teacher/logprobs"), by_row[row].column("teacher/logprobs"))


def test_a_routed_teachers_unscored_tokens_count_on_its_prompts_only(tmp_path: Path) -> None:
    cache = factory.filled(tmp_path / "c.zarr", n_prompts=4)
    round_ = cache.round()
    teacher = round_.scores("teacher")
    assert isinstance(teacher.manifest, cs.ScoresManifest)
    partial = round_.start_scores("partial", dataclasses.replace(teacher.manifest, partial=True))
    scores = teacher.read(0)
    unscored = np.random.default_rng(0).random(scores.n_tokens) < 0.4
    for value in vars(scores).values():
        if value is not None:
            value[unscored] = np.nan
    partial.write(0, scores)
    rollouts = round_.rollouts.read(0)
    prompts_T = np.repeat(rollouts.row_prompt, rollouts.response_length)
    taught = np.array([True, False, True, False])
    columns = {"teacher": ("logprobs",), "partial": ("logprobs",)}
    for mask, lost in ((None, unscored), (taught, unscored & taught[prompts_T])):
        loader = Replay(round_, columns, Order(4, 4, 4, 1, 0), taught=None if mask is None else {"partial": mask})
        assert lost.sum() > 0 and loader.batch(0).n_tokens == rollouts.n_tokens - lost.sum()


def test_batches_read_ahead_are_those_read_alone(round_: cs.Round) -> None:
    order = order_of(round_)
    ahead = list(Replay(round_, COLUMNS, order).batches(range(2, 9)))
    assert [batch.step for batch in ahead] == list(range(2, 9))
    for batch in ahead:
        assert rows_of(batch.rollouts) == rows_of(Replay(round_, COLUMNS, order).batch(batch.step).rollouts)


def test_few_blocks_are_held_and_few_read_twice(round_: cs.Round, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = Replay(round_, COLUMNS, order_of(round_, prompts_per_step=2, window_blocks=2))
    read: list[int] = []
    load = loader._load
    monkeypatch.setattr(loader, "_load", lambda index: read.append(index) or load(index))
    steps_an_epoch = round_.n_prompts // 2
    for _ in loader.batches(range(steps_an_epoch)):
        assert len(loader._loaded) <= 4
    assert sorted(read) == list(range(round_.n_blocks))


def test_a_damaged_block_is_an_error_at_its_step(tmp_path: Path) -> None:
    path = tmp_path / "c.zarr"
    round_ = factory.filled(path, n_prompts=22).round()
    shard = path / "rounds/00000/scores/teacher/candidate_logprobs/c/3/0/0"
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 1
    shard.write_bytes(content)
    loader = Replay(cs.open(path).round(), COLUMNS, order_of(round_, prompts_per_step=4, window_blocks=1))
    first_bad = next(s for s in range(6) if any(p // 4 == 3 for p in loader.order.step(s)))
    batches = loader.batches(range(6))
    for _ in range(first_bad):
        next(batches)
    with pytest.raises(cs.CorruptBlockError, match="block 3, array candidate_logprobs"):
        next(batches)


def test_an_early_end_leaves_no_thread(round_: cs.Round) -> None:
    import threading

    batches = Replay(round_, COLUMNS, order_of(round_)).batches(range(5))
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert not [t for t in threading.enumerate() if t.name.startswith("replay")]
