"""Stage one, scoring: the log-probs of the student and of every teacher at each cached token.

At every response position, with p the model's next-token distribution at temperature 1:

    logprobs = log p(y_t),  entropy = -sum_v p(v) log p(v),  candidate_logprobs = log p(v) for v in C,
    rest_logprob = log sum_{v not in C} p(v)

The student comes first, by the forward that training uses and never the sampler's, since samplers differ from
trainers in the last bits and, under top-p or temperature, in kind. It chooses C: the sampled token and its
likeliest others (or random draws), K in all. `sampling_logprobs` are from the same forward at the
sampling temperature; their distance to `rollout_logprobs` is the gap between sampler and trainer. Then each
teacher scores the same C. One model is in memory at a time, and [T, V] never exists: the head runs over
`score.rows_per_chunk` response rows at a time.

Rollouts are packed into tiles that depend on their block alone, and a block is committed when it is complete,
so neither a kill nor its place in a batch changes a bit.

Departure from the source: it trains on the sampler's log-probs; here the student's are computed again.

    redpen score RECIPE --cache CACHE [--only NAME] [--launcher ray [--workers N]]
    torchrun --nproc-per-node N -m pipeline score RECIPE --cache CACHE
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

import cache_schema as cs
from pipeline.config import ModelConfig, Recipe
from pipeline.console import progress, say, show, speed, warn
from pipeline.disk import bytes_per_token, require_free
from pipeline.distributed.blocks import OnProgress, open_for_writing, run_blocks
from pipeline.distributed.ranks import Launcher, Ranks, join_ranks
from pipeline.engines.resident import ResidentScorer
from pipeline.engines.scoring import ScoreOptions, Scorer, TokenBatch, sequences
from pipeline.errors import ConfigError, ModelError
from pipeline.forward.packing_check import choose_checked, settle_layout
from pipeline.models import load as models
from pipeline.models.resolve import ResolvedModel, resolve
from pipeline.rounds import known_manifests, manifests
from pipeline.score.finished import kept, nothing_to_do, report_end, scorers
from pipeline.score.summary import summarize
from pipeline.teachers.alignment import View, longest_of, view_of
from pipeline.teachers.prompts import template_of
from pipeline.teachers.spans import SpanView

IntArray = npt.NDArray[np.int64]


def run(
    recipe: Recipe,
    cache_url: str,
    only: str | None = None,
    round_index: int | None = None,
    *,
    launcher: Launcher = None,
    n_workers: int | None = None,
) -> int:
    """Score the committed rollouts that lack scores; returns the exit code 0.

    Args:
        only: one scorer's name, "student" or a teacher's.
        round_index: the latest round by default.
        launcher, n_workers: as `join_ranks`.

    Raises:
        ConfigError: `only` names no scorer.
        ModelError: a model is not available, or has another vocabulary.
        CacheError: not a cache, no rollouts, sampled by a different student, scored with other settings, locked, or
            its disk is too small.
    """
    chosen = scorers(recipe)
    if only is not None and only not in chosen:
        raise ConfigError(f"--only: expected one of {', '.join(chosen)}, got {only!r}")
    with join_ranks(launcher, n_workers) as ranks, open_for_writing(cache_url, "redpen score", ranks) as cache:
        round_ = cache.round(round_index)
        if not round_.rollouts.committed().any():
            raise cs.CacheError(
                f"cache {cache_url} round {round_.index}: no block of rollouts is finished; "
                f"run `redpen rollouts RECIPE --cache {cache_url}`"
            )
        # All scorers before the first forward: a teacher that does not fit must be found now, not hours later.
        all_work = ranks.broadcast(
            lambda: [_plan_scorer(recipe, round_, name, cfg) for name, cfg in chosen.items() if only in (None, name)]
        )
        for work in all_work:
            if work is not None:
                _score_blocks(work, round_, ranks)
                models.free_memory()
        if ranks.is_main_process:
            report_end(round_)
    return 0


# -- planning ------------------------------------------------------------------------------------------------


def _plan_scorer(recipe: Recipe, round_: cs.Round, name: str, cfg: ModelConfig) -> ScoreWork | None:
    """A scorer's work; None if its finished scores are kept without looking at the model."""
    if (line := kept(round_, name, cfg)) is not None:
        show(line)
        return None
    work = ScoreWork(recipe, round_.cache.url, round_.index, name)
    before = known_manifests.of_scores(recipe, round_.manifest, cfg)
    manifest = work.manifest
    known_manifests.remember(before, known_manifests.of_scores(recipe, round_.manifest, cfg), manifest)
    is_finished = name in round_.scorer_names() and round_.scores(name).committed().all()
    if manifest.engine == "vllm" and not is_finished:
        from pipeline.engines.vllm import import_vllm

        import_vllm()  # better missing now than after the student has scored everything
    return work


