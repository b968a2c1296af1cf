"""How every array of a cache is stored: its `zarr.json`, written from and compared with one description.

Shapes, types and codecs all follow from the manifests, so metadata that say anything else are damaged. zarr is given
our own description rather than what was found: nothing that a file declares is ever allocated.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import ByteRequest, RangeByteRequest, Store
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec, ZstdCodec
from zarr.core.array_spec import ArraySpec as ChunkSpec
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.core.metadata import ArrayV3Metadata
from zarr.core.sync import sync
from zarr.storage import StorePath, WrapperStore

from .arrays import COMMIT_FIELDS, INNER_CHUNK, ArraySpec, inner_chunk
from .errors import CacheError
from .manifest import MOST_SLOT_VALUES, RoundManifest, ScoresManifest, shown
from .nodes import damaged, read_node

_BYTES: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}
_CRC32C: dict[str, Any] = {"name": "crc32c"}
_ZSTD: dict[str, Any] = {"name": "zstd", "configuration": {"level": 1, "checksum": False}}
#: Keys that reading does not depend on.
_FREE = ("attributes", "dimension_names")


@dataclass(frozen=True)
class Layout:
    """How one array is stored.

    Attributes:
        dtype: numpy's code; stored little-endian.
        chunks: shape of an inner chunk, which has a checksum.
        shards: shape of a stored object that holds several chunks; None: each chunk is an object.
        compressed: whether chunks are compressed by zstd.
    """

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    shards: tuple[int, ...] | None
    fill: int | float
    compressed: bool
    dimension_names: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The array's `zarr.json`."""
        codecs = [_BYTES, *([_ZSTD] if self.compressed else []), _CRC32C]
        if self.shards is not None:
            configuration = {
                "chunk_shape": list(self.chunks),
                "codecs": codecs,
                "index_codecs": [_BYTES, _CRC32C],
                "index_location": "end",
            }
            codecs = [{"name": "sharding_indexed", "configuration": configuration}]
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": np.dtype(self.dtype).name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(self.shards or self.chunks)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": "NaN" if self.fill != self.fill else self.fill,
            "codecs": codecs,
            "attributes": dict(self.attributes),
            "dimension_names": list(self.dimension_names),
            "storage_transformers": [],
        }

    def object_bytes(self) -> int:
        """The most that one stored object can hold."""
        raw = math.prod(self.chunks) * np.dtype(self.dtype).itemsize
        n_chunks = math.prod(s // c for s, c in zip(self.shards, self.chunks, strict=True)) if self.shards else 1
        return n_chunks * (raw + raw // 128 + 1024) + 16 * n_chunks + 64  # what zstd, the checksum and the index add

    def in_memory(self) -> ArrayV3Metadata:
        codecs: Sequence[Any] = (
            BytesCodec(endian="little"),
            *([_Zstd(level=1)] if self.compressed else []),
            Crc32cCodec(),
        )
        if self.shards is not None:
            codecs = (ShardingCodec(chunk_shape=self.chunks, codecs=codecs),)
        return ArrayV3Metadata.from_dict({**self.to_json(), "codecs": codecs})


def block_layouts(manifest: RoundManifest | ScoresManifest, round_manifest: RoundManifest) -> dict[str, Layout]:
    """Every array of a block group, `commit` included."""
    slots = round_manifest.slots()
    if isinstance(manifest, ScoresManifest):
        slots |= {"candidate": manifest.candidates, "topk": manifest.topk}
    n_blocks = round_manifest.n_blocks
    found = {}
    for spec in manifest.arrays():
        slot = tuple(slots[dim] for dim in spec.dims)
        if math.prod(slot) > MOST_SLOT_VALUES:
            raise CacheError(
                f"array {spec.name}: a block would hold {math.prod(slot):,} values, at most {MOST_SLOT_VALUES:,} are "
                "possible; lower rollouts.prompts_per_block or score.candidates"
            )
        found[spec.name] = Layout(
            dtype=spec.dtype,
            shape=(n_blocks, *slot),
            chunks=(1, inner_chunk(spec, slot[0]), *slot[1:]),
            shards=(1, *slot),
            fill=spec.fill,
            compressed=True,
            dimension_names=spec.dimension_names,
            attributes={"unit": spec.unit, "meaning": spec.meaning},
        )
    fields = commit_fields(manifest.arrays())
    found["commit"] = Layout(
        dtype="u8",
        shape=(n_blocks, len(fields)),
        chunks=(1, len(fields)),
        shards=None,
        fill=0,
        compressed=False,
        dimension_names=("block", "field"),
        attributes={"fields": fields, "meaning": "written last; rows == 0: the block is not there"},
    )
    return found


def prompt_layouts(n_bytes: int, n_prompts: int) -> dict[str, Layout]:
    """The arrays of a round's prompts."""
    found = {}
    for name, dtype, size, dimension, meaning in (
        ("bytes", "u1", n_bytes, "byte", "prompt records as canonical UTF-8 JSON, end to end"),
        ("offsets", "i8", n_prompts + 1, "prompt_boundary", "record i is bytes[offsets[i]:offsets[i + 1]]"),
    ):
        found[name] = Layout(
            dtype=dtype,
            shape=(size,),
            chunks=(min(size, INNER_CHUNK * 16),),
            shards=None,
            fill=0,
            compressed=True,
            dimension_names=(dimension,),
            attributes={"unit": "byte", "meaning": meaning},
        )
    return found


def commit_fields(specs: Iterable[ArraySpec]) -> list[str]:
    return [*COMMIT_FIELDS, *(f"digest.{spec.name}" for spec in specs)]


def create(group: zarr.Group, layouts: Mapping[str, Layout]) -> None:
    """Create arrays, empty, in `group`."""

    async def write() -> None:
        # At once: servers are far away.
        buffer = default_buffer_prototype().buffer
        files = {name: json.dumps(layout.to_json(), indent=2).encode() for name, layout in layouts.items()}
        await asyncio.gather(
            *((group.store_path / f"{name}/zarr.json").set(buffer.from_bytes(file)) for name, file in files.items())
        )

    sync(write())


def open_array(store: Store, path: str, layout: Layout) -> zarr.Array[Any]:
    """The array at `path`. Raises `CacheError` naming what its metadata have that `layout` has not."""
    found = read_node(store, path)
    if found is None:
        raise damaged(path, "is missing")
    problem = _difference(_normal(layout.to_json()), _normal(found))
    if problem is None and "fields" in layout.attributes:
        attributes = found.get("attributes")
        fields = attributes.get("fields") if isinstance(attributes, dict) else None
        problem = _difference(layout.attributes["fields"], fields, "attributes.fields")
    if problem is not None:
        raise damaged(path, problem)
    where = StorePath(_Bounded(store, layout.object_bytes()), path)
    return zarr.Array(zarr.AsyncArray(layout.in_memory(), where))


def write_only(array: zarr.Array[Any]) -> zarr.Array[Any]:
    """The array with a store in which it finds nothing: zarr would read the shard that it replaces whole, and stop at
    a damaged one."""
    where = StorePath(_Unread(array.store_path.store), array.store_path.path)
    return zarr.Array(dataclasses.replace(array.async_array, store_path=where))


@contextmanager
def decoding_errors() -> Iterator[None]:
    """Turn whatever zarr and its codecs raise about stored values into `ValueError`, one line."""
    try:
        yield
    except (OSError, CacheError):
        raise
    except Exception as error:  # by codec: ValueError, RuntimeError, MemoryError, struct.error and more
        raise ValueError(" ".join(str(error).split())[:160] or type(error).__name__) from error


def _normal(value: dict[str, Any]) -> dict[str, Any]:
    """An array's metadata without what other writers may leave out or say otherwise."""
    optional: dict[str, Any] = {"storage_transformers": []}
    found = {
        name: item
        for name, item in (optional | value).items()
        if name not in _FREE and not (isinstance(item, dict) and item.get("must_understand") is False)
    }
    if isinstance(encoding := found.get("chunk_key_encoding"), dict):
        found["chunk_key_encoding"] = {"configuration": {"separator": "/"}} | encoding
    found["codecs"] = _normal_codecs(found.get("codecs"), found.get("data_type"))
    return found


def _normal_codecs(codecs: Any, data_type: Any) -> Any:
    if not isinstance(codecs, list):
        return codecs
    found = []
    for codec in codecs:
        if isinstance(codec, str):
            codec = {"name": codec}
        if not isinstance(codec, dict):
            return codecs
        configuration, name = codec.get("configuration", {}), codec.get("name")
        if isinstance(configuration, dict):
            if name == "zstd" or (
                name == "bytes" and data_type == "uint8"
            ):  # how hard it was compressed is not for the reader
                configuration = {}
            elif name == "sharding_indexed":
                configuration = {"index_location": "end"} | configuration
                for inner, of in (("codecs", data_type), ("index_codecs", "uint64")):
                    configuration[inner] = _normal_codecs(configuration.get(inner), of)
        found.append(codec | {"configuration": configuration})
    return found


def _difference(expected: Any, found: Any, where: str = "") -> str | None:
    """The first place at which JSON `found` is not `expected`; 1, 1.0 and true are three values."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in [*expected, *(key for key in found if key not in expected)]:
            name = f"{where}.{key}" if where else str(key)
            if key not in found:
                return f"{shown(name)}: expected {shown(expected[key])}, found nothing"
            if key not in expected:
                return f"{shown(name)}: expected nothing, found {shown(found[key])}"
            if (problem := _difference(expected[key], found[key], name)) is not None:
                return problem
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        for index, (ours, theirs) in enumerate(zip(expected, found, strict=True)):
            if (problem := _difference(ours, theirs, f"{where}[{index}]")) is not None:
                return problem
    elif json.dumps(expected) != json.dumps(found):
        return f"{where}: expected {shown(expected)}, found {shown(found)}"
    return None


class _Bounded(WrapperStore[Store]):
    """A store whose objects hold at most so many bytes."""

    def __init__(self, store: Store, at_most: int = 0):
        super().__init__(store)
        self._at_most = at_most

    def _with_store(self, store: Store) -> _Bounded:
        return _Bounded(store, self._at_most)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        whole = RangeByteRequest(0, self._at_most + 1)
        if isinstance(byte_range, RangeByteRequest) and byte_range.end - byte_range.start > self._at_most:
            raise ValueError(f"expected at most {self._at_most:,} bytes, its index says more")
        found = await self._store.get(key, prototype, whole if byte_range is None else byte_range)
        if found is not None and len(found) > self._at_most:
            raise ValueError(f"expected at most {self._at_most:,} bytes, found more")
        return found


class _Unread(WrapperStore[Store]):
    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        return None


class _Zstd(ZstdCodec):
    """zstd that looks at the declared size before it decompresses."""

    def _decode_sync(self, chunk_bytes: Buffer, chunk_spec: ChunkSpec) -> Buffer:
        dtype = chunk_spec.dtype.to_native_dtype()
        expected, found = math.prod(chunk_spec.shape) * dtype.itemsize, _content_size(chunk_bytes.to_bytes()[:18])
        if found != expected:
            raise ValueError(f"a chunk should decompress to {expected:,} bytes, it says {found}")
        return super()._decode_sync(chunk_bytes, chunk_spec)


def _content_size(frame: bytes) -> int | None:
    """Bytes that a zstd frame says it decompresses to (RFC 8878, 3.1.1.1); None where it does not say."""
    if len(frame) < 6 or frame[:4] != b"\x28\xb5\x2f\xfd":
        return None
    descriptor = frame[4]
    flag, single = descriptor >> 6, descriptor >> 5 & 1
    start = 5 + (1 - single) + (0, 1, 2, 4)[descriptor & 3]
    width = (single, 2, 4, 8)[flag]
    if not width or len(frame) < start + width:
        return None
    return int.from_bytes(frame[start : start + width], "little") + (256 if width == 2 else 0)
