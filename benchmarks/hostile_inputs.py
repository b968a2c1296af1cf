"""Damage, as files from outside have it: JSON of other types and sizes, bytes flipped, cut and swapped, links and
pipes where a file belongs. Each function takes a `random.Random`, so that the same seed does the same damage.

Needs the standard library alone. benchmarks/hostile.py runs redpen's commands on the result.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Colours, a bell, a window title, C1 and bidirectional controls, markup: what may steer a terminal or a page.
ESCAPES = "\x1b[31mred\x07\x1b]0;title\x07\x9b2J\u202e</script><b hostile>"

#: What may not be where a value of another kind or size is expected, as JSON text.
VALUES = {
    "null": "null",
    "true": "true",
    "0": "0",
    "-1": "-1",
    "1.5": "1.5",
    "2^31": str(2**31),
    "2^40": str(2**40),
    "2^63": str(2**63),
    "2^70": str(2**70),
    "-2^70": str(-(2**70)),
    "10^400": str(10**400),
    "5,000 digits": "9" * 5000,
    "1e308": "1e308",
    "1e-320": "1e-320",
    "NaN": "NaN",
    "Infinity": "Infinity",
    "-Infinity": "-Infinity",
    "no text": '""',
    "text": '"hostile"',
    "a number as text": '"1"',
    "escapes": json.dumps(ESCAPES),
    "NUL": '"\\u0000"',
    "a lone surrogate": '"\\ud800"',
    "1 MB of text": '"' + "x" * 2**20 + '"',
    "a path upwards": '"../../outside/canary.txt"',
    "[]": "[]",
    "{}": "{}",
    "[1]": "[1]",
    "[[1]]": "[[1]]",
    "[null]": "[null]",
    '{"a": 1}': '{"a": 1}',
    "100,000 numbers": "[" + "1," * 99_999 + "1]",
    "nested 100,000 deep": "[" * 100_000 + "]" * 100_000,
}


@dataclass(frozen=True)
class Damage:
    """Bytes that were damaged, and how.

    Attributes:
        what: a few words for people.
        kind: `value` (a JSON value replaced), `near` (by a plausible one), `key` (left out, added, renamed, given
            twice), `text` (the bytes themselves), `same` (means what it meant).
        path: keys and indices of the value in a JSON text.
        old, new: the value before, and after as JSON text; None where no single value was replaced.
    """

    content: bytes
    what: str
    kind: str
    path: tuple[Any, ...] = ()
    old: Any = None
    new: str | None = None

    @property
    def same_type(self) -> bool:
        """Whether the new value is what JSON calls the old one, and finite."""
        if self.new is None:
            return False
        try:
            new = json.loads(self.new)
        except (ValueError, RecursionError):
            return False
        if isinstance(self.old, bool) or isinstance(new, bool):
            return type(self.old) is type(new)
        if isinstance(self.old, int | float) and isinstance(new, int | float):
            return isinstance(self.old, float) >= isinstance(new, float) and abs(new) < 2**63 and math.isfinite(new)
        return type(self.old) is type(new)


# -------------------------------------------------------------------------------------------------------------- JSON


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every value within a JSON value, and where it is."""
    if path:
        yield path, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], text: str) -> str:
    """The JSON text of `value` with that of one place replaced by `text`, which need not be JSON."""
    copy = json.loads(json.dumps(value))
    holder = copy
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = "@replaced@"
    return json.dumps(copy, indent=1).replace('"@replaced@"', text)


def damaged_json(rng: random.Random, content: bytes, *, within: tuple[Any, ...] = ()) -> Damage:
    """A JSON document with one thing wrong with it, or nothing. `within` narrows which values are replaced."""
    value = json.loads(content)
    found = [(path, old) for path, old in places(value) if path[: len(within)] == within] or list(places(value))
    kind = rng.choices(("value", "near", "key", "text", "same"), (10, 2, 3, 3, 1))[0]
    if kind == "same" or not found:
        return _same_json(rng, value)
    if kind == "text":
        return damaged_text(rng, content)
    path, old = rng.choice(found)
    name = ".".join(map(str, path))
    if kind == "key":
        return _damaged_key(rng, value, path, old)
    label, text = ("", _near(old)) if kind == "near" else rng.choice(list(VALUES.items()))
    label = label or f"{text[:60]} (was {json.dumps(old)[:60]})"
    kind = "same" if text == json.dumps(old) else kind
    return Damage(replaced(value, path, text).encode(), f"{name} = {label}", kind, path, old, text)


