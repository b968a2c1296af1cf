"""The student, its adapter and optimizer, and the one thing done with them: an update on a batch.

Shapes: T response positions of a micro-batch, D hidden.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pipeline.config import TrainConfig
from pipeline.distributed.fsdp import Gradients, WeightSharding
from pipeline.errors import ModelError, RedpenError
from pipeline.forward.finite import not_finite
from pipeline.forward.head import Head, HeadLoss, chunked_head_loss, unwrapped
from pipeline.forward.packing import check_packing, pack, packed_hidden
from pipeline.models.lora import trainable, training_mode
from pipeline.runs.checkpoint import Checkpoint, Tensors
from pipeline.train.objective import Sums
from pipeline.train.optimizer import make_optimizer, master_weights, round_from_masters, set_state, state_tensors
from pipeline.train.replay import Batch, MicroBatch, Rollout


def learning_rate(train: TrainConfig, step: int) -> float:
    """Of step `step`, counted from 0: linear warm-up, then the schedule down to 0 at `train.steps`."""
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    progress = (step - train.warmup_steps) / max(train.steps - train.warmup_steps, 1)
    factor = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return train.learning_rate * factor[train.schedule]


class Objective(Protocol):
    """What is minimised (`pipeline.train.objective`, `pipeline.train.likelihood`)."""

    def targets(self, micro_batch: MicroBatch, device: torch.device | str) -> Any:
        """What the cache says of a micro-batch's tokens, on the device; `ids_TC` are the columns that it needs."""

    def loss(self, targets: Any, n_tokens: float, rows: slice, student_nC: Tensor, rest_n: Tensor) -> Tensor:
        """A chunk's share of the mean over the global batch's `n_tokens`."""

    def measure(self, targets: Any, result: HeadLoss) -> Sums:
        """Totals over the micro-batch."""

    def metrics(self, sums: Sums) -> dict[str, float]:
        """What a step reports of the totals over its global batch, `loss` among it."""


