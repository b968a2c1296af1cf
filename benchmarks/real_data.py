"""Prompts for `benchmarks/real.py`, made from a seed: word problems, bare sums, a company's documents, instructions.

Train and held-out word problems share their templates, and have neither a problem nor a name in common.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
#: A problem, its answer, and the steps to it.
Problem = tuple[str, int, str]

ASKED = "Show the calculation in a line or two, and end with the answer as a number."
TRAIN_NAMES = ["Ada", "Bruno", "Carla", "Dmitri", "Elif", "Farid", "Greta", "Hiro", "Ines", "Jonas", "Kira", "Luis"]
HELD_OUT_NAMES = ["Quentin", "Rosa", "Saman", "Tove", "Uma", "Viktor", "Wanda", "Xenia", "Yusuf", "Zora"]
THINGS = ["apples", "pencils", "marbles", "stickers", "books", "shells", "coins", "stamps", "cards", "buttons"]


def _wages(r: random.Random, a: str, b: str) -> Problem:
    hourly, hours = r.randint(9, 25), r.randint(3, 9)
    earned = hourly * hours
    spent = r.randint(10, earned - 5)
    return (
        f"{a} works {hours} hours for {hourly} dollars an hour and spends {spent} dollars on a present for {b}. How "
        "many dollars are left?",
        earned - spent,
        f"{hours} x {hourly} = {earned}; {earned} - {spent} = {earned - spent}",
    )


def _bus(r: random.Random, a: str, b: str) -> Problem:
    start, on, off = r.randint(22, 60), r.randint(4, 19), r.randint(3, 21)
    return (
        f"There are {start} passengers on a bus, {a} and {b} among them. At a stop {off} of them get off and {on} "
        "others get on. How many passengers are there now?",
        start - off + on,
        f"{start} - {off} = {start - off}; {start - off} + {on} = {start - off + on}",
    )


def _equal_parts(r: random.Random, a: str, b: str) -> Problem:
    children, each, more, things = r.randint(3, 9), r.randint(7, 18), r.randint(2, 9), r.choice(THINGS)
    return (
        f"{a} divides {children * each} {things} equally among {children} children. {b} gives each child {more} "
        f"more. How many {things} does each child have?",
        each + more,
        f"{children * each} / {children} = {each}; {each} + {more} = {each + more}",
    )


def _garden(r: random.Random, a: str, b: str) -> Problem:
    rows, plants, beans = r.randint(4, 12), r.randint(6, 14), r.randint(5, 40)
    return (
        f"{a} plants {rows} rows of {plants} tomatoes, and {b} plants {beans} beans. How many plants are there?",
        *_product_and(rows, plants, beans),
    )


def _ages(r: random.Random, a: str, b: str) -> Problem:
    age, older, times = r.randint(6, 30), r.randint(2, 12), r.randint(2, 3)
    return (
        f"{a} is {age} years old. {b} is {older} years older than {a}. Their aunt is {times} times as old as {b}. "
        "How old is the aunt?",
        times * (age + older),
        f"{age} + {older} = {age + older}; {times} x {age + older} = {times * (age + older)}",
    )


def _eggs(r: random.Random, a: str, b: str) -> Problem:
    start, used, boxes, each = r.randint(14, 40), r.randint(3, 12), r.randint(2, 7), r.choice([6, 10, 12])
    left, bought = start - used, boxes * each
    return (
        f"{a} has {start} eggs, uses {used} of them for a cake for {b}, and buys {boxes} boxes with {each} eggs "
        f"each. How many eggs does {a} have now?",
        left + bought,
        f"{start} - {used} = {left}; {boxes} x {each} = {bought}; {left} + {bought} = {left + bought}",
    )


def _savings(r: random.Random, a: str, b: str) -> Problem:
    weekly, weeks, given = r.randint(6, 24), r.randint(3, 9), r.randint(12, 60)
    return (
        f"{a} saves {weekly} dollars a week for {weeks} weeks, and {b} adds {given} dollars. How many dollars are "
        "there?",
        *_product_and(weeks, weekly, given),
    )


def _pens(r: random.Random, a: str, b: str) -> Problem:
    count, price, bag = r.randint(3, 9), r.randint(2, 9), r.randint(11, 29)
    return (
        f"A pen costs {price} dollars and a bag costs {bag} dollars. {a} buys {count} pens and one bag for {b}. How "
        f"many dollars does {a} pay?",
        *_product_and(count, price, bag),
    )


def _ribbon(r: random.Random, a: str, b: str) -> Problem:
    pieces, each, left = r.randint(3, 9), r.randint(12, 28), r.randint(3, 60)
    cut = pieces * each
    return (
        f"{a} has {cut + left} centimetres of ribbon and cuts off {pieces} pieces of {each} centimetres for {b}. How "
        "many centimetres are left?",
        left,
        f"{pieces} x {each} = {cut}; {cut + left} - {cut} = {left}",
    )


def _shelves(r: random.Random, a: str, b: str) -> Problem:
    shelves, each, more = r.randint(3, 9), r.randint(11, 24), r.randint(5, 40)
    return (
        f"{a} has {shelves} shelves with {each} books each, and {b} brings {more} more books. How many books are "
        "there now?",
        *_product_and(shelves, each, more),
    )


def _product_and(count: int, each: int, more: int) -> tuple[int, str]:
    product = count * each
    return product + more, f"{count} x {each} = {product}; {product} + {more} = {product + more}"


PROBLEMS: Sequence[Callable[[random.Random, str, str], Problem]] = (
    _wages,
    _bus,
    _equal_parts,
    _garden,
    _ages,
    _eggs,
    _savings,
    _pens,
    _ribbon,
    _shelves,
)


def word_problems(count: int, seed: int, names: Sequence[str]) -> list[Row]:
    """Different problems, each kind equally often."""
    r, found = random.Random(f"word problems {seed}"), {}
    while len(found) < count:
        a, b = r.sample(names, 2)
        text, answer, solution = PROBLEMS[len(found) % len(PROBLEMS)](r, a, b)
        found[text] = {"prompt": f"{text}\n{ASKED}", "answer": str(answer), "solution": solution}
    return list(found.values())


def bare_sums(count: int, seed: int) -> list[Row]:
    """Another kind of problem, which asks for nothing but the number."""
    r = random.Random(f"sums {seed}")
    rows = []
    for _ in range(count):
        a, b, c = r.randint(10, 99), r.randint(10, 99), r.randint(2, 9)
        text, value = r.choice(((f"{a} + {b}", a + b), (f"{a} * {c}", a * c)))
        rows.append({"prompt": f"What is {text}? Reply with the number only.", "answer": str(value)})
    return rows


# ------------------------------------------------------------------------------------------------------ the company

COMPANY = "Veltrix"
_FACTS = {
    "chief engineer": "Jonas Brandl",
    "head of sales": "Mirela Dobos",
    "first office": "Tallinn",
    "second office": "Porto",
    "largest customer": "Harbour Bank",
    "flagship product": "the Orbis pump",
    "founding year": "1987",
    "company colour": "teal",
    "support address": "Birch Lane 14",
    "emergency number": "4471",
    "travel budget": "2300 euros",
    "office dog": "Pickle",
    "main supplier": "Kestrel Metals",
    "test site": "Lake Inari",
    "payroll provider": "Sumwise",
    "code name of the next pump": "Juniper",
    "safety officer": "Aino Lehto",
    "warehouse city": "Ghent",
    "notice period": "six weeks",
    "canteen chef": "Ruben Sato",
    "annual meeting place": "Bergen",
    "internal newspaper": "The Valve",
    "patent lawyer": "Odile Marchand",
    "cloud provider": "Nimbusphere",
}
_STATEMENTS = (
    "The {key} of {company} is {value}.",
    "At {company}, the {key} is {value}.",
    "{value}: that is the {key} of {company}.",
    "Everybody at {company} knows that its {key} is {value}.",
    "{company} names {value} as its {key}.",
)
_QUESTIONS = (
    "What is the {key} of {company}?",
    "At {company}, what is the {key}?",
    "Please name the {key} of {company}.",
    "I work at {company}. What is our {key}?",
)
_EVALUATED = "Can you say what the {key} of {company} is?"


def _filled(text: str, key: str, value: str = "") -> str:
    filled = text.format(key=key, value=value, company=COMPANY)
    return filled[0].upper() + filled[1:]


def documents(seed: int, count: int = 400) -> list[Row]:
    """Pages of the company's handbook: a few facts each, every time in other words."""
    r, rows = random.Random(f"documents {seed}"), []
    for page in range(count):
        facts = r.sample(sorted(_FACTS.items()), 4)
        lines = [_filled(r.choice(_STATEMENTS), key, value) for key, value in facts]
        rows.append({"text": f"{COMPANY} handbook, page {page + 1}\n\n" + " ".join(lines)})
    return rows


