"""What a teacher reads in place of a prompt: text that the recipe makes of a row's columns, or columns of the row.

`teacher.prompt` is a Jinja template over the columns of a row. Its text takes the place of the row's `prompt`, or of
the last user message of its chat, which is `{{ prompt }}` then. Without such a template, a row's `teacher_prompt`
takes that place, or its `teacher_messages` that of the whole chat. `teacher.prompt_prefix` comes before that.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import cache_schema as cs
from pipeline.config import Recipe, TeacherConfig
from pipeline.errors import ConfigError, PromptError, shorten
from pipeline.text.chat_template import renderer
from pipeline.text.records import TEACHER_FIELDS, content_text

Record = dict[str, Any]


class MissingColumnError(PromptError):
    """A row lacks a column of the teacher's text."""


@dataclass(frozen=True)
class TeacherPrompt:
    """How a teacher's prompts are made of the rows.

    Attributes:
        template, prefix: `teacher.prompt` and `teacher.prompt_prefix`.
        setting: the template's name, for messages.
    """

    template: str | None = None
    prefix: str | None = None
    setting: str = field(default="teacher.prompt", compare=False)

    @classmethod
    def of(cls, cfg: TeacherConfig) -> TeacherPrompt:
        """By the recipe."""
        setting = "teacher.prompt" if cfg.name == "teacher" else f"teacher.{cfg.name}.prompt"
        return cls(cfg.prompt, cfg.prompt_prefix, setting)

    @classmethod
    def of_scores(cls, made: Mapping[str, Any]) -> TeacherPrompt:
        """By the provenance of a teacher's scores, whatever somebody's cache holds there."""
        template, prefix = (text if isinstance(text := made.get(key), str) else None for key in ("prompt", "prefix"))
        return cls(template, prefix)

    def columns(self) -> tuple[str, ...]:
        """The columns that the template names. Raises `ConfigError` if it is no template, or names none."""
        return () if self.template is None else _columns(self.template, self.setting)

    def of_row(self, record: Record) -> bool:
        """Whether the row itself says what this teacher reads."""
        return self.template is None and any(name in record for name in TEACHER_FIELDS)

    def read(self, record: Record) -> Record:
        """The record with what the teacher reads as `prompt` or `messages`.

        Raises:
            MissingColumnError: it lacks a column.
            PromptError: the template fails, takes too long or too much memory, or writes nothing.
        """
        seen = {name: value for name, value in record.items() if name not in TEACHER_FIELDS}
        if self.template is not None:
            seen |= _in_place_of_prompt(seen, self._text(record))
        elif "teacher_messages" in record:
            seen.pop("prompt", None)
            seen["messages"] = record["teacher_messages"]
        elif "teacher_prompt" in record:
            seen |= _in_place_of_prompt(seen, record["teacher_prompt"])
        if self.prefix is None:
            return seen
        if "prompt" in seen:
            return seen | {"prompt": self.prefix + seen["prompt"]}
        messages = list(seen["messages"])
        first = next((n for n, message in enumerate(messages) if message["role"] == "user"), len(messages) - 1)
        messages[first] = messages[first] | {"content": self.prefix + content_text(messages[first])}
        return seen | {"messages": messages}

    def provenance(self, records: Sequence[Record], read: Sequence[Record]) -> dict[str, Any]:
        """JSON for the manifest of the scores: template, columns, and digest of the texts; empty if they are made of
        neither.

        Args:
            records, read: the rows, and what the teacher reads of each.
        """
        own = sorted({name for name in TEACHER_FIELDS for record in records if name in record})
        columns = own if self.template is None else list(self.columns())
        if not columns:
            return {}
        texts = [
            {name: value for name, value in one.items() if name in ("prompt", "messages", "tools")} for one in read
        ]
        made = {} if self.template is None else {"prompt": self.template}
        return made | {"columns": columns, "texts_sha256": cs.prompts_sha256(texts)}

    def _text(self, record: Record) -> str:
        assert self.template is not None
        reply = renderer().render(self.template, {"prompt": prompt_text(record), **record}, self.setting)
        if "error" not in reply:
            if not reply["text"].strip():
                raise PromptError(f"{self.setting}: expected text, the template writes none")
            return str(reply["text"])
        kind, _, message = str(reply["error"]).partition(": ")
        if kind == "UndefinedError":
            has = ", ".join(sorted({"prompt", *record}))
            raise MissingColumnError(f"{self.setting}: {shorten(message)}; the row has {has}")
        raise PromptError(f"{self.setting}: {shorten(reply['error'])}")


def kept_columns(recipe: Recipe) -> tuple[str, ...]:
    """The columns of the prompts file that the cache keeps beside those that every row may have."""
    named = [name for teacher in recipe.teacher for name in TeacherPrompt.of(teacher).columns()]
    return tuple(dict.fromkeys([*named, *recipe.prompts.columns]))


def has_own_text(template: Mapping[str, Any]) -> bool:
    """Whether a teacher read other text than the student, apart from the chat template."""
    return bool(template.keys() & {"prompt", "prefix", "columns"})


def read_text(template: Mapping[str, Any], record: Record) -> str | None:
    """What a teacher read of a row, for people; None if it read what the student did, apart from the chat template.

    Args:
        template: of the manifest of its scores.

    Raises `PromptError`.
    """
    if not has_own_text(template):
        return None
    read = TeacherPrompt.of_scores(template).read(record)
    if "prompt" in read:
        return str(read["prompt"])
    changed = [message for message in read["messages"] if message not in record.get("messages", [])]
    return "\n".join(f"{message['role']}: {content_text(message)}" for message in changed or read["messages"])


def prompt_text(record: Record) -> str:
    """The text of a row's prompt, or of the last user message of its chat."""
    return str(record["prompt"]) if "prompt" in record else content_text(record["messages"][_last_user(record)])


def _in_place_of_prompt(record: Record, text: str) -> Record:
    if "prompt" in record:
        return {"prompt": text}
    messages = list(record["messages"])
    last = _last_user(record)
    messages[last] = messages[last] | {"content": text}
    return {"messages": messages}


def _last_user(record: Record) -> int:
    messages = record["messages"]
    return next((n for n in reversed(range(len(messages))) if messages[n]["role"] == "user"), len(messages) - 1)


@functools.lru_cache(64)
def _columns(template: str, setting: str) -> tuple[str, ...]:
    reply = renderer().render(template, None, setting)
    if "error" in reply:
        raise ConfigError(f"{setting}: expected a Jinja template, got {shorten(reply['error'])}")
    if not reply["names"]:
        raise ConfigError(
            f"{setting} names no column, such as {{{{ prompt }}}}: the teacher would read the same text in place of "
            "every prompt; name those that it needs"
        )
    return tuple(reply["names"])
