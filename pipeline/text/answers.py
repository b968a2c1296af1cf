"""Right or wrong answers, legal or illegal responses, and confidence intervals. numpy only.

Shapes: P prompts, S samples of each.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.text.math_verify import boxed, judge

if TYPE_CHECKING:
    from pipeline.config import EvalConfig

Floats = npt.NDArray[np.floating]

#: Standard normal quantile of a 95 % interval.
Z95 = 1.959963984540054

_NUMBER = re.compile(
    r"""
    (?<![\w.])((?<![\w)]\s)[-+\u2212]\s?|[-+\u2212]?)   # a sign, unless it is a difference: 5 - 3
    (?:\\?[$\u20ac\u00a3])?
    (                                      # 1,234.5 or 1234.5 or .5
        (?:\d{1,3}(?:,\d{3})+(?!,?\d)|\d+)(?:\.\d+)?
        |\.\d+
    )
    (?:[eE]([-+]?\d{1,4}))?                # no longer: 1e999999999 has a thousand million digits
    (?:\s?/\s?(\d+))?
    (\s?\\?%)?
    (?!\w)
    """,
    re.VERBOSE,
)
_FENCE = re.compile(r"```[\w-]*\n(.*?)\n?```", re.DOTALL)
#: Ends the visible reasoning of some models.
END_OF_REASONING = "</think>"


@dataclass(frozen=True)
class Estimate:
    """A measured value and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Checker:
    """What `[eval]` calls an answer, a right one and a legal response.

        checker = Checker.of(recipe.eval)
        checker.is_right("so it is 1,000.0", "1000")

    Attributes:
        match: how an answer is compared with the wanted one; equal texts are always equal. "number": as
            rational numbers, 1,000 = 1000.0 = 1e3 and 3/4 = 75 %, currency signs are ignored. "math": so too,
            and as mathematics by math-verify.
        pattern: its one group in its last match is the answer. Without it: the whole response ("exact"), its last
            number ("number"), or what math-verify finds ("math").
        format: when a response is legal. "json": it is one JSON value, a code fence around it aside; "answer": it
            holds an answer; anything else: a regular expression that must match all of it. Reasoning up to
            </think> and spaces at either end are ignored. None: always.
    """

    match: str = "exact"
    pattern: str | None = None
    format: str | None = None

    @classmethod
    def of(cls, settings: EvalConfig) -> Checker:
        """Raises `ConfigError` if math-verify is needed and missing."""
        if settings.match == "math":
            judge().require()
        return cls(settings.match, settings.answer_pattern, settings.format)

    def answer(self, response: str) -> str | None:
        """What the response gives as its answer, stripped; None if it gives none."""
        if self.pattern is not None:
            *_, found = None, *re.finditer(self.pattern, response)
            return None if found is None or found[1] is None else found[1].strip()
        if self.match == "number":
            *_, last = None, *_NUMBER.finditer(response)
            return None if last is None else last[0].strip()
        return judge().answer(response) if self.match == "math" else response.strip()

    def is_right(self, response: str, wanted: str) -> bool:
        """Whether the response's answer equals `wanted`, by `match`."""
        finds_itself = self.match == "math" and self.pattern is None
        given, wanted = response.strip() if finds_itself else self.answer(response), wanted.strip()
        if given is None or given == wanted or self.match == "exact":
            return given == wanted
        numbers = as_number(given), as_number(wanted)
        if None not in numbers and numbers[0] == numbers[1]:
            return True
        return self.match == "math" and judge().is_right(given if finds_itself else boxed(given), wanted)

    def is_legal(self, response: str) -> bool:
        """Whether the response has the wanted form."""
        said = response.rpartition(END_OF_REASONING)[2].strip()
        if self.format is None:
            return True
        if self.format == "json":
            fenced = _FENCE.fullmatch(said)
            return _is_json(fenced[1] if fenced else said)
        if self.format == "answer":
            return bool(self.answer(said))
        return re.fullmatch(self.format, said) is not None


def as_number(text: str) -> Fraction | None:
    """The number that the whole text is, exactly; None if it is not a number. A full stop may end it."""
    found = _NUMBER.fullmatch(text.strip().removesuffix("."))
    if found is None:
        return None
    sign, digits, exponent, divisor, percent = found.groups()
    try:  # Python converts at most 4,300 digits
        value = Fraction(digits.replace(",", "")) * Fraction(10) ** int(exponent or 0) / int(divisor or 1)
    except (ValueError, ZeroDivisionError):
        return None
    return (-value if sign in ("-", "\u2212") else value) / (100 if percent else 1)


def fraction_right(right_PS: npt.NDArray[np.bool_]) -> Estimate:
    """The fraction of right responses; samples of one prompt, which are right or wrong together, count for fewer."""
    return _estimate(right_PS.mean(1), right_PS.shape[1])


def pass_at(k: int, right_PS: npt.NDArray[np.bool_]) -> Estimate:
    """pass@k: how likely at least one of k samples of a prompt is right, the mean over prompts of the unbiased

        1 - C(S - c, k) / C(S, k),    c of S samples right

    of Chen et al. (arXiv 2107.03374, eq. 1), with the interval of `fraction_right`.
    """
    n_samples = right_PS.shape[1]
    by_count = [1 - math.comb(n_samples - c, k) / math.comb(n_samples, k) for c in range(n_samples + 1)]
    return _estimate(np.array(by_count)[right_PS.sum(1)], n_samples / k)


def _estimate(values_P: Floats, trials: float) -> Estimate:
    """Mean over prompts of values in [0, 1] with Wilson's interval (Wilson 1927) over the effective number of trials.

    A prompt's `trials` succeed or fail together, so they count for fewer: with v the variance of the mean over
    prompts, p (1 - p) / v in all (Kish's design effect), at least P and at most P times `trials`. With one trial a
    prompt this is the plain Wilson interval.
    """
    n_prompts, p = len(values_P), float(values_P.mean())
    variance = float(values_P.var(ddof=1)) / n_prompts if n_prompts > 1 else np.inf
    independent = n_prompts * trials if 0 < p < 1 else n_prompts  # if all are equal, their dependence is unknown
    n = float(np.clip(p * (1 - p) / variance, n_prompts, independent)) if variance else float(independent)
    centre = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * np.sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2))
    return Estimate(p, float(np.clip(centre - half, 0.0, p)), float(np.clip(centre + half, p, 1.0)))


def _is_json(text: str) -> bool:
    def refuse(constant: str) -> Any:
        raise ValueError(constant)  # NaN and Infinity are Python's, not JSON's

    try:
        json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return False
    return True
