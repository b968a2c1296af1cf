"""Which layout an architecture takes, found from its configuration before hours are spent on rollouts.

The model is run on torch's meta device, without weights. Packed rollouts must meet in attention alone, in every
layer, through transformers' attention interface: what a layer carries from token to token besides (a convolution, a
recurrent state) would leak from one rollout into the next. A model that does not fulfil this takes padded rows
(`pipeline.forward.rows`), which are right for any causal model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.config import ModelConfig
from pipeline.errors import ModelError
from pipeline.forward.attention import ATTENTION, NotCausalError, watched
from pipeline.forward.head import Head, unwrapped
from pipeline.forward.packing import decoder_body, pack, packed_hidden
from pipeline.models import load as models
from pipeline.models.meta_model import WithoutValues
from pipeline.models.resolve import ResolvedModel, resolve

_META = torch.device("meta")
_LENGTHS = (5, 3)
_known: dict[str, LayoutChoice] = {}


@dataclass(frozen=True)
class LayoutChoice:
    """How a model's rollouts are laid out.

    Attributes:
        packed: end to end; else as padded rows.
        reason: why not packed; "" if they are.
        n_parameters: of the model that the configuration describes.
    """

    packed: bool
    reason: str = ""
    n_parameters: int = 0


def choose_layout(model: ModelConfig | ResolvedModel) -> LayoutChoice:
    """The layout of a model, from its configuration alone.

    A forward that does not run on the meta device, since it looks at values, is packed until
    `pipeline.forward.packing_check.settle_layout` finds out more.

    Raises:
        ModelError: a model that no layout can score, naming it, its architecture and the reason.
    """
    source = resolve(model)
    key = source.config.to_json_string() + (repr(source.settings) if source.settings.trust_remote_code else "")
    if key not in _known:
        _known[key] = _choose(source)
    return _known[key]


def _choose(source: ResolvedModel) -> LayoutChoice:
    label = source.setting("model")
    not_packed = ""
    try:
        model = models.load_skeleton(source, _META, attention=ATTENTION)
    except ModelError:
        model = models.load_skeleton(source, _META, attention=None)
        not_packed = "it does not use transformers' attention interface"
    name = type(unwrapped(model)).__name__
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    try:
        Head.of(model)
        decoder_body(model)
    except ModelError as error:
        raise ModelError(f"{label}: {name} cannot be scored: {error}; choose another model") from error
    if not_packed:
        return LayoutChoice(False, not_packed, n_parameters)
    try:
        reason = _reason(model)
    except NotCausalError as error:
        raise ModelError(f"{label}: {name} cannot be scored: {error}; choose another model") from error
    except ModelError as error:
        reason = str(error)
    except (RuntimeError, NotImplementedError):  # something that the meta device does not do
        reason = ""
    except Exception as error:  # whatever a forward raises that is called with what it does not take
        reason = f"its forward does not take them ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    return LayoutChoice(not reason, reason or "", n_parameters)


def _reason(model: Any) -> str:
    """Why packed rollouts would see one another; "" if they would not."""
    body: Any = decoder_body(model)
    if getattr(body.config, "attention_chunk_size", None):  # longer than what is run here
        return "its attention sees chunks of the sequence, by a mask of its own"
    layers: Any = next((m for m in body.children() if isinstance(m, nn.ModuleList)), [])
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
            packed_hidden(model, pack(sequences, [1] * len(sequences), _META))
    finally:
        for handle in handles:
            handle.remove()
    for index in range(len(layers)):
        if index not in attending:
            name = type(layers[index]).__name__
            return f"its layer {index} ({name}) mixes tokens by other means than transformers' attention interface"
    return ""
