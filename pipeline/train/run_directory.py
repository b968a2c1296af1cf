"""A run on disk: what it was made of, its curve, its checkpoints, its adapter.

recipe.toml        the resolved recipe
data.zarr          the round of documents and chats that it learns from, where `redpen sft` made it
run.json           the cache it learns from (digests of every block), an id, and, once it has ended, how
metrics.jsonl      one object a step
tensorboard/       the same as curves
checkpoints/       see pipeline.train.checkpoint
adapter/           PEFT format, once training has ended; or
model/             the whole model, where all of its weights were trained
ledger.json        seconds, tokens and FLOPs by stage, once training has ended
wandb/             what Weights & Biases keeps here, where it was asked for
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from pipeline.config import Recipe, load_recipe
from pipeline.errors import RedpenError
from pipeline.files import sync, write_atomically
from pipeline.run_lock import hold_run

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
# What a kill may leave of a run that had not started.
_BEFORE_START = frozenset({".lock", "recipe.toml", "recipe.toml.partial", "run.json.partial", "data.zarr"})


@dataclass(frozen=True)
class Result:
    """How a run ended: the step, one sentence, and the exit code."""

    step: int
    sentence: str
    exit_code: int


class RunDirectory:
    """The files of one run of a recipe on a cache (see `provenance.cache_identity`). Use `open_run`."""

    def __init__(self, path: Path, recipe: Recipe, cache: dict[str, Any]):
        self.path, self._now, self._cache = path, recipe, cache
        self.recipe = path / "recipe.toml"
        self.metrics = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"
        self.adapter = path / "adapter"
        self.model = path / "model"
        self.ledger = path / "ledger.json"
        self.track = recipe.track
        self._run = path / "run.json"

    @property
    def result(self) -> Result | None:
        """How the run ended, None while it has not, or where the recipe asks for more steps than it had then."""
        result = self._read_run().get("result")
        if result is None or self._now.train.steps > load_recipe(str(self.recipe)).train.steps:
            return None
        return Result(**result)

    @property
    def id(self) -> str:
        """The same for as long as training goes on from what is here: trackers know the run by it."""
        return str(self._read_run()["id"])

    @property
    def made_of(self) -> dict[str, Any]:
        """The recipe and the cache's identity, as JSON has them."""
        return self._now.model_dump(mode="json", exclude={"track"}) | {"cache": self._cache}

    def finish(self, result: Result) -> None:
        """Record how the run ended: its last write."""
        with self.writing():
            self._write_run(self._read_run() | {"result": asdict(result)})

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
        with self.writing(), self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")

    def steps(self) -> Iterator[dict[str, Any]]:
        """The lines so far, each as it was added."""
        if self.metrics.exists():
            with self.metrics.open(encoding="utf-8") as file:
                yield from map(json.loads, file)

    def sync_metrics(self) -> None:
        """Have the lines so far on the disk itself: a checkpoint must not outlive them."""
        sync(self.metrics)

    def rewind_metrics(self, step: int) -> None:
        """Keep the lines of the first `step` steps: those after a checkpoint will be written again."""
        kept = []
        lines = self.metrics.read_text(encoding="utf-8").splitlines() if self.metrics.exists() else []
        for line in lines:
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                break  # cut off by a kill
        if len(kept) != step:
            raise RedpenError(
                f"run {self.path}: metrics.jsonl holds {len(kept)} of the {step} steps of its checkpoint; "
                "restore it, or start another --run"
            )
        if self.metrics.exists():  # else nothing was logged, and a run that fails before its start leaves nothing
            with self.writing():
                write_atomically(self.metrics, "".join(kept))

    def _read_run(self) -> dict[str, Any]:
        try:
            value = json.loads(self._run.read_text(encoding="utf-8"))
            return dict(value)
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError) as error:
            raise RedpenError(f"run {self.path}: run.json cannot be read ({error}); start another --run") from None

    def _write_run(self, value: dict[str, Any]) -> None:
        write_atomically(self._run, json.dumps(value, indent=1) + "\n")

    def start(self) -> None:
        """Record what the run is made of, once everything that could be wrong with it has been found right."""
        known = self._read_run().get("id") if self.checkpoints.exists() else None
        with self.writing():
            # In this order: a run that goes on for more steps is then never taken for finished.
            self._write_run({"cache": self._cache, "id": known or secrets.token_hex(4), "result": None})
            write_atomically(self.recipe, self._now.to_toml())

    def _require_same(self) -> None:
        """Raise `RedpenError` where the directory holds something else, or the steps of another recipe or cache."""
        run = self._read_run()
        if not run:
            if found := sorted(p.name for p in self.path.iterdir() if p.name not in _BEFORE_START):
                raise RedpenError(
                    f"run {self.path}: expected a run of redpen or an empty directory, found {found[0]}; "
                    "choose another --run"
                )
        elif run.get("result") is not None or self.checkpoints.exists():  # else there is nothing to protect yet
            differing = _recipe_differences(load_recipe(str(self.recipe)), self._now)
            differing += [
                f"cache {key}: {was}, now {self._cache.get(key)}"
                for key, was in run.get("cache", {}).items()
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
    with ExitStack() as held:
        with run.writing():
            run.path.mkdir(parents=True, exist_ok=True)
            held.enter_context(hold_run(run.path, "trains"))
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
