"""First pass of a report over a round: sums over all tokens, and the choice of the rollouts to show. numpy only.

Shapes: T response tokens of a block, R rollouts, V token ids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

import cache_schema as cs
from pipeline.console import progress
from pipeline.report.string_table import MAX_NATS, as_text
from pipeline.rounds.metrics import Float64, teacher_prefers
from pipeline.rounds.scored_block import Bool, Int64, ScoredBlock, ScoredRound
from pipeline.text.answers import Checker, answers_of
from pipeline.text.detokenize import local_tokenizer, response_texts

#: Tokens that the first pass reads; of a larger round it reads evenly spaced blocks.
TOKENS = 16_000_000
#: Reverse KL (nats) from which the token that the teacher prefers is counted.
NEGLIGIBLE = 1e-3

#: Whether an answer is right: RIGHT, WRONG, or UNKNOWN without a reference answer.
RIGHT, WRONG, UNKNOWN = 1, 0, -1
#: [R] of a block, from its rollouts and its prompts' records.
AnswerCheck = Callable[[cs.RolloutBlock, Sequence[Mapping[str, Any]]], npt.NDArray[np.int8]]

_GOLDEN = (5**0.5 - 1) / 2


def answer_check(manifest: cs.RoundManifest, checker: Checker) -> AnswerCheck | None:
    """Compares responses with the `answer` of their prompts; None if the tokenizer is not on this machine."""
    tokenizer = local_tokenizer(manifest.tokenizer.name, manifest.student.revision)
    if tokenizer is None:
        return None

    def check(rollouts: cs.RolloutBlock, records: Sequence[Mapping[str, Any]]) -> npt.NDArray[np.int8]:
        answers = [answers_of(records[prompt]) for prompt in rollouts.row_prompt.tolist()]
        accepted = {row: answer for row, answer in enumerate(answers) if answer is not None}
        right = np.full(rollouts.n_rows, UNKNOWN, np.int8)
        if not accepted:
            return right  # batch_decode of an empty list returns one empty text
        texts = response_texts(rollouts, tokenizer)
        for row, answer in accepted.items():
            right[row] = RIGHT if checker.is_right(texts[row], answer) else WRONG
        return right

    return check


# -------------------------------------------------------------------------------------------------------------- sums


def clip_kl(kl_T: Float64) -> Float64:
    """Reverse KL within what a page can store; NaN stays NaN."""
    return np.clip(kl_T, 0.0, MAX_NATS)


def bin_starts(max_response_tokens: int) -> Int64:
    """Where bins of positions begin: eight single ones, then four an octave."""
    octaves = [low + low // 4 * part for low in 8 << np.arange(30, dtype=np.int64) for part in range(4)]
    return np.array([start for start in [*range(8), *octaves] if start < max_response_tokens], np.int64)


@dataclass
class TokenSums:
    """Reverse KL to one teacher over the scored tokens: by token id, by position, by what the teacher prefers.

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
    def empty(cls, manifest: cs.RoundManifest) -> TokenSums:
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

    def add(self, scored: ScoredBlock, teacher: str, mask: Bool) -> None:
        rollouts, kl = scored.rollouts, clip_kl(scored.reverse_kl[teacher])[mask]
        token = rollouts.token_ids[mask].astype(np.int64)
        self.count += np.bincount(token, minlength=len(self.count))
        self.kl += np.bincount(token, weights=kl, minlength=len(self.kl))
        bins = np.searchsorted(self.starts, rollouts.token_positions[mask], side="right") - 1
        self.bin_count += np.bincount(bins, minlength=len(self.starts))
        self.bin_kl += np.bincount(bins, weights=kl, minlength=len(self.starts))
        # ascending, so that of equal tokens the highest is written last; of equal KL the first in the round
        order = np.argsort(kl[::-1], kind="stable")
        token_up, kl_up = token[::-1][order], kl[::-1][order]
        numbers_up = np.repeat(scored.numbers, rollouts.response_length)[mask][::-1][order]
        higher = kl_up > self.highest[token_up]
        self.highest[token_up[higher]] = kl_up[higher]
        self.example[token_up[higher]] = numbers_up[higher]
        wanted = teacher_prefers(scored.student, scored.scores[teacher])[mask]
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


