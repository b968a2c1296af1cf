"""Every stage with a real model: SmolLM2-135M-Instruct learns to answer as it does under a system message.

Not part of `make test`: .ci/run makes the model (`helpers.real_model`) and runs these tests by `-m real`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import cache_schema as cs
from helpers import browser, real_model
from pipeline import cli

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]

SYSTEM = "You are a pirate. Begin every answer with Arr, matey!"
QUESTIONS = [
    "What is the capital of France?",
    "Name three fruits.",
    "Why is the sky blue?",
    "How do I boil an egg?",
    "What does a doctor do?",
    "Write one sentence about the sea.",
]
HELD_OUT = ["What is the capital of Italy?", "Name three animals."]
RECIPE = """
[student]
model = "{model}"
dtype = "float32"

[[teacher]]
name = "same"
model = "{model}"
dtype = "float32"

[[teacher]]
name = "pirate"
model = "{model}"
dtype = "float32"
template = "chat"
system = "{system}"

[prompts]
path = "{prompts}"

[rollouts]
rollouts_per_prompt = 2
max_prompt_tokens = 64
max_response_tokens = 24

[train]
teacher = "pirate"
steps = {steps}
prompts_per_step = 6
learning_rate = 1e-3
lora_rank = 32
stop_reverse_kl = 0.0
share_prompts_from = 1
gradient_checkpointing = false

[eval]
path = "{held_out}"
"""
STEPS = 4


@dataclass(frozen=True)
class Experiment:
    model: Path
    cache: Path
    run: Path
    merged: Path
    page: Path


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """All commands, one after the other."""
    model = real_model.need()
    folder = tmp_path_factory.mktemp("real")
    files = {"prompts": QUESTIONS, "held_out": HELD_OUT}
    for name, questions in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": q}) + "\n" for q in questions))
    paths = {name: folder / f"{name}.jsonl" for name in files}
    recipe, cache, run = folder / "recipe.toml", folder / "cache.zarr", folder / "run"
    recipe.write_text(RECIPE.format(model=model, system=SYSTEM, steps=STEPS, **paths))

    def redpen(*args: object) -> None:
        assert cli.main([str(arg) for arg in args]) == 0, args

    redpen("rollouts", recipe, "--cache", cache)
    redpen("score", recipe, "--cache", cache)
    redpen("diagnose", cache, "--teacher", "pirate")
    redpen("train", recipe, "--cache", cache, "--run", run)
    redpen("eval", run)
    redpen("merge", run, "-o", folder / "merged")
    redpen("report", run, "-o", folder / "page.html")
    return Experiment(model, cache, run, folder / "merged", folder / "page.html")


#: Its rollout has exactly 200 tokens: nothing stops it.
CHAT = """Explain this function \N{SNAKE} and improve it:

```python
def total(items):
    return sum(x for x in items if x % 2 == 0)
```
"""
LONG = """
[student]
model = "{model}"
dtype = "float32"

[teacher]
model = "{model}"
dtype = "float32"
system = "{system}"

[prompts]
path = "{prompts}"
template = "chat"

[rollouts]
rollouts_per_prompt = 1
max_prompt_tokens = 128
max_response_tokens = 200
stop_token_ids = [49151]
"""


@pytest.fixture(scope="module")
def long_chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a cache with one long chat."""
    model = real_model.need()
    folder = tmp_path_factory.mktemp("long")
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": CHAT}) + "\n")
    (folder / "recipe.toml").write_text(LONG.format(model=model, system=SYSTEM, prompts=folder / "prompts.jsonl"))
    for command in (["rollouts", folder / "recipe.toml", "--cache"], ["score", folder / "recipe.toml", "--cache"]):
        assert cli.main([*map(str, command), str(folder / "c.zarr")]) == 0
    assert cli.main(["report", str(folder / "c.zarr"), "-o", str(folder / "page.html")]) == 0
    return folder / "page.html"


