"""Prompts: every bad line is named, every good one becomes the tokens it should."""

from __future__ import annotations

import contextlib
import copy
import datetime
import json
import math
import os
import random
import sys
import types
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import cache_schema as cs
import pipeline.text.chat_template
import pipeline.text.prompts
import pipeline.text.token_length
from pipeline.config import PromptsConfig
from pipeline.errors import PromptError
from pipeline.text.chat_template import Renderer, chat_text
from pipeline.text.prompts import load_prompts
from pipeline.text.records import check_record
from pipeline.text.rendering import render, render_all, template_identity
from pipeline.text.template_effect import without_effect
from pipeline.text.token_length import least_tokens
from pipeline.toy import asset_path

CHAT = [{"role": "user", "content": "hi"}]


def config(path: object, **settings: Any) -> PromptsConfig:
    return PromptsConfig(path=str(path), **settings)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(asset_path("student"))


def load(tmp_path: Path, content: bytes, **settings: Any) -> list[dict[str, Any]]:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    return load_prompts(config(path, **settings))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "prompts.jsonl: expected at least one prompt, the file holds none"),
        (b"\n\n", "expected at least one prompt"),
        (b'{"prompt": "a"}\n{"prompt": \n', "prompts.jsonl:2: expected one JSON object on each line"),
        (b'[\n{"prompt": "a"}\n]', "prompts.jsonl:1: expected one JSON object on each line"),
        (b'["a"]', "prompts.jsonl:1: expected an object with prompt or messages, got a list"),
        (b'"a"', "got text"),
        (b"\xff\xfe", "prompts.jsonl:1: expected UTF-8, got byte 0xff in column 1"),
        (b"[" * 100_000, "prompts.jsonl:1: expected one JSON object"),
        (b'{"id": ' + b"9" * 5000 + b"}", "prompts.jsonl:1: expected one JSON object"),
        (b'{"id": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", "got JSON that is nested too deeply"),
        (b"{}", "prompts.jsonl:1: expected prompt or messages, got fields none"),
        (b'{"prompt": null}', "expected prompt or messages, got fields prompt"),
        (b'{"promt": "a"}', "got fields promt; is promt your prompt?"),
        (b'{"question": "a"}', "got fields question; name the field with the text prompt"),
        (b'{"prompt": "a", "messages": []}', "expected either prompt or messages, got both"),
        (b'{"prompt": ""}', "prompt: expected text, got an empty one"),
        (b'{"prompt": " \\n"}', "prompt: expected text, got an empty one"),
        (b'{"prompt": 3}', "prompt: expected text, got a number"),
        (b'{"prompt": {"a": 1}}', "prompt: expected text, got an object"),
        (b'{"prompt": "\\ud800"}', "prompt: expected Unicode text, got half a surrogate pair at character 0"),
        (b'{"prompt": "a", "answer": []}', "answer: expected text or a list of accepted answers, got an empty list"),
        (b'{"prompt": "a", "answer": ["b", [1]]}', "answer[1]: expected text, got a list"),
        (b'{"prompt": "a", "answer": true}', "answer: expected text, got true or false"),
        (b'{"prompt": "a", "answer": -Infinity}', "answer: expected text or a finite number, got -inf"),
        (
            b'{"prompt": "a", "answer": "' + b"x" * 70_000 + b'"}',
            "answer: expected at most 65,536 characters, got 70,000",
        ),
        (
            b'{"prompt": "a", "answer": ["b"' + b', "c"' * 2000 + b"]}",
            "answer: expected at most 1,000 answers, got 2,001",
        ),
        (b'{"prompt": "a", "answer": 1, "answer": 2}', 'expected every key once, got "answer" more often'),
        (b'{"messages": [{"role": "user", "role": "user", "content": "a"}]}', 'expected every key once, got "role"'),
        (
            json.dumps({"messages": '[{"role": "user", "content": "a", "content": "b"}]'}).encode(),
            'messages: expected every key once, got "content"',
        ),
        (b'{"prompt": "a", "source": {}}', "source: expected text, got an object"),
        (b'{"messages": []}', "messages: expected a list of {role, content} objects, got an empty list"),
        (b'{"messages": "a"}', "messages: expected a list of {role, content} objects, got text"),
        (b'{"messages": ["a"]}', "messages[0]: expected an object with role and content, got text"),
        (b'{"messages": [{"role": "user"}]}', "messages[0]: expected role and content, got role"),
        (b'{"messages": [{"role": "user", "content": {}}]}', "messages[0].content: expected text, got an object"),
        (
            b'{"messages": [{"role": "", "content": "a"}]}',
            "expected system, user, assistant or tool",
        ),
        (b'{"messages": [{"role": "user", "content": ""}]}', "messages[0].content: expected text, got an empty one"),
        (b'{"messages": [{"role": "assistant", "content": "a"}]}', "ends before the student's turn"),
    ],
)
def test_bad_line_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(PromptError) as error:
        load(tmp_path, content)
    text = str(error.value)
    assert message in text and "\n" not in text and len(text) < 400 + len(str(tmp_path))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none.jsonl", "none.jsonl: no such file"),
        ("none.parquet", "none.parquet: no such file"),
        ("none", "expected a .jsonl or .parquet file, a Hub dataset id, toy:train or toy:heldout, got no such file"),
        (".", "got a directory"),
        ("notes.txt", "got a file with suffix '.txt'"),
        ("toy:test", "toy:test: expected toy:train, toy:heldout, toy:company/documents"),
        ("x" * 3000, "cannot be read"),
        ("bad.parquet", "bad.parquet: expected a Parquet file: "),
        ("a.jsonl", "got a directory"),
    ],
)
def test_bad_path_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("a")
    Path("bad.parquet").write_text("a")
    Path("a.jsonl").mkdir()
    with pytest.raises(PromptError) as error:
        load_prompts(config(path))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_good_lines(tmp_path: Path) -> None:
    lines = [
        {"prompt": "a\u2028b", "answer": 3, "source": "s", "id": 7, "else": [1]},
        {"messages": CHAT, "answer": None},
        {"prompt": CHAT},
        {"prompt": "b", "answer": ["one", 1]},
        {"prompt": "b", "answer": [64.0]},
    ]
    content = b"\xef\xbb\xbf" + b"\r\n\r\n".join(json.dumps(line, ensure_ascii=False).encode() for line in lines)
    records = load(tmp_path, content)
    assert records == [
        {"prompt": "a\u2028b", "answer": "3", "source": "s", "id": "7"},
        {"messages": CHAT},
        {"messages": CHAT},
        {"prompt": "b", "answer": ["one", "1"]},
        {"prompt": "b", "answer": "64"},
    ]
    assert load(tmp_path, content, limit=1) == records[:1]
    assert cs.prompts_sha256(records) != cs.prompts_sha256(records[:1])


