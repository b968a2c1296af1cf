"""What a student can do, and how far it is from its teacher, on prompts it was not trained on.

    redpen eval RUN                                       the recipe's student, before and after
    redpen eval MODEL --prompts FILE [--teacher MODEL]    one model
    redpen eval RUN --tasks ifeval,aime24                 also tasks of lm-evaluation-harness

`pipeline.text.answers.Checker` decides which answer is right and which response legal, for the greedy response to
each prompt and for `eval.samples` sampled at `eval.temperature`, with pass@k. Reverse KL is on *fresh* rollouts,
sampled at temperature 1 by the very student that is measured:

    mean_t  sum_{v in C} p_S(v) (log p_S(v) - log p_T(v)) + p_S(rest) (log p_S(rest) - log p_T(rest))

with C the sampled token and the student's likeliest others (`eval.candidates` in all); a lower bound, close at 64.
Before and after draw from the same random numbers, so their difference is known better than either. Intervals are
95 %: see `pipeline.text.answers` and, for reverse KL, `pipeline.rounds.intervals`. One model is in memory at a time:
each student samples, scores its own rollouts and is unloaded, then the teacher scores them all.

A run keeps the figures (eval.json), the fresh rollouts (eval.zarr) and what the trained student thinks of the cached
ones (reread.safetensors), for `redpen report`.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import cache_schema as cs
from pipeline.config import ModelConfig, Recipe, TeacherConfig
from pipeline.console import progress, say, warn
from pipeline.distributed.signals import graceful
from pipeline.engines.heldout import (
    generating,
    greedy_sampling,
    held_out_prompts,
    legal_responses,
    max_response_tokens,
    response_setting,
    right_answers,
    texts_of,
)
from pipeline.engines.resident import ResidentScorer
from pipeline.engines.sampling import PromptBlock, Sampling, require_room
from pipeline.engines.scoring import ScoreOptions, Scorer, TokenBatch
from pipeline.engines.transformers_sampler import TransformersSampler
from pipeline.errors import ConfigError, ModelError, ModelNotFoundError
from pipeline.evaluate.eval_cache import EVAL_CACHE, Keeper
from pipeline.evaluate.job import AFTER, FIGURES, Job, job_of, kept_in
from pipeline.evaluate.reread import REREAD, reread
from pipeline.evaluate.table import show
from pipeline.files import atomic_directory, remove, staged_file, write_atomically
from pipeline.models import load as models
from pipeline.rounds.intervals import mean_per_token
from pipeline.rounds.metrics import scores_reverse_kl
from pipeline.runs.files import replacing
from pipeline.runs.lock import locked, replacing_results
from pipeline.teachers.alignment import View, view_on
from pipeline.teachers.spans import SpanView
from pipeline.text.answers import Checker, Estimate, pass_at, share_right
from pipeline.text.prompts import prompts_sha256

Figures = dict[str, Any]
MakeScorer = Callable[..., Scorer]


@dataclass(frozen=True)
class Responses:
    """What one student did: greedy and sampled responses, and for the KL its fresh rollouts with its own scores.

    Attributes:
        sampling: of the fresh rollouts.
    """

    greedy: cs.RolloutBlock
    sampled: cs.RolloutBlock
    fresh: cs.RolloutBlock
    sampling: Sampling
    scores: cs.ScoreBlock | None


@dataclass(frozen=True)
class Prompts:
    """The prompts of `eval.path`: their records, as the students read them, and as the teacher does."""

    records: list[dict[str, Any]]
    block: PromptBlock
    view: View

    @property
    def with_answer(self) -> list[int]:
        return [i for i, record in enumerate(self.records) if "answer" in record]


def run(
    target: str,
    *,
    prompts: str | None = None,
    teacher: str | None = None,
    tasks: Sequence[str] = (),
    overrides: Sequence[str] = (),
    recipe: str | None = None,
    out: str | os.PathLike[str] | None = None,
) -> int:
    """Measure `target` and print a table; the exit code 0.

    Args:
        target: a run directory, or a model (path, Hub id, toy:student).
        prompts: in place of `eval.path`.
        teacher: in place of the recipe's; a bare model without either gets no reverse KL.
        tasks: in place of `eval.tasks`.
        overrides: `section.key=value`.
        recipe: settings for a bare model.
        out: where the figures go as JSON; default RUN/eval.json, beside what the report shows.

    Raises:
        RedpenError: an unfinished run, no prompts, no answers and no teacher, or models or tasks that cannot be had.
    """
    started = time.perf_counter()
    if tasks:
        if any(override.partition("=")[0].strip() == "eval.tasks" for override in overrides):
            raise ConfigError("--set eval.tasks and --tasks: expected one of them, got both")
        overrides = [*overrides, f"eval.tasks={json.dumps(list(tasks))}"]
    with ExitStack() as held:
        if (in_run := kept_in(target, out)) is not None:
            held.enter_context(locked(in_run, "evaluates"))
        job = job_of(target, prompts, teacher, overrides, recipe, out)
        _measure(job, started, teacher_required=teacher is not None)
    return 0


def _measure(job: Job, started: float, *, teacher_required: bool) -> None:
    """Do the job, and keep what comes of it once all of it has succeeded."""
    settings, checker = job.recipe.eval, Checker.of(job.recipe.eval)
    tokenizer = models.load_tokenizer(next(iter(job.students.values())))
    job, given = _prompts(job, tokenizer, required=teacher_required)
    measure_tasks = _tasks(job, tokenizer)

    responses: dict[str, Responses] = {}
    figures: dict[str, Figures] = {}
    read_again: bytes | None = None
    with ExitStack() as results:
        try:
            for label, cfg in job.students.items():
                model = models.load_model(cfg)
                if given is not None:
                    responses[label] = _respond(job, model, cfg, tokenizer, given.block, label)
                    figures[label] = _figures(responses[label], given.records, tokenizer, checker)
                if settings.tasks:
                    say(f"{label}: {', '.join(settings.tasks)} by lm-evaluation-harness")
                    figures[label] = figures.get(label, {}) | {"tasks": measure_tasks(model)}
                if job.run is not None and label == AFTER:
                    read_again = reread(job.run, model, job.recipe)
                del model
                models.free_memory()
            if given is not None and job.teacher is not None:
                for label, estimate in _reverse_kl(job, job.teacher, responses, given, results).items():
                    # one prompt has no interval, and JSON no NaN
                    figures[label]["reverse_kl"] = {
                        end: None if np.isnan(bound) else bound for end, bound in asdict(estimate).items()
                    }
        except Exception:  # a task that fails, a teacher that does not fit: what was measured before is not lost
            if figures:
                _keep_part(job, given, figures, started)
            raise
        about = _about(job, given) | {"seconds": round(time.perf_counter() - started, 1)}
        try:
            _keep(job, _as_json(about, figures), read_again, results)
        finally:
            show(figures, about)


def _keep(job: Job, figures: str, read_again: bytes | None, results: ExitStack) -> None:
    """Replace what an earlier evaluation left, once all of this one is on disk.

    Args:
        results: puts what the run keeps of the rollouts in its place when it is closed.
    """
    if job.out is None:
        return
    results.enter_context(staged_file(job.out, figures))
    if job.run is None:
        results.close()
        return
    old = [] if job.teacher is not None else [job.run / EVAL_CACHE]
    if read_again is not None:
        results.enter_context(staged_file(job.run / REREAD, read_again))
    else:
        old.append(job.run / REREAD)
    with replacing_results(job.run), graceful(), replacing(job.run, FIGURES, EVAL_CACHE, REREAD):
        for path in old:
            remove(path)
        results.close()


def _keep_part(job: Job, given: Prompts | None, figures: dict[str, Figures], started: float) -> None:
    """Print what was measured before something failed, and write it where that replaces nothing."""
    about = _about(job, given) | {"seconds": round(time.perf_counter() - started, 1)}
    show(figures, about)
    if job.out is None:
        return
    if job.out.exists() or (job.run is not None and (job.run / EVAL_CACHE).exists()):
        warn(f"{job.out} is still that of an earlier evaluation; what was measured now is above")
    else:
        with replacing(job.run, FIGURES) if job.run is not None else nullcontext():
            write_atomically(job.out, _as_json(about, figures))


def _as_json(about: dict[str, Any], figures: dict[str, Figures]) -> str:
    return json.dumps(about | figures, indent=1, allow_nan=False) + "\n"


def _about(job: Job, given: Prompts | None) -> dict[str, Any]:
    """What was measured, for the table and the file."""
    settings, prompts = job.recipe.eval, None
    if given is not None:
        digest = prompts_sha256(given.records)
        prompts = {"path": settings.path, "count": len(given.records), "sha256": digest}
    return {
        "prompts": prompts,
        "answers": 0 if given is None else len(given.with_answer),
        "match": settings.match,
        "format": settings.format,
        "samples": settings.samples,
        "temperature": settings.temperature,
        "teacher": None if job.teacher is None else job.teacher.model,
        "candidates": settings.candidates,
    }


def _prompts(job: Job, tokenizer: PreTrainedTokenizerBase, *, required: bool) -> tuple[Job, Prompts | None]:
    """The prompts to respond to, if any; the job without a teacher that cannot be had and is not `required`."""
    settings, student = job.recipe.eval, next(iter(job.students.values()))
    if settings.path is None:
        return replace(job, teacher=None), None
    records, ids = held_out_prompts(job.recipe, settings.limit, tokenizer, student)
    n_answers = sum("answer" in record for record in records)
    if not n_answers and job.teacher is None:
        raise ConfigError(
            f"{settings.path}: no prompt has an answer, and without --teacher there is nothing to measure"
        )
    if n_answers < len(records):
        warn(f"{settings.path}: {len(records) - n_answers} of {len(records)} prompts have no answer")
    view = View()
    if job.teacher is not None:
        identity, facts = models.tokenizer_identity(tokenizer, student.model), models.model_facts(student)
        size, stops = max(identity.vocab_size, facts.vocab_size), greedy_sampling(job.recipe, student, tokenizer)
        try:
            found = view_on(
                job.recipe, job.teacher, records, identity.digest, size, stops.stop_token_ids, settings.path
            )
            if isinstance(found, SpanView):
                warn(f"{job.teacher.model} cuts text into other tokens, so reverse KL to it is left out")
                job = replace(job, teacher=None)
            else:
                view = found
        except ModelNotFoundError as error:
            if required or not n_answers:
                raise
            # Training may outlive its teacher's files; accuracy needs none.
            warn(f"{error}; reverse KL is left out")
            job = replace(job, teacher=None)
    if job.teacher is not None:
        # what it reads is fresh: sampled after hours that would be lost
        context, longest = models.model_facts(job.teacher).context, max_response_tokens(job.recipe)
        whose = f"the teacher {job.teacher.model}'s"
        require_room(view.prompts or ids, longest, context, response_setting(job.recipe), whose)
    return job, Prompts(records, PromptBlock(0, list(enumerate(ids))), view)


def _tasks(job: Job, tokenizer: PreTrainedTokenizerBase) -> Callable[[PreTrainedModel], Figures]:
    """What measures `eval.tasks`; they are loaded now, before hours are spent."""
    recipe = job.recipe
    if not recipe.eval.tasks:
        return lambda model: {}
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("eval.tasks needs lm-evaluation-harness: pip install 'redpen[eval]'")
    from pipeline.evaluate import harness

    tasks = harness.load_tasks(recipe.eval, models.model_facts(next(iter(job.students.values()))).context)
    return lambda model: harness.measure(model, tokenizer, recipe, tasks)


def _respond(
    job: Job,
    model: PreTrainedModel,
    cfg: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    block: PromptBlock,
    label: str,
) -> Responses:
    """One student's responses, and its reading of the fresh ones."""
    recipe, settings = job.recipe, job.recipe.eval
    greedy = greedy_sampling(recipe, cfg, tokenizer)
    sampled = replace(greedy, temperature=settings.temperature, rollouts_per_prompt=settings.samples)
    fresh = sampled if settings.temperature == 1 else replace(greedy, temperature=1.0)
    wanted = {"greedy": greedy, "sampled": sampled}
    if job.teacher is not None and fresh is not sampled:
        wanted["fresh"] = fresh

    total = sum(len(block.prompts) * sampling.rollouts_per_prompt for sampling in wanted.values())
    with progress(f"{label}: responses", total, "responses") as bar, generating(model):

        def count(ended: int, _: int) -> None:
            bar.advance(ended)

        rollouts = {
            name: TransformersSampler(model, sampling, batch_size=settings.batch_size, on_step=count).sample_block(
                block
            )
            for name, sampling in wanted.items()
        }
    rollouts.setdefault("fresh", rollouts["sampled"])
    scores = None
    if job.teacher is not None:
        known = min(models.tokenizer_identity(tokenizer, cfg.model).vocab_size, models.model_facts(cfg).vocab_size)
        options = _options(recipe, min(settings.candidates, known), known)
        make = functools.partial(ResidentScorer, model)
        scores = _read(make, rollouts["fresh"], None, options, f"{label}: reading")
    return Responses(**rollouts, sampling=fresh, scores=scores)


