"""One block's part of an array: its object, checked and decoded here.

zarr takes a millisecond for a read, whatever its size, in which its event loop turns thirty times; of 25 small arrays
in a block that is nearly all. The layouts are few and known (`layout.Layout`), so this decodes the same codecs by the
same libraries: the index of a shard, then the chunks that hold the used part, by crc32c and zstd.
"""

from __future__ import annotations

from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
from numcodecs.zstd import Zstd  # type: ignore[import-untyped]
from zarr.abc.buffer import Buffer
from zarr.abc.store import RangeByteRequest, Store
from zarr.buffer import default_buffer_prototype

from ._zarr_compat import sync
from .layout import Layout

Bytes = npt.NDArray[np.uint8]

_CRC_BYTES, _ENTRY_BYTES = 4, 16
_MISSING = 2**64 - 1
_zstd = Zstd()


def read_block(store: Store, path: str, layout: Layout, block: int, used: int) -> npt.NDArray[Any]:
    """The first `used` elements of a block, along its slot. What is not stored has the fill value.

    Raises `ValueError` if the object is not what the layout says, and whatever the storage raises.
    """
    data = _fetch(store, f"{path}/c/{block}{'/0' * (len(layout.shape) - 1)}", layout.object_bytes())
    kind = np.dtype(layout.dtype).newbyteorder("<")
    shape = (used, *layout.shape[2:])
    if data is None:
        return np.full(shape, layout.fill, kind)
    if layout.shards is None:
        values = np.frombuffer(_checked(data).tobytes(), kind)
        if len(values) != layout.shape[1]:
            raise ValueError(f"expected {layout.shape[1]} values, found {len(values)}")
        return values[:used]
    chunk = layout.chunks[1]
    entries = _index(data, layout.shards[1] // chunk, layout.object_bytes())
    out = np.empty(shape, kind)
    for start in range(0, used, chunk):
        part, (offset, length) = out[start : start + chunk], entries[start // chunk]
        if (offset, length) == (_MISSING, _MISSING):
            part[...] = layout.fill
            continue
        if offset + length > len(data):
            raise ValueError(f"expected chunks within {len(data):,} bytes, its index says more")
        _decompress(_checked(data[offset : offset + length]), part, (chunk, *shape[1:]))
    return out


def _fetch(store: Store, key: str, at_most: int) -> Bytes | None:
    span, prototype = RangeByteRequest(0, at_most + 1), default_buffer_prototype()
    get_sync = getattr(store, "get_sync", None)  # of stores in memory and on a local disk
    found: Buffer | None = (
        sync(store.get(key, prototype, span))
        if get_sync is None
        else get_sync(key, prototype=prototype, byte_range=span)
    )
    if found is not None and len(found) > at_most:
        raise ValueError(f"expected at most {at_most:,} bytes, found more")
    return None if found is None else np.asarray(found.as_numpy_array()).view(np.uint8)


def _index(data: Bytes, n_chunks: int, at_most: int) -> list[tuple[int, int]]:
    """Offset and length of every chunk in a shard, which are at its end."""
    size = n_chunks * _ENTRY_BYTES + _CRC_BYTES
    if len(data) < size:
        raise ValueError(f"expected an index of {size:,} bytes, found {len(data):,}")
    entries = np.frombuffer(_checked(data[len(data) - size :]).tobytes(), "<u8").reshape(n_chunks, 2).tolist()
    lengths = [length for _, length in entries if length != _MISSING]
    if sum(lengths) > at_most:
        raise ValueError(f"expected chunks of at most {at_most:,} bytes together, its index says more")
    return [(offset, length) for offset, length in entries]


def _checked(data: Bytes) -> Bytes:
    """Without the crc32c at its end, which has to fit."""
    content, stored = data[:-_CRC_BYTES], data[-_CRC_BYTES:]
    if google_crc32c.value(content) != int.from_bytes(stored.tobytes(), "little") or len(stored) < _CRC_BYTES:
        raise ValueError("its checksum does not fit")
    return content


def _decompress(content: Bytes, part: npt.NDArray[Any], shape: tuple[int, ...]) -> None:
    """Into `part`, which the chunk of this shape may exceed. A frame that holds more than the chunk is an error,
    whatever size it declares."""
    if part.shape == shape:
        part[...] = 0
        _zstd.decode(content, part.reshape(-1).view(np.uint8))
        return
    whole = np.zeros(shape, part.dtype)
    _zstd.decode(content, whole.reshape(-1).view(np.uint8))
    part[...] = whole[: len(part)]
