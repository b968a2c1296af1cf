"""The checks of a pair of student and teacher: whether they can work together, and what to set if not.

The bounds lie between what healthy pairs and planted faults measure, far from both: on the toy (259 tokens) and on
random models of 4,096 and of 151,936 tokens, as tests/test_diagnose.py plants them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from pipeline.config import TrainConfig
from pipeline.diagnose.figures import FIRST_TOKENS, UNLIKELY, Figures, below, percent, probability
from pipeline.diagnose.read import PairScores
from pipeline.diagnose.token_names import TokenNames
from pipeline.models.identity import other_prompt

#: blocks: the pair cannot work; harms: it learns less or something else; note: worth knowing.
Severity = Literal["blocks", "harms", "note"]
_WORST_FIRST: tuple[Severity, ...] = ("blocks", "harms", "note")

#: Scored tokens below which nothing is concluded, and below which only what blocks a pair is: other findings would
#: rest on a handful of tokens.
FEW_TOKENS, ENOUGH_TOKENS = 100, 500
#: Of the probability that the student gives to its own candidates, what the teacher gives to them at the median
#: position: below it, the teacher mostly considers other tokens. Pairs that succeed come to share 97 % and more
#: (arXiv 2604.13016).
SAME_TOKENS = 0.5
#: Agreement on the likeliest candidate, from 0 (chance) to 1; below this the models do not agree.
CHANCE_AGREEMENT = 0.2
#: Mean log-prob of the student's tokens in units of a uniform guess's. Untrained weights give 1 to 1.2, a model that
#: is sure of other tokens 1.3 and more.
LESS_THAN_CHANCE = 1.3
#: Entropy in units of the largest possible from which a model is no better than random.
FLAT = 0.7
#: Reverse KL (nats) of the first tokens from which the teacher had another prompt: two good models that would begin
#: differently are below 1. And of all tokens, from which the rest is lost too.
OTHER_PROMPT, LOST = 2.0, 1.0
#: Median log-prob of the student's stop tokens: below 1 in 1,000 the teacher does not stop there.
NO_STOP = math.log(1e-3)
#: Fraction of the tokens that the teacher finds unlikely. Healthy pairs have a few in a thousand.
MANY_UNLIKELY = 0.02
#: A token that the teacher never writes: seen so often, unlikely so often; a finding from this fraction of the KL.
NEVER_SEEN, NEVER_FRACTION, NEVER_KL = 5, 0.9, 0.05
#: Fraction of the tokens with a reverse KL above WIDE from which the student is simply far from the teacher.
FAR = 0.25
#: Fraction of positions at which the teacher prefers tokens outside the student's candidates; and of the student's
#: probability that these should hold.
MANY_OUTSIDE, COVERED = 0.02, 0.9
#: A teacher is less sure than its student from so many times its entropy, and so many nats more.
LESS_SURE, LESS_SURE_NATS = 2.0, 0.1
#: Per cent of the tokens.
_QUANTILES = (1, 5, 25, 50, 75, 95, 99)


@dataclass(frozen=True)
class CheckResult:
    """What a check found wrong with a pair, or with its rollouts.

    Attributes:
        key: of the check, for programs; a teacher has each key at most once.
        verdict: one sentence.
        evidence: numbers and tokens, a line each.
        remedy: what to set or do.
        explains: the fraction of the reverse KL, or of the rollouts, that it accounts for; orders results of one
            severity.
        teacher: its name; None for a check of the rollouts.
    """

    key: str
    severity: Severity
    verdict: str
    evidence: tuple[str, ...]
    remedy: str
    explains: float
    teacher: str | None = None


def worst_first(results: Iterable[CheckResult]) -> list[CheckResult]:
    """Sorted by severity, then by how much they explain."""
    return sorted(results, key=lambda result: (_WORST_FIRST.index(result.severity), -result.explains))


@dataclass(frozen=True)
class PairContext:
    """What the checks of a pair use: the scores, the key figures, and the names of tokens."""

    pair: PairScores
    figures: Figures
    names: TokenNames

    def result(
        self, key: str, severity: Severity, verdict: str, evidence: Sequence[str], remedy: str, explains: float
    ) -> CheckResult:
        return CheckResult(key, severity, verdict, tuple(evidence), remedy, explains, self.pair.teacher)

    @property
    def chance_logprob(self) -> float:
        """Log-prob of a uniform guess over the vocabulary."""
        return -math.log(self.pair.sampled.vocab_size)

    @property
    def agreement(self) -> float | None:
        """Agreement on the likeliest candidate: 0 by chance, 1 always (Cohen's kappa for K equal candidates)."""
        if self.figures.agreement is None:
            return None
        chance = 1 / self.pair.scored.candidates
        return (self.figures.agreement - chance) / (1 - chance)

    @property
    def same_tokens(self) -> bool:
        """Whether most of the teacher's probability is on the student's candidates."""
        if self.figures.shared_median is None:
            return self.figures.logprob > 0.5 * self.chance_logprob
        return self.figures.shared_median >= SAME_TOKENS * self.figures.student_shared

    def fraction_of_kl(self, chosen: npt.NDArray[np.bool_]) -> float:
        total = float(self.pair.tokens.reverse_kl.sum())
        return float(self.pair.tokens.reverse_kl[chosen].sum()) / total if total > 0 else 0.0

    def preferred(self, chosen: npt.NDArray[np.bool_]) -> str:
        """The tokens that the teacher most often prefers at these positions, as far as the scores show."""
        tokens = self.pair.tokens
        sure = chosen & tokens.is_preference
        if sure.sum() < 0.5 * chosen.sum():
            return "tokens that are not among the student's candidates (set score.teacher_topk to see them)"
        most = Counter(tokens.prefers[sure].tolist()).most_common(3)
        shown = ", ".join(f"{self.names(token)} ({percent(count / int(chosen.sum()))})" for token, count in most)
        return f"{shown} of the time"


def check_pair(pair: PairScores, figures: Figures, names: TokenNames) -> list[CheckResult]:
    """All that is wrong with a pair; only the first that blocks it, since the others would repeat it."""
    context = PairContext(pair, figures, names)
    if figures.tokens < FEW_TOKENS:
        return [_few_tokens(context)]
    fundamental = _other_tokens(context) or _other_prompt(context)
    if fundamental is not None and fundamental.severity == "blocks":
        return [fundamental]
    if figures.tokens < ENOUGH_TOKENS:
        return [_few_tokens(context)]
    found = [_stop(context), *_never(context), _far(context), _nothing(context), _outside(context)]
    found += [_few_candidates(context), _less_sure(context), _itself(context)]
    return [finding for finding in (fundamental, *found) if finding is not None]


def _itself(context: PairContext) -> CheckResult | None:
    """The same weights with another prompt: what that changes is all there is to learn."""
    tokens, scored, sampled = context.pair.tokens, context.pair.scored, context.pair.sampled
    weights = (sampled.student.digest, sampled.student.adapter_digest)
    read = other_prompt(scored, sampled)
    if read is None or (scored.model.digest, scored.model.adapter_digest) != weights:
        return None
    change = tokens.logprob - tokens.student_logprob
    at = ", ".join(
        f"{q:g} % {value:+.3f}" for q, value in zip(_QUANTILES, np.percentile(change, _QUANTILES), strict=True)
    )
    return context.result(
        "itself",
        "note",
        "The teacher is the student itself with another prompt, so it teaches what that prompt changes.",
        [
            f"it read {read}",
            f"log-prob of the student's tokens with this prompt, less that without it: mean {change.mean():+.4f} "
            f"nats; quantiles: {at}",
        ],
        "if it changes little, the model does not use what it is shown: look at a wrong response (`redpen inspect`), "
        "and ask the model with that prompt (`redpen chat`)",
        0.0,
    )


# ------------------------------------------------------------------------------------------------------ compatibility


def _other_tokens(context: PairContext) -> CheckResult | None:
    """The teacher's probability is elsewhere, and it ranks the student's candidates as chance would."""
    figures, pair = context.figures, context.pair
    units = figures.logprob / context.chance_logprob
    flat = figures.entropy is not None and figures.entropy > -FLAT * context.chance_logprob
    related = context.same_tokens or (context.agreement is not None and context.agreement >= CHANCE_AGREEMENT)
    if related and not flat:
        return None
    evidence = [
        f"the student's tokens have a mean log-prob of {figures.logprob:.1f} for the teacher; a uniform guess among "
        f"{pair.sampled.vocab_size:,} tokens gives {context.chance_logprob:.1f}"
    ]
    if figures.shared is not None:
        evidence.append(
            f"to the student's {pair.scored.candidates} candidates the teacher gives {percent(figures.shared)} of "
            f"its probability, the student {percent(figures.student_shared)}"
        )
    if figures.agreement is not None:
        evidence.append(
            f"both give the same candidate the highest log-prob at {percent(figures.agreement)} of the positions; "
            f"chance alone gives {percent(1 / pair.scored.candidates)}"
        )
    if figures.entropy is not None:
        evidence.append(f"its entropy is {figures.entropy:.2f} nats of {-context.chance_logprob:.2f} possible")
    if pair.scored.tokenizer.digest != pair.sampled.tokenizer.digest:
        evidence.append("the cache records different tokenizers for teacher and student")
    if units > LESS_THAN_CHANCE and not flat:
        return context.result(
            "vocabulary",
            "blocks",
            "Teacher and student use different token ids: the same id stands for another token.",
            evidence,
            "check that the rows of the teacher's weights are in the order of its tokenizer.json (were they resized, "
            "converted, or taken from a model with another tokenizer?). If they are, it was not trained on anything "
            "like these responses: choose another",
            1.0,
        )
    return context.result(
        "unrelated",
        "blocks",
        "The teacher does not know what the student writes: it is hardly better than a uniform guess.",
        evidence,
        "check teacher.model, teacher.revision and teacher.adapter (are these the trained weights?), or choose a "
        "teacher that was trained on this task and language; a teacher with other token ids looks the same",
        1.0,
    )


def _other_prompt(context: PairContext) -> CheckResult | None:
    """The same tokens, but the first ones, which follow from the prompt alone, are already unlikely."""
    figures, tokens = context.figures, context.pair.tokens
    if figures.reverse_kl_first_tokens < OTHER_PROMPT:
        return None
    first = (tokens.position < FIRST_TOKENS) & ~tokens.stop
    evidence = [
        f"reverse KL of the first {FIRST_TOKENS} tokens: {figures.reverse_kl_first_tokens:.2f} nats each, of all "
        f"tokens {figures.reverse_kl:.2f}",
    ]
    if figures.shared is not None:
        evidence.append(
            f"both prefer the same tokens: {percent(figures.shared)} of the teacher's probability is on the "
            "student's candidates"
        )
    if context.agreement is not None and context.agreement < CHANCE_AGREEMENT:
        evidence.append("but it ranks them as chance would, so it does not follow the response either")
    evidence += [f"it would begin with {context.preferred(first & (tokens.position == 0))}"]
    evidence += context.names.other_renderings(context.pair)
    return context.result(
        "template",
        "blocks" if figures.reverse_kl >= LOST else "harms",
        "The teacher scores the responses as if they answered another prompt: it was trained with another template, "
        "or on another task.",
        evidence,
        "render prompts as in the teacher's training: prompts.template, prompts.template_args (such as "
        "enable_thinking) and prompts.system; then sample and score a new round. A teacher of the student's family "
        "avoids this",
        1.0 if figures.reverse_kl >= LOST else context.fraction_of_kl(first),
    )


# ------------------------------------------------------------------------------------------------------ single tokens


def _few_tokens(context: PairContext) -> CheckResult:
    return context.result(
        "few-tokens",
        "note",
        "Too few tokens to say whether this pair will work.",
        [f"{context.figures.tokens:,} tokens are scored; at least {ENOUGH_TOKENS} are needed"],
        "sample and score more rollouts (prompts.limit, rollouts.rollouts_per_prompt)",
        0.0,
    )


def _stop(context: PairContext) -> CheckResult | None:
    """Stop tokens that the teacher would not write where the student does."""
    tokens, figures = context.pair.tokens, context.figures
    if figures.stop_logprob is None or figures.stop_logprob > NO_STOP:
        return None
    rest = tokens.logprob[~tokens.stop]
    if not len(rest) or np.median(rest) < NO_STOP:
        return None  # nothing special about stopping
    used = sorted({int(token) for token in tokens.token[tokens.stop]})
    own = context.names.own_stop(context.pair)
    fraction = context.fraction_of_kl(tokens.stop)
    evidence = [
        f"the student ends with {', '.join(map(context.names, used[:3]))}: median log-prob "
        f"{figures.stop_logprob:.1f} for the teacher, {np.median(rest):.2f} for all other tokens",
        f"{percent(float(tokens.stop.mean()))} of the tokens are these, and {percent(fraction)} of the reverse KL",
        f"there the teacher prefers {context.preferred(tokens.stop)}",
    ]
    if own is not None and own not in used:
        evidence.append(f"the teacher's own tokenizer ends with {context.names(own)}")
    return context.result(
        "eos",
        "harms",
        "The teacher does not stop where the student stops: it was trained with another stop token.",
        evidence,
        "leave the stop token out of the loss with select.eos = false; or give both the same stop token: "
        "rollouts.stop_token_ids, or a teacher of the same kind (base or instruct) as the student",
        fraction,
    )


def _never(context: PairContext) -> Iterator[CheckResult]:
    """Tokens that the teacher would never sample, and many unlikely ones."""
    tokens = context.pair.tokens
    unlikely = below(tokens, UNLIKELY) & ~tokens.stop
    ids, which = np.unique(tokens.token, return_inverse=True)
    seen, bad = np.bincount(which), np.bincount(which, weights=unlikely)
    never = (seen >= NEVER_SEEN) & (bad >= NEVER_FRACTION * seen)
    of_never = never[which] & ~tokens.stop
    if (fraction := context.fraction_of_kl(of_never)) >= NEVER_KL:
        chosen = [int(ids[i]) for i in np.argsort(-bad * never)[: min(5, int(never.sum()))]]
        special = [token for token in chosen if context.names.is_special(token)]
        yield context.result(
            "impossible",
            "harms",
            "The student samples tokens that the teacher never would.",
            [
                f"{', '.join(map(context.names, chosen))}: {percent(float(of_never.mean()))} of the tokens and "
                f"{percent(fraction)} of the reverse KL, nearly always less likely than 1 in "
                f"{math.exp(-UNLIKELY):,.0f} for the teacher",
                f"in their place the teacher prefers {context.preferred(of_never)}",
            ],
            "leave special tokens out of the loss with select.special_tokens = false"
            if special
            else "bring both to the same format first: prompts.system, prompts.template_args, or a little SFT of the "
            "student on the teacher's responses",
            fraction,
        )
        unlikely &= ~of_never
    if float(unlikely.mean()) >= MANY_UNLIKELY:
        worst = Counter(tokens.token[unlikely].tolist()).most_common(5)
        shown = ", ".join(f"{context.names(token)} ({count:,} times)" for token, count in worst)
        yield context.result(
            "unlikely",
            "harms",
            "Too many of the student's tokens are next to impossible for the teacher.",
            [
                f"{percent(float(unlikely.mean()))} of the tokens are less likely than {probability(UNLIKELY)}, with "
                f"{percent(context.fraction_of_kl(unlikely))} of the reverse KL; most often {shown}",
                f"there the teacher prefers {context.preferred(unlikely)}",
            ],
            "start with a little SFT of the student on the teacher's responses, or with easier prompts "
            "(off-policy cold start and prompt selection, arXiv 2604.13016); score.teacher_topk = 8 lets the loss "
            "see what the teacher prefers",
            context.fraction_of_kl(unlikely),
        )


# --------------------------------------------------------------------------------------------------------- the whole


def _far(context: PairContext) -> CheckResult | None:
    figures = context.figures
    if figures.wide < FAR:
        return None
    return context.result(
        "far",
        "harms",
        "Student and teacher prefer different tokens at too many positions.",
        [
            f"reverse KL is above 1 nat at {percent(figures.wide)} of the tokens, and {figures.reverse_kl:.2f} on "
            "average; few of the corrections are useful"
        ],
        "choose a teacher closer to the student (the same family, the same kind of reasoning), or start with SFT on "
        "the teacher's responses (arXiv 2604.13016: compatible thinking patterns, off-policy cold start)",
        figures.wide,
    )


def _nothing(context: PairContext) -> CheckResult | None:
    figures, stop = context.figures, TrainConfig().stop_reverse_kl
    if figures.reverse_kl >= stop:
        return None
    return context.result(
        "nothing-to-learn",
        "harms",
        "There is next to nothing to learn: on these responses the student already matches the teacher.",
        [
            f"reverse KL {figures.reverse_kl:.2g} nats a token; training ends below train.stop_reverse_kl = {stop:g}",
        ],
        "if an earlier round brought it there, it is done; otherwise harder prompts, longer responses "
        "(rollouts.max_response_tokens), or a better teacher",
        0.0,
    )


def _outside(context: PairContext) -> CheckResult | None:
    tokens = context.pair.tokens
    outside = (tokens.shared < SAME_TOKENS * tokens.student_shared) & ~tokens.stop  # `_stop` covers these
    if context.pair.scored.topk or float(outside.mean()) < MANY_OUTSIDE:
        return None
    return context.result(
        "outside",
        "note",
        "At some positions the token that the teacher prefers is not among the student's candidates, so the loss "
        "cannot see it.",
        [
            f"at {percent(float(outside.mean()))} of the positions, with {percent(context.fraction_of_kl(outside))} "
            f"of the reverse KL, the teacher gives the {context.pair.scored.candidates} candidates less than half of "
            "what the student gives them"
        ],
        "store the teacher's own likeliest: score.teacher_topk = 8, and score again",
        context.fraction_of_kl(outside),
    )


def _few_candidates(context: PairContext) -> CheckResult | None:
    covered = context.figures.student_shared
    if context.figures.shared is None or context.pair.scored.candidate_kind != "topk" or covered >= COVERED:
        return None
    return context.result(
        "few-candidates",
        "note",
        "The candidates cover too little of the student's probability: reverse KL is measured too low.",
        [f"{percent(covered)} of the student's probability is on its {context.pair.scored.candidates} candidates"],
        f"score.candidates = {2 * context.pair.scored.candidates} or more, and score again",
        1 - covered,
    )


def _less_sure(context: PairContext) -> CheckResult | None:
    teacher, student = context.figures.entropy, context.figures.student_entropy
    if teacher is None or teacher < LESS_SURE * student or teacher < student + LESS_SURE_NATS:
        return None
    return context.result(
        "less-sure",
        "note",
        "The teacher is less certain of these tokens than the student: is it the better model here?",
        [f"entropy {teacher:.2f} nats for the teacher, {student:.2f} for the student"],
        "compare their accuracy on prompts with answers (redpen eval MODEL --prompts FILE) before training; a cache "
        "does not record which answers are right",
        0.0,
    )
