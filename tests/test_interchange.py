"""Import and export: real files in, a cache that the stages accept; a cache out, in Parquet that `datasets` loads."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

import cache_schema as cs
from helpers import cache_factory as factory
from helpers.caches import SMALL, add_partial_teachers, tree_digest
from pipeline import cli
from pipeline.config import Recipe, load_recipe
from pipeline.errors import RedpenError
from pipeline.interchange import exporting, importing
from pipeline.interchange.restoring import Export
from pipeline.models.identity import IMPORTED
from pipeline.models.resolve import resolve

#: The student's ids that the made-up rollouts use, and the one that ends them.
A, B, EOS = 65, 66, 256


def toy(*overrides: str) -> Recipe:
    return load_recipe("toy", [*SMALL, *overrides])


def rollout(**changes: Any) -> dict[str, Any]:
    """A row; None leaves a field out."""
    row = {
        "prompt": "1+1=",
        "response_tokens": [A, B, EOS],
        "rollout_logprobs": [-0.5, -1.0, 0.0],
        "teacher_log_probs": [-0.25, None, -3.0],
    }
    return {name: value for name, value in (row | changes).items() if value is not None}


def jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def as_parquet(path: Path, rows: list[dict[str, Any]]) -> str:
    parquet.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def imported(file: str, cache: Path, *overrides: str, **options: Any) -> cs.Round:
    assert importing.run(file, toy(*overrides), str(cache), **options) == 0
    opened = cs.open(str(cache))
    assert list(cs.verify(opened)) == []
    return opened.round()


def refused(file: str, cache: Path, *overrides: str, **options: Any) -> str:
    """What an import is refused with; it must be one line and must leave nothing behind."""
    with pytest.raises(RedpenError) as error:
        importing.run(file, toy(*overrides), str(cache), **options)
    assert "\n" not in str(error.value) and not cache.exists()
    return str(error.value)


def same_rollouts(a: cs.Round, b: cs.Round) -> None:
    assert a.n_blocks == b.n_blocks and a.manifest.prompts_sha256 == b.manifest.prompts_sha256
    for block in range(a.n_blocks):
        pairs = zip(astuple(a.rollouts.read(block)), astuple(b.rollouts.read(block)), strict=True)
        for ours, theirs in pairs:
            np.testing.assert_array_equal(ours, theirs)


def lightning_rows(round_: cs.Round, render: Callable[[str], str]) -> list[dict[str, Any]]:
    """A scored round as Lightning-OPD's prepare_lightning_opd.py writes one: rendered text, the rest in metadata."""
    rows = []
    for block in range(round_.n_blocks):
        rollouts, teacher = round_.rollouts.read(block), round_.scores("teacher").read(block)
        for row in range(rollouts.n_rows):
            record = round_.prompts[int(rollouts.prompt_index[rollouts.row_prompt[row]])]
            ids = rollouts.response(row).tolist()
            metadata = {
                "is_lightning_opd": True,
                "loss_mask": [1] * len(ids),
                "response": "text that is not read",
                "response_tokens": ids,
                "teacher_log_probs": teacher.logprobs[rollouts.response_slice(row)].astype(float).tolist(),
            }
            rows.append({"label": "0", "metadata": metadata, "prompt": render(record["prompt"])})
    return rows


# ------------------------------------------------------------------------------------------------------------ import


