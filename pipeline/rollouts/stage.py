"""Stage one, sampling: the student answers every prompt, and the cache stores exactly what it sampled.

    y_t ~ q(. | x, y_<t),   q = top_p(softmax(z / temperature)),   rollout_logprobs = log q(y_t | x, y_<t)

for `rollouts_per_prompt` responses y of each prompt x. Ids are stored as sampled, the stop token included; text is
never tokenized again. With `rollouts.environment` a response has several turns (`pipeline.engines.episodes`), and
rollouts in which it fails are left out.

A rollout's random numbers are a function of (seed, round, prompt, sample), a block's content of the block alone, and
a block is committed when it is complete: a killed run loses the block at hand, the same command continues, and the
result is that of an undisturbed run. If `eval.format` defines legal responses, the student's first responses are
checked before anything is written; if no response is right, a warning says why.

Departures from the source: temperature 1 instead of 0.3 by default, since tempered rollouts miss most of the
student's support; a model's own generation defaults (top_k, penalties) never apply, so that q is what the
recipe says.

    redpen rollouts RECIPE --cache CACHE [--launcher ray [--workers N]]
    torchrun --nproc-per-node N -m pipeline rollouts RECIPE --cache CACHE
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
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
from pipeline.engines.episodes import Episodes
from pipeline.engines.sampling import DecodingProgress, PromptBlock, Sampler, Sampling, require_room
from pipeline.errors import ConfigError
from pipeline.models import load as models
from pipeline.models.identity import created_by
from pipeline.models.resolve import ResolvedModel, resolve
from pipeline.rollouts.answer_check import check_held_out, check_round
from pipeline.rollouts.finished import n_left_out, nothing_to_do
from pipeline.rollouts.format_check import check_format
from pipeline.rollouts.model_check import Prompts, check_architectures, check_scoring, check_student, check_teachers
from pipeline.rounds import known_manifests
from pipeline.rounds.manifests import sampled_round
from pipeline.teachers.prompts import check_prompts
from pipeline.text.answers import Checker
from pipeline.text.prompts import load_prompts
from pipeline.text.rendering import render_all
from pipeline.text.teacher_prompt import kept_columns

#: Warn from this fraction of responses that reached the length limit.
MANY_TRUNCATED = 0.05
# Batches of vLLM in one call: its engine is slow at the end of each call, while it empties.
_BATCHES_PER_CALL = 8


def run(
    recipe: Recipe,
    cache_url: str,
    round_index: int | None = None,
    *,
    launcher: Launcher = None,
    n_workers: int | None = None,
) -> int:
    """Sample the blocks that the round lacks; returns the exit code 0.

    Args:
        round_index: an existing round to complete, or the next number to start it; the latest by default.
        launcher, n_workers: as `join_ranks`.

    Raises:
        PromptError, ModelError, ConfigError: the recipe does not fit its prompts or its model.
        RedpenError: the student does not pass the format check.
        CacheError: the cache was made with other settings, is locked, or its disk is too small.
    """
    with join_ranks(launcher, n_workers) as ranks, ExitStack() as stack:
        manifest, records, prompts = ranks.broadcast(lambda: _plan_round(recipe))
        create = functools.partial(cs.create, cache_url, created_by=created_by())
        cache = stack.enter_context(open_for_writing(cache_url, "redpen rollouts", ranks, create))
        index = ranks.broadcast(lambda: cache.start_round(manifest, records, round_index).index)
        round_ = cache.round(index)
        pending = ranks.broadcast(lambda: np.flatnonzero(~round_.rollouts.committed()).tolist())
        if pending:
            work = RolloutsWork(recipe, cache_url, index, prompts, ranks.is_main_process)
            _sample_blocks(work, round_, pending, ranks)
        elif ranks.is_main_process:
            show(nothing_to_do(round_))
    if ranks.is_main_process and pending:
        suggest(f"redpen score RECIPE --cache {cache_url}")
    return 0


def check_settings(recipe: Recipe) -> None:
    """Refuse what `run` refuses before it loads a model: prompts, lengths, architectures, the environment."""
    _plan_round(recipe)


def _plan_round(recipe: Recipe) -> tuple[cs.RoundManifest, list[dict[str, Any]], list[npt.NDArray[np.int32]]]:
    """The round's manifest, its prompt records, and their token ids."""
    before = known_manifests.of_round(recipe)
    settings, student = recipe.rollouts, resolve(recipe.student)
    check_architectures(recipe)
    if student.dtype != "float32" and models.pick_device(recipe.student).type == "cpu":
        warn(
            f'student.dtype is "{student.dtype}" on a CPU: log-probs of the same token then differ by 0.1 nats or so '
            'between sampling and training, as much as a small reverse KL; "float32" is exact, and on a CPU with '
            "bf16 instructions takes up to twice as long"
        )
    tokenizer, context = student.tokenizer, student.context
    records = load_prompts(recipe.prompts, columns=kept_columns(recipe))
    if missing := [name for name in recipe.prompts.columns if not any(name in record for record in records)]:
        warn(f"{recipe.prompts.path}: no prompt has the column {missing[0]!r} of prompts.columns, so nothing is kept")
    prompts = render_all(records, tokenizer, recipe.prompts, settings.max_prompt_tokens, context)
    require_room(prompts, settings.max_response_tokens, context, "rollouts.max_response_tokens")
    check_prompts(recipe, records, recipe.prompts.path)
    if unknown := [token for token in student.stop_token_ids(settings) if token >= student.vocab_size]:
        raise ConfigError(f"rollouts.stop_token_ids: expected ids below {student.vocab_size}, got {unknown[0]}")
    environment = None
    if settings.environment is not None:
        with closing(Episodes(recipe, student, records[0])) as episodes:
            environment = episodes.identity
    manifest = sampled_round(recipe, student, records, environment)
    known_manifests.remember(before, known_manifests.of_round(recipe), manifest)
    return manifest, records, prompts