def _student_manifest(recipe: Recipe, round_: cs.Round, student: ResolvedModel) -> cs.ScoresManifest:
    """Refuses a student that did not sample the round."""
    sampled = round_.manifest
    mine = replace(sampled, student=student.identity, tokenizer=student.tokenizer_identity)
    if differing := sampled.differences(mine):
        raise cs.ProvenanceError(
            f"cache {round_.cache.url} round {round_.index}: sampled by a different student "
            f"({'; '.join(differing)}); set [student] back, or sample a round by this one with "
            f"`redpen rollouts RECIPE --round {round_.index + 1}`"
        )
    if recipe.score.candidates > student.known_tokens:
        raise ConfigError(
            f"score.candidates: expected at most {student.known_tokens}, the student's vocabulary, got "
            f"{recipe.score.candidates}"
        )
    return manifests.scores(recipe, student, sampled, template=sampled.template)


def _manifest(recipe: Recipe, round_: cs.Round, teacher: ResolvedModel, view: View | SpanView) -> cs.ScoresManifest:
    sampled = round_.manifest
    return manifests.scores(
        recipe,
        teacher,
        sampled,
        template=template_of(recipe, teacher, sampled.template, view.made_of),
        lacks_tokens=view.lacks_tokens(sampled.tokenizer.vocab_size),
        spans=isinstance(view, SpanView),
    )


# -- scoring -------------------------------------------------------------------------------------------------


def _score_blocks(work: ScoreWork, round_: cs.Round, ranks: Ranks) -> None:
    """Score one scorer's missing blocks and print a summary of its scores."""
    name = work.name
    pending, n_ready = ranks.broadcast(lambda: _pending_blocks(work, round_))
    if not len(pending):
        if ranks.is_main_process:
            show(nothing_to_do(round_, name))
        return
    n_tokens = round_.rollouts.commits()["tokens"].astype(np.int64)
    n_pending, mine = int(n_tokens[pending].sum()), int(n_tokens[ranks.shard(pending)].sum())
    seconds = run_blocks(
        work,
        pending,
        ranks,
        begin=lambda: round_.start_scores(name, work.manifest),
        state=lambda: f"{round_.scores(name).committed().sum()} of {round_.n_blocks} blocks by {name} are committed",
        bar=progress(name, mine + n_ready - n_pending, "tokens", done=n_ready - n_pending),
        advance=lambda bar, rollouts, tokens: bar.advance(tokens),
    )
    if ranks.is_main_process:
        show(
            f"{name}: {summarize(round_, name)}; {n_pending:,} tokens in {seconds:.1f} s, "
            f"{speed(n_pending / seconds, 'tokens')}"
        )