def test_lightning_opd_is_imported_scored_and_trained_on(
    toy_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    made = cs.open(str(toy_cache)).round()
    as_parquet(Path("opd.parquet"), lightning_rows(made, lambda text: text))
    options = [part for text in (*SMALL, "train.steps=2") for part in ("--set", text)]

    def redpen(command: str) -> tuple[int, str, str]:
        code = cli.main([*command.split(), *([] if command.startswith(("inspect", "verify")) else options)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    code, out, _ = redpen("import opd.parquet toy --cache c")
    n_tokens = int(made.rollouts.commits()["tokens"].sum())
    assert code == 0 and f"96 rollouts of {made.n_prompts} prompts" in out
    assert f"{n_tokens:,} tokens, {n_tokens:,} of them scored by teacher" in out
    before = tree_digest(tmp_path / "c")
    assert "nothing to do" in redpen("import opd.parquet toy --cache c")[1] and tree_digest(tmp_path / "c") == before
    assert redpen("inspect c")[0] == 0 and redpen("verify c")[0] == 0

    round_ = cs.open("c").round()
    assert round_.teacher_names() == ["teacher"] and round_.manifest.template == {"kind": "none"}
    scores = round_.scores("teacher").manifest
    assert isinstance(scores, cs.ScoresManifest)
    assert (scores.engine, scores.candidates, scores.entropy, scores.partial) == ("import", 0, False, True)
    for block in range(round_.n_blocks):
        theirs, ours = made.rollouts.read(block), round_.rollouts.read(block)
        assert np.isnan(ours.rollout_logprobs).all() and (ours.trained == 1).all()
        for name in ("prompt_token_ids", "token_ids", "row_prompt", "sample_index", "finish_reason"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
        teacher = round_.scores("teacher").read(block)
        np.testing.assert_array_equal(teacher.logprobs, made.scores("teacher").read(block).logprobs)
        assert teacher.entropy is None and teacher.candidate_logprobs is None

    code, out, _ = redpen("score toy --cache c")
    assert code == 0 and "teacher: imported scores are kept" in out and "student: mean log-prob" in out
    assert redpen("inspect c --rollout 3")[0] == 0 and redpen("verify c")[0] == 0
    code, _, err = redpen("train toy --cache c --run refused --set train.loss=jsd")
    assert code == 1 and "the scores by 'teacher' hold no candidates (engine import)" in err
    code, out, err = redpen("train toy --cache c --run k2")
    assert code == 0 and "max steps: 2 done" in out and "at the sampled token alone (k2)" in err
    code, out, _ = redpen("train toy --cache c --run run --set train.loss=importance_sampling")
    assert code == 0 and "max steps: 2 done" in out
    steps = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [math.isfinite(step["loss"]) for step in steps] == [True, True]
    assert json.loads(Path("run/ledger.json").read_text())["rollouts"]["flops"] is None


@pytest.mark.parametrize("layout", ["struct", "dotted columns", "columns", "jsonl", "jsonl columns"])
def test_fields_are_found_wherever_they_are(layout: str, tmp_path: Path) -> None:
    inner = {"response_tokens": [A, EOS], "teacher_log_probs": [-1.0, -2.0], "rollout_log_probs": [-0.5, None]}
    outer = {"prompt": "1+1=", "answer": "2", "metadata": {"loss_mask": [0, 1]} | inner}
    if layout != "struct" and layout != "jsonl":
        prefix = "metadata." if layout == "dotted columns" else ""
        outer = outer | {prefix + name: value for name, value in outer.pop("metadata").items()}
    write = jsonl if layout.startswith("jsonl") else as_parquet
    file = write(tmp_path / ("x.jsonl" if write is jsonl else "x.parquet"), [outer])
    round_ = imported(file, tmp_path / "c")
    rollouts = round_.rollouts.read(0)
    assert round_.prompts[0] == {"prompt": "1+1=", "answer": "2"}
    assert rollouts.token_ids.tolist() == [A, EOS] and rollouts.trained.tolist() == [0, 1]
    assert rollouts.rollout_logprobs[0] == -0.5 and np.isnan(rollouts.rollout_logprobs[1])
    assert round_.scores("teacher").read(0).logprobs.tolist() == [-1.0, -2.0]


def test_what_the_file_lacks_is_not_scored(tmp_path: Path) -> None:
    rows = [rollout(), rollout(teacher_log_probs=None), rollout(prompt="2+2=", rollout_logprobs=None)]
    round_ = imported(jsonl(tmp_path / "x.jsonl", rows), tmp_path / "c")
    teacher = round_.scores("teacher").read(0).logprobs
    np.testing.assert_array_equal(teacher, np.float32([-0.25, np.nan, -3] + [np.nan] * 3 + [-0.25, np.nan, -3]))
    assert np.isnan(round_.rollouts.read(0).rollout_logprobs).tolist() == [False] * 6 + [True] * 3
    assert round_.rollouts.read(0).sample_index.tolist() == [0, 1, 0] and round_.manifest.rollouts_per_prompt == 2
    alone = imported(jsonl(tmp_path / "y.jsonl", [rollout(teacher_log_probs=None)]), tmp_path / "d")
    assert alone.scorer_names() == []


def test_rows_of_a_prompt_may_lie_apart(tmp_path: Path) -> None:
    """Ten prompts in blocks of four, three samples each, all the first samples first."""
    rows = [
        rollout(prompt=f"{prompt}+1=", response_tokens=[A] * (1 + sample) + [EOS], rollout_logprobs=None)
        | {"teacher_log_probs": [-float(prompt)] * (2 + sample)}
        for sample in range(3)
        for prompt in range(10)
    ]
    round_ = imported(as_parquet(tmp_path / "x.parquet", rows), tmp_path / "c")
    for block in range(3):
        rollouts = round_.rollouts.read(block)
        assert rollouts.response_length.tolist() == [2, 3, 4] * rollouts.n_prompts
        prompt_T = np.repeat(rollouts.prompt_index[rollouts.row_prompt], rollouts.response_length)
        np.testing.assert_array_equal(round_.scores("teacher").read(block).logprobs, -prompt_T.astype(np.float32))


@pytest.mark.parametrize(
    ("ids", "said", "expected", "warned"),
    [
        ([A, EOS], None, cs.FINISH_STOP, False),
        ([A, EOS], "stop", cs.FINISH_STOP, False),
        ([A] * 32, None, cs.FINISH_LENGTH, False),
        ([A] * 31, "length", cs.FINISH_LENGTH, False),
        ([A, A], None, cs.FINISH_OTHER, False),
        ([A, EOS], "abort", cs.FINISH_OTHER, False),
        ([A, A], "stop", cs.FINISH_OTHER, True),  # its stop token was cut off
    ],
)
def test_finish_reason(
    ids: list[int], said: str | None, expected: int, warned: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = rollout(response_tokens=ids, finish_reason=said, rollout_logprobs=None, teacher_log_probs=None)
    round_ = imported(jsonl(tmp_path / "x.jsonl", [row]), tmp_path / "c")
    assert round_.rollouts.read(0).finish_reason.tolist() == [expected]
    assert (
        "finish_reason stop, but do not end with one of the stop ids" in " ".join(capsys.readouterr().err.split())
    ) == warned


def test_a_prompt_is_rendered_once(tmp_path: Path) -> None:
    """By the recipe's template, or by whoever wrote the file, never by both."""
    chat = ("prompts.template=chat", "rollouts.max_prompt_tokens=80")
    tokenizer = resolve(toy().student).tokenizer
    messages = [{"role": "user", "content": "1+1="}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    given = {"prompt_tokens": [A, B]}
    for number, (row, recipe, expected, template) in enumerate(
        [
            (rollout(prompt="1+1="), chat, ids, "chat"),
            (rollout(prompt=messages), chat, ids, "chat"),
            (rollout(prompt=text, metadata={"is_lightning_opd": True}), chat, ids, "none"),
            (rollout(prompt=text), ("rollouts.max_prompt_tokens=80",), ids, "none"),
            (rollout(prompt=text) | given, chat, [A, B], "imported"),
        ]
    ):
        for suffix, write in ((".jsonl", jsonl), (".parquet", as_parquet)):
            file = write(tmp_path / f"{number}{suffix}", [row])
            round_ = imported(file, tmp_path / f"c{number}{suffix}", *recipe)
            assert round_.rollouts.read(0).prompt_token_ids.tolist() == expected
            assert round_.manifest.template["kind"] == template
    message = refused(jsonl(tmp_path / "x.jsonl", [rollout(prompt=text)]), tmp_path / "c", *chat)
    assert "x.jsonl:1: prompt: expected text for the chat template, got text that holds <|im_" in message
    assert 'set prompts.template to "none"' in message


BAD = {
    "no ids": (rollout(response_tokens=None, response="2"), "response_tokens: expected the ids that the student"),
    "empty": (rollout(response_tokens=[]), "response_tokens: expected at least one token id, got an empty list"),
    "text ids": (
        rollout(response_tokens=["a"]),
        "response_tokens: expected a list of token ids, got a list of string",
    ),
    "float ids": (rollout(response_tokens=[1.0]), "expected a list of token ids, got a list of double"),
    "null id": (rollout(response_tokens=[A, None]), "expected a list of token ids, got a list with 1 nulls"),
    "text for ids": (rollout(response_tokens="ab"), "response_tokens: expected a list of token ids, got str"),
    "id beyond": (rollout(response_tokens=[A, 999, EOS]), "response_tokens: expected ids in 0..258, got 999"),
    "negative id": (rollout(response_tokens=[A, -1, EOS]), "response_tokens: expected ids in 0..258, got -1"),
    "short teacher": (
        rollout(teacher_log_probs=[-1.0]),
        "teacher_log_probs: expected 3 values, one for each response token, got 1",
    ),
    "long logprobs": (rollout(rollout_logprobs=[-1.0] * 4), "rollout_logprobs: expected 3 values"),
    "probability": (
        rollout(teacher_log_probs=[-0.1, 0.5, -1.0]),
        "teacher_log_probs: expected log-probs, finite and at most 0, got 0.5",
    ),
    "NaN": (rollout(teacher_log_probs=[-0.1, math.nan, -1.0]), "finite and at most 0, got nan; use null for"),
    "infinity": (rollout(rollout_logprobs=[-0.1, -math.inf, -1.0]), "finite and at most 0, got -inf"),
    "beyond float32": (rollout(rollout_logprobs=[-0.1, -1e39, -1.0]), "rollout_logprobs: expected log-probs, finite"),
    "whole numbers": (rollout(teacher_log_probs=[-1, 2**60, -1]), "finite and at most 0, got 1.15292e+18"),
    "text logprobs": (rollout(rollout_logprobs=["a", "b", "c"]), "expected a list of numbers, got a list of string"),
    "mask": (rollout(loss_mask=[0, 1, 2]), "loss_mask: expected a list of 0 and 1"),
    "finish": (rollout(finish_reason=7), "finish_reason: expected stop, length or other text, got int"),
    "empty prompt": (rollout(prompt=" "), "prompt: expected text, got an empty one"),
    "huge prompt": (
        rollout(prompt="1" * 40_000),
        "prompt: expected at most 16 tokens, got at least 40000; remove it",
    ),
    "no prompt": (rollout(prompt=None), "expected prompt or messages, got"),
    "answered": (rollout(prompt=[{"role": "assistant", "content": "2"}]), "ends before the student's turn"),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_refuses_the_file(name: str, suffix: str, tmp_path: Path) -> None:
    row, message = BAD[name]
    if suffix == ".jsonl":
        place = f"{jsonl(tmp_path / 'x.jsonl', [rollout(), row, row])}:2"
    else:
        place = f"{as_parquet(tmp_path / 'x.parquet', [row, row])}: row 1"
    found = refused(place.split(":")[0], tmp_path / "c")
    assert found.startswith(f"{place}: ") and message in found, found
    assert f"(2 of {3 if suffix == '.jsonl' else 2} rows are at fault; nothing was written)" in found


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "x.jsonl: expected at least one rollout, the file holds none"),
        ([[1]], "x.jsonl:1: expected one JSON object on each line, got list"),
        (
            [rollout(), rollout(prompt="1+" * 20), rollout(prompt="1+" * 30)],
            "x.jsonl: rollout 2: rollouts.max_prompt_tokens: expected at most 16 tokens, got 40 "
            "(2 of 3 rollouts are too long, the longest has 60); set it to 60 or remove them",
        ),
        (
            [rollout(response_tokens=[A] * 33, rollout_logprobs=None, teacher_log_probs=None)],
            "rollout 1: rollouts.max_response_tokens: expected at most 32 tokens, got 33",
        ),
        ([rollout(response_tokens=[1, "a"])], "expected a list of token ids, got one of other things"),
        ([rollout(response_tokens=[2**70])], "expected a list of token ids, got one of other things"),
    ],
)
def test_a_bad_file_is_refused(rows: list[Any], message: str, tmp_path: Path) -> None:
    assert message in refused(jsonl(tmp_path / "x.jsonl", rows), tmp_path / "c")


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.text.prompts._LINE_AT_MOST", 1000)
    (tmp_path / "x.jsonl").write_text(json.dumps(rollout()) + "\n" + "[" * 1001)
    assert "x.jsonl:2: expected at most 1,000 bytes a line" in refused(str(tmp_path / "x.jsonl"), tmp_path / "c")


@pytest.mark.parametrize("name", ["prompt", "response_tokens", "metadata"])
def test_a_column_that_is_there_twice_is_refused(name: str, tmp_path: Path) -> None:
    table = pa.Table.from_pylist([rollout(metadata={"source": "a"})])
    parquet.write_table(table.append_column(name, table[name]), tmp_path / "x.parquet")
    assert f"column {name}: expected it once" in refused(str(tmp_path / "x.parquet"), tmp_path / "c")


def test_whole_numbers_are_log_probs_too(tmp_path: Path) -> None:
    values = [-(2**60), -1, 0]
    file = as_parquet(tmp_path / "x.parquet", [rollout(rollout_logprobs=values, teacher_log_probs=None)])
    found = imported(file, tmp_path / "c").rollouts.read(0).rollout_logprobs
    assert found.tolist() == [float(np.float32(value)) for value in values]


def test_whose_log_probs(tmp_path: Path) -> None:
    recorded, unscored = jsonl(tmp_path / "t.jsonl", [rollout()]), jsonl(tmp_path / "u.jsonl", [rollout()] * 2)
    jsonl(Path(unscored), [rollout(teacher_log_probs=None)])
    assert "expected one of teacher, got 'x'" in refused(recorded, tmp_path / "c", teacher="x")
    assert "got none in any row; leave --teacher out" in refused(unscored, tmp_path / "c", teacher="teacher")
    assert "no such file" in refused(str(tmp_path / "nothing"), tmp_path / "c")
    assert "got a directory" in refused(str(tmp_path), tmp_path / "c")
    (tmp_path / "x.parquet").write_text("no Parquet")
    assert "x.parquet: expected a Parquet file: ArrowInvalid" in refused(str(tmp_path / "x.parquet"), tmp_path / "c")
    two = toy().model_copy(update={"teacher": [toy().teacher[0].model_copy(update={"name": n}) for n in "ab"]})
    with pytest.raises(RedpenError, match="name the teacher with --teacher, one of a, b"):
        importing.run(recorded, two, str(tmp_path / "c"))
    assert importing.run(recorded, two, str(tmp_path / "c"), teacher="b") == 0
    assert cs.open(str(tmp_path / "c")).round().teacher_names() == ["b"]


def test_a_teacher_that_fills_in_zeros_is_pointed_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [rollout(teacher_log_probs=[0.0] * 3), rollout()]
    imported(jsonl(tmp_path / "x.jsonl", rows), tmp_path / "c")
    assert "1 of 2 rollouts have teacher log-probs of 0 throughout" in " ".join(capsys.readouterr().err.split())


def test_an_import_is_resumed_and_another_file_refused(toy_cache: Path, tmp_path: Path) -> None:
    rows = lightning_rows(cs.open(str(toy_cache)).round(), lambda text: text)
    file, cache = as_parquet(tmp_path / "x.parquet", rows), tmp_path / "c"
    imported(file, cache)
    opened = cs.open(str(cache), writable=True)
    round_ = opened.round()
    expected = [astuple(round_.rollouts.read(b)) for b in range(round_.n_blocks)]
    for block in (1, 4):
        round_.rollouts.uncommit(block)
    round_.scores("teacher").uncommit(5)
    round_ = imported(file, cache)
    assert round_.rollouts.committed().all() and round_.scores("teacher").committed().all()
    for block, arrays in enumerate(expected):
        for ours, theirs in zip(astuple(round_.rollouts.read(block)), arrays, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    before = tree_digest(cache)
    other = as_parquet(tmp_path / "y.parquet", rows[:-1])
    with pytest.raises(cs.ProvenanceError, match=r"sampler_settings\.file_sha256: cached"):
        importing.run(other, toy(), str(cache))
    assert tree_digest(cache) == before
    assert importing.run(other, toy(), str(cache), round_index=1) == 0


# ------------------------------------------------------------------------------------------------------------ export


def test_datasets_loads_an_export(toy_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exporting.run(str(toy_cache), str(tmp_path / "out")) == 0
    file = tmp_path / "out/round-00000.parquet"
    assert f"96 rollouts of {toy_cache} round 0 in {file}" in capsys.readouterr().out
    assert os.listdir(file.parent) == [file.name]
    import datasets

    datasets.disable_progress_bars()
    loaded = datasets.load_dataset(
        "parquet", data_files=str(file), split="train", cache_dir=str(tmp_path / "hub")
    ).with_format("numpy")
    round_ = cs.open(str(toy_cache)).round()
    assert len(loaded) == 96 and parquet.ParquetFile(file).num_row_groups == round_.n_blocks
    number = 0
    for block in range(round_.n_blocks):
        rollouts = round_.rollouts.read(block)
        scores = {"student": round_.scores("student").read(block)}
        scores["teacher.teacher"] = round_.scores("teacher").read(block)
        for row in range(rollouts.n_rows):
            span, found = rollouts.response_slice(row), loaded[number]
            prompt = int(rollouts.prompt_index[rollouts.row_prompt[row]])
            assert (found["prompt_index"], found["sample_index"]) == (prompt, rollouts.sample_index[row])
            assert {name: str(found[name]) for name in ("prompt", "answer", "source")} == round_.prompts[prompt]
            assert found["finish_reason"] == "stop" and found["messages"] is None
            np.testing.assert_array_equal(found["prompt_token_ids"], rollouts.prompt(row))
            np.testing.assert_array_equal(found["response_token_ids"], rollouts.response(row))
            np.testing.assert_array_equal(found["rollout_logprobs"], rollouts.rollout_logprobs[span])
            for prefix, record in scores.items():
                for name, value in vars(record).items():
                    if value is not None:
                        np.testing.assert_array_equal(found[f"{prefix}.{name}"], value[span], err_msg=name)
            number += 1
    about = json.loads(parquet.read_schema(file).metadata[b"redpen"])
    assert about["manifest"] == json.loads(json.dumps(round_.manifest.to_json()))
    assert about["scores"].keys() == {"student", "teacher"} and about["round"] == 0


def test_several_answers_are_exported_and_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers: list[Any] = [["two", "2"], "3", None]
    rows = [rollout(prompt=f"{i}+1=", answer=answer) for i, answer in enumerate(answers)]
    first = imported(jsonl(tmp_path / "x.jsonl", rows), tmp_path / "c")
    assert exporting.run(str(tmp_path / "c"), str(tmp_path / "x.parquet")) == 0
    assert parquet.read_table(tmp_path / "x.parquet")["answer"].to_pylist() == [["two", "2"], ["3"], None]
    capsys.readouterr()
    again = imported(str(tmp_path / "x.parquet"), tmp_path / "d")
    same_rollouts(again, first)
    assert again.scores("teacher").manifest == first.scores("teacher").manifest
    assert "warning" not in capsys.readouterr().err
    assert [again.prompts[i].get("answer") for i in range(3)] == answers


def test_what_is_not_scored_is_null(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [rollout(prompt=f"{i}+1=") for i in range(10)]
    imported(jsonl(tmp_path / "x.jsonl", rows), tmp_path / "c")
    round_ = cs.open(str(tmp_path / "c"), writable=True).round()
    round_.scores("teacher").uncommit(1)
    round_.rollouts.uncommit(2)
    assert cli.main(["export-cache", str(tmp_path / "c"), "-o", str(tmp_path / "x.parquet")]) == 0
    err = " ".join(capsys.readouterr().err.split())
    assert "rollouts: 1 of 3 blocks are not finished, and left out in the export" in err
    assert "teacher: 2 of 3 blocks are not finished, and null in the export" in err
    table = parquet.read_table(tmp_path / "x.parquet").to_pydict()
    assert table["teacher.teacher.logprobs"] == [[-0.25, None, -3.0]] * 4 + [None] * 4
    assert table["rollout_logprobs"] == [[-0.5, -1.0, 0.0]] * 8 and table["answer"] == [None] * 8


def test_an_export_replaces_nothing_by_less(tmp_path: Path) -> None:
    factory.filled(tmp_path / "c")
    file = tmp_path / "x.parquet"
    assert exporting.run(str(tmp_path / "c"), str(file)) == 0
    before = file.read_bytes()
    shard = next(path for path in (tmp_path / "c").rglob("student/entropy/c/1/*") if path.is_file())
    shard.unlink()
    with pytest.raises(cs.CorruptBlockError, match="its shard is missing"):
        exporting.run(str(tmp_path / "c"), str(file))
    assert file.read_bytes() == before and {path.name for path in tmp_path.iterdir()} == {"c", "x.parquet"}
    with pytest.raises(RedpenError, match="or a directory, got a file"):
        exporting.run(str(tmp_path / "c"), __file__)
    (tmp_path / "link.parquet").symlink_to(file)
    with pytest.raises(RedpenError, match=r"link\.parquet.*symbolic link"):
        exporting.run(str(tmp_path / "c"), str(tmp_path / "link.parquet"))
    records = factory.prompts(4)
    cs.create(tmp_path / "empty").start_round(factory.round_manifest(records), records)
    with pytest.raises(cs.CacheError, match="no block of rollouts is finished, nothing to export"):
        exporting.run(str(tmp_path / "empty"), str(file))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[cs.Round, Path]:
    """A round with every array that there is, chats and texts among its prompts, and its export."""
    directory, student = tmp_path_factory.mktemp("exported"), resolve(toy().student)
    identity = {"student": student.identity, "tokenizer": student.tokenizer_identity}
    cache = factory.filled(directory / "a", **identity)
    add_partial_teachers(directory / "a", 3)
    round_, rng = cache.round(), np.random.default_rng(4)
    own = round_.start_scores("own", factory.scores_manifest("teacher", topk=3))
    for block in range(round_.n_blocks):
        candidate_ids = round_.scores("student").read(block).candidate_ids
        own.write(block, factory.score_block(own.manifest, round_.rollouts.read(block), rng, candidate_ids))
    round_.scores("alone").uncommit(1)
    assert exporting.run(str(directory / "a"), str(directory / "x.parquet")) == 0
    return round_, directory / "x.parquet"


def test_an_export_is_restored_whole(
    exported: tuple[cs.Round, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every array of every scorer, which blocks there are, and all manifests; a second import changes nothing."""
    first, file = exported
    again = imported(str(file), tmp_path / "b")
    assert not capsys.readouterr().err.count("warning")
    assert set(first.scorer_names()) == {"student", "teacher", "partial", "alone", "own"}
    assert_same_round(first, again)
    before = tree_digest(tmp_path / "b")
    assert importing.run(str(file), toy(), str(tmp_path / "b")) == 0
    assert tree_digest(tmp_path / "b") == before and "nothing to do" in capsys.readouterr().out


def assert_same_round(first: cs.Round, again: cs.Round) -> None:
    assert again.manifest == first.manifest and again.scorer_names() == first.scorer_names()
    groups = [(first.rollouts, again.rollouts)]
    groups += [(first.scores(name), again.scores(name)) for name in first.scorer_names()]  # type: ignore[misc]
    for ours, theirs in groups:
        assert ours.manifest == theirs.manifest
        assert ours.committed().tolist() == theirs.committed().tolist()
        for block in np.flatnonzero(ours.committed()).tolist():
            for a, b in zip(astuple(ours.read(block)), astuple(theirs.read(block)), strict=True):
                assert (a is None and b is None) or a.tobytes() == b.tobytes()
    assert [again.prompts[i] for i in range(again.n_prompts)] == [first.prompts[i] for i in range(first.n_prompts)]


def test_prompts_without_rollouts_are_restored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The environment failed in all their rollouts: the first and last prompt of a block, and one of another."""
    student, records, rng = resolve(toy().student), factory.prompts(10), np.random.default_rng(5)
    identity = {"student": student.identity, "tokenizer": student.tokenizer_identity}
    manifest = factory.round_manifest(records, rollouts_per_prompt=2, **identity)
    round_ = cs.create(tmp_path / "a").start_round(manifest, records)
    scores = round_.start_scores("student", factory.scores_manifest("student"))
    for block, without in enumerate(({0, 3}, set(), {1})):
        whole = factory.rollout_block(manifest, block, rng)
        prompts = [(int(index), whole.prompt_ids(n)) for n, index in enumerate(whole.prompt_index)]
        spans = [
            (row, whole.response_slice(row)) for row in range(whole.n_rows) if whole.row_prompt[row] not in without
        ]
        rows = [
            cs.RolloutRow(
                int(whole.row_prompt[row]),
                int(whole.sample_index[row]),
                whole.token_ids[span],
                whole.rollout_logprobs[span],
                int(whole.finish_reason[row]),
            )
            for row, span in spans
        ]
        rollouts = cs.RolloutBlock.from_rows(prompts, rows)
        round_.rollouts.write(block, rollouts)
        scores.write(block, factory.score_block(scores.manifest, rollouts, rng))
    assert exporting.run(str(tmp_path / "a"), str(tmp_path / "x.parquet")) == 0
    assert parquet.read_table(tmp_path / "x.parquet").num_rows == 2 * 7
    assert_same_round(round_, imported(str(tmp_path / "x.parquet"), tmp_path / "b"))
    assert "warning" not in capsys.readouterr().err


def _with(table: pa.Table, column: str, values: list[Any]) -> pa.Table:
    number = table.schema.get_field_index(column)
    return table.set_column(number, table.schema.field(column), pa.array(values, table.schema.field(column).type))


def _lists(table: pa.Table, column: str, change: Callable[[list[Any]], list[Any]]) -> pa.Table:
    return _with(table, column, [change(values) for values in table[column].to_pylist()])


CHANGED: dict[str, tuple[Callable[[pa.Table], pa.Table], str]] = {
    "a score": (lambda t: _lists(t, "student.entropy", lambda e: [1.0] * len(e)), "student were changed"),
    "a mask": (lambda t: _lists(t, "trained", lambda e: [*e[:-1], 0]), "rollouts"),
    "an answer": (lambda t: _with(t, "answer", ["x"] * t.num_rows), "its prompts were changed"),
    "rows": (lambda t: t.slice(1), "rollouts"),
    "a prompt's rows": (lambda t: t.slice(12), "its rows were changed"),
    "a column": (lambda t: t.drop_columns(["teacher.own.topk_ids"]), "its columns were changed"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGED)
def test_a_changed_export_is_imported_without_scores(
    name: str, exported: tuple[cs.Round, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, reason = CHANGED[name]
    table = change(parquet.read_table(exported[1]))
    parquet.write_table(table, tmp_path / "x.parquet", row_group_size=12)
    again = imported(str(tmp_path / "x.parquet"), tmp_path / "b", "rollouts.stop_token_ids=[7]")
    assert again.scorer_names() == [] and again.manifest.engine == IMPORTED
    err = " ".join(capsys.readouterr().err.split())
    assert "the scores of student, teacher.alone, teacher.own, teacher.partial, teacher.teacher are left out" in err
    assert reason in err


NO_EXPORTS = (
    *(b"[" * 100_000, b'{"scores": ' + b"[" * 100_000, b"9" * 5000, b"[1]", b"\xff"),
    {"without_rollouts": [[1e400, {}, []]]},
    *({"format_version": "2"}, {"digests": {"rollouts": [5]}}, {"columns": 5}),
)


@pytest.mark.parametrize("about", NO_EXPORTS, ids=lambda about: str(about)[:30])
def test_a_file_whose_metadata_is_not_an_exports_is_no_export(
    about: Any, exported: tuple[cs.Round, Path], tmp_path: Path
) -> None:
    table = parquet.read_table(exported[1])
    if isinstance(about, dict):
        about = json.dumps(json.loads(table.schema.metadata[b"redpen"]) | about).encode()
    parquet.write_table(table.replace_schema_metadata({b"redpen": about}), tmp_path / "x.parquet")
    assert Export.of(tmp_path / "x.parquet") is None


def test_an_export_of_another_student_is_imported_without_scores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    factory.filled(tmp_path / "a")
    assert exporting.run(str(tmp_path / "a"), str(tmp_path / "x.parquet")) == 0
    assert imported(str(tmp_path / "x.parquet"), tmp_path / "b").scorer_names() == []
    assert "it was sampled by a different student (student.digest" in " ".join(capsys.readouterr().err.split())


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1), n_prompts=st.integers(1, 9), per_block=st.integers(1, 5))
def test_round_trip(seed: int, n_prompts: int, per_block: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Prompts may be equal, have unlike numbers of rollouts, be chats; behaviour may be unknown, tokens untrained."""
    rng, directory = np.random.default_rng(seed), tmp_path_factory.mktemp("trip")
    chats: list[dict[str, Any]] = [{"messages": [{"role": "user", "content": "a\n\U0001f600"}], "source": "chat"}]
    records = [[*factory.prompts(2), *chats][i] for i in rng.integers(0, 3, n_prompts)]
    manifest = factory.round_manifest(records, prompts_per_block=per_block)
    round_ = cs.create(directory / "a").start_round(manifest, records)
    for block in range(round_.n_blocks):
        made = factory.rollout_block(manifest, block, rng)
        rows = []
        for row in range(made.n_rows):
            if made.sample_index[row] <= rng.integers(0, 3):
                span = made.response_slice(row)
                logprobs = np.where(rng.random(len(made.token_ids[span])) < 0.3, np.nan, made.rollout_logprobs[span])
                trained = rng.integers(0, 2, len(logprobs))
                prompt, sample = int(made.row_prompt[row]), int(made.sample_index[row])
                # a prompt's rollouts are numbered from 0 on, without gaps
                sample = sum(other.prompt == prompt for other in rows)
                rows.append(
                    cs.RolloutRow(prompt, sample, made.response(row), logprobs, int(made.finish_reason[row]), trained)
                )
        prompts = [(int(index), made.prompt_ids(p)) for p, index in enumerate(made.prompt_index)]
        round_.rollouts.write(block, cs.RolloutBlock.from_rows(prompts, rows))
    file = str(directory / "x.parquet")
    assert exporting.run(str(directory / "a"), file) == 0
    limits = ("rollouts.stop_token_ids=[7]", "rollouts.max_prompt_tokens=6", "rollouts.max_response_tokens=9")
    again = imported(file, directory / "b", *limits, f"rollouts.prompts_per_block={per_block}")
    same_rollouts(round_, again)
