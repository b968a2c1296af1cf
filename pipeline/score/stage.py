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

    redpen score RECIPE --cache CACHE [--only NAME] [--launcher ray [--workers N]]
    torchrun --nproc-per-node N -m pipeline score RECIPE --cache CACHE
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

import cache_schema as cs
from pipeline.config import ModelConfig, Recipe, TeacherConfig
from pipeline.console import progress, show, speed, suggest, warn
from pipeline.disk import bytes_per_token, require_free
from pipeline.distributed.blocks import open_for_writing, run_blocks
from pipeline.distributed.ranks import Launcher, Ranks, join_ranks
from pipeline.errors import ConfigError, ModelError
from pipeline.models import load as models
from pipeline.models.identity import IMPORTED, created_by
from pipeline.rounds.metrics import REVERSE_KL_ARRAYS, SamplerGap, scores_reverse_kl
from pipeline.score.session import ScoreWork
from pipeline.teachers.alignment import View, longest_of, template_of, view_of
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
    """Score whatever committed rollouts lack; returns the exit code 0.

    Args:
        only: one scorer's name, "student" or a teacher's.
        round_index: the latest round by default.
        launcher, n_workers: as `join_ranks`.

    Raises:
        ConfigError: `only` names no scorer. ModelError: a model cannot be had, or reads another vocabulary.
        CacheError: not a cache, no rollouts, another student's, made otherwise, locked, no disk space left.
    """
    scorers: dict[str, ModelConfig] = {cs.STUDENT: recipe.student, **{t.name: t for t in recipe.teacher}}
    if only is not None and only not in scorers:
        raise ConfigError(f"--only: expected one of {', '.join(scorers)}, got {only!r}")
    with join_ranks(launcher, n_workers) as ranks, open_for_writing(cache_url, "redpen score", ranks) as cache:
        round_ = cache.round(round_index)
        n_missing = int((~round_.rollouts.committed()).sum())
        if n_missing == round_.n_blocks:
            raise cs.CacheError(
                f"cache {cache_url} round {round_.index}: no block of rollouts is finished; "
                f"run `redpen rollouts RECIPE --cache {cache_url}`"
            )
        # All of them before the first forward: a teacher that does not fit must not be found out hours later.
        jobs = ranks.broadcast(
            lambda: [_job(recipe, round_, name, cfg) for name, cfg in scorers.items() if only in (None, name)]
        )
        for job in jobs:
            if job is not None:
                _score(job, round_, ranks)
                models.free_memory()
        if not ranks.is_main_process:
            return 0
        if n_missing:
            warn(
                f"{n_missing} of {round_.n_blocks} blocks have no rollouts yet; "
                f"run `redpen rollouts RECIPE --cache {cache_url}`, then this again"
            )
        else:
            suggest(f"redpen diagnose {cache_url}, then redpen train RECIPE --cache {cache_url} --run DIR")
    return 0


def _job(recipe: Recipe, round_: cs.Round, name: str, cfg: ModelConfig) -> ScoreWork | None:
    """A scorer's work; None where its finished scores are taken as they are."""
    if name in round_.scorer_names() and round_.scores(name).manifest.engine == IMPORTED:
        show(f"{name}: imported, taken as it is; to score by {cfg.model} as well, give that teacher another name")
        return None
    if name != cs.STUDENT and _is_complete(round_, name, cfg) and not models.is_here(cfg):
        # A cache is replayed long after its teacher has left the disk; that must not fetch it again.
        show(f"{name}: {_summary(round_, name)}; nothing to do (taken as it is: {cfg.model} is not on this machine)")
        return None
    manifest = _manifest(recipe, round_, name, cfg, models.model_facts(cfg))
    if manifest.engine == "vllm" and not (name in round_.scorer_names() and round_.scores(name).committed().all()):
        from pipeline.engines.vllm import import_vllm

        import_vllm()  # better missed now than after the student has read everything
    return ScoreWork(recipe, round_.cache.url, round_.index, name, manifest)


