"""What a run has cost, by stage: seconds, tokens, and FLOPs by the formulas of `pipeline.models.flops`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field

import cache_schema as cs
from pipeline.config import ModelConfig, Recipe
from pipeline.errors import ModelError, RedpenError
from pipeline.files import parse_model, read_json
from pipeline.models import flops, meta_model
from pipeline.models.identity import DATA, IMPORTED
from pipeline.models.paths import resolve_path
from pipeline.runs import files as run_files

_Number = Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class Cost:
    """The cost of a stage. `flops` is None if the model's config is not on this machine, or the work was done
    elsewhere."""

    seconds: _Number
    tokens: Annotated[int, Field(ge=0)]
    flops: _Number | None


class _Ledger(BaseModel):
    stages: dict[str, Cost]


def stage_one(recipe: Recipe, round_: cs.Round) -> dict[str, Cost]:
    """The costs of a cache from the commits of its blocks: sampling, then each scorer; none for text that was not
    sampled."""
    if round_.manifest.engine == DATA:
        return {}
    models: dict[str, ModelConfig] = {cs.STUDENT: recipe.student} | {t.name: t for t in recipe.teacher}
    costs = {"rollouts": _cost(round_.rollouts, recipe.student, prompts_once=True)}
    for name in round_.scorer_names():
        costs[f"score {name}"] = _cost(round_.scores(name), models.get(name), prompts_once=False)
    return costs


def training(recipe: Recipe, trained_parameters: int, tokens: int, seconds: float) -> Cost:
    """The cost of stage two; tokens include prompts."""
    n = parameters(recipe.student)
    if n is None:
        return Cost(seconds, tokens, None)
    adapter = trained_parameters if recipe.train.method == "lora" else None
    recomputed = recipe.train.gradient_checkpointing
    return Cost(seconds, tokens, flops.training(n, adapter, tokens, recomputed=recomputed))


def table(costs: dict[str, Cost]) -> dict[str, Any]:
    """The content of ledger.json."""
    return {
        name: {"seconds": round(cost.seconds, 3), "tokens": cost.tokens, "flops": cost.flops}
        for name, cost in costs.items()
    }


def read(run: Path) -> dict[str, Cost]:
    """A finished run's costs by stage. Raises `RedpenError` if its ledger.json has changed since the run ended."""
    run_files.check(run, run_files.LEDGER)
    path = run / run_files.LEDGER
    try:
        found = read_json(path, follow_links=False)
    except FileNotFoundError:
        raise RedpenError(f"{path}: is missing; run the command that made the run again to restore it") from None
    return parse_model({"stages": found}, _Ledger, str(path)).stages


def total(ledgers: Iterable[Mapping[str, Cost]]) -> dict[str, Cost]:
    """Costs of several runs by stage; FLOPs are None if those of one run are."""
    found: dict[str, Cost] = {}
    for ledger in ledgers:
        for name, cost in ledger.items():
            so_far = found.get(name, Cost(0.0, 0, 0.0))
            work = None if so_far.flops is None or cost.flops is None else so_far.flops + cost.flops
            found[name] = Cost(so_far.seconds + cost.seconds, so_far.tokens + cost.tokens, work)
    return found


def parameters(cfg: ModelConfig | None) -> int | None:
    """Number of parameters that a token is multiplied by, from the model's config; None if that is not on this
    machine."""
    directory = None if cfg is None else _local_directory(cfg)
    if cfg is None or directory is None:
        return None
    try:
        here = cfg.model_copy(update={"model": str(directory), "revision": None})
        return meta_model.Weights.of(meta_model.load_meta_model(here)).multiplied
    except ModelError:
        return None


def _cost(group: cs.BlockGroup[Any], cfg: ModelConfig | None, *, prompts_once: bool) -> Cost:
    commits = group.commits()
    commits = commits[commits["rows"] > 0]
    rows, prompts = commits["rows"].astype(float), commits["prompts"].astype(float)
    prompt_tokens = commits["prompt_tokens"] * (1 if prompts_once else rows / prompts)
    tokens = int(commits["tokens"].sum() + prompt_tokens.sum())
    n = None if group.manifest.engine == IMPORTED else parameters(cfg)  # made elsewhere, at an unknown cost
    return Cost(float(commits["elapsed_us"].sum()) / 1e6, tokens, None if n is None else flops.forward(n, tokens))


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
