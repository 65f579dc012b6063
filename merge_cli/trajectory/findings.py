"""What is odd about a window of checkpoints, by name: found in the log, or in the geometry of the
weights.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from merge_cli.trajectory.gram import Geometry, Gram, geometry, is_even

SHRINK = 0.8  # below: the learning rate fell. In the pilots' decays .70 at a quarter of the way
SPIKE = 3.0  # times the median increment
STRAIGHT = 0.9  # of N-1: no noise worth averaging

STOPS_FORECAST = {
    "warm-up": True,  # the learning rate rises
    "decay": True,  # it falls
    "schedule": True,  # it falls over the whole run: cosine, 1/sqrt
    "stages": True,  # it changes from one plateau to another
    "learning rate": True,  # increments shrink, and no log explains it
    "restart": True,  # the step counter falls
    "ramp": True,  # tokens a step grow
    "spike": True,  # one increment is far longer than the others
    "equal": False,  # two checkpoints have the same weights
    "no noise": False,  # the path is a straight line
    "router bias": False,  # the biases of routers jump, or drift in one direction
}


class Finding(NamedTuple):
    """Something about a window of checkpoints that a merge should not span, or that makes a number
    mean less.

    `name` is a key of `STOPS_FORECAST`. It lies between the steps `first` and `last`, where those
    are known.
    """

    name: str
    text: str
    first: float | None = None
    last: float | None = None

    @property
    def stops_forecast(self) -> bool:
        """Whether no forecast is made from a window that touches it."""
        return STOPS_FORECAST.get(self.name, True)


def findings_of(shape: Geometry, names: Sequence[str], places: Sequence[float]) -> Iterator[Finding]:
    """What the geometry of checkpoints `names` at `places` (steps, or positions) shows."""
    n = len(names)
    for i in range(n):
        for j in range(i + 1, n):
            if shape.distances[i][j] == 0.0:
                yield Finding("equal", f"{names[i]} and {names[j]} have the same weights", places[i], places[j])
    yield from _spikes(shape.increments, names, places, "the weights")
    if shape.shrink is not None and shape.shrink < SHRINK and is_even(places):
        text = f"the last increment is {shape.shrink:.2f} of the first: the learning rate falls (below {SHRINK:g})"
        yield Finding("learning rate", text, places[0], places[-1])
    if n > 2 and shape.straightness is not None and shape.straightness > STRAIGHT * (n - 1):
        text = f"straightness {shape.straightness:.2f} of at most {n - 1}: the path is a line, with no noise to average away"
        yield Finding("no noise", text, places[0], places[-1])


def router_findings(biases: Mapping[str, Gram], names: Sequence[str], places: Sequence[float]) -> Iterator[Finding]:
    """Routers' biases, by group, that jump, or still drift in one direction: the average of them
    then lags behind.
    """
    n = len(names)
    for group, gram in biases.items():
        shape = geometry(gram, places)
        for spike in _spikes(shape.increments, names, places, f"the router bias of {group}"):
            yield spike._replace(name="router bias")
        if n > 3 and shape.straightness is not None and shape.straightness > (n - 1) / 2:
            text = (
                f"the router bias of {group} drifts in one direction (straightness {shape.straightness:.1f} of {n - 1}):"
                " the load of its experts has not settled"
            )
            yield Finding("router bias", text, places[0], places[-1])


def _spikes(lengths: Sequence[float], names: Sequence[str], places: Sequence[float], of: str) -> Iterator[Finding]:
    """Increments over three times the median; one over a wider gap is compared by its share of the
    gap.
    """
    gaps = [newer - older for older, newer in pairwise(places)]
    if len(lengths) < 3:
        return
    gap = statistics.median(gaps)
    fair = [length * min(1.0, gap / own) if own > 0 else length for length, own in zip(lengths, gaps, strict=True)]
    usual = statistics.median(fair)
    for i, length in enumerate(fair):
        if usual > 0 and length > SPIKE * usual:
            text = (
                f"from {names[i]} to {names[i + 1]} {of} move {length / usual:.1f} times as far as usual:"
                " a spike, or another stage of training"
            )
            yield Finding("spike", text, places[i], places[i + 1])