def _score(work: ScoreWork, round_: cs.Round, ranks: Ranks) -> None:
    """Bring one scorer's blocks up to date and print what it thinks."""
    name = work.name
    pending, n_readable = ranks.broadcast(lambda: _pending(work, round_))
    if not len(pending):
        if ranks.is_main_process:
            show(f"{name}: {_summary(round_, name)}; nothing to do")
        return
    n_tokens = round_.rollouts.commits()["tokens"].astype(np.int64)
    n_pending, mine = int(n_tokens[pending].sum()), int(n_tokens[ranks.shard(pending)].sum())
    started = time.perf_counter()
    run_blocks(
        work,
        pending,
        ranks,
        begin=lambda: round_.start_scores(name, work.manifest),
        state=lambda: f"{round_.scores(name).committed().sum()} of {round_.n_blocks} blocks by {name} are committed",
        bar=progress(name, mine + n_readable - n_pending, "tokens", done=n_readable - n_pending),
        advance=lambda bar, rollouts, tokens: bar.advance(tokens),
    )
    seconds = time.perf_counter() - started
    if ranks.is_main_process:
        show(
            f"{name}: {_summary(round_, name)}; {n_pending:,} tokens in {seconds:.1f} s, "
            f"{speed(n_pending / seconds, 'tokens')}"
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
        _require_context(round_, pending, work)
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
    same &= cfg.quantisation in (None, group.manifest.quantisation)
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
    template, partial, spelt = sampled.template, by_engine, False
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
    if isinstance(cfg, TeacherConfig):
        template = template_of(recipe, cfg, sampled.template)
        view = view_of(recipe, cfg, round_)
        partial |= view.leaves_out(sampled.tokenizer.vocab_size)
        spelt = isinstance(view, SpanView)
        template |= {"alignment": "spans"} if spelt else {}
    return cs.ScoresManifest(
        role="student" if is_student else "teacher",
        model=identity,
        tokenizer=tokenizer_identity,
        template=template,
        dtype="served" if placement == "server" else facts.dtype,
        quantisation=facts.quantisation,
        engine=placement if by_engine else "transformers",
        tile_tokens=0 if by_engine else recipe.score.tile_tokens,
        vocab_size=facts.vocab_size,
        candidate_kind=recipe.score.candidate_kind,
        candidates=0 if spelt else recipe.score.candidates,
        # greedy decoding has no log-probs to compare with
        sampling_temperature=(sampled.temperature or 1.0) if is_student else None,
        topk=0 if is_student or spelt else recipe.score.teacher_topk,
        entropy=not (by_engine or spelt),
        partial=partial,
        created_by=created_by(),
    )


def _require_context(round_: cs.Round, blocks: IntArray, work: ScoreWork) -> None:
    """Refuse a model that was not made for rollouts as long as these: it would read them wrongly and say
    nothing.
    """
    sampled, cfg = round_.manifest, work.cfg
    facts, own = models.model_facts(cfg), isinstance(cfg, TeacherConfig) and cfg.renders
    if facts.context is None:
        return
    if not own and sampled.max_prompt_tokens + sampled.max_response_tokens <= facts.context:
        return
    view: View | SpanView = view_of(work.recipe, cfg, round_) if isinstance(cfg, TeacherConfig) else View()
    for block in blocks.tolist():
        longest = longest_of(round_, block, view)
        if longest > facts.context:
            raise ModelError(
                f"{models.setting(cfg, 'model')} = {cfg.model!r}: its context is {facts.context} tokens, "
                f"a rollout of block {block} has {longest}; choose a model with a longer context"
            )


def _summary(round_: cs.Round, name: str) -> str:
    """Means over the scored and trained tokens: what the scorer thinks, and its distance to the student's or, for the
    student itself, to the sampler's. Warns where that gap is more than rounding.
    """
    sampled, is_student = round_.manifest, name == cs.STUDENT
    group, student = round_.scores(name), round_.scores(cs.STUDENT)
    columns: dict[str, list[npt.NDArray[Any]]] = {"mean log-prob": [], "mean entropy": [], "reverse KL": []}
    log_ratios, candidates_told, n_trained, n_told = [], [], 0, 0
    for block in np.flatnonzero(group.committed()).tolist():
        # Not the whole block: the student's candidates alone are most of its bytes.
        rollouts = round_.rollouts.read_arrays(block, ("trained", "rollout_logprobs"))
        arrays = ("logprobs", "entropy", *(("sampling_logprobs",) if is_student else REVERSE_KL_ARRAYS))
        scores = cs.ScoreBlock(**group.read_arrays(block, arrays))
        trained = rollouts["trained"] == 1
        told = trained & np.isfinite(scores.logprobs)
        n_trained, n_told = n_trained + int(trained.sum()), n_told + int(told.sum())
        columns["mean log-prob"].append(scores.logprobs[told])
        if scores.entropy is not None:
            columns["mean entropy"].append(scores.entropy[told])
        if is_student:
            log_ratio = (scores.sampling_logprobs - rollouts["rollout_logprobs"])[told]
            log_ratios.append(log_ratio[np.isfinite(log_ratio)])
        else:
            read_by_student = cs.ScoreBlock(**student.read_arrays(block, REVERSE_KL_ARRAYS))
            columns["reverse KL"].append(scores_reverse_kl(read_by_student, scores)[told])
            if scores.candidate_logprobs is not None:
                candidates_told.append(~np.isnan(scores.candidate_logprobs[told]).ravel())
    means = {name: np.concatenate(parts).mean(dtype=np.float64) for name, parts in columns.items() if parts}
    shown = ", ".join(f"{name} {mean:.4g}" for name, mean in means.items()) + " nats a token"
    if candidates_told and (share := np.concatenate(candidates_told).mean(dtype=np.float64)) < 1:
        shown += f", {share:.1%} of candidates told"
    if n_told < n_trained:
        shown += f", {n_told / n_trained:.1%} of tokens scored"
        shown += (
            " (in spans that both tokenizers share)" if group.manifest.template.get("alignment") == "spans" else ""
        )
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
