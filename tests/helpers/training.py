"""Trainers of the toy, gradients written out naively, and comparisons of runs."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import cache_schema as cs
from pipeline.config import Recipe
from pipeline.distributed.signals import Stop
from pipeline.models import load as models
from pipeline.models import lora
from pipeline.train.build import make_objective, make_replay
from pipeline.train.replay import Batch, Replay, Rollout
from pipeline.train.teachers import select_teachers
from pipeline.train.trainer import StudentTrainer


def trainer_of(cache: Path, recipe: Recipe, *teachers: str) -> tuple[StudentTrainer, Replay]:
    """As `redpen train` makes them, with the teachers that the recipe selects unless they are named."""
    round_ = cs.open(cache).round()
    objective = make_objective(recipe, round_, teachers or select_teachers(recipe, round_, str(cache)))
    model = lora.make_trainable(models.load_model(recipe.student, trainable=True), recipe.train)
    return StudentTrainer(model, objective, recipe.train), make_replay(recipe, round_, objective)


def moved(trainer: StudentTrainer) -> StudentTrainer:
    """A student that has left the one that was sampled: with B = 0 half of the gradient is 0."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.parameters.values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return trainer


def gradient(trainer: StudentTrainer, batch: Batch) -> torch.Tensor:
    trainer.gradient(batch)
    return flat_gradient(trainer)


def flat_gradient(trainer: StudentTrainer) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in trainer.parameters.values() if p.grad is not None])


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def naive_gradient(trainer: StudentTrainer, batch: Batch, loss: str) -> torch.Tensor:
    """The gradient of `reverse_kl` or `importance_sampling` by their formulas."""

    def loss_of(rollout: Rollout, logp: Tensor) -> Tensor:
        if loss == "reverse_kl":
            return kl(*buckets(rollout, logp))
        sampled = logp.gather(1, columns(rollout, "student/candidate_ids").long()[:, :1])[:, 0]
        advantage = -(sampled - columns(rollout, "teacher/logprobs")).detach().clamp(-10, 10)
        return -((sampled - columns(rollout, "student/logprobs")).exp() * advantage).sum()

    return naive_gradient_of(trainer, batch, loss_of)


def naive_gradient_of(trainer: StudentTrainer, batch: Batch, loss_of: Callable[[Rollout, Tensor], Tensor]) -> Tensor:
    """Each rollout alone, full log-probs [T, V], autograd, one division; `loss_of` sums over the trained tokens."""
    for parameter in trainer.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    total = torch.zeros(())
    for rollout in batch.rollouts:
        ids = torch.from_numpy(rollout.token_ids).long()
        logits = trainer.model(input_ids=ids[None], use_cache=False).logits[0, len(rollout.prompt_ids) - 1 : -1]
        total = total + loss_of(rollout, logits.log_softmax(1))
    (total / sum(np.count_nonzero(r.weights) for r in batch.rollouts)).backward()
    return flat_gradient(trainer)


def columns(rollout: Rollout, name: str) -> Tensor:
    return torch.from_numpy(rollout.column(name))


def buckets(rollout: Rollout, logp: Tensor) -> tuple[Tensor, Tensor]:
    """Student and teacher over candidates and rest, as log-probs [T, K + 1]."""
    ids = columns(rollout, "student/candidate_ids").long()
    rest = logp.scatter(1, ids, -torch.inf).logsumexp(1, keepdim=True)
    teacher = [columns(rollout, "teacher/candidate_logprobs"), columns(rollout, "teacher/rest_logprob")[:, None]]
    return torch.cat([logp.gather(1, ids), rest], 1), torch.cat(teacher, 1)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum()


def teacher_columns(rollout: Rollout, name: str) -> tuple[Tensor, Tensor]:
    """A teacher's log-probs of the candidates [T, K], NaN where it has none, and of the rest [T]."""
    return columns(rollout, f"{name}/candidate_logprobs").double(), columns(rollout, f"{name}/rest_logprob").double()


def partial_kl(rollout: Rollout, logp: Tensor, teacher_TK: Tensor, rest_T: Tensor) -> Tensor:
    """Reverse KL to a teacher that lacks some candidates, which are then in its rest; summed over trained tokens."""
    ids, total = columns(rollout, "student/candidate_ids").long(), torch.zeros(())
    for t in np.flatnonzero(rollout.weights).tolist():
        recorded = teacher_TK[t].isfinite()
        own = logp[t, ids[t][recorded]]
        rest = logp[t].index_fill(0, ids[t][recorded], -torch.inf).logsumexp(0)
        total = total + kl(own, teacher_TK[t][recorded]) + kl(rest, rest_T[t])
    return total


def curve(run: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics, times aside."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


def assert_same_run(run: Path, undisturbed: Path) -> None:
    """The curve but for its timings, and every byte of the adapter."""
    assert curve(run) == curve(undisturbed)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (run / "adapter" / name).read_bytes() == (undisturbed / "adapter" / name).read_bytes()


@contextmanager
def stop_after_one_step() -> Iterator[Stop]:
    stop = Stop()
    stop.signum = signal.SIGINT
    yield stop
