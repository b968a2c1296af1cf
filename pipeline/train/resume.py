"""A run's checkpoints: saving the trainer with its history, and restoring them on every rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from pydantic import BaseModel

from pipeline.config import TrainConfig
from pipeline.console import say, warn
from pipeline.errors import RedpenError
from pipeline.files import parse_model
from pipeline.runs import checkpoint
from pipeline.runs.checkpoint import Checkpoint, Checkpoints, path_of
from pipeline.runs.directory import RunDirectory
from pipeline.train.stopping import TrainingHistory, best_step
from pipeline.train.trainer import StudentTrainer


class CheckpointSaver:
    """Saves a trainer and its history in a run's directory, from the main process. Every rank calls `save`."""

    def __init__(self, run: RunDirectory, trainer: StudentTrainer, history: TrainingHistory):
        self._run, self._trainer, self._history = run, trainer, history
        self._saved_step = trainer.step
        self._checkpoints = Checkpoints(run.checkpoints, trainer.train.keep_checkpoints, before=run.sync_metrics)

    def save(self, *, wait: bool = False) -> None:
        """Save the trainer's step unless it was saved before; with `wait` until it is on disk."""
        trainer = self._trainer
        if self._saved_step < trainer.step:
            tensors, self._saved_step = trainer.tensors(), trainer.step
            if trainer.ranks.is_main_process:
                best = best_step(trainer.train, self._history)
                with self._run.writing():
                    self._checkpoints.save(trainer.step, tensors, asdict(self._history), best)
        if wait:
            with self._run.writing():
                self._checkpoints.wait()
            trainer.ranks.barrier()

    def close(self) -> None:
        self._checkpoints.close()


def resume(run: RunDirectory, trainer: StudentTrainer, start: Path | None) -> TrainingHistory:
    """Restore the run's last whole checkpoint, and rewind its metrics to that step.

    Args:
        start: checkpoints of the run that made the student's weights; a new run takes the optimizer's moments from
            them.
    """
    found = _restore(trainer, lambda: checkpoint.latest(run.checkpoints, warn))
    if found is None and start is not None:
        _restore(trainer, lambda: replace(_result_checkpoint(start, trainer.train), step=0))
    if found is not None:
        say(f"continuing {run.path} after step {found.step} of {trainer.train.steps}")
    if trainer.ranks.is_main_process:
        run.rewind_metrics(trainer.step)
    return _history(run.checkpoints, found) if found is not None else TrainingHistory()


def restore_best(run: RunDirectory, trainer: StudentTrainer, history: TrainingHistory) -> None:
    """Restore the step with the best held-out metric; without one the last step stays."""
    best = best_step(trainer.train, history)
    if best is None or best == trainer.step:
        return
    try:
        _restore(trainer, lambda: checkpoint.load(path_of(run.checkpoints, best)))
    except checkpoint.DamagedCheckpointError as error:
        raise RedpenError(
            f"run {run.path}: the checkpoint of step {best}, the best by held-out {trainer.train.heldout_metric}, is "
            f"damaged ({error}); start another --run"
        ) from error


def _result_checkpoint(checkpoints: Path, train: TrainConfig) -> Checkpoint:
    """The checkpoint that a finished run's weights were saved from."""
    last = checkpoint.latest(checkpoints, warn)
    if last is None:
        raise RedpenError(f"{checkpoints}: expected the checkpoints of a finished run, found none that is whole")
    best = best_step(train, _history(checkpoints, last))
    return last if best in (None, last.step) else checkpoint.load(path_of(checkpoints, best))


def _restore(trainer: StudentTrainer, read: Callable[[], Checkpoint | None]) -> Checkpoint | None:
    """Restore the checkpoint, if any, that `read` returns on the main process."""
    found = None

    def outline() -> Checkpoint | None:
        nonlocal found
        found = read()
        return found.outline() if found is not None else None

    outlined = trainer.ranks.broadcast(outline)
    found = found or outlined
    if found is not None:
        trainer.restore(found)
    return found


class _State(BaseModel):
    history: TrainingHistory


def _history(checkpoints: Path, found: Checkpoint) -> TrainingHistory:
    return parse_model({"history": found.state}, _State, f"{path_of(checkpoints, found.step)}: state").history
