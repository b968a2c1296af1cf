"""What a student can do, and how far it is from its teacher, on prompts it was not trained on.

    redpen eval RUN                                       the recipe's student, before and after
    redpen eval MODEL --prompts FILE [--teacher MODEL]    one model

Accuracy is exact match of the answer that `eval.answer_pattern` finds in a response: greedy, and sampled at
`eval.temperature`. Reverse KL is on *fresh* rollouts, sampled at temperature 1 by the very student that is measured:

    mean_t  sum_{v in C} p_S(v) (log p_S(v) - log p_T(v)) + p_S(rest) (log p_S(rest) - log p_T(rest))

with C the sampled token and the student's likeliest others (`eval.candidates` in all); a lower bound, close at 64.
Before and after draw from the same random numbers, so their difference is known better than either. Intervals are
95 %: see `pipeline.answers`. One model is in memory at a time: each student samples, reads its own
rollouts and goes, then the teacher reads them all.
"""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import cache_schema as cs
from pipeline import models
from pipeline.answers import Estimate, mean_per_token, share_right
from pipeline.config import ModelConfig, Recipe, TeacherConfig, load_recipe
from pipeline.console import progress, warn
from pipeline.errors import ConfigError, ModelNotFoundError, RedpenError
from pipeline.evaluate.accuracy import answer_of, generating, greedy_sampling, right_answers
from pipeline.evaluate.table import show
from pipeline.metrics import scores_reverse_kl
from pipeline.prompts import load_prompts, prompts_sha256, render_all
from pipeline.rollouts import PromptBlock
from pipeline.rollouts.transformers_sampler import TransformersSampler
from pipeline.score import ScoreOptions, TokenBatch
from pipeline.score.resident import ResidentScorer


@dataclass(frozen=True)
class Job:
    """What to measure: students by label, the teacher if any, and where the figures go."""

    recipe: Recipe
    students: dict[str, ModelConfig]
    teacher: TeacherConfig | None
    out: Path | None


@dataclass(frozen=True)
class Responses:
    """What one student did: greedy and sampled responses, and for the KL its fresh rollouts with its own scores."""

    greedy: cs.RolloutBlock
    sampled: cs.RolloutBlock
    fresh: cs.RolloutBlock
    scores: cs.ScoreBlock | None


