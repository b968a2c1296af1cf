"""A metric on prompts that are not trained on, measured while training: accuracy, legal responses, or reverse KL.

Accuracy and legal responses are the rates of `redpen eval`, on fresh greedy responses to the first `heldout_prompts`
prompts of `eval.path`. Reverse KL is that of training, over candidates + rest at cached prefixes, on the last
`heldout_prompts` prompts of the round, which are then not trained on: one forward pass without sampling, but blind to
a drift of the student's own prefixes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from pipeline.config import Recipe
from pipeline.engines.heldout import HeldOutPrompts
from pipeline.errors import ConfigError
from pipeline.train.metrics import MetricSums
from pipeline.train.replay import Replay
from pipeline.train.trainer import StudentTrainer

Metric = Callable[[], float]


def heldout_metric(recipe: Recipe, trainer: StudentTrainer, replay: Replay) -> Metric | None:
    """A function that measures `train.heldout_metric` of the current student; None without one. Every rank calls it.

    Raises `RedpenError` if the prompts cannot be used.
    """
    train, ranks = recipe.train, trainer.ranks
    if train.heldout_metric is None:
        return None
    if train.heldout_metric == "reverse_kl":

        def reverse_kl() -> float:
            measured = [trainer.measure(batch) for batch in replay.held_back(train.prompts_per_step)]
            return MetricSums.merge(measured).metrics()["reverse_kl"]

        return reverse_kl
    if trainer.sharding.mesh is not None and recipe.rollouts.environment is not None:
        raise ConfigError(
            f'train.heldout_metric = "{train.heldout_metric}" with rollouts.environment needs train.parallel = '
            '"ddp", got "fsdp", whose ranks would have to get equal replies; use "ddp", or "reverse_kl"'
        )
    prompts = HeldOutPrompts.load(recipe, train.heldout_metric, train.heldout_prompts)
    # Sharded weights are gathered by all ranks at once, so every rank then answers all prompts.
    mine = prompts.shard(ranks.rank, ranks.size) if trainer.sharding.mesh is None else prompts

    def rate() -> float:
        count = trainer.within(lambda: mine.count(trainer.model))
        counts = ranks.gather(torch.tensor([count, len(mine.prompts)]))
        total, n_prompts = torch.stack(counts).sum(0).tolist()
        return float(total / n_prompts)

    return rate
