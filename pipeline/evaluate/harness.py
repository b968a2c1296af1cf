"""Tasks of lm-evaluation-harness (extra `eval`) on a student that is in memory, through the harness's own API.

A task's prompts go through the chat template if the recipe's do, with its system message and arguments. Decoding is
as the task says, greedy by default, and ends at the student's stop tokens; `eval.max_response_tokens`, if set, takes
the place of a task's own limit. A model's reasoning up to </think> is not scored.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from pipeline.config import EvalConfig, Recipe
from pipeline.config.messages import did_you_mean
from pipeline.console import console, warn
from pipeline.engines.heldout import generating
from pipeline.errors import ConfigError, PromptError, RedpenError, one_line
from pipeline.forward.head import unwrapped
from pipeline.models.resolve import ResolvedModel
from pipeline.text.answers import END_OF_REASONING
from pipeline.text.chat_template import chat_text
from pipeline.text.rendering import uses_chat

#: `value` and `stderr` (None if the harness gives none) by task and metric.
Scores = dict[str, dict[str, dict[str, float | None]]]

_OURS = Path(__file__).parent.parent
# With which the harness draws examples; its own default.
_FEWSHOT_SEED = 1234
# Marks the end of the given beginning of a reply, after which a template may go on.
_REPLY_END = "END_OF_THE_GIVEN_REPLY"


def load_tasks(settings: EvalConfig, context: int | None = None) -> dict[str, Any]:
    """`eval.tasks` with their data sets, as the harness takes them.

    Args:
        context: of the student, tokens.

    Raises:
        ConfigError: there is no such task, it needs another package, or its responses do not fit the context.
        RedpenError: its data set is not available.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if settings.task_path is not None and not Path(settings.task_path).is_dir():
        raise ConfigError(f"eval.task_path = {settings.task_path!r}: expected a directory of task files (YAML)")
    manager = TaskManager(include_path=settings.task_path)
    found: dict[str, Any] = {"tasks": {}, "groups": {}}
    for name in settings.tasks:
        if name not in manager.all_tasks:
            own = "" if settings.task_path is None else f" or of {settings.task_path}"
            raise ConfigError(
                f"eval.tasks: {name!r} is no task of lm-evaluation-harness{own} (`lm-eval ls tasks` lists them)"
                + did_you_mean(name, manager.all_tasks)
            )
        try:
            with _quiet():
                loaded = manager.load([name])
        except ImportError as error:
            raise ConfigError(f"eval.tasks: {name!r} needs another package ({one_line(error, 300)})") from error
        except Exception as error:  # of the network, the Hub, the files, or a task's own code
            raise RedpenError(
                f"eval.tasks: {name!r} or its data set is not available ({one_line(error, 300)})"
            ) from error
        found["tasks"] |= loaded["tasks"]
        found["groups"] |= loaded.get("groups") or {}
    for task in found["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        if settings.max_response_tokens is not None and task.get_config("output_type") == "generate_until":
            task.set_config("generation_kwargs", {"max_gen_toks": settings.max_response_tokens}, update=True)
    for name, task in found["tasks"].items():
        longest = (task.get_config("generation_kwargs") or {}).get("max_gen_toks")
        if context is not None and isinstance(longest, int) and longest >= context:
            asked = "eval.max_response_tokens" if settings.max_response_tokens is not None else "its own max_gen_toks"
            raise ConfigError(
                f"eval.tasks: {name!r}: {asked} is {longest}, and the student's context of {context} tokens has to "
                f"hold the prompt too; set eval.max_response_tokens below {context}"
            )
    return found


def measure(model: PreTrainedModel, student: ResolvedModel, recipe: Recipe, tasks: dict[str, Any]) -> Scores:
    """Each task's metrics for a loaded model. Raises `RedpenError` if the harness refuses one or its code fails."""
    chat = uses_chat(student.tokenizer, recipe.prompts)
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(_FEWSHOT_SEED)
    torch.manual_seed(recipe.rollouts.seed)
    try:
        with generating(model), _stopping(model, student.stop_token_ids(recipe.rollouts)), _quiet():
            # simple_evaluate would do no more, but ask git and every tool of the machine who they are
            evaluated = _Student(model, student.tokenizer, recipe)
            found = lm_eval.evaluate(
                evaluated,
                task_dict=tasks,
                limit=recipe.eval.task_limit,
                apply_chat_template=chat,
                system_instruction=recipe.prompts.system if chat else None,
                fewshot_as_multiturn=True,
                log_samples=False,
            )
    except RedpenError:
        raise
    except (ValueError, AssertionError, ImportError) as error:  # its errors for unsupported requests
        raise RedpenError(
            f"eval.tasks: lm-evaluation-harness refuses ({one_line(error, 300)}); if a task's own length limit is "
            "too large, set eval.max_response_tokens"
        ) from error
    except Exception as error:
        if any(Path(frame.filename).is_relative_to(_OURS) for frame in traceback.extract_tb(error.__traceback__)[1:]):
            raise
        raise RedpenError(
            f"eval.tasks: the code of a task fails ({type(error).__name__}: {one_line(error, 300)})"
        ) from error
    if evaluated.n_cut:
        warn(
            f"eval.tasks: {evaluated.n_cut:,} prompts lost their beginning, since with the response they do not fit "
            f"the student's context of {evaluated.max_length} tokens; lower eval.max_response_tokens"
        )
    return {name: _metrics(result) for name, result in found["results"].items()}


class _Student(HFLM):  # type: ignore[misc]  # lm_eval has no types
    """The harness's model around one that is loaded."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe):
        reasons = END_OF_REASONING in tokenizer.get_vocab()
        super().__init__(
            model,
            tokenizer=tokenizer,
            batch_size=recipe.eval.batch_size,
            think_end_token=END_OF_REASONING if reasons else None,
            chat_template_args=recipe.prompts.template_args,
        )
        self.n_cut = 0
        self._template_args = recipe.prompts.template_args
        self._warned = False
        self._longest = recipe.eval.max_response_tokens or recipe.rollouts.max_response_tokens

    @property
    def max_gen_toks(self) -> int:
        """Of a task without a limit."""
        return int(min(self._longest, self.max_length // 2))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as text, rendered with the limits of `pipeline.text.chat_template`, which the harness's has not.

        Raises `PromptError` if the template refuses the chat; system messages alone are left out with a warning, as
        the harness does without one.
        """
        try:
            return self._chat_text(chat_history, reply_follows=add_generation_prompt)
        except PromptError:
            rest = [message for message in chat_history if message["role"] != "system"]
            if len(rest) == len(chat_history):
                raise
            text = self._chat_text(rest, reply_follows=add_generation_prompt)
        if not self._warned:
            warn("eval.tasks: the chat template refuses system messages, so they are left out of the tasks' prompts")
            self._warned = True
        return text

    def _chat_text(self, chat: list[dict[str, str]], *, reply_follows: bool) -> str:
        """`reply_follows` is false if the last message is the beginning of the reply, after which the text ends."""
        if reply_follows:
            return chat_text(chat, self.tokenizer, self._template_args, reply_follows=True)
        marked = [*chat[:-1], chat[-1] | {"content": chat[-1]["content"] + _REPLY_END + " "}]
        whole = chat_text(marked, self.tokenizer, self._template_args, reply_follows=False)
        text, found, after = whole.rpartition(_REPLY_END)
        if not found:
            raise PromptError("the chat template leaves out the beginning of the reply that a task gives")
        return text if after.startswith(" ") else text.rstrip()  # a template that strips messages, as transformers

    def tok_batch_encode(self, strings: Any, *args: Any, **kwargs: Any) -> Any:
        """The harness's, counting prompts whose beginning it cuts off: it only logs that."""
        ids, mask = super().tok_batch_encode(strings, *args, **kwargs)
        if limit := kwargs.get("left_truncate_len"):
            whole = self.tokenizer(list(strings), add_special_tokens=False)["input_ids"]
            self.n_cut += sum(len(row) > limit for row in whole)
        return ids, mask


@contextlib.contextmanager
def _stopping(model: PreTrainedModel, stop_ids: Sequence[int]) -> Iterator[None]:
    """Generation ends at these tokens; the model's other generation settings do not apply."""
    base = unwrapped(model)
    own = base.generation_config
    base.generation_config = GenerationConfig(eos_token_id=list(stop_ids))
    try:
        yield
    finally:
        base.generation_config = own


def _quiet() -> contextlib.AbstractContextManager[object]:
    """The harness's bars are for a terminal."""
    return contextlib.nullcontext() if console.is_terminal else contextlib.redirect_stderr(io.StringIO())


def _metrics(result: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """`metric,filter` and `metric_stderr,filter` together; the filter's name only if there is one."""
    found: dict[str, dict[str, float | None]] = {}
    for key, value in result.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float) or not math.isfinite(value):
            continue
        stderr = result.get(f"{metric}_stderr,{filtered}")
        known = isinstance(stderr, int | float) and math.isfinite(stderr)
        name = metric if filtered == "none" else f"{metric}, {filtered}"
        found[name] = {"value": float(value), "stderr": stderr if known else None}
    return found
