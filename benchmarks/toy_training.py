"""A toy student that is trained from a cache in this process and measured as it goes: what the figures plot."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import numpy as np
import torch

import cache_schema as cs
import pipeline.rollouts.stage
import pipeline.score.stage
from pipeline.api import Student, Teacher
from pipeline.config import Recipe, RolloutsConfig, load_recipe
from pipeline.engines.resident import ResidentScorer
from pipeline.engines.scoring import TokenBatch
from pipeline.models.lora import make_trainable, training_mode
from pipeline.rounds.metrics import scores_reverse_kl
from pipeline.text.prompts import load_prompts
from pipeline.train.build import make_objective, make_replay
from pipeline.train.trainer import StudentTrainer

HELDOUT, CANDIDATES = 512, 64
GREEDY = RolloutsConfig(rollouts_per_prompt=1, temperature=0.0, max_response_tokens=32)
FRESH = RolloutsConfig(rollouts_per_prompt=1, temperature=1.0, max_response_tokens=32)

torch.set_num_threads(2)


def toy_recipe(seed: int, *settings: str) -> Recipe:
    return load_recipe("toy", [f"rollouts.seed={seed}", f"train.seed={seed}", *settings])


def make_cache(path: Path, recipe: Recipe, out: TextIO = sys.stderr) -> Path:
    """Stage one, where it is not done yet; what it prints goes to `out`."""
    with contextlib.redirect_stdout(out):
        pipeline.rollouts.stage.run(recipe, str(path))
        pipeline.score.stage.run(recipe, str(path))
    return path


class Measured:
    """Held-out accuracy and on-policy reverse KL of a student, whatever it becomes."""

    def __init__(self, recipe: Recipe, heldout: int = HELDOUT):
        records = load_prompts(recipe.prompts.model_copy(update={"path": "toy:heldout", "limit": heldout}))
        self._prompts, self._answers = ([str(r[key]) for r in records] for key in ("prompt", "answer"))
        self.student = Student(recipe.student, template="none", candidates=CANDIDATES)
        self.teacher = Teacher(recipe.teacher[0])

    def now(self) -> dict[str, float]:
        """`accuracy`, greedy; `fresh_kl`, in nats a token on rollouts of its own, over 64 candidates and the rest."""
        texts = self.student.sample(self._prompts, GREEDY).texts
        right = [text.rpartition("=")[2] == answer for text, answer in zip(texts, self._answers, strict=True)]
        fresh = self.student.sample(self._prompts, FRESH)
        kl_T = scores_reverse_kl(fresh.scores, self.teacher.compute_scores(fresh))
        return {"accuracy": float(np.mean(right)), "fresh_kl": float(kl_T.mean())}


class Replayed(Measured):
    """A student that is trained from a cache, as `redpen train` does it."""

    def __init__(self, recipe: Recipe, cache: Path, heldout: int = HELDOUT):
        super().__init__(recipe, heldout)
        self.recipe, self.round = recipe, cs.open(str(cache)).round(0)
        objective = make_objective(recipe, self.round, ["teacher"])
        self.replay = make_replay(recipe, self.round, objective)
        self.student.model = make_trainable(self.student.model, recipe.train)
        self.trainer = StudentTrainer(self.student.model, objective, recipe.train)

    def now(self) -> dict[str, float]:
        """With `cached_kl`, what it looks like from the cache, over the cached candidates and the rest."""
        scorer, parts = ResidentScorer(self.student.model), []
        self.student.model.eval()
        for block in range(self.round.n_blocks):
            cached, teacher = (self.round.scores(name).read(block) for name in (cs.STUDENT, "teacher"))
            assert cached.candidate_ids is not None
            now = scorer.compute_logprobs(TokenBatch((self.round.rollouts.read(block),), cached.candidate_ids))
            parts.append(scores_reverse_kl(replace(now, candidate_ids=cached.candidate_ids), teacher))
        return super().now() | {"cached_kl": float(np.concatenate(parts).mean())}

    def advance(self, step: int) -> None:
        """Train until so many steps are done."""
        training_mode(self.student.model)
        while self.trainer.step < step:
            self.trainer.update(self.replay.batch(self.trainer.step))

    def curve(self, steps: Sequence[int]) -> list[dict[str, float]]:
        """What is measured after so many steps, in ascending order."""
        points = []
        for step in steps:
            self.advance(step)
            points.append({"step": step, **self.now()})
        return points
