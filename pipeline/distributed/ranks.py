"""This process among the ranks of its job, which torchrun starts: the same for every stage."""

from __future__ import annotations

import functools
import itertools
import os
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import torch
from torch.distributed import DistError
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from pipeline.console import fail
from pipeline.distributed.blocks import Session, Work
from pipeline.distributed.signals import defer_to_main_process
from pipeline.environment import RANK, WORLD_SIZE
from pipeline.errors import ConfigError, Interrupted, RedpenError, user_message

_T = TypeVar("_T")

#: Who starts the workers; None: torchrun, if anyone.
Launcher = Literal["ray"] | None

# torchrun's store takes 8 MiB at a time.
_PART_BYTES = 4 << 20
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks of its job.

    Attributes:
        open: gives the session that does a work's blocks, in this process or elsewhere.
    """

    rank: int = 0
    size: int = 1
    store: Store | None = None
    open: Callable[[Work], Session] = lambda work: work.open()
    _calls: Iterator[int] = field(default_factory=itertools.count)

    @property
    def is_main_process(self) -> bool:
        return self.rank == 0

    def shard(self, blocks: Sequence[int]) -> list[int]:
        """Every `size`-th block."""
        return list(blocks[self.rank :: self.size])

    def broadcast(self, find: Callable[[], _T]) -> _T:
        """What the leader finds, on every rank. Where the leader fails, all end; its line says why."""
        if self.store is None:
            return find()
        key = str(next(self._calls))
        if self.is_main_process:
            told = b""
            try:
                found = find()
                told = pickle.dumps(found)
            finally:
                with _same_job():
                    _tell(self.store, key, told)
            return found
        with _same_job():
            told = _hear(self.store, key)
        if not told:
            defer_to_main_process()
            raise SystemExit(1)
        value: _T = pickle.loads(told)
        return value

    def barrier(self, check: Callable[[], object] = lambda: None) -> None:
        """Wait for every rank; what `check` raises meanwhile ends that."""
        if self.store is not None:
            key = str(next(self._calls))
            with _same_job():
                self.store.add(key, 1)
                while self.store.add(key, 0) < self.size:
                    check()
                    time.sleep(_POLL_SECONDS)


@contextmanager
def join_ranks(launcher: Launcher = None, n_workers: int | None = None) -> Iterator[Ranks]:
    """This process's team: it leads a Ray cluster's workers, is one of torchrun's ranks, or is alone.

    Of torchrun's ranks only the leader talks, beside one line by any other that fails.

    Args:
        n_workers: Ray's; by default one a GPU, or one a machine where there is none.
    """
    if launcher == "ray":
        from pipeline.distributed.ray import cluster

        if WORLD_SIZE > 1:
            raise ConfigError("--launcher ray: it starts workers of its own; run the command without torchrun")
        with cluster(n_workers) as ranks:
            yield ranks
        return
    ranks = _ranks()
    try:
        yield ranks
    except (Exception, Interrupted) as error:
        line = str(error) if isinstance(error, Interrupted) else user_message(error)
        if ranks.is_main_process or line is None:
            raise
        fail(f"rank {ranks.rank}: {line}")
        raise SystemExit(error.exit_code if isinstance(error, Interrupted) else 1) from error


@functools.cache
def _ranks() -> Ranks:
    """This process's place in its torchrun job, and its share of the machine's GPUs."""
    if WORLD_SIZE == 1:
        return Ranks()
    if n_gpus := torch.cuda.device_count():
        names = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(n_gpus)))).split(",")[:n_gpus]
        mine = gpu_share(names, int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
    # a store, not a process group: waiting for it can be interrupted, and a vLLM engine has its own group
    with _same_job():
        store: Store = next(rendezvous("env://"))[0]
    # `--max-restarts` brings new ranks to the same store
    store = PrefixStore(f"redpen/{WORLD_SIZE}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # or that engine looks for its peers in torchrun's store
    return Ranks(RANK, WORLD_SIZE, store)


def gpu_share(gpus: Sequence[str], rank: int, n_ranks: int) -> list[str]:
    """The GPUs of a machine's rank `rank`: as many for each of `n_ranks`, or one shared by several ranks."""
    each = max(1, len(gpus) // n_ranks)
    first = rank * each % len(gpus)
    return list(gpus[first : first + each])


def _tell(store: Store, key: str, data: bytes) -> None:
    for start in range(0, len(data), _PART_BYTES):
        store.set(f"{key}/{start}", data[start : start + _PART_BYTES])  # type: ignore[arg-type]  # takes bytes
    store.set(key, str(len(data)))


def _hear(store: Store, key: str) -> bytes:
    while not store.check([key]):
        time.sleep(_POLL_SECONDS)
    return b"".join(store.get(f"{key}/{start}") for start in range(0, int(store.get(key)), _PART_BYTES))


@contextmanager
def _same_job() -> Iterator[None]:
    try:
        yield
    except DistError as error:
        raise RedpenError(
            "torchrun has ended, and this worker with it; finished blocks are committed, run the same command again"
        ) from error
