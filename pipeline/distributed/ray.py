"""Workers of a Ray cluster: each has the model in its own process, and is assigned blocks as it becomes free.

The process of the command plans, holds the cache's lock and prints; it needs no GPU. A task is a few blocks, and may
run twice: a worker that dies is replaced, and the blocks that it had not committed go to the next free worker.
RAY_ADDRESS names a running cluster (`auto`: the one on this machine), in which every machine has cache, models and
redpen at the same paths; without it, a cluster of this machine starts and ends with the command.

    redpen score RECIPE --cache CACHE --launcher ray --workers 4
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import signal
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cache_schema as cs
from pipeline.console import console, say, warn
from pipeline.distributed.blocks import OnProgress, Session, Work
from pipeline.distributed.ranks import Ranks
from pipeline.environment import ENVIRONMENT, install_hint
from pipeline.errors import ConfigError, RedpenError, user_message

# A block, or the loading of the model, that has killed so many workers would kill them all.
_MAX_DEATHS = 4
_POLL_SECONDS = 1.0
_PATIENCE_SECONDS = 30.0
_END_SECONDS = 10.0


@contextlib.contextmanager
def cluster(n_workers: int | None) -> Iterator[Ranks]:
    """A single rank whose blocks are written by the workers of a cluster.

    Raises:
        ConfigError: Ray is not installed, or no cluster is reachable at RAY_ADDRESS.
    """
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")  # keeps Ray from printing on stdout
    try:
        import ray
    except ImportError as error:
        raise ConfigError(f"--launcher ray: Ray is not installed; `{install_hint('ray')}`") from error
    address = os.environ.get("RAY_ADDRESS")
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
    local = {"num_cpus": max(os.cpu_count() or 1, n_workers or 1), "include_dashboard": False}
    try:
        _require_answer(address or "local")
        ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, **({} if address else local))
    except (OSError, RuntimeError, ValueError) as error:
        failure = f"RAY_ADDRESS = {address!r}: no such cluster" if address else "--launcher ray: Ray failed to start"
        raise ConfigError(f"{failure} ({_reason(error)})") from error
    try:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)  # Ray has replaced them
        yield Ranks(open_session=lambda work: RaySession(work, n_workers))
    finally:
        ray.shutdown()


@dataclass(frozen=True)
class _Report:
    """The outcome of a call to a worker.

    Attributes:
        output: lines that it printed.
        error: one line; None if the call succeeded.
        batch_blocks: of the session that was opened.
    """

    output: str
    error: str | None
    batch_blocks: int


class _Worker:
    """One process of the cluster, and the session in it.

    Args:
        directory, host: of the command. The worker changes to that directory if it exists, for relative paths.
    """

    def __init__(self, directory: str, host: str):
        with contextlib.suppress(OSError):
            os.chdir(directory)
        self._elsewhere = "" if host == socket.gethostname() else f"{socket.gethostname()}: "
        self._session: Session | None = None

    def start(self) -> None:
        """Return once the process runs."""

    def open(self, work: Work) -> _Report:
        def load() -> None:
            self._session = work.open()

        return self._report(load)

    def run(self, blocks: Sequence[int]) -> _Report:
        assert self._session is not None
        session = self._session
        return self._report(lambda: session.run(blocks, lambda rollouts, tokens: None))

    def close(self) -> None:
        if self._session is not None:
            self._session.close()

    def _report(self, act: Callable[[], None]) -> _Report:
        console.file, error = (output := io.StringIO()), None
        try:
            act()
        except Exception as failure:
            if (line := user_message(failure)) is None:
                raise
            error = self._elsewhere + line
        return _Report(output.getvalue(), error, 1 if self._session is None else self._session.batch_blocks)


@dataclass
class _Task:
    """A call in progress on a worker, and its blocks that are not known to be committed."""

    worker: Any
    step: str
    blocks: list[int] = field(default_factory=list)


class RaySession:
    """The `Session` of a whole cluster of workers. It is open as soon as one of them has loaded the model.

    Args:
        n_workers: by default as many as the cluster's GPUs suffice for, or one for each machine without GPUs.

    Raises:
        RedpenError: a worker's error, or the model or a block killed one worker after another.
    """

    batch_blocks = 1

    def __init__(self, work: Work, n_workers: int | None):
        import ray

        total, n_machines = ray.cluster_resources(), sum(node["Alive"] for node in ray.nodes())
        n_gpus = int(total.get("GPU", 0)) if work.gpus else 0
        self._n_workers = n_workers or (max(1, n_gpus // work.gpus) if n_gpus else n_machines)
        self._needs = {"num_cpus": 1.0, "num_gpus": _gpus_each(n_gpus, work.gpus, self._n_workers)}
        threads = max(1, int(total.get("CPU", 1)) // self._n_workers)
        environment = {name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()}
        environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(threads))
        environment["PYTHONPATH"] = f"{Path(__file__).parents[2]}:${{PYTHONPATH}}"
        self._new_worker = ray.remote(_Worker).options(
            **self._needs, scheduling_strategy="SPREAD", runtime_env={"env_vars": environment}
        )
        self._work, self._work_ref = work, ray.put(work)
        self._tasks: dict[Any, _Task] = {}
        self._ready: list[Any] = []
        self._queue: deque[int] = deque()
        self._done: list[int] = []
        self._deaths: Counter[int | None] = Counter()  # by block; None: before a model was loaded
        self._has_opened = False
        try:
            for _ in range(self._n_workers):
                self._start()
            while not self._ready:
                self._poll()
        except BaseException:
            self.close()
            raise

    def run(self, blocks: Sequence[int], on_progress: OnProgress) -> None:
        """Assign blocks to workers until all are committed."""
        group, looked = self._work.group(), time.monotonic()
        self._queue.extend(blocks)
        most = min(self.batch_blocks, math.ceil(len(blocks) / self._n_workers))
        while self._queue or self._running():
            while self._ready and self._queue:
                # a block of a worker that died is assigned alone, to find out whether it was the cause
                size = 1 if self._deaths[self._queue[0]] else min(most, len(self._queue))
                batch = [self._queue.popleft() for _ in range(size)]
                worker = self._ready.pop()
                self._tasks[worker.run.remote(batch)] = _Task(worker, "run", batch)
            self._poll()
            if time.monotonic() > looked + _POLL_SECONDS:
                looked = time.monotonic()
                for task in self._running().values():
                    self._take_committed(group, task)
            commits = [group.commit(block) for block in self._done]
            self._done.clear()
            on_progress(*(sum(int(commit[name]) for commit in commits) for name in ("rows", "tokens")))

    def close(self) -> None:
        """Stop all workers."""
        import ray

        closing = [worker.close.remote() for worker in self._ready]
        _wait(closing)
        for worker in [*self._ready, *(task.worker for task in self._tasks.values())]:
            ray.kill(worker)
        _wait(list(self._running()))  # none may still write after the cache's lock is released

    def _running(self) -> dict[Any, _Task]:
        return {ref: task for ref, task in self._tasks.items() if task.step == "run"}

    def _start(self) -> None:
        worker = self._new_worker.remote(os.getcwd(), socket.gethostname())
        self._tasks[worker.start.remote()] = _Task(worker, "start")
        self._patient_until = time.monotonic() + _PATIENCE_SECONDS

    def _poll(self) -> None:
        """Process calls that have ended; waits up to a second for one."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        done, _ = ray.wait(list(self._tasks), timeout=_POLL_SECONDS)
        for ref in done:
            task = self._tasks.pop(ref)
            try:
                report = ray.get(ref)
            except RayTaskError:
                raise  # a bug, with its traceback
            except RayError as error:
                if getattr(error, "actor_init_failed", False):
                    raise RedpenError(
                        f"a worker cannot start ({_reason(error)}); install redpen and the packages that the recipe "
                        "uses on every machine of the cluster, in the same versions"
                    ) from error
                self._replace(task, _reason(error))
                continue
            if task.step == "start":
                self._tasks[task.worker.open.remote(self._work_ref)] = _Task(task.worker, "open")
                continue
            self._take(task, report)
        if time.monotonic() > self._patient_until:
            self._patient_until = math.inf
            self._warn_of_missing(sum(task.step == "start" for task in self._tasks.values()))

    def _take(self, task: _Task, report: _Report) -> None:
        """Record a successful call; its worker is ready again."""
        if report.error is not None:
            raise RedpenError(report.error)
        if task.step == "run" or not self._has_opened:  # all print the same when they open
            for line in report.output.splitlines():
                say(line)
        if task.step == "open":
            self._has_opened, self.batch_blocks = True, report.batch_blocks
            del self._deaths[None]
        self._ready.append(task.worker)
        self._done += task.blocks

    def _replace(self, task: _Task, reason: str) -> None:
        """Replace a dead worker; its unfinished blocks go to the front of the queue."""
        import ray

        ray.kill(task.worker)  # in case it is only unreachable
        if task.step == "run":
            self._take_committed(self._work.group(), task)
            self._queue.extendleft(reversed(task.blocks))
        lost: list[int] | list[None] = task.blocks if task.step == "run" else [None]
        self._deaths.update(lost)
        for what in lost:
            if self._deaths[what] >= _MAX_DEATHS:
                doing = "loading the model" if what is None else f"block {what}"
                raise RedpenError(
                    f"{doing} has killed {_MAX_DEATHS} workers ({reason}); see Ray's logs. Finished blocks are "
                    "committed, and the same command continues"
                )
        undone = f"; to be repeated: block {', '.join(map(str, task.blocks))}" if task.blocks else ""
        say(f"a worker process has died and is replaced{undone} ({reason})")
        self._start()

    def _take_committed(self, group: cs.BlockGroup[Any], task: _Task) -> None:
        committed = [block for block in task.blocks if group.is_committed(block)]
        task.blocks = [block for block in task.blocks if block not in committed]
        self._done += committed

    def _warn_of_missing(self, n_missing: int) -> None:
        import ray

        if n_missing:
            needs = " and ".join(f"{self._needs[f'num_{name.lower()}s']:g} {name}" for name in ("CPU", "GPU"))
            total, free = ray.cluster_resources(), ray.available_resources()
            has = ", ".join(
                f"{free.get(name, 0):g} of {total.get(name, 0):g} {name}s free" for name in ("CPU", "GPU")
            )
            warn(
                f"{n_missing} of {self._n_workers} workers have not started in {_PATIENCE_SECONDS:g} s: each needs "
                f"{needs}, the cluster has {has}; {'continuing with the others' if self._has_opened else 'waiting'}"
            )


def _require_answer(address: str) -> None:
    """Raise `OSError` if nothing listens: Ray itself would try for a quarter of an hour."""
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), _END_SECONDS).close()


def _gpus_each(n_gpus: int, wanted: int, n_workers: int) -> float:
    """GPUs for one worker: what it needs, or a fraction of one if several workers share it."""
    if not n_gpus or wanted != 1:
        return float(min(n_gpus, wanted))
    return 1 / math.ceil(n_workers / n_gpus)


def _wait(calls: list[Any]) -> None:
    import ray

    if calls:
        ray.wait(calls, num_returns=len(calls), timeout=_END_SECONDS)


def _reason(error: Exception) -> str:
    """The reason in Ray's message, without its advice."""
    last = (str(error).strip() or type(error).__name__).splitlines()[-1]
    return last.partition("Worker exit detail: ")[2].partition(" Some common causes")[0] or last[:300]