def test_limit_stops_reading(tmp_path: Path) -> None:
    assert load(tmp_path, b'{"prompt": "a"}\nnot json', limit=1) == [{"prompt": "a"}]


def test_toy_prompts_do_not_overlap() -> None:
    train, heldout = ({line["prompt"] for line in load_prompts(config(f"toy:{s}"))} for s in ("train", "heldout"))
    assert len(heldout) >= 2000 and not train & heldout


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "prompts.parquet"
    pq.write_table(
        pa.table({"prompt": ["a", None], "messages": [None, CHAT], "answer": [1, 2], "extra": [0, 0]}), path
    )
    assert load_prompts(config(path)) == [{"prompt": "a", "answer": "1"}, {"messages": CHAT, "answer": "2"}]
    pq.write_table(pa.table({"prompt": ["a", ""]}), path)
    with pytest.raises(PromptError, match=r"prompts\.parquet: row 2: prompt: expected text, got an empty one"):
        load_prompts(config(path))
    pq.write_table(pa.table({"question": ["a"]}), path)
    with pytest.raises(PromptError, match="expected prompt or messages, got columns question"):
        load_prompts(config(path))


def test_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(PromptError, match=r"org/set: no such file; .*pip install datasets"):
        load_prompts(config("org/set"))

    def load_dataset(name: str, split: str) -> list[dict[str, Any]]:
        if split != "test":
            raise ValueError(f"Unknown split\n{split}")
        return [{"prompt": CHAT, "answer": "3"}, {"prompt": ""}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert load_prompts(config("org/set", split="test", limit=1)) == [{"messages": CHAT, "answer": "3"}]
    with pytest.raises(PromptError, match=r"org/set\[test\]: row 2: prompt"):
        load_prompts(config("org/set", split="test"))
    with pytest.raises(PromptError, match="Hub dataset org/set, split train: ValueError: Unknown split train"):
        load_prompts(config("org/set"))


# --------------------------------------------------------------------------------------------------------- rendering


def test_chat_template_is_applied(tokenizer: Any) -> None:
    cfg = config("toy:train")
    expected = "<|im_start|>user\n1+2*3=<|im_end|>\n<|im_start|>assistant\n"
    ids = render({"prompt": "1+2*3="}, tokenizer, cfg)
    assert tokenizer.decode(ids) == expected and all(isinstance(token, int) for token in ids)
    assert ids == render({"messages": [{"role": "user", "content": "1+2*3="}]}, tokenizer, cfg)
    with_system = render({"prompt": "a"}, tokenizer, config("toy:train", system="be brief"))
    assert tokenizer.decode(with_system).startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\na")
    own = {"messages": [{"role": "system", "content": "own"}, *CHAT]}
    assert "be brief" not in tokenizer.decode(render(own, tokenizer, config("toy:train", system="be brief")))


def test_template_arguments_reach_the_template(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[0].content }}{% if think %}?{% endif %}")
    on, off = (config("toy:train", template_args={"think": value}) for value in (True, False))
    assert tokenizer.decode(render({"prompt": "a"}, tokenizer, on)) == "a?"
    assert tokenizer.decode(render({"prompt": "a"}, tokenizer, off)) == "a"
    assert template_identity(tokenizer, on) != template_identity(tokenizer, off)
    json.dumps(template_identity(tokenizer, on))