def reverse_kl(experiment: Experiment, teacher: str) -> np.ndarray:
    """Nats of every cached token, over candidates and rest, by its formula."""
    round_ = cs.open(experiment.cache).round()
    student, scores = round_.scores(cs.STUDENT).read(0), round_.scores(teacher).read(0)

    def buckets(block: cs.ScoreBlock) -> np.ndarray:
        assert block.candidate_logprobs is not None and block.rest_logprob is not None
        return np.concatenate([block.candidate_logprobs, block.rest_logprob[:, None]], 1).astype(np.float64)

    p, q = buckets(student), buckets(scores)
    return (np.exp(p) * (p - q)).sum(1)


def test_prompts_are_rendered_by_the_chat_template(experiment: Experiment) -> None:
    tokenizer = AutoTokenizer.from_pretrained(experiment.model)
    block = cs.open(experiment.cache).round().rollouts.read(0)
    for i, question in enumerate(QUESTIONS):
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert "<|im_start|>assistant" in text
        assert tokenizer.decode(block.prompt_ids(i)) == text


def test_a_teacher_that_is_the_student_has_its_logprobs(experiment: Experiment) -> None:
    assert np.abs(reverse_kl(experiment, "same")).max() < 1e-6
    round_ = cs.open(experiment.cache).round()
    gap = round_.scores(cs.STUDENT).read(0).logprobs - round_.rollouts.read(0).rollout_logprobs
    assert np.abs(gap).max() < 1e-3, "the sampler's log-probs are the scorer's"


def test_training_lowers_the_cached_reverse_kl(experiment: Experiment) -> None:
    curve = [json.loads(line) for line in (experiment.run / "metrics.jsonl").read_text().splitlines()]
    assert len(curve) == STEPS
    before = reverse_kl(experiment, "pirate").mean()
    assert before > 0.05, "the system message matters"
    assert math.isclose(curve[0]["reverse_kl"], before, rel_tol=1e-3) and curve[0]["ess"] > 0.9999
    assert curve[-1]["reverse_kl"] < 0.8 * before


def test_evaluation_has_figures_of_fresh_rollouts(experiment: Experiment) -> None:
    figures = json.loads((experiment.run / "eval.json").read_text())
    before, after = (figures[label]["reverse_kl"]["value"] for label in ("before", "after"))
    assert after > 0 and before > 0
    assert cs.open(experiment.run / "eval.zarr").round_indices() == [0, 1]


def test_the_merged_model_answers_otherwise(experiment: Experiment) -> None:
    tokenizer = AutoTokenizer.from_pretrained(experiment.model)
    messages = [{"role": "user", "content": HELD_OUT[0]}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)

    def answer(model: Path) -> str:
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        out = loaded.generate(**ids, max_new_tokens=24, do_sample=False)
        return str(tokenizer.decode(out[0, ids["input_ids"].shape[1] :]))

    before, after = answer(experiment.model), answer(experiment.merged)
    print(before, "->", after)
    assert before and after and before != after


@dataclass(frozen=True)
class Shown:
    size: tuple[int, int]
    is_phone: bool


@pytest.mark.parametrize("shown", [Shown((1360, 900), False), Shown((390, 844), True)], ids=["desktop", "phone"])
def test_the_page_shows_chats_of_200_tokens(long_chat: Path, shown: Shown) -> None:
    """Newlines, code and an emoji in the prompt, a long response: nothing is lost or lies beside the page."""
    with browser.chromium() as chromium:
        width, height = shown.size
        context = chromium.new_context(
            viewport={"width": width, "height": height}, has_touch=shown.is_phone, is_mobile=shown.is_phone
        )
        page, wrong = context.new_page(), []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(f"{long_chat.as_uri()}#rollout=0")
        overflow = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        prompt, response = page.locator("#reader .prompt").inner_text(), page.locator("#reader .response")
        assert all(line.strip() in prompt for line in CHAT.splitlines() if line)
        assert response.locator(".t").count() == 200 and "\n" in response.inner_text()
        about = page.locator(".summary").inner_text()
        assert wrong == [] and overflow <= 0
        model = real_model.find()
        assert model is not None and model.name in about and str(model) not in about


def test_the_page_opens(experiment: Experiment) -> None:
    with browser.chromium() as chromium:
        page, wrong = chromium.new_page(), []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(experiment.page.as_uri())
        text = page.locator("body").inner_text()
        assert HELD_OUT[1] in text and "after training" in text, "the page opens on what is new"
        assert wrong == []
