"""A stage has ended when its record says so, and what it ended with is what its readers get."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import cache_schema as cs
from helpers import killing
from helpers.caches import SMALL, flip_a_bit, small_recipe
from helpers.commands import one_line
from helpers.training import curve
from pipeline import distill, merge
from pipeline.cli import main
from pipeline.config import ModelConfig
from pipeline.distill import Measurement
from pipeline.errors import RedpenError
from pipeline.models.paths import find_directory
from pipeline.models.resolve import resolve
from pipeline.report import runs
from pipeline.runs.files import DamagedRunError, digests, read_record, write_record
from pipeline.runs.trained_student import trained_student
from pipeline.train import stage

STEPS = ("train.steps=3",)
TINY = ("prompts.limit=4", "rollouts.prompts_per_block=4", "train.steps=1", "distill.patience=1")


@pytest.fixture(scope="module")
def finished(toy_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    assert stage.run(small_recipe(*STEPS), str(toy_cache), run) == 0
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished run."""
    return shutil.copytree(finished, tmp_path / "run")


def same(run: Path, other: Path) -> bool:
    """Everything but the timings."""
    names = ("recipe.toml", "adapter")
    return digests(run, names) == digests(other, names) and curve(run) == curve(other)


# -------------------------------------------------------------------------------------------------------------- train


