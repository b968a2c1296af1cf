"""The page of `redpen report` in a real browser: what it shows, how it is used, and that nothing in it can act."""

from __future__ import annotations

import base64
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.browser import chromium
from pipeline.report import page

MISSING = 65535
MINUS = "\N{MINUS SIGN}"

#: One token each. None may act, move what stands around it, or end an element of the page.
HOSTILE = [
    "<script>window.hacked=1</script>",
    "</script><img src=x onerror=window.hacked=1>",
    "</style>",
    "<!--",
    "\"'`&amp;",
    "👩",
    "\ud83d",
    "שלום",
    "\u202etxt.exe",
    "\u200b",
    "\x1b[31m",
    "\x00",
    "\n",
    "",
    "{{ 7 * 7 }}",
    "\ufffd",
]


def b64(values: Any, dtype: str) -> str:
    return base64.b64encode(np.asarray(values, dtype).tobytes()).decode()


def make_row(number: int, start: int, length: int, **changes: Any) -> dict[str, Any]:
    return {
        "number": number,
        "same_as": None,
        "prompt_index": number // 2,
        "sample_index": number % 2,
        "prompt": f"What is {number} + 5?",
        "read": {},
        "answer": str(number + 5),
        "source": "sums" if number % 3 else "words",
        "finish": "stop",
        "right": number % 2 == 0,
        "start": start,
        "length": length,
        "kl": {},
        "worst": {},
    } | changes


def make_set(texts: list[list[str]], kl: dict[str, list[list[float]]], **changes: Any) -> dict[str, Any]:
    """A set of rollouts of these tokens with this reverse KL; every token has candidates: itself, "better", "x"."""
    flat = [text for row in texts for text in row]
    unique = list(dict.fromkeys(flat))
    n, starts = len(flat), np.cumsum([0, *map(len, texts)])
    rows = [make_row(i, int(starts[i]), len(row)) for i, row in enumerate(texts)]
    teachers = []
    for name, of_rows in kl.items():
        values = np.concatenate(of_rows)
        recorded = np.where(np.isnan(values), MISSING, np.round(1000 * np.nan_to_num(values)))
        teachers.append(
            {
                "name": name,
                "label": f"model of {name}",
                "logprob": b64(np.where(recorded == MISSING, MISSING, 2303), "<u2"),
                "kl": b64(recorded, "<u2"),
                "entropy": None,
            }
        )
        for row, known in zip(rows, of_rows, strict=True):
            row["kl"][name] = float(np.nanmean(known))
            row["worst"][name] = float(np.nanmax(known))
    labels = [*unique, "better", "x"]
    candidates = [labels.index(label) for text in flat for label in (text, "better", "x")]
    example = rows[0]["number"]
    return {
        "name": "round 0 of small.zarr",
        "kind": "cache",
        "pair": None,
        "phase": None,
        "n_total": len(texts),
        "n_shown": len(texts),
        "left_out": None,
        "teachers": teachers,
        "student": {"label": "small student", "logprob": b64([693] * n, "<u2"), "entropy": b64([1100] * n, "<u2")},
        "after": [],
        "rows": rows,
        "strings": [[i, text] for i, text in enumerate(unique)],
        "tokens": b64([unique.index(text) for text in flat], "<u4"),
        "trained": b64([1] * n, "u1"),
        "candidates": {
            "at": b64(np.arange(n), "<u4"),
            "start": b64(3 * np.arange(n + 1), "<u4"),
            "label": b64(candidates, "<u4"),
            "student": b64([693, 2303, MISSING] * n, "<u2"),
            "teachers": [b64([2303, 105, MISSING] * n, "<u2") for _ in kl],
        },
        "labels": labels,
        "by_position": {name: {"start": [0, 1, 2], "kl": [0.1, 0.5, 0.2], "tokens": [2, 2, 2]} for name in kl},
        "most_corrected": {
            name: [
                {
                    "token": flat[1],
                    "id": unique.index(flat[1]),
                    "count": 2,
                    "kl_sum": 1.0,
                    "kl_mean": 0.5,
                    "share": 0.7,
                    "prefers": "better",
                    "example": example,
                }
            ]
            for name in kl
        },
        "totals": {name: {"kl": 0.25, "tokens": n} for name in kl},
        "answers": {"right": 1, "known": 2},
        "provenance": [["temperature", "1"]],
    } | changes