class Trainer:
    """Moves a student along an objective.

    Args:
        sharding: of the job whose every rank has such a trainer; by default this process is alone.

    Attributes:
        parameters: what is trained, by name.
        masters: what the optimizer moves, and where gradients are: the parameters, or fp32 copies that they are
            rounded from.
        within: calls its argument, in which the student is whole, and gives what that returns.
        step: updates done.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        train: TrainConfig,
        sharding: WeightSharding = WeightSharding(),  # noqa: B008  frozen
    ):
        self.model, self.objective, self.train, self.sharding = model, objective, train, sharding
        Head.of(model)  # what it refuses is refused before the first forward pass
        if train.gradient_checkpointing:
            unwrapped(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.within = sharding.parallelize(model)
        self.parameters = trainable(model)
        self.masters = master_weights(self.parameters)
        self.gradients = Gradients(self.masters, sharding)
        self.device = next(iter(self.parameters.values())).device
        self.optimizer = make_optimizer(self.masters, train)
        self.step = 0
        training_mode(model)

    def check(self, rollouts: Sequence[Rollout]) -> float:
        """Largest difference, in nats, between packed log-probs and each rollout's own. Raises `ModelError` past
        rounding."""
        sequences, starts = [r.token_ids for r in rollouts], [len(r.prompt_ids) for r in rollouts]
        share = self.train.share_prompts_from
        worst = self.within(lambda: check_packing(self.model, sequences, starts, share_prompts_from=share))
        training_mode(self.model)
        return worst

    def update(self, batch: Batch) -> dict[str, float]:
        """One optimizer step on the mean loss over the batch's trained tokens; metrics are those before the step.

        Raises `RedpenError` where loss or gradient is not finite; nothing has moved then.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.train, self.step)
        sums = self.gradient(batch)
        # One tensor at a time on the CPU, as the optimizer.
        foreach = None if self.device.type == "cuda" else False
        norm = torch.nn.utils.clip_grad_norm_(self.masters.values(), self.train.max_grad_norm, foreach=foreach)
        metrics = self.objective.metrics(sums) | {
            "grad_norm": float(self.sharding.full_tensor(norm)),
            "lr": self.optimizer.param_groups[0]["lr"],
        }
        if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
            if not self.step and not math.isfinite(metrics.get("entropy", 0.0)):
                raise not_finite(self.model, "reading the first batch")
            raise RedpenError(
                f"step {self.step + 1}: loss {metrics['loss']:g}, gradient norm {metrics['grad_norm']:g}; lower "
                "train.learning_rate, or run `redpen verify` on the cache (the last checkpoint is untouched)"
            )
        self.optimizer.step()
        round_from_masters(self.parameters, self.masters)
        self.step += 1
        return metrics

    def gradient(self, batch: Batch) -> Sums:
        """Set every `.grad` to the gradient of the mean loss over the batch's trained tokens, whichever ranks read
        them; what is measured is that of the whole batch too."""
        if self.train.lora_dropout:
            # Masks are a function of seed, step and rank, so there is no generator state to keep.
            torch.manual_seed(hash((self.train.seed, self.step, self.sharding.rank)) % 2**63)
        self.gradients.clear()
        n_tokens = batch.n_tokens
        parts = [Sums.zero(self.device)]
        for micro_batch in self._micro_batches(batch):
            loss, sums = self._forward(micro_batch, n_tokens)
            torch.autograd.backward(loss)
            parts.append(sums)
        self.gradients.all_reduce()
        return self._over_ranks(Sums.merge(parts))

    @torch.no_grad()
    def measure(self, batch: Batch) -> Sums:
        """What `gradient` measures of a batch, by a forward pass alone and without dropout."""
        self.model.eval()
        try:
            parts = [self._forward(micro_batch, batch.n_tokens)[1] for micro_batch in self._micro_batches(batch)]
        finally:
            training_mode(self.model)
        return self._over_ranks(Sums.merge([Sums.zero(self.device), *parts]))

    def _micro_batches(self, batch: Batch) -> list[MicroBatch]:
        budget, share = self.train.tokens_per_microbatch, self.train.share_prompts_from
        return batch.micro_batches(budget, self.sharding.rank, self.sharding.size, share_prompts_from=share)

    def _forward(self, micro_batch: MicroBatch, n_tokens: float) -> tuple[Tensor, Sums]:
        """A micro-batch's share of the loss, and what is measured of it; `n_tokens` counts the whole global batch."""
        rollouts = micro_batch.rollouts
        starts, share = [len(r.prompt_ids) for r in rollouts], self.train.share_prompts_from
        packed = pack([r.token_ids for r in rollouts], starts, self.device, share_prompts_from=share)
        targets = self.objective.targets(micro_batch, self.device)

        def forward() -> tuple[Tensor, HeadLoss]:
            result = chunked_head_loss(
                packed_hidden(self.model, packed),
                Head.of(self.model),
                targets.ids_TC,
                functools.partial(self.objective.loss, targets, n_tokens),
                self.train.rows_per_chunk,
                entropy=True,
            )
            return result.loss, result

        loss, result = self.within(forward)
        return loss, self.objective.measure(targets, result)

    def _over_ranks(self, sums: Sums) -> Sums:
        sizes = [sums.totals.numel(), sums.drift.numel()]
        told = self.sharding.gather(torch.cat([sums.totals, sums.drift]))
        return Sums.merge([Sums(*torch.split(values, sizes)) for values in told])

    # -- state ------------------------------------------------------------------------------------------------------

    def weights(self) -> Tensors:
        """A copy of what is trained, in the student's own dtype; see `tensors`."""
        return self.sharding.copy_to_main_process(self.parameters)

    def tensors(self) -> dict[str, Tensors]:
        """A copy of all that an update depends on beside the batch: weights, and Adam's moments and step counts.

        For every rank to call at the same time; it is whole, and in the first one's host memory only.
        """
        moments = state_tensors(self.optimizer, self.masters)
        return {
            "weights": self.sharding.copy_to_main_process(self.masters),
            "optimizer": self.sharding.copy_to_main_process(moments),
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue where `checkpoint` was saved, by any number of ranks; all but the first need its outline only.

        Raises `ModelError` where it belongs to other parameters.
        """
        weights, state = checkpoint.tensors.get("weights", {}), checkpoint.tensors["optimizer"]
        if {n: w.shape for n, w in self.masters.items()} != {n: v.shape for n, v in weights.items()}:
            raise ModelError("checkpoint: it has other weights than the recipe trains; use another --run")
        with torch.no_grad():
            for name, weight in self.masters.items():
                weight.copy_(self.sharding.distribute(weights[name], weight))
        round_from_masters(self.parameters, self.masters)
        owners = {name: self.masters[name.rpartition("/")[0]] for name in state}
        shared = {name: self.sharding.distribute(value, owners[name]) for name, value in state.items()}
        set_state(self.optimizer, self.masters, shared)
        self.step = checkpoint.step
