"""A cache and a run that an earlier version wrote: they are read, continued, and made again with the same numbers."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from helpers.caches import ROOT, assert_same_cache
from helpers.training import curve
from pipeline.cli import main

CACHE, RUN = "out/small.zarr", "out/small"
SETTINGS = {
    "prompts.limit": 12,
    "rollouts.rollouts_per_prompt": 2,
    "rollouts.prompts_per_block": 4,
    "train.steps": 6,
    "train.lora_rank": 2,
    "train.prompts_per_step": 4,
    "train.checkpoint_every": 3,
    "train.keep_checkpoints": 1,
}


def redpen(command: str, *args: str, **changes: int) -> int:
    settings = SETTINGS | {f"train.{name}": value for name, value in changes.items()}
    return main(
        [command, "toy", *args, *(part for name in settings for part in ("--set", f"{name}={settings[name]}"))]
    )


@pytest.fixture
def before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of then: the run has recorded its cache by a relative path."""
    with tarfile.open(ROOT / "tests/fixtures/before.tar.gz") as archive:
        archive.extractall(tmp_path / "out", filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(directory: Path) -> dict[str, bytes]:
    """Every file of the cache and the run, but the lock that a command leaves."""
    files = [path for name in (CACHE, RUN) for path in sorted((directory / name).rglob("*")) if path.is_file()]
    return {str(path): path.read_bytes() for path in files if path.name != ".lock"}


def test_nothing_is_left_to_do(before: Path, capsys: pytest.CaptureFixture[str]) -> None:
    was = contents(before)
    assert main(["verify", CACHE]) == 0
    assert main(["verify", RUN]) == 0
    assert main(["inspect", CACHE]) == 0
    assert redpen("rollouts", "--cache", CACHE) == 0
    assert redpen("score", "--cache", CACHE) == 0
    assert redpen("train", "--cache", CACHE, "--run", RUN) == 0
    assert "6 done" in capsys.readouterr().out
    assert main(["report", RUN, CACHE, "-o", "page.html"]) == 0
    assert "0.17123" in (before / "page.html").read_text()
    assert contents(before) == was


def test_its_figures_are_those_recorded(before: Path) -> None:
    def values() -> dict[str, object]:
        """The figures without seconds, the limit, and intervals of reverse KL, which were normal ones then."""
        found = json.loads((before / RUN / "eval.json").read_text())
        for student in ("before", "after"):
            found[student]["reverse_kl"] = found[student]["reverse_kl"]["value"]
        return {key: value for key, value in found.items() if key not in ("seconds", "max_response_tokens")}

    recorded = values()
    assert main(["eval", RUN, "--set", "eval.limit=8"]) == 0
    assert values() == recorded


def test_training_goes_on(before: Path) -> None:
    first = curve(before / RUN)
    assert redpen("train", "--cache", CACHE, "--run", RUN, steps=9) == 0
    longer = curve(before / RUN)
    assert longer[:6] == first and [line["step"] for line in longer[6:]] == [7, 8, 9]


def test_the_same_recipe_gives_the_same_numbers(before: Path) -> None:
    assert redpen("rollouts", "--cache", "again.zarr") == 0
    assert redpen("score", "--cache", "again.zarr") == 0
    assert redpen("train", "--cache", "again.zarr", "--run", "again") == 0
    assert_same_cache(before / "again.zarr", before / CACHE, ["rollouts", "student", "teacher"])
    assert curve(before / "again") == curve(before / RUN)
    then, now = (load_file(before / run / "adapter" / "adapter_model.safetensors") for run in (RUN, "again"))
    assert then.keys() == now.keys()
    for name, tensor in then.items():
        np.testing.assert_array_equal(now[name].numpy(), tensor.numpy(), err_msg=name)
