"""Stops at any moment: the run that continues is bit for bit the one that nobody disturbed."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from helpers import preloaded
from helpers.caches import SMALL, small_recipe
from helpers.training import assert_same_run, curve, stop_after_one_step
from pipeline.config import Recipe
from pipeline.distributed.signals import Stop
from pipeline.errors import Interrupted, RedpenError
from pipeline.train import stage

Make = Callable[..., Recipe]

STEPS = 12
LONG = (f"train.steps={STEPS}", "train.schedule=cosine", "train.lora_dropout=0.1")


def start(cache: Path, run: Path) -> preloaded.Process:
    settings = [part for setting in (*SMALL, *LONG) for part in ("--set", setting)]
    return preloaded.python("-m", "pipeline", "train", "toy", "--cache", str(cache), "--run", str(run), *settings)


@pytest.fixture(scope="module")
def undisturbed(toy_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert stage.run(small_recipe(*LONG), str(toy_cache), run) == 0
    assert len(curve(run)) == STEPS
    return run


def steps_done(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return len(metrics.read_bytes().splitlines()) if metrics.exists() else 0


def test_killed_twice_at_random(toy_cache: Path, undisturbed: Path, tmp_path: Path) -> None:
    run, rng = tmp_path / "run", random.Random(0)
    for at_least in (1, 5):
        process = start(toy_cache, run)
        while steps_done(run) < at_least and process.poll() is None:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not (run / "adapter").exists()
    process = start(toy_cache, run)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "max steps: 12 done" in out
    assert_same_run(run, undisturbed)


def test_sigterm_checkpoints_and_says_so(toy_cache: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(toy_cache, run)
    while steps_done(run) < 3 and process.poll() is None:
        time.sleep(0.005)
    process.terminate()
    _, errors = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, errors
    done = steps_done(run)
    assert f"stopped by SIGTERM: step {done} of 12 is in" in errors and "Traceback" not in errors
    assert (run / f"checkpoints/step-{done:08d}").exists()
    assert stage.run(small_recipe(*LONG), str(toy_cache), run) == 0
    assert_same_run(run, undisturbed)


def test_stopped_after_every_step(
    toy_cache: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr(stage, "graceful", stop_after_one_step)
    for step in range(1, STEPS + 1):
        with pytest.raises(Interrupted) as caught:
            stage.run(small_recipe(*LONG), str(toy_cache), run)
        assert caught.value.exit_code == 130 and steps_done(run) == step
    assert stage.run(small_recipe(*LONG), str(toy_cache), run) == 0
    assert_same_run(run, undisturbed)


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it."""


@pytest.mark.parametrize("moment", ["checkpoint", "adapter", "ledger", "result"])
def test_killed_in_the_middle_of_a_write(
    moment: str, toy_cache: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.models import lora
    from pipeline.runs import checkpoint, ledger
    from pipeline.runs.directory import RunDirectory

    run = tmp_path / "run"
    calls = 0

    def killed(*_: object, **__: object) -> None:
        raise Killed

    def killed_on_the_third(*args: object, **kwargs: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Killed
        real(*args, **kwargs)

    real: Callable[..., None] = checkpoint.save_file
    with monkeypatch.context() as patch:
        if moment == "checkpoint":
            patch.setattr(checkpoint, "save_file", killed_on_the_third)
        elif moment == "adapter":
            patch.setattr(lora.PeftModel, "save_pretrained", killed)
        elif moment == "ledger":
            patch.setattr(ledger, "table", killed)
        else:
            patch.setattr(RunDirectory, "finish", killed)
        with pytest.raises(Killed):
            stage.run(small_recipe(*LONG), str(toy_cache), run)
    assert stage.run(small_recipe(*LONG), str(toy_cache), run) == 0
    assert_same_run(run, undisturbed)


def test_a_damaged_checkpoint_costs_its_steps_only(
    toy_cache: Path,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"

    @contextmanager
    def stop_after_five() -> Iterator[Stop]:
        class Five(Stop):
            signum = property(lambda _: signal.SIGTERM if steps_done(run) >= 5 else None, lambda *_: None)  # type: ignore[assignment]

        yield Five()

    with monkeypatch.context() as patch:
        patch.setattr(stage, "graceful", stop_after_five)
        with pytest.raises(Interrupted):
            stage.run(small_recipe(*LONG), str(toy_cache), run)
    newest = max((run / "checkpoints").iterdir())
    os.truncate(newest / "optimizer.safetensors", 100)
    # a line cut off by the kill, as a full disk or a dying machine leaves it
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    capsys.readouterr()
    assert stage.run(small_recipe(*LONG), str(toy_cache), run) == 0
    said = capsys.readouterr().err
    assert "step-00000005 is damaged" in said and "after step 4 of 12" in said
    assert_same_run(run, undisturbed)


def test_a_curve_that_is_not_the_checkpoints_is_refused(
    toy_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(stage, "graceful", stop_after_one_step)
        for _ in range(2):
            with pytest.raises(Interrupted):
                stage.run(small_recipe(*LONG), str(toy_cache), run)
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(RedpenError, match=r"metrics\.jsonl holds 0 of the 2 steps"):
        stage.run(small_recipe(*LONG), str(toy_cache), run)


def test_tensorboard_shows_each_step_once(toy_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that a kill undid are drawn again; the earlier points are purged."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from pipeline.train.trainer import StudentTrainer

    run, real = tmp_path / "run", StudentTrainer.update

    def dies_at_five(self: StudentTrainer, batch: object) -> object:
        if self.step == 5:
            raise Killed
        return real(self, batch)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(StudentTrainer, "update", dies_at_five)
        with pytest.raises(Killed):
            stage.run(small_recipe(*LONG), str(toy_cache), run)
    assert stage.run(small_recipe(*LONG), str(toy_cache), run) == 0
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, STEPS + 1))


def test_a_finished_run_goes_on_for_more_steps(toy_cache: Path, tmp_path: Path) -> None:
    """Under a constant schedule its steps are those of the longer run."""
    run, longer = tmp_path / "run", tmp_path / "longer"
    assert stage.run(small_recipe("train.steps=7"), str(toy_cache), longer) == 0
    for steps in (3, 7):
        assert stage.run(small_recipe(f"train.steps={steps}"), str(toy_cache), run) == 0
        assert len(curve(run)) == steps
    assert_same_run(run, longer)
    with pytest.raises(RedpenError, match=r"train\.steps = 7, now 5; choose another --run"):
        stage.run(small_recipe("train.steps=5"), str(toy_cache), run)
    cooled = tmp_path / "cooled"
    assert stage.run(small_recipe("train.steps=3", "train.schedule=linear"), str(toy_cache), cooled) == 0
    with pytest.raises(
        RedpenError, match=r'train\.steps = 3, now 7 \(only schedule = "constant" can be extended\); choose'
    ):
        stage.run(small_recipe("train.steps=7", "train.schedule=linear"), str(toy_cache), cooled)


def test_a_curve_is_on_the_disk_before_a_checkpoint_of_it(
    toy_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.runs import checkpoint
    from pipeline.runs import directory as run_directory

    order: list[str] = []
    real_sync, real_save = run_directory.sync, checkpoint.save
    monkeypatch.setattr(run_directory, "sync", lambda path: (order.append(path.name), real_sync(path))[1])
    monkeypatch.setattr(checkpoint, "save", lambda *a, **kw: (order.append("checkpoint"), real_save(*a, **kw))[1])
    assert stage.run(small_recipe("train.steps=4"), str(toy_cache), tmp_path / "run") == 0
    assert order == ["metrics.jsonl", "checkpoint"] * 2
