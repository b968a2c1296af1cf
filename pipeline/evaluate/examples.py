"""Responses before and after training, side by side on stdout: what an evaluation changed, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.console import show, warn
from pipeline.text.answers import Checker, answers_of, none_right
from pipeline.text.records import content_text

# Prompts that are shown; characters of a text that are, of its beginning and of its end.
_PROMPTS, _BEGINNING, _END = 3, 200, 80


@dataclass(frozen=True)
class Responses:
    """One student's response to each prompt, by the prompt's number; `kind` is how they were made."""

    kind: str
    texts: Mapping[int, str]


def show_responses(
    responses: Mapping[str, Responses], records: Sequence[Mapping[str, Any]], checker: Checker
) -> None:
    """Print the first prompts whose response changed, with the response of every student.

    Args:
        responses: by the student's label; the same kind and prompts for all. One student alone has no change, so its
            first responses are shown.
    """
    students = list(responses.values())
    kind, numbers = students[0].kind, list(students[0].texts)
    if len(students) > 1:
        changed = [n for n in numbers if len({student.texts[n] for student in students}) > 1]
        which = f", the first {min(_PROMPTS, len(changed))} of them:" if changed else ""
        show(f"{len(changed)} of {len(numbers)} {kind} responses changed{which}")
        numbers = changed
    else:
        show(f"the first of {len(numbers)} {kind} responses:")
    for label, student in responses.items():
        answered = {n: answers for n in student.texts if (answers := answers_of(records[n])) is not None}
        texts = [student.texts[n] for n in answered]
        if (line := none_right(texts, list(answered.values()), checker)) is not None:
            warn(f"{label}: {line}")
    width = max(len("prompt"), *(len(label) for label in responses))
    for number in numbers[:_PROMPTS]:
        accepted = answers_of(records[number])
        wanted = "" if accepted is None else f"  (answer: {_shortened(' or '.join(accepted))})"
        show(f"  {'prompt':{width}}  {_shortened(prompt_text(records[number]))}{wanted}")
        for label, student in responses.items():
            text = student.texts[number]
            mark = "" if accepted is None else "right  " if checker.is_right(text, accepted) else "wrong  "
            show(f"  {label:{width}}  {mark}{_shortened(text)}")


def prompt_text(record: Mapping[str, Any]) -> str:
    """A prompt, or the last message of a chat."""
    return str(record["prompt"]) if "prompt" in record else content_text(record["messages"][-1])


def _shortened(text: str) -> str:
    text = text.strip()
    return text if len(text) <= _BEGINNING + _END else f"{text[:_BEGINNING]} ... {text[-_END:]}"
