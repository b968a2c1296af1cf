"""A model with a PEFT adapter, as peft loads it."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from transformers import PreTrainedModel

from pipeline.config.recipe import ModelConfig
from pipeline.errors import ModelError, RedpenError, one_line
from pipeline.models.files import read_adapter_config, shortened
from pipeline.models.resolve import ResolvedModel, resolve


def with_adapter(model: PreTrainedModel, source: ModelConfig | ResolvedModel, *, trainable: bool = False) -> Any:
    """The model with the adapter of its settings, not merged. Raises `ModelError`."""
    from peft import PeftModel, load_peft_weights, set_peft_model_state_dict

    source = resolve(source)
    directory, base, label = source.adapter_directory, source.settings.model, source.setting("adapter")
    assert directory is not None
    read_adapter_config(directory)
    if not (directory / "adapter_model.safetensors").is_file():
        raise ModelError(f"{directory}: expected adapter_model.safetensors, found none; only safetensors are read")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            adapted = PeftModel.from_pretrained(model, str(directory), is_trainable=trainable)
            # Loaded once more, since only this reports tensors that belong nowhere in the model.
            loaded = set_peft_model_state_dict(adapted, load_peft_weights(str(directory), device="cpu"))
        except (torch.OutOfMemoryError, RedpenError):
            raise
        except Exception as error:  # whatever peft, safetensors and torch raise
            raise ModelError(
                f"{label}: cannot be loaded as a PEFT adapter of {base} ({one_line(error)}); train or copy it again"
            ) from error
    if unexpected := loaded.unexpected_keys:
        raise ModelError(
            f"{label}: {len(unexpected)} of its tensors have no place in {base} ({shortened(unexpected)}); choose "
            "the model that it was trained on"
        )
    for warning in caught:
        if "missing adapter keys" in str(warning.message):
            raise ModelError(f"{label}: does not fit {base} ({one_line(warning.message)})")
    return adapted
