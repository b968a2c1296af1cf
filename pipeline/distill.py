"""Rounds of rollouts, scores and training, each begun by the student that the round before made.

    redpen distill RECIPE --cache URL --run DIR
    torchrun --nproc-per-node 8 -m pipeline -- distill RECIPE --cache URL --run DIR

Round r samples the next `prompts.limit` prompts of the file from student r (student 0 is the recipe's) into round r
of the cache; everyone scores them, which measures the reverse KL of *fresh* rollouts; training on them, in
DIR/rounds/r, makes student r + 1. A round's training ends by the rules of `redpen train`: where its reverse KL
says that the round is used up, or the drift gauge (`train.stale_ess`) that the student has left it, the next one
begins.

All ends when the fresh reverse KL is below `distill.stop_reverse_kl`, when a metric has had no new best for
`distill.patience` rounds, or after `distill.rounds`. The metric is `train.heldout_metric` where there is one, and its
best student is the result; else it is the fresh reverse KL. Every round measures that on prompts of its own, where a
few hard ones decide: "below" means by two standard errors, and the result is the last student that is within two of
the best.

What there is to do follows from what is on disk, so the same command continues after any kill.
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
from pipeline.rollouts import stage as rollouts
from pipeline.rounds.scored_block import marked_blocks
from pipeline.runs.directory import Result, RunDirectory, open_run
from pipeline.runs.files import METRICS, check, read_record, read_steps
from pipeline.score import stage as score
from pipeline.text.prompts import load_prompts
from pipeline.train import inputs, ledger
from pipeline.train import stage as train
from pipeline.train.stopping import badness

#: Tokens of a round over which its fresh reverse KL is measured; of a larger round evenly spaced blocks are read.
MEASURED_TOKENS = 4_000_000
#: Standard errors by which two measurements must differ before one student counts as worse than the other.
NOISE = 2.0


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error."""

    value: float
    error: float = 0.0

    def is_worse(self, other: Estimate) -> bool:
        """Whether it is larger by more than their noise."""
        return self.value - other.value > NOISE * math.hypot(self.error, other.error)


@dataclass(frozen=True)
class Round:
    """What a round has found.

    Attributes:
        reverse_kl: of the student that began it, on its fresh rollouts, nats a token; None where it learns from
            rewards alone.
        heldout: `train.heldout_metric` of the student that it made, where both are there.
        steps: that made it; None while it is not made.
    """

    reverse_kl: Estimate | None
    heldout: float | None = None
    steps: int | None = None


def run(recipe: Recipe, cache_url: str, run_dir: str | os.PathLike[str]) -> int:
    """Go through the rounds, from wherever an earlier call left off; the exit code 0.

    Under torchrun every rank calls this.

    Raises:
        RedpenError, CacheError: what the stages raise, or the run was started with other settings, or is held by
            another process.
    """
    with contextlib.ExitStack() as held, join_ranks() as ranks:
        run, result, n_slices = ranks.broadcast(lambda: _open(held, recipe, cache_url, run_dir))
        rounds: list[Round] = []
        taught = recipe.reward.teacher_weight > 0
        while result is None:
            index = len(rounds)
            now, directory = _of_round(recipe, run, index, n_slices), _directory(run, index)
            if ranks.broadcast(functools.partial(_has_to_train, directory)):
                if ranks.is_main_process:
                    say(f"round {index} of {recipe.distill.rounds} at most")
                _stage(rollouts.run, now, cache_url, index)
                _stage(score.run, now, cache_url, None if taught else cs.STUDENT, index)
            found = Round(
                ranks.broadcast(functools.partial(fresh_reverse_kl, now, cache_url, index)) if taught else None
            )
            if (result := verdict(recipe, [*rounds, found])) is None:
                carried = index > 0 and recipe.distill.carry == "adapter+optimizer"
                start = _directory(run, index - 1) / "checkpoints" if carried else None
                _stage(train.run, now, cache_url, directory, index, start=start)
                found = ranks.broadcast(functools.partial(_trained, found, recipe, directory))
                result = verdict(recipe, [*rounds, found])
            rounds.append(found)
            if result is not None and ranks.is_main_process:
                _finish(run, recipe, cache_url, rounds, result)
        if ranks.is_main_process:
            show(f"{run.path}: {result.sentence}")
    return 0


def verdict(recipe: Recipe, rounds: Sequence[Round]) -> Result | None:
    """Whether, and how, all ends after these rounds, the last of which may not have trained yet.

    The result's `step` is the number of the student that is kept: as many rounds have made it.
    """
    distill, last = recipe.distill, rounds[-1]
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
        by_student = {index: found.reverse_kl for index, found in enumerate(rounds) if found.reverse_kl is not None}
        named = "reverse KL on fresh rollouts"
    else:
        student = len(rounds)
        by_student = {
            index: Estimate(badness(recipe.train, found.heldout))
            for index, found in enumerate(rounds, 1)
            if found.heldout is not None
        }
        named = f"held-out {(recipe.train.heldout_metric or '').replace('_kl', ' KL')}"
    best = min(by_student, key=lambda index: (by_student[index].value, index), default=student)
    as_good = [index for index, found in by_student.items() if index >= best and not found.is_worse(by_student[best])]
    kept = max(as_good, default=student) if last.steps is None else best
    told = ""
    if kept < student:
        told = f"; the result is the student {f'of round {kept - 1}' if kept else 'as it was'}"
    if student - best >= distill.patience:
        return Result(
            kept, f"plateau after {_rounds(student)}: no better {named} in the last {student - best}{told}", 0
        )
    if student == distill.rounds:
        return Result(kept, f"max rounds: {_rounds(student)} done{told}", 0)
    return None


