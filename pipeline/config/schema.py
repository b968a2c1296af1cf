"""The base class of sections, and what their fields say: types, bounds and descriptions, for messages and docs."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from pipeline.config.messages import clip, did_you_mean, show_value

#: Upper bounds of counts, of tokens in one sequence and of weights: products of them stay within what numpy, torch
#: and file formats can hold.
MANY, CONTEXT, LARGE = 2**31 - 1, 2**24, 10**6
#: Most characters of a path (as on Linux) or Hub id, and of a name that becomes part of a file name.
PATH, NAME = 4095, 64

#: Upper bounds from here on only guard arithmetic; messages show them when they are exceeded, docs never.
_TECHNICAL = 2**16


class Section(BaseModel):
    """A table of settings: unknown keys are errors, values are not converted, and it cannot be changed."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def first_repeated(names: Sequence[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


# ------------------------------------------------------------------------------------------------------------- fields


@cache
def known_settings(root: type[Section]) -> tuple[str, ...]:
    """Dotted names of all sections and settings."""
    return tuple(_walk(root, ""))


def _walk(model: type[Section], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        if section := section_of(field):
            yield from _walk(section, f"{prefix}{name}.")


def find_setting(root: type[Section], keys: Sequence[str]) -> FieldInfo | None:
    """The field at dotted keys, or None. In a list of tables, the name of a table may be the second key."""
    model: type[Section] | None = root
    field = None
    for position, key in enumerate(keys):
        if model is None:
            return field  # a key inside the value of a setting
        if key not in model.model_fields:
            if position == 1 and len(keys) > 2 and field is not None and get_origin(field.annotation) is list:
                continue
            return None
        field = model.model_fields[key]
        model = section_of(field)
    return field


def section_of(field: FieldInfo) -> type[Section] | None:
    """The class of a table, or of the items of a list of tables; None for a plain setting."""
    inner = get_args(field.annotation)[0] if get_origin(field.annotation) is list else field.annotation
    return inner if isinstance(inner, type) and issubclass(inner, Section) else None


def is_text(field: FieldInfo) -> bool:
    """Whether the setting accepts text and nothing else."""
    annotation = field.annotation
    return set(get_args(annotation) if _is_union(annotation) else (annotation,)) - {type(None)} == {str}


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


# ------------------------------------------------------------------------------------------------------ documentation


@dataclass(frozen=True)
class Described:
    """A setting as the documentation shows it. `default` is None if the setting is required."""

    key: str
    default: Any
    is_required: bool
    accepts: str
    meaning: str


def described(root: type[Section]) -> Iterator[tuple[str, str, list[Described]]]:
    """Name, docstring and settings of every section."""
    for name, field in root.model_fields.items():
        section = section_of(field)
        assert section is not None
        yield name, section.__doc__ or "", [_described(key, of) for key, of in section.model_fields.items()]


def _described(key: str, field: FieldInfo) -> Described:
    required = field.is_required()
    default = None if required else field.get_default(call_default_factory=True)
    return Described(key, default, required, accepted(field), field.description or "")


def accepted(field: FieldInfo, technical: bool = False) -> str:
    """What a setting accepts, from its type and bounds, e.g. "an integer >= 1"."""
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


# ----------------------------------------------------------------------------------------------------------- messages


def explain(
    root: type[Section], error: ValidationError, data: dict[str, Any], where: str, overridden: Sequence[str]
) -> str:
    """One line about pydantic's first error: the recipe, the setting, what was expected and what was found.

    Unknown keys come first, as a misspelt one explains a missing one.
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


def _path(root: type[Section], loc: tuple[int | str, ...], data: dict[str, Any]) -> str:
    """The dotted name of the setting at a pydantic location, without keys inside the setting's value."""
    keys: list[str] = []
    for part in loc:
        if isinstance(part, int):
            tables = data.get(keys[0])
            if isinstance(tables, list) and len(tables) > 1 and isinstance(tables[part], dict):
                keys.append(str(tables[part].get("name", part)))
            continue
        keys.append(part)
        field = find_setting(root, keys)
        if field is not None and section_of(field) is None:
            break
    return ".".join(keys)


def _problem(root: type[Section], path: str, item: Mapping[str, Any]) -> str:
    field, whole = find_setting(root, path.split(".")), item["loc"][-1:] == (path.rpartition(".")[2],)
    if item["type"] == "value_error":  # raised by a validator or check of redpen
        return str(item["ctx"]["error"]) + (f", got {show_value(item['input'])}" if path else "")
    if field is None:
        return f"is not a setting{_nearest(root, path)}"
    if item["type"] == "missing" and whole:
        return f"is missing: expected {accepted(field)} ({field.description})"
    if item["type"] == "string_too_long":
        return f"must have at most {item['ctx']['max_length']} characters, got {len(item['input']):,}"
    if item["type"] == "less_than_equal":
        return f"must be {accepted(field, technical=True)}, got {show_value(item['input'])}"
    return f"must be {accepted(field)}, got {'too few' if item['type'] == 'missing' else show_value(item['input'])}"


def _nearest(root: type[Section], path: str) -> str:
    section, *inner = path.split(".")
    known = known_settings(root)
    if inner:  # suggest settings, not sections; path may name one of several tables: leave that name out
        known = tuple(name for name in known if "." in name)
        path = f"{section}.{inner[-1]}"
    keys = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == path.rpartition(".")[0]]
    return did_you_mean(path, known) or f"; {f'[{section}]' if inner else 'a recipe'} has {', '.join(keys)}"
