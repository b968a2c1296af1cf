"""The entry check: before the first rollout, whether the student gives responses of the form that is wanted at all.

On-policy distillation corrects what a student says. One that does not keep to the form yet is corrected where no
answer can come of it, and hours later there is little to see; a little fine-tuning comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

import cache_schema as cs
from pipeline.config import Recipe
from pipeline.console import escape_control, progress, say
from pipeline.engines.sampling import PromptBlock, Sampler
from pipeline.errors import RedpenError
from pipeline.text.answers import Checker

# Characters of an example that are shown, of its beginning and of its end.
_SHOWN = (50, 25)


def check_entry(
    recipe: Recipe,
    checker: Checker,
    sampler: Callable[[Callable[[int, int], None]], Sampler],
    prompts: Sequence[npt.NDArray[np.int32]],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Sample one response to each of the first `rollouts.format_check_prompts` prompts and look at their form.

    Args:
        sampler: that of the round, but with one rollout a prompt, given its `on_step`.

    Raises:
        RedpenError: fewer than `rollouts.format_check_min` of them are legal by `eval.format`.
    """
    settings = recipe.rollouts
    first = prompts[: settings.format_check_prompts]
    with progress("entry check", len(first), "responses") as bar:
        ((_, rollouts, _),) = sampler(lambda ended, _: bar.advance(ended)).sample(
            [PromptBlock(0, list(enumerate(first)))]
        )
    texts = tokenizer.batch_decode(
        [rollouts.response(row) for row in range(rollouts.n_rows)], skip_special_tokens=True
    )
    illegal = [row for row, text in enumerate(texts) if not checker.is_legal(text)]
    n_legal = len(texts) - len(illegal)
    found = f"{n_legal} of the first {len(texts)} responses are legal by eval.format = {recipe.eval.format!r}"
    if n_legal >= settings.format_check_min * len(texts):
        say(f"entry check: {found}")
        return
    n_cut = int((rollouts.finish_reason[illegal] == cs.FINISH_LENGTH).sum())
    cut = f"; {n_cut} were cut at rollouts.max_response_tokens = {settings.max_response_tokens}" if n_cut else ""
    examples = " and ".join(f'"{_short(texts[row])}"' for row in illegal[:2])
    raise RedpenError(
        f"entry check: {found}, fewer than rollouts.format_check_min = {settings.format_check_min:g} of them{cut}; "
        f"not legal: {examples}; take a student that keeps to the form (fine-tune it for that first), ask for the "
        "form in the prompts, correct eval.format, or set rollouts.format_check_prompts = 0 to go on"
    )


def _short(text: str) -> str:
    """The beginning and the end of a text, on one line."""
    start, end = _SHOWN
    return escape_control(text if len(text) <= start + end else f"{text[:start]} ... {text[-end:]}")
