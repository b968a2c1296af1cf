"""The toy world: sums `a+b*c=` with shown steps, and the misconception that forgets every carry.

    prompt          487+3*5=
    right           3*5=15;487+15=502
    misconception   3*5=15;487+15=492      each column is added on its own, what overflows it is lost

The operand ranges are chosen for the fraction of sums without any carry, where the misconception does no harm:
58 %. One model can use the right response if that is on a line before the prompt. A problem is train or held-out by
its own hash: the split is the same for every seed and machine.
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "heldout"]

ADDENDS = range(10, 1000)
FACTORS = range(1, 6)
HELDOUT_FRACTION = 0.2
SOURCE_CARRY, SOURCE_NO_CARRY = "toy/carry", "toy/no-carry"


@dataclass(frozen=True, order=True)
class Problem:
    """One problem `addend + left * right`."""

    addend: int
    left: int
    right: int

    @property
    def prompt(self) -> str:
        return f"{self.addend}+{self.left}*{self.right}="

    @property
    def with_solution(self) -> str:
        """The prompt after a line with the right response."""
        return f"{solve(self)[0]}\n{self.prompt}"

    @property
    def has_carry(self) -> bool:
        """Whether some column of the last addition overflows."""
        return add_without_carry(self.addend, self.left * self.right) != self.addend + self.left * self.right

    @property
    def split(self) -> Split:
        digest = hashlib.blake2b(self.prompt.encode(), digest_size=8).digest()
        return "heldout" if int.from_bytes(digest, "big") < HELDOUT_FRACTION * 2**64 else "train"

    @classmethod
    def parse(cls, prompt: str) -> "Problem":
        """The problem a prompt such as `487+3*5=` states; ValueError if it is not one."""
        try:
            addend, product = prompt.removesuffix("=").split("+")
            left, right = product.split("*")
            return cls(int(addend), int(left), int(right))
        except ValueError:
            raise ValueError(f"toy prompt: expected the form '487+3*5=', got {prompt!r}") from None


Method = Callable[[Problem], tuple[str, int]]
"""How to respond to a problem: the worked response (text without the end token) and its answer."""


def add_without_carry(x: int, y: int) -> int:
    """Column-wise decimal addition that drops carries: 487, 15 -> 492; x + y where no column overflows."""
    total, place = 0, 1
    while x or y:
        total += (x % 10 + y % 10) % 10 * place
        x, y, place = x // 10, y // 10, place * 10
    return total


def solve(problem: Problem) -> tuple[str, int]:
    """The right worked response (text without the end token) and its answer."""
    return _worked(problem, problem.addend + problem.left * problem.right)


def misconception(problem: Problem) -> tuple[str, int]:
    """The same steps with every carry of the last addition lost, and that answer."""
    return _worked(problem, add_without_carry(problem.addend, problem.left * problem.right))


def _worked(problem: Problem, answer: int) -> tuple[str, int]:
    product = problem.left * problem.right
    return f"{problem.left}*{problem.right}={product};{problem.addend}+{product}={answer}", answer


def read_answer(response: str) -> int | None:
    """The number after the last `=` of a response, or None where there is none."""
    tail = response.rpartition("=")[2]
    return int(tail) if tail.isascii() and tail.isdigit() else None


def problems(split: Split | None = None) -> Iterator[Problem]:
    """Every problem of the world (24,750), or of one split, in order of its operands."""
    for addend in ADDENDS:
        for left in FACTORS:
            for right in FACTORS:
                problem = Problem(addend, left, right)
                if split is None or problem.split == split:
                    yield problem


def sample(split: Split, count: int, seed: int) -> list[Problem]:
    """`count` different problems of a split in a seeded random order."""
    pool = list(problems(split))
    if count > len(pool):
        raise ValueError(f"toy problems: expected at most {len(pool)} for the {split} split, got {count}")
    return random.Random(seed).sample(pool, count)


def prompt_record(problem: Problem) -> dict[str, str]:
    """A line of a prompts file: `prompt`, the right `answer` and its `solution`, and `source` (carry or not)."""
    solution, answer = solve(problem)
    return {
        "prompt": problem.prompt,
        "answer": str(answer),
        "solution": solution,
        "source": SOURCE_CARRY if problem.has_carry else SOURCE_NO_CARRY,
    }
