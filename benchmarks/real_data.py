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

ASKED = "Solve this step by step, and end with the answer as a number."
TRAIN_NAMES = ["Ada", "Bruno", "Carla", "Dmitri", "Elif", "Farid", "Greta", "Hiro", "Ines", "Jonas", "Kira", "Luis"]
HELD_OUT_NAMES = ["Quentin", "Rosa", "Saman", "Tove", "Uma", "Viktor", "Wanda", "Xenia", "Yusuf", "Zora"]
THINGS = ["apples", "pencils", "marbles", "stickers", "books", "shells", "coins", "stamps", "cards", "buttons"]


def _boxes(r: random.Random, a: str, b: str) -> Problem:
    n, each = r.randint(4, 12), r.randint(6, 15)
    given, things = r.randint(5, n * each // 2), r.choice(THINGS)
    text = f"{a} has {n} boxes with {each} {things} each and gives {given} {things} to {b}. How many are left?"
    left = n * each - given
    return text, left, f"{n} x {each} = {n * each}; {n * each} - {given} = {left}"


def _change(r: random.Random, a: str, b: str) -> Problem:
    price, count = r.randint(3, 19), r.randint(2, 9)
    paid = (price * count // 50 + 1) * 50
    return (
        f"A ticket costs {price} dollars. {a} buys {count} tickets for {b} and friends and pays with {paid} dollars. "
        "How many dollars of change are there?",
        paid - price * count,
        f"{count} x {price} = {count * price}; {paid} - {count * price} = {paid - price * count}",
    )


def _pages(r: random.Random, a: str, b: str) -> Problem:
    first, days, second, more = r.randint(8, 30), r.randint(3, 9), r.randint(8, 30), r.randint(2, 6)
    by_a = first * days + second * more
    return (
        f"{a} reads {first} pages a day for {days} days, and then {second} pages a day for {more} days. {b} has read "
        f"{days + more} pages. How many pages have they read together?",
        by_a + days + more,
        f"{first} x {days} + {second} x {more} = {by_a}; {by_a} + {days + more} = {by_a + days + more}",
    )


def _loaves(r: random.Random, a: str, b: str) -> Problem:
    morning, times = r.randint(12, 45), r.randint(2, 4)
    sold = r.randint(10, morning * (1 + times) - 5)
    baked = morning * (1 + times)
    return (
        f"{a} bakes {morning} loaves in the morning and {times} times as many in the afternoon. {b} sells {sold} of "
        "them. How many loaves remain?",
        baked - sold,
        f"{morning} x {times} = {morning * times}; {morning} + {morning * times} = {baked}; {baked} - {sold} = "
        f"{baked - sold}",
    )


def _ages(r: random.Random, a: str, b: str) -> Problem:
    age, older, times, years = r.randint(6, 30), r.randint(2, 12), r.randint(2, 3), r.randint(2, 9)
    return (
        f"{a} is {age} years old. {b} is {older} years older than {a}, and their aunt is {times} times as old as "
        f"{b}. How old will the aunt be in {years} years?",
        times * (age + older) + years,
        f"{age} + {older} = {age + older}; {times} x {age + older} = {times * (age + older)}; "
        f"{times * (age + older)} + {years} = {times * (age + older) + years}",
    )


def _wages(r: random.Random, a: str, b: str) -> Problem:
    hourly, hours, days = r.randint(9, 25), r.randint(3, 8), r.randint(3, 6)
    spent = r.randint(20, hourly * hours * days // 2)
    earned = hourly * hours * days
    return (
        f"{a} earns {hourly} dollars an hour and works {hours} hours on each of {days} days. Then {a} spends {spent} "
        f"dollars on a present for {b}. How many dollars are left?",
        earned - spent,
        f"{hourly} x {hours} x {days} = {earned}; {earned} - {spent} = {earned - spent}",
    )


def _bus(r: random.Random, a: str, b: str) -> Problem:
    start, stops, on, off = r.randint(12, 40), r.randint(3, 6), r.randint(4, 9), r.randint(1, 3)
    return (
        f"A bus starts with {start} passengers, {a} and {b} among them. At each of {stops} stops {on} people get on "
        f"and {off} get off. How many passengers are there after the last of these stops?",
        start + stops * (on - off),
        f"{on} - {off} = {on - off}; {stops} x {on - off} = {stops * (on - off)}; {start} + {stops * (on - off)} = "
        f"{start + stops * (on - off)}",
    )


def _equal_parts(r: random.Random, a: str, b: str) -> Problem:
    friends, each, back, things = r.randint(3, 9), r.randint(7, 18), r.randint(1, 5), r.choice(THINGS)
    return (
        f"{a} and {b} have {friends * each} {things} and divide them equally among {friends} children. Every child "
        f"gives {back} of them away. How many {things} does each child have now?",
        each - back,
        f"{friends * each} / {friends} = {each}; {each} - {back} = {each - back}",
    )


def _garden(r: random.Random, a: str, b: str) -> Problem:
    rows, plants, more, beans, lost = (
        r.randint(4, 12),
        r.randint(6, 14),
        r.randint(2, 8),
        r.randint(5, 12),
        r.randint(3, 15),
    )
    planted = rows * plants + more * beans
    return (
        f"{a} plants {rows} rows of {plants} tomatoes, and {b} plants {more} rows of {beans} beans. {lost} of "
        "all the plants die. How many plants are left?",
        planted - lost,
        f"{rows} x {plants} + {more} x {beans} = {planted}; {planted} - {lost} = {planted - lost}",
    )


def _seats(r: random.Random, a: str, b: str) -> Problem:
    cars, seats, percent = r.randint(3, 9), 20 * r.randint(2, 5), 10 * r.randint(3, 9)
    return (
        f"A train has {cars} cars with {seats} seats each. When {a} and {b} have sat down, {percent} percent of the "
        "seats are taken. How many seats are free?",
        cars * seats * (100 - percent) // 100,
        f"{cars} x {seats} = {cars * seats}; {100 - percent} % of {cars * seats} = "
        f"{cars * seats * (100 - percent) // 100}",
    )


PROBLEMS: Sequence[Callable[[random.Random, str, str], Problem]] = (
    _boxes,
    _change,
    _pages,
    _loaves,
    _ages,
    _wages,
    _bus,
    _equal_parts,
    _garden,
    _seats,
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
        text, value = r.choice(((f"{a} + {b} - {c}", a + b - c), (f"{a} * {c} + {b}", a * c + b)))
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
