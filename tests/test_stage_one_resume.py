"""Stage one, killed and stopped: real processes, real signals. What is finished equals an undisturbed
run's.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import cache_schema as cs
from helpers import preloaded
from helpers.caches import MANY_BLOCKS, assert_same_cache, wait_for_commits, without_scores


def start(command: str, cache: Path) -> preloaded.Process:
    overrides = [argument for setting in MANY_BLOCKS for argument in ("--set", setting)]
    return preloaded.python("-m", "pipeline", command, "toy", "--cache", str(cache), *overrides)


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
    command: str, prepare: Callable[[Path, Path], Path], groups: list[str], undisturbed_cache: Path, tmp_path: Path
) -> None:
    cache, rng = prepare(undisturbed_cache, tmp_path / "toy.zarr"), random.Random()
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
    assert_same_cache(cache, undisturbed_cache, sorted({group.removeprefix("scores/") for group in groups}))


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_is_clean_and_says_so_in_one_line(
    signum: signal.Signals, code: int, undisturbed_cache: Path, tmp_path: Path
) -> None:
    command, prepare, group = {
        signal.SIGTERM: ("rollouts", nothing, "rollouts"),
        signal.SIGINT: ("score", without_scores, "scores/student"),
    }[signum]
    cache = prepare(undisturbed_cache, tmp_path / "toy.zarr")
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


def test_the_error_names_the_process_that_holds_the_cache(tmp_path: Path) -> None:
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
