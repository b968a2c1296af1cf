"""Rules that span settings: each contradiction is refused and each doubtful or unused setting named, in one line."""

from __future__ import annotations

import pytest

from pipeline.config import Recipe, checks, load_recipe, recipe_names
from pipeline.errors import ConfigError
from pipeline.train.checks import check_single_pass

TWO = {
    "student": {"model": "a"},
    "teacher": [{"model": "b", "name": "big"}, {"model": "c", "name": "code"}],
    "prompts": {"path": "p.jsonl"},
}
SAMPLED = 'train.loss="importance_sampling"'
REWARDS = ("reward.coefficient=1", SAMPLED)

#: What each rule refuses, and the setting that its message names.
CONFLICTS: dict[str, list[tuple[list[str], str]]] = {
    "teacher_names_differ": [(["teacher.big.name=code"], "two teachers are named 'code'")],
    "policy_gradients_need_top_p_1": [
        ([SAMPLED, "rollouts.top_p=0.9"], "rollouts.top_p must be 1"),
        (["reward.coefficient=1", "rollouts.top_p=0.9"], "rollouts.top_p must be 1 for rewards"),
    ],
    "rewards_need_several_rollouts": [([*REWARDS, "rollouts.rollouts_per_prompt=1"], "rollouts_per_prompt")],
    "rewards_need_sampling": [([*REWARDS, "rollouts.temperature=0"], "rollouts.temperature")],
    "rewards_need_rollouts": [(["reward.coefficient=1", "train.loss=cross_entropy"], "train.loss")],
    "rewards_alone_are_a_policy_gradient": [
        (["reward.teacher_weight=0"], "reward.coefficient"),
        (["reward.teacher_weight=0", "reward.coefficient=1"], "train.loss"),
    ],
    "format_reward_needs_format": [([*REWARDS, "reward.verifier=format"], "eval.format")],
    "importance_sampling_settings_need_it": [
        (["train.advantage=cached"], "train.advantage"),
        (["train.advantage=constant", "train.loss=forward_kl"], "train.advantage"),
        (["train.ppo_clip=0.2"], "train.ppo_clip"),
    ],
    "a_constant_advantage_is_the_only_one": [([*REWARDS, "train.advantage=constant"], "reward.coefficient = 1")],
    "clips_need_a_divergence": [
        (["train.loss=importance_sampling", f"train.{name}=0.05"], f"train.{name} = 0.05")
        for name in ("entry_clip", "token_clip")
    ],
    "warmup_fits_in_training": [(["train.steps=9", "train.warmup_steps=10"], "train.warmup_steps = 10")],
    "fsdp_excludes_low_bits": [
        (["train.parallel=fsdp", "train.optimizer=adamw_8bit"], "adamw_8bit"),
        (["train.parallel=fsdp", "student.quantisation=nf4"], "nf4"),
    ],
    "full_training_excludes_quantisation": [(["train.method=full", "student.quantisation=nf4"], "train.method")],
    "heldout_reverse_kl_needs_a_teacher": [
        (["train.heldout_metric=reverse_kl", "train.loss=cross_entropy"], "train.loss"),
        ([*REWARDS, "train.heldout_metric=reverse_kl", "reward.teacher_weight=0"], "reward.teacher_weight"),
        ([SAMPLED, "train.heldout_metric=reverse_kl", "train.advantage=constant"], "train.advantage"),
    ],
    "heldout_answers_need_prompts": [(["train.heldout_metric=accuracy"], "eval.path")],
    "heldout_format_needs_format": [(["train.heldout_metric=format", "eval.path=p"], "eval.format")],
    "answer_format_needs_a_pattern": [(["eval.format=answer"], "eval.answer_pattern")],
    "vllm_supports_the_temperature": [(["rollouts.engine=vllm", "rollouts.temperature=3"], "rollouts.temperature")],
    "quantised_models_are_resident": [
        (["student.quantisation=nf4", "score.placement=streamed"], "of the student"),
        (["teacher.code.quantisation=nf4", "score.placement=vllm"], "of teacher 'code'"),
    ],
    "spans_need_local_logits": [(["score.alignment=spans", "score.placement=vllm"], "score.alignment")],
    "round_limits_are_within_the_longest": [
        (["rollouts.max_response_tokens=9", "distill.max_response_tokens=[8,16]"], "distill.max_response_tokens")
    ],
    "prompts_have_no_prefix": [
        (["teacher.big.prompt={{ prompt }}", "teacher.big.prompt_prefix=a"], "either prompt or prompt_prefix")
    ],
    "served_teachers_have_a_url": [(["teacher.big.placement=server"], "teacher.url")],
    "served_adapters_have_a_name": [
        (["teacher.big.placement=server", "teacher.big.url=http://a", "teacher.big.adapter=x"], "teacher.served_name")
    ],
    "system_messages_need_a_template": [(["prompts.template=none", "prompts.system=s"], "prompts.system")],
    "chosen_teachers_differ": [
        (["train.teacher=[]"], "train.teacher"),
        (['train.teacher=["big", "big"]'], "train.teacher"),
    ],
    "chosen_teachers_are_routed_to": [(["train.teacher=big", 'train.route={"*" = "code"}'], "train.teacher")],
    "mixtures_have_several_teachers": [
        (["train.teacher=big", "train.mixture=geometric"], "train.mixture"),
        (["train.teacher=big", "train.teacher_weights={big = 1}"], "train.teacher_weights"),
        (['train.route={"*" = "code"}', "train.mixture=geometric"], "train.mixture"),
    ],
    "weights_are_of_the_chosen_teachers": [
        (['train.teacher=["big", "code"]', "train.teacher_weights={big = 1, cod = 1}"], "did you mean code?"),
        (['train.teacher=["big", "code"]', "train.teacher_weights={big = 1}"], "none for 'code'"),
        (['train.teacher=["big", "code"]', "train.teacher_weights={big = 0, code = 0}"], "train.teacher_weights"),
    ],
}