def make_document(*sets: dict[str, Any], **changes: Any) -> Any:
    about = {"title": "small.zarr, runs/a", "created_by": "redpen 0.1.0"}
    return about | {"sets": list(sets), "runs": [], "cache": None, "notes": []} | changes


WORDS = ["The", " answer", " is", " 1", "2", ".\n", " Done"]
KL = [0.0, 0.05, 0.2, 0.5, 2.0, 4.0, float("nan")]


def small_document() -> Any:
    """Two teachers, a trained student's reading, a held-out pair, a run."""
    texts = [WORDS, [*WORDS[:4], "9"], HOSTILE]
    strict = [KL, KL[:5], [1.5] * len(HOSTILE)]
    kind = [[0.001] * 7, [0.4] * 5, [0.0] * len(HOSTILE)]
    n = sum(map(len, texts))
    after = np.full(n, MISSING)
    after[:7] = [0, 50, 200, 20, 100, 6000, MISSING]
    reading = {"run": "runs/a", "logprob": b64(np.where(after == MISSING, MISSING, 100), "<u2"), "entropy": None}
    cache = make_set(texts, {"strict": strict, "kind": kind}, after=[reading | {"kl": {"strict": b64(after, "<u2")}}])
    cache["rows"][1] |= {"finish": "length"}
    pair = [
        make_set(
            [[phase, " one"], [phase, " two"]],
            {"strict": [[high, 0.0], [0.0, high]]},
            name=f"runs/a, {phase}",
            kind="heldout",
            pair="runs/a",
            phase=phase,
        )
        for phase, high in (("before", 2.0), ("after", 0.3))
    ]
    estimate = {"value": 0.5, "low": 0.4, "high": 0.6}
    run = {
        "name": "runs/a",
        "sentence": "plateau: no <b>gain</b>",
        "exit_code": 0,
        "recipe": {"train.steps": 5},
        "differs": [],
        "cache": {},
        "figures": {},
        "curves": {"reverse_kl": [[1, 0.2], [2, 0.1]]},
        "ledger": {"train": {"seconds": 2.5, "tokens": 1000, "flops": 1e9}},
        "eval": {
            "prompts": {"path": "heldout.jsonl", "count": 10},
            "before": {"greedy": estimate},
            "after": {"greedy": estimate | {"value": 0.75}},
        },
        "card": [["student", "small student"]],
    }
    return make_document(cache, *pair, runs=[run], notes=["a note with \u202e and <i>"])


# ----------------------------------------------------------------------------------------------------------- browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


Open = Callable[..., Any]


