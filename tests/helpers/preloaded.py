"""Processes of redpen, alone or by torchrun, that do not import torch anew: forks of one that has.

For tests that kill them, stop them or need several. Each is a process of its own, with its signals and its exit code,
and runs its program from the first line; what it is spared are six CPU seconds of other libraries' imports.
test_workers.py also starts a job as users do, by torchrun's own command.
"""

from __future__ import annotations

import dataclasses
import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

# Nothing of redpen: what it reads when imported, such as its rank, is not the server's.
_PRELOADED = [
    *("torch.distributed.run", "torch.distributed.fsdp", "torch.utils.tensorboard", "torch._dynamo"),
    *("transformers.models.qwen3.modeling_qwen3", "peft", "zarr", "pydantic", "tomlkit", "rich.progress"),
]
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(_PRELOADED)


class Process:
    """A running program, with what `subprocess.Popen` has of these names. It prints to files, so nobody must read."""

    def __init__(self, program: Callable[..., None], *arguments: object) -> None:
        self._directory = tempfile.TemporaryDirectory()
        self._printed = [Path(self._directory.name, name) for name in ("out", "err")]
        with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
            forkserver.ensure_running()  # torch reads it when imported
            environment = dict(os.environ)
        self._process = _CONTEXT.Process(target=_begin, args=(environment, self._printed, program, *arguments))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Once only."""
        self.wait(timeout)
        with self._directory:
            out, err = (file.read_text() for file in self._printed)
        return out, err

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def python(*command: str) -> Process:
    """`python COMMAND`, a file or a module by `-m`, on one thread."""
    return Process(_run, *command)


def torchrun(*command: str) -> Process:
    """`torchrun COMMAND`, its options included; its ranks are forked too."""
    return Process(_launch, *command)


def processes(pid: int) -> Iterator[tuple[int, str]]:
    """The processes that one has started, directly or not, with their command lines."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for child in map(int, children):
            yield child, Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            yield from processes(child)
    except OSError:
        return  # it has just ended


def _begin(
    environment: dict[str, str], printed: list[Path], program: Callable[..., None], *arguments: object
) -> None:
    gc.freeze()  # stages look for garbage after each of their models; there is none in what was imported
    os.environ.clear()
    os.environ.update(environment)
    for standard, path in enumerate(printed, start=1):
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(file, standard)
        os.close(file)
    program(*arguments)


def _run(*command: str) -> None:
    if command[0] == "-u":  # torchrun says so to its ranks
        command = command[1:]
    if command[0] == "-m":
        sys.argv = list(command[1:])
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(command)
        sys.path.insert(0, os.path.dirname(command[0]))
        runpy.run_path(command[0], run_name="__main__")


def _launch(*command: str) -> None:
    from torch.distributed import run
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    def forked(config: LaunchConfig, entrypoint: str) -> elastic_launch:
        return elastic_launch(dataclasses.replace(config, start_method="fork"), _run)

    with mock.patch.object(run, "elastic_launch", forked):
        run.main(command)
