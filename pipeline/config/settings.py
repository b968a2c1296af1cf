"""Settings in TOML: what went wrong in one line, `section.key=value` overrides, and the way back to TOML.

Knows nothing of redpen's own settings; `pipeline.config` declares those.
"""

from __future__ import annotations

import json
import re
import tomllib
import types
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from pipeline.config.messages import clip, did_you_mean, show_value
from pipeline.errors import ConfigError

Raw = dict[str, Any]

#: An upper bound as high as this is there for the arithmetic, and shown only where it is exceeded.
_TECHNICAL = 2**16
#: Tables and lists within one another.
_DEEPEST = 32
#: What needs no saying beside a value.
_PLAIN = ("string", "non-empty string", "table", "true or false")


class Section(BaseModel):
    """A table of settings: no unknown keys, no silent conversions, immutable once read."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


# ----------------------------------------------------------------------------------------------------------- reading


def parse_toml(text: str, where: str) -> Raw:
    """TOML from outside. Raises `ConfigError` naming `where`, whatever is wrong with the text."""
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ConfigError(f"{where}: not valid TOML: nested too deeply") from None
    except ValueError as error:  # also integers of thousands of digits, and dates that there are not
        raise ConfigError(f"{where}: not valid TOML: {clip(str(error), 200)}") from None


def check_plain(data: Any, where: str) -> None:
    """Raises `ConfigError`, naming `where` and the setting, where plain data are nested too deeply or hold a number
    or text that no setting can be.
    """
    rest: list[tuple[tuple[str, ...], Any]] = [((), data)]
    while rest:
        keys, value = rest.pop()
        name = clip(".".join(keys))
        if len(keys) > _DEEPEST:
            raise ConfigError(f"{where}: {name} must be nested at most {_DEEPEST} deep, is deeper")
        if isinstance(value, dict):
            rest += [((*keys, str(key)), item) for key, item in value.items()]
            rest += [(keys, key) for key in value]
        elif isinstance(value, list):
            rest += [((*keys, ""), item) for item in value]
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ConfigError(f"{where}: {name} must be a number of 64 bits, got an integer of {value.bit_length()}")
        elif isinstance(value, str) and "\0" in value:
            raise ConfigError(
                f"{where}: {name or 'a key'} must be text without NUL characters, got {show_value(value)}"
            )


# --------------------------------------------------------------------------------------------------------- overrides


def apply_override(root: type[Section], data: Raw, text: str) -> str:
    """Apply one `section.key=value` to raw data in place and return the dotted path that it set.

    The value is read as TOML and, where it is none, as text; an empty one returns the setting to its default. In a
    section that is a list of tables, `section.NAME.key` addresses the table of that name. Raises `ConfigError`.
    """
    path, equals, raw = text.partition("=")
    keys, raw = [key.strip() for key in path.split(".")], raw.strip()
    dotted = ".".join(keys)
    if len(dotted) > 1000:
        raise ConfigError(f"--set: expected section.key=value, got {clip(text)}")
    if not equals or len(keys) < 2 or not all(keys):
        near = did_you_mean(path.strip(), [name for name in known_settings(root) if "." in name])
        raise ConfigError(f"--set: expected section.key=value, got {show_value(text)}{near}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"--set {dotted!a}: expected UTF-8 text, got {clip(ascii(raw))}") from None
    table, keys = _addressed(data, keys, dotted)
    for depth, key in enumerate(keys[:-1]):
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            outer = ".".join(dotted.split(".")[: depth - len(keys) + 1])
            raise ConfigError(f"--set {dotted}: {outer} is not a table, so it has no {keys[depth + 1]}")
    if raw:
        table[keys[-1]] = _value(root, dotted, raw)
    else:
        table.pop(keys[-1], None)
    return dotted


def _addressed(data: Raw, keys: list[str], dotted: str) -> tuple[Raw, list[str]]:
    """The table that an override is about, and the keys that remain within it."""
    section, rest = data.setdefault(keys[0], {}), keys[1:]
    if isinstance(section, list):
        tables = {str(table.get("name", keys[0])): table for table in section if isinstance(table, dict)}
        if len(rest) > 1 and rest[0] in tables:
            section, rest = tables[rest[0]], rest[1:]
        elif len(tables) == 1 and len(rest) == 1:
            (section,) = tables.values()
        else:
            raise ConfigError(
                f"--set {dotted}: expected {keys[0]}.NAME.{rest[-1]} with NAME one of {', '.join(tables)}"
            )
    elif isinstance(section, dict) and len(rest) > 1 and rest[0] == section.get("name", keys[0]):
        rest = rest[1:]
    if not isinstance(section, dict):
        raise ConfigError(f"--set {dotted}: {keys[0]} is not a table")
    return section, rest


def _value(root: type[Section], dotted: str, raw: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {raw}\n")
    except tomllib.TOMLDecodeError:
        return raw
    except (ValueError, RecursionError):  # an integer of thousands of digits, a thousand brackets
        raise ConfigError(f"--set {dotted}: expected a TOML value, got {show_value(raw)}") from None
    value = parsed["value"] if parsed.keys() == {"value"} else raw
    field = setting(root, dotted.split("."))
    # `--set student.revision=2024` means text: nobody quotes twice on a command line
    return raw if field is not None and not isinstance(value, str) and _is_text(field.annotation) else value


def _is_text(annotation: Any) -> bool:
    return set(get_args(annotation) if _is_union(annotation) else (annotation,)) - {type(None)} == {str}


# ---------------------------------------------------------------------------------------------------------- messages


def explain(root: type[Section], error: ValidationError, data: Raw, where: str, overridden: Sequence[str]) -> str:
    """One line about the first problem that pydantic found: source, setting, what was expected, what came.

    A misspelt key comes first: it explains the missing one.
    """
    problems: dict[str, str] = {}
    for item in sorted(error.errors(include_url=False), key=lambda item: item["type"] != "extra_forbidden"):
        path = _path(root, item["loc"], data)
        problems.setdefault(path, _problem(root, path, item))
    (path, problem), *others = ((clip(path), problem) for path, problem in problems.items())
    more = f" (and {len(others)} more: {', '.join(name for name, _ in others[:3])})" if others else ""
    if not path:
        return f"{where}: {problem}{more}"
    by_hand = any(f"{name}.".startswith(f"{path}.") or f"{path}.".startswith(f"{name}.") for name in overridden)
    return f"{'--set' if by_hand else where + ':'} {path} {problem}{more}"


@cache
def known_settings(root: type[Section]) -> tuple[str, ...]:
    """Every section and setting by its dotted name."""
    return tuple(_walk(root, ""))


def _walk(model: type[Section], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        if section := _section_of(field):
            yield from _walk(section, f"{prefix}{name}.")


def setting(root: type[Section], keys: Sequence[str]) -> FieldInfo | None:
    """The field under dotted keys (the name of one of several tables may stand second), or None."""
    model: type[Section] | None = root
    field = None
    for position, key in enumerate(keys):
        if model is None:
            return field  # within a setting that is itself a table
        if key not in model.model_fields:
            if position == 1 and len(keys) > 2 and field is not None and get_origin(field.annotation) is list:
                continue
            return None
        field = model.model_fields[key]
        model = _section_of(field)
    return field


def _section_of(field: FieldInfo) -> type[Section] | None:
    """The class of a field that is a table or a list of tables; None for a plain setting."""
    inner = get_args(field.annotation)[0] if get_origin(field.annotation) is list else field.annotation
    return inner if isinstance(inner, type) and issubclass(inner, Section) else None


def _path(root: type[Section], loc: tuple[int | str, ...], data: Raw) -> str:
    """The dotted setting that a pydantic location is about; what lies inside a setting's value is left off."""
    keys: list[str] = []
    for part in loc:
        if isinstance(part, int):
            tables = data.get(keys[0])
            if isinstance(tables, list) and len(tables) > 1 and isinstance(tables[part], dict):
                keys.append(str(tables[part].get("name", part)))
            continue
        keys.append(part)
        field = setting(root, keys)
        if field is not None and _section_of(field) is None:
            break
    return ".".join(keys)


