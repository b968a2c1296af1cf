"""Curves of a run: metrics.jsonl and TensorBoard always, Weights & Biases and trackio if `track.trackers` names them.

Both libraries pass logged values to a process or thread, so a step does not wait for a network. An error of theirs
costs one warning and the rest of that tracker's curve, never the run. A run that continues also continues their
curves: steps that a kill took from a tracker are logged from metrics.jsonl, and steps that the tracker already has,
repeated by a run that was killed after its last checkpoint, are not logged twice.

Weights & Biases keeps its files in RUN/wandb. If nobody is logged in, or its server does not respond within
`INIT_SECONDS`, it works offline: nothing is asked at the terminal, and `wandb sync` of RUN/wandb/latest-run uploads
the whole curve. trackio writes to TRACKIO_DIR, or to what TRACKIO_SPACE_ID or TRACKIO_SERVER_URL name. WANDB_MODE,
WANDB_ENTITY and the other environment variables of both work as usual.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from pipeline.config import TrackConfig
from pipeline.console import say, warn
from pipeline.credentials import masked
from pipeline.environment import install_hint
from pipeline.errors import ConfigError, one_line
from pipeline.runs.directory import Result, RunDirectory

#: How long to wait for a server of Weights & Biases at the start, and for the upload of the curve at the end.
INIT_SECONDS, FINISH_SECONDS = 30.0, 60.0


class Tracker(Protocol):
    """A place that shows curves."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the metrics of a step, by name."""

    def finish(self, result: Result | None) -> None:
        """Log how the run ended (None if it has not), and wait until everything is written."""


class TensorBoard:
    """TensorBoard event files. Points from `first_step` on by an earlier process are hidden."""

    def __init__(self, directory: Path, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory), purge_step=first_step)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def finish(self, result: Result | None) -> None:
        self._writer.close()


class Wandb:
    """A run of Weights & Biases, identified by the run directory's id."""

    def __init__(self, track: TrackConfig, run: RunDirectory):
        import wandb

        def begin(mode: Any) -> Any:
            return wandb.init(
                project=track.project,
                name=track.name or run.path.resolve().name,
                group=track.group,
                tags=track.tags,
                id=run.id,
                resume="allow",
                config=masked(run.config),
                dir=run.path,
                mode=mode,
                settings=wandb.Settings(
                    console="off",  # standard output and error stay as they are
                    silent=True,
                    init_timeout=INIT_SECONDS,
                    finish_timeout=FINISH_SECONDS,
                    finish_timeout_raises=True,
                ),
            )

        wandb.setup(wandb.Settings(silent=True))  # for the login
        later = f"`wandb sync {run.path}/wandb/latest-run` uploads the curves later"
        try:
            online = os.environ.get("WANDB_MODE", "online") == "online"
            if lacks_login := online and not wandb.login(prompt=False, verify=False):
                say(f"wandb: not logged in; {later}")
            self._run = begin("offline" if lacks_login else None)
        except wandb.errors.Error as error:
            warn(f"wandb: {one_line(error)}; {later}")
            wandb.teardown()  # or the id would be in use
            self._run = begin("offline")
        if not (self._run.offline or self._run.disabled):
            say(f"wandb: {self._run.url}")
        self._first_step = self._run.step  # the first step that a continued run lacks; 0 offline

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if step >= self._first_step:
            self._run.log(dict(metrics), step=step)

    def finish(self, result: Result | None) -> None:
        if result is not None:
            self._run.summary.update({"result": result.sentence, "exit_code": result.exit_code})
        self._run.finish(exit_code=1 if result is None else 0)


class Trackio:
    """A run of trackio, identified by its name, which contains the run directory's id."""

    def __init__(self, track: TrackConfig, run: RunDirectory):
        import trackio

        name = f"{track.name or run.path.resolve().name}-{run.id}"
        config = masked(run.config) | ({"tags": track.tags} if track.tags else {})
        with _silence():
            self._run = trackio.init(
                project=track.project, name=name, group=track.group, config=config, resume="allow", embed=False
            )
        say(f"trackio: run {name}; view it with `trackio show --project {track.project}`")
        self._first_step = getattr(self._run, "_next_step", 0)  # as for wandb; there is no public name for it
        self._step = 0

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if step >= self._first_step:
            self._run.log(dict(metrics), step=step)
        self._step = step

    def finish(self, result: Result | None) -> None:
        import trackio

        if result is not None:
            self._run.log({"result": result.sentence, "exit_code": result.exit_code}, step=self._step)
        with _silence():
            trackio.finish()  # type: ignore[no-untyped-call]


_TRACKERS: dict[str, Callable[[TrackConfig, RunDirectory], Tracker]] = {"wandb": Wandb, "trackio": Trackio}


def check_installed(track: TrackConfig) -> None:
    """Raise `ConfigError` if the library of a tracker is not installed."""
    for name in track.trackers:
        spec = find_spec(name)
        if spec is None or spec.origin is None:  # origin None: a directory of that name, such as RUN/wandb
            raise ConfigError(f"track.trackers: {name} is not installed; `{install_hint(name)}`")


class Recorder:
    """Logs the steps of a run from `first_step` on to all of its curves; only the main process has one."""

    def __init__(self, run: RunDirectory, first_step: int):
        self._run, self._result = run, None
        with run.writing():
            self._tensorboard = TensorBoard(run.tensorboard, first_step)
        self._trackers: dict[str, Tracker] = {}
        for name in dict.fromkeys(run.track.trackers):
            with self._unless_it_fails(name):
                self._trackers[name] = _TRACKERS[name](run.track, run)
        for metrics in run.steps() if self._trackers else ():
            self._track(metrics, metrics.pop("time"))

    def log(self, metrics: dict[str, Any], speed: dict[str, float]) -> None:
        """Log a step's metrics, which include `step`, and its speed."""
        self._run.append_metrics(metrics | {"time": speed})
        with self._run.writing():
            self._tensorboard.log(_named(metrics, speed), metrics["step"])
        self._track(metrics, speed)

    def close(self, result: Result | None) -> None:
        """Write everything out; `result` is None if the run has not ended."""
        with self._run.writing():
            self._tensorboard.finish(result)
        for name, tracker in list(self._trackers.items()):
            with self._unless_it_fails(name):
                tracker.finish(result)

    def _track(self, metrics: dict[str, Any], speed: dict[str, float]) -> None:
        for name, tracker in list(self._trackers.items()):
            with self._unless_it_fails(name):
                tracker.log(_named(metrics, speed), metrics["step"])

    @contextlib.contextmanager
    def _unless_it_fails(self, name: str) -> Iterator[None]:
        """Drop a tracker after its first failure."""
        try:
            yield
        except Exception as error:
            self._trackers.pop(name, None)
            warn(f"{name} failed ({one_line(error)}); training continues without it; {self._run.metrics} is complete")


def _named(metrics: dict[str, Any], speed: dict[str, float]) -> dict[str, float]:
    named = {f"train/{name}": value for name, value in metrics.items() if name != "step"}
    return named | {f"time/{name}": value for name, value in speed.items()}


def _silence() -> contextlib.AbstractContextManager[Any]:
    """Hide what trackio prints on standard output, which is for results."""
    return contextlib.redirect_stdout(io.StringIO())
