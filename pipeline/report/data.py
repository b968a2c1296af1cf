"""What the views of a cache show, as plain JSON-able records: the whole cache, or one rollout token by token.

A rollout's number in its round is `prompt number * rollouts_per_prompt + sample number`, known before it is sampled.
"""

from __future__ import annotations

import contextlib
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import cache_schema as cs
from pipeline.errors import RedpenError
from pipeline.rounds.metrics import first_occurrence, scores_reverse_kl
from pipeline.rounds.scored_block import scored_blocks
from pipeline.text.detokenize import Decoder, labels, pieces

#: Tokens over which a summary measures reverse KL; of a larger round it reads evenly spaced blocks.
SUMMARY_TOKENS = 4_000_000

FINISH_NAMES = {cs.FINISH_STOP: "stop", cs.FINISH_LENGTH: "length", cs.FINISH_OTHER: "other"}


# ----------------------------------------------------------------------------------------------------------- summary


def summary(cache: cs.Cache, round_index: int | None = None, *, reverse_kl: bool = True) -> dict[str, Any]:
    """Rounds (or one of them), rollouts and scores of a cache, with the mean reverse KL to each teacher.

    `reverse_kl=False` leaves that out, for which scores would have to be read.
    """
    rounds = [cache.round(index) for index in (cache.round_indices() if round_index is None else [round_index])]
    return {
        "cache": cache.url,
        "format_version": cs.VERSION,
        "bytes": _bytes_below(cache.path) if cache.path else None,
        "rounds": [_round_summary(round_, reverse_kl) for round_ in rounds],
    }


def _round_summary(round_: cs.Round, reverse_kl: bool) -> dict[str, Any]:
    manifest, rollouts = round_.manifest, round_.rollouts
    commits, committed = rollouts.commits(), rollouts.committed()
    rows, tokens = (int(commits[name].sum()) for name in ("rows", "tokens"))
    finish = {name: 0 for name in FINISH_NAMES.values()}
    for block in np.flatnonzero(committed):
        reasons = rollouts.read_arrays(int(block), ["finish_reason"])["finish_reason"]
        for code, name in FINISH_NAMES.items():
            finish[name] += int((reasons == code).sum())
    return {
        "index": round_.index,
        "student": _model(manifest.student),
        "engine": manifest.engine,
        "temperature": manifest.temperature,
        "top_p": manifest.top_p,
        "seed": manifest.seed,
        "rollouts_per_prompt": manifest.rollouts_per_prompt,
        "max_response_tokens": manifest.max_response_tokens,
        "prompts": manifest.n_prompts,
        "rollouts": rows,
        "tokens": tokens,
        "mean_response_tokens": tokens / rows if rows else None,
        "finish": finish,
        "blocks": {"committed": int(committed.sum()), "total": round_.n_blocks},
        "scores": [_scores_summary(round_, name, reverse_kl) for name in round_.scorer_names()],
    }


def _scores_summary(round_: cs.Round, name: str, reverse_kl: bool) -> dict[str, Any]:
    scores = round_.scores(name)
    manifest, committed = scores.manifest, scores.committed()
    assert isinstance(manifest, cs.ScoresManifest)
    found = {
        "name": name,
        "role": manifest.role,
        "model": _model(manifest.model),
        "dtype": manifest.dtype,
        "engine": manifest.engine,
        "candidates": manifest.candidates,
        "candidate_kind": manifest.candidate_kind,
        "topk": manifest.topk,
        "blocks": {"committed": int(committed.sum()), "total": round_.n_blocks},
    }
    return found | _mean_reverse_kl(round_, name) if reverse_kl and manifest.role == "teacher" else found


def _mean_reverse_kl(round_: cs.Round, teacher: str) -> dict[str, Any]:
    """Mean over the trained tokens of the scored blocks, or of as many of them as make up SUMMARY_TOKENS."""
    total, count = 0.0, 0
    for marked in scored_blocks(round_, [teacher], at_most_tokens=SUMMARY_TOKENS):
        kl = marked.reverse_kl[teacher][marked.mask(teacher)]
        total, count = total + float(kl.sum()), count + len(kl)
    return {"reverse_kl": _number(total / count) if count else None, "reverse_kl_tokens": count}


def _model(identity: cs.ModelIdentity) -> dict[str, Any]:
    return {
        "name": identity.name,
        "revision": identity.revision,
        "digest": identity.digest,
        "adapter_digest": identity.adapter_digest,
    }


def _bytes_below(path: Path) -> int:
    total = 0
    for file in path.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # of a block that is being written
            found = file.lstat()
            total += found.st_size if stat.S_ISREG(found.st_mode) else 0
    return total


# ---------------------------------------------------------------------------------------------------------- rollouts


