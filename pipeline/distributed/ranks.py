"""The ranks of a job that torchrun starts, and how they exchange data: one interface for all stages.

Python objects go through torchrun's key-value store, which needs no process group: waiting for it can be interrupted,
and a vLLM engine in the same process can have its own group. Tensors need one; training opens it by `process_group`.
"""

from __future__ import annotations

import functools
import itertools
import os
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from pipeline.console import fail
from pipeline.distributed.signals import defer_to_main_process
from pipeline.environment import RANK, WORLD_SIZE
from pipeline.errors import ConfigError, Interrupted, RedpenError, user_message

if TYPE_CHECKING:
    from pipeline.distributed.blocks import Session, Work

_T = TypeVar("_T")

#: Who starts the workers; None: torchrun, if anyone.
Launcher = Literal["ray"] | None

_MAX_VALUE_BYTES = 4 << 20  # torchrun's store accepts values up to 8 MiB
_POLL_SECONDS = 0.05
#: How long collectives wait for a rank that is alive but stuck; one that has ended is noticed at once.
_TIMEOUT = timedelta(minutes=30)
_RANK_LOST = "train/rank_lost"  # in the store: what a rank that failed concludes, "True" if another one was lost
_groups = itertools.count()


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks of its job; by default it is alone.

    Attributes:
        store: torchrun's key-value store; None for a single process.
        has_process_group: whether tensors can be exchanged (see `process_group`).
        open_session: loads what writes blocks, in this process or on a Ray cluster.
    """

    rank: int = 0
    size: int = 1
    store: Store | None = None
    has_process_group: bool = False
    open_session: Callable[[Work], Session] = lambda work: work.open()
    _calls: Iterator[int] = field(default_factory=itertools.count)

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0, which writes shared files and prints results."""
        return self.rank == 0

    def shard(self, blocks: Sequence[int]) -> list[int]:
        """This rank's blocks: every `size`-th."""
        return list(blocks[self.rank :: self.size])

    def broadcast(self, make: Callable[[], _T]) -> _T:
        """Call `make` on the main process and return its (pickled) result on every rank.

        If it raises there, the other ranks exit without a message.
        """
        if self.store is None:
            return make()
        key = str(next(self._calls))
        if self.is_main_process:
            data = b""
            try:
                made = make()
                data = pickle.dumps(made)
            finally:
                with _same_job():
                    _set(self.store, key, data)
            return made
        with _same_job():
            data = _get(self.store, key)
        if not data:
            defer_to_main_process()
            raise SystemExit(1)
        value: _T = pickle.loads(data)
        return value

    def barrier(self, check: Callable[[], object] = lambda: None) -> None:
        """Wait for every rank. Outside a process group `check` is called meanwhile, and may raise to end the wait."""
        if self.has_process_group:
            self.maximum(0)  # fails if a rank has ended
        elif self.store is not None:
            key = str(next(self._calls))
            with _same_job():
                self.store.add(key, 1)
                while self.store.add(key, 0) < self.size:
                    check()
                    time.sleep(_POLL_SECONDS)

    def gather(self, values: Tensor) -> list[Tensor]:
        """The `values` of every rank (of one shape and dtype), in order of ranks."""
        if self.size == 1:
            return [values]
        gathered = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(gathered, values.contiguous())
        return gathered

    def maximum(self, value: int) -> int:
        """The largest `value` of any rank."""
        return max(int(each) for each in self.gather(torch.tensor(value)))

    def all_reduce(self, values: Tensor) -> None:
        """Replace `values` by its sum over the ranks, the same bits on every rank."""
        if self.size > 1:
            dist.all_reduce(values)


@contextmanager
def join_ranks(launcher: Launcher = None, n_workers: int | None = None) -> Iterator[Ranks]:
    """The ranks of this job: torchrun's, or this process alone, with or without a Ray cluster.

    Only the main process prints; of the others, one that fails prints one line.

    Args:
        n_workers: Ray's; by default one a GPU, or one a machine if there are no GPUs.
    """
    if launcher == "ray":
        from pipeline.distributed.ray import cluster

        if WORLD_SIZE > 1:
            raise ConfigError("--launcher ray: Ray starts the workers itself; run the command without torchrun")
        with cluster(n_workers) as ranks:
            yield ranks
        return
    ranks = _torchrun_ranks()
    try:
        yield ranks
    except (Exception, Interrupted) as error:
        line = str(error) if isinstance(error, Interrupted) else user_message(error)
        if ranks.is_main_process or line is None:
            raise
        fail(f"rank {ranks.rank}: {line}")
        raise SystemExit(error.exit_code if isinstance(error, Interrupted) else 1) from error


