"""What must fit together before anything is loaded: the round, its scores, the student and the recipe."""

from __future__ import annotations

import cache_schema as cs
from pipeline import models
from pipeline.config import Recipe
from pipeline.console import warn
from pipeline.errors import ConfigError, ModelError


def teacher_name(recipe: Recipe, round_: cs.Round, cache_url: str) -> str:
    """The scores to learn from: `train.teacher`, or the only ones there are."""
    scored, wanted = round_.teacher_names(), recipe.train.teacher
    where = f"cache {cache_url} round {round_.index}"
    if cs.STUDENT not in round_.scorer_names() or not scored:
        raise cs.CacheError(f"{where}: not scored yet; run `redpen score RECIPE --cache {cache_url}`")
    if wanted is None and len(scored) > 1:
        raise ConfigError(f"train.teacher: {where} is scored by {', '.join(scored)}; say which one to learn from")
    if wanted is not None and wanted not in scored:
        raise ConfigError(
            f"train.teacher = {wanted!r}: {where} is scored by {', '.join(scored)}; "
            f"run `redpen score RECIPE --cache {cache_url} --only {wanted}`"
        )
    return wanted or scored[0]


def check_scored(round_: cs.Round, teacher: str, cache_url: str) -> None:
    """Training needs every block of the rollouts, the student's scores and the teacher's."""
    groups = {"rollouts": round_.rollouts, "student": round_.scores(cs.STUDENT), teacher: round_.scores(teacher)}
    for name, group in groups.items():
        done = int(group.committed().sum())
        if done < round_.n_blocks:
            what = "sampled" if name == "rollouts" else f"scored by {name!r}"
            command = "rollouts" if name == "rollouts" else "score"
            raise cs.UncommittedError(
                f"cache {cache_url} round {round_.index}: {done} of {round_.n_blocks} blocks are {what}; "
                f"`redpen {command} RECIPE --cache {cache_url}` does the rest"
            )


def check_candidates(recipe: Recipe, scores: cs.ScoresManifest, teacher: str) -> None:
    """A teacher that told of the sampled token alone allows no divergence over candidates."""
    if scores.candidates or scores.topk:
        return
    if recipe.train.loss == "reverse_kl":
        raise ConfigError(
            f'train.loss = "reverse_kl": the scores by {teacher!r} hold no candidates (engine {scores.engine}); '
            'set it to "importance_sampling", or let the teacher score the cache itself under another name'
        )
    warn(
        f"the scores by {teacher!r} hold no candidates: reverse KL is measured over the sampled token and everything "
        "else, a low bound; set train.stop_reverse_kl = 0 to train through"
    )


def check_replay(recipe: Recipe, round_: cs.Round, cache_url: str) -> None:
    """What the loss needs of how this round was sampled, whatever the recipe says of sampling."""
    recipe.check_single_use(round_.n_prompts)
    sampled = round_.manifest
    if recipe.train.loss != "importance_sampling":
        return
    where = f"cache {cache_url} round {round_.index} was sampled at"
    if sampled.top_p < 1:
        raise ConfigError(
            f'train.loss = "importance_sampling": {where} top_p {sampled.top_p:g}, and tokens outside the nucleus '
            'have no ratio; set it to "reverse_kl", or sample a round at top_p 1'
        )
    if sampled.temperature != 1 and recipe.rollouts.temperature == 1:  # else the recipe has warned already
        warn(f"{where} temperature {sampled.temperature:g}: importance sampling then raises the on-policy reverse KL")


def check_student(recipe: Recipe, round_: cs.Round, cache_url: str) -> None:
    """The student must be the one that sampled the rollouts, and should be read in the type it was scored in."""
    cached, now = round_.manifest.student, models.model_identity(recipe.student)
    differing = [
        f"student.{field} {getattr(cached, field)} ({cached.name}), the recipe's {getattr(now, field)} ({now.name})"
        for field in ("digest", "adapter_digest")
        if getattr(cached, field) != getattr(now, field)
    ]
    if differing:
        raise ModelError(
            f"cache {cache_url} round {round_.index} is another student's: it has {'; '.join(differing)}; "
            "set student.model and student.adapter to that student, or sample a cache of this one"
        )
    scored, dtype = round_.scores(cs.STUDENT).manifest.dtype, models.model_facts(recipe.student).dtype
    if scored != dtype:
        warn(
            f"student.dtype: the student was scored in {scored} and is trained in {dtype}; "
            "importance ratios then also hold the difference of their roundings"
        )