def test_plain_text(tokenizer: Any) -> None:
    cfg = config("toy:train", template="none")
    assert render({"prompt": "1+2*3="}, tokenizer, cfg) == list(b"1+2*3=")
    assert template_identity(tokenizer, cfg) == {"kind": "none"}
    with pytest.raises(PromptError, match="messages need a chat template, got prompts"):
        render({"messages": CHAT}, tokenizer, cfg)


class Words:
    """A base model's tokenizer: BOS 1 and EOS 2 around the text, as some Llama configurations have it."""

    chat_template = None
    bos_token_id = 1

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = [1 if word == "<s>" else 10 + len(word) for word in text.split()]
        return {"input_ids": [1, *ids, 2] if add_special_tokens else ids}


@pytest.mark.parametrize("text", ["one three", "<s> one three"])
def test_one_bos_and_no_eos(text: str) -> None:
    assert render({"prompt": text}, Words(), config("p.jsonl")) == [1, 13, 15]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("record", "settings", "message"),
    [
        ({"messages": CHAT}, {}, "messages need a chat template, the tokenizer has none"),
        ({"prompt": "a"}, {"template": "chat"}, 'prompts.template = "chat" needs a tokenizer with a chat template'),
        ({"prompt": "a"}, {"system": "s"}, "prompts.system needs a chat template, the tokenizer has none"),
    ],
)
def test_base_model_has_no_template(record: dict[str, Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PromptError) as error:
        render(record, Words(), config("p.jsonl", **settings))  # type: ignore[arg-type]
    assert message in str(error.value)


def test_render_all_names_what_is_too_long(tokenizer: Any) -> None:
    cfg = config("p.jsonl", template="none")
    records = [{"prompt": "1" * length} for length in (3, 9, 4, 12)]
    arrays = render_all(records, tokenizer, cfg, 12, context=13)
    assert [len(ids) for ids in arrays] == [3, 9, 4, 12] and all(ids.dtype == np.int32 for ids in arrays)
    with pytest.raises(PromptError) as error:
        render_all(records, tokenizer, cfg, 8)
    assert str(error.value) == (
        "p.jsonl: prompt 2: expected at most 8 tokens, got 9 (2 of 4 prompts are too long, the longest has 12); "
        "set rollouts.max_prompt_tokens to 12 or remove them"
    )
    with pytest.raises(PromptError, match="the student's context is 12 tokens, so shorten or remove them"):
        render_all(records, tokenizer, cfg, 100, context=12)


def test_render_all_names_the_prompt_that_a_template_refuses(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no\\nsystem') }}{% endif %}x"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    records = [{"prompt": "a"}, {"messages": [{"role": "system", "content": "s"}, *CHAT]}]
    with pytest.raises(PromptError, match=r"^p\.jsonl: prompt 2: the chat template refuses it: \w+: no system$"):
        render_all(records, tokenizer, config("p.jsonl"), 10)
    monkeypatch.setattr(tokenizer, "chat_template", "{{ '' }}")
    with pytest.raises(PromptError, match="expected at least one token"):
        render_all(records[:1], tokenizer, config("p.jsonl"), 10)


NUMBERS = [
    (64, "64"),
    (64.0, "64"),  # what pandas makes of 64 beside a null
    (-0.0, "0"),
    (0.1, "0.1"),
    (2.0**53 - 1, "9007199254740991"),
    (10**30, str(10**30)),
    (Decimal("64.00"), "64"),
    (Decimal("1E+2"), "100"),
    (Decimal("0.50"), "0.50"),
    (math.nan, None),
    (Decimal("NaN"), None),
    (None, None),
]


@pytest.mark.parametrize(("value", "text"), NUMBERS, ids=str)
def test_numbers_as_answers(value: object, text: str | None) -> None:
    record = check_record({"prompt": "a", "answer": value, "id": value}, "here")
    assert record == {"prompt": "a"} | ({} if text is None else {"answer": text, "id": text})


@pytest.mark.parametrize("value", [2.0**53, -1e300, [1.0, 1e17]], ids=str)
def test_a_number_that_may_have_been_another_integer_is_no_answer(value: object) -> None:
    with pytest.raises(PromptError, match=r"^here: answer.*as text$"):
        check_record({"prompt": "a", "answer": value}, "here")
    assert check_record({"prompt": "a", "id": 1e17}, "here")["id"] == "1e+17"


def test_a_column_of_numbers_is_the_same_answers_in_every_type(tmp_path: Path) -> None:
    expected = [{"prompt": "a", "answer": "64"}, {"prompt": "b"}, {"prompt": "c", "answer": "-7"}]
    lines = '{"prompt": "a", "answer": 64.0}\n{"prompt": "b", "answer": NaN}\n{"prompt": "c", "answer": -7.0}\n'
    (tmp_path / "p.jsonl").write_text(lines)
    assert load_prompts(config(tmp_path / "p.jsonl")) == expected
    prompts = ["a", "b", "c"]
    for answers in (
        pa.array([64, None, -7]),
        pa.array([64.0, None, -7.0]),
        pa.array([64.0, math.nan, -7.0]),
        pa.array([64.0, None, -7.0], pa.float32()),
        pa.array([Decimal("64"), None, Decimal("-7")], pa.decimal128(10, 2)),
    ):
        pq.write_table(pa.table({"prompt": prompts, "answer": answers}), tmp_path / "p.parquet")
        assert load_prompts(config(tmp_path / "p.parquet")) == expected
    for value in (0.1, np.float16(0.1), [0.1, 0.2]):
        kind = pa.float16() if isinstance(value, np.float16) else pa.float32()
        answers = pa.array([value], pa.list_(kind) if isinstance(value, list) else kind)
        pq.write_table(pa.table({"prompt": ["a"], "answer": answers}), tmp_path / "p.parquet")
        (record,) = load_prompts(config(tmp_path / "p.parquet"))
        assert record["answer"] == (["0.1", "0.2"] if isinstance(value, list) else "0.1")


# ------------------------------------------------------------------------------------------------- templates and lengths  # noqa: E501


def lines_of(tokenizer: Any, template: str, chats: list[Any] | None = None, **settings: Any) -> list[str]:
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = template
    return without_effect([(chat, None) for chat in chats or [CHAT]], tokenizer, config("p.jsonl", **settings))


TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
OPENS = "{% if add_generation_prompt %}<assistant>{% endif %}"
SYSTEM = [{"role": "system", "content": "s"}, *CHAT]


@pytest.mark.parametrize(
    ("template", "settings", "chats", "named"),
    [
        (TURNS + OPENS, {}, None, None),
        (TURNS + OPENS, {"system": "be brief"}, None, None),
        # a default that is set by hand changes nothing, and is read
        (TURNS + OPENS + "{% if think is defined and not think %}<no>{% endif %}", {"template_args": {"think": True}},
         None, None),
        (TURNS + OPENS + "{{ effort or 'low' }}", {"template_args": {"effort": "low"}}, None, None),
        # a reply follows the user's message directly: nothing is lacking
        ("{% for m in messages %}{{ '[INST] ' ~ m.content ~ ' [/INST]' if m.role == 'user' else m.content }}{% endfor %}",  # noqa: E501
         {}, None, None),
        (TURNS, {}, None, "add_generation_prompt"),
        ("{{ messages[0].content }}|{{ messages|length }}", {}, None, "add_generation_prompt"),
        (TURNS.replace("%}<", "%}{% if m.role != 'system' %}<").replace("</s>", "</s>{% endif %}") + OPENS,
         {"system": "be brief"}, None, "prompts.system"),
        # it writes a system message, but always its own
        ("<system>default</s>" + TURNS.replace("%}<", "%}{% if m.role != 'system' %}<").replace("</s>", "</s>{% endif %}")  # noqa: E501
         + OPENS, {"system": "be brief"}, None, "prompts.system"),
        (TURNS + OPENS, {"system": "be brief"}, [SYSTEM], "prompts.system"),
        (TURNS.replace("%}<", "%}{% if m.role != 'developer' %}<").replace("</s>", "</s>{% endif %}") + OPENS, {},
         [[{"role": "developer", "content": "d"}, *CHAT]], "developer"),
        (TURNS + OPENS + "{% if enable_thinking %}<think>{% endif %}", {"template_args": {"enable_thinkng": True}}, None,  # noqa: E501
         "prompts.template_args.enable_thinkng"),
    ],
)  # fmt: skip
def test_a_setting_without_effect_is_named(
    tokenizer: Any, template: str, settings: dict[str, Any], chats: list[Any] | None, named: str | None
) -> None:
    found = lines_of(tokenizer, template, chats, **settings)
    assert len(found) == (named is not None) and all(named in line and "\n" not in line for line in found)  # type: ignore[operator]


def test_a_misspelt_argument_is_reported_once_with_the_right_one(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", TURNS + OPENS + "{% if enable_thinking %}<think>{% endif %}")
    cfg, records = config("p.jsonl", template_args={"enable_thinkng": True}), [{"prompt": "a"}, {"prompt": "b"}]
    named = {"template_args": "teacher.template_args"}
    for _ in range(2):
        render_all(records, tokenizer, cfg, 200, named=named)
    text = capsys.readouterr().err
    assert text.count("teacher.template_args.enable_thinkng") == 1 and "did you mean enable_thinking?" in text


def test_a_tokenizer_without_a_template_has_no_arguments() -> None:
    (line,) = without_effect([(CHAT, None)], Words(), config("p.jsonl", template_args={"x": 1}))  # type: ignore[arg-type]
    assert "prompts.template_args" in line


@pytest.mark.parametrize(
    "template",
    [
        "{{ '%1000000000d' % 1 }}",
        "{{ 10**100000000 }}",  # one step of C, while it is compiled
        "{{ 'x' * 10**10 }}",
        "{{ 'x' * 40000000 }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
        "{{ ''.__class__.__mro__ }}",
        "{% include '/etc/passwd' %}",
        "{{ ",
        "{{ '\\ud800' }}",
    ],
)
def test_a_template_has_bounds(tokenizer: Any, monkeypatch: pytest.MonkeyPatch, template: str) -> None:
    quick = Renderer(seconds=0.2)
    monkeypatch.setattr(pipeline.text.chat_template, "renderer", lambda: quick)
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(PromptError) as error:
        render({"prompt": "a"}, tokenizer, config("p.jsonl"))
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[0].content }}")  # and the next one is well
    assert render({"prompt": "a"}, tokenizer, config("p.jsonl")) == [ord("a")]
    quick.close()


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{{ bos_token }}{%- for m in messages %}\n  {%- if loop.first %}\n<{{ m | tojson }}>\n  {% endif %}\n{% endfor %}\n",  # noqa: E501
        "{% generation %}{{ messages[0].content }}{% endgeneration %}{{ tools is none }}{{ documents }}{{ x.y[0] }}",
        "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}{{ m.content|tojson(indent=1) }}{% endfor %}é",  # noqa: E501
    ],
)
def test_templates_are_rendered_as_transformers_does(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, template: str | None
) -> None:
    if template is not None:
        monkeypatch.setattr(tokenizer, "chat_template", template)
    chat, args = [{"role": "system", "content": 'é"<&'}, *CHAT], {"x": {"y": [1.5]}}
    for follows in (True, False):
        expected = tokenizer.apply_chat_template(chat, add_generation_prompt=follows, tokenize=False, **args)
        assert chat_text(chat, tokenizer, args, reply_follows=follows) == expected


