"""Logits that are not finite: found on values that are read back anyway, and said in one line."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.errors import ModelError
from pipeline.forward.head import unwrapped

_CAUSES = {
    torch.float16: "its values overflow float16, which most models are not made for, or its weights are damaged; use "
    'dtype = "bfloat16" or "float32"',
    torch.bfloat16: "its weights are damaged, or its values overflow; download it again, and compare with "
    'dtype = "float32"',
}


def set_name(model: nn.Module, name: str) -> None:
    """Let messages about a model's values name it as the recipe does."""
    unwrapped(model).redpen_name = name


def name_of(model: nn.Module) -> str:
    """How a message names a loaded model."""
    base: Any = unwrapped(model)
    return str(getattr(base, "redpen_name", None) or base.config.name_or_path or type(base).__name__)


def not_finite(model: nn.Module, doing: str) -> ModelError:
    """The error for logits that are NaN or infinite."""
    dtype = unwrapped(model).dtype
    cause = _CAUSES.get(dtype, "its weights are damaged; download or train it again")
    return not_finite_by(name_of(model), str(dtype).removeprefix("torch."), doing, cause)


def not_finite_by(name: str, dtype: str, doing: str, cause: str) -> ModelError:
    """The same for a model that is not in this process."""
    return ModelError(f"{name} in {dtype}: its logits are not finite while {doing}; most likely {cause}")


def check_scores(scores: dict[str, Any], model: nn.Module, doing: str = "scoring") -> None:
    """Refuse scores (arrays by name) made of logits that are not finite: a single one makes its whole row NaN."""
    for value in scores.values():
        if value is not None and np.issubdtype(value.dtype, np.floating) and np.isnan(value).any():
            raise not_finite(model, doing)
