"""Builds what a run trains on from its recipe and the round: the objective and the batches."""

from __future__ import annotations

from collections.abc import Sequence

import cache_schema as cs
from pipeline.config import Recipe
from pipeline.models.resolve import resolve
from pipeline.text.answers import Checker
from pipeline.train.objective import CrossEntropy, DistillationObjective, Objective, PolicyGradient
from pipeline.train.order import Order
from pipeline.train.replay import Derived, Replay, behaviour
from pipeline.train.reward import Rewards
from pipeline.train.selection import Selection
from pipeline.train.teachers import load_teachers


def make_objective(recipe: Recipe, round_: cs.Round, teacher_names: Sequence[str]) -> Objective:
    """The objective of a recipe on a round; without teachers, cross-entropy or a policy gradient."""
    if not teacher_names:
        cross_entropy = recipe.train.loss == "cross_entropy"
        return CrossEntropy() if cross_entropy else PolicyGradient(recipe.train, recipe.reward)
    student = round_.scores(cs.STUDENT).manifest
    draws = student.candidates - 1 if student.candidate_kind == "sampled" else 0
    teachers = load_teachers(recipe, round_, teacher_names)
    return DistillationObjective(recipe.train, teachers, round_.manifest.vocab_size, draws, recipe.reward)


def make_replay(recipe: Recipe, round_: cs.Round, objective: Objective) -> Replay:
    """The round's batches for an objective. Raises `ConfigError` if every prompt is held back."""
    train, select = recipe.train, recipe.select
    student, stop_ids, special_ids = resolve(recipe.student), round_.manifest.stop_token_ids, ()
    if not select.special_tokens:
        special_ids = tuple(set(student.tokenizer.all_special_ids) - set(stop_ids))
    taught = objective.teachers.taught if isinstance(objective, DistillationObjective) else {}
    derived: list[Derived] = []
    if recipe.reward.coefficient:
        derived.append(Rewards(round_, student.tokenizer, Checker.of(recipe.eval), recipe.reward).columns)
    if train.behaviour_correction:
        derived.append(behaviour)
    selection = Selection(select, stop_ids, special_ids)
    order = make_order(recipe, round_)
    return Replay(round_, objective.arrays, order, selection=selection, taught=taught, derived=derived)


def make_order(recipe: Recipe, round_: cs.Round) -> Order:
    """The order of the round's prompts. Raises `ConfigError` if every prompt is held back."""
    train = recipe.train
    return Order(
        round_.n_prompts,
        round_.manifest.prompts_per_block,
        train.prompts_per_step,
        train.shuffle_window_blocks,
        train.seed,
        n_held_back(recipe),
    )


def n_held_back(recipe: Recipe) -> int:
    """How many prompts at the round's end are measured on instead of trained on."""
    return recipe.train.heldout_prompts if recipe.train.heldout_metric == "reverse_kl" else 0
