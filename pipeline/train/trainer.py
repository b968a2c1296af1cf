"""The student, its adapter and optimizer, and the one thing done with them: an update on a batch.

Shapes: T response positions of a micro-batch, D hidden.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from pipeline.config import TrainConfig
from pipeline.errors import ModelError, RedpenError
from pipeline.logprobs import Head, chunked_head_loss
from pipeline.packing import check_packing, pack, packed_hidden
from pipeline.train.checkpoint import Checkpoint, Tensors
from pipeline.train.lora import trainable, training_mode
from pipeline.train.objective import Objective, Sums
from pipeline.train.replay import Batch, MicroBatch, Rollout


def learning_rate(train: TrainConfig, step: int) -> float:
    """Of step `step`, counted from 0: linear warm-up, then the schedule down to 0 at `train.steps`."""
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    progress = (step - train.warmup_steps) / max(train.steps - train.warmup_steps, 1)
    factor = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return train.learning_rate * factor[train.schedule]


class Trainer:
    """Moves a student along an objective.

    Attributes:
        parameters: what is trained, by name.
        step: updates done.
    """

    def __init__(self, model: PeftModel, objective: Objective, train: TrainConfig):
        self.model, self.objective, self.train = model, objective, train
        self.head = Head.of(model)
        self.parameters = trainable(model)
        self.device = next(iter(self.parameters.values())).device
        on_cuda = self.device.type == "cuda"
        # One tensor at a time on the CPU: the order of additions, and so every bit, is then fixed.
        self._foreach = None if on_cuda else False
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=train.learning_rate,
            betas=train.betas,
            weight_decay=train.weight_decay,
            foreach=self._foreach,
            fused=on_cuda,
        )
        self.step = 0
        if train.gradient_checkpointing:
            base: Any = model.get_base_model()
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        training_mode(model)

    def check(self, rollouts: Sequence[Rollout]) -> float:
        """Largest difference, in nats, between packed log-probs and each rollout's own. Raises `ModelError` past
        rounding."""
        sequences, starts = [r.token_ids for r in rollouts], [len(r.prompt_ids) for r in rollouts]
        worst = check_packing(self.model, sequences, starts)
        training_mode(self.model)
        return worst

    def update(self, batch: Batch) -> dict[str, float]:
        """One optimizer step on the mean loss over the batch's trained tokens; metrics are those before the step.

        Raises `RedpenError` where loss or gradient is not finite; nothing has moved then.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.train, self.step)
        sums = self.gradient(batch)
        norm = torch.nn.utils.clip_grad_norm_(
            self.parameters.values(), self.train.max_grad_norm, foreach=self._foreach
        )
        metrics = sums.metrics() | {"grad_norm": float(norm), "lr": self.optimizer.param_groups[0]["lr"]}
        if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
            raise RedpenError(
                f"step {self.step + 1}: loss {metrics['loss']:g}, gradient norm {metrics['grad_norm']:g}; lower "
                "train.learning_rate, or run `redpen verify` on the cache (the last checkpoint is untouched)"
            )
        self.optimizer.step()
        self.step += 1
        return metrics

    def gradient(self, batch: Batch) -> Sums:
        """Set every `.grad` to the gradient of the mean loss over the batch's trained tokens."""
        if self.train.lora_dropout:
            # Masks are a function of seed and step, so there is no generator state to keep.
            torch.manual_seed(hash((self.train.seed, self.step)) % 2**63)
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        n_tokens = batch.n_tokens
        micro_batches = batch.micro_batches(self.train.tokens_per_microbatch)
        parts = [self._backward(micro_batch, n_tokens) for micro_batch in micro_batches]
        return Sums.merge([Sums.zero(self.device), *parts])

    def _backward(self, micro_batch: MicroBatch, n_tokens: float) -> Sums:
        """Add a micro-batch's share of the gradient; `n_tokens` counts the whole global batch."""
        rollouts = micro_batch.rollouts
        packed = pack([r.token_ids for r in rollouts], [len(r.prompt_ids) for r in rollouts], self.device)
        targets = self.objective.targets(micro_batch, self.device)
        hidden_TD = packed_hidden(self.model, packed)
        result = chunked_head_loss(
            hidden_TD,
            self.head,
            targets.ids_TC,
            functools.partial(self.objective.loss, targets, n_tokens),
            self.train.rows_per_chunk,
            entropy=True,
        )
        torch.autograd.backward(result.loss)
        return self.objective.measure(targets, result)

    # -- state ------------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensors]:
        """All that an update depends on beside the batch: weights, and Adam's moments and step counts."""
        moments: Tensors = {}
        for name, parameter in self.parameters.items():
            moments |= {f"{name}/{key}": value for key, value in self.optimizer.state[parameter].items()}
        return {"adapter": dict(self.parameters), "optimizer": moments}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue where `checkpoint` was saved. Raises `ModelError` where it belongs to other parameters."""
        adapter, moments = checkpoint.tensors["adapter"], checkpoint.tensors["optimizer"]
        if {n: p.shape for n, p in self.parameters.items()} != {n: v.shape for n, v in adapter.items()}:
            raise ModelError("checkpoint: its adapter has other weights than the recipe's; use another --run")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(adapter[name])
        state: dict[str, dict[str, Tensor]] = {name: {} for name in self.parameters}
        for name, value in moments.items():
            owner, _, key = name.rpartition("/")
            state[owner][key] = value
        packed: Any = self.optimizer.state_dict()
        packed["state"] = {i: values for i, values in enumerate(state.values()) if values}
        self.optimizer.load_state_dict(packed)
        self.step = checkpoint.step