def _near(old: Any) -> str:
    """Another plausible value, as JSON text."""
    if isinstance(old, bool):
        return json.dumps(not old)
    if isinstance(old, int | float):
        return json.dumps(old + 1 if isinstance(old, int) else old * 1.5 if old else 0.5)
    if isinstance(old, str):
        return json.dumps(old + "x")
    if isinstance(old, list):
        return json.dumps(old[:-1] if old else [0])
    return json.dumps(dict(list(old.items())[:-1]) if old else {"more": 1} if isinstance(old, dict) else "x")


def _damaged_key(rng: random.Random, value: Any, path: tuple[Any, ...], old: Any) -> Damage:
    """A key or an element left out, added, renamed or given twice."""
    copy = json.loads(json.dumps(value))
    holder = copy
    for key in path[:-1]:
        holder = holder[key]
    name, last = ".".join(map(str, path)), path[-1]
    how = rng.choice(("left out", "beside another", "renamed", "given twice"))
    if how == "left out":
        del holder[last]
    elif isinstance(holder, list):
        how = "given twice"
        holder.insert(last, holder[last])
    elif how == "beside another":
        holder["hostile"] = {"a": [1, None]}
    elif how == "renamed":
        holder[str(last).upper() + "_"] = holder.pop(last)
    else:
        holder[f"@{last}"] = "@twice@"
        text = json.dumps(copy, indent=1).replace(json.dumps(f"@{last}"), json.dumps(last))
        text = text.replace('"@twice@"', '"hostile"')
        return Damage(text.encode(), f"{name} given twice", "key", path, old)
    return Damage(json.dumps(copy, indent=1).encode(), f"{name} {how}", "key", path, old)


def _same_json(rng: random.Random, value: Any) -> Damage:
    def turned(inner: Any) -> Any:
        if isinstance(inner, dict):
            return {key: turned(inner[key]) for key in reversed(inner)}
        return [turned(each) for each in inner] if isinstance(inner, list) else inner

    forms = {
        "on one line": json.dumps(value),
        "indented by 7": json.dumps(value, indent=7),
        "keys in another order": json.dumps(turned(value)),
        "blank lines around": "\n\n" + json.dumps(value) + "\n\n",
    }
    what, text = rng.choice(list(forms.items()))
    return Damage(text.encode(), what, "same")


def damaged_lines(rng: random.Random, content: bytes) -> Damage:
    """JSON lines of which one is damaged, gone or twice, or which are damaged as text."""
    lines = content.splitlines(keepends=True)
    if rng.random() < 0.25:
        return damaged_text(rng, content)
    at = rng.randrange(len(lines))
    if rng.random() < 0.2:
        what, changed = rng.choice(
            (
                ("gone", []),
                ("twice", [lines[at]] * 2),
                ("blank", [b"\n"]),
                ("blank after it", [lines[at], b"   \n"]),
                ("10 MB long", [lines[at].rstrip() + b" " * 10**7 + b"\n"]),
                ("no JSON", [b"hostile\n"]),
            )
        )
        kind = "same" if what == "blank after it" else "text"
        return Damage(b"".join((*lines[:at], *changed, *lines[at + 1 :])), f"line {at + 1} {what}", kind)
    damage = damaged_json(rng, lines[at])
    text = (damage.content if damage.kind == "text" else damage.content.replace(b"\n", b" ")) + b"\n"
    changed_lines = b"".join((*lines[:at], text, *lines[at + 1 :]))
    return dataclasses.replace(damage, content=changed_lines, what=f"line {at + 1}: {damage.what}")


# ------------------------------------------------------------------------------------------------------------- bytes

