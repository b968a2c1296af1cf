"""Recipes: every setting of redpen, declared once with its bounds and its meaning.

A recipe is a TOML file, one table a section. `load_recipe` reads it, applies `section.key=value` overrides and checks
the result; whatever is wrong becomes a `ConfigError` of one line that names the setting, what was expected and what
came. `Recipe.to_toml` writes it back, so that the resolved recipe can lie beside what it made.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from pipeline import credentials, files
from pipeline.config import messages, settings
from pipeline.config.idle import idle_settings
from pipeline.config.settings import Section
from pipeline.errors import ConfigError

#: The most of anything that is counted, of tokens that are read together, and the largest weight: what numpy, torch
#: and files still hold after these were multiplied with one another.
MANY, CONTEXT, LARGE = 2**31 - 1, 2**24, 10**6
#: Characters of a path (as Linux has it) or a Hub id, and of a name that becomes part of a file's.
PATH, NAME = 4095, 64

#: Bytes of a recipe.
_AT_MOST = 2**20

Beta = Annotated[float, Field(strict=True, ge=0, lt=1)]
Placement = Literal["resident", "streamed", "vllm", "server"]

#: Settings that are no more: the one value that is still accepted, as recipes of finished runs hold it, and why.
REMOVED: dict[str, tuple[Any, str]] = {
    "train.residual_baseline": (False, "nobody has measured that it helps"),
}


#: What `apply_chat_template` takes beside the template's variables, or redpen itself gives the template.
_NO_VARIABLES = {"messages", "add_generation_prompt", "continue_final_message", "chat_template", "conversation"}
_NO_VARIABLES |= {"tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"}
_NO_VARIABLES |= {"return_assistant_tokens_mask", "tokenizer_kwargs"}


def _template_args(args: dict[str, Any]) -> dict[str, Any]:
    try:  # dates, and whatever else JSON cannot hold, cannot be recorded as provenance
        json.dumps(args, allow_nan=False)
    except (TypeError, ValueError):
        raise ValueError("must hold only text, numbers, true/false, lists and tables") from None
    if reserved := sorted(_NO_VARIABLES & args.keys()):
        raise ValueError(f"must hold variables of the template; {reserved[0]} is not the recipe's to set")
    return args


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"must be a regular expression: {error}") from None
    except (OverflowError, RecursionError, MemoryError) as error:
        raise ValueError(f"must be a regular expression that fits: {error}") from None


def _repeated(names: Sequence[str]) -> str | None:
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)  # type: ignore[func-returns-value]


class ModelConfig(Section):
    """A model by Hub id or path, and how to load it."""

    model: str = Field(min_length=1, max_length=PATH, description="Hub id, local path, or toy:student / toy:teacher")
    revision: str | None = Field(default=None, max_length=PATH, description="Hub branch, tag or commit")
    adapter: str | None = Field(
        default=None, max_length=PATH, description="PEFT adapter (directory or Hub id) applied on top"
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        default="bfloat16", description="type of the weights; auto: as the checkpoint says"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: cuda where there is one")
    trust_remote_code: bool = Field(default=False, description="run Python code that comes with the model")
    quantisation: Literal["nf4"] | None = Field(
        default=None,
        description="nf4: linear layers in 4 bits while loading (extra quant); default: as the checkpoint",
    )


class StudentConfig(ModelConfig):
    """The student: a model, and where its fine-tuning came from."""

    sft_teacher: str | None = Field(
        default=None,
        description="the model that wrote the answers it was fine-tuned on, if any; another teacher is warned of",
    )


class TeacherConfig(ModelConfig):
    """A teacher: a model and the name of its scores in the cache."""

    name: str = Field(default="teacher", max_length=NAME, description="name of this teacher's scores in the cache")
    placement: Placement | None = Field(default=None, description="default: score.placement")
    url: str | None = Field(
        default=None,
        max_length=PATH,
        description="placement server: base URL of its API, e.g. http://localhost:8000/v1",
    )
    served_name: str | None = Field(
        default=None, max_length=PATH, description="placement server: its name there; default: model"
    )
    template: Literal["auto", "chat", "none"] | None = Field(
        default=None, description="how it reads prompts, as prompts.template; default: the student's token ids"
    )
    template_args: dict[str, Any] | None = Field(
        default=None, description="arguments of its own chat template; default: prompts.template_args"
    )
    system: str | None = Field(default=None, description="its own system message; default: prompts.system")
    prompt_prefix: str | None = Field(
        default=None, description="text before every prompt (a chat's first user message) that it alone reads"
    )
    stop_token: str | None = Field(
        default=None,
        description="the token that ends its responses, read where the student's EOS is, e.g. '<|im_end|>'; default: "
        "the student's EOS",
    )

    @property
    def renders(self) -> bool:
        """Whether it reads prompts in its own way."""
        own = (self.template, self.template_args, self.system, self.prompt_prefix)
        return any(value is not None for value in own)

    @field_validator("template_args")
    @classmethod
    def _plain_values(cls, args: dict[str, Any] | None) -> dict[str, Any] | None:
        return None if args is None else _template_args(args)

    @field_validator("name")
    @classmethod
    def _usable_in_a_path(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) or name == "student":
            raise ValueError("must be letters, digits, - and _, and not 'student'")
        return name


class PromptsConfig(Section):
    """Where prompts come from and how they become tokens."""

    path: str = Field(
        min_length=1, max_length=PATH, description="JSONL or Parquet file, Hub dataset id, or toy:train"
    )
    split: str = Field(default="train", max_length=PATH, description="split of a Hub dataset")
    skip: int = Field(default=0, ge=0, le=MANY, description="leave out the first so many prompts")
    limit: int | None = Field(default=None, ge=1, le=MANY, description="use only so many prompts")
    template: Literal["auto", "chat", "none"] = Field(
        default="auto",
        description="auto: the tokenizer's chat template if it has one; chat: require it; none: prompt text as it is",
    )
    template_args: dict[str, Any] = Field(
        default_factory=dict, description="arguments of the chat template, e.g. enable_thinking"
    )
    system: str | None = Field(default=None, description="system message for prompts without one of their own")

    @field_validator("template_args")
    @classmethod
    def _plain_values(cls, args: dict[str, Any]) -> dict[str, Any]:
        return _template_args(args)


class RolloutsConfig(Section):
    """Stage one, sampling."""

    engine: Literal["transformers", "vllm"] = Field(default="transformers", description="what samples")
    rollouts_per_prompt: int = Field(default=4, ge=1, le=64, description="responses sampled for each prompt")
    temperature: float = Field(default=1.0, ge=0, le=10, description="1 samples the student itself; 0 is greedy")
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="nucleus sampling; below 1 rules out importance sampling"
    )
    max_prompt_tokens: int = Field(default=1024, ge=1, le=CONTEXT, description="longest prompt accepted")
    max_response_tokens: int = Field(
        default=2048, ge=1, le=CONTEXT, description="a response that reaches it is cut there"
    )
    stop_token_ids: list[Annotated[int, Field(ge=0, le=MANY)]] | None = Field(
        default=None, description="ids that end a response; default: the model's own EOS ids"
    )
    seed: int = Field(
        default=0, ge=0, le=2**31 - 1, description="with round, prompt and sample number it fixes each rollout"
    )
    prompts_per_block: int = Field(
        default=64, ge=1, le=2**16, description="prompts in a block, the unit of writing and resuming"
    )
    batch_size: int = Field(default=256, ge=1, le=2**20, description="rollouts decoded together")
    format_check_prompts: int = Field(
        default=32,
        ge=0,
        le=MANY,
        description="responses looked at before the round starts, where eval.format is set; 0: none",
    )
    format_check_min: float = Field(default=0.5, ge=0, le=1, description="of them that must be legal by eval.format")


class ScoreConfig(Section):
    """Stage one, scoring."""

    placement: Placement = Field(
        default="resident",
        description="resident: the whole scorer on the device; streamed: layer by layer, for models that do not fit; "
        "vllm, server: teachers read by vLLM, here or behind teacher.url (the student then stays resident)",
    )
    memory_gib: float | None = Field(
        default=None,
        gt=0,
        le=2**20,
        description="device memory that a streamed scorer may use; default: most of what is free",
    )
    tile_tokens: int = Field(
        default=8192, ge=1, le=CONTEXT, description="tokens (prompts included) packed into one forward"
    )
    candidates: int = Field(
        default=8, ge=1, le=4096, description="alternatives kept at every position, the sampled token included"
    )
    candidate_kind: Literal["topk", "sampled"] = Field(
        default="topk", description="topk: the student's likeliest; sampled: drawn from the student"
    )
    teacher_topk: int = Field(
        default=0, ge=0, le=4096, description="the teacher's own likeliest tokens, stored beside; 0: none"
    )
    rows_per_chunk: int = Field(
        default=1024, ge=1, le=CONTEXT, description="positions whose logits exist at the same time"
    )
    alignment: Literal["tokens", "spans"] = Field(
        default="tokens",
        description="tokens: a teacher cuts text into the student's tokens; spans: where it does not, the pieces "
        "of text that both share are compared (placement resident or streamed)",
    )
    server_requests: int = Field(default=32, ge=1, le=1024, description="requests in flight to a served teacher")
    server_timeout: float = Field(
        default=300.0, gt=0, le=86400, description="seconds that one request to it may take"
    )
    server_retries: int = Field(default=8, ge=0, le=100, description="times a failed request to it is sent again")


class VllmConfig(Section):
    """The vLLM engine, as sampler (rollouts.engine) or scorer (score.placement)."""

    tensor_parallel_size: int = Field(default=1, ge=1, le=2**16, description="GPUs that share one model")
    gpu_memory_utilization: float | None = Field(
        default=None, gt=0, le=1, description="share of the device's memory; default: 0.9 on a GPU, 0.2 without one"
    )
    enforce_eager: bool = Field(default=False, description="no compilation: starts sooner, runs slower")


class TrainConfig(Section):
    """Stage two."""

    loss: Literal["reverse_kl", "importance_sampling", "forward_kl", "jsd", "mixed_kl", "cross_entropy"] = Field(
        default="reverse_kl",
        description="reverse_kl, forward_kl, jsd: over candidates + rest; mixed_kl: of reverse and forward; "
        "importance_sampling: the policy gradient on the sampled token; cross_entropy: on the rollouts' tokens, "
        "without any scores (redpen sft)",
    )
    jsd_beta: float = Field(
        default=0.5,
        gt=0,
        lt=1,
        description="jsd: weight of the teacher in the mixture, as in GKD; 0 forward, 1 reverse",
    )
    forward_weight: float = Field(
        default=0.5, ge=0, le=1, description="mixed_kl: share of forward KL; reverse KL has the rest"
    )
    advantage: Literal["current", "cached"] = Field(
        default="current",
        description="importance sampling: advantage by the current student, or as cached (one pass only)",
    )
    advantage_clip: float = Field(default=10.0, gt=0, le=LARGE, description="bound on the absolute advantage, nats")
    ratio_truncation: float | None = Field(
        default=None,
        ge=1,
        le=LARGE,
        description="importance sampling: larger ratios count as this, where ppo_clip has not stopped the token; "
        "default: as they are",
    )
    ppo_clip: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="importance sampling: PPO's epsilon, the ratio clipped to 1 +- it; default: off",
    )
    behaviour_correction: bool = Field(
        default=False,
        description="importance sampling: ratios against the distribution really sampled from (rollout_logprobs)",
    )
    steps: int = Field(default=150, ge=1, le=MANY, description="optimizer steps at most")
    prompts_per_step: int = Field(
        default=64, ge=1, le=2**20, description="prompts, each with all its rollouts, in a global batch"
    )
    learning_rate: float = Field(default=1e-4, gt=0, le=1, description="peak learning rate of AdamW")
    warmup_steps: int = Field(default=0, ge=0, le=MANY, description="steps of linear warm-up, at most train.steps")
    schedule: Literal["constant", "linear", "cosine"] = Field(default="constant", description="after the warm-up")
    weight_decay: float = Field(default=0.0, ge=0, le=1, description="AdamW weight decay")
    max_grad_norm: float = Field(default=1.0, gt=0, le=LARGE, description="gradients are clipped to this norm")
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.95), strict=False, description="AdamW betas")
    optimizer: Literal["adamw", "adamw_8bit"] = Field(
        default="adamw", description="adamw_8bit: its moments in 8 bits (extra quant; one GPU or ddp)"
    )
    method: Literal["lora", "full"] = Field(default="lora", description="lora: an adapter; full: every weight")
    lora_rank: int = Field(default=128, ge=1, le=4096, description="LoRA rank; 32 or more is advised")
    lora_alpha: float = Field(
        default=32.0, gt=0, le=LARGE, description="LoRA updates are scaled by lora_alpha / lora_rank"
    )
    lora_targets: Literal["all-linear"] | list[str] = Field(
        default="all-linear", description="all-linear, or a list of module names"
    )
    lora_dropout: float = Field(default=0.0, ge=0, lt=1, description="LoRA dropout")
    tokens_per_microbatch: int = Field(
        default=8192, ge=1, le=CONTEXT, description="tokens (prompts included) in one forward and backward"
    )
    share_prompts_from: int = Field(
        default=128,
        ge=1,
        le=MANY,
        description="prompts of so many tokens or more are read once for all their rollouts in a micro-batch: less "
        "work, equal results",
    )
    rows_per_chunk: int = Field(
        default=1024, ge=1, le=CONTEXT, description="positions whose logits exist at the same time"
    )
    gradient_checkpointing: bool = Field(
        default=True, description="recompute activations in backward: slower, far less memory"
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        default="ddp", description="under torchrun; ddp: a student on each GPU; fsdp: one in shards over all of them"
    )
    seed: int = Field(default=0, ge=0, le=2**31 - 1, description="of the replay order and the new LoRA weights")
    shuffle_window_blocks: int = Field(
        default=8, ge=1, le=MANY, description="blocks whose prompts are shuffled together"
    )
    checkpoint_every: int = Field(default=10, ge=1, le=MANY, description="steps between checkpoints")
    keep_checkpoints: int = Field(default=2, ge=1, le=MANY, description="checkpoints kept")
    stop_reverse_kl: float = Field(
        default=0.002, ge=0, le=LARGE, description="cached reverse KL per token that ends the round; 0: never"
    )
    stop_window: int = Field(default=5, ge=1, le=MANY, description="steps over which that reverse KL is averaged")
    stale_ess: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="effective sample size, as a fraction, below which the cache is stale; 0: off",
    )
    heldout_metric: Literal["reverse_kl", "accuracy", "format"] | None = Field(
        default=None,
        description="measured while training: reverse_kl on prompts of the round that are held back, or accuracy or "
        "legal format on eval.path, greedily; the best checkpoint by it becomes the adapter; default: none",
    )
    heldout_every: int = Field(default=10, ge=1, le=MANY, description="steps between measurements of heldout_metric")
    heldout_prompts: int = Field(default=64, ge=1, le=MANY, description="prompts to measure it on")
    heldout_patience: int = Field(
        default=3, ge=1, le=MANY, description="measurements in a row without a new best that end training: a plateau"
    )
    teacher: str | list[str] | None = Field(
        default=None, description="name of the teacher to learn from, or a list of several; default: the only one"
    )
    mixture: Literal["arithmetic", "geometric"] = Field(
        default="arithmetic", description="several teachers: mean of their probabilities, or of their log-probs"
    )
    teacher_weights: dict[str, Annotated[float, Field(ge=0, le=LARGE)]] = Field(
        default_factory=dict, description="several teachers: weight by name; default: equal"
    )
    route: dict[str, str] = Field(
        default_factory=dict,
        description="the one teacher for prompts of a source, by source, e.g. { math = 'big', '*' = 'base' }; "
        "default: the mixture",
    )


class RewardConfig(Section):
    """Task reward beside the teacher: a prompt's rollouts that [eval] finds right, against the others."""

    coefficient: float = Field(
        default=0.0, ge=0, le=LARGE, description="weight of the reward's advantage; 0: no rewards"
    )
    teacher_weight: float = Field(
        default=1.0,
        ge=0,
        le=LARGE,
        description="weight of the loss to the teacher beside it; 0: rewards alone, no teacher is needed",
    )
    verifier: Literal["answer", "format"] = Field(
        default="answer", description="what earns 1: a right answer (eval.match), or a legal form (eval.format)"
    )
    normalise: Literal["std", "mean"] = Field(
        default="std",
        description="rollouts are compared with their prompt's mean; std: divided by the standard deviation of the "
        "prompt's n rollouts (of the population: by n, not n - 1) + 1e-4 (GRPO); mean: as it is (Dr. GRPO)",
    )


