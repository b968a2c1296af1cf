"""The format check: a student that does not keep to the form is refused before the first rollout, and only then."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

import cache_schema as cs
from helpers.caches import small_recipe
from pipeline.errors import ConfigError, RedpenError
from pipeline.rollouts import stage

JSON = ("prompts.limit=8", "eval.format=json")


def test_an_illegal_student_is_refused_before_any_rollout(tmp_path: Path) -> None:
    with pytest.raises(RedpenError) as caught:
        stage.run(small_recipe(*JSON, "rollouts.format_check_prompts=5"), str(tmp_path / "c.zarr"))
    line = str(caught.value)
    assert line.startswith("format check: 0 of the first 5 responses are legal by eval.format = 'json', fewer than ")
    assert len(re.findall(r'"\d\*\d=\d+;\d+[+-]\d+=\d+"', line)) == 2 and "\n" not in line
    assert not cs.open(tmp_path / "c.zarr").round().has_blocks()
    # what was left is no hindrance to the recipe that has been put right
    assert stage.run(small_recipe("prompts.limit=4"), str(tmp_path / "c.zarr")) == 0


def test_truncated_responses_are_reported(tmp_path: Path) -> None:
    with pytest.raises(RedpenError, match=r"8 were cut at rollouts\.max_response_tokens = 3; not legal"):
        stage.run(small_recipe("prompts.limit=8", "rollouts.max_response_tokens=3"), str(tmp_path / "c.zarr"))


def test_examples_are_escaped_and_short() -> None:
    from pipeline.rollouts.format_check import _short

    shown = _short("\x1b[2J" + "long " * 100 + "\nend\u202e")
    assert shown.startswith("\\x1b[2Jlong") and shown.endswith("\\nend\\u202e") and len(shown) < 100


@pytest.mark.parametrize(
    "settings", [("rollouts.format_check_prompts=0",), ("rollouts.format_check_min=0",), ("eval.format=",)], ids=str
)
def test_the_format_check_can_be_switched_off(settings: tuple[str, ...], tmp_path: Path) -> None:
    assert stage.run(small_recipe(*JSON, *settings), str(tmp_path / "c.zarr")) == 0


def test_only_a_round_without_blocks_is_entered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And the check changes nothing: the rollouts are those of a round without it."""
    url, recipe = str(tmp_path / "c.zarr"), small_recipe("prompts.limit=8")
    assert stage.run(recipe, url) == 0
    assert "format check: 8 of the first 8 responses are legal" in capsys.readouterr().err
    assert stage.run(small_recipe("prompts.limit=8", "rollouts.format_check_prompts=0"), f"{tmp_path}/d.zarr") == 0
    one, other = (cs.open(tmp_path / name).round().rollouts.read(1) for name in ("c.zarr", "d.zarr"))
    np.testing.assert_array_equal(one.token_ids, other.token_ids)
    cs.open(url, writable=True).round().rollouts.uncommit(1)
    assert stage.run(small_recipe(*JSON), url) == 0  # nothing is legal now, but the round has begun
    assert "format check" not in capsys.readouterr().err


def test_a_round_without_a_check_needs_no_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    url, maths = str(tmp_path / "c.zarr"), ("prompts.limit=4", "eval.match=math")
    with pytest.raises(ConfigError, match="math-verify"):
        stage.run(small_recipe(*maths), url)
    assert stage.run(small_recipe(*maths, "eval.format="), url) == 0


# -- the answer check ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["prompts", "held-out prompts"])
def test_a_round_without_a_right_answer_is_pointed_out(
    where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its own rollouts, or by responses to held-out prompts: answers inside sentences, compared as a whole."""
    answers, none = tmp_path / "answers.jsonl", tmp_path / "none.jsonl"
    answers.write_text('{"prompt": "121+2*3=", "answer": "127"}\n')
    none.write_text('{"prompt": "121+2*3="}\n')
    sampled, held_out = (answers, none) if where == "prompts" else (none, answers)
    settings = [f"prompts.path={sampled}", f"eval.path={held_out}", "eval.format=", "eval.answer_pattern="]
    assert stage.run(small_recipe(*settings), str(tmp_path / "c.zarr")) == 0
    said = capsys.readouterr().err
    assert 'eval.match = "exact", e.g. expected "127", got "2*3=6;121+6=127"; ' in said
    assert 'contain it: set eval.match = "contains"' in said and said.count("e.g. expected") == 1
    assert stage.run(small_recipe(*settings, "eval.match=contains"), str(tmp_path / "d.zarr")) == 0
    assert "e.g. expected" not in capsys.readouterr().err
