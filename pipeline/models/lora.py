"""The trained weights of the student, a LoRA or all of them, and their files for peft, transformers and vLLM."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)

from pipeline.config import ModelConfig, TrainConfig
from pipeline.console import warn
from pipeline.errors import ModelError
from pipeline.files import atomic_directory
from pipeline.forward.finite import name_of
from pipeline.forward.head import unwrapped
from pipeline.forward.packing import decoder_body
from pipeline.models import load as models
from pipeline.models._transformers_compat import Conv1D, GradientCheckpointingLayer, quiet
from pipeline.models.files import shortened
from pipeline.models.paths import base_name
from pipeline.models.resolve import resolve

_NAME = "default"


def make_trainable(model: nn.Module, train: TrainConfig) -> nn.Module:
    """Require gradients of the weights of a loaded student that `train.method` trains: a LoRA's, or all.

    Raises:
        ModelError: as `add_lora`; its weights are scaled for inference (RWKV); or all weights are to be trained, and
            the student has an adapter or weights that are not floating-point numbers, or could not be loaded again.
    """
    if getattr(unwrapped(model).config, "rescale_every", 0):
        raise ModelError(
            f"{name_of(model)}: {type(unwrapped(model)).__name__} scales its weights in place for inference, under "
            "which it cannot be trained; set rescale_every to 0 in its config.json (fp16 alone needs it)"
        )
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
    check_saves_whole(model)
    model.requires_grad_(True)
    return model


def check_saves_whole(model: nn.Module) -> None:
    """Refuse a text model of a wrapper that no auto class of transformers would load again (Mllama's), if saved
    alone. Raises `ModelError`.
    """
    config = unwrapped(model).config
    loadable = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    if not any(type(config) in mapping for mapping in loadable) and not getattr(config, "auto_map", None):
        raise ModelError(
            f"{name_of(model)}: transformers would not load a whole {type(unwrapped(model)).__name__} again (model "
            f'type "{config.model_type}"), so it can be neither merged nor trained with train.method = "full"; '
            "train a LoRA, and apply it with peft"
        )


def add_lora(model: nn.Module, train: TrainConfig) -> PeftModel:
    """Freeze `model` and put a fresh LoRA on the linear layers of its decoder; its weights are fp32.

    The head, what is outside the decoder (a vision tower) and routers, which return more than a product, get none.

    Nor do layers whose weight the model reads without calling the layer, which bypasses an adapter.

    A = Kaiming uniform from `train.seed`, B = 0, so the first forward is that of the student. A model with an adapter
    (`student.adapter`) continues to train it; its rank and alpha must be the recipe's.

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
        exclude_modules=_excluded(model),
        bias="none",
    )
    with torch.random.fork_rng(devices=_devices(model)):
        torch.manual_seed(train.seed)
        try:
            adapted = get_peft_model(model, config)
        except ValueError as error:
            raise ModelError(f"train.lora_targets: {' '.join(str(error).split())[:200]}") from error
    assert isinstance(adapted, PeftModel)
    if train.lora_targets == "all-linear":
        _warn_of_experts(adapted)
    if shared := shared_weights(adapted):
        warn(
            f"{name_of(adapted)}: {len(shared)} of its layers share a weight with another one, but not its adapter; "
            "it can be trained and applied, but not merged"
        )
    return adapted


def shared_weights(adapted: nn.Module) -> list[str]:
    """Names of adapted layers whose weight an earlier adapted layer has, too (Zamba2's shared blocks)."""
    seen: set[int] = set()
    found = []
    for name, module in adapted.named_modules():
        if isinstance(module, BaseTunerLayer) and (weight := getattr(module, "weight", None)) is not None:
            if id(weight) in seen:
                found.append(name)
            seen.add(id(weight))
    return found


def _excluded(model: nn.Module) -> str | None:
    """A pattern of the linear layers that get no LoRA; None if there are none."""
    decoder = {id(module) for module in decoder_body(model).modules()}
    # Mamba takes the weights of these past an adapter on them, some always and some in fused kernels.
    mixers = [module for module in model.modules() if hasattr(module, "conv1d") and hasattr(module, "D")]
    fused = {id(getattr(module, name, None)) for module in mixers for name in ("out_proj", "dt_proj")}
    head = unwrapped(model).get_output_embeddings()  # which peft leaves out
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and (id(module) not in decoder or not _is_product(module) or id(module) in fused)
        and module is not head
    ]
    if lost := _lost_in_loading(model):
        warn(
            f"{name_of(model)}: {len(lost)} of its layers get no LoRA ({shortened(lost)}): transformers' renaming of "
            "stored weights would keep peft from finding it again"
        )
    names += lost + bypassed(model)
    # With layer numbers as wildcards: the pattern is stored with the adapter.
    patterns = sorted({re.sub(r"\\\.\d+(?=\\\.|$)", r"\\.\\d+", re.escape(name)) for name in names})
    return "|".join(patterns) or None


