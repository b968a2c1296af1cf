"""Evaluation: what a student can do, and how far it is from its teacher, on prompts it was not trained on.

    redpen eval RUN                                       the recipe's student, before and after
    redpen eval MODEL --prompts FILE [--teacher MODEL]    one model
    redpen eval RUN --tasks ifeval,aime24                 also tasks of lm-evaluation-harness

`pipeline.text.answers.Checker` decides which answers are right and which responses legal, of the greedy response to
each prompt with an answer and of `eval.samples` sampled at `eval.temperature`, with pass@k. Reverse KL is on *fresh*
rollouts, sampled at temperature 1 by the student that is measured:

    mean_t  sum_{v in C} p_S(v) (log p_S(v) - log p_T(v)) + p_S(rest) (log p_S(rest) - log p_T(rest))

with C the sampled token and the student's likeliest others (`eval.candidates` in all); a lower bound, close at 64.
Before and after use the same random numbers, so their difference is known better than either. Intervals are
95 %: see `pipeline.text.answers` and, for reverse KL, `pipeline.rounds.intervals`. One model is in memory at a time:
each student samples, scores its own rollouts and is unloaded, then the teacher scores them all.

A run keeps the figures (eval.json), the fresh rollouts (eval.zarr) and the trained student's scores of the cached
rollouts (reread.safetensors), for `redpen report`.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import cache_schema as cs
from pipeline.config import Recipe
from pipeline.console import progress, say, suggest, warn
from pipeline.distributed.signals import graceful
from pipeline.engines.episodes import Episodes
from pipeline.engines.heldout import (
    episodes_of,
    generating,
    greedy_sampling,
    held_out_prompts,
    legal_responses,
    max_response_tokens,
    response_setting,
    right_answers,
    using,
)
from pipeline.engines.resident import ResidentScorer
from pipeline.engines.sampling import DecodingProgress, PromptBlock, Sampling, require_room
from pipeline.engines.scoring import ScoreOptions, Scorer, TokenBatch
from pipeline.engines.transformers_sampler import TransformersSampler
from pipeline.environment import install_hint
from pipeline.errors import ConfigError, ModelError, ModelNotFoundError
from pipeline.evaluate.eval_cache import EvalCacheWriter
from pipeline.evaluate.examples import Responses, show_responses
from pipeline.evaluate.job import AFTER, EvalJob, plan_eval, run_of
from pipeline.evaluate.reread import reread
from pipeline.evaluate.table import show
from pipeline.files import atomic_directory, remove, staged_file, write_atomically
from pipeline.models import load as models
from pipeline.models.resolve import ResolvedModel, resolve
from pipeline.rounds.intervals import mean_per_token
from pipeline.rounds.metrics import scores_reverse_kl
from pipeline.runs.files import EVAL_CACHE, EVAL_FIGURES, REREAD, replacing
from pipeline.runs.lock import locked, replacing_results
from pipeline.teachers.alignment import View, view_on
from pipeline.teachers.spans import SpanView
from pipeline.text.answers import Checker, Estimate, answers_of, fraction_right, pass_at
from pipeline.text.detokenize import response_texts
from pipeline.text.teacher_prompt import MissingColumnError

Figures = dict[str, Any]
MakeScorer = Callable[..., Scorer]


@dataclass(frozen=True)
class EvalPrompts:
    """The prompts of `eval.path`: their records, as the students see them, and as the teacher does."""

    records: list[dict[str, Any]]
    block: PromptBlock
    view: View
    episodes: Episodes | None

    @cached_property
    def answers(self) -> list[list[str] | None]:
        """The accepted answers of every prompt."""
        return [answers_of(record) for record in self.records]

    @cached_property
    def with_answer(self) -> list[int]:
        """Numbers of the prompts with an answer."""
        return [index for index, accepted in enumerate(self.answers) if accepted is not None]


@dataclass(frozen=True)
class StudentResponses:
    """One student's greedy and sampled responses, and for the reverse KL its fresh rollouts with its own scores.

    Attributes:
        greedy: to the prompts with an answer; None if there are none.
        sampling: of the fresh rollouts.
    """

    greedy: cs.RolloutBlock | None
    sampled: cs.RolloutBlock
    fresh: cs.RolloutBlock
    sampling: Sampling
    scores: cs.ScoreBlock | None


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
    """Measure `target` and print a table; returns the exit code 0.

    Args:
        target: a run directory, or a model (path, Hub id, toy:student).
        prompts: in place of `eval.path`.
        teacher: in place of the recipe's; a bare model without either gets no reverse KL.
        tasks: in place of `eval.tasks`.
        overrides: `section.key=value`.
        recipe: settings and teacher for a bare model.
        out: the file for the figures (JSON); default RUN/eval.json.

    Raises:
        RedpenError: an unfinished run, no prompts, or models or tasks that are not available.
    """
    started = time.perf_counter()
    if tasks:
        if any(override.partition("=")[0].strip() == "eval.tasks" for override in overrides):
            raise ConfigError("--set eval.tasks and --tasks: expected one of them, got both")
        overrides = [*overrides, f"eval.tasks={json.dumps(list(tasks))}"]
    with ExitStack() as stack:
        if (run_dir := run_of(target, out)) is not None:
            stack.enter_context(locked(run_dir, "evaluates"))
        job = plan_eval(target, prompts, teacher, overrides, recipe, out)
        _measure(job, started, teacher_required=teacher is not None)
        if run_dir is not None:
            suggest(f"redpen report {run_dir}, for a page of the curves and of every response, before and after")
    return 0


def _measure(job: EvalJob, started: float, *, teacher_required: bool) -> None:
    """Measure every student, then compare all with the teacher; the results are written together at the end."""
    settings, checker = job.recipe.eval, Checker.of(job.recipe.eval)
    students = {label: resolve(cfg) for label, cfg in job.students.items()}
    student = next(iter(students.values()))  # all have the same tokenizer and context
    teacher = None if job.teacher is None else resolve(job.teacher)
    job, prompts = _load_prompts(job, student, teacher, teacher_required=teacher_required)
    measure_tasks = _load_tasks(job.recipe, student)

    responses: dict[str, StudentResponses] = {}
    figures: dict[str, Figures] = {}
    shown: dict[str, Responses] = {}
    reread_file: bytes | None = None
    with ExitStack() as results:
        try:
            for label, source in students.items():
                model = models.load_model(source)
                if prompts is not None:
                    responses[label] = _respond(job, model, source, prompts, label)
                    figures[label], shown[label] = _grade(responses[label], prompts, student.tokenizer, checker)
                if settings.tasks:
                    say(f"{label}: {', '.join(settings.tasks)} by lm-evaluation-harness")
                    figures[label] = figures.get(label, {}) | {"tasks": measure_tasks(model)}
                if job.run is not None and label == AFTER:
                    reread_file = reread(job.run, model, job.recipe)
                del model
                models.free_memory()
            if prompts is not None and job.teacher is not None:
                assert teacher is not None
                for label, estimate in _reverse_kl(job, teacher, students, responses, prompts, results).items():
                    # few prompts have no interval, and JSON no NaN
                    figures[label]["reverse_kl"] = {
                        end: None if np.isnan(bound) else bound for end, bound in asdict(estimate).items()
                    }
        except Exception:  # a task that fails, a teacher that does not fit: keep what was measured before
            if figures:
                _keep_partial(job, figures, _describe(job, prompts, started))
            raise
        about = _describe(job, prompts, started)
        try:
            _keep(job, _to_json(about, figures), reread_file, results)
        finally:
            show(figures, about)
            if prompts is not None:
                show_responses(shown, prompts.records, checker)


# -- preparing -----------------------------------------------------------------------------------------------


def _load_prompts(
    job: EvalJob, student: ResolvedModel, teacher: ResolvedModel | None, *, teacher_required: bool
) -> tuple[EvalJob, EvalPrompts | None]:
    """The prompts to respond to, if any.

    The job is returned without its teacher if that cannot be compared with the student and is not required.
    """
    settings = job.recipe.eval
    if settings.path is None:
        return replace(job, teacher=None), None
    records, ids = held_out_prompts(job.recipe, settings.limit, student)
    block = PromptBlock(0, list(enumerate(ids)), records)
    prompts = EvalPrompts(records, block, View(), episodes_of(job.recipe, student, records))
    n_answers = len(prompts.with_answer)
    if n_answers < len(records):
        counted = "accuracy is of the others" if n_answers else "accuracy is not measured"
        warn(f"{settings.path}: {len(records) - n_answers} of {len(records)} prompts have no answer; {counted}")
    if teacher is None:
        return job, prompts
    stop_ids = student.stop_token_ids(job.recipe.rollouts)
    size = max(student.tokenizer_identity.vocab_size, student.vocab_size)
    try:
        view = view_on(job.recipe, teacher, records, student.tokenizer_identity.digest, size, stop_ids, settings.path)
    except (ModelNotFoundError, MissingColumnError) as error:
        if teacher_required or not n_answers:
            raise
        # A run may be evaluated after its teacher was deleted, or on prompts without solutions.
        warn(f"{error}; reverse KL is left out")
        return replace(job, teacher=None), prompts
    if isinstance(view, SpanView):
        warn(f"{teacher.settings.model} tokenizes text differently from the student, so reverse KL to it is left out")
        return replace(job, teacher=None), prompts
    # The teacher scores what is sampled hours later, and must have room for it.
    teacher_name, longest = f"the teacher {teacher.settings.model}'s", max_response_tokens(job.recipe)
    require_room(view.prompts or ids, longest, teacher.context, response_setting(job.recipe), teacher_name)
    return job, replace(prompts, view=view)


def _load_tasks(recipe: Recipe, student: ResolvedModel) -> Callable[[PreTrainedModel], Figures]:
    """Load `eval.tasks`, before hours are spent; returns what measures them."""
    if not recipe.eval.tasks:
        return lambda model: {}
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(f"eval.tasks needs lm-evaluation-harness: {install_hint('eval')}")
    from pipeline.evaluate import harness

    tasks = harness.load_tasks(recipe.eval, student.context)
    return lambda model: harness.measure(model, student, recipe, tasks)


# -- measuring -----------------------------------------------------------------------------------------------


def _respond(
    job: EvalJob, model: PreTrainedModel, source: ResolvedModel, prompts: EvalPrompts, label: str
) -> StudentResponses:
    """Sample one student's responses, and score its fresh rollouts with the student itself."""
    recipe, settings = job.recipe, job.recipe.eval
    greedy = greedy_sampling(recipe, source)
    sampled = replace(greedy, temperature=settings.temperature, rollouts_per_prompt=settings.samples)
    fresh = sampled if settings.temperature == 1 else replace(greedy, temperature=1.0)
    every = prompts.block
    wanted = {"sampled": (sampled, every)}
    if prompts.with_answer:
        wanted["greedy"] = greedy, every.part(prompts.with_answer)
    if job.teacher is not None and fresh is not sampled:
        wanted["fresh"] = fresh, every

    rollouts: dict[str, cs.RolloutBlock] = {}
    total = sum(len(block.prompts) * sampling.rollouts_per_prompt for sampling, block in wanted.values())
    with progress(f"{label}: responses", total, "responses") as bar, generating(model), using(prompts.episodes):
        shown = DecodingProgress(bar, total, greedy.max_response_tokens)
        for name, (sampling, block) in wanted.items():
            sampler = TransformersSampler(
                model, sampling, batch_size=settings.batch_size, on_step=shown, episodes=prompts.episodes
            )
            rollouts[name] = sampler.sample_block(block)
    fresh_rollouts = rollouts.get("fresh", rollouts["sampled"])
    scores = None
    if job.teacher is not None:
        known = source.known_tokens
        options = _options(recipe, min(settings.candidates, known), known)
        make = functools.partial(ResidentScorer, model)
        scores = _score(make, fresh_rollouts, None, options, f"{label}: scoring")
    return StudentResponses(rollouts.get("greedy"), rollouts["sampled"], fresh_rollouts, fresh, scores)


