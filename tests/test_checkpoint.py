"""Checkpoints: what comes back, what is kept, and that a half or damaged one is passed over."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from helpers.caches import flip_a_bit
from pipeline import files
from pipeline.runs import checkpoint
from pipeline.runs.checkpoint import DamagedCheckpointError


def tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(step)
    weights = {"a.lora_A": torch.randn(3, 4, generator=generator), "b.lora_B": torch.randn(4, 2, generator=generator)}
    moments = {"a.lora_A/step": torch.tensor(float(step)), "a.lora_A/exp_avg": weights["a.lora_A"].T * 0.1}
    return {"adapter": weights, "optimizer": moments}


def save(directory: Path, step: int, keep: int = 3) -> Path:
    return checkpoint.save(directory, step, tensors(step), {"window": [0.1 + 0.2, 1e-300], "n": step}, keep=keep)


def latest(directory: Path) -> tuple[checkpoint.Checkpoint | None, list[str]]:
    said: list[str] = []
    return checkpoint.latest(directory, said.append), said


def test_what_was_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    save(tmp_path, 7)
    found, said = latest(tmp_path)
    assert found is not None and not said
    assert found.step == 7 and found.state == {"window": [0.1 + 0.2, 1e-300], "n": 7}
    for group, values in tensors(7).items():
        assert found.tensors[group].keys() == values.keys()
        for name, value in values.items():
            assert torch.equal(found.tensors[group][name], value) and found.tensors[group][name].dtype == value.dtype


def test_the_newest_few_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 15, 100):
        save(tmp_path, step, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000015", "step-00000100"]
    found, _ = latest(tmp_path)
    assert found is not None and found.step == 100


def test_the_best_is_kept_however_old(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        checkpoint.save(tmp_path, step, tensors(step), {}, keep=1, best=10 if step > 5 else 5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-00000020"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_are_as_readable_as_the_umask_says(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        path = save(tmp_path / "checkpoints", 1)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {mode}


# -- in the background ---------------------------------------------------------------------------------------------


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is written at a time."""
    go, real, writing = threading.Event(), checkpoint.save_file, []

    def slow(values: dict[str, torch.Tensor], path: Path) -> None:
        assert go.wait(10)
        writing.append(path.parent.name)
        real(values, path)

    monkeypatch.setattr(checkpoint, "save_file", slow)
    with contextlib.closing(checkpoint.Checkpoints(tmp_path, 2, before=lambda: writing.append("before"))) as saving:
        saving.save(1, tensors(1), {}, None)
        assert not list(tmp_path.glob("step-*1"))
        threading.Timer(0.1, go.set).start()
        saving.save(2, tensors(2), {}, None)
        assert [name[:14] for name in writing[:3]] == ["before", ".step-00000001", ".step-00000001"]
        saving.wait()
    for step in (1, 2):
        found = checkpoint.load(tmp_path / f"step-0000000{step}").tensors["adapter"]["a.lora_A"]
        assert torch.equal(found, tensors(step)["adapter"]["a.lora_A"])


def test_background_errors_are_raised_at_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with contextlib.closing(checkpoint.Checkpoints(tmp_path, 2, before=lambda: None)) as saving:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "save_file", full)
            saving.save(1, tensors(1), {}, None)
            with pytest.raises(OSError, match="No space left"):
                saving.save(2, tensors(2), {}, None)
        saving.save(3, tensors(3), {}, None)
        saving.wait()
    found, said = latest(tmp_path)
    assert found is not None and found.step == 3 and not said


def test_nothing_saved_is_no_checkpoint(tmp_path: Path) -> None:
    assert latest(tmp_path / "none") == (None, [])


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def edit(checkpoint: Path, **changes: object) -> None:
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps(state | changes))


DAMAGE: dict[str, Callable[[Path], None]] = {
    "truncated tensors": lambda c: truncate(c / "optimizer.safetensors"),
    "a flipped bit": lambda c: flip_a_bit(c / "adapter.safetensors"),
    "missing tensors": lambda c: (c / "adapter.safetensors").unlink(),
    "another step's tensors": lambda c: shutil.copy(c.parent / "step-00000001/adapter.safetensors", c),
    "no state": lambda c: (c / "state.json").unlink(),
    "truncated state": lambda c: truncate(c / "state.json"),
    "empty state": lambda c: (c / "state.json").write_text(""),
    "state of another kind": lambda c: (c / "state.json").write_text("[1, 2]"),
    "state without digests": lambda c: (c / "state.json").write_text(json.dumps({"step": 2, "state": {}})),
    "another step's state": lambda c: shutil.copy(c.parent / "step-00000001/state.json", c),
    "an edited step": lambda c: edit(c, step=1),
    "an edited state": lambda c: edit(c, state={"n": 3}),
    "a step without bounds": lambda c: edit(c, step=10**30, digest=None),
    "files elsewhere": lambda c: edit(c, digests={"../step-00000001/adapter": "0"}, digest=None),
    "an empty directory": lambda c: [p.unlink() for p in c.iterdir()] and None,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(damage: Callable[[Path], None], tmp_path: Path) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    damage(newest)
    found, said = latest(tmp_path)
    assert found is not None and found.step == 1
    assert len(said) == 1 and str(newest) in said[0] and "\n" not in said[0]
    with pytest.raises(DamagedCheckpointError):
        checkpoint.load(newest)


def test_a_checkpoints_step_is_that_of_its_directory(tmp_path: Path) -> None:
    """Also where state.json has no digest, as in checkpoints of earlier versions."""
    newest = save(tmp_path, 2)
    edit(newest, digest=None)
    assert checkpoint.load(newest).step == 2
    edit(newest, step=3, digest=None)
    with pytest.raises(DamagedCheckpointError, match="step 3"):
        checkpoint.load(newest)


def test_all_damaged_is_a_start_from_nothing(tmp_path: Path) -> None:
    for step in (1, 2):
        truncate(save(tmp_path, step) / "state.json")
    found, said = latest(tmp_path)
    assert found is None and len(said) == 2


def test_a_save_cut_short_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    real, calls = checkpoint.save_file, []

    def fails_on_the_second(values: dict[str, torch.Tensor], path: Path) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(values, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", fails_on_the_second)
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path, 2)
    found, said = latest(tmp_path)
    assert found is not None and found.step == 1 and not said
    save(tmp_path, 4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000004"]


def test_a_directory_is_replaced_only_when_the_new_one_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    with files.atomic_directory(target) as partial:
        (partial / "a").write_text("old")
    with pytest.raises(RuntimeError), files.atomic_directory(target) as partial:
        (partial / "a").write_text("new")
        raise RuntimeError
    assert (target / "a").read_text() == "old"
    with files.atomic_directory(target) as partial:
        assert not list(partial.iterdir())
        (partial / "b").write_text("new")
    assert [p.name for p in target.iterdir()] == ["b"] and [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_a_file_is_replaced_at_once(tmp_path: Path) -> None:
    target = tmp_path / "metrics.jsonl"
    target.write_text("old")
    files.write_atomically(target, "new")
    assert target.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == [target.name]