class SelectConfig(Section):
    """Which of the cached response tokens stage two trains on; the cache itself is never changed."""

    first_tokens: int | None = Field(
        default=None, ge=1, le=CONTEXT, description="only the first so many of a response"
    )
    special_tokens: bool = Field(default=True, description="the tokenizer's special tokens, stop tokens aside")
    eos: bool = Field(default=True, description="the stop token that ends a response")
    truncated: bool = Field(default=True, description="responses that were cut at the length limit")
    entropy_fraction: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="only this share of a step's tokens, those of the highest student entropy",
    )


class DistillConfig(Section):
    """Rounds of rollouts, scores and training (`redpen distill`)."""

    rounds: int = Field(default=4, ge=1, le=1000, description="rounds at most")
    learning_rate_decay: float = Field(
        default=1.0, gt=0, le=1, description="a round's learning rate is that of the round before times this"
    )
    stop_reverse_kl: float = Field(
        default=0.002,
        ge=0,
        le=LARGE,
        description="reverse KL per token, on a round's fresh rollouts, at which nothing is left to learn; 0: never",
    )
    patience: int = Field(
        default=2,
        ge=1,
        le=MANY,
        description="rounds in a row without a new best that end it: of train.heldout_metric, or else of that "
        "reverse KL",
    )
    carry: Literal["adapter", "adapter+optimizer"] = Field(
        default="adapter+optimizer", description="what the next round's training starts from"
    )


