"""Stage one, scoring: what the student and every teacher think of each cached token.

At every response position, with p the model's next-token distribution at temperature 1:

    logprobs = log p(y_t),  entropy = -sum_v p(v) log p(v),  candidate_logprobs = log p(v) for v in C,
    rest_logprob = log sum_{v not in C} p(v)

The student comes first: by the forward that training uses, never the sampler's, since samplers differ from
trainers in the last bits and, under top-p or temperature, in kind. It brings C: the sampled token and its
likeliest others (or draws of its own), K in all. It also gives `sampling_logprobs`, the same forward at the
sampling temperature; its distance to `rollout_logprobs` is the gap between sampler and trainer. Then each
teacher is read at the same C. One model is in memory at a time, and [T, V] never exists: the head runs over
`score.rows_per_chunk` response rows at a time.

Rollouts are packed into tiles whose members follow from their block alone, and a block is committed when it
is whole, so neither a kill nor its place in a batch moves a bit.

Departure from the source: it trains on the sampler's log-probs; here the student's are computed again.

    redpen score RECIPE --cache CACHE [--only NAME]
    python -m pipeline score RECIPE --cache CACHE
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import cache_schema as cs
from pipeline import models, workers
from pipeline.config import ModelConfig, Recipe, TeacherConfig
from pipeline.console import progress, say, warn
from pipeline.disk import bytes_per_token, require_free
from pipeline.errors import ConfigError, ModelError
from pipeline.metrics import SamplerGap, scores_reverse_kl
from pipeline.packing import check_packing
from pipeline.provenance import IMPORTED, created_by
from pipeline.score import ScoreOptions, Scorer, TokenBatch, sequences
from pipeline.score.resident import ResidentScorer

_CHECKED_ROLLOUTS = 4

IntArray = npt.NDArray[np.int64]


def run(
    recipe: Recipe,
    cache_url: str,
    only: str | None = None,
    round_index: int | None = None,
    *,
    launcher: workers.Launcher = None,
    n_workers: int | None = None,
) -> int:
    """Score whatever committed rollouts lack; returns the exit code 0.

    Args:
        only: one scorer's name, "student" or a teacher's.
        round_index: the latest round by default.
        launcher, n_workers: as `workers.team`.

    Raises:
        ConfigError: `only` names no scorer. ModelError: a model cannot be had, or reads another vocabulary.
        CacheError: not a cache, no rollouts, another student's, made otherwise, locked, no disk space left.
    """
    scorers: dict[str, ModelConfig] = {cs.STUDENT: recipe.student, **{t.name: t for t in recipe.teacher}}
    if only is not None and only not in scorers:
        raise ConfigError(f"--only: expected one of {', '.join(scorers)}, got {only!r}")
    with workers.team(launcher, n_workers) as ranks, workers.writing(cache_url, "redpen score", ranks) as cache:
        round_ = cache.round(round_index)
        n_missing = int((~round_.rollouts.committed()).sum())
        if n_missing == round_.n_blocks:
            raise cs.CacheError(
                f"cache {cache_url} round {round_.index}: no block of rollouts is finished; "
                f"run `redpen rollouts RECIPE --cache {cache_url}`"
            )
        # All of them before the first forward: a teacher that does not fit must not be found out hours later.
        jobs = ranks.agree(
            lambda: [_job(recipe, round_, name, cfg) for name, cfg in scorers.items() if only in (None, name)]
        )
        for job in jobs:
            if job is not None:
                _score(job, round_, ranks)
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
        if not ranks.leads:
            return 0
        if n_missing:
            warn(
                f"{n_missing} of {round_.n_blocks} blocks have no rollouts yet; "
                f"run `redpen rollouts RECIPE --cache {cache_url}`, then this again"
            )
        else:
            print(f"next: redpen train RECIPE --cache {cache_url} --run DIR")
    return 0


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
        self._on_progress: workers.OnProgress = lambda rollouts, tokens: None
        with ExitStack() as stack:
            self._scorer = _scorer(work, self._round, lambda tokens: self._on_progress(0, tokens), stack)
            self._engine = stack.pop_all()
        self._n_tokens = self._round.rollouts.commits()["tokens"].astype(np.int64)
        self.batch_blocks = math.ceil(self._scorer.batch_tokens / self._n_tokens[self._n_tokens > 0].mean())

    def run(self, blocks: Sequence[int], on_progress: workers.OnProgress) -> None:
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
    recipe, cfg, options = work.recipe, work.cfg, _options(work.recipe, work.manifest)
    if recipe.placement(cfg) in ("vllm", "server"):
        from pipeline.score.engines import open_engine

        assert isinstance(cfg, TeacherConfig)
        return open_engine(recipe, cfg, round_, options, on_tile, stack)
    readable = np.flatnonzero(round_.rollouts.committed())
    sample = _shortest(round_.rollouts.read(int(readable[0])))
    if recipe.placement(cfg) == "streamed":
        from pipeline.score.streamed import StreamedScorer

        streamed = StreamedScorer(cfg, options, memory_gib=recipe.score.memory_gib, on_tile=on_tile)
        _say_packing(streamed.check_packing(*sample))
        return streamed
    model = models.load_model(cfg)
    _say_packing(check_packing(model, *sample))
    return ResidentScorer(model, options, on_tile=on_tile)


def _job(recipe: Recipe, round_: cs.Round, name: str, cfg: ModelConfig) -> ScoreWork | None:
    """A scorer's work; None where its finished scores are taken as they are."""
    if name in round_.scorer_names() and round_.scores(name).manifest.engine == IMPORTED:
        print(f"{name}: imported, taken as it is; to score by {cfg.model} as well, give that teacher another name")
        return None
    if name != cs.STUDENT and _is_complete(round_, name, cfg) and not models.is_here(cfg):
        # A cache is replayed long after its teacher has left the disk; that must not fetch it again.
        print(f"{name}: {_summary(round_, name)}; nothing to do (taken as it is: {cfg.model} is not on this machine)")
        return None
    manifest = _manifest(recipe, round_, name, cfg, models.model_facts(cfg))
    if manifest.engine == "vllm" and not (name in round_.scorer_names() and round_.scores(name).committed().all()):
        from pipeline.vllm_engine import import_vllm

        import_vllm()  # better missed now than after the student has read everything
    return ScoreWork(recipe, round_.cache.url, round_.index, name, manifest)


