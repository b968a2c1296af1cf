"""The rollouts of a page token by token: the second pass reads their blocks again. numpy only.

Only tokens that are shown are ever held together. Shapes: T tokens shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import cache_schema as cs
from pipeline.console import progress
from pipeline.report.candidates import Candidates, part_of
from pipeline.report.data import FINISH_NAMES
from pipeline.report.encode import NOT_TOLD, TEXT_BYTES, as_text, clean, nats, packed
from pipeline.report.provenance_rows import model_label
from pipeline.report.reread import Reread
from pipeline.report.scan import RIGHT, UNKNOWN, Int64, Judge, Reading, Scan, capped_kl
from pipeline.report.string_table import Labels, Pieces
from pipeline.text.detokenize import Decoder

#: Of a set's bytes: what prompts may take.
PROMPT_SHARE = 0.1
#: Characters of a prompt that are shown, at most and at least.
PROMPT_CHARACTERS = (8_000, 200)


@dataclass(frozen=True)
class Request:
    """What is wanted of a round.

    Attributes:
        rollouts: how many to show at most; page_bytes: how much of a page they may fill.
        only: numbers of the rollouts to show, in the place of a choice.
        rereads: readings of its tokens by students that were trained on it.
    """

    name: str
    kind: str
    rollouts: int
    page_bytes: int
    judge: Judge | None = None
    pair: str | None = None
    phase: str | None = None
    only: Int64 | None = None
    rereads: Sequence[Reread] = ()


class Shown:
    """The rollouts of a page, in its order: the second pass reads them block by block."""

    def __init__(self, found: Scan, rows: Int64, request: Request, tokenizer: Decoder):
        self._scan, self._rows, self._request, self._tokenizer = found, rows, request, tokenizer
        self._numbers = found.number[rows].tolist()
        self._names = found.blocks.teachers
        self._start = np.concatenate([[0], np.cumsum(found.length[rows])]).astype(np.int64)
        self.labels, self._pieces = Labels(tokenizer), Pieces(tokenizer)
        most, least = PROMPT_CHARACTERS
        fair = int(PROMPT_SHARE * request.page_bytes / max(len(rows), 1))
        self._prompt_characters = max(least, min(most, fair))
        self._records: list[dict[str, Any]] = [{} for _ in self._numbers]
        n = int(self._start[-1])
        rereads = [f"after {reread.run} {what}" for reread in request.rereads for what in ("logprob", "entropy")]
        after_kl = [f"after {reread.run} kl {name}" for reread in request.rereads for name in self._names]
        of_teachers = [f"{what} {name}" for name in self._names for what in ("logprob", "kl", "entropy")]
        columns = ["logprob", "entropy", *of_teachers, *rereads, *after_kl]
        self._u16 = {column: np.full(n, NOT_TOLD, np.uint16) for column in columns}
        self._tokens, self._trained, self._worth = np.zeros(n, np.uint32), np.zeros(n, np.uint8), np.zeros(n)
        self._candidates: list[Candidates] = []
        self._cut = 0

    def read(self) -> None:
        place = {number: index for index, number in enumerate(self._numbers)}
        blocks, manifest = self._scan.blocks, self._scan.blocks.round.manifest
        per_block = manifest.prompts_per_block * manifest.rollouts_per_prompt
        wanted = sorted({number // per_block for number in self._numbers})
        with progress(f"{self._request.name}: reading", len(wanted)) as bar:
            for block in wanted:
                reading = blocks.read(block)
                for row, number in enumerate(reading.numbers.tolist()):
                    if number in place:
                        self._add(reading, row, place[number])
                bar.advance()

    def _add(self, reading: Reading, row: int, index: int) -> None:
        rollouts, student = reading.rollouts, reading.student
        span, at = rollouts.response_slice(row), slice(int(self._start[index]), int(self._start[index + 1]))
        self._tokens[at] = self._pieces.add(rollouts.token_ids[span].tolist())
        self._trained[at] = rollouts.trained[span]
        self._records[index] = self._record(rollouts, row, index, at)
        worth = np.zeros(at.stop - at.start)
        if student is not None:
            assert student.entropy is not None
            self._u16["logprob"][at] = nats(-student.logprobs[span])
            self._u16["entropy"][at] = nats(student.entropy[span])
            # tells something only where no teacher does
            worth = 1e-9 * student.entropy[span].astype(np.float64)
        for name, scores in reading.teachers.items():
            kl = reading.kl[name][span]
            self._u16[f"logprob {name}"][at], self._u16[f"kl {name}"][at] = nats(-scores.logprobs[span]), nats(kl)
            if scores.entropy is not None:
                self._u16[f"entropy {name}"][at] = nats(scores.entropy[span])
            worth = np.maximum(worth, np.where(self._trained[at] == 1, np.nan_to_num(kl), 0.0))
        self._worth[at] = worth
        if student is None:
            return
        teachers = {name: part_of(scores, span) for name, scores in reading.teachers.items()}
        own = part_of(student, span)
        self._candidates.append(Candidates.of(at.start, own, teachers, self._names))
        for reread in self._request.rereads:
            after = reread.of(self._numbers[index], own)
            if after is None:
                continue
            assert after.entropy is not None
            self._u16[f"after {reread.run} logprob"][at] = nats(-after.logprobs)
            self._u16[f"after {reread.run} entropy"][at] = nats(after.entropy)
            for name, scores in teachers.items():
                self._u16[f"after {reread.run} kl {name}"][at] = nats(capped_kl(after, scores))

    def _record(self, rollouts: cs.RolloutBlock, row: int, index: int, at: slice) -> dict[str, Any]:
        found, place = self._scan, int(self._rows[index])
        prompt_index = int(rollouts.prompt_index[rollouts.row_prompt[row]])
        line = found.blocks.round.prompts[prompt_index]
        right = int(found.right[place])
        return {
            "number": self._numbers[index],
            "prompt_index": prompt_index,
            "sample_index": int(rollouts.sample_index[row]),
            "prompt": self._shortened(clean(self._tokenizer.decode(rollouts.prompt(row).tolist()))),
            "answer": as_text(line.get("answer")),
            "source": as_text(line.get("source")),
            "finish": FINISH_NAMES[int(rollouts.finish_reason[row])],
            "right": None if right == UNKNOWN else right == RIGHT,
            "start": at.start,
            "length": at.stop - at.start,
            "kl": {name: _number(found.mean[name][place]) for name in self._names},
            "worst": {name: _number(found.worst[name][place]) for name in self._names},
        }

    def _shortened(self, prompt: str) -> str:
        most = self._prompt_characters
        if len(prompt) <= most:
            return prompt
        self._cut += 1
        tail = most // 2  # a question stands at the end as often as at the beginning
        return f"{prompt[: most - tail]} [... {len(prompt) - most:,} characters ...] {prompt[-tail:]}"

    @property
    def prompts_left_out(self) -> str | None:
        cut, most = self._cut, self._prompt_characters
        return f"{cut:,} of the prompts shown are cut in the middle to {most:,} characters" if cut else None

    def columns(self) -> dict[str, Any]:
        """Readers, student, after, rows, pieces, tokens and trained of the set."""
        b64 = {name: packed(array) for name, array in self._u16.items()}
        groups, own = self._scan.blocks.groups, self._scan.blocks.round.manifest
        has_entropy = {name: groups[name].manifest.entropy for name in self._names}  # type: ignore[union-attr]
        return {
            "readers": [
                {
                    "name": name,
                    "label": model_label(groups[name].manifest.model),  # type: ignore[union-attr]
                    "logprob": b64[f"logprob {name}"],
                    "kl": b64[f"kl {name}"],
                    "entropy": b64[f"entropy {name}"] if has_entropy[name] else None,
                }
                for name in self._names
            ],
            "student": {"label": model_label(own.student), "logprob": b64["logprob"], "entropy": b64["entropy"]},
            "after": [
                {
                    "run": reread.run,
                    "logprob": b64[f"after {reread.run} logprob"],
                    "entropy": b64[f"after {reread.run} entropy"],
                    "kl": {name: b64[f"after {reread.run} kl {name}"] for name in self._names},
                }
                for reread in self._request.rereads
            ],
            "rows": self._records,
            "pieces": self._pieces.table(),
            "tokens": packed(self._tokens),
            "trained": packed(self._trained),
        }

    def candidates(self, page_bytes: int) -> tuple[dict[str, Any], str | None]:
        """The candidates at the positions of the highest reverse KL that have room, and what was left out."""
        every = Candidates.joined(self._candidates, len(self._names))
        cost = TEXT_BYTES * (8 + every.count * (6 + 2 * len(self._names)))
        order = np.argsort(-self._worth[every.at], kind="stable")
        fits = order[np.cumsum(cost[order]) <= page_bytes]
        kept = every.only(np.sort(fits))
        found = {
            "at": packed(kept.at.astype(np.uint32)),
            "start": packed(np.concatenate([[0], np.cumsum(kept.count)]).astype(np.uint32)),
            "piece": packed(self.labels.add(kept.ids)),
            "student": packed(kept.student),
            "readers": [packed(reader) for reader in kept.readers],
        }
        if len(kept.at) == len(every.at):
            return found, None
        by = "reverse KL" if self._names else "entropy"
        return found, f"candidates are there for the {len(kept.at):,} of {len(every.at):,} tokens of the highest {by}"


def _number(value: np.floating[Any]) -> float | None:
    return float(value) if np.isfinite(value) else None
