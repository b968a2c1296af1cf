"""Where curves go: each tracker's own reader finds every step once, and no tracker can harm a run."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from helpers.caches import small_recipe
from pipeline import console
from pipeline.config import Recipe
from pipeline.errors import ConfigError
from pipeline.models import load as models
from pipeline.runs import tracking
from pipeline.runs.directory import Result, open_run
from pipeline.train import stage

ROOT = Path(__file__).parent.parent
BOTH = 'track.trackers=["wandb", "trackio"]'
CACHE = {"url": "c.zarr", "round": 0}
DONE = Result(8, "max steps: 8 done", 0)


@pytest.fixture(scope="module", autouse=True)
def trackers_at_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Both trackers in directories of this test's own, with nobody logged in."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("WANDB_", "TRACKIO_"))]:
            patch.delenv(name)
        for name, value in {"HOME": home, "TRACKIO_DIR": home / "trackio", "WANDB_ERROR_REPORTING": "false"}.items():
            patch.setenv(name, str(value))
        yield
        if "wandb" in sys.modules:
            sys.modules["wandb"].teardown()


def log(recorder: tracking.Recorder, steps: range) -> None:
    for step in steps:
        recorder.log({"step": step, "reverse_kl": 1 / step, "tokens": 10 * step}, {"seconds": 0.5})


def wandb_records(path: Path) -> Iterator[Any]:
    """What a .wandb file holds: protobuf records in LevelDB's log format, in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole, at = whole + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""


def wandb_run(run: Path) -> dict[str, Any]:
    """The newest of a run's offline runs: its record, config, history rows, summary."""
    (path,) = (run / "wandb" / "latest-run").glob("*.wandb")
    found: dict[str, Any] = {"history": [], "summary": {}}

    def items(of: Any) -> dict[str, Any]:
        return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in of}

    for record in wandb_records(path):
        match record.WhichOneof("record_type"):
            case "run":
                found |= {"run": record.run, "config": items(record.run.config.update)}
            case "history":
                found["history"].append(items(record.history.item))
            case "summary":
                found["summary"] |= items(record.summary.update)
    return found