def _score(work: ScoreWork, round_: cs.Round, ranks: workers.Team) -> None:
    """Bring one scorer's blocks up to date and print what it thinks."""
    name = work.name
    pending, n_readable = ranks.agree(lambda: _pending(work, round_))
    if not len(pending):
        if ranks.leads:
            print(f"{name}: {_summary(round_, name)}; nothing to do")
        return
    n_tokens = round_.rollouts.commits()["tokens"].astype(np.int64)
    n_pending, mine = int(n_tokens[pending].sum()), int(n_tokens[ranks.share(pending)].sum())
    started = time.perf_counter()
    workers.run(
        work,
        pending,
        ranks,
        begin=lambda: round_.start_scores(name, work.manifest),
        state=lambda: f"{round_.scores(name).committed().sum()} of {round_.n_blocks} blocks by {name} are committed",
        bar=progress(name, mine + n_readable - n_pending, "tokens", done=n_readable - n_pending),
        advance=lambda bar, rollouts, tokens: bar.advance(tokens),
    )
    seconds = time.perf_counter() - started
    if ranks.leads:
        print(
            f"{name}: {_summary(round_, name)}; {n_pending:,} tokens now in {seconds:.1f} s, "
            f"{n_pending / seconds:,.0f} tokens/s"
        )


