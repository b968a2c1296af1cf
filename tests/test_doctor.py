"""`redpen doctor`: this machine as it is, and what is said of others."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from pipeline import cli, doctor


@pytest.fixture(autouse=True)
def _toy_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "recipe_names", lambda: ["toy", "qwen3-8b-from-32b"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_this_machine_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["python"] == platform.python_version() and found["cores"]["all"] == os.cpu_count()
    assert found["torch"]["version"] == torch.__version__ and len(found["cards"]) == torch.cuda.device_count()
    assert 0 < found["memory"]["free"] <= found["memory"]["total"] and found["disk"]["here"] > 0
    assert found["extras"].keys() == {"eval", "quant", "ray", "s3", "trackio", "vllm", "wandb"}
    assert found["hub"] == {
        "endpoint": constants.ENDPOINT, "reachable": False, "error": "HF_HUB_OFFLINE is set",
    }  # fmt: skip
    assert found["recipes"]["toy"] == {"fits": True, "why": None}
    assert found["recipes"]["qwen3-8b-from-32b"]["fits"] is None


def test_a_container_has_the_memory_that_it_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "memory_limits", lambda: [2**62, 3 * 2**20])
    assert doctor._memory() == {"total": 3 * 2**20, "free": 3 * 2**20}


def test_the_disk_of_a_directory_that_cannot_be(tmp_path: Path) -> None:
    assert doctor._free(tmp_path / ("a" * 300) / "hub") > 0


def other_machine() -> dict[str, Any]:
    card = {"name": "Card \x1b[2J", "free": 2**30, "total": 2**34}
    return {
        "redpen": "1", "directory": "/here", "python": "3.13.0", "platform": "Linux",
        "cores": {"usable": 2, "all": 64}, "memory": {"total": 2**35, "free": 2**34},
        "disk": {"here": 2**40, "models": 2**30}, "torch": {"version": "2.13.0", "cuda": "13.0", "hip": None},
        "cards": [card], "packages": {"peft": None, "zarr": "3.1.6"},
        "extras": {"eval": {"lm-eval": "0.4.13", "math-verify": None}, "ray": {"ray": None}},
        "hub": {"endpoint": "https://hub", "reachable": True, "seconds": 0.21},
        "recipes": {"a": {"fits": False, "why": "training: does not fit 16 GiB, 23.9 GiB at most"}},
    }  # fmt: skip


def test_another_machine_on_one_screen() -> None:
    rows = dict(line.split("  ", 1) for line in doctor.lines(other_machine()))
    text = {name: value.strip() for name, value in rows.items()}
    assert text["card 0"] == "Card \x1b[2J, 1.0 GiB of 16.0 GiB free"  # `show` escapes it
    assert text["torch"] == "2.13.0, CUDA 13.0" and text["Hub"] == "https://hub: answers in 0.2 s"
    assert text["packages"] == "peft missing, zarr 3.1.6"
    assert text["extra eval"].startswith("lm-eval 0.4.13; math-verify missing: `") and "[eval]" in text["extra eval"]
    assert text["extra ray"].startswith("ray missing: `") and len(rows) < 24
    assert text["recipe a"] == "does not fit: training: does not fit 16 GiB, 23.9 GiB at most"


def test_a_small_card_does_not_fit_the_toy() -> None:
    found = doctor._recipes([{"name": "", "free": 0, "total": 2**29}], 2**40, is_reachable=False)["toy"]
    assert found["fits"] is False and "training: does not fit 0.5 GiB" in found["why"]


def test_a_hub_that_does_not_answer_costs_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    started = time.monotonic()
    found = doctor._hub("http://127.0.0.1:9")  # discard: nothing listens
    assert not found["reachable"] and "Error" in found["error"] and time.monotonic() - started < 10
