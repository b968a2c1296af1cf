"""Right or wrong answers, legal or illegal responses, and confidence intervals. Loads no torch.

Shapes: P prompts, S samples of each.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import regex

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
# A word, with its accents and signs as in C++, or a number with its sign; of scripts without spaces a letter.
_SPACELESS = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_WORD = regex.compile(
    rf"""
    [{_SPACELESS}]\p{{M}}*
    | (?:(?<![\p{{L}}\p{{N}}\p{{M}}_)])-(?=\d))?
      [[\p{{L}}\p{{N}}\p{{M}}_]--[{_SPACELESS}]]+
      (?:(?<=\d)[.,](?=\d)[[\p{{L}}\p{{N}}\p{{M}}_]--[{_SPACELESS}]]+)*
      (?:(?<=\p{{L}})[+\#]+(?![\p{{L}}\p{{N}}]))?
    | [\p{{S}}%]
    """,
    regex.VERBOSE | regex.V1,
)
_THOUSANDS = re.compile(r"-?\d{1,3}(,\d{3})+(\.\d+)?")
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
            and as mathematics by math-verify. "contains": the wanted words follow one another in the answer; see
            `words`.
        pattern: its one group in its last match is the answer. Without it: the whole response ("exact"), all after
            </think> ("contains"), its last number ("number"), or what math-verify finds ("math").
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
        if self.match == "contains":
            said = response.rpartition(END_OF_REASONING)[2].strip()
            return None if said.startswith("<think>") else said
        return judge().answer(response) if self.match == "math" else response.strip()

    def is_right(self, response: str, accepted: str | Sequence[str]) -> bool:
        """Whether the response's answer is one of those that are accepted."""
        wanted = [accepted] if isinstance(accepted, str) else accepted
        return any(self._is_right(response, answer) for answer in wanted)

    def _is_right(self, response: str, wanted: str) -> bool:
        finds_itself = self.match == "math" and self.pattern is None
        given, wanted = response.strip() if finds_itself else self.answer(response), wanted.strip()
        if given is None or given == wanted or self.match == "exact":
            return given == wanted
        if self.match == "contains":
            return _contains(words(given), words(wanted))
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


def answers_of(record: Mapping[str, Any]) -> list[str] | None:
    """The answers that a prompt's record accepts; None if it has none."""
    answer = record.get("answer")
    if answer is None:
        return None
    return [str(each) for each in answer] if isinstance(answer, list) else [str(answer)]


def words(text: str) -> list[str]:
    """The words of a text, for comparisons: Unicode's compatibility form (NFKC), case folded, without punctuation.

    Signs such as + or % are words, a number keeps its sign and its decimals but no commas between thousands, and each
    letter of a script that is written without spaces is a word.

        words("The peak is 8,849 m (Everest).") == ["the", "peak", "is", "8849", "m", "everest"]
    """
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).replace("\u2212", "-")
    return [w.replace(",", "") if _THOUSANDS.fullmatch(w) else w for w in _WORD.findall(text)]


def _contains(said: list[str], wanted: list[str]) -> bool:
    return bool(wanted) and any(said[i : i + len(wanted)] == wanted for i in range(len(said) - len(wanted) + 1))


def none_right(texts: Sequence[str], accepted: Sequence[list[str]], checker: Checker) -> str | None:
    """If no response is right, one line that says so, with an example and what to change; otherwise None."""
    if not texts or any(checker.is_right(text, answers) for text, answers in zip(texts, accepted, strict=True)):
        return None
    said = [checker.answer(text) for text in texts]
    inside = [i for i, text in enumerate(texts) if Checker("contains").is_right(text, accepted[i])]
    shown = inside[0] if inside else next((i for i, answer in enumerate(said) if answer), 0)
    got = texts[shown] if said[shown] is None else said[shown]
    setting = f'eval.match = "{checker.match}"'
    if checker.pattern is not None:
        setting += f" and eval.answer_pattern = {checker.pattern!r}"
    if inside and checker.match != "contains":
        remedy = f'{len(inside)} of them contain it: set eval.match = "contains"'
        remedy += "" if checker.pattern is None else ", or correct the pattern"
    elif not any(said):
        remedy = "an answer is found in none of them: correct eval.answer_pattern or eval.match"
    else:
        remedy = (
            "if that is right, correct eval.match or eval.answer_pattern; if not, the prompts are too hard for it"
        )
    return (
        f"none of {len(texts)} responses is right by {setting}, e.g. expected {_quoted(' or '.join(accepted[shown]))}"
        f", got {'no answer in ' if said[shown] is None else ''}{_quoted(got or '')}; {remedy}"
    )


def _quoted(text: str) -> str:
    text = text.strip()
    return f'"{text if len(text) <= 120 else f"{text[:80]} ... {text[-35:]}"}"'


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
