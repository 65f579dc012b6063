"""Which merges to evaluate: plans over the steps of a run, as entries with the options of `pmerge
average`.

    auto      4 checkpoints over the last 10 % of the run, and merges of 8 at the finest spacing V and at 2V: all that a forecast
              needs (in the pilots 5 evaluations missed the annealed loss by 5 % of the drop on
              average, more merges added nothing)
    rolling   every checkpoint, and a merge of 8 that ends at each
    grid      merges of 2, 4, 8 and 16 at V, 2V and 4V, by sma and wma
    pairs     merges of two at lags V, 2V, 4V, ...: the loss variogram
    plane     three checkpoints, their midpoints and centroid: a landscape from 7 evaluations

An entry with `last` 1 is a checkpoint as it is.
"""

from __future__ import annotations

import bisect
import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from merge_cli.errors import UsageError
from merge_cli.request.coefficients import AGE_HURTS

PLANS = ("auto", "rolling", "grid", "pairs", "plane")
MERGE_OF = 8
SINGLES = 4
RECENT = 0.1  # of the run

Entry = dict[str, Any]


def make_plan(kind: str, steps: Sequence[int], since: float = 0.0) -> list[Entry]:
    """The entries of a plan for checkpoints at `steps`, ascending. Checkpoints before `since` are
    of another phase.

    Raises UsageError for an unknown plan or too few checkpoints.
    """
    if kind not in PLANS:
        raise UsageError(f"--plan cannot be {kind!r}", details=[f"expected  {', '.join(PLANS)}, or a FILE"], hint="--plan auto")
    steps = [step for step in steps if step >= since]
    if len(steps) < 3:
        raise UsageError(
            f"a plan needs at least three checkpoints, found {len(steps)}",
            hint="name what is to be evaluated in a list:  --plan FILE",
        )
    make = {"auto": _auto, "rolling": _rolling, "grid": _grid, "pairs": _pairs, "plane": _plane}[kind]
    found: dict[str, Entry] = {}
    for entry in make(list(steps), finest(steps)):
        found.setdefault(entry["name"], entry)
    return list(found.values())


def finest(steps: Sequence[int]) -> int:
    """The usual gap between the newest checkpoints."""
    recent = steps[-(2 * MERGE_OF) :]
    return int(statistics.median_low([newer - older for older, newer in pairwise(recent)]))


def spread_out(steps: Sequence[int], since: float = 0.0) -> list[int]:
    """Four checkpoints, evenly over the last tenth of the run, the newest among them; the newest
    four where fewer lie there.
    """
    newest = steps[-1]
    recent = [step for step in steps if step >= newest - RECENT * (newest - since)]
    if len(recent) < SINGLES:
        return list(steps[-SINGLES:])
    return sorted({recent[round(i * (len(recent) - 1) / (SINGLES - 1))] for i in range(SINGLES)})


def single(step: int) -> Entry:
    """The checkpoint at `step` as it is."""
    return {"name": f"step-{step}", "method": "sma", "last": 1, "at": step}


def merge(method: str, last: int, every: int, at: int) -> Entry:
    """A merge of `last` checkpoints, one every `every` steps, that ends at step `at`."""
    return {"name": f"{method}-last{last}-every{every}-at{at}", "method": method, "last": last, "every": every, "at": at}


def window(steps: Sequence[float], every: float, at: float) -> int:
    """How many checkpoints there are one `every` steps back from `at`, each within a tenth of that;
    `steps` ascend.
    """
    count = 0
    while True:
        place = at - count * every
        after = bisect.bisect_left(steps, place)
        near = [step for step in steps[max(after - 1, 0) : after + 1] if step <= at]
        if not any(10 * abs(step - place) <= every for step in near):
            return count
        count += 1


def _auto(steps: list[int], gap: int) -> list[Entry]:
    newest = steps[-1]
    entries = [single(step) for step in spread_out(steps)]
    for every in (gap, 2 * gap):
        count = min(MERGE_OF, window(steps, every, newest))
        while count >= 3 and every * (count - 1) / 2 > AGE_HURTS * newest:
            count -= 1
        if count >= 3:
            entries.append(merge("sma", count, every, newest))
    return entries


def _rolling(steps: list[int], gap: int) -> list[Entry]:
    ends = [step for step in steps if window(steps, gap, step) >= 3]
    return [*map(single, steps), *(merge("sma", min(MERGE_OF, window(steps, gap, step)), gap, step) for step in ends)]


def _grid(steps: list[int], gap: int) -> list[Entry]:
    newest = steps[-1]
    cells = [
        merge(method, count, every, newest)
        for method in ("sma", "wma")
        for every in (gap, 2 * gap, 4 * gap)
        for count in (2, 4, 8, 16)
        if count <= window(steps, every, newest)
    ]
    return [*_auto(steps, gap), *cells]


def _pairs(steps: list[int], gap: int) -> list[Entry]:
    newest = steps[-1]
    entries, lag = [single(newest)], gap
    while window(steps, lag, newest) >= 2:
        other = min(steps, key=lambda step: abs(step - (newest - lag)))
        entries += [single(other), merge("sma", 2, lag, newest)]
        lag *= 2
    return [*entries, *(entry for entry in _auto(steps, gap) if entry["last"] == 1)]


def _plane(steps: list[int], gap: int) -> list[Entry]:
    """Three corners as far apart as evenly spaced checkpoints allow."""
    newest = steps[-1]
    every = gap * max(1, (window(steps, gap, newest) - 1) // 2)
    if window(steps, every, newest) < 3:
        raise UsageError("a plane needs three evenly spaced checkpoints", hint="--plan auto")
    corners = [min(steps, key=lambda step: abs(step - (newest - i * every))) for i in range(3)]
    sides = [merge("sma", 2, every, newest), merge("sma", 2, every, corners[1]), merge("sma", 2, 2 * every, newest)]
    return [*map(single, corners), *sides, merge("sma", 3, every, newest)]
