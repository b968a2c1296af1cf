"""What an evaluation is about: a run's student before and after, or one model; the teacher; where the results go."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline import models
from pipeline.config import ModelConfig, Recipe, TeacherConfig, load_recipe
from pipeline.console import warn
from pipeline.errors import ConfigError, RedpenError

BEFORE, AFTER = "before", "after"


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


def job_of(
    target: str,
    prompts: str | None,
    teacher: str | None,
    overrides: Sequence[str],
    recipe_name: str | None,
    out: str | os.PathLike[str] | None,
) -> Job:
    """The job that the arguments of `stage.run` describe. Raises `RedpenError` where they do not fit together."""
    run_dir = Path(target)
    is_run = (run_dir / "recipe.toml").is_file()
    if is_run:
        if recipe_name is not None:
            raise ConfigError(f"--recipe: {target} is a run and brings its own recipe; use --set to change a setting")
        recipe = load_recipe(str(run_dir / "recipe.toml"), overrides)
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
    if teacher == "":
        raise ConfigError("--teacher: expected a model's path or Hub id, got an empty text")
    if teacher is not None:
        known = (t for t in recipe.teacher if t.model == teacher)
        chosen = next(known, TeacherConfig(model=teacher, dtype="auto", device=recipe.student.device))
    path = prompts or recipe.eval.path
    if path is None and not recipe.eval.tasks:
        raise ConfigError("eval.path is not set: give the prompts with --prompts FILE, or --tasks to measure")
    if out is not None and not Path(out).parent.is_dir():
        raise ConfigError(f"--out {out}: there is no directory {Path(out).parent}")
    kept_in = run_dir if is_run and out is None else None
    written = kept_in / "eval.json" if kept_in else Path(out) if out else None
    recipe = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"path": path})})
    return Job(recipe, students, chosen, written, kept_in)


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
        name = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))["cache"]["teacher"]
    except (OSError, ValueError, KeyError, TypeError):
        name = recipe.train.teacher
    found = next((teacher for teacher in recipe.teacher if teacher.name == name), recipe.teacher[0])
    if found.name != name and len(recipe.teacher) > 1:
        warn(f"{run_dir} learned from {name}; reverse KL is to {found.name} alone, --teacher MODEL chooses another")
    return found
