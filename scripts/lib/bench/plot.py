"""Draw a series as SVG by hand, and say how straight it is: no library for two dozen lines.

bars        one bar a value, on an axis from zero, with a line that must not be crossed
fit_line    the straight line through points (least squares) and what is left of each
"""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

WIDTH, HEIGHT, LEFT, TOP, FOOT = 560, 300, 56, 34, 44


def bars(title: str, unit: str, x_title: str, points: Sequence[tuple[str, float]], limit: float = 0.0) -> str:
    """An SVG drawing of `points` (label, value); `limit` is drawn as a dashed line."""
    top = 1.1 * max(limit, *(value for _, value in points))
    step = nice_step(top / 5)
    room, height = (WIDTH - LEFT - 16) / len(points), HEIGHT - TOP - FOOT

    def y(value: float) -> float:
        return TOP + height * (1 - value / top)

    parts = [text(LEFT, 20, f"{title} ({unit})", "start", 14)]
    for k in range(int(top / step) + 1):
        parts.append(line(LEFT, y(k * step), WIDTH - 16, y(k * step), "#ddd"))
        parts.append(text(LEFT - 6, y(k * step) + 4, f"{k * step:g}", "end"))
    for k, (label, value) in enumerate(points):
        left = LEFT + room * (k + 0.2)
        bar = f'x="{left:.1f}" y="{y(value):.1f}" width="{room * 0.6:.1f}" height="{height + TOP - y(value):.1f}"'
        parts.append(f'<rect {bar} fill="#4878a8"/>')
        parts.append(text(left + room * 0.3, y(value) - 4, f"{value:.0f}" if value >= 10 else f"{value:.2f}", "middle"))
        parts.append(text(left + room * 0.3, HEIGHT - FOOT + 16, label, "middle"))
    if limit:
        parts.append(line(LEFT, y(limit), WIDTH - 16, y(limit), "#b03030", dashed=True))
        parts.append(text(WIDTH - 16, y(limit) - 4, f"limit {limit:g}", "end"))
    parts.append(text((LEFT + WIDTH) / 2, HEIGHT - 8, x_title, "middle"))
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    style = '<rect width="100%" height="100%" fill="#fff"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">{style}\n' + "\n".join(parts) + "\n</svg>\n"


def text(x: float, y: float, content: str, anchor: str, size: int = 11) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}">{escape(content)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, color: str, dashed: bool = False) -> str:
    dashes = ' stroke-dasharray="6 4"' if dashed else ""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}"{dashes}/>'


def nice_step(least: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is at least `least`."""
    power = 10.0 ** len(str(int(least))) / 10 if least >= 1 else 0.01
    return next(power * k for k in (1, 2, 5, 10, 20, 50, 100) if power * k >= least)


def fit_line(points: Sequence[tuple[float, float]]) -> tuple[float, float, list[float]]:
    """Fixed cost a, slope b, and y / (a + b x) - 1 of each point. Errors count relative to y, so
    that small points count too.
    """
    weights = [1 / max(y, 1e-9) ** 2 for _, y in points]
    total = sum(weights)
    mean_x = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
    mean_y = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
    spread = sum(w * (x - mean_x) ** 2 for w, (x, _) in zip(weights, points, strict=True))
    slope = sum(w * (x - mean_x) * (y - mean_y) for w, (x, y) in zip(weights, points, strict=True)) / spread
    fixed = mean_y - slope * mean_x
    return fixed, slope, [y / (fixed + slope * x) - 1 for x, y in points]
