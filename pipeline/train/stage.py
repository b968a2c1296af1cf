"""Stage two: replay a scored cache and move the student towards its teacher. Only the student is loaded.

    redpen train RECIPE --cache URL --run DIR
    torchrun --nproc-per-node 8 -m pipeline -- train RECIPE --cache URL --run DIR      a process a GPU
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
        -m pipeline -- train RECIPE --cache URL --run DIR                              on each of two machines

(without the `--` torchrun takes --run for one of its own options)

Let x_t be a cached response token with its prefix, S the current student, `old` the student that sampled it, T the
teacher, all at temperature 1; C the cached candidates (and the teacher's own top-k if stored), rest everything else.

    reverse_kl             mean_t sum_{v in C, rest} p_S(v) (log p_S(v) - log p_T(v))
    importance_sampling    mean_t -exp(log p_S(x_t) - log p_old(x_t)) A_t,
                           A_t = -(log p_S(x_t) - log p_T(x_t)), without gradient

`pipeline.train.losses` has the formulas of the others (forward_kl, jsd, mixed_kl), of ratio truncation, PPO's clip
and behaviour correction, and of what replaces reverse_kl where a teacher told of the sampled token alone (k2) or
candidates were drawn from the student (`over_draws`). T may be a mixture of teachers, or one chosen by the prompt's
source (`pipeline.train.mixture`); which tokens count is `select`'s to say (`pipeline.train.selection`).

The mean is over all trained tokens of a step's global batch, whose count is known before the first forward, so the
gradient depends neither on micro-batches nor on the number of processes (`pipeline.distributed.fsdp`); equal
rollouts are read once and weigh as often as they occur. Each micro-batch packs whole rollouts without padding; the
head and the loss go through row chunks and make their gradient in the same pass (`pipeline.forward.head`).

Training ends when `reverse_kl` over the last `stop_window` steps is below `stop_reverse_kl` (the round is used up),
when `heldout_metric` has had no new best for `heldout_patience` measurements (a plateau; its best step is then the
result), after `steps`, or with exit code 3 when the effective sample size falls below `stale_ess`. What is reported
as reverse KL is the first formula on *cached* prefixes; on fresh ones it is larger, which `redpen eval RUN` measures.

Departures from the source (on-policy distillation by importance sampling): the default is the direct gradient of
reverse KL over candidates, which ends at higher accuracy; the advantage uses the current student unless told
otherwise, since the cached one is right for a single pass only; learning rate 1e-4 with LoRA, since 5e-7 moves
nothing.

Killed at any moment, the same command continues from the last checkpoint, on any number of processes: all of them see
the same global batches in the same order. On the CPU with as many processes and threads metrics and adapter are then
bit for bit those of an undisturbed run. Of several processes the first writes and talks, and holds the run's lock.
torchrun makes an exit code of 1 of any other than 0, so for it a stale cache is told by the sentence and by run.json.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import cache_schema as cs
from pipeline.config import Recipe, TrainConfig
from pipeline.console import progress, say, short, show, suggest, warn
from pipeline.distributed.fsdp import weight_sharding
from pipeline.distributed.ranks import join_ranks
from pipeline.distributed.signals import graceful
from pipeline.errors import Interrupted, RedpenError
from pipeline.files import parse_model, write_atomically
from pipeline.models import load as models
from pipeline.models import lora
from pipeline.models.identity import cache_identity
from pipeline.models.model_card import run_card
from pipeline.runs import checkpoint, tracking
from pipeline.runs.directory import Result, RunDirectory, open_run
from pipeline.train import inputs, ledger
from pipeline.train.heldout import Metric, heldout_metric
from pipeline.train.packs import tokens_of
from pipeline.train.replay import Batch, Replay
from pipeline.train.reward import mean_reward
from pipeline.train.stopping import GAUGES, Memory, best_step, told_metric, verdict
from pipeline.train.trainer import Trainer

_CHECKED_ROLLOUTS = 4


def run(
    recipe: Recipe,
    cache_url: str,
    run_dir: str | os.PathLike[str],
    round_index: int | None = None,
    *,
    start: Path | None = None,
) -> int:
    """Train until done, from wherever an earlier call left off; the exit code.

    Under torchrun every rank calls this, and all but the first return 0.

    Args:
        start: checkpoints of the run that made the student's weights; the optimizer goes on with its moments.

    Raises `CacheError` and `RedpenError` where cache, recipe and run do not fit together, `Interrupted` after a
    checkpoint where a signal asked for a stop.
    """
    train = recipe.train
    with join_ranks() as ranks, contextlib.ExitStack() as held:
        run, result, index, teachers = ranks.broadcast(lambda: _open(held, recipe, cache_url, run_dir, round_index))
        if result is not None:
            if ranks.is_main_process:
                show(f"{run.path} is finished: {result.sentence}")
            return result.exit_code if ranks.is_main_process else 0
        round_ = cs.open(cache_url).round(index)
        objective = inputs.objective(recipe, round_, teachers)
        replay = inputs.replay(recipe, round_, objective)
        with weight_sharding(ranks, recipe.student, train) as sharding:
            model = lora.make_trainable(
                models.load_model(sharding.load_config(recipe.student), trainable=True), train
            )
            trainer = Trainer(model, objective, train, sharding)
            memory = _resume(run, trainer, start)
            worst = trainer.check(replay.batch(trainer.step).rollouts[:_CHECKED_ROLLOUTS])
            say(f"packing: a rollout among others has the log-probs it has alone, to {worst:.1g} nats")

            heldout = heldout_metric(recipe, trainer, replay)
            if sharding.is_main_process:
                run.start()
            result = _train(run, trainer, replay, memory, heldout)
            _return_to_best(run, trainer, best_step(train, memory))
            weights = trainer.weights()
            if sharding.is_main_process:
                with run.writing():
                    lora.save(model, weights, run.made, recipe.student, run_card(recipe, round_, teachers, result))
                    adapter_parameters = sum(parameter.numel() for parameter in trainer.parameters.values())
                    costs = ledger.stage_one(recipe, round_)
                    costs["train"] = ledger.training(recipe, adapter_parameters, memory.tokens, memory.seconds)
                    write_atomically(run.ledger, json.dumps(ledger.table(costs), indent=1) + "\n")
                run.finish(result)
                show(result.sentence)
                show(f"{run.made.name}: {run.made}")
                suggest(f"redpen eval {run.path} for what it gained, redpen report {run.path} for where")
        return result.exit_code if ranks.is_main_process else 0


def _open(
    held: contextlib.ExitStack,
    recipe: Recipe,
    cache_url: str,
    run_dir: str | os.PathLike[str],
    round_index: int | None,
) -> tuple[RunDirectory, Result | None, int, tuple[str, ...]]:
    """The run, locked until `held` closes; how it ended, if it has; the round and the teachers it learns from."""
    round_ = cs.open(cache_url).round(round_index)
    tracking.check_installed(recipe.track)
    teachers = inputs.teacher_names(recipe, round_, cache_url)
    inputs.check_scored(recipe.train.loss, round_, teachers, cache_url)
    inputs.check_replay(recipe, round_)
    run = held.enter_context(open_run(run_dir, recipe, cache_identity(cache_url, round_, teachers)))
    result = run.result
    if result is None and run.has_ended and checkpoint.latest(run.checkpoints, warn) is None:
        raise RedpenError(
            f"run {run.path}: it has ended, and there is no whole checkpoint in {run.checkpoints} to go on from; "
            f"restore the run from a copy, or choose another --run"
        )
    if result is None:
        inputs.check_teachers(recipe, round_, teachers)
        inputs.check_student(recipe, round_, cache_url)
    return run, result, round_.index, teachers


def _train(run: RunDirectory, trainer: Trainer, replay: Replay, memory: Memory, heldout: Metric | None) -> Result:
    """Update until there is a verdict, which is every rank's; the last step is then checkpointed."""
    train, sharding, saved = trainer.train, trainer.sharding, trainer.step
    saving = checkpoint.Checkpoints(run.checkpoints, train.keep_checkpoints, before=run.sync_metrics)

    def save(*, wait: bool = False) -> None:
        nonlocal saved
        if saved < trainer.step:
            tensors, saved = trainer.tensors(), trainer.step
            if sharding.is_main_process:
                with run.writing():
                    saving.save(saved, tensors, asdict(memory), best_step(train, memory))
        if wait:
            with run.writing():
                saving.wait()
            sharding.barrier()

    batches = contextlib.closing(replay.batches(range(trainer.step, train.steps)))
    bar = progress("train", total=train.steps, unit="steps", done=trainer.step)
    with (
        graceful() as stop,
        contextlib.closing(saving),
        batches as stream,
        _recorder(run, trainer, memory) as recorder,
        bar as shown,
    ):
        while (result := verdict(train, trainer.step, memory)) is None:
            started = time.perf_counter()
            batch = next(stream)
            waited = time.perf_counter() - started
            measured = trainer.update(batch)
            seconds = time.perf_counter() - started

            metrics = {"step": trainer.step, **measured, **_counts(train, batch)}
            speed = {"seconds": seconds, "waited": waited, "tokens_per_second": metrics["tokens_read"] / seconds}
            if heldout is not None and (trainer.step % train.heldout_every == 0 or trainer.step == train.steps):
                metrics[f"heldout_{train.heldout_metric}"] = memory.heldout[str(trainer.step)] = heldout()
            if recorder is not None:
                recorder.log(metrics, speed)
            shown.advance(note=_note(train, metrics, speed, memory))
            gauges = {key: metrics[key] for key in GAUGES if key in metrics}
            memory.window = [*memory.window, gauges][-train.stop_window :]
            memory.seconds, memory.tokens = memory.seconds + seconds, memory.tokens + metrics["tokens_read"]
            if trainer.step % train.checkpoint_every == 0 or trainer.step == best_step(train, memory):
                save()
            if signum := sharding.maximum(stop.signum or 0):  # of any rank: all stop at this step
                save(wait=True)
                raise Interrupted(signum, f"step {trainer.step} of {train.steps} is in {run.checkpoints}")
        save(wait=True)
    return result


