"""Which merge to make: the predicted gain of every method, N and spacing for which there are
checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from merge_cli.request.coefficients import AGE_HURTS
from merge_cli.request.methods import coefficients
from merge_cli.trajectory.model import Measured, gain
from merge_cli.trajectory.plans import window

METHODS = ("sma", "wma", "ema", "decay")
MOST = 64  # checkpoints of a merge
MULTIPLES = (1, 2, 4, 8)  # of the finest spacing
FLAT = 0.05  # of the best gain


class Choice(NamedTuple):
    """A merge that could be made: its predicted gain over l(T), and the measured one where there is
    one.
    """

    method: str
    n: int
    spacing: float
    removes: float
    age: float
    gain: float
    measured: float | None


def choices(
    noises: Sequence[tuple[float, float]],
    s: float,
    steps: Sequence[float],
    since: float = 0.0,
    done: Sequence[tuple[Measured, float]] = (),
) -> list[Choice]:
    """Every choice at multiples of the finest spacing back from the newest of `steps`; `done` are
    merges with measured gains.

    `noises` are (spacing, a), finest first: a choice takes the a of the widest spacing up to its
    own, because close checkpoints share some of their noise, and averaging removes less of it.
    Merges that lag by more than a quarter of the steps since `since` are left out: there the loss
    is no straight line.
    """
    newest = steps[-1]
    inside = [step for step in steps if step >= since]
    found = []
    for multiple in MULTIPLES:
        spacing = noises[0][0] * multiple
        a = [value for wide, value in noises if wide <= 1.1 * spacing][-1]
        for count in range(1, 1 + min(MOST, window(inside, spacing, newest))):
            places = [newest - i * spacing for i in reversed(range(count))]
            for method in METHODS if count > 1 else ():
                one = Measured("", tuple(places), coefficients(method, places).values, math.nan)
                if one.age <= AGE_HURTS * (newest - since):
                    known = next((value for merge, value in done if _same(merge, one, spacing)), None)
                    predicted = gain(a, s, one.removes, one.age)
                    found.append(Choice(method, count, spacing, one.removes, one.age, predicted, known))
    return found


def best(found: Sequence[Choice]) -> Choice | None:
    """The choice with the largest predicted gain, of equal ones the one with the fewest
    checkpoints; None if all would hurt.
    """
    top = max(found, key=lambda choice: (choice.gain, -choice.n, -choice.spacing), default=None)
    return top if top is not None and top.gain > 0 else None


def flat_range(found: Sequence[Choice], top: Choice) -> tuple[int, int]:
    """The N of the same method and spacing whose gain is within 5 % of the best."""
    near = [
        choice.n
        for choice in found
        if (choice.method, choice.spacing) == (top.method, top.spacing) and choice.gain >= (1 - FLAT) * top.gain
    ]
    return min(near), max(near)


def _same(merge: Measured, other: Measured, spacing: float) -> bool:
    return (
        len(merge.steps) == len(other.steps)
        and all(10 * abs(one - two) <= spacing for one, two in zip(merge.steps, other.steps, strict=True))
        and all(abs(one - two) < 1e-9 for one, two in zip(merge.coefficients, other.coefficients, strict=True))
    )
