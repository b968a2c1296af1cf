"""Right and legal: what counts as the same answer, what a legal response is, and how sure shares and pass@k are."""

from __future__ import annotations

import importlib.util
import itertools
import signal
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import EvalConfig
from pipeline.errors import ConfigError
from pipeline.text.answers import Checker, as_number, fraction_right, none_right, pass_at
from pipeline.text.math_verify import MathJudge, boxed

BOXED = r"\\boxed\{(.*)\}"

# -- answers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "pattern", "answer"),
    [
        ("3*5=15;487+15=502", r"=(\d+)\s*$", "502"),
        ("3*5=15;487+15=502\n", r"=(\d+)\s*$", "502"),
        ("3*5=15;487+15=", r"=(\d+)\s*$", None),
        (r"so \boxed{1} or rather \boxed{ 2 }.", r"\\boxed\{([^{}]*)\}", "2"),
        ("  Paris \n", None, "Paris"),
        ("", None, ""),
        ("a or nothing", r"(b)?nothing", None),
    ],
)
def test_the_answer_is_the_last_match(response: str, pattern: str | None, answer: str | None) -> None:
    assert Checker(pattern=pattern).answer(response) == answer


def test_wilson_intervals() -> None:
    """5 and 0 of 10 as in the tables of Newcombe (1998) to four digits."""
    half = fraction_right(np.array([[True]] * 5 + [[False]] * 5))
    assert (half.value, half.low, half.high) == pytest.approx((0.5, 0.2366, 0.7634), abs=1e-4)
    none = fraction_right(np.zeros((10, 1), bool))
    assert (none.value, none.low, none.high) == pytest.approx((0, 0, 0.2775), abs=1e-4)


def test_samples_of_one_prompt_are_not_independent() -> None:
    once = np.array([[True], [False]] * 50)
    together = fraction_right(np.repeat(once, 8, axis=1))
    assert (together.low, together.high) == pytest.approx(
        (fraction_right(once).low, fraction_right(once).high), abs=2e-3
    )
    mixed = fraction_right(np.tile([[True, False] * 4], (100, 1)))
    assert mixed.high - mixed.low < (together.high - together.low) / 2.5


@pytest.mark.parametrize(
    ("given", "wanted", "match"),
    [
        ("502", " 502\n", "exact"),
        ("1,000", "1000.0", "number"),
        ("1e3", "1000", "number"),
        ("$1,000.50", "1000.5", "number"),
        ("3/4", "75 %", "number"),
        ("\u22120.5", "-1/2", "number"),
        ("12.", "12", "number"),
        ("Paris", "Paris", "number"),
        ("1e3", "1000", "math"),
        (r"\frac{2}{4}", "0.5", "math"),
        ("(x+1)^2", "x^2 + 2x + 1", "math"),
        (r"\{1, 2\}", r"\{2, 1\}", "math"),
        ("x = 3", "3", "math"),
        ("Paris", "Paris", "math"),
    ],
)
def test_the_same_answer(given: str, wanted: str, match: str) -> None:
    """Each is set apart by the stricter comparison, where there is one."""
    said = rf"It is \boxed{{{given}}}"
    assert Checker(match, BOXED).is_right(said, wanted)
    assert not Checker(match, BOXED).is_right(said, f"{wanted} + 1")
    assert Checker("exact", BOXED).is_right(said, wanted) == (given == wanted.strip())


@pytest.mark.parametrize(
    ("response", "match", "answer"),
    [
        ("first 7, then 1,250 apples", "number", "1,250"),
        ("so x = 3/4.", "number", "3/4"),
        ("10-5", "number", "5"),
        ("the 5th", "number", None),
        (r"hence $x$ is \boxed{\frac12}", "math", r"\frac{1}{2}"),
        ("no idea", "math", None),
    ],
)
def test_without_a_pattern_the_answer_is_found(response: str, match: str, answer: str | None) -> None:
    checker = Checker(match)
    assert checker.answer(response) == answer
    assert checker.is_right(response, "1") is False
    assert answer is None or checker.is_right(response, answer)


