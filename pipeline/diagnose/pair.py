"""What a teacher's reading says of the pair.

The bounds lie between what healthy pairs and planted faults measure, far from both: on the toy (259 tokens) and on
random models of 4,096 and of 151,936 tokens, as tests/test_diagnose.py plants them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

import numpy as np

from pipeline.config import TrainConfig
from pipeline.diagnose import Finding
from pipeline.diagnose.compatibility import other_prompt, other_tokens
from pipeline.diagnose.context import SAME_TOKENS, Case
from pipeline.diagnose.figures import UNLIKELY, Figures, below, percent, probability
from pipeline.diagnose.reading import Pair
from pipeline.diagnose.token_names import Words

#: Median log-prob of the student's stop tokens: below 1 in 1,000 the teacher does not stop there.
NO_STOP = math.log(1e-3)
#: Share of the tokens that the teacher finds unlikely. Healthy pairs have a few in a thousand.
MANY_UNLIKELY = 0.02
#: A token that the teacher never writes: seen so often, unlikely so often; worth a finding from this share of the KL.
NEVER_SEEN, NEVER_SHARE, NEVER_KL = 5, 0.9, 0.05
#: Share of the tokens with a reverse KL above WIDE from which the models simply want different things.
FAR = 0.25
#: Share of positions at which the teacher leaves the student's candidates; and of the student's own probability that
#: they should hold.
MANY_OUTSIDE, COVERED = 0.02, 0.9
#: A teacher is less sure than its student from so many times its entropy, and so many nats more.
LESS_SURE, LESS_SURE_NATS = 2.0, 0.1


def findings(pair: Pair, figures: Figures, words: Words) -> list[Finding]:
    """All that is wrong with a pair; only the first that blocks it, since the others would repeat it."""
    case = Case(pair, figures, words)
    fundamental = other_tokens(case) or other_prompt(case)
    if fundamental is not None and fundamental.severity == "blocks":
        return [fundamental]
    found = [_stop(case), *_never(case), _far(case), _nothing(case), _outside(case)]
    found += [_few_candidates(case), _less_sure(case)]
    return [finding for finding in (fundamental, *found) if finding is not None]


# ------------------------------------------------------------------------------------------------------ single tokens


def _stop(case: Case) -> Finding | None:
    """Stop tokens that the teacher would not write where the student does."""
    reading, figures = case.pair.reading, case.figures
    if figures.stop_logprob is None or figures.stop_logprob > NO_STOP:
        return None
    rest = reading.logprob[~reading.stop]
    if not len(rest) or np.median(rest) < NO_STOP:
        return None  # nothing special about stopping
    used = sorted({int(token) for token in reading.token[reading.stop]})
    own = case.words.own_stop(case.pair)
    share = case.share_of_kl(reading.stop)
    evidence = [
        f"the student ends with {', '.join(map(case.words, used[:3]))}: median log-prob "
        f"{figures.stop_logprob:.1f} for the teacher, {np.median(rest):.2f} for all other tokens",
        f"{percent(float(reading.stop.mean()))} of the tokens are these, and {percent(share)} of the reverse KL",
        f"there the teacher prefers {case.preferred(reading.stop)}",
    ]
    if own is not None and own not in used:
        evidence.append(f"the teacher's own tokenizer ends with {case.words(own)}")
    return case.finding(
        "eos",
        "harms",
        "The teacher does not stop where the student stops: it was taught another end.",
        evidence,
        "leave the stop token out of the loss with select.eos = false; or let both end alike: "
        "rollouts.stop_token_ids, or a teacher of the same kind (base or instruct) as the student",
        share,
    )


def _never(case: Case) -> Iterator[Finding]:
    """Tokens that the teacher never writes, and a large share of unlikely ones."""
    reading = case.pair.reading
    unlikely = below(reading, UNLIKELY) & ~reading.stop
    ids, which = np.unique(reading.token, return_inverse=True)
    seen, bad = np.bincount(which), np.bincount(which, weights=unlikely)
    never = (seen >= NEVER_SEEN) & (bad >= NEVER_SHARE * seen)
    of_never = never[which] & ~reading.stop
    if (share := case.share_of_kl(of_never)) >= NEVER_KL:
        chosen = [int(ids[i]) for i in np.argsort(-bad * never)[: min(5, int(never.sum()))]]
        special = [token for token in chosen if case.words.is_special(token)]
        yield case.finding(
            "impossible",
            "harms",
            "The student writes tokens that the teacher never would.",
            [
                f"{', '.join(map(case.words, chosen))}: {percent(float(of_never.mean()))} of the tokens and "
                f"{percent(share)} of the reverse KL, nearly always less likely than 1 in "
                f"{math.exp(-UNLIKELY):,.0f} for the teacher",
                f"in their place the teacher prefers {case.preferred(of_never)}",
            ],
            "leave special tokens out of the loss with select.special_tokens = false"
            if special
            else "bring both to the same format first: prompts.system, prompts.template_args, or a little SFT of the "
            "student on the teacher's responses",
            share,
        )
        unlikely &= ~of_never
    if float(unlikely.mean()) >= MANY_UNLIKELY:
        worst = Counter(reading.token[unlikely].tolist()).most_common(5)
        shown = ", ".join(f"{case.words(token)} ({count:,} times)" for token, count in worst)
        yield case.finding(
            "unlikely",
            "harms",
            "Too much of what the student writes is next to impossible for the teacher.",
            [
                f"{percent(float(unlikely.mean()))} of the tokens are less likely than {probability(UNLIKELY)}, with "
                f"{percent(case.share_of_kl(unlikely))} of the reverse KL; most often {shown}",
                f"there the teacher prefers {case.preferred(unlikely)}",
            ],
            "begin with a little SFT of the student on the teacher's responses, or with easier prompts "
            "(off-policy cold start and prompt selection, arXiv 2604.13016); score.teacher_topk = 8 lets the loss "
            "see what the teacher prefers",
            case.share_of_kl(unlikely),
        )


# --------------------------------------------------------------------------------------------------------- the whole


def _far(case: Case) -> Finding | None:
    figures = case.figures
    if figures.wide < FAR:
        return None
    return case.finding(
        "far",
        "harms",
        "Student and teacher want different things at too many tokens.",
        [
            f"reverse KL is above 1 nat at {percent(figures.wide)} of the tokens, and {figures.reverse_kl:.2f} on "
            "average; useful corrections are few and far between"
        ],
        "choose a teacher nearer to the student (its own family, its own kind of reasoning), or begin with SFT on "
        "the teacher's responses (arXiv 2604.13016: compatible thinking patterns, off-policy cold start)",
        figures.wide,
    )


def _nothing(case: Case) -> Finding | None:
    figures, stop = case.figures, TrainConfig().stop_reverse_kl
    if figures.reverse_kl >= stop:
        return None
    return case.finding(
        "nothing-to-learn",
        "harms",
        "There is next to nothing to learn: on these responses the student already thinks as the teacher does.",
        [
            f"reverse KL {figures.reverse_kl:.2g} nats a token; training ends below train.stop_reverse_kl = {stop:g}",
        ],
        "if an earlier round brought it there, it is done; otherwise harder prompts, longer responses "
        "(rollouts.max_response_tokens), or a better teacher",
        0.0,
    )


def _outside(case: Case) -> Finding | None:
    reading = case.pair.reading
    outside = (reading.share < SAME_TOKENS * reading.student_share) & ~reading.stop  # of these `_stop` tells
    if case.pair.scored.topk or float(outside.mean()) < MANY_OUTSIDE:
        return None
    return case.finding(
        "outside",
        "note",
        "At some tokens the teacher's choice is none of the student's candidates, so the loss cannot see what it is.",
        [
            f"at {percent(float(outside.mean()))} of the positions, with {percent(case.share_of_kl(outside))} of the "
            f"reverse KL, the teacher gives the {case.pair.scored.candidates} candidates less than half of what the "
            "student gives them"
        ],
        "store the teacher's own likeliest: score.teacher_topk = 8, and score again",
        case.share_of_kl(outside),
    )


def _few_candidates(case: Case) -> Finding | None:
    covered = case.figures.student_shared
    if case.figures.shared is None or case.pair.scored.candidate_kind != "topk" or covered >= COVERED:
        return None
    return case.finding(
        "few-candidates",
        "note",
        "The candidates hold too little of what the student would say: reverse KL is measured too low.",
        [f"{percent(covered)} of the student's probability is on its {case.pair.scored.candidates} candidates"],
        f"score.candidates = {2 * case.pair.scored.candidates} or more, and score again",
        1 - covered,
    )


def _less_sure(case: Case) -> Finding | None:
    teacher, student = case.figures.entropy, case.figures.student_entropy
    if teacher is None or teacher < LESS_SURE * student or teacher < student + LESS_SURE_NATS:
        return None
    return case.finding(
        "less-sure",
        "note",
        "The teacher is less sure of these tokens than the student: is it the better one here?",
        [f"entropy {teacher:.2f} nats for the teacher, {student:.2f} for the student"],
        "compare their accuracy on prompts with answers (redpen eval MODEL --prompts FILE) before training; a cache "
        "knows nothing of right and wrong",
        0.0,
    )
