"""Several processes on one stage, which deal its blocks among themselves.

Blocks need no coordination: who writes which is known, and each is written once. Only what comes before and after
them does: the leader reads the recipe's models, holds the cache's lock and creates what is missing; the others take
over what it found. A process by itself is its own leader, and so is the one that hands blocks to a Ray cluster.

    torchrun --nproc-per-node 4 -m pipeline score RECIPE --cache CACHE
    redpen score RECIPE --cache CACHE --launcher ray --workers 4
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from typing import TYPE_CHECKING, Protocol

import cache_schema as cs
from pipeline.console import Bar
from pipeline.distributed.signals import graceful

if TYPE_CHECKING:
    from pipeline.distributed.ranks import Ranks

#: Called between units of work with the rollouts that ended and the tokens since the last call. What it raises stops
#: the work; blocks that are written stay.
OnProgress = Callable[[int, int], None]


class Session(Protocol):
    """A model that is loaded, ready to write blocks.

    Attributes:
        batch_blocks: blocks that keep it busy; fewer at a time cost speed.
    """

    batch_blocks: int

    def run(self, blocks: Sequence[int], on_progress: OnProgress) -> None: ...

    def close(self) -> None:
        """Stop what runs beside this process's own objects, such as an engine."""


class Work(Protocol):
    """What a worker needs to know, picklable.

    Attributes:
        gpus: that one worker uses, where there are any.
    """

    @property
    def gpus(self) -> int: ...

    def group(self) -> cs.BlockGroup:
        """Where the blocks are committed."""

    def open(self) -> Session:
        """Load the model; changes nothing in the cache."""


@contextmanager
def open_for_writing(
    url: str, command: str, ranks: Ranks, create: Callable[[], cs.Cache] | None = None
) -> Iterator[cs.Cache]:
    """The cache, open for writing by all ranks; the leader holds its lock until the last of them is done."""

    def take(stack: ExitStack) -> None:
        cache = create() if create is not None else cs.open(url, writable=True)
        stack.enter_context(cache.lock(command))

    with ExitStack() as stack:
        ranks.broadcast(lambda: take(stack))
        yield cs.open(url, writable=True)
        ranks.barrier()


def run_blocks(
    work: Work,
    pending: Sequence[int],
    ranks: Ranks,
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

    def prepare() -> None:
        begin()

    mine = ranks.shard(pending)
    with ExitStack() as stack:
        session = stack.enter_context(closing(ranks.open(work))) if mine else None
        ranks.broadcast(prepare)
        with graceful() as stop:

            def check() -> None:
                if stop.requested:
                    stop.check(state() if ranks.is_main_process else "")

            def on_progress(rollouts: int, tokens: int) -> None:
                check()
                advance(shown, rollouts, tokens)

            with bar as shown:
                if session is not None:
                    session.run(mine, on_progress)
            ranks.barrier(check)
