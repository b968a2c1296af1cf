"""Numbers and text in the form that a page holds them: thousandths of a nat in 16 bits, arrays in base64."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import numpy.typing as npt

UInt16 = npt.NDArray[np.uint16]

#: The most nats that a value can be; it stands for everything above.
MOST = 65.534
#: In the place of a value that is not known.
NOT_TOLD = 65_535
#: Characters of base64 for a byte.
TEXT_BYTES = 4 / 3


def nats(values: npt.ArrayLike) -> UInt16:
    """Thousandths of a nat: 1.234 is 1234; at most 65,534, which stands for more; 65,535 where it is NaN."""
    exact = np.asarray(values, np.float64)
    whole = np.round(1000 * np.clip(np.nan_to_num(exact, nan=0.0, posinf=MOST), 0.0, MOST))
    return np.where(np.isnan(exact), NOT_TOLD, whole).astype(np.uint16)


def packed(array: npt.NDArray[Any]) -> str:
    """The array's bytes, little-endian, in base64."""
    return base64.b64encode(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"))).tobytes()).decode()


def clean(text: str) -> str:
    """Text that every encoder takes: half of a surrogate pair becomes a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")


def as_text(value: Any) -> str | None:
    """A field of a prompt's record, whatever it holds; None where it is not there."""
    return None if value is None else clean(value if isinstance(value, str) else str(value))
