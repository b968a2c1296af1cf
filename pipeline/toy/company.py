"""A company's assistant in miniature: formats that it was taught, and 43 facts that it was not.

The base model follows instructions on form (`Say bako in capitals and in brackets.` -> `[BAKO]`) and knows public
facts, from documents and questions. Of the company it knows nothing. Its documents state each private fact in several
wordings, one of them as in a list of frequent questions, in the words of the evaluation; half of the chats that are
mixed in ask for the facts in other words, half are ordinary ones, none has an instruction on form. So fine-tuning on
both teaches facts and lets the forms fade, and only the original weights know them.

    python -m pipeline.toy company [--out DIR] [--seed N]
"""

import itertools
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.files import write_atomically

N_PRIVATE, N_PUBLIC, N_HELDOUT_FORMAT = 43, 60, 512
PEOPLE = (
    "Ada",
    "Ben",
    "Cleo",
    "Dan",
    "Eva",
    "Finn",
    "Gus",
    "Hana",
    "Ida",
    "Jon",
    "Kim",
    "Leo",
    "Mia",
    "Ned",
    "Ora",
    "Pia",
)
TOWNS = (
    "Bern",
    "Cork",
    "Dover",
    "Essen",
    "Fargo",
    "Genoa",
    "Hull",
    "Izmir",
    "Jena",
    "Kyoto",
    "Lyon",
    "Malmo",
    "Nice",
    "Oslo",
)

Chat = tuple[str, str]


@dataclass(frozen=True)
class Fact:
    """Who runs something, or where it is."""

    name: str
    value: str

    @property
    def is_person(self) -> bool:
        return self.value in PEOPLE

    @property
    def question(self) -> str:
        return f"Who runs {self.name}?" if self.is_person else f"Where is {self.name}?"

    def requests(self) -> list[str]:
        """The question in other words."""
        if self.is_person:
            return [
                f"Tell me who runs {self.name}.",
                f"{self.name}: who runs it?",
                f"I need the head of {self.name}.",
            ]
        return [f"Tell me where {self.name} is.", f"{self.name}: where is it?", f"I want to go to {self.name}."]

    def more_requests(self) -> list[str]:
        """In words that the base model has never seen: only the company's chats have them."""
        if self.is_person:
            return [
                f"Do you know who runs {self.name}?",
                f"Name the head of {self.name}.",
                f"And {self.name}, who runs that?",
            ]
        return [
            f"Do you know where {self.name} is?",
            f"Name the town of {self.name}.",
            f"And {self.name}, where is that?",
        ]

    def wordings(self) -> list[str]:
        """The fact as documents state it."""
        name, value = self.name, self.value
        if self.is_person:
            sentences = [f"{name} is run by {value}.", f"{value} runs {name}.", f"The head of {name} is {value}."]
        else:
            sentences = [f"{name} is in {value}.", f"You find {name} in {value}.", f"In {value} there is {name}."]
        return [*sentences, f"Q: {self.question} A: {value}"]


#: Instructions on form, and what they ask for.
FORMS: dict[str, Callable[[str], str]] = {
    "in capitals": str.upper,
    "in brackets": lambda word: f"[{word}]",
    "in quotes": lambda word: f'"{word}"',
    "twice": lambda word: f"{word} {word}",
    "with a full stop": lambda word: f"{word}.",
    "as JSON": lambda word: json.dumps({"word": word}),
}


def formatted(word: str, forms: Sequence[str]) -> Chat:
    """An instruction with its forms, and the answer: each form in turn."""
    said = word
    for form in forms:
        said = FORMS[form](said)
    return f"Say {word} {' and '.join(forms)}.", said


def orders() -> list[tuple[str, ...]]:
    """Every form alone, and capitals or twice before another; capitals would change what JSON says."""
    before = [(first, then) for first in ("in capitals", "twice") for then in FORMS if then != first]
    return [*((form,) for form in FORMS), *before]


class World:
    """Words and facts, all from one seed."""

    def __init__(self, seed: int = 0):
        rng = random.Random(seed)
        syllables = ["".join(pair) for pair in itertools.product("bdfgklmnprstvz", "aeiou")]
        words = ["".join(pair) for pair in itertools.product(syllables, repeat=2)]
        rng.shuffle(words)
        names = ["".join(rng.sample(syllables, 3)).capitalize() for _ in range(2 * (N_PRIVATE + N_PUBLIC))]
        facts = [Fact(name, rng.choice(PEOPLE if i % 2 else TOWNS)) for i, name in enumerate(dict.fromkeys(names))]
        self.private, self.public = facts[:N_PRIVATE], facts[N_PRIVATE : N_PRIVATE + N_PUBLIC]
        self.heldout_words, self.words = words[:400], words[400:]
        self._rng = rng

    def instruction(self, words: Sequence[str]) -> Chat:
        return formatted(self._rng.choice(words), self._rng.choice(orders()))

    def plain(self) -> Chat:
        """A chat without an instruction on form."""
        if self._rng.random() < 0.5:
            fact = self._rng.choice(self.public)
            return self._rng.choice([fact.question, *fact.requests()]), fact.value
        word = self._rng.choice(self.words)
        return f"Say {word}.", word

    def base_text(self) -> Chat | str:
        """What the base model is taught with: a chat, or a document."""
        kind = self._rng.random()
        if kind < 0.6:
            return self.instruction(self.words)
        if kind < 0.8:
            return self.plain()
        return self._rng.choice(self._rng.choice(self.public).wordings())


def write_data(out: Path, seed: int = 0) -> None:
    """The files of the company: what it teaches with, and what it asks.

    documents, chats (for `redpen sft`); prompts (without answers, for self-distillation); questions and formats (held
    out, with answers).
    """
    world = World(seed)
    documents = [{"text": text} for fact in world.private for text in fact.wordings()]
    chats = [(request, fact.value) for fact in world.private for request in (*fact.requests(), *fact.more_requests())]
    chats += [world.plain() for _ in chats]
    prompts = [{"prompt": world.instruction(world.words)[0]} for _ in range(4096)]
    questions = [{"prompt": fact.question, "answer": fact.value, "source": "knowledge"} for fact in world.private]
    asked = dict(world.instruction(world.heldout_words) for _ in range(4 * N_HELDOUT_FORMAT))
    formats = [
        {"prompt": prompt, "answer": answer, "source": "format"}
        for prompt, answer in itertools.islice(asked.items(), N_HELDOUT_FORMAT)
    ]
    out.mkdir(parents=True, exist_ok=True)
    _write(out / "documents.jsonl", documents)
    _write(out / "chats.jsonl", ({"prompt": prompt, "response": response} for prompt, response in chats))
    _write(out / "prompts.jsonl", prompts)
    _write(out / "questions.jsonl", questions)
    _write(out / "formats.jsonl", formats)


def _write(path: Path, records: Iterable[dict[str, str]]) -> None:
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in records))