@pytest.fixture
def open_page(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """Opens a document's page; fails the test if the console has an error or anything but the file is asked for."""
    wrong: list[str] = []
    contexts = []

    def show(document: Any, hash_: str = "#set=0", size: tuple[int, int] = (1360, 900), **options: Any) -> Any:
        file = tmp_path / "report.html"
        file.write_text(page.render(document), encoding="utf-8")
        context = browser.new_context(viewport={"width": size[0], "height": size[1]}, **options)
        contexts.append(context)
        shown = context.new_page()
        shown.set_default_timeout(30000)
        shown.on(
            "console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None
        )
        shown.on("pageerror", lambda error: wrong.append(str(error)))
        shown.on("dialog", lambda dialog: wrong.append(dialog.message))
        shown.on("request", lambda request: wrong.append(request.url) if request.url[:8] != "file:///" else None)
        shown.goto(file.as_uri() + hash_)
        return shown

    yield show
    for context in contexts:
        context.close()
    assert wrong == []


def texts(shown: Any, selector: str) -> list[str]:
    return [" ".join(text.split()) for text in shown.locator(selector).all_inner_texts()]


def numbers(shown: Any) -> list[str]:
    return texts(shown, "#list .meta b")


# ------------------------------------------------------------------------------------------------------------- tests


def test_hostile_text_is_shown_and_does_nothing(open_page: Open) -> None:
    shown = open_page(small_document(), "#rollout=2")
    shown.wait_for_timeout(100)
    tokens = shown.locator(".response .t").evaluate_all(
        """nodes => nodes.map((node) => [...node.childNodes].filter((child) => child.className !== "unseen")
            .map((child) => child.textContent).join(""))"""
    )
    assert tokens[:6] == HOSTILE[:6]
    assert tokens[6:] == [
        *("\\ud83d", "שלום", "\\u202etxt.exe", "\\u200b", "\\x1b[31m", "\\x00", "↵\n", "◦", "{{ 7 * 7 }}", "\ufffd")
    ]
    assert shown.evaluate("window.hacked") is None
    assert shown.locator("img, #reader script, #list script, main b:has-text('gain')").count() == 0
    assert "a note with \\u202e and <i>" in shown.inner_text(".notes")


def test_what_the_teacher_read_is_beside_the_prompt(open_page: Open) -> None:
    document = make_set([["a", "b"], ["c", "d"]], {"strict": [[2.0, 0.0]] * 2, "kind": [[0.0, 1.0]] * 2})
    document["rows"][0]["read"] = {"strict": "Hint: 5 <b>x</b>\u202e\nWhat is 0 + 5?"}
    shown = open_page(make_document(document), "#set=0&rollout=0")
    assert texts(shown, "#reader h4")[:2] == ["Prompt", "What strict read instead"]
    assert "Hint: 5 <b>x</b>" in shown.inner_text(".prompt >> nth=1") and shown.locator(".prompt b").count() == 0
    shown = open_page(make_document(document), "#set=0&rollout=1")
    assert shown.locator(".prompt").count() == 1


def test_right_to_left(open_page: Open) -> None:
    words = ["שלום", " עולם", " abc"]
    shown = open_page(make_document(make_set([words], {"strict": [[2.0, 0.0, 0.0]]})))
    right = [shown.locator(".response .t").nth(at).bounding_box()["x"] for at in range(3)]
    assert right == sorted(right, reverse=True)  # read from the right, token after token
    shown.focus(".response")
    shown.keyboard.press("ArrowLeft")
    shown.keyboard.press("ArrowLeft")
    assert shown.inner_text("#details h3") == "␣עולם"
    assert shown.locator(".legend").bounding_box()["x"] == shown.locator("#reading").bounding_box()["x"]
    shown = open_page(make_document(make_set([["a", "ש", " 1", "2", " b"]], {"strict": [[0.0] * 5]})))
    left = [shown.locator(".response .t").nth(at).bounding_box()["x"] for at in range(5)]
    assert left == sorted(left)  # a letter that reads to the left takes no digit with it


def test_policy_and_data_of_the_file() -> None:
    document = small_document()
    html = page.render(document)
    html.encode()  # lone surrogates are escapes by now
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)
    assert policy is not None and policy[1].startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy[1] and "http" not in policy[1]
    assert all(part in policy[1] for part in ("base-uri 'none'", "form-action 'none'", "trusted-types 'none'"))
    data = re.search(r'id="document">(.*?)</script>', html, re.S)
    assert data is not None and not set("<>&\u2028\u2029") & set(data[1])
    assert json.loads(data[1]) == document
    assert not re.search(r"\s(style|on\w+)=|(src|href)=\"(?!#)", html.replace(data[1], ""))


def test_marks_and_what_the_teacher_prefers(open_page: Open) -> None:
    shown = open_page(small_document(), "#rollout=0")
    classes = shown.locator(".response .t").evaluate_all("nodes => nodes.map(n => n.className.trim())")
    assert classes == ["t", "t l1", "t l2", "t l3", "t l4", "t l5", "t"]
    assert texts(shown, ".response rt") == ["better"] * 3  # from 0.3 nats
    assert "4.00 nats, teacher prefers better" in shown.locator(".t.l5").text_content()
    assert texts(shown, ".worst-tokens .amount") == ["4.00", "2.00", "0.50", "0.20"]
    shown.hover(".t.l4")
    assert texts(shown, ".scores tbody tr:first-child td") == ["50.0%", f"{MINUS}0.693", "1.100", ""]
    assert texts(shown, ".scores tbody .kl") == ["", "0.100", "2.000", "0.001"]  # student, after, strict, kind
    assert texts(shown, ".candidates tbody tr") == [
        "better 10.0% 90.0% 90.0%",
        "2 (sampled) 50.0% 10.0% 10.0%",
        "x missing missing missing",
    ]
    unscored = shown.locator(".response .t").last
    unscored.hover()
    assert texts(shown, ".scores .kl") == ["", "", "", "0.001"]


