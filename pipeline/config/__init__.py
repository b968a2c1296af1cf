"""Recipes: every setting of redpen, with its bounds, its meaning and the rules that span several."""

from pipeline.config.models import ModelConfig, PromptsConfig, StudentConfig, TeacherConfig
from pipeline.config.recipe import Recipe, load_recipe, load_stored_recipe, recipe_names, recipe_text
from pipeline.config.stages import EvalConfig, RolloutsConfig, ScoreConfig, VllmConfig
from pipeline.config.training import (
    ContinualConfig,
    DistillConfig,
    GateConfig,
    RewardConfig,
    SelectConfig,
    SftConfig,
    SftData,
    TrackConfig,
    TrainConfig,
)

__all__ = [
    "ContinualConfig",
    "DistillConfig",
    "EvalConfig",
    "GateConfig",
    "ModelConfig",
    "PromptsConfig",
    "Recipe",
    "RewardConfig",
    "RolloutsConfig",
    "ScoreConfig",
    "SelectConfig",
    "SftConfig",
    "SftData",
    "StudentConfig",
    "TeacherConfig",
    "TrackConfig",
    "TrainConfig",
    "VllmConfig",
    "load_recipe",
    "load_stored_recipe",
    "recipe_names",
    "recipe_text",
]
