"""Right and legal responses of a model in memory, for evaluation and for the held-out metric of training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.config import Recipe
from pipeline.engines.episodes import Episodes
from pipeline.engines.sampling import PromptBlock, Sampling, require_room
from pipeline.engines.transformers_sampler import TransformersSampler
from pipeline.errors import ConfigError
from pipeline.forward.head import unwrapped
from pipeline.forward.rows import attention_of, eval_mode, sampling_attention
from pipeline.models.resolve import ResolvedModel, resolve
from pipeline.text.answers import Checker, answers_of
from pipeline.text.detokenize import response_texts
from pipeline.text.prompts import load_prompts
from pipeline.text.rendering import render_all
from pipeline.text.teacher_prompt import kept_columns

# Takes the place of the round's number in the sampling seed: evaluation never repeats a cached rollout.
_EVALUATION = -1


def greedy_sampling(recipe: Recipe, student: ResolvedModel) -> Sampling:
    """One greedy response a prompt, by the settings of [eval]."""
    return Sampling(
        temperature=0.0,
        top_p=1.0,
        stop_token_ids=student.stop_token_ids(recipe.rollouts),
        rollouts_per_prompt=1,
        max_response_tokens=max_response_tokens(recipe),
        seed=recipe.rollouts.seed,
        round_index=_EVALUATION,
    )


def held_out_prompts(
    recipe: Recipe,
    limit: int | None,
    student: ResolvedModel,
    *,
    metric: str | None = None,
    setting: str = "eval.path",
) -> tuple[list[dict[str, Any]], list[npt.NDArray[np.int32]]]:
    """The first `limit` prompts of `eval.path`, for the metric "accuracy" those with an answer, and their token ids.

    Args:
        setting: the one that the path is from, for messages.

    Raises:
        PromptError, ConfigError: they cannot be read, there are none, or one does not fit the student, alone or
            with the longest response.
    """
    assert recipe.eval.path is not None
    wanted = recipe.prompts.model_copy(update={"path": recipe.eval.path, "skip": 0, "limit": limit})
    records = load_prompts(wanted, setting, kept_columns(recipe))
    if metric == "accuracy":
        records = [record for record in records if "answer" in record]
        if not records:
            raise ConfigError(f"{setting} = {recipe.eval.path!r}: none of the first {limit} prompts has an answer")
    context = student.context
    ids = render_all(records, student.tokenizer, wanted, recipe.rollouts.max_prompt_tokens, context)
    require_room(ids, max_response_tokens(recipe), context, response_setting(recipe))
    return records, ids


def max_response_tokens(recipe: Recipe) -> int:
    """The longest response that is evaluated."""
    return recipe.eval.max_response_tokens or recipe.rollouts.max_response_tokens


def response_setting(recipe: Recipe) -> str:
    """The setting that determines `max_response_tokens`."""
    section = "rollouts" if recipe.eval.max_response_tokens is None else "eval"
    return f"{section}.max_response_tokens"


def right_answers(
    texts: Sequence[str], accepted: Sequence[list[str] | None], checker: Checker
) -> npt.NDArray[np.bool_]:
    """[P, S]: whether each response, S a prompt, gives an answer that its prompt accepts; without one it is never
    right."""
    n_samples = len(texts) // len(accepted)
    wanted = [answers for answers in accepted for _ in range(n_samples)]
    right = [w is not None and checker.is_right(text, w) for text, w in zip(texts, wanted, strict=True)]
    return np.array(right).reshape(len(accepted), n_samples)


def legal_responses(texts: Sequence[str], n_prompts: int, checker: Checker) -> npt.NDArray[np.bool_]:
    """[P, S]: whether each response is legal."""
    return np.array([checker.is_legal(text) for text in texts]).reshape(n_prompts, -1)


def episodes_of(recipe: Recipe, student: ResolvedModel, records: Sequence[dict[str, Any]]) -> Episodes | None:
    """Replies of the recipe's environment, if it has one. A response whose environment fails ends there.

    Raises `ConfigError` if it cannot be used.
    """
    if recipe.rollouts.environment is None:
        return None
    return Episodes(recipe, student, records[0], keep_failed=True)


@contextmanager
def using(episodes: Episodes | None) -> Iterator[None]:
    """Afterwards report what failed, and end the environment's processes."""
    try:
        yield
    finally:
        if episodes is not None:
            episodes.report_failures()
            episodes.close()


@contextmanager
def generating(model: nn.Module) -> Iterator[None]:
    """Put a model that is loaded for packed rollouts, or is in training, into the state for generation: padded
    attention, eval mode."""
    base = unwrapped(model)
    with attention_of(base, sampling_attention(base)), eval_mode(model):
        yield


@dataclass(frozen=True)
class HeldOutPrompts:
    """Prompts of `eval.path` as `(token ids, accepted answers)`, and the metric of a greedy response to them.

    Attributes:
        metric: "accuracy" counts right responses, "format" legal ones.
    """

    metric: str
    prompts: tuple[tuple[npt.NDArray[np.int32], list[str] | None], ...]
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    checker: Checker
    batch_size: int
    records: tuple[dict[str, Any], ...]
    episodes: Episodes | None

    @classmethod
    def load(cls, recipe: Recipe, metric: str, limit: int, setting: str = "eval.path") -> HeldOutPrompts:
        """The first `limit` prompts; see `held_out_prompts`. Raises `RedpenError`."""
        student = resolve(recipe.student)
        records, ids = held_out_prompts(recipe, limit, student, metric=metric, setting=setting)
        return cls(
            metric,
            tuple((i, answers_of(record)) for i, record in zip(ids, records, strict=True)),
            student.tokenizer,
            greedy_sampling(recipe, student),
            Checker.of(recipe.eval),
            recipe.eval.batch_size,
            tuple(records),
            episodes_of(recipe, student, records),
        )

    def shard(self, rank: int, world: int) -> HeldOutPrompts:
        """Every `world`-th prompt, from `rank`."""
        return replace(self, prompts=self.prompts[rank::world], records=self.records[rank::world])

    def count(self, model: PreTrainedModel) -> int:
        """The number of greedy responses that are right, or legal."""
        if not self.prompts:
            return 0
        block = PromptBlock(0, [(index, ids) for index, (ids, _) in enumerate(self.prompts)], self.records)
        with generating(model), using(self.episodes):
            sampler = TransformersSampler(model, self.sampling, batch_size=self.batch_size, episodes=self.episodes)
            rollouts = sampler.sample_block(block)
        texts = response_texts(rollouts, self.tokenizer)
        if self.metric == "format":
            return int(legal_responses(texts, len(self.prompts), self.checker).sum())
        return int(right_answers(texts, [answers for _, answers in self.prompts], self.checker).sum())
