"""A CUDA device on a machine that has none: its tensors have a shape, a type and a device, but no values.

They are on torch's meta device, which Python code is shown as "cuda". Operations are checked more strictly than a GPU
does: none may have tensors of two devices, except copies and CPU scalars. So a tensor that was left on the CPU, which
tests on a CPU cannot find, is an error. Code that reads values of the device gets zeros and True, and the place in
`pipeline` is recorded: there the host would wait for a GPU.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_ROOT = str(Path(__file__).parents[2] / "pipeline") + "/"
_aten = torch.ops.aten
_COPIES = {_aten.copy_.default, _aten._to_copy.default, _aten._foreach_copy_.default}
_CUDA, _META = torch.device("cuda", 0), torch.device("meta")
_device, _is_cuda, _is_meta = (getattr(Tensor, name).__get__ for name in ("device", "is_cuda", "is_meta"))


class MixedDevicesError(RuntimeError):
    """An operation on tensors of two devices."""


class FakeCuda(TorchDispatchMode):
    """See `fake_cuda`.

    Attributes:
        reads: how often each place in `pipeline` ("forward/head.py check_ids") read a value from the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()

    def _read(self) -> None:
        frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(_ROOT)]
        self.reads[f"{frames[-1].filename[len(_ROOT) :]} {frames[-1].name}" if frames else "elsewhere"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():  # composed operations are not taken apart before they come here
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        tensors = [leaf for leaf in tree_leaves([args, kwargs]) if isinstance(leaf, Tensor)]
        devices = {"cuda" if on_cuda(tensor) else "cpu" for tensor in tensors if tensor.ndim}
        if len(devices) > 1 and func not in _COPIES:
            raise MixedDevicesError(f"{func}: expected tensors on one device, got some on cuda and some on the CPU")
        first = tensors[0] if tensors else None
        if first is None or not on_cuda(first):
            if func is _aten.copy_.default and on_cuda(tensors[1]):
                self._read()
                return first.zero_()
            return func(*args, **kwargs)
        match func:
            case _aten._local_scalar_dense.default:
                self._read()
                return True if first.dtype == torch.bool else torch.zeros((), dtype=first.dtype).item()
            case _aten.equal.default:
                self._read()
                return True
            case _aten.nonzero.default:
                self._read()
                return first.new_empty(0, first.ndim, dtype=torch.int64)
            case _aten.repeat_interleave.Tensor:
                if kwargs.get("output_size") is None:
                    self._read()
                return torch.empty(kwargs.get("output_size") or len(first), dtype=torch.int64, device=_META)
            case _aten._to_copy.default if kwargs.get("device") not in (None, _META):
                self._read()
                return torch.zeros(first.shape, dtype=kwargs.get("dtype") or first.dtype)
        return func(*args, **kwargs)


def on_cuda(value: Tensor) -> bool:
    """Whether it is on the device; also for code that sees through the disguise."""
    with torch._C.DisableTorchFunction():
        return value.is_meta


class _Disguise(TorchFunctionMode):
    """Shows the meta device as "cuda"."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (_device, _is_cuda, _is_meta):
            cuda = on_cuda(args[0])
            if func == _device:
                return _CUDA if cuda else func(*args)
            return func == _is_cuda and cuda
        if func is Tensor.data_ptr and on_cuda(args[0]):
            return 0
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if func in (torch.device, torch.device.__new__):
            return func(*args, **kwargs)
        return func(*tree_map(_underneath, args), **tree_map(_underneath, kwargs))


def _underneath(value: Any) -> Any:
    """The meta device for "cuda"."""
    is_cuda = (isinstance(value, torch.device) and value.type == "cuda") or (
        isinstance(value, str) and value in ("cuda", "cuda:0")
    )
    return _META if is_cuda else value


@contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    """Within, there is a CUDA device. What is on it has to be made within, too."""
    cuda, autocast, backward = FakeCuda(), torch.autocast, torch.autograd._engine_run_backward

    def no_autocast(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return nullcontext() if device_type in ("cuda", "meta") else autocast(device_type, *args, **kwargs)

    def disguised_backward(*args: Any, **kwargs: Any) -> Any:
        with _Disguise():  # a mode is off within the functions that it sees, and backward computes layers again
            return backward(*args, **kwargs)

    def described(value: Tensor) -> Any:  # by checkpointing, which compares what it computes again
        return value.shape, value.dtype

    with (
        cuda,
        _Disguise(),
        mock.patch.dict("torch.utils.checkpoint._allowed_determinism_checks_to_fns", default=described),
        mock.patch("torch.autocast", no_autocast),
        mock.patch("torch.autograd._engine_run_backward", disguised_backward),
        mock.patch.multiple("torch.cuda", get_rng_state=lambda _: None, set_rng_state=lambda *_: None),
    ):
        yield cuda
