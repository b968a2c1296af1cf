"""The answer check: a warning, before anything is trained, if no response is right by the recipe's [eval].

Answers that are compared in the wrong way make rewards and every evaluation 0, which would otherwise show only after
training. A round whose prompts have answers is checked by its own rollouts; for one without, the student answers a
few of the held-out prompts first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import cache_schema as cs
from pipeline.config import Recipe
from pipeline.console import progress, warn
from pipeline.engines.heldout import held_out_prompts
from pipeline.engines.sampling import DecodingProgress, PromptBlock, Sampler
from pipeline.errors import ConfigError, RedpenError
from pipeline.models.resolve import ResolvedModel
from pipeline.text.answers import Checker, answers_of, none_right
from pipeline.text.detokenize import response_texts

# Responses that are compared: of a round, and to held-out prompts.
_OF_ROUND, _HELD_OUT = 256, 16


def check_round(recipe: Recipe, round_: cs.Round, student: ResolvedModel) -> None:
    """Warn if none of a sampled round's first responses to prompts with an answer is right."""
    accepted: list[list[str]] = []
    texts: list[str] = []
    for block in range(round_.n_blocks):
        records = [round_.prompts[index] for index in round_.block_prompts(block)]
        if not any("answer" in record for record in records):
            continue
        rollouts = round_.rollouts.read(block)
        answers = [answers_of(records[prompt]) for prompt in rollouts.row_prompt.tolist()]
        for text, answer in zip(response_texts(rollouts, student.tokenizer), answers, strict=True):
            if answer is not None:
                texts.append(text)
                accepted.append(answer)
        if len(texts) >= _OF_ROUND:
            break
    _warn(recipe, texts[:_OF_ROUND], accepted[:_OF_ROUND], "")


def check_held_out(
    recipe: Recipe, make_sampler: Callable[[Callable[[int, int], None]], Sampler], student: ResolvedModel
) -> None:
    """Warn if the student's responses to the first prompts of `eval.path` with an answer are all wrong.

    Args:
        make_sampler: from an `on_step`, the round's sampler with one rollout a prompt.
    """
    try:
        records, ids = held_out_prompts(recipe, _HELD_OUT, student)
    except RedpenError as error:  # the round does not need them
        warn(f"eval.path cannot be used for evaluation: {error}")
        return
    accepted = {index: answers for index, record in enumerate(records) if (answers := answers_of(record)) is not None}
    if not accepted:
        return
    with progress("answer check", len(accepted), "responses") as bar:
        sampler = make_sampler(DecodingProgress(bar, len(accepted), recipe.rollouts.max_response_tokens))
        block = PromptBlock(0, list(enumerate(ids)), records).part(list(accepted))
        ((_, rollouts, _),) = sampler.sample([block])
    wanted = list(accepted.values())
    answered = [wanted[prompt] for prompt in rollouts.row_prompt.tolist()]
    _warn(recipe, response_texts(rollouts, student.tokenizer), answered, f"{recipe.eval.path}: ")


def _warn(recipe: Recipe, texts: list[str], accepted: list[list[str]], where: str) -> None:
    with contextlib.suppress(ConfigError):  # math-verify is missing, which whatever needs it reports
        if texts and (line := none_right(texts, accepted, Checker.of(recipe.eval))) is not None:
            warn(f"{where}{line}")
