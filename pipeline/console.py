"""What redpen says while it works: lines and progress bars on stderr, readable on a terminal and in a log file.

Results go to stdout, by `print` or, where they are tables, by `results()`.
"""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from pipeline.environment import RANK

console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=RANK > 0)  # of several workers, one talks

#: C0 and C1 controls, and the invisible characters that reorder or hide text
_CONTROLS = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)
_SHORT = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}


def escape_control(text: str) -> str:
    """`text` on one line, control characters shown as escapes: what a model wrote must not steer the terminal."""
    return _CONTROLS.sub(lambda m: _SHORT.get(m[0]) or m[0].encode("unicode_escape", "surrogatepass").decode(), text)


def results() -> Console:
    """A console on stdout for tables. A pipe or a file has no width to fold long rows to."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def say(line: str) -> None:
    """One line of information."""
    console.print(Text(escape_control(line)))


def warn(line: str) -> None:
    """One line that deserves attention; the work goes on."""
    console.print(Text.assemble(("warning: ", "yellow"), escape_control(line)))


class Bar:
    """A progress bar to advance. `unit` is what is counted, `done` what an earlier run had finished."""

    def __init__(self, description: str, total: int, unit: str, done: int = 0):
        self.description, self.total, self.unit = description, total, unit
        self.done, self.note = done, ""
        self._done_before, self._started = done, time.monotonic()

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Count `count` more; `note` replaces the remark at the end of the bar."""
        self.done += count
        self.note = self.note if note is None else note
        self._show()

    @property
    def rate(self) -> float:
        """Units a second in this run."""
        return (self.done - self._done_before) / max(time.monotonic() - self._started, 1e-9)

    def line(self) -> str:
        """The state of the work as one plain line."""
        share = f"{self.done / self.total:.0%}" if self.total else "100%"
        left = (self.total - self.done) / self.rate if self.rate else 0.0
        eta = f", {_duration(left)} left" if self.done < self.total and left else ""
        note = f", {self.note}" if self.note else ""
        return f"{self.description}: {share}, {self.done}/{self.total} {self.unit}, {_rate(self.rate)}/s{eta}{note}"

    def close(self) -> None:
        """Leave one line about the finished work, if this run did any."""
        if self.done > self._done_before:
            say(self.line())

    def _show(self) -> None:
        raise NotImplementedError


class _LiveBar(Bar):
    """A rich bar that redraws itself."""

    def __init__(self, description: str, total: int, unit: str, done: int, live: Progress):
        super().__init__(description, total, unit, done)
        self._live = live
        self._task: TaskID = live.add_task(description, total=total, completed=done, rate="", note="", unit=unit)

    def _show(self) -> None:
        rate, note = f"{_rate(self.rate)}/s", escape_control(self.note)
        self._live.update(self._task, completed=self.done, rate=rate, note=note)


class _LineBar(Bar):
    """A plain line about every 10 % of the work, at most one a second and at least one in ten seconds of progress."""

    def __init__(self, description: str, total: int, unit: str, done: int):
        super().__init__(description, total, unit, done)
        self._last_time, self._last_done = time.monotonic(), done

    def _show(self) -> None:
        waited = time.monotonic() - self._last_time
        tenth = 10 * (self.done - self._last_done) >= self.total
        if waited >= 10 or (tenth and waited >= 1):
            self._last_time, self._last_done = time.monotonic(), self.done
            say(self.line())

    def close(self) -> None:
        if self._last_done < self.done:
            super().close()


@contextlib.contextmanager
def progress(description: str, total: int, unit: str = "blocks", done: int = 0) -> Iterator[Bar]:
    """Show progress over `total` units, of which `done` were finished before: a bar with rate and time left on a
    terminal, plain lines otherwise, and one closing line either way.

        with progress("rollouts", total=2048, unit="rollouts") as bar:
            bar.advance(256, note="mean length 18.4")
    """
    bar: Bar
    if console.is_terminal:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]} {task.fields[rate]}", markup=False),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        with Progress(*columns, console=console, transient=True) as live:
            yield (bar := _LiveBar(description, total, unit, done, live))
    else:
        yield (bar := _LineBar(description, total, unit, done))
    bar.close()


def _rate(per_second: float) -> str:
    for bound, divisor, suffix in ((1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if per_second >= bound:
            return f"{per_second / divisor:.1f}{suffix}"
    return f"{per_second:.1f}"


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
