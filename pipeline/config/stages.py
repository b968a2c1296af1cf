"""Settings of sampling, scoring and evaluation: [rollouts], [score], [vllm] and [eval]."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from pipeline.config.models import Placement
from pipeline.config.schema import CONTEXT, MANY, PATH, Section


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"must be a regular expression: {error}") from None
    except (OverflowError, RecursionError, MemoryError) as error:
        raise ValueError(f"must be a regular expression that Python can compile: {error}") from None


class RolloutsConfig(Section):
    """Stage one: the student samples responses."""

    engine: Literal["transformers", "vllm"] = Field(default="transformers", description="sampling engine")
    rollouts_per_prompt: int = Field(default=4, ge=1, le=64, description="responses sampled for each prompt")
    temperature: float = Field(
        default=1.0, ge=0, le=10, description="1: the student's own distribution; 0: greedy decoding"
    )
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="nucleus sampling; importance sampling and rewards need 1"
    )
    max_prompt_tokens: int = Field(default=1024, ge=1, le=CONTEXT, description="longer prompts are refused")
    max_response_tokens: int = Field(default=2048, ge=1, le=CONTEXT, description="longer responses are truncated")
    stop_token_ids: list[Annotated[int, Field(ge=0, le=MANY)]] | None = Field(
        default=None, min_length=1, description="token ids that end a response; default: the model's EOS ids"
    )
    seed: int = Field(
        default=0,
        ge=0,
        le=2**31 - 1,
        description="seed; a rollout depends on it, the round, prompt and sample number",
    )
    prompts_per_block: int = Field(
        default=64, ge=1, le=2**16, description="prompts in a block, the unit of writing and resuming"
    )
    batch_size: int = Field(default=256, ge=1, le=2**20, description="rollouts decoded together")
    environment: str | None = Field(
        default=None,
        max_length=PATH,
        description="module:factory of your own code that answers the student's turns, e.g. a tool; "
        "max_response_tokens is then of all turns together; default: a rollout is one turn",
    )
    max_turns: int = Field(default=4, ge=1, le=1024, description="with environment: the student's turns in a rollout")
    environment_timeout: float = Field(
        default=60.0, gt=0, le=86400, description="time that the environment has for one reply, in seconds"
    )
    environment_workers: int = Field(
        default=4, ge=1, le=1024, description="processes that run the environment of one sampler"
    )
    format_check_prompts: int = Field(
        default=32,
        ge=0,
        le=MANY,
        description="with eval.format: responses sampled and checked for legal format before the round; 0: no check",
    )
    format_check_min: float = Field(
        default=0.5, ge=0, le=1, description="fraction of them that must be legal, or the round does not start"
    )

    @field_validator("environment")
    @classmethod
    def _environment(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", name):
            raise ValueError("must be module:factory, e.g. calculator:Calculator")
        return name


class ScoreConfig(Section):
    """Stage one: student and teachers score the rollouts."""

    placement: Placement = Field(
        default="resident",
        description="resident: the whole model on the device; streamed: one layer at a time, for models that do not "
        "fit; vllm, server: teachers in vLLM, in this process or behind teacher.url (the student stays resident)",
    )
    memory_gib: float | None = Field(
        default=None,
        gt=0,
        le=2**20,
        description="placement streamed: device memory to use, in GiB; default: most of what is free",
    )
    tile_tokens: int = Field(
        default=8192, ge=1, le=CONTEXT, description="tokens, prompts included, packed into one forward pass"
    )
    candidates: int = Field(
        default=8, ge=1, le=4096, description="tokens stored for every position, the sampled token included"
    )
    candidate_kind: Literal["topk", "sampled"] = Field(
        default="topk", description="topk: the student's most likely tokens; sampled: drawn from the student"
    )
    teacher_topk: int = Field(
        default=0, ge=0, le=4096, description="the teacher's most likely tokens, stored in addition; 0: none"
    )
    rows_per_chunk: int = Field(
        default=1024, ge=1, le=CONTEXT, description="positions with logits in memory at the same time"
    )
    alignment: Literal["tokens", "spans"] = Field(
        default="tokens",
        description="tokens: teachers must tokenize text as the student does; spans: where they do not, compare "
        "spans of text with shared boundaries (placement resident or streamed)",
    )
    server_requests: int = Field(default=32, ge=1, le=1024, description="placement server: concurrent requests")
    server_timeout: float = Field(
        default=300.0, gt=0, le=86400, description="placement server: timeout of a request, in seconds"
    )
    server_retries: int = Field(default=8, ge=0, le=100, description="placement server: retries of a failed request")


class VllmConfig(Section):
    """vLLM, for rollouts.engine and score.placement."""

    tensor_parallel_size: int = Field(default=1, ge=1, le=2**16, description="GPUs that one model is sharded over")
    gpu_memory_utilization: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="fraction of the device's memory to use; default: 0.9 on a GPU, 0.2 on a CPU",
    )
    enforce_eager: bool = Field(default=False, description="do not compile: starts sooner, runs slower")


class EvalConfig(Section):
    """Evaluation on held-out prompts."""

    path: str | None = Field(
        default=None,
        max_length=PATH,
        description="prompts with an answer: JSONL, Parquet, Hub dataset id or toy:heldout",
    )
    limit: int | None = Field(default=None, ge=1, le=MANY, description="number of prompts to use; default: all")
    samples: int = Field(
        default=1, ge=1, le=64, description="responses sampled for each prompt, in addition to the greedy one"
    )
    temperature: float = Field(default=1.0, gt=0, le=10, description="sampling temperature")
    max_response_tokens: int | None = Field(
        default=None,
        ge=1,
        le=CONTEXT,
        description="longer responses are truncated; default: rollouts.max_response_tokens, or the task's limit",
    )
    match: Literal["exact", "contains", "number", "math"] = Field(
        default="exact",
        description="how answers are compared; exact: as text; contains: the answer's words follow one another in "
        "the response, in any case; number: also as numbers, 1,000 = 1e3, 3/4 = 75 %; math: as expressions, by "
        "math-verify (extra eval)",
    )
    answer_pattern: str | None = Field(
        default=None,
        description="regular expression with one group; its last match in a response is the answer. default: the "
        "whole response (exact), all after </think> (contains), its last number (number), or what math-verify finds "
        "(math)",
    )
    format: str | None = Field(
        default=None,
        min_length=1,
        description="what a legal response is: JSON (json), one with an answer (answer), or a regular expression "
        "that must match all of it; reasoning up to </think> is ignored. default: every response is legal",
    )
    candidates: int = Field(
        default=64, ge=1, le=4096, description="tokens compared at every position for reverse KL to a teacher"
    )
    batch_size: int = Field(default=256, ge=1, le=2**20, description="responses decoded together")
    tasks: list[Annotated[str, Field(min_length=1)]] = Field(
        default=[], description="tasks of lm-evaluation-harness, e.g. ifeval, aime24 (extra eval)"
    )
    task_path: str | None = Field(
        default=None, min_length=1, max_length=PATH, description="directory with your own task files (YAML)"
    )
    task_limit: int | None = Field(
        default=None, ge=1, le=MANY, description="number of examples of each task; default: all"
    )
    reread_rollouts: int = Field(
        default=256,
        ge=0,
        le=MANY,
        description="cached rollouts, those with the highest-loss tokens, that the trained student scores again for "
        "the report",
    )

    @field_validator("format")
    @classmethod
    def _format(cls, pattern: str | None) -> str | None:
        if pattern not in (None, "json", "answer"):
            _compile(pattern)
        return pattern

    @field_validator("answer_pattern")
    @classmethod
    def _answer_pattern(cls, pattern: str | None) -> str | None:
        groups = 1 if pattern is None else _compile(pattern).groups
        if groups != 1:
            raise ValueError(f"must hold exactly one group (...), it holds {groups}")
        return pattern
