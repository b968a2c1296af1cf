"""`redpen plan`: memory, FLOPs, cache size and time of a recipe, from model configs and prompts alone.

No weights are loaded or downloaded. Activations are measured by running the model's code on torch's meta device
(`pipeline.models.meta_model`); all other assumptions are printed with the figures.
"""

from __future__ import annotations

import json
from dataclasses import asdict

from pipeline.config import Recipe
from pipeline.console import show
from pipeline.plan.assumed import Device, Lengths

__all__ = ["Device", "misfits", "run"]


def run(
    recipe: Recipe,
    device: Device,
    *,
    mean_prompt_tokens: float | None = None,
    mean_response_tokens: float | None = None,
    as_json: bool = False,
) -> None:
    """Print the plan on stdout.

    Raises:
        ConfigError: the recipe does not allow these mean lengths.
        ModelError: a model's config cannot be loaded, or is not that of a causal language model.
        PromptError: a prompt cannot be read, or rendered for a teacher that reads its own.
    """
    lengths = Lengths.of(recipe, mean_prompt_tokens, mean_response_tokens)
    from pipeline.plan import cost, memory, table

    models = memory.PlannedModels.of(recipe)
    needs = memory.by_step(recipe, models, device)
    costs = cost.costs(recipe, models, device, lengths, needs)
    if as_json:
        plan = {"device": asdict(device), "lengths": asdict(lengths), "parameters": models.parameters()}
        plan["teacher_prompts"] = {name: own and asdict(own) for name, own in models.own_prompts.items()}
        show(json.dumps(plan | {"memory": [need.as_dict() for need in needs], "cost": costs.as_dict()}))
    else:
        table.show(recipe, models, device, lengths, needs, costs)


def misfits(recipe: Recipe, device: Device) -> list[str]:
    """A line for each step of the recipe that does not fit the device. Raises as `run`."""
    from pipeline.plan import memory, table

    models = memory.PlannedModels.of(recipe)
    needs = memory.by_step(recipe, models, device)
    lacking = [need for need in needs if need.refused or need.total > device.gib * memory.GIB]
    return [table.advice(need, device, recipe, models) for need in lacking]
