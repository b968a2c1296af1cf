"""The checks of the rollouts, whatever the teacher: cut, empty, repeated, or not the student's own samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np

import cache_schema as cs
from pipeline.diagnose.checks import FEW_TOKENS, CheckResult, Severity
from pipeline.diagnose.figures import percent
from pipeline.diagnose.read import LOOP_TURNS, RoundSample
from pipeline.rounds.metrics import SamplerGap

#: Responses below which nothing is concluded about them.
FEW_RESPONSES = 10
#: Fraction of responses cut at the length limit that is worth knowing, and that does harm.
SOME_CUT, MANY_CUT = 0.05, 0.25
#: Fraction of responses that end in a loop, or that are only a stop token.
LOOPS, EMPTY = 0.02, 0.1
#: Pairs of equal responses beyond those that the student's own probabilities explain.
REPEATS = 0.1
#: Temperatures below which too little of the student's support is sampled (0.3 was measured to make importance
#: sampling worse than no training; 0.8 is in use).
COLD = 0.6
#: Standard deviations, and fraction of the entropy, by which the sum of log-prob + entropy may miss 0. The sum has
#: heavy tails (one token of 1 in a million), hence so many.
NOT_OWN_SIGMA, NOT_OWN_FRACTION = 6.0, 0.15


def check_rollouts(sample: RoundSample) -> list[CheckResult]:
    """All that is wrong with the rollouts of a round."""
    checks: list[Callable[[RoundSample], CheckResult | None]] = [_tempered, _nucleus]
    if len(sample.responses.length) >= FEW_RESPONSES:
        checks += [_cut, _loops, _empty, _repeats]
    if sample.responses.length.sum() >= FEW_TOKENS:
        checks += [_sampler, _not_own]
    results = [check(sample) for check in checks]
    return [result for result in results if result is not None]


def distinct_fraction(sample: RoundSample) -> float:
    """The fraction of different responses; those of different prompts count as different."""
    pairs = set(zip(sample.responses.prompt.tolist(), sample.responses.response.tolist(), strict=True))
    return len(pairs) / len(sample.responses.prompt)


def _cut(sample: RoundSample) -> CheckResult | None:
    responses, limit = sample.responses, sample.round.manifest.max_response_tokens
    cut = float((responses.finish == cs.FINISH_LENGTH).mean())
    if cut < SOME_CUT:
        return None
    return CheckResult(
        "truncated",
        "harms" if cut >= MANY_CUT else "note",
        "Responses are cut before they end: the rest of them, and how they end, is never corrected.",
        (
            f"{percent(cut)} of {len(responses.finish):,} responses were cut at rollouts.max_response_tokens = "
            f"{limit}; mean length {responses.length.mean():.0f} tokens",
        ),
        "raise rollouts.max_response_tokens (see `redpen plan` for the cost); to keep these rollouts but leave such "
        "responses out, select.truncated = false",
        cut,
    )


def _loops(sample: RoundSample) -> CheckResult | None:
    loops = float(sample.responses.loops.mean())
    if loops < LOOPS:
        return None
    return CheckResult(
        "loops",
        "harms",
        "Responses end in a loop of the same few tokens.",
        (f"{percent(loops)} of the responses were cut in a loop of {LOOP_TURNS} repeats or more",),
        "select.truncated = false leaves them out; check prompts.template and rollouts.stop_token_ids, since a "
        "student that does not stop often gets a template that it was not trained with",
        loops,
    )


def _empty(sample: RoundSample) -> CheckResult | None:
    responses = sample.responses
    empty = float(((responses.length == 1) & (responses.finish == cs.FINISH_STOP)).mean())
    if empty < EMPTY:
        return None
    return CheckResult(
        "empty",
        "harms",
        "Responses are often empty: the stop token alone.",
        (f"{percent(empty)} of the responses are empty",),
        "check prompts.template and prompts.template_args: the prompt may end in the wrong place",
        empty,
    )


def _repeats(sample: RoundSample) -> CheckResult | None:
    """Equal responses to a prompt, against what chance gives: another sample equals response y with probability
    p(y), so of a prompt's R responses sum_i (R - 1) p(y_i) ordered pairs are expected to be equal.
    """
    manifest, responses = sample.round.manifest, sample.responses
    _, per_prompt = np.unique(responses.prompt, return_inverse=True)
    others = np.bincount(per_prompt)[per_prompt] - 1
    if manifest.temperature > 0 and (not others.any() or manifest.top_p < 1):  # p(y) of a nucleus is not known
        return None
    counts = Counter(zip(responses.prompt.tolist(), responses.response.tolist(), strict=True))
    n_pairs = max(int(others.sum()), 1)
    equal = sum(count * (count - 1) for count in counts.values()) / n_pairs
    expected = float((others * np.exp(responses.logprob)).sum()) / n_pairs
    if manifest.temperature > 0 and equal < expected + REPEATS:
        return None
    evidence = []
    if others.any():
        evidence.append(
            f"{len(counts):,} of {len(responses.prompt):,} responses are different, {manifest.rollouts_per_prompt} "
            f"were sampled of each prompt; {percent(equal)} of the pairs are equal, where sampling at temperature "
            f"{manifest.temperature or 1:g} would give {percent(expected)}"
        )
    if manifest.temperature == 0:
        evidence.insert(0, "rollouts.temperature = 0: every response is the student's likeliest")
    return CheckResult(
        "deterministic",
        "harms",
        "The rollouts are not samples: responses repeat, so only the student's likeliest tokens are corrected.",
        tuple(evidence),
        "sample again with rollouts.temperature = 1"
        + ("" if manifest.temperature == 0 else " and a different seed for each rollout"),
        1.0 if manifest.temperature == 0 else equal - expected,
    )


def _tempered(sample: RoundSample) -> CheckResult | None:
    temperature = sample.round.manifest.temperature
    if temperature in (0, 1):
        return None
    severity: Severity = "harms" if temperature < COLD else "note"
    return CheckResult(
        "temperature",
        severity,
        "The rollouts are not sampled from the student itself but from a "
        + ("sharper" if temperature < 1 else "flatter")
        + " version of it.",
        (f"rollouts.temperature = {temperature:g}",),
        "1 is recommended: tempered rollouts miss part of the student's distribution"
        + ('; with train.loss = "importance_sampling" the on-policy reverse KL may rise' if temperature < 1 else ""),
        0.0,
    )


def _nucleus(sample: RoundSample) -> CheckResult | None:
    top_p = sample.round.manifest.top_p
    if top_p == 1:
        return None
    return CheckResult(
        "top-p",
        "note",
        "Tokens outside the nucleus are never sampled, so never corrected.",
        (f"rollouts.top_p = {top_p:g}",),
        "rollouts.top_p = 1 is recommended, and needed for importance sampling",
        1 - top_p,
    )


def _sampler(sample: RoundSample) -> CheckResult | None:
    manifest = sample.round.manifest
    gap = SamplerGap.of(sample.log_ratio)
    if gap is None or not gap.is_wide or manifest.temperature == 0 or manifest.top_p < 1:
        return None
    return CheckResult(
        "sampler",
        "harms",
        "Sampler and training forward give the sampled tokens different probabilities.",
        (f"ratio trainer / sampler: {gap}; it should be 1, up to the rounding of half precision",),
        "compare dtype, quantisation, adapter and attention of both (rollouts.engine, student.dtype, "
        'student.quantisation); train.loss = "reverse_kl" suffers less than importance sampling',
        min(1.0, gap.outside),
    )


def _not_own(sample: RoundSample) -> CheckResult | None:
    """Sampled from the student, log-prob + entropy is 0 on average: a martingale with a known variance."""
    manifest, responses = sample.round.manifest, sample.responses
    if manifest.temperature != 1 or manifest.top_p < 1:
        return None
    surprise, spread = float(responses.surprise.sum()), float(responses.spread.sum())
    entropy = float(responses.entropy.sum())
    if abs(surprise) <= max(NOT_OWN_SIGMA * spread**0.5, NOT_OWN_FRACTION * entropy):
        return None
    likelier = surprise > 0
    return CheckResult(
        "not-own",
        "harms",
        "The rollouts are not samples of this student: they are "
        + ("likelier than what it samples." if likelier else "less likely than what it samples."),
        (
            f"log-prob + entropy is {surprise / entropy:+.0%} of the entropy, where the student's own samples give "
            f"0: {abs(surprise) / max(spread, 1e-12) ** 0.5:.0f} standard deviations off",
        ),
        "were they sampled at a lower temperature than the cache records?"
        if likelier
        else "were they written by another model, or by this one before it was trained? Sample a new round: run "
        "`redpen rollouts RECIPE`",
        min(1.0, abs(surprise) / max(entropy, 1e-12)),
    )
