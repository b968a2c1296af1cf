"""Digests of decoded arrays, which link them to the commit of their block.

They notice what crc32c of the stored chunks cannot: a missing shard, which reads as fill values, and arrays of one
writer with the commit of another. Version 2 of the format has XXH3, 128 bits, which costs a few percent of decoding;
version 1 has BLAKE2b, 64 bits, which costs as much as decoding. Neither is a protection against forgery.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

#: The format that new caches have; versions from 1 are read and continued.
VERSION = 2


def digest_bytes(version: int) -> int:
    """Size of a digest in a cache of this format version."""
    return 8 if version == 1 else 16


def digest(data: bytes | memoryview, version: int) -> int:
    """The digest of some bytes, a number below 2**64 in version 1, and below 2**128 in version 2."""
    if version == 1:
        return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
    return xxhash.xxh3_128_intdigest(data)


def array_digest(value: npt.NDArray[Any], version: int) -> int:
    """Digest of an array's elements in C order, little-endian."""
    return digest(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data, version)
