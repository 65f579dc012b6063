"""Charts as SVG text: axes, lines, dots, bands, bars and grids of cells, with a title and a
description for readers.

One decimal of a pixel and a fixed order of attributes make the text the same for the same numbers.
Colors come from classes, which the page defines once; every mark has a `<title>`, which browsers
show when the pointer rests on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape

WIDTH, HEIGHT = 480.0, 300.0
RIGHT, TOP, BOTTOM = 14.0, 14.0, 44.0

Point = tuple[float, float]
Shade = Callable[[float], str]


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers between `low` and `high`: at most `most`, steps of 1, 2 or 5 times a power of
    ten.
    """
    if not high > low:
        return [low]
    raw = (high - low) / max(most - 1, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if power * factor >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def label(value: float, step: float = 0.0) -> str:
    """A number on an axis: thousands with commas, decimals as fine as `step` asks for."""
    if value == int(value) and (abs(value) >= 10 or step >= 1):
        return f"{int(value):,}"
    decimals = max(0, -math.floor(math.log10(step) + 1e-9)) if step > 0 else 3
    return f"{value:.{decimals}f}"


def padded(values: Iterable[float], share: float = 0.06) -> tuple[float, float]:
    """The range of values with some room at both ends."""
    found = list(values)
    low, high = min(found), max(found)
    room = share * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


class Plot:
    """A chart with linear axes over the ranges `x` and `y`."""

    def __init__(
        self, name: str, title: str, description: str, x: Point, y: Point, x_label: str, y_label: str, *, height: float = HEIGHT
    ) -> None:
        self._name = name
        self._title = title
        self._description = description
        self._x, self._y = x, y
        self._labels = x_label, y_label
        self._height = height
        self._left = 30.0 + 6.6 * max(len(words) for _, words in _labeled(ticks(*y)))
        self._marks: list[str] = []

    def at(self, x: float, y: float) -> Point:
        """The place of a point on the canvas."""
        (x0, x1), (y0, y1) = self._x, self._y
        across = (WIDTH - self._left - RIGHT) * (x - x0) / (x1 - x0)
        up = (self._height - TOP - BOTTOM) * (y - y0) / (y1 - y0)
        return self._left + across, self._height - BOTTOM - up

    def line(self, points: Sequence[Point], kind: str) -> None:
        """A line through points, of the class `kind`."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (self.at(*point) for point in points))
        self._marks.append(f'<polyline class="{kind}" points="{path}"/>')

    def dot(self, point: Point, kind: str, about: str, radius: float = 3.5) -> None:
        x, y = self.at(*point)
        self._marks.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}">{_title(about)}</circle>')

    def diamond(self, point: Point, kind: str, about: str, radius: float = 5.5) -> None:
        x, y = self.at(*point)
        corners = ((x, y - radius), (x + radius, y), (x, y + radius), (x - radius, y))
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in corners)
        self._marks.append(f'<polygon class="{kind}" points="{path}">{_title(about)}</polygon>')

    def box(self, low: Point, high: Point, kind: str, about: str = "", least: float = 0.0) -> None:
        """A rectangle between two corners, at least `least` pixels wide."""
        (x0, y0), (x1, y1) = self.at(*low), self.at(*high)
        middle, width = (x0 + x1) / 2, max(x1 - x0, least)
        self._marks.append(
            f'<rect class="{kind}" x="{middle - width / 2:.1f}" y="{y1:.1f}" width="{width:.1f}" height="{max(y0 - y1, 0):.1f}">'
            f"{_title(about)}</rect>"
        )

    def level(self, point: Point, width: float, kind: str) -> None:
        """A short horizontal line around a point, `width` pixels wide."""
        x, y = self.at(*point)
        self._marks.append(f'<line class="{kind}" x1="{x - width / 2:.1f}" y1="{y:.1f}" x2="{x + width / 2:.1f}" y2="{y:.1f}"/>')

    def ellipse(self, center: Point, axis: Point, other: Point, kind: str) -> None:
        """An ellipse around `center`, its half axes the vectors `axis` and `other` in the
        coordinates of the chart.
        """
        steps = [2 * math.pi * i / 72 for i in range(73)]
        points = [
            (
                center[0] + axis[0] * math.cos(t) + other[0] * math.sin(t),
                center[1] + axis[1] * math.cos(t) + other[1] * math.sin(t),
            )
            for t in steps
        ]
        self.line(points, kind)

    def text(self, point: Point, words: str, kind: str = "note", dx: float = 0.0, dy: float = 0.0, anchor: str = "start") -> None:
        x, y = self.at(*point)
        self._marks.append(f'<text class="{kind}" x="{x + dx:.1f}" y="{y + dy:.1f}" text-anchor="{anchor}">{escape(words)}</text>')

    def draw(self, x_ticks: Sequence[tuple[float, str]] | None = None) -> str:
        """The chart as an `<svg>` element."""
        return frame(self._name, self._title, self._description, [*self._axes(x_ticks), *self._marks], self._height)

    def bare(self) -> str:
        """The chart without axes."""
        return frame(self._name, self._title, self._description, self._marks, self._height)

    def _axes(self, x_ticks: Sequence[tuple[float, str]] | None) -> list[str]:
        bottom, right = self._height - BOTTOM, WIDTH - RIGHT
        found = []
        for value, words in _labeled(ticks(*self._y)):
            _, y = self.at(self._x[0], value)
            kind = "zero" if value == 0 else "grid"
            found.append(f'<line class="{kind}" x1="{self._left:.1f}" y1="{y:.1f}" x2="{right:.1f}" y2="{y:.1f}"/>')
            found.append(f'<text class="tick" x="{self._left - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{words}</text>')
        for value, words in x_ticks if x_ticks is not None else _labeled(ticks(*self._x)):
            x, _ = self.at(value, self._y[0])
            found.append(f'<line class="axis" x1="{x:.1f}" y1="{bottom:.1f}" x2="{x:.1f}" y2="{bottom + 4:.1f}"/>')
            found.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 17:.1f}" text-anchor="middle">{escape(words)}</text>')
        found.append(f'<line class="axis" x1="{self._left:.1f}" y1="{bottom:.1f}" x2="{right:.1f}" y2="{bottom:.1f}"/>')
        middle = (self._left + right) / 2
        found.append(
            f'<text class="label" x="{middle:.1f}" y="{self._height - 8:.1f}" text-anchor="middle">{escape(self._labels[0])}</text>'
        )
        up = (TOP + bottom) / 2
        found.append(
            f'<text class="label" x="13" y="{up:.1f}" text-anchor="middle" transform="rotate(-90 13 {up:.1f})">'
            f"{escape(self._labels[1])}</text>"
        )
        return found


def cells(
    name: str,
    title: str,
    description: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    shade: Shade,
    *,
    show: bool = False,
) -> str:
    """A grid of colored cells, `shade(value)` their fill; `show` writes the numbers into them."""
    left = 8 + 8.0 * max(map(len, rows), default=1)
    width = min(62.0, (WIDTH - left - 14) / max(len(columns), 1))
    height = max(9.0, min(20.0, 420.0 / max(len(rows), 1)))
    top = 20.0 + 4.6 * max(map(len, columns), default=1)  # the names are turned by 35 degrees; 13.5 pixels in narrow windows
    marks = []
    every_row = max(1, math.ceil(11 / height))
    every_column = max(1, math.ceil(16 / width))
    for j, column in enumerate(columns):
        if j % every_column == 0:
            x = left + (j + 0.5) * width
            marks.append(
                f'<text class="tick" x="{x:.1f}" y="{top - 6:.1f}" text-anchor="start"'
                f' transform="rotate(-35 {x:.1f} {top - 6:.1f})">{escape(column)}</text>'
            )
    for i, row in enumerate(rows):
        y = top + i * height
        if i % every_row == 0:
            marks.append(
                f'<text class="tick" x="{left - 5:.1f}" y="{y + height / 2 + 4:.1f}" text-anchor="end">{escape(row)}</text>'
            )
        for j, column in enumerate(columns):
            value = values[i][j]
            if value is None:
                continue
            x = left + j * width
            fill = shade(value)
            marks.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{width - 1:.1f}" height="{height - 1:.1f}" fill="{fill}">'
                f"{_title(f'{row}, {column}: {value:.4g}')}</rect>"
            )
            if show and width >= 30:
                kind = "dark" if _is_dark(fill) else "light"
                marks.append(
                    f'<text class="cell {kind}" x="{x + width / 2 - 0.5:.1f}" y="{y + height / 2 + 4:.1f}"'
                    f' text-anchor="middle">{value:.3g}</text>'
                )
    return frame(name, title, description, marks, top + height * len(rows) + 8)


def frame(name: str, title: str, description: str, marks: Sequence[str], height: float) -> str:
    """An `<svg>` element that scales with its column and is named for those who cannot see it."""
    head = (
        f'<svg viewBox="0 0 {WIDTH:.0f} {height:.0f}" role="img"'
        f' aria-labelledby="{name}-title {name}-description">'
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-description">{escape(description)}</desc>'
    )
    return "\n".join([head, *marks, "</svg>"])


def ramp(low: float, high: float) -> Shade:
    """From pale to dark blue between two values."""
    return lambda value: _mix((239, 243, 251), (8, 48, 107), (value - low) / (high - low) if high > low else 0.5)


def diverging(most: float) -> Shade:
    """From orange (below 0) over white to blue (above), up to `most` in size."""

    def shade(value: float) -> str:
        share = min(1.0, abs(value) / most) if most > 0 else 0.0
        return _mix((250, 250, 250), (33, 102, 172) if value > 0 else (178, 88, 6), share)

    return shade


def _mix(one: tuple[int, int, int], other: tuple[int, int, int], share: float) -> str:
    share = min(1.0, max(0.0, share))
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(one, other, strict=True))


def _is_dark(fill: str) -> bool:
    red, green, blue = (int(fill[i : i + 2], 16) for i in (1, 3, 5))
    return 0.3 * red + 0.59 * green + 0.11 * blue < 140


def _labeled(values: Sequence[float]) -> list[tuple[float, str]]:
    step = values[1] - values[0] if len(values) > 1 else 0.0
    return [(value, label(value, step)) for value in values]


def _title(about: str) -> str:
    return f"<title>{escape(about)}</title>" if about else ""