def _problem(root: type[Section], path: str, item: Mapping[str, Any]) -> str:
    field, whole = setting(root, path.split(".")), item["loc"][-1:] == (path.rpartition(".")[2],)
    if item["type"] == "value_error":  # from a validator of ours, in our words
        return str(item["ctx"]["error"]) + (f", got {show_value(item['input'])}" if path else "")
    if field is None:
        return f"is not a setting{_nearest(root, path)}"
    if item["type"] == "missing" and whole:
        return f"is missing: expected {_expected(field)} ({field.description})"
    if item["type"] == "string_too_long":
        return f"must have at most {item['ctx']['max_length']} characters, got {len(item['input']):,}"
    if item["type"] == "less_than_equal":
        return f"must be {_expected(field, technical=True)}, got {show_value(item['input'])}"
    return f"must be {_expected(field)}, got {'too few' if item['type'] == 'missing' else show_value(item['input'])}"


def _nearest(root: type[Section], path: str) -> str:
    section, *inner = path.split(".")
    known = known_settings(root)
    if inner:  # a setting is meant, not a section; the name of one of several tables does not count
        known = tuple(name for name in known if "." in name)
        path = f"{section}.{inner[-1]}"
    keys = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == path.rpartition(".")[0]]
    return did_you_mean(path, known) or f"; {f'[{section}]' if inner else 'a recipe'} has {', '.join(keys)}"


