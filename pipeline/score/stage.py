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
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

import cache_schema as cs
from pipeline import models
from pipeline.config import ModelConfig, Recipe
from pipeline.console import progress, say, warn
from pipeline.disk import bytes_per_token, require_free
from pipeline.errors import ConfigError, ModelError
from pipeline.metrics import reverse_kl
from pipeline.packing import check_packing
from pipeline.provenance import created_by
from pipeline.score import ScoreOptions, Scorer, TokenBatch, sequences
from pipeline.score.resident import ResidentScorer
from pipeline.signals import graceful

_CHECKED_ROLLOUTS = 4

IntArray = npt.NDArray[np.int64]


def run(recipe: Recipe, cache_url: str, only: str | None = None, round_index: int | None = None) -> int:
    """Score whatever committed rollouts lack; returns the exit code 0.

    Args:
        only: one scorer's name, "student" or a teacher's.
        round_index: the latest round by default.

    Raises:
        ConfigError: `only` names no scorer. ModelError: a model cannot be had, or reads another vocabulary.
        CacheError: not a cache, no rollouts, another student's, made otherwise, locked, no disk space left.
    """
    scorers: dict[str, ModelConfig] = {cs.STUDENT: recipe.student, **{t.name: t for t in recipe.teacher}}
    if only is not None and only not in scorers:
        raise ConfigError(f"--only: expected one of {', '.join(scorers)}, got {only!r}")
    cache = cs.open(cache_url, writable=True)
    with cache.lock("redpen score"):
        round_ = cache.round(round_index)
        n_missing = int((~round_.rollouts.committed()).sum())
        if n_missing == round_.n_blocks:
            raise cs.CacheError(
                f"cache {cache_url} round {round_.index}: no block of rollouts is finished; "
                f"run `redpen rollouts RECIPE --cache {cache_url}`"
            )
        # All of them before the first forward: a teacher that does not fit must not be found out hours later.
        plans = [_plan(recipe, round_, name, cfg) for name, cfg in scorers.items() if only in (None, name)]
        for plan in plans:
            if plan is not None:
                _score(recipe, round_, *plan)
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
        if n_missing:
            warn(
                f"{n_missing} of {round_.n_blocks} blocks have no rollouts yet; "
                f"run `redpen rollouts RECIPE --cache {cache_url}`, then this again"
            )
        else:
            print(f"next: redpen train RECIPE --cache {cache_url} --run DIR")
    return 0


def _plan(
    recipe: Recipe, round_: cs.Round, name: str, cfg: ModelConfig
) -> tuple[str, ModelConfig, models.ModelFacts, cs.ScoresManifest] | None:
    """What a scorer will be recorded as; None where its finished scores are taken as they are."""
    if name != cs.STUDENT and _is_complete(round_, name, cfg) and not models.is_here(cfg):
        # A cache is replayed long after its teacher has left the disk; that must not fetch it again.
        print(f"{name}: {_summary(round_, name)}; nothing to do (taken as it is: {cfg.model} is not on this machine)")
        return None
    facts = models.model_facts(cfg)
    return name, cfg, facts, _manifest(recipe, round_, name, cfg, facts)


def _score(
    recipe: Recipe,
    round_: cs.Round,
    name: str,
    cfg: ModelConfig,
    facts: models.ModelFacts,
    manifest: cs.ScoresManifest,
) -> None:
    """Bring one scorer's blocks up to date and print what it thinks."""
    is_student = name == cs.STUDENT
    group = round_.start_scores(name, manifest) if name in round_.scorer_names() else None
    readable = round_.rollouts.committed()
    if not is_student:
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
    if not len(pending):
        print(f"{name}: {_summary(round_, name)}; nothing to do")
        return

    n_tokens = round_.rollouts.commits()["tokens"].astype(np.int64)
    n_readable, n_pending = int(n_tokens[readable].sum()), int(n_tokens[pending].sum())
    sizes = {"candidate": manifest.candidates, "topk": manifest.topk}
    require_free(round_.cache.url, n_pending * bytes_per_token(manifest.arrays(), sizes), f"scores by {name}")
    _require_context(round_, pending, cfg, facts)
    model = models.load_model(cfg)
    _check_packing(model, round_.rollouts.read(int(pending[0])))
    # only now: a model that could not be used leaves no trace in the cache
    group = group or round_.start_scores(name, manifest)
    committed = int(done.sum())
    started = time.perf_counter()
    already = n_readable - n_pending
    with graceful() as stop, progress(name, n_readable, "tokens", done=already) as bar:

        def on_tile(n_read: int) -> None:
            stop.check(f"{committed} of {round_.n_blocks} blocks by {name} are committed")
            bar.advance(n_read)

        scorer: Scorer = ResidentScorer(model, _options(recipe, manifest), on_tile=on_tile)
        for blocks in _batches(pending, n_tokens, scorer.batch_tokens):
            batch_started = time.perf_counter()
            batch = _read(round_, blocks, with_candidates=not is_student)
            scores = batch.split(scorer.compute_logprobs(batch))
            seconds = (time.perf_counter() - batch_started) / len(blocks)
            for block, record in zip(blocks, scores, strict=True):
                group.write(block, record, elapsed_seconds=seconds)
                committed += 1
    seconds = time.perf_counter() - started
    print(
        f"{name}: {_summary(round_, name)}; {n_pending:,} tokens now in {seconds:.1f} s, "
        f"{n_pending / seconds:,.0f} tokens/s"
    )