def _figures(
    done: Responses, records: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, checker: Checker
) -> Figures:
    """What the responses of one student are worth."""
    found: Figures = {}
    answers = [record.get("answer") for record in records]
    with_answer = [i for i, answer in enumerate(answers) if answer is not None]
    texts = {"greedy": texts_of(done.greedy, tokenizer), "sampled": texts_of(done.sampled, tokenizer)}
    if with_answer:
        right = {name: right_answers(said, answers, checker)[with_answer] for name, said in texts.items()}
        found |= {name: asdict(share_right(right_PS)) for name, right_PS in right.items()}
        n_samples = right["sampled"].shape[1]
        found["pass_at"] = {str(2**e): asdict(pass_at(2**e, right["sampled"])) for e in range(n_samples.bit_length())}
    if checker.format is not None:
        found["format"] = asdict(share_right(legal_responses(texts["sampled"], len(records), checker)))
    found["response_tokens"] = float(done.sampled.response_length.mean())
    found["truncated"] = float((done.sampled.finish_reason == cs.FINISH_LENGTH).mean())
    return found


def _reverse_kl(
    job: Job, cfg: TeacherConfig, responses: dict[str, Responses], given: Prompts, results: ExitStack
) -> dict[str, Estimate]:
    """KL(S || T) a token of each student's fresh rollouts, which the run keeps, once `results` is closed, with what
    both think of them."""
    estimates, keeper = {}, None
    if job.run is not None:
        directory = results.enter_context(atomic_directory(job.run / EVAL_CACHE))
        keeper = Keeper(directory, job.recipe, cfg, given.records, given.view)
    read = _reader(job.recipe, cfg)
    for label, done in responses.items():
        student, rollouts = done.scores, done.fresh
        assert student is not None and student.candidate_ids is not None
        teacher = _read(read, rollouts, student.candidate_ids, _options(job.recipe), f"teacher: {label}", given.view)
        kl_T = scores_reverse_kl(student, teacher)
        if unknown := int((~np.isfinite(kl_T)).sum()):
            raise ModelError(
                f"{cfg.model}: {unknown} of {len(kl_T)} tokens of {label} have no finite reverse KL to it, so its "
                "log-probs are not finite; load it in another dtype (teacher.dtype)"
            )
        prompt_T = np.repeat(rollouts.row_prompt, rollouts.response_length)
        totals_P = np.asarray(np.bincount(prompt_T, weights=kl_T, minlength=rollouts.n_prompts), np.float64)
        tokens_P = np.bincount(prompt_T, minlength=rollouts.n_prompts).astype(np.float64)
        estimate = mean_per_token(totals_P, tokens_P)
        estimates[label] = replace(estimate, low=float(np.maximum(estimate.low, 0.0)))  # no divergence is below 0
        if keeper is not None:
            keeper.add(job.students[label], done.sampling, rollouts, student, teacher)
    del read
    models.free_memory()
    return estimates


def _reader(recipe: Recipe, cfg: TeacherConfig) -> MakeScorer:
    """What reads by a teacher that is here: layer by layer where the recipe says so, else whole."""
    if recipe.placement(cfg) == "streamed":
        from pipeline.streaming.streamed import StreamedScorer

        return functools.partial(StreamedScorer, cfg, memory_gib=recipe.score.memory_gib)
    return functools.partial(ResidentScorer, models.load_model(cfg))


def _options(recipe: Recipe, candidates: int = 0, candidate_vocab: int | None = None) -> ScoreOptions:
    return ScoreOptions(
        candidates=candidates,
        candidate_vocab=candidate_vocab,
        tile_tokens=recipe.score.tile_tokens,
        rows_per_chunk=recipe.score.rows_per_chunk,
    )


def _read(
    make: MakeScorer,
    rollouts: cs.RolloutBlock,
    candidate_ids: Any,
    options: ScoreOptions,
    label: str,
    view: View = View(),  # noqa: B008  frozen
) -> cs.ScoreBlock:
    with progress(label, rollouts.n_tokens, "tokens") as bar:
        scorer = view.scorer(make(options=options, on_tile=bar.advance))
        return scorer.compute_logprobs(TokenBatch((rollouts,), candidate_ids))
