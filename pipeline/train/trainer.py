"""The student with its optimizer: an update on a batch, and the state that checkpoints hold.

Shapes: T response positions of a micro-batch, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipeline.config import TrainConfig
from pipeline.distributed.fsdp import Gradients, WeightSharding
from pipeline.errors import ModelError, RedpenError
from pipeline.forward.finite import not_finite
from pipeline.forward.head import Head
from pipeline.forward.loss_head import HeadLoss, chunked_head_loss
from pipeline.forward.packing_check import choose_checked, settle_layout
from pipeline.forward.rows import is_packed, lay_out, response_hidden
from pipeline.models.lora import checkpoint_gradients, trainable, training_mode
from pipeline.runs.checkpoint import Checkpoint, Tensors
from pipeline.train import losses
from pipeline.train.metrics import MetricSums, measure
from pipeline.train.objective import Objective
from pipeline.train.optimizer import make_optimizer, master_weights, round_from_masters, set_state, state_tensors
from pipeline.train.replay import Batch, MicroBatch, Rollout


def learning_rate(train: TrainConfig, step: int) -> float:
    """The learning rate of a step, counted from 0: linear warmup, then the schedule down to 0 at `train.steps`."""
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    progress = (step - train.warmup_steps) / max(train.steps - train.warmup_steps, 1)
    factor = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return train.learning_rate * factor[train.schedule]


class StudentTrainer:
    """Trains a student on an objective.

    Args:
        sharding: how the ranks of the job, each with such a trainer, hold the weights; by default a single process.

    Attributes:
        parameters: the trained parameters, by name.
        masters: the weights that the optimizer updates, with their gradients: the parameters themselves, or fp32
            copies that they are rounded from.
        within: calls a function while the student's weights are gathered, and returns its result.
        step: number of updates done.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        train: TrainConfig,
        sharding: WeightSharding = WeightSharding(),  # noqa: B008  frozen
    ):
        self.model, self.objective, self.train = model, objective, train
        self.sharding, self.ranks = sharding, sharding.ranks
        Head.of(model)  # raises for an unsupported head before the first forward pass
        if train.gradient_checkpointing:
            checkpoint_gradients(model)
        self.within = sharding.parallelize(model)
        self.parameters = trainable(model)
        self.masters = master_weights(self.parameters)
        self.gradients = Gradients(self.masters, self.ranks)
        self.device = next(iter(self.parameters.values())).device
        self.optimizer = make_optimizer(self.masters, train)
        self.step = 0
        training_mode(model)

    def check(self, rollouts: Sequence[Rollout]) -> str:
        """Check on some of these rollouts that laid out together they have the log-probs that each has alone; returns
        what was found. Raises `ModelError` past rounding.
        """
        chosen = [rollouts[i] for i in choose_checked([len(r.token_ids) for r in rollouts], self.device)]
        sequences, starts = [r.token_ids for r in chosen], [len(r.prompt_ids) for r in chosen]
        share = self._share_prompts_from
        found = self.within(lambda: settle_layout(self.model, sequences, starts, share_prompts_from=share))
        training_mode(self.model)
        return found

    @property
    def _share_prompts_from(self) -> int | None:
        return self.train.share_prompts_from if is_packed(self.model) else None

    def update(self, batch: Batch) -> dict[str, float]:
        """One optimizer step on the mean loss over the batch's trained tokens; returns the metrics before the step.

        Raises `RedpenError`, with the weights unchanged, if loss or gradient is not finite.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.train, self.step)
        sums = self.gradient(batch)
        # One tensor at a time on the CPU, as in the optimizer.
        foreach = None if self.device.type == "cuda" else False
        norm = torch.nn.utils.clip_grad_norm_(self.masters.values(), self.train.max_grad_norm, foreach=foreach)
        metrics = {name: value for name, value in sums.metrics().items() if name in self.objective.reported}
        metrics |= {"grad_norm": float(self.sharding.full_tensor(norm)), "lr": self.optimizer.param_groups[0]["lr"]}
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

    def gradient(self, batch: Batch) -> MetricSums:
        """Set every `.grad` to the gradient of the mean loss over the batch's trained tokens, of all ranks; returns
        the sums of the whole batch."""
        if self.train.lora_dropout:
            # Masks are a function of seed, step and rank, so there is no generator state to keep.
            torch.manual_seed(hash((self.train.seed, self.step, self.ranks.rank)) % 2**63)
        self.gradients.clear()
        parts = [MetricSums.zero(self.device)]
        for micro_batch in self._micro_batches(batch):
            loss, sums = self._forward(micro_batch, batch.n_tokens)
            torch.autograd.backward(loss)
            parts.append(sums)
        self.gradients.all_reduce()
        return self._over_ranks(parts)

    @torch.no_grad()
    def measure(self, batch: Batch) -> MetricSums:
        """The sums that `gradient` returns, from forward passes only and without dropout."""
        self.model.eval()
        try:
            parts = [self._forward(micro_batch, batch.n_tokens)[1] for micro_batch in self._micro_batches(batch)]
        finally:
            training_mode(self.model)
        return self._over_ranks([MetricSums.zero(self.device), *parts])

    def _micro_batches(self, batch: Batch) -> list[MicroBatch]:
        budget, share = self.train.tokens_per_microbatch, self._share_prompts_from
        return batch.micro_batches(budget, self.ranks.rank, self.ranks.size, share_prompts_from=share)

    def _forward(self, micro_batch: MicroBatch, n_tokens: float) -> tuple[Tensor, MetricSums]:
        """The micro-batch's part of the mean loss over the global batch's `n_tokens`, and its metrics."""
        rollouts = micro_batch.rollouts
        tokens = lay_out(
            self.model,
            [r.token_ids for r in rollouts],
            [len(r.prompt_ids) for r in rollouts],
            self.device,
            share_prompts_from=self._share_prompts_from,
            one_forward=self.sharding.mesh is not None,  # each forward gathers the shards of every rank
        )
        targets = self.objective.targets(micro_batch, self.device)

        def chunk_loss(rows: slice, logprobs_nC: Tensor, rest_n: Tensor) -> Tensor:
            loss_n = self.objective.token_loss(targets[rows], logprobs_nC, rest_n)
            return losses.token_sum(loss_n, targets.weights_T[rows], n_tokens)

        def forward() -> tuple[Tensor, HeadLoss]:
            hidden_TD, head = response_hidden(self.model, tokens), Head.of(self.model)
            rows_per_chunk = self.train.rows_per_chunk
            result = chunked_head_loss(hidden_TD, head, targets.ids_TC, chunk_loss, rows_per_chunk, entropy=True)
            return result.loss, result

        loss, result = self.within(forward)
        return loss, measure(targets, result)

    def _over_ranks(self, parts: Sequence[MetricSums]) -> MetricSums:
        sums = MetricSums.merge(parts)
        sizes = [sums.totals.numel(), sums.drift.numel()]
        gathered = self.ranks.gather(torch.cat([sums.totals, sums.drift]))
        return MetricSums.merge([MetricSums(*torch.split(values, sizes)) for values in gathered])

    # -- state ------------------------------------------------------------------------------------------------------

    def weights(self) -> Tensors:
        """A copy of the trained parameters in the student's own dtype; see `tensors`."""
        return self.sharding.copy_to_main_process(self.parameters)

    def tensors(self) -> dict[str, Tensors]:
        """A copy of the training state for a checkpoint: weights, and Adam's moments and step counts.

        A collective call; the result is whole, and in the main process's host memory only.
        """
        moments = state_tensors(self.optimizer, self.masters)
        return {
            "weights": self.sharding.copy_to_main_process(self.masters),
            "optimizer": self.sharding.copy_to_main_process(moments),
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Load a checkpoint saved by any number of ranks; all but the main process need its outline only.

        Raises `ModelError` if its parameters are not those that this recipe trains.
        """
        weights, state = checkpoint.tensors.get("weights", {}), checkpoint.tensors["optimizer"]
        if {n: w.shape for n, w in self.masters.items()} != {n: v.shape for n, v in weights.items()}:
            raise ModelError("checkpoint: its weights are not those that the recipe trains; use another --run")
        with torch.no_grad():
            for name, weight in self.masters.items():
                weight.copy_(self.sharding.distribute(weights[name], weight))
        round_from_masters(self.parameters, self.masters)
        owners = {name: self.masters[name.rpartition("/")[0]] for name in state}
        shared = {name: self.sharding.distribute(value, owners[name]) for name, value in state.items()}
        set_state(self.optimizer, self.masters, shared)
        self.step = checkpoint.step
