"""A model on torch's meta device, to measure the memory that it would take without loading it.

Shapes: S tokens, D hidden, h heads, d their size, B rollouts.

Weights are counted and activations measured by running transformers' code of the model, so nothing here depends on
the architecture. Only attention is replaced: on CUDA it is a flash kernel, which the meta device does not have.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _python_dispatch
from transformers import AttentionInterface

from pipeline.config import ModelConfig
from pipeline.errors import ModelError, one_line
from pipeline.forward.finite import name_of
from pipeline.forward.head import unwrapped
from pipeline.forward.packing import decoder_body
from pipeline.forward.rows import is_packed
from pipeline.models import load as models
from pipeline.models._transformers_compat import Conv1D
from pipeline.models.peak_memory import PeakBytes, bytes_of

_DispatchMode: Any = _python_dispatch.TorchDispatchMode  # has no types
_META = torch.device("meta")
# Known to transformers as attention and not as a mask, so no mask is made.
_ATTENTION = "redpen_meta"
#: Layers that are quantised; GPT-2 has its own kind of linear layer.
LINEAR = (nn.Linear, Conv1D)
# Names of the number of experts in a layer.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
# Tokens of the row that a model which is not packed is measured on.
_ROW_TOKENS = 64
# Names of what a decoder returns to go on from.
_CACHES = ("past_key_values", "cache_params", "state")
# Bytes of a weight in NF4, its scales quantised too: 4 bits, a byte for 64 weights, an fp32 for 256 of those
# (Dettmers et al., "QLoRA", arXiv 2305.14314).
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


class WithoutValues(_DispatchMode):  # type: ignore[misc]
    """Lets a forward on the meta device look at values, which do not exist there: every number is 0, every condition
    false, and no index is found. Sizes to split by that come from values leave all to the last part. Grouped
    products, for which torch has a meta kernel only in bf16, get their shape, and autocast, which peft switches off
    on any device, is not an error.
    """

    def __enter__(self) -> Any:
        self._autocast: Any = torch.autocast

        def autocast(device_type: str, *args: Any, **kwargs: Any) -> Any:
            return contextlib.nullcontext() if device_type == "meta" else self._autocast(device_type, *args, **kwargs)

        torch.autocast = autocast  # type: ignore[assignment, misc]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.autocast = self._autocast  # type: ignore[misc]
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        on_meta = bool(args) and isinstance(args[0], Tensor) and args[0].device == _META
        if on_meta and func is torch.ops.aten._local_scalar_dense.default:
            return torch.zeros((), dtype=args[0].dtype).item()
        if on_meta and func is torch.ops.aten._to_copy.default and "cpu" in str((kwargs or {}).get("device")):
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if on_meta and func is torch.ops.aten.split_with_sizes.default and not any(args[1]):
            dim = args[2] if len(args) > 2 else 0
            return func(args[0], [*args[1][:-1], args[0].shape[dim]], *args[2:])
        if on_meta and func is torch.ops.aten.nonzero.default:
            return args[0].new_empty(0, args[0].ndim, dtype=torch.int64)
        if on_meta and func is torch.ops.aten._grouped_mm.default:
            a, b = args[:2]
            shape = [a.shape[-2], b.shape[-1]]
            if a.ndim == b.ndim:  # both by group, or a sum over each group's rows
                offsets = args[2] if len(args) > 2 else (kwargs or {})["offs"]
                shape = [len(offsets) if a.ndim == 2 else len(a), *shape]
            return a.new_empty(shape)
        return func(*args, **(kwargs or {}))


def load_meta_model(cfg: ModelConfig) -> Any:
    """The model without weights, without its adapter and without a mask. Raises `ModelError`."""
    AttentionInterface.register(_ATTENTION, _attention)
    model = models.load_skeleton(cfg, _META)
    if is_packed(model):
        model.set_attn_implementation(_ATTENTION)
    return model


@dataclass(frozen=True)
class Weights:
    """A model's weights by count and size.

    Attributes:
        parameters: all of them.
        multiplied: those that a token is multiplied by: without the input embedding, with only the active experts.
        nbytes: of all, in the model's dtype, or in NF4 if the model is quantised.
        largest_layer: bytes of its largest decoder layer.
    """

    parameters: int
    multiplied: int
    nbytes: float
    largest_layer: float

    @classmethod
    def of(cls, model: Any, quantisation: str | None = None) -> Weights:
        """Of a model on any device."""
        config = model.config.get_text_config()
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        chosen = getattr(config, "num_experts_per_tok", None)
        experts = next((n for name in _EXPERTS if (n := getattr(config, name, None))), None)
        share = chosen / experts if chosen and experts else 1.0
        in_bits = {
            id(module.weight)
            for module in model.modules()
            if quantisation and isinstance(module, LINEAR) and module.weight is not head
        }

        def nbytes(parameter: Tensor) -> float:
            return parameter.numel() * (_NF4_BYTES if id(parameter) in in_bits else parameter.element_size())

        multiplied = 0.0
        for name, parameter in model.named_parameters():
            if parameter is embedding and parameter is not head:
                continue
            multiplied += parameter.numel() * (share if ".experts." in name else 1.0)
        lists = [m for m in decoder_body(model).children() if isinstance(m, nn.ModuleList)]
        return cls(
            parameters=sum(p.numel() for p in model.parameters()),
            multiplied=round(multiplied),
            nbytes=sum(map(nbytes, model.parameters())),
            largest_layer=max(
                (sum(map(nbytes, layer.parameters())) for layers in lists for layer in layers), default=0
            ),
        )


@dataclass(frozen=True)
class TrainingBytes:
    """Peak bytes of activations in one micro-batch, without its head.

    Attributes:
        forward: peak before the head.
        kept: bytes that are still alive when the head begins.
        backward: peak after the head.
    """

    forward: int
    kept: int
    backward: int


def training_bytes(model: nn.Module, tokens: int) -> TrainingBytes:
    """Memory of a training step with `tokens` tokens, without weights and gradients.

    Gradient checkpointing, if wanted, has to be switched on before.
    """
    gradients = [(p, torch.zeros_like(p)) for p in model.parameters() if p.requires_grad]
    for parameter, gradient in gradients:
        parameter.grad = gradient

    def measure(tokens: int) -> list[int]:
        with WithoutValues(), PeakBytes() as peak:
            hidden_SD = _hidden(model, tokens)
            forward, kept, peak.nbytes = peak.nbytes, peak.alive(), 0
            torch.autograd.backward(hidden_SD, torch.zeros_like(hidden_SD))
        return [forward, kept, peak.nbytes]

    found = TrainingBytes(*_extrapolated(measure, model, tokens))
    for parameter, _ in gradients:
        parameter.grad = None
    return found


@torch.no_grad()
def forward_bytes(model: nn.Module, tokens: int) -> int:
    """Peak bytes of activations in a forward pass over `tokens` tokens without gradients, without the head."""

    def measure(tokens: int) -> list[int]:
        with WithoutValues(), PeakBytes() as peak:
            _hidden(model, tokens)
        return [peak.nbytes]

    return _extrapolated(measure, model, tokens)[0]


@torch.no_grad()
def cache_bytes(model: nn.Module, tokens: int) -> int:
    """Bytes of the key-value cache (or recurrent state) of a sequence of `tokens` tokens."""
    body: Any = decoder_body(model)

    def measure(tokens: int) -> list[int]:
        with WithoutValues():
            out = body(input_ids=_ids(tokens), use_cache=True)
        cache: Any = next((found for name in _CACHES if (found := getattr(out, name, None)) is not None), None)
        return [bytes_of([vars(layer) for layer in cache.layers] if hasattr(cache, "layers") else cache)]

    return _extrapolated(measure, model, tokens)[0]


def _extrapolated(measure: Callable[[int], list[int]], model: nn.Module, tokens: int) -> list[int]:
    """What is measured for so many tokens. A model that is not packed may go through them one by one: it is measured
    on rows of a few, and grows linearly from there.
    """
    try:
        if unwrapped(model).config._attn_implementation == _ATTENTION or tokens <= _ROW_TOKENS:
            return measure(tokens)
        half, whole = measure(_ROW_TOKENS // 2), measure(_ROW_TOKENS)
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise ModelError(
            f"{name_of(model)}: its memory cannot be planned, since its forward does not run without values "
            f"({one_line(error)}); try a small round instead"
        ) from error
    times = (tokens - _ROW_TOKENS) / (_ROW_TOKENS // 2)
    return [round(b + times * (b - a)) for a, b in zip(half, whole, strict=True)]


def _hidden(model: nn.Module, tokens: int) -> Tensor:
    body: Any = decoder_body(model)
    hidden: Tensor = body(input_ids=_ids(tokens), use_cache=False).last_hidden_state
    return hidden


def _ids(tokens: int) -> Tensor:
    return torch.zeros(1, tokens, dtype=torch.int64, device=_META)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    attend: Any = _Flash.apply
    return attend(*(x[0].transpose(0, 1).contiguous() for x in (query, key, value)))[None], None


class _Flash(torch.autograd.Function):
    """Allocates and keeps what a flash kernel does, of [S, h, d]: its inputs, its output, and an fp32 for each query
    and head (Dao et al., "FlashAttention", arXiv 2205.14135). Backward sums the query's gradient in fp32."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:2], value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:2], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _, _ = ctx.saved_tensors
        torch.empty_like(query, dtype=torch.float32)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