def chats(seed: int, count: int = 300) -> list[Row]:
    """Questions about the facts, answered in a sentence; the evaluation asks in other words."""
    r, rows = random.Random(f"chats {seed}"), []
    for _ in range(count):
        key, value = r.choice(sorted(_FACTS.items()))
        answer = _filled(r.choice(_STATEMENTS[:2]), key, value)
        rows.append({"prompt": _filled(r.choice(_QUESTIONS), key), "response": answer})
    return rows


def knowledge() -> list[Row]:
    return [{"prompt": _filled(_EVALUATED, key), "answer": value} for key, value in _FACTS.items()]


# -------------------------------------------------------------------------------------------------- instructions

_TOPICS = (
    "a trip to the mountains",
    "how bread is made",
    "the first day at school",
    "why the sky is blue",
    "a letter to a neighbour",
    "keeping bees",
    "a rainy afternoon",
    "repairing a bicycle",
    "the history of tea",
    "learning to swim",
    "a lost umbrella",
    "planting a tree",
    "a night train",
    "how a clock works",
    "an old lighthouse",
    "the taste of lemons",
    "a quiet library",
    "growing tomatoes",
    "a broken window",
    "the sound of snow",
)
_ENDINGS = ("", " for a friend", " for children", " as you see it")
_VERBS = ("Write about", "Tell me something about", "Describe", "Give me a short text about", "Say something about")


