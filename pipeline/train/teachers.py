"""The teachers of a run: which scores the recipe selects, and their columns at the tokens of a micro-batch.

Shapes: N teachers, T response positions, C columns of the vocabulary at each, K candidates, P prompts of the round.

A mixture needs every teacher at every column. All are scored at the student's candidates, so those are its columns;
the teachers' own top-k tokens, which differ from one teacher to the next, are not used. If prompts are routed, each
position has one teacher, and that teacher's top-k joins as it does for a single one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import cache_schema as cs
from pipeline.config import Recipe, TrainConfig
from pipeline.errors import ConfigError
from pipeline.forward.head import without_repeats
from pipeline.rounds.metrics import rest_of
from pipeline.train.mixture import TeacherColumns, mixed, pad_to_same_width, routed


@dataclass(frozen=True)
class Teachers:
    """The teachers to learn from, and how they combine.

    Attributes:
        scores: manifest of each teacher's scores, by name.
        weights: [N], positive, summing to 1: of each in the mixture.
        mixture: of their probabilities, or of their log-probs.
        route_P: index of each prompt's one teacher; None: all of them teach every prompt, mixed.
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
        """Whether some positions have no more than the teacher's log-prob of the sampled token."""
        return any(not scores.candidates and not self._topk(scores) for scores in self.scores.values())

    @property
    def taught(self) -> dict[str, npt.NDArray[np.bool_]]:
        """[P] the prompts routed to each teacher, by name; empty if every teacher has all prompts."""
        route_P = self.route_P
        return {} if route_P is None else {name: route_P == i for i, name in enumerate(self.scores)}

    @property
    def arrays(self) -> dict[str, tuple[str, ...]]:
        """The arrays to read from the cache, by teacher."""
        found = {}
        for name, scores in self.scores.items():
            unused = {"entropy", *(("rest_logprob",) if self._topk(scores) else ())}
            stored = cs.teacher_arrays(candidates=scores.candidates > 0, topk=self._topk(scores) > 0)
            found[name] = tuple(spec.name for spec in stored if spec.name not in unused)
        return found

    def columns(
        self, column: Callable[[str], Tensor], candidate_ids_TK: Tensor, prompts_T: npt.NDArray[np.int64]
    ) -> TeacherColumns:
        """The columns of all teachers, mixed or routed.

        Args:
            column: returns the cached array `<scorer>/<array>` at the T positions.
            candidate_ids_TK: the student's candidates, the sampled token first.
            prompts_T: the prompt of each position, counted in the round.
        """
        each = pad_to_same_width([self._columns_of(name, column, candidate_ids_TK) for name in self.scores])
        if self.route_P is not None:
            return routed(each, torch.from_numpy(self.route_P[prompts_T]).to(candidate_ids_TK.device))
        return mixed(each, self.weights, self.mixture) if self.mixed else each[0]

    def _columns_of(self, name: str, column: Callable[[str], Tensor], candidate_ids_TK: Tensor) -> TeacherColumns:
        scores, sampled_T = self.scores[name], column(f"{name}/logprobs")
        if scores.candidates:
            logprobs = column(f"{name}/candidate_logprobs")
            missing = logprobs.isnan()
            missing[:, 0] = False  # an unscored sampled token has weight 0
            ids = candidate_ids_TK.masked_fill(missing, -1)
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
        return TeacherColumns(without_repeats(ids), logprobs, rest_T)

    def _topk(self, scores: cs.ScoresManifest) -> int:
        return 0 if self.mixed else scores.topk


def select_teachers(recipe: Recipe, round_: cs.Round, cache_url: str) -> tuple[str, ...]:
    """Names of the scores to learn from: those of `train.route`, or `train.teacher`, or the only ones in the cache;
    none for cross-entropy and for rewards alone.

    Rules that need no cache are in `pipeline.config.checks`. Raises `CacheError` if nothing is scored, `ConfigError`
    if the settings do not fit the teachers that have scores.
    """
    if not recipe.has_teacher:
        return ()
    train, scored = recipe.train, round_.teacher_names()
    where = f"cache {cache_url} round {round_.index}"
    if cs.STUDENT not in round_.scorer_names() or not scored:
        raise cs.CacheError(f"{where}: not scored yet; run `redpen score RECIPE --cache {cache_url}`")
    setting, names = "train.teacher", [train.teacher] if isinstance(train.teacher, str) else train.teacher
    if train.route:
        setting, names = "train.route", sorted(set(train.route.values()))
    elif names is None:
        names = _only_teacher(train, scored, where)
    for name in names:
        if name not in scored:
            raise ConfigError(
                f"{setting} = {name!r}: {where} is scored by {', '.join(scored)}; "
                f"run `redpen score RECIPE --cache {cache_url} --only {name}`"
            )
    return tuple(name for name in names if train.teacher_weights.get(name, 1.0) > 0)


def load_teachers(recipe: Recipe, round_: cs.Round, names: Sequence[str]) -> Teachers:
    """The teachers of `select_teachers`, weighted or routed. Raises `ConfigError` for a prompt without a route."""
    train = recipe.train
    scores = {name: round_.scores(name).manifest for name in names}
    if train.route:
        return Teachers(scores, route_P=_route(train, round_, names))
    weights = [train.teacher_weights.get(name, 1.0) for name in names]
    return Teachers(scores, tuple(weight / sum(weights) for weight in weights), train.mixture)


def _only_teacher(train: TrainConfig, scored: list[str], where: str) -> list[str]:
    """The one teacher with scores, for a recipe that chooses none."""
    if len(scored) > 1:
        raise ConfigError(
            f"train.teacher: {where} is scored by {', '.join(scored)}; set it to the one to learn from, or to a list"
        )
    if train.teacher_weights or train.mixture != TrainConfig().mixture:
        raise ConfigError(
            f"train.{'teacher_weights' if train.teacher_weights else 'mixture'}: needs several teachers for each "
            f"prompt, got the one teacher {scored[0]!r}; remove it"
        )
    return scored


def _route(train: TrainConfig, round_: cs.Round, names: Sequence[str]) -> npt.NDArray[np.int64]:
    """[P]: the index of each prompt's teacher."""
    route_P = np.empty(round_.n_prompts, np.int64)
    for prompt in range(round_.n_prompts):
        source = round_.prompts[prompt].get("source")
        name = train.route.get("*") if source is None else train.route.get(str(source), train.route.get("*"))
        if name is None:
            described = "has no source" if source is None else f"is from {source!r}"
            raise ConfigError(
                f"train.route: prompt {prompt} of round {round_.index} {described}, which has no route; add "
                + ("" if source is None else f"{source!r} or ")
                + "'*', the teacher of all others"
            )
        route_P[prompt] = names.index(name)
    return route_P