def _resume(run: RunDirectory, trainer: Trainer, start: Path | None) -> Memory:
    """Put the trainer where the last whole checkpoint is, and the curve with it."""
    found = _restore(trainer, lambda: checkpoint.latest(run.checkpoints, warn))
    if found is None and start is not None:
        _restore(trainer, lambda: replace(_final(start, trainer.train), step=0))
    if found is not None:
        say(f"continuing {run.path} after step {found.step} of {trainer.train.steps}")
    if trainer.sharding.is_main_process:
        run.rewind_metrics(trainer.step)
    return _memory(run.checkpoints, found) if found is not None else Memory()


def _final(checkpoints: Path, train: TrainConfig) -> checkpoint.Checkpoint:
    """The checkpoint that a finished run's weights were saved from."""
    last = checkpoint.latest(checkpoints, warn)
    if last is None:
        raise RedpenError(f"{checkpoints}: expected the checkpoints of a finished run, found none that is whole")
    best = best_step(train, _memory(checkpoints, last))
    return last if best in (None, last.step) else checkpoint.load(checkpoint.path_of(checkpoints, best))


class _State(BaseModel):
    memory: Memory


def _memory(checkpoints: Path, found: checkpoint.Checkpoint) -> Memory:
    name = f"{checkpoint.path_of(checkpoints, found.step)}: state"
    return parse_model({"memory": found.state}, _State, name).memory