def run(
    target: str,
    *,
    prompts: str | None = None,
    teacher: str | None = None,
    overrides: Sequence[str] = (),
    recipe: str | None = None,
    out: str | os.PathLike[str] | None = None,
) -> int:
    """Measure `target` and print a table; the exit code 0.

    Args:
        target: a run directory, or a model (path, Hub id, toy:student).
        prompts: in place of `eval.path`.
        teacher: in place of the recipe's; a bare model without either gets no reverse KL.
        overrides: `section.key=value`.
        recipe: settings for a bare model.
        out: where the figures go as JSON; default RUN/eval.json.

    Raises:
        RedpenError: an unfinished run, no prompts, no answers and no teacher, or models that cannot be had.
    """
    started = time.perf_counter()
    job = _job(target, prompts, teacher, overrides, recipe, out)
    if job.out is not None and not job.out.parent.is_dir():
        raise ConfigError(f"--out {job.out}: there is no directory {job.out.parent}")
    settings, student = job.recipe.eval, next(iter(job.students.values()))
    records = load_prompts(job.recipe.prompts.model_copy(update={"path": settings.path, "limit": settings.limit}))
    with_answer = [i for i, record in enumerate(records) if "answer" in record]
    if not with_answer and job.teacher is None:
        raise ConfigError(
            f"{settings.path}: no prompt has an answer, and without --teacher there is nothing to measure"
        )
    if len(with_answer) < len(records):
        warn(f"{settings.path}: {len(records) - len(with_answer)} of {len(records)} prompts have no answer")
    tokenizer, facts = models.load_tokenizer(student), models.model_facts(student)
    if job.teacher is not None:
        try:
            teacher_tokenizer = models.load_tokenizer(job.teacher)
            models.check_same_vocabulary(tokenizer, teacher_tokenizer, (student.model, job.teacher.model))
        except ModelNotFoundError as error:
            if teacher is not None or not with_answer:
                raise
            # Training may outlive its teacher's files; accuracy needs none.
            warn(f"{error}; reverse KL is left out")
            job = replace(job, teacher=None)
    limit = job.recipe.rollouts.max_prompt_tokens
    ids = render_all(records, tokenizer, job.recipe.prompts, limit, facts.context)
    block = PromptBlock(0, list(enumerate(ids)))

    responses = {label: _respond(job, cfg, tokenizer, block, label) for label, cfg in job.students.items()}
    figures: dict[str, dict[str, Any]] = {label: {} for label in responses}
    for label, done in responses.items():
        if with_answer:
            answers = [answer_of(record) for record in records]
            for name, rollouts in (("greedy", done.greedy), ("sampled", done.sampled)):
                right_PS = right_answers(rollouts, answers, tokenizer, settings.answer_pattern)
                figures[label][name] = asdict(share_right(right_PS[with_answer]))
        figures[label] |= {
            "response_tokens": float(done.sampled.response_length.mean()),
            "truncated": float((done.sampled.finish_reason == cs.FINISH_LENGTH).mean()),
        }
    if job.teacher is not None:
        for label, estimate in _reverse_kl(job, job.teacher, responses).items():
            figures[label]["reverse_kl"] = asdict(estimate)

    about = {
        "prompts": {"path": settings.path, "count": len(records), "sha256": prompts_sha256(records)},
        "answers": len(with_answer),
        "samples": settings.samples,
        "temperature": settings.temperature,
        "teacher": None if job.teacher is None else job.teacher.model,
        "candidates": settings.candidates,
        "seconds": round(time.perf_counter() - started, 1),
    }
    show(figures, about)
    if job.out is not None:
        job.out.write_text(json.dumps(about | figures, indent=1) + "\n", encoding="utf-8")
    return 0


# -- what to measure ----------------------------------------------------------------------------------------------


def _job(
    target: str,
    prompts: str | None,
    teacher: str | None,
    overrides: Sequence[str],
    recipe_name: str | None,
    out: str | os.PathLike[str] | None,
) -> Job:
    run_dir = Path(target)
    is_run = (run_dir / "recipe.toml").is_file()
    if is_run:
        if recipe_name is not None:
            raise ConfigError(f"--recipe: {target} is a run and brings its own recipe; use --set to change a setting")
        recipe = load_recipe(str(run_dir / "recipe.toml"), overrides)
        made = run_dir / ("adapter" if recipe.train.method == "lora" else "model")
        if not made.is_dir():
            raise RedpenError(f"run {target}: has no {made.name} yet; finish it with the same `redpen train` command")
        whole = {"model": str(made), "revision": None, "adapter": None}
        update = {"adapter": str(made)} if recipe.train.method == "lora" else whole
        trained = recipe.student.model_copy(update=update)
        students = {"before": recipe.student, "after": trained}
        chosen: TeacherConfig | None = _run_teacher(recipe, run_dir)
        out = out or run_dir / "eval.json"
    else:
        # the embedded models were taught on bare sums, which their recipe says
        recipe_name = recipe_name or ("toy" if target.startswith("toy:") else None)
        recipe = _recipe_for(target, prompts, teacher, overrides, recipe_name)
        students = {"model": recipe.student}
        chosen = None
    if teacher == "":
        raise ConfigError("--teacher: expected a model's path or Hub id, got an empty text")
    if teacher is not None:
        known = (t for t in recipe.teacher if t.model == teacher)
        chosen = next(known, TeacherConfig(model=teacher, dtype="auto", device=recipe.student.device))
    path = prompts or recipe.eval.path
    if path is None:
        raise ConfigError("eval.path is not set: give the prompts with --prompts FILE")
    settings = recipe.eval.model_copy(update={"path": path})
    return Job(recipe.model_copy(update={"eval": settings}), students, chosen, Path(out) if out else None)