def test_every_rule_has_a_case() -> None:
    assert list(CONFLICTS) == [rule.__name__ for rule in checks._CONFLICTS]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [case for cases in CONFLICTS.values() for case in cases],
    ids=lambda value: str(value)[:30],
)
def test_a_contradiction_is_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        Recipe.from_dict(TWO, overrides=overrides)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [*REWARDS, "reward.teacher_weight=0", 'train.teacher=["big", "big"]'],
        ["train.loss=cross_entropy", "train.teacher=big", "train.mixture=geometric"],
        ['train.teacher=["big", "code"]', "train.teacher_weights={big = 1, code = 0}", "train.mixture=geometric"],
        ["train.teacher_weights={big = 1, code = 0}"],
        ['train.teacher=["code", "big"]', 'train.route={"*" = "code", math = "big"}'],
        ["train.steps=10", "train.warmup_steps=10"],
        [SAMPLED, "train.advantage=constant", 'train.teacher=["big", "big"]'],
    ],
)
def test_what_fits_is_accepted(overrides: list[str]) -> None:
    Recipe.from_dict(TWO, overrides=overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollouts.temperature=0.3"], "rollouts.temperature = 0.3"),
        (["rollouts.temperature=0"], "all rollouts of a prompt are the same"),
        (["rollouts.top_p=0.9"], "rollouts.top_p = 0.9"),
        (["train.learning_rate=5e-7"], "train.learning_rate = 5e-07"),
        (["train.lora_rank=8"], "train.lora_rank = 8"),
        (["train.loss=importance_sampling", "train.advantage=cached"], "valid for one pass"),
        (["score.candidates=1"], "score.candidates = 1"),
    ],
)
def test_warnings(overrides: list[str], message: str) -> None:
    warnings = load_recipe("toy", overrides).warnings()
    assert any(message in line for line in warnings) and not any("\n" in line for line in warnings)


@pytest.mark.parametrize(
    "signal", [["train.advantage=constant"], ["reward.coefficient=1", "reward.teacher_weight=0"]], ids=" ".join
)
def test_without_a_teacher_no_warning_is_about_reverse_kl(signal: list[str]) -> None:
    """Tempered rollouts make a policy gradient biased, whatever it is of."""
    tempered = [SAMPLED, "rollouts.temperature=0.7", *signal]
    (line,) = [line for line in load_recipe("toy", tempered).warnings() if "rollouts.temperature" in line]
    assert "biased, unless train.behaviour_correction" in line and "reverse KL" not in line