def test_a_teacher_with_its_mass_elsewhere_prefers_no_scored_token(open_page: Open) -> None:
    """0.3 for "better" and 0.1 for the token leave 0.6, which one token may have; after 0.5 none can be likelier."""
    recorded = make_set([["a", "b"]], {"strict": [[2.0, 2.0]]})
    recorded["candidates"]["teachers"] = [b64([2303, 1204, MISSING, 2303, 693, MISSING], "<u2")]
    shown = open_page(make_document(recorded), "#rollout=0")
    assert texts(shown, ".response rt") == ["better"]


def test_a_token_that_was_not_trained_on_has_no_mark(open_page: Open) -> None:
    half = make_set([["a", "b"]], {"strict": [[2.0, 7.0]]}, trained=b64([1, 0], "u1"))
    shown = open_page(make_document(half))
    classes = shown.locator(".response .t").evaluate_all("nodes => nodes.map(n => n.className)")
    assert classes == ["t l4", "t untrained"]
    assert texts(shown, "#list .worst") == ["worst 2.00"]
    assert texts(shown, ".legend .untrained") == ["not written by the student, not trained on"]
    assert "1 of them trained on" in texts(shown, ".facts span")
    assert texts(shown, ".response .unseen")[-1] == "(not trained on:)"
    whole = open_page(make_document(make_set([["a", "b"]], {"strict": [[2.0, 7.0]]})))
    assert texts(whole, ".untrained") == [] and "trained on" not in " ".join(texts(whole, ".facts span"))


def test_filter_and_order(open_page: Open) -> None:
    shown = open_page(small_document(), "#sort=number")
    assert numbers(shown) == ["#0", "#1", "#2"]
    shown.select_option("#sort", "worst")
    assert numbers(shown) == ["#0", "#1", "#2"]
    shown.select_option("#sort", "total")
    assert numbers(shown) == ["#2", "#0", "#1"]
    shown.select_option("#teacher", "kind")
    assert numbers(shown) == ["#1", "#0", "#2"]
    shown.select_option("#right", "wrong")
    assert numbers(shown) == ["#1"] and shown.inner_text("#count") == "1 of 3 rollouts"
    shown.select_option("#right", "")
    shown.select_option("#finish", "length")
    assert numbers(shown) == ["#1"]
    shown.select_option("#finish", "")
    shown.select_option("#source", "words")
    assert numbers(shown) == ["#0"]
    shown.select_option("#source", "")
    shown.fill("#q", "SCRIPT")
    assert numbers(shown) == ["#2"]
    shown.fill("#q", "what is 1")
    assert numbers(shown) == ["#1"]
    shown.fill("#q", "nowhere")
    assert numbers(shown) == [] and shown.inner_text("#count") == "No rollout matches"


def test_the_address_keeps_what_is_shown(open_page: Open) -> None:
    shown = open_page(small_document())
    shown.select_option("#teacher", "kind")
    shown.fill("#q", "what")
    shown.locator(".item").nth(1).click()
    shown.keyboard.press("n")
    shown.wait_for_url(re.compile("token="))
    again = open_page(small_document(), shown.evaluate("location.hash"))
    assert again.inner_text("#reading") == "Rollout 1"
    assert again.input_value("#q") == "what" and again.input_value("#teacher") == "kind"
    assert texts(again, ".t.current") == texts(shown, ".t.current") != []
    # a token of the table opens the place where its KL is highest
    again.click("#tokens a.token >> nth=0")
    again.locator("#reading", has_text="Rollout 0").wait_for()
    assert again.locator(".t.current").text_content().startswith(" answer")
    assert again.input_value("#teacher") == "strict"


