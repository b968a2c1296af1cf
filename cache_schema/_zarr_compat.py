"""Everything redpen uses of zarr beyond its public interface.

Tried with zarr 3.1.6 and numcodecs 0.16.6; `pyproject.toml` has the range allowed. After an upgrade, run
`tests/test_cache.py` and `tests/test_s3.py`. Besides, `s3.S3Store` overrides `ObjectStore._list`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import zarr
from zarr.abc.buffer import Buffer
from zarr.abc.store import Store
from zarr.codecs import ZstdCodec
from zarr.core.array_spec import ArraySpec as ChunkSpec
from zarr.core.group import GroupMetadata
from zarr.core.metadata import ArrayV3Metadata
from zarr.core.sync import sync
from zarr.storage import StorePath

__all__ = ["BoundedZstd", "make_array", "make_group", "sync", "with_store"]


def make_group(store: Store, path: str, attributes: dict[str, Any]) -> zarr.Group:
    """The group at `path`, without reading its metadata from the store."""
    return zarr.Group(zarr.AsyncGroup(GroupMetadata(attributes=attributes), StorePath(store, path)))


def make_array(store: Store, path: str, metadata: Mapping[str, Any], codecs: Sequence[Any]) -> zarr.Array[Any]:
    """The array at `path`, with these codecs in place of those of `metadata`, without reading its metadata."""
    described = ArrayV3Metadata.from_dict({**metadata, "codecs": tuple(codecs)})
    return zarr.Array(zarr.AsyncArray(described, StorePath(store, path)))


def with_store(array: zarr.Array[Any], store: Store) -> zarr.Array[Any]:
    """The same array in another store."""
    return zarr.Array(dataclasses.replace(array.async_array, store_path=StorePath(store, array.store_path.path)))


class BoundedZstd(ZstdCodec):
    """zstd into a buffer of the chunk's size: a frame that holds more is an error, whatever size it declares."""

    def _decode_sync(self, chunk_bytes: Buffer, chunk_spec: ChunkSpec) -> Buffer:
        size = math.prod(chunk_spec.shape) * chunk_spec.dtype.to_native_dtype().itemsize
        chunk = np.zeros(size, np.uint8)
        self._zstd_codec.decode(chunk_bytes.as_numpy_array(), chunk)
        return chunk_spec.prototype.buffer.from_array_like(chunk)
