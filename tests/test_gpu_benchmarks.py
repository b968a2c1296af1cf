"""benchmarks/gpu.py on the CPU, with tiny shapes: every job runs and its figures mean something."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu")


def test_every_job(gpu: Any, tmp_path: Path) -> None:
    found: list[dict[str, Any]] = []
    for step in gpu.steps("tiny", "cpu", str(tmp_path / "model"), str(tmp_path)):
        if step.job:
            found += [{"step": step.name, **json.loads(json.dumps(figure))} for figure in gpu.run_job(step.job)]
            found.append({"step": step.name, "ended": "done", "seconds": 1.0})

    def of(what: str) -> list[dict[str, Any]]:
        return [figure for figure in found if figure.get("what") == what]

    assert [figure["rank"] for figure in of("train")] == [32, 128]
    for figure in of("train"):
        assert figure["planned"] == pytest.approx(figure["peak"], rel=0.1), "`redpen plan` estimates the peak"
        assert figure["tokens/s"] > 0 and figure["operations"] > 0
    assert {figure["form"] for figure in of("scored")} == {"resident", "streamed", "accelerate"}
    compared = [figure for figure in of("scored") if "different" in figure]
    assert len(compared) == 2 and not any(figure["different"] for figure in compared)
    layouts = {figure["family"]: figure["found"] for figure in of("layout")}
    assert "not packed" in layouts["hybrid"] and "packed and unpacked" in layouts["multimodal"]
    assert len(of("streamed")) == 2 and not any(figure["different"] for figure in of("streamed"))
    assert all(figure["grad_norm"] > 0 for figure in of("update"))
    text = gpu.summary(found, "tiny shapes")
    assert "nan" not in text and "None" not in text
    for figure in of("train"):
        assert f"| {figure['tokens/s']:,.0f} |" in text


def test_a_hang_loses_its_step_alone(gpu: Any, tmp_path: Path) -> None:
    hang = f"""
import subprocess, sys, time
print('{{"what": "before"}}', flush=True)
subprocess.Popen([{sys.executable!r}, "-S", "-c", "import time; time.sleep(100)"])
time.sleep(100)"""
    results = gpu.Results(tmp_path, "a test")

    def run(name: str, program: str, seconds: float = 60.0) -> None:
        results.run(gpu.Step("part", name, 0, command=(sys.executable, "-S", "-c", program)), seconds)

    run("hangs", hang, gpu.LEAST_SECONDS)
    run("fails", "raise SystemExit('no such kernel')")
    run("works", "print('2 passed')")
    run("too late", "", 1.0)
    ended = {figure["step"]: figure["ended"] for figure in results.found if "ended" in figure}
    assert ended["hangs"].startswith("failed: killed") and ended["fails"] == "failed: no such kernel"
    assert ended["works"] == "2 passed" and ended["too late"].startswith("did not run")
    assert results.failed
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert lines == [
        {**figure, "seconds": pytest.approx(figure["seconds"], abs=1e-4)} if "seconds" in figure else figure
        for figure in results.found
    ]
    assert {"step": "hangs", "what": "before"} in lines
    assert "no such kernel" in (tmp_path / "summary.md").read_text()


def test_the_command(tmp_path: Path) -> None:
    """One step in its own process; a student that is not given is reported."""
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--out", str(tmp_path), "--shape", "tiny"]
    command += ["--device", "cpu", "--parts", "matmul,student"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert found[0]["TFLOPS"] > 0 and "did not run: needs --student" in found[-1]["ended"]
    assert (tmp_path / "summary.md").read_text().splitlines()[0] == "tiny shapes on cpu"
