"""New knowledge without losing old behaviour: fine-tune, then distil from the weights as they were, then check both.

    redpen continual RECIPE --cache URL --run DIR [--data FILE=SHARE ...]

1. `redpen sft` on documents and chats, in DIR/sft: the student learns what is new, and its behaviour suffers.
2. `redpen distill` of that student, in DIR/distill: its rollouts to `prompts.path` (chats without answers) are scored
   by the recipe's teacher, which is the student as it was. No labels are needed.
3. The gate: every `[[continual.gate]]` evaluation must hold, or the exit code is 4 and one line says what does not.

DIR/adapter (DIR/model with `train.method = "full"`) is the result either way. The next batch of documents starts from
it: `--set student.adapter=DIR/adapter`, with the same teacher. What there is to do follows from what is on disk, so
the same command continues after any kill.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from pipeline import distill
from pipeline.config import GateConfig, ModelConfig, Recipe, StudentConfig, load_stored_recipe
from pipeline.console import results, say, show, without_suggestions
from pipeline.distributed.ranks import join_ranks
from pipeline.engines.heldout import HeldOutPrompts
from pipeline.errors import ConfigError, RedpenError
from pipeline.evaluate.table import share
from pipeline.files import atomic_directory, write_atomically
from pipeline.models import load as models
from pipeline.runs.directory import Result, RunDirectory, open_run
from pipeline.sft import stage as sft
from pipeline.text.answers import share_right
from pipeline.train import ledger

EXIT_GATE = 4
#: Parts of the recipe that decide what comes out, beside those that every run compares.
_SECTIONS = ("teacher", "prompts", "rollouts", "score", "sft", "distill", "continual")
_ROUNDING = 1e-9
#: The students that the gate compares.
BEFORE, TUNED, AFTER = "before", "after sft", "after distillation"

#: Measured values with their intervals by gate and student.
Measured = dict[str, dict[str, dict[str, float]]]


def run(recipe: Recipe, cache_url: str, run_dir: str | os.PathLike[str], data: Sequence[str] = ()) -> int:
    """Go through all three, from wherever an earlier call left off; 0, or `EXIT_GATE`.

    Under torchrun every rank calls this.

    Raises:
        RedpenError, CacheError: what the stages raise, no gate is given, or the run was started with other settings.
    """
    if not recipe.continual.gate:
        raise ConfigError(
            "continual.gate is not set: give one [[continual.gate]] for what must rise, one for what must stay"
        )
    with contextlib.ExitStack() as held, join_ranks() as ranks:
        recipe = sft.with_data(recipe, data)
        made = ranks.broadcast(lambda: _open(held, recipe, cache_url, run_dir))
        result = ranks.broadcast(lambda: made.result)
        if result is None:
            ranks.broadcast(lambda: list(_asked(recipe)))  # a gate that cannot be measured is refused before the work
            if ranks.is_main_process:
                made.start()
            if models.made_student(recipe.student, made.path / "sft") is None:
                with without_suggestions():
                    sft.run(recipe, (), made.path / "sft")
                models.free_memory()
            tuned = models.made_student(recipe.student, made.path / "sft")
            assert tuned is not None
            distill.run(recipe.model_copy(update={"student": tuned}), cache_url, made.path / "distill")
            models.free_memory()
            result = ranks.broadcast(lambda: _finish(made, recipe, tuned))
        if ranks.is_main_process:
            show(f"{made.path}: {result.sentence}")
        return result.exit_code if ranks.is_main_process else 0


def _open(
    held: contextlib.ExitStack, recipe: Recipe, cache_url: str, run_dir: str | os.PathLike[str]
) -> RunDirectory:
    """The run, locked until `held` closes. Raises `RedpenError` where it was started with other settings."""
    made = held.enter_context(open_run(run_dir, recipe, {"url": cache_url}))
    if made.recipe.exists():
        before = load_stored_recipe(made.recipe)
        differing = [f"[{name}]" for name in _SECTIONS if getattr(before, name) != getattr(recipe, name)]
        if differing:
            raise RedpenError(
                f"run {made.path} was started with another {', '.join(differing)}; choose another --run"
            )
    return made


def _finish(made: RunDirectory, recipe: Recipe, tuned: StudentConfig) -> Result:
    """Keep what was made, measure the gate, and record how it ended."""
    after = models.made_student(tuned, made.path / "distill") or tuned
    kept, source = made.made, after.adapter if recipe.train.method == "lora" else after.model
    with made.writing(), atomic_directory(kept) as partial:
        assert source is not None
        shutil.copytree(source, partial, dirs_exist_ok=True)
    measured = _measure(recipe, {BEFORE: recipe.student, TUNED: tuned, AFTER: after})
    with made.writing():
        write_atomically(made.path / "gate.json", json.dumps(measured, indent=1) + "\n")
        write_atomically(made.ledger, json.dumps(_ledger(made.path), indent=1) + "\n")
    _show(measured)
    faults = [fault for gate in recipe.continual.gate if (fault := fault_of(gate, measured[gate.name])) is not None]
    sentence = f"the gate does not hold: {'; '.join(faults)}" if faults else "the gate holds"
    result = Result(1, f"{sentence}; the {kept.name} is {kept}", EXIT_GATE if faults else 0)
    made.finish(result)
    return result


def _measure(recipe: Recipe, students: dict[str, ModelConfig]) -> Measured:
    """Greedy responses of every student to every gate's prompts."""
    asked = _asked(recipe)
    found: Measured = {name: {} for name in asked}
    for label, cfg in students.items():
        model = models.load_model(cfg)
        for name, prompts in asked.items():
            right = np.zeros((len(prompts.prompts), 1), np.bool_)
            right[: prompts.count(model)] = True
            found[name][label] = asdict(share_right(right))
            say(f"{label}: {name} {found[name][label]['value']:.1%} of {len(right)}")
        del model
        models.free_memory()
    return found


