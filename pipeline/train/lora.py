"""The student's adapter: put on, saved as peft and vLLM read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from pipeline.config import TrainConfig
from pipeline.errors import ModelError
from pipeline.train.checkpoint import atomic_directory

_NAME = "default"


def add_lora(model: nn.Module, train: TrainConfig) -> PeftModel:
    """Freeze `model` and put a fresh LoRA on its linear layers, the head excluded; its weights are fp32.

    A = Kaiming uniform from `train.seed`, B = 0, so the first forward is the student's own. A model that came with an
    adapter (`student.adapter`) goes on training that one, whose rank and alpha must be the recipe's.

    Raises:
        ModelError: no layer has one of the names in `lora_targets`, one is the head, or the adapter has other
        settings.
    """
    if isinstance(model, PeftModel):
        return _continued(model, train)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=train.lora_rank,
        lora_alpha=train.lora_alpha,
        lora_dropout=train.lora_dropout,
        target_modules=train.lora_targets,
        bias="none",
    )
    with torch.random.fork_rng(devices=_devices(model)):
        torch.manual_seed(train.seed)
        try:
            adapted = get_peft_model(model, config)
        except ValueError as error:
            raise ModelError(f"train.lora_targets: {' '.join(str(error).split())[:200]}") from error
    assert isinstance(adapted, PeftModel)
    return adapted


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that training moves, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def training_mode(model: nn.Module) -> None:
    """Switch on what training needs, LoRA dropout and gradient checkpointing where enabled, and leave the rest in
    eval mode: a base model's own dropout would make the student another one than the cache was sampled from."""
    for name, module in model.named_modules():
        module.training = "lora_dropout" in name or isinstance(module, GradientCheckpointingLayer)


def save_adapter(model: PeftModel, directory: Path, base: str) -> None:
    """Write the adapter in PEFT's format, all at once. `base` is the path or Hub id it goes on."""
    config: Any = model.peft_config[_NAME]
    config.base_model_name_or_path = base
    if not isinstance(config.target_modules, str):
        config.target_modules = sorted(config.target_modules)  # a set, whose order changes from process to process
    with atomic_directory(directory) as partial:
        # "auto" would ask the Hub for the base model's vocabulary; no embedding is ever trained here
        model.save_pretrained(str(partial), safe_serialization=True, save_embedding_layers=False)


def adapter_tensors(model: PeftModel) -> dict[str, Tensor]:
    """The adapter's weights by PEFT's names."""
    state: dict[str, Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return state


def _continued(model: PeftModel, train: TrainConfig) -> PeftModel:
    config: Any = model.peft_config[_NAME]
    wanted = {"r": train.lora_rank, "lora_alpha": train.lora_alpha, "lora_dropout": train.lora_dropout}
    different = [
        f"{name} {getattr(config, name, None)} and not {value:g}"
        for name, value in wanted.items()
        if getattr(config, name, None) != value
    ]
    if different:
        raise ModelError(
            f"student.adapter: goes on training, but has {', '.join(different)}; set train.lora_rank, "
            "train.lora_alpha and train.lora_dropout to the adapter's, or merge it into the student first"
        )
    return model


def _devices(model: nn.Module) -> list[torch.device]:
    return list({p.device for p in model.parameters() if p.device.type == "cuda"})
