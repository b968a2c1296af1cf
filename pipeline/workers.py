"""Several processes on one stage: the ranks of a `torchrun` job, which deal its blocks among themselves.

Blocks need no coordination: who writes which is known before, and each is written once. Only what comes before and
after them does: the first rank, the leader, reads the recipe's models, holds the cache's lock and creates what is
missing; the others take over what it found. A job of one process is its own leader.

    torchrun --nproc-per-node 4 -m pipeline score RECIPE --cache CACHE
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch

import cache_schema as cs
from pipeline.console import Bar, console
from pipeline.errors import RedpenError
from pipeline.signals import graceful

_T = TypeVar("_T")

#: Called between units of work with the rollouts that ended and the tokens since the last call. What it raises stops
#: the work; blocks that are written stay.
OnProgress = Callable[[int, int], None]

# Ranks wait for one another only between scorers, but a wave of a large teacher may take hours.
_TIMEOUT = timedelta(days=7)


class Session(Protocol):
    """A model that is loaded, ready to write blocks.

    Attributes:
        batch_tokens: response tokens that are worth handing to it at a time; it never splits a block.
    """

    batch_tokens: int

    def run(self, blocks: Sequence[int], on_progress: OnProgress) -> None: ...

    def close(self) -> None:
        """Stop what runs beside this process's own objects, such as an engine."""


class Work(Protocol):
    """What a worker needs to know, picklable. `open` loads the model and changes nothing in the cache."""

    def open(self) -> Session: ...


@dataclass(frozen=True)
class Team:
    """This process among the ranks of its job."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def share(self, blocks: Sequence[int]) -> list[int]:
        """Every `size`-th block."""
        return list(blocks[self.rank :: self.size])

    def agree(self, find: Callable[[], _T]) -> _T:
        """What the leader finds, on every rank. Where the leader fails, all do."""
        if self.size == 1:
            return find()
        found: list[Any] = [None, False]
        try:
            if self.leads:
                found = [find(), True]
        finally:
            with _lost_peers():
                torch.distributed.broadcast_object_list(found, src=0)
        if not found[1]:
            raise RedpenError(f"worker {self.rank}: the first worker stopped; its line says why")
        value: _T = found[0]
        return value

    def meet(self) -> None:
        """Wait for every rank."""
        if self.size > 1:
            with _lost_peers():
                torch.distributed.barrier()


@contextmanager
def team() -> Iterator[Team]:
    """This process's team: the ranks that torchrun started, or itself alone. Only the leader then talks."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Team()
        return
    ranks = Team(int(os.environ["RANK"]), size)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    console.quiet = not ranks.leads
    # gloo: what is exchanged is a few kilobytes of Python objects
    torch.distributed.init_process_group("gloo", timeout=_TIMEOUT)
    try:
        yield ranks
    finally:
        torch.distributed.destroy_process_group()


@contextmanager
def writing(url: str, command: str, ranks: Team, create: Callable[[], cs.Cache] | None = None) -> Iterator[cs.Cache]:
    """The cache, open for writing by all ranks; the leader holds its lock until the last of them is done."""

    def take(stack: ExitStack) -> None:
        cache = create() if create is not None else cs.open(url, writable=True)
        stack.enter_context(cache.lock(command))

    with ExitStack() as stack:
        ranks.agree(lambda: take(stack))
        yield cs.open(url, writable=True)
        ranks.meet()


def run(
    work: Work,
    pending: Sequence[int],
    ranks: Team,
    *,
    begin: Callable[[], object],
    state: Callable[[], str],
    bar: AbstractContextManager[Bar],
    advance: Callable[[Bar, int, int], None],
) -> None:
    """Do `pending` blocks, this rank its share; returns when every rank is done.

    Args:
        begin: called on the leader once the model is loaded, and before any block is written: a model that cannot be
            used leaves no trace in the cache.
        state: what is on disk by now, for who stops the work.
        bar: of this rank's share. advance: moves it by rollouts and tokens.
    """
    with closing(work.open()) as session:

        def prepare() -> None:
            begin()

        ranks.agree(prepare)
        with graceful() as stop, bar as shown:

            def on_progress(rollouts: int, tokens: int) -> None:
                if stop.requested:
                    stop.check(state())
                advance(shown, rollouts, tokens)

            session.run(ranks.share(pending), on_progress)
    ranks.meet()


@contextmanager
def _lost_peers() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo's only kind
        raise RedpenError(
            f"another worker of this job ended ({' '.join(str(error).split())[:120]}); "
            "finished blocks are committed, run the same command again"
        ) from error
