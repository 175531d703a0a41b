"""Where the parts of a chart lie, in pixels of its drawing; `page.html.jinja` draws them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from utils.page.content import Chart, Line, Range, Rate

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 34  # margins
MAX_POINTS = 400  # of a line
REACH = 2.5  # normalized values beyond are drawn at the edge


@dataclass(frozen=True)
class DrawnLine:
    """A line of a chart: SVG path data of the line and its band, and its points that are drawn."""

    name: str
    path: str
    band: str
    points: list[tuple[float, float]]
    marks: list[tuple[float, float]]
    colour: str


@dataclass(frozen=True)
class Drawing:
    """A chart: lines, and (position, text) of the marks along both axes."""

    title: str
    x_label: str
    lines: list[DrawnLine]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]


def drawing(chart: Chart) -> Drawing:
    """A chart's geometry; values that are not finite, and with `log` not positive, leave gaps."""
    lines = [_thinned(line) for line in chart.lines]
    xs = [x for line in lines for x in line.x]
    values = [y for line in lines for part in (line.y, line.low or (), line.high or ()) for y in part]
    values = [y for y in values if _drawable(y, chart.log)]
    if chart.log and values:
        values = [math.log10(y) for y in values]
    x_low, x_high = _widened(xs)
    y_low, y_high = _widened(values)
    pad = 0.04 * (y_high - y_low)
    y_low, y_high = y_low - pad, y_high + pad

    def at_x(x: float) -> float:
        return round(LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT), 1)

    def at_y(y: float) -> float:
        y = math.log10(y) if chart.log else y
        return round(HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM), 1)

    def path(xs: Sequence[float], ys: Sequence[float]) -> str:
        parts, begins = [], True
        for x, y in zip(xs, ys, strict=True):
            if _drawable(y, chart.log):
                parts.append(f"{'M' if begins else 'L'}{at_x(x)} {at_y(y)}")
            begins = not _drawable(y, chart.log)
        return "".join(parts)

    drawn = []
    for number, line in enumerate(lines):
        points = [(at_x(x), at_y(y)) for x, y in zip(line.x, line.y, strict=True) if _drawable(y, chart.log)]
        marks = [(at_x(line.x[i]), at_y(line.y[i])) for i in line.marks if _drawable(line.y[i], chart.log)]
        band = ""
        if line.low is not None and line.high is not None:
            there = path(line.x, line.high)
            back = path(list(reversed(line.x)), list(reversed(line.low)))
            band = f"{there}L{back[1:]}Z" if there and back else ""
        colour = line.tone or f"line-{number % 6}"
        few = points if len(points) <= 40 else []
        drawn.append(DrawnLine(line.name, path(line.x, line.y), band, few, marks, colour))
    y_ticks = _log_ticks(y_low, y_high) if chart.log else [(y, _short(y)) for y in _ticks(y_low, y_high)]
    scale = (HEIGHT - TOP - BOTTOM) / (y_high - y_low)
    y_ticks = [(round(HEIGHT - BOTTOM - (y - y_low) * scale, 1), text) for y, text in y_ticks]
    return Drawing(chart.title, chart.x_label, drawn, [(at_x(x), _short(x)) for x in _ticks(x_low, x_high)], y_ticks)


def range_bar(item: Range) -> tuple[float, float]:
    """Where a range begins and ends, in per cent of a bar from -REACH to REACH."""
    low, high = (min(max(50 + 50 * value / REACH, 0.0), 100.0) for value in (item.low, item.high))
    return round(low, 1), round(max(high, low + 0.6), 1)


def rate_bar(rate: Rate) -> tuple[float, float, float]:
    """The rate and the ends of its interval, in per cent."""
    return tuple(round(100 * value, 1) for value in (rate.successes / max(rate.episodes, 1), rate.low, rate.high))


def _thinned(line: Line) -> Line:
    """At most MAX_POINTS points of a line, evenly chosen; marked ones stay."""
    if len(line.x) <= MAX_POINTS:
        return line
    chosen = {round(i * (len(line.x) - 1) / (MAX_POINTS - 1)) for i in range(MAX_POINTS)} | set(line.marks)
    kept = sorted(chosen)
    place = {i: n for n, i in enumerate(kept)}
    x, y, low, high = (
        None if part is None else [part[i] for i in kept] for part in (line.x, line.y, line.low, line.high)
    )
    return Line(line.name, x, y, low, high, [place[i] for i in line.marks], line.tone)


def _drawable(value: float, log: bool) -> bool:
    return value is not None and math.isfinite(value) and (value > 0 or not log)


def _widened(values: Sequence[float]) -> tuple[float, float]:
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _ticks(low: float, high: float) -> list[float]:
    step = 10 ** math.floor(math.log10((high - low) / 3))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 5)
    return [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """(logarithm, text) at powers of ten, or between them where there are few."""
    factors = (1,) if high - low > 1.8 else (1, 2, 5) if high - low > 0.5 else (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)
    values = [f * 10.0**n for n in range(math.floor(low), math.ceil(high) + 1) for f in factors]
    every = max(1, math.ceil((high - low) / 6))
    ticks = [(math.log10(value), _short(value)) for value in values if low <= math.log10(value) <= high]
    return ticks[::every]


def _short(value: float) -> str:
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.4g}"
