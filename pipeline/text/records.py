"""Prompt records: what one line of a prompts file holds, checked.

A record is a JSON object with either `prompt` (text) or `messages` (a chat that ends before the student's turn), and
optionally `tools` (their JSON schemas, for the chat template), `answer` (text, or a list of texts of which each is
right), `source` and `id`, and `teacher_prompt` (text) or `teacher_messages` (a chat), which teachers read instead.
ShareGPT's `conversations` are converted to `messages`. Messages keep all of their fields, for the chat template. Of
the record other fields are dropped unless they are asked for. Nulls and NaN count as absent; within chats and tools
only those of Parquet (`without_filled_nulls`). Each error is one line with the place, what was expected and what was
found.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from pipeline.config.messages import show_value
from pipeline.errors import PromptError

TEACHER_FIELDS = ("teacher_prompt", "teacher_messages")
FIELDS = ("prompt", "messages", "conversations", "tools", "answer", "source", "id", *TEACHER_FIELDS)
#: Fields that may also be the text of their JSON, as in Parquet, which has one type a column.
_JSON_FIELDS = ("messages", "teacher_messages", "tools")
# A prompt may be a chat, too.
_OF_CHATS = (*_JSON_FIELDS, "conversations", "prompt")
#: Answers of a prompt, and characters of each: every response is compared with all of them.
_MOST_ANSWERS, _ANSWER_AT_MOST = 1000, 2**16
#: From here on not every integer is a float.
_INEXACT = 2**53
#: Roles by ShareGPT's `from`.
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant"}
_ROLES |= {"bing": "assistant", "bard": "assistant", "model": "assistant", "system": "system"}


class RepeatedKeyError(ValueError):
    """An object of JSON has a key twice, and Python would take the last."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads(..., object_pairs_hook=unique_keys)`. Raises `RepeatedKeyError`."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RepeatedKeyError(f"expected every key once, got {show_value(twice)} more often; keep one")
    return found


def check_record(value: Any, place: str, columns: Sequence[str] = ()) -> dict[str, Any]:
    """The prompt record of one line, with only the fields in `FIELDS` and these `columns`.

    Raises `PromptError` naming `place`.
    """
    if not isinstance(value, dict):
        raise PromptError(f"{place}: expected an object with prompt or messages, got {_kind(value)}")
    record = known_fields(value, place, (*FIELDS, *columns))
    if isinstance(record.get("prompt"), list):  # the conversational form of TRL and many Hub datasets
        record["messages"] = record.pop("prompt") if "messages" not in record else record["messages"]
    if "prompt" in record and "messages" in record:
        raise PromptError(f"{place}: expected either prompt or messages, got both; keep one")
    if "messages" in record:
        record["messages"] = _check_asked(record["messages"], place, "messages")
    elif "prompt" in record:
        _check_not_empty(record, "prompt", place, "remove the line")
    else:
        raise PromptError(f"{place}: {no_prompt(list(value), 'fields')}")
    if "tools" in record and not check_tools(record["tools"], place):
        del record["tools"]
    if all(name in record for name in TEACHER_FIELDS):
        raise PromptError(f"{place}: expected either {' or '.join(TEACHER_FIELDS)}, got both; keep one")
    if "teacher_messages" in record:
        record["teacher_messages"] = _check_asked(record["teacher_messages"], place, "teacher_messages")
    if "teacher_prompt" in record:
        _check_not_empty(record, "teacher_prompt", place, "remove it")
    for name in columns:
        if name in record and name not in FIELDS:
            _check_column(record[name], name, place)
    if "answer" in record:
        answer = record["answer"]
        several = isinstance(answer, list)
        record["answer"] = _check_answers(answer, place) if several else _check_answer(answer, "answer", place)
    for name in ("source", "id"):
        if name in record:
            record[name] = _check_label(record[name], name, place)
    return record


