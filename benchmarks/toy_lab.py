"""What the comparisons on the toy pair share: processes and their cost, results that survive a cut run, figures."""

from __future__ import annotations

import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
#: Both cores for every process, and threads that wait do not spin beside those that work.
ENVIRONMENT = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
#: Okabe and Ito's colours, which the colour-blind can distinguish.
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"


@dataclass(frozen=True)
class Cost:
    """A process with those it started, as seen from outside.

    Attributes:
        seconds: by the clock, imports included.
        anonymous: bytes of anonymous memory at its peak.
        cpu_seconds: user and system time. Other work on the machine changes it far less than `seconds`.
    """

    seconds: float
    anonymous: int
    output: str
    cpu_seconds: float


def measured(*command: object, codes: Sequence[int] = (0,), root: Path = ROOT) -> Cost:
    """Run a command of a checkout to its end. Exits with its output where it ends with another code."""
    started, cpu = time.perf_counter(), _cpu_seconds()
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=root,
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, _anonymous(process.pid))
        time.sleep(0.02 if time.perf_counter() - started < 60 else 0.2)
    seconds = time.perf_counter() - started
    output, errors = process.communicate()
    if process.returncode not in codes:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{output}{errors}")
    return Cost(seconds, peak, output, _cpu_seconds() - cpu)


def redpen(*args: object, settings: Sequence[str] = (), codes: Sequence[int] = (0,), root: Path = ROOT) -> Cost:
    """A command of redpen with `section.key=value` settings."""
    parts = (part for setting in settings for part in ("--set", setting))
    return measured("-m", "pipeline", *args, *parts, codes=codes, root=root)


def sampled(output: str) -> tuple[int, float]:
    """Tokens and seconds, without loading the model, in what `redpen rollouts` prints."""
    match = re.search(r"([\d,]+) tokens[^\n]* in ([\d.]+) s", output)
    if match is None:
        sys.exit(f"no line about tokens and seconds in:\n{output}")
    return int(match[1].replace(",", "")), float(match[2])


def evaluate(out: Path, adapter: Path) -> dict[str, float]:
    """Greedy accuracy on the 2,048 held-out prompts and reverse KL on fresh rollouts, of the toy student with it."""
    student = f"student.adapter={adapter}"
    redpen("eval", "toy:student", "--teacher", "toy:teacher", "--out", out, settings=[student])
    figures = json.loads(out.read_text())["model"]
    return {"accuracy": figures["greedy"]["value"], "fresh_kl": figures["reverse_kl"]["value"]}


def curve(run: Path) -> list[dict[str, Any]]:
    """A training run's metrics, one object a step."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


class Results:
    """Figures by name, in a file: what was measured before a run was cut is not measured again."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self.figures: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        if name not in self.figures:
            print(f"  {name} ...", file=sys.stderr, flush=True)
            self.figures[name] = measure()
            partial = self._path.with_suffix(".partial")
            partial.write_text(json.dumps(self.figures, indent=1) + "\n")
            partial.replace(self._path)
        return self.figures[name]


def _cpu_seconds() -> float:
    """Of all processes that have ended and that were waited for, here or by those that waited for them."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _anonymous(pid: int) -> int:
    """Bytes of a process and of those it started."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        children = [
            int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()
        ]
    except OSError:  # it has just ended
        return 0
    found = re.search(r"RssAnon:\s+(\d+)", status)
    return (1024 * int(found[1]) if found else 0) + sum(map(_anonymous, children))


# -- figures ------------------------------------------------------------------------------------------------------


@contextmanager
def figure(path: Path, rows: int, columns: int) -> Iterator[list[Any]]:
    """The axes of a figure, row by row, which is written as SVG at the end; its text stays text."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": path.name,
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e5e5e5",
        "axes.axisbelow": True,
    }
    with plt.rc_context(style):
        drawn, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.1 * rows), squeeze=False)
        yield list(axes.flat)
        drawn.tight_layout()
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn.savefig(path, facecolor="white", metadata={"Date": None})
        plt.close(drawn)
    print(f"figure: {path}")


def median_curve(
    axis: Any, runs: Sequence[Sequence[dict[str, float]]], key: str, name: str, colour: str, style: str = "-"
) -> None:
    """The seeds' median of a measurement by step, and faintly every seed."""
    steps = [point["step"] for point in runs[0]]
    for run in runs:
        axis.plot(steps, [point[key] for point in run], style, color=colour, alpha=0.25, linewidth=1)
    middle = [statistics.median(run[row][key] for run in runs) for row in range(len(steps))]
    axis.plot(steps, middle, style, color=colour, marker="o", markersize=3.5, label=name)


def spread(values: Sequence[float], form: str) -> str:
    """The median, and lowest to highest where there are several."""
    middle, low, high = (form.format(value) for value in (statistics.median(values), min(values), max(values)))
    to = " to " if {low[0], high[0]} & {"+", "-"} else "-"
    return middle if len(values) == 1 else f"{middle} ({low}{to}{high})"
