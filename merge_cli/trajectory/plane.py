"""The loss over the plane through three checkpoints, from seven evaluations: corners, midpoints,
centroid.

A quadratic through these seven reproduced a measured 7 x 7 grid inside the triangle's box with an
error of .002 of a range of .54 (a pilot of 0.5M parameters). Its contours are ellipses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations

from merge_cli.trajectory import svg
from merge_cli.trajectory.evidence import Evidence
from merge_cli.trajectory.model import Measured
from merge_cli.trajectory.panels import Panel

_CORNERS = ((0.0, 0.0), (1.0, 0.0), (0.5, math.sqrt(3) / 2))
_LEVELS = 6


@dataclass(frozen=True)
class Quadratic:
    """`f(x, y) = low + ((x, y) - center)' H ((x, y) - center) / 2`, H = ((xx, xy), (xy, yy))
    positive definite.
    """

    low: float
    center: tuple[float, float]
    xx: float
    xy: float
    yy: float

    def axes(self, level: float) -> tuple[tuple[float, float], tuple[float, float]]:
        """The half axes of the ellipse on which the value is `level`."""
        angle = 0.5 * math.atan2(2 * self.xy, self.xx - self.yy)
        spread = math.hypot((self.xx - self.yy) / 2, self.xy)
        middle = (self.xx + self.yy) / 2
        found = []
        for curvature, turn in ((middle + spread, angle), (middle - spread, angle + math.pi / 2)):
            length = math.sqrt(2 * (level - self.low) / curvature)
            found.append((length * math.cos(turn), length * math.sin(turn)))
        return found[0], found[1]


def plane(found: Evidence) -> Panel | None:
    """The panel of the plane, where the ledger has its seven rows."""
    singles = {one.steps[0]: one for one in found.singles}
    merges = {(one.steps, one.coefficients): one for one in found.merges}
    for one in reversed(found.merges):
        if len(one.steps) != 3 or max(one.coefficients) - min(one.coefficients) > 1e-9:
            continue
        corners = [singles.get(step) for step in one.steps]
        sides = [merges.get((pair, (0.5, 0.5))) for pair in combinations(one.steps, 2)]
        if None not in corners and None not in sides:
            return _panel(found, [*corners, *sides, one])  # type: ignore[list-item]
    return None


def _panel(found: Evidence, seven: list[Measured]) -> Panel | None:
    places = [_place(one, seven[6].steps) for one in seven]
    fitted = fit(places, [one.loss for one in seven])
    words = "contours of the loss over the plane through three checkpoints"
    plot = svg.Plot("plane", "Landscape", words, (-0.35, 1.35), (-0.3, 1.15), "", "", height=380)
    plot.line([*_CORNERS, _CORNERS[0]], "path faint")
    if fitted is not None:
        high = max(one.loss for one in seven)
        for i in range(1, _LEVELS + 1):
            level = fitted.low + (high - fitted.low) * i / _LEVELS
            plot.ellipse(fitted.center, *fitted.axes(level), kind=f"path v{min(3, i // 2)}")
        plot.diamond(fitted.center, "best", f"minimum of the fit: {fitted.low:.4f}")
    for one, place in zip(seven, places, strict=True):
        name = found.row(one.key).name
        plot.dot(place, "single" if len(one.steps) == 1 else "merged", f"{name}: {one.loss:.4f}", 4)
        plot.text(place, f"{one.loss:.3f}", dx=7, dy=-5)
    rows = [(found.row(one.key).name, f"{one.loss:.5f}") for one in seven]
    if fitted is not None:
        rows.append(("minimum of the fit", f"{fitted.low:.5f}"))
    return Panel(
        "The landscape between three checkpoints",
        plot.bare(),
        "The loss over the plane through three checkpoints (open dots), as a quadratic through seven measured points. Merges are"
        " filled dots; the diamond is the minimum of the fit.",
        "The triangle is drawn with equal sides, whatever the distances. Outside it the fit is an extrapolation."
        + ("" if fitted is not None else " The seven values are no bowl, so there are no contours."),
        ("row", found.metric),
        tuple(rows),
    )


def _place(one: Measured, steps: tuple[float, ...]) -> tuple[float, float]:
    share = dict(zip(one.steps, one.coefficients, strict=True))
    x = math.fsum(share.get(step, 0.0) * corner[0] for step, corner in zip(steps, _CORNERS, strict=True))
    y = math.fsum(share.get(step, 0.0) * corner[1] for step, corner in zip(steps, _CORNERS, strict=True))
    return x, y


def fit(places: list[tuple[float, float]], values: list[float]) -> Quadratic | None:
    """Least squares of a quadratic through at least six points; None where it has no minimum."""
    columns = [(1.0, x, y, x * x / 2, x * y, y * y / 2) for x, y in places]
    normal = [[math.fsum(row[i] * row[j] for row in columns) for j in range(6)] for i in range(6)]
    right = [math.fsum(row[i] * value for row, value in zip(columns, values, strict=True)) for i in range(6)]
    solved = _solve(normal, right)
    if solved is None:
        return None
    constant, bx, by, xx, xy, yy = solved
    determinant = xx * yy - xy * xy
    if xx <= 0 or determinant <= 0:
        return None
    x, y = (-bx * yy + by * xy) / determinant, (-by * xx + bx * xy) / determinant
    return Quadratic(constant + (bx * x + by * y) / 2, (x, y), xx, xy, yy)


def _solve(matrix: list[list[float]], right: list[float]) -> list[float] | None:
    """Gauss elimination with pivots; None for a singular matrix."""
    n = len(right)
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for i in range(n):
        pivot = max(range(i, n), key=lambda k: abs(rows[k][i]))
        if abs(rows[pivot][i]) < 1e-12:
            return None
        rows[i], rows[pivot] = rows[pivot], rows[i]
        for k in range(i + 1, n):
            factor = rows[k][i] / rows[i][i]
            rows[k] = [a - factor * b for a, b in zip(rows[k], rows[i], strict=True)]
    solution = [0.0] * n
    for i in reversed(range(n)):
        solution[i] = (rows[i][n] - math.fsum(rows[i][j] * solution[j] for j in range(i + 1, n))) / rows[i][i]
    return solution
