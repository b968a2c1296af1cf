"""`redpen plan`: what a recipe will take, from configs alone: memory by part, FLOPs, cache bytes, time.

No weight is read or downloaded. Activations are those of the model's own code, run on torch's meta device
(`pipeline.models.meta_model`); what is assumed beyond that is printed with the figures.
"""

from __future__ import annotations

import json
from dataclasses import asdict

from pipeline.config import Recipe
from pipeline.console import show
from pipeline.plan.assumed import Device, Lengths

__all__ = ["Device", "run"]


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
        ConfigError: mean lengths that the recipe does not allow.
        ModelError: a model's config cannot be had, or is none of a causal language model.
    """
    lengths = Lengths.of(recipe, mean_prompt_tokens, mean_response_tokens)
    from pipeline.plan import cost, memory, table

    models = memory.Models.of(recipe)
    needs = memory.needs(recipe, models, device)
    costs = cost.costs(recipe, models, device, lengths, needs)
    if as_json:
        found = {"device": asdict(device), "lengths": asdict(lengths), "parameters": models.parameters()}
        show(json.dumps(found | {"memory": [need.as_dict() for need in needs], "cost": costs.as_dict()}))
    else:
        table.show(recipe, models, device, lengths, needs, costs)
