"""One line about a scorer's finished blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

import cache_schema as cs
from pipeline.console import warn
from pipeline.rounds.metrics import REVERSE_KL_ARRAYS, SamplerGap, scores_reverse_kl

Columns = Sequence[npt.NDArray[Any]]


def summarize(round_: cs.Round, name: str) -> str:
    """Means over the scored tokens that are trained: log-prob, entropy, and reverse KL to a teacher; for the student
    its distance to the sampler, with a warning if that is more than rounding explains.
    """
    is_student, group, student = name == cs.STUDENT, round_.scores(name), round_.scores(cs.STUDENT)
    columns: dict[str, list[npt.NDArray[Any]]] = {"mean log-prob": [], "mean entropy": [], "reverse KL": []}
    log_ratios, has_candidate, n_trained, n_scored = [], [], 0, 0
    for block in np.flatnonzero(group.committed()).tolist():
        # Not the whole block: the student's candidates alone are most of its bytes.
        rollouts = round_.rollouts.read_arrays(block, ("trained", "rollout_logprobs"))
        arrays = ("logprobs", "entropy", *(("sampling_logprobs",) if is_student else REVERSE_KL_ARRAYS))
        scores = cs.ScoreBlock(**group.read_arrays(block, arrays))
        trained = rollouts["trained"] == 1
        scored = trained & np.isfinite(scores.logprobs)
        n_trained, n_scored = n_trained + int(trained.sum()), n_scored + int(scored.sum())
        columns["mean log-prob"].append(scores.logprobs[scored])
        if scores.entropy is not None:
            columns["mean entropy"].append(scores.entropy[scored])
        if is_student:
            log_ratio = (scores.sampling_logprobs - rollouts["rollout_logprobs"])[scored]
            log_ratios.append(log_ratio[np.isfinite(log_ratio)])
        else:
            by_student = cs.ScoreBlock(**student.read_arrays(block, REVERSE_KL_ARRAYS))
            columns["reverse KL"].append(scores_reverse_kl(by_student, scores)[scored])
            if scores.candidate_logprobs is not None:
                has_candidate.append(~np.isnan(scores.candidate_logprobs[scored]).ravel())
    means = {title: _mean(parts) for title, parts in columns.items() if parts}
    text = ", ".join(f"{title} {mean:.4g}" for title, mean in means.items()) + " nats a token"
    if has_candidate and (fraction := _mean(has_candidate)) < 1:
        text += f", log-probs for {fraction:.1%} of candidates"
    if n_scored < n_trained:
        text += f", {n_scored / n_trained:.1%} of tokens scored"
        spans = group.manifest.template.get("alignment") == "spans"
        text += " (in spans that both tokenizers share)" if spans else ""
    return text + (_sampler_gap(round_.manifest, log_ratios) if is_student else "")


def _sampler_gap(sampled: cs.RoundManifest, log_ratios: Columns) -> str:
    """How far the sampler is from the training forward, if both have the same distribution."""
    if sampled.temperature == 0 or sampled.top_p < 1 or (gap := SamplerGap.of(np.concatenate(log_ratios))) is None:
        return ""
    if gap.is_wide:
        warn(
            f"the sampler ({sampled.engine}) and the training forward disagree more than rounding explains ({gap}); "
            "importance ratios start from the training forward's log-probs, but compare dtype, attention and "
            "quantisation of both"
        )
    return f"; trainer/sampler ratio: {gap}"


def _mean(parts: Columns) -> float:
    return float(np.concatenate(parts).mean(dtype=np.float64))
