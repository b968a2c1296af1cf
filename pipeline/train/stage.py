"""Stage two: train the student on a scored cache. No teacher is loaded.

    redpen train RECIPE --cache URL --run DIR
    torchrun --nproc-per-node 8 -m pipeline -- train RECIPE --cache URL --run DIR      one process per GPU
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
        -m pipeline -- train RECIPE --cache URL --run DIR                              on each of two machines

(without the `--`, torchrun takes --run for one of its own options)

Let x_t be a cached response token with its prefix, S the current student, `old` the student that sampled it, T the
teacher, all at temperature 1; C the cached candidates (and the teacher's own top-k if stored), rest everything else.

    reverse_kl             mean_t sum_{v in C, rest} p_S(v) (log p_S(v) - log p_T(v))
    importance_sampling    mean_t -exp(log p_S(x_t) - log p_old(x_t)) A_t,
                           A_t = -(log p_S(x_t) - log p_T(x_t)), without gradient

`pipeline.train.losses` has the formulas of the others, of ratio truncation, the PPO clip
and behaviour correction, and of what replaces reverse_kl if only the sampled token is scored (k2) or candidates were
drawn from the student (`over_draws`). T may be a mixture of teachers, or chosen by the prompt's source
(`pipeline.train.teachers`); `select` decides which tokens count (`pipeline.train.selection`).

The mean is over all trained tokens of a step's global batch. Their count is known before the first forward pass, so
the gradient depends neither on micro-batches nor on the number of processes (`pipeline.distributed.fsdp`). Equal
rollouts are computed once, with the weight of all their copies. Each micro-batch packs whole rollouts without
padding; head and loss process chunks of rows and compute their gradient in the same pass (`pipeline.forward.head`).

Training ends when `reverse_kl` over the last `stop_window` steps is below `stop_reverse_kl` (the round is used up),
when `heldout_metric` has had no new best for `heldout_patience` measurements (a plateau; its best step is then the
result), after `steps`, or with exit code 3 when the effective sample size falls below `stale_ess`. The reported
reverse KL is the first formula on *cached* prefixes; on fresh ones it is larger, which `redpen eval RUN` measures.

Departures from the source (on-policy distillation by importance sampling): the default is the direct gradient of
reverse KL over candidates, which reaches a higher accuracy; the advantage uses the current student by default, since
the cached one is right for a single pass only; the learning rate is 1e-4 with LoRA, since 5e-7 moves nothing.

A run that was killed continues from its last checkpoint with the same command, on any number of processes: all of
them see the same global batches in the same order. On the CPU, with as many processes and threads, metrics and
adapter are then bit for bit those of an undisturbed run. The main process alone writes and prints, and holds the
run's lock. torchrun turns every exit code except 0 into 1: there, the message and run.json show a stale cache.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cache_schema as cs
from pipeline.config import Recipe, TrainConfig
from pipeline.console import progress, say, short, show, warn
from pipeline.distributed.fsdp import weight_sharding
from pipeline.distributed.ranks import join_ranks
from pipeline.distributed.signals import graceful
from pipeline.errors import Interrupted, RedpenError
from pipeline.files import write_atomically
from pipeline.models import load as models
from pipeline.models import lora
from pipeline.models.model_card import run_card, suggest_uses
from pipeline.rounds.identity import cache_identity
from pipeline.runs import checkpoint, tracking
from pipeline.runs.directory import Result, RunDirectory, open_run
from pipeline.train import checks, ledger
from pipeline.train.build import make_objective, make_replay
from pipeline.train.heldout import Metric, heldout_metric
from pipeline.train.packs import tokens_of
from pipeline.train.replay import Batch, Replay
from pipeline.train.resume import CheckpointSaver, restore_best, resume
from pipeline.train.reward import mean_reward
from pipeline.train.stopping import TrainingHistory, best_step, format_metric, stop_result
from pipeline.train.teachers import select_teachers
from pipeline.train.trainer import StudentTrainer


def run(
    recipe: Recipe,
    cache_url: str,
    run_dir: str | os.PathLike[str],
    round_index: int | None = None,
    *,
    start: Path | None = None,
) -> int:
    """Train to the end, continuing an earlier call if there was one; returns the exit code.

    Under torchrun every rank calls this, and all except the main process return 0.

    Args:
        start: checkpoints of the run that made the student's weights; the optimizer continues with its moments.

    Raises `CacheError` and `RedpenError` if cache, recipe and run do not fit together, `Interrupted` after a
    checkpoint if a signal asked for a stop.
    """
    train = recipe.train
    with join_ranks() as ranks, contextlib.ExitStack() as lock:
        # Check the recipe against the cache, and lock the run.
        run, result, index, teachers = ranks.broadcast(lambda: _open(lock, recipe, cache_url, run_dir, round_index))
        if result is not None:
            if ranks.is_main_process:
                show(f"{run.path} is finished: {result.sentence}")
            return result.exit_code if ranks.is_main_process else 0

        # The batches and what is minimised on them.
        round_ = cs.open(cache_url).round(index)
        objective = make_objective(recipe, round_, teachers)
        replay = make_replay(recipe, round_, objective)

        with weight_sharding(ranks, recipe.student, train) as sharding:
            # The student, at the last checkpoint.
            model = models.load_model(sharding.load_config(recipe.student), trainable=True)
            model = lora.make_trainable(model, train)
            trainer = StudentTrainer(model, objective, train, sharding)
            history = resume(run, trainer, start)
            say(trainer.check(replay.batch(trainer.step).rollouts))
            heldout = heldout_metric(recipe, trainer, replay)

            # Train.
            if ranks.is_main_process:
                run.start()
            result = _train(run, trainer, replay, history, heldout)

            # Save the best step.
            restore_best(run, trainer, history)
            weights = trainer.weights()
            if ranks.is_main_process:
                with run.writing():
                    lora.save(model, weights, run.trained, recipe.student, run_card(recipe, round_, teachers, result))
                    adapter_parameters = sum(parameter.numel() for parameter in trainer.parameters.values())
                    costs = ledger.stage_one(recipe, round_)
                    costs["train"] = ledger.training(recipe, adapter_parameters, history.tokens, history.seconds)
                    write_atomically(run.ledger, json.dumps(ledger.table(costs), indent=1) + "\n")
                run.finish(result)
                if (fetched := round_.cache.fetched) is not None:
                    say(f"{cache_url}: {fetched[0] / 2**20:.1f} of {fetched[1] / 2**20:.1f} MiB were fetched")
                show(result.sentence)
                show(f"{run.trained.name}: {run.trained}")
                suggest_uses(recipe, run)
        return result.exit_code if ranks.is_main_process else 0


def _open(
    lock: contextlib.ExitStack,
    recipe: Recipe,
    cache_url: str,
    run_dir: str | os.PathLike[str],
    round_index: int | None,
) -> tuple[RunDirectory, Result | None, int, tuple[str, ...]]:
    """The run, locked until `lock` closes; its result, if it has ended; the round's index and the teachers' names."""
    round_ = cs.open(cache_url).round(round_index)
    tracking.check_installed(recipe.track)
    teachers = select_teachers(recipe, round_, cache_url)
    checks.check_committed(recipe.train.loss, round_, teachers, cache_url)
    checks.check_round(recipe, round_)
    run = lock.enter_context(open_run(run_dir, recipe, cache_identity(cache_url, round_, teachers)))
    result = run.result
    if result is None:
        if run.has_ended and checkpoint.latest(run.checkpoints, warn) is None:
            raise RedpenError(
                f"run {run.path}: it has ended, and there is no whole checkpoint in {run.checkpoints} to continue "
                "from; restore the run from a copy, or choose another --run"
            )
        checks.check_teachers(recipe, round_, teachers)
        checks.check_student(recipe, round_, cache_url)
    return run, result, round_.index, teachers


def _train(
    run: RunDirectory, trainer: StudentTrainer, replay: Replay, history: TrainingHistory, heldout: Metric | None
) -> Result:
    """Train until `stop_result` returns a result, the same on every rank; the last step is checkpointed."""
    train = trainer.train
    with (
        graceful() as stop,
        contextlib.closing(CheckpointSaver(run, trainer, history)) as checkpoints,
        contextlib.closing(replay.batches(range(trainer.step, train.steps))) as batches,
        _recorder(run, trainer, history) as recorder,
        progress("train", total=train.steps, unit="steps", done=trainer.step) as bar,
    ):
        while (result := stop_result(train, trainer.step, history)) is None:
            started = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - started
            metrics: dict[str, Any] = trainer.update(batch)
            seconds = time.perf_counter() - started

            step = trainer.step
            metrics = {"step": step, **metrics, **_batch_metrics(train, batch)}
            speed = {"seconds": seconds, "waited": waited, "tokens_per_second": metrics["tokens_read"] / seconds}
            if heldout is not None and (step % train.heldout_every == 0 or step == train.steps):
                metrics[f"heldout_{train.heldout_metric}"] = history.heldout[str(step)] = heldout()
            if recorder is not None:
                recorder.log(metrics, speed)
            bar.advance(note=_note(train, metrics, speed, history))
            history.add(train, metrics, seconds, metrics["tokens_read"])

            if step % train.checkpoint_every == 0 or step == best_step(train, history):
                checkpoints.save()
            if signum := trainer.ranks.maximum(stop.signum or 0):  # of any rank, so that all stop at this step
                checkpoints.save(wait=True)
                raise Interrupted(signum, f"step {step} of {train.steps} is in {run.checkpoints}")
        checkpoints.save(wait=True)
    return result


def _batch_metrics(train: TrainConfig, batch: Batch) -> dict[str, Any]:
    """Mean reward (if there are rewards), trained tokens, rollouts, distinct rollouts, and tokens of the forward
    passes, a shared prompt counted once."""
    reward = mean_reward(batch)
    return {
        **({} if reward is None else {"reward": reward}),
        "tokens": round(batch.n_tokens),
        "rows": len(batch.rollouts),
        "distinct_rows": len(batch.distinct),
        "tokens_read": tokens_of(batch.rows(train.share_prompts_from)),
    }


@contextlib.contextmanager
def _recorder(
    run: RunDirectory, trainer: StudentTrainer, history: TrainingHistory
) -> Iterator[tracking.Recorder | None]:
    """On the main process, a recorder of the steps to come; it is closed with the result, if training has ended."""
    if not trainer.ranks.is_main_process:
        yield None
        return
    recorder = tracking.Recorder(run, trainer.step + 1)
    try:
        yield recorder
    finally:
        recorder.close(stop_result(trainer.train, trainer.step, history))


def _note(train: TrainConfig, metrics: dict[str, Any], speed: dict[str, float], history: TrainingHistory) -> str:
    """The progress line's metrics."""
    parts = [f"loss {metrics['loss']:.4f}"]
    if "reverse_kl" in metrics:
        parts = [f"reverse KL {metrics['reverse_kl']:.4f}", f"ESS {metrics['ess']:.3f}"]
    if history.heldout:
        parts.append("held-out " + format_metric(train, [*history.heldout.values()][-1]))
    return ", ".join([*parts, f"{short(speed['tokens_per_second'])} tokens/s"])
