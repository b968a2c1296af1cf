"""A run on disk: what it was made of, its curve, its checkpoints, its adapter.

recipe.toml        the resolved recipe
data.zarr          the round of documents and chats that it learns from, where `redpen sft` made it
run.json           the cache it learns from (digests of every block), an id, and, once it has ended, how
metrics.jsonl      one object a step
tensorboard/       the same as curves
checkpoints/       see pipeline.runs.checkpoint
adapter/           PEFT format, once training has ended; or
model/             the whole model, where all of its weights were trained
ledger.json        seconds, tokens and FLOPs by stage, once training has ended
wandb/             what Weights & Biases keeps here, where it was asked for
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from pipeline.config import Recipe, load_stored_recipe
from pipeline.console import say
from pipeline.errors import RedpenError
from pipeline.files import PARTIAL, append, sync, write_atomically
from pipeline.runs.files import (
    LEDGER,
    MADE,
    METRICS,
    RECIPE,
    Record,
    Result,
    check,
    digests,
    locked,
    parse_step,
    read_lines,
    read_record,
    read_steps,
    refuse_links,
    write_record,
)

__all__ = ["Result", "RunDirectory", "open_run"]

# Sections of a recipe that decide what comes out, and those of their settings that only decide how the work is done.
_SECTIONS = ("student", "train", "reward", "select")
_OPERATIONAL = frozenset(
    {
        "tokens_per_microbatch",
        "share_prompts_from",
        "rows_per_chunk",
        "gradient_checkpointing",
        "checkpoint_every",
        "keep_checkpoints",
        "parallel",
        "device",
    }
)
#: What a run ends with, as far as it has it.
_RESULT = (RECIPE, METRICS, LEDGER, "gate.json", *MADE)
# What a kill may leave of a run that had not started, beside temporary files.
_BEFORE_START = frozenset({".lock", RECIPE, "data.zarr"})


class RunDirectory:
    """The files of one run of a recipe on a cache (see `provenance.cache_identity`). Use `open_run`."""

    def __init__(self, path: Path, recipe: Recipe, cache: dict[str, Any]):
        self.path, self._now, self._cache = path, recipe, cache
        self.recipe = path / RECIPE
        self.metrics = path / METRICS
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"
        self.adapter, self.model = (path / name for name in MADE)
        self.ledger = path / LEDGER
        self.track = recipe.track

    @property
    def made(self) -> Path:
        """Where the result goes: the adapter, or the whole model."""
        return self.adapter if self._now.train.method == "lora" else self.model

    @property
    def result(self) -> Result | None:
        """How the run ended. None while it has not, where the recipe asks for more steps than it had then, and where
        a part of the result has been removed since, which is then to be made again.

        Raises `DamagedRunError` where a part is not what the run ended with.
        """
        record = self._record()
        if record.result is None or self._now.train.steps > load_stored_recipe(self.recipe).train.steps:
            return None
        wanted = [self.made] if record.result.step else []  # else the result is the student as it was
        if gone := [path for path in (*wanted, self.ledger) if not path.exists()]:
            say(f"run {self.path}: {gone[0].name} is no longer there; it is made again")
            return None
        check(self.path, *_RESULT, record=record)
        return record.result

    @property
    def has_ended(self) -> bool:
        """Whether the record says so, even where there is something left to do."""
        return self._record().result is not None

    @property
    def id(self) -> str:
        """The same for as long as training goes on from what is here: trackers know the run by it."""
        return self._record().id

    @property
    def made_of(self) -> dict[str, Any]:
        """The recipe and the cache's identity, as JSON has them."""
        return self._now.model_dump(mode="json", exclude={"track"}) | {"cache": self._cache}

    def finish(self, result: Result) -> None:
        """Record how the run ended, and digests of what it ended with: its last write."""
        with self.writing():
            files = digests(self.path, _RESULT)
            write_record(self.path, self._record().model_copy(update={"result": result, "files": files}))

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn what the storage refuses into a `RedpenError` of one line."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise RedpenError(
                f"run {self.path}: cannot be written ({reason}); make room or choose another --run, then run the "
                "same command again (the last checkpoint is untouched)"
            ) from error

    def append_metrics(self, metrics: dict[str, Any]) -> None:
        """Add a step's line."""
        with self.writing():
            append(self.metrics, json.dumps(metrics) + "\n")

    def steps(self) -> Iterator[dict[str, Any]]:
        """The lines so far, each as it was added."""
        return read_steps(self.path)

    def sync_metrics(self) -> None:
        """Have the lines so far on the disk itself: a checkpoint must not outlive them."""
        sync(self.metrics)

    def rewind_metrics(self, step: int) -> None:
        """Keep the lines of the first `step` steps: those after a checkpoint will be written again."""
        kept = []
        for line in read_lines(self.metrics):
            try:
                if parse_step(line, METRICS)["step"] <= step:
                    kept.append(line + b"\n")
            except RedpenError:
                break  # cut off by a kill
        if len(kept) != step:
            raise RedpenError(
                f"run {self.path}: metrics.jsonl holds {len(kept)} of the {step} steps of its checkpoint; "
                "restore it, or start another --run"
            )
        if self.metrics.exists():  # else nothing was logged, and a run that fails before its start leaves nothing
            with self.writing():
                write_atomically(self.metrics, b"".join(kept))

    def _record(self) -> Record:
        return read_record(self.path) or Record()

    def start(self) -> None:
        """Record what the run is made of, once everything that could be wrong with it has been found right."""
        known = self._record().id if self.checkpoints.exists() else None
        with self.writing():
            # In this order: a run that goes on for more steps is then never taken for finished.
            write_record(self.path, Record(cache=self._cache, id=known or secrets.token_hex(4)))
            write_atomically(self.recipe, self._now.to_toml())

    def _require_same(self) -> None:
        """Raise `RedpenError` where the directory holds something else, or the steps of another recipe or cache."""
        run = read_record(self.path)
        if run is None:
            names = (path.name for path in self.path.iterdir() if path.name not in _BEFORE_START)
            if found := sorted(name for name in names if not name.endswith(PARTIAL)):
                raise RedpenError(
                    f"run {self.path}: expected a run of redpen or an empty directory, found {found[0]}; "
                    "choose another --run"
                )
        elif run.result is not None or self.checkpoints.exists():  # else there is nothing to protect yet
            check(self.path, RECIPE, METRICS, record=run)
            differing = _recipe_differences(load_stored_recipe(self.recipe), self._now)
            differing += [
                f"cache {key}: {was}, now {self._cache.get(key)}"
                for key, was in run.cache.items()
                if key != "url" and was != self._cache.get(key)
            ]
            if differing:
                raise RedpenError(f"run {self.path} was started with {'; '.join(differing)}; choose another --run")


