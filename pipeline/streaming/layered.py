"""A decoder run one layer at a time, whoever wrote it.

The model runs as transformers has it, first with layers that only note what they are called with, and at the end with
a last layer that returns what the real ones have made of it: positions, masks, scaled embeddings, the final norm and
the head are its own. Between these the real layers are called one by one, each on all the forwards, while its weights
are there. Models whose decoder does anything between its layers are refused.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pipeline.errors import ModelError
from pipeline.forward.packing import decoder_body

_T = TypeVar("_T")

# What layers return: hidden states, or a tuple of them and what is not kept, in whose place is an empty tensor.
_NOT_KEPT = torch.empty(0)
_RETURNS: tuple[Callable[[Tensor], Any], ...] = (
    lambda hidden: hidden,
    lambda hidden: (hidden,),
    lambda hidden: (hidden, _NOT_KEPT),
    lambda hidden: (hidden, _NOT_KEPT, _NOT_KEPT),
)


@dataclass
class Noted:
    """A forward that is on its way through the layers.

    Attributes:
        forward: of the whole model.
        hidden: [1, S, D], what the next layer takes; overwritten by every layer.
        calls: beside it, the arguments of each layer.
        attention: the implementation under which the forward called its layers.
    """

    forward: Callable[[], Any]
    hidden: Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    attention: str


class LayeredModel:
    """A causal language model whose decoder layers have weights only while they are needed.

    Attributes:
        layers: of its decoder, in order.

    Raises:
        ModelError: the decoder has no single list of layers.
    """

    def __init__(self, model: Any):
        self.base = model
        body, n_layers = decoder_body(model), model.config.get_text_config().num_hidden_layers
        lists = [m for m in body.children() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
        if len(lists) != 1:
            raise self.refusal(f"its decoder has {len(lists)} lists of {n_layers} layers, one was expected")
        self.layers: list[nn.Module] = list(lists[0])
        owners: dict[int, int] = {}
        for number, layer in enumerate(self.layers):
            if any(owners.setdefault(id(parameter), number) != number for parameter in layer.parameters()):
                raise self.refusal("its layers share weights")
        self._embedding = model.get_input_embeddings()
        # Where each name of the state is kept. An adapter wraps modules, and so changes names but not this.
        self._holders = {
            f"{prefix}.{key}" if prefix else key: (held, key)
            for prefix, module in model.named_modules(remove_duplicate=False)
            for held in (module._parameters, module._buffers)
            for key in held
        }
        index = {module: number for number, module in enumerate(self.layers)}
        self._returns: Callable[[Tensor], Any] | None = None  # how layers return hidden states; found by `note`
        self._prefixes = {f"{name}.": index[module] for name, module in model.named_modules() if module in index}

    def layer_of(self, name: str) -> int | None:
        """The layer to which a weight of this name belongs."""
        return next((index for prefix, index in self._prefixes.items() if name.startswith(prefix)), None)

    def refusal(self, reason: str) -> ModelError:
        return ModelError(
            f'{type(self.base).__name__} cannot be streamed: {reason}; use score.placement = "resident"'
        )

    def install(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Put weights in their places; returns what was there."""
        before = {}
        for name, value in weights.items():
            held, key = self._holders[name]
            before[name] = held[key]
            is_parameter = isinstance(held[key], nn.Parameter) and not isinstance(value, nn.Parameter)
            held[key] = nn.Parameter(value, requires_grad=False) if is_parameter else value
        return before

    def embedding_alone(self) -> str | None:
        """Name of the embedding's weight if it is a table that nothing else uses, such as the head."""
        table = getattr(self._embedding, "weight", None)
        names = [name for name, (held, key) in self._holders.items() if held[key] is table]
        return names[0] if isinstance(self._embedding, nn.Embedding) and len(names) == 1 else None

    def embed_on_host(self, device: torch.device) -> None:
        """Look tokens up in host memory, and move what they are to `device`."""
        for name, buffer in self._embedding.named_buffers():
            setattr(self._embedding, name, buffer.cpu())
        self._embedding.register_forward_pre_hook(lambda module, args: tuple(arg.cpu() for arg in args))
        self._embedding.register_forward_hook(lambda module, args, embedded: embedded.to(device))

    def run(
        self,
        forwards: Sequence[Callable[[], _T]],
        weights: Iterator[tuple[int, dict[str, Tensor]]],
        progress: Callable[[], None] = lambda: None,
    ) -> Iterator[_T]:
        """Call forwards of the model, every layer on all of them in turn; gives what each returns.

        Args:
            weights: numbers and weights of all layers.
            progress: called before each forward's part in a layer, and before its end.
        """
        noted = [self.note(forward) for forward in forwards]
        for index, tensors in itertools.islice(weights, len(self.layers)):
            before = self.install(tensors)
            try:
                for run in noted:
                    progress()
                    run.hidden.copy_(self.step(index, run))
            finally:
                self.install(before)
        while noted:
            progress()
            yield self._finish(noted.pop(0))

    def note(self, forward: Callable[[], Any]) -> Noted:
        """Learn what a forward calls its layers with, and at first whether they return hidden states or a tuple."""
        if self._returns is not None:
            return self._note(forward, self._returns)
        refusal: ModelError | None = None
        for returns in _RETURNS:
            try:
                noted = self._note(forward, returns)
            except ModelError as error:
                refusal = error
                continue
            except (ValueError, TypeError, IndexError, RuntimeError) as error:
                refusal = refusal or self.refusal(f"its decoder fails ({error})")
                continue
            self._returns = returns
            return noted
        assert refusal is not None
        raise refusal

    def _note(self, forward: Callable[[], Any], returns: Callable[[Tensor], Any]) -> Noted:
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        first: Tensor | None = None
        attention = ""

        def layer(index: int, *args: Any, **kwargs: Any) -> Any:
            nonlocal first, attention
            hidden, args, kwargs = _split_hidden(args, kwargs)
            if first is None:
                first, attention = hidden, self.base.config._attn_implementation
            if index != len(calls) or hidden is not first:
                raise self.refusal("its decoder does something between its layers")
            if any(value is _NOT_KEPT for value in (*args, *kwargs.values())):
                raise self.refusal("its layers hand more than hidden states on to the next")
            calls.append((args, kwargs))
            return returns(hidden)

        with self._layers_as(layer):
            forward()
        if first is None or len(calls) != len(self.layers):
            raise self.refusal("its decoder does not call its layers")
        # A copy to be overwritten: what lives as long as a wave is not allocated among activations.
        return Noted(forward, first.clone(memory_format=torch.contiguous_format), calls, attention)

    def step(self, index: int, run: Noted) -> Tensor:
        """What a layer, its weights installed, makes of a forward's hidden states."""
        attention = self.base.config._attn_implementation
        args, kwargs = run.calls[index]
        self._attend_by(run.attention)
        try:
            hidden = self.layers[index](run.hidden, *args, **kwargs)
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            raise self.refusal(f"its layers do not run one at a time ({error})") from error
        finally:
            self._attend_by(attention)
        if isinstance(hidden, tuple):
            hidden = hidden[0]
        if not isinstance(hidden, Tensor) or (hidden.shape, hidden.dtype) != (run.hidden.shape, run.hidden.dtype):
            raise self.refusal("its layers do not return hidden states like those that they take")
        return hidden

    def _finish(self, run: Noted) -> Any:
        """What a forward makes of the last layer's output."""

        assert self._returns is not None
        returns = self._returns

        def layer(index: int, *args: Any, **kwargs: Any) -> Any:
            return returns(run.hidden if index == len(self.layers) - 1 else _split_hidden(args, kwargs)[0])

        with self._layers_as(layer):
            return run.forward()

    @contextlib.contextmanager
    def _layers_as(self, forward: Callable[..., Any]) -> Iterator[None]:
        """Layers that call `forward(index, ...)` instead of their own."""
        with contextlib.ExitStack() as stack:
            for index, layer in enumerate(self.layers):
                stack.enter_context(_forward_as(layer, partial(forward, index)))
            yield

    def _attend_by(self, implementation: str) -> None:
        if self.base.config._attn_implementation != implementation:
            self.base.set_attn_implementation(implementation)


@contextlib.contextmanager
def _forward_as(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    module.forward = forward
    try:
        yield
    finally:
        del module.forward  # the class's again


def _split_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Hidden states, which come first, and the other arguments of a layer."""
    if args:
        return args[0], args[1:], kwargs
    return kwargs["hidden_states"], (), {name: value for name, value in kwargs.items() if name != "hidden_states"}