def _expected(field: FieldInfo, technical: bool = False) -> str:
    """What a setting accepts, in words, from its type and its bounds; `technical` bounds too."""
    kind = _kind(field.annotation, technical)
    if any(getattr(constraint, "min_length", 0) for constraint in field.metadata):
        kind = kind.replace("a ", "a non-empty ", 1)
    return kind + _bounds(field.metadata, technical)


def _bounds(constraints: Sequence[Any], technical: bool) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    bounds = [
        f"{sign} {bound}"
        for constraint in constraints
        for name, sign in signs.items()
        if (bound := getattr(constraint, name, None)) is not None
        if technical or name != "le" or bound < _TECHNICAL
    ]
    return f" {' and '.join(bounds)}" if bounds else ""


def _kind(annotation: Any, technical: bool = False) -> str:
    origin, options = get_origin(annotation), get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return f"a table with {', '.join(annotation.model_fields)}"
    if origin is Literal:
        return " or ".join(show_value(option) for option in options)
    if _is_union(annotation):
        return " or ".join(_kind(option, technical) for option in options if option is not type(None))
    if origin is tuple:
        return f"a list of {len(options)} {_plural(options[0], technical)}"
    if origin is list:
        return f"a list of {_plural(options[0], technical)}"
    if origin is Annotated:
        return _kind(options[0]) + _bounds([c for o in options[1:] for c in getattr(o, "metadata", [])], technical)
    names: dict[Any, str] = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
    return names.get(annotation, "a table")


def _plural(annotation: Any, technical: bool) -> str:
    noun, _, bounds = _kind(annotation, technical).removeprefix("an ").removeprefix("a ").partition(" ")
    return f"{noun}s {bounds}".strip()


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


# ----------------------------------------------------------------------------------------------------- documentation


@dataclass(frozen=True)
class Described:
    """A setting as documentation shows it.

    Attributes:
        default: as TOML; empty where a setting is off or follows another by default, None where it must be given.
    """

    key: str
    default: str | None
    accepts: str
    meaning: str


def described(root: type[Section]) -> Iterator[tuple[str, str, list[Described]]]:
    """Every section in order: its name, what it is for, and its settings."""
    for name, field in root.model_fields.items():
        section = _section_of(field)
        assert section is not None
        yield name, section.__doc__ or "", [_described(key, of) for key, of in section.model_fields.items()]


def _described(key: str, field: FieldInfo) -> Described:
    value = field.get_default(call_default_factory=True)
    default = "" if value is None else _toml(list(value) if isinstance(value, tuple) else value)
    return Described(key, None if field.is_required() else default, _expected(field), field.description or "")


# -------------------------------------------------------------------------------------------------------------- TOML


def to_toml(settings: Section, *, explained: bool = False) -> str:
    """Every setting, defaults included, as TOML that reads back equal. None, always a default, is left out.

    `explained` puts each setting's meaning and bounds beside it, and shows those left out as comments.
    """
    lines: list[str] = []
    for section, value in settings.model_dump(mode="json").items():
        field = type(settings).model_fields[section]
        tables = value if isinstance(value, list) else [value]
        header = f"[[{section}]]" if len(tables) > 1 else f"[{section}]"
        for table in tables:
            lines += [header, *_entries(_section_of(field), table, explained), ""]
    return "\n".join(lines)


def _entries(section: type[Section] | None, table: Raw, explained: bool) -> Iterator[str]:
    assert section is not None
    for key, value in table.items():
        entry = f"# {key} =" if value is None else f"{key} = {_toml(value)}"
        if explained:
            field = section.model_fields[key]
            accepted = _expected(field).removeprefix("an ").removeprefix("a ")
            yield f"{entry:35} # {field.description}" + (f" ({accepted})" if accepted not in _PLAIN else "")
        elif value is not None:
            yield entry


def _toml(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return _toml_text(value)
        case dict():
            pairs = ", ".join(f"{_toml_key(key)} = {_toml(item)}" for key, item in value.items() if item is not None)
            return f"{{ {pairs} }}" if pairs else "{}"
        case list():
            return f"[{', '.join(_toml(item) for item in value)}]"
        case _:
            return repr(value)


def _toml_text(text: str) -> str:
    # a JSON string is a TOML basic string, but for DEL, which TOML wants escaped; so is what cannot be seen
    return "".join(
        _escaped(letter) if letter == "\x7f" or unicodedata.category(letter)[0] == "C" else letter
        for letter in json.dumps(text, ensure_ascii=False)
    )


def _escaped(letter: str) -> str:
    return f"\\u{ord(letter):04x}" if ord(letter) < 2**16 else f"\\U{ord(letter):08x}"


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml_text(key)