class SftData(Section):
    """One source of documents or chats."""

    path: str = Field(
        min_length=1, max_length=PATH, description="JSONL, Parquet or Hub dataset id; lines with text, or chats"
    )
    share: float | None = Field(
        default=None, gt=0, le=1, description="of the trained tokens; default: every example equally often"
    )
    split: str = Field(default="train", max_length=PATH, description="split of a Hub dataset")


class SftConfig(Section):
    """Fine-tuning on documents and chats (`redpen sft`); what is not here is as in [train]."""

    data: list[SftData] = Field(default=[], description="[[sft.data]], one or several, mixed by their shares")
    steps: int = Field(default=200, ge=1, le=MANY, description="optimizer steps")
    examples_per_step: int = Field(default=32, ge=1, le=2**20, description="examples in a global batch")
    learning_rate: float = Field(default=1e-4, gt=0, le=1, description="peak learning rate of AdamW")
    max_tokens: int = Field(
        default=2048,
        ge=2,
        le=CONTEXT,
        description="documents are cut into pieces of so many; longer chats are left out",
    )

    @field_validator("data")
    @classmethod
    def _all_or_none(cls, data: list[SftData]) -> list[SftData]:
        shares = [source.share for source in data if source.share is not None]
        if shares and (len(shares) < len(data) or abs(sum(shares) - 1) > 1e-6):
            raise ValueError(f"shares must be given for each, and add up to 1, got {shares} of {len(data)}")
        return data


