"""Greedy accuracy of a model that is in memory: what evaluation reports, and training may watch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import cache_schema as cs
from pipeline import models
from pipeline.answers import extract_answer
from pipeline.config import ModelConfig, Recipe
from pipeline.errors import ConfigError
from pipeline.logprobs import unwrapped
from pipeline.prompts import load_prompts, render_all
from pipeline.rollouts import PromptBlock, Sampling
from pipeline.rollouts.transformers_sampler import TransformersSampler

# Takes the place of the round's number in the sampling seed: evaluation never repeats a cached rollout.
_EVALUATION = -1


def greedy_sampling(recipe: Recipe, cfg: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> Sampling:
    """One greedy response a prompt, as `eval` wants them."""
    return Sampling(
        temperature=0.0,
        top_p=1.0,
        stop_token_ids=models.stop_token_ids(cfg, tokenizer, recipe.rollouts),
        rollouts_per_prompt=1,
        max_response_tokens=recipe.eval.max_response_tokens or recipe.rollouts.max_response_tokens,
        seed=recipe.rollouts.seed,
        round_index=_EVALUATION,
    )


def right_answers(
    rollouts: cs.RolloutBlock,
    answers: Sequence[str | None],
    tokenizer: PreTrainedTokenizerBase,
    pattern: str | None,
) -> npt.NDArray[np.bool_]:
    """[P, S]: whether each response gives its prompt's answer; `answers` is by prompt of the block, and a prompt
    without one is never right."""
    texts = tokenizer.batch_decode(
        [rollouts.response(row) for row in range(rollouts.n_rows)], skip_special_tokens=True
    )
    wanted = [answers[prompt] for prompt in rollouts.row_prompt]
    right = [w is not None and extract_answer(text, pattern) == w for text, w in zip(texts, wanted, strict=True)]
    return np.array(right).reshape(len(answers), -1)


def answer_of(record: dict[str, Any]) -> str | None:
    """A prompt's answer as `right_answers` compares it."""
    return str(record["answer"]).strip() if "answer" in record else None


@contextmanager
def generating(model: nn.Module) -> Iterator[None]:
    """A model loaded for packed rollouts, or in training, as generation needs it: padded attention, eval mode."""
    base = unwrapped(model)
    attention = base.config._attn_implementation
    training = [module for module in model.modules() if module.training]
    base.set_attn_implementation("sdpa")
    model.eval()
    try:
        yield
    finally:
        base.set_attn_implementation(attention)
        for module in training:
            module.training = True


@dataclass(frozen=True)
class HeldOutPrompts:
    """Prompts with an answer, as `(token ids, answer)` of a student."""

    prompts: tuple[tuple[npt.NDArray[np.int32], str], ...]
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    pattern: str | None
    batch_size: int

    @classmethod
    def load(cls, recipe: Recipe, limit: int) -> HeldOutPrompts:
        """The first `limit` prompts of `eval.path`. Raises `RedpenError` where they cannot be used."""
        wanted = recipe.prompts.model_copy(update={"path": recipe.eval.path, "limit": limit})
        records = [record for record in load_prompts(wanted) if "answer" in record]
        if not records:
            raise ConfigError(f"eval.path = {recipe.eval.path!r}: none of the first {limit} prompts has an answer")
        tokenizer, facts = models.load_tokenizer(recipe.student), models.model_facts(recipe.student)
        ids = render_all(records, tokenizer, recipe.prompts, recipe.rollouts.max_prompt_tokens, facts.context)
        return cls(
            tuple((i, str(answer_of(record))) for i, record in zip(ids, records, strict=True)),
            tokenizer,
            greedy_sampling(recipe, recipe.student, tokenizer),
            recipe.eval.answer_pattern,
            recipe.eval.batch_size,
        )

    def share(self, rank: int, world: int) -> HeldOutPrompts:
        """Every `world`-th prompt, from `rank`."""
        return replace(self, prompts=self.prompts[rank::world])

    def count_right(self, model: PreTrainedModel) -> int:
        """How many of them the model answers rightly when it is greedy."""
        if not self.prompts:
            return 0
        block = PromptBlock(0, [(index, ids) for index, (ids, _) in enumerate(self.prompts)])
        with generating(model):
            rollouts = TransformersSampler(model, self.sampling, batch_size=self.batch_size).sample_block(block)
        answers = [answer for _, answer in self.prompts]
        return int(right_answers(rollouts, answers, self.tokenizer, self.pattern).sum())
