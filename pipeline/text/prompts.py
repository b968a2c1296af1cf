"""Prompts: from files to checked records, from records to token ids.

A record is a JSON object with either `prompt` (text) or `messages` (a chat that ends before the student's turn), and
optionally `answer`, `source` and `id`. ShareGPT's `conversations` are read as `messages`. Other fields of a line are
left out; nulls and NaN count as absent. Each error is one line with the file, the line, what was expected and what
was found.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.config import PromptsConfig
from pipeline.config.messages import show_value
from pipeline.errors import PromptError
from pipeline.text.chat_template import chat_text
from pipeline.text.template_effect import N_CHATS, warn_without_effect, with_system
from pipeline.text.token_length import least_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIELDS = ("prompt", "messages", "conversations", "answer", "source", "id")
_JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
#: Rows of a Parquet file that are Python objects at the same time.
_ROWS = 1024
#: Bytes that one line may have.
_LINE_AT_MOST = 2**26
#: Roles as ShareGPT's `from` names them.
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant"}
_ROLES |= {"bing": "assistant", "bard": "assistant", "model": "assistant", "system": "system"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def load_prompts(cfg: PromptsConfig, setting: str = "prompts.path") -> list[dict[str, Any]]:
    """The checked records of `cfg.path` after the first `cfg.skip`, at most `cfg.limit`.

    Raises `PromptError` naming file and line, or the `setting` that the path is from.
    """
    rows = (check_record(value, place) for place, value in raw_rows(cfg, setting=setting))
    records = list(itertools.islice(rows, cfg.skip, None if cfg.limit is None else cfg.skip + cfg.limit))
    if not records and cfg.skip:
        raise PromptError(f"{cfg.path}: expected more than prompts.skip = {cfg.skip} prompts, the file holds fewer")
    if not records:
        raise PromptError(f"{cfg.path}: expected at least one prompt, the file holds none")
    return records


def prompts_sha256(records: Sequence[dict[str, Any]]) -> str:
    """SHA-256 over the records' canonical JSON lines, as the cache records it."""
    import cache_schema

    return cache_schema.prompts_sha256(records)


# ----------------------------------------------------------------------------------------------------------- reading


def raw_rows(
    cfg: PromptsConfig, fields: Sequence[str] = FIELDS, setting: str = "prompts.path"
) -> Iterator[tuple[str, Any]]:
    """Pairs of place (`file:line`) and raw record of `cfg.path`; of Parquet only these fields are read. Raises
    `PromptError`, naming `setting` where the path is wrong."""
    if cfg.path.startswith("toy:"):
        return json_lines(_toy_path(cfg.path, setting), cfg.path)
    path = Path(cfg.path)
    try:
        exists = path.exists()
    except OSError as error:  # a name too long for the file system
        raise PromptError(f"{cfg.path}: cannot be read: {error.strerror}") from None
    if path.suffix in _JSON_SUFFIXES and not path.is_dir():
        return json_lines(path, cfg.path, setting)
    if path.suffix == ".parquet" and not path.is_dir():
        return _parquet_rows(path, fields, setting)
    if not exists and _HUB_ID.fullmatch(cfg.path):
        return _hub_rows(cfg)
    came = "a directory" if path.is_dir() else f"a file with suffix {path.suffix!r}" if exists else "no such file"
    raise PromptError(
        f"{cfg.path}: expected a .jsonl or .parquet file, a Hub dataset id, toy:train or toy:heldout, got {came}; "
        f"set {setting}"
    )


def _toy_path(name: str, setting: str) -> Path:
    from pipeline import toy

    files = {asset.removeprefix("prompts/").removesuffix(".jsonl"): asset for asset in toy.asset_names()}
    asset = files.get(name.removeprefix("toy:"), "")
    if not asset.endswith(".jsonl"):
        known = ", ".join(f"toy:{file}" for file, path in files.items() if path.endswith(".jsonl"))
        raise PromptError(f"{name}: expected {known}; set {setting}")
    return toy.asset_path(asset)