@contextmanager
def process_group(ranks: Ranks, device: torch.device) -> Iterator[Ranks]:
    """The same ranks with a process group for tensors, NCCL on GPUs and gloo on the CPU, while the body runs.

    Ranks leave the body together, so that torchrun does not end the others while the main process still writes. An
    error that all of them meet is reported by the main process only. A rank that is lost ends the job.

    Raises:
        ConfigError: ranks share a GPU.
    """
    if ranks.store is None:
        yield ranks
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)  # a mesh would choose by LOCAL_RANK, but each rank sees its own GPUs only
    store = PrefixStore(f"train/{next(_groups)}", ranks.store)
    try:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.size, timeout=_TIMEOUT)
        grouped = replace(ranks, has_process_group=True)
        if device.type == "cuda":
            _require_own_gpu(grouped, device)
        yield grouped
        ranks.barrier()
        dist.destroy_process_group()
    except Interrupted as error:
        if dist.is_initialized():
            dist.destroy_process_group()
        if ranks.is_main_process:
            raise
        raise SystemExit(error.exit_code) from None  # the main process was stopped too, and reports it
    except Exception as error:
        lost = _lost_a_rank(error)
        if not ranks.is_main_process:
            defer_to_main_process()
            with suppress(dist.DistError):  # torchrun may have ended too
                ranks.store.set(_RANK_LOST, str(lost))
        if not lost:
            raise
        if ranks.is_main_process and ranks.store.check([_RANK_LOST]):
            raise SystemExit(1) from None
        raise RedpenError(
            "another rank of this job has ended, so this one stops too (torchrun's report says why); run the same "
            "command again to continue from the last checkpoint"
        ) from error


@functools.cache
def _torchrun_ranks() -> Ranks:
    """This process in its torchrun job; of the machine's GPUs it sees its own from now on."""
    if WORLD_SIZE == 1:
        return Ranks()
    if n_gpus := torch.cuda.device_count():
        names = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(n_gpus)))).split(",")[:n_gpus]
        own = rank_gpus(names, int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(own)
    with _same_job():
        store: Store = next(rendezvous("env://"))[0]
    # `--max-restarts` brings new ranks to the same store
    store = PrefixStore(f"redpen/{WORLD_SIZE}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # or a vLLM engine looks for its peers in torchrun's store
    return Ranks(RANK, WORLD_SIZE, store)


def rank_gpus(gpus: Sequence[str], rank: int, n_ranks: int) -> list[str]:
    """The GPUs of a machine's rank `rank`: equally many for each of `n_ranks`, or one shared by several ranks."""
    each = max(1, len(gpus) // n_ranks)
    first = rank * each % len(gpus)
    return list(gpus[first : first + each])


def _require_own_gpu(ranks: Ranks, device: torch.device) -> None:
    """NCCL hangs or fails, depending on its release, if two ranks use one GPU."""
    uuid = torch.tensor(list(str(torch.cuda.get_device_properties(device).uuid).encode()))
    n_gpus = len({tuple(each.tolist()) for each in ranks.gather(uuid)})
    if n_gpus < ranks.size:
        raise ConfigError(
            f"torchrun: training needs one GPU for each rank, found {n_gpus} for {ranks.size} ranks; lower "
            "--nproc-per-node"
        )


def _lost_a_rank(error: Exception) -> bool:
    """gloo raises plain RuntimeErrors, some of them from FSDP's hooks in backward."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL"))
    )


def _set(store: Store, key: str, data: bytes) -> None:
    for start in range(0, len(data), _MAX_VALUE_BYTES):
        store.set(f"{key}/{start}", data[start : start + _MAX_VALUE_BYTES])  # type: ignore[arg-type]  # takes bytes
    store.set(key, str(len(data)))


def _get(store: Store, key: str) -> bytes:
    while not store.check([key]):
        time.sleep(_POLL_SECONDS)
    return b"".join(store.get(f"{key}/{start}") for start in range(0, int(store.get(key)), _MAX_VALUE_BYTES))


@contextmanager
def _same_job() -> Iterator[None]:
    try:
        yield
    except dist.DistError as error:
        raise RedpenError(
            "torchrun has ended, and this rank with it; finished blocks are committed, run the same command again"
        ) from error