def rollout(
    round_: cs.Round, number: int, teacher: str | None, load_decoder: Callable[[], Decoder]
) -> dict[str, Any]:
    """One rollout, token by token, with what the student and `teacher` (default: the only one) think of each.

    `load_decoder` is called once the rollout is known to be there: a tokenizer takes seconds to load. Where a scorer
    has not scored the block yet, its fields are None. Raises `RedpenError` or `CacheError`, one line.
    """
    block, row, record = _find(round_, number)
    span = record.response_slice(row)
    ids = [int(token) for token in record.token_ids[span]]
    name = _choose_teacher(round_, teacher)
    student = _scores(round_, cs.STUDENT, block, span)
    other = _scores(round_, name, block, span)
    counts = trained = record.trained[span] == 1
    kl = None
    if student is not None and other is not None:
        kl = scores_reverse_kl(cs.ScoreBlock(**student), cs.ScoreBlock(**other))
        counts = trained & ~np.isnan(kl)
    prompt_index = int(record.prompt_index[record.row_prompt[row]])
    line = round_.prompts[prompt_index]
    tokenizer = load_decoder()
    texts = pieces(ids, tokenizer)
    label = labels(tokenizer)
    return {
        "round": round_.index,
        "rollout": number,
        "block": block,
        "prompt_index": prompt_index,
        "sample_index": int(record.sample_index[row]),
        "answer": line.get("answer"),
        "source": line.get("source"),
        "finish": FINISH_NAMES[int(record.finish_reason[row])],
        "teacher": name,
        "prompt": "".join(pieces([int(token) for token in record.prompt(row)], tokenizer)),
        "response": "".join(texts),
        "scored": kl is not None,
        "mean_reverse_kl": _number(kl[counts].mean()) if kl is not None and counts.any() else None,
        "tokens": [
            {
                "position": position,
                "id": token,
                "text": texts[position],
                "trained": bool(trained[position]),
                "rollout_logprob": _number(record.rollout_logprobs[span][position]),
                "student_logprob": None if student is None else _number(student["logprobs"][position]),
                "teacher_logprob": None if other is None else _number(other["logprobs"][position]),
                "entropy": None if student is None else _number(student["entropy"][position]),
                "reverse_kl": None if kl is None else _number(kl[position]),
                "candidates": _candidates(student, other, position, label),
            }
            for position, token in enumerate(ids)
        ],
    }


def _find(round_: cs.Round, number: int) -> tuple[int, int, cs.RolloutBlock]:
    """Block, row within it, and the block's record."""
    manifest = round_.manifest
    total = manifest.n_prompts * manifest.rollouts_per_prompt
    if not 0 <= number < total:
        raise RedpenError(f"--rollout: round {round_.index} has rollouts 0 to {total - 1}, got {number}")
    prompt, sample = divmod(number, manifest.rollouts_per_prompt)
    block = prompt // manifest.prompts_per_block
    record: cs.RolloutBlock = round_.rollouts.read(block)
    rows = np.flatnonzero((record.prompt_index[record.row_prompt] == prompt) & (record.sample_index == sample))
    if not len(rows):
        raise RedpenError(f"--rollout: prompt {prompt} has no sample {sample} in round {round_.index}")
    return block, int(rows[0]), record


def _choose_teacher(round_: cs.Round, wanted: str | None) -> str | None:
    names = round_.teacher_names()
    if wanted is None:
        if len(names) > 1:
            raise RedpenError(
                f"--teacher: round {round_.index} has several teachers, choose one of {', '.join(names)}"
            )
        return names[0] if names else None
    if wanted not in names:
        raise RedpenError(
            f"--teacher: expected one of {', '.join(names) or 'none yet'} in round {round_.index}, got {wanted!r}"
        )
    return wanted


def _scores(round_: cs.Round, name: str | None, block: int, span: slice) -> dict[str, Any] | None:
    """The span's part of each array of a scorer, or None where it has not scored the block."""
    if name is None or name not in round_.scorer_names():
        return None
    group = round_.scores(name)
    if not group.is_committed(block):
        return None
    arrays = group.read_arrays(block, [spec.name for spec in group.specs])
    return {array: value[span] for array, value in arrays.items()}


def _candidates(
    student: dict[str, Any] | None, teacher: dict[str, Any] | None, position: int, label: Callable[[int], str]
) -> list[dict[str, Any]]:
    """The position's candidates, each once, with both models' log-probs; then the teacher's own top-k, if stored."""
    if student is None:
        return []
    ids = student["candidate_ids"][position]
    told = np.full(len(ids), np.nan)
    if teacher is not None and "candidate_logprobs" in teacher:
        told = teacher["candidate_logprobs"][position]
    found: dict[int, dict[str, Any]] = {
        int(ids[k]): {
            "id": int(ids[k]),
            "text": label(int(ids[k])),
            "student_logprob": _number(student["candidate_logprobs"][position][k]),
            "teacher_logprob": _number(told[k]),
        }
        for k in np.flatnonzero(first_occurrence(ids[None])[0])
    }
    if teacher is not None and "topk_ids" in teacher:
        for token, logprob in zip(teacher["topk_ids"][position], teacher["topk_logprobs"][position], strict=True):
            own: dict[str, Any] = {"id": int(token), "text": label(int(token)), "student_logprob": None}
            found.setdefault(int(token), own | {"teacher_logprob": _number(logprob)})
    return list(found.values())


def _number(value: Any) -> float | None:
    """A JSON number; None for NaN (not scored) and for minus infinity (no probability)."""
    return float(value) if np.isfinite(value) else None