# -------------------------------------------------------------------------------------------------------------- scan


@dataclass(frozen=True)
class RoundScan:
    """What the first pass found; arrays have a value for each rollout, in the order of the round.

    Attributes:
        reader: of the round's blocks; blocks: numbers of those that were read.
        total: rollouts in the round, read or not.
        worst, mean: by teacher, of the reverse KL of the scored tokens; NaN if there are none.
        right: RIGHT, WRONG or UNKNOWN.
        source: index into `sources`.
    """

    reader: ScoredRound
    blocks: Int64
    total: int
    number: Int64
    length: Int64
    worst: dict[str, Float64]
    mean: dict[str, Float64]
    right: npt.NDArray[np.int8]
    source: Int64
    sources: list[str | None]
    sums: dict[str, TokenSums]

    @property
    def highest(self) -> Float64:
        """[R]: the highest reverse KL of a token to any teacher; -1 without scores."""
        of_teachers = [np.nan_to_num(worst, nan=-1.0) for worst in self.worst.values()]
        return np.max(of_teachers, axis=0) if of_teachers else np.full(len(self.number), -1.0)


def scan_round(round_: cs.Round, check: AnswerCheck | None, label: str, at_most_tokens: int = TOKENS) -> RoundScan:
    """Read every block of the round that has rollouts, or evenly spaced ones of about `at_most_tokens`.

    Args:
        label: of the progress bar.

    Raises:
        CacheError: a block is damaged.
    """
    reader = ScoredRound(round_)
    blocks = reader.sample(np.flatnonzero(round_.rollouts.commits()["rows"] > 0), at_most_tokens)
    sums = {name: TokenSums.empty(round_.manifest) for name in reader.teachers}
    columns: list[dict[str, npt.NDArray[Any]]] = []
    sources: dict[str | None, int] = {}
    with progress(f"{label}: scanning", len(blocks)) as bar:
        for scored in map(reader.read, blocks.tolist()):
            rollouts = scored.rollouts
            records = [round_.prompts[int(i)] for i in rollouts.prompt_index]
            source_P = [sources.setdefault(as_text(record.get("source")), len(sources)) for record in records]
            column: dict[str, npt.NDArray[Any]] = {
                "number": scored.numbers,
                "length": rollouts.response_length.astype(np.int64),
                "right": np.full(rollouts.n_rows, UNKNOWN, np.int8) if check is None else check(rollouts, records),
                "source": np.array(source_P, np.int64)[rollouts.row_prompt],
            }
            for name in reader.teachers:
                kl, mask = np.full(rollouts.n_tokens, np.nan), np.zeros(rollouts.n_tokens, np.bool_)
                if name in scored.scores:
                    kl, mask = clip_kl(scored.reverse_kl[name]), scored.mask(name)
                column |= {f"worst {name}": _worst(kl, mask, rollouts), f"mean {name}": _mean(kl, mask, rollouts)}
                if mask.any():
                    sums[name].add(scored, name, mask)
            columns.append(column)
            bar.advance()
    joined = {key: np.concatenate([column[key] for column in columns]) for key in columns[0]}
    return RoundScan(
        reader,
        blocks,
        int(round_.rollouts.commits()["rows"].sum()),
        **{key: joined[key] for key in ("number", "length", "right", "source")},
        worst={name: joined[f"worst {name}"] for name in reader.teachers},
        mean={name: joined[f"mean {name}"] for name in reader.teachers},
        sources=list(sources),
        sums=sums,
    )


def _worst(kl: Float64, mask: Bool, rollouts: cs.RolloutBlock) -> Float64:
    highest = np.maximum.reduceat(np.where(mask, kl, -1.0), rollouts.response_start)
    return np.where(highest < 0, np.nan, highest)


def _mean(kl: Float64, mask: Bool, rollouts: cs.RolloutBlock) -> Float64:
    total = np.add.reduceat(np.where(mask, kl, 0.0), rollouts.response_start)
    n = np.add.reduceat(mask.astype(np.int64), rollouts.response_start)
    return np.where(n > 0, total / np.maximum(n, 1), np.nan)