def _is_complete(round_: cs.Round, name: str, cfg: ModelConfig) -> bool:
    """Whether every block is scored by a model of this name."""
    if name not in round_.scorer_names():
        return False
    group = round_.scores(name)
    assert isinstance(group.manifest, cs.ScoresManifest)
    cached = group.manifest.model
    same = cached.name == cfg.model and cfg.revision in (None, cached.revision)
    same &= (cached.adapter_digest is None) == (cfg.adapter is None) and cfg.dtype in ("auto", group.manifest.dtype)
    return same and bool(group.committed().all())


def _manifest(
    recipe: Recipe, round_: cs.Round, name: str, cfg: ModelConfig, facts: models.ModelFacts
) -> cs.ScoresManifest:
    """Who scores how. Refuses a student that did not sample the round, a teacher that reads other tokens."""
    sampled, is_student = round_.manifest, name == cs.STUDENT
    tokenizer = models.load_tokenizer(cfg)
    tokenizer_identity, identity = models.tokenizer_identity(tokenizer, cfg.model), models.model_identity(cfg)
    if is_student:
        differing = sampled.differences(replace(sampled, student=identity, tokenizer=tokenizer_identity))
        if differing:
            raise cs.ProvenanceError(
                f"cache {round_.cache.url} round {round_.index}: sampled by another student "
                f"({'; '.join(differing)}); set [student] back, or sample a round by this one with "
                f"`redpen rollouts RECIPE --round {round_.index + 1}`"
            )
        if recipe.score.candidates > facts.vocab_size:
            raise ConfigError(
                f"score.candidates: expected at most {facts.vocab_size}, the student's vocabulary, "
                f"got {recipe.score.candidates}"
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
        dtype=facts.dtype,
        quantisation=facts.quantisation,
        engine="transformers",
        tile_tokens=recipe.score.tile_tokens,
        vocab_size=facts.vocab_size,
        candidate_kind=recipe.score.candidate_kind,
        candidates=recipe.score.candidates,
        # greedy decoding has no log-probs to compare with
        sampling_temperature=(sampled.temperature or 1.0) if is_student else None,
        topk=0 if is_student else recipe.score.teacher_topk,
        created_by=created_by(),
    )


def _options(recipe: Recipe, manifest: cs.ScoresManifest) -> ScoreOptions:
    return ScoreOptions(
        candidates=manifest.candidates,
        candidate_kind=manifest.candidate_kind,
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


def _check_packing(model: PreTrainedModel, rollouts: cs.RolloutBlock) -> None:
    """Packed log-probs are those of each rollout alone, on a few short rollouts. Raises `ModelError`."""
    lengths = rollouts.prompt_length[rollouts.row_prompt] + rollouts.response_length
    shortest = np.argsort(lengths, kind="stable")[:_CHECKED_ROLLOUTS]
    difference = check_packing(model, *sequences(rollouts, shortest.tolist()))
    say(f"packing: a rollout among others has the log-probs it has alone, to {difference:.1g} nats")


def _batches(blocks: IntArray, n_tokens: IntArray, batch_tokens: int) -> Iterator[list[int]]:
    """Consecutive blocks, as many as it takes to reach `batch_tokens` response tokens."""
    batch: list[int] = []
    for block in blocks.tolist():
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
    """Means over the scored and trained tokens, nats: what the scorer thinks, and its distance to others."""
    sampled, is_student = round_.manifest, name == cs.STUDENT
    group, student = round_.scores(name), round_.scores(cs.STUDENT)
    logprobs, entropy, distance = [], [], []
    for block in np.flatnonzero(group.committed()).tolist():
        rollouts, scores = round_.rollouts.read(block), group.read(block)
        trained = rollouts.trained == 1
        logprobs.append(scores.logprobs[trained])
        entropy.append(scores.entropy[trained])
        if is_student:
            gap = np.abs(rollouts.rollout_logprobs - scores.sampling_logprobs)[trained]
            distance.append(gap[np.isfinite(gap)])
        else:
            own = student.read(block)
            distance.append(
                reverse_kl(
                    own.candidate_logprobs,
                    own.rest_logprob,
                    scores.candidate_logprobs,
                    scores.rest_logprob,
                    own.candidate_ids,
                )[trained]
            )
    parts = {"mean log-prob": logprobs, "mean entropy": entropy}
    if not is_student:
        parts["reverse KL"] = distance
    elif sampled.temperature > 0 and sampled.top_p == 1:
        parts["mean |sampler - trainer|"] = distance
    means = {key: np.concatenate(values) for key, values in parts.items()}
    shown = [f"{key} {values.mean(dtype=np.float64):.4g}" for key, values in means.items() if len(values)]
    return f"{', '.join(shown)} nats a token"
