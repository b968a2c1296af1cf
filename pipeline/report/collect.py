"""A round as the page's data: its most informative rollouts with their tokens, and sums over the whole round.

A set of rollouts in the document is JSON; arrays are little-endian in base64. Per token they are 16-bit thousandths
of a nat (65,535: not told). T tokens are shown, N of them with candidates, M candidates in all:

    name, kind ("cache" or "heldout"), pair, phase    held-out sets before and after training have the same pair
    n_total, n_shown, left_out    how many rollouts there are and are shown, and what is not, in words
    rows                 [{number, prompt_index, sample_index, prompt, answer, source, finish, right, start, length,
                         kl, worst}]: start and length place the tokens, kl (mean) and worst (highest) are by teacher
    student              {label, logprob u16 [T], entropy u16 [T]}
    readers              the teachers: [{name, label, logprob u16 [T], kl u16 [T], entropy u16 [T] or null}]
    after                students that were trained on it: [{run, logprob u16 [T], entropy u16 [T], kl by teacher}]
    pieces, tokens, trained    [[token id, text]], u32 [T] into it, u8 [T]
    labels, candidates   texts, and {at u32 [N] token, start u32 [N + 1], piece u32 [M] into labels, student u16 [M],
                         readers [u16 [M]]}: the token itself comes first
    by_position, most_corrected, totals    by teacher, over the whole round, as are answers; facts are pairs of text
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import cache_schema as cs
from pipeline.report.choose import choose, of_numbers
from pipeline.report.encode import TEXT_BYTES, clean
from pipeline.report.page_rows import PROMPT_SHARE, Request, Shown
from pipeline.report.provenance_rows import facts
from pipeline.report.scan import RIGHT, UNKNOWN, Scan, scan
from pipeline.text.detokenize import Decoder

#: Tokens in the table of the most corrected.
MOST_CORRECTED = 40
#: Of a set's bytes: what its tokens may take at most; candidates get what is left.
TOKEN_SHARE = 0.7


def collect(round_: cs.Round, request: Request, tokenizer: Decoder) -> dict[str, Any] | None:
    """The round as one of the document's sets; None where it holds no rollouts.

    Raises:
        CacheError: a block is damaged.
    """
    if not round_.rollouts.committed().any():
        return None
    found = scan(round_, request.judge, request.name)
    names = found.blocks.teachers
    examples = [found.sums[n].example[t] for n in names for t in found.sums[n].most_corrected(MOST_CORRECTED)]
    token_bytes = TEXT_BYTES * (9 + 6 * len(names) + (4 + 2 * len(names)) * len(request.rereads))
    if request.only is None:
        most_tokens = int(TOKEN_SHARE * request.page_bytes / token_bytes)
        choice = choose(found, request.rollouts, most_tokens, np.array(examples, np.int64))
    else:
        choice = of_numbers(found, request.only)
    shown = Shown(found, choice.rows, request, tokenizer)
    shown.read()
    numbers = set(found.number[choice.rows].tolist())
    n_tokens = int(found.length[choice.rows].sum())
    left_for_candidates = request.page_bytes * (1 - PROMPT_SHARE) - n_tokens * token_bytes
    candidates, candidates_left_out = shown.candidates(int(left_for_candidates))
    told = [choice.left_out, _unread(found), shown.prompts_left_out, candidates_left_out, *_unscored(found)]
    sentences = ". ".join(text[0].upper() + text[1:] for text in told if text)
    return {
        "name": request.name,
        "kind": request.kind,
        "pair": request.pair,
        "phase": request.phase,
        "n_total": found.total,
        "n_shown": len(choice.rows),
        "left_out": sentences or None,
        **shown.columns(),
        "candidates": candidates,
        "labels": shown.labels.table,
        "by_position": {name: _by_position(found, name) for name in names},
        "most_corrected": {name: _most_corrected(found, name, numbers, shown.labels.text) for name in names},
        "totals": {name: _total(found, name) for name in names if found.sums[name].count.any()},
        "answers": _answers(found),
        "facts": facts(round_),
    }


def _most_corrected(found: Scan, name: str, shown: set[int], text: Callable[[int], str]) -> list[dict[str, Any]]:
    """The tokens with the highest sums of reverse KL to a teacher."""
    sums = found.sums[name]
    prefers, total = sums.prefers(), float(sums.kl.sum())
    rows = []
    for token in sums.most_corrected(MOST_CORRECTED):
        kl, count, wanted = float(sums.kl[token]), int(sums.count[token]), prefers.get(token)
        example = int(sums.example[token])
        rows.append(
            {
                "token": clean(text(token)),
                "id": token,
                "count": count,
                "kl_sum": kl,
                "kl_mean": kl / count,
                "share": kl / total,
                "prefers": None if wanted is None else clean(text(wanted)),
                "example": example if example in shown else None,
            }
        )
    return rows


def _by_position(found: Scan, name: str) -> dict[str, list[Any]]:
    sums = found.sums[name]
    bins = int(np.flatnonzero(sums.bin_count)[-1]) + 1 if sums.bin_count.any() else 0
    mean = sums.bin_kl[:bins] / np.maximum(sums.bin_count[:bins], 1)
    return {"start": sums.starts[:bins].tolist(), "kl": mean.tolist(), "tokens": sums.bin_count[:bins].tolist()}


def _total(found: Scan, name: str) -> dict[str, Any]:
    tokens = int(found.sums[name].count.sum())
    return {"kl": float(found.sums[name].kl.sum()) / tokens, "tokens": tokens}


def _answers(found: Scan) -> dict[str, int] | None:
    """How many of the round's answers are right, of those that were compared with one that is wanted."""
    known = int((found.right != UNKNOWN).sum())
    return {"right": int((found.right == RIGHT).sum()), "known": known} if known else None


def _unread(found: Scan) -> str | None:
    n, blocks = len(found.blocks.chosen), int(found.blocks.round.rollouts.committed().sum())
    return f"figures and choice are from {n:,} of {blocks:,} blocks, evenly spaced" if n < blocks else None


def _unscored(found: Scan) -> Iterator[str]:
    blocks, scored = found.blocks.chosen, found.blocks.scored
    if cs.STUDENT not in scored:
        yield "the student has not scored its rollouts, so no token is marked"
    elif not found.blocks.teachers:
        yield "no teacher has scored the rollouts, so no token is marked"
    for name, there in scored.items():
        if missing := int((~there[blocks]).sum()):
            yield f"{name} has not scored {missing:,} of {len(blocks):,} blocks, whose tokens are not marked"
