"""First pass over a round: a few values a rollout and sums over all tokens, block by block. numpy only.

Shapes: T response tokens of a block, R rollouts, K candidates, M teacher top-k.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

import cache_schema as cs
from pipeline.console import progress
from pipeline.report.encode import MOST, as_text
from pipeline.rounds.metrics import Float64, scores_reverse_kl, teacher_prefers

Int64 = npt.NDArray[np.int64]

#: Tokens that are looked at; of a larger round evenly spaced blocks.
TOKENS = 16_000_000
#: Reverse KL (nats) from which what the teacher prefers is counted.
NEGLIGIBLE = 1e-3

#: Right, wrong, or not known.
RIGHT, WRONG, UNKNOWN = 1, 0, -1
Judge = Callable[[cs.RolloutBlock, Sequence[Mapping[str, Any]]], npt.NDArray[np.int8]]


@dataclass(frozen=True)
class Reading:
    """A block's rollouts with what of its scores is there.

    Attributes:
        kl: KL(student || teacher) [T] of every teacher in `teachers`, nats, at most MOST; NaN where it is not known.
    """

    rollouts: cs.RolloutBlock
    student: cs.ScoreBlock | None
    teachers: dict[str, cs.ScoreBlock]
    kl: dict[str, Float64]
    numbers: Int64  # [R] in the round

    @property
    def trained(self) -> npt.NDArray[np.bool_]:
        return np.asarray(self.rollouts.trained == 1)


@dataclass(frozen=True)
class Blocks:
    """Blocks of a round to read, and which of them every scorer has scored."""

    round: cs.Round
    chosen: Int64
    groups: dict[str, cs.BlockGroup]
    scored: dict[str, npt.NDArray[np.bool_]]

    @classmethod
    def of(cls, round_: cs.Round, at_most_tokens: int) -> Blocks:
        """The round's blocks of rollouts, or evenly spaced ones of about so many tokens."""
        commits = round_.rollouts.commits()
        blocks = np.flatnonzero(commits["rows"] > 0)
        tokens = int(commits["tokens"][blocks].sum())
        if tokens > at_most_tokens:
            n = max(1, len(blocks) * at_most_tokens // tokens)
            blocks = blocks[np.linspace(0, len(blocks) - 1, n).round().astype(int)]
        groups = {name: round_.scores(name) for name in round_.scorer_names()}
        return cls(round_, blocks, groups, {name: group.committed() for name, group in groups.items()})

    @property
    def teachers(self) -> list[str]:
        return [name for name in self.groups if name != cs.STUDENT]

    def read(self, block: int) -> Reading:
        """Raises `CacheError` where the block is damaged."""
        rollouts: cs.RolloutBlock = self.round.rollouts.read(block)
        found: dict[str, cs.ScoreBlock] = {n: g.read(block) for n, g in self.groups.items() if self.scored[n][block]}
        student = found.pop(cs.STUDENT, None)
        unknown = np.full(rollouts.n_tokens, np.nan)
        kl = {n: unknown if student is None else capped_kl(student, scores) for n, scores in found.items()}
        per_prompt = self.round.manifest.rollouts_per_prompt
        numbers = rollouts.prompt_index[rollouts.row_prompt] * per_prompt + rollouts.sample_index
        return Reading(rollouts, student, found, kl, numbers)


def capped_kl(student: cs.ScoreBlock, teacher: cs.ScoreBlock) -> Float64:
    """KL(student || teacher) [T] within 0 and MOST; NaN where the teacher told nothing."""
    return np.clip(scores_reverse_kl(student, teacher), 0.0, MOST)


def bin_starts(max_response_tokens: int) -> Int64:
    """Where bins of positions begin: eight single ones, then four an octave."""
    octaves = [low + low // 4 * part for low in 8 << np.arange(30, dtype=np.int64) for part in range(4)]
    return np.array([start for start in [*range(8), *octaves] if start < max_response_tokens], np.int64)


@dataclass
class Sums:
    """Reverse KL to one teacher over the tokens that count: by token, by position, by what the teacher prefers.

    Attributes:
        count, kl: [V] by token id; highest, example: [V] its highest KL and the rollout that has it.
        bin_count, bin_kl: by position. preferred: KL by (token, what the teacher prefers there).
    """

    starts: Int64
    count: Int64
    kl: Float64
    highest: Float64
    example: Int64
    bin_count: Int64
    bin_kl: Float64
    preferred: dict[tuple[int, int], float] = field(default_factory=dict)

    @classmethod
    def empty(cls, manifest: cs.RoundManifest) -> Sums:
        starts, n = bin_starts(manifest.max_response_tokens), manifest.vocab_size
        return cls(
            starts,
            count=np.zeros(n, np.int64),
            kl=np.zeros(n),
            highest=np.full(n, -1.0),
            example=np.full(n, -1, np.int64),
            bin_count=np.zeros(len(starts), np.int64),
            bin_kl=np.zeros(len(starts)),
        )

    def add(self, reading: Reading, teacher: str, counts: npt.NDArray[np.bool_]) -> None:
        rollouts, kl = reading.rollouts, reading.kl[teacher][counts]
        token = rollouts.token_ids[counts].astype(np.int64)
        self.count += np.bincount(token, minlength=len(self.count))
        self.kl += np.bincount(token, weights=kl, minlength=len(self.kl))
        bins = np.searchsorted(self.starts, rollouts.token_positions[counts], side="right") - 1
        self.bin_count += np.bincount(bins, minlength=len(self.starts))
        self.bin_kl += np.bincount(bins, weights=kl, minlength=len(self.starts))
        # ascending, so that of equal tokens the highest is written last; of equal KL the first in the round
        order = np.argsort(kl[::-1], kind="stable")
        token_up, kl_up = token[::-1][order], kl[::-1][order]
        numbers_up = np.repeat(reading.numbers, rollouts.response_length)[counts][::-1][order]
        higher = kl_up > self.highest[token_up]
        self.highest[token_up[higher]] = kl_up[higher]
        self.example[token_up[higher]] = numbers_up[higher]
        assert reading.student is not None
        wanted = teacher_prefers(reading.student, reading.teachers[teacher])[counts]
        matters = (kl >= NEGLIGIBLE) & (wanted >= 0)
        pairs, place = np.unique(token[matters] << 32 | wanted[matters], return_inverse=True)
        for pair, total in zip(pairs.tolist(), np.bincount(place, weights=kl[matters]).tolist(), strict=True):
            key = (pair >> 32, pair & 0xFFFFFFFF)
            self.preferred[key] = self.preferred.get(key, 0.0) + total

    def most_corrected(self, n: int) -> list[int]:
        """Ids of the tokens with the highest sums of KL, descending."""
        return [token for token in np.argsort(-self.kl, kind="stable")[:n].tolist() if self.kl[token] > 0]

    def prefers(self) -> dict[int, int]:
        """By token, what the teacher prefers where most of the token's KL lies."""
        best: dict[int, tuple[float, int]] = {}
        for (token, wanted), total in self.preferred.items():
            best[token] = max(best.get(token, (0.0, -1)), (total, wanted))
        return {token: wanted for token, (_, wanted) in best.items()}


@dataclass(frozen=True)
class Scan:
    """What the first pass found. One value a rollout, in the order of the round.

    Attributes:
        total: rollouts in the round, looked at or not.
        worst, mean: by teacher, of the reverse KL of the tokens that count; NaN where there are none.
        right: RIGHT, WRONG or UNKNOWN.
        source: index into `sources`.
    """

    blocks: Blocks
    total: int
    number: Int64
    length: Int64
    worst: dict[str, Float64]
    mean: dict[str, Float64]
    right: npt.NDArray[np.int8]
    source: Int64
    sources: list[str | None]
    sums: dict[str, Sums]

    @property
    def highest(self) -> Float64:
        """[R]: the highest reverse KL of a token to any teacher; -1 where none is known."""
        of_teachers = [np.nan_to_num(worst, nan=-1.0) for worst in self.worst.values()]
        return np.max(of_teachers, axis=0) if of_teachers else np.full(len(self.number), -1.0)


def scan(round_: cs.Round, judge: Judge | None, label: str, at_most_tokens: int = TOKENS) -> Scan:
    """Look at every rollout of the round, or at evenly spaced blocks of it.

    Args:
        judge: tells of a block which rollouts are right, from its prompts' records.
        label: of the progress bar.

    Raises:
        CacheError: a block is damaged.
    """
    blocks = Blocks.of(round_, at_most_tokens)
    sums = {name: Sums.empty(round_.manifest) for name in blocks.teachers}
    columns: list[dict[str, npt.NDArray[Any]]] = []
    sources: dict[str | None, int] = {}
    with progress(f"{label}: looking", len(blocks.chosen)) as bar:
        for reading in map(blocks.read, blocks.chosen.tolist()):
            rollouts, records = reading.rollouts, [round_.prompts[int(i)] for i in reading.rollouts.prompt_index]
            source_P = [sources.setdefault(as_text(record.get("source")), len(sources)) for record in records]
            right = np.full(rollouts.n_rows, UNKNOWN, np.int8) if judge is None else judge(rollouts, records)
            column: dict[str, npt.NDArray[Any]] = {
                "number": reading.numbers,
                "length": rollouts.response_length.astype(np.int64),
                "right": right,
                "source": np.array(source_P, np.int64)[rollouts.row_prompt],
            }
            for name in blocks.teachers:
                kl = reading.kl.get(name, np.full(rollouts.n_tokens, np.nan))
                counts = reading.trained & ~np.isnan(kl)
                column |= {f"worst {name}": _worst(kl, counts, rollouts), f"mean {name}": _mean(kl, counts, rollouts)}
                if counts.any():
                    sums[name].add(reading, name, counts)
            columns.append(column)
            bar.advance()
    joined = {key: np.concatenate([column[key] for column in columns]) for key in columns[0]}
    return Scan(
        blocks,
        int(round_.rollouts.commits()["rows"].sum()),
        **{key: joined[key] for key in ("number", "length", "right", "source")},
        worst={name: joined[f"worst {name}"] for name in blocks.teachers},
        mean={name: joined[f"mean {name}"] for name in blocks.teachers},
        sources=list(sources),
        sums=sums,
    )


def _worst(kl: Float64, counts: npt.NDArray[np.bool_], rollouts: cs.RolloutBlock) -> Float64:
    highest = np.maximum.reduceat(np.where(counts, kl, -1.0), rollouts.response_start)
    return np.where(highest < 0, np.nan, highest)


def _mean(kl: Float64, counts: npt.NDArray[np.bool_], rollouts: cs.RolloutBlock) -> Float64:
    total = np.add.reduceat(np.where(counts, kl, 0.0), rollouts.response_start)
    n = np.add.reduceat(counts.astype(np.int64), rollouts.response_start)
    return np.where(n > 0, total / np.maximum(n, 1), np.nan)
