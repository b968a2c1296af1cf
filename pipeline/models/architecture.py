"""Whether an architecture can score packed rollouts, from its configuration alone, before hours of sampling.

The model runs on torch's meta device, without weights: tokens of packed rollouts may only mix in attention, in every
layer, through transformers' attention interface. Anything else that carries state from token to token (a convolution,
a recurrent state) would leak from one rollout into the next.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.config import ModelConfig
from pipeline.errors import ModelError
from pipeline.forward import packing
from pipeline.forward.attention import ATTENTION, watched
from pipeline.forward.head import Head, unwrapped
from pipeline.models import load as models
from pipeline.models.meta_model import WithoutValues
from pipeline.models.resolve import resolve, setting_name

_META = torch.device("meta")
_LENGTHS = (5, 3)


def check_architecture(cfg: ModelConfig) -> None:
    """Refuse a model that cannot score packed rollouts. Loads only its configuration.

    A forward that needs values, so that it does not run on the meta device, is left to `check_packing`.

    Raises:
        ModelError: naming the model, its architecture and the reason.
    """
    label = f"{setting_name(cfg, 'model')} = {cfg.model!r}"
    try:
        model = models.load_skeleton(cfg, _META)
    except ModelError as error:
        if isinstance(error.__cause__, KeyError) and ATTENTION in str(error.__cause__):
            name = " ".join(resolve(cfg).architectures)
            raise _refusal(label, name, "it does not use transformers' attention interface") from error
        raise
    name = type(unwrapped(model)).__name__
    try:
        Head.of(model)
        reason = _reason(model)
    except ModelError as error:
        raise _refusal(label, name, str(error)) from error
    except (RuntimeError, NotImplementedError):  # unsupported on the meta device
        return
    except Exception as error:  # whatever a forward raises for arguments that it does not accept
        reason = f"its forward does not accept them ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    if reason:
        raise _refusal(label, name, reason)


def _refusal(label: str, name: str, reason: str) -> ModelError:
    return ModelError(
        f"{label}: {name} cannot be used for packed rollouts, which scoring and training need: {reason}; choose "
        "another model"
    )


def _reason(model: Any) -> str | None:
    """Why packed rollouts would see one another; None if they would not."""
    body = packing.decoder_body(model)
    layers = next((m for m in body.children() if isinstance(m, nn.ModuleList)), None)
    if layers is None or not len(layers):
        return None
    for index, layer in enumerate(layers):
        for part in layer.modules():
            if isinstance(part, nn.Conv1d):
                return f"its layer {index} convolves over tokens, so that a rollout would see the one before it"
    sequences = [np.zeros(length, np.int32) for length in _LENGTHS]
    attending: set[int] = set()
    handles = []
    current = [-1]

    def enter(index: int) -> Any:
        def hook(*_: Any) -> None:
            current[0] = index

        return hook

    for index, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(enter(index)))
    try:
        with torch.no_grad(), WithoutValues(), watched(lambda: attending.add(current[0])):
            packing.packed_hidden(model, packing.pack(sequences, [1] * len(sequences), _META))
    finally:
        for handle in handles:
            handle.remove()
    for index in range(len(layers)):
        if index not in attending:
            name = type(layers[index]).__name__
            return f"its layer {index} ({name}) mixes tokens by other means than transformers' attention interface"
    return None
