"""The key figures of a pair, which the checks compare with their bounds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pipeline.diagnose.read import PairScores, TokenColumns
from pipeline.rounds.metrics import Float64
from pipeline.rounds.scored_block import Bool

#: Log-probs below which a token is next to impossible (1 in 22,000), and impossible (1 in 500 million); and how many
#: nats likelier it must then be for the student, which samples rare tokens too.
UNLIKELY, IMPOSSIBLE, LIKELIER = -10.0, -20.0, 3.0
#: The early part of a response; its fraction of the reverse KL is reported.
EARLY = 0.3
#: First tokens of a response: what a model says next after the prompt alone.
FIRST_TOKENS = 3
#: Reverse KL (nats) of a token at which student and teacher clearly prefer different things.
WIDE = 1.0


@dataclass(frozen=True)
class Figures:
    """Means over the scored tokens, nats; None if the scores do not determine them.

    Attributes:
        scored_share: fraction of the student's own tokens that are scored: the teacher may lack some, for instance
            those in no span that both tokenizers share.
        reverse_kl: and of the FIRST_TOKENS of a response (the stop token aside), of its first, second and last third.
        wide: fraction of tokens with a reverse KL above WIDE.
        early_share: fraction of all the reverse KL that lies in the first EARLY of the responses' positions.
        half_in: the smallest fraction of the tokens that holds half of the reverse KL.
        shared: probability that the teacher gives to the student's candidates together, its mean and its median over
            positions; student_shared: the student's own mean.
        overlap: fraction of the student's likeliest candidates that are among as many of the teacher's.
        agreement: fraction of positions at which both give the same candidate the highest log-prob.
        stop_logprob: median log-prob of the student's stop tokens under the teacher.
        unlikely, impossible: fraction of tokens below UNLIKELY, IMPOSSIBLE for the teacher, and not for the student.
    """

    tokens: int
    scored_share: float
    reverse_kl: float
    reverse_kl_first_tokens: float
    reverse_kl_thirds: tuple[float | None, float | None, float | None]
    wide: float
    early_share: float | None
    half_in: float | None
    shared: float | None
    shared_median: float | None
    student_shared: float
    overlap: float | None
    agreement: float | None
    logprob: float
    student_logprob: float
    entropy: float | None
    student_entropy: float
    stop_logprob: float | None
    unlikely: float
    impossible: float

    @classmethod
    def of(cls, pair: PairScores) -> Figures:
        tokens = pair.tokens
        kl, place = tokens.reverse_kl, tokens.position / tokens.length
        total = float(kl.sum())
        ordered = np.sort(kl)[::-1]
        half = int(np.searchsorted(np.cumsum(ordered), total / 2)) + 1
        thirds = [mean(kl[(place >= low / 3) & (place < (low + 1) / 3)]) for low in range(3)]
        stops = tokens.logprob[tokens.stop]
        return cls(
            tokens=len(kl),
            scored_share=pair.scored_share,
            reverse_kl=float(kl.mean()),
            reverse_kl_first_tokens=mean(kl[(tokens.position < FIRST_TOKENS) & ~tokens.stop]) or 0.0,
            reverse_kl_thirds=(thirds[0], thirds[1], thirds[2]),
            wide=float((kl > WIDE).mean()),
            early_share=float(kl[place < EARLY].sum()) / total if total > 0 else None,
            half_in=half / len(kl) if total > 0 else None,
            shared=mean(tokens.shared),
            shared_median=None if np.isnan(tokens.shared).all() else float(np.nanmedian(tokens.shared)),
            student_shared=float(tokens.student_shared.mean()),
            overlap=mean(tokens.overlap),
            agreement=mean(tokens.agrees),
            logprob=float(tokens.logprob.mean()),
            student_logprob=float(tokens.student_logprob.mean()),
            entropy=mean(tokens.entropy),
            student_entropy=float(tokens.student_entropy.mean()),
            stop_logprob=float(np.median(stops)) if len(stops) else None,
            unlikely=float(below(tokens, UNLIKELY).mean()),
            impossible=float(below(tokens, IMPOSSIBLE).mean()),
        )


def below(tokens: TokenColumns, bound: float) -> Bool:
    """[T]: tokens with a log-prob below `bound` under the teacher, and not under the student."""
    return np.asarray((tokens.logprob < bound) & (tokens.logprob < tokens.student_logprob - LIKELIER))


def mean(values: Float64) -> float | None:
    """Mean of the values that are not NaN; None if there are none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


def percent(fraction: float | None) -> str:
    """A fraction as text, never rounded to 0 % or 100 %."""
    if fraction is None or math.isnan(fraction):
        return "-"
    if 0 < fraction < 1e-4:
        return "<0.01%"
    if 0.9999 < fraction < 1:
        return ">99.99%"
    return f"{fraction:.2%}" if 0 < fraction < 0.1 or 0.99 < fraction < 1 else f"{fraction:.0%}"


def probability(logprob: float) -> str:
    """A log-prob as text: nats, and the chance."""
    chance = f"1 in {math.exp(-logprob):,.0f}" if -30 < logprob < -2 else percent(math.exp(logprob))
    return f"{logprob:.1f} nats ({chance})" if logprob > -30 else f"{logprob:.1f} nats"
