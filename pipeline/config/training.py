"""Settings of training: [train], [reward], [select], [distill], [sft], [continual] and [track]."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from pipeline.config.schema import CONTEXT, LARGE, MANY, NAME, PATH, Section, first_repeated

#: Settings of [train] that only the divergences over candidates use, and those that only a policy gradient uses.
CLIPS = ("entry_clip", "token_clip")
POLICY_GRADIENT = ("advantage", "ratio_truncation", "ppo_clip", "behaviour_correction")

Beta = Annotated[float, Field(strict=True, ge=0, lt=1)]


class TrainConfig(Section):
    """Stage two: the student is trained on the cache."""

    loss: Literal["reverse_kl", "importance_sampling", "forward_kl", "jsd", "mixed_kl", "cross_entropy"] = Field(
        default="reverse_kl",
        description="reverse_kl, forward_kl, jsd: over the candidates and the remaining mass; mixed_kl: weighted sum "
        "of reverse and forward KL; importance_sampling: policy gradient on the sampled token; cross_entropy: on the "
        "rollouts' tokens, without scores (redpen sft)",
    )
    jsd_beta: float = Field(
        default=0.5,
        gt=0,
        lt=1,
        description="jsd: weight of the teacher in the mixture, as in GKD; near 0: forward KL, near 1: reverse KL",
    )
    forward_weight: float = Field(
        default=0.5, ge=0, le=1, description="mixed_kl: weight of forward KL; reverse KL has 1 minus it"
    )
    entry_clip: float | None = Field(
        default=None,
        gt=0,
        le=LARGE,
        description="reverse_kl, forward_kl, jsd, mixed_kl: upper bound on what one candidate adds to a token's "
        "loss, in nats; above it there is no gradient; default: none",
    )
    token_clip: float | None = Field(
        default=None,
        gt=0,
        le=LARGE,
        description="reverse_kl, forward_kl, jsd, mixed_kl: upper bound on a token's loss, in nats; above it there "
        "is no gradient; default: none",
    )
    advantage: Literal["current", "cached", "constant"] = Field(
        default="current",
        description="importance_sampling: the teacher's log-prob minus that of the current student, or of the cached "
        "one (one pass only); constant: -1 at tokens below constant_below, 0 at others, without a teacher",
    )
    constant_below: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description='advantage = "constant": probability, for the student that sampled, below which a token has '
        "advantage -1",
    )
    advantage_clip: float = Field(
        default=10.0, gt=0, le=LARGE, description="advantages are clipped to +- this, in nats"
    )
    ratio_truncation: float | None = Field(
        default=None,
        ge=1,
        le=LARGE,
        description="importance_sampling: upper bound on ratios that ppo_clip has not clipped; default: none",
    )
    ppo_clip: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="importance_sampling: PPO's epsilon, ratios are clipped to 1 +- it; default: off",
    )
    behaviour_correction: bool = Field(
        default=False,
        description="importance_sampling: ratios against the distribution that was sampled from (rollout_logprobs)",
    )
    steps: int = Field(default=150, ge=1, le=MANY, description="maximum number of optimizer steps")
    prompts_per_step: int = Field(
        default=64, ge=1, le=2**20, description="prompts, each with all its rollouts, in the global batch"
    )
    learning_rate: float = Field(default=1e-4, gt=0, le=1, description="peak learning rate of AdamW")
    warmup_steps: int = Field(default=0, ge=0, le=MANY, description="steps of linear warmup, at most train.steps")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="learning rate after the warmup"
    )
    weight_decay: float = Field(default=0.0, ge=0, le=1, description="AdamW weight decay")
    max_grad_norm: float = Field(default=1.0, gt=0, le=LARGE, description="gradients are clipped to this norm")
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.95), strict=False, description="AdamW betas")
    optimizer: Literal["adamw", "adamw_8bit"] = Field(
        default="adamw", description="adamw_8bit: 8-bit moments (extra quant; one GPU or ddp)"
    )
    method: Literal["lora", "full"] = Field(
        default="lora", description="lora: train an adapter; full: train every weight"
    )
    lora_rank: int = Field(default=128, ge=1, le=4096, description="LoRA rank; 32 or more is recommended")
    lora_alpha: float = Field(
        default=32.0, gt=0, le=LARGE, description="LoRA updates are scaled by lora_alpha / lora_rank"
    )
    lora_targets: Literal["all-linear"] | list[str] = Field(
        default="all-linear", description="modules that get an adapter: all linear layers, or a list of names"
    )
    lora_dropout: float = Field(default=0.0, ge=0, lt=1, description="LoRA dropout")
    tokens_per_microbatch: int = Field(
        default=8192, ge=1, le=CONTEXT, description="tokens, prompts included, in one forward and backward pass"
    )
    share_prompts_from: int = Field(
        default=128,
        ge=1,
        le=MANY,
        description="prompts with at least this many tokens are computed once for all their rollouts in a micro-"
        "batch: less work, equal results",
    )
    rows_per_chunk: int = Field(
        default=1024, ge=1, le=CONTEXT, description="positions with logits in memory at the same time"
    )
    gradient_checkpointing: bool = Field(
        default=True, description="recompute activations in the backward pass: slower, far less memory"
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        default="ddp", description="under torchrun; ddp: the whole student on each GPU; fsdp: sharded over all GPUs"
    )
    seed: int = Field(
        default=0, ge=0, le=2**31 - 1, description="seed of the order of prompts and of new LoRA weights"
    )
    shuffle_window_blocks: int = Field(default=8, ge=1, le=MANY, description="blocks in a shuffle window")
    checkpoint_every: int = Field(default=10, ge=1, le=MANY, description="steps between checkpoints")
    keep_checkpoints: int = Field(default=2, ge=1, le=MANY, description="checkpoints to keep")
    stop_reverse_kl: float = Field(
        default=0.002,
        ge=0,
        le=LARGE,
        description="end training when the mean reverse KL per token falls to this; 0: never",
    )
    stop_window: int = Field(
        default=5, ge=1, le=MANY, description="steps that stop_reverse_kl and stale_ess average over"
    )
    stale_ess: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="end training, as the cache is stale, when the effective sample size (a fraction) falls "
        "below this; 0: never",
    )
    heldout_metric: Literal["reverse_kl", "accuracy", "format"] | None = Field(
        default=None,
        description="measured during training; reverse_kl: on held-out prompts of the round; accuracy, format: of "
        "greedy responses to eval.path; the best checkpoint becomes the result; default: none",
    )
    heldout_every: int = Field(default=10, ge=1, le=MANY, description="steps between measurements of heldout_metric")
    heldout_prompts: int = Field(default=64, ge=1, le=MANY, description="prompts that heldout_metric is measured on")
    heldout_patience: int = Field(
        default=3, ge=1, le=MANY, description="end training after this many measurements without a new best"
    )
    teacher: str | list[str] | None = Field(
        default=None, description="name of the teacher to learn from, or a list of names; default: the only one"
    )
    mixture: Literal["arithmetic", "geometric"] = Field(
        default="arithmetic",
        description="several teachers: average their probabilities (arithmetic) or log-probs (geometric)",
    )
    teacher_weights: dict[str, Annotated[float, Field(ge=0, le=LARGE)]] = Field(
        default_factory=dict, description="several teachers: weight by name; default: equal"
    )
    route: dict[str, str] = Field(
        default_factory=dict,
        description="teacher for each source of prompts, e.g. { math = 'big', '*' = 'base' }; default: the mixture",
    )


class RewardConfig(Section):
    """Task rewards, alone or in addition to a teacher: [eval] says which rollouts are right."""

    coefficient: float = Field(
        default=0.0, ge=0, le=LARGE, description="weight of the advantage from rewards; 0: no rewards"
    )
    teacher_weight: float = Field(
        default=1.0,
        ge=0,
        le=LARGE,
        description="weight of the distillation loss in addition to rewards; 0: rewards alone, no teacher is needed",
    )
    verifier: Literal["answer", "format"] = Field(
        default="answer",
        description="what earns a reward of 1: a right answer (eval.match) or a legal format (eval.format)",
    )
    normalise: Literal["std", "mean"] = Field(
        default="std",
        description="advantage: reward minus the prompt's mean; std: divided by the population standard deviation of "
        "the prompt's rollouts + 1e-4 (GRPO); mean: not divided (Dr. GRPO)",
    )


class SelectConfig(Section):
    """Which cached response tokens stage two trains on; the cache is not changed."""

    first_tokens: int | None = Field(
        default=None,
        ge=1,
        le=CONTEXT,
        description="train on the first tokens of a response only, this many; default: on all",
    )
    special_tokens: bool = Field(
        default=True, description="train on the tokenizer's special tokens (stop tokens: eos)"
    )
    eos: bool = Field(default=True, description="train on the stop token that ends a response")
    truncated: bool = Field(default=True, description="train on responses that were truncated at the length limit")
    entropy_fraction: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="train on this fraction of a step's tokens, those with the highest student entropy",
    )


class DistillConfig(Section):
    """Rounds of sampling, scoring and training (`redpen distill`)."""

    rounds: int = Field(default=4, ge=1, le=1000, description="maximum number of rounds")
    learning_rate_decay: float = Field(
        default=1.0, gt=0, le=1, description="factor on the learning rate from one round to the next"
    )
    stop_reverse_kl: float = Field(
        default=0.002,
        ge=0,
        le=LARGE,
        description="end when reverse KL per token on a round's fresh rollouts is at most this; 0: never",
    )
    patience: int = Field(
        default=2,
        ge=1,
        le=MANY,
        description="end after this many rounds without a new best train.heldout_metric or, without one, reverse KL",
    )
    carry: Literal["adapter", "adapter+optimizer"] = Field(
        default="adapter+optimizer", description="state that the next round's training starts from"
    )
    max_response_tokens: list[Annotated[int, Field(ge=1, le=CONTEXT)]] = Field(
        default=[],
        description="limits of responses by round, e.g. [512, 1024, 2048], the last for all that follow; default: "
        "rollouts.max_response_tokens",
    )

    @model_validator(mode="after")
    def _limits_grow(self) -> Self:
        limits = self.max_response_tokens
        if limits != sorted(limits) or len(limits) > self.rounds:
            raise ValueError(
                f"max_response_tokens: expected limits that grow, at most one for each of {self.rounds} rounds, got "
                f"{limits}"
            )
        return self


class SftData(Section):
    """A source of documents or chats."""

    path: str = Field(
        min_length=1,
        max_length=PATH,
        description="JSONL or Parquet file, or Hub dataset id, of documents (text) or chats",
    )
    share: float | None = Field(
        default=None, gt=0, le=1, description="fraction of the trained tokens; default: every example equally often"
    )
    split: str = Field(default="train", max_length=PATH, description="split of a Hub dataset")


class SftConfig(Section):
    """Fine-tuning on documents and chats (`redpen sft`); other settings are taken from [train]."""

    data: list[SftData] = Field(default=[], description="sources, as [[sft.data]] tables, mixed by their shares")
    steps: int = Field(default=200, ge=1, le=MANY, description="optimizer steps")
    examples_per_step: int = Field(default=32, ge=1, le=2**20, description="examples in the global batch")
    learning_rate: float = Field(default=1e-4, gt=0, le=1, description="peak learning rate of AdamW")
    max_tokens: int = Field(
        default=2048,
        ge=2,
        le=CONTEXT,
        description="longer documents are split; longer chats are left out",
    )

    @field_validator("data")
    @classmethod
    def _shares(cls, data: list[SftData]) -> list[SftData]:
        shares = [source.share for source in data if source.share is not None]
        if shares and (len(shares) < len(data) or abs(sum(shares) - 1) > 1e-6):
            raise ValueError(f"shares must be given for every source and add up to 1, got {shares} of {len(data)}")
        return data


class GateConfig(Section):
    """An evaluation that `redpen continual` must pass."""

    name: str = Field(min_length=1, max_length=NAME, description="name in results and messages")
    path: str = Field(min_length=1, max_length=PATH, description="prompts with an answer, as eval.path")
    limit: int = Field(default=512, ge=1, le=MANY, description="number of prompts to use")
    metric: Literal["accuracy", "format"] = Field(
        default="accuracy",
        description="fraction of greedy responses that are right (eval.match) or legal (eval.format)",
    )
    at_least: float | None = Field(default=None, ge=0, le=1, description="required value at the end")
    rise: float | None = Field(
        default=None, ge=0, le=1, description="required increase from before to the end; 0.3 is 30 points"
    )
    fall: float | None = Field(default=None, ge=0, le=1, description="allowed decrease from before to the end")
    fall_since_sft: float | None = Field(
        default=None, ge=0, le=1, description="allowed decrease from after fine-tuning to the end"
    )

    @model_validator(mode="after")
    def _has_a_condition(self) -> Self:
        if self.at_least is None and self.rise is None and self.fall is None and self.fall_since_sft is None:
            raise ValueError(f"gate {self.name!r} needs at_least, rise, fall or fall_since_sft, or it always passes")
        return self


class ContinualConfig(Section):
    """New knowledge without loss of old behaviour (`redpen continual`): [sft], then [distill], then gates."""

    gate: list[GateConfig] = Field(
        default=[], description="evaluations, as [[continual.gate]] tables, that must all pass"
    )

    @field_validator("gate")
    @classmethod
    def _unique_names(cls, gate: list[GateConfig]) -> list[GateConfig]:
        names = [one.name for one in gate]
        if repeated := first_repeated(names):
            raise ValueError(f"has two gates named {repeated!r}; give each its own name")
        return gate


class TrackConfig(Section):
    """Experiment trackers, in addition to the run's files and TensorBoard; without effect on training."""

    trackers: list[Literal["wandb", "trackio"]] = Field(
        default=[], description="services to log to, each an extra of the same name"
    )
    project: str = Field(default="redpen", min_length=1, description="project")
    name: str | None = Field(default=None, min_length=1, description="name of the run; default: the run directory's")
    group: str | None = Field(default=None, description="group of related runs")
    tags: list[str] = Field(default=[], description="tags of the run")