def _recipe_for(
    target: str, prompts: str | None, teacher: str | None, overrides: Sequence[str], name: str | None
) -> Recipe:
    """Settings for a bare model: those of a recipe, or the defaults."""
    if name is not None:
        recipe = load_recipe(name, overrides)
        return recipe.model_copy(update={"student": recipe.student.model_copy(update={"model": target})})
    if prompts is None:
        raise ConfigError(f"--prompts: expected a file of prompts to measure {target} on, got none")
    models_as_saved = {"student": {"model": target, "dtype": "auto"}, "teacher": {"model": teacher or target}}
    return Recipe.from_dict(models_as_saved | {"prompts": {"path": prompts}}, f"eval of {target}", overrides)


def _run_teacher(recipe: Recipe, run_dir: Path) -> TeacherConfig:
    """The teacher that the run learned from."""
    try:
        name = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))["cache"]["teacher"]
    except (OSError, ValueError, KeyError, TypeError):
        name = recipe.train.teacher
    return next((teacher for teacher in recipe.teacher if teacher.name == name), recipe.teacher[0])


# -- measuring ----------------------------------------------------------------------------------------------------


def _respond(
    job: Job, cfg: ModelConfig, tokenizer: PreTrainedTokenizerBase, block: PromptBlock, label: str
) -> Responses:
    """Everything that needs this student in memory."""
    recipe, settings = job.recipe, job.recipe.eval
    greedy = greedy_sampling(recipe, cfg, tokenizer)
    sampled = replace(greedy, temperature=settings.temperature, rollouts_per_prompt=settings.samples)
    fresh = sampled if settings.temperature == 1 else replace(greedy, temperature=1.0)
    wanted = {"greedy": greedy, "sampled": sampled}
    if job.teacher is not None and fresh is not sampled:
        wanted["fresh"] = fresh

    model = models.load_model(cfg)
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
        options = _options(job.recipe, min(settings.candidates, known), known)
        scores = _read(model, rollouts["fresh"], None, options, f"{label}: reading")
    del model
    _free()
    return Responses(**rollouts, scores=scores)


def _reverse_kl(job: Job, cfg: TeacherConfig, responses: dict[str, Responses]) -> dict[str, Estimate]:
    """KL(S || T) a token of each student's fresh rollouts."""
    estimates = {}
    model = models.load_model(cfg)
    for label, done in responses.items():
        student, rollouts = done.scores, done.fresh
        assert student is not None and student.candidate_ids is not None
        teacher = _read(model, rollouts, student.candidate_ids, _options(job.recipe), f"teacher: {label}")
        kl_T = scores_reverse_kl(student, teacher)
        prompt_T = np.repeat(rollouts.row_prompt, rollouts.response_length)
        totals_P = np.asarray(np.bincount(prompt_T, weights=kl_T, minlength=rollouts.n_prompts), np.float64)
        tokens_P = np.bincount(prompt_T, minlength=rollouts.n_prompts).astype(np.float64)
        estimates[label] = mean_per_token(totals_P, tokens_P)
    del model
    _free()
    return estimates


def _options(recipe: Recipe, candidates: int = 0, candidate_vocab: int | None = None) -> ScoreOptions:
    return ScoreOptions(
        candidates=candidates,
        candidate_vocab=candidate_vocab,
        tile_tokens=recipe.score.tile_tokens,
        rows_per_chunk=recipe.score.rows_per_chunk,
    )


def _read(
    model: PreTrainedModel, rollouts: cs.RolloutBlock, candidate_ids: Any, options: ScoreOptions, label: str
) -> cs.ScoreBlock:
    with progress(label, rollouts.n_tokens, "tokens") as bar:
        on_tile: Callable[[int], None] = bar.advance
        scorer = ResidentScorer(model, options, on_tile=on_tile)
        return scorer.compute_logprobs(TokenBatch((rollouts,), candidate_ids))


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