def check_conversation(
    value: Mapping[str, Any], place: str, columns: Sequence[str] = (), first: int | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """A finished conversation: the record of its prompt, which are the messages before the first assistant turn, or
    before message `first`, and all messages; None if `messages` hold no assistant turn.

    Raises `PromptError` naming `place`.
    """
    record = known_fields(value, place, (*FIELDS, *columns))
    if "messages" not in record or "prompt" in record:
        return None
    messages = _check_messages(record["messages"], place)
    if first is None:
        first = next((number for number, message in enumerate(messages) if message["role"] == "assistant"), None)
    if first is None:
        return None
    if first == 0:
        raise PromptError(
            f"{place}: messages[0]: expected a prompt before the assistant's first turn, got none; add the message "
            "that it answers"
        )
    return check_record(record | {"messages": messages[:first]}, place, columns), messages


def known_fields(value: Mapping[str, Any], place: str, names: Sequence[str]) -> dict[str, Any]:
    """The fields of these names that are not missing: `conversations` as `messages`, the text of JSON read.

    Raises `PromptError` naming `place`.
    """
    record = conversations_to_messages(
        {name: value[name] for name in names if not _is_missing(value.get(name))}, place
    )
    for name in _JSON_FIELDS:
        if isinstance(record.get(name), str):
            try:
                record[name] = json.loads(record[name], object_pairs_hook=unique_keys)
            except RepeatedKeyError as error:
                raise PromptError(f"{place}: {name}: {error}") from None
            except (ValueError, RecursionError):
                pass  # refused as text
    return record


def without_filled_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as Arrow returns it, its chats and tools without the null fields of objects at any depth.

    Arrow has one type a column: every object gets the fields of all others in the column, null where it had none, and
    a chat template would write them, `{"x": 1, "city": null}`. A null that was meant cannot be distinguished.
    """
    return {name: _without_nulls(value) if name in _OF_CHATS else value for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def content_text(message: Mapping[str, Any]) -> str:
    """The text of a message, its parts joined; empty if it has none."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _check_not_empty(record: Mapping[str, Any], name: str, place: str, remedy: str) -> None:
    check_text(record[name], name, place)
    if not record[name].strip():
        raise PromptError(f"{place}: {name}: expected text, got an empty one; {remedy}")


def check_tools(tools: Any, place: str) -> list[dict[str, Any]]:
    """The tools of a chat. Raises `PromptError` naming `place`."""
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        came = f"a list of {_kind(tools[0])}" if isinstance(tools, list) else _kind(tools)
        raise PromptError(f"{place}: tools: expected a list of objects (JSON schemas of functions), got {came}")
    _check_column(tools, "tools", place)
    return tools


def _check_asked(messages: Any, place: str, name: str) -> list[dict[str, Any]]:
    """The messages of a chat that ends before the assistant's turn."""
    checked = _check_messages(messages, place, name)
    if checked[-1]["role"] == "assistant":
        raise PromptError(
            f"{place}: {name}: expected a chat that ends before the student's turn, got one that ends with the "
            "assistant's; remove its last message"
        )
    return checked


def _check_column(value: Any, name: str, place: str) -> None:
    """A column that a teacher's text may be made of is JSON."""
    if isinstance(value, str):
        check_text(value, name, place)
        return
    try:
        json.dumps(value, allow_nan=False).encode()
        return
    except (TypeError, ValueError, RecursionError):
        pass
    raise PromptError(
        f"{place}: {name}: expected text, or numbers, lists and objects of them, got {_kind(value)} that JSON does "
        "not have; convert the column to text"
    )


def conversations_to_messages(record: dict[str, Any], place: str) -> dict[str, Any]:
    """A record with ShareGPT's `conversations`, a list of {from, value}, as `messages`.

    Raises `PromptError` naming `place`.
    """
    if "conversations" not in record:
        return record
    if other := next((name for name in ("messages", "prompt", "text") if name in record), None):
        raise PromptError(f"{place}: expected either {other} or conversations, got both; keep one")
    turns = record["conversations"]
    if not isinstance(turns, list):
        raise PromptError(f"{place}: conversations: expected a list of {{from, value}} objects, got {_kind(turns)}")
    messages = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or turn.get("from") is None:
            messages.append(turn)  # {role, content}, or what is said of messages
            continue
        role = _ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
        if role is None:
            raise PromptError(
                f"{place}: conversations[{number}].from: expected one of {', '.join(_ROLES)}, got "
                f"{show_value(turn['from'])}; convert the column to messages, a list of {{role, content}}"
            )
        rest = {key: item for key, item in turn.items() if key not in ("from", "value")}
        messages.append({"role": role, "content": turn.get("value")} | rest)
    return {name: item for name, item in record.items() if name != "conversations"} | {"messages": messages}


def check_chat(messages: Any, place: str) -> list[dict[str, Any]]:
    """The messages of a chat that ends with the assistant's. Raises `PromptError` naming `place`."""
    checked = _check_messages(messages, place)
    if checked[-1]["role"] != "assistant":
        raise PromptError(
            f"{place}: messages: expected a chat that ends with the assistant's reply, which is trained, got one "
            f"that ends with role {checked[-1]['role']}; add the reply, or remove the line"
        )
    return checked


def _check_messages(messages: Any, place: str, name: str = "messages") -> list[dict[str, Any]]:
    """Messages with their fields as they are, for the chat template; nulls are left out."""
    if not isinstance(messages, list) or not messages:
        came = "an empty list" if messages == [] else _kind(messages)
        raise PromptError(f"{place}: {name}: expected a list of {{role, content}} objects, got {came}")
    checked: list[dict[str, Any]] = []
    for number, message in enumerate(messages):
        label = f"{name}[{number}]"
        if not isinstance(message, dict):
            raise PromptError(f"{place}: {label}: expected an object with role and content, got {_kind(message)}")
        message = {key: item for key, item in message.items() if item is not None}
        wanted = ("role",) if "tool_calls" in message else ("role", "content")
        if any(key not in message for key in wanted):
            raise PromptError(f"{place}: {label}: expected {' and '.join(wanted)}, got {_keys(message)}")
        check_text(message["role"], f"{label}.role", place)
        if not message["role"]:
            raise PromptError(f"{place}: {label}.role: expected system, user, assistant or tool, got an empty one")
        if isinstance(message.get("content"), list):
            _check_parts(message["content"], f"{label}.content", place)
        elif "content" in message:
            check_text(message["content"], f"{label}.content", place)
        for key in message.keys() - {"role", "content"}:
            _check_column(message[key], f"{label}.{key}", place)
        checked.append(message)
    last = checked[-1]
    if last["role"] != "tool" and "tool_calls" not in last and not content_text(last).strip():
        raise PromptError(f"{place}: {name}[{len(messages) - 1}].content: expected text, got an empty one")
    return checked


def _check_parts(parts: list[Any], label: str, place: str) -> None:
    """The content of a message in parts is text."""
    for number, part in enumerate(parts):
        if not isinstance(part, dict) or part.get("type") != "text" or part.keys() != {"type", "text"}:
            came = f"type {show_value(part['type'])}" if isinstance(part, dict) and "type" in part else _kind(part)
            raise PromptError(
                f"{place}: {label}[{number}]: expected a part {{type: text, text: ...}}, got {came}; other parts are "
                "not supported"
            )
        check_text(part["text"], f"{label}[{number}].text", place)


def _is_missing(value: Any) -> bool:
    """Null, or NaN, which is how pandas writes a null among numbers."""
    return value is None or (isinstance(value, float | Decimal) and math.isnan(value))


def _check_answers(values: list[Any], place: str) -> str | list[str]:
    """Several answers of which each is right; one alone as text."""
    if not values:
        raise PromptError(f"{place}: answer: expected text or a list of accepted answers, got an empty list")
    if len(values) > _MOST_ANSWERS:
        raise PromptError(f"{place}: answer: expected at most {_MOST_ANSWERS:,} answers, got {len(values):,}")
    answers = [_check_answer(value, f"answer[{number}]", place) for number, value in enumerate(values)]
    return answers[0] if len(answers) == 1 else answers


def _check_answer(value: Any, name: str, place: str) -> str:
    if isinstance(value, float) and _INEXACT <= abs(value) < math.inf:
        raise PromptError(
            f"{place}: {name}: expected text or a number below 2^53, got {value}, which may have been another "
            "integer before it became a float; give the answer as text"
        )
    answer = _check_label(value, name, place)
    if len(answer) > _ANSWER_AT_MOST:
        raise PromptError(
            f"{place}: {name}: expected at most {_ANSWER_AT_MOST:,} characters, got {len(answer):,}; give what a "
            "response is compared with"
        )
    return answer


def _check_label(value: Any, name: str, place: str) -> str:
    """`answer`, `source` and `id` are text; a number is written out, an integral one without decimals.

    pandas makes 64.0 of an integer as soon as its column holds a null, and 64 is what a model answers.
    """
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        if not isinstance(value, int) and not math.isfinite(value):
            raise PromptError(f"{place}: {name}: expected text or a finite number, got {value}")
        value = _digits(value)
    check_text(value, name, place)
    return str(value)


def _digits(value: float | Decimal) -> str:
    if isinstance(value, Decimal):
        return format(value if value % 1 else value.to_integral_value(), "f")
    exact = isinstance(value, float) and abs(value) < _INEXACT and value == int(value)
    return str(int(value)) if exact else json.dumps(value)


def check_text(value: Any, name: str, place: str) -> None:
    """Raise `PromptError` naming `place` if the value is not text that can be written as UTF-8."""
    if not isinstance(value, str):
        raise PromptError(f"{place}: {name}: expected text, got {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{place}: {name}: expected Unicode text, got half a surrogate pair at character {error.start}"
        ) from None


def no_prompt(names: Sequence[str], what: str) -> str:
    names = [str(name) for name in names]
    near = [
        f"is {_short(name)} your {wanted}?"
        for wanted in ("prompt", "messages")
        for name in difflib.get_close_matches(wanted, names, 1, 0.7)
    ]
    chats = [name for name in names if re.match(r"(conversation|dialog|chat|turns?$)", name.lower())]
    if chats and not near:
        near = [f"if {_short(chats[0])} holds chats, name it messages: a list of {{role, content}}"]
    hint = f"; {near[0]}" if near else f"; name the {what[:-1]} with the text prompt"
    return f"expected prompt or messages, got {what} {', '.join(map(_short, names[:8])) or 'none'}{hint}"


def _keys(value: Iterable[Any]) -> str:
    return ", ".join(_short(str(key)) for key in [*value][:8]) or "no fields"


def _short(name: str) -> str:
    return name if len(name) <= 40 else name[:37] + "..."


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return f"{names.get(type(value), 'a number' if isinstance(value, int | float) else type(value).__name__)}"
