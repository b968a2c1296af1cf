"""Several teachers over one round: added later, mixed, and compared before anything is trained."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import cache_schema as cs
import pipeline.score.stage
from helpers.caches import SMALL, small_recipe
from pipeline.cli import main
from pipeline.diagnose import read, stage

#: A second teacher: the student itself, which drops carries where the first does not.
SECOND = ("teacher.name=second", "teacher.model=toy:student")


def digests(path: Path) -> dict[str, str]:
    files = (file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def both(toy_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ensemble") / "c.zarr"
    shutil.copytree(toy_cache, path)
    assert pipeline.score.stage.run(small_recipe(*SECOND), str(path), "second") == 0
    return path


def test_a_teacher_added_later_touches_its_own_group_only(toy_cache: Path, both: Path) -> None:
    before, after = digests(toy_cache), digests(both)
    assert {name: after[name] for name in before} == before
    added = after.keys() - before.keys()
    assert added and all(name.startswith("rounds/00000/scores/second/") for name in added)
    assert not list(cs.verify(cs.open(both)))


@pytest.mark.parametrize("mixture", ["arithmetic", "geometric"])
def test_a_mixture_of_both_trains(mixture: str, both: Path, tmp_path: Path) -> None:
    settings = ('train.teacher=["teacher","second"]', f"train.mixture={mixture}", "train.steps=2")
    arguments = [part for setting in (*settings, "train.prompts_per_step=4") for part in ("--set", setting)]
    assert main(["train", "toy", "--cache", str(both), "--run", str(tmp_path / "run"), *arguments]) == 0
    steps = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2 and all(np.isfinite(step["reverse_kl"]) for step in steps)


def test_the_shipped_recipe_adds_its_second_teacher_to_a_cache_of_the_toy(
    toy_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "c.zarr"
    shutil.copytree(toy_cache, cache)
    small = [part for setting in (*SMALL, "train.steps=2") for part in ("--set", setting)]
    assert main(["score", "toy-ensemble", "--cache", str(cache), *small]) == 0
    said = capsys.readouterr().out
    assert "nothing to do" in next(line for line in said.splitlines() if line.startswith("teacher:"))
    assert main(["train", "toy-ensemble", "--cache", str(cache), "--run", str(tmp_path / "run"), *small]) == 0
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 2


def test_diagnose_says_where_teachers_differ(both: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen = read.read_round(cs.open(both).round(), ["teacher", "second"])
    assert seen is not None
    (pair,) = stage.diagnosis(seen)["between"]
    one, other = (seen.pairs[name].tokens for name in ("teacher", "second"))
    sure = [r.prefers_logprob >= np.log(0.5) for r in (one, other)]
    expected = (sure[0] & sure[1] & (one.prefers != other.prefers)).mean()
    assert pair["teachers"] == ["teacher", "second"] and pair["tokens"] == len(one.token)
    assert pair["differ"] == pytest.approx(expected) and 0.005 < expected < 0.2, "the dropped carries"
    assert all(item["token"].strip("'").isdigit() and len({*item["wants"].values()}) == 2 for item in pair["at"])
    assert main(["diagnose", str(both)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "second and teacher prefer different tokens at" in said and "train.route" in said


def test_teachers_that_agree_are_reported(
    toy_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.zarr"
    shutil.copytree(toy_cache, path)
    assert pipeline.score.stage.run(small_recipe("teacher.name=again"), str(path), "again") == 0
    assert main(["diagnose", str(path)]) == 0
    assert "prefer different tokens nowhere" in " ".join(capsys.readouterr().out.split())
