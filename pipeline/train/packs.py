"""How a global batch becomes micro-batches: rows in packs by token budget, packs dealt to ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PackedRow:
    """A rollout to pack. Rows with the same `prompt` in one pack share its tokens; give rows that share nothing
    distinct numbers."""

    prompt: int
    prompt_tokens: int
    response_tokens: int

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.response_tokens


def pack_rows(rows: Sequence[PackedRow], budget: int, ranks: int = 1) -> list[list[int]]:
    """Rows in packs of at most `budget` tokens, as `tokens_of` counts them; a longer row has a pack to itself.

    First fit, longest first; rows of a prompt join it in its pack if there is room. For several ranks the number of
    packs is rounded up to a multiple of `ranks`, and the smallest budget that needs no more packs is used: then all
    are about equally full, and no rank waits for another. Deterministic; rows within a pack are in ascending order.
    """
    packs = _first_fit(rows, budget)
    if ranks > 1 and packs:
        enough = -(-len(packs) // ranks) * ranks
        low, high = 0, budget
        while high - low > max(1, high // 256):
            tried = (low + high) // 2
            if len(found := _first_fit(rows, tried)) <= enough:
                packs, high = found, tried
            else:
                low = tried
        packs = _side_by_side(packs, [tokens_of([rows[i] for i in pack]) for pack in packs], ranks)
    return [sorted(pack) for pack in packs]


def tokens_of(rows: Sequence[PackedRow]) -> int:
    """Tokens in a pack of these rows."""
    prompts = {row.prompt: row.prompt_tokens for row in rows}
    return sum(prompts.values()) + sum(row.response_tokens for row in rows)


def deal(packs: Sequence[list[int]], rank: int, world: int) -> list[list[int] | None]:
    """Packs of one rank, every `world`-th; padded with None, so that all ranks have as many."""
    mine: list[list[int] | None] = list(packs[rank::world])
    return mine + [None] * (-(-len(packs) // world) - len(mine))


def _side_by_side(packs: list[list[int]], loads: Sequence[int], ranks: int) -> list[list[int]]:
    """Packs ordered so that `deal` gives packs of similar size to the ranks at a time, in a snake order."""
    order = sorted(range(len(packs)), key=lambda i: (-loads[i], i))
    turns = [order[start : start + ranks] for start in range(0, len(order), ranks)]
    return [packs[i] for number, turn in enumerate(turns) for i in (turn if number % 2 == 0 else reversed(turn))]


def _first_fit(rows: Sequence[PackedRow], budget: int) -> list[list[int]]:
    longest: dict[int, int] = {}
    for row in rows:
        longest[row.prompt] = max(longest.get(row.prompt, 0), row.tokens)
    order = sorted(range(len(rows)), key=lambda i: (-longest[rows[i].prompt], rows[i].prompt, -rows[i].tokens, i))
    packs: list[list[int]] = []
    room: list[int] = []
    holding: dict[int, list[int]] = {}  # packs by the prompts they hold
    for i in order:
        row = rows[i]
        holders = holding.setdefault(row.prompt, [])
        fit = next((pack for pack in holders if row.response_tokens <= room[pack]), None)
        if fit is None:
            fit = next((pack for pack, free in enumerate(room) if row.tokens <= free), len(packs))
            if fit == len(packs):
                packs.append([])
                room.append(budget)
            holders.append(fit)
            room[fit] -= row.prompt_tokens
        packs[fit].append(i)
        room[fit] -= row.response_tokens
    return packs