def _sample_blocks(work: RolloutsWork, round_: cs.Round, pending: list[int], ranks: Ranks) -> None:
    """Sample the missing blocks and print a summary of the round."""
    manifest, n_blocks = round_.manifest, round_.n_blocks
    if len(pending) < n_blocks:
        say(f"rollouts: {n_blocks - len(pending)} of {n_blocks} blocks are there already")
    total = manifest.n_prompts * manifest.rollouts_per_prompt

    def n_rollouts(blocks: Sequence[int]) -> int:
        return sum(len(round_.block_prompts(block)) for block in blocks) * manifest.rollouts_per_prompt

    n_pending, mine = n_rollouts(pending), n_rollouts(ranks.shard(pending))
    at_most = n_pending * manifest.max_response_tokens * bytes_per_token(cs.ROLLOUT_ARRAYS)
    ranks.broadcast(lambda: require_free(round_.cache.url, at_most, "its rollouts, all at full length,"))

    shown: list[DecodingProgress] = []

    def advance(bar: Bar, rollouts: int, tokens: int) -> None:
        if not shown:
            shown.append(DecodingProgress(bar, mine, manifest.max_response_tokens))
        shown[0](rollouts, tokens)

    seconds = run_blocks(
        work,
        pending,
        ranks,
        begin=lambda: None,
        state=lambda: f"{round_.rollouts.committed().sum()} of {n_blocks} blocks are committed",
        bar=progress("rollouts", total - n_pending + mine, "rollouts", done=total - n_pending),
        advance=advance,
    )
    if ranks.is_main_process:
        n_tokens = int(round_.rollouts.commits()["tokens"][pending].sum())
        show(
            f"rollouts: {_summarize(round_)}; {n_pending:,} rollouts in {seconds:.1f} s, "
            f"{speed(n_pending / seconds, 'rollouts')}, {speed(n_tokens / seconds, 'tokens')}"
        )
        check_round(work.recipe, round_, resolve(work.recipe.student))


@dataclass(frozen=True)
class RolloutsWork:
    """The sampling of a round, for any process that can open the cache and load the student.

    Attributes:
        checks: check models, format and answers if the round has no block yet. Of torchrun's ranks only the main
            process does, while the others wait; on a Ray cluster every worker that starts so early does.
    """

    recipe: Recipe
    cache_url: str
    round_index: int
    prompts: list[npt.NDArray[np.int32]]
    checks: bool

    @property
    def gpus(self) -> int:
        if self.recipe.student.device == "cpu":
            return 0
        return self.recipe.vllm.tensor_parallel_size if self.recipe.rollouts.engine == "vllm" else 1

    def group(self) -> cs.BlockGroup[cs.RoundManifest]:
        return cs.open(self.cache_url).round(self.round_index).rollouts

    def open(self) -> RolloutsSession:
        return RolloutsSession(self)