def json_lines(path: Path, name: str, setting: str = "prompts.path") -> Iterator[tuple[str, Any]]:
    """Pairs of place (`name:line`) and the JSON value of each line that is not blank. Raises `PromptError`."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise PromptError(f"{name}: expected a regular file, got a directory, a device or a pipe")
            for number in itertools.count(1):
                line = file.readline(_LINE_AT_MOST + 1)
                if not line:
                    return
                if len(line) > _LINE_AT_MOST:
                    raise PromptError(
                        f"{name}:{number}: expected at most {_LINE_AT_MOST:,} bytes a line, got more; write one "
                        "record on each line (JSONL)"
                    )
                line = line.removeprefix(b"\xef\xbb\xbf")  # files with a byte order mark, put together
                if line.strip():
                    yield f"{name}:{number}", _parse(line, f"{name}:{number}")
    except FileNotFoundError:
        raise PromptError(f"{name}: no such file; set {setting} to your prompts (JSONL or Parquet)") from None
    except OSError as error:
        raise PromptError(f"{name}: cannot be read: {error.strerror}") from None


def _parse(line: bytes, place: str) -> Any:
    def checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise PromptError(f"{place}: expected every key once, got {_show(twice)} more often; keep one")
        return found

    try:
        return json.loads(line.decode(), object_pairs_hook=checked)
    except PromptError:
        raise
    except UnicodeDecodeError as error:
        byte = line[error.start]
        raise PromptError(f"{place}: expected UTF-8, got byte 0x{byte:02x} in column {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise PromptError(
            f"{place}: expected one JSON object on each line, got {_show(line.decode().strip())} "
            f"({error.msg}, column {error.colno})"
        ) from None
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, a thousand brackets
        raise PromptError(f"{place}: expected one JSON object on each line, got JSON that {error}") from None


def _parquet_rows(path: Path, fields: Sequence[str], setting: str) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        if path.exists() and not path.is_file():
            raise PromptError(f"{path}: expected a regular file, got a device or a pipe")
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns = [name for name in fields if name in names]
            if twice := next((name for name in columns if names.count(name) > 1), None):
                raise PromptError(f"{path}: expected one column {twice}, got {names.count(twice)}; remove the others")
            if not {"prompt", "messages", "conversations", "text"} & set(columns):
                raise PromptError(f"{path}: {_no_prompt(names, 'columns')}")
            number = 0
            narrow = [n for n in columns if pyarrow.types.is_float32(file.schema_arrow.field(n).type)]
            for batch in file.iter_batches(_ROWS, columns=columns):
                for value in batch.to_pylist():
                    number += 1
                    for name in narrow:  # 0.1 and not 0.10000000149
                        value[name] = None if value[name] is None else float(str(np.float32(value[name])))
                    yield f"{path}: row {number}", value
    except FileNotFoundError:
        raise PromptError(f"{path}: no such file; set {setting} to your prompts (JSONL or Parquet)") from None
    except PromptError:
        raise
    except Exception as error:  # Arrow's own, and what Python says of values that it has no type for
        raise PromptError(f"{path}: expected a Parquet file: {_one_line(error)}") from None


def _hub_rows(cfg: PromptsConfig) -> Iterator[tuple[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise PromptError(
            f"{cfg.path}: no such file; to read it as a Hub dataset install `datasets` (pip install datasets)"
        ) from None
    try:
        rows: Iterable[Any] = datasets.load_dataset(cfg.path, split=cfg.split)
    except Exception as error:  # `datasets` raises whatever its network and file layers raise
        raise PromptError(f"Hub dataset {cfg.path}, split {cfg.split}: {_one_line(error)}") from None
    return ((f"{cfg.path}[{cfg.split}]: row {number}", value) for number, value in enumerate(rows, 1))


# ---------------------------------------------------------------------------------------------------------- checking


def check_record(value: Any, place: str) -> dict[str, Any]:
    """The prompt record of one line, with only the fields that redpen knows. Raises `PromptError` naming `place`."""
    if not isinstance(value, dict):
        raise PromptError(f"{place}: expected an object with prompt or messages, got {_kind(value)}")
    record = named_messages({name: value[name] for name in FIELDS if not _is_missing(value.get(name))}, place)
    if isinstance(record.get("prompt"), list):  # the conversational form of TRL and many Hub datasets
        record["messages"] = record.pop("prompt") if "messages" not in record else record["messages"]
    if "prompt" in record and "messages" in record:
        raise PromptError(f"{place}: expected either prompt or messages, got both; keep one")
    if "messages" in record:
        record["messages"] = _check_messages(record["messages"], place)
        if record["messages"][-1]["role"] == "assistant":
            raise PromptError(
                f"{place}: messages: expected a chat that ends before the student's turn, got one that ends with the "
                "assistant's; remove its last message"
            )
    elif "prompt" in record:
        check_text(record["prompt"], "prompt", place)
        if not record["prompt"].strip():
            raise PromptError(f"{place}: prompt: expected text, got an empty one; remove the line")
    else:
        raise PromptError(f"{place}: {_no_prompt(list(value), 'fields')}")
    for name in ("answer", "source", "id"):
        if name in record:
            record[name] = _check_label(record[name], name, place)
    return record


def named_messages(record: dict[str, Any], place: str) -> dict[str, Any]:
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


def check_chat(messages: Any, place: str) -> list[dict[str, str]]:
    """The messages of a chat that ends with the assistant's. Raises `PromptError` naming `place`."""
    checked = _check_messages(messages, place)
    if checked[-1]["role"] != "assistant":
        raise PromptError(
            f"{place}: messages: expected a chat that ends with the assistant's reply, which is learnt, got one that "
            f"ends with role {checked[-1]['role']}; add the reply, or remove the line"
        )
    return checked


