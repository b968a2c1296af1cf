"""Output: results on stdout, messages and progress on stderr, for terminals and log files.

`show()` prints a line of results, `results()` is a console for tables; `say()`, `warn()`, `fail()` and `progress()`
write to stderr. Nothing else writes to either stream. Text from outside passes through `escape_control()`, so that no
file, model or server can control the terminal.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import IO, Any, cast

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.text import Text

from pipeline import credentials
from pipeline.environment import RANK


class _Stderr(io.TextIOBase):
    """The current sys.stderr. Write errors (full disk, closed terminal) are ignored: they must not end the work."""

    @property
    def rich_proxied_file(self) -> _Stderr:
        """The file that rich writes to; rich replaces sys.stderr while a bar is shown."""
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
    """The current sys.stdout, for rich: control sequences other than colours become escapes."""

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


#: Only the first of several ranks writes to it.
console = Console(file=cast("IO[str]", _Stderr()), highlight=False, soft_wrap=True, quiet=RANK > 0)

_SUGGESTIONS: ContextVar[bool] = ContextVar("without_suggestions", default=os.environ.get("REDPEN_SUGGEST") == "0")

#: C0 and C1 controls, and the invisible characters that reorder or hide text
_CONTROLS = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)
_SHORT = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
_STYLE_OR_CONTROL = re.compile(rf"\x1b\[[\d;]*m|(?!\n){_CONTROLS.pattern}")


def escape_control(text: str) -> str:
    """`text` on one line, control characters escaped and credentials masked as `***`."""
    return _CONTROLS.sub(_escape, credentials.mask(text))


def _escape(found: re.Match[str]) -> str:
    return _SHORT.get(found[0]) or found[0].encode("unicode_escape", "surrogatepass").decode()


def clipped(line: str) -> str:
    """A message without the middle of words of more than 300 characters, e.g. paths, and at most 4,000 long."""
    line = re.sub(r"\S{301,}", lambda word: f"{word[0][:150]}...{word[0][-150:]}", line)
    return line if len(line) <= 4000 else f"{line[:2000]} ... {line[-2000:]}"


def results() -> Console:
    """A console on stdout for tables. Pipes and files get 160 columns."""
    width = None if sys.stdout.isatty() else 160
    return Console(file=cast("IO[str]", _Stdout()), highlight=False, markup=False, emoji=False, width=width)


def show(line: str) -> None:
    """Print one line of results on stdout."""
    print(escape_control(line), flush=True)


def show_part(text: str) -> None:
    """Write a part of a streamed result on stdout; its line breaks stay."""
    sys.stdout.write("\n".join(map(escape_control, text.split("\n"))))
    sys.stdout.flush()


def say(line: str) -> None:
    """Print one line of information on stderr."""
    console.print(Text(escape_control(clipped(line))))


def fail(line: str) -> None:
    """Print the line of an error, on any rank."""
    console.file.write(f"redpen: {escape_control(clipped(line))}\n")


def suggest(line: str) -> None:
    """Print the next command to run, unless `without_suggestions` is active or REDPEN_SUGGEST is 0."""
    if not _SUGGESTIONS.get():
        say(f"next: {line}")


@contextlib.contextmanager
def without_suggestions() -> Iterator[None]:
    """Suppress `suggest`, for workflows that run the next stage themselves."""
    token = _SUGGESTIONS.set(True)
    try:
        yield
    finally:
        _SUGGESTIONS.reset(token)


def warn(line: str) -> None:
    """Print one line about a problem that does not stop the work."""
    console.print(Text.assemble(("warning: ", "yellow"), escape_control(clipped(line))))


class Bar:
    """Progress of `total` units (a plural noun), of which an earlier run finished `done`."""

    def __init__(self, description: str, total: int, unit: str, done: int = 0):
        self.description, self.total, self.unit = description, total, unit
        self.done, self.note = done, ""
        self._done_before, self._started = done, time.monotonic()
        self._fraction: float | None = None

    def advance(self, count: int = 1, note: str | None = None, fraction: float | None = None) -> None:
        """Count `count` more units; `note` replaces the text beside the bar.

        Args:
            fraction: of this run's work, for the time left, if finished units do not say how much work is done.
        """
        self.done += count
        self.note = self.note if note is None else note
        self._fraction = fraction
        self._show()

    @property
    def seconds(self) -> float:
        """Since the bar was shown."""
        return max(time.monotonic() - self._started, 1e-9)

    @property
    def rate(self) -> float:
        """Units per second in this run."""
        return (self.done - self._done_before) / self.seconds

    @property
    def left(self) -> str:
        """The time left, such as "0:35"; empty if it is unknown, or nothing is left."""
        fraction = self._fraction
        if fraction is None:
            fraction = (self.done - self._done_before) / max(self.total - self._done_before, 1)
        if not fraction or self.done >= self.total:
            return ""
        return _duration(self.seconds * (1 - fraction) / fraction)

    @property
    def pace(self) -> str:
        """The rate with its unit; empty before the first unit is done."""
        return speed(self.rate, self.unit) if self.done > self._done_before else ""

    def line(self) -> str:
        """The progress as one plain line."""
        percent = f"{self.done / self.total:.0%}" if self.total else "100%"
        left = f"{self.left} left" if self.left else ""
        parts = [percent, f"{self.done}/{self.total} {self.unit}", self.pace, left, self.note]
        return f"{self.description}: {', '.join(filter(None, parts))}"

    def close(self) -> None:
        """Print the final line, if this run did anything."""
        if self.done > self._done_before:
            say(self.line())

    def _show(self) -> None:
        raise NotImplementedError


class _LiveBar(Bar):
    """A rich progress bar with the note below it."""

    def __init__(self, description: str, total: int, unit: str, done: int, live: _Live):
        super().__init__(description, total, unit, done)
        self._live = live
        self._task = live.add_task(description, total=total, completed=done, rate="", unit=unit, left="")

    def _show(self) -> None:
        self._live.note = escape_control(self.note)
        self._live.update(self._task, completed=self.done, rate=self.pace, left=self.left)


class _Live(Progress):
    """A progress display with a line of text below the bar."""

    note = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.note:
            yield Text(self.note, no_wrap=True, overflow="ellipsis")


class _LineBar(Bar):
    """Plain lines for log files: one for every 10 % of the work, at most one a second, and at least one for every 10
    seconds (5 minutes in a long run).
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
    """Show progress over `total` units, of which `done` were finished before.

    On a terminal, a bar with rate and remaining time; otherwise plain lines. A final line stays in both cases.

        with progress("rollouts", total=2048, unit="rollouts") as bar:
            bar.advance(256, note="mean length 18.4")
    """
    bar: Bar
    if console.file.isatty() and not console.is_dumb_terminal:  # is_terminal would follow FORCE_COLOR
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]} {task.fields[rate]}", markup=False),
            TextColumn("{task.fields[left]}", style="progress.remaining"),
        )
        with _Live(*columns, console=console, transient=True) as live:
            yield (bar := _LiveBar(description, total, unit, done, live))
    else:
        yield (bar := _LineBar(description, total, unit, done))
    bar.close()


def short(number: float) -> str:
    """A number with a few digits: 0.17, 812.3, 14.6k, 1.2M."""
    for bound, divisor, suffix in ((1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if number >= bound:
            return f"{number / divisor:.1f}{suffix}"
    return f"{number:.1f}" if number >= 1 or number == 0 else f"{number:.2g}"


def speed(rate: float, unit: str) -> str:
    """A rate with digits at any speed: `14.6k tokens/s`, `0.17 rollouts/s`; below that, `48.0 s a rollout`."""
    if 0 < rate < 0.1:
        return f"{1 / rate:,.1f} s a {unit.removesuffix('s')}"
    return f"{short(rate)} {unit}/s"


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