@pytest.mark.parametrize(
    ("overrides", "idle"),
    [
        (["rollouts.temperature=0", "rollouts.top_p=0.9"], "rollouts.top_p"),
        (["eval.format=", "rollouts.format_check_min=0.9"], "rollouts.format_check_min"),
        (["rollouts.format_check_prompts=0", "rollouts.format_check_min=0.9"], "rollouts.format_check_min"),
        (["rollouts.max_turns=2"], "rollouts.max_turns"),
        (["rollouts.environment_timeout=2"], "rollouts.environment_timeout"),
        (["rollouts.environment_workers=2"], "rollouts.environment_workers"),
        (["rollouts.environment=a:b", "rollouts.max_turns=1"], "rollouts.environment"),
        (["score.candidates=1", "score.candidate_kind=sampled"], "score.candidate_kind"),
        (["train.jsd_beta=0.2"], "train.jsd_beta"),
        (["train.loss=jsd", "train.forward_weight=0.2"], "train.forward_weight"),
        (["train.advantage_clip=2"], "train.advantage_clip"),
        (["reward.coefficient=1", "train.advantage=cached"], "train.advantage"),
        ([SAMPLED, "train.constant_below=0.2"], "train.constant_below"),
        ([SAMPLED, "train.advantage=constant", "train.advantage_clip=2"], "train.advantage_clip"),
        ([SAMPLED, "train.advantage=constant", "train.teacher=teacher"], "train.teacher"),
        (["train.loss=cross_entropy", "train.teacher=teacher"], "train.teacher"),
        (["train.loss=cross_entropy", "train.stale_ess=0.5"], "train.stale_ess"),
        (["train.loss=cross_entropy", "train.stop_reverse_kl=0.5"], "train.stop_reverse_kl"),
        (["train.stop_reverse_kl=0", "train.stop_window=9"], "train.stop_window"),
        (["train.steps=3", "train.stale_ess=0.5"], "train.stale_ess"),
        (["train.heldout_every=3"], "train.heldout_every"),
        (["train.heldout_patience=4"], "train.heldout_patience"),
        (["train.steps=9", "train.warmup_steps=9", "train.schedule=linear"], "train.schedule"),
        (["reward.normalise=mean"], "reward.normalise"),
        (["reward.teacher_weight=0.5"], "reward.teacher_weight"),
        (["select.first_tokens=32"], "select.first_tokens"),
        (["distill.rounds=1"], "distill.learning_rate_decay"),
        (["distill.rounds=4"], "distill.patience"),
    ],
)
def test_an_unused_setting_is_warned_of(overrides: list[str], idle: str) -> None:
    recipe = load_recipe("toy", overrides)
    found = [line for line in recipe.warnings() if line.startswith(f"{idle} = ") and "has no effect" in line]
    assert len(found) == 1 and "\n" not in found[0]


@pytest.mark.parametrize("name", recipe_names())
def test_no_shipped_recipe_has_a_setting_without_effect(name: str) -> None:
    assert not [line for line in load_recipe(name).warnings() if "has no effect" in line]


def test_another_sft_teacher_is_warned_of() -> None:
    assert not load_recipe("toy", ["student.sft_teacher=toy:teacher"]).warnings()
    (line,) = load_recipe("toy", ["student.sft_teacher=big/model"]).warnings()
    assert "toy:teacher" in line and "big/model" in line


def test_cached_advantage_may_be_used_once() -> None:
    cached = [
        "train.loss=importance_sampling",
        "train.advantage=cached",
        "train.steps=8",
        "train.prompts_per_step=64",
    ]
    check_single_pass(load_recipe("toy", cached), 512)
    with pytest.raises(ConfigError, match=r"8 steps x 64 prompts need 512 prompts, the round holds 511; .* to 7 or"):
        check_single_pass(load_recipe("toy", cached), 511)
    check_single_pass(load_recipe("toy", [*cached, "train.advantage=current"]), 64)
