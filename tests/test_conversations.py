"""Finished conversations with tool calls: their tokens, which of them are trained, and all that is done with them."""

from __future__ import annotations

import base64
import itertools
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from transformers import AutoModelForCausalLM

import cache_schema as cs
from helpers.tool_templates import QWEN3, call, family_tokenizer, two_calls
from helpers.training import curve
from pipeline import cli
from pipeline.config import PromptsConfig, Recipe, load_recipe
from pipeline.diagnose.read import read_round
from pipeline.errors import PromptError, RedpenError
from pipeline.interchange import importing
from pipeline.models.resolve import resolve
from pipeline.report import inspect
from pipeline.score.summary import summarize
from pipeline.text.assistant_turns import ConversationTokens, render_conversation
from pipeline.text.detokenize import response_texts
from pipeline.text.prompts import raw_rows
from pipeline.text.rendering import render
from pipeline.toy import asset_path

CFG = PromptsConfig(path="-")
TOOLS = [{"type": "function", "function": {"name": "add"}}]

OTHERWISE = "the chat template writes this assistant turn in another way when other messages follow"
LEFT_OUT = "the chat template leaves it out of the assistant's turn"

#: The text of a conversation in pieces: what is only read, and, in turn, what the assistant wrote.
Pieces = list[str]

QWEN3_WRITES = [
    "<|im_start|>user\n1+2?<|im_end|>\n<|im_start|>assistant\n",
    '<think>\na\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call><|im_end|>',
    "\n<|im_start|>user\n<tool_response>\none\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
    '<think>\nb\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"x": 2}}\n</tool_call><|im_end|>',
    "\n<|im_start|>user\n<tool_response>\ntwo\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
    "<think>\nc\n</think>\n\n3<|im_end|>",
    "\n",
]
LLAMA3_WRITES = [
    "<|start_header_id|>user<|end_header_id|>\n\n1+2?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    '{"name": "add", "parameters": {"x": 1}}<|eot_id|>',
    "<|start_header_id|>ipython<|end_header_id|>\n\none<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    '{"name": "add", "parameters": {"x": 2}}<|eot_id|>',
    "<|start_header_id|>ipython<|end_header_id|>\n\ntwo<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "3<|eot_id|>",
]
GPT_OSS_WRITES = [
    "<|start|>user<|message|>1+2?<|end|><|start|>assistant",
    ' to=functions.add<|channel|>commentary json<|message|>{"x": 1}<|call|>',
    '<|start|>functions to=assistant<|channel|>commentary<|message|>"one"<|end|><|start|>assistant',
    ' to=functions.add<|channel|>commentary json<|message|>{"x": 2}<|call|>',
    '<|start|>functions to=assistant<|channel|>commentary<|message|>"two"<|end|><|start|>assistant',
    "<|channel|>analysis<|message|>c<|end|><|start|>assistant<|channel|>final<|message|>3<|return|>",
]


def rendered(family: str, messages: list[dict[str, Any]], **settings: Any) -> tuple[ConversationTokens, Any]:
    tokenizer, stop_ids = family_tokenizer(family)
    return render_conversation(messages, tokenizer, CFG, stop_ids, **settings), tokenizer


def ids_of(pieces: Pieces, tokenizer: Any) -> list[list[int]]:
    return [tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in pieces]


@pytest.mark.parametrize(
    ("family", "messages", "pieces"),
    [
        ("qwen3", two_calls("a", "b", "c"), QWEN3_WRITES),
        ("llama3", two_calls(), LLAMA3_WRITES),
        ("gpt-oss", [*two_calls()[:-1], {"role": "assistant", "content": "3", "thinking": "c"}], GPT_OSS_WRITES),
    ],
)
def test_two_calls_by_hand(family: str, messages: list[dict[str, Any]], pieces: Pieces) -> None:
    found, tokenizer = rendered(family, messages)
    by_piece = ids_of(pieces, tokenizer)
    assert found.ids.tolist() == [token for ids in by_piece for token in ids]
    assert found.trained.tolist() == [n % 2 == 1 for n, ids in enumerate(by_piece) for _ in ids]
    assert len(found.turns) == 3 and not found.faults
    asked = render({"messages": messages[:1]}, tokenizer, CFG)
    assert found.ids[: found.turns[0][0]].tolist() == asked, "the prompt is the one that a rollout begins with"


def test_ids_of_a_turn_by_hand() -> None:
    """257 and 258 are <|im_start|> and <|im_end|>, the others bytes."""
    found, _ = rendered("qwen3", [{"role": "user", "content": "u"}, call("f", {})])
    called = [*b'<think>\n\n</think>\n\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>', 258]
    assert found.ids.tolist() == [257, *b"user\nu", 258, 10, 257, *b"assistant\n", *called, 10]
    assert found.turns == ((20, 20 + len(called)),)


