"""Stage one on several processes: each rank writes its own blocks of a cache.

Ranks need not coordinate while they work: which rank writes a block is known, and each block is written once. Before
and after, the main process resolves the recipe's models, holds the cache's lock and creates what is missing, and the
other ranks receive what it found.

    torchrun --nproc-per-node 4 -m pipeline score RECIPE --cache CACHE
    redpen score RECIPE --cache CACHE --launcher ray --workers 4
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from typing import Any, Protocol

import cache_schema as cs
from pipeline.console import Bar
from pipeline.distributed.ranks import Ranks
from pipeline.distributed.signals import graceful

#: Called between units of work with the rollouts that ended and the tokens since the last call. What it raises stops
#: the work; blocks that are written stay.
OnProgress = Callable[[int, int], None]


class Session(Protocol):
    """A loaded model that writes blocks.

    Attributes:
        batch_blocks: blocks that keep it busy; fewer at a time cost speed.
    """

    batch_blocks: int

    def run(self, blocks: Sequence[int], on_progress: OnProgress) -> None: ...

    def close(self) -> None:
        """Stop what runs outside this process, such as an engine."""


class Work(Protocol):
    """A stage's work on one cache group, picklable.

    Attributes:
        gpus: how many one worker uses, if the machine has any.
    """

    @property
    def gpus(self) -> int: ...

    def group(self) -> cs.BlockGroup[Any]:
        """The cache group that the blocks are committed to."""

    def open(self) -> Session:
        """Load the model; changes nothing in the cache."""


@contextmanager
def open_for_writing(
    url: str, command: str, ranks: Ranks, create: Callable[[], cs.Cache] | None = None
) -> Iterator[cs.Cache]:
    """The cache, open for writing by all ranks; the main process holds its lock until all of them are done."""

    def lock(stack: ExitStack) -> None:
        cache = create() if create is not None else cs.open(url, writable=True)
        stack.enter_context(cache.lock(command))

    with ExitStack() as stack:
        ranks.broadcast(lambda: lock(stack))
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
) -> float:
    """Write this rank's shard of the `pending` blocks, and wait for the other ranks.

    Args:
        begin: called on the main process after the model is loaded and before any block is written, so that a model
            that cannot be used leaves no trace in the cache.
        state: describes what is committed so far, for the message of an interrupt.
        bar: progress over this rank's shard. advance: moves it by rollouts and tokens.

    Returns:
        Seconds from when the models were loaded and checked until every rank was done.
    """

    def begin_without_result() -> None:  # its result may not be picklable
        begin()

    own = ranks.shard(pending)
    with ExitStack() as stack:
        session = stack.enter_context(closing(ranks.open_session(work))) if own else None
        ranks.broadcast(begin_without_result)
        started = time.perf_counter()
        with graceful() as stop:

            def check() -> None:
                if stop.requested:
                    stop.check(state() if ranks.is_main_process else "")

            def on_progress(rollouts: int, tokens: int) -> None:
                check()
                advance(shown, rollouts, tokens)

            with bar as shown:
                if session is not None:
                    session.run(own, on_progress)
            ranks.barrier(check)
    return time.perf_counter() - started
