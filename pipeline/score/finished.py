"""Whether a round lacks no score, found without torch: by manifests that an earlier run made from the same files.

Also what `redpen score` prints of scores that are kept, and at its end.
"""

from __future__ import annotations

import cache_schema as cs
from pipeline.config import ModelConfig, Recipe, TeacherConfig
from pipeline.console import show, suggest, warn
from pipeline.environment import WORLD_SIZE
from pipeline.models.identity import IMPORTED
from pipeline.models.paths import is_available
from pipeline.rounds import known_manifests
from pipeline.text.teacher_prompt import TeacherPrompt


def report_finished(recipe: Recipe, cache_url: str, only: str | None = None, round_index: int | None = None) -> bool:
    """Say of each scorer that there is nothing to do, and return True; False if there is something, or it cannot be
    known here.

    Then `pipeline.score.stage` finds out, and refuses what does not fit. Raises `CacheLockedError`.
    """
    chosen = {name: cfg for name, cfg in scorers(recipe).items() if only in (None, name)}
    if WORLD_SIZE > 1 or not chosen:  # ranks decide together
        return False
    try:
        cache = cs.open(cache_url, writable=True)
        with cache.lock("redpen score"):
            round_ = cache.round(round_index)
            lines = [_line(recipe, round_, name, cfg) for name, cfg in chosen.items()]
            if None in lines:
                return False
            for line in lines:
                show(str(line))
            report_end(round_)
    except cs.CacheLockedError:
        raise
    except cs.CacheError:
        return False
    return True


def scorers(recipe: Recipe) -> dict[str, ModelConfig]:
    """Every model that scores, by name, the student first."""
    return {cs.STUDENT: recipe.student, **{teacher.name: teacher for teacher in recipe.teacher}}


def kept(round_: cs.Round, name: str, cfg: ModelConfig) -> str | None:
    """The line of finished scores that are kept without looking at the model; None if it has to be looked at."""
    if not round_.has_scores(name):
        return None
    group = round_.scores(name)
    if group.manifest.engine == IMPORTED:
        return f"{name}: imported scores are kept; to score by {cfg.model} too, give that teacher another name"
    if name != cs.STUDENT and _is_complete(group, cfg) and not is_available(cfg):
        # A cache is used long after its teacher was deleted; that must not download it again.
        return f"{nothing_to_do(round_, name)} ({cfg.model} is not on this machine)"
    return None


def nothing_to_do(round_: cs.Round, name: str) -> str:
    """The line of a scorer that has scored every block that it can, from the commits alone."""
    group = round_.scores(name)
    commits = round_.rollouts.commits()[group.committed()]
    return (
        f"{name}: {int(commits['tokens'].sum()):,} tokens of {int(commits['rows'].sum()):,} rollouts are scored by "
        f"{group.manifest.model.name}; nothing to do"
    )


def report_end(round_: cs.Round) -> None:
    """Say what to run next, or what is missing."""
    if n_missing := int((~round_.rollouts.committed()).sum()):
        warn(
            f"{n_missing} of {round_.n_blocks} blocks have no rollouts yet; "
            f"run `redpen rollouts RECIPE --cache {round_.cache.url}`, then `redpen score` again"
        )
    else:
        suggest(f"redpen diagnose {round_.cache.url}, then redpen train RECIPE --cache {round_.cache.url} --run DIR")


def _line(recipe: Recipe, round_: cs.Round, name: str, cfg: ModelConfig) -> str | None:
    """What to print of a scorer that has nothing to do; None of any other."""
    if (line := kept(round_, name, cfg)) is not None:
        return line
    sources = known_manifests.of_scores(recipe, round_.manifest, cfg)
    manifest = known_manifests.recall(sources, cs.ScoresManifest)
    if manifest is None or not round_.has_scores(name):
        return None
    group = round_.scores(name)
    done = group.committed()
    # While blocks wait for the student's scores, the stage warns of them.
    if group.manifest.differences(manifest) or not done.any() or (done != round_.rollouts.committed()).any():
        return None
    return nothing_to_do(round_, name)


def _is_complete(group: cs.BlockGroup[cs.ScoresManifest], cfg: ModelConfig) -> bool:
    """Whether every block is scored by a model of this name."""
    cached = group.manifest.model
    same = cached.name == cfg.model and cfg.revision in (None, cached.revision)
    same &= (cached.adapter_digest is None) == (cfg.adapter is None)
    same &= cfg.quantisation in (None, group.manifest.quantisation)
    if isinstance(cfg, TeacherConfig):
        same &= TeacherPrompt.of(cfg) == TeacherPrompt.of_scores(group.manifest.template)
    same &= group.manifest.engine == "server" or cfg.dtype in ("auto", group.manifest.dtype)
    return same and bool(group.committed().all())
