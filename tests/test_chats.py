"""Chats with tools, names, reasoning and parts reach the chat template as they are, and what it ignores is named."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

import cache_schema as cs
import pipeline.rollouts.stage
from pipeline.config import PromptsConfig, load_recipe
from pipeline.errors import PromptError
from pipeline.interchange import exporting, importing
from pipeline.text import template_effect
from pipeline.text.prompts import load_prompts
from pipeline.text.records import check_record
from pipeline.text.rendering import render, render_all
from pipeline.text.teacher_prompt import TeacherPrompt
from pipeline.toy import asset_path

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "unit": None}}}]
CALL = {"id": "7", "type": "function", "function": {"name": "add", "arguments": {"x": 1, "y": [2.5, None]}}}
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": [{"type": "text", "text": "1+"}, {"type": "text", "text": "2?"}], "name": "ann"},
    {"role": "assistant", "tool_calls": [CALL], "reasoning_content": "add them"},
    {"role": "tool", "content": "", "tool_call_id": "7"},
    {"role": "user", "content": "so?"},
]
KNOWS = (
    "{% if tools %}<tools>{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}<{{ m.role }} {{ m.name }} {{ m.tool_call_id }}>{{ m.reasoning_content }}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content or [] %}{{ p.text }}{% endfor %}"
    "{% endif %}{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
IGNORES = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content if m.content is string else 'x' }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SHORT = (
    "prompts.template=chat",
    "rollouts.max_prompt_tokens=300",
    "rollouts.rollouts_per_prompt=1",
    "rollouts.max_response_tokens=4",
    "rollouts.format_check_prompts=0",
)
CFG = PromptsConfig(path="p.jsonl")


def tokenizer_with(template: str) -> Any:
    tokenizer = copy.copy(AutoTokenizer.from_pretrained(asset_path("student")))
    tokenizer.chat_template = template
    return tokenizer


def test_every_field_reaches_the_template() -> None:
    record, tokenizer = check_record({"messages": CHAT, "tools": TOOLS}, "here"), tokenizer_with(KNOWS)
    assert record == {"messages": CHAT, "tools": TOOLS}
    text = tokenizer.decode(render(record, tokenizer, CFG))
    expected = tokenizer.apply_chat_template(CHAT, tools=TOOLS, add_generation_prompt=True, tokenize=False)
    assert text == expected
    for part in ("<user ann ", "1+2?", "add them", '{"x": 1, "y": [2.5, null]}', '"unit": null', "<tool  7></s>"):
        assert part in text
    own = CFG.model_copy(update={"template_args": {"tools": [{"of": "the recipe"}]}})
    assert tokenizer.decode(render(record, tokenizer, own)) == text
    assert "of the recipe" not in text and "the recipe" in tokenizer.decode(render({"prompt": "a"}, tokenizer, own))


def test_what_a_template_ignores_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """Also if it is in a late row only."""
    template_effect._warn_once.cache_clear()  # another test of this process may have been warned of the same
    records = [{"prompt": str(number)} for number in range(20)]
    render_all([*records, {"messages": CHAT, "tools": TOOLS}], tokenizer_with(KNOWS), CFG, 1000)
    assert "warning" not in capsys.readouterr().err
    render_all([*records, {"messages": CHAT, "tools": TOOLS}], tokenizer_with(IGNORES), CFG, 1000)
    lines = capsys.readouterr().err.splitlines()
    fields = ("name", "reasoning_content", "tool_calls")
    assert [line.split("leaves out ")[1].split(" in ")[0] for line in lines] == [
        *(f"{name} of messages" for name in fields),
        "tools",
    ]
    render_all([{"messages": CHAT, "tools": TOOLS}], tokenizer_with(KNOWS.replace("m.name", "0")), CFG, 1000)
    (line,) = capsys.readouterr().err.splitlines()
    assert "leaves out name of messages" in line


@pytest.mark.parametrize("template", ["{{ messages[1].content }}", "{{ messages[1].content | tojson }}"])
def test_parts_that_a_template_writes_as_code_are_refused(template: str) -> None:
    with pytest.raises(PromptError, match=r"messages\[1\]\.content: the chat template writes parts as code") as error:
        render({"messages": CHAT}, tokenizer_with(template + "{{ add_generation_prompt }}"), CFG)
    assert "\n" not in str(error.value)


def test_a_template_that_fails_over_parts_says_so() -> None:
    with pytest.raises(PromptError, match=r"refuses it: .*; messages\[1\]\.content is a list of parts"):
        render({"messages": CHAT}, tokenizer_with("{{ messages[1].content.startswith('a') }}"), CFG)


def test_tools_without_a_template_are_refused() -> None:
    plain = CFG.model_copy(update={"template": "none"})
    with pytest.raises(PromptError, match="tools need a chat template"):
        render({"prompt": "a", "tools": TOOLS}, tokenizer_with(KNOWS), plain)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tools": {"name": "add"}}, "tools: expected a list of objects (JSON schemas of functions), got an object"),
        ({"tools": ["add"]}, "tools: expected a list of objects (JSON schemas of functions), got a list of text"),
        ({"tools": "add"}, "tools: expected a list of objects (JSON schemas of functions), got text"),
        ({"content": [{"type": "image", "url": "x"}]},
         'messages[0].content[0]: expected a part {type: text, text: ...}, got type "image"'),
        ({"content": [{"type": "text", "text": 1}]}, "messages[0].content[0].text: expected text, got a number"),
        ({"content": []}, "messages[0].content: expected text, got an empty one"),
        ({"content": None}, "messages[0]: expected role and content, got role"),
        ({"content": None, "role": "assistant", "tool_calls": [CALL]}, "ends before the student's turn"),
        ({"name": float("inf")}, "messages[0].name: expected text, or numbers"),
    ],
)  # fmt: skip
def test_what_is_no_chat_is_one_line(fields: dict[str, Any], message: str) -> None:
    tools = {name: fields.pop(name) for name in ("tools",) if name in fields}
    with pytest.raises(PromptError) as error:
        check_record({"messages": [{"role": "user", "content": "a"} | fields], **tools}, "p.jsonl:3")
    assert str(error.value).startswith("p.jsonl:3: ") and message in str(error.value) and "\n" not in str(error.value)


def test_a_teachers_text_takes_the_place_of_the_last_user_message_alone() -> None:
    record = {"messages": CHAT, "tools": TOOLS, "solution": "3"}
    read = TeacherPrompt("{{ solution }}; {{ prompt }}").read(record)
    assert read["messages"] == [*CHAT[:-1], {"role": "user", "content": "3; so?"}] and read["tools"] == TOOLS
    (first, *_), asked = TeacherPrompt(prefix="think. ").read(record)["messages"][1:], CHAT[1]
    assert first == asked | {"content": "think. 1+2?"}


def test_chats_travel_through_cache_export_and_parquet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"messages": CHAT, "tools": TOOLS, "answer": "3"}, {"prompt": "1+1*1=", "answer": "2"}]
    texts = {"messages": [json.dumps(CHAT), None], "tools": [json.dumps(TOOLS), None], "answer": ["3", "2"]}
    pq.write_table(pa.table({**texts, "prompt": [None, "1+1*1="]}), tmp_path / "p.parquet")
    recipe = load_recipe("toy", [f"prompts.path={tmp_path / 'p.parquet'}", *SHORT])
    assert load_prompts(recipe.prompts) == rows
    with pytest.raises(PromptError, match=r"writes parts as code|refuses it"):  # the toy's template knows text alone
        pipeline.rollouts.stage.run(recipe, str(tmp_path / "c.zarr"))
    rows[1]["teacher_messages"] = [{"role": "user", "content": "1+1*1=?"}]
    rows[0]["messages"] = [m | {"content": "1+2?"} if m.get("name") else {"content": ""} | m for m in CHAT]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = load_recipe("toy", [f"prompts.path={tmp_path / 'p.jsonl'}", *SHORT])
    assert pipeline.rollouts.stage.run(recipe, str(tmp_path / "c.zarr")) == 0
    assert "leaves out tool_calls of messages" in capsys.readouterr().err
    assert exporting.run(str(tmp_path / "c.zarr"), str(tmp_path / "r.parquet")) == 0
    assert importing.run(str(tmp_path / "r.parquet"), recipe, str(tmp_path / "back.zarr")) == 0
    for name in ("c.zarr", "back.zarr"):
        round_ = cs.open(tmp_path / name).round()
        assert [round_.prompts[index] for index in range(2)] == rows
    assert round_.manifest.engine == "transformers", "restored, not imported anew"
