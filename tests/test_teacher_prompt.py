"""A teacher's own view of each prompt: text made of the row's columns, from the recipe or from the row."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

import cache_schema as cs
import pipeline.rollouts.stage
import pipeline.text.chat_template
from helpers.tiny_configs import tiny_config
from pipeline import distill
from pipeline.api import Teacher
from pipeline.config import Recipe, TeacherConfig, load_recipe
from pipeline.console import results
from pipeline.errors import ConfigError, PromptError, RedpenError
from pipeline.evaluate import stage as evaluate
from pipeline.interchange import exporting, importing
from pipeline.models import model_card
from pipeline.report import inspect
from pipeline.report.document import SetRequest, rollout_set
from pipeline.report.terminal import show_rollout
from pipeline.runs.directory import Result
from pipeline.score import finished, stage
from pipeline.teachers.prompts import check_prompts
from pipeline.text.chat_template import Renderer
from pipeline.text.detokenize import load_decoder
from pipeline.text.prompts import load_prompts
from pipeline.text.teacher_prompt import TeacherPrompt
from pipeline.toy import asset_path

SMALL = (
    "prompts.limit=8",
    "rollouts.prompts_per_block=4",
    "rollouts.rollouts_per_prompt=2",
    "train.prompts_per_step=4",
)
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
SOLVED, HINTED = "{{ solution }}\n{{ prompt }}", "{{ hints | join(';') }};{{ prompt }}"
#: What each teacher reads of a row, without Jinja.
READ: dict[str, Callable[[dict[str, Any]], str]] = {
    "solved": lambda row: f"{row['solution']}\n{row['prompt']}",
    "hinted": lambda row: f"{row['hints'][0]};{row['hints'][1]};{row['prompt']}",
    "own": lambda row: row.get("teacher_prompt", row["prompt"]),
}


def rows() -> list[dict[str, Any]]:
    found = []
    for number, line in enumerate(asset_path("prompts/train.jsonl").read_text().splitlines()[:8]):
        row = json.loads(line)
        found.append(row | {"hints": [str(number), "é"], "unused": "x"})
        if number % 2:
            found[-1]["teacher_prompt"] = f"1+1*1=1*1=1;1+1=2;{row['prompt']}"
    return found


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("prompts") / "p.jsonl", rows())


def recipe_of(path: Path, *overrides: str) -> Recipe:
    return load_recipe("toy", [*SMALL, f"prompts.path={path}", *overrides])


def viewed(path: Path, *overrides: str) -> Recipe:
    """The toy with three teachers, which read other columns of the same rows."""
    made = recipe_of(path, *overrides).model_dump()
    (teacher,) = made["teacher"]
    own = {"solved": {"prompt": SOLVED}, "hinted": {"prompt": HINTED}, "own": {}}
    made["teacher"] = [teacher | {"name": name} | setting for name, setting in own.items()]
    return Recipe.from_dict(made)


@pytest.fixture(scope="module")
def cache(prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rollouts, scored by all three."""
    path = tmp_path_factory.mktemp("viewed") / "c.zarr"
    assert pipeline.rollouts.stage.run(viewed(prompts), str(path)) == 0
    assert stage.run(viewed(prompts), str(path)) == 0
    assert not list(cs.verify(cs.open(path)))
    return path


def check_by_hand(round_: cs.Round, scorer: str, read: Callable[[dict[str, Any]], str], model: Path) -> None:
    """Every score against one plain forward a rollout."""
    teacher = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    for block in range(round_.n_blocks):
        rollouts, found = round_.rollouts.read(block), round_.scores(scorer).read(block)
        for row in range(rollouts.n_rows):
            record = round_.prompts[int(rollouts.prompt_index[rollouts.row_prompt[row]])]
            ids, response = tokenizer(read(record))["input_ids"], rollouts.response(row).tolist()
            with torch.no_grad():
                logprobs = (
                    teacher(torch.tensor([ids + response])).logits.double().log_softmax(-1)[0, len(ids) - 1 : -1]
                )
            span = rollouts.response_slice(row)
            np.testing.assert_allclose(found.logprobs[span], logprobs[range(len(response)), response], atol=2e-5)
            assert found.candidate_logprobs is not None
            candidates = round_.scores("student").read(block).candidate_ids[span]
            expected = logprobs.gather(1, torch.tensor(candidates, dtype=torch.long))
            np.testing.assert_allclose(found.candidate_logprobs[span], expected, atol=2e-5)