def trackio_rows(project: str, name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The config and the rows of a run."""
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = [run for run in trackio.Api().runs(project) if run.name == name]
    return run.config or {}, SQLiteStorage.get_logs(project, name, run_id=run.id)


def tensorboard_steps(directory: Path, tag: str) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(directory))
    accumulator.Reload()
    return [event.step for event in accumulator.Scalars(tag)]


# ------------------------------------------------------------------------------------------------------- what is kept


def test_a_run_is_with_all_trackers(toy_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracked = small_recipe(BOTH, "track.project=toys", "track.group=g", 'track.tags=["a"]')
    assert stage.run(tracked, str(toy_cache), tmp_path / "run") == 0
    captured = capsys.readouterr()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    identity = json.loads((tmp_path / "run" / "run.json").read_text())
    recorded = wandb_run(tmp_path / "run")
    assert (recorded["run"].run_id, recorded["run"].project, recorded["run"].run_group) == (
        identity["id"],
        "toys",
        "g",
    )
    assert recorded["run"].display_name == "run" and list(recorded["run"].tags) == ["a"]
    config, rows = trackio_rows("toys", f"run-{identity['id']}")
    for known in (recorded["config"], config):
        assert known["train"]["lora_rank"] == 4 and known["cache"] == identity["cache"] and "track" not in known
    rows, end = rows[:-1], rows[-1]
    for row, other, line in zip(recorded["history"], rows, lines, strict=True):
        assert row["_step"] == other["step"] == line["step"]
        for key, value in line.items():
            if key not in ("step", "time"):
                assert row[f"train/{key}"] == other[f"train/{key}"] == value
        assert row["time/seconds"] == line["time"]["seconds"]
    sentence = identity["result"]["sentence"]
    assert recorded["summary"]["result"] == end["result"] == sentence and recorded["summary"]["exit_code"] == 0
    assert tensorboard_steps(tmp_path / "run" / "tensorboard", "train/ess") == [line["step"] for line in lines]

    assert captured.out.splitlines()[0] == sentence and len(captured.out.splitlines()) == 2, "trackers print nothing"
    assert "wandb: not logged in; `wandb sync " in captured.err
    (last,) = re.findall(r"train: 100%, .*", captured.err)
    assert re.search(r"reverse KL \d\.\d{4}, ESS \d\.\d{3}, [\d.]+k? tokens/s$", last)
    assert f"next: `redpen eval {tmp_path / 'run'}`" in captured.err.splitlines()[-1]


def test_a_run_that_continues_continues_its_curves(tmp_path: Path) -> None:
    """Six steps, of which a checkpoint keeps four: the last two are done again, and two more."""
    recipe = small_recipe(BOTH, "track.name=twice")
    with open_run(tmp_path, recipe, CACHE) as run:
        run.start()
        known = run.id
        recorder = tracking.Recorder(run, 1)
        log(recorder, range(1, 7))
        recorder.close(None)
    (tmp_path / "checkpoints").mkdir()
    with open_run(tmp_path, recipe, CACHE) as run:
        run.rewind_metrics(4)
        run.start()
        assert run.id == known
        recorder = tracking.Recorder(run, 5)
        log(recorder, range(5, 9))
        recorder.close(DONE)
    every = list(range(1, 9))
    assert [row["step"] for row in trackio_rows("redpen", f"twice-{known}")[1]] == [*every, 8]
    recorded = wandb_run(tmp_path)
    assert recorded["run"].run_id == known and [row["_step"] for row in recorded["history"]] == every
    assert [row["train/reverse_kl"] for row in recorded["history"]] == [1 / step for step in every]
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 2
    assert tensorboard_steps(tmp_path / "tensorboard", "train/reverse_kl") == every


def test_a_run_that_starts_again_without_a_step_has_a_new_id(tmp_path: Path) -> None:
    ids = []
    for _ in range(2):
        with open_run(tmp_path, small_recipe(), CACHE) as run:
            run.start()
            ids.append(run.id)
    assert ids[0] != ids[1]


def test_trackers_are_no_other_settings(tmp_path: Path) -> None:
    with open_run(tmp_path, small_recipe(), CACHE) as run:
        run.start()
    (tmp_path / "checkpoints").mkdir()
    with open_run(tmp_path, small_recipe(BOTH, "track.project=other"), CACHE) as run:
        assert run.track.trackers == ["wandb", "trackio"]


# -------------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("when", ["init", "log", "finish"])
def test_a_tracker_that_fails_costs_one_line(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken:
        def __init__(self, *_: object) -> None:
            self.at("init")

        def log(self, metrics: Mapping[str, float], step: int) -> None:
            self.at("log")

        def finish(self, result: Result | None) -> None:
            self.at("finish")

        def at(self, now: str) -> None:
            if now == when:
                raise ConnectionError("no\nroute")

    monkeypatch.setitem(tracking._TRACKERS, "wandb", Broken)
    with open_run(tmp_path, small_recipe('track.trackers=["wandb"]'), CACHE) as run:
        run.start()
        recorder = tracking.Recorder(run, 1)
        log(recorder, range(1, 4))
        recorder.close(DONE)
        assert [line["step"] for line in run.steps()] == [1, 2, 3]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: wandb failed (ConnectionError: no route); ")


@pytest.mark.parametrize("key", ["a" * 40, "short"], ids=["no answer", "not a key"])
def test_wandb_falls_back_to_offline(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(tracking, "INIT_SECONDS", 1.0)
    import wandb

    wandb.teardown()  # its settings are read once
    with open_run(tmp_path, small_recipe('track.trackers=["wandb"]'), CACHE) as run:
        run.start()
        recorder = tracking.Recorder(run, 1)
        log(recorder, range(1, 3))
        recorder.close(DONE)
    wandb.teardown()
    assert [row["_step"] for row in wandb_run(tmp_path)["history"]] == [1, 2]
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("warning: wandb: ") and line.endswith("latest-run` uploads the curves later")
    assert captured.out == ""


@pytest.mark.parametrize("spec", [None, ModuleSpec("wandb", None)], ids=["absent", "a directory called wandb"])
def test_a_missing_library_is_named_before_anything_is_loaded(
    spec: ModuleSpec | None,
    toy_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recipe: Callable[..., Recipe],
) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: spec)
    monkeypatch.setattr(models, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ConfigError, match=r"wandb is not installed; `.*pip install -e .*\[wandb\]'?`"):
        stage.run(recipe('track.trackers=["wandb"]'), str(toy_cache), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------------------------------------------- live view

VIEW = textwrap.dedent("""
    import os, signal, time
    from pipeline.console import progress, say
    from pipeline.distributed.signals import graceful

    with graceful(), progress("train", total=40, unit="steps") as bar:
        for step in range(40):
            time.sleep(0.03)
            if step == 20:
                os.kill(os.getpid(), signal.SIGTERM)
            bar.advance(note=f"reverse KL {1 / (step + 1):.4f}")
    say("next")
""")


def view(on_terminal: bool, **env: str) -> str:
    """What a bar writes to stderr, a terminal or a pipe."""
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    environment |= {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color", **env}
    ours, theirs = pty.openpty() if on_terminal else os.pipe()
    process = subprocess.Popen([sys.executable, "-c", VIEW], stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    written = b""
    try:
        while chunk := os.read(ours, 65536):
            written += chunk
    except OSError:  # a terminal that nobody has open any more
        pass
    os.close(ours)
    assert process.wait() == 0
    return written.decode()


def screen(written: str) -> list[str]:
    """The lines that a terminal ends up with."""
    rows, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[0-9;?]*[a-zA-Z]|\r|\n|[^\x1b\r\n]+", written):
        if token == "\r":
            column = 0
        elif token == "\n":
            row += 1
            rows += [""] * (row == len(rows))
        elif token.endswith("A") and token.startswith("\x1b["):
            row -= int(token[2:-1] or 1)
        elif token == "\x1b[2K":
            rows[row] = ""
        elif not token.startswith("\x1b["):
            rows[row] = rows[row][:column].ljust(column) + token + rows[row][column + len(token) :]
            column += len(token)
    return [line for line in rows if line]


def test_a_terminal_has_a_bar_and_a_note() -> None:
    written = view(True)
    frames = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "\n", re.sub(r"\x1b\[[0-9;]*m", "", written))
    assert "━" in frames and re.search(r"train .*\d+/40 steps [\d.]+ steps/s \d+:\d\d", frames)
    assert re.search(r"^reverse KL 0\.0\d+", frames, re.M), "below the bar"
    recorded, result, following = screen(written)[-3:]
    assert recorded.startswith("SIGTERM: ") and recorded.endswith(" again to force quit"), "not redrawn away"
    assert re.fullmatch(r"train: 100%, 40/40 steps, [\d.]+ steps/s, reverse KL 0\.0250", result), "one line stays"
    assert following == "next"


def test_a_pipe_has_plain_lines() -> None:
    written = view(False, FORCE_COLOR="1")
    lines = written.splitlines()
    assert "\x1b" not in written and "\r" not in written and 3 <= len(lines) <= 5
    assert re.fullmatch(r"train: 100%, 40/40 steps, [\d.]+ steps/s, reverse KL 0\.0250", lines[-2])
    assert lines[-1] == "next"


@pytest.mark.parametrize(
    ("rate", "shown"),
    [(14_600, "14.6k tokens/s"), (0.17, "0.17 tokens/s"), (1 / 48, "48.0 s a token"), (0, "0.0 tokens/s")],
)
def test_a_rate_has_digits_at_any_speed(rate: float, shown: str) -> None:
    assert console.speed(rate, "tokens") == shown


def test_lines_of_a_long_run_are_few(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    with console.progress("train", total=20_000, unit="steps") as bar:
        for _ in range(20_000):
            now += 2.0
            bar.advance()
    lines = capsys.readouterr().err.splitlines()
    assert 100 < len(lines) < 200, "eleven hours"