def _pending(work: ScoreWork, round_: cs.Round) -> tuple[list[int], int]:
    """Blocks to score, and the response tokens of all that can be; refuses what would fail later."""
    name, manifest = work.name, work.manifest
    group = round_.start_scores(name, manifest) if name in round_.scorer_names() else None
    readable = round_.rollouts.committed()
    if name != cs.STUDENT:
        have_candidates = round_.scores(cs.STUDENT).committed()
        if n_waiting := int((readable & ~have_candidates).sum()):
            warn(f"{name}: {n_waiting} blocks wait for the student's scores, which bring the candidates")
        readable &= have_candidates
        if not readable.any():
            raise cs.CacheError(
                f"cache {round_.cache.url} round {round_.index}: the student has scored no block yet; run "
                f"`redpen score RECIPE --cache {round_.cache.url} --only {cs.STUDENT}` first"
            )
    done = np.zeros_like(readable) if group is None else group.committed()
    pending = np.flatnonzero(readable & ~done)
    n_tokens = round_.rollouts.commits()["tokens"].astype(np.int64)
    if len(pending):
        sizes = {"candidate": manifest.candidates, "topk": manifest.topk}
        needed = int(n_tokens[pending].sum()) * bytes_per_token(manifest.arrays(), sizes)
        require_free(round_.cache.url, needed, f"scores by {name}")
        _require_context(round_, pending, work.cfg, models.model_facts(work.cfg))
    return pending.tolist(), int(n_tokens[readable].sum())


def _is_complete(round_: cs.Round, name: str, cfg: ModelConfig) -> bool:
    """Whether every block is scored by a model of this name."""
    if name not in round_.scorer_names():
        return False
    group = round_.scores(name)
    assert isinstance(group.manifest, cs.ScoresManifest)
    cached = group.manifest.model
    same = cached.name == cfg.model and cfg.revision in (None, cached.revision)
    same &= (cached.adapter_digest is None) == (cfg.adapter is None)
    same &= group.manifest.engine == "server" or cfg.dtype in ("auto", group.manifest.dtype)
    return same and bool(group.committed().all())


def _manifest(
    recipe: Recipe, round_: cs.Round, name: str, cfg: ModelConfig, facts: models.ModelFacts
) -> cs.ScoresManifest:
    """Who scores how. Refuses a student that did not sample the round, a teacher that reads other tokens."""
    sampled, is_student = round_.manifest, name == cs.STUDENT
    tokenizer = models.load_tokenizer(cfg)
    tokenizer_identity, placement = models.tokenizer_identity(tokenizer, cfg.model), recipe.placement(cfg)
    by_engine = placement in ("vllm", "server")
    if placement == "server":
        assert isinstance(cfg, TeacherConfig)
        identity = models.served_identity(cfg)
    else:
        identity = models.model_identity(cfg)
    if is_student:
        differing = sampled.differences(replace(sampled, student=identity, tokenizer=tokenizer_identity))
        if differing:
            raise cs.ProvenanceError(
                f"cache {round_.cache.url} round {round_.index}: sampled by another student "
                f"({'; '.join(differing)}); set [student] back, or sample a round by this one with "
                f"`redpen rollouts RECIPE --round {round_.index + 1}`"
            )
        known = min(facts.vocab_size, tokenizer_identity.vocab_size)
        if recipe.score.candidates > known:
            raise ConfigError(
                f"score.candidates: expected at most {known}, the student's vocabulary, got {recipe.score.candidates}"
            )
    elif tokenizer_identity.digest != sampled.tokenizer.digest:
        models.check_same_vocabulary(
            models.load_tokenizer(recipe.student), tokenizer, (recipe.student.model, cfg.model)
        )
    return cs.ScoresManifest(
        role="student" if is_student else "teacher",
        model=identity,
        tokenizer=tokenizer_identity,
        template=sampled.template,
        dtype="served" if placement == "server" else facts.dtype,
        quantisation=facts.quantisation,
        engine=placement if by_engine else "transformers",
        tile_tokens=0 if by_engine else recipe.score.tile_tokens,
        vocab_size=facts.vocab_size,
        candidate_kind=recipe.score.candidate_kind,
        candidates=recipe.score.candidates,
        # greedy decoding has no log-probs to compare with
        sampling_temperature=(sampled.temperature or 1.0) if is_student else None,
        topk=0 if is_student else recipe.score.teacher_topk,
        entropy=not by_engine,
        partial=by_engine,
        created_by=created_by(),
    )


