"""Rules between the recipe and the cache, checked before any weights are loaded: scores, sampling and the student."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

import cache_schema as cs
from pipeline.config import Recipe, RewardConfig
from pipeline.config.training import CLIPS
from pipeline.console import warn
from pipeline.errors import ConfigError, ModelError
from pipeline.models.identity import IMPORTED
from pipeline.models.resolve import resolve
from pipeline.rounds.scored_block import prompts_without_rollouts
from pipeline.train.build import make_objective, make_order, n_held_back
from pipeline.train.objective import DistillationObjective
from pipeline.train.teachers import Teachers

_OF_REWARD, _K2 = "a reward's policy gradient", "reverse_kl without candidates"


def check_committed(loss: str, round_: cs.Round, teachers: Sequence[str], cache_url: str) -> None:
    """Training needs every block of the rollouts, of the teachers' scores and of the student's; cross-entropy of the
    rollouts only. Raises `UncommittedError`."""
    scorers = () if loss == "cross_entropy" else (cs.STUDENT, *teachers)
    groups = {"rollouts": round_.rollouts} | {name: round_.scores(name) for name in scorers}
    for name, group in groups.items():
        done = int(group.committed().sum())
        if done < round_.n_blocks:
            what = "sampled" if name == "rollouts" else f"scored by {name!r}"
            command = "rollouts" if name == "rollouts" else "score"
            raise cs.UncommittedError(
                f"cache {cache_url} round {round_.index}: {done} of {round_.n_blocks} blocks are {what}; "
                f"run `redpen {command} RECIPE --cache {cache_url}` to complete it"
            )


def check_round(recipe: Recipe, round_: cs.Round) -> None:
    """What the loss requires of how this round was sampled. Raises `ConfigError`."""
    train, reward = recipe.train, recipe.reward
    check_steps(recipe, round_)
    check_single_pass(recipe, round_.n_prompts - n_held_back(recipe))
    if train.loss == "importance_sampling":
        check_sampling(recipe, round_, "importance_sampling")
    elif reward.coefficient:
        check_sampling(recipe, round_, _OF_REWARD)
    if reward.coefficient:
        check_groups(round_)
        check_answers(round_, reward)
    if train.behaviour_correction:
        check_behaviour(round_)


def check_steps(recipe: Recipe, round_: cs.Round) -> None:
    """Refuse steps of prompts that have no rollout at all, since their environment failed."""
    if "environment" not in round_.manifest.sampler_settings or not len(lost := prompts_without_rollouts(round_)):
        return
    order = make_order(recipe, round_)
    for step in range(recipe.train.steps):
        if np.isin(order.step(step), lost).all():
            raise ConfigError(
                f"train.prompts_per_step = {order.prompts_per_step}: {len(lost):,} of {round_.n_prompts:,} prompts "
                f"of round {round_.index} have no rollout, since their environment failed, and step {step + 1} would "
                "have no others; raise it"
            )


def check_single_pass(recipe: Recipe, n_prompts: int) -> None:
    """Refuse `train.advantage = "cached"` if training would use a round of `n_prompts` prompts more than once.

    In a second pass the advantage is no longer the student's: its optimum is all mass on the best rollout.
    """
    train, needed = recipe.train, recipe.train.steps * recipe.train.prompts_per_step
    if train.loss == "importance_sampling" and train.advantage == "cached" and needed > n_prompts:
        steps = max(n_prompts // train.prompts_per_step, 1)
        raise ConfigError(
            f'train.advantage = "cached" is right for one pass only: {train.steps} steps x '
            f"{train.prompts_per_step} prompts need {needed} prompts, the round holds {n_prompts}; "
            f'set train.steps to {steps} or train.advantage to "current"'
        )


def check_sampling(recipe: Recipe, round_: cs.Round, loss: str) -> None:
    """Importance ratios need tokens sampled from the whole distribution, preferably at temperature 1."""
    sampled, where = round_.manifest, f"round {round_.index} of the cache was sampled at"
    if sampled.top_p < 1:
        raise ConfigError(
            f"train.loss: {where} top_p {sampled.top_p:g}, and tokens outside the nucleus have no ratio, which "
            f'{loss} needs; set it to "reverse_kl" over candidates, or sample a round at top_p 1'
        )
    if sampled.temperature == 1 or recipe.train.behaviour_correction or recipe.rollouts.temperature < 1:
        return  # of the last the recipe has warned
    if sampled.temperature < 1 and recipe.has_teacher and loss != _OF_REWARD:
        effect = "raises the on-policy reverse KL"
    else:
        effect = "is biased" + (", unless train.behaviour_correction is true" if loss != _K2 else "")
    warn(f"{where} temperature {sampled.temperature:g}: {loss} then {effect}")


def check_behaviour(round_: cs.Round) -> None:
    """`train.behaviour_correction` divides by the probability that each token was sampled with."""
    if round_.manifest.temperature == 0:
        raise ConfigError(
            f"train.behaviour_correction: round {round_.index} of the cache was decoded greedily, which is no "
            "distribution over tokens; set it to false, or sample a round at a temperature"
        )
    if round_.manifest.engine != IMPORTED:
        return
    group, names = round_.rollouts, ["rollout_logprobs", "trained"]
    read = cs.read_ahead(lambda block: group.read_arrays(block, names), range(round_.n_blocks), [group])
    for block, found in enumerate(read):
        unknown = int((np.isnan(found["rollout_logprobs"]) & (found["trained"] == 1)).sum())
        if unknown:
            raise ConfigError(
                f"train.behaviour_correction: block {block} of the imported round {round_.index} has no "
                f"rollout_logprobs of {unknown} tokens; set it to false, or import the rollouts with them"
            )


def check_groups(round_: cs.Round) -> None:
    """A reward's advantage compares different rollouts of a prompt."""
    sampled, where = round_.manifest, f"reward.coefficient: round {round_.index} of the cache"
    if sampled.rollouts_per_prompt == 1:
        raise ConfigError(
            f"{where} has 1 rollout of each prompt, and an advantage compares several; sample a round with "
            "rollouts.rollouts_per_prompt of 2 or more, or set it to 0"
        )
    if sampled.temperature == 0:
        raise ConfigError(
            f"{where} was decoded greedily, so all rollouts of a prompt have the same reward; sample a round at a "
            "temperature, or set it to 0"
        )


