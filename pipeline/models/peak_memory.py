"""Bytes of tensors: of containers of them, and the peak while some code runs.

Tensors on torch's meta device count like any other, so that memory can be measured without being allocated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.multiprocessing import reductions
from torch.utils import _python_dispatch

_weak_storage: Any = reductions.StorageWeakRef  # has no types
_DispatchMode: Any = _python_dispatch.TorchDispatchMode


class PeakBytes(_DispatchMode):  # type: ignore[misc]
    """Measures `nbytes`, the peak bytes of storages made by operations under it."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0
        self._made: dict[int, tuple[Any, int]] = {}
        self._sum = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {tensor.untyped_storage()._cdata for tensor in tensors_in([args, kwargs])}
        for tensor in tensors_in(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in known and storage._cdata not in self._made:  # else it is a view
                self._made[storage._cdata] = _weak_storage(storage), storage.nbytes()
                self._sum += storage.nbytes()
        if self._sum > self.nbytes:  # perhaps only because freed storages are still counted
            self.nbytes = max(self.nbytes, self.alive())
        return out

    def alive(self) -> int:
        """Bytes of the storages that are still alive."""
        self._made = {key: entry for key, entry in self._made.items() if not entry[0].expired()}
        self._sum = sum(nbytes for _, nbytes in self._made.values())
        return self._sum


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested containers and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value):
        yield from tensors_in(vars(value))


def bytes_of(value: Any) -> int:
    """Bytes of the tensors in nested containers and dataclasses, shared storage counted once."""
    storages = (tensor.untyped_storage() for tensor in tensors_in(value))
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())
