"""One distribution from the columns of several teachers: pure functions on tensors.

Shapes: N teachers, T response positions, C columns of the vocabulary at each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class TeacherColumns:
    """A teacher's log-probs, or those of a mixture of teachers, at T positions; in nats.

    Attributes:
        ids_TC: distinct token ids, the sampled one first; -1 in rows with fewer, and for tokens without a score.
        logprobs_TC, rest_T: log-probs of those ids and of everything else.
    """

    ids_TC: Tensor
    logprobs_TC: Tensor
    rest_T: Tensor


def mixed(
    teachers: Sequence[TeacherColumns], weights: Sequence[float], mixture: Literal["arithmetic", "geometric"]
) -> TeacherColumns:
    """One distribution of several teachers that were scored at the same columns.

        arithmetic:  p(v) = sum over i of w_i p_i(v),       exact for every column and for the rest
        geometric:   log p(v) = sum over i of w_i log p_i(v) - log Z,   Z such that C + rest has probability 1

    Without Z the geometric mean has a mass below 1 unless the teachers agree, so a reverse KL against it could not
    fall below -log Z. A column without a score of one teacher is in nobody's C: its mass joins every teacher's rest.
    """
    common_TC = torch.stack([teacher.ids_TC >= 0 for teacher in teachers]).all(0)
    weights_N11 = teachers[0].rest_T.new_tensor(weights)[:, None, None]
    parts = []
    for teacher in teachers:
        outside_TC = teacher.logprobs_TC.masked_fill(common_TC | (teacher.ids_TC < 0), -torch.inf)
        rest_T1 = torch.cat([teacher.rest_T[:, None], outside_TC], 1).logsumexp(1, keepdim=True)
        parts.append(torch.cat([teacher.logprobs_TC.masked_fill(~common_TC, -torch.inf), rest_T1], 1))
    logprobs_NTC = torch.stack(parts)
    if mixture == "arithmetic":
        logprobs_TC = (logprobs_NTC + weights_N11.log()).logsumexp(0)
    else:
        logprobs_TC = (logprobs_NTC * weights_N11).sum(0)
        logprobs_TC = logprobs_TC - logprobs_TC.logsumexp(1, keepdim=True)
    return TeacherColumns(teachers[0].ids_TC.masked_fill(~common_TC, -1), logprobs_TC[:, :-1], logprobs_TC[:, -1])


def routed(teachers: Sequence[TeacherColumns], route_T: Tensor) -> TeacherColumns:
    """At each position the columns of one teacher, number `route_T`."""
    rows_T = torch.arange(len(route_T), device=route_T.device)
    return TeacherColumns(
        *(
            torch.stack([getattr(teacher, name) for teacher in teachers])[route_T, rows_T]
            for name in ("ids_TC", "logprobs_TC", "rest_T")
        )
    )


def pad_to_same_width(teachers: Sequence[TeacherColumns]) -> list[TeacherColumns]:
    """The teachers' columns with padding up to the widest of them."""
    width = max(teacher.ids_TC.shape[1] for teacher in teachers)
    return [
        TeacherColumns(
            F.pad(teacher.ids_TC, (0, width - teacher.ids_TC.shape[1]), value=-1),
            F.pad(teacher.logprobs_TC, (0, width - teacher.ids_TC.shape[1]), value=-torch.inf),
            teacher.rest_T,
        )
        for teacher in teachers
    ]