def check_answers(round_: cs.Round, reward: RewardConfig) -> None:
    """Rewards for answers need prompts with answers."""
    if reward.verifier == "answer" and not any("answer" in round_.prompts[i] for i in range(round_.n_prompts)):
        raise ConfigError(
            f'reward.verifier = "answer": no prompt of round {round_.index} has an answer to compare with; give the '
            'prompts an `answer`, or set it to "format"'
        )


def check_teachers(recipe: Recipe, round_: cs.Round, names: Sequence[str]) -> None:
    """Every prompt needs a teacher, and a divergence over candidates needs the teachers' scores of them."""
    if not names:
        return
    objective = make_objective(recipe, round_, names)
    assert isinstance(objective, DistillationObjective)
    for name, taught_P in objective.teachers.taught.items():
        if not taught_P.any():
            warn(f"train.route: no prompt of round {round_.index} goes to {name!r}")
    if objective.teachers.only_sampled:
        check_sampled_token_only(recipe, round_, objective.teachers)
    elif objective.draws and recipe.train.loss != "importance_sampling":
        check_draws(recipe.train.loss, objective.teachers)
    if objective.teachers.only_sampled or objective.draws:
        check_unclipped(recipe, "no candidates" if objective.teachers.only_sampled else "drawn candidates")


def check_sampled_token_only(recipe: Recipe, round_: cs.Round, teachers: Teachers) -> None:
    """Scores without candidates leave `k2` in place of reverse KL, and rule out the other divergences."""
    loss = recipe.train.loss
    name, scores = next((name, scores) for name, scores in teachers.scores.items() if not scores.candidates)
    found = f"the scores by {name!r} hold no candidates (engine {scores.engine})"
    if loss not in ("reverse_kl", "importance_sampling"):
        raise ConfigError(
            f'train.loss = "{loss}": {found}; set it to "reverse_kl" or "importance_sampling", or let the '
            "teacher score the cache itself under another name"
        )
    if loss == "reverse_kl":
        check_sampling(recipe, round_, _K2)
        found += ", so reverse_kl is differentiated at the sampled token alone (k2)"
    warn(
        f"{found}; reverse KL is measured over the sampled token and everything else, a loose lower bound; set "
        "train.stop_reverse_kl = 0 to train through"
    )


def check_unclipped(recipe: Recipe, found: str) -> None:
    """The clips bound terms of a divergence over fixed candidates; a clipped estimate of one is something else."""
    for name in CLIPS:
        if (value := getattr(recipe.train, name)) is not None:
            raise ConfigError(
                f"train.{name} = {value:g} needs scores of the student's likeliest tokens, and this round has "
                f'{found}; leave it out, or score with score.candidate_kind = "topk"'
            )


def check_draws(loss: str, teachers: Teachers) -> None:
    """A mean over drawn candidates is unbiased only if every draw is scored, over the whole vocabulary."""
    unscored = (name for name, scores in teachers.scores.items() if scores.partial or not scores.candidates)
    if name := next(unscored, None):
        raise ConfigError(
            f'train.loss = "{loss}": the candidates were drawn from the student, and some have no score by {name!r}, '
            'which would bias the mean over draws; use score.candidate_kind = "topk", or train.loss = '
            '"importance_sampling"'
        )
    if teachers.mixed and teachers.mixture == "geometric":
        raise ConfigError(
            f'train.mixture = "geometric": the candidates were drawn from the student, and train.loss = "{loss}" '
            'over draws needs probabilities of the whole vocabulary; use "arithmetic"'
        )


def check_student(recipe: Recipe, round_: cs.Round, cache_url: str) -> None:
    """The student must be the one that sampled the rollouts, in the quantisation and preferably the dtype it was
    scored in. Raises `ModelError`."""
    cached, now = round_.manifest.student, resolve(recipe.student).identity
    differing = [
        f"student.{field} {getattr(cached, field)} ({cached.name}), the recipe's {getattr(now, field)} ({now.name})"
        for field in ("digest", "adapter_digest")
        if getattr(cached, field) != getattr(now, field)
    ]
    if differing:
        raise ModelError(
            f"cache {cache_url} round {round_.index} was sampled by a different student: it has "
            f"{'; '.join(differing)}; set student.model and student.adapter to that student, or sample a cache of "
            "this one"
        )
    if recipe.train.loss == "cross_entropy":
        return
    facts, scores = resolve(recipe.student), round_.scores(cs.STUDENT).manifest
    if scores.quantisation != facts.scored_quantisation:
        scored, trained = (
            "unquantised" if method is None else f"in {method}"
            for method in (scores.quantisation, facts.scored_quantisation)
        )
        raise ModelError(
            f"student.quantisation: the student was scored {scored} and would be trained {trained}, which is a "
            "different model; set it to what it was scored in, or score the rollouts again in another cache"
        )
    if scores.dtype != facts.dtype:
        warn(
            f"student.dtype: the student was scored in {scores.dtype} and is trained in {facts.dtype}; "
            "importance ratios then include the difference between the two roundings"
        )
