"""A run directory in the making: opened, locked, written and finished. `pipeline.runs.files` names its files."""

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
from pipeline.errors import RedpenError, shorten
from pipeline.files import PARTIAL, append, sync, write_atomically
from pipeline.runs.files import (
    ADAPTER,
    CHECKPOINTS,
    LEDGER,
    LOCK,
    METRICS,
    MODEL,
    RECIPE,
    RESULTS,
    SFT_ROUND,
    TENSORBOARD,
    Record,
    Result,
    check,
    digests,
    parse_step,
    read_lines,
    read_record,
    read_steps,
    refuse_links,
    write_record,
)
from pipeline.runs.lock import locked

__all__ = ["Result", "RunDirectory", "open_run"]

# Sections of a recipe that decide the result, and those of their settings that only decide how the work is done.
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
# What a kill may leave of a run that had not started, beside temporary files.
_BEFORE_START = frozenset({LOCK, RECIPE, SFT_ROUND})


class RunDirectory:
    """One run of a recipe on a cache (see `pipeline.rounds.identity.cache_identity`). Use `open_run`."""

    def __init__(self, path: Path, recipe: Recipe, cache: dict[str, Any]):
        self.path, self._requested, self._cache = path, recipe, cache
        self.recipe = path / RECIPE
        self.metrics = path / METRICS
        self.ledger = path / LEDGER
        self.checkpoints = path / CHECKPOINTS
        self.tensorboard = path / TENSORBOARD
        #: What training makes: the adapter, or the whole model.
        self.trained = path / (ADAPTER if recipe.train.method == "lora" else MODEL)
        self.track = recipe.track

    @property
    def result(self) -> Result | None:
        """How the run ended; None if there is something left to do: the run has not ended, the recipe asks for more
        steps now, or a file of the result was removed and has to be written again.

        Raises `DamagedRunError` if a file of the result is damaged.
        """
        record = self._record()
        if record.result is None or self._requested.train.steps > load_stored_recipe(self.recipe).train.steps:
            return None
        needed = [self.trained] if record.result.step else []  # step 0: the result is the recipe's student
        if missing := [path for path in (*needed, self.ledger) if not path.exists()]:
            say(f"run {self.path}: {missing[0].name} is missing and will be written again")
            return None
        check(self.path, *RESULTS, record=record)
        return record.result

    @property
    def has_ended(self) -> bool:
        """Whether the record has a result, even if there is something left to do."""
        return self._record().result is not None

    @property
    def id(self) -> str:
        """The id in the record, by which trackers know the run."""
        return self._record().id

    @property
    def config(self) -> dict[str, Any]:
        """The recipe and the cache's identity, as JSON, for trackers."""
        return self._requested.model_dump(mode="json", exclude={"track"}) | {"cache": self._cache}

    def start(self) -> None:
        """Record recipe and cache. Call it after every check that may refuse the run."""
        known = self._record().id if self.checkpoints.exists() else None
        with self.writing():
            # The record first: a finished run that continues for more steps must not be taken for finished.
            write_record(self.path, Record(cache=self._cache, id=known or secrets.token_hex(4)))
            write_atomically(self.recipe, self._requested.to_toml())

    def finish(self, result: Result) -> None:
        """Record how the run ended, and the digests of its files: the last write."""
        with self.writing():
            files = digests(self.path, RESULTS)
            write_record(self.path, self._record().model_copy(update={"result": result, "files": files}))

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn an error of the storage into a `RedpenError`."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or shorten(error)
            raise RedpenError(
                f"run {self.path}: cannot be written ({reason}); make room or choose another --run, then run the "
                "same command again (the last checkpoint is untouched)"
            ) from error

    def append_metrics(self, metrics: dict[str, Any]) -> None:
        """Append a step's line."""
        with self.writing():
            append(self.metrics, json.dumps(metrics) + "\n")

    def steps(self) -> Iterator[dict[str, Any]]:
        """The steps so far."""
        return read_steps(self.path)

    def sync_metrics(self) -> None:
        """Flush the lines so far to disk, before a checkpoint that refers to them."""
        sync(self.metrics)

    def rewind_metrics(self, step: int) -> None:
        """Keep the lines of the first `step` steps; training writes those after its checkpoint again."""
        kept = []
        for line in read_lines(self.metrics):
            try:
                if parse_step(line, METRICS)["step"] <= step:
                    kept.append(line + b"\n")
            except RedpenError:
                break  # cut off by a kill
        if len(kept) != step:
            raise RedpenError(
                f"run {self.path}: expected {step} steps in {METRICS}, as in the checkpoint, found {len(kept)}; "
                "restore it from a copy, or choose another --run"
            )
        if self.metrics.exists():  # a run that fails before its start leaves nothing
            with self.writing():
                write_atomically(self.metrics, b"".join(kept))

    def _record(self) -> Record:
        return read_record(self.path) or Record()

    def _require_run(self) -> None:
        """Raise `RedpenError` if the directory holds something other than a run."""
        if read_record(self.path) is None:
            names = (path.name for path in self.path.iterdir() if path.name not in _BEFORE_START)
            if found := sorted(name for name in names if not name.endswith(PARTIAL)):
                raise RedpenError(
                    f"run {self.path}: expected a run of redpen or an empty directory, found {found[0]}; "
                    "choose another --run"
                )

    def _require_same(self) -> None:
        """Raise `RedpenError` if the directory holds something else, or steps of a different recipe or cache."""
        self._require_run()
        run = read_record(self.path)
        # before the first checkpoint there is nothing to protect
        if run is not None and (run.result is not None or self.checkpoints.exists()):
            check(self.path, RECIPE, METRICS, record=run)
            differing = _recipe_differences(load_stored_recipe(self.recipe), self._requested)
            differing += [
                f"cache {key}: {was}, now {self._cache.get(key)}"
                for key, was in run.cache.items()
                if key != "url" and was != self._cache.get(key)
            ]
            if differing:
                raise RedpenError(f"run {self.path} was started with {'; '.join(differing)}; choose another --run")


@contextmanager
def open_run(path: str | os.PathLike[str], recipe: Recipe, cache: dict[str, Any]) -> Iterator[RunDirectory]:
    """The run at `path`, created if it is missing and locked against other processes.

    Args:
        cache: what the run learns from; see `pipeline.rounds.identity.cache_identity`.

    Raises:
        RedpenError: the run was started with different settings or on a different cache, another process has the
            lock, or the storage refuses a write.
    """
    run = RunDirectory(Path(path), recipe, cache)
    with run.writing():
        run.path.mkdir(parents=True, exist_ok=True)
    refuse_links(run.path)
    if not (run.path / LOCK).exists():
        run._require_run()  # before the lock leaves a file among somebody's own
    with contextlib.ExitStack() as stack:
        with run.writing():
            stack.enter_context(locked(run.path, "trains"))
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
                    continue  # the steps so far are the first ones of the longer run
                found.append(f'train.steps = {was[key]}, now {is_[key]} (only schedule = "constant" can be extended)')
            else:
                found.append(f"{section}.{key} = {was[key]}, now {is_[key]}")
    return found
