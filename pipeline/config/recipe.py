"""`Recipe`, all settings of redpen, and reading one from a TOML file.

Whatever is wrong with a recipe is a `ConfigError` of one line that names the file and the setting, what was expected
and what was found.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Self

from pydantic import Field, PrivateAttr, ValidationError, model_validator

from pipeline import credentials, files
from pipeline.config import checks, toml
from pipeline.config.messages import clip, did_you_mean
from pipeline.config.models import ModelConfig, Placement, PromptsConfig, StudentConfig, TeacherConfig
from pipeline.config.schema import Section, explain
from pipeline.config.stages import EvalConfig, RolloutsConfig, ScoreConfig, VllmConfig
from pipeline.config.training import (
    ContinualConfig,
    DistillConfig,
    RewardConfig,
    SelectConfig,
    SftConfig,
    TrackConfig,
    TrainConfig,
)
from pipeline.errors import ConfigError

#: Most bytes of a recipe. One stored in a run may be larger by the defaults that were added.
_MAX_BYTES, _MAX_STORED_BYTES = 2**20, 2**21

#: Old names of settings, and the new ones. Recipes stored in runs may still hold the old names.
RENAMED = {
    "rollouts.entry_prompts": "rollouts.format_check_prompts",
    "rollouts.entry_share": "rollouts.format_check_min",
}
#: Settings that were removed: the one value that is still accepted, as stored recipes hold it, and the reason.
REMOVED: dict[str, tuple[Any, str]] = {
    "train.residual_baseline": (False, "nobody has measured that it helps"),
}


class Recipe(Section):
    """What to distil, from which teachers, on which prompts, and how."""

    student: StudentConfig = Field(description="the model that samples and learns")
    teacher: list[TeacherConfig] = Field(min_length=1, description="[teacher], or several [[teacher]] with names")
    prompts: PromptsConfig = Field(description="training prompts")
    rollouts: RolloutsConfig = Field(default=RolloutsConfig(), description="sampling")
    score: ScoreConfig = Field(default=ScoreConfig(), description="scoring")
    vllm: VllmConfig = Field(default=VllmConfig(), description="the vLLM engine")
    train: TrainConfig = Field(default=TrainConfig(), description="training")
    reward: RewardConfig = Field(default=RewardConfig(), description="task rewards")
    select: SelectConfig = Field(default=SelectConfig(), description="which tokens are trained on")
    distill: DistillConfig = Field(default=DistillConfig(), description="rounds of sampling, scoring and training")
    eval: EvalConfig = Field(default=EvalConfig(), description="evaluation")
    sft: SftConfig = Field(default=SftConfig(), description="fine-tuning on documents and chats")
    continual: ContinualConfig = Field(default=ContinualConfig(), description="new knowledge and old behaviour")
    track: TrackConfig = Field(default=TrackConfig(), description="experiment trackers")

    _source: str = PrivateAttr(default="")

    def __eq__(self, other: object) -> bool:
        """Whether all settings are equal; comments do not count."""
        return isinstance(other, Recipe) and self.__dict__ == other.__dict__

    @model_validator(mode="before")
    @classmethod
    def _no_credentials(cls, data: Any) -> Any:
        for path, text in credentials.in_settings(data):
            raise ValueError(f"{path} {credentials.message(text, path)}")
        return data

    @model_validator(mode="before")
    @classmethod
    def _one_teacher_or_several(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("teacher"), dict):
            data = data | {"teacher": [data["teacher"]]}
        return data

    @model_validator(mode="after")
    def _no_conflicts(self) -> Self:
        if conflict := checks.find_conflict(self):
            raise ValueError(conflict)
        return self

    def placement(self, model: ModelConfig) -> Placement:
        """Where a model is scored. The student provides the candidates, so it is scored in this process."""
        if isinstance(model, TeacherConfig):
            return model.placement or self.score.placement
        return self.score.placement if self.score.placement in ("resident", "streamed") else "resident"

    @property
    def source(self) -> str:
        """The TOML that the recipe was read from; `to_toml` takes comments from it."""
        return self._source

    @property
    def has_rewards(self) -> bool:
        """Whether training uses task rewards."""
        return self.reward.coefficient > 0

    @property
    def has_teacher(self) -> bool:
        """Whether training uses a teacher's scores."""
        train = self.train
        return train.loss != "cross_entropy" and train.advantage != "constant" and self.reward.teacher_weight > 0

    @property
    def teacher_names(self) -> list[str]:
        return [teacher.name for teacher in self.teacher]

    @classmethod
    def from_dict(
        cls,
        data: dict[str, Any],
        where: str = "recipe",
        overrides: Sequence[str] = (),
        *,
        source: str = "",
        stored: bool = False,
    ) -> Recipe:
        """A recipe from the tables of a TOML file, after `section.key=value` overrides.

        Args:
            where: what messages call the data.
            source: the TOML text of the data; `to_toml` keeps its comments.
            stored: the data are of a run, and may hold old names of settings.

        Raises:
            ConfigError: one line about the first problem.
        """
        toml.check_values(data, where)
        data = copy.deepcopy(data)
        if stored:
            _rename(data)
        overridden = [toml.apply_override(cls, data, text) for text in overrides]
        _refuse_old_names(data, where, overridden)
        toml.check_values(data, "--set")
        try:
            recipe = cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError(explain(cls, error, data, where, overridden)) from None
        recipe._source = source
        return recipe

    def to_toml(self, *, explained: bool = False) -> str:
        """The whole recipe, defaults and the user's comments included, as TOML that reads back to an equal recipe.

        `explained` adds to every setting what it means and what it accepts.
        """
        return toml.to_toml(self, self._source, explained=explained)

    def warnings(self) -> list[str]:
        """One line for each setting that is known to work badly, or that has no effect."""
        return checks.find_warnings(self)


