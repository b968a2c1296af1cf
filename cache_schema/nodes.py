"""Groups and arrays of a store by their `zarr.json`, read here and nowhere else."""

from __future__ import annotations

import json
from typing import Any

import zarr
from zarr.abc.store import Store
from zarr.core.buffer import default_buffer_prototype
from zarr.core.group import AsyncGroup, GroupMetadata
from zarr.core.sync import sync
from zarr.storage import StorePath

from .errors import CacheError
from .manifest import shown

#: How deep metadata may be nested; an array's go down to 7.
NESTING = 32


def damaged(path: str, problem: str) -> CacheError:
    """The error of a node whose `zarr.json` is not what it should be."""
    return CacheError(
        f"unreadable metadata in {shown(f'{path}/zarr.json' if path else 'zarr.json', 200)} ({problem}); restore the "
        "cache from a copy, or start another"
    )


def read_node(store: Store, path: str) -> dict[str, Any] | None:
    """The metadata of the group or array at `path`; None where there is none.

    Raises `CacheError` where they are no JSON object. `OSError` is the storage's.
    """
    key = f"{path}/zarr.json" if path else "zarr.json"
    try:
        found = sync(store.get(key, default_buffer_prototype()))
        if found is None:
            return None
        value = json.loads(found.to_bytes())
    except CacheError:
        raise
    except RecursionError:
        raise damaged(path, "not valid JSON: nested too deeply") from None
    except ValueError as error:  # also bytes that are no text, integers of thousands of digits, a pipe
        raise damaged(path, " ".join(str(error).split())[:200]) from None
    if not isinstance(value, dict):
        raise damaged(path, f"expected a JSON object, found {shown(value)}")
    _check_nesting(value, path)
    return value


def open_group(store: Store, path: str) -> zarr.Group | None:
    """The group at `path`, None where there is none. Raises `CacheError` where something else is there."""
    found = read_node(store, path)
    if found is None:
        return None
    for name, expected in (("zarr_format", 3), ("node_type", "group")):
        if isinstance(found.get(name), bool) or found.get(name) != expected:
            raise damaged(path, f"{name}: expected {shown(expected)}, found {shown(found.get(name))}")
    attributes = found.get("attributes", {})
    if not isinstance(attributes, dict):
        raise damaged(path, f"attributes: expected a JSON object, found {shown(attributes)}")
    return zarr.Group(AsyncGroup(GroupMetadata(attributes=attributes), StorePath(store, path)))


def _check_nesting(value: Any, path: str) -> None:
    level, depth = [value], 0
    while level:
        if depth == NESTING:
            raise damaged(path, f"expected JSON nested at most {NESTING} deep, found it deeper")
        inner = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list))
        level, depth = [item for items in inner for item in items], depth + 1