def test_keys(open_page: Open) -> None:
    shown = open_page(small_document())
    press = shown.keyboard.press
    press("n")
    assert shown.locator(".t.current").text_content().startswith(" is")
    press("n")
    press("n")
    assert shown.inner_text("#spoken") == "2, reverse KL 2.00 nats, teacher prefers better"
    press("p")
    assert shown.inner_text("#details h3") == "␣1"
    press("ArrowLeft")
    press("ArrowLeft")
    assert shown.inner_text("#details h3") == "␣answer"
    press("End")
    assert shown.inner_text("#details h3") == "␣Done"
    press("j")
    assert shown.inner_text("#reading") == "Rollout 1"
    press("k")
    assert shown.inner_text("#reading") == "Rollout 0"
    press("/")
    shown.keyboard.type("jn")
    assert shown.input_value("#q") == "jn" and shown.inner_text("#reading") == "Rollout 0"
    shown.fill("#q", "")
    shown.focus("#scroll")
    press("ArrowDown")
    assert shown.get_attribute("#scroll", "aria-activedescendant") == "row-1"
    press("Enter")
    assert shown.evaluate("document.activeElement.className") == "response"
    press("?")
    assert shown.locator("#keys").is_visible()
    shown.uncheck("#single")
    press("Escape")
    press("j")
    assert shown.inner_text("#reading") == "Rollout 1"  # letters are only letters now


def test_it_opens_on_the_trained_student(open_page: Open) -> None:
    """On the set that is new, if the run was evaluated; a link that names no set means the cached rollouts."""
    assert open_page(small_document(), "").input_value("#set") == "2"
    assert open_page(small_document(), "#rollout=0").input_value("#set") == "0"
    document = small_document()
    document["sets"] = document["sets"][:1]
    assert open_page(document, "").input_value("#set") == "0"


def test_before_and_after_training(open_page: Open) -> None:
    shown = open_page(small_document(), "#rollout=0")
    shown.select_option("#view", "after:0")
    marked = "nodes => nodes.map(n => n.className.trim())"
    assert shown.locator(".response .t").evaluate_all(marked) == ["t", "t l1", "t l2", "t", "t l2", "t l5", "t"]
    shown.select_option("#view", "change:0")
    assert shown.locator(".response .t").evaluate_all(marked) == [
        "t",
        "t",
        "t",
        "t l3 fallen",
        "t l4 fallen",
        "t l4",
        "t",
    ]
    assert f"{MINUS}0.48" in shown.inner_text(".worst-tokens") and "+2.00" in shown.inner_text(".worst-tokens")
    shown.select_option("#set", "2")  # held-out, after: beside the same prompt before
    assert texts(shown, "#reader h4") == ["Prompt", "Response, before training", "Response, after training"]
    words = shown.locator(".response").evaluate_all("all => all.map(r => r.querySelector('.t').firstChild.data)")
    assert words == ["before", "after"]
    shown.keyboard.press("n")
    shown.keyboard.press("n")
    assert shown.inner_text("#details h3") == "after"  # marks lead from one response to the other
    again = open_page(small_document(), "#set=2&teacher=strict&rollout=0&seek=0")
    assert again.locator(".t.current").text_content().startswith("after")


@pytest.mark.parametrize("width", [360, 900])
def test_small_screens(open_page: Open, width: int) -> None:
    shown = open_page(small_document(), size=(width, 740), has_touch=True)
    overflow = "document.documentElement.scrollWidth - innerWidth"
    assert shown.evaluate(overflow) == 0
    shown.locator(".item").first.tap()
    assert shown.locator("#index").is_visible() == (width > 760)
    assert shown.evaluate(overflow) == 0
    shown.locator(".t.l5").tap()
    sheet, token = (shown.locator(name).bounding_box() for name in ("#details", ".t.current"))
    assert sheet["y"] + sheet["height"] == 740 and token["y"] + token["height"] <= sheet["y"]
    assert shown.evaluate(overflow) == 0
    shown.keyboard.press("Escape")
    assert not shown.locator("#details").is_visible()
    if width == 360:
        shown.go_back()
        shown.locator("#index").wait_for()
        shown.locator(".item").nth(1).tap()
        shown.click(".back")
        assert shown.locator("#index").is_visible() and not shown.locator("#reader").is_visible()