@contextmanager
def open_run(path: str | os.PathLike[str], recipe: Recipe, cache: dict[str, Any]) -> Iterator[RunDirectory]:
    """The run at `path`, held against other processes.

    Args:
        cache: what the run learns from; see `provenance.cache_identity`.

    Raises:
        RedpenError: the run was started with other settings or another cache, is held by another process, or the
            storage refuses a write.
    """
    run = RunDirectory(Path(path), recipe, cache)
    with run.writing():
        run.path.mkdir(parents=True, exist_ok=True)
    refuse_links(run.path)
    with contextlib.ExitStack() as held:
        with run.writing():
            held.enter_context(locked(run.path, "trains"))
        run._require_same()
        yield run


def _recipe_differences(before: Recipe, now: Recipe) -> list[str]:
    found = []
    for section in _SECTIONS:
        was, is_ = getattr(before, section).model_dump(), getattr(now, section).model_dump()
        for key in was:
            if was[key] == is_[key] or key in _OPERATIONAL:
                continue
            if (section, key) == ("train", "steps") and is_[key] > was[key]:
                if now.train.schedule == "constant":
                    continue  # the steps so far are those of the longer run
                found.append(f'train.steps = {was[key]}, now {is_[key]} (only schedule = "constant" can go on)')
            else:
                found.append(f"{section}.{key} = {was[key]}, now {is_[key]}")
    return found
