"""Caches on S3, `s3://BUCKET/NAME`: zarr's `ObjectStore` over obstore (extra `s3`), with retries and one-line errors.

Credentials, region and endpoint come from the usual AWS_* environment variables and are not stored.

A failing request is retried for `RETRY_SECONDS`. zarr reads a missing key as fill values, so only the response "no
such key" may count as missing: every other failure, a missing bucket included, is an `OSError` other than
`FileNotFoundError`.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from zarr.abc.buffer import Buffer, BufferPrototype
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.storage import ObjectStore

from .errors import CacheLockedError, StorageError

if TYPE_CHECKING:
    import obstore
    import obstore.store

#: How long a failing request is retried, and how long a response is awaited before a warning.
RETRY_SECONDS, PATIENCE_SECONDS = 30.0, 5.0
#: Timeouts of connecting and of one request; a large shard is written in parts of 5 MB.
CONNECT_SECONDS, REQUEST_SECONDS = 5.0, 60.0

_URL = re.compile(r"s3://(?P<bucket>[A-Za-z0-9][A-Za-z0-9._-]+)/(?P<path>.+)")
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")

_T = TypeVar("_T")

_log = logging.getLogger(__name__)


def open_s3(url: str, *, read_only: bool) -> S3Store:
    """The store at `url`, without a request to the server. Raises `StorageError`."""
    match = _URL.fullmatch(url)
    parts = [part for part in match["path"].split("/") if part] if match else []
    if match is None or not parts or {".", ".."} & set(parts):
        raise StorageError(f"cache {url}: expected s3://BUCKET/NAME, e.g. s3://my-bucket/caches/toy.zarr")
    try:
        import obstore.exceptions
        import obstore.store
    except ModuleNotFoundError:
        raise StorageError(f"cache {url}: s3:// needs obstore; `pip install obstore`") from None
    variable = next((name for name in _ENDPOINTS if os.environ.get(name)), None)
    endpoint = urlsplit(os.environ[variable] if variable else "https://s3.amazonaws.com")
    if endpoint.scheme not in ("http", "https") or not endpoint.hostname:
        raise StorageError(
            f"cache {url}: {variable}: expected http(s)://HOST[:PORT], got {endpoint.geturl().rpartition('@')[2]!r}"
        )
    allow_http = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true") or endpoint.hostname in _LOOPBACK
    if endpoint.scheme == "http" and not allow_http:
        raise StorageError(f"cache {url}: {variable} is not encrypted; use https://, or set AWS_ALLOW_HTTP=true")

    def connect(prefix: list[str]) -> obstore.store.S3Store:
        return obstore.store.S3Store(
            match["bucket"],
            prefix="/".join(prefix) or None,
            client_options={
                "allow_http": allow_http,
                "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
                "timeout": timedelta(seconds=REQUEST_SECONDS),
            },
            retry_config={
                "max_retries": 1000,  # bounded by retry_timeout
                "retry_timeout": timedelta(seconds=RETRY_SECONDS),
                "backoff": {"max_backoff": timedelta(seconds=2)},
            },
        )

    server = Server(url, match["bucket"], f"{endpoint.scheme}://{endpoint.netloc.rpartition('@')[2]}")
    try:
        server.lock_store, server.lock_key = connect(parts[:-1]), f".{parts[-1]}.lock"
        return S3Store(connect(parts), server, read_only=read_only)
    except obstore.exceptions.BaseError as error:  # incomplete credentials, an unknown setting
        raise StorageError(f"cache {url}: {server.explained(str(error))}") from error


@dataclass
class Server:
    """The server of one cache: requests with retries and error messages, and the cache's lock.

    Attributes:
        lock_store, lock_key: place of the lock, beside the cache.
        lost_to: who holds the lock after this process has lost it.
    """

    url: str
    bucket: str
    endpoint: str
    lock_store: obstore.store.S3Store = field(init=False)
    lock_key: str = field(init=False)
    lost_to: str | None = None
    _waiting: int = 0
    _pending: set[asyncio.Task[Any]] = field(default_factory=set)

    async def answer(
        self, request: Callable[[], Awaitable[_T]], *, sends: int = 0, may_be_missing: bool = False
    ) -> _T:
        """The response to `request`. A failure raises an `OSError` that says what to check.

        Args:
            sends: bytes to upload, which allow for a longer wait before the warning.
            may_be_missing: raise `FileNotFoundError` for the response "no such key".
        """
        import obstore.exceptions

        task = asyncio.create_task(_persistently(request))
        self._pending.add(task)
        try:
            if (await asyncio.wait({task}, timeout=PATIENCE_SECONDS + sends / 1e6))[0]:
                return task.result()
            return await self._awaited(task)
        except (obstore.exceptions.PreconditionError, obstore.exceptions.AlreadyExistsError):
            raise  # the condition of a conditional request failed
        except (obstore.exceptions.BaseError, FileNotFoundError) as error:
            if may_be_missing and isinstance(error, FileNotFoundError) and "NoSuchBucket" not in str(error):
                raise
            if "status code: 416" in str(error):
                raise ValueError("the object is shorter than expected") from error
            raise OSError(errno.EIO, self.explained(str(error))) from error
        finally:
            task.cancel()
            self._pending.discard(task)

    async def _awaited(self, task: asyncio.Task[_T]) -> _T:
        """The result of a slow request. The first slow one logs a warning, the last one its end."""
        if self._waiting == 0:
            _log.warning(
                "cache %s: no response from %s for %.0f s, still trying", self.url, self.endpoint, PATIENCE_SECONDS
            )
        self._waiting += 1
        try:
            answer = await task
        finally:
            self._waiting -= 1
        if self._waiting == 0:
            _log.warning("cache %s: %s responds again", self.url, self.endpoint)
        return answer

    def cancel_requests(self) -> None:
        """Cancel, from any thread, the requests that wait for a response."""
        for task in list(self._pending):
            task.get_loop().call_soon_threadsafe(task.cancel)

    async def put_lock(self, body: bytes, mode: obstore.PutMode) -> str | None:
        """Write the lock if the condition `mode` holds, and return its new tag.

        Raises obstore's PreconditionError or AlreadyExistsError.
        """
        import obstore

        put = await self.answer(lambda: obstore.put_async(self.lock_store, self.lock_key, body, mode=mode))
        return put["e_tag"]

    async def get_lock(self) -> tuple[bytes, obstore.ObjectMeta]:
        """The lock's content and metadata. Raises `FileNotFoundError`."""
        import obstore

        async def get() -> tuple[bytes, obstore.ObjectMeta]:
            found = await obstore.get_async(self.lock_store, self.lock_key)
            return bytes(await found.bytes_async()), found.meta

        return await self.answer(get, may_be_missing=True)

    async def delete_lock(self) -> None:
        import obstore

        await self.answer(lambda: obstore.delete_async(self.lock_store, self.lock_key))

    def require_lock(self) -> None:
        """Raise `CacheLockedError` if this process has lost the cache's lock."""
        if self.lost_to is not None:
            raise CacheLockedError(
                f"cache {self.url}: {self.lost_to} has taken over the lock; wait for it or stop it"
            )

    def explained(self, text: str) -> str:
        """One line for an obstore error of many lines: what happened and what to check."""

        def match(pattern: str) -> str:
            return next(iter(re.findall(pattern, text)), "")

        status, code, message = (
            match(r"status code: (\d+)"),
            match(r"<Code>(.*?)</Code>"),
            match(r"<Message>(.*?)</Message>"),
        )
        reply = " ".join(f"{self.endpoint} responded {status} {code} {message}".split())[:200]
        if code == "NoSuchBucket":
            return f"{self.endpoint} has no bucket {self.bucket!r}; create it or choose another --cache"
        if re.search(r"Missing\w*(KeyId|AccessKey)|/latest/(api|meta-data)/|//169\.254\.", text):
            return "no credentials for S3; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (this machine has no role)"
        if status in ("401", "403"):
            return (
                f"{reply}; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, and that they may "
                f"list, get, put and delete objects of bucket {self.bucket!r}"
            )
        if status == "501":  # not for S3 itself, nor for recent releases of other servers
            return f"{reply}; if it lacks conditional writes, set AWS_CONDITIONAL_PUT=disabled to go without a lock"
        if status.startswith("5") or status == "429":
            return f"{reply} for {RETRY_SECONDS:.0f} s; wait until the server works again"
        if "redirect" in text:
            return f"{self.endpoint} redirects to another region; set AWS_REGION to the bucket's"
        if status:
            return f"{reply}; check AWS_ENDPOINT_URL, AWS_REGION and the credentials"
        if "InvalidCertificate" in text:
            return f"{self.endpoint} has an untrusted certificate; set SSL_CERT_FILE to its certificate authority"
        if "HTTP error" in text:
            why = (
                match(r'message: "(.*?)"')
                or match(r'error: "(.*?)"')
                or match(r"kind: (Timeout)")
                or "connection lost"
            )
            return f"{self.endpoint} cannot be reached ({why}); check the network and AWS_ENDPOINT_URL"
        return f"{self.endpoint}: {' '.join(text.partition('Debug source')[0].split())[:200]}"


