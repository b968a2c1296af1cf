"""Charts for the page: lines and bars as SVG text, each with its figures as a table.

Series differ by colour (Okabe and Ito's palette, which the colour-blind can distinguish; on white and on black each
of the first five has a contrast of about 3:1 or more), and without colour by dashes and markers, or hatches. Nothing
but presentation attributes and the classes of `STYLE` is used, so a page may forbid inline styles. Text is escaped.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from pipeline.console import escape_control

Point = Sequence[float]

#: Points that a line is drawn from at most, and rows of the table beside it.
MAX_POINTS, TABLE_ROWS = 400, 12

#: What the charts need of a page's style sheet. `--chart-0` to `--chart-6` change the colours.
STYLE = """
.chart { margin: 0 }
.chart svg { display: block; width: 100%; height: auto; font: 12px system-ui, sans-serif }
.chart text { fill: currentColor }
.chart .title { font-size: 13px; font-weight: 600 }
.chart .end { text-anchor: end }
.chart .middle { text-anchor: middle }
.chart .grid { stroke: currentColor; stroke-opacity: .15 }
.chart .line { fill: none; stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round }
.chart .mark { fill: var(--c); stroke: none }
.chart .edge { stroke: var(--c) }
.chart .pale { fill: var(--c); fill-opacity: .3 }
.chart table { border-collapse: collapse; font-size: .85em }
.chart th, .chart td { padding: .1em .6em; text-align: right }
.s0 { --c: var(--chart-0, #0072b2) }
.s1 { --c: var(--chart-1, #d55e00) }
.s2 { --c: var(--chart-2, #009e73) }
.s3 { --c: var(--chart-3, #cc79a7) }
.s4 { --c: var(--chart-4, currentColor) }
.s5 { --c: var(--chart-5, #e69f00) }
.s6 { --c: var(--chart-6, #56b4e9) }
"""
_COLOURS = 7
_DASHES = ("", "6 3", "2 2.5", "9 3 2 3", "1 4")
#: Around (0, 0): circle, square, triangle, diamond.
_MARKS = ("M-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0", "M-3-3h6v6h-6z", "M0-3.6L3.6 3h-7.2z", "M0-4L4 0L0 4L-4 0z")
_HATCH_ANGLES = (45, 135, 0, 90)

_WIDTH, _PLOT_HEIGHT, _LEFT, _RIGHT = 460.0, 180.0, 50.0, 22.0
_ROW, _LETTER = 18.0, 6.6  # height of a row of text, mean width of a letter


@dataclass(frozen=True)
class _Scale:
    """Values from `low` to `high` onto pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]

    def __call__(self, value: float) -> float:
        return self.start + (self.end - self.start) * (value - self.low) / (self.high - self.low)


def line_chart(title: str, series: Mapping[str, Sequence[Point]], *, x_label: str, y_label: str) -> str:
    """Lines through the points [x, y] of each series, in order of x; an empty text without a point.

    A series without points is left out, but the others keep their colours. Values that are not finite are left out.
    """
    kept = {
        label: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
        for label, points in series.items()
    }
    lines = [(i, label, thin(points)) for i, (label, points) in enumerate(kept.items()) if points]
    if not lines:
        return ""
    named = lines if len(series) > 1 else []
    top = _top(named)
    xs, ys = ([point[axis] for _, _, points in lines for point in points] for axis in (0, 1))
    x = _linear(min(xs), max(xs), _LEFT, _WIDTH - _RIGHT, whole=all(float(v).is_integer() for v in xs), tight=True)
    y = _linear(min(ys), max(ys), top + _PLOT_HEIGHT, top)
    body = []
    for i, label, points in lines:
        path = "M" + "L".join(f"{x(px):.1f} {y(py):.1f}" for px, py in points)
        body.append(f'<path class="line s{i % _COLOURS}" stroke-dasharray="{_DASHES[i % len(_DASHES)]}" d="{path}"/>')
        stride = max(len(points) // 8, 1)
        for px, py in points[(i % 3) * stride // 3 :: stride]:
            tip = _escaped(f"{label}, {x_label} {_number(px)}: {_number(py)}")
            at = f"translate({x(px):.1f} {y(py):.1f})"
            mark = _MARKS[i % len(_MARKS)]
            body.append(f'<path class="mark s{i % _COLOURS}" transform="{at}" d="{mark}"><title>{tip}</title></path>')
    ticks = "".join(_text(x(tick), top + _PLOT_HEIGHT + 15, _number(tick), "middle") for tick in x.ticks)
    texts = [_line_summary(label, points, x_label) for _, label, points in lines]
    table = _table(x_label, [label for _, label, _ in lines], _rows([points for _, _, points in lines]))
    parts = [_grid(y), ticks, *body, _legend(named, _line_sample)]
    return _figure(title, y_label, x_label, top, texts, parts, table)


def bar_chart(
    title: str, names: Sequence[str], series: Mapping[str, Sequence[float | None]], *, x_label: str, y_label: str
) -> str:
    """A group of bars for each of `names`, one for each series; None and what is not finite have no bar.

    An empty text without a bar.
    """
    bars = [
        (i, label, [(n, float(v)) for n, v in enumerate(values) if v is not None and math.isfinite(v)])
        for i, (label, values) in enumerate(series.items())
    ]
    bars = [bar for bar in bars if bar[2]]
    if not bars:
        return ""
    named = bars if len(series) > 1 else []
    top = _top(named)
    values = [value for _, _, points in bars for _, value in points]
    y = _linear(min(0.0, *values), max(0.0, *values), top + _PLOT_HEIGHT, top)
    slot = (_WIDTH - _LEFT - _RIGHT) / len(names)
    width = 0.8 * slot / len(bars)
    texts = [_bar_summary(label, [(names[n], value) for n, value in points], x_label) for _, label, points in bars]
    key = _key(title, *texts)
    body = [_hatches(key, [i for i, _, _ in bars])]
    for place, (i, label, points) in enumerate(bars):
        for n, value in points:
            left, height = _LEFT + (n + 0.1) * slot + place * width, y(min(value, 0)) - y(max(value, 0))
            tip = _escaped(f"{label}, {x_label} {names[n]}: {_number(value)}")
            bar = _bar(key, i, left, y(max(value, 0)), width, height)
            body.append(f"{bar}<title>{tip}</title></rect>")
    stride = math.ceil((max(map(len, names)) + 1) * _LETTER * len(names) / (_WIDTH - _LEFT - _RIGHT))
    ticks = "".join(
        _text(_LEFT + (n + 0.5) * slot, top + _PLOT_HEIGHT + 15, name, "middle")
        for n, name in enumerate(names)
        if n % stride == 0
    )
    by_name = [dict(points) for _, _, points in bars]
    rows = [(name, [found.get(n) for found in by_name]) for n, name in enumerate(names)]
    table = _table(x_label, [label for _, label, _ in bars], rows)
    legend = _legend(named, lambda i, at, row: _bar(key, i, at, row - 9, 18, 9) + "</rect>")
    return _figure(title, y_label, x_label, top, texts, [_grid(y), *body, ticks, legend], table)


def thin(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most `limit` of the points: first and last, and of every stretch between the lowest and the highest.

    So spikes and the best value are kept, unlike in a mean or in every tenth point.
    """
    if len(points) <= limit:
        return list(points)
    inner, bins = points[1:-1], (limit - 2) // 2
    kept = [points[0]]
    for b in range(bins):
        stretch = range(b * len(inner) // bins, (b + 1) * len(inner) // bins)
        lowest, highest = (pick(stretch, key=lambda i: inner[i][1]) for pick in (min, max))
        kept += [inner[i] for i in sorted({lowest, highest})]
    return [*kept, points[-1]]


# -------------------------------------------------------------------------------------------------------------- axes


def _linear(low: float, high: float, start: float, end: float, *, whole: bool = False, tight: bool = False) -> _Scale:
    """From tick to tick, or `tight` around the values; from 0 where that costs little room."""
    if 0 < low <= (0.05 if tight else 0.4) * high:
        low = 0.0
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # one value
        room = max(abs(low), 1.0)
        low, high = (low - room, high + room) if tight else (min(low, 0.0), max(high, 0.0))
    if high - low < 1e-100:  # nothing but zeros
        high = low + 1
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    step = max(step, 1.0) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [float(f"{n * step:.12g}") for n in range(first, last + 1)]
    if tight:
        return _Scale(low, high, start, end, tuple(tick for tick in ticks if low <= tick <= high))
    return _Scale(ticks[0], ticks[-1], start, end, tuple(ticks))


def _grid(y: _Scale) -> str:
    """A line and a number at every tick of the vertical axis."""
    return "".join(
        f'<path class="grid" d="M{_LEFT} {y(tick):.1f}H{_WIDTH - _RIGHT}"/>'
        + _text(_LEFT - 6, y(tick) + 4, _number(tick), "end")
        for tick in y.ticks
    )


# ------------------------------------------------------------------------------------------------------------ legend


def _placed(lines: Sequence[tuple[int, str, object]]) -> Iterator[tuple[int, str, float, float]]:
    """Index, label, x and baseline of each entry of the legend."""
    at, row = _LEFT, 2.0
    for i, label, _ in lines:
        label = label if len(label) <= 48 else f"{label[:22]}…{label[-24:]}"
        width = 24 + _LETTER * len(label) + 14
        if at > _LEFT and at + width > _WIDTH - _RIGHT:
            at, row = _LEFT, row + 1
        yield i, label, at, row * _ROW + 15
        at += width


def _legend(lines: Sequence[tuple[int, str, object]], sample: Callable[[int, float, float], str]) -> str:
    return "".join(sample(i, at, row) + _text(at + 24, row, label) for i, label, at, row in _placed(lines))


def _line_sample(i: int, at: float, row: float) -> str:
    middle = row - 4
    return (
        f'<path class="line s{i % _COLOURS}" stroke-dasharray="{_DASHES[i % len(_DASHES)]}" '
        f'd="M{at:.1f} {middle:.1f}h18"/><path class="mark s{i % _COLOURS}" '
        f'transform="translate({at + 9:.1f} {middle:.1f})" d="{_MARKS[i % len(_MARKS)]}"/>'
    )


def _top(lines: Sequence[tuple[int, str, object]]) -> float:
    """Where the plot begins: below title, y label and legend."""
    return max([2 * _ROW, *(row for _, _, _, row in _placed(lines))]) + 12


def _bar(key: str, i: int, left: float, top: float, width: float, height: float) -> str:
    place = f'x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<rect class="edge s{i % _COLOURS}" fill="url(#{key}-{i})" {place}>'


def _hatches(key: str, series: Sequence[int]) -> str:
    """The fill of each series' bars: the first plain, the others hatched one way each."""
    patterns = []
    for i in series:
        angle, width = _HATCH_ANGLES[(i - 1) % len(_HATCH_ANGLES)], 6 if i == 0 else 2.5
        patterns.append(
            f'<pattern id="{key}-{i}" class="s{i % _COLOURS}" width="6" height="6" patternUnits="userSpaceOnUse" '
            f'patternTransform="rotate({angle})"><path class="pale" d="M0 0h6v6h-6z"/>'
            f'<path class="mark" d="M0 0h{width}v6h-{width}z"/></pattern>'
        )
    return f"<defs>{''.join(patterns)}</defs>"


# -------------------------------------------------------------------------------------------------------------- text


def _figure(
    title: str, y_label: str, x_label: str, top: float, texts: Sequence[str], parts: Sequence[str], table: str
) -> str:
    key, height = _key(title, *texts), top + _PLOT_HEIGHT + 40
    description = " ".join([f"{y_label} by {x_label}.", *texts])
    axis = _text((_LEFT + _WIDTH - _RIGHT) / 2, height - 6, x_label, "middle")
    figures = f"<details><summary>{_escaped(title)}: figures</summary>{table}</details>"
    return (
        f'<figure class="chart"><svg viewBox="0 0 {_WIDTH:g} {height:g}" role="img" '
        f'aria-labelledby="{key}-title {key}-desc"><title id="{key}-title">{_escaped(title)}</title>'
        f'<desc id="{key}-desc">{_escaped(description)}</desc>{_text(2, 15, title, "title")}{_text(2, 32, y_label)}'
        f"{''.join(parts)}{axis}</svg>{figures}</figure>"
    )


def _table(x_label: str, labels: Sequence[str], rows: Sequence[tuple[str, Sequence[float | None]]]) -> str:
    head = "".join(f'<th scope="col">{_escaped(label)}</th>' for label in (x_label, *labels))
    body = "".join(
        f'<tr><th scope="row">{_escaped(name)}</th>'
        + "".join(f"<td>{'' if value is None else _number(value)}</td>" for value in values)
        + "</tr>"
        for name, values in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _rows(lines: Sequence[Sequence[Point]]) -> list[tuple[str, list[float | None]]]:
    """The lines at a few x, first and last included: at each the value there, or the last before it."""
    xs = sorted({point[0] for points in lines for point in points})
    n = min(len(xs), TABLE_ROWS)
    chosen = [xs[round(i * (len(xs) - 1) / max(n - 1, 1))] for i in range(n)]
    return [(_number(x), [next((y for px, y in reversed(p) if px <= x), None) for p in lines]) for x in chosen]


def _line_summary(label: str, points: Sequence[Point], x_label: str) -> str:
    lowest, highest = (pick(points, key=lambda point: point[1]) for pick in (min, max))
    return (
        f"{label}: from {_number(points[0][1])} at {x_label} {_number(points[0][0])} to {_number(points[-1][1])} at "
        f"{_number(points[-1][0])}; lowest {_number(lowest[1])} at {_number(lowest[0])}, highest "
        f"{_number(highest[1])} at {_number(highest[0])}."
    )


def _bar_summary(label: str, bars: Sequence[tuple[str, float]], x_label: str) -> str:
    name, value = max(bars, key=lambda bar: bar[1])
    return f"{label}: highest {_number(value)} at {x_label} {name}."


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    shape = f' class="{kind}"' if kind else ""
    return f'<text{shape} x="{x:.1f}" y="{y:.1f}">{_escaped(text)}</text>'


def _number(value: float) -> str:
    """Short and exact enough to read off: 0.0123, 14.6k, 2e-05."""
    for bound, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= bound:
            return f"{value / (1e3 if suffix == 'k' else bound):.4g}{suffix}"
    return f"{value:.4g}"


def _escaped(text: str) -> str:
    return escape(escape_control(text))


def _key(*texts: str) -> str:
    """An id for a chart's parts, the same for the same chart."""
    return f"chart-{zlib.crc32(chr(10).join(texts).encode()):08x}"
