"""From inner products to geometry: everything that N checkpoints' weights say without an
evaluation.

A Gram matrix holds `<x_i - x_last, x_j - x_last>` for every pair, so squared distances are `D_ij =
G_ii + G_jj - 2 G_ij`, and all statistics are algebra on N x N numbers, whatever the size of the
model. Deviations from the newest checkpoint rather than weights are multiplied: checkpoints of one
run differ by a few percent, and products of whole weights would lose the digits that matter.

None of these numbers gives the size of a gain or a best N: Euclidean distances grow on while the
loss variogram saturates within a few dozen steps, and predictors built on distances correlate
negatively with the gain (docs/trajectory.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

Matrix = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Gram:
    """`products[i][j] = <x_i - x_last, x_j - x_last>`, oldest to newest, with `norm2 = |x_last|^2`,
    over `num_elements` weights.
    """

    products: Matrix
    norm2: float
    num_elements: int

    @property
    def size(self) -> int:
        """The number of checkpoints, N."""
        return len(self.products)

    def distance2(self, i: int, j: int) -> float:
        """`|x_i - x_j|^2`; rounding never makes it negative."""
        return max(0.0, math.fsum((self.products[i][i], self.products[j][j], -2.0 * self.products[i][j])))

    def increment(self, i: int, j: int) -> float:
        """`<x_{i+1} - x_i, x_{j+1} - x_j>`."""
        g = self.products
        return math.fsum((g[i + 1][j + 1], g[i][j], -g[i + 1][j], -g[i][j + 1]))

    def spread2(self, coefficients: Sequence[float]) -> float:
        """`J = sum_i c_i |x_i - m|^2 = sum_{i<j} c_i c_j D_ij` around the merge m."""
        pairs = ((i, j) for j in range(self.size) for i in range(j))
        return math.fsum(coefficients[i] * coefficients[j] * self.distance2(i, j) for i, j in pairs)

    def merge_to_newest2(self, coefficients: Sequence[float]) -> float:
        """`|m - x_last|^2 = sum_i c_i D_{i,last} - J`."""
        last = self.size - 1
        return max(0.0, math.fsum(c * self.distance2(i, last) for i, c in enumerate(coefficients)) - self.spread2(coefficients))


def total(grams: Iterable[Gram]) -> Gram:
    """The Gram matrix of all weights of all groups: exact sums, so the order of the groups does not
    matter.
    """
    parts = list(grams)
    size = parts[0].size
    products = [[math.fsum(part.products[i][j] for part in parts) for j in range(size)] for i in range(size)]
    return Gram(products, math.fsum(part.norm2 for part in parts), sum(part.num_elements for part in parts))


class Lag(NamedTuple):
    """One point of a variogram: half the mean squared distance of the `pairs` of checkpoints that
    are `lag` apart.
    """

    lag: float
    gamma: float
    pairs: int


@dataclass(frozen=True)
class Geometry:
    """The path that checkpoints take through weight space; None where there are too few of them.

    `increments` are the lengths `|x_{i+1} - x_i|`, `cosines` those between increments, `cos1` and
    `cos2` their means one and two apart. `exponent` is the slope of log gamma over log lag: 1 for a
    random walk, 2 for a straight line, 0 where distances have saturated. `straightness` is `|x_last
    - x_0|^2 / sum of squared increments`: 1 for a random walk, N-1 for a straight line, less than 1
    for an oscillation. `shrink` is the last increment over the first, which falls with the learning
    rate.
    """

    distances: tuple[tuple[float, ...], ...]
    increments: tuple[float, ...]
    cosines: tuple[tuple[float, ...], ...]
    cos1: float | None
    cos2: float | None
    variogram: tuple[Lag, ...]
    exponent: float | None
    straightness: float | None
    shrink: float | None


def geometry(gram: Gram, places: Sequence[float]) -> Geometry:
    """The geometry of checkpoints at `places`: steps, tokens or mere positions, oldest to newest.
    Lags are in their unit.
    """
    n = gram.size
    squares = [gram.increment(i, i) for i in range(n - 1)]
    lengths = tuple(math.sqrt(max(0.0, square)) for square in squares)
    cosines = tuple(tuple(_ratio(gram.increment(i, j), lengths[i] * lengths[j]) or 0.0 for j in range(n - 1)) for i in range(n - 1))
    variogram = _variogram(gram, places)
    path = math.fsum(squares)
    return Geometry(
        distances=tuple(tuple(math.sqrt(gram.distance2(i, j)) for j in range(n)) for i in range(n)),
        increments=lengths,
        cosines=cosines,
        cos1=_mean([cosines[i][i + 1] for i in range(n - 2)]),
        cos2=_mean([cosines[i][i + 2] for i in range(n - 3)]),
        variogram=variogram,
        exponent=_log_slope([point for point in variogram if point.gamma > 0]),
        straightness=_ratio(gram.distance2(0, n - 1), path) if n > 1 else None,
        shrink=_ratio(lengths[-1], lengths[0]) if n > 2 else None,
    )


def is_even(places: Sequence[float]) -> bool:
    """Whether the places are evenly spaced, up to a tenth of the mean gap."""
    gaps = [newer - older for older, newer in pairwise(places)]
    mean = math.fsum(gaps) / max(len(gaps), 1)
    return all(abs(gap - mean) <= 0.1 * abs(mean) * (1 + 1e-9) for gap in gaps)


def _variogram(gram: Gram, places: Sequence[float]) -> tuple[Lag, ...]:
    """By position where the places are even, else by exact difference of places."""
    n = gram.size
    gap = (places[-1] - places[0]) / (n - 1) if n > 1 else 0.0
    by_lag: dict[float, list[float]] = {}
    for i in range(n):
        for j in range(i + 1, n):
            lag = (j - i) * gap if is_even(places) else places[j] - places[i]
            by_lag.setdefault(lag, []).append(gram.distance2(i, j))
    return tuple(Lag(lag, math.fsum(found) / (2 * len(found)), len(found)) for lag, found in sorted(by_lag.items()))


def _log_slope(points: Sequence[Lag]) -> float | None:
    if len(points) < 3:
        return None
    x = [math.log(point.lag) for point in points]
    y = [math.log(point.gamma) for point in points]
    mean_x, mean_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    return _ratio(
        math.fsum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)), math.fsum((a - mean_x) ** 2 for a in x)
    )


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _ratio(over: float, under: float) -> float | None:
    return over / under if under > 0 else None
