"""Settings that were changed although another setting switches them off.

A contradiction is an error (`pipeline.config.checks`). An unused setting is only warned of, as a recipe may serve
several runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pipeline.config.messages import show_value

if TYPE_CHECKING:
    from pipeline.config.recipe import Recipe


def unused_settings(recipe: Recipe) -> list[str]:
    """One line for each setting that was changed from its default and that another setting switches off."""
    found: dict[str, str] = {}
    for names, is_used, reason in _uses(recipe):
        for name in () if is_used else names:
            section, key = name.split(".")
            settings = getattr(recipe, section)
            value, default = getattr(settings, key), type(settings).model_fields[key]
            if value != default.get_default(call_default_factory=True):
                found.setdefault(name, f"{name} = {show_value(value)} has no effect: {reason}")
    return list(found.values())


def _uses(recipe: Recipe) -> Iterator[tuple[Sequence[str], bool, str]]:
    """Settings, whether they are used, and why not."""
    rollouts, score, train, distill = recipe.rollouts, recipe.score, recipe.train, recipe.distill
    has_rewards, has_teacher = recipe.has_rewards, recipe.has_teacher
    is_sft = train.loss == "cross_entropy"

    yield ["rollouts.top_p"], rollouts.temperature > 0, "rollouts.temperature is 0, which is greedy"
    format_check = ["rollouts.format_check_prompts", "rollouts.format_check_min"]
    yield format_check, recipe.eval.format is not None, "eval.format is not set"
    no_check = "rollouts.format_check_prompts is 0"
    yield ["rollouts.format_check_min"], rollouts.format_check_prompts > 0, no_check
    of_environment = ["rollouts.max_turns", "rollouts.environment_timeout", "rollouts.environment_workers"]
    yield of_environment, rollouts.environment is not None, "rollouts.environment is not set"
    asked = "rollouts.max_turns is 1, so nothing follows the student's turn"
    yield ["rollouts.environment", *of_environment[1:]], rollouts.max_turns > 1, asked
    yield ["score.candidate_kind"], score.candidates > 1, "score.candidates is 1, the sampled token alone"

    yield ["train.jsd_beta"], train.loss == "jsd", f'train.loss is "{train.loss}", not "jsd"'
    yield ["train.forward_weight"], train.loss == "mixed_kl", f'train.loss is "{train.loss}", not "mixed_kl"'
    teacher_advantage = has_teacher and train.loss == "importance_sampling"
    needs_it = "it needs importance sampling with a teacher's scores"
    is_constant = train.advantage == "constant"
    yield ["train.advantage"], teacher_advantage or is_constant, needs_it
    yield ["train.advantage_clip"], teacher_advantage, needs_it
    yield ["train.constant_below"], is_constant, f'train.advantage is "{train.advantage}", not "constant"'
    no_teacher = "training uses no teacher"
    yield ["train.teacher", "train.mixture", "train.teacher_weights", "train.route"], has_teacher, no_teacher
    if train.stop_reverse_kl > 0:
        yield ["train.stop_reverse_kl"], has_teacher, no_teacher
    if distill.stop_reverse_kl > 0:
        yield ["distill.stop_reverse_kl"], has_teacher, no_teacher
    yield ["train.stale_ess"], not is_sft, f'train.loss is "{train.loss}"'
    may_stop = (has_teacher and train.stop_reverse_kl > 0) or train.stale_ess > 0
    yield ["train.stop_window"], may_stop, "train.stop_reverse_kl and train.stale_ess are 0 or unused"
    stops = ["train.stop_window", "train.stale_ess", *(["train.stop_reverse_kl"] if train.stop_reverse_kl else [])]
    too_few = f"train.stop_window is {train.stop_window} steps, and train.steps is {train.steps}"
    yield stops, train.stop_window <= train.steps, too_few
    heldout = ["train.heldout_every", "train.heldout_prompts", "train.heldout_patience"]
    yield heldout, train.heldout_metric is not None, "train.heldout_metric is not set"
    is_scheduled = train.schedule == "constant" or train.warmup_steps < train.steps
    yield ["train.schedule"], is_scheduled, "train.warmup_steps is all of train.steps"

    no_rewards = "reward.coefficient is 0"
    yield ["reward.verifier", "reward.normalise"], has_rewards, no_rewards
    yield ["reward.teacher_weight"], has_rewards or is_sft, f"{no_rewards}, so there is nothing to weigh it against"

    if (first := recipe.select.first_tokens) is not None:
        longest = rollouts.max_response_tokens
        yield ["select.first_tokens"], first < longest, f"rollouts.max_response_tokens is {longest}"

    several = ["distill.learning_rate_decay", "distill.carry", "distill.patience"]
    yield several, distill.rounds > 1, "distill.rounds is 1"
    yield ["distill.patience"], distill.patience <= distill.rounds, f"distill.rounds is {distill.rounds}"
    is_measured = has_teacher or train.heldout_metric is not None
    yield ["distill.patience"], is_measured, f"{no_teacher}, and train.heldout_metric is not set"