# ----------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("name", READ)
def test_scores_are_those_of_the_text_that_is_shown(cache: Path, name: str) -> None:
    check_by_hand(cs.open(cache).round(), name, READ[name], asset_path("teacher"))


@pytest.mark.parametrize("kind", ["streamed", "rows"])
def test_a_teacher_added_later_needs_the_cache_alone(
    cache: Path, prompts: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path, model = Path(shutil.copytree(cache, tmp_path / "c.zarr")), asset_path("teacher")
    if kind == "rows":
        torch.manual_seed(0)
        model = tmp_path / "mamba"
        AutoModelForCausalLM.from_config(tiny_config("mamba", vocab_size=259)).save_pretrained(model)
        AutoTokenizer.from_pretrained(asset_path("teacher")).save_pretrained(model)
    made = recipe_of(
        tmp_path / "gone.jsonl",
        "teacher.name=later",
        f"teacher.model={model}",
        f"teacher.prompt={HINTED}",
        f"score.placement={'streamed' if kind == 'streamed' else 'resident'}",
    )
    assert stage.run(made, str(path), "later") == 0
    assert kind != "rows" or "rows" in capsys.readouterr().err
    check_by_hand(cs.open(path).round(), "later", READ["hinted"], model)


def test_a_prefix_is_the_same_as_its_template(cache: Path, prompts: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(cache, tmp_path / "c.zarr"))
    for name, own in (("a", "prompt_prefix=1+1*1="), ("b", "prompt=1+1*1={{ teacher_prompt | default(prompt) }}")):
        made = recipe_of(prompts, f"teacher.name={name}", f"teacher.{own}", "prompts.columns=['solution', 'hints']")
        assert stage.run(made, str(path), name) == 0
    round_ = cs.open(path).round()
    for block in range(round_.n_blocks):
        a, b = (round_.scores(name).read(block) for name in ("a", "b"))
        assert np.array_equal(a.logprobs, b.logprobs) and np.array_equal(a.candidate_logprobs, b.candidate_logprobs)


# ------------------------------------------------------------------------------------------------------- provenance


def test_scores_say_what_their_teacher_read(cache: Path) -> None:
    round_ = cs.open(cache).round()
    lines = [round_.prompts[index] for index in range(round_.n_prompts)]
    assert all("unused" not in line and line["hints"][1] == "é" for line in lines)
    templates = {name: round_.scores(name).manifest.template for name in READ}
    assert (templates["solved"]["prompt"], templates["solved"]["columns"]) == (SOLVED, ["prompt", "solution"])
    assert "prompt" not in templates["own"] and templates["own"]["columns"] == ["teacher_prompt"]
    for name, read in READ.items():
        assert templates[name]["texts_sha256"] == cs.prompts_sha256([{"prompt": read(line)} for line in lines]), name


@pytest.mark.parametrize("name", ["solved", "own"])
def test_another_text_is_refused(
    cache: Path, prompts: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(shutil.copytree(cache, tmp_path / "c.zarr"))
    before = recipe_of(prompts, f"teacher.name={name}", *([f"teacher.prompt={SOLVED}"] if name == "solved" else []))
    assert stage.run(before, str(path), name) == 0
    changed = recipe_of(prompts, f"teacher.name={name}", "teacher.prompt={{ solution }} {{ prompt }}")
    if name == "solved":  # finished scores need no model, if they are those that the recipe asks for
        monkeypatch.setattr(finished, "is_available", lambda cfg: False)
        assert stage.run(before, str(path), name) == 0
    with pytest.raises(cs.ProvenanceError, match="template") as error:
        stage.run(changed, str(path), name)
    assert "\n" not in str(error.value)


def test_pages_show_what_each_teacher_read(cache: Path, prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    round_ = cs.open(cache).round()
    decoder = load_decoder(round_.manifest)
    found = rollout_set(round_, SetRequest("round", "cache", 100, 10**7), decoder)
    assert found is not None
    for row in found["rows"]:
        line = round_.prompts[row["prompt_index"]]
        assert row["prompt"] == line["prompt"] and row["read"] == {name: read(line) for name, read in READ.items()}
    views = [inspect.rollout(round_, 3, name, lambda: decoder) for name in READ]
    assert [view["teacher_prompt"] for view in views] == [read(round_.prompts[1]) for read in READ.values()]
    show_rollout(views, results())
    shown = capsys.readouterr().out.replace("\n", "")
    assert all(f"{name} read " in shown for name in READ)
    card = model_card.run_card(viewed(prompts), round_, tuple(READ), Result(1, "done", 0))
    assert 'read in place of every prompt "{{ solution }}\\n{{ prompt }}"' in card
    assert "read in place of prompts teacher_prompt of the rows" in card


@pytest.mark.parametrize("planted", [ENDLESS, 5], ids=["endless", "a number"])
def test_a_template_in_somebodys_cache_does_nothing(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planted: object
) -> None:
    quick = Renderer(seconds=0.2)
    monkeypatch.setattr("pipeline.text.teacher_prompt.renderer", lambda: quick)
    path = Path(shutil.copytree(cache, tmp_path / "c.zarr"))
    file = path / "rounds/00000/scores/solved/zarr.json"
    manifest = json.loads(file.read_text())
    manifest["attributes"]["redpen"]["template"] |= {"prompt": planted, "prefix": planted}
    file.write_text(json.dumps(manifest))
    round_ = cs.open(path).round()
    decoder = load_decoder(round_.manifest)
    found = rollout_set(round_, SetRequest("round", "cache", 100, 10**7), decoder)
    assert found is not None
    shown = {row["read"]["solved"] for row in found["rows"]}
    shown.add(inspect.rollout(round_, 0, "solved", lambda: decoder)["teacher_prompt"])
    if isinstance(planted, str):
        assert shown == {"[teacher.prompt takes more than 0.2 s for one prompt]"}
    quick.close()


def test_exports_keep_the_columns(cache: Path, prompts: Path, tmp_path: Path) -> None:
    file = tmp_path / "r.parquet"
    assert exporting.run(str(cache), str(file)) == 0
    table = pq.read_table(file)
    assert table["solution"][0].as_py() == rows()[0]["solution"] and table["teacher_prompt"][0].as_py() is None
    assert importing.run(str(file), viewed(prompts), str(tmp_path / "back.zarr")) == 0
    back, round_ = cs.open(tmp_path / "back.zarr").round(), cs.open(cache).round()
    assert back.manifest == round_.manifest and back.scorer_names() == round_.scorer_names()


def test_columns_that_an_export_cannot_hold_are_named(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [row | {"mixed": [n, "a"] if n else 1, "trained": "yes"} for n, row in enumerate(rows()[:2])]
    made = recipe_of(
        write(tmp_path / "p.jsonl", lines), "prompts.columns=['mixed', 'trained']", "rollouts.format_check_prompts=0"
    )
    assert pipeline.rollouts.stage.run(made, str(tmp_path / "c.zarr")) == 0
    assert exporting.run(str(tmp_path / "c.zarr"), str(tmp_path / "r.parquet")) == 0
    err = capsys.readouterr().err
    assert "column mixed of the prompts has values of several types; it is left out" in err
    assert "column trained of the prompts has the name of one of rollouts; it is left out" in err
    table = pq.read_table(tmp_path / "r.parquet")
    assert "mixed" not in table.column_names and set(table["trained"][0].as_py()) == {1}


# --------------------------------------------------------------------------------------------------------- refusals


HOSTILE = {
    "{% for i in range(10**9) %}{% endfor %}{{ prompt }}": "sampled range|takes more than 0.2 s|OverflowError",
    ENDLESS + "{{ prompt }}": "more than 0.2 s",
    "{{ prompt * 10**9 }}": "memory|characters",
    "{{ prompt * 9000000 }}": "characters",
    "{{ prompt.__class__.__mro__ }}": "unsafe|undefined",
    "{% include '/etc/passwd' %}{{ prompt }}": "loader|Error",
    "{{ prompt ": "expected a Jinja template",
    "Think.": "names no column",
    "{% if prompt %}{% endif %}": "expected text",
    "{{ prompt }}{{ solutoin }}": "prompt 1: .*'solutoin' is undefined; the row has .*solution",
    "{{ prompt }}{{ rare }}": "prompt 3: .*'rare' is undefined",
}


@pytest.mark.parametrize("template", HOSTILE)
def test_what_cannot_be_read_is_one_line_before_anything_is_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    quick = Renderer(seconds=0.2)
    for module in ("chat_template", "teacher_prompt"):
        monkeypatch.setattr(f"pipeline.text.{module}.renderer", lambda: quick)
    file = write(tmp_path / "p.jsonl", [row | ({"rare": 1} if n < 2 else {}) for n, row in enumerate(rows())])
    made = recipe_of(file, f"teacher.prompt={json.dumps(template)}", "prompts.columns=['solution']")
    with pytest.raises(RedpenError, match=HOSTILE[template]) as error:
        pipeline.rollouts.stage.run(made, str(tmp_path / "c.zarr"))
    assert "teacher.prompt" in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400
    assert not (tmp_path / "c.zarr").exists()
    quick.close()


@pytest.mark.parametrize(
    ("times", "error", "message"),
    [(300, PromptError, "prompt 1: expected at most 511 tokens.* the teacher's context is 512"),
     (62, ConfigError, r"rollouts\.max_response_tokens: expected at most \d+ \(teacher's context of 512 tokens")],
)  # fmt: skip
def test_a_text_that_is_too_long_is_never_cut(
    prompts: Path, tmp_path: Path, times: int, error: type[Exception], message: str
) -> None:
    long = f"teacher.prompt={{{{ prompt * {times} }}}}"
    with pytest.raises(error, match=message):
        pipeline.rollouts.stage.run(recipe_of(prompts, long), str(tmp_path / "c.zarr"))
    assert not (tmp_path / "c.zarr").exists()


def test_columns_that_a_round_did_not_keep(cache: Path, prompts: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(cache, tmp_path / "c.zarr"))
    made = recipe_of(prompts, "teacher.name=later", "teacher.prompt={{ unused }}{{ prompt }}")
    with pytest.raises(PromptError, match=r"round 0: prompt 1: teacher\.later\.prompt: 'unused' .*prompts\.columns"):
        stage.run(made, str(path), "later")


def test_rows_of_later_rounds_are_looked_at_first(tmp_path: Path) -> None:
    lines = [{name: row[name] for name in row if n < 6 or name != "solution"} for n, row in enumerate(rows())]
    made = recipe_of(write(tmp_path / "p.jsonl", lines), f"teacher.prompt={SOLVED}", "prompts.limit=2")
    with pytest.raises(PromptError, match=r"prompt 7: teacher\.prompt: 'solution' is undefined"):
        distill.run(made, str(tmp_path / "c.zarr"), tmp_path / "run")
    assert not (tmp_path / "c.zarr").exists()


def test_rows_are_looked_at_without_the_teacher(tmp_path: Path) -> None:
    """Its context is not known then, its columns are."""
    file = write(tmp_path / "p.jsonl", rows())
    away = (f"teacher.model={tmp_path / 'gone'}", "prompts.columns=['solution']")
    made = recipe_of(file, f"teacher.prompt={SOLVED}", *away)
    check_prompts(made, load_prompts(made.prompts, columns=("solution",)), "p.jsonl")
    with pytest.raises(PromptError, match=r"p\.jsonl: prompt 1: teacher\.prompt: 'solution' is undefined"):
        check_prompts(made, load_prompts(made.prompts), "p.jsonl")


def test_a_column_that_no_row_has_is_named(prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = recipe_of(prompts, "prompts.columns=['solutoin']", "prompts.limit=2", "rollouts.format_check_prompts=0")
    assert pipeline.rollouts.stage.run(made, str(tmp_path / "c.zarr")) == 0
    assert "no prompt has the column 'solutoin' of prompts.columns" in capsys.readouterr().err


def test_rows_without_a_text_are_counted(prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_prompts(recipe_of(prompts), load_prompts(recipe_of(prompts).prompts), "p.jsonl")
    assert "teacher: 4 of 8 prompts have no teacher_prompt or teacher_messages" in capsys.readouterr().err


def test_combinations_that_make_no_sense(prompts: Path) -> None:
    with pytest.raises(ConfigError, match="expected either prompt or prompt_prefix, got both"):
        recipe_of(prompts, "teacher.prompt={{ prompt }}", "teacher.prompt_prefix=a")
    with pytest.raises(ConfigError, match=r"teacher\.prompt"):
        Teacher(TeacherConfig(model="toy:teacher", dtype="float32", prompt="{{ prompt }}"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"teacher_prompt": "a", "teacher_messages": [{"role": "user", "content": "a"}]},
            "teacher_prompt or teacher_m",
        ),
        (
            {"teacher_messages": [{"role": "assistant", "content": "a"}]},
            "teacher_messages: expected a chat",
        ),
        ({"teacher_messages": "a"}, "teacher_messages: expected a list"),
        ({"teacher_prompt": " "}, "teacher_prompt: expected text, got an empty"),
        ({"teacher_prompt": 3}, "teacher_prompt: expected text, got a number"),
        ({"solution": "\ud800"}, "solution: expected Unicode"),
        ({"solution": [float("nan")]}, "solution: expected text, or numbers"),
    ],
)
def test_rows_at_fault(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    file = write(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b"} | row])
    with pytest.raises(PromptError, match=rf"p\.jsonl:2: .*{message}"):
        load_prompts(recipe_of(file).prompts, columns=("solution",))


def test_parquet_columns_of_other_types(tmp_path: Path) -> None:
    file = tmp_path / "p.parquet"
    table = {"prompt": ["a"], "solution": ["s"], "when": pa.array([0], pa.timestamp("s")), "else": [1]}
    pq.write_table(pa.table(table), file)
    cfg = recipe_of(file).prompts
    assert load_prompts(cfg, columns=("solution",)) == [{"prompt": "a", "solution": "s"}]
    with pytest.raises(PromptError, match=r"row 1: when: expected text, or numbers, .* got datetime"):
        load_prompts(cfg, columns=("when",))


# ------------------------------------------------------------------------------------------------------- evaluation


def test_evaluation_reads_the_view_or_says_that_it_cannot(
    cache: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = write(tmp_path / "plain.jsonl", [{"prompt": row["prompt"], "answer": row["answer"]} for row in rows()])
    toml = tmp_path / "r.toml"
    toml.write_text(recipe_of(prompts, f"teacher.prompt={json.dumps(SOLVED)}", "teacher.model=toy:student").to_toml())
    found = {}
    for path in (prompts, plain):
        out = tmp_path / f"{path.stem}.json"
        assert evaluate.run("toy:student", recipe=str(toml), prompts=str(path), out=out) == 0
        found[path] = json.loads(out.read_text())["model"]
    assert found[prompts]["reverse_kl"]["value"] > 0, "the same weights that read the solution are another teacher"
    assert "reverse_kl" not in found[plain] and "greedy" in found[plain]
    assert "'solution' is undefined" in (err := capsys.readouterr().err) and "reverse KL is left out" in err


# ------------------------------------------------------------------------------------------------------- properties

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(lambda text: text.strip())
VALUES = st.recursive(TEXT | st.integers(-9, 9) | st.booleans(), lambda one: st.lists(one, max_size=3), max_leaves=4)
CHATS = st.lists(st.tuples(st.sampled_from(["system", "user", "tool"]), TEXT), max_size=3)


@settings(max_examples=60, deadline=None)
@given(TEXT, TEXT, VALUES, CHATS)
def test_every_row_is_read_as_written(prompt: str, solution: str, extra: Any, before: list[tuple[str, str]]) -> None:
    """Columns are never templates themselves, and all but the prompt stays as it is."""
    said = TeacherPrompt("<{{ solution }}|{{ prompt }}>{{ extra | tojson }}\n")
    chat = [{"role": role, "content": text} for role, text in [*before, ("user", prompt)]]
    text = f"<{solution}|{prompt}>"
    for record in ({"prompt": prompt}, {"messages": chat}):
        read = said.read(record | {"solution": solution, "extra": extra, "id": "7"})
        seen = read["prompt"] if "prompt" in record else read["messages"][-1]["content"]
        assert seen.startswith(text) and seen.endswith("\n") and json.loads(seen.removeprefix(text)) == extra
        assert "prompt" in record or read["messages"][:-1] == chat[:-1]
        assert read["id"] == "7" and TeacherPrompt().read(record) == record
    own = {"prompt": prompt, "teacher_messages": chat}
    assert TeacherPrompt().read(own) == {"messages": chat}
    assert TeacherPrompt().read({"messages": chat, "teacher_prompt": solution})["messages"] == [
        *chat[:-1],
        {"role": "user", "content": solution},
    ]