async def _persistently(request: Callable[[], Awaitable[_T]]) -> _T:
    """`request`, retried if its response breaks off (obstore retries only if there is no response)."""
    import obstore.exceptions

    deadline = time.monotonic() + RETRY_SECONDS
    while True:
        try:
            return await request()
        except obstore.exceptions.GenericError as error:
            broke_off = "HttpError" in str(error) and "status code" not in str(error)
            if not broke_off or time.monotonic() > deadline:
                raise
        await asyncio.sleep(0.2)


class S3Store(ObjectStore["obstore.store.S3Store"]):
    """zarr's `ObjectStore`, with every request made by `Server.answer`."""

    def __init__(self, store: obstore.store.S3Store, server: Server, *, read_only: bool = False):
        super().__init__(store, read_only=read_only)
        self.server = server

    def with_read_only(self, read_only: bool = False) -> S3Store:
        return S3Store(self.store, self.server, read_only=read_only)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        with suppress(FileNotFoundError):
            data = await self.server.answer(lambda: self._get(key, byte_range), may_be_missing=True)
            return prototype.buffer.from_bytes(data)
        return None

    async def _get(self, key: str, byte_range: ByteRequest | None) -> Any:
        import obstore

        options: obstore.GetOptions = {}
        if isinstance(byte_range, RangeByteRequest):
            options["range"] = (byte_range.start, byte_range.end)
        elif isinstance(byte_range, OffsetByteRequest):
            options["range"] = {"offset": byte_range.offset}
        elif isinstance(byte_range, SuffixByteRequest):
            options["range"] = {"suffix": byte_range.suffix}
        return await (await obstore.get_async(self.store, key, options=options)).bytes_async()

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return list(await asyncio.gather(*(self.get(key, prototype, byte_range) for key, byte_range in key_ranges)))

    async def exists(self, key: str) -> bool:
        return await self.server.answer(partial(super().exists, key))

    async def set(self, key: str, value: Buffer) -> None:
        self.server.require_lock()
        await self.server.answer(partial(super().set, key, value), sends=len(value))

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        self.server.require_lock()
        try:
            await self.server.answer(partial(super().set_if_not_exists, key, value))
        except NotImplementedError:  # AWS_CONDITIONAL_PUT=disabled
            if not await self.exists(key):
                await self.set(key, value)

    async def delete(self, key: str) -> None:
        self.server.require_lock()
        await self.server.answer(partial(super().delete, key))

    async def delete_dir(self, prefix: str) -> None:
        import obstore

        self.server.require_lock()
        keys = [meta["path"] async for meta in self._list(f"{prefix.rstrip('/')}/" if prefix else prefix)]
        await self.server.answer(lambda: obstore.delete_async(self.store, keys))

    async def _list(self, prefix: str | None = None) -> AsyncGenerator[obstore.ObjectMeta, None]:
        import obstore

        for meta in await self.server.answer(lambda: obstore.list(self.store, prefix).collect_async()):
            yield meta

    async def list_dir(self, prefix: str) -> AsyncGenerator[str, None]:
        import obstore

        found = await self.server.answer(lambda: obstore.list_with_delimiter_async(self.store, prefix=prefix))
        for path in (*found["common_prefixes"], *(meta["path"] for meta in found["objects"])):
            yield path.removeprefix(prefix.rstrip("/")).lstrip("/")
