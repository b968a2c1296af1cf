"""Recipes as TOML: reading, `--set section.key=value` overrides, and writing with the user's comments."""

from __future__ import annotations

import contextlib
import json
import re
import tomllib
import unicodedata
from collections import Counter
from typing import TYPE_CHECKING, Any

from pydantic.fields import FieldInfo

from pipeline.config.messages import clip, did_you_mean, show_value
from pipeline.config.schema import Section, accepted, find_setting, is_text, known_settings, section_of
from pipeline.credentials import mask
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    import tomlkit.items

Raw = dict[str, Any]
#: Keys from the top of a recipe to a section, a table in a list (by its number) or a setting.
Keys = tuple[str | int, ...]

#: Most tables and lists inside one another.
_MAX_DEPTH = 32
#: Most characters of the dotted name in an override.
_MAX_NAME = 1000
#: Kinds of values that an explained recipe does not repeat beside the value.
_OBVIOUS = ("string", "non-empty string", "table", "true or false")


# ------------------------------------------------------------------------------------------------------------ reading


def parse_toml(text: str, where: str) -> Raw:
    """The tables of a TOML text. Raises `ConfigError`, naming `where`, if it is not valid TOML."""
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ConfigError(f"{where}: not valid TOML: nested too deeply") from None
    except ValueError as error:  # includes integers with thousands of digits and impossible dates
        raise ConfigError(f"{where}: not valid TOML: {clip(str(error), 200)}") from None


def check_values(data: Any, where: str) -> None:
    """Raise `ConfigError` if data are nested too deeply, or hold an integer or text that no setting accepts."""
    rest: list[tuple[tuple[str, ...], Any]] = [((), data)]
    while rest:
        keys, value = rest.pop()
        name = clip(".".join(keys))
        if len(keys) > _MAX_DEPTH:
            raise ConfigError(f"{where}: {name} must be nested at most {_MAX_DEPTH} deep, is deeper")
        if isinstance(value, dict):
            rest += [((*keys, str(key)), item) for key, item in value.items()]
            rest += [(keys, key) for key in value]
        elif isinstance(value, list):
            rest += [((*keys, ""), item) for item in value]
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ConfigError(f"{where}: {name} must be a 64-bit integer, got one of {value.bit_length()} bits")
        elif isinstance(value, str) and "\0" in value:
            raise ConfigError(f"{where}: {name or 'a key'} must not contain NUL, got {show_value(value)}")


# ---------------------------------------------------------------------------------------------------------- overrides


