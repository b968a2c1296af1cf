"""Whether student and teacher have anything in common: do they speak the same tokens, and read the same prompt?"""

from __future__ import annotations

from pipeline.diagnose import Finding
from pipeline.diagnose.context import Case
from pipeline.diagnose.figures import FIRST_TOKENS, percent

#: Agreement on the likeliest candidate, from 0 (as by chance) to 1, below which there is none to speak of.
CHANCE_AGREEMENT = 0.2
#: Mean log-prob of the student's tokens in units of a uniform guess's. Weights that know nothing give 1 to 1.2, a
#: model that is sure of other tokens 1.3 and more.
LESS_THAN_CHANCE = 1.3
#: Entropy in units of the largest possible from which a model writes or reads at random.
FLAT = 0.7
#: Reverse KL (nats) of the first tokens from which the teacher reads another prompt: two good models that would begin
#: differently are below 1. And of all tokens, from which the rest is lost too.
OTHER_PROMPT, LOST = 2.0, 1.0


def other_tokens(case: Case) -> Finding | None:
    """The teacher puts its probability elsewhere, and ranks the student's candidates as chance would."""
    figures, pair = case.figures, case.pair
    units = figures.logprob / case.chance_logprob
    flat = figures.entropy is not None and figures.entropy > -FLAT * case.chance_logprob
    related = case.same_tokens or (case.agreement is not None and case.agreement >= CHANCE_AGREEMENT)
    if related and not flat:
        return None
    evidence = [
        f"the student's tokens have a mean log-prob of {figures.logprob:.1f} for the teacher; a uniform guess among "
        f"{pair.sampled.vocab_size:,} tokens gives {case.chance_logprob:.1f}"
    ]
    if figures.shared is not None:
        evidence.append(
            f"to the student's {pair.scored.candidates} candidates the teacher gives {percent(figures.shared)} of "
            f"its probability, the student {percent(figures.student_shared)}"
        )
    if figures.agreement is not None:
        evidence.append(
            f"its likeliest among them is the student's at {percent(figures.agreement)} of the positions; chance "
            f"alone gives {percent(1 / pair.scored.candidates)}"
        )
    if figures.entropy is not None:
        evidence.append(f"its entropy is {figures.entropy:.2f} nats of {-case.chance_logprob:.2f} possible")
    if pair.scored.tokenizer.digest != pair.sampled.tokenizer.digest:
        evidence.append("the cache records another tokenizer for the teacher than for the student")
    if units > LESS_THAN_CHANCE and not flat:
        return case.finding(
            "vocabulary",
            "blocks",
            "The teacher reads other tokens than the student writes: the same ids mean other words to it.",
            evidence,
            "check that the rows of the teacher's weights are in the order of its tokenizer.json (were they resized, "
            "converted, or taken from a model with another tokenizer?). If they are, it was taught nothing like "
            "these responses: choose another",
            1.0,
        )
    return case.finding(
        "unrelated",
        "blocks",
        "The teacher knows nothing of what the student writes: it does hardly better than a blind guess.",
        evidence,
        "check teacher.model, teacher.revision and teacher.adapter (are these the trained weights?), or choose a "
        "teacher that was taught this task and language; equal evidence comes from a teacher with other token ids",
        1.0,
    )


def other_prompt(case: Case) -> Finding | None:
    """The same tokens, but already the first ones, which follow from the prompt alone, surprise the teacher."""
    figures, reading = case.figures, case.pair.reading
    if figures.reverse_kl_first_tokens < OTHER_PROMPT:
        return None
    first = (reading.position < FIRST_TOKENS) & ~reading.stop
    evidence = [
        f"reverse KL of the first {FIRST_TOKENS} tokens: {figures.reverse_kl_first_tokens:.2f} nats each, of all "
        f"tokens {figures.reverse_kl:.2f}",
    ]
    if figures.shared is not None:
        evidence.append(
            f"both consider the same tokens: {percent(figures.shared)} of the teacher's probability is on the "
            "student's candidates"
        )
    if case.agreement is not None and case.agreement < CHANCE_AGREEMENT:
        evidence.append("but it ranks them as chance would, so it does not follow the response either")
    evidence += [f"it would begin with {case.preferred(first & (reading.position == 0))}"]
    evidence += case.words.other_renderings(case.pair)
    return case.finding(
        "template",
        "blocks" if figures.reverse_kl >= LOST else "harms",
        "The teacher reads the responses as if they answered another prompt: the template is not the one that it was "
        "taught, or its task is another.",
        evidence,
        "render prompts as the teacher was taught: prompts.template, prompts.template_args (such as enable_thinking) "
        "and prompts.system; then sample and score a new round. A teacher of the student's own family avoids this",
        1.0 if figures.reverse_kl >= LOST else case.share_of_kl(first),
    )
