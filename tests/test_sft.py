"""Documents and chats: what of them is learnt, in which mixture, and that it is the trainer that distils."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import cache_schema as cs
from helpers import preloaded
from helpers.caches import small_recipe
from helpers.tool_templates import QWEN3, call, two_calls
from helpers.training import curve
from pipeline.cli import main
from pipeline.config import PromptsConfig, load_recipe
from pipeline.errors import ConfigError, PromptError
from pipeline.evaluate import stage as evaluate
from pipeline.sft import stage
from pipeline.sft.examples import Example, ExampleReader, mix
from pipeline.toy import asset_path, world
from pipeline.train.build import make_objective, make_replay

END, IM_END = 256, 258
CALL = call("f", {})
SMALL = ("sft.steps=4", "sft.examples_per_step=4", "sft.learning_rate=1e-3", "rollouts.prompts_per_block=8")


def reader(max_tokens: int = 64, template: str = "auto", **settings: Any) -> ExampleReader:
    tokenizer = AutoTokenizer.from_pretrained(asset_path("student"))
    tokenizer.chat_template = settings.pop("chat_template", tokenizer.chat_template)
    return ExampleReader(tokenizer, PromptsConfig(path="-", template=template, **settings), (END, IM_END), max_tokens)


def recorded(example: Example) -> tuple[str, str]:
    """The text that is only read, in place of which the learnt text has a `_` a token, and the learnt text."""
    tokenizer = AutoTokenizer.from_pretrained(asset_path("student"))
    ids = np.concatenate([example.prompt, example.response])
    learnt = np.concatenate([np.zeros(len(example.prompt), bool), example.trained])
    read = [ord("_") if is_learnt else int(token) for token, is_learnt in zip(ids, learnt, strict=True)]
    return tokenizer.decode(read), tokenizer.decode(ids[learnt])


def write(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# ----------------------------------------------------------------------------------------------------------- examples


@given(text=st.text(st.sampled_from("abc é"), min_size=1, max_size=60), max_tokens=st.integers(2, 20))
def test_every_token_of_a_document_but_its_first_is_learnt_once(text: str, max_tokens: int) -> None:
    pieces = reader(max_tokens).read({"text": text}, "f:1", "f")
    ids = [*text.encode(), END]
    assert all(len(piece.prompt) == 1 and len(piece.response) < max_tokens for piece in pieces)
    assert np.concatenate([piece.response for piece in pieces]).tolist() == ids[1:]
    assert all(piece.trained.all() for piece in pieces)
    starts = np.cumsum([0, *(len(piece.response) for piece in pieces[:-1])])
    assert [int(piece.prompt[0]) for piece in pieces] == [ids[start] for start in starts]


def test_every_turn_of_the_assistant_is_learnt_up_to_its_end() -> None:
    turns = [("system", "s"), ("user", "u"), ("assistant", "ab"), ("user", "v"), ("assistant", "c")]
    (example,) = reader(200).read({"messages": [{"role": r, "content": c} for r, c in turns]}, "f:1", "f")
    read, learnt = recorded(example)
    assert learnt == "ab<|im_end|>c<|im_end|>"
    assert read.endswith("<|im_start|>assistant\n___\n<|im_start|>user\nv<|im_end|>\n<|im_start|>assistant\n__")
    assert len(example.response) == example.trained.size and example.response[-1] == IM_END
    assert example.record["messages"][-1] == {"role": "user", "content": "v"} and example.record["source"] == "f"


def test_a_turn_that_the_template_rewrites_is_only_read() -> None:
    """As templates do that leave out the reasoning of earlier turns."""
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content if loop.last else m.content.upper() }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    turns = [("user", "u"), ("assistant", "ab"), ("user", "v"), ("assistant", "c")]
    record = {"messages": [{"role": r, "content": c} for r, c in turns]}
    (example,) = reader(200, chat_template=template.replace("m.content if loop.last else ", "")).read(
        record, "f", "f"
    )
    assert recorded(example)[1] == "AB<|im_end|>C<|im_end|>"
    with pytest.raises(PromptError, match=r"^f:1: messages\[3\]: the chat template does not continue its generation"):
        reader(200, chat_template=template).read(record, "f:1", "f")
    kept = template.replace("if loop.last", "if loop.last or m.role == 'user'")
    (example,) = reader(200, chat_template=kept).read(record, "f:1", "f")
    assert recorded(example)[1] == "c<|im_end|>"


def test_tool_calls_are_learnt_and_their_results_read() -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    line = {"messages": two_calls("a", "b", "c"), "tools": json.dumps(tools), "source": "calls"}
    (example,) = reader(400, chat_template=QWEN3).read(line, "f:1", "f")
    read, learnt = recorded(example)
    called = '<tool_call>\n{{"name": "add", "arguments": {{"x": {}}}}}\n</tool_call><|im_end|>'
    turns = [f"<think>\na\n</think>\n\n{called.format(1)}", f"<think>\nb\n</think>\n\n{called.format(2)}"]
    assert learnt == "".join([*turns, "<think>\nc\n</think>\n\n3<|im_end|>"])
    pieces = [piece.strip("_") for piece in re.split("__+", read.replace("<tool_response>", "RESPONSE"))]
    header = "<|im_start|>assistant\n"
    assert pieces == [
        f"<|im_start|>system\n{json.dumps(tools)}<|im_end|>\n<|im_start|>user\n1+2?<|im_end|>\n{header}",
        f"\n<|im_start|>user\nRESPONSE\none\n</tool_response><|im_end|>\n{header}",
        f"\n<|im_start|>user\nRESPONSE\ntwo\n</tool_response><|im_end|>\n{header}",
        "",
    ]
    assert example.record == {"source": "calls", "messages": two_calls("a", "b")[:-1], "tools": tools}


def test_a_tool_call_that_the_template_rewrites_is_refused() -> None:
    """A turn of text is only read then: that is how the template has earlier turns."""
    line = {"messages": two_calls("", "", "c")}
    with pytest.raises(
        PromptError, match=r"^f:1: messages\[1\]: the chat template writes this assistant turn in .*; set"
    ):
        reader(400, chat_template=QWEN3).read(line, "f:1", "f")


def test_sharegpt_and_what_cannot_fit(capsys: pytest.CaptureFixture[str]) -> None:
    turns = [{"from": "human", "value": "u"}, {"from": "gpt", "value": "ab"}]
    chats = reader(template_args={"enable_thinkng": True})
    examples = chats.read({"conversations": turns}, "f:1", "f")
    assert recorded(examples[0])[1] == "ab<|im_end|>"
    chats.warn_without_effect(examples)
    assert capsys.readouterr().err.count("prompts.template_args.enable_thinkng") == 1
    long = "word " * 2_000_000
    assert chats.read({"prompt": long, "response": "a"}, "f:1", "f") == []
    assert reader(template="none").read({"prompt": "a", "response": long}, "f:1", "f") == []


@pytest.mark.parametrize(
    ("writes", "message"),
    [
        ("{{ m.content }}<|im_end|>", "expected tokens before the assistant's first turn"),
        ("{% if m.role != 'assistant' %}{{ m.content }}{% endif %}", "expected tokens of the assistant's turns"),
    ],
)
def test_a_template_that_writes_nothing_to_read_or_to_learn(writes: str, message: str) -> None:
    made = reader()
    made.tokenizer.chat_template = "{% for m in messages %}" + writes + "{% endfor %}"
    with pytest.raises(PromptError, match=rf"^d:1: messages: {message}, the chat template writes none"):
        made.read({"messages": [{"role": "assistant", "content": "a"}]}, "d:1", "d")


def test_what_is_left_out_is_counted_by_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a" * 80}]}
    lines = [(f"d:{n}", value) for n, value in enumerate([{"text": ""}, chat, {"text": "a"}, {"text": ""}])]
    assert len(stage._read(reader(), "d.jsonl", lines)) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "2 of 4 documents are empty, left out" in said and "1 of 4 chats are longer than 64 tokens" in said


def test_prompt_and_response_with_and_without_a_template() -> None:
    record = {"prompt": "1+1=", "response": "2", "source": "sums", "id": 7}
    (plain,) = reader(template="none").read(record, "f:1", "f")
    assert recorded(plain) == ("1+1=__", "2<|endoftext|>") and plain.record["source"] == "sums"
    (chat,) = reader(system="S").read(record, "f:1", "f")
    assert recorded(chat)[1] == "2<|im_end|>" and recorded(chat)[0].startswith("<|im_start|>system\nS<|im_end|>")
    assert reader(5, "none").read(record, "f:1", "f") == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("a", "expected an object with text, messages"),
        ({"txt": "a"}, "expected text, messages that .*, or prompt and response, got txt"),
        ({"text": "a", "prompt": "b", "response": "c"}, "got text, prompt, response"),
        ({"prompt": "b"}, "expected text, messages"),
        ({"text": 3}, "text: expected text, got a number"),
        ({"messages": [{"role": "user", "content": "u"}]}, "ends with role user; add the reply"),
        ({"prompt": "a", "response": 1}, "response: expected text, got a number"),
        ({"text": "a", "tools": [{}]}, "tools: expected messages beside them"),
        ({"messages": [{"role": "user", "content": "u"}, CALL], "tools": {}}, "tools: expected a list of objects"),
        (
            {"messages": [{"role": "user", "content": "u"}, CALL]},
            r"messages\[1\].tool_calls: the chat template leaves",
        ),
    ],
)
def test_what_is_no_example_is_named(value: Any, message: str) -> None:
    with pytest.raises(PromptError, match=f"^data.jsonl:3: .*{message}"):
        reader().read(value, "data.jsonl:3", "data")


# ------------------------------------------------------------------------------------------------------------ mixture


@given(
    lengths=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=2, max_size=3),
    share=st.floats(0.1, 0.9),
    seed=st.integers(0, 9),
)
def test_shares_hold_at_any_time(lengths: list[list[int]], share: float, seed: int) -> None:
    def example(source: int, length: int) -> Example:
        return Example({"of": source}, np.zeros(1, np.int32), np.zeros(length, np.int32), np.ones(length, bool))

    sources = [[example(i, n) for n in of_source] for i, of_source in enumerate(lengths)]
    shares = np.array([share, *[(1 - share) / (len(sources) - 1)] * (len(sources) - 1)])
    chosen = mix(sources, shares.tolist(), 60, seed)
    tokens = np.zeros(len(sources))
    for found in chosen:
        tokens[found.record["of"]] += found.trained.sum()
        # no source is further ahead of its share than by one example
        assert (tokens / shares - (tokens / shares).min() <= 9 / shares + 1e-9).all()
    for of_source in sources:
        times = [sum(found is one for found in chosen) for one in of_source]
        assert max(times) - min(times) <= 1, "each as often as the others"


# ----------------------------------------------------------------------------------------------------------- training


def sums(n: int) -> list[dict[str, str]]:
    """Prompts of the toy with their right workings."""
    problems = world.sample("train", n, seed=0)
    return [{"prompt": problem.prompt, "response": world.solve(problem)[0]} for problem in problems]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with data files and a finished `run` on them."""
    path = tmp_path_factory.mktemp("sft")
    write(path / "sums.jsonl", sums(16))
    write(path / "facts.jsonl", [{"text": f"The code of room {n} is {n * n}."} for n in range(5)])
    assert main(command(path, path / "run")) == 0
    return path


