"""Prompts: every bad line is named, every good one becomes the tokens it should."""

from __future__ import annotations

import json
import math
import sys
import types
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from pipeline.config import PromptsConfig
from pipeline.errors import PromptError
from pipeline.prompts import check_record, load_prompts, prompts_sha256, render, render_all, template_identity
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
        (b'{"prompt": "a", "answer": [1]}', "answer: expected text, got a list"),
        (b'{"prompt": "a", "answer": true}', "answer: expected text, got true or false"),
        (b'{"prompt": "a", "answer": -Infinity}', "answer: expected text or a finite number, got -inf"),
        (b'{"prompt": "a", "answer": 1, "answer": 2}', 'expected every key once, got "answer" more often'),
        (b'{"messages": [{"role": "user", "role": "user", "content": "a"}]}', 'expected every key once, got "role"'),
        (b'{"prompt": "a", "source": {}}', "source: expected text, got an object"),
        (b'{"messages": []}', "messages: expected a list of {role, content} objects, got an empty list"),
        (b'{"messages": "a"}', "messages: expected a list of {role, content} objects, got text"),
        (b'{"messages": ["a"]}', "messages[0]: expected an object with role and content, got text"),
        (b'{"messages": [{"role": "user"}]}', "messages[0]: expected role and content, got role"),
        (b'{"messages": [{"role": "user", "content": [1]}]}', "messages[0].content: expected text, got a list"),
        (b'{"messages": [{"role": "", "content": "a"}]}', "messages[0].role: expected system, user or assistant"),
        (b'{"messages": [{"role": "user", "content": ""}]}', "messages[0].content: expected text, got an empty one"),
        (b'{"messages": [{"role": "user", "content": "a", "name": "b"}]}', "got also name"),
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
        ("x" * 5000, "cannot be read"),
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
    ]
    content = b"\xef\xbb\xbf" + b"\r\n\r\n".join(json.dumps(line, ensure_ascii=False).encode() for line in lines)
    records = load(tmp_path, content)
    assert records == [
        {"prompt": "a\u2028b", "answer": "3", "source": "s", "id": "7"},
        {"messages": CHAT},
        {"messages": CHAT},
    ]
    assert load(tmp_path, content, limit=1) == records[:1]
    assert prompts_sha256(records) != prompts_sha256(records[:1])


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
    (2.0**53, "9007199254740992.0"),  # may have been another integer
    (1e300, "1e+300"),
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
    pq.write_table(pa.table({"prompt": ["a"], "answer": pa.array([0.1], pa.float32())}), tmp_path / "p.parquet")
    assert load_prompts(config(tmp_path / "p.parquet")) == [{"prompt": "a", "answer": "0.1"}]
