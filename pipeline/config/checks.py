"""Rules that span settings, one function each: contradictions are refused, values known to work badly are warned of.

A rule takes the recipe and returns the problem in one line, or None.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from pipeline.config.messages import did_you_mean
from pipeline.config.schema import first_repeated
from pipeline.config.training import CLIPS, POLICY_GRADIENT, TrainConfig
from pipeline.config.unused import unused_settings

if TYPE_CHECKING:
    from pipeline.config.recipe import Recipe

Rule = Callable[["Recipe"], str | None]

_CONFLICTS: list[Rule] = []
_WARNINGS: list[Rule] = []


def find_conflict(recipe: Recipe) -> str | None:
    """The first contradiction between settings."""
    return next((problem for rule in _CONFLICTS if (problem := rule(recipe))), None)


def find_warnings(recipe: Recipe) -> list[str]:
    """One line for each setting that works but is known to work badly, or that has no effect."""
    return [line for rule in _WARNINGS if (line := rule(recipe))] + unused_settings(recipe)


def _conflict(rule: Rule) -> Rule:
    _CONFLICTS.append(rule)
    return rule


def _warning(rule: Rule) -> Rule:
    _WARNINGS.append(rule)
    return rule


# ---------------------------------------------------------------------------------------------------------- conflicts


@_conflict
def teacher_names_differ(recipe: Recipe) -> str | None:
    if repeated := first_repeated(recipe.teacher_names):
        return f"two teachers are named {repeated!r}; give each [[teacher]] a different name"
    return None


@_conflict
def policy_gradients_need_top_p_1(recipe: Recipe) -> str | None:
    if recipe.rollouts.top_p == 1 or not (recipe.has_rewards or recipe.train.loss == "importance_sampling"):
        return None
    what = "rewards" if recipe.has_rewards else 'train.loss = "importance_sampling"'
    other = "" if recipe.has_rewards else ' or train.loss = "reverse_kl"'
    return (
        f"rollouts.top_p must be 1 for {what}, got {recipe.rollouts.top_p}: tokens outside the nucleus have no "
        f"ratio; set it to 1{other}"
    )


@_conflict
def rewards_need_several_rollouts(recipe: Recipe) -> str | None:
    if recipe.has_rewards and recipe.rollouts.rollouts_per_prompt == 1:
        return (
            "reward.coefficient needs rollouts.rollouts_per_prompt of 2 or more, got 1: the advantage compares a "
            "prompt's rollouts"
        )
    return None


@_conflict
def rewards_need_sampling(recipe: Recipe) -> str | None:
    if recipe.has_rewards and recipe.rollouts.temperature == 0:
        return (
            "reward.coefficient needs rollouts.temperature above 0, got 0: all greedy rollouts of a prompt are the "
            "same, so their advantage is 0"
        )
    return None


@_conflict
def rewards_need_rollouts(recipe: Recipe) -> str | None:
    if recipe.has_rewards and recipe.train.loss == "cross_entropy":
        return 'reward.coefficient needs rollouts of the student, got train.loss = "cross_entropy"'
    return None


@_conflict
def rewards_alone_are_a_policy_gradient(recipe: Recipe) -> str | None:
    is_policy_gradient = recipe.has_rewards and recipe.train.loss == "importance_sampling"
    if recipe.reward.teacher_weight == 0 and not is_policy_gradient:
        return (
            'reward.teacher_weight = 0 needs reward.coefficient above 0 and train.loss = "importance_sampling", got '
            f'{recipe.reward.coefficient:g} and "{recipe.train.loss}": rewards alone are a policy gradient'
        )
    return None


@_conflict
def format_reward_needs_format(recipe: Recipe) -> str | None:
    if recipe.has_rewards and recipe.reward.verifier == "format" and recipe.eval.format is None:
        return 'reward.verifier = "format" needs eval.format: what a legal response is'
    return None


@_conflict
def importance_sampling_settings_need_it(recipe: Recipe) -> str | None:
    if recipe.train.loss == "importance_sampling" or recipe.has_rewards:
        return None
    defaults = TrainConfig()
    for name in POLICY_GRADIENT:
        if (value := getattr(recipe.train, name)) != getattr(defaults, name):
            return (
                f'train.{name} = {value!r} belongs to train.loss = "importance_sampling", got "{recipe.train.loss}", '
                "which does not use it"
            )
    return None


@_conflict
def a_constant_advantage_is_the_only_one(recipe: Recipe) -> str | None:
    if recipe.train.advantage == "constant" and recipe.has_rewards:
        return (
            'train.advantage = "constant" is a control without another signal, got reward.coefficient = '
            f'{recipe.reward.coefficient:g}; set that to 0, or train.advantage to "current"'
        )
    return None


@_conflict
def clips_need_a_divergence(recipe: Recipe) -> str | None:
    train = recipe.train
    for name in CLIPS:
        value = getattr(train, name)
        if value is not None and train.loss in ("importance_sampling", "cross_entropy"):
            return (
                f"train.{name} = {value:g} bounds reverse_kl, forward_kl, jsd and mixed_kl; train.loss = "
                f'"{train.loss}" does not use it (importance_sampling has train.advantage_clip)'
            )
    return None


@_conflict
def warmup_fits_in_training(recipe: Recipe) -> str | None:
    if recipe.train.warmup_steps > recipe.train.steps:
        return (
            f"train.warmup_steps = {recipe.train.warmup_steps} is more than train.steps = {recipe.train.steps}, so "
            "train.learning_rate would never be reached; lower it, or raise train.steps"
        )
    return None


@_conflict
def fsdp_excludes_low_bits(recipe: Recipe) -> str | None:
    low_bits = recipe.student.quantisation or recipe.train.optimizer
    if recipe.train.parallel == "fsdp" and low_bits != "adamw":
        return (
            f'train.parallel = "fsdp" with {low_bits} corrupts weights or memory without an error (bitsandbytes '
            '#1633, accelerate #3983); use "ddp", or neither nf4 nor adamw_8bit'
        )
    return None


@_conflict
def full_training_excludes_quantisation(recipe: Recipe) -> str | None:
    if recipe.train.method == "full" and recipe.student.quantisation:
        return (
            f'train.method = "full" cannot train weights in {recipe.student.quantisation}; set it to "lora", or '
            "remove student.quantisation"
        )
    return None


@_conflict
def heldout_reverse_kl_needs_a_teacher(recipe: Recipe) -> str | None:
    if recipe.train.heldout_metric == "reverse_kl" and not recipe.has_teacher:
        found = "reward.teacher_weight = 0" if recipe.has_rewards else 'train.advantage = "constant"'
        if recipe.train.loss == "cross_entropy":
            found = 'train.loss = "cross_entropy"'
        return f'train.heldout_metric = "reverse_kl" needs a teacher, got {found}; use "accuracy" or "format"'
    return None


@_conflict
def heldout_answers_need_prompts(recipe: Recipe) -> str | None:
    if recipe.train.heldout_metric in ("accuracy", "format") and recipe.eval.path is None:
        return f'train.heldout_metric = "{recipe.train.heldout_metric}" needs eval.path: held-out prompts'
    return None


@_conflict
def heldout_format_needs_format(recipe: Recipe) -> str | None:
    if recipe.train.heldout_metric == "format" and recipe.eval.format is None:
        return 'train.heldout_metric = "format" needs eval.format: what a legal response is'
    return None


@_conflict
def answer_format_needs_a_pattern(recipe: Recipe) -> str | None:
    settings = recipe.eval
    if settings.format == "answer" and settings.match in ("exact", "contains") and settings.answer_pattern is None:
        return (
            'eval.format = "answer" needs eval.answer_pattern, or eval.match = "number" or "math": without them the '
            "whole response is the answer, and every response is legal"
        )
    return None


@_conflict
def vllm_supports_the_temperature(recipe: Recipe) -> str | None:
    temperature = recipe.rollouts.temperature
    if recipe.rollouts.engine == "vllm" and temperature != 0 and not 0.01 <= temperature <= 2:
        return (
            'rollouts.temperature must be 0, or 0.01 to 2, for rollouts.engine = "vllm", got '
            f"{temperature:g}: vLLM refuses or replaces others"
        )
    return None


@_conflict
def quantised_models_are_resident(recipe: Recipe) -> str | None:
    for model in (recipe.student, *recipe.teacher):
        if model.quantisation and (placement := recipe.placement(model)) != "resident":
            name = "the student" if model is recipe.student else f"teacher {getattr(model, 'name', '')!r}"
            return (
                f'quantisation = "{model.quantisation}" of {name} needs placement "resident", got "{placement}"; set '
                'score.placement to "resident", and placement of a teacher that needs another'
            )
    return None


@_conflict
def spans_need_local_logits(recipe: Recipe) -> str | None:
    for teacher in recipe.teacher if recipe.score.alignment == "spans" else ():
        if (placement := recipe.placement(teacher)) in ("vllm", "server"):
            return (
                f'score.alignment = "spans" needs placement "resident" or "streamed" of {teacher.name!r}, got '
                f'"{placement}"'
            )
    return None


@_conflict
def round_limits_are_within_the_longest(recipe: Recipe) -> str | None:
    longest, limits = recipe.rollouts.max_response_tokens, recipe.distill.max_response_tokens
    if limits and limits[-1] > longest:
        return f"distill.max_response_tokens: expected at most {longest}, rollouts.max_response_tokens, got {limits}"
    return None


@_conflict
def prompts_have_no_prefix(recipe: Recipe) -> str | None:
    for teacher in recipe.teacher:
        if teacher.prompt is not None and teacher.prompt_prefix is not None:
            return (
                f"teacher {teacher.name!r}: expected either prompt or prompt_prefix, got both; write the prefix into "
                "prompt, before {{ prompt }}"
            )
    return None


@_conflict
def served_teachers_have_a_url(recipe: Recipe) -> str | None:
    for teacher in recipe.teacher:
        if recipe.placement(teacher) == "server" and teacher.url is None:
            return (
                f'placement "server" of teacher {teacher.name!r} needs teacher.url, the base URL of its API, e.g. '
                "http://localhost:8000/v1"
            )
    return None


@_conflict
def served_adapters_have_a_name(recipe: Recipe) -> str | None:
    for teacher in recipe.teacher:
        is_served = recipe.placement(teacher) == "server"
        if is_served and teacher.adapter is not None and teacher.served_name is None:
            return (
                f'placement "server" of teacher {teacher.name!r} with an adapter needs teacher.served_name, the '
                "server's name for the model with its adapter"
            )
    return None


@_conflict
def system_messages_need_a_template(recipe: Recipe) -> str | None:
    prompts = recipe.prompts
    if prompts.template == "none" and (prompts.system is not None or prompts.template_args):
        return 'prompts.system and prompts.template_args need a chat template, got prompts.template = "none"'
    return None


def _chosen_teachers(recipe: Recipe) -> list[str] | None:
    """Names in train.teacher; None if it is not set."""
    chosen = recipe.train.teacher
    return [chosen] if isinstance(chosen, str) else chosen


@_conflict
def chosen_teachers_differ(recipe: Recipe) -> str | None:
    chosen = _chosen_teachers(recipe)
    if recipe.has_teacher and chosen is not None and (not chosen or first_repeated(chosen)):
        return f"train.teacher: expected one name or a list of different ones, got {chosen}"
    return None


@_conflict
def chosen_teachers_are_routed_to(recipe: Recipe) -> str | None:
    chosen, routed_to = _chosen_teachers(recipe), sorted(set(recipe.train.route.values()))
    if recipe.has_teacher and routed_to and chosen is not None and sorted(chosen) != routed_to:
        return (
            f"train.teacher: expected the teachers of train.route, {', '.join(routed_to)}, or nothing, got "
            f"{', '.join(chosen)}"
        )
    return None


@_conflict
def mixtures_have_several_teachers(recipe: Recipe) -> str | None:
    train, chosen = recipe.train, _chosen_teachers(recipe)
    has_one = bool(train.route) or (chosen is not None and len(chosen) == 1)
    is_mixed = bool(train.teacher_weights) or train.mixture != TrainConfig().mixture
    if recipe.has_teacher and has_one and is_mixed:
        setting = "teacher_weights" if train.teacher_weights else "mixture"
        found = "train.route" if train.route or not chosen else f"the one teacher {chosen[0]!r}"
        return f"train.{setting}: needs several teachers for each prompt, got {found}; remove it"
    return None


@_conflict
def weights_are_of_the_chosen_teachers(recipe: Recipe) -> str | None:
    weights, chosen = recipe.train.teacher_weights, _chosen_teachers(recipe)
    if not recipe.has_teacher or not weights or chosen is None:
        return None
    for name in weights:
        if name not in chosen:
            return f"train.teacher_weights: {name!r} is not among the teachers {', '.join(chosen)}" + did_you_mean(
                name, chosen
            )
    if missing := [name for name in chosen if name not in weights]:
        return f"train.teacher_weights: expected a weight for every teacher, got none for {missing[0]!r}"
    if not any(weights.values()):
        return "train.teacher_weights: expected one above 0, got 0 for every teacher"
    return None


# ----------------------------------------------------------------------------------------------------------- warnings


@_warning
def another_sft_teacher(recipe: Recipe) -> str | None:
    wrote, names = recipe.student.sft_teacher, [teacher.model for teacher in recipe.teacher]
    if wrote is None or wrote in names:
        return None
    return (
        f"student.sft_teacher = {wrote!r}, and the teacher is {', '.join(names)}: a student fine-tuned on one "
        "model's answers gains less from another teacher (6.8 points less on AIME, arXiv:2604.13010); use that model"
    )


@_warning
def low_temperature(recipe: Recipe) -> str | None:
    if recipe.rollouts.temperature >= 1:
        return None
    effect = "training then only corrects tokens that the student was already confident of"
    if recipe.train.loss == "importance_sampling" and not recipe.train.behaviour_correction:
        effect = "under importance sampling the on-policy reverse KL then rises instead of falling"
        if not recipe.has_teacher:
            effect = "the policy gradient is then biased, unless train.behaviour_correction is true"
    return (
        f"rollouts.temperature = {recipe.rollouts.temperature:g}: rollouts miss most of the student's support; "
        f"{effect}; 1 is recommended"
    )


@_warning
def several_greedy_rollouts(recipe: Recipe) -> str | None:
    count = recipe.rollouts.rollouts_per_prompt
    if recipe.rollouts.temperature == 0 and count > 1:
        return (
            f"rollouts.rollouts_per_prompt = {count} at temperature 0: all rollouts of a prompt are the same; use 1, "
            "or a temperature of 1"
        )
    return None


@_warning
def nucleus_sampling(recipe: Recipe) -> str | None:
    if recipe.rollouts.top_p < 1:
        return (
            f"rollouts.top_p = {recipe.rollouts.top_p:g}: tokens outside the nucleus are never sampled, so never "
            "corrected; 1 is recommended"
        )
    return None


@_warning
def vllm_samples_unquantised(recipe: Recipe) -> str | None:
    if recipe.student.quantisation and recipe.rollouts.engine == "vllm":
        return (
            f'student.quantisation = "{recipe.student.quantisation}": vLLM samples from the unquantised student; '
            "`redpen score` reports how far the two are apart"
        )
    return None


@_warning
def low_lora_learning_rate(recipe: Recipe) -> str | None:
    if recipe.train.method == "lora" and recipe.train.learning_rate < 1e-5:
        return (
            f"train.learning_rate = {recipe.train.learning_rate:g}: too low for LoRA with Adam to learn anything; "
            "about 1e-4 is recommended"
        )
    return None


@_warning
def low_lora_rank(recipe: Recipe) -> str | None:
    if recipe.train.method == "lora" and recipe.train.lora_rank < 32:
        return f"train.lora_rank = {recipe.train.lora_rank}: small ranks lose accuracy; 32 or more is recommended"
    return None


@_warning
def cached_advantage(recipe: Recipe) -> str | None:
    if recipe.train.advantage == "cached":
        return (
            'train.advantage = "cached": valid for one pass over the rollouts only (a second is refused); "current" '
            "allows several"
        )
    return None


@_warning
def one_candidate(recipe: Recipe) -> str | None:
    if recipe.train.loss == "reverse_kl" and recipe.score.candidates == 1:
        return (
            "score.candidates = 1: reverse_kl then compares the sampled token and the remaining mass only, without "
            "the tokens that the teacher prefers; 8 or more is recommended"
        )
    return None
