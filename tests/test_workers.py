"""Several workers on one stage, by torchrun and on a Ray cluster: real processes, real kills, equal results."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import cache_schema as cs
from helpers import preloaded
from helpers.caches import MANY_BLOCKS, ROOT, assert_same_cache, wait_for_commits, without_scores
from helpers.preloaded import processes
from pipeline.config import load_recipe
from pipeline.distributed import ray as ray_launcher
from pipeline.distributed.ranks import Ranks, rank_gpus
from pipeline.errors import ConfigError, ModelError
from pipeline.rollouts import stage as rollouts_stage

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
RANKS = ["--nproc-per-node", "2"]
TORCHRUN = ["-m", "torch.distributed.run", *RANKS]
RAY = ["--launcher", "ray", "--workers", "2"]
SETTINGS = [argument for setting in MANY_BLOCKS for argument in ("--set", setting)]


def by_torchrun(cache: Path, *options: str) -> preloaded.Process:
    """`redpen score` by two ranks of one thread each."""
    command = ["-m", "pipeline", "--", "score", "toy", "--cache", str(cache), *SETTINGS]
    return preloaded.torchrun(*RANKS, *options, *command)


def by_ray(cache: Path) -> subprocess.Popen[str]:
    """`redpen rollouts` by two workers of one thread each, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", "rollouts", "toy", "--cache", str(cache), *SETTINGS, *RAY],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def kill_one(process: subprocess.Popen[str], command_line: str) -> None:
    """SIGKILL for one of its workers, at once or as soon as there is one."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        for pid, line in processes(process.pid):
            if command_line in line:
                os.kill(pid, signal.SIGKILL)
                return
    raise AssertionError(f"no {command_line} met running")


def kill_rank(job: preloaded.Process, rank: int) -> None:
    """SIGKILL for one rank; the other does nothing more before it hears of that from torchrun."""
    ranks = [pid for pid, _ in processes(job.pid)]
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    os.kill(ranks[rank], signal.SIGKILL)
    time.sleep(1)
    os.kill(ranks[1 - rank], signal.SIGCONT)


def test_a_killed_rank_ends_the_job_and_what_follows_finishes_it(undisturbed_cache: Path, tmp_path: Path) -> None:
    cache = without_scores(undisturbed_cache, tmp_path / "toy.zarr")
    job = by_torchrun(cache)
    wait_for_commits(job, cache / "rounds/00000/scores/student", 2)
    kill_rank(job, 1)
    out, err = job.communicate(timeout=180)
    assert job.returncode == 1 and "next:" not in out + err
    (line,) = (line for line in err.splitlines() if line.startswith("redpen: "))
    assert line.startswith("redpen: stopped by SIGTERM: ") and line.endswith("the same command continues")
    assert re.search(r": \d+ of 24 blocks by (student|teacher) are committed;", line)
    assert not list(cs.verify(cs.open(cache)))
    job = by_torchrun(cache, "--max-restarts", "1")
    wait_for_commits(job, cache / "rounds/00000/scores/student", 2)
    kill_rank(job, 0)
    out, err = job.communicate(timeout=180)
    assert job.returncode == 0, err
    assert [line.split(":")[0] for line in out.splitlines()] == ["student", "teacher"]
    assert err.count("next: redpen diagnose") == 1
    assert [line for line in err.splitlines() if line.startswith("redpen: ")] == [
        "redpen: rank 1: stopped by SIGTERM; the same command continues"
    ]
    ours = "\n".join(line for line in err.splitlines() if not re.match(r"[EW]\d{4} ", line))  # but torchrun's
    assert "Traceback" not in ours and "Warning" not in ours
    assert_same_cache(cache, undisturbed_cache, ["student", "teacher"])


def test_of_several_ranks_one_reports_the_error(tmp_path: Path) -> None:
    settings = ["--set", "train.step=1"]
    command = [sys.executable, *TORCHRUN, "-m", "pipeline", "score", "toy", "--cache", str(tmp_path), *settings]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("redpen: ") == 1
    assert "train.step" in done.stderr and "did you mean train.steps" in done.stderr


def test_every_rank_receives_what_the_main_process_made(monkeypatch: pytest.MonkeyPatch) -> None:
    store = torch.distributed.HashStore()
    main, other = (Ranks(rank, 2, store) for rank in range(2))
    found = np.arange(3_000_000), "more than torchrun's store takes at a time"
    assert main.broadcast(lambda: found) is found
    array, text = other.broadcast(lambda: pytest.fail("only the main process calls it"))
    np.testing.assert_array_equal(array, found[0])
    assert text == found[1]
    assert main.broadcast(lambda: None) is other.broadcast(lambda: None) is None

    with pytest.raises(ModelError, match="no such model"):
        main.broadcast(functools.partial(fail, ModelError("no such model")))
    waited: list[bool] = []
    monkeypatch.setattr("pipeline.distributed.ranks.defer_to_main_process", lambda: waited.append(True))
    with pytest.raises(SystemExit):
        other.broadcast(lambda: None)
    assert waited == [True]


def fail(error: Exception) -> None:
    raise error


@needs_ray
def test_a_ray_run_outlives_its_workers(undisturbed_cache: Path, tmp_path: Path) -> None:
    cache = tmp_path / "toy.zarr"
    run = by_ray(cache)
    wait_for_commits(run, cache / "rounds/00000/rollouts", 2)
    kill_one(run, "ray::_Worker.run")
    out, err = run.communicate(timeout=120)
    assert run.returncode == 0, err
    assert [line.split(":")[0] for line in out.splitlines()] == ["rollouts"]
    assert err.count("next: redpen score") == 1
    assert len(re.findall("a worker process has died and is replaced", err)) == 1
    expected = re.compile(r"(student|teacher|format check|rollouts|next|a worker process)\b")
    assert all(expected.match(line) for line in err.splitlines()), err
    assert_same_cache(cache, undisturbed_cache, ["rollouts"])


#: Stages whose blocks are empty files: block 8 ends its workers, block 5 is refused, no model loads.
STAGES = """
import os, signal, sys
from pathlib import Path
from pipeline.distributed import ray as ray_launcher
from pipeline.errors import ModelError, RedpenError