def _check_messages(messages: Any, place: str) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        came = "an empty list" if messages == [] else _kind(messages)
        raise PromptError(f"{place}: messages: expected a list of {{role, content}} objects, got {came}")
    for number, message in enumerate(messages):
        label = f"messages[{number}]"
        if not isinstance(message, dict):
            raise PromptError(f"{place}: {label}: expected an object with role and content, got {_kind(message)}")
        message = {key: item for key, item in message.items() if item is not None}
        for key in ("role", "content"):
            if key not in message:
                raise PromptError(f"{place}: {label}: expected role and content, got {_keys(message)}")
            check_text(message[key], f"{label}.{key}", place)
        if extra := message.keys() - {"role", "content"}:
            raise PromptError(
                f"{place}: {label}: expected only role and content, got also {_keys(sorted(map(str, extra)))}; "
                "tool calls and names are not supported"
            )
        if not message["role"]:
            raise PromptError(f"{place}: {label}.role: expected system, user or assistant, got an empty one")
    if not messages[-1]["content"].strip():
        raise PromptError(f"{place}: messages[{len(messages) - 1}].content: expected text, got an empty one")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _is_missing(value: Any) -> bool:
    """Null, or NaN, which is how pandas writes a null among numbers."""
    return value is None or (isinstance(value, float | Decimal) and math.isnan(value))


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
    exact = isinstance(value, float) and abs(value) < 2**53 and value == int(value)
    return str(int(value)) if exact else json.dumps(value)


def check_text(value: Any, name: str, place: str) -> None:
    """Raises `PromptError` naming `place` where the value is no text that can be written as UTF-8."""
    if not isinstance(value, str):
        raise PromptError(f"{place}: {name}: expected text, got {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{place}: {name}: expected Unicode text, got half a surrogate pair at character {error.start}"
        ) from None


# --------------------------------------------------------------------------------------------------------- rendering


class TooLongError(PromptError):
    """A prompt that cannot fit, found before it was tokenised.

    Attributes:
        least: tokens that it has at least.
    """

    def __init__(self, least: int, at_most: int):
        self.least = least
        super().__init__(f"expected at most {at_most} tokens, got at least {least}")


def render(
    record: dict[str, Any], tokenizer: PreTrainedTokenizerBase, cfg: PromptsConfig, at_most: int | None = None
) -> list[int]:
    """Token ids of one prompt: through the chat template, ready for the student's turn, or as plain text.

    Args:
        at_most: tokens; a text that is certain to have more is not tokenised.

    Raises:
        TooLongError: it has more than `at_most` tokens. What is just a little too long is returned.
        PromptError: the template is missing or refuses the record.
    """
    if not uses_chat(tokenizer, cfg):
        if "messages" in record:
            return render_chat(record["messages"], tokenizer, cfg)  # which says what is missing
        if cfg.system is not None:
            raise PromptError(f"prompts.system needs a chat template, {_no_template(cfg)}; remove it")
        return plain_ids(record["prompt"], tokenizer, at_most)
    return render_chat(_chat_of(record), tokenizer, cfg, reply_follows=True, at_most=at_most)