class RolloutsSession:
    """A loaded sampler and the round that it writes to."""

    def __init__(self, work: RolloutsWork):
        self._round, self._prompts = cs.open(work.cache_url, writable=True).round(work.round_index), work.prompts
        self._on_progress: OnProgress = lambda rollouts, tokens: None
        recipe, settings, manifest = work.recipe, work.recipe.rollouts, self._round.manifest
        student, sampling = resolve(recipe.student), Sampling.of(manifest, self._round.index)
        self._episodes: Episodes | None = None
        rollouts = _BATCHES_PER_CALL * settings.batch_size if settings.engine == "vllm" else 1
        self.batch_blocks = math.ceil(rollouts / (manifest.prompts_per_block * manifest.rollouts_per_prompt))
        begun = bool(self._round.rollouts.committed().any())
        is_first = work.checks and not begun
        checks_format = is_first and recipe.eval.format is not None and settings.format_check_prompts > 0
        checker = Checker.of(recipe.eval) if checks_format else None
        if is_first:
            check_teachers(recipe, work.prompts)
        with ExitStack() as stack:
            if settings.environment is not None:
                known = manifest.sampler_settings["environment"]["source_digest"]
                first_record = self._round.prompts[0]
                episodes = Episodes(recipe, student, first_record, has_replied=begun, source_digest=known)
                self._episodes = stack.enter_context(closing(episodes))
            make_sampler = _load_sampler(recipe, student, stack, work.prompts, is_first, self._episodes)
            once = functools.partial(make_sampler, replace(sampling, rollouts_per_prompt=1))
            if is_first and not self._round.index and recipe.eval.path is not None and not _has_answers(self._round):
                check_held_out(recipe, once, student)
            if checker is not None:
                first = self._block(0, range(min(settings.format_check_prompts, len(work.prompts))))
                check_format(recipe, checker, once, first, student.tokenizer)
            if self._episodes is not None:
                self._episodes.report_failures("responses of the checks")
            self._sampler = make_sampler(sampling, lambda *counts: self._on_progress(*counts))
            self._engine = stack.pop_all()

    def run(self, blocks: Sequence[int], on_progress: OnProgress) -> None:
        """Sample blocks and commit each as soon as it is complete."""
        self._on_progress = on_progress
        prompts = (self._block(block, self._round.block_prompts(block)) for block in blocks)
        try:
            for block, rollouts, seconds in self._sampler.sample(prompts):
                self._round.rollouts.write(block, rollouts, elapsed_seconds=seconds)
        finally:
            if self._episodes is not None:
                self._episodes.report_failures()

    def close(self) -> None:
        self._engine.close()

    def _block(self, block: int, numbers: range) -> PromptBlock:
        records = [] if self._episodes is None else [self._round.prompts[i] for i in numbers]
        return PromptBlock(block, [(i, self._prompts[i]) for i in numbers], records)


def _has_answers(round_: cs.Round) -> bool:
    return any("answer" in round_.prompts[index] for index in range(round_.n_prompts))


def _load_sampler(
    recipe: Recipe,
    student: ResolvedModel,
    stack: ExitStack,
    prompts: Prompts,
    is_first: bool,
    episodes: Episodes | None,
) -> Callable[[Sampling, OnProgress], Sampler]:
    """Load the student, and check it if the round is new; returns what makes samplers of it. An engine is closed with
    `stack`.

    Raises `ModelError` for an adapter that vLLM does not apply as training does.
    """
    settings = recipe.rollouts
    if settings.engine == "vllm":
        from pipeline.engines.adapter_check import AdapterEffect
        from pipeline.engines.vllm import Engine
        from pipeline.engines.vllm_sampler import VllmSampler

        longest = settings.max_prompt_tokens + settings.max_response_tokens
        longest = min(longest, student.context or longest)
        if is_first:
            check_scoring(recipe, prompts)
        effect = AdapterEffect.of(recipe.student, prompts)  # before vLLM takes the memory
        engine = Engine(recipe.student, recipe.vllm, max_length=longest, max_sequences=settings.batch_size)
        stack.enter_context(engine)
        if effect is not None:
            effect.check(engine, f"{student.setting('adapter')}: in vLLM it")
        return lambda sampling, on_step: VllmSampler(
            engine, sampling, batch_size=settings.batch_size, on_step=on_step, episodes=episodes
        )
    from pipeline.engines.transformers_sampler import TransformersSampler

    model = models.load_model(student, attention="sampling")
    if is_first:
        check_student(recipe, model, prompts)
    return lambda sampling, on_step: TransformersSampler(
        model, sampling, batch_size=settings.batch_size, on_step=on_step, episodes=episodes
    )


def _summarize(round_: cs.Round) -> str:
    """What the finished round holds; warns if the length limit cut many responses."""
    names = ("response_length", "finish_reason", "rollout_logprobs")
    group = round_.rollouts
    blocks = list(cs.read_ahead(lambda block: group.read_arrays(block, names), range(round_.n_blocks), [group]))
    length, reason, logprobs = (np.concatenate([block[name] for block in blocks]) for name in names)
    own, missing = ~np.isnan(logprobs), n_left_out(round_, len(length))  # an environment's tokens have no log-prob
    cut = float((reason == cs.FINISH_LENGTH).mean())
    limit = round_.manifest.max_response_tokens
    if cut > MANY_TRUNCATED:
        warn(
            f"{cut:.0%} of the responses were cut at rollouts.max_response_tokens = {limit}; training cannot correct "
            "what the student would have said after that"
        )
    return (
        f"{round_.n_prompts:,} prompts x {round_.manifest.rollouts_per_prompt} in {round_.cache.url} "
        f"round {round_.index}, {length.sum():,} tokens, mean length {length.mean():.1f}, "
        f"{cut:.1%} cut at {limit}, mean log-prob {logprobs[own].mean(dtype=np.float64):.4g}"
        + (f", {1 - own.mean():.1%} of the tokens by the environment" if not own.all() else "")
        + (f", {missing:,} rollouts left out" if missing else "")
    )
