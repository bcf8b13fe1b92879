"""Charts as inline SVG: thin lines, ticks at round numbers, labels at the ends of the lines, one colour a run.

Colours are the classes c0 to c7, whose values in light and dark are in the page's style sheet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from reporting.runs import Points

WIDTH, HEIGHT = 460, 250
TOP, BOTTOM, LEFT = 10, 34, 48  # margins; the right one has the room that the labels need
COLORS = 8
MOST_POINTS = 200  # of a line; more are averaged
MOST_LABEL = 18  # letters of a label in a chart
LINE = 12  # between two labels


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        run: number of the run, which decides the colour.
        half: half widths of the band around the points; [] for none.
        faint: an earlier state, drawn thin and without a label.
    """

    points: Points
    label: str
    run: int
    half: list[float] = field(default_factory=list)
    faint: bool = False


def ticks(low: float, high: float, count: int = 5, whole: bool = False) -> list[float]:
    """About `count` round numbers (1, 2, 2.5 or 5 times a power of ten) from at most `low` to at least `high`; whole
    numbers where the axis counts."""
    if not high > low:
        low, high = (low - abs(low) / 10, high + abs(high) / 10) if low else (0.0, 1.0)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    steps = (power * m for m in (1, 2, 2.5, 5, 10, 20, 100, 1000) if power * m >= raw * (1 - 1e-9))
    step = next(s for s in steps if not whole or (s >= 1 and s == round(s)))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten around [low, high]; every second or third where there would be more than six."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    last = max(last, first + 1)
    every = -(-(last - first) // 6)
    return [10.0**i for i in range(first, last + every, every)]


def tick_text(value: float, step: float, percent: bool = False) -> str:
    """With as many decimals as ticks `step` apart need; thousands as in 3,000, the small and the large as in 2e-5."""
    if percent:
        value, step = 100 * value, 100 * step
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    decimals = max(0, -math.floor(math.log10(step) + 1e-9)) if step > 0 else 0
    if round(step * 10**decimals, 6) % 1:  # 2.5 and its like
        decimals += 1
    return f"{value:,.{decimals}f}{' %' if percent else ''}"


def value_text(value: float, percent: bool = False) -> str:
    return f"{100 * value:.2f} %" if percent else f"{value:,.4g}" if abs(value) < 1e6 else f"{value:.4g}"


def thinned(line: Line) -> Line:
    """At most MOST_POINTS points, each the mean of as many neighbours."""
    each = -(-len(line.points) // MOST_POINTS)
    if each <= 1:
        return line
    chunks = [slice(i, i + each) for i in range(0, len(line.points), each)]
    points = [tuple(_mean(column) for column in zip(*line.points[chunk], strict=True)) for chunk in chunks]
    half = [_mean(line.half[chunk]) for chunk in chunks] if line.half else []
    return Line([(x, y) for x, y in points], line.label, line.run, half, line.faint)


@dataclass(frozen=True)
class Scale:
    """From values to pixels."""

    ticks: list[float]
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (self.ticks[0], self.ticks[-1], value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def text(self, value: float, percent: bool = False) -> str:
        step = value if self.log else self.ticks[1] - self.ticks[0]
        return tick_text(value, step, percent)


def line_chart(lines: Sequence[Line], *, x_label: str, percent: bool = False, log: bool = False) -> str:
    """The lines over a common axis; "" when none has a point.

    Args:
        percent: the values are shares, shown in %.
        log: a logarithmic axis, where all values are positive and span more than two powers of ten.
    """
    drawn = [thinned(line) for line in lines if line.points]
    if not drawn:
        return ""
    labels = [line for line in drawn if not line.faint]
    right = 14 + 7.6 * max((len(short(line.label)) for line in labels if len(labels) > 1), default=0)
    x = Scale(ticks(*_ends([px for line in drawn for px, _ in line.points]), 4, whole=True), LEFT, WIDTH - right)
    values = [
        y + s * h for line in drawn for (_, y), h in zip(line.points, _halves(line), strict=True) for s in (-1, 1)
    ]
    low, high = _ends([min(max(value, 0.0), 1.0) for value in values] if percent else values)
    is_log = log and low > 0 and high / low > 100
    y = Scale(log_ticks(low, high) if is_log else ticks(low, high), HEIGHT - BOTTOM, TOP, is_log)
    parts = [_axes(x, y, x_label, percent)]
    parts += [_band(line, x, y) for line in drawn if line.half]
    parts += [_line(line, x, y) for line in drawn]
    parts += _end_labels(labels, x, y)
    parts += [_hits(line, x, y, x_label, percent) for line in drawn]
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'


def dot_chart(rows: Sequence[str], values: Sequence[tuple[int, str, dict[str, tuple[float, float]]]]) -> str:
    """A row a name, for each run a hollow dot where its value began and a full one where it is; "" without rows.

    Args:
        values: (number of the run, its label, {row: (first, last)}).
    """
    ends = [v for _, _, found in values for pair in found.values() for v in pair]
    if not rows or not ends:
        return ""
    left = 12 + 6.2 * max(len(short(row, 40)) for row in rows)
    width, height = left + 330, 17 * len(rows) + BOTTOM + TOP
    x = Scale(ticks(*_ends(ends), 4), left, width - 20)
    parts = []
    for tick in x.ticks:
        parts.append(f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>')
        parts.append(f'<text x="{x(tick):.1f}" y="{height - 18}" text-anchor="middle">{x.text(tick)}</text>')
    for i, row in enumerate(rows):
        middle = TOP + 17 * i + 8.5
        parts.append(f'<text x="{left - 10:.1f}" y="{middle + 3.5}" text-anchor="end">{escape(short(row, 40))}</text>')
        for run, label, found in values:
            if row in found:
                parts.append(_dots(found[row], run, f"{label}, {row}", x, middle + 3 * (run - (len(values) - 1) / 2)))
    return f'<svg viewBox="0 0 {width:.0f} {height}" role="img" style="max-width:{width:.0f}px">{"".join(parts)}</svg>'


def short(text: str, most: int = MOST_LABEL) -> str:
    """The text, its middle left out where it is longer."""
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-(most - most // 2 - 1) :]}"


def _dots(ends: tuple[float, float], run: int, name: str, x: Scale, y: float) -> str:
    first, last = ends
    text = escape(f"{name}: {value_text(first)} → {value_text(last)}")
    color = f"c{run % COLORS}"
    return (
        f'<g class="{color}">'
        f'<line class="line faint" x1="{x(first):.1f}" x2="{x(last):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<circle class="hollow" cx="{x(first):.1f}" cy="{y:.1f}" r="3"/>'
        f'<circle class="full" cx="{x(last):.1f}" cy="{y:.1f}" r="3.5"/>'
        f'<circle class="hit" cx="{x(last):.1f}" cy="{y:.1f}" r="6"><title>{text}</title></circle></g>'
    )


def _axes(x: Scale, y: Scale, x_label: str, percent: bool) -> str:
    left, right = x.start, x.end
    parts = []
    for tick in y.ticks:
        parts.append(f'<line class="grid" x1="{left}" x2="{right:.1f}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        text = y.text(tick, percent)
        parts.append(f'<text x="{left - 6}" y="{y(tick) + 3.5:.1f}" text-anchor="end">{text}</text>')
    below = HEIGHT - BOTTOM + 15
    parts += [f'<text x="{x(tick):.1f}" y="{below}" text-anchor="middle">{x.text(tick)}</text>' for tick in x.ticks]
    middle = (left + right) / 2
    parts.append(f'<text class="name" x="{middle:.1f}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>')
    return "".join(parts)


def _line(line: Line, x: Scale, y: Scale) -> str:
    path = " L".join(f"{x(px):.1f} {y(py):.1f}" for px, py in line.points)
    kind = "line faint" if line.faint else "line"
    dots = ""
    if len(line.points) <= 12:
        dots = "".join(f'<circle class="full" cx="{x(a):.1f}" cy="{y(b):.1f}" r="2"/>' for a, b in line.points)
    return f'<g class="c{line.run % COLORS}"><path class="{kind}" d="M{path}"/>{"" if line.faint else dots}</g>'


def _band(line: Line, x: Scale, y: Scale) -> str:
    pairs = list(zip(line.points, line.half, strict=True))
    most, least = y.ticks[-1], y.ticks[0]
    upper = [f"{x(px):.1f} {y(min(py + h, most)):.1f}" for (px, py), h in pairs]
    lower = [f"{x(px):.1f} {y(max(py - h, least)):.1f}" for (px, py), h in reversed(pairs)]
    return f'<path class="band c{line.run % COLORS}" d="M{" L".join([*upper, *lower])}Z"/>'


def _hits(line: Line, x: Scale, y: Scale, x_label: str, percent: bool) -> str:
    """Invisible targets that show their value."""
    parts = []
    for (px, py), half in zip(line.points, _halves(line), strict=True):
        around = f" ± {value_text(half, percent)}" if half else ""
        text = escape(f"{line.label}, {x_label} {px:,.6g}: {value_text(py, percent)}{around}")
        parts.append(f'<circle class="hit" cx="{x(px):.1f}" cy="{y(py):.1f}" r="5"><title>{text}</title></circle>')
    return f'<g class="c{line.run % COLORS}">{"".join(parts)}</g>'


def _end_labels(lines: Sequence[Line], x: Scale, y: Scale) -> list[str]:
    """Labels right of the plot at the heights where the lines end, moved apart where they would overlap; none for a
    single line."""
    if len(lines) < 2:
        return []
    order = sorted(range(len(lines)), key=lambda i: y(lines[i].points[-1][1]))
    heights = [y(lines[i].points[-1][1]) for i in order]
    for k in range(1, len(order)):  # downwards, then up again from the bottom
        heights[k] = max(heights[k], heights[k - 1] + LINE)
    lowest = HEIGHT - BOTTOM + 4.0
    for k in reversed(range(len(order))):
        heights[k] = lowest = min(heights[k], lowest)
        lowest -= LINE
    return [
        f'<text class="label c{lines[i].run % COLORS}" x="{x.end + 8:.1f}" y="{at + 3.5:.1f}">'
        f"{escape(short(lines[i].label))}</text>"
        for at, i in zip(heights, order, strict=True)
    ]


def _halves(line: Line) -> list[float]:
    return line.half or [0.0] * len(line.points)


def _ends(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
