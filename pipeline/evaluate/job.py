"""What an evaluation measures, from the arguments of `redpen eval`: students, a teacher, and where results go."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import ModelConfig, Recipe, TeacherConfig, load_recipe
from pipeline.console import warn
from pipeline.errors import ConfigError, RedpenError
from pipeline.files import check_output, refuse_link
from pipeline.runs.files import EVAL_FIGURES, RECIPE, read_recipe, read_record
from pipeline.runs.trained_student import trained_student

BEFORE, AFTER = "before", "after"
#: How a file of figures begins.
FIGURES_BEGIN = b'{\n "prompts":'
_WANTED = {
    "--prompts": "a file of prompts",
    "--teacher": "a model's path or Hub id",
    "--recipe": "a recipe",
    "--out": "a file",
}


@dataclass(frozen=True)
class EvalJob:
    """What to measure: responses to the prompts of `eval.path`, if there is one, and the tasks of `eval.tasks`.

    Attributes:
        students: by label; a run's are BEFORE and AFTER.
        out: the file for the figures, if any.
        run: the run directory that keeps the rollouts for the report; None for a bare model, or if the figures are
            written elsewhere.
    """

    recipe: Recipe
    students: Mapping[str, ModelConfig]
    teacher: TeacherConfig | None
    out: Path | None
    run: Path | None


def run_of(target: str, out: str | os.PathLike[str] | None) -> Path | None:
    """The run that keeps the results; None for a bare model, or if the figures are written elsewhere."""
    run_dir = Path(target)
    elsewhere = out is not None and os.path.realpath(out) != os.path.realpath(run_dir / EVAL_FIGURES)
    return run_dir if _is_run(run_dir) and not elsewhere else None


def plan_eval(
    target: str,
    prompts: str | None,
    teacher: str | None,
    overrides: Sequence[str],
    recipe_name: str | None,
    out: str | os.PathLike[str] | None,
) -> EvalJob:
    """The job that the arguments of `stage.run` describe. Raises `RedpenError` if they contradict one another."""
    run_dir, is_run = Path(target), _is_run(Path(target))
    for option, given in (("--prompts", prompts), ("--teacher", teacher), ("--recipe", recipe_name), ("--out", out)):
        if given is not None and not os.fspath(given):
            raise ConfigError(f"{option}: expected {_WANTED[option]}, got an empty text")
    _check_overrides(overrides, prompts, is_run)
    if is_run:
        if recipe_name is not None:
            raise ConfigError(f"--recipe: {target} is a run and brings its own recipe; use --set to change a setting")
        recipe = read_recipe(run_dir, overrides)
        trained = trained_student(recipe.student, run_dir)
        if trained is None:
            made = "adapter" if recipe.train.method == "lora" else "model"
            raise RedpenError(f"run {target}: has no {made} yet; finish it with the same `redpen train` command")
        students = {BEFORE: recipe.student, AFTER: trained}
        chosen: TeacherConfig | None = _run_teacher(recipe, run_dir)
    else:
        if run_dir.is_dir() and not (run_dir / "config.json").is_file():
            raise RedpenError(f"{target}: expected a run of `redpen train`, or a model; this directory is neither")
        is_given = recipe_name is not None
        # the embedded models were trained without a chat template, as their recipe says
        recipe_name = recipe_name or ("toy" if target.startswith("toy:") else None)
        recipe = _recipe_for(target, prompts, teacher, overrides, recipe_name)
        students = {"model": recipe.student}
        chosen = _recipe_teacher(recipe, target) if is_given else None
    if teacher is not None:
        known = (t for t in recipe.teacher if t.model == teacher)
        chosen = next(known, TeacherConfig(model=teacher, dtype="auto", device=recipe.student.device))
    path = prompts or recipe.eval.path
    if path is None and not recipe.eval.tasks:
        raise ConfigError("eval.path is not set: give the prompts with --prompts FILE, or --tasks to measure")
    if path is None and teacher is not None:
        raise ConfigError(
            f"--teacher {teacher}: reverse KL is measured on responses to prompts, and eval.path is not set; give "
            "the prompts with --prompts FILE, or leave --teacher out"
        )
    run = run_of(target, out)
    written = run / EVAL_FIGURES if run else Path(out) if out is not None else None
    if written is not None:
        _check_writable(written, out, is_own=run is not None)
    recipe = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"path": path})})
    return EvalJob(recipe, students, chosen, written, run)


def _is_run(path: Path) -> bool:
    return (path / RECIPE).is_file()


def _check_overrides(overrides: Sequence[str], prompts: str | None, is_run: bool) -> None:
    """Raise `ConfigError` if --set repeats an argument, or would have no effect on what is measured."""
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key == "eval.path" and prompts is not None:
            raise ConfigError("--set eval.path and --prompts: expected one of them, got both")
        if key in ("student.model", "student.adapter") and is_run:
            raise ConfigError(f"--set {key}: a run is measured with the student it trained; evaluate MODEL instead")
        if key == "student.model":
            raise ConfigError("--set student.model: the model is the command's argument; leave the setting out")
        if key.startswith("train.") and is_run:
            raise ConfigError(f"--set {key}: the run has been trained, so the setting would change nothing")


def _check_writable(path: Path, out: str | os.PathLike[str] | None, *, is_own: bool) -> None:
    """Raise `RedpenError`, hours before they are written, if the figures cannot be, or would replace something else.

    Args:
        is_own: the file is the run's own, which may be replaced whatever it holds.
    """
    name, directory = f"--out {out}" if out is not None else str(path), path.parent
    if not directory.is_dir():
        raise ConfigError(f"{name}: there is no directory {directory}")
    if path.is_dir():
        raise ConfigError(f"{name}: expected a file such as {path / EVAL_FIGURES}, found a directory")
    if is_own:
        refuse_link(path)
    else:
        check_output(path, FIGURES_BEGIN, "the figures of an evaluation")
    if not os.access(directory, os.W_OK):
        raise ConfigError(f"{name}: {directory} cannot be written; choose another file with --out")


def _recipe_for(
    target: str, prompts: str | None, teacher: str | None, overrides: Sequence[str], name: str | None
) -> Recipe:
    """Settings for a bare model: those of a recipe, or the defaults."""
    if name is not None:
        recipe = load_recipe(name, overrides)
        return recipe.model_copy(update={"student": recipe.student.model_copy(update={"model": target})})
    sections = {
        "student": {"model": target, "dtype": "auto"},
        "teacher": {"model": teacher or target},
        "prompts": {"path": prompts or "-"},  # without any, tasks bring their own
    }
    return Recipe.from_dict(sections, f"eval of {target}", overrides)


def _run_teacher(recipe: Recipe, run_dir: Path) -> TeacherConfig:
    """The teacher that the run learned from."""
    record = read_record(run_dir)
    name = recipe.train.teacher if record is None else record.cache.get("teacher", recipe.train.teacher)
    return _teacher_named(recipe, name, f"{run_dir} learned from {name or 'no teacher'}")


def _recipe_teacher(recipe: Recipe, target: str) -> TeacherConfig | None:
    """The teacher of the recipe that is given for a bare model; None if that is the same model."""
    names = ", ".join(recipe.teacher_names)
    found = _teacher_named(recipe, recipe.train.teacher or names, f"{target} is compared with the recipe's {names}")
    is_same = (found.model, found.adapter) == (target, recipe.student.adapter) and not found.renders
    return None if is_same else found


def _teacher_named(recipe: Recipe, name: object, reason: str) -> TeacherConfig:
    """The teacher of this name; of several without it the first, with a warning."""
    found = next((teacher for teacher in recipe.teacher if teacher.name == name), recipe.teacher[0])
    if found.name != name and len(recipe.teacher) > 1:
        warn(f"{reason}; reverse KL is to {found.name} alone, --teacher MODEL chooses another")
    return found
