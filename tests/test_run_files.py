"""What a run records of its result, and that every reader finds damage."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.caches import flip_a_bit
from pipeline.errors import RedpenError
from pipeline.runs import files as run_files
from pipeline.runs.files import DamagedRunError, Record, Result, check, digests, read_record, replacing, write_record
from pipeline.runs.lock import locked

NAMES = ("metrics.jsonl", "ledger.json", "adapter")


def finished(run: Path) -> Path:
    """A run of three files, ended and recorded."""
    (run / "adapter").mkdir(parents=True)
    for name in ("metrics.jsonl", "ledger.json", "adapter/weights", "adapter/README.md"):
        (run / name).write_text(f'{{"step": 1, "name": "{name}"}}\n')
    record = Record(cache={"url": "c"}, id="1", result=Result(1, "done", 0), files=digests(run, NAMES))
    write_record(run, record)
    return run


def test_what_was_written_is_read(tmp_path: Path) -> None:
    run = finished(tmp_path)
    record = read_record(run)
    assert record is not None and record.result == Result(1, "done", 0) and record.cache == {"url": "c"}
    assert set(record.files or ()) == {"metrics.jsonl", "ledger.json", "adapter/weights"}
    check(run, *NAMES, "eval.json")
    (run / "adapter/README.md").write_text("license: mit")
    check(run, *NAMES)


@pytest.mark.parametrize("damage", [flip_a_bit, Path.unlink], ids=["flipped", "removed"])
@pytest.mark.parametrize("name", ["metrics.jsonl", "ledger.json", "adapter/weights", "run.json"])
def test_damage_is_one_line_that_names_the_file(name: str, damage: Callable[[Path], None], tmp_path: Path) -> None:
    run = finished(tmp_path)
    damage(run / name)
    if name == "run.json" and damage is not flip_a_bit:
        assert read_record(run) is None
        return
    with pytest.raises(DamagedRunError) as error:
        check(run, *NAMES)
    assert str(run / name) in str(error.value) and "\n" not in str(error.value)


def test_a_run_without_digests_is_read_as_it_is(tmp_path: Path) -> None:
    run = finished(tmp_path)
    recorded = {"cache": {}, "id": "1", "result": {"step": 1, "sentence": "s", "exit_code": 0}}
    (run / "run.json").write_text(json.dumps(recorded))
    flip_a_bit(run / "ledger.json")
    (run / "eval.json").write_text("{}")
    check(run, *NAMES, "eval.json")
    with replacing(run, "eval.json"):
        pass
    check(run, "eval.json")


@pytest.mark.parametrize(
    "result",
    [
        {"step": 1, "sentence": "s"},
        {"step": -1, "sentence": "s", "exit_code": 0},
        {"step": 1, "sentence": ["s"], "exit_code": 0},
        {"step": 1, "sentence": "s", "exit_code": 10**30},
        [],
        "done",
    ],
)
def test_an_invalid_result_is_one_line(result: object, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"cache": {}, "id": "1", "result": result}))
    with pytest.raises(DamagedRunError, match=r"run\.json: result") as error:
        read_record(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("cache", [[1], {"url": 5}, {"round": "z"}, {"teacher": {"a": 1}}])
def test_a_run_that_learned_from_something_invalid_is_one_line(cache: object, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"cache": cache, "id": "1", "result": None}))
    with pytest.raises(DamagedRunError, match=r"run\.json: cache") as error:
        read_record(tmp_path)
    assert "\n" not in str(error.value)


def test_what_is_added_is_recorded(tmp_path: Path) -> None:
    run = finished(tmp_path)
    (run / "eval.json").write_text("of an earlier result")
    with pytest.raises(DamagedRunError, match=r"eval\.json: does not belong"):
        check(run, "eval.json")
    with locked(run), replacing(run, "eval.json", "eval.zarr"):
        (run / "eval.json").write_text("{}")
        (run / "eval.zarr").mkdir()
        (run / "eval.zarr/zarr.json").write_text("{}")
        with pytest.raises(DamagedRunError):
            check(run, "eval.json")
    check(run, *NAMES, "eval.json", "eval.zarr")
    flip_a_bit(run / "eval.zarr/zarr.json")
    with pytest.raises(DamagedRunError, match=r"eval\.zarr"):
        check(run, "eval.zarr")


def test_what_was_not_replaced_is_recorded_as_before(tmp_path: Path) -> None:
    run = finished(tmp_path)
    before = read_record(run)
    with pytest.raises(OSError, match="full"), replacing(run, "ledger.json", "eval.json"):
        (run / "eval.json").write_text("{}")
        raise OSError("full")
    assert read_record(run) == before
    flip_a_bit(run / "ledger.json")
    with pytest.raises(OSError, match="full"), replacing(run, "ledger.json"):
        raise OSError("full")
    with pytest.raises(DamagedRunError, match=r"ledger\.json"):  # a failure does not make damage right
        check(run, "ledger.json")


def test_a_cache_is_checked_but_for_what_its_commits_check(toy_cache: Path, tmp_path: Path) -> None:
    run = tmp_path
    shutil.copytree(toy_cache, run / "eval.zarr")
    before = digests(run, ["eval.zarr"])
    chunk = next((run / "eval.zarr/rounds/00000/rollouts/token_ids/c").rglob("*[0-9]"))
    flip_a_bit(next(file for file in (chunk, *chunk.rglob("*")) if file.is_file()))
    assert digests(run, ["eval.zarr"]) == before
    for part in ("rollouts/commit/c", "scores/teacher/zarr.json", "rollouts/zarr.json"):
        path = run / "eval.zarr/rounds/00000" / part
        file = path if path.is_file() else next(file for file in path.rglob("*") if file.is_file())
        content = file.read_bytes()
        flip_a_bit(file)
        assert digests(run, ["eval.zarr"]) != before
        file.write_bytes(content)


@pytest.mark.parametrize(
    "name", ["run.json", ".lock", "metrics.jsonl", "checkpoints", "adapter", "tensorboard/a", "rounds/00000/x", "new"]
)
def test_a_link_is_refused(name: str, tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    run_files.refuse_links(run)
    path = run / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "moved")
    with pytest.raises(RedpenError, match="symbolic link") as error:
        run_files.refuse_links(run)
    assert str(path) in str(error.value)


def test_no_command_reads_a_runs_recipe_past_its_digest() -> None:
    """Others than `read_recipe` are in a run that `open_run` has checked, or report what is wrong."""
    pipeline = Path(run_files.__file__).parents[1]
    readers = {
        path.relative_to(pipeline).as_posix()
        for path in pipeline.rglob("*.py")
        if "load_stored_recipe(" in path.read_text()
    }
    of_runs = {f"runs/{name}.py" for name in ("files", "directory", "verify")}
    assert readers == of_runs | {"config/recipe.py", "distill.py", "continual.py"}


def test_a_pipe_in_the_place_of_a_file_does_not_hang(tmp_path: Path) -> None:
    run = finished(tmp_path)
    (run / "ledger.json").unlink()
    os.mkfifo(run / "ledger.json")
    with pytest.raises(RedpenError, match=r"ledger\.json"):
        check(run, "ledger.json")