class GateConfig(Section):
    """An evaluation that must hold after new knowledge was learnt."""

    name: str = Field(min_length=1, max_length=NAME, description="what it measures, in a word")
    path: str = Field(min_length=1, max_length=PATH, description="prompts with an answer, as eval.path")
    limit: int = Field(default=512, ge=1, le=MANY, description="use only the first so many prompts")
    metric: Literal["accuracy", "format"] = Field(
        default="accuracy", description="right greedy responses (eval.match), or legal ones (eval.format)"
    )
    at_least: float | None = Field(default=None, ge=0, le=1, description="share that there must be at the end")
    rise: float | None = Field(default=None, ge=0, le=1, description="how much it must have risen, 0.3 is 30 points")
    fall: float | None = Field(default=None, ge=0, le=1, description="how much it may have fallen")
    fall_since_sft: float | None = Field(
        default=None, ge=0, le=1, description="how much of it distillation may have cost, after fine-tuning"
    )

    @model_validator(mode="after")
    def _asks_for_something(self) -> Self:
        if self.at_least is None and self.rise is None and self.fall is None and self.fall_since_sft is None:
            raise ValueError(f"gate {self.name!r} needs at_least, rise, fall or fall_since_sft, or it always holds")
        return self


class ContinualConfig(Section):
    """New knowledge and old behaviour (`redpen continual`): [sft], then [distill], then the gate."""

    gate: list[GateConfig] = Field(default=[], description="[[continual.gate]], all of which must hold")

    @field_validator("gate")
    @classmethod
    def _by_name(cls, gate: list[GateConfig]) -> list[GateConfig]:
        names = [one.name for one in gate]
        if repeated := _repeated(names):
            raise ValueError(f"has two gates named {repeated!r}; give each its own name")
        return gate