def _rename(data: dict[str, Any]) -> None:
    for old, new in RENAMED.items():
        (section, key), new_key = old.split("."), new.rpartition(".")[2]
        table = data.get(section)
        if isinstance(table, dict) and key in table:
            table.setdefault(new_key, table.pop(key))


def _refuse_old_names(data: dict[str, Any], where: str, overridden: Sequence[str]) -> None:
    """Raise `ConfigError` for settings that were renamed or removed; drop removed ones with the old default."""
    for name in (*RENAMED, *REMOVED):
        section, key = name.split(".")
        table = data.get(section)
        if not isinstance(table, dict) or key not in table:
            continue
        source = "--set" if name in overridden else f"{where}:"
        if name in RENAMED:
            raise ConfigError(f"{source} {name} was renamed; use {RENAMED[name]}")
        accepted, reason = REMOVED[name]
        if table.pop(key) != accepted:
            raise ConfigError(f"{source} {name} was removed ({reason}); leave it out")


# -------------------------------------------------------------------------------------------------------------- files


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a shipped recipe by its name, or a TOML file, and apply `section.key=value` overrides.

    An override's value is TOML; what is not valid TOML is taken as text, and an empty value restores the default.
    Raises `ConfigError`.
    """
    where = f"recipe {clip(name_or_path)}"
    shipped = name_or_path in recipe_names()
    text = recipe_text(name_or_path) if shipped else _read(name_or_path, where, _MAX_BYTES)
    return Recipe.from_dict(toml.parse_toml(text, where), where, overrides, source=text)


def load_stored_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe.toml of a run, of this redpen or an older one. Raises `ConfigError`."""
    where = f"recipe {clip(os.fspath(path))}"
    text = _read(os.fspath(path), where, _MAX_STORED_BYTES)
    return Recipe.from_dict(toml.parse_toml(text, where), where, overrides, source=text, stored=True)


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.name.removesuffix(".toml") for path in _shipped().iterdir() if path.name.endswith(".toml"))


def recipe_text(name: str) -> str:
    """The TOML of a shipped recipe."""
    if name not in recipe_names():
        raise ConfigError(
            f"recipe {name}: expected one of {', '.join(recipe_names())}{did_you_mean(name, recipe_names())}"
        )
    return (_shipped() / f"{name}.toml").read_text(encoding="utf-8")


def _shipped() -> Traversable:
    return resources.files("pipeline") / "recipes"


def _read(path: str, where: str, at_most: int) -> str:
    try:
        if not path or not Path(path).exists():
            raise FileNotFoundError
        return files.read_text(Path(path), at_most=at_most, error=ConfigError)
    except FileNotFoundError:
        raise ConfigError(
            f"{where}: no such file; expected a TOML file or one of {', '.join(recipe_names())}"
            + did_you_mean(path, recipe_names())
        ) from None
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read: {error.strerror}") from None
