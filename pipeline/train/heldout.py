"""A metric on prompts that are not trained on, measured while training: right or legal responses, or reverse KL.

Accuracy and the share of legal responses are those of `redpen eval`, on fresh greedy responses to the first
`heldout_prompts` prompts of `eval.path`. Reverse KL is that of training, over candidates + rest at cached prefixes,
on the last `heldout_prompts` prompts of the round, which the replay then holds back: one forward pass and no
sampling, but blind to how the student's own prefixes drift.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from pipeline.config import Recipe
from pipeline.engines.heldout import HeldOutPrompts
from pipeline.train.objective import Sums
from pipeline.train.replay import Replay
from pipeline.train.trainer import Trainer

Metric = Callable[[], float]


def heldout_metric(recipe: Recipe, trainer: Trainer, replay: Replay) -> Metric | None:
    """A function that measures `train.heldout_metric` of the student as it is, for every rank to call together; None
    where the recipe asks for none.

    Raises `RedpenError` where the prompts cannot be used.
    """
    train, sharding = recipe.train, trainer.sharding
    if train.heldout_metric == "reverse_kl":

        def reverse_kl() -> float:
            measured = [trainer.measure(batch) for batch in replay.held_back(train.prompts_per_step)]
            return Sums.merge(measured).metrics()["reverse_kl"]

        return reverse_kl
    if train.heldout_metric is not None:
        prompts = HeldOutPrompts.load(recipe, train.heldout_metric, train.heldout_prompts)
        # Shards are gathered by all ranks at once, so where there are any each rank answers everything.
        share = prompts.shard(sharding.rank, sharding.size) if sharding.mesh is None else prompts

        def share_counted() -> float:
            counted = trainer.within(lambda: share.count(trainer.model))
            counts = sharding.gather(torch.tensor([counted, len(share.prompts)]))
            n_counted, n_prompts = torch.stack(counts).sum(0).tolist()
            return float(n_counted / n_prompts)

        return share_counted
    return None
