"""Groups and arrays of a store: the only module that reads a `zarr.json`."""

from __future__ import annotations

import json
from typing import Any

import zarr
from zarr.abc.store import Store
from zarr.buffer import default_buffer_prototype

from ._zarr_compat import make_group, sync
from .errors import CacheError, shown
from .stores import BoundedStore, holds_blocks

#: Limits of a `zarr.json`: bytes and nesting. Those that redpen writes have a few thousand bytes and 7 levels.
METADATA_BYTES, NESTING = 2**24, 32


def damaged(path: str, problem: str) -> CacheError:
    """The error to raise about a missing or wrong `zarr.json` of the node at `path`."""
    return CacheError(
        f"unreadable metadata in {shown(f'{path}/zarr.json' if path else 'zarr.json', 200)} ({problem}); restore the "
        "cache from a copy, or start another"
    )


def read_node(store: Store, path: str) -> dict[str, Any] | None:
    """The metadata of the group or array at `path`, or None if there is none.

    Raises `CacheError` if they are not a JSON object within the limits, and whatever the storage raises.
    """
    key = f"{path}/zarr.json" if path else "zarr.json"
    try:
        found = sync(BoundedStore(store, METADATA_BYTES).get(key, default_buffer_prototype()))
        if found is None:
            return None
        value = json.loads(found.to_bytes())
    except CacheError:
        raise
    except RecursionError:
        raise damaged(path, "not valid JSON: nested too deeply") from None
    except ValueError as error:  # also: not UTF-8, an integer of thousands of digits, not a regular file, too large
        raise damaged(path, " ".join(str(error).split())[:200]) from None
    if not isinstance(value, dict):
        raise damaged(path, f"expected a JSON object, found {shown(value)}")
    _check_nesting(value, path)
    return value


def open_group(store: Store, path: str) -> zarr.Group | None:
    """The group at `path`, or None if there is none. Raises `CacheError` if something else is there."""
    found = read_node(store, path)
    if found is None:
        return None
    for name, expected in (("zarr_format", 3), ("node_type", "group")):
        if isinstance(found.get(name), bool) or found.get(name) != expected:
            raise damaged(path, f"{name}: expected {shown(expected)}, found {shown(found.get(name))}")
    attributes = found.get("attributes", {})
    if not isinstance(attributes, dict):
        raise damaged(path, f"attributes: expected a JSON object, found {shown(attributes)}")
    return make_group(store, path, attributes)


def open_complete_group(store: Store, path: str, *children: str) -> zarr.Group | None:
    """The group of a round or scorer; None if its creation, which writes attribute `redpen` last, never ended.

    Raises `CacheError` if there are blocks below it (or below `children` of it) without the metadata to read them by.
    """
    group = open_group(store, path)
    if group is not None and "redpen" in group.attrs:
        return group
    if any(holds_blocks(store, f"{path}/{child}".rstrip("/")) for child in children or ("",)):
        raise damaged(path, "metadata is missing, though there are blocks below it")
    return None


def _check_nesting(value: Any, path: str) -> None:
    level, depth = [value], 0
    while level:
        if depth == NESTING:
            raise damaged(path, f"expected JSON nested at most {NESTING} deep, found it deeper")
        inner = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list))
        level, depth = [item for items in inner for item in items], depth + 1
