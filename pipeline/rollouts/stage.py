"""Stage one, sampling: the student answers every prompt, and the cache keeps exactly what it said.

    y_t ~ q(. | x, y_<t),   q = top_p(softmax(z / temperature)),   rollout_logprobs = log q(y_t | x, y_<t)

for `rollouts_per_prompt` responses y of each prompt x. Ids are stored as sampled, the stop token included;
nothing is decoded and tokenised again. A rollout's random numbers are a function of (seed, round, prompt,
sample), a block's work of the block alone, and a block is committed when it is whole: a killed run loses the
block at hand, and the same command does the rest, with the result of an undisturbed run.

Departures from the source: temperature 1 instead of 0.3 by default, since tempered rollouts miss most of the
student's support; a model's own generation defaults (top_k, penalties) never apply, so that q is what the
recipe says.

    redpen rollouts RECIPE --cache CACHE
    python -m pipeline rollouts RECIPE --cache CACHE
"""

from __future__ import annotations

import time

import numpy as np

import cache_schema as cs
from pipeline import models
from pipeline.config import Recipe
from pipeline.console import progress, say, warn
from pipeline.disk import bytes_per_token, require_free
from pipeline.errors import ConfigError
from pipeline.prompts import load_prompts, prompts_sha256, render_all, template_identity
from pipeline.provenance import created_by
from pipeline.rollouts import PromptBlock, Sampler, Sampling
from pipeline.rollouts.transformers_sampler import TransformersSampler
from pipeline.signals import graceful

#: Warn from this share of responses that the length limit cut.
MANY_TRUNCATED = 0.05


def run(recipe: Recipe, cache_url: str, round_index: int | None = None) -> int:
    """Sample whatever the round lacks; returns the exit code 0.

    Args:
        round_index: an existing round to complete, or the next number to start it; the latest by default.

    Raises:
        PromptError, ModelError, ConfigError: the recipe does not fit its prompts or its model.
        CacheError: the cache was made otherwise, is locked, or its disk is too small.
    """
    settings = recipe.rollouts
    tokenizer = models.load_tokenizer(recipe.student)
    facts = models.model_facts(recipe.student)
    records = load_prompts(recipe.prompts)
    prompts = render_all(records, tokenizer, recipe.prompts, settings.max_prompt_tokens, facts.context)
    longest = max(len(ids) for ids in prompts)
    if facts.context is not None and longest + settings.max_response_tokens > facts.context:
        raise ConfigError(
            f"rollouts.max_response_tokens: expected at most {facts.context - longest} (the student's "
            f"context of {facts.context} tokens less the longest prompt's {longest}), "
            f"got {settings.max_response_tokens}"
        )
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
        created_by=created_by(),
    )
    for token in manifest.stop_token_ids:
        if token >= facts.vocab_size:
            raise ConfigError(f"rollouts.stop_token_ids: expected ids below {facts.vocab_size}, got {token}")

    cache = cs.create(cache_url, created_by=created_by())
    with cache.lock("redpen rollouts"):
        round_ = cache.start_round(manifest, records, round_index)
        pending = np.flatnonzero(~round_.rollouts.committed())
        if not len(pending):
            print(f"rollouts: {_summary(round_)}; nothing to do")
            return 0
        committed = round_.n_blocks - len(pending)
        if committed:
            say(f"rollouts: {committed} of {round_.n_blocks} blocks are there already")
        blocks = [PromptBlock(int(b), [(i, prompts[i]) for i in round_.block_prompts(int(b))]) for b in pending]
        n_pending = sum(len(block.prompts) for block in blocks) * settings.rollouts_per_prompt
        total = manifest.n_prompts * settings.rollouts_per_prompt
        at_most = n_pending * settings.max_response_tokens * bytes_per_token(cs.ROLLOUT_ARRAYS)
        require_free(cache_url, at_most, "its rollouts, all at full length,")

        model = models.load_model(recipe.student, attention="sdpa")
        tokens_sampled, started = 0, time.perf_counter()
        with graceful() as stop, progress("rollouts", total, "rollouts", done=total - n_pending) as bar:

            def on_step(n_ended: int, n_tokens: int) -> None:
                nonlocal tokens_sampled
                stop.check(f"{committed} of {round_.n_blocks} blocks are committed")
                tokens_sampled += n_tokens
                bar.advance(n_ended, note=f"{tokens_sampled / (time.perf_counter() - started):,.0f} tokens/s")

            sampling = Sampling.of(manifest, round_.index)
            sampler: Sampler = TransformersSampler(model, sampling, batch_size=settings.batch_size, on_step=on_step)
            for block, rollouts, seconds in sampler.sample(blocks):
                round_.rollouts.write(block, rollouts, elapsed_seconds=seconds)
                committed += 1
        seconds = time.perf_counter() - started
        print(
            f"rollouts: {_summary(round_)}; {n_pending:,} rollouts now in {seconds:.1f} s, "
            f"{n_pending / seconds:,.0f} rollouts/s, {tokens_sampled / seconds:,.0f} tokens/s"
        )
    print(f"next: redpen score RECIPE --cache {cache_url}")
    return 0


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
