"""Responses of an OpenAI-compatible server: their JSON as typed models, errors, and bounded reading of bodies."""

from __future__ import annotations

import base64
import io
import math
import re
import zlib
from typing import Annotated, Any

import httpx2
import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from pipeline.errors import ModelError, one_line, shorten


class _Response(BaseModel):
    """A response. Fields that redpen does not use may be anything."""

    model_config = ConfigDict(strict=True, frozen=True)


class ServedModel(_Response):
    id: str = Field(max_length=10_000)
    max_model_len: Annotated[int, Field(ge=1, lt=2**53)] | None = None


class ModelList(_Response):
    """The response of /models."""

    data: list[ServedModel] | None = Field(default=None, fail_fast=True)


# Validation stops at the first error: a list of millions could give millions of messages.
_Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]] | None, Field(fail_fast=True)]
#: `EngineLogprobs.from_positions` checks the values.
_Positions = Annotated[list[dict[str, Any] | None] | None, Field(fail_fast=True)]


class Choice(_Response):
    prompt_token_ids: _Ids = None
    prompt_logprobs: _Positions = None


class Completion(_Response):
    """The response of /completions and of /inference/v1/generate."""

    choices: list[Choice] | None = Field(default=None, fail_fast=True)
    prompt_token_ids: _Ids = None
    prompt_logprobs: _Positions = None
    prompt_token_id_logprobs: str | None = None


class Refused(Exception):
    """The server refused a request; repeating it is no use."""

    def __init__(self, status: int, text: str):
        super().__init__(text)
        self.status = status
        allowed = re.search(r"max(?:imum)? allowed:? *(\d+)", text)
        #: most log-probs at a position, if the message names the limit
        self.allowed = int(allowed[1]) if allowed else None


class Failed(Exception):
    """A request failed for a reason that may pass; `wait`: seconds to wait, if the server sent a number."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


async def read_bounded(response: httpx2.Response, at_most: int) -> bytes:
    """A body, decompressed; if it is longer than `at_most`, that much and a byte more."""
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "gzip", "x-gzip", "deflate", ""):
        raise Failed(f"its response has content-encoding {encoding[:40]!r}, gzip was requested")
    decompressor = None if encoding in ("identity", "") else zlib.decompressobj(32 + zlib.MAX_WBITS)
    found = bytearray()
    async for chunk in response.aiter_raw():
        left = at_most + 1 - len(found)
        found += chunk[:left] if decompressor is None else decompressor.decompress(chunk, left)
        if len(found) > at_most:
            break
    return bytes(found)


def decode_array(encoded: str, shape: tuple[int, ...]) -> npt.NDArray[np.floating[Any]]:
    """Log-probs from a .npy file in base64; its header is checked before memory is allocated."""
    try:
        content = base64.b64decode(encoded, validate=True)
        file = io.BytesIO(content)
        if np.lib.format.read_magic(file) != (1, 0):  # type: ignore[no-untyped-call]
            raise ValueError("expected version 1.0 of the format")
        found, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)  # type: ignore[no-untyped-call]
        if dtype.kind != "f" or dtype.itemsize > 8:
            raise ValueError(f"expected floats, found {dtype}")
        if found != shape:
            raise ModelError(f"returned log-probs of shape {shorten(found, 100)}, asked for {shape}")
        values = np.frombuffer(content, dtype, offset=file.tell())
        return values.reshape(found, order="F" if is_fortran else "C")
    except ModelError:
        raise
    except Exception as error:  # numpy evaluates the header as Python, which fails in many ways
        raise ModelError(f"returned log-probs that are no array ({one_line(error, 120)})") from None


def first_difference(sent: list[int], echoed: list[int]) -> tuple[int, int, object]:
    for position, token in enumerate(sent):
        found = echoed[position] if position < len(echoed) else "nothing"
        if token != found:
            return position, token, found
    return len(sent) - 1, sent[-1], f"{len(echoed) - len(sent)} tokens more"


def retry_after(response: httpx2.Response) -> float | None:
    """Seconds to wait by the server's Retry-After header, a minute at most."""
    try:
        seconds = float(response.headers["retry-after"])
        return min(max(seconds, 0), 60) if math.isfinite(seconds) else None
    except (KeyError, ValueError):
        return None