def command(path: Path, run: Path) -> list[str]:
    settings = [part for setting in SMALL for part in ("--set", setting)]
    data = [part for name in ("sums", "facts") for part in ("--data", f"{path / name}.jsonl=0.5")]
    return ["sft", "toy", "--run", str(run), *data, *settings]


def test_the_first_loss_is_transformers_own(tuned: Path) -> None:
    """In float64, of every example alone, over the labels of its learnt tokens."""
    model = AutoModelForCausalLM.from_pretrained(asset_path("student"), dtype=torch.float64)
    round_ = cs.open(tuned / "run/data.zarr").round()
    losses = []
    recipe = stage._train_recipe(stage.with_data(small_recipe(*SMALL), [str(tuned / "facts.jsonl")]))
    assert recipe.train.loss == "cross_entropy" and recipe.train.learning_rate == 1e-3
    order = make_replay(recipe, round_, make_objective(recipe, round_, ())).order
    for number in order.step(0).tolist():
        block = round_.rollouts.read(number // round_.manifest.prompts_per_block)
        row = number % round_.manifest.prompts_per_block
        span = block.response_slice(row)
        ids = np.concatenate([block.prompt(row), block.token_ids[span]])
        labels = np.concatenate([np.full(len(block.prompt(row)), -100), block.token_ids[span]])
        labels[len(block.prompt(row)) :][block.trained[span] == 0] = -100
        with torch.no_grad():
            logits = model(torch.from_numpy(ids[None]).long()).logits[0, :-1]
        losses.append(F.cross_entropy(logits, torch.from_numpy(labels[1:]), reduction="none", ignore_index=-100))
        losses[-1] = losses[-1][torch.from_numpy(labels[1:] >= 0)]
    expected = torch.cat(losses).mean().item()
    assert curve(tuned / "run")[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_run_is_a_run(tuned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tuned / "run"
    steps = curve(run)
    assert len(steps) == 4 and {"loss", "entropy", "lr", "tokens"} <= steps[0].keys()
    assert not {"reverse_kl", "ess"} & steps[0].keys()
    ledger = json.loads((run / "ledger.json").read_text())
    assert set(ledger) == {"train"} and ledger["train"]["flops"] > 0
    card = (run / "adapter/README.md").read_text()
    assert "student fine-tuned" in card and "16 documents and chats" in card and "distill" not in card
    cache = cs.open(run / "data.zarr")
    assert not list(cs.verify(cache)) and not cache.round().scorer_names()
    learnt = {"sums": 0, "facts": 0}
    for record, block in zip(map(cache.round().prompts.__getitem__, range(16)), range(16), strict=True):
        rollouts = cache.round().rollouts.read(block // 8)
        learnt[record["source"]] += int(rollouts.trained[rollouts.response_slice(block % 8)].sum())
    assert abs(learnt["sums"] - learnt["facts"]) < 40, "half of the tokens each"
    assert main(["report", str(run), "-o", str(tuned / "report.html")]) == 0
    assert main(["inspect", str(run / "data.zarr"), "--rollout", "1"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(run / "data.zarr")]) == 0
    assert "redpen score" not in capsys.readouterr().err
    assert evaluate.run(str(run), overrides=("eval.limit=8",)) == 0
    out, err = capsys.readouterr()
    assert "accuracy, greedy" in out and "warning" not in err


def test_killed_it_goes_on_to_the_same_bits(tuned: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = preloaded.python("-m", "pipeline", *command(tuned, run))
    while process.poll() is None and not (run / "data.zarr/rounds/00000/rollouts").exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert main(command(tuned, run)) == 0
    assert curve(run) == curve(tuned / "run")
    for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (run / name).read_bytes() == (tuned / "run" / name).read_bytes()


def test_other_data_are_refused_and_nothing_is_lost(tuned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (tuned / "run/metrics.jsonl").read_bytes()
    assert main([*command(tuned, tuned / "run"), "--data", str(tuned / "sums.jsonl")]) == 1
    assert "sft.data shares must be given" in capsys.readouterr().err
    assert (
        main(["sft", "toy", "--run", str(tuned / "run"), "--data", str(tuned / "sums.jsonl"), "--set", SMALL[0]]) == 1
    )
    assert "other settings" in capsys.readouterr().err
    assert (tuned / "run/metrics.jsonl").read_bytes() == before
    with pytest.raises(ConfigError, match=r"sft\.data is not set: give --data FILE"):
        stage.run(small_recipe(), (), tuned / "nothing")
    with pytest.raises(PromptError, match="no such file"):
        stage.run(small_recipe(), [str(tuned / "gone.jsonl")], tuned / "nothing")


def test_knowledge_rises(tmp_path: Path) -> None:
    """Right workings of 32 sums, learnt by heart."""
    data = write(tmp_path / "sums.jsonl", sums(32))
    answers = [{"prompt": record["prompt"], "answer": record["response"].rpartition("=")[2]} for record in sums(32)]
    prompts = write(tmp_path / "prompts.jsonl", answers)
    settings = ("sft.steps=30", "sft.examples_per_step=8", "sft.learning_rate=3e-3", f"eval.path={prompts}")
    assert stage.run(small_recipe(*settings, "train.lora_rank=16"), [str(data)], tmp_path / "run") == 0
    assert evaluate.run(str(tmp_path / "run"), out=tmp_path / "eval.json") == 0
    found = json.loads((tmp_path / "eval.json").read_text())
    assert found["after"]["greedy"]["value"] > found["before"]["greedy"]["value"] + 0.2


def test_a_warm_up_longer_than_fine_tuning_is_refused(tmp_path: Path) -> None:
    recipe = load_recipe("company", ["train.warmup_steps=9", "sft.steps=8"])
    with pytest.raises(ConfigError, match=r"train\.warmup_steps = 9 .* sft\.steps = 8"):
        stage.run(recipe, (), tmp_path / "run")
