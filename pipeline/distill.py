"""Rounds of rollouts, scores and training, each with the student that the round before trained.

    redpen distill RECIPE --cache URL --run DIR
    torchrun --nproc-per-node 8 -m pipeline -- distill RECIPE --cache URL --run DIR

Round r samples the next `prompts.limit` prompts of the file with student r (student 0 is the recipe's) into round r
of the cache. Student and teachers score them, which measures the reverse KL on *fresh* rollouts; training on them, in
DIR/rounds/r, makes student r + 1. Training on a round ends by the rules of `redpen train`, also when its reverse KL
no longer falls or the student has drifted too far from the rollouts (`train.stale_ess`); then the next round begins.

The rounds end when the fresh reverse KL is below `distill.stop_reverse_kl`, when a metric has had no new best for
`distill.patience` rounds, or after `distill.rounds`. The metric is `train.heldout_metric` if it is set, and its best
student is the result; otherwise it is the fresh reverse KL. Each round measures that on its own prompts, of which a
few hard ones dominate: "below" means by two standard errors, and the result is the last student within two standard
errors of the best. If `distill.max_response_tokens` grows by round, the rounds do not end before its last limit, and
only rounds of that limit are compared.

What is left to do follows from what is on disk, so the same command continues after any kill.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import cache_schema as cs
from pipeline.config import Recipe, load_stored_recipe
from pipeline.console import say, show, without_suggestions
from pipeline.distributed.ranks import join_ranks
from pipeline.files import atomic_directory, write_atomically
from pipeline.models import load as models
from pipeline.models.identity import created_by
from pipeline.models.model_card import suggest_uses
from pipeline.rollouts import stage as rollouts
from pipeline.rounds.scored_block import scored_blocks
from pipeline.runs.directory import Result, RunDirectory, open_run
from pipeline.runs.files import CHECKPOINTS, METRICS, ROUNDS, check, is_run, read_record, read_steps
from pipeline.runs.trained_student import trained_student
from pipeline.score import stage as score
from pipeline.teachers.prompts import check_prompts
from pipeline.text.prompts import load_prompts
from pipeline.text.teacher_prompt import kept_columns
from pipeline.train import ledger
from pipeline.train import stage as train
from pipeline.train.stopping import heldout_loss
from pipeline.train.teachers import load_teachers, select_teachers

#: Tokens of a round over which its fresh reverse KL is measured; of a larger round evenly spaced blocks are read.
MEASURED_TOKENS = 4_000_000
#: Standard errors by which two measurements must differ before one student counts as worse than the other.
NOISE = 2.0


@dataclass(frozen=True)
class Measurement:
    """A mean with its standard error; lower is better."""

    value: float
    error: float = 0.0

    def is_worse(self, other: Measurement) -> bool:
        """Whether it is larger by more than their noise."""
        return self.value - other.value > NOISE * math.hypot(self.error, other.error)


@dataclass(frozen=True)
class RoundResult:
    """What is known of a round.

    Attributes:
        reverse_kl: on its fresh rollouts, by the student that sampled them, nats a token; None if it learns from
            rewards alone.
        heldout: `train.heldout_metric` of the student that it trained; None without a metric, or before training.
        steps: optimizer steps; None before training.
    """

    reverse_kl: Measurement | None
    heldout: float | None = None
    steps: int | None = None


def run(recipe: Recipe, cache_url: str, run_dir: str | os.PathLike[str]) -> int:
    """Run the rounds, from wherever an earlier call left off; returns exit code 0.

    Under torchrun every rank calls this.

    Raises:
        RedpenError, CacheError: what the stages raise, or the run was started with different settings, or another
            process has its lock.
    """
    with contextlib.ExitStack() as stack, join_ranks() as ranks:
        run, result, n_slices = ranks.broadcast(lambda: _open(stack, recipe, cache_url, run_dir))
        rounds: list[RoundResult] = []
        has_teachers = recipe.has_teacher
        while result is None:
            index = len(rounds)
            round_recipe, directory = _round_recipe(recipe, run, index, n_slices), _round_directory(run, index)
            if not ranks.broadcast(functools.partial(_has_ended, directory)):
                if ranks.is_main_process:
                    say(f"round {index} of {recipe.distill.rounds} at most")
                _run_stage(rollouts.run, round_recipe, cache_url, index)
                _run_stage(score.run, round_recipe, cache_url, None if has_teachers else cs.STUDENT, index)
            measure = functools.partial(fresh_reverse_kl, round_recipe, cache_url, index)
            current = RoundResult(ranks.broadcast(measure) if has_teachers else None)
            if (result := final_result(recipe, [*rounds, current])) is None:
                carried = index > 0 and recipe.distill.carry == "adapter+optimizer"
                start = _round_directory(run, index - 1) / CHECKPOINTS if carried else None
                _run_stage(train.run, round_recipe, cache_url, directory, index, start=start)
                current = ranks.broadcast(functools.partial(_after_training, current, recipe, directory))
                result = final_result(recipe, [*rounds, current])
            rounds.append(current)
            if result is not None and ranks.is_main_process:
                _finish(run, recipe, cache_url, rounds, result)
        if ranks.is_main_process:
            show(f"{run.path}: {result.sentence}")
            if result.step:
                show(f"{run.trained.name}: {run.trained}")
                suggest_uses(recipe, run)
    return 0


def check_settings(recipe: Recipe, cache_url: str) -> None:
    """Refuse what the first round would refuse before it loads a model. Raises as `run`."""
    cs.create(cache_url, created_by=created_by())
    rollouts.check_settings(recipe)


def final_result(recipe: Recipe, rounds: Sequence[RoundResult]) -> Result | None:
    """The result after these rounds, or None if another one follows; the last round may not have trained yet.

    The result's `step` is the number of the student that is kept: as many rounds have trained it.
    """
    distill, last = recipe.distill, rounds[-1]
    if len(rounds) < len(distill.max_response_tokens):
        return None  # longer responses are to come
    limits = [_response_limit(recipe, index) for index in range(len(rounds))]
    # shorter responses have another reverse KL
    alike = {index: each for index, each in enumerate(rounds) if limits[index] == limits[-1]}
    if last.steps is None:
        student = len(rounds) - 1
        if last.reverse_kl is None:
            return None
        fresh = last.reverse_kl
        if fresh.value + NOISE * fresh.error < distill.stop_reverse_kl:
            return Result(
                student,
                f"converged after {_rounds(student)}: reverse KL on fresh rollouts is {fresh.value:.5f} +- "
                f"{fresh.error:.5f} nats a token, below {distill.stop_reverse_kl:g}",
                0,
            )
        if recipe.train.heldout_metric is not None:
            return None
        metric = "reverse KL on fresh rollouts"
        by_student = {index: each.reverse_kl for index, each in alike.items() if each.reverse_kl is not None}
    else:
        student = len(rounds)
        metric = f"held-out {(recipe.train.heldout_metric or '').replace('_kl', ' KL')}"
        by_student = {
            index + 1: Measurement(heldout_loss(recipe.train, each.heldout))
            for index, each in alike.items()
            if each.heldout is not None
        }
    best = min(by_student, key=lambda index: (by_student[index].value, index), default=student)
    as_good = [index for index, each in by_student.items() if index >= best and not each.is_worse(by_student[best])]
    kept = max(as_good, default=student) if last.steps is None else best
    which = ""
    if kept < student:
        which = f"; the result is the student {f'of round {kept - 1}' if kept else 'of the recipe'}"
    if student - best >= distill.patience:
        sentence = f"plateau after {_rounds(student)}: no better {metric} in the last {student - best}{which}"
        return Result(kept, sentence, 0)
    if student == distill.rounds:
        return Result(kept, f"max rounds: {_rounds(student)} done{which}", 0)
    return None


def fresh_reverse_kl(recipe: Recipe, cache_url: str, index: int) -> Measurement:
    """Reverse KL of the student that sampled a round, nats a token, to the teacher of each prompt.

    With several mixed teachers it is the weighted mean to each, an upper bound of the divergence from their mixture.
    The standard error is over prompts (that of a ratio of sums), because rollouts of one prompt fail together.
    """
    round_ = cs.open(cache_url).round(index)
    teachers = load_teachers(recipe, round_, select_teachers(recipe, round_, cache_url))
    weights = dict(zip(teachers.scores, teachers.weights, strict=False)) if teachers.mixed else {}
    kl_P, tokens_P = np.zeros(round_.n_prompts), np.zeros(round_.n_prompts)
    for scored in scored_blocks(round_, list(teachers.scores), at_most_tokens=MEASURED_TOKENS):
        for name in scored.teachers:
            chosen, weight = scored.mask(name), weights.get(name, 1.0)
            prompt_T = scored.rollouts.token_prompts
            if name in teachers.taught:
                chosen &= teachers.taught[name][prompt_T]
            np.add.at(kl_P, prompt_T[chosen], weight * scored.reverse_kl[name][chosen])
            np.add.at(tokens_P, prompt_T[chosen], weight)
    mean = float(kl_P.sum() / tokens_P.sum())
    return Measurement(mean, float(np.linalg.norm(kl_P - mean * tokens_P) / tokens_P.sum()))


def _run_stage(stage: Callable[..., int], *args: Any, **kwargs: Any) -> None:
    """Run a stage, without its suggestion of what comes next, and free its memory."""
    with without_suggestions():
        stage(*args, **kwargs)
    models.free_memory()


def _open(
    stack: contextlib.ExitStack, recipe: Recipe, cache_url: str, run_dir: str | os.PathLike[str]
) -> tuple[RunDirectory, Result | None, int]:
    """The run, locked until `stack` closes; its result, if it has ended; how many slices of `prompts.limit` prompts
    the file has.
    """
    limit, n_slices = recipe.prompts.limit, 1
    if limit is not None:
        every = load_prompts(recipe.prompts.model_copy(update={"limit": None}), columns=kept_columns(recipe))
        n_slices = max(1, len(every) // limit)
        # better now than in the round that comes to the row
        check_prompts(recipe, every[: limit * min(n_slices, recipe.distill.rounds)], recipe.prompts.path)
    if not is_run(run_dir):  # if its cache is refused, nothing is left of it
        cs.create(cache_url, created_by=created_by())
    run = stack.enter_context(open_run(run_dir, recipe, {"url": cache_url, "teacher": recipe.train.teacher}))
    if run.result is not None and load_stored_recipe(run.recipe).distill == recipe.distill:
        return run, run.result, n_slices
    run.start()
    return run, None, n_slices


def _has_ended(directory: Path) -> bool:
    record = read_record(directory)
    return record is not None and record.result is not None


def _round_directory(run: RunDirectory, index: int) -> Path:
    return run.path / ROUNDS / f"{index:05d}"


def _round_recipe(recipe: Recipe, run: RunDirectory, index: int, n_slices: int) -> Recipe:
    """The recipe of one round: its slice of the prompts, its limits, the student of the round before."""
    prompts, student = recipe.prompts, recipe.student
    rate = recipe.train.learning_rate * recipe.distill.learning_rate_decay**index
    if index:
        trained = trained_student(student, _round_directory(run, index - 1))
        assert trained is not None, "the round before has ended, and its training writes removed files again"
        student = trained
    return recipe.model_copy(
        update={
            "prompts": prompts.model_copy(update={"skip": prompts.skip + index % n_slices * (prompts.limit or 0)}),
            "rollouts": recipe.rollouts.model_copy(update={"max_response_tokens": _response_limit(recipe, index)}),
            "distill": recipe.distill.model_copy(update={"max_response_tokens": []}),
            "student": student,
            "train": recipe.train.model_copy(update={"learning_rate": rate}),
        }
    )


def _response_limit(recipe: Recipe, index: int) -> int:
    """Tokens at which the responses of a round are cut."""
    by_round = recipe.distill.max_response_tokens
    return by_round[min(index, len(by_round) - 1)] if by_round else recipe.rollouts.max_response_tokens


def _after_training(current: RoundResult, recipe: Recipe, directory: Path) -> RoundResult:
    """The round with its number of steps and the held-out metric of the student that it keeps."""
    steps = list(read_steps(directory))
    measured = [step[key] for step in steps if (key := f"heldout_{recipe.train.heldout_metric}") in step]
    best = min(measured, key=functools.partial(heldout_loss, recipe.train), default=None)
    return replace(current, steps=len(steps), heldout=best)


def _finish(run: RunDirectory, recipe: Recipe, cache_url: str, rounds: Sequence[RoundResult], result: Result) -> None:
    """Write the run's files from those of its rounds: the student that is kept, one curve, one ledger."""
    directories = [_round_directory(run, index) for index, each in enumerate(rounds) if each.steps is not None]
    lines: list[str] = []
    costs = []
    for index, directory in enumerate(directories):
        check(directory, METRICS)
        for line in read_steps(directory):
            lines.append(json.dumps({"round": index} | line | {"step": len(lines) + 1}) + "\n")
        costs.append(ledger.read(directory))
    if len(directories) < len(rounds):  # the last round was sampled and scored only
        costs.append(ledger.stage_one(recipe, cs.open(cache_url).round(len(directories))))
    with run.writing():
        write_atomically(run.metrics, "".join(lines))
        write_atomically(run.ledger, json.dumps(ledger.table(ledger.total(costs)), indent=1) + "\n")
        if result.step:
            source = directories[result.step - 1]
            check(source, run.trained.name)
            with atomic_directory(run.trained) as partial:
                shutil.copytree(source / run.trained.name, partial, dirs_exist_ok=True)
        elif run.trained.exists():  # from an earlier result, after fewer rounds
            shutil.rmtree(run.trained)
    run.finish(result)


def _rounds(count: int) -> str:
    return f"{count} round{'' if count == 1 else 's'}"
