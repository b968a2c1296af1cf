"""The document of a page: rollouts of a round with their tokens, and figures of the whole round.

It is JSON. Arrays are little-endian in base64; values per token are 16-bit thousandths of a nat (65,535: missing).
T tokens are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np

import cache_schema as cs
from pipeline.console import warn
from pipeline.credentials import mask
from pipeline.models.identity import own_prompt
from pipeline.report.page_rows import PROMPT_FRACTION, CandidateArrays, ListedRollout, PageRows
from pipeline.report.read import RIGHT, UNKNOWN, AnswerCheck, RoundScan, choose, choose_numbers, scan_round
from pipeline.report.runs import Reread, RunRecord, model_title
from pipeline.report.string_table import TEXT_BYTES, clean, encode_array
from pipeline.rounds.scored_block import Int64
from pipeline.text.detokenize import Decoder

#: Tokens in the table of the most corrected.
MOST_CORRECTED = 40
#: Fraction of a set's bytes for its tokens; candidates get what is left.
TOKEN_FRACTION = 0.7


class StudentArrays(TypedDict):
    label: str
    logprob: str  # u16 [T]
    entropy: str  # u16 [T]


class TeacherArrays(TypedDict):
    name: str
    label: str
    logprob: str  # u16 [T]
    kl: str  # u16 [T]
    entropy: str | None  # u16 [T]


class AfterArrays(TypedDict):
    """Scores by a student that was trained on the rollouts."""

    run: str
    logprob: str  # u16 [T]
    entropy: str  # u16 [T]
    kl: dict[str, str]  # u16 [T] by teacher


class CorrectedToken(TypedDict):
    token: str
    id: int
    count: int
    kl_sum: float
    kl_mean: float
    share: float
    prefers: str | None
    example: int | None  # number of the rollout that has its highest KL, if it is shown


class RolloutSet(TypedDict):
    """Rollouts of one round."""

    name: str
    kind: str  # "cache" or "heldout"
    pair: str | None  # the same for the held-out sets before and after a training
    phase: str | None  # "before" or "after"
    n_total: int
    n_shown: int
    left_out: str | None  # sentences
    teachers: list[TeacherArrays]
    student: StudentArrays
    after: list[AfterArrays]
    rows: list[ListedRollout]
    strings: list[list[int | str]]  # [token id, text]
    tokens: str  # u32 [T] into strings
    trained: str  # u8 [T]
    candidates: CandidateArrays
    labels: list[str]
    by_position: dict[str, dict[str, list[Any]]]  # the rest is of the whole round, by teacher: starts of bins,
    most_corrected: dict[str, list[CorrectedToken]]
    totals: dict[str, dict[str, Any]]  # mean KL, tokens
    answers: dict[str, int] | None  # right, of those that could be checked
    provenance: list[list[str]]  # names and values


class Document(TypedDict):
    title: str
    created_by: str
    sets: list[RolloutSet]
    runs: list[RunRecord]
    cache: dict[str, Any] | None  # see `inspect.summary`
    notes: list[str]  # sentences on what is missing


@dataclass(frozen=True)
class SetRequest:
    """What to show of a round.

    Attributes:
        rollouts: how many to show at most; page_bytes: how much of a page they may fill.
        only: numbers of the rollouts to show, instead of a choice.
        rereads: scores of its tokens by students that were trained on it.
    """

    name: str
    kind: str
    rollouts: int
    page_bytes: int
    check: AnswerCheck | None = None
    pair: str | None = None
    phase: str | None = None
    only: Int64 | None = None
    rereads: Sequence[Reread] = ()


def rollout_set(round_: cs.Round, request: SetRequest, tokenizer: Decoder) -> RolloutSet | None:
    """The round as one of the document's sets; None if it holds no rollouts.

    Raises:
        CacheError: a block is damaged.
    """
    if not round_.rollouts.committed().any():
        return None
    scan = scan_round(round_, request.check, request.name)
    names, manifests = scan.reader.teachers, {name: group.manifest for name, group in scan.reader.scores.items()}
    token_bytes = TEXT_BYTES * (9 + 6 * len(names) + (4 + 2 * len(names)) * len(request.rereads))
    if request.only is None:
        examples = [scan.sums[n].example[t] for n in names for t in scan.sums[n].most_corrected(MOST_CORRECTED)]
        most_tokens = int(TOKEN_FRACTION * request.page_bytes / token_bytes)
        choice = choose(scan, request.rollouts, most_tokens, np.array(examples, np.int64))
    else:
        choice = choose_numbers(scan, request.only)
    rows = PageRows(scan, choice.rows, request.page_bytes, request.rereads, tokenizer)
    rows.read(request.name)
    room = request.page_bytes * (1 - PROMPT_FRACTION) - len(rows.tokens) * token_bytes
    candidates, candidates_left_out = rows.candidates(int(room))
    notes = [choice.left_out, _unread(scan), rows.cut_prompts, candidates_left_out, *_unscored(scan)]
    found: RolloutSet = {
        "name": request.name,
        "kind": request.kind,
        "pair": request.pair,
        "phase": request.phase,
        "n_total": scan.total,
        "n_shown": len(choice.rows),
        "left_out": ". ".join(note[0].upper() + note[1:] for note in notes if note) or None,
        "teachers": [
            {
                "name": name,
                "label": _model_label(manifests[name].model),
                "logprob": rows.column("teacher", name, "logprob"),
                "kl": rows.column("teacher", name, "kl", ""),
                "entropy": rows.column("teacher", name, "entropy") if manifests[name].entropy else None,
            }
            for name in names
        ],
        "student": {
            "label": _model_label(round_.manifest.student),
            "logprob": rows.column("student", "logprob"),
            "entropy": rows.column("student", "entropy"),
        },
        "after": [
            {
                "run": reread.run,
                "logprob": rows.column("after", reread.run, "logprob"),
                "entropy": rows.column("after", reread.run, "entropy"),
                "kl": {name: rows.column("after", reread.run, "kl", name) for name in names},
            }
            for reread in request.rereads
        ],
        "rows": rows.records(),
        "strings": rows.strings.rows(),
        "tokens": encode_array(rows.tokens),
        "trained": encode_array(rows.trained),
        "candidates": candidates,
        "labels": rows.labels.rows,
        "by_position": {name: _by_position(scan, name) for name in names},
        "most_corrected": {name: _most_corrected(scan, name, set(rows.numbers), rows.labels.text) for name in names},
        "totals": {name: _total(scan, name) for name in names if scan.sums[name].count.any()},
        "answers": _answers(scan),
        "provenance": provenance(round_),
    }
    return found


# ----------------------------------------------------------------------------------------------------------- figures


def _most_corrected(scan: RoundScan, name: str, shown: set[int], text: Callable[[int], str]) -> list[CorrectedToken]:
    """The tokens with the highest sums of reverse KL to a teacher."""
    sums = scan.sums[name]
    prefers, total = sums.prefers(), float(sums.kl.sum())
    rows: list[CorrectedToken] = []
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


def _by_position(scan: RoundScan, name: str) -> dict[str, list[Any]]:
    sums = scan.sums[name]
    bins = int(np.flatnonzero(sums.bin_count)[-1]) + 1 if sums.bin_count.any() else 0
    mean = sums.bin_kl[:bins] / np.maximum(sums.bin_count[:bins], 1)
    return {"start": sums.starts[:bins].tolist(), "kl": mean.tolist(), "tokens": sums.bin_count[:bins].tolist()}


def _total(scan: RoundScan, name: str) -> dict[str, Any]:
    tokens = int(scan.sums[name].count.sum())
    return {"kl": float(scan.sums[name].kl.sum()) / tokens, "tokens": tokens}


def _answers(scan: RoundScan) -> dict[str, int] | None:
    known = int((scan.right != UNKNOWN).sum())
    return {"right": int((scan.right == RIGHT).sum()), "known": known} if known else None


def _unread(scan: RoundScan) -> str | None:
    n, blocks = len(scan.blocks), int(scan.reader.round.rollouts.committed().sum())
    return f"figures and choice are from {n:,} of {blocks:,} blocks, evenly spaced" if n < blocks else None


def _unscored(scan: RoundScan) -> Iterator[str]:
    blocks, committed, round_ = scan.blocks, scan.reader.committed, scan.reader.round
    if cs.STUDENT not in committed:
        yield "the student has not scored its rollouts, so no token is marked"
    elif not scan.reader.teachers:
        yield "no teacher has scored the rollouts, so no token is marked"
    for name, there in committed.items():
        if missing := int((~there[blocks]).sum()):
            sentence = f"{name} has not scored {missing:,} of {len(blocks):,} blocks"
            warn(f"cache {round_.cache.url} round {round_.index}: {sentence}")
            yield f"{sentence}; their tokens are not marked"


# -------------------------------------------------------------------------------------------------------- provenance


def provenance(round_: cs.Round) -> list[list[str]]:
    """Origin of a round's rollouts and scores by their manifests, as rows of a name and a value."""
    made, tokenizer = round_.manifest, round_.manifest.tokenizer
    rows: list[tuple[str, Any]] = [
        ("cache", f"{round_.cache.url}, round {round_.index}"),
        ("created by", made.created_by),
        ("student", _model(made.student)),
        ("student dtype", made.dtype),
        ("tokenizer", f"{tokenizer.name}, digest {tokenizer.digest}, {tokenizer.vocab_size:,} tokens"),
        ("template", _settings(made.template)),
        ("prompts", f"{made.n_prompts:,}, SHA-256 {made.prompts_sha256}"),
        ("rollouts per prompt", made.rollouts_per_prompt),
        ("sampler", made.engine),
        ("sampler settings", _settings(made.sampler_settings)),
        ("temperature", f"{made.temperature:g}"),
        ("top-p", f"{made.top_p:g}"),
        ("seed", made.seed),
        ("token limits", f"prompt {made.max_prompt_tokens:,}, response {made.max_response_tokens:,}"),
        ("stop tokens", ", ".join(map(str, made.stop_token_ids))),
    ]
    for name in round_.scorer_names():
        rows += _scorer(name, round_.scores(name))
        if name != cs.STUDENT:
            rows.append((f"{name}: read", own_prompt(round_, name)))
    return [[name, mask(str(value))] for name, value in rows if value not in ("", None)]