def apply_override(root: type[Section], data: Raw, text: str) -> str:
    """Apply one `section.key=value` to raw data in place and return the dotted name that it set.

    The value is TOML; what is not valid TOML is taken as text, and an empty value restores the default. In a list of
    tables, `section.NAME.key` means the table with that name. Raises `ConfigError`.
    """
    path, equals, raw = text.partition("=")
    keys, raw = [key.strip() for key in path.split(".")], raw.strip()
    dotted = ".".join(keys)
    if len(dotted) > _MAX_NAME:
        raise ConfigError(f"--set: expected section.key=value, got {clip(text)}")
    if not equals or len(keys) < 2 or not all(keys):
        near = did_you_mean(path.strip(), [name for name in known_settings(root) if "." in name])
        raise ConfigError(f"--set: expected section.key=value, got {show_value(text)}{near}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"--set {dotted!a}: expected UTF-8 text, got {clip(ascii(raw))}") from None
    table, keys = _find_table(data, keys, dotted)
    for depth, key in enumerate(keys[:-1]):
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            outer = ".".join(dotted.split(".")[: depth - len(keys) + 1])
            raise ConfigError(f"--set {dotted}: {outer} is not a table, so it has no {keys[depth + 1]}")
    if raw:
        table[keys[-1]] = _parse_value(root, dotted, raw)
    else:
        table.pop(keys[-1], None)
    return dotted


def _find_table(data: Raw, keys: list[str], dotted: str) -> tuple[Raw, list[str]]:
    """The table that an override addresses, and the remaining keys inside it."""
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


def _parse_value(root: type[Section], dotted: str, raw: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {raw}\n")
    except tomllib.TOMLDecodeError:
        return raw
    except (ValueError, RecursionError):  # an integer of thousands of digits, a thousand brackets
        raise ConfigError(f"--set {dotted}: expected a TOML value, got {show_value(raw)}") from None
    value = parsed["value"] if parsed.keys() == {"value"} else raw
    field = find_setting(root, dotted.split("."))
    # `--set student.revision=2024` means text: nobody quotes twice on a command line
    return raw if field is not None and not isinstance(value, str) and is_text(field) else value


# ------------------------------------------------------------------------------------------------------------ writing


def to_toml(settings: Section, source: str = "", *, explained: bool = False) -> str:
    """All settings, defaults included, as TOML that reads back equal. None, always a default, is left out.

    Args:
        source: the TOML that the settings were read from; its comments, and values as written there, are kept.
        explained: add each setting's description and bounds, and show settings without a value as comments.
    """
    writer = _Writer(type(settings), source, explained)
    for name, value in settings.model_dump(mode="json").items():
        section = section_of(type(settings).model_fields[name])
        assert section is not None
        if isinstance(value, dict):
            writer.add_table((name,), f"[{name}]", section, value)
        elif len(value) == 1:
            keys: Keys = (name, 0) if (name, 0) in writer.source.comments else (name,)
            writer.add_table(keys, f"[{name}]", section, value[0])
        else:
            writer.add_tables((name,), section, value)
    return "\n".join([*writer.lines, *writer.comments(())])


def toml_value(value: Any) -> str:
    """A setting's value as TOML, on one line."""
    return _item(value).as_string()


class _Writer:
    def __init__(self, root: type[Section], source: str, explained: bool):
        self.lines: list[str] = []
        self.source = _Source(source)
        self._explained = explained
        names = (name.split(".") for name in known_settings(root))
        fields = (field for keys in names if (field := find_setting(root, keys)) is not None)
        self._explanation_of = {id(field): _explanation(field) for field in fields}
        #: An explained recipe may have become the user's own; its explanations are not theirs.
        self._explanations = tuple(self._explanation_of.values())

    def add_tables(self, keys: Keys, section: type[Section], tables: list[Raw]) -> None:
        for number, table in enumerate(tables):
            self.add_table((*keys, number), f"[[{'.'.join(map(str, keys))}]]", section, table)

    def add_table(self, keys: Keys, header: str, section: type[Section], table: Raw) -> None:
        """Lines of one table, then of the lists of tables inside it."""
        self.lines += [*self.comments(keys), header]
        inner = {key: of for key, field in section.model_fields.items() if table[key] and (of := section_of(field))}
        for key, value in table.items():
            if key not in inner:
                self._add_setting((*keys, key), section.model_fields[key], value)
        self.lines.append("")
        for key, of in inner.items():
            self.add_tables((*keys, key), of, table[key])

    def _add_setting(self, keys: Keys, field: FieldInfo, value: Any) -> None:
        if value is None:
            entry = f"# {keys[-1]} ="
        else:
            entry = f"{keys[-1]} = {self.source.written(keys, value) or toml_value(value)}"
        if self._explained or value is not None:
            self.lines += [line for found in self.source.within.get(keys, ()) for line in self.comments(found)]
            self.lines.append(f"{entry:35} {self._explanation_of[id(field)]}" if self._explained else entry)

    def comments(self, keys: Keys) -> list[str]:
        lines = self.source.comments.get(keys, [])
        return [line for line in lines if not line.endswith(self._explanations)]


def _explanation(field: FieldInfo) -> str:
    accepts = accepted(field).removeprefix("an ").removeprefix("a ")
    return f"# {field.description}" + (f" ({accepts})" if accepts not in _OBVIOUS else "")


class _Source:
    """Comments and values of a recipe as its author wrote them.

    Attributes:
        comments: the lines above and beside each table and setting; those that end the text belong to ().
        within: the keys of `comments` that begin with some keys, these included.
    """

    def __init__(self, text: str):
        self.comments: dict[Keys, list[str]] = {}
        self.within: dict[Keys, list[Keys]] = {}
        self._n_tables: Counter[Keys] = Counter()
        self._items: dict[Keys, tomlkit.items.Item] = {}
        self._above: list[str] = []
        if text:
            import tomlkit
            from tomlkit.exceptions import TOMLKitError

            with contextlib.suppress(TOMLKitError, RecursionError):  # tomllib accepts a little more than tomlkit
                self._walk((), tomlkit.parse(text).body)
                self._add(())

    def written(self, keys: Keys, value: Any) -> str | None:
        """The value as the source writes it, if it is this one and holds no credential or invisible character."""
        item = self._items.get(keys)
        if item is None or json.dumps(item.unwrap(), default=str) != json.dumps(value):
            return None
        text = item.as_string()
        return text if text == mask(text) and text.replace("\n", "").isprintable() else None

    def _walk(self, outer: Keys, body: Any) -> None:
        from tomlkit.items import AoT, Comment, Table

        for key, item in body:
            if isinstance(item, Comment):
                self._above.append(item.trivia.comment)
            elif isinstance(item, AoT):
                keys = (*outer, key.key)
                for table in item.body:
                    self._walk_table((*keys, self._n_tables[keys]), table)
                    self._n_tables[keys] += 1
            elif isinstance(item, Table):
                self._walk_table((*outer, key.key), item)
            elif key is not None:
                self._items[*outer, key.key] = item
                self._add((*outer, key.key), item.trivia.comment)

    def _walk_table(self, keys: Keys, table: tomlkit.items.Table) -> None:
        if not table.is_super_table():  # [a] in [a.b]
            self._add(keys, table.trivia.comment)
        self._walk(keys, table.value.body)

    def _add(self, keys: Keys, beside: str = "") -> None:
        lines = [mask(line) for line in (*self._above, beside) if line]
        if keys not in self.comments:
            self.comments[keys] = []
            for n in range(1, len(keys) + 1):
                self.within.setdefault(keys[:n], []).append(keys)
        self.comments[keys].extend(lines)
        self._above.clear()


def _item(value: Any) -> tomlkit.items.Item:
    import tomlkit
    from tomlkit.items import KeyType, SingleKey

    match value:
        case str():
            return tomlkit.string(_escape(value), escape=False)
        case list() | tuple():
            array = tomlkit.array()
            for item in value:
                array.append(_item(item))
            return array
        case dict():
            table = tomlkit.inline_table()
            for key, item in value.items():
                if item is not None:
                    text = _escape(key)
                    bare = re.fullmatch(r"[A-Za-z0-9_-]+", key)
                    table.append(key if bare else SingleKey(key, KeyType.Basic, original=f'"{text}"'), _item(item))
            return table
    number: tomlkit.items.Item = tomlkit.item(value)
    return number


def _escape(text: str) -> str:
    """The inside of a TOML string. Invisible characters are escaped too, as a terminal would not show them."""
    escaped = json.dumps(text, ensure_ascii=False)[1:-1]
    return "".join(
        (f"\\u{ord(letter):04x}" if ord(letter) < 2**16 else f"\\U{ord(letter):08x}")
        if unicodedata.category(letter)[0] == "C"
        else letter
        for letter in escaped
    )