def _pending_blocks(work: ScoreWork, round_: cs.Round) -> tuple[list[int], int]:
    """The blocks to score, and the response tokens of all blocks that can be scored now.

    Raises if the disk is too small or a rollout is longer than the model's context.
    """
    name, manifest = work.name, work.manifest
    group = round_.start_scores(name, manifest) if name in round_.scorer_names() else None
    ready = round_.rollouts.committed()
    if name != cs.STUDENT:
        have_candidates = round_.scores(cs.STUDENT).committed()
        if n_waiting := int((ready & ~have_candidates).sum()):
            warn(f"{name}: {n_waiting} blocks wait for the student's scores, which hold the candidates")
        ready &= have_candidates
        if not ready.any():
            raise cs.CacheError(
                f"cache {round_.cache.url} round {round_.index}: the student has scored no block yet; run "
                f"`redpen score RECIPE --cache {round_.cache.url} --only {cs.STUDENT}` first"
            )
    done = np.zeros_like(ready) if group is None else group.committed()
    pending = np.flatnonzero(ready & ~done)
    n_tokens = round_.rollouts.commits()["tokens"].astype(np.int64)
    if len(pending):
        sizes = {"candidate": manifest.candidates, "topk": manifest.topk}
        needed = int(n_tokens[pending].sum()) * bytes_per_token(manifest.arrays(), sizes)
        require_free(round_.cache.url, needed, f"scores by {name}")
        _check_context(round_, pending, work)
    return pending.tolist(), int(n_tokens[ready].sum())


def _check_context(round_: cs.Round, blocks: IntArray, work: ScoreWork) -> None:
    """Refuse a model that was not made for rollouts as long as these: its scores would be wrong without a sign."""
    sampled, (model, view) = round_.manifest, work.resolved
    context, renders = model.context, view.prompts is not None
    if context is None or (not renders and sampled.max_prompt_tokens + sampled.max_response_tokens <= context):
        return
    for block in blocks.tolist():
        longest = longest_of(round_, block, view)
        if longest > context:
            raise ModelError(
                f"{model.setting('model')}: its context is {context} tokens, a rollout of block {block} has "
                f"{longest}; choose a model with a longer context"
            )


@dataclass(frozen=True)
class ScoreWork:
    """One scorer's work on a round, for any process that can open the cache and load the model."""

    recipe: Recipe
    cache_url: str
    round_index: int
    name: str

    def __getstate__(self) -> dict[str, Any]:
        """Without the model and the round, which each process looks up for itself."""
        return {name: value for name, value in self.__dict__.items() if name not in ("resolved", "_round")}

    @cached_property
    def resolved(self) -> tuple[ResolvedModel, View | SpanView]:
        """The scorer's model, and how its tokens relate to the student's."""
        model = resolve(self.cfg)
        return model, View() if self.name == cs.STUDENT else view_of(self.recipe, model, self._round)

    @cached_property
    def manifest(self) -> cs.ScoresManifest:
        """What the scores will be."""
        model, view = self.resolved
        if self.name == cs.STUDENT:
            return _student_manifest(self.recipe, self._round, model)
        return _manifest(self.recipe, self._round, model, view)

    @cached_property
    def _round(self) -> cs.Round:
        return cs.open(self.cache_url).round(self.round_index)

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

    def group(self) -> cs.BlockGroup[cs.ScoresManifest]:
        return cs.open(self.cache_url).round(self.round_index).scores(self.name)

    def open(self) -> ScoreSession:
        return ScoreSession(self)


class ScoreSession:
    """A loaded scorer and the round that it writes to."""

    def __init__(self, work: ScoreWork):
        self._round = cs.open(work.cache_url, writable=True).round(work.round_index)
        self._name, self._is_student = work.name, work.name == cs.STUDENT
        self._on_progress: OnProgress = lambda rollouts, tokens: None
        with ExitStack() as stack:
            self._scorer = _load_scorer(work, self._round, lambda tokens: self._on_progress(0, tokens), stack)
            self._engine = stack.pop_all()
        self._n_tokens = self._round.rollouts.commits()["tokens"].astype(np.int64)
        self.batch_blocks = math.ceil(self._scorer.batch_tokens / self._n_tokens[self._n_tokens > 0].mean())

    def run(self, blocks: Sequence[int], on_progress: OnProgress) -> None:
        """Score and commit blocks, as many at a time as keep the scorer busy."""
        self._on_progress = on_progress
        group = self._round.scores(self._name)
        for batch in _batches(blocks, self._n_tokens, self._scorer.batch_tokens):
            started = time.perf_counter()
            tokens = _read_blocks(self._round, batch, with_candidates=not self._is_student)
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