@pytest.mark.parametrize(
    ("response", "wanted", "right"),
    [
        ("The chief engineer of Veltrix is Jonas Brandl.", "jonas brandl", True),
        ("Brandl, Jonas", "Jonas Brandl", False),
        ("Jonas Brandlsen", "Jonas Brandl", False),
        ("Die STRASSE", "Straße", True),
        ("Cafe\u0301 Noir", "CAFÉ noir", True),
        ("\uff11\uff12 apples", "12", True),  # full-width digits
        ("It is 3.5 m", "3", False),
        ("It is 3.5 m.", "3.5", True),
        ("The peak is 8,849 m (Everest).", "8849", True),
        ("the 3rd", "3", False),
        ("10-5", "5", True),
        ("so \u22125", "-5", True),
        ("so -5", "5", False),
        ("in C++", "C", False),
        ("642+12=654", "642", True),
        ("75%", "75 %", True),
        ("\u6771\u4eac\u3067\u3059", "\u6771\u4eac", True),  # no spaces in Japanese
        ("Rome? <think>Rome</think> Paris", "Rome", False),
        ("<think> it may be Rome", "Rome", False),  # cut before the answer
        ("", "Rome", False),
        ("?!", "?", False),
    ],
)
def test_an_answer_within_a_sentence(response: str, wanted: str, right: bool) -> None:
    assert Checker("contains").is_right(response, wanted) is right


@pytest.mark.parametrize("match", ["exact", "contains", "number"])
def test_each_of_several_answers_is_right(match: str) -> None:
    checker = Checker(match)
    assert checker.is_right("1000", ["7", "1000"]) and checker.is_right("7", ["7", "1000"])
    assert not checker.is_right("999", ["7", "1000"]) and not checker.is_right("1000", [])


def test_what_is_wrong_with_every_response() -> None:
    said, wanted = ["It is Paris.", "Rome"], [["paris"], ["Bern", "Berne"]]
    assert none_right(["Paris", "paris"], [["paris"], ["paris"]], Checker()) is None
    assert none_right([], [], Checker()) is None
    line = none_right(said, wanted, Checker())
    assert line is not None and 'expected "paris", got "It is Paris."' in line and "1 of them contain it" in line
    assert 'set eval.match = "contains"' in line and none_right(said, wanted, Checker("contains")) is None
    line = none_right(said, wanted[1:] * 2, Checker(pattern=r"=(\d+)"))
    assert line is not None and 'expected "Bern or Berne", got no answer in "It is Paris."' in line
    assert "eval.answer_pattern = '=(" in line and "\n" not in line


@given(st.fractions(), st.sampled_from(["{}", "$ {}", " {} "]))
def test_fractions_are_read_exactly(value: object, form: str) -> None:
    assert as_number(str(value)) == value
    assert as_number(form.format("x")) is None


@given(st.text(alphabet="0123456789.,/eE%-+ $", max_size=30))
def test_as_number_gives_a_number_or_none(text: str) -> None:
    value = as_number(text)
    if value is not None and text[0].isdigit():
        assert as_number(f"-{text}") == -value and value >= 0


@pytest.mark.parametrize("text", ["1e99999", "1e-99999", "9" * 5000, "1/0", "", "%", "1,00", "NaN"])
def test_what_is_no_number_takes_no_time(text: str) -> None:
    assert as_number(text) is None


# -- mathematics in its own process ---------------------------------------------------------------------------------


def test_hostile_text_is_wrong_and_the_next_question_is_answered() -> None:
    judge = MathJudge(seconds=1)
    try:
        for text in ("9^{9^{9^{9}}}", "9**9**9**9**9", "(" * 3000, "__import__('os').system('exit 1')", "\ud800\n\0"):
            assert not judge.is_right(boxed(text), "3")
        assert judge.is_right(boxed(r"\frac{6}{2}"), "3")
    finally:
        judge.close()