def bypassed(model: nn.Module) -> list[str]:
    """Linear layers of the decoder whose weight its forward uses without calling them (LongCat's routers).

    An adapter on one has no effect, as long as it is not merged. A model on torch's meta device runs as far as it can
    without values.
    """
    body = decoder_body(model)
    within = {id(module) for module in body.modules()}
    layers = {
        name: module
        for name, module in model.named_modules()
        if id(module) in within and isinstance(module, nn.Linear | Conv1D)
    }
    uses, device = _Uses(layers.values()), next(body.parameters()).device
    try:
        with torch.no_grad(), uses:
            body(input_ids=torch.zeros(1, 4, dtype=torch.long, device=device), use_cache=False)
    except (RuntimeError, IndexError, ValueError):
        if device.type != "meta":
            raise
    return [name for name, module in layers.items() if id(module.weight) in uses.elsewhere]


class _Uses(TorchFunctionMode):
    """Finds weights that torch functions take while the layer that has them does not run.

    Attributes:
        elsewhere: the ids of these weights.
    """

    def __init__(self, layers: Iterable[nn.Linear | Conv1D]):
        super().__init__()
        self.elsewhere: set[int] = set()
        self._running: list[int] = []
        self._layers = list(layers)
        self._weights = {id(layer.weight) for layer in self._layers}

    def __enter__(self) -> Any:
        self._hooks = [layer.register_forward_pre_hook(self._enter_layer) for layer in self._layers]
        self._hooks += [layer.register_forward_hook(self._leave_layer, always_call=True) for layer in self._layers]
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor):
            taken = {id(value) for value in (*args, *(kwargs or {}).values())}
            self.elsewhere |= (taken & self._weights) - set(self._running)
        return found

    def _enter_layer(self, layer: nn.Module, args: Any) -> None:
        self._running.append(id(layer.weight))

    def _leave_layer(self, layer: nn.Module, args: Any, output: Any) -> None:
        self._running.pop()


def _lost_in_loading(model: nn.Module) -> list[str]:
    """Linear layers of the decoder whose stored adapter gets another name when it is loaded (Laguna's experts)."""
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
    except ImportError:  # an older peft, which renames nothing
        return []
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    stored = {name: f"base_model.model.{name}.lora_A.weight" for name in names}
    weights = {key: torch.zeros(()) for key in stored.values()}
    found = convert_peft_adapter_state_dict_for_transformers(unwrapped(model), LoraConfig(), weights, _NAME)
    return [name for name in names if stored[name] not in found]


def _is_product(module: nn.Linear | Conv1D) -> bool:
    """Whether a linear layer returns its product and nothing else, which one that an architecture defines may not:
    Falcon's does, a router returns a choice of experts.
    """
    if not type(module).__module__.startswith(("transformers.models.", "transformers_modules.")):
        return True
    weight = module.weight
    ones = weight.new_ones(1, weight.shape[1])
    try:
        with torch.no_grad():
            found, product = module(ones), nn.functional.linear(ones, weight, module.bias)
    except (RuntimeError, ValueError, TypeError, IndexError):  # whatever a layer raises that takes another input
        return False
    if not isinstance(found, Tensor) or found.shape != product.shape:
        return False
    return found.is_meta or torch.allclose(found, product, rtol=1e-2, atol=1e-2)


