"""Settings of models and prompts: [student], [teacher] and [prompts]."""

from __future__ import annotations

import json
import re
from typing import Any, Literal

from pydantic import Field, field_validator

from pipeline.config.schema import MANY, NAME, PATH, Section

Placement = Literal["resident", "streamed", "vllm", "server"]

#: Arguments of `apply_chat_template` that redpen sets, or that are not variables of the template.
_RESERVED_TEMPLATE_ARGS = {
    *("messages", "add_generation_prompt", "continue_final_message", "chat_template", "conversation", "tokenize"),
    *("padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
    "tokenizer_kwargs",
}


def _check_template_args(args: dict[str, Any]) -> dict[str, Any]:
    try:  # they are recorded as provenance, in JSON
        json.dumps(args, allow_nan=False)
    except (TypeError, ValueError):
        raise ValueError("must hold only text, numbers, true/false, lists and tables") from None
    if reserved := sorted(_RESERVED_TEMPLATE_ARGS & args.keys()):
        raise ValueError(f"must hold variables of the chat template; {reserved[0]} is set by redpen")
    return args


class ModelConfig(Section):
    """A model, by Hub id or path, and how to load it."""

    model: str = Field(
        min_length=1, max_length=PATH, description="Hub id, local path, or toy:student, toy:teacher, toy:reader"
    )
    revision: str | None = Field(default=None, max_length=PATH, description="Hub branch, tag or commit")
    adapter: str | None = Field(
        default=None, max_length=PATH, description="PEFT adapter (directory or Hub id) applied on top"
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        default="bfloat16", description="dtype of the weights; auto: the checkpoint's"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: cuda if available, else cpu")
    trust_remote_code: bool = Field(default=False, description="run Python code that comes with the model")
    quantisation: Literal["nf4"] | None = Field(
        default=None,
        description="nf4: quantise linear layers to 4 bits while loading (extra quant); default: as stored",
    )


class StudentConfig(ModelConfig):
    """The model that samples rollouts and is trained."""

    sft_teacher: str | None = Field(
        default=None,
        description="the model that wrote the student's SFT answers, if any; redpen warns if the teacher is another",
    )


class TeacherConfig(ModelConfig):
    """A model that scores the student's rollouts."""

    name: str = Field(default="teacher", max_length=NAME, description="name of this teacher's scores in the cache")
    placement: Placement | None = Field(default=None, description="where this teacher runs; default: score.placement")
    url: str | None = Field(
        default=None,
        max_length=PATH,
        description="placement server: base URL of its API, e.g. http://localhost:8000/v1",
    )
    served_name: str | None = Field(
        default=None, max_length=PATH, description="placement server: the model's name there; default: model"
    )
    template: Literal["auto", "chat", "none"] | None = Field(
        default=None,
        description="render prompts for this teacher, as prompts.template does; default: the student's token ids",
    )
    template_args: dict[str, Any] | None = Field(
        default=None, description="variables of this teacher's chat template; default: prompts.template_args"
    )
    system: str | None = Field(default=None, description="system message for this teacher; default: prompts.system")
    prompt: str | None = Field(
        default=None,
        max_length=2**15,
        description="what this teacher reads in place of a prompt (a chat's last user message): a Jinja template "
        "over the row's columns, e.g. '{{ prompt }} Solution: {{ solution }}'; default: the row's teacher_messages "
        "or teacher_prompt, if it has them",
    )
    prompt_prefix: str | None = Field(
        default=None,
        description="text before every prompt (a chat's first user message) that only this teacher is given",
    )
    stop_token: str | None = Field(
        default=None,
        description="token scored in place of the student's EOS, e.g. '<|im_end|>'; default: the student's EOS",
    )

    @property
    def renders(self) -> bool:
        """Whether the recipe has prompts rendered for this teacher; rows may have their own text for it, too."""
        rendering = (self.template, self.template_args, self.system, self.prompt, self.prompt_prefix)
        return any(value is not None for value in rendering)

    @field_validator("template_args")
    @classmethod
    def _template_args(cls, args: dict[str, Any] | None) -> dict[str, Any] | None:
        return None if args is None else _check_template_args(args)

    @field_validator("name")
    @classmethod
    def _name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) or name == "student":
            raise ValueError("must be letters, digits, - and _, and not 'student'")
        return name


class PromptsConfig(Section):
    """Where prompts come from and how they are rendered."""

    path: str = Field(
        min_length=1, max_length=PATH, description="JSONL or Parquet file, Hub dataset id, or toy:train"
    )
    split: str = Field(default="train", max_length=PATH, description="split of a Hub dataset")
    skip: int = Field(default=0, ge=0, le=MANY, description="number of prompts to skip at the start")
    limit: int | None = Field(default=None, ge=1, le=MANY, description="number of prompts to use; default: all")
    columns: list[str] = Field(
        default_factory=list,
        description="columns to keep in the cache beside those that a teacher.prompt names, for teachers added later",
    )
    template: Literal["auto", "chat", "none"] = Field(
        default="auto",
        description="auto: the tokenizer's chat template if it has one; chat: require one; none: the plain text",
    )
    template_args: dict[str, Any] = Field(
        default_factory=dict, description="variables of the chat template, e.g. enable_thinking"
    )
    system: str | None = Field(default=None, description="system message for prompts that bring none")

    @field_validator("template_args")
    @classmethod
    def _template_args(cls, args: dict[str, Any]) -> dict[str, Any]:
        return _check_template_args(args)