def _return_to_best(run: RunDirectory, trainer: Trainer, best: int | None) -> None:
    """Put the trainer where the held-out metric was best; where there is none it stays."""
    if best not in (None, trainer.step):
        assert best is not None
        try:
            _restore(trainer, lambda: checkpoint.load(checkpoint.path_of(run.checkpoints, best)))
        except checkpoint.DamagedCheckpointError as error:
            raise RedpenError(
                f"run {run.path}: the checkpoint of step {best}, the best by held-out "
                f"{trainer.train.heldout_metric}, is damaged ({error}); start another --run"
            ) from error


def _restore(trainer: Trainer, read: Callable[[], checkpoint.Checkpoint | None]) -> checkpoint.Checkpoint | None:
    """Put the trainer where a checkpoint is, if there is one. The first rank reads it."""
    sharding = trainer.sharding
    found = read() if sharding.is_main_process else None
    outline = sharding.broadcast(None if found is None else found.outline())
    found = found or outline
    if found is not None:
        trainer.restore(found)
    return found


def _counts(train: TrainConfig, batch: Batch) -> dict[str, Any]:
    """Of a batch: the mean reward where there are rewards, trained tokens, rollouts, the different ones among them,
    and the tokens that forward passes read; a shared prompt once."""
    reward = mean_reward(batch)
    return {
        **({} if reward is None else {"reward": reward}),
        "tokens": round(batch.n_tokens),
        "rows": len(batch.rollouts),
        "distinct_rows": len(batch.distinct),
        "tokens_read": tokens_of(batch.rows(train.share_prompts_from)),
    }


@contextlib.contextmanager
def _recorder(run: RunDirectory, trainer: Trainer, memory: Memory) -> Iterator[tracking.Recorder | None]:
    """Writes down the steps after the trainer's and at the end how the run ended, if it has; on the first rank."""
    if not trainer.sharding.is_main_process:
        yield None
        return
    recorder = tracking.Recorder(run, trainer.step + 1)
    try:
        yield recorder
    finally:
        recorder.close(verdict(trainer.train, trainer.step, memory))


def _note(train: TrainConfig, metrics: dict[str, Any], speed: dict[str, float], memory: Memory) -> str:
    """What is worth watching, in a few words."""
    parts = [f"loss {metrics['loss']:.4f}"]
    if "reverse_kl" in metrics:
        parts = [f"reverse KL {metrics['reverse_kl']:.4f}", f"ESS {metrics['ess']:.3f}"]
    if memory.heldout:
        parts.append("held-out " + told_metric(train, [*memory.heldout.values()][-1]))
    return ", ".join([*parts, f"{short(speed['tokens_per_second'])} tokens/s"])