def _scorer(name: str, scores: cs.BlockGroup[cs.ScoresManifest]) -> list[tuple[str, Any]]:
    made = scores.manifest
    candidates = f"{made.candidates} {'sampled' if made.candidate_kind == 'sampled' else 'likeliest'} of the student"
    if made.candidates == 0:
        candidates = "none, only the token itself"
    if made.topk:
        candidates += f", and the teacher's own {made.topk} likeliest"
    quantised = f", quantised ({made.quantisation})" if made.quantisation else ""
    return [
        (f"{name}: model", _model(made.model)),
        (f"{name}: scored by", f"{made.engine} in {made.dtype}{quantised}"),
        (f"{name}: candidates", candidates),
        (f"{name}: partial", "scores may be missing" if made.partial else None),
        (f"{name}: blocks", f"{int(scores.committed().sum()):,} of {scores.n_blocks:,}"),
        (f"{name}: created by", made.created_by),
    ]


def _model(model: cs.ModelIdentity) -> str:
    revision = f", revision {model.revision}" if model.revision else ""
    adapter = f", adapter {model.adapter_digest}" if model.adapter_digest else ""
    return f"{model.name}{revision}, digest {model.digest}{adapter}"


def _model_label(model: cs.ModelIdentity) -> str:
    title = model_title(model.name)
    return mask(f"{title} + adapter" if model.adapter_digest else title)


def _settings(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())