class Group:
    def is_committed(self, block): return Path(str(block)).exists()
    def commit(self, block): return {"rows": 1, "tokens": 10}

class Session:
    batch_blocks = 3
    def run(self, blocks, on_progress):
        for block in blocks:
            if block == FATAL: os.kill(os.getpid(), 9)
            if block == WRONG: raise ModelError("block 5 is wrong")
            Path(str(block)).touch()
    def close(self): pass

class Work:
    gpus = 1
    def group(self): return Group()
    def open(self):
        if LOADS: return Session()
        os._exit(1)

ray_launcher._MAX_DEATHS = 2
handler = lambda signum, frame: None
signal.signal(signal.SIGTERM, handler)
with ray_launcher.cluster(1) as ranks:
    assert signal.getsignal(signal.SIGTERM) is handler
    for FATAL, WRONG, LOADS in ((8, None, True), (None, 5, True), (None, None, False)):
        for name in "0123456789": Path(name).unlink(missing_ok=True)
        counts = []
        try:
            ranks.open_session(Work()).run(range(10), lambda *count: counts.append(count))
        except RedpenError as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        print(*sorted(path.name for path in Path().iterdir()), *map(sum, zip(*counts)))
"""


@needs_ray
def test_what_ends_every_worker_or_stops_one_is_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STAGES],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    # what could be done is done, and counted: blocks, rows, tokens
    assert done.stdout.splitlines() == ["0 1 2 3 4 5 6 7 8 80", "0 1 2 3 4 3 30", ""]
    ended = r"a worker process has died and is replaced"
    patterns = [
        rf"{ended}; to be repeated: block 8 \(.*\)",
        r"RedpenError: block 8 has killed 2 workers \(.*\).*",
        r"RedpenError: block 5 is wrong",
        rf"{ended} \(.*\)",
        r"RedpenError: loading the model has killed 2 workers \(.*\).*",
    ]
    for line, pattern in zip(done.stderr.splitlines(), patterns, strict=True):
        assert re.fullmatch(pattern, line)


def test_ray_that_is_missing_or_does_not_answer_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy, cache = load_recipe("toy", ["prompts.limit=4"]), str(tmp_path / "toy.zarr")
    if importlib.util.find_spec("ray") is not None:
        monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
        with pytest.raises(ConfigError, match=r"RAY_ADDRESS = '127\.0\.0\.1:1': no such cluster \(.*refused\)"):
            rollouts_stage.run(toy, cache, launcher="ray")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"--launcher ray: Ray is not installed; `.*pip install -e .*\[ray\]'?`"):
        rollouts_stage.run(toy, cache, launcher="ray")
    assert not Path(cache).exists()


@pytest.mark.parametrize(
    ("gpus", "n_ranks", "shares"),
    [
        ("0123", 4, ["0", "1", "2", "3"]),
        ("0123", 2, ["01", "23"]),
        ("0123", 3, ["0", "1", "2"]),
        ("57", 3, ["5", "7", "5"]),
        ("0", 2, ["0", "0"]),
    ],
)
def test_ranks_share_the_gpus_of_their_machine(gpus: str, n_ranks: int, shares: list[str]) -> None:
    assert ["".join(rank_gpus(gpus, rank, n_ranks)) for rank in range(n_ranks)] == shares


@pytest.mark.parametrize(
    ("n_gpus", "wanted", "n_workers", "each"),
    [(0, 1, 4, 0), (4, 0, 4, 0), (4, 1, 4, 1), (4, 1, 2, 1), (2, 1, 3, 0.5), (1, 1, 4, 0.25), (8, 2, 4, 2)],
)
def test_ray_workers_share_gpus_where_there_are_more_of_them(
    n_gpus: int, wanted: int, n_workers: int, each: float
) -> None:
    assert ray_launcher._gpus_each(n_gpus, wanted, n_workers) == each
