"""The teachers of a run: what each told of the columns, and the one distribution that all of them make.

Shapes: N teachers, T response positions, C columns of the vocabulary at each, P prompts of the round.

A mixture needs every teacher at every column. All are scored at the student's candidates, so those are its columns;
the teachers' own top-k, which differ from one to the next, are not read. Where prompts are routed, each position has
one teacher, and that one's top-k joins as it does alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

import cache_schema as cs
from pipeline.forward.head import without_repeats
from pipeline.rounds.metrics import rest_of


@dataclass(frozen=True)
class TeacherColumns:
    """What is known of a teacher, or of several, at T positions; nats.

    Attributes:
        ids_TC: distinct token ids, the sampled one first; -1 where a row has fewer, or the teacher did not tell.
        logprobs_TC, rest_T: at those ids, and of everything else.
    """

    ids_TC: Tensor
    logprobs_TC: Tensor
    rest_T: Tensor


@dataclass(frozen=True)
class Teachers:
    """Whose scores are learnt from, and as what.

    Attributes:
        scores: manifest of each one's scores, by name.
        weights: [N], positive, summing to 1: of each in the mixture.
        mixture: of their probabilities, or of their log-probs.
        route_P: number of each prompt's one teacher; None: all of them teach every prompt, mixed.
    """

    scores: dict[str, cs.ScoresManifest]
    weights: tuple[float, ...] = (1.0,)
    mixture: Literal["arithmetic", "geometric"] = "arithmetic"
    route_P: npt.NDArray[np.int64] | None = None

    @property
    def mixed(self) -> bool:
        return len(self.scores) > 1 and self.route_P is None

    @property
    def only_sampled(self) -> bool:
        """Whether no more is known than the teachers' log-prob of the sampled token, at some positions at least."""
        return any(not scores.candidates and not self._topk(scores) for scores in self.scores.values())

    @property
    def taught(self) -> dict[str, npt.NDArray[np.bool_]]:
        """[P] which prompts a teacher is for, by name; those that are not named are for all."""
        route_P = self.route_P
        return {} if route_P is None else {name: route_P == i for i, name in enumerate(self.scores)}

    @property
    def arrays(self) -> dict[str, tuple[str, ...]]:
        """The arrays to read from the cache, by teacher."""
        found = {}
        for name, scores in self.scores.items():
            unused = {"entropy", *(("rest_logprob",) if self._topk(scores) else ())}
            told = cs.teacher_arrays(candidates=scores.candidates > 0, topk=self._topk(scores) > 0)
            found[name] = tuple(spec.name for spec in told if spec.name not in unused)
        return found

    def told(
        self, column: Callable[[str], Tensor], candidate_ids_TK: Tensor, prompts_T: npt.NDArray[np.int64]
    ) -> TeacherColumns:
        """All that they told together.

        Args:
            column: a cached array `<scorer>/<array>` at the T positions.
            candidate_ids_TK: the student's candidates, the sampled token first.
            prompts_T: the prompt of each position, counted in the round.
        """
        told = []
        for name, scores in self.scores.items():
            sampled_T = column(f"{name}/logprobs")
            if scores.candidates:
                ids, logprobs = candidate_ids_TK, column(f"{name}/candidate_logprobs")
                untold = logprobs.isnan()
                untold[:, 0] = False  # the sampled token: where it is unscored, the row weighs nothing
                ids = ids.masked_fill(untold, -1)
            else:
                ids, logprobs = candidate_ids_TK[:, :1], sampled_T[:, None]
            if self._topk(scores):
                ids = torch.cat([ids, column(f"{name}/topk_ids").long()], 1)
                logprobs = torch.cat([logprobs, column(f"{name}/topk_logprobs")], 1)
                rest_T = column(f"{name}/topk_rest_logprob")
            elif scores.candidates:
                rest_T = column(f"{name}/rest_logprob")
            else:
                rest_T = torch.from_numpy(rest_of(sampled_T.cpu().numpy())).to(sampled_T)
            told.append(TeacherColumns(without_repeats(ids), logprobs, rest_T))
        told = _same_width(told)
        if self.route_P is not None:
            return routed(told, torch.from_numpy(self.route_P[prompts_T]).to(candidate_ids_TK.device))
        return mixed(told, self.weights, self.mixture) if self.mixed else told[0]

    def _topk(self, scores: cs.ScoresManifest) -> int:
        return 0 if self.mixed else scores.topk


def mixed(
    told: Sequence[TeacherColumns], weights: Sequence[float], mixture: Literal["arithmetic", "geometric"]
) -> TeacherColumns:
    """One distribution of several teachers that were asked for the same columns.

        arithmetic:  p(v) = sum over i of w_i p_i(v),       exact for every column and for the rest
        geometric:   log p(v) = sum over i of w_i log p_i(v) - log Z,   Z such that C + rest has probability 1

    The geometric sum as it stands has mass below 1 wherever the teachers differ, so a reverse KL against it could
    not fall below -log Z. A column that one teacher did not tell is in nobody's C: it belongs to every one's rest.
    """
    common_TC = torch.stack([one.ids_TC >= 0 for one in told]).all(0)
    weights_N11 = told[0].rest_T.new_tensor(weights)[:, None, None]
    parts = []
    for one in told:
        outside_TC = one.logprobs_TC.masked_fill(common_TC | (one.ids_TC < 0), -torch.inf)
        rest_T1 = torch.cat([one.rest_T[:, None], outside_TC], 1).logsumexp(1, keepdim=True)
        parts.append(torch.cat([one.logprobs_TC.masked_fill(~common_TC, -torch.inf), rest_T1], 1))
    logprobs_NTC = torch.stack(parts)
    if mixture == "arithmetic":
        logprobs_TC = (logprobs_NTC + weights_N11.log()).logsumexp(0)
    else:
        logprobs_TC = (logprobs_NTC * weights_N11).sum(0)
        logprobs_TC = logprobs_TC - logprobs_TC.logsumexp(1, keepdim=True)
    return TeacherColumns(told[0].ids_TC.masked_fill(~common_TC, -1), logprobs_TC[:, :-1], logprobs_TC[:, -1])


def routed(told: Sequence[TeacherColumns], route_T: Tensor) -> TeacherColumns:
    """At each position what one teacher told, number `route_T`."""
    rows_T = torch.arange(len(route_T), device=route_T.device)
    ids_NTC, logprobs_NTC = torch.stack([one.ids_TC for one in told]), torch.stack([one.logprobs_TC for one in told])
    rest_NT = torch.stack([one.rest_T for one in told])
    return TeacherColumns(ids_NTC[route_T, rows_T], logprobs_NTC[route_T, rows_T], rest_NT[route_T, rows_T])


def _same_width(told: Sequence[TeacherColumns]) -> list[TeacherColumns]:
    """With columns of padding where one has fewer than another."""
    width = max(one.ids_TC.shape[1] for one in told)
    missing = [width - one.ids_TC.shape[1] for one in told]
    return [
        TeacherColumns(
            F.pad(one.ids_TC, (0, n), value=-1), F.pad(one.logprobs_TC, (0, n), value=-torch.inf), one.rest_T
        )
        for one, n in zip(told, missing, strict=True)
    ]
