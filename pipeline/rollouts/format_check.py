"""The format check: before the first rollout, whether the student gives responses of the wanted form at all.

On-policy distillation corrects what a student writes. A student that does not keep to the form gives no answers to
correct, which would otherwise show only hours later; a little fine-tuning on the form has to come first.
"""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

import cache_schema as cs
from pipeline.config import Recipe
from pipeline.console import escape_control, progress, say
from pipeline.engines.sampling import DecodingProgress, PromptBlock, Sampler
from pipeline.errors import RedpenError
from pipeline.text.answers import Checker
from pipeline.text.detokenize import response_texts

# Characters of an example that are shown, of its beginning and of its end.
_SHOWN = (50, 25)


def check_format(
    recipe: Recipe,
    checker: Checker,
    make_sampler: Callable[[Callable[[int, int], None]], Sampler],
    first: PromptBlock,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Sample one response to each of the round's first prompts and check their form.

    Args:
        make_sampler: from an `on_step`, the round's sampler with one rollout a prompt.
        first: `rollouts.format_check_prompts` prompts.

    Raises:
        RedpenError: fewer than the fraction `rollouts.format_check_min` are legal by `eval.format`.
    """
    settings = recipe.rollouts
    with progress("format check", len(first.prompts), "responses") as bar:
        sampler = make_sampler(DecodingProgress(bar, len(first.prompts), settings.max_response_tokens))
        ((_, rollouts, _),) = sampler.sample([first])
    texts = response_texts(rollouts, tokenizer)
    illegal = [row for row, text in enumerate(texts) if not checker.is_legal(text)]
    n_legal = len(texts) - len(illegal)
    found = f"{n_legal} of the first {len(texts)} responses are legal by eval.format = {recipe.eval.format!r}"
    if n_legal >= settings.format_check_min * len(texts):
        say(f"format check: {found}")
        return
    n_cut = int((rollouts.finish_reason[illegal] == cs.FINISH_LENGTH).sum())
    cut = f"; {n_cut} were cut at rollouts.max_response_tokens = {settings.max_response_tokens}" if n_cut else ""
    examples = " and ".join(f'"{_short(texts[row])}"' for row in illegal[:2])
    raise RedpenError(
        f"format check: {found}, fewer than rollouts.format_check_min = {settings.format_check_min:g}{cut}; "
        f"not legal: {examples}; fine-tune the student on the form first, ask for it in the prompts, correct "
        "eval.format, or set rollouts.format_check_prompts = 0 to skip this check"
    )


def _short(text: str) -> str:
    """The beginning and the end of a text, on one line."""
    start, end = _SHOWN
    return escape_control(text if len(text) <= start + end else f"{text[:start]} ... {text[-end:]}")