CONTRAST = """([one, other]) => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const style = getComputedStyle(document.documentElement);
  const paint = (...names) => {
    for (const name of names) { canvas.fillStyle = style.getPropertyValue(name); canvas.fillRect(0, 0, 1, 1); }
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const [low, high] = [paint(...other, one), paint(...other)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(open_page: Open, scheme: str) -> None:
    shown = open_page(small_document(), color_scheme=scheme)
    for ground in (["--paper"], ["--raised"]):
        for ink in ("--ink", "--quiet", "--pen", "--good", "--accent"):
            assert shown.evaluate(CONTRAST, [ink, ground]) >= 4.5, (ink, ground)
        for wash in ("--l1", "--l2", "--l3", "--l4", "--l5", "--f", "--bar"):
            assert shown.evaluate(CONTRAST, ["--ink", [*ground, wash]]) >= 4.5, (wash, ground)
    strengths = [shown.evaluate(CONTRAST, ["--raised", ["--raised", f"--l{level}"]]) for level in range(1, 6)]
    assert strengths == sorted(strengths)  # lightness alone distinguishes the levels
    assert min(b - a for a, b in itertools.pairwise(strengths)) > 0.05


def test_many_rollouts_are_few_elements(open_page: Open) -> None:
    rows = [WORDS] * 3000
    shown = open_page(make_document(make_set(rows, {"strict": [KL] * 3000})))
    assert shown.locator(".item").count() < 30
    shown.eval_on_selector("#scroll", "node => node.scrollTop = node.scrollHeight")
    shown.locator("#row-2999").wait_for()
    assert shown.locator(".item").count() < 30
    shown.keyboard.press("k")
    assert shown.inner_text("#reading") == "Rollout 0"


def test_without_a_script(open_page: Open) -> None:
    shown = open_page(small_document(), java_script_enabled=False)
    assert "JavaScript is switched off" in shown.inner_text("#rollouts")
    assert not shown.locator("#workspace").is_visible()
    assert "50.0% → 75.0%" in shown.inner_text(".summary") and "+25.0 points" in shown.inner_text(".summary")
    assert "plateau: no <b>gain</b>" in shown.inner_text("#training")
    assert shown.locator("#training .chart").count() == 1 and shown.locator("#tokens .chart").count() == 2


def test_what_is_not_there(open_page: Open) -> None:
    shown = open_page(make_document())
    assert "No rollouts to look at" in shown.inner_text("main")
    alone = make_set([WORDS], {}, answers=None)
    alone["candidates"] |= {"at": b64([], "<u4"), "start": b64([0], "<u4")}
    shown = open_page(make_document(alone))
    assert "No teacher has scored this" in shown.inner_text(".legend")
    shown.keyboard.press("n")
    shown.hover(".t >> nth=1")
    assert shown.inner_text("#details h3") == "␣answer"


def test_print(open_page: Open) -> None:
    shown = open_page(small_document(), "#rollout=0")
    shown.emulate_media(media="print", color_scheme="dark")
    assert [shown.locator(name).is_visible() for name in ("#filters", "#index", "#details", ".response")] == [
        *(False, False, False, True)
    ]
    assert shown.evaluate(CONTRAST, ["--ink", ["--paper"]]) > 15


def test_identical_rollouts_are_listed_once(open_page: Open) -> None:
    copies = make_set([["a", "b"], ["a", "b"], ["c"]], {"strict": [[2.0, 0.0], [2.0, 0.0], [1.0]]})
    copies["rows"][1]["same_as"] = 0
    shown = open_page(make_document(copies), "#rollout=1")
    assert numbers(shown) == ["#0", "#2"] and texts(shown, "#list .copies") == ["\N{MULTIPLICATION SIGN}2"]
    assert shown.inner_text("#count") == "3 of 3 rollouts, 2 distinct"
    assert shown.inner_text("#reading") == "Rollout 0" and "2 identical rollouts" in shown.inner_text("#reader")
    shown.fill("#q", "#1")
    assert numbers(shown) == ["#0"]