REFUSED = {
    "reasoning only at the end": (
        "qwen3",
        two_calls("", "", "c"),
        f'messages[1]: {OTHERWISE}: "ool_call>',
    ),
    "reasoning before another question": (
        "qwen3",
        [*two_calls("a", "b", "c"), {"role": "user", "content": "u"}, {"role": "assistant", "content": "4"}],
        f"messages[1]: {OTHERWISE}",
    ),
    "reasoning under another name": (
        "qwen3",
        two_calls("a", "b", "c", field="thinking"),
        f"messages[1].thinking: {LEFT_OUT}",
    ),
    "several calls at once": (
        "llama3",
        [*two_calls()[:1], {**call("add", {}), "tool_calls": call("add", {})["tool_calls"] * 2}],
        "the chat template refuses it: TemplateError: only single tool-calls at once",
    ),
    "text beside a call": (
        "llama3",
        [*two_calls()[:1], {**call("add", {}), "content": "I add."}],
        f"messages[1].content: {LEFT_OUT}",
    ),
    "a call of several": (
        "gpt-oss",
        [
            *two_calls()[:1],
            {**call("a", {}), "tool_calls": [*call("a", {})["tool_calls"], *call("b", {})["tool_calls"]]},
        ],
        f"messages[1].tool_calls[1]: {LEFT_OUT}",
    ),
    "reasoning before a final answer": (
        "gpt-oss",
        two_calls("a", "b", "c", field="thinking"),
        f'messages[1]: {OTHERWISE}: " to=function", at the end "<|channel|>analysis<|message|>a<|end|>"',
    ),
    "a final answer within": (
        "gpt-oss",
        [*two_calls(), {"role": "user", "content": "u"}, {"role": "assistant", "content": "4"}],
        f'messages[5]: {OTHERWISE}: "<|end|>',
    ),
    "arguments that are no JSON": (
        "llama3",
        [*two_calls()[:1], call("add", "{x")],
        'messages[1].tool_calls[0]: arguments: expected an object or the text of one in JSON, got "{x"',
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_template_does_not_keep_is_refused(name: str) -> None:
    family, messages, message = REFUSED[name]
    try:
        found, _ = rendered(family, messages)
        fault = found.faults[0]
    except PromptError as error:
        fault = str(error)
    assert fault.startswith(message) and "\n" not in fault


def test_a_template_whose_generation_prompt_is_not_what_it_writes() -> None:
    tokenizer, stop_ids = family_tokenizer("qwen3")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "'<|im_start|>assistant\\n' }}{% endif %}", "'A:' }}{% endif %}"
    )
    found = render_conversation(two_calls("a", "b", "c"), tokenizer, CFG, stop_ids)
    assert not found.turns and len(found.faults) == 3
    assert found.faults[0] == (
        "messages[1]: the chat template does not continue its generation prompt with the assistant's turn: the "
        'prompt has "A:", the turn "<|im_start|>assistant\\n<"'
    )


def test_a_header_after_the_last_turn_is_no_fault() -> None:
    """As the first templates of Llama 3 write it, with or without a generation prompt."""
    tokenizer, stop_ids = family_tokenizer("llama3")
    tokenizer.chat_template = tokenizer.chat_template.replace("{%- if add_generation_prompt %}", "{%- if true %}")
    found = render_conversation(two_calls(), tokenizer, CFG, stop_ids)
    assert [tokenizer.decode(found.ids[a:b].tolist()) for a, b in found.turns] == LLAMA3_WRITES[1::2]


# ------------------------------------------------------------------------------------------------------------ import


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy student with a template that knows tools."""
    path = tmp_path_factory.mktemp("models") / "student"
    shutil.copytree(asset_path("student"), path)
    (path / "chat_template.jinja").write_text(QWEN3)
    return path


def recipe_of(student: Path, *overrides: str) -> Recipe:
    return load_recipe("toy", [*settings_of(student), *overrides])


def settings_of(student: Path) -> list[str]:
    lengths = ["rollouts.max_prompt_tokens=160", "rollouts.max_response_tokens=340"]
    small = ["rollouts.prompts_per_block=2", "train.prompts_per_step=2", "train.steps=1", "train.lora_rank=4"]
    answers = ["eval.answer_pattern=([0-9])$", "train.stop_reverse_kl=0"]
    return [f"student.model={student}", "prompts.template=chat", *lengths, *small, *answers]


def rows() -> list[dict[str, Any]]:
    """Two traces of one prompt with tools, and one of another that ends with a call."""
    longer = [*two_calls("a", "b", "c"), {"role": "user", "content": "Thanks."}]
    shorter = [{"role": "user", "content": "1+2?"}, {"role": "assistant", "content": "3", "reasoning_content": "d"}]
    called = [{"role": "user", "content": "u"}, {**call("f", {}), "reasoning_content": "e"}]
    return [
        {"messages": longer, "tools": TOOLS, "answer": "3", "finish_reason": "stop"},
        {"messages": called, "source": "calls"},
        {"messages": shorter, "tools": TOOLS, "answer": "3"},
    ]


def written(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    """The rows as JSONL, or as Parquet, which has messages and tools as JSON."""
    if path.suffix == ".parquet":
        as_json = ("messages", "tools")
        flat = [{k: json.dumps(v) if k in as_json else v for k, v in row.items()} for row in rows]
        parquet.write_table(
            pa.table({k: [row.get(k) for row in flat] for k in {k for row in flat for k in row}}), path
        )
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


WITH_TOOLS = '<|im_start|>system\n[{"type": "function", "function": {"name": "add"}}]<|im_end|>\n'


def test_fields_that_arrow_fills_in_are_not_part_of_a_call(student: Path, tmp_path: Path) -> None:
    """Parquet has one type for the arguments of all calls, so that each gets the fields of the others, as null."""

    def asked(arguments: dict[str, Any], properties: dict[str, Any]) -> dict[str, Any]:
        parameters = {"type": "object", "properties": properties}
        tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
        called = {**call("f", arguments), "reasoning_content": "e"}
        return {"messages": [{"role": "user", "content": "u"}, called], "tools": tools}

    found = [asked({"x": 1}, {"x": {"type": "integer"}}), asked({"city": "Rome"}, {"city": {"type": "string"}})]
    written(tmp_path / "a.jsonl", found)
    parquet.write_table(pa.Table.from_pylist(found), tmp_path / "a.parquet")
    assert parquet.read_table(tmp_path / "a.parquet").to_pylist() != found
    for name in ("a.jsonl", "a.parquet"):
        assert [value for _, value in raw_rows(PromptsConfig(path=str(tmp_path / name)))] == found
        importing.run(str(tmp_path / name), recipe_of(student), str(tmp_path / f"{name}.zarr"))
    assert_same_blocks(*(cs.open(tmp_path / f"a.{kind}.zarr").round() for kind in ("jsonl", "parquet")))


def assert_same_blocks(ours: cs.Round, theirs: cs.Round) -> None:
    assert ours.manifest.prompts_sha256 == theirs.manifest.prompts_sha256
    np.testing.assert_equal(vars(ours.rollouts.read(0)), vars(theirs.rollouts.read(0)))


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet"])
def test_traces_are_imported(name: str, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_of(student)
    assert importing.run(written(tmp_path / name, rows()), recipe, str(tmp_path / "c")) == 0
    out, err = capsys.readouterr()
    assert "1 conversations have messages after the last assistant turn" in " ".join(err.split())
    round_, tokenizer = cs.open(str(tmp_path / "c")).round(), resolve(recipe.student).tokenizer
    assert list(cs.verify(round_.cache)) == [] and round_.manifest.template["kind"] == "chat"
    block = round_.rollouts.read(0)
    asked = {"messages": [{"role": "user", "content": "1+2?"}], "tools": TOOLS, "answer": "3"}
    assert [round_.prompts[n] for n in range(2)] == [
        asked,
        {"messages": rows()[1]["messages"][:1], "source": "calls"},
    ]
    whole = ids_of(QWEN3_WRITES, tokenizer)
    expected = [
        [(n % 2, token) for n, ids in enumerate(whole[1:-1], 1) for token in ids],
        [(1, token) for token in [*b"<think>\nd\n</think>\n\n3", 258]],
        [(1, token) for token in ids_of(["<think>\ne\n</think>\n\n" + CALLED], tokenizer)[0]],
    ]
    assert block.prompt_ids(0).tolist() == ids_of([WITH_TOOLS + QWEN3_WRITES[0]], tokenizer)[0]
    assert block.sample_index.tolist() == [0, 1, 0] and (block.finish_reason == cs.FINISH_STOP).all()
    for row, pairs in enumerate(expected):
        span = block.response_slice(row)
        assert list(zip(block.trained[span].tolist(), block.token_ids[span].tolist(), strict=True)) == pairs
    assert np.isnan(block.rollout_logprobs).all()
    n_trained = sum(is_trained for pairs in expected for is_trained, _ in pairs)
    assert f"{block.n_tokens} tokens, {n_trained} of them trained" in out


CALLED = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><|im_end|>'

BAD_ROWS = {
    "the template rewrites it": (
        {"messages": two_calls("", "", "c")},
        f'messages[1]: {OTHERWISE}: "ool_call>',
    ),
    "no prompt": ({"messages": [{"role": "assistant", "content": "a"}]}, "messages[0]: expected a prompt before"),
    "a mask without ids": (
        {"messages": two_calls("a", "b", "c"), "loss_mask": [1]},
        "loss_mask: expected response_tokens beside it, got none; give both, or neither",
    ),
    "scores without ids": (
        {"messages": two_calls("a", "b", "c"), "teacher_log_probs": [-1.0]},
        "teacher_log_probs: expected response_tokens beside it",
    ),
    "cut": (
        {"messages": two_calls("a", "b", "c"), "finish_reason": "length"},
        "finish_reason: expected a conversation that ended, got length; remove the row",
    ),
    "too long": (
        {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a" * 40_000}]},
        "messages: expected at most 500 tokens, got at least",
    ),
    "no text": (
        {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": 3}]},
        "messages[1].content: expected text, got a number",
    ),
    "neither": (
        {"messages": [{"role": "user", "content": "u"}]},
        "response_tokens: expected the ids that the student sampled, or messages with the assistant's turns",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_row_that_is_no_trace_is_named(name: str, student: Path, tmp_path: Path) -> None:
    row, message = BAD_ROWS[name]
    with pytest.raises(RedpenError) as error:
        importing.run(written(tmp_path / "x.jsonl", [rows()[2], row]), recipe_of(student), str(tmp_path / "c"))
    assert str(error.value).startswith(f"{tmp_path / 'x.jsonl'}:2: {message}") and "\n" not in str(error.value)
    assert "(1 of 2 rows are at fault; nothing was written)" in str(error.value) and not (tmp_path / "c").exists()


def test_turns_that_end_with_another_token_are_warned_of(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of(student, "rollouts.stop_token_ids=[256]")
    assert importing.run(written(tmp_path / "x.jsonl", rows()[1:2]), recipe, str(tmp_path / "c")) == 0
    assert "1 conversations, as the chat template writes them, do not end with one of the stop ids 256" in " ".join(
        capsys.readouterr().err.split()
    )


# ------------------------------------------------------------------------------------------- what is done with them


@pytest.fixture(scope="module")
def trained(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the traces as a scored cache `c`, a `run` of one step on it, and its report."""
    path = tmp_path_factory.mktemp("traces")
    file, settings = (
        written(path / "x.jsonl", rows()),
        [part for one in settings_of(student) for part in ("--set", one)],
    )
    for command in (
        ["import", file, "toy", "--cache", str(path / "c"), *settings],
        ["score", "toy", "--cache", str(path / "c"), *settings],
        ["train", "toy", "--cache", str(path / "c"), "--run", str(path / "run"), *settings],
        ["report", str(path / "run"), "-o", str(path / "r.html")],
    ):
        assert cli.main(command) == 0
    return path


def kl_by_hand(path: Path, student: Path) -> tuple[list[float], int]:
    """KL(student || teacher) in float64 at every trained token, from the logits, and how many tokens there are."""
    models = [AutoModelForCausalLM.from_pretrained(m, dtype=torch.float64) for m in (student, asset_path("teacher"))]
    round_ = cs.open(str(path / "c")).round()
    rollouts, candidates = round_.rollouts.read(0), round_.scores("student").read(0).candidate_ids
    found: list[float] = []
    for row in range(rollouts.n_rows):
        span, prompt = rollouts.response_slice(row), rollouts.prompt(row)
        ids = torch.from_numpy(np.concatenate([prompt, rollouts.response(row)]))[None].long()
        with torch.no_grad():
            own, theirs = (model(ids).logits[0, len(prompt) - 1 : -1].softmax(-1) for model in models)
        for position, is_trained in enumerate(rollouts.trained[span]):
            if is_trained:
                columns = torch.from_numpy(candidates[span][position]).long()
                p, q = own[position, columns], theirs[position, columns]
                p, q = torch.cat([p, 1 - p.sum()[None]]), torch.cat([q, 1 - q.sum()[None]])
                found.append(float((p * (p / q).log()).sum()))
    return found, rollouts.n_tokens


def test_the_loss_is_over_the_assistants_tokens_alone(trained: Path, student: Path) -> None:
    kl, n_tokens = kl_by_hand(trained, student)
    (step,) = curve(trained / "run")
    assert step["loss"] == pytest.approx(np.mean(kl), rel=1e-5)
    assert step["reverse_kl"] == pytest.approx(np.mean(kl), rel=1e-5)
    assert step["tokens"] == len(kl) < n_tokens


def test_every_figure_is_over_the_assistants_tokens_alone(
    trained: Path, student: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kl, _ = kl_by_hand(trained, student)
    cache = cs.open(str(trained / "c"))
    score = inspect.summary(cache)["rounds"][0]["scores"][1]
    assert score["reverse_kl"] == pytest.approx(np.mean(kl), rel=1e-5) and score["reverse_kl_tokens"] == len(kl)
    assert f"reverse KL {np.mean(kl):.4g} nats a token" in summarize(cache.round(), "teacher")
    (shown,) = [s for s in document_of(trained / "r.html")["sets"] if s["kind"] == "cache"]
    assert shown["totals"] == {"teacher": {"kl": pytest.approx(np.mean(kl), rel=1e-5), "tokens": len(kl)}}
    cli.main(["diagnose", str(trained / "c"), "--json"])  # it finds that the toys know nothing of such text
    figures = json.loads(capsys.readouterr().out)["figures"]["teacher"]
    assert figures["reverse_kl"] == pytest.approx(np.mean(kl), rel=1e-5)
    sample, rollouts = read_round(cache.round(), ["teacher"]), cache.round().rollouts.read(0)
    assert sample is not None
    own = np.where(rollouts.trained == 1, cache.round().scores("student").read(0).sampling_logprobs, 0.0)
    by_row = [own[rollouts.response_slice(row)].sum(dtype=np.float64) for row in range(3)]
    assert sample.responses.logprob.tolist() == pytest.approx(by_row)
    assert sample.pairs["teacher"].tokens.stop.sum() == 5, "at the end of each turn"


def test_the_page_has_the_text_and_what_is_trained(trained: Path) -> None:
    document = document_of(trained / "r.html")
    (shown,) = [s for s in document["sets"] if s["kind"] == "cache"]
    (row,) = [row for row in shown["rows"] if row["number"] == 0]
    at = slice(row["start"], row["start"] + row["length"])
    tokens = np.frombuffer(base64.b64decode(shown["tokens"]), "<u4")[at]
    marked = np.frombuffer(base64.b64decode(shown["trained"]), "u1")[at]
    texts = [shown["strings"][token][1] for token in tokens]
    parts = [
        "".join(text for _, text in part)
        for _, part in itertools.groupby(zip(marked, texts, strict=True), lambda p: p[0])
    ]
    assert parts == QWEN3_WRITES[1:-1] and marked[0] == 1
    assert row["prompt"] == WITH_TOOLS + QWEN3_WRITES[0] and row["right"] is True


def test_an_answer_is_what_the_assistant_said_last() -> None:
    """Not what a tool returned; with a mask that ends early, what is before."""
    tokenizer = family_tokenizer("qwen3")[0]
    masks = {"1": "aaatttbbb", "2": "aaattt...", "3": "...tttbbb", "4": "........."}
    rows = [
        cs.RolloutRow(0, n, list(text.encode()), [0.0] * 9, cs.FINISH_OTHER, [mark in "ab" for mark in mask])
        for n, (text, mask) in enumerate((f"{name}{mask[1:]}", mask) for name, mask in masks.items())
    ]
    block = cs.RolloutBlock.from_rows([(0, [65])], rows)
    assert response_texts(block, tokenizer) == ["bbb", "2aa", "bbb", "4........"]


def test_inspect_says_what_is_not_trained(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(trained / "c"), "--rollout", "0"]) == 0
    out = capsys.readouterr().out
    n_trained = sum(len(ids) for ids in ids_of(QWEN3_WRITES[1::2], family_tokenizer("qwen3")[0]))
    assert f" tokens, {n_trained} of them trained on, finished by stop" in out
    read = QWEN3_WRITES[2].replace("\n", "↵\n")
    assert f"⟨{read}⟩" in out and "⟨⟩ not written by the student, not trained on" in out
    assert cli.main(["inspect", str(trained / "c"), "--rollout", "1"]) == 0
    assert "trained on" not in capsys.readouterr().out


def document_of(page: Path) -> dict[str, Any]:
    """The data of a report."""
    found = re.search(r'<script[^>]*type="application/json"[^>]*>(.*?)</script>', page.read_text(), re.DOTALL)
    assert found is not None
    return dict(json.loads(found[1]))
