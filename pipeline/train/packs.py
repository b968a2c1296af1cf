"""How a global batch becomes micro-batches: rows in packs by token budget, packs dealt to ranks."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def pack_rows(lengths: Sequence[int], budget: int, ranks: int = 1) -> list[list[int]]:
    """Rows in packs of at most `budget` tokens; a row that is longer has a pack to itself.

    One rank gets as few packs as first-fit decreasing finds. For several their number is rounded up to a multiple of
    `ranks` and the rows are spread over them evenly (longest first, each to the emptiest pack; Graham 1969), so that
    no rank waits for another; where that breaks the budget, which full packs allow, they stay as they were.
    Deterministic; rows within a pack are in ascending order.
    """
    packs = _first_fit(lengths, budget)
    if ranks > 1:
        even = _evenly(lengths, -(-len(packs) // ranks) * ranks)
        if all(len(pack) == 1 or sum(lengths[row] for row in pack) <= budget for pack in even):
            packs = even
    return [sorted(pack) for pack in packs]


def families(prompts: Sequence[int], lengths: Sequence[tuple[int, int]], budget: int) -> list[tuple[list[int], int]]:
    """Rows that read their prompt together, and how many tokens that is: all of one prompt, or as many as the budget
    holds, in order of rows. `lengths` are those of each row's prompt and of the whole row."""
    made: list[tuple[list[int], int]] = []
    latest: dict[int, int] = {}
    for row, (prompt, (prompt_tokens, tokens)) in enumerate(zip(prompts, lengths, strict=True)):
        family = latest.get(prompt)
        if family is not None and made[family][1] + tokens - prompt_tokens <= budget:
            rows, total = made[family]
            made[family] = ([*rows, row], total + tokens - prompt_tokens)
        else:
            latest[prompt] = len(made)
            made.append(([row], tokens))
    return made


def deal(packs: Sequence[list[int]], rank: int, world: int) -> list[list[int] | None]:
    """Packs of one rank, every `world`-th; None pads ranks that are short of one, so that all have as many."""
    mine: list[list[int] | None] = list(packs[rank::world])
    return mine + [None] * (-(-len(packs) // world) - len(mine))


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))


def _first_fit(lengths: Sequence[int], budget: int) -> list[list[int]]:
    packs: list[list[int]] = []
    room: list[int] = []
    for row in _longest_first(lengths):
        fit = next((i for i, free in enumerate(room) if lengths[row] <= free), None)
        if fit is None:
            packs.append([])
            room.append(budget)
            fit = len(packs) - 1
        packs[fit].append(row)
        room[fit] -= lengths[row]
    return packs


def _evenly(lengths: Sequence[int], n_packs: int) -> list[list[int]]:
    """At most `n_packs` packs, fullest first: neighbours in the deal are then of a size."""
    packs: list[list[int]] = [[] for _ in range(n_packs)]
    loads = [(0, i) for i in range(n_packs)]
    for row in _longest_first(lengths):
        load, i = heapq.heappop(loads)
        packs[i].append(row)
        heapq.heappush(loads, (load + lengths[row], i))
    return [packs[i] for load, i in sorted(loads, key=lambda entry: (-entry[0], entry[1])) if load]