def _warn_of_experts(adapted: nn.Module) -> None:
    """Warn if peft cannot adapt the experts of a mixture, which then keep their weights."""
    weights = list(adapted.named_parameters())
    adapted_experts = any(".experts." in name and p.requires_grad for name, p in weights)
    count = sum(p.numel() for name, p in weights if ".experts." in name)
    if count and not adapted_experts:
        share = count / sum(p.numel() for _, p in weights)
        warn(
            f'train.lora_targets = "all-linear": the experts of {name_of(adapted)} ({share:.0%} of its weights) are '
            "not linear layers and get no LoRA; the other layers are trained"
        )


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def checkpoint_gradients(model: nn.Module) -> None:
    """Recompute each layer's activations in backward, as training does."""
    try:
        unwrapped(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise ModelError(f"train.gradient_checkpointing = true: {error} Set it to false") from error


def training_mode(model: nn.Module) -> None:
    """Put LoRA dropout and gradient checkpointing, if enabled, in training mode, and the rest in eval mode: with the
    base model's dropout the student would not be the one that the cache was sampled from.

    A layer checkpoints its gradients in training mode only, but may also drop out by it: its forward runs in eval
    mode.
    """
    for name, module in model.named_modules():
        module.training = "lora_dropout" in name
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True
            if _to_eval not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(_to_eval, prepend=True)
                module.register_forward_hook(_from_eval, always_call=True)


def _to_eval(layer: nn.Module, args: Any) -> None:
    layer._was_training = layer.training  # type: ignore[assignment]
    layer.training = False


def _from_eval(layer: nn.Module, args: Any, output: Any) -> None:
    layer.training = bool(layer._was_training)


def save(model: nn.Module, weights: Mapping[str, Tensor], directory: Path, student: ModelConfig, card: str) -> None:
    """Write what was trained, atomically: the adapter in PEFT's format, or the whole model with its tokenizer.

    Args:
        weights: the trained weights by name, not sharded.
        student: the model that `model` was loaded from.
        card: text of its README.md.
    """
    with atomic_directory(directory) as partial:
        if isinstance(model, PeftModel):
            config: Any = model.peft_config[_NAME]
            config.base_model_name_or_path, config.revision = base_name(student), student.revision
            if not isinstance(config.target_modules, str):
                config.target_modules = sorted(config.target_modules)  # a set, in another order in each process
            # "auto" would ask the Hub for the base model's vocabulary; no embedding is ever trained here
            model.save_pretrained(str(partial), safe_serialization=True, save_embedding_layers=False)
            _name_in_wrapper(model, resolve(student).config, partial)
        else:
            assert isinstance(model, PreTrainedModel)
            tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
            buffers = {name: value for name, value in model.state_dict().items() if name not in tied}
            models.save_model(model, partial, resolve(student).directory, buffers | dict(weights))
        (partial / "README.md").write_text(card, encoding="utf-8")


def _name_in_wrapper(model: PeftModel, config: PretrainedConfig, directory: Path) -> None:
    """Give a saved adapter's weights also the names that they have in the vision wrapper that a text model was taken
    from, as Qwen3.5 is. vLLM, and transformers' class of the whole, know no others; transformers' text model knows
    only those without the wrapper's prefix, and peft takes from a file what fits.
    """
    text = unwrapped(model)
    if type(config) is type(text.config) or type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return
    with torch.device("meta"), quiet(progress=False):
        wrapper = AutoModelForImageTextToText.from_config(config)
    body = decoder_body(text)
    here = next(name for name, module in text.named_modules() if module is body)
    there = next(name for name, module in wrapper.named_modules() if type(module) is type(body))
    file = directory / "adapter_model.safetensors"
    prefix = "base_model.model."
    weights = load_file(file)
    of_wrapper = {name.replace(f"{prefix}{here}.", f"{prefix}{there}.", 1): weights[name].clone() for name in weights}
    save_file(weights | of_wrapper, file, metadata={"format": "pt"})
    settings: Any = model.peft_config[_NAME].to_dict()
    if not isinstance(settings["target_modules"], str):
        settings["target_modules"] = sorted(name.removeprefix(f"{here}.") for name in settings["target_modules"])
    outside = {name for part in (wrapper, wrapper.base_model) for name, _ in part.named_children()}
    towers = "|".join(re.escape(name) for name in sorted(outside - {*there.split("."), "lm_head"}))
    excluded = (settings["exclude_modules"] or "").replace(re.escape(f"{here}."), r"(.*\.)?")
    settings["exclude_modules"] = "|".join(filter(None, [excluded, rf"(.*\.)?({towers})\..*"]))
    stored = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    stored |= {name: settings[name] for name in ("target_modules", "exclude_modules")}
    (directory / "adapter_config.json").write_text(json.dumps(stored, indent=2, sort_keys=True), encoding="utf-8")


def _continued(model: PeftModel, train: TrainConfig) -> PeftModel:
    config: Any = model.peft_config[_NAME]
    wanted = {"r": train.lora_rank, "lora_alpha": train.lora_alpha, "lora_dropout": train.lora_dropout}
    different = [
        f"{name} {getattr(config, name, None)} instead of {value:g}"
        for name, value in wanted.items()
        if getattr(config, name, None) != value
    ]
    if different:
        raise ModelError(
            f"student.adapter: training continues with it, but it has {', '.join(different)}; set train.lora_rank, "
            "train.lora_alpha and train.lora_dropout to the adapter's, or merge it into the student first"
        )
    return model


def _devices(model: nn.Module) -> list[torch.device]:
    return list({p.device for p in model.parameters() if p.device.type == "cuda"})
