"""Settings that a recipe changes and that then do nothing, because another setting switches them off.

What contradicts itself is refused (`pipeline.config`). This is about what is merely without effect, which may well be
so on purpose, in a recipe that serves several runs: it is said and goes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipeline.config.messages import show_value

if TYPE_CHECKING:
    from pipeline.config.recipe import Recipe

#: Settings, whether they do something, and what has to be so for that.
Rule = tuple[tuple[str, ...], bool, str]


def idle_settings(recipe: Recipe) -> list[str]:
    """One line for each setting that is not at its default and has no effect."""
    found: dict[str, str] = {}
    for names, is_used, needed in _rules(recipe):
        for name in names:
            section, key = name.split(".")
            settings = getattr(recipe, section)
            value, default = getattr(settings, key), type(settings).model_fields[key]
            if not is_used and value != default.get_default(call_default_factory=True):
                found.setdefault(name, f"{name} = {show_value(value)} does nothing: {needed}")
    return list(found.values())


def _rules(recipe: Recipe) -> Iterator[Rule]:
    rollouts, score, train, reward, distill = (
        recipe.rollouts,
        recipe.score,
        recipe.train,
        recipe.reward,
        recipe.distill,
    )
    rewarded, has_scores = reward.coefficient > 0, train.loss != "cross_entropy"
    taught = has_scores and reward.teacher_weight > 0
    by_sampled_token = taught and train.loss == "importance_sampling"

    yield ("rollouts.top_p",), rollouts.temperature > 0, "rollouts.temperature is 0, which is greedy"
    yield (
        ("rollouts.format_check_prompts", "rollouts.format_check_min"),
        recipe.eval.format is not None,
        "eval.format is not set",
    )
    yield ("rollouts.format_check_min",), rollouts.format_check_prompts > 0, "rollouts.format_check_prompts is 0"
    yield ("score.candidate_kind",), score.candidates > 1, "score.candidates is 1, the sampled token alone"

    yield ("train.jsd_beta",), train.loss == "jsd", f'train.loss is "{train.loss}", not "jsd"'
    yield ("train.forward_weight",), train.loss == "mixed_kl", f'train.loss is "{train.loss}", not "mixed_kl"'
    of_teacher = ("train.advantage", "train.advantage_clip")
    yield of_teacher, by_sampled_token, "it belongs to importance sampling of a teacher's scores"
    no_teacher = "no teacher is learnt from"
    yield ("train.teacher", "train.mixture", "train.teacher_weights", "train.route"), taught, no_teacher
    if train.stop_reverse_kl > 0:
        yield ("train.stop_reverse_kl",), taught, no_teacher
    if distill.stop_reverse_kl > 0:
        yield ("distill.stop_reverse_kl",), taught, no_teacher
    yield ("train.stale_ess",), has_scores, f'train.loss is "{train.loss}"'
    is_stopped = (taught and train.stop_reverse_kl > 0) or train.stale_ess > 0
    yield ("train.stop_window",), is_stopped, "neither train.stop_reverse_kl nor train.stale_ess ends training"
    stops = ("train.stop_window", "train.stale_ess", *(["train.stop_reverse_kl"] if train.stop_reverse_kl else []))
    too_few = f"train.stop_window is {train.stop_window} steps, and train.steps is {train.steps}"
    yield stops, train.stop_window <= train.steps, too_few
    watching = ("train.heldout_every", "train.heldout_prompts", "train.heldout_patience")
    yield watching, train.heldout_metric is not None, "train.heldout_metric is not set"
    is_scheduled = train.schedule == "constant" or train.warmup_steps < train.steps
    yield ("train.schedule",), is_scheduled, "train.warmup_steps takes all of train.steps"

    yield ("reward.verifier", "reward.normalise"), rewarded, "reward.coefficient is 0"
    is_weighed = rewarded or train.loss == "cross_entropy"
    yield ("reward.teacher_weight",), is_weighed, "reward.coefficient is 0, so there is nothing to weigh it against"

    if recipe.select.first_tokens is not None:
        longest = rollouts.max_response_tokens
        is_cut = recipe.select.first_tokens < longest
        yield ("select.first_tokens",), is_cut, f"rollouts.max_response_tokens is {longest}"

    several = ("distill.learning_rate_decay", "distill.carry", "distill.patience")
    yield several, distill.rounds > 1, "distill.rounds is 1"
    yield ("distill.patience",), distill.patience <= distill.rounds, f"distill.rounds is {distill.rounds}"
    is_measured = taught or train.heldout_metric is not None
    yield ("distill.patience",), is_measured, f"{no_teacher}, and train.heldout_metric is not set"
