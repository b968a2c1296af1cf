"""The prompts of a teacher: what it reads of each row, rendered by its own tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.config import PromptsConfig, Recipe, TeacherConfig
from pipeline.console import warn
from pipeline.engines.sampling import require_room
from pipeline.errors import ModelNotFoundError, PromptError
from pipeline.models.resolve import ResolvedModel, resolve
from pipeline.text.records import TEACHER_FIELDS
from pipeline.text.rendering import render_all, template_identity
from pipeline.text.teacher_prompt import TeacherPrompt

Records = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class TeacherPrompts:
    """A teacher's token ids of every prompt.

    Attributes:
        made_of: the text's template, columns and digest, if it is made of columns, for the provenance of the scores.
    """

    ids: list[npt.NDArray[np.int32]]
    made_of: dict[str, Any] = field(default_factory=dict)


def has_own_prompts(cfg: TeacherConfig, records: Records) -> bool:
    """Whether prompts are rendered for this teacher, rather than passed as the student's token ids."""
    return cfg.renders or any(map(TeacherPrompt.of(cfg).of_row, records))


def teacher_prompts(recipe: Recipe, teacher: ResolvedModel, records: Records, source: str) -> TeacherPrompts:
    """What a teacher reads of these rows.

    Args:
        source: where the rows are from, for messages.

    Raises:
        MissingColumnError: a row lacks a column that its text is made of.
        PromptError: a prompt does not fit its template, or its context.
    """
    cfg, context = settings_of(teacher), teacher.context
    read, made_of = _read(cfg, records, source)
    longest = context or np.iinfo(np.int32).max
    named = {name: f"teacher.{name}" for name in ("system", "template_args") if getattr(cfg, name) is not None}
    rendering = _rendering(recipe, cfg).model_copy(update={"path": source})
    ids = render_all(read, teacher.tokenizer, rendering, longest, context, reader="teacher", named=named)
    return TeacherPrompts(ids, made_of)


def check_prompts(recipe: Recipe, records: Records, source: str) -> None:
    """Refuse rows of which a teacher cannot read what the recipe wants, before anything is sampled.

    Of a teacher that is not available yet, `redpen score` checks the lengths. Raises as `teacher_prompts`, and
    `ConfigError` if the longest response does not fit after a prompt.
    """
    for cfg in recipe.teacher:
        if not has_own_prompts(cfg, records):
            continue
        if 0 < (n := sum(map(TeacherPrompt.of(cfg).of_row, records))) < len(records):
            own = " or ".join(TEACHER_FIELDS)
            warn(
                f"{cfg.name}: {len(records) - n:,} of {len(records):,} prompts have no {own}; it reads them as the "
                "student does"
            )
        try:
            teacher = resolve(cfg)
            prompts, context = teacher_prompts(recipe, teacher, records, source), teacher.context
        except ModelNotFoundError:
            _read(cfg, records, source)
            continue
        longest = recipe.rollouts.max_response_tokens
        require_room(prompts.ids, longest, context, "rollouts.max_response_tokens", f"{cfg.name}'s")


def template_of(
    recipe: Recipe, teacher: ResolvedModel, students: dict[str, Any], made_of: dict[str, Any]
) -> dict[str, Any]:
    """How a teacher's prompts are rendered and its responses end, as JSON for the provenance of its scores.

    Args:
        students: the same for the student.
        made_of: of the teacher's prompts.
    """
    cfg, rendering = settings_of(teacher), dict(students)
    if cfg.renders or made_of:
        rendering = template_identity(teacher.tokenizer, _rendering(recipe, cfg)) | made_of
        rendering |= {"prefix": cfg.prompt_prefix} if cfg.prompt_prefix is not None else {}
    return rendering | ({"stop_token": cfg.stop_token} if cfg.stop_token is not None else {})


def settings_of(teacher: ResolvedModel) -> TeacherConfig:
    assert isinstance(teacher.settings, TeacherConfig)
    return teacher.settings


def _read(cfg: TeacherConfig, records: Records, source: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What the teacher reads of each row, and what that is made of."""
    prompt, read = TeacherPrompt.of(cfg), []
    for number, record in enumerate(records, 1):
        try:
            read.append(prompt.read(record))
        except PromptError as error:
            raise type(error)(f"{source}: prompt {number}: {error}") from None
    return read, prompt.provenance(records, read)


def _rendering(recipe: Recipe, teacher: TeacherConfig) -> PromptsConfig:
    own = {"template": teacher.template, "template_args": teacher.template_args, "system": teacher.system}
    return recipe.prompts.model_copy(update={name: value for name, value in own.items() if value is not None})