def render_chat(
    messages: Sequence[dict[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    cfg: PromptsConfig,
    *,
    reply_follows: bool = False,
    at_most: int | None = None,
) -> list[int]:
    """Token ids of a chat through the chat template, ready for the assistant's turn if `reply_follows`.

    Raises as `render`.
    """
    if not uses_chat(tokenizer, cfg):
        raise PromptError(f"messages need a chat template, {_no_template(cfg)}; give plain text as prompt")
    chat = with_system(messages, cfg.system)
    text = chat_text(chat, tokenizer, cfg.template_args, reply_follows=reply_follows)
    _check_length(text, tokenizer, at_most)
    try:
        # the template writes every special token itself, a BOS included
        return [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    except Exception as error:  # of text that no tokenizer was made for, as half a surrogate pair
        raise PromptError(f"the tokenizer refuses what the chat template writes: {_one_line(error)}") from None


def _chat_of(record: dict[str, Any]) -> list[dict[str, str]]:
    return record.get("messages") or [{"role": "user", "content": record["prompt"]}]


def _no_template(cfg: PromptsConfig) -> str:
    return 'got prompts.template = "none"' if cfg.template == "none" else "the tokenizer has none"


def _check_length(text: str, tokenizer: PreTrainedTokenizerBase, at_most: int | None) -> None:
    if at_most is not None and len(text) > at_most and (least := least_tokens(text, tokenizer)) > at_most:
        raise TooLongError(least, at_most)


def with_prefix(record: dict[str, Any], prefix: str | None) -> dict[str, Any]:
    """The record with text before its prompt, or before the first user message of its chat."""
    if prefix is None:
        return record
    if "prompt" in record:
        return record | {"prompt": prefix + record["prompt"]}
    messages = [dict(message) for message in record["messages"]]
    first = next((message for message in messages if message["role"] == "user"), messages[-1])
    first["content"] = prefix + first["content"]
    return record | {"messages": messages}


def render_all(
    records: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    cfg: PromptsConfig,
    max_prompt_tokens: int,
    context: int | None = None,
    *,
    reader: str = "student",
    named: Mapping[str, str] | None = None,
) -> list[npt.NDArray[np.int32]]:
    """Token ids of every prompt, checked against the longest accepted and the reader's `context` length (tokens).

    Warns of settings that change nothing in the first prompts. What is much too long is not tokenised.

    Args:
        reader: who reads them, for the messages.
        named: the names of `system` and `template_args` in the recipe, where they are not those of [prompts].

    Raises:
        PromptError: names the first prompt at fault, its length, the limit, how many there are in all, and the
            setting to change.
    """
    if cfg.template != "none":
        warn_without_effect([_chat_of(record) for record in records[:N_CHATS]], tokenizer, cfg, named)
    limit = max_prompt_tokens if context is None else min(max_prompt_tokens, context - 1)
    rendered, lengths, least = [], [], False
    for number, record in enumerate(records, 1):
        try:
            ids = np.asarray(render(record, tokenizer, cfg, limit), np.int32)
        except TooLongError as error:
            lengths.append(error.least)
            least = True
            continue
        except PromptError as error:
            raise PromptError(f"{cfg.path}: prompt {number}: {error}") from None
        if not len(ids):
            raise PromptError(f"{cfg.path}: prompt {number}: expected at least one token, the tokenizer gives none")
        rendered.append(ids)
        lengths.append(len(ids))
    long = [number for number, length in enumerate(lengths, 1) if length > limit]
    if long:
        longest = max(lengths)
        if context is not None and longest >= context:
            remedy = f"the {reader}'s context is {context} tokens, so shorten or remove them"
        elif least:
            remedy = "remove them, or set rollouts.max_prompt_tokens higher"
        else:
            remedy = f"set rollouts.max_prompt_tokens to {longest} or remove them"
        raise PromptError(
            f"{cfg.path}: prompt {long[0]}: expected at most {limit} tokens, got {lengths[long[0] - 1]} "
            f"({len(long)} of {len(lengths)} prompts are too long, the longest has {longest}"
            f"{' or more' if least else ''}); {remedy}"
        )
    return rendered


def template_identity(tokenizer: PreTrainedTokenizerBase, cfg: PromptsConfig) -> dict[str, Any]:
    """How prompts become tokens, as JSON for the cache's provenance."""
    if not uses_chat(tokenizer, cfg):
        return {"kind": "none"}
    template = json.dumps(tokenizer.chat_template, sort_keys=True)
    return {
        "kind": "chat",
        "sha256": hashlib.sha256(template.encode()).hexdigest(),
        "args": cfg.template_args,
        "system": cfg.system,
    }


def uses_chat(tokenizer: PreTrainedTokenizerBase, cfg: PromptsConfig) -> bool:
    """Whether prompts go through the tokenizer's chat template. Raises `PromptError` where it has none and should."""
    has_template = bool(tokenizer.chat_template)
    if cfg.template == "chat" and not has_template:
        raise PromptError(
            'prompts.template = "chat" needs a tokenizer with a chat template, the student\'s has none; '
            'set it to "none", or use an instruct model'
        )
    return has_template and cfg.template != "none"


def plain_ids(text: str, tokenizer: PreTrainedTokenizerBase, at_most: int | None = None) -> list[int]:
    """Tokens of `text`, after a BOS where the tokenizer puts one itself; never with an EOS, which would end it.

    Raises `TooLongError` where it is certain to have more than `at_most`.
    """
    _check_length(text, tokenizer, at_most)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:1] != [bos] and tokenizer("a")["input_ids"][:1] == [bos]:
        ids = [bos, *ids]
    return ids


# ---------------------------------------------------------------------------------------------------------- messages


def _no_prompt(names: Sequence[str], what: str) -> str:
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


def _show(text: str) -> str:
    return json.dumps(text if len(text) <= 40 else text[:37] + "...", ensure_ascii=False)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 200 else text[:197] + '...'}"