class TrackConfig(Section):
    """Where the curves of training go beside the run's own files and TensorBoard; it changes nothing else."""

    trackers: list[Literal["wandb", "trackio"]] = Field(
        default=[], description="services to log to, each an extra of its name"
    )
    project: str = Field(default="redpen", min_length=1, description="project there")
    name: str | None = Field(default=None, min_length=1, description="name there; default: the run directory's")
    group: str | None = Field(default=None, description="group there, for runs that belong together")
    tags: list[str] = Field(default=[], description="tags there")


class EvalConfig(Section):
    """Evaluation on held-out prompts."""

    path: str | None = Field(
        default=None,
        max_length=PATH,
        description="prompts with an answer: JSONL, Parquet, Hub dataset id or toy:heldout",
    )
    limit: int | None = Field(default=None, ge=1, le=MANY, description="use only the first so many prompts")
    samples: int = Field(
        default=1, ge=1, le=64, description="sampled responses for each prompt, beside the greedy one"
    )
    temperature: float = Field(default=1.0, gt=0, le=10, description="of the sampled responses")
    max_response_tokens: int | None = Field(
        default=None, ge=1, le=CONTEXT, description="default: rollouts.max_response_tokens, or what a task says"
    )
    match: Literal["exact", "number", "math"] = Field(
        default="exact",
        description="answers are equal as text; as numbers too: 1,000 = 1e3, 3/4 = 75 %; or as mathematics, by "
        "math-verify (extra eval)",
    )
    answer_pattern: str | None = Field(
        default=None,
        description="regular expression with one group; its last match in a response is the answer. default: the "
        "whole response (exact), its last number, or what math-verify finds (math)",
    )
    format: str | None = Field(
        default=None,
        min_length=1,
        description="a response is legal if it is JSON (json), if it holds an answer (answer), or if this regular "
        "expression matches all of it; what is reasoned up to </think> does not count. default: always",
    )
    candidates: int = Field(
        default=64, ge=1, le=4096, description="alternatives kept when measuring reverse KL to a teacher"
    )
    batch_size: int = Field(default=256, ge=1, le=2**20, description="responses decoded together")
    tasks: list[Annotated[str, Field(min_length=1)]] = Field(
        default=[], description="tasks of lm-evaluation-harness, e.g. ifeval, aime24 (extra eval)"
    )
    task_path: str | None = Field(
        default=None, min_length=1, max_length=PATH, description="directory of your own task files (YAML)"
    )
    task_limit: int | None = Field(
        default=None, ge=1, le=MANY, description="only the first so many examples of each task"
    )
    reread_rollouts: int = Field(
        default=256,
        ge=0,
        le=MANY,
        description="cached rollouts, those of the worst tokens, that the trained student reads again for the report",
    )

    @field_validator("format")
    @classmethod
    def _expression(cls, pattern: str | None) -> str | None:
        if pattern not in (None, "json", "answer"):
            _compiled(pattern)
        return pattern

    @field_validator("answer_pattern")
    @classmethod
    def _one_group(cls, pattern: str | None) -> str | None:
        groups = 1 if pattern is None else _compiled(pattern).groups
        if groups != 1:
            raise ValueError(f"must hold exactly one group (...), it holds {groups}")
        return pattern


