"""Rollouts that are read once for several: the gradient is that of every rollout alone, whatever differs in them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cache_schema as cs
from helpers import cache_factory as factory
from helpers.caches import small_recipe
from pipeline.config import Recipe
from pipeline.train import losses
from pipeline.train.objective import DistillationObjective, PolicyGradient
from pipeline.train.replay import BEHAVIOUR, Batch, LoadedBlock, MicroBatch, Rollout
from pipeline.train.reward import ADVANTAGE
from pipeline.train.teachers import Teachers

VOCAB, LENGTH, N_PROMPTS, N_SAMPLES, N_CANDIDATES = 12, 4, 2, 4, 4
N_ROWS = N_PROMPTS * N_SAMPLES

#: What a loss may take from a row beside its tokens; each may differ where the tokens are equal.
COLUMNS = (
    *("student/logprobs", "student/candidate_ids", "student/candidate_logprobs"),
    *("teacher/logprobs", "teacher/candidate_logprobs", "teacher/rest_logprob"),
    *(ADVANTAGE, BEHAVIOUR),
)

REWARDED = ("reward.coefficient=0.5",)
SAMPLED = ("train.loss=importance_sampling", "train.ppo_clip=0.2", "train.ratio_truncation=1.1")


def over_columns(recipe: Recipe, draws: int = 0) -> DistillationObjective:
    return DistillationObjective(
        recipe.train, Teachers({"teacher": factory.scores_manifest("teacher")}), VOCAB, draws, recipe.reward
    )


def of_sampled_token(recipe: Recipe) -> DistillationObjective:
    recorded = factory.scores_manifest("teacher", candidates=0)
    return DistillationObjective(recipe.train, Teachers({"teacher": recorded}), VOCAB, 0, recipe.reward)


OBJECTIVES: dict[str, Callable[[], DistillationObjective | PolicyGradient]] = {
    "reverse_kl": lambda: over_columns(small_recipe(*REWARDED)),
    "forward_kl": lambda: over_columns(small_recipe("train.loss=forward_kl")),
    "draws": lambda: over_columns(small_recipe("train.loss=jsd"), N_CANDIDATES - 1),
    "k2": lambda: of_sampled_token(small_recipe(*REWARDED)),
    "importance_sampling": lambda: over_columns(small_recipe(*SAMPLED, *REWARDED)),
    "behaviour": lambda: over_columns(small_recipe(*SAMPLED, "train.behaviour_correction=true")),
    "cached": lambda: over_columns(small_recipe(*SAMPLED, "train.advantage=cached")),
    "rewards": lambda: PolicyGradient(*_of_rewards()),
}


def _of_rewards() -> tuple:
    recipe = small_recipe(*SAMPLED, *REWARDED, "reward.teacher_weight=0", "train.behaviour_correction=true")
    return recipe.train, recipe.reward


def batch_of(seed: int, words: list[int], counted: list[int], variants: dict[str, list[int]]) -> Batch:
    """Rollouts of one of two texts, of which the first `counted` tokens count, with one of two values a column."""
    rng = np.random.default_rng(seed)
    texts = rng.integers(0, VOCAB, (2, LENGTH))
    texts[1, :2] = texts[0, :2]  # equal where only two tokens count
    rows = [
        cs.RolloutRow(row // N_SAMPLES, row % N_SAMPLES, texts[words[row]], -np.ones(LENGTH), cs.FINISH_STOP)
        for row in range(N_ROWS)
    ]
    rollouts = cs.RolloutBlock.from_rows([(p, np.array([p])) for p in range(N_PROMPTS)], rows)
    others = np.array([rng.permutation(VOCAB)[:N_CANDIDATES] for _ in range(2 * LENGTH)]).reshape(2, LENGTH, -1)
    of_one: dict[str, np.ndarray] = {"student/candidate_ids": others.astype(np.int32)}
    for name in COLUMNS:
        shape = (2, LENGTH, N_CANDIDATES) if "candidate" in name else (2, LENGTH)
        of_one.setdefault(name, (np.log(rng.random(shape)) - 2).astype(np.float32))
    columns = {name: np.concatenate([of_one[name][variants[name][row]] for row in range(N_ROWS)]) for name in COLUMNS}
    columns["student/candidate_ids"][:, 0] = rollouts.token_ids
    for scorer in ("student", "teacher"):
        columns[f"{scorer}/candidate_logprobs"][:, 0] = columns[f"{scorer}/logprobs"]
    weights = np.concatenate([np.arange(LENGTH) < counted[row] for row in range(N_ROWS)]).astype(np.float32)
    block = LoadedBlock(rollouts, columns, weights)
    return Batch(0, tuple(Rollout(block, row) for row in range(N_ROWS)))


def gradient(objective: DistillationObjective | PolicyGradient, parts: list[MicroBatch], n_tokens: float) -> Tensor:
    """Of a student in float64, in which logits are a function of all tokens so far."""
    table = torch.randn(97, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for part in parts:
        contexts = [
            int(np.dot(rollout.token_ids[: end + 1], 3 ** np.arange(end + 1)) % 97)
            for rollout in part.rollouts
            for end in range(len(rollout.weights))
        ]
        targets = objective.targets(part, "cpu")
        logprobs = table[contexts].log_softmax(1)
        places = targets.ids_TC.masked_fill(targets.ids_TC < 0, VOCAB)
        outside = torch.ones(len(contexts), VOCAB + 1, dtype=torch.bool).scatter_(1, places, False)[:, :VOCAB]
        rest = logprobs.masked_fill(~outside, -torch.inf).logsumexp(1)
        of_columns = logprobs.gather(1, targets.ids_TC.clamp(min=0))
        loss = objective.token_loss(targets, of_columns, rest)
        total = total + losses.token_sum(loss, targets.weights_T, n_tokens)
    return torch.autograd.grad(total, table)[0]


one_of_two = st.lists(st.integers(0, 1), min_size=N_ROWS, max_size=N_ROWS)


@pytest.mark.parametrize("loss", OBJECTIVES)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    words=one_of_two,
    counted=st.lists(st.sampled_from([2, 2, 4]), min_size=N_ROWS, max_size=N_ROWS),
    differing=st.fixed_dictionaries({name: st.just([0] * N_ROWS) | one_of_two for name in COLUMNS}),
)
def test_the_gradient_is_that_of_every_rollout_alone(
    loss: str, seed: int, words: list[int], counted: list[int], differing: dict[str, list[int]]
) -> None:
    batch, objective = batch_of(seed, words, counted, differing), OBJECTIVES[loss]()
    merged = gradient(objective, batch.micro_batches(12), batch.n_tokens)
    alone = gradient(objective, [MicroBatch((r,), (1,)) for r in batch.rollouts], batch.n_tokens)
    torch.testing.assert_close(merged, alone, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", COLUMNS)
def test_whatever_differs_keeps_rollouts_apart(name: str) -> None:
    """Of 4 rollouts of a prompt that are equal in the tokens that count, the last differs in one column."""
    equal = {column: [0] * N_ROWS for column in COLUMNS}
    words, counted = [0, 1] * (N_ROWS // 2), [2] * N_ROWS
    assert [n for _, n in batch_of(1, words, counted, equal).distinct] == [4, 4]
    odd = equal | {name: [0, 0, 0, 1] * N_PROMPTS}
    assert [n for _, n in batch_of(1, words, counted, odd).distinct] == [3, 1, 3, 1]