def _load_scorer(work: ScoreWork, round_: cs.Round, on_tile: Callable[[int], None], stack: ExitStack) -> Scorer:
    """Load the scorer and check it on a few rollouts; an engine is closed with `stack`."""
    recipe, manifest, (scorer, view) = work.recipe, work.manifest, work.resolved
    placement = recipe.placement(work.cfg)
    options = ScoreOptions(
        candidates=max(manifest.candidates, 1),
        candidate_kind=manifest.candidate_kind,
        candidate_vocab=manifest.tokenizer.vocab_size,
        sampling_temperature=manifest.sampling_temperature,
        topk=manifest.topk,
        topk_among=view.shared,
        tile_tokens=manifest.tile_tokens,
        rows_per_chunk=recipe.score.rows_per_chunk,
    )
    if placement in ("vllm", "server"):
        from pipeline.score.engines import open_engine

        assert isinstance(view, View)
        return view.scorer(open_engine(recipe, scorer, round_, view, options, on_tile, stack))
    first = int(np.flatnonzero(round_.rollouts.committed())[0])
    sample = _checked_rollouts(view.of(TokenBatch((round_.rollouts.read(first),))).blocks[0], work.cfg)
    if placement == "streamed":
        from pipeline.streaming.streamed import StreamedScorer

        memory, longest = recipe.score.memory_gib, _longest(round_, view, options.tile_tokens)
        streamed = StreamedScorer(scorer, options, memory_gib=memory, longest=longest, on_tile=on_tile)
        say(streamed.settle_layout(*sample))
        return view.scorer(streamed)
    model = models.load_model(scorer)
    say(settle_layout(model, *sample))
    return view.scorer(ResidentScorer(model, options, on_tile=on_tile))


def _longest(round_: cs.Round, view: View | SpanView, tile_tokens: int) -> int:
    """Tokens of the longest rollout in the teacher's view; at most `tile_tokens` if none can be longer."""
    sampled = round_.manifest
    if isinstance(view, View):
        prompt = sampled.max_prompt_tokens if view.prompts is None else max(map(len, view.prompts))
        if prompt + sampled.max_response_tokens <= tile_tokens:
            return prompt + sampled.max_response_tokens
    return max(longest_of(round_, block, view) for block in np.flatnonzero(round_.rollouts.committed()).tolist())


def _checked_rollouts(rollouts: cs.RolloutBlock, cfg: ModelConfig) -> tuple[list[npt.NDArray[np.int32]], list[int]]:
    """A few rollouts of a block that differ in length, as `sequences` returns them."""
    return sequences(rollouts, choose_checked(rollouts.rollout_length.tolist(), models.pick_device(cfg)))


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


def _read_blocks(round_: cs.Round, blocks: list[int], *, with_candidates: bool) -> TokenBatch:
    """The rollouts of some blocks, for a teacher with the student's candidates and log-probs."""
    candidate_ids = logprobs = None
    if with_candidates:
        student = round_.scores(cs.STUDENT)
        names = ("candidate_ids", "logprobs")
        read = [student.read_arrays(block, names) for block in blocks]
        candidate_ids, logprobs = (np.concatenate([one[name] for one in read]) for name in names)
    return TokenBatch(
        blocks=tuple(round_.rollouts.read(block) for block in blocks),
        candidate_ids=candidate_ids,
        student_logprobs=logprobs,
        keys=tuple((round_.manifest.seed, round_.index, block) for block in blocks),
    )