class Recipe(Section):
    """What to distil, from whom, on which prompts, and how."""

    student: StudentConfig = Field(description="the model that samples and learns")
    teacher: list[TeacherConfig] = Field(min_length=1, description="[teacher], or several [[teacher]] with names")
    prompts: PromptsConfig = Field(description="training prompts")
    rollouts: RolloutsConfig = Field(default=RolloutsConfig(), description="sampling")
    score: ScoreConfig = Field(default=ScoreConfig(), description="scoring")
    vllm: VllmConfig = Field(default=VllmConfig(), description="the vLLM engine, where it samples or scores")
    train: TrainConfig = Field(default=TrainConfig(), description="training")
    reward: RewardConfig = Field(default=RewardConfig(), description="task reward beside the teacher")
    select: SelectConfig = Field(default=SelectConfig(), description="which tokens are trained on")
    distill: DistillConfig = Field(default=DistillConfig(), description="rounds of the three")
    eval: EvalConfig = Field(default=EvalConfig(), description="evaluation")
    sft: SftConfig = Field(default=SftConfig(), description="fine-tuning on documents and chats")
    continual: ContinualConfig = Field(default=ContinualConfig(), description="new knowledge and old behaviour")
    track: TrackConfig = Field(default=TrackConfig(), description="experiment trackers")

    @model_validator(mode="before")
    @classmethod
    def _no_credentials(cls, data: Any) -> Any:
        for path, text in credentials.in_settings(data):
            raise ValueError(f"{path} {credentials.message(text, path)}")
        return data

    @model_validator(mode="before")
    @classmethod
    def _one_teacher_or_several(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("teacher"), dict):
            data = data | {"teacher": [data["teacher"]]}
        return data

    @model_validator(mode="after")
    def _settings_fit_together(self) -> Self:
        names = [teacher.name for teacher in self.teacher]
        if repeated := _repeated(names):
            raise ValueError(f"two teachers are named {repeated!r}; give each [[teacher]] its own name")
        rewarded = self.reward.coefficient > 0
        if (self.train.loss == "importance_sampling" or rewarded) and self.rollouts.top_p < 1:
            what = 'rollouts.top_p must be 1 for train.loss = "importance_sampling"'
            raise ValueError(
                f"{'rollouts.top_p must be 1 for rewards' if rewarded else what}, got {self.rollouts.top_p}: tokens "
                "outside the nucleus have no ratio; set it to 1"
                + ("" if rewarded else ' or train.loss = "reverse_kl"')
            )
        if rewarded and self.rollouts.rollouts_per_prompt == 1:
            raise ValueError(
                "reward.coefficient needs rollouts.rollouts_per_prompt of 2 or more, got 1: a rollout's advantage is "
                "over the others of its prompt"
            )
        if rewarded and self.rollouts.temperature == 0:
            raise ValueError(
                "reward.coefficient needs rollouts.temperature above 0, got 0: greedy rollouts of a prompt are "
                "all the same, so none is better than another"
            )
        if rewarded and self.train.loss == "cross_entropy":
            raise ValueError('reward.coefficient needs rollouts of the student\'s, got train.loss = "cross_entropy"')
        if self.reward.teacher_weight == 0 and not (rewarded and self.train.loss == "importance_sampling"):
            raise ValueError(
                "reward.teacher_weight = 0 leaves rewards alone, which is a policy gradient: set reward.coefficient "
                f'above 0 and train.loss = "importance_sampling", got {self.reward.coefficient:g} and '
                f'"{self.train.loss}"'
            )
        if rewarded and self.reward.verifier == "format" and self.eval.format is None:
            raise ValueError('reward.verifier = "format" needs eval.format: what a legal response is')
        if self.train.loss != "importance_sampling" and not rewarded:
            defaults = TrainConfig()
            for name in ("advantage", "ratio_truncation", "ppo_clip", "behaviour_correction"):
                if (value := getattr(self.train, name)) != getattr(defaults, name):
                    raise ValueError(
                        f'train.{name} = {value!r} belongs to train.loss = "importance_sampling", '
                        f'got "{self.train.loss}", which does not use it'
                    )
        if self.train.warmup_steps > self.train.steps:
            raise ValueError(
                f"train.warmup_steps = {self.train.warmup_steps} is more than train.steps = {self.train.steps}, so "
                "train.learning_rate would never be reached; lower it, or raise train.steps"
            )
        sharded, in_bits = self.train.parallel == "fsdp", self.student.quantisation or self.train.optimizer
        if sharded and in_bits != "adamw":
            raise ValueError(
                f'train.parallel = "fsdp" with {in_bits} corrupts weights or memory without an error '
                '(bitsandbytes #1633, accelerate #3983); use "ddp", or neither nf4 nor adamw_8bit'
            )
        if self.train.method == "full" and self.student.quantisation:
            raise ValueError(
                f'train.method = "full" cannot train weights in {self.student.quantisation}; '
                'set it to "lora" or leave student.quantisation out'
            )
        watched = self.train.heldout_metric
        if watched == "reverse_kl" and self.train.loss == "cross_entropy":
            raise ValueError(
                'train.heldout_metric = "reverse_kl" needs a teacher, got train.loss = "cross_entropy"; use '
                '"accuracy" or "format"'
            )
        if watched == "reverse_kl" and self.reward.teacher_weight == 0:
            raise ValueError(
                'train.heldout_metric = "reverse_kl" needs a teacher, got reward.teacher_weight = 0; use '
                '"accuracy" or "format"'
            )
        if watched in ("accuracy", "format") and self.eval.path is None:
            raise ValueError(f'train.heldout_metric = "{watched}" needs eval.path: held-out prompts')
        if watched == "format" and self.eval.format is None:
            raise ValueError('train.heldout_metric = "format" needs eval.format: what a legal response is')
        if self.eval.format == "answer" and self.eval.match == "exact" and self.eval.answer_pattern is None:
            raise ValueError(
                'eval.format = "answer" needs eval.answer_pattern, or eval.match = "number" or "math": the whole '
                "response is the answer now, and every one is legal"
            )
        if (
            self.rollouts.engine == "vllm"
            and self.rollouts.temperature != 0
            and not 0.01 <= self.rollouts.temperature <= 2
        ):
            raise ValueError(
                'rollouts.temperature must be 0, or 0.01 to 2, for rollouts.engine = "vllm", '
                f"got {self.rollouts.temperature:g}: vLLM refuses others or replaces them"
            )
        for model in (self.student, *self.teacher):
            if model.quantisation and (placement := self.placement(model)) != "resident":
                section = f"teacher {model.name!r}" if isinstance(model, TeacherConfig) else "student"
                raise ValueError(
                    f'quantisation = "{model.quantisation}" of the {section} needs placement "resident", got '
                    f'"{placement}"; set score.placement to "resident", and placement of a teacher that needs another'
                )
        for teacher in self.teacher:
            if self.score.alignment == "spans" and self.placement(teacher) in ("vllm", "server"):
                raise ValueError(
                    f'score.alignment = "spans" needs placement "resident" or "streamed" of {teacher.name!r}, got '
                    f'"{self.placement(teacher)}"'
                )
            if self.placement(teacher) == "server" and teacher.url is None:
                raise ValueError(
                    f'placement "server" of teacher {teacher.name!r} needs teacher.url, the base URL of its API, '
                    "e.g. http://localhost:8000/v1"
                )
            if self.placement(teacher) == "server" and teacher.adapter is not None and teacher.served_name is None:
                raise ValueError(
                    f'placement "server" of teacher {teacher.name!r} with an adapter needs teacher.served_name, '
                    "the name by which the server applies it"
                )
        if self.prompts.template == "none" and (self.prompts.system is not None or self.prompts.template_args):
            raise ValueError(
                'prompts.system and prompts.template_args need a chat template, got prompts.template = "none"'
            )
        return self

    def placement(self, model: ModelConfig) -> Placement:
        """How a scorer of this recipe is placed. The student, which brings the candidates, is always read here."""
        if isinstance(model, TeacherConfig):
            return model.placement or self.score.placement
        return self.score.placement if self.score.placement in ("resident", "streamed") else "resident"

    @property
    def teacher_names(self) -> list[str]:
        return [teacher.name for teacher in self.teacher]

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str = "recipe", overrides: Sequence[str] = ()) -> Recipe:
        """Check plain data (as TOML gives it) after `section.key=value` overrides. Raises `ConfigError`, one line."""
        settings.check_plain(data, where)
        data = copy.deepcopy(data)
        overridden = [settings.apply_override(cls, data, text) for text in overrides]
        _without_removed(data, where, overridden)
        settings.check_plain(data, "--set")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError(settings.explain(cls, error, data, where, overridden)) from None

    def to_toml(self, *, explained: bool = False) -> str:
        """The whole recipe, defaults included, as TOML that `load_recipe` reads back to an equal recipe.

        `explained` adds to every setting what it means and what it accepts.
        """
        return settings.to_toml(self, explained=explained)

    def warnings(self) -> list[str]:
        """One line for each setting that works but that practice has corrected: the reason, and the better value."""
        rollouts, train, score = self.rollouts, self.train, self.score
        found = []
        wrote, names = self.student.sft_teacher, [teacher.model for teacher in self.teacher]
        if wrote is not None and wrote not in names:
            found.append(
                f"student.sft_teacher = {wrote!r}, and the teacher is {', '.join(names)}: a student that learnt one "
                "model's answers gains less from another (6.8 points less on AIME, arXiv:2604.13010); use the "
                "same one"
            )
        if rollouts.temperature < 1:
            effect = (
                "under importance sampling the on-policy reverse KL then rises instead of falling"
                if train.loss == "importance_sampling" and not train.behaviour_correction
                else "the student is then corrected only where it was already sure"
            )
            found.append(
                f"rollouts.temperature = {rollouts.temperature:g}: tempered rollouts miss most of the student's "
                f"support; {effect}; 1 is advised"
            )
        if rollouts.temperature == 0 and rollouts.rollouts_per_prompt > 1:
            found.append(
                f"rollouts.rollouts_per_prompt = {rollouts.rollouts_per_prompt} at temperature 0: "
                "all rollouts of a prompt are the same; use 1, or a temperature of 1"
            )
        if rollouts.top_p < 1:
            found.append(
                f"rollouts.top_p = {rollouts.top_p:g}: what the student says outside the nucleus is never corrected; "
                "1 is advised"
            )
        if self.student.quantisation and rollouts.engine == "vllm":
            found.append(
                f'student.quantisation = "{self.student.quantisation}": vLLM samples from the unquantised student; '
                "`redpen score` tells how far that is from the one that learns"
            )
        if train.method == "lora" and train.learning_rate < 1e-5:
            found.append(
                f"train.learning_rate = {train.learning_rate:g}: moves nothing under Adam with LoRA; "
                "about 1e-4 is advised"
            )
        if train.method == "lora" and train.lora_rank < 32:
            found.append(f"train.lora_rank = {train.lora_rank}: small ranks lose accuracy; 32 or more is advised")
        if train.advantage == "cached":
            found.append(
                'train.advantage = "cached": right for one pass over the rollouts only (a second is refused); '
                '"current" may be replayed'
            )
        if train.loss == "reverse_kl" and score.candidates == 1:
            found.append(
                "score.candidates = 1: reverse_kl then sees the sampled token and the rest only, not which "
                "other token the teacher prefers; 8 or more is advised"
            )
        return found + idle_settings(self)

    def check_single_use(self, n_prompts: int) -> None:
        """Refuse `advantage = "cached"` where the training steps would use a round of `n_prompts` more than once.

        Replayed, the optimum of the cached advantage is a point mass on the best rollout.
        """
        wanted = self.train.steps * self.train.prompts_per_step
        if self.train.loss == "importance_sampling" and self.train.advantage == "cached" and wanted > n_prompts:
            steps = max(n_prompts // self.train.prompts_per_step, 1)
            raise ConfigError(
                f'train.advantage = "cached" is right for one pass only: {self.train.steps} steps x '
                f"{self.train.prompts_per_step} prompts need {wanted} prompts, the round holds {n_prompts}; "
                f'set train.steps to {steps} or train.advantage to "current"'
            )


def _without_removed(data: dict[str, Any], where: str, overridden: Sequence[str]) -> None:
    """Leave out settings that are no more where they are as they were by default. Raises `ConfigError` elsewhere."""
    for name, (accepted, reason) in REMOVED.items():
        section, _, key = name.partition(".")
        table = data.get(section)
        if isinstance(table, dict) and key in table and table.pop(key) != accepted:
            raise ConfigError(
                f"{'--set' if name in overridden else where + ':'} {name} was removed ({reason}); leave it out"
            )


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a shipped recipe by name, or a TOML file, apply `section.key=value` overrides, and check it.

    An override's value is read as TOML and, where it is none, as text; an empty value returns the setting to its
    default. Raises `ConfigError` with one line.
    """
    return Recipe.from_dict(*_read(name_or_path), overrides)


def load_stored_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe.toml of a run directory, which an older redpen may have written."""
    return load_recipe(os.fspath(path), overrides)


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.name.removesuffix(".toml") for path in _shipped().iterdir() if path.name.endswith(".toml"))


def recipe_text(name: str) -> str:
    """A shipped recipe as it is written, comments included."""
    if name not in recipe_names():
        raise ConfigError(
            f"recipe {name}: expected one of {', '.join(recipe_names())}{messages.did_you_mean(name, recipe_names())}"
        )
    return (_shipped() / f"{name}.toml").read_text(encoding="utf-8")


def _shipped() -> Traversable:
    return resources.files("pipeline") / "recipes"


def _read(name_or_path: str) -> tuple[dict[str, Any], str]:
    where = f"recipe {messages.clip(name_or_path)}"
    if name_or_path in recipe_names():
        return settings.parse_toml(recipe_text(name_or_path), where), where
    try:
        path = Path(name_or_path)
        if not name_or_path or not path.exists():
            raise FileNotFoundError
        return settings.parse_toml(files.read_text(path, at_most=_AT_MOST, error=ConfigError), where), where
    except FileNotFoundError:
        raise ConfigError(
            f"{where}: no such file; expected a TOML file or one of {', '.join(recipe_names())}"
            + messages.did_you_mean(name_or_path, recipe_names())
        ) from None
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read: {error.strerror}") from None
