"""What an evaluation is about: a run's student before and after, or one model; the teacher; where the results go."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import ModelConfig, Recipe, TeacherConfig, load_recipe, load_stored_recipe
from pipeline.console import warn
from pipeline.errors import ConfigError, RedpenError
from pipeline.files import read_json, refuse_link
from pipeline.models import load as models

BEFORE, AFTER = "before", "after"
#: The figures of a run's evaluation.
FIGURES = "eval.json"
_WANTED = {
    "--prompts": "a file of prompts",
    "--teacher": "a model's path or Hub id",
    "--recipe": "a recipe",
    "--out": "a file",
}


@dataclass(frozen=True)
class Job:
    """What to measure: responses to the prompts of `eval.path`, if there is one, and the tasks of `eval.tasks`.

    Attributes:
        students: by label; a run's are BEFORE and AFTER.
        out: where the figures go, if anywhere.
        run: the run directory in which rollouts are kept for the report; None for a bare model, and where the
            figures go elsewhere.
    """

    recipe: Recipe
    students: Mapping[str, ModelConfig]
    teacher: TeacherConfig | None
    out: Path | None
    run: Path | None


def kept_in(target: str, out: str | os.PathLike[str] | None) -> Path | None:
    """The run that keeps what is measured; None for a bare model, and where the figures go elsewhere."""
    run_dir = Path(target)
    elsewhere = out is not None and os.path.realpath(out) != os.path.realpath(run_dir / FIGURES)
    return run_dir if _is_run(run_dir) and not elsewhere else None


def job_of(
    target: str,
    prompts: str | None,
    teacher: str | None,
    overrides: Sequence[str],
    recipe_name: str | None,
    out: str | os.PathLike[str] | None,
) -> Job:
    """The job that the arguments of `stage.run` describe. Raises `RedpenError` where they do not fit together."""
    run_dir, is_run = Path(target), _is_run(Path(target))
    for option, given in (("--prompts", prompts), ("--teacher", teacher), ("--recipe", recipe_name), ("--out", out)):
        if given is not None and not os.fspath(given):
            raise ConfigError(f"{option}: expected {_WANTED[option]}, got an empty text")
    _refuse_two_answers(overrides, prompts, is_run)
    if is_run:
        if recipe_name is not None:
            raise ConfigError(f"--recipe: {target} is a run and brings its own recipe; use --set to change a setting")
        recipe = load_stored_recipe(run_dir / "recipe.toml", overrides)
        trained = models.made_student(recipe.student, run_dir)
        if trained is None:
            made = "adapter" if recipe.train.method == "lora" else "model"
            raise RedpenError(f"run {target}: has no {made} yet; finish it with the same `redpen train` command")
        students = {BEFORE: recipe.student, AFTER: trained}
        chosen: TeacherConfig | None = _run_teacher(recipe, run_dir)
    else:
        if run_dir.is_dir() and not (run_dir / "config.json").is_file():
            raise RedpenError(f"{target}: expected a run of `redpen train`, or a model; this directory is neither")
        # the embedded models were taught on bare sums, which their recipe says
        recipe_name = recipe_name or ("toy" if target.startswith("toy:") else None)
        recipe = _recipe_for(target, prompts, teacher, overrides, recipe_name)
        students = {"model": recipe.student}
        chosen = None
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
    run = kept_in(target, out)
    written = run / FIGURES if run else Path(out) if out is not None else None
    if written is not None:
        _require_writable(written, out)
    recipe = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"path": path})})
    return Job(recipe, students, chosen, written, run)


def _is_run(path: Path) -> bool:
    return (path / "recipe.toml").is_file()


def _refuse_two_answers(overrides: Sequence[str], prompts: str | None, is_run: bool) -> None:
    """Raise `ConfigError` where --set says what an argument says too, or would have no effect on what is measured."""
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


def _require_writable(path: Path, out: str | os.PathLike[str] | None) -> None:
    """Raise `RedpenError` where the figures could not be written, hours before they are."""
    name, directory = f"--out {out}" if out is not None else str(path), path.parent
    if not directory.is_dir():
        raise ConfigError(f"{name}: there is no directory {directory}")
    if path.is_dir():
        raise ConfigError(f"{name}: expected a file such as {path / FIGURES}, found a directory")
    refuse_link(path)
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
    try:
        name = read_json(run_dir / "run.json")["cache"]["teacher"]
    except (OSError, ValueError, KeyError, TypeError):
        name = recipe.train.teacher
    found = next((teacher for teacher in recipe.teacher if teacher.name == name), recipe.teacher[0])
    if found.name != name and len(recipe.teacher) > 1:
        warn(f"{run_dir} learned from {name}; reverse KL is to {found.name} alone, --teacher MODEL chooses another")
    return found