def test_what_cannot_fit_is_not_tokenised(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(tokenizer), "__call__", lambda *args, **kwargs: pytest.fail("tokenised"))
    for template in ("none", "chat"):
        with pytest.raises(PromptError, match=r"rollouts\.max_prompt_tokens") as error:
            render_all([{"prompt": "word " * 2_000_000}], tokenizer, config("p.jsonl", template=template), 1000)
        assert "p.jsonl: prompt 1:" in str(error.value)


def of_words(kind: str) -> Any:
    """A tokenizer that may write a word of any length as one unknown token."""
    vocab = ["[UNK]", *"abcdefghijklmnopqrstuvwxyz", "the", "cat"]
    model = {
        "WordPiece": lambda: tokenizers.models.WordPiece(
            {token: n for n, token in enumerate(vocab)}, unk_token="[UNK]", max_input_chars_per_word=10**9
        ),
        "WordLevel": lambda: tokenizers.models.WordLevel({token: n for n, token in enumerate(vocab)}, "[UNK]"),
        "Unigram": lambda: tokenizers.models.Unigram([(token, -1.0) for token in vocab], unk_id=0),
        "BPE": lambda: tokenizers.models.BPE({token: n for n, token in enumerate(vocab)}, [], unk_token="[UNK]"),
    }[kind]()
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", eos_token="z")