def fresh_reverse_kl(recipe: Recipe, cache_url: str, index: int) -> Estimate:
    """Of the student that sampled a round, nats a token: of each prompt to the teacher that it has, or, where
    several are mixed, the weighted mean to each, which the divergence from their mixture does not exceed. The
    standard error is over prompts (that of a ratio of sums), since rollouts of one prompt fail together."""
    round_ = cs.open(cache_url).round(index)
    teachers = inputs.teachers(recipe, round_, inputs.teacher_names(recipe, round_, cache_url))
    weights = dict(zip(teachers.scores, teachers.weights, strict=False)) if teachers.mixed else {}
    kl_P, tokens_P = np.zeros(round_.n_prompts), np.zeros(round_.n_prompts)
    for marked in marked_blocks(round_, list(teachers.scores), at_most_tokens=MEASURED_TOKENS):
        for name in marked.teachers:
            chosen, weight = marked.counts(name), weights.get(name, 1.0)
            prompt_T = marked.rollouts.token_prompts
            if name in teachers.taught:
                chosen &= teachers.taught[name][prompt_T]
            np.add.at(kl_P, prompt_T[chosen], weight * marked.reverse_kl[name][chosen])
            np.add.at(tokens_P, prompt_T[chosen], weight)
    mean = float(kl_P.sum() / tokens_P.sum())
    return Estimate(mean, float(np.linalg.norm(kl_P - mean * tokens_P) / tokens_P.sum()))


def _stage(stage: Callable[..., int], *args: Any, **kwargs: Any) -> None:
    """Run one; what it had in memory is then free for the next."""
    with without_suggestions():
        stage(*args, **kwargs)
    models.free_memory()


def _open(
    held: contextlib.ExitStack, recipe: Recipe, cache_url: str, run_dir: str | os.PathLike[str]
) -> tuple[RunDirectory, Result | None, int]:
    """The run, locked until `held` closes; how it ended, if it has; how often `prompts.limit` goes into the file."""
    limit, n_slices = recipe.prompts.limit, 1
    if limit is not None:
        everything = load_prompts(recipe.prompts.model_copy(update={"limit": None}))
        n_slices = max(1, len(everything) // limit)
    run = held.enter_context(open_run(run_dir, recipe, {"url": cache_url, "teacher": recipe.train.teacher}))
    if run.result is not None and load_stored_recipe(run.recipe).distill == recipe.distill:
        return run, run.result, n_slices
    run.start()
    return run, None, n_slices


def _has_to_train(directory: Path) -> bool:
    """Whether a round's training has not ended: then its rollouts and scores are brought up to date first."""
    record = read_record(directory)
    return record is None or record.result is None


def _directory(run: RunDirectory, index: int) -> Path:
    return run.path / "rounds" / f"{index:05d}"


def _of_round(recipe: Recipe, run: RunDirectory, index: int, n_slices: int) -> Recipe:
    """The recipe of one round: its share of the prompts, and the student of the round before."""
    prompts, student = recipe.prompts, recipe.student
    rate = recipe.train.learning_rate * recipe.distill.learning_rate_decay**index
    slower = recipe.train.model_copy(update={"learning_rate": rate})
    prompts = prompts.model_copy(update={"skip": prompts.skip + index % n_slices * (prompts.limit or 0)})
    if index:
        made = models.made_student(student, _directory(run, index - 1))
        assert made is not None, "the round before has ended, and its training puts back what was removed"
        student = made
    return recipe.model_copy(update={"prompts": prompts, "student": student, "train": slower})


def _trained(found: Round, recipe: Recipe, directory: Path) -> Round:
    """The round with what its run tells: how many steps it took, and the held-out metric of its result."""
    steps = list(read_steps(directory))
    measured = [step[key] for step in steps if (key := f"heldout_{recipe.train.heldout_metric}") in step]
    best = min(measured, key=functools.partial(badness, recipe.train), default=None)
    return replace(found, steps=len(steps), heldout=best)


def _finish(run: RunDirectory, recipe: Recipe, cache_url: str, rounds: Sequence[Round], result: Result) -> None:
    """Put together what the rounds made: the student that is kept, one curve, one ledger."""
    made = [_directory(run, index) for index, found in enumerate(rounds) if found.steps is not None]
    lines: list[str] = []
    costs = []
    for index, directory in enumerate(made):
        check(directory, METRICS)
        for line in read_steps(directory):
            lines.append(json.dumps({"round": index} | line | {"step": len(lines) + 1}) + "\n")
        costs.append(ledger.read(directory))
    if len(made) < len(rounds):  # the last was sampled and scored, and told that nothing is left to learn
        costs.append(ledger.stage_one(recipe, cs.open(cache_url).round(len(made))))
    with run.writing():
        write_atomically(run.metrics, "".join(lines))
        write_atomically(run.ledger, json.dumps(ledger.table(ledger.total(costs)), indent=1) + "\n")
        if result.step:
            source = made[result.step - 1]
            check(source, run.made.name)
            with atomic_directory(run.made) as partial:
                shutil.copytree(source / run.made.name, partial, dirs_exist_ok=True)
        elif run.made.exists():  # of an earlier result, when there were fewer rounds
            shutil.rmtree(run.made)
    run.finish(result)


def _rounds(count: int) -> str:
    return f"{count} round{'' if count == 1 else 's'}"
