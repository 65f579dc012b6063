"""The loss model: what averaging removes, `a (1 - sum c^2)`, against what age costs, `s x age`.

Checkpoints at a constant learning rate scatter around a path that slowly descends. `a` is the loss
that the scatter costs (half the trace of Hessian times covariance), `s` the fall of the loss per
step along the path. For white noise between checkpoints and a straight path the gain of a merge
over l(T), the line at the newest step, is

    gain(c) = a (1 - sum c_i^2) - s sum c_i (T_last - T_i)

so one evaluated merge gives `a`, and with it the gain of every other. The best simple merge has N*
= sqrt(a/b) checkpoints, b = s V/2 at spacing V; the best non-negative shape is linear in age, which
is wma, with sqrt(2) N*.

Every estimate is a weighted sum of measured losses and carries its weights, so each number can be
traced to its rows.

Not covered: noise that is correlated between checkpoints (`a` from close checkpoints is then too
small), a curved path (`a` from wide spacings is too large), other metrics than losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

SPACINGS_DIFFER = 0.15  # of a, at V and 2V


class Measured(NamedTuple):
    """The measured loss of a merge of checkpoints at `steps`, oldest to newest; `key` names its
    row.
    """

    key: str
    steps: tuple[float, ...]
    coefficients: tuple[float, ...]
    loss: float

    @property
    def removes(self) -> float:
        """`1 - sum c^2`: the share of the noise that the merge averages away."""
        return 1.0 - math.fsum(c * c for c in self.coefficients)

    @property
    def age(self) -> float:
        """`sum c_i (T_last - T_i)`, in steps."""
        return math.fsum(c * (self.steps[-1] - step) for c, step in zip(self.coefficients, self.steps, strict=True))

    @property
    def spacing(self) -> float:
        """The mean distance of its checkpoints."""
        return (self.steps[-1] - self.steps[0]) / max(len(self.steps) - 1, 1)


@dataclass(frozen=True)
class Estimate:
    """`value = sum of weights x losses`, over rows by key."""

    value: float = 0.0
    weights: Mapping[str, float] = field(default_factory=dict)

    def plus(self, other: Estimate, scale: float = 1.0) -> Estimate:
        """`self + scale x other`."""
        weights = dict(self.weights)
        for key, weight in other.weights.items():
            weights[key] = weights.get(key, 0.0) + scale * weight
        return Estimate(self.value + scale * other.value, weights)

    def times(self, scale: float) -> Estimate:
        return Estimate().plus(self, scale)


def measured(one: Measured) -> Estimate:
    """The loss of one row as an estimate."""
    return Estimate(one.loss, {one.key: 1.0})


@dataclass(frozen=True)
class Line:
    """Least squares through losses of single checkpoints, over steps or over `place` of a step (the
    logarithm, to extrapolate).

    `deviation` is the standard deviation of the residuals; None for two points, through which every
    line goes exactly.
    """

    points: tuple[Measured, ...]
    deviation: float | None
    place: Callable[[float], float] = float

    def at(self, step: float) -> Estimate:
        """The loss at `step`."""
        x, mean, square = self._places()
        here = self.place(step) - mean
        return _sum((one, 1 / len(x) + here * (xi - mean) / square) for one, xi in zip(self.points, x, strict=True))

    def fall(self) -> Estimate:
        """The fall of the loss per unit of place: s, where that is the step."""
        x, mean, square = self._places()
        return _sum((one, -(xi - mean) / square) for one, xi in zip(self.points, x, strict=True))

    def _places(self) -> tuple[list[float], float, float]:
        x = [self.place(one.steps[0]) for one in self.points]
        mean = math.fsum(x) / len(x)
        return x, mean, math.fsum((xi - mean) ** 2 for xi in x)


def fit_line(singles: Sequence[Measured], place: Callable[[float], float] = float) -> Line:
    """The line through at least two single checkpoints at different steps."""
    line = Line(tuple(singles), None, place)
    if len(singles) < 3:
        return line
    squares = math.fsum((one.loss - line.at(one.steps[0]).value) ** 2 for one in singles)
    return Line(tuple(singles), math.sqrt(squares / (len(singles) - 2)), place)


class Noise(NamedTuple):
    """The noise loss `a` from `merges` merges whose checkpoints are `spacing` steps apart."""

    spacing: float
    a: Estimate
    merges: int


def noise_of(merges: Sequence[Measured], line: Line, singles: Sequence[Measured]) -> list[Noise]:
    """The noise loss at each spacing, finest first: `a = sum o d / sum o^2`, o = 1 - sum c^2, d =
    sum c_i l_i - L(merge).

    The l_i are the measured losses of a merge's checkpoints where all of them were evaluated, else
    those of the line.
    """
    known = {one.steps[0]: one for one in singles}
    groups: list[list[Measured]] = []
    for merge in sorted(merges, key=lambda one: (one.spacing, one.key)):
        if groups and merge.spacing <= 1.1 * groups[-1][0].spacing:
            groups[-1].append(merge)
        else:
            groups.append([merge])
    found = []
    for group in groups:
        squares = math.fsum(one.removes**2 for one in group)
        total = Estimate()
        for one in group:
            exact = all(step in known for step in one.steps)
            for c, step in zip(one.coefficients, one.steps, strict=True):
                loss = measured(known[step]) if exact else line.at(step)
                total = total.plus(loss, c * one.removes / squares)
            total = total.plus(measured(one), -one.removes / squares)
        found.append(Noise(math.fsum(one.spacing for one in group) / len(group), total, len(group)))
    return found


def distinct(noises: Sequence[Noise]) -> list[tuple[float, float]]:
    """(spacing, a) of the finest spacing, and of each wider one whose a differs from that before
    it. What agrees is one number: its chance differences would decide between spacings.
    """
    found: list[tuple[float, float]] = []
    for noise in noises:
        a = noise.a.value
        if a > 0 and not (found and abs(a / found[-1][1] - 1) <= SPACINGS_DIFFER):
            found.append((noise.spacing, a))
    return found


def fit_error(estimate: Estimate, everything: Mapping[str, Measured], deviation: float | None) -> float | None:
    """The standard error of an estimate by the scatter of single checkpoints around the line; a
    merge scatters by sqrt(sum c^2).
    """
    if deviation is None:
        return None
    parts = (weight**2 * (1.0 - everything[key].removes) for key, weight in estimate.weights.items())
    return deviation * math.sqrt(math.fsum(parts))


def gain(a: float, s: float, removes: float, age: float) -> float:
    """What a merge gains over l(T), the loss of the newest step on the line: `a (1 - sum c^2) - s
    age`.
    """
    return a * removes - s * age


def best_count(a: float, s: float, spacing: float) -> float:
    """N* = sqrt(a / b) of the simple average, b = s V / 2; infinite where the loss does not fall."""
    return math.sqrt(2 * a / (s * spacing)) if s > 0 and a > 0 else math.inf if a > 0 else 1.0


def pair_noise(pair: Measured, older: Measured, newer: Measured) -> float:
    """`Q / 4 = 2 [(l_i + l_j) / 2 - L(midpoint)]` of a pair merge: the loss variogram, which rises
    with the lag to `a`.
    """
    return 2.0 * ((older.loss + newer.loss) / 2 - pair.loss)


def _sum(terms: Iterable[tuple[Measured, float]]) -> Estimate:
    pairs = list(terms)
    value = math.fsum(one.loss * weight for one, weight in pairs)
    return Estimate(value, {one.key: weight for one, weight in pairs})
