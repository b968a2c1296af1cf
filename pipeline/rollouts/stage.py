"""Stage one, sampling: the student answers every prompt, and the cache keeps exactly what it said.

    y_t ~ q(. | x, y_<t),   q = top_p(softmax(z / temperature)),   rollout_logprobs = log q(y_t | x, y_<t)

for `rollouts_per_prompt` responses y of each prompt x. Ids are stored as sampled, the stop token included;
nothing is decoded and tokenised again. A rollout's random numbers are a function of (seed, round, prompt,
sample), a block's work of the block alone, and a block is committed when it is whole: a killed run loses the
block at hand, and the same command does the rest, with the result of an undisturbed run. Where `eval.format` says
what a legal response is, the student's first responses are looked at before anything is sampled for the cache.

Departures from the source: temperature 1 instead of 0.3 by default, since tempered rollouts miss most of the
student's support; a model's own generation defaults (top_k, penalties) never apply, so that q is what the
recipe says.

    redpen rollouts RECIPE --cache CACHE [--launcher ray [--workers N]]
    torchrun --nproc-per-node N -m pipeline rollouts RECIPE --cache CACHE
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

import cache_schema as cs
from pipeline.config import Recipe
from pipeline.console import Bar, progress, say, show, speed, suggest, warn
from pipeline.disk import bytes_per_token, require_free
from pipeline.distributed.blocks import OnProgress, open_for_writing, run_blocks
from pipeline.distributed.ranks import Launcher, Ranks, join_ranks
from pipeline.engines.sampling import PromptBlock, Sampler, Sampling, require_room
from pipeline.errors import ConfigError, ModelNotFoundError
from pipeline.models import load as models
from pipeline.models.identity import created_by
from pipeline.rollouts.format_check import check_entry
from pipeline.text.answers import Checker
from pipeline.text.prompts import load_prompts, prompts_sha256, render_all, template_identity

#: Warn from this share of responses that the length limit cut.
MANY_TRUNCATED = 0.05
# Times that a batch of blocks fills vLLM's engine: while it runs empty at the end of one, it is slow.
_FILLS = 8


def run(
    recipe: Recipe,
    cache_url: str,
    round_index: int | None = None,
    *,
    launcher: Launcher = None,
    n_workers: int | None = None,
) -> int:
    """Sample whatever the round lacks; returns the exit code 0.

    Args:
        round_index: an existing round to complete, or the next number to start it; the latest by default.
        launcher, n_workers: as `join_ranks`.

    Raises:
        PromptError, ModelError, ConfigError: the recipe does not fit its prompts or its model.
        RedpenError: the student does not pass the entry check.
        CacheError: the cache was made otherwise, is locked, or its disk is too small.
    """
    with join_ranks(launcher, n_workers) as ranks, ExitStack() as stack:
        manifest, records, prompts = ranks.broadcast(lambda: _plan(recipe))
        create = functools.partial(cs.create, cache_url, created_by=created_by())
        cache = stack.enter_context(open_for_writing(cache_url, "redpen rollouts", ranks, create))
        index = ranks.broadcast(lambda: cache.start_round(manifest, records, round_index).index)
        round_ = cache.round(index)
        pending = ranks.broadcast(lambda: np.flatnonzero(~round_.rollouts.committed()).tolist())
        if pending:
            _sample(RolloutsWork(recipe, cache_url, index, prompts, ranks.is_main_process), round_, pending, ranks)
        elif ranks.is_main_process:
            show(f"rollouts: {_summary(round_)}; nothing to do")
    if ranks.is_main_process and pending:
        suggest(f"redpen score RECIPE --cache {cache_url}")
    return 0


def _plan(recipe: Recipe) -> tuple[cs.RoundManifest, list[dict[str, Any]], list[npt.NDArray[np.int32]]]:
    """What the round will be recorded as, its prompt records, and their token ids."""
    settings = recipe.rollouts
    _check_architectures(recipe)
    tokenizer = models.load_tokenizer(recipe.student)
    facts = models.model_facts(recipe.student)
    records = load_prompts(recipe.prompts)
    prompts = render_all(records, tokenizer, recipe.prompts, settings.max_prompt_tokens, facts.context)
    require_room(prompts, settings.max_response_tokens, facts.context, "rollouts.max_response_tokens")
    manifest = cs.RoundManifest(
        student=models.model_identity(recipe.student),
        tokenizer=models.tokenizer_identity(tokenizer, recipe.student.model),
        template=template_identity(tokenizer, recipe.prompts),
        stop_token_ids=models.stop_token_ids(recipe.student, tokenizer, settings),
        temperature=settings.temperature,
        top_p=settings.top_p,
        rollouts_per_prompt=settings.rollouts_per_prompt,
        max_prompt_tokens=settings.max_prompt_tokens,
        max_response_tokens=settings.max_response_tokens,
        prompts_per_block=settings.prompts_per_block,
        seed=settings.seed,
        engine=settings.engine,
        prompts_sha256=prompts_sha256(records),
        n_prompts=len(records),
        vocab_size=facts.vocab_size,
        dtype=facts.dtype,
        sampler_settings=_sampler_settings(recipe),
        created_by=created_by(),
    )
    for token in manifest.stop_token_ids:
        if token >= facts.vocab_size:
            raise ConfigError(f"rollouts.stop_token_ids: expected ids below {facts.vocab_size}, got {token}")
    return manifest, records, prompts


def _check_architectures(recipe: Recipe) -> None:
    """Refuse models that could not read what is about to be sampled. A teacher that cannot be had now is left to
    `redpen score`.
    """
    from pipeline.models.architecture import check_architecture

    check_architecture(recipe.student)
    if recipe.rollouts.engine == "vllm":
        from pipeline.streaming.header_check import check_checkpoint

        check_checkpoint(recipe.student)
    for teacher in recipe.teacher:
        if recipe.placement(teacher) in ("resident", "streamed"):
            with contextlib.suppress(ModelNotFoundError):
                check_architecture(teacher)


def _sampler_settings(recipe: Recipe) -> dict[str, Any]:
    """What else the samples depend on. vLLM takes the student unquantised."""
    if recipe.student.quantisation is None or recipe.rollouts.engine == "vllm":
        return {}
    return {"quantisation": recipe.student.quantisation}


@dataclass(frozen=True)
class RolloutsWork:
    """The sampling of a round, for any process that has the cache and the student.

    Attributes:
        enters: check the student before there is any block: of torchrun's ranks the leader does, and the others wait
            for it to open; on a Ray cluster every worker does that opens so early, side by side.
    """

    recipe: Recipe
    cache_url: str
    round_index: int
    prompts: list[npt.NDArray[np.int32]]
    enters: bool

    @property
    def gpus(self) -> int:
        if self.recipe.student.device == "cpu":
            return 0
        return self.recipe.vllm.tensor_parallel_size if self.recipe.rollouts.engine == "vllm" else 1

    def group(self) -> cs.BlockGroup:
        return cs.open(self.cache_url).round(self.round_index).rollouts

    def open(self) -> RolloutsSession:
        return RolloutsSession(self)


class RolloutsSession:
    """The sampler, loaded, and the round that it writes to."""

    def __init__(self, work: RolloutsWork):
        self._round, self._prompts = cs.open(work.cache_url, writable=True).round(work.round_index), work.prompts
        self._on_progress: OnProgress = lambda rollouts, tokens: None
        sampling = Sampling.of(self._round.manifest, self._round.index)
        settings, manifest = work.recipe.rollouts, self._round.manifest
        rollouts = _FILLS * settings.batch_size if settings.engine == "vllm" else 1
        self.batch_blocks = math.ceil(rollouts / (manifest.prompts_per_block * manifest.rollouts_per_prompt))
        enters = work.enters and work.recipe.eval.format is not None and settings.format_check_prompts > 0
        begun = bool(self._round.rollouts.committed().any())
        checker = Checker.of(work.recipe.eval) if enters and not begun else None
        with ExitStack() as stack:
            sampler = _samplers(work.recipe, stack)
            if checker is not None:
                once = functools.partial(sampler, replace(sampling, rollouts_per_prompt=1))
                check_entry(work.recipe, checker, once, work.prompts, models.load_tokenizer(work.recipe.student))
            self._sampler = sampler(sampling, lambda *counts: self._on_progress(*counts))
            self._engine = stack.pop_all()

    def run(self, blocks: Sequence[int], on_progress: OnProgress) -> None:
        """Sample blocks and commit each as soon as it is whole."""
        self._on_progress = on_progress
        prompts = (PromptBlock(b, [(i, self._prompts[i]) for i in self._round.block_prompts(b)]) for b in blocks)
        for block, rollouts, seconds in self._sampler.sample(prompts):
            self._round.rollouts.write(block, rollouts, elapsed_seconds=seconds)

    def close(self) -> None:
        self._engine.close()


def _samplers(recipe: Recipe, stack: ExitStack) -> Callable[[Sampling, OnProgress], Sampler]:
    """Makes samplers of the kind that the recipe asks for, of one student that is loaded now, its engine left to the
    stack. Only what is needed is imported."""
    settings = recipe.rollouts
    if settings.engine == "vllm":
        from pipeline.engines.vllm import Engine
        from pipeline.engines.vllm_sampler import VllmSampler

        longest = settings.max_prompt_tokens + settings.max_response_tokens
        context = models.model_facts(recipe.student).context or longest
        engine = Engine(
            recipe.student, recipe.vllm, max_length=min(longest, context), max_sequences=settings.batch_size
        )
        stack.enter_context(engine)
        return lambda sampling, on_step: VllmSampler(
            engine, sampling, batch_size=settings.batch_size, on_step=on_step
        )
    from pipeline.engines.transformers_sampler import TransformersSampler

    model = models.load_model(recipe.student, attention="sdpa")
    return lambda sampling, on_step: TransformersSampler(
        model, sampling, batch_size=settings.batch_size, on_step=on_step
    )


def _sample(work: RolloutsWork, round_: cs.Round, pending: list[int], ranks: Ranks) -> None:
    """Sample the blocks that are missing and print what the round then holds."""
    manifest, n_blocks = round_.manifest, round_.n_blocks
    if len(pending) < n_blocks:
        say(f"rollouts: {n_blocks - len(pending)} of {n_blocks} blocks are there already")
    total = manifest.n_prompts * manifest.rollouts_per_prompt

    def n_rollouts(blocks: Sequence[int]) -> int:
        return sum(len(round_.block_prompts(block)) for block in blocks) * manifest.rollouts_per_prompt

    n_pending, mine = n_rollouts(pending), n_rollouts(ranks.shard(pending))
    at_most = n_pending * manifest.max_response_tokens * bytes_per_token(cs.ROLLOUT_ARRAYS)
    ranks.broadcast(lambda: require_free(round_.cache.url, at_most, "its rollouts, all at full length,"))

    tokens_sampled, started = 0, time.perf_counter()

    def advance(bar: Bar, rollouts: int, tokens: int) -> None:
        nonlocal tokens_sampled
        tokens_sampled += tokens
        bar.advance(rollouts, note=f"{tokens_sampled / (time.perf_counter() - started):,.0f} tokens/s")

    run_blocks(
        work,
        pending,
        ranks,
        begin=lambda: None,
        state=lambda: f"{round_.rollouts.committed().sum()} of {n_blocks} blocks are committed",
        bar=progress("rollouts", total - n_pending + mine, "rollouts", done=total - n_pending),
        advance=advance,
    )
    seconds = time.perf_counter() - started
    if ranks.is_main_process:
        n_tokens = int(round_.rollouts.commits()["tokens"][pending].sum())
        show(
            f"rollouts: {_summary(round_)}; {n_pending:,} rollouts in {seconds:.1f} s, "
            f"{speed(n_pending / seconds, 'rollouts')}, {speed(n_tokens / seconds, 'tokens')}"
        )


def _summary(round_: cs.Round) -> str:
    """What the finished round holds; warns where it holds many cut responses."""
    names = ("response_length", "finish_reason", "rollout_logprobs")
    blocks = [round_.rollouts.read_arrays(block, names) for block in range(round_.n_blocks)]
    length, reason, logprobs = (np.concatenate([block[name] for block in blocks]) for name in names)
    cut = float((reason == cs.FINISH_LENGTH).mean())
    limit = round_.manifest.max_response_tokens
    if cut > MANY_TRUNCATED:
        warn(
            f"{cut:.0%} of the responses were cut at rollouts.max_response_tokens = {limit}; "
            "what the student would have said after it is never corrected"
        )
    return (
        f"{round_.n_prompts:,} prompts x {round_.manifest.rollouts_per_prompt} in {round_.cache.url} "
        f"round {round_.index}, {length.sum():,} tokens, mean length {length.mean():.1f}, "
        f"{cut:.1%} cut at {limit}, mean log-prob {logprobs.mean(dtype=np.float64):.4g}"
    )