# ------------------------------------------------------------------------------------------------------------ choice


@dataclass(frozen=True)
class RolloutChoice:
    """Rollouts to show by their index in the scan, most informative first, and what was left out (None: nothing)."""

    rows: Int64
    left_out: str | None


def choose(scan: RoundScan, wanted: int, at_most_tokens: int, examples: Int64) -> RolloutChoice:
    """The `wanted` most informative rollouts, or as many of them as have `at_most_tokens`.

    Half are those with the highest reverse KL at a token; a quarter are wrong answers, and the rest any others, both
    spread evenly over the round and its sources, so that typical rollouts are shown as well. Without scores or
    reference answers, their places go to the others.

    Args:
        examples: numbers of rollouts to take first, those that the table of most corrected tokens links to.
    """
    n = len(scan.number)
    rows, parts = _choose(scan, min(wanted, n), examples)
    while scan.length[rows].sum() > at_most_tokens and len(rows) > 1:
        fitting = int(len(rows) * at_most_tokens / scan.length[rows].sum())
        rows, parts = _choose(scan, max(1, min(fitting, len(rows) - 1)), examples)
    left_out = None if len(rows) == scan.total else _left_out(scan, parts)
    return RolloutChoice(_by_highest(scan, rows), left_out)


def choose_numbers(scan: RoundScan, numbers: Int64) -> RolloutChoice:
    """The rollouts with these numbers, if they were chosen from two rounds together."""
    rows = np.flatnonzero(np.isin(scan.number, numbers))
    shown = f"{len(rows):,} of {scan.total:,} rollouts are shown: those chosen before or after training"
    return RolloutChoice(_by_highest(scan, rows), None if len(rows) == scan.total else shown)


def _by_highest(scan: RoundScan, rows: Int64) -> Int64:
    return np.asarray(rows[np.lexsort([scan.number[rows], -scan.highest[rows]])])


def _choose(scan: RoundScan, wanted: int, examples: Int64) -> tuple[Int64, dict[str, int]]:
    highest, free = scan.highest, np.ones(len(scan.number), bool)
    parts: dict[str, Int64] = {}

    def take(name: str, ordered: Int64, quota: int) -> None:
        parts[name] = ordered[free[ordered]][:quota]
        free[parts[name]] = False

    order = np.argsort(-highest, kind="stable")
    known = order[highest[order] >= 0]
    take("examples", np.flatnonzero(np.isin(scan.number, examples)), wanted // 2)
    take("worst", known, -(-wanted // 2) - len(parts["examples"]))
    take("wrong", _spread(scan, np.flatnonzero(scan.right == WRONG)), wanted // 4)
    take("others", _spread(scan, np.flatnonzero(free)), wanted - sum(map(len, parts.values())))
    return np.concatenate(list(parts.values())), {name: len(part) for name, part in parts.items()}


def _spread(scan: RoundScan, rows: Int64) -> Int64:
    """`rows` in an order of which every prefix is spread over their sources, and within each over the round."""
    ordered = rows[np.argsort((np.arange(len(rows)) * _GOLDEN) % 1.0, kind="stable")]
    by_source = np.argsort(scan.source[ordered], kind="stable")
    counts = np.bincount(scan.source[ordered])
    turn = np.empty(len(ordered), np.int64)  # a rollout's number among those of its source
    turn[by_source] = np.arange(len(ordered)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.asarray(ordered[np.lexsort([scan.source[ordered], turn])])


def _left_out(scan: RoundScan, parts: dict[str, int]) -> str:
    shown, n_sources = sum(parts.values()), len(scan.sources)
    over = f"the round and its {n_sources} sources" if n_sources > 1 else "the round"
    worst = parts["worst"] + parts["examples"]
    reasons = {
        f"{worst:,} with the highest reverse KL at a token": worst,
        f"{parts['wrong']:,} more wrong answers": parts["wrong"],
        f"{parts['others']:,} others spread evenly over {over}": parts["others"],
    }
    return f"{shown:,} of {scan.total:,} rollouts are shown: " + ", ".join(
        reason for reason, count in reasons.items() if count
    )