@pytest.mark.parametrize("kind", ["WordPiece", "WordLevel", "Unigram", "BPE"])
def test_what_cannot_fit_is_not_tokenised_by_any_tokenizer(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = of_words(kind)
    assert len(render({"prompt": "the " * 10_000}, tokenizer, config("p.jsonl"), at_most=1000)) >= 10_000
    monkeypatch.setattr(type(tokenizer), "__call__", lambda *args, **kwargs: pytest.fail("tokenised"))
    for text in ("catthe" * 50_000, "\u732b" * 300_000, " " * 300_000 + "the"):
        with pytest.raises(PromptError, match=r"p\.jsonl: prompt 1:.*rollouts\.max_prompt_tokens"):
            render_all([{"prompt": text}], tokenizer, config("p.jsonl"), 1000)


def byte_pairs(strips: bool) -> Any:
    """A byte-level tokenizer with merges, NFC and, if asked, an added token that takes the white space beside it."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.normalizer = tokenizers.normalizers.NFC()
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(["the cat sat on the mat", " " * 64, "aaaaaaaaaaaaaaaa", "é" * 8], trainer)
    made.add_tokens([tokenizers.AddedToken("<long-token-of-many-letters>", lstrip=strips, rstrip=strips)])
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.mark.parametrize("strips", [False, True])
def test_no_text_has_fewer_tokens_than_the_least(strips: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.text.token_length, "_CHEAP", 0)
    tokenizer, rng = byte_pairs(strips), random.Random(0)
    parts = [
        "the cat",
        " ",
        "  " * 40,
        "a" * 50,
        "e\u0301",
        "é",
        "<long-token-of-many-letters>",
        "\u3000",
        "猫",
        "\n",
    ]
    for _ in range(200):
        text = "".join(rng.choices(parts, k=rng.randint(1, 40)))
        assert least_tokens(text, tokenizer) <= len(tokenizer(text)["input_ids"])
    assert least_tokens("the cat " * 1000, tokenizer) > 500
    assert least_tokens(" " * 1000, tokenizer) == (1000 // 256 if strips else 15)


# ------------------------------------------------------------------------------------------------------ what people bring  # noqa: E501


def test_sharegpt_is_read_as_messages(tmp_path: Path) -> None:
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "hi"}]
    expected = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    assert load(tmp_path, json.dumps({"conversations": turns, "id": 3}).encode()) == [
        {"messages": expected, "id": "3"}
    ]
    assert load(tmp_path, json.dumps({"conversations": expected}).encode()) == [{"messages": expected}]
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"conversations": [turns], "more": [1]}), path)
    assert load_prompts(config(path)) == [{"messages": expected}]
    for wrong, named in (
        ({"conversations": [{"from": "tool", "value": "a"}]}, r"conversations\[0\]\.from"),
        ({"conversations": [*turns, {"from": "gpt", "value": "a"}]}, "ends before the student's turn"),
        ({"conversations": "a"}, "conversations: expected a list"),
        ({"conversations": [{"from": "human"}]}, "content"),
        ({"conversations": turns, "prompt": "a"}, "either prompt or conversations"),
    ):
        with pytest.raises(PromptError, match=named):
            load(tmp_path, json.dumps(wrong).encode())
    with pytest.raises(PromptError, match="dialogue holds chats, name it messages"):
        load(tmp_path, b'{"dialogue": [], "x": 1}')


def test_a_huge_line_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.text.prompts, "_LINE_AT_MOST", 100)
    assert len(load(tmp_path, b'{"prompt": "a"}\n' + b'{"prompt": "' + b"a" * 85 + b'"}\n')) == 2
    with pytest.raises(PromptError, match=r"prompts\.jsonl:2: expected at most 100 bytes"):
        load(tmp_path, b'{"prompt": "a"}\n' + b'{"prompt": "' + b"a" * 87 + b'"}\n')
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(PromptError, match="regular file"):
        load_prompts(config(tmp_path / "pipe.jsonl"))


@pytest.mark.parametrize(
    ("columns", "named"),
    [
        ([("prompt", pa.array(["a"])), ("prompt", pa.array(["b"]))], "one column prompt"),
        ([("prompt", pa.array([b"a"]))], "row 1: prompt: expected text"),
        ([("prompt", pa.array(["a"]).view(pa.binary())), ("id", pa.array([1]))], "row 1: prompt: expected text"),
        ([("messages", pa.array([{"role": "user", "content": "a"}]))], "row 1: messages: expected a list"),
        ([("messages", pa.array([[[("role", "user")]]], pa.list_(pa.map_(pa.string(), pa.string()))))], "row 1: messages"),  # noqa: E501
        ([("messages", pa.array([CHAT])), ("answer", pa.array([datetime.datetime(2020, 1, 1)]))], "row 1: answer"),
        ([("prompt", pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")]))],  # noqa: E501
         "p.parquet"),
        ([("conversation", pa.array(["a"]))], "messages"),
    ],
)  # fmt: skip
def test_odd_parquet_columns_are_named(tmp_path: Path, columns: list[Any], named: str) -> None:
    path = tmp_path / "p.parquet"
    pq.write_table(pa.Table.from_arrays([array for _, array in columns], [name for name, _ in columns]), path)
    with pytest.raises(PromptError) as error:
        load_prompts(config(path))
    assert named in str(error.value) and "\n" not in str(error.value)


def rows_of(rng: random.Random, number: int) -> dict[str, Any]:
    """A row as people and programs write them: most of them right, others of another type, size or shape."""
    odd = [
        None,
        True,
        3,
        -1.5,
        2**70,
        "",
        " ",
        "a\0b",
        [],
        {},
        [[]],
        ["a"],
        "x" * 100_000,
        "\u202e",
        CHAT,
        {"role": "user"},
    ]
    turn: dict[str, Any] = {"role": rng.choice(["system", "user", "assistant", "tool"]), "content": "c"}
    if rng.random() < 0.3:
        turn[rng.choice(["role", "content", "from", "value", "name"])] = rng.choice(odd)
    row: dict[str, Any] = {rng.choice(["prompt", "text", "question"]): "a", "id": number}
    if rng.random() < 0.5:
        row = {rng.choice(["messages", "conversations", "prompt"]): [turn] * rng.randint(1, 3) + CHAT}
    if rng.random() < 0.5:
        row[rng.choice(["prompt", "messages", "answer", "source", "id", "conversations", "x" * 5000])] = rng.choice(
            odd
        )
    return row


def test_mutated_rows_are_one_line_or_prompts(tmp_path: Path, tokenizer: Any) -> None:
    rng, path = random.Random(0), tmp_path / "p.jsonl"
    counts = [0, 0]
    for number in range(400):
        row = rows_of(rng, number)
        content = json.dumps(row).encode()
        if rng.random() < 0.2:
            place = rng.randrange(len(content))
            content = (
                content[:place]
                + rng.choice([b"", b"\xff", b"\0", b"[" * 5000, b"\n", b"9" * 5000])
                + content[place + 1 :]
            )
        path.write_bytes(content)
        table = tmp_path / f"{number}.parquet"
        with contextlib.suppress(pa.ArrowException, OverflowError):  # what Arrow has no type for
            pq.write_table(pa.Table.from_pylist([row]), table)
        for file in (path, table):
            if not file.exists():
                continue
            try:
                records = load_prompts(config(file))
                cs.prompts_sha256(records)
                assert all(len(ids) for ids in render_all(records, tokenizer, config(file), 2**20))
                counts[0] += 1
            except PromptError as error:
                assert "\n" not in str(error) and len(str(error)) < 600 + len(str(file))
                counts[1] += 1
    assert min(counts) > 50
