"""What a run has cost, by stage: seconds, tokens, FLOPs.

With N parameters of a model, its input embedding aside (a lookup costs nothing), and n tokens read by it:

    sampling, scoring    2 N n      one forward; the sampler reads a prompt once, scorers for every rollout
    training             4 N n + 6 A n, and 2 N n more with gradient checkpointing
                                    forward and the gradient of activations through the frozen weights; forward and
                                    both gradients of the adapter's A parameters

Attention's own products and the optimizer are left out: a few percent at these lengths.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cache_schema as cs
from pipeline.config import ModelConfig, Recipe
from pipeline.errors import ModelError
from pipeline.models import resolve_path
from pipeline.provenance import IMPORTED, weight_files


@dataclass(frozen=True)
class Cost:
    """One stage. `flops` is None where the model's size is not known here, or the work was done elsewhere."""

    seconds: float
    tokens: int
    flops: float | None


def stage_one(recipe: Recipe, round_: cs.Round) -> dict[str, Cost]:
    """What the cache cost: sampling, then each scorer, from the commits of their blocks."""
    models: dict[str, ModelConfig] = {cs.STUDENT: recipe.student} | {t.name: t for t in recipe.teacher}
    costs = {"rollouts": _cost(round_.rollouts, recipe.student, prompts_once=True)}
    for name in round_.scorer_names():
        costs[f"score {name}"] = _cost(round_.scores(name), models.get(name), prompts_once=False)
    return costs


def training(recipe: Recipe, adapter_parameters: int, tokens: int, seconds: float) -> Cost:
    """Stage two; tokens include prompts."""
    n = parameters(recipe.student)
    if n is None:
        return Cost(seconds, tokens, None)
    a_token = (6 if recipe.train.gradient_checkpointing else 4) * n + 6 * adapter_parameters
    return Cost(seconds, tokens, float(a_token) * tokens)


def table(costs: dict[str, Cost]) -> dict[str, Any]:
    """As it goes into ledger.json."""
    return {
        name: {"seconds": round(cost.seconds, 3), "tokens": cost.tokens, "flops": cost.flops}
        for name, cost in costs.items()
    }


def parameters(cfg: ModelConfig | None) -> int | None:
    """Parameters that multiply, by the headers of the model's weight files; None where they are not on this
    machine."""
    directory = None if cfg is None else _local_directory(cfg)
    if directory is None:
        return None
    try:
        sizes: dict[str, int] = {
            name: math.prod(entry["shape"])
            for file in weight_files(directory)
            for name, entry in _header(file).items()
            if name != "__metadata__"
        }
    except (ModelError, OSError, ValueError):
        return None
    tied = not any(name.endswith("lm_head.weight") for name in sizes)
    return sum(size for name, size in sizes.items() if tied or not name.endswith("embed_tokens.weight"))


def _cost(group: cs.BlockGroup, cfg: ModelConfig | None, *, prompts_once: bool) -> Cost:
    commits = group.commits()
    commits = commits[commits["rows"] > 0]
    rows, prompts = commits["rows"].astype(float), commits["prompts"].astype(float)
    prompt_tokens = commits["prompt_tokens"] * (1 if prompts_once else rows / prompts)
    tokens = int(commits["tokens"].sum() + prompt_tokens.sum())
    n = None if group.manifest.engine == IMPORTED else parameters(cfg)  # made elsewhere, at a cost that is not known
    return Cost(float(commits["elapsed_us"].sum()) / 1e6, tokens, None if n is None else 2.0 * n * tokens)


def _local_directory(cfg: ModelConfig) -> Path | None:
    """The model's directory if it is on this machine; nothing is downloaded."""
    path = Path(resolve_path(cfg.model)).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(cfg.model, "config.json", revision=cfg.revision)
    except HFValidationError:  # a path that is not there
        return None
    return Path(config).parent if isinstance(config, str) else None


def _header(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header: dict[str, Any] = json.loads(stream.read(size))
    return header
