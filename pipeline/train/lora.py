"""What of the student is trained, a LoRA or all of it, and how it is saved for peft, transformers and vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from pipeline import models
from pipeline.config import ModelConfig, TrainConfig
from pipeline.errors import ModelError
from pipeline.files import atomic_directory

_NAME = "default"


def make_trainable(model: nn.Module, train: TrainConfig) -> nn.Module:
    """Let `train.method` decide which weights of a loaded student require gradients: a LoRA's, or all.

    Raises:
        ModelError: what `add_lora` raises; or all weights are to be trained, and the student has an adapter or
        weights that are no floating-point numbers.
    """
    if train.method == "lora":
        adapted: nn.Module = add_lora(model, train)
        return adapted
    if isinstance(model, PeftModel):
        raise ModelError(
            'student.adapter: train.method = "full" trains the weights themselves; merge the adapter into them first '
            "(`redpen merge`), and set student.model to the result"
        )
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise ModelError(
                f'student.model: train.method = "full" cannot train weights of {parameter.dtype} ({name}); '
                'set it to "lora", or take the model unquantised'
            )
    model.requires_grad_(True)
    return model


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


def save(model: nn.Module, weights: Mapping[str, Tensor], directory: Path, student: ModelConfig, card: str) -> None:
    """Write what was trained, all at once: the adapter in PEFT's format, or the whole model with its tokenizer.

    Args:
        weights: what was trained, by its name in the model, whole.
        student: what `model` was loaded from.
        card: text of its README.md.
    """
    with atomic_directory(directory) as partial:
        if isinstance(model, PeftModel):
            config: Any = model.peft_config[_NAME]
            config.base_model_name_or_path, config.revision = models.base_name(student), student.revision
            if not isinstance(config.target_modules, str):
                config.target_modules = sorted(config.target_modules)  # a set, in another order in each process
            # "auto" would ask the Hub for the base model's vocabulary; no embedding is ever trained here
            model.save_pretrained(str(partial), safe_serialization=True, save_embedding_layers=False)
        else:
            assert isinstance(model, PreTrainedModel)
            tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
            buffers = {name: value for name, value in model.state_dict().items() if name not in tied}
            models.save_model(model, partial, models.model_directory(student), buffers | dict(weights))
        (partial / "README.md").write_text(card, encoding="utf-8")


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
