"""Reading several blocks at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

from .group import BlockGroup

#: Blocks that are read at a time, and bytes of them.
MOST_BLOCKS, MOST_BYTES = 8, 2**28
_POLL_SECONDS = 0.05

_T = TypeVar("_T")


def read_ahead(
    read: Callable[[int], _T], blocks: Iterable[int], groups: Sequence[BlockGroup[Any]], at_once: int | None = None
) -> Iterator[_T]:
    """`map(read, blocks)`, where `read` reads a block of some `groups`.

    Args:
        at_once: blocks that are read at a time; default: of a cache on a server, whose answers take time, as many as
            fit into `MOST_BYTES`; of a local one, whose arrays are decoded in threads already, one.
    """
    if at_once is None:
        fitting = MOST_BYTES // max(1, sum(group.block_bytes for group in groups))
        at_once = 1 if all(group.is_near for group in groups) else max(1, min(MOST_BLOCKS, fitting))
    if at_once == 1:
        yield from map(read, blocks)
        return
    threads = ThreadPoolExecutor(at_once, thread_name_prefix="cache-blocks")
    begun: deque[Future[_T]] = deque()
    try:
        for block in blocks:
            begun.append(threads.submit(read, block))
            if len(begun) == at_once:
                yield begun[0].result()
                begun.popleft()
        while begun:
            yield begun[0].result()
            begun.popleft()
    except (Exception, GeneratorExit):
        raise
    except BaseException:  # Ctrl-C
        while wait(begun, timeout=_POLL_SECONDS).not_done:  # each block still asks for its other arrays
            for group in groups:
                group.cancel_requests()
        raise
    finally:
        threads.shutdown(cancel_futures=True)
