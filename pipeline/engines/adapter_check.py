"""Whether an inference engine applies an adapter: vLLM ignores keys of one that it does not know, without a word.

With x the engine's log-probs of some tokens, a those of the forward in this process, and b the same without the
adapter, the part of the adapter's effect that the engine shows is

    c = <x - b, a - b> / |a - b|^2,    give or take |x - b - c (a - b)| / (sqrt(n) |a - b|):

1 if it applies all of the adapter, 0 if nothing, in spite of rounding, which is apart from the effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open

from pipeline.config import ModelConfig
from pipeline.console import warn
from pipeline.errors import ModelError
from pipeline.models import load as models
from pipeline.models.resolve import resolve, setting_name

if TYPE_CHECKING:
    from pipeline.engines.vllm import Engine

#: Prompts that are read, and of how many tokens at most.
_PROMPTS, _PROMPT_TOKENS = 8, 256
# How far from 1 the part may be, and how many times its error.
_PART, _ERRORS = 0.25, 5.0

Array = npt.NDArray[np.floating[Any]]
Prompts = Sequence[npt.NDArray[np.int32]]


def check_effect(found: Array, adapted: Array, base: Array, who: str) -> None:
    """Refuse an engine that shows another effect of an adapter than the forward in this process.

    Args:
        found: [n] log-probs by the engine, NaN where it has none.
        adapted, base: [n] by the forward, with and without the adapter.
        who: the setting and the engine, for the message.

    Raises:
        ModelError: with the part of the effect that was found.
    """
    known = np.isfinite(found) & np.isfinite(adapted) & np.isfinite(base)
    x, a, b = (array[known].astype(np.float64) for array in (found, adapted, base))
    effect, got = a - b, x - b
    size = float(effect @ effect)
    if size == 0:
        return
    part = float(got @ effect) / size
    residual = got - part * effect
    error = float(np.sqrt(residual @ residual / len(x) / size))
    if abs(part - 1) > max(_PART, _ERRORS * error):
        raise ModelError(
            f"{who} shows {part:.0%} of the effect that the adapter has in the training forward, expected 100%; it "
            "may not know the adapter's modules or settings: merge it with `redpen merge`, and use the merged model"
        )


def changes_nothing(adapter: Path) -> bool:
    """Whether a LoRA is as it was initialised: everything that it adds is 0."""
    try:
        with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
            names = list(file.keys())
            outer = [name for name in names if ".lora_B." in name or ".lora_embedding_B" in name]
            inner = [name for name in names if ".lora_A." in name or ".lora_embedding_A" in name]
            return len(outer) + len(inner) == len(names) and not any(file.get_tensor(name).any() for name in outer)
    except (OSError, SafetensorError):  # whoever loads it says why it cannot be read
        return False


@dataclass(frozen=True)
class AdapterEffect:
    """What an adapter does to the next token after a few prompts, by the forward that training uses.

    Attributes:
        prompts: their last tokens.
        adapted, base: f4 [prompts, vocabulary], with and without the adapter; None if the model did not fit.
    """

    prompts: list[npt.NDArray[np.int32]]
    adapted: npt.NDArray[np.float32] | None
    base: npt.NDArray[np.float32] | None

    @classmethod
    def of(cls, model: ModelConfig, prompts: Prompts) -> AdapterEffect | None:
        """None for a model without an adapter, or with one that changes nothing yet. Raises `ModelError`."""
        # vLLM loads it unquantised
        source = resolve(model.model_copy(update={"quantisation": None}))
        if source.adapter_directory is None or changes_nothing(source.adapter_directory):
            return None
        shortest = sorted((prompt for prompt in prompts if len(prompt)), key=len)[:_PROMPTS]
        few = [prompt[-_PROMPT_TOKENS:] for prompt in shortest]
        if not few:
            return None
        try:
            loaded = models.load_model(source, attention="sampling")
            adapted = _next_logprobs(loaded, few)
            with loaded.disable_adapter():
                base = _next_logprobs(loaded, few)
        except torch.OutOfMemoryError:
            warn(f"{setting_name(model, 'adapter')}: no memory to compare it in vLLM with the training forward")
            return cls(few, None, None)
        finally:
            loaded = None
            models.free_memory()
        return cls(few, adapted, base)

    def check(self, engine: Engine, who: str) -> None:
        """Refuse an engine that does not apply the adapter. Raises `ModelError`."""
        found = engine.next_logprobs(self.prompts)
        rows = [(row, token) for row, returned in enumerate(found) for token in returned]
        at = tuple(np.array(rows).T)
        changes = True  # most log-probs; an adapter may be too small for the type of the model
        if self.adapted is not None and self.base is not None:
            changes = bool((self.adapted[at] != self.base[at]).mean() > 0.5)
        if changes and found == engine.next_logprobs(self.prompts, adapted=False):
            raise ModelError(
                f"{who} has no effect: the log-probs after {len(found)} prompts are the same without it, since vLLM "
                "ignores modules that it does not know; merge it with `redpen merge`, and use the merged model"
            )
        if self.adapted is None or self.base is None:
            return
        values = np.array([logprob for returned in found for logprob in returned.values()])
        check_effect(values, self.adapted[at], self.base[at], who)


@torch.inference_mode()
def _next_logprobs(model: Any, prompts: Prompts) -> npt.NDArray[np.float32]:
    """[prompts, vocabulary]"""
    device = next(model.parameters()).device
    rows = []
    for prompt in prompts:
        ids = torch.from_numpy(prompt.astype(np.int64)).to(device)
        rows.append(model(input_ids=ids[None], use_cache=False).logits[0, -1].float().log_softmax(0).cpu())
    return torch.stack(rows).numpy()
