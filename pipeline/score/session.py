"""One scorer's share of the scoring stage: the model, loaded and checked, and the blocks that it writes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

import cache_schema as cs
from pipeline.config import ModelConfig, Recipe, TeacherConfig
from pipeline.console import say
from pipeline.distributed.blocks import OnProgress
from pipeline.engines.resident import ResidentScorer
from pipeline.engines.scoring import ScoreOptions, Scorer, TokenBatch, sequences
from pipeline.forward.packing import check_packing
from pipeline.models import load as models
from pipeline.teachers.alignment import View, view_of
from pipeline.teachers.spans import SpanView

_CHECKED_ROLLOUTS = 4

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ScoreWork:
    """One scorer's work on a round, for any process that has the cache and the model."""

    recipe: Recipe
    cache_url: str
    round_index: int
    name: str
    manifest: cs.ScoresManifest

    @property
    def cfg(self) -> ModelConfig:
        if self.name == cs.STUDENT:
            return self.recipe.student
        return next(teacher for teacher in self.recipe.teacher if teacher.name == self.name)

    @property
    def gpus(self) -> int:
        placement = self.recipe.placement(self.cfg)
        if self.cfg.device == "cpu" or placement == "server":
            return 0
        return self.recipe.vllm.tensor_parallel_size if placement == "vllm" else 1

    def group(self) -> cs.BlockGroup:
        return cs.open(self.cache_url).round(self.round_index).scores(self.name)

    def open(self) -> ScoreSession:
        return ScoreSession(self)


class ScoreSession:
    """The scorer, loaded, and the round that it writes to."""

    def __init__(self, work: ScoreWork):
        self._round = cs.open(work.cache_url, writable=True).round(work.round_index)
        self._name, self._is_student = work.name, work.name == cs.STUDENT
        self._on_progress: OnProgress = lambda rollouts, tokens: None
        with ExitStack() as stack:
            self._scorer = _scorer(work, self._round, lambda tokens: self._on_progress(0, tokens), stack)
            self._engine = stack.pop_all()
        self._n_tokens = self._round.rollouts.commits()["tokens"].astype(np.int64)
        self.batch_blocks = math.ceil(self._scorer.batch_tokens / self._n_tokens[self._n_tokens > 0].mean())

    def run(self, blocks: Sequence[int], on_progress: OnProgress) -> None:
        """Score and commit blocks, as many at a time as keep the scorer busy."""
        self._on_progress = on_progress
        group = self._round.scores(self._name)
        for batch in _batches(blocks, self._n_tokens, self._scorer.batch_tokens):
            started = time.perf_counter()
            tokens = _read(self._round, batch, with_candidates=not self._is_student)
            scores = tokens.split(self._scorer.compute_logprobs(tokens))
            seconds = (time.perf_counter() - started) / len(batch)
            for index, block in enumerate(batch):
                candidate_ids = None if tokens.candidate_ids is None else tokens.part(tokens.candidate_ids, index)
                group.write(
                    block,
                    scores[index],
                    rollouts=tokens.blocks[index],
                    candidate_ids=candidate_ids,
                    elapsed_seconds=seconds,
                )

    def close(self) -> None:
        self._engine.close()


def _scorer(work: ScoreWork, round_: cs.Round, on_tile: Callable[[int], None], stack: ExitStack) -> Scorer:
    """The scorer that the recipe asks for, checked on a few rollouts; its engine, if it has one, is the stack's."""
    recipe, cfg = work.recipe, work.cfg
    view: View | SpanView = view_of(recipe, cfg, round_) if isinstance(cfg, TeacherConfig) else View()
    options = _options(recipe, work.manifest, view)
    if recipe.placement(cfg) in ("vllm", "server"):
        from pipeline.score.engines import open_engine

        assert isinstance(cfg, TeacherConfig) and isinstance(view, View)
        return view.scorer(open_engine(recipe, cfg, round_, view, options, on_tile, stack))
    readable = np.flatnonzero(round_.rollouts.committed())
    sample = _shortest(view.of(TokenBatch((round_.rollouts.read(int(readable[0])),))).blocks[0])
    if recipe.placement(cfg) == "streamed":
        from pipeline.streaming.streamed import StreamedScorer

        streamed = StreamedScorer(cfg, options, memory_gib=recipe.score.memory_gib, on_tile=on_tile)
        _say_packing(streamed.check_packing(*sample))
        return view.scorer(streamed)
    model = models.load_model(cfg)
    _say_packing(check_packing(model, *sample))
    return view.scorer(ResidentScorer(model, options, on_tile=on_tile))


def _options(recipe: Recipe, manifest: cs.ScoresManifest, view: View | SpanView) -> ScoreOptions:
    return ScoreOptions(
        candidates=max(manifest.candidates, 1),
        candidate_kind=manifest.candidate_kind,
        candidate_vocab=manifest.tokenizer.vocab_size,
        sampling_temperature=manifest.sampling_temperature,
        topk=manifest.topk,
        topk_among=view.shared,
        tile_tokens=manifest.tile_tokens,
        rows_per_chunk=recipe.score.rows_per_chunk,
    )


def _shortest(rollouts: cs.RolloutBlock) -> tuple[list[npt.NDArray[np.int32]], list[int]]:
    """A few short rollouts of a block, as `sequences` gives them."""
    lengths = rollouts.prompt_length[rollouts.row_prompt] + rollouts.response_length
    return sequences(rollouts, np.argsort(lengths, kind="stable")[:_CHECKED_ROLLOUTS].tolist())


def _say_packing(difference: float) -> None:
    say(f"packing: a rollout among others has the log-probs it has alone, to {difference:.1g} nats")


def _batches(blocks: Sequence[int], n_tokens: IntArray, batch_tokens: int) -> Iterator[list[int]]:
    """Consecutive blocks, as many as it takes to reach `batch_tokens` response tokens."""
    batch: list[int] = []
    for block in blocks:
        batch.append(block)
        if n_tokens[batch].sum() >= batch_tokens:
            yield batch
            batch = []
    if batch:
        yield batch


def _read(round_: cs.Round, blocks: list[int], *, with_candidates: bool) -> TokenBatch:
    candidate_ids = logprobs = None
    if with_candidates:
        student = round_.scores(cs.STUDENT)
        names = ("candidate_ids", "logprobs")
        told = [student.read_arrays(block, names) for block in blocks]
        candidate_ids, logprobs = (np.concatenate([one[name] for one in told]) for name in names)
    return TokenBatch(
        blocks=tuple(round_.rollouts.read(block) for block in blocks),
        candidate_ids=candidate_ids,
        student_logprobs=logprobs,
        keys=tuple((round_.manifest.seed, round_.index, block) for block in blocks),
    )