def test_an_interrupted_question_leaves_no_answer_behind() -> None:
    judge = MathJudge()

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        assert judge.is_right(boxed("3"), "3")
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            judge.is_right(boxed("9^{9^{9^{9}}}"), "3")
        assert judge.answer(boxed("7")) == "7"
    finally:
        signal.signal(signal.SIGALRM, before)
        judge.close()


def test_a_checker_works_from_any_thread() -> None:
    right: list[bool] = []
    checker = Checker("math", BOXED)
    threads = [
        threading.Thread(target=lambda n=n: right.append(checker.is_right(rf"\boxed{{{n}x+{n}x}}", f"{2 * n}x")))
        for n in range(1, 9)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 8


def test_a_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^eval\.match = \"math\" .*pip install -e .*\[eval\]'?$"):
        Checker.of(EvalConfig(match="math"))
    assert Checker.of(EvalConfig(match="number")).is_right("2.0", "2")


# -- legal responses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "legal"),
    [
        ('{"a": [1, 2]}', True),
        (' \n{"a": 1}\n', True),
        ('```json\n{"a": 1}\n```', True),
        ('<think>so {"a"</think>\n{"a": 1}', True),
        ('here: {"a": 1}', False),
        ('{"a": 1', False),
        ('{"a": NaN}', False),
        ("[" * 100_000, False),
        ("", False),
    ],
)
def test_legal_json(response: str, legal: bool) -> None:
    assert Checker(format="json").is_legal(response) == legal


def test_other_legal_forms() -> None:
    answers = Checker("exact", r"=(\d+)$", "answer")
    assert answers.is_legal("1+1=2") and not answers.is_legal("1+1=") and not answers.is_legal("1=1</think>hm")
    expression = Checker(format=r"(yes|no)\.?")
    assert expression.is_legal(" yes.\n") and not expression.is_legal("yes, I think")
    assert Checker().is_legal("")


# -- how sure -------------------------------------------------------------------------------------------------------


def test_pass_at_k_is_the_share_of_all_subsets_with_a_right_one() -> None:
    right_PS = np.random.default_rng(0).random((7, 6)) < 0.3
    for k in (1, 2, 4, 6):
        subsets = [[any(row[list(chosen)]) for chosen in itertools.combinations(range(6), k)] for row in right_PS]
        assert pass_at(k, right_PS).value == pytest.approx(np.mean(subsets), rel=1e-12)
    assert pass_at(1, right_PS).value == pytest.approx(right_PS.mean())


@pytest.mark.parametrize("right", [False, True])
def test_pass_at_k_of_equal_samples_has_the_interval_of_its_prompts(right: bool) -> None:
    estimate = pass_at(4, np.full((20, 8), right))
    plain = fraction_right(np.full((20, 1), right))
    assert (estimate.low, estimate.high) == (plain.low, plain.high)
    assert estimate.value == right and estimate.high - estimate.low == pytest.approx(0.161, abs=1e-3)


@pytest.mark.parametrize(("n_prompts", "a", "b"), [(30, 0.5, 0.5), (100, 0.3, 3.0), (100, 8.0, 2.0)])
def test_the_interval_of_pass_at_k_covers(n_prompts: int, a: float, b: float) -> None:
    """Prompts of different difficulty (beta), 8 samples: 95 % of the intervals, or a little more, hold pass@4."""
    rng, covered, trials = np.random.default_rng(0), 0, 1000
    truth = 1 - np.prod([(b + i) / (a + b + i) for i in range(4)])  # 1 - E[(1 - p)^4]
    for _ in range(trials):
        p = rng.beta(a, b, n_prompts)
        estimate = pass_at(4, rng.random((n_prompts, 8)) < p[:, None])
        covered += estimate.low <= truth <= estimate.high
    assert 0.93 < covered / trials < 0.99


@given(st.integers(1, 60), st.integers(1, 5), st.integers(0, 2**32))
def test_intervals_hold_their_value(n_prompts: int, n_samples: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    estimate = fraction_right(rng.random((n_prompts, n_samples)) < rng.random())
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