def _asked(recipe: Recipe) -> dict[str, HeldOutPrompts]:
    """The prompts of every gate. Raises `RedpenError` where they cannot be used."""
    found = {}
    for gate in recipe.continual.gate:
        of_gate = recipe.eval.model_copy(update={"path": gate.path, "limit": gate.limit})
        asking, setting = recipe.model_copy(update={"eval": of_gate}), f"continual.gate.{gate.name}.path"
        found[gate.name] = HeldOutPrompts.load(asking, gate.metric, gate.limit, setting)
    return found


def fault_of(gate: GateConfig, measured: dict[str, dict[str, float]]) -> str | None:
    """What of a gate does not hold."""
    before, tuned, after = (measured[label]["value"] for label in (BEFORE, TUNED, AFTER))
    rise = after - before
    if gate.at_least is not None and after < gate.at_least:
        return f"{gate.name} is {after:.1%}, below {gate.at_least:.1%}"
    if gate.rise is not None and rise < gate.rise - _ROUNDING:
        return f"{gate.name} rose by {100 * rise:.1f} points, less than {100 * gate.rise:.1f}"
    if gate.fall is not None and -rise > gate.fall + _ROUNDING:
        return f"{gate.name} fell by {-100 * rise:.1f} points, more than {100 * gate.fall:.1f}"
    if gate.fall_since_sft is not None and tuned - after > gate.fall_since_sft + _ROUNDING:
        lost = f"{gate.name} fell by {100 * (tuned - after):.1f} points after fine-tuning"
        return f"{lost}, more than {100 * gate.fall_since_sft:.1f}"
    return None


def _ledger(path: Path) -> dict[str, Any]:
    """What both parts cost."""
    (tuning,) = ledger.read(path / "sft").values()  # documents and chats cost nothing
    return ledger.table({"sft": tuning, **ledger.read(path / "distill")})


def _show(measured: Measured) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("greedy")
    for label in (BEFORE, TUNED, AFTER):
        table.add_column(label, justify="right")
    for name, by_student in measured.items():
        table.add_row(name, *map(share, by_student.values()))
    results().print(table)
