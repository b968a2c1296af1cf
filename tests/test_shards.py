"""Blocks are decoded here as zarr decodes them, and what zarr would not have written is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zarr
from numcodecs.zstd import Zstd
from zarr.storage import MemoryStore

from cache_schema import layout
from cache_schema.layout import Layout
from cache_schema.local import LocalDirectory
from cache_schema.shards import read_block

#: Three chunks a shard, in one or two dimensions.
FLAT = Layout("i4", (2, 24), (1, 8), (1, 24), -1, True, ("block", "token"))
WIDE = Layout("f4", (2, 24, 3), (1, 8, 3), (1, 24, 3), float("nan"), True, ("block", "token", "candidate"))
COMMIT = Layout("u8", (2, 5), (1, 5), None, 0, False, ("block", "field"))


def written(directory: Path, what: Layout, block: np.ndarray) -> zarr.Array[Any]:
    """An array with one block, written by zarr through this layout."""
    store = LocalDirectory(directory)
    group = zarr.create_group(store)
    layout.create(group, {"a": what})
    what.open(store, "a")[1] = block
    return what.open(store, "a")


@pytest.mark.parametrize("what", [FLAT, WIDE, COMMIT], ids=["flat", "wide", "commit"])
def test_a_block_is_what_zarr_reads(tmp_path: Path, what: Layout) -> None:
    block = np.random.default_rng(0).integers(1, 99, what.shape[1:]).astype(what.dtype)
    block[8:16] = what.fill  # a chunk that is not stored
    array = written(tmp_path, what, block)
    by_zarr = zarr.open_array(tmp_path / "a", mode="r")
    for store in (LocalDirectory(tmp_path), LocalDirectory(tmp_path, read_only=True)):
        for used in (0, 1, 5, 8, 9, 16, 23, 24):
            used = min(used, what.shape[1])
            for number in (0, 1):
                found = read_block(store, "a", what, number, used)
                assert found.dtype == np.dtype(what.dtype) and found.shape == (used, *what.shape[2:])
                np.testing.assert_array_equal(found, by_zarr[number][:used])
                np.testing.assert_array_equal(found, array[number][:used])


def test_a_store_without_get_sync(tmp_path: Path) -> None:
    from zarr.storage import WrapperStore

    store = MemoryStore()
    layout.create(zarr.create_group(store), {"a": FLAT})
    FLAT.open(store, "a")[0] = np.arange(24)
    for one in (store, WrapperStore(store)):
        assert read_block(one, "a", FLAT, 0, 9).tolist() == list(range(9))


def with_crc(data: bytes) -> bytes:
    return data + google_crc32c.value(data).to_bytes(4, "little")


def shard(*chunks: bytes, entries: list[tuple[int, int]] | None = None) -> bytes:
    """Chunks end to end, and their index."""
    found, start = [], 0
    for chunk in chunks:
        found.append((start, len(chunk)) if chunk else (2**64 - 1, 2**64 - 1))
        start += len(chunk)
    return b"".join(chunks) + with_crc(np.array(entries or found, "<u8").tobytes())


ZEROS = with_crc(Zstd(level=1).encode(np.zeros(8, "<i4")))
WHOLE = shard(ZEROS, ZEROS, ZEROS)
DAMAGE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "index"),
    "only a part of the index": (WHOLE[-20:], "index"),
    "a flipped bit in a chunk": (shard(bytes([ZEROS[0] ^ 1]) + ZEROS[1:], ZEROS, ZEROS), "checksum"),
    "a flipped bit in the index": (
        shard(ZEROS, ZEROS, ZEROS)[:-9] + b"\1" + shard(ZEROS, ZEROS, ZEROS)[-8:],
        "checksum",
    ),
    "no room for a checksum": (shard(ZEROS, ZEROS, ZEROS, entries=[(0, 3)] * 3), "checksum"),
    "beyond the end": (shard(ZEROS, ZEROS, ZEROS, entries=[(2**63, 9)] * 3), "within"),
    "longer than the shard": (shard(ZEROS, ZEROS, ZEROS, entries=[(0, 2**62)] * 3), "together"),
    "half missing": (shard(ZEROS, ZEROS, ZEROS, entries=[(2**64 - 1, 9)] * 3), "within"),
    "a chunk that holds more": (
        shard(with_crc(Zstd(level=1).encode(np.zeros(9, "<i4"))), ZEROS, ZEROS),
        "buffer|size|larger|[Dd]estination",
    ),
    "no zstd": (shard(with_crc(b"nothing of the kind"), ZEROS, ZEROS), "Zstd|zstd|frame|[Cc]ontent|input"),
    "more than any shard": (b"\0" * (FLAT.object_bytes() + 1), "at most"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_shard_is_refused(tmp_path: Path, name: str) -> None:
    content, message = DAMAGE[name]
    path = tmp_path / "a/c/0/0"
    path.parent.mkdir(parents=True)
    path.write_bytes(WHOLE)
    assert read_block(LocalDirectory(tmp_path), "a", FLAT, 0, 24).tolist() == [0] * 24
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message), layout.decoding_errors():
        read_block(LocalDirectory(tmp_path), "a", FLAT, 0, 24)


def test_a_commit_of_another_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a/c/0/0"
    path.parent.mkdir(parents=True)
    for size in (4, 6):
        path.write_bytes(with_crc(bytes(8 * size)))
        with pytest.raises(ValueError, match=f"expected 5 values, found {size}|at most"):
            read_block(LocalDirectory(tmp_path), "a", COMMIT, 0, 5)