def _grade(
    done: StudentResponses, prompts: EvalPrompts, tokenizer: PreTrainedTokenizerBase, checker: Checker
) -> tuple[Figures, Responses]:
    """Accuracy, pass@k, legal format and lengths of one student's responses, and those that are shown: the greedy
    ones, or the first sampled for each prompt."""
    found: Figures = {}
    sampled = response_texts(done.sampled, tokenizer)
    shown = Responses("sampled", dict(enumerate(sampled[:: len(sampled) // len(prompts.records)])))
    if done.greedy is not None:
        answered = prompts.with_answer
        greedy, accepted = response_texts(done.greedy, tokenizer), [prompts.answers[index] for index in answered]
        shown = Responses("greedy", dict(zip(answered, greedy, strict=True)))
        right_PS = right_answers(sampled, prompts.answers, checker)[answered]
        found["greedy"] = asdict(fraction_right(right_answers(greedy, accepted, checker)))
        found["sampled"] = asdict(fraction_right(right_PS))
        n_samples = right_PS.shape[1]
        found["pass_at"] = {str(2**e): asdict(pass_at(2**e, right_PS)) for e in range(n_samples.bit_length())}
    if checker.format is not None:
        found["format"] = asdict(fraction_right(legal_responses(sampled, len(prompts.records), checker)))
    found["response_tokens"] = float(done.sampled.response_length.mean())
    found["truncated"] = float((done.sampled.finish_reason == cs.FINISH_LENGTH).mean())
    return found, shown


def _reverse_kl(
    job: EvalJob,
    teacher: ResolvedModel,
    students: Mapping[str, ResolvedModel],
    responses: Mapping[str, StudentResponses],
    prompts: EvalPrompts,
    results: ExitStack,
) -> dict[str, Estimate]:
    """KL(S || T) a token of each student's fresh rollouts.

    A run keeps the rollouts with both models' scores; they take their place when `results` is closed.
    """
    estimates, writer = {}, None
    if job.run is not None:
        directory = results.enter_context(atomic_directory(job.run / EVAL_CACHE))
        view, episodes = prompts.view, prompts.episodes
        writer = EvalCacheWriter(directory, job.recipe, teacher, prompts.records, view, episodes)
    make = _load_teacher(job.recipe, teacher)
    for label, done in responses.items():
        student, rollouts = done.scores, done.fresh
        assert student is not None and student.candidate_ids is not None
        options = _options(job.recipe)
        scores = _score(make, rollouts, student.candidate_ids, options, f"teacher: {label}", prompts.view)
        kl_T = scores_reverse_kl(student, scores)
        own_T = rollouts.trained == 1
        if unknown := int((~np.isfinite(kl_T[own_T])).sum()):
            raise ModelError(
                f"{teacher.settings.model}: {unknown} of {len(kl_T)} tokens of {label} have no finite reverse KL to "
                "it, so its log-probs are not finite; load it in another dtype (teacher.dtype)"
            )
        prompt_T = rollouts.token_prompts
        totals_P = np.bincount(prompt_T, np.where(own_T, kl_T, 0.0), rollouts.n_prompts).astype(np.float64)
        tokens_P = np.bincount(prompt_T, own_T, rollouts.n_prompts).astype(np.float64)
        estimate = mean_per_token(totals_P, tokens_P)
        estimates[label] = replace(estimate, low=float(np.maximum(estimate.low, 0.0)))  # no divergence is below 0
        if writer is not None:
            writer.add(students[label], done.sampling, rollouts, student, scores)
    del make
    models.free_memory()
    return estimates


def _load_teacher(recipe: Recipe, teacher: ResolvedModel) -> MakeScorer:
    """Load the teacher, or stream it layer by layer if the recipe says so; returns what makes scorers of it."""
    if recipe.placement(teacher.settings) == "streamed":
        from pipeline.streaming.streamed import StreamedScorer

        return functools.partial(StreamedScorer, teacher, memory_gib=recipe.score.memory_gib)
    return functools.partial(ResidentScorer, models.load_model(teacher))


def _options(recipe: Recipe, candidates: int = 0, candidate_vocab: int | None = None) -> ScoreOptions:
    return ScoreOptions(
        candidates=candidates,
        candidate_vocab=candidate_vocab,
        tile_tokens=recipe.score.tile_tokens,
        rows_per_chunk=recipe.score.rows_per_chunk,
    )


def _score(
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


# -- keeping -------------------------------------------------------------------------------------------------


def _describe(job: EvalJob, prompts: EvalPrompts | None, started: float) -> dict[str, Any]:
    """What was measured, for the table and the file."""
    settings, source = job.recipe.eval, None
    if prompts is not None:
        digest = cs.prompts_sha256(prompts.records)
        source = {"path": settings.path, "count": len(prompts.records), "sha256": digest}
    return {
        "prompts": source,
        "answers": 0 if prompts is None else len(prompts.with_answer),
        "match": settings.match,
        "format": settings.format,
        "samples": settings.samples,
        "temperature": settings.temperature,
        "max_response_tokens": max_response_tokens(job.recipe),
        "teacher": None if job.teacher is None else job.teacher.model,
        "candidates": settings.candidates,
        "seconds": round(time.perf_counter() - started, 1),
    }


def _to_json(about: dict[str, Any], figures: dict[str, Figures]) -> str:
    return json.dumps(about | figures, indent=1, allow_nan=False) + "\n"


def _keep(job: EvalJob, figures: str, reread_file: bytes | None, results: ExitStack) -> None:
    """Replace the files of an earlier evaluation, once all of this one are on disk.

    Args:
        results: closing it moves the new files into their places.
    """
    if job.out is None:
        return
    results.enter_context(staged_file(job.out, figures))
    if job.run is None:
        results.close()
        return
    old = [] if job.teacher is not None else [job.run / EVAL_CACHE]
    if reread_file is not None:
        results.enter_context(staged_file(job.run / REREAD, reread_file))
    else:
        old.append(job.run / REREAD)
    with replacing_results(job.run), graceful(), replacing(job.run, EVAL_FIGURES, EVAL_CACHE, REREAD):
        for path in old:
            remove(path)
        results.close()


def _keep_partial(job: EvalJob, figures: dict[str, Figures], about: dict[str, Any]) -> None:
    """Print what was measured before something failed, and write it if that replaces nothing."""
    show(figures, about)
    if job.out is None:
        return
    if job.out.exists() or (job.run is not None and (job.run / EVAL_CACHE).exists()):
        warn(f"{job.out} still belongs to an earlier evaluation; what was measured now is printed above")
    else:
        with replacing(job.run, EVAL_FIGURES) if job.run is not None else nullcontext():
            write_atomically(job.out, _to_json(about, figures))