_TEXTS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "a BOM before it": lambda content: b"\xef\xbb\xbf" + content,
    "UTF-16": lambda content: content.decode("utf-8", "replace").encode("utf-16"),
    "not UTF-8": lambda content: content[: len(content) // 2] + b"\xff\xfe\xc3" + content[len(content) // 2 :],
    "a NUL in it": lambda content: content[: len(content) // 2] + b"\0" + content[len(content) // 2 :],
    "[]": lambda content: b"[]",
    "null": lambda content: b"null",
    "{}": lambda content: b"{}",
    "a number": lambda content: b"7",
    "text": lambda content: b'"hostile"',
    "nested 100,000 deep": lambda content: b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "4 MB of spaces before it": lambda content: b" " * 2**22 + content,
    "twice": lambda content: content + content,
    "more after it": lambda content: content + b"hostile",
    "16 MB of zeros": lambda content: bytes(2**24),
}


def damaged_text(rng: random.Random, content: bytes) -> Damage:
    """A text file cut, in another encoding, or something else entirely."""
    if rng.random() < 0.4:
        return damaged_bytes(rng, content)
    what, change = rng.choice(list(_TEXTS.items()))
    return Damage(change(content), what, "text")


def damaged_bytes(rng: random.Random, content: bytes, other: bytes = b"") -> Damage:
    """Bits and bytes flipped, cut, zeroed, or all of `other`."""
    n, at = len(content), rng.randrange(max(len(content), 1))
    flipped = bytearray(content or b"\0")
    flipped[at] ^= 1 << rng.randrange(8)
    end = min(at + rng.randrange(1, 65), n)
    forms = {
        f"bit flipped in byte {at}": bytes(flipped),
        f"bytes {at} to {end} zeroed": content[:at] + bytes(end - at) + content[end:],
        f"bytes {at} to {end} random": content[:at] + rng.randbytes(end - at) + content[end:],
        f"cut at byte {at}": content[:at],
        "last byte gone": content[:-1],
        f"byte {at} gone": content[:at] + content[at + 1 :],
        "empty": b"",
        "17 bytes more": content + rng.randbytes(17),
        "random": rng.randbytes(n),
    }
    if other:
        forms["another's content"] = other
    what, changed = rng.choice(list(forms.items()))
    return Damage(changed, what, "same" if changed == content else "text")


def damaged_safetensors(rng: random.Random, content: bytes) -> Damage:
    """A safetensors file with a changed header, or with damaged values (`kind` is then `data`)."""
    n = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + n], content[8 + n :]
    how = rng.choice(("header", "header", "length", "bytes", "values", "NaN", "gone"))
    if how == "header":
        damage = damaged_json(rng, header)
        whole = len(damage.content).to_bytes(8, "little") + damage.content + data
        return dataclasses.replace(damage, content=whole, what=f"header: {damage.what}")
    if how == "length":
        length = rng.choice((0, n - 1, n + 1, 2**31, 2**40, 2**63, 2**64 - 1))
        return Damage(length.to_bytes(8, "little") + content[8:], f"header of {length} bytes", "text")
    if how == "values":
        at = rng.randrange(len(data))
        changed = bytearray(data)
        changed[at] ^= 1 << rng.randrange(8)
        return Damage(content[: 8 + n] + bytes(changed), f"a bit of byte {at} of the values", "data")
    if how == "NaN":
        return Damage(content[: 8 + n] + b"\xff" * len(data), "every value NaN", "NaN")
    if how == "gone":
        tensors = json.loads(header)
        name = rng.choice([key for key in tensors if key != "__metadata__"])
        del tensors[name]
        text = json.dumps(tensors).encode()
        return Damage(len(text).to_bytes(8, "little") + text + data, f"{name} gone", "text")
    return damaged_bytes(rng, content)


def damaged(rng: random.Random, name: str, content: bytes) -> Damage:
    """A file damaged as its name says that it is."""
    if name.endswith(".json"):
        return damaged_json(rng, content)
    if name.endswith(".jsonl"):
        return damaged_lines(rng, content)
    if name.endswith(".safetensors"):
        return damaged_safetensors(rng, content)
    if name.endswith((".toml", ".jinja", ".md")):
        return damaged_text(rng, content)
    return damaged_bytes(rng, content)


def replace(path: Path, content: bytes) -> None:
    """Another file in the place of one. What else links to the old one keeps its content."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


# ------------------------------------------------------------------------------------------------------ other things


#: What may be in the place of a file or directory.
NO_FILES = (
    "a link to the same outside",
    "a link to another file outside",
    "a link to nothing outside",
    "a link to a directory outside",
    "a link to itself",
    "a link to /dev/zero",
    "a link to /dev/full",
    "a pipe",
    "a directory",
)


def no_file(what: str, path: Path, outside: Path) -> None:
    """Put one of `NO_FILES` where a file or directory is, or might be.

    Args:
        outside: a directory that links lead to; whatever follows one changes it.
    """
    same = outside / f"same-{path.name}"
    targets = {
        "a link to the same outside": same,
        "a link to another file outside": outside / "canary.txt",
        "a link to nothing outside": outside / "nothing",
        "a link to a directory outside": outside / "canaries",
        "a link to itself": path,
        "a link to /dev/zero": Path("/dev/zero"),
        "a link to /dev/full": Path("/dev/full"),
    }
    if path.is_dir():
        shutil.copytree(path, same)
    else:
        same.write_bytes(path.read_bytes() if path.exists() else b"canary")
    remove(path)
    if what == "a pipe":
        os.mkfifo(path)
    elif what == "a directory":
        path.mkdir()
    else:
        path.symlink_to(targets[what])


def remove(path: Path) -> None:
    """Have nothing at `path`."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
