"""Stage one, killed and stopped: real processes, real signals. What is finished equals an undisturbed
run's.
"""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import preloaded
import pytest
import torch

import cache_schema as cs
import pipeline.rollouts.stage as rollouts_stage
import pipeline.score.stage as score_stage
from pipeline.config import load_recipe

# 24 blocks, so that a kill always finds some done and some to do
SETTINGS = [
    "prompts.limit=48",
    "rollouts.prompts_per_block=2",
    "rollouts.batch_size=8",
    "score.tile_tokens=64",
]
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cache, made on one thread as by the processes here: other thread counts, other last bits."""
    path, threads = tmp_path_factory.mktemp("undisturbed") / "toy.zarr", torch.get_num_threads()
    torch.set_num_threads(1)
    rollouts_stage.run(load_recipe("toy", SETTINGS), str(path))
    score_stage.run(load_recipe("toy", SETTINGS), str(path))
    torch.set_num_threads(threads)
    return path


def start(command: str, cache: Path) -> preloaded.Process:
    overrides = [argument for setting in SETTINGS for argument in ("--set", setting)]
    return preloaded.python("-m", "pipeline", command, "toy", "--cache", str(cache), *overrides)


def wait_for_commits(process: subprocess.Popen[str] | preloaded.Process, group: Path, count: int) -> None:
    """Until `count` more blocks of a group are committed: each is one file of its commit array."""
    chunks = group / "commit" / "c"

    def committed() -> int:
        return len(list(chunks.iterdir())) if chunks.is_dir() else 0

    before, deadline = committed(), time.monotonic() + 120
    while committed() < before + count:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def assert_same(cache: Path, expected: Path, names: list[str]) -> None:
    """Every decoded array and commit record of some groups, times aside."""
    a, b = cs.open(cache).round(), cs.open(expected).round()
    assert not list(cs.verify(a.cache))
    for name in names:
        left, right = (r.rollouts if name == "rollouts" else r.scores(name) for r in (a, b))
        assert left.committed().all() and right.committed().all()
        for field in left.commits().dtype.names:
            if field not in cs.TIME_FIELDS:
                np.testing.assert_array_equal(left.commits()[field], right.commits()[field], err_msg=field)
        for block in range(a.n_blocks):
            ours = left.read(block)
            for key, value in vars(right.read(block)).items():
                np.testing.assert_array_equal(getattr(ours, key), value, err_msg=f"{name} {key}")


def without_scores(undisturbed: Path, path: Path) -> Path:
    shutil.copytree(undisturbed, path)
    for scores in (path / "rounds/00000/scores").iterdir():
        if scores.is_dir():
            shutil.rmtree(scores)
    return path


def nothing(undisturbed: Path, path: Path) -> Path:
    return path


@pytest.mark.parametrize(
    ("command", "prepare", "groups"),
    [
        ("rollouts", nothing, ["rollouts", "rollouts"]),
        ("score", without_scores, ["scores/student", "scores/teacher"]),
    ],
)
def test_two_kills_change_nothing(
    command: str, prepare: Callable[[Path, Path], Path], groups: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    cache, rng = prepare(undisturbed, tmp_path / "toy.zarr"), random.Random()
    for group in groups:
        process = start(command, cache)
        wait_for_commits(process, cache / "rounds/00000" / group, rng.randint(1, 8))
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        process.communicate()
        assert not list(cs.verify(cs.open(cache)))
    out, err = start(command, cache).communicate(timeout=120)
    assert "next: redpen" in err, out
    assert_same(cache, undisturbed, sorted({group.removeprefix("scores/") for group in groups}))


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_is_clean_and_says_so_in_one_line(
    signum: signal.Signals, code: int, undisturbed: Path, tmp_path: Path
) -> None:
    command, prepare, group = {
        signal.SIGTERM: ("rollouts", nothing, "rollouts"),
        signal.SIGINT: ("score", without_scores, "scores/student"),
    }[signum]
    cache = prepare(undisturbed, tmp_path / "toy.zarr")
    process = start(command, cache)
    wait_for_commits(process, cache / "rounds/00000" / group, 2)
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code and out == "" and "Traceback" not in err
    last = err.splitlines()[-1]
    assert last.startswith(f"redpen: stopped by {signum.name}: ") and "of 24 blocks" in last
    assert last.endswith("are committed; the same command continues")
    found = cs.open(cache)
    committed = int(last.split(" of 24 blocks")[0].split()[-1])
    groups = found.round().rollouts if command == "rollouts" else found.round().scores("student")
    assert committed == groups.committed().sum() and 2 <= committed < 24
    assert not list(cs.verify(found)) and not list(tmp_path.glob(".*lock"))


def test_a_second_process_is_told_who_holds_the_cache(tmp_path: Path) -> None:
    cache = tmp_path / "toy.zarr"
    first = start("rollouts", cache)
    try:
        wait_for_commits(first, cache / "rounds/00000/rollouts", 1)
        first.send_signal(signal.SIGSTOP)
        second = start("rollouts", cache)
        out, err = second.communicate(timeout=60)
        assert second.returncode == 1 and out == ""
        line = err.splitlines()[-1]
        assert (
            line.startswith(f"redpen: cache {cache} is being written by `redpen rollouts") and f"{first.pid}" in line
        )
    finally:
        first.kill()
        first.communicate()
