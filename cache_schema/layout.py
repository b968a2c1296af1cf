"""How every array of a cache is stored: its `zarr.json`, and the comparison with one that is found.

Shapes, types and codecs follow from the manifests, so metadata that say anything else are damaged. zarr gets our own
description rather than the one found, so nothing is allocated because a file declares it.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import Store
from zarr.buffer import default_buffer_prototype
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec

from ._zarr_compat import BoundedZstd, make_array, sync, with_store
from .arrays import COMMIT_FIELDS, INNER_CHUNK, ArraySpec, inner_chunk
from .digests import VERSION, digest_bytes
from .errors import CacheError, shown
from .manifest import MOST_SLOT_VALUES, RoundManifest, ScoresManifest
from .nodes import damaged, read_node
from .stores import BoundedStore, WriteOnlyStore

_BYTES: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}
_CRC32C: dict[str, Any] = {"name": "crc32c"}
_ZSTD: dict[str, Any] = {"name": "zstd", "configuration": {"level": 1, "checksum": False}}
#: Keys that do not matter for reading.
_IGNORED = ("attributes", "dimension_names")


@dataclass(frozen=True)
class Layout:
    """How one array is stored.

    Attributes:
        dtype: numpy's code; stored little-endian.
        chunks: shape of a chunk (in a shard: of an inner chunk).
        shards: shape of a shard; None: not sharded.
        compressed: whether chunks are compressed with zstd.
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
        """An upper bound of the size of one stored object."""
        raw = math.prod(self.chunks) * np.dtype(self.dtype).itemsize
        n_chunks = math.prod(self.shards or self.chunks) // math.prod(self.chunks)
        return n_chunks * (raw + raw // 128 + 1024) + 16 * n_chunks + 64  # with what zstd, crc32c and the index add

    def open(self, store: Store, path: str) -> zarr.Array[Any]:
        """The array at `path`, opened by this description alone."""
        codecs: tuple[Any, ...] = (
            BytesCodec(endian="little"),
            *([BoundedZstd(level=1)] if self.compressed else []),
            Crc32cCodec(),
        )
        if self.shards is not None:
            codecs = (ShardingCodec(chunk_shape=self.chunks, codecs=codecs),)
        return make_array(BoundedStore(store, self.object_bytes()), path, self.to_json(), codecs)


def block_layouts(
    manifest: RoundManifest | ScoresManifest, round_manifest: RoundManifest, version: int = VERSION
) -> dict[str, Layout]:
    """Every array of a block group, `commit` included, in a cache of this format version."""
    slots = round_manifest.slots()
    if isinstance(manifest, ScoresManifest):
        slots |= {"candidate": manifest.candidates, "topk": manifest.topk}
    n_blocks = round_manifest.n_blocks
    found = {}
    for spec in manifest.arrays():
        slot = tuple(slots[dim] for dim in spec.dims)
        if math.prod(slot) > MOST_SLOT_VALUES:
            raise CacheError(
                f"array {spec.name}: expected at most {MOST_SLOT_VALUES:,} values a block, found "
                f"{math.prod(slot):,}; lower rollouts.prompts_per_block or score.candidates"
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
    fields = commit_columns(manifest.arrays(), version)
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


def commit_type(specs: Iterable[ArraySpec], version: int) -> np.dtype[Any]:
    """A commit record. Digests are opaque bytes (a little-endian number), all other fields uint64."""
    names = [*COMMIT_FIELDS, *(f"digest.{spec.name}" for spec in specs)]
    return np.dtype([(name, f"V{digest_bytes(version)}" if "digest" in name else "<u8") for name in names])


def commit_columns(specs: Iterable[ArraySpec], version: int) -> list[str]:
    """Names of the uint64 numbers that a commit record is stored as: a digest of 128 bits has two."""
    record = commit_type(specs, version)
    return [f"{name}{half}" for name in record.names or () for half in ("", ":high")[: record[name].itemsize // 8]]


def create(group: zarr.Group, layouts: Mapping[str, Layout]) -> None:
    """Create empty arrays in `group`, concurrently: a server may be far away."""

    async def write() -> None:
        from_bytes = default_buffer_prototype().buffer.from_bytes
        files = {name: json.dumps(layout.to_json(), indent=2).encode() for name, layout in layouts.items()}
        await asyncio.gather(
            *((group.store_path / f"{name}/zarr.json").set(from_bytes(file)) for name, file in files.items())
        )

    sync(write())


def open_array(store: Store, path: str, layout: Layout) -> zarr.Array[Any]:
    """The array at `path`. Raises `CacheError` naming the first difference between its metadata and `layout`."""
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
    return layout.open(store, path)


def write_only(array: zarr.Array[Any]) -> zarr.Array[Any]:
    """The array, to replace whole shards of without reading them first."""
    return with_store(array, WriteOnlyStore(array.store_path.store))


@contextmanager
def decoding_errors() -> Iterator[None]:
    """Turn whatever zarr and its codecs raise for damaged values into a `ValueError` of one line."""
    try:
        yield
    except (OSError, CacheError):
        raise
    except Exception as error:  # depending on the codec: ValueError, RuntimeError, MemoryError, struct.error, ...
        raise ValueError(" ".join(str(error).split())[:160] or type(error).__name__) from error


def _normal(value: dict[str, Any]) -> dict[str, Any]:
    """An array's metadata in the form that redpen writes: other writers may omit defaults or write other levels."""
    found = {
        name: item
        for name, item in ({"storage_transformers": []} | value).items()
        if name not in _IGNORED and not (isinstance(item, dict) and item.get("must_understand") is False)
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
            if name == "zstd" or (name == "bytes" and data_type == "uint8"):  # level; endianness of single bytes
                configuration = {}
            elif name == "sharding_indexed":
                configuration = {"index_location": "end"} | configuration
                for inner, of in (("codecs", data_type), ("index_codecs", "uint64")):
                    configuration[inner] = _normal_codecs(configuration.get(inner), of)
        found.append(codec | {"configuration": configuration})
    return found


def _difference(expected: Any, found: Any, where: str = "") -> str | None:
    """The first difference of two JSON values, for a message; 1, 1.0 and true are different."""
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