@pytest.mark.parametrize("part", ["adapter", "ledger.json"])
def test_what_was_removed_is_made_again_from_the_checkpoint(
    part: str, run: Path, finished: Path, toy_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = run / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert part != "adapter" or trained_student(small_recipe().student, run) is None
    monkeypatch.setattr("pipeline.train.trainer.StudentTrainer.update", None)  # nothing is trained again
    assert stage.run(small_recipe(*STEPS), str(toy_cache), run) == 0
    assert same(run, finished) and (run / "ledger.json").exists()


def test_without_adapter_and_checkpoint_one_line_says_what_to_do(run: Path, toy_cache: Path) -> None:
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints")
    before = (run / "run.json").read_bytes()
    with pytest.raises(RedpenError, match=r"no whole checkpoint in .*checkpoints") as error:
        stage.run(small_recipe(*STEPS), str(toy_cache), run)
    assert "\n" not in str(error.value) and (run / "run.json").read_bytes() == before


@pytest.mark.parametrize(
    "name", ["adapter/adapter_model.safetensors", "metrics.jsonl", "ledger.json", "recipe.toml", "run.json"]
)
def test_damage_of_a_finished_run_reaches_nobody(
    name: str, run: Path, toy_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """train, verify, and whoever uses that file."""
    assert main(["verify", str(run)]) == 0
    flip_a_bit(run / name)
    with pytest.raises(DamagedRunError) as error:
        stage.run(small_recipe(*STEPS), str(toy_cache), run)
    assert str(run / name) in str(error.value) and "\n" not in str(error.value)
    capsys.readouterr()
    assert main(["verify", str(run)]) == 1
    assert str(run / name) in capsys.readouterr().out
    if name.startswith("adapter"):
        find_directory.cache_clear()
        uses: list[Callable[[], object]] = [
            lambda: trained_student(small_recipe().student, run),
            lambda: resolve(ModelConfig(model="toy:student", adapter=str(run / "adapter"))).adapter_directory,
            lambda: merge.run(str(run), str(tmp_path / "merged")),
            lambda: merge.run(str(run / "adapter"), str(tmp_path / "merged")),
        ]
        for use in uses:
            with pytest.raises(DamagedRunError, match="adapter_model"):
                use()
    else:
        (note,) = runs.read_run(run)["notes"]
        assert name in note


@pytest.mark.parametrize(
    "command", ["eval RUN", "chat RUN", "sample RUN 1+1=", "merge RUN -o merged", "push RUN a/b --base x/y"]
)
def test_a_recipe_that_was_changed_since_is_used_by_no_command(
    command: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that is valid, so only its digest shows it: figures and responses would be of other settings."""
    monkeypatch.chdir(run.parent)
    recipe = run / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("temperature = 1.0", "temperature = 0.5"))
    assert main(command.replace("RUN", str(run)).split()) == 1
    assert str(recipe) in one_line(capsys.readouterr().err)
    assert not (run.parent / "merged").exists()


def test_answers_on_a_page_are_not_checked_by_a_recipe_that_was_changed(
    run: Path, toy_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = run / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("answer_pattern = ", "answer_pattern = 'x' # "))
    assert main(["report", str(run), str(toy_cache), "-o", str(tmp_path / "r.html")]) == 0
    assert "answers are not checked" in capsys.readouterr().err


def test_a_checkpoint_of_another_step_is_passed_over(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest = max((run / "checkpoints").iterdir())
    state = json.loads((newest / "state.json").read_text())
    (newest / "state.json").write_text(json.dumps(state | {"step": 2}))
    assert main(["verify", str(run)]) == 1
    assert str(newest) in capsys.readouterr().out


def test_a_run_made_before_there_were_digests_goes_on(run: Path, toy_cache: Path) -> None:
    record = read_record(run)
    assert record is not None
    recorded = record.model_dump(mode="json", exclude={"files"})
    (run / "run.json").write_text(json.dumps(recorded))
    for state in run.glob("checkpoints/*/state.json"):
        old = json.loads(state.read_text())
        del old["digest"]
        state.write_text(json.dumps(old))
    assert main(["verify", str(run)]) == 0 and not runs.read_run(run)["notes"]
    assert trained_student(small_recipe().student, run) is not None
    assert stage.run(small_recipe(*STEPS), str(toy_cache), run) == 0
    assert stage.run(small_recipe("train.steps=4"), str(toy_cache), run) == 0
    now = read_record(run)
    assert now is not None and now.files and now.id == record.id


def test_a_run_that_is_no_utf8_or_lacks_fields_is_left_out_with_a_note(run: Path) -> None:
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\xfe\n")
    (run / "run.json").write_text(json.dumps({"cache": {}, "result": {"sentence": "\x1b[2J"}}))
    found = runs.read_run(run)
    assert found["sentence"] is None and len(found["notes"]) == 1 and "result.step" in found["notes"][0]


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl", ".lock", "adapter", "tensorboard", "run.json"])
def test_links_in_a_run_are_refused_before_anything_is_written(
    name: str, run: Path, toy_cache: Path, tmp_path: Path
) -> None:
    (run / name).rename(tmp_path / "elsewhere")
    (run / name).symlink_to(tmp_path / "elsewhere")
    shutil.rmtree(run / "adapter") if name != "adapter" else None  # else there is nothing to write
    with pytest.raises(RedpenError, match="symbolic link") as error:
        stage.run(small_recipe(*STEPS), str(toy_cache), run)
    assert str(run / name) in str(error.value)


# ------------------------------------------------------------------------------------------------------------ distill


def test_the_student_as_it_was_is_a_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second round shows that the first one made the student worse; nothing of the earlier finish is left."""
    cache, run = str(tmp_path / "cache.zarr"), tmp_path / "run"
    kls = {0: Measurement(0.1), 1: Measurement(0.9)}
    monkeypatch.setattr(distill, "fresh_reverse_kl", lambda recipe, url, index: kls[index])
    assert distill.run(small_recipe(*TINY, "distill.rounds=1"), cache, run) == 0
    recipe = small_recipe(*TINY, "distill.rounds=3")
    assert trained_student(recipe.student, run) not in (None, recipe.student)
    (run / "eval.json").write_text("{}")
    capsys.readouterr()
    assert distill.run(recipe, cache, run) == 0
    assert "the result is the student of the recipe" in capsys.readouterr().out
    record = read_record(run)
    assert record is not None and record.result is not None and record.result.step == 0
    assert not (run / "adapter").exists()
    assert trained_student(recipe.student, run) == recipe.student
    with pytest.raises(RedpenError, match="nothing to merge"):
        merge.run(str(run), str(tmp_path / "merged"))
    (note,) = runs.read_run(run)["notes"]
    assert "eval.json" in note
    before = (run / "run.json").read_bytes()
    assert distill.run(recipe, cache, run) == 0 and (run / "run.json").read_bytes() == before
    assert main(["verify", str(run)]) == 1, "an evaluation of another result"
    (run / "eval.json").unlink()
    assert main(["verify", str(run)]) == 0


def test_a_round_whose_adapter_was_removed_is_completed(tmp_path: Path) -> None:
    cache, run, recipe = str(tmp_path / "cache.zarr"), tmp_path / "run", small_recipe(*TINY, "distill.rounds=1")
    assert distill.run(recipe, cache, run) == 0
    before = digests(run, ["adapter"])
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "rounds/00000/adapter")
    assert distill.run(recipe, cache, run) == 0
    assert digests(run, ["adapter"]) == before
    assert (run / "rounds/00000/adapter/adapter_model.safetensors").exists()
    assert main(["verify", str(run)]) == 0


def test_killed_between_the_last_writes(toy_cache: Path, tmp_path: Path) -> None:
    """Of a round's training and of the whole: before each of them, in turn, by the same command."""
    undisturbed, run = tmp_path / "undisturbed", tmp_path / "run"
    recipe = (*TINY, "distill.rounds=1", "train.checkpoint_every=1")
    assert distill.run(small_recipe(*recipe), str(tmp_path / "calm.zarr"), undisturbed) == 0
    settings = [part for setting in (*SMALL, *recipe) for part in ("--set", setting)]
    command = ["distill", "toy", "--cache", str(tmp_path / "killed.zarr"), "--run", str(run), *settings]
    of_round = [("/rounds/00000/adapter", 1), ("/rounds/00000/run.json", 2)]
    of_all = [("/run/ledger.json", 1), ("/run/adapter", 1), ("/run/run.json", 2)]
    killing.before_each(of_round + of_all, *command)
    assert same(run, undisturbed) and same(run / "rounds/00000", undisturbed / "rounds/00000")
    assert main(["verify", str(run)]) == 0
    assert not list(cs.verify(cs.open(tmp_path / "killed.zarr")))


def test_a_recorded_run_is_written_back_as_it_was(run: Path) -> None:
    before, record = (run / "run.json").read_bytes(), read_record(run)
    assert record is not None
    write_record(run, record)
    assert (run / "run.json").read_bytes() == before
