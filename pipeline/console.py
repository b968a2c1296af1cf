"""What redpen says while it works: lines and progress bars on stderr, readable on a terminal and in a log file.

Results go to stdout, by `show()` or, for tables, by `results()`. Nothing else writes to either, and what came from
outside passes `escape_control()`, so no file, model or server steers the terminal.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import sys
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import IO, Any, cast

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from pipeline import credentials
from pipeline.environment import RANK


class _Stderr(io.TextIOBase):
    """sys.stderr as it is at the moment. What cannot be written, to a full disk or a terminal that is gone, is lost:
    no work ends because its progress is not seen.
    """

    @property
    def rich_proxied_file(self) -> _Stderr:
        """For rich, which may put a file of its own in the place of sys.stderr."""
        return self

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._file.flush()

    def isatty(self) -> bool:
        return bool(self._file.isatty())

    def fileno(self) -> int:
        return int(self._file.fileno())

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return str(getattr(self._file, "encoding", "utf-8"))

    @property
    def _file(self) -> Any:
        return getattr(sys.stderr, "rich_proxied_file", sys.stderr) or io.StringIO()


class _Stdout(io.TextIOBase):
    """sys.stdout as it is at the moment, for rich: nothing reaches a terminal but text and colours."""

    def write(self, text: str) -> int:
        sys.stdout.write(_STYLE_OR_CONTROL.sub(lambda m: m[0] if m[0].startswith("\x1b[") else _escape(m), text))
        return len(text)

    def flush(self) -> None:
        sys.stdout.flush()

    def isatty(self) -> bool:
        return sys.stdout.isatty()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return str(getattr(sys.stdout, "encoding", "utf-8"))


#: Of several workers, one talks.
console = Console(file=cast("IO[str]", _Stderr()), highlight=False, soft_wrap=True, quiet=RANK > 0)

_SUGGESTIONS: ContextVar[bool] = ContextVar("without_suggestions", default=False)

#: C0 and C1 controls, and the invisible characters that reorder or hide text
_CONTROLS = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)
_SHORT = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
_STYLE_OR_CONTROL = re.compile(rf"\x1b\[[\d;]*m|(?!\n){_CONTROLS.pattern}")


def escape_control(text: str) -> str:
    """`text` on one line, for eyes: control characters are escapes, since what a file or a model holds must not steer
    the terminal, and what looks like a credential is `***`.
    """
    return _CONTROLS.sub(_escape, credentials.mask(text))


def _escape(found: re.Match[str]) -> str:
    return _SHORT.get(found[0]) or found[0].encode("unicode_escape", "surrogatepass").decode()


def clipped(line: str, *, word: int = 300, most: int = 4000) -> str:
    """A message with the middle of very long words, paths for example, and of a very long line left out."""
    line = re.sub(rf"\S{{{word + 1},}}", lambda m: f"{m[0][: word // 2]}...{m[0][-word // 2 :]}", line)
    return line if len(line) <= most else f"{line[: most // 2]} ... {line[-most // 2 :]}"


def results() -> Console:
    """A console on stdout for tables. A pipe or a file has no width to fold long rows to."""
    width = None if sys.stdout.isatty() else 160
    return Console(file=cast("IO[str]", _Stdout()), highlight=False, markup=False, emoji=False, width=width)


def show(line: str) -> None:
    """One line of results on stdout. Control characters are shown as escapes."""
    print(escape_control(line), flush=True)


def say(line: str) -> None:
    """One line of information."""
    console.print(Text(escape_control(clipped(line))))


def fail(line: str) -> None:
    """The one line of an error, by any of several workers."""
    console.file.write(f"redpen: {escape_control(clipped(line))}\n")


def suggest(line: str) -> None:
    """What to do next, unless a command is under way that does it by itself."""
    if not _SUGGESTIONS.get():
        say(f"next: {line}")


@contextlib.contextmanager
def without_suggestions() -> Iterator[None]:
    """Within it nothing is suggested."""
    token = _SUGGESTIONS.set(True)
    try:
        yield
    finally:
        _SUGGESTIONS.reset(token)


def warn(line: str) -> None:
    """One line that deserves attention; the work goes on."""
    console.print(Text.assemble(("warning: ", "yellow"), escape_control(clipped(line))))


class Trend:
    """The whole course of a figure in `width` letters at most, from 0 to its highest: ▇▅▄▂▁▁. Each is the mean of as
    many values as every other.
    """

    def __init__(self, width: int = 10):
        self._width, self._each = width, 1
        self._means: list[float] = []
        self._open: list[float] = []

    def add(self, value: float) -> None:
        """Draw `value` too, if it is finite."""
        if not math.isfinite(value):
            return
        self._open.append(value)
        if len(self._open) < self._each:
            return
        self._means.append(sum(self._open) / self._each)
        self._open.clear()
        if len(self._means) > self._width:
            pairs = zip(self._means[::2], self._means[1::2], strict=False)
            self._open = self._means[-1:] * self._each if len(self._means) % 2 else []
            self._means, self._each = [(a + b) / 2 for a, b in pairs], 2 * self._each

    def __str__(self) -> str:
        highest = max(self._means, default=0.0)
        return "".join("▁▂▃▄▅▆▇█"[min(int(8 * mean / highest), 7) if mean > 0 else 0] for mean in self._means)


class Bar:
    """A progress bar to advance. `unit` is what is counted, `done` what an earlier run had finished."""

    def __init__(self, description: str, total: int, unit: str, done: int = 0):
        self.description, self.total, self.unit = description, total, unit
        self.done, self.note, self.trend = done, "", Trend()
        self._done_before, self._started = done, time.monotonic()

    def advance(self, count: int = 1, note: str | None = None, trend: float | None = None) -> None:
        """Count `count` more; `note` replaces the remark beside the bar, `trend` goes on a curve in front of it."""
        self.done += count
        self.note = self.note if note is None else note
        if trend is not None:
            self.trend.add(trend)
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
        return f"{self.description}: {share}, {self.done}/{self.total} {self.unit}, {short(self.rate)}/s{eta}{note}"

    def close(self) -> None:
        """Leave one line about the finished work, if this run did any."""
        if self.done > self._done_before:
            say(self.line())

    def _show(self) -> None:
        raise NotImplementedError


class _LiveBar(Bar):
    """A rich bar that redraws itself, with the trend and the remark on a line of their own."""

    def __init__(self, description: str, total: int, unit: str, done: int, live: _Live):
        super().__init__(description, total, unit, done)
        self._live = live
        self._task = live.add_task(description, total=total, completed=done, rate="", unit=unit)

    def _show(self) -> None:
        self._live.remark = f"{self.trend} {escape_control(self.note)}".strip()
        self._live.update(self._task, completed=self.done, rate=f"{short(self.rate)}/s")


class _Live(Progress):
    """A progress display with a remark below the bar."""

    remark = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.remark:
            yield Text(self.remark, no_wrap=True, overflow="ellipsis")


class _LineBar(Bar):
    """A plain line about every 10 % of the work, at most one a second, and one after a while without: 10 seconds at
    first, 5 minutes in a long run.
    """

    def __init__(self, description: str, total: int, unit: str, done: int):
        super().__init__(description, total, unit, done)
        self._last_time, self._last_done = self._started, done

    def _show(self) -> None:
        now = time.monotonic()
        waited, patience = now - self._last_time, min(max(10.0, (now - self._started) / 10), 300.0)
        tenth = 10 * (self.done - self._last_done) >= self.total
        if waited >= patience or (tenth and waited >= 1):
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
    if console.file.isatty() and not console.is_dumb_terminal:  # is_terminal would believe FORCE_COLOR
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]} {task.fields[rate]}", markup=False),
            TimeRemainingColumn(),
        )
        with _Live(*columns, console=console, transient=True) as live:
            yield (bar := _LiveBar(description, total, unit, done, live))
    else:
        yield (bar := _LineBar(description, total, unit, done))
    bar.close()


def short(number: float) -> str:
    """A number to be read at a glance: 812.3, 14.6k, 1.2M."""
    for bound, divisor, suffix in ((1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if number >= bound:
            return f"{number / divisor:.1f}{suffix}"
    return f"{number:.1f}"


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
