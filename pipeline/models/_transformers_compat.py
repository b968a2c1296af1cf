"""What redpen uses of transformers beyond its documented interface, in one place.

Tried with transformers 5.17 and 5.19. With another version, look here first: names move between modules, and a
change of how checkpoints are converted on loading changes what `pipeline.streaming` must do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer
from transformers.utils import logging

__all__ = [
    "Concatenate",
    "Conv1D",
    "GradientCheckpointingLayer",
    "MergeModulelist",
    "WeightConverter",
    "WeightRenaming",
    "check_quantiser",
    "dot_natural_key",
    "get_model_conversion_mapping",
    "initialize_as_loaded",
    "initialize_on_meta",
    "quiet",
    "rename_source_key",
    "save_weights",
]


@contextlib.contextmanager
def quiet(*, progress: bool) -> Iterator[None]:
    """Switch off transformers' loading report, and its progress bar unless `progress`."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not progress:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def check_quantiser(settings: Any) -> None:
    """Raise whatever transformers' quantiser does if it cannot load such a checkpoint here."""
    if not AutoHfQuantizer.supports_quant_method(settings if isinstance(settings, dict) else settings.to_dict()):
        raise ValueError("transformers does not know this method")
    AutoHfQuantizer.from_config(settings, pre_quantized=True).validate_environment(device_map=None)


def save_weights(model: PreTrainedModel, directory: Path, state: dict[str, Tensor] | None) -> None:
    """`save_pretrained` without the generation settings, which it refuses to save if they are invalid."""
    settings, model.generation_config = model.generation_config, GenerationConfig()
    try:
        model.save_pretrained(directory, state_dict=state)
    finally:
        model.generation_config = settings
    (directory / "generation_config.json").unlink(missing_ok=True)


def initialize_on_meta(model: Any, device: torch.device) -> None:
    """Compute on `device` the buffers that no checkpoint holds, of a model on torch's meta device."""
    for name, buffer in model.named_non_persistent_buffers():
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, torch.empty_like(buffer, device=device))
    model.initialize_weights()  # has no effect on meta tensors


def initialize_as_loaded(model: Any) -> None:
    """What `from_pretrained` does with a model once it has read its weights: it initializes what is left, by code of
    the architecture, which may change weights that were read (Youtu sets its padding token's embedding to 0).
    """
    for module in model.modules():
        vars(module).pop("_is_hf_initialized", None)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor._is_hf_initialized = True
    model.initialize_weights()
