"""The records of `redpen inspect`, JSON-able: a summary of a cache, or one rollout token by token."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import cache_schema as cs
from pipeline.errors import PromptError, RedpenError
from pipeline.models.identity import own_prompt
from pipeline.rounds.metrics import first_occurrence
from pipeline.rounds.scored_block import ScoredRound, part_of, scored_blocks
from pipeline.text.detokenize import Decoder, labels, pieces
from pipeline.text.teacher_prompt import read_text

#: Tokens over which a summary measures reverse KL; of a larger round it reads evenly spaced blocks.
SUMMARY_TOKENS = 4_000_000


# ----------------------------------------------------------------------------------------------------------- summary


def summary(cache: cs.Cache, round_index: int | None = None, *, reverse_kl: bool = True) -> dict[str, Any]:
    """Rounds (or one of them), rollouts and scores of a cache, with the mean reverse KL to each teacher.

    `reverse_kl=False` leaves the mean out: it is the only part that reads scores.
    """
    rounds = [cache.round(index) for index in (cache.round_indices() if round_index is None else [round_index])]
    return {
        "cache": cache.url,
        "format_version": cache.version,
        "bytes": _bytes_below(cache.path) if cache.path else None,
        "rounds": [_round_summary(round_, reverse_kl) for round_ in rounds],
    }


def _round_summary(round_: cs.Round, reverse_kl: bool) -> dict[str, Any]:
    manifest, rollouts = round_.manifest, round_.rollouts
    commits, committed = rollouts.commits(), rollouts.committed()
    rows, tokens = (int(commits[name].sum()) for name in ("rows", "tokens"))
    finish = {name: 0 for name in cs.FINISH_NAMES.values()}
    for block in np.flatnonzero(committed):
        reasons = rollouts.read_arrays(int(block), ["finish_reason"])["finish_reason"]
        for code, name in cs.FINISH_NAMES.items():
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
    found = {
        "name": name,
        "role": manifest.role,
        "model": _model(manifest.model),
        "dtype": manifest.dtype,
        "engine": manifest.engine,
        "candidates": manifest.candidates,
        "candidate_kind": manifest.candidate_kind,
        "topk": manifest.topk,
        "read": own_prompt(round_, name) if manifest.role == "teacher" else None,
        "blocks": {
            "committed": int(committed.sum()),
            "stale": int((scores.commits()["rows"] > 0).sum() - committed.sum()),
            "total": round_.n_blocks,
        },
    }
    return found | _mean_reverse_kl(round_, name) if reverse_kl and manifest.role == "teacher" else found


def _mean_reverse_kl(round_: cs.Round, teacher: str) -> dict[str, Any]:
    """Mean over the trained tokens of the scored blocks, or of as many of them as make up SUMMARY_TOKENS."""
    total, count = 0.0, 0
    for scored in scored_blocks(round_, [teacher], at_most_tokens=SUMMARY_TOKENS):
        kl = scored.reverse_kl[teacher][scored.mask(teacher)]
        total, count = total + float(kl.sum()), count + len(kl)
    return {"reverse_kl": json_number(total / count) if count else None, "reverse_kl_tokens": count}


def _model(identity: cs.ModelIdentity) -> dict[str, Any]:
    return {
        "name": identity.name,
        "revision": identity.revision,
        "digest": identity.digest,
        "adapter_digest": identity.adapter_digest,
    }


def _bytes_below(path: Path) -> int:
    total = 0
    for directory, _, names in os.walk(path):  # half the time of rglob, and a block has 25 files
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # temporary files of a block that is being written
                found = os.lstat(os.path.join(directory, name))
                total += found.st_size if stat.S_ISREG(found.st_mode) else 0
    return total


# ----------------------------------------------------------------------------------------------------------- rollout


def rollout(
    round_: cs.Round, number: int, teacher: str | None, load_decoder: Callable[[], Decoder]
) -> dict[str, Any]:
    """One rollout, token by token, with the scores of the student and of `teacher` (default: the only one).

    Fields of a scorer that has not scored the block are None. `load_decoder` is called once the rollout is known to
    exist: a tokenizer takes seconds to load. Raises `RedpenError` or `CacheError`, one line.
    """
    manifest = round_.manifest
    total = manifest.n_prompts * manifest.rollouts_per_prompt
    if not 0 <= number < total:
        raise RedpenError(f"--rollout: round {round_.index} has rollouts 0 to {total - 1}, got {number}")
    name = _choose_teacher(round_, teacher)
    prompt, sample = divmod(number, manifest.rollouts_per_prompt)
    reader = ScoredRound(round_, [] if name is None else [name])
    scored = reader.read(prompt // manifest.prompts_per_block)
    rows = np.flatnonzero(scored.numbers == number)
    if not len(rows):
        raise RedpenError(f"--rollout: prompt {prompt} has no sample {sample} in round {round_.index}")
    row, rollouts = int(rows[0]), scored.rollouts
    span = rollouts.response_slice(row)
    scores = {scorer: part_of(block, span) for scorer, block in scored.scores.items()}
    student, other = scores.get(cs.STUDENT), None if name is None else scores.get(name)
    kl = scored.reverse_kl[name][span] if name is not None and student is not None and other is not None else None
    mean = kl[scored.mask(name)[span]] if kl is not None and name is not None else np.zeros(0)
    line, tokenizer = round_.prompts[prompt], load_decoder()
    entropy = None if student is None else student.entropy
    ids: list[int] = rollouts.token_ids[span].tolist()
    texts, label = pieces(ids, tokenizer), labels(tokenizer)
    return {
        "round": round_.index,
        "rollout": number,
        "block": scored.block,
        "prompt_index": prompt,
        "sample_index": sample,
        "answer": line.get("answer"),
        "source": line.get("source"),
        "finish": cs.FINISH_NAMES[int(rollouts.finish_reason[row])],
        "teacher": name,
        "prompt": "".join(pieces(rollouts.prompt(row).tolist(), tokenizer)),
        "teacher_prompt": None if name is None else _read_by(round_, name, line),
        "response": "".join(texts),
        "scored": kl is not None,
        "mean_reverse_kl": json_number(mean.mean()) if len(mean) else None,
        "tokens": [
            {
                "position": position,
                "id": token,
                "text": texts[position],
                "trained": bool(scored.trained[span][position]),
                "rollout_logprob": json_number(rollouts.rollout_logprobs[span][position]),
                "student_logprob": None if student is None else json_number(student.logprobs[position]),
                "teacher_logprob": None if other is None else json_number(other.logprobs[position]),
                "entropy": None if entropy is None else json_number(entropy[position]),
                "reverse_kl": None if kl is None else json_number(kl[position]),
                "candidates": _candidates(student, other, position, label),
            }
            for position, token in enumerate(ids)
        ],
    }


def _read_by(round_: cs.Round, teacher: str, record: dict[str, Any]) -> str | None:
    try:
        return read_text(round_.scores(teacher).manifest.template, record)
    except PromptError as error:
        return f"[{error}]"


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


def _candidates(
    student: cs.ScoreBlock | None, teacher: cs.ScoreBlock | None, position: int, label: Callable[[int], str]
) -> list[dict[str, Any]]:
    """The position's candidates, each once, with both models' log-probs; then the teacher's own top-k, if stored."""
    if student is None or student.candidate_ids is None or student.candidate_logprobs is None:
        return []
    ids = student.candidate_ids[position]
    by_teacher = np.full(len(ids), np.nan)
    if teacher is not None and teacher.candidate_logprobs is not None:
        by_teacher = teacher.candidate_logprobs[position]
    found: dict[int, dict[str, Any]] = {
        int(ids[k]): {
            "id": int(ids[k]),
            "text": label(int(ids[k])),
            "student_logprob": json_number(student.candidate_logprobs[position][k]),
            "teacher_logprob": json_number(by_teacher[k]),
        }
        for k in np.flatnonzero(first_occurrence(ids[None])[0])
    }
    if teacher is not None and teacher.topk_ids is not None and teacher.topk_logprobs is not None:
        for token, logprob in zip(teacher.topk_ids[position], teacher.topk_logprobs[position], strict=True):
            own: dict[str, Any] = {"id": int(token), "text": label(int(token)), "student_logprob": None}
            found.setdefault(int(token), own | {"teacher_logprob": json_number(logprob)})
    return list(found.values())


def json_number(value: Any) -> float | None:
    """A JSON number; None for NaN (not scored) and for minus infinity (no probability)."""
    return float(value) if np.isfinite(value) else None
