"""New knowledge without losing old behaviour: fine-tune, distil from the original weights, then check both.

    redpen continual RECIPE --cache URL --run DIR [--data FILE=SHARE ...]

1. `redpen sft` on documents and chats, in DIR/sft: the student learns what is new, and its behaviour suffers.
2. `redpen distill` of that student, in DIR/distill: its rollouts to `prompts.path` (chats without answers) are scored
   by the recipe's teacher, which is the student before fine-tuning. No labels are needed.
3. The gate: every `[[continual.gate]]` evaluation must hold, otherwise the exit code is 4 and one line says why.

DIR/adapter (DIR/model with `train.method = "full"`) is the result either way. The next batch of documents starts from
it: `--set student.adapter=DIR/adapter`, with the same teacher. What is left to do follows from what is on disk, so
the same command continues after any kill. With another gate or [eval], a finished run measures the gate again and
trains nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
from rich.table import Table

from pipeline import distill
from pipeline.config import GateConfig, ModelConfig, Recipe, StudentConfig, load_stored_recipe
from pipeline.console import results, say, show, without_suggestions
from pipeline.distributed.ranks import join_ranks
from pipeline.engines.heldout import HeldOutPrompts
from pipeline.errors import ConfigError, RedpenError
from pipeline.evaluate.table import percent
from pipeline.files import atomic_directory, write_atomically
from pipeline.models import load as models
from pipeline.runs.directory import Result, RunDirectory, open_run
from pipeline.runs.files import DISTILL, GATE, SFT
from pipeline.runs.trained_student import trained_student
from pipeline.sft import stage as sft
from pipeline.text.answers import fraction_right
from pipeline.train import ledger

EXIT_GATE = 4
#: Sections of the recipe that decide the result, beside those that every run compares.
_SECTIONS = ("teacher", "prompts", "rollouts", "score", "sft", "distill")
#: Settings of [eval] that the gate measures by.
_MEASURED_BY = {"match", "answer_pattern", "format", "max_response_tokens"}
_ROUNDING = 1e-9
#: The students that the gate compares.
BEFORE, TUNED, AFTER = "before", "after sft", "after distillation"

#: Measured values with their intervals by gate and student.
Measured = dict[str, dict[str, dict[str, float]]]


def run(recipe: Recipe, cache_url: str, run_dir: str | os.PathLike[str], data: Sequence[str] = ()) -> int:
    """Run all three, from wherever an earlier call left off; returns exit code 0, or `EXIT_GATE`.

    Under torchrun every rank calls this.

    Raises:
        RedpenError, CacheError: what the stages raise, no gate is set, or the run has different settings.
    """
    if not recipe.continual.gate:
        raise ConfigError(
            "continual.gate is not set: give one [[continual.gate]] for what must rise, one for what must stay"
        )
    with contextlib.ExitStack() as stack, join_ranks() as ranks:
        recipe = sft.with_data(recipe, data)
        run, result = ranks.broadcast(lambda: _open(stack, recipe, cache_url, run_dir))
        if result is None:
            ranks.broadcast(lambda: list(_gate_prompts(recipe)))  # refuse unusable prompts first
            if ranks.is_main_process:
                run.start()
            with without_suggestions():
                if trained_student(recipe.student, run.path / SFT) is None:
                    # better now than after fine-tuning
                    ranks.broadcast(lambda: distill.check_settings(recipe, cache_url))
                    sft.run(recipe, (), run.path / SFT)
                    models.free_memory()
                tuned = trained_student(recipe.student, run.path / SFT)
                assert tuned is not None
                distill.run(recipe.model_copy(update={"student": tuned}), cache_url, run.path / DISTILL)
                models.free_memory()
            result = ranks.broadcast(lambda: _finish(run, recipe, tuned))
        if ranks.is_main_process:
            show(f"{run.path}: {result.sentence}")
        return result.exit_code if ranks.is_main_process else 0


def _open(
    stack: contextlib.ExitStack, recipe: Recipe, cache_url: str, run_dir: str | os.PathLike[str]
) -> tuple[RunDirectory, Result | None]:
    """The run, locked until `stack` closes, and its result. Raises `RedpenError` if its settings were different."""
    run = stack.enter_context(open_run(run_dir, recipe, {"url": cache_url}))
    if run.recipe.exists():
        before = load_stored_recipe(run.recipe)
        differing = [f"[{name}]" for name in _SECTIONS if getattr(before, name) != getattr(recipe, name)]
        if differing:
            raise RedpenError(
                f"run {run.path} was started with a different {', '.join(differing)}; choose another --run"
            )
        if run.result is not None and _gate_settings(before) != _gate_settings(recipe):
            say(f"run {run.path}: [eval] or the gate has changed since, so the gate is measured again")
            return run, None
    return run, run.result


def _gate_settings(recipe: Recipe) -> tuple[object, ...]:
    return recipe.continual, recipe.eval.model_dump(include=_MEASURED_BY)


def _finish(run: RunDirectory, recipe: Recipe, tuned: StudentConfig) -> Result:
    """Copy the trained student, measure the gate, and record how it ended."""
    after = trained_student(tuned, run.path / DISTILL) or tuned
    source = after.adapter if recipe.train.method == "lora" else after.model
    with run.writing(), atomic_directory(run.trained) as partial:
        assert source is not None
        shutil.copytree(source, partial, dirs_exist_ok=True)
    measured = _measure(recipe, {BEFORE: recipe.student, TUNED: tuned, AFTER: after})
    (sft_cost,) = ledger.read(run.path / SFT).values()  # documents and chats cost nothing
    costs = {"sft": sft_cost, **ledger.read(run.path / DISTILL)}
    with run.writing():
        write_atomically(run.path / GATE, json.dumps(measured, indent=1) + "\n")
        write_atomically(run.ledger, json.dumps(ledger.table(costs), indent=1) + "\n")
    _show(measured)
    faults = [fault for gate in recipe.continual.gate if (fault := fault_of(gate, measured[gate.name])) is not None]
    sentence = f"the gate does not hold: {'; '.join(faults)}" if faults else "the gate holds"
    sentence += time.strftime(" (measured %Y-%m-%d %H:%M UTC)", time.gmtime())
    result = Result(1, f"{sentence}; the {run.trained.name} is {run.trained}", EXIT_GATE if faults else 0)
    run.finish(result)
    return result


def _measure(recipe: Recipe, students: dict[str, ModelConfig]) -> Measured:
    """Score greedy responses of every student to the prompts of every gate."""
    gates = _gate_prompts(recipe)
    found: Measured = {name: {} for name in gates}
    for label, cfg in students.items():
        model = models.load_model(cfg)
        for name, prompts in gates.items():
            right = np.zeros((len(prompts.prompts), 1), np.bool_)
            right[: prompts.count(model)] = True
            found[name][label] = asdict(fraction_right(right))
            say(f"{label}: {name} {found[name][label]['value']:.1%} of {len(right)}")
        del model
        models.free_memory()
    return found


def _gate_prompts(recipe: Recipe) -> dict[str, HeldOutPrompts]:
    """The prompts of every gate. Raises `RedpenError` if they cannot be used."""
    found = {}
    for gate in recipe.continual.gate:
        prompts = recipe.eval.model_copy(update={"path": gate.path, "limit": gate.limit})
        setting = f"continual.gate.{gate.name}.path"
        gate_recipe = recipe.model_copy(update={"eval": prompts})
        found[gate.name] = HeldOutPrompts.load(gate_recipe, gate.metric, gate.limit, setting)
    return found


def fault_of(gate: GateConfig, measured: dict[str, dict[str, float]]) -> str | None:
    """The limit of a gate that the measured values break, as a sentence; None if it holds."""
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


def _show(measured: Measured) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("greedy")
    for label in (BEFORE, TUNED, AFTER):
        table.add_column(label, justify="right")
    for name, by_student in measured.items():
        table.add_row(name, *map(percent, by_student.values()))
    results().print(table)