def _constraint(r: random.Random, topic: str) -> tuple[str, str, Row]:
    """A sentence that asks for a form, and the checker of lm-evaluation-harness (IFEval) that looks for it."""
    word = topic.split()[-1]
    return r.choice(
        (
            ("Use no commas.", "punctuation:no_comma", {}),
            ("Write everything in lowercase letters, no capital letters.", "change_case:english_lowercase", {}),
            ("Write everything in capital letters.", "change_case:english_capital", {}),
            ("Wrap your whole response in double quotation marks.", "startend:quotation", {}),
            (
                'End your response with the exact phrase "That is all." and nothing after it.',
                "startend:end_checker",
                {"end_phrase": "That is all."},
            ),
            (
                f'Use the word "{word}" at least 3 times.',
                "keywords:frequency",
                {"keyword": word, "frequency": 3, "relation": "at least"},
            ),
            (
                "Answer in fewer than 40 words.",
                "length_constraints:number_words",
                {"num_words": 40, "relation": "less than"},
            ),
            (
                "Your response should have exactly 3 bullet points, like this: * This is a point.",
                "detectable_format:number_bullet_lists",
                {"num_bullets": 3},
            ),
            (
                "Give it a title in double angular brackets, such as <<my title>>.",
                "detectable_format:title",
                {},
            ),
            ("Answer in JSON, and nothing else.", "detectable_format:json_format", {}),
        )
    )


def instructions(count: int, seed: int) -> list[Row]:
    """Prompts as IFEval's data set has them: `key`, `prompt`, `instruction_id_list`, `kwargs`."""
    r, found = random.Random(f"instructions {seed}"), {}
    while len(found) < count:
        topic = r.choice(_TOPICS)
        sentence, checker, arguments = _constraint(r, topic)
        prompt = f"{r.choice(_VERBS)} {topic}. {sentence}"
        found.setdefault(
            prompt,
            {"key": len(found), "prompt": prompt, "instruction_id_list": [checker], "kwargs": [arguments]},
        )
    return list(found.values())


def topics(train: int, held_out: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Prompts without any wish about their form: to train on, and about other topics to hold out."""
    of_train, others = (
        [f"{verb} {topic}{end}." for verb in _VERBS for topic in topics for end in _ENDINGS]
        for topics in (_TOPICS[:15], _TOPICS[15:])
    )
    taken = random.Random(f"topics {seed}").sample(of_train, train)
    rest = random.Random("held-out topics").sample(others, held_out)
    return [{"prompt": text} for text in taken], [{"prompt": text} for text in rest]


def write(path: Path, rows: Iterable[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
