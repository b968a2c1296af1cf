"""Whether a round lacks nothing, found without torch: by a manifest that an earlier run made from the same files."""

from __future__ import annotations

import cache_schema as cs
from pipeline.config import Recipe
from pipeline.console import show
from pipeline.environment import WORLD_SIZE
from pipeline.rounds import known_manifests


def report_finished(recipe: Recipe, cache_url: str, round_index: int | None = None) -> bool:
    """Say that there is nothing to do, and return True; False if there is something, or it cannot be known here.

    Then `pipeline.rollouts.stage` finds out, and refuses what does not fit. Raises `CacheLockedError`.
    """
    if WORLD_SIZE > 1:  # ranks decide together
        return False
    manifest = known_manifests.recall(known_manifests.of_round(recipe), cs.RoundManifest)
    if manifest is None:
        return False
    try:
        cache = cs.open(cache_url, writable=True)
        with cache.lock("redpen rollouts"):
            round_ = cache.round(round_index)
            if round_.manifest.differences(manifest) or not round_.rollouts.committed().all():
                return False
            show(nothing_to_do(round_))
    except cs.CacheLockedError:
        raise
    except cs.CacheError:
        return False
    return True


def nothing_to_do(round_: cs.Round) -> str:
    """The line of a round whose blocks are all committed, from its commits alone."""
    commits = round_.rollouts.commits()
    n_rows, n_tokens = int(commits["rows"].sum()), int(commits["tokens"].sum())
    missing = n_left_out(round_, n_rows)
    return (
        f"rollouts: {round_.n_prompts:,} prompts x {round_.manifest.rollouts_per_prompt} in {round_.cache.url} "
        f"round {round_.index}, {n_tokens:,} tokens, mean length {n_tokens / n_rows:.1f}"
        + (f", {missing:,} rollouts left out" if missing else "")
        + "; nothing to do"
    )


def n_left_out(round_: cs.Round, n_rows: int) -> int:
    """Rollouts that a finished round of `n_rows` lacks, since their environment failed."""
    return round_.n_prompts * round_.manifest.rollouts_per_prompt - n_rows