def _options(recipe: Recipe, manifest: cs.ScoresManifest) -> ScoreOptions:
    return ScoreOptions(
        candidates=manifest.candidates,
        candidate_kind=manifest.candidate_kind,
        candidate_vocab=manifest.tokenizer.vocab_size,
        sampling_temperature=manifest.sampling_temperature,
        topk=manifest.topk,
        tile_tokens=manifest.tile_tokens,
        rows_per_chunk=recipe.score.rows_per_chunk,
    )


def _require_context(round_: cs.Round, blocks: IntArray, cfg: ModelConfig, facts: models.ModelFacts) -> None:
    """Refuse a model that was not made for rollouts as long as these: it would read them wrongly and say
    nothing.
    """
    sampled = round_.manifest
    if facts.context is None or sampled.max_prompt_tokens + sampled.max_response_tokens <= facts.context:
        return
    names = ("prompt_length", "row_prompt", "response_length")
    for block in blocks.tolist():
        rows = round_.rollouts.read_arrays(block, names)
        longest = int((rows["prompt_length"][rows["row_prompt"]] + rows["response_length"]).max())
        if longest > facts.context:
            raise ModelError(
                f"{models.setting(cfg, 'model')} = {cfg.model!r}: its context is {facts.context} tokens, "
                f"a rollout of block {block} has {longest}; choose a model with a longer context"
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
    candidate_ids = None
    if with_candidates:
        student = round_.scores(cs.STUDENT)
        candidate_ids = np.concatenate([student.read_arrays(b, ["candidate_ids"])["candidate_ids"] for b in blocks])
    return TokenBatch(
        blocks=tuple(round_.rollouts.read(block) for block in blocks),
        candidate_ids=candidate_ids,
        keys=tuple((round_.manifest.seed, round_.index, block) for block in blocks),
    )


def _summary(round_: cs.Round, name: str) -> str:
    """Means over the scored and trained tokens: what the scorer thinks, and its distance to the student's or, for the
    student itself, to the sampler's. Warns where that gap is more than rounding.
    """
    sampled, is_student = round_.manifest, name == cs.STUDENT
    group, student = round_.scores(name), round_.scores(cs.STUDENT)
    columns: dict[str, list[npt.NDArray[Any]]] = {"mean log-prob": [], "mean entropy": [], "reverse KL": []}
    log_ratios, candidates_told, n_unscored = [], [], 0
    for block in np.flatnonzero(group.committed()).tolist():
        rollouts, scores = round_.rollouts.read(block), group.read(block)
        told = (rollouts.trained == 1) & np.isfinite(scores.logprobs)
        n_unscored += int((rollouts.trained == 1).sum() - told.sum())
        columns["mean log-prob"].append(scores.logprobs[told])
        if scores.entropy is not None:
            columns["mean entropy"].append(scores.entropy[told])
        if is_student:
            log_ratio = (scores.sampling_logprobs - rollouts.rollout_logprobs)[told]
            log_ratios.append(log_ratio[np.isfinite(log_ratio)])
        else:
            columns["reverse KL"].append(scores_reverse_kl(student.read(block), scores)[told])
            if scores.candidate_logprobs is not None:
                candidates_told.append(~np.isnan(scores.candidate_logprobs[told]).ravel())
    means = {name: np.concatenate(parts).mean(dtype=np.float64) for name, parts in columns.items() if parts}
    shown = ", ".join(f"{name} {mean:.4g}" for name, mean in means.items()) + " nats a token"
    if candidates_told and (share := np.concatenate(candidates_told).mean(dtype=np.float64)) < 1:
        shown += f", {share:.1%} of candidates told"
    if n_unscored:
        shown += f", {n_unscored:,} tokens not scored"
    if is_student and sampled.temperature > 0 and sampled.top_p == 1:
        gap = SamplerGap.of(np.concatenate(log_ratios))
        if gap is not None:
            shown += f"; trainer/sampler ratio: {gap}"
            if gap.is_wide:
                warn(
                    f"the sampler ({sampled.engine}) and the training forward disagree more than rounding explains "
                    f"({gap}); importance ratios start from the training forward's log-probs, but look at dtype, "
                    "attention and quantisation of both"
                )
    return shown
