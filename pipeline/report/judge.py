"""Right and wrong responses of cached rollouts, as an evaluation of the same recipe tells them apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

import cache_schema as cs
from pipeline.report.scan import RIGHT, UNKNOWN, WRONG, Judge
from pipeline.text.answers import Checker
from pipeline.text.detokenize import local_tokenizer


def answer_judge(manifest: cs.RoundManifest, checker: Checker) -> Judge | None:
    """Compares responses with the `answer` of their prompts; None where the tokenizer is not on this machine."""
    tokenizer = local_tokenizer(manifest.tokenizer.name, manifest.student.revision)
    if tokenizer is None:
        return None

    def judge(rollouts: cs.RolloutBlock, records: Sequence[Mapping[str, Any]]) -> npt.NDArray[np.int8]:
        wanted = [records[prompt].get("answer") for prompt in rollouts.row_prompt.tolist()]
        rows = [row for row, answer in enumerate(wanted) if answer is not None]
        right = np.full(rollouts.n_rows, UNKNOWN, np.int8)
        if not rows:
            return right  # of nothing, a tokenizer makes one empty text
        texts = tokenizer.batch_decode([rollouts.response(row) for row in rows], skip_special_tokens=True)
        for row, text in zip(rows, texts, strict=True):
            right[row] = RIGHT if checker.is_right(text, str(wanted[row])) else WRONG
        return right

    return judge
