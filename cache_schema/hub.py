"""Published caches, `hf://datasets/OWNER/NAME[@REVISION]`: read from the Hugging Face Hub, each object when needed.

A process resolves a revision to its commit once, so what is pushed later does not change what it reads. Objects are
kept in the Hub client's own cache, and are fetched once a machine.
"""

from __future__ import annotations

import asyncio
import functools
import re
import threading
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

from zarr.abc.buffer import Buffer, BufferPrototype
from zarr.abc.store import ByteRequest, Store

from .errors import NotACacheError, StorageError
from .local import LocalDirectory

#: A published cache; to publish one, without a revision.
HUB_URL = re.compile(r"hf://datasets/(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[^@?#\s]+))?")


@functools.cache
def open_hub(url: str) -> HubStore:
    """The store at `url`. Raises `StorageError`, and `NotACacheError` if there is no such repository."""
    match = HUB_URL.fullmatch(url)
    if match is None:
        raise StorageError(f"cache {url}: expected hf://datasets/OWNER/NAME or hf://datasets/OWNER/NAME@REVISION")
    try:
        import huggingface_hub
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
    except ImportError:
        raise StorageError(f"cache {url}: hf:// needs huggingface_hub; `pip install huggingface_hub`") from None
    api, repository = huggingface_hub.HfApi(), match["repository"]
    try:
        commit = api.dataset_info(repository, revision=match["revision"]).sha
        assert commit is not None
        tree = api.list_repo_tree(repository, recursive=True, revision=commit, repo_type="dataset")
        sizes = {entry.path: entry.size for entry in tree if isinstance(entry, huggingface_hub.RepoFile)}
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        missing = "revision" if isinstance(error, RevisionNotFoundError) else "repository"
        raise NotACacheError(
            f"cache {url}: there is no such {missing} at {api.endpoint}, or the token in HF_TOKEN may not read it"
        ) from None
    except Exception as error:  # network, authorisation: the client's errors have no common root
        raise _unreachable(url, error) from error
    return HubStore(url, repository, commit, sizes)


class HubStore(Store):
    """Objects of a data set at one commit; nothing can be written.

    Attributes:
        commit: the commit's hash.
        sizes: bytes of every object, by its key.
        fetched: keys that were fetched, and not found on this machine.
    """

    supports_writes = supports_deletes = False
    supports_listing = True

    def __init__(self, url: str, repository: str, commit: str, sizes: dict[str, int]):
        super().__init__(read_only=True)
        self.url, self.commit, self.sizes = url, commit, sizes
        self._repository = repository
        self.fetched: set[str] = set()
        self._lock = threading.Lock()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HubStore) and (other.url, other.commit) == (self.url, self.commit)

    def __str__(self) -> str:
        return self.url

    def with_read_only(self, read_only: bool = False) -> HubStore:
        if not read_only:
            raise StorageError(f"cache {self.url}: a published cache cannot be written")
        return self

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        if key not in self.sizes:
            return None
        path = await asyncio.to_thread(self._file, key)
        return await LocalDirectory(path.parent, read_only=True).get(path.name, prototype, byte_range)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return list(await asyncio.gather(*(self.get(key, prototype, byte_range) for key, byte_range in key_ranges)))

    async def exists(self, key: str) -> bool:
        return key in self.sizes

    async def set(self, key: str, value: Buffer) -> None:
        raise StorageError(f"cache {self.url}: a published cache cannot be written")

    async def delete(self, key: str) -> None:
        raise StorageError(f"cache {self.url}: a published cache cannot be written")

    async def list(self) -> AsyncIterator[str]:
        for key in self.sizes:
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        for key in self.sizes:
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        start = f"{prefix.rstrip('/')}/" if prefix else ""
        for name in dict.fromkeys(key[len(start) :].partition("/")[0] for key in self.sizes if key.startswith(start)):
            yield name

    def _file(self, key: str) -> Path:
        """The object on this machine, fetched if it is not there yet."""
        import huggingface_hub

        of: dict[str, Any] = {"repo_id": self._repository, "repo_type": "dataset", "revision": self.commit}
        found = huggingface_hub.try_to_load_from_cache(filename=key, **of)
        if isinstance(found, str):
            return Path(found)
        try:
            path = Path(huggingface_hub.hf_hub_download(filename=key, **of))
        except Exception as error:  # network, authorisation, disk: the client's errors have no common root
            raise _unreachable(f"{self.url}, {key}", error) from error
        with self._lock:
            self.fetched.add(key)
        return path


def _unreachable(what: str, error: Exception) -> StorageError:
    reason = " ".join(str(error).split())[:200]
    return StorageError(f"cache {what}: cannot be fetched ({reason}); check the network and the token in HF_TOKEN")
