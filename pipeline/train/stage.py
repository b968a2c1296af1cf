"""Stage two: replay a scored cache and move the student towards its teacher. Only the student is loaded.

    redpen train RECIPE --cache DIR --run DIR

Let x_t be a cached response token with its prefix, S the current student, `old` the student that sampled it, T the
teacher, all at temperature 1; C the cached candidates (and the teacher's own top-k if stored), rest everything else.

    reverse_kl             mean_t sum_{v in C, rest} p_S(v) (log p_S(v) - log p_T(v))
    importance_sampling    mean_t -exp(log p_S(x_t) - log p_old(x_t)) A_t,
                           A_t = -(log p_S(x_t) - log p_T(x_t)), without gradient

The mean is over all trained tokens of a step's global batch, whose count is known before the first forward, so the
gradient does not depend on micro-batches; equal rollouts are read once and weigh as often as they occur. Each
micro-batch packs whole rollouts without padding; the head and the loss go through row chunks and make their
gradient in the same pass (`pipeline.logprobs`).

Training ends when `reverse_kl` over the last `stop_window` steps is below `stop_reverse_kl` (the round is used up),
after `steps`, or with exit code 3 when the effective sample size falls below `stale_ess`. What is reported as
reverse KL is the first formula on *cached* prefixes; on fresh ones it is larger, which `redpen eval RUN` measures.

Departures from the source (on-policy distillation by importance sampling): the default is the direct gradient of
reverse KL over candidates, which ends at higher accuracy; the advantage uses the current student unless told
otherwise, since the cached one is right for a single pass only; learning rate 1e-4 with LoRA, since 5e-7 moves
nothing.

Killed at any moment, the same command continues from the last checkpoint; on the CPU with the same number of threads
metrics and adapter are then bit for bit those of an undisturbed run.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cache_schema as cs
from pipeline import models
from pipeline.config import Recipe
from pipeline.console import progress, say, warn
from pipeline.signals import graceful
from pipeline.train import checkpoint, inputs, ledger, lora
from pipeline.train.objective import Objective
from pipeline.train.replay import Batch, Order, Replay
from pipeline.train.run_directory import Result, RunDirectory, cache_identity, open_run
from pipeline.train.stopping import Memory, verdict
from pipeline.train.trainer import Trainer

_CHECKED_ROLLOUTS = 4


def run(recipe: Recipe, cache_url: str, run_dir: str | os.PathLike[str], round_index: int | None = None) -> int:
    """Train until done, from wherever an earlier call left off; the exit code.

    Raises `CacheError` and `RedpenError` where cache, recipe and run do not fit together, `Interrupted` after a
    checkpoint where a signal asked for a stop.
    """
    train = recipe.train
    round_ = cs.open(cache_url).round(round_index)
    teacher = inputs.teacher_name(recipe, round_, cache_url)
    inputs.check_scored(round_, teacher, cache_url)
    inputs.check_replay(recipe, round_, cache_url)
    with open_run(run_dir, recipe, cache_identity(cache_url, round_, teacher)) as run:
        if run.result is not None:
            print(f"{run.path} is finished: {run.result.sentence}")
            return run.result.exit_code
        scores = round_.scores(teacher).manifest
        assert isinstance(scores, cs.ScoresManifest)
        inputs.check_candidates(recipe, scores, teacher)
        inputs.check_student(recipe, round_, cache_url)
        order = Order(
            round_.n_prompts,
            round_.manifest.prompts_per_block,
            train.prompts_per_step,
            train.shuffle_window_blocks,
            train.seed,
        )
        objective = Objective(train, teacher, scores, round_.manifest.vocab_size)
        replay = Replay(round_, objective.arrays, order)
        model = lora.add_lora(models.load_model(recipe.student, trainable=True), train)
        trainer = Trainer(model, objective, train)
        memory = _resume(run, trainer)
        worst = trainer.check(replay.batch(trainer.step).rollouts[:_CHECKED_ROLLOUTS])
        say(f"packing: a rollout among others has the log-probs it has alone, to {worst:.1g} nats")

        run.start()
        result = _train(run, trainer, replay, memory)
        with run.writing():
            lora.save_adapter(model, run.adapter, _base_name(recipe))
            adapter_parameters = sum(parameter.numel() for parameter in trainer.parameters.values())
            costs = ledger.stage_one(recipe, round_)
            costs["train"] = ledger.training(recipe, adapter_parameters, memory.tokens, memory.seconds)
            checkpoint.write_atomically(run.ledger, json.dumps(ledger.table(costs), indent=1) + "\n")
        run.finish(result)
    print(result.sentence)
    print(f"adapter: {run.adapter}")
    return result.exit_code


def _train(run: RunDirectory, trainer: Trainer, replay: Replay, memory: Memory) -> Result:
    """Update until there is a verdict; the last step is then checkpointed."""
    train, saved = trainer.train, trainer.step

    def save() -> None:
        nonlocal saved
        if saved < trainer.step:
            with run.writing():
                checkpoint.save(
                    run.checkpoints, trainer.step, trainer.tensors(), asdict(memory), keep=train.keep_checkpoints
                )
            saved = trainer.step

    batches = contextlib.closing(replay.batches(range(trainer.step, train.steps)))
    bar = progress("train", total=train.steps, unit="steps", done=trainer.step)
    with graceful() as stop, batches as stream, _curves(run, trainer.step) as curve, bar as shown:
        while (result := verdict(train, trainer.step, memory)) is None:
            started = time.perf_counter()
            batch = next(stream)
            waited = time.perf_counter() - started
            measured = trainer.update(batch)
            seconds = time.perf_counter() - started

            metrics = {"step": trainer.step, **measured, **_counts(batch)}
            speed = {"seconds": seconds, "waited": waited, "tokens_per_second": metrics["tokens_read"] / seconds}
            run.append_metrics(metrics | {"time": speed})
            curve(metrics, speed)
            shown.advance(note=f"reverse KL {metrics['reverse_kl']:.4f}")
            memory.window = [*memory.window, {key: metrics[key] for key in ("reverse_kl", "ess")}][
                -train.stop_window :
            ]
            memory.seconds, memory.tokens = memory.seconds + seconds, memory.tokens + metrics["tokens_read"]
            if trainer.step % train.checkpoint_every == 0:
                save()
            if stop.requested:
                save()
                stop.check(f"step {trainer.step} of {train.steps} is in {run.checkpoints}")
        save()
    return result


def _resume(run: RunDirectory, trainer: Trainer) -> Memory:
    """Put the trainer where the last whole checkpoint is, and the curve with it."""
    found = checkpoint.latest(run.checkpoints, warn)
    if found is not None:
        trainer.restore(found)
        say(f"continuing {run.path} after step {found.step} of {trainer.train.steps}")
    run.rewind_metrics(trainer.step)
    return Memory(**found.state) if found is not None else Memory()


def _counts(batch: Batch) -> dict[str, Any]:
    """Trained tokens, rollouts, the different ones among them, and the tokens that the forward pass reads."""
    return {
        "tokens": round(batch.n_tokens),
        "rows": len(batch.rollouts),
        "distinct_rows": len(batch.distinct),
        "tokens_read": sum(rollout.n_tokens for rollout, _ in batch.distinct),
    }


@contextlib.contextmanager
def _curves(run: RunDirectory, step: int) -> Iterator[Any]:
    """A function that draws a step's metrics in TensorBoard; what an earlier run drew after `step` is hidden."""
    from torch.utils.tensorboard import SummaryWriter

    with run.writing():
        writer = SummaryWriter(str(run.tensorboard), purge_step=step + 1)

    def draw(metrics: dict[str, Any], speed: dict[str, float]) -> None:
        with run.writing():
            for name, value in metrics.items():
                if name != "step":
                    writer.add_scalar(f"train/{name}", value, metrics["step"])
            for name, value in speed.items():
                writer.add_scalar(f"time/{name}", value, metrics["step"])

    try:
        yield draw
    finally:
        writer.close()


def _base_name(recipe: Recipe) -> str:
    """What the adapter's config calls its base model: a Hub id, or an absolute path."""
    model = models.resolve_path(recipe.student.model)
    path = Path(model).expanduser()
    return str(path.resolve()) if path.is_dir() else model
