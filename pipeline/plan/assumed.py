"""What a plan assumes: the machine, and the lengths of prompts and responses."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import PromptsConfig, Recipe
from pipeline.errors import ConfigError
from pipeline.text.prompts import load_prompts, raw_rows
from pipeline.text.teacher_prompt import kept_columns

# Prompts that are rendered for a teacher that reads its own.
_RENDERED = 1000


@dataclass(frozen=True)
class Device:
    """The machine to plan for; by default one RTX 4090.

    Attributes:
        gib: memory of one GPU. gpus: how many share the work.
        tflops: peak for dense bf16 matrix products. utilisation: the fraction that forward and backward passes reach.
        gbps: bandwidth of the GPU's memory in GB/s, which bounds sampling. link_gbps: between GPU and host.
    """

    gib: float = 24.0
    gpus: int = 1
    tflops: float = 165.0
    utilisation: float = 0.4
    gbps: float = 1008.0
    link_gbps: float = 25.0


def n_prompts(recipe: Recipe) -> tuple[int, str]:
    """How many prompts a round has, and how that is known: by counting a file that is here, by `prompts.limit`, or by
    what training uses once. Raises `PromptError` if the file cannot be read."""
    cfg, train = recipe.prompts, recipe.train
    if _is_here(cfg):
        last = None if cfg.limit is None else cfg.skip + cfg.limit
        counted = max(0, sum(1 for _ in itertools.islice(raw_rows(cfg), last)) - cfg.skip)
        return max(1, counted), f"{cfg.path} has {counted:,} prompts" + ("" if last is None else " in its limits")
    if cfg.limit is not None:
        return cfg.limit, f"prompts.limit is {cfg.limit:,}, and {cfg.path} is not here to be counted"
    steps = f"{train.steps} steps x {train.prompts_per_step} prompts, each used once"
    return train.steps * train.prompts_per_step, f"prompts.limit is not set, and {cfg.path} is not here: {steps}"


@dataclass(frozen=True)
class OwnPrompts:
    """Tokens of the prompts that a teacher reads in place of the student's, of the first `rendered` prompts."""

    mean: float
    longest: int
    rendered: int


@dataclass(frozen=True)
class Lengths:
    """Mean tokens of a prompt and of a response. `bound`: they are the longest that the recipe allows."""

    prompt: float
    response: float
    bound: bool

    @classmethod
    def of(cls, recipe: Recipe, prompt: float | None, response: float | None) -> Lengths:
        """The given means, or the longest allowed. Raises `ConfigError` if a mean exceeds what the recipe allows."""
        longest = recipe.rollouts.max_prompt_tokens, recipe.rollouts.max_response_tokens
        for name, mean, limit in zip(("prompt", "response"), (prompt, response), longest, strict=True):
            if mean is not None and not 0 < mean <= limit:
                raise ConfigError(
                    f"--mean-{name}-tokens: expected more than 0 and at most rollouts.max_{name}_tokens = {limit}, "
                    f"got {mean:g}"
                )
        return cls(prompt or longest[0], response or longest[1], bound=response is None)


def own_prompts(recipe: Recipe) -> dict[str, OwnPrompts | None]:
    """The prompts of each teacher that reads its own, by its name; None if they are not here to be rendered.

    Raises:
        PromptError: a prompt cannot be read or rendered.
        ModelError: the teacher's tokenizer cannot be loaded.
    """
    cfg = recipe.prompts
    if not _is_here(cfg):
        return {teacher.name: None for teacher in recipe.teacher if teacher.renders}
    from pipeline.models.resolve import resolve
    from pipeline.teachers.prompts import has_own_prompts, teacher_prompts

    first = cfg.model_copy(update={"limit": min(cfg.limit or _RENDERED, _RENDERED)})
    records = load_prompts(first, columns=kept_columns(recipe))
    found: dict[str, OwnPrompts | None] = {}
    for teacher in recipe.teacher:
        if has_own_prompts(teacher, records):
            tokens = [len(ids) for ids in teacher_prompts(recipe, resolve(teacher), records, cfg.path).ids]
            found[teacher.name] = OwnPrompts(sum(tokens) / len(tokens), max(tokens), len(tokens))
    return found


def _is_here(cfg: PromptsConfig) -> bool:
    return cfg.path.startswith("toy:") or Path(cfg.path).is_file()
