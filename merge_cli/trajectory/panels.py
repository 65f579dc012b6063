"""The panels of the report: each a chart, the numbers behind it, and a sentence on what it does not
show.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from merge_cli.request.methods import coefficients
from merge_cli.trajectory import svg
from merge_cli.trajectory.analysis import Analysis, Spread
from merge_cli.trajectory.choices import Choice
from merge_cli.trajectory.evidence import Evidence
from merge_cli.trajectory.forecast import Band, Forecast
from merge_cli.trajectory.groups import KINDS
from merge_cli.trajectory.model import Measured, pair_noise

_AT = re.compile(r"-at\d+$")
_SHOWN_N = 40


@dataclass(frozen=True)
class Panel:
    """A chart with its words: what it shows, what it does not show, and its numbers as a table."""

    title: str
    chart: str
    shows: str
    shows_not: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def panels(found: Evidence, forecast: Forecast, analysis: Analysis | None) -> list[Panel]:
    """All panels for which there are numbers, the three that matter most first."""
    made = [
        _losses(found, forecast),
        _gains(found, forecast),
        _spreads(analysis),
        _loss_variogram(found, forecast),
        _variogram(analysis),
        _coefficients(forecast),
        _cosines(analysis),
    ]
    return [panel for panel in made if panel is not None]


def _losses(found: Evidence, forecast: Forecast) -> Panel | None:
    if not found.singles:
        return None
    series: dict[str, list[tuple[Measured, str]]] = {}
    for one in found.merges:
        name = found.row(one.key).name
        series.setdefault(_AT.sub("", name), []).append((one, name))
    bands = [(name, band) for name, band in (("now", forecast.now), ("ahead", forecast.ahead)) if band is not None]
    annealed = [(row, row.parts[0].step, row.metrics[found.metric]) for row in found.annealed if row.parts[0].step is not None]
    y = [one.loss for one in [*found.singles, *found.merges]]
    y += [value for _, band in bands for value in (band.low, band.high)] + [loss for *_, loss in annealed]
    x = [one.steps[-1] for one in [*found.singles, *found.merges]] + [band.step for _, band in bands]
    words = f"{found.metric} of checkpoints, merges and the forecast, by step"
    plot = svg.Plot("losses", "Loss against steps", words, svg.padded(x, 0.08), svg.padded(y), "step", found.metric)
    for name, band in bands:
        _draw_band(plot, name, band)
    plot.line([(one.steps[0], one.loss) for one in found.singles], "path faint")
    if forecast.level is not None and forecast.slope is not None and len(found.near) > 1:
        end = found.singles[-1].steps[0]
        ends = [found.near[0].steps[0], end]
        plot.line([(step, forecast.level.value + forecast.slope.value * (end - step)) for step in ends], "fit")
    for one in found.singles:
        plot.dot((one.steps[0], one.loss), "single", f"step {one.steps[0]:,.0f}: {one.loss:.5f}")
    for members in series.values():
        members.sort(key=lambda each: each[0].steps[-1])
        if len(members) > 2:
            plot.line([(one.steps[-1], one.loss) for one, _ in members], "path merge")
        for one, name in members:
            plot.dot((one.steps[-1], one.loss), "merged", f"{name}: {one.loss:.5f}")
    for row, step, loss in annealed:
        plot.diamond((float(step or 0), loss), "annealed", f"{row.name}: {loss:.5f}")
    rows = [(found.row(one.key).name, f"{one.steps[-1]:,.0f}", f"{one.loss:.5f}") for one in [*found.singles, *found.merges]]
    rows += [(row.name, f"{step:,}", f"{loss:.5f}") for row, step, loss in annealed]
    rows += [
        (f"forecast {name}", f"{band.step:,.0f}", f"{band.value:.5f} ({band.low:.5f} to {band.high:.5f})") for name, band in bands
    ]
    return Panel(
        "Loss, merges and the forecast",
        plot.draw(),
        "Dots are checkpoints, filled dots merges at the step of their newest checkpoint, the straight line the fit l(t). A bar is"
        " a forecast with its band, a diamond the end of a real annealing.",
        "The band is a range of past errors, not a confidence interval. The loss is that of this text.",
        ("row", "step", found.metric),
        tuple(rows),
    )


def _draw_band(plot: svg.Plot, name: str, band: Band) -> None:
    about = f"{name}: {band.value:.4f} ({band.low:.4f} to {band.high:.4f})"
    plot.box((band.step, band.low), (band.step, band.high), "band", about, least=16)
    plot.level((band.step, band.value), 22, "center")
    plot.text((band.step, band.value), name, dx=-14, dy=4, anchor="end")


def _gains(found: Evidence, forecast: Forecast) -> Panel | None:
    """Gain against N at each spacing, predicted and measured."""
    table = [choice for choice in forecast.choices if choice.method == "sma"]
    if not table or forecast.level is None:
        return None
    top = forecast.choice
    most = min(max(choice.n for choice in table), max(_SHOWN_N, top.n if top is not None else 0))
    table = [choice for choice in table if choice.n <= most]
    spacings = sorted({choice.spacing for choice in table})
    measured = [c for c in forecast.choices if c.measured is not None and c.n <= most and c.spacing in spacings]
    y = [0.0, *(choice.gain for choice in table), *(choice.measured or 0.0 for choice in measured)]
    if top is not None:
        y.append(top.gain)
    words = "predicted and measured gain over the fitted loss of the newest step, by number of merged checkpoints and spacing"
    low, high = svg.padded(y)
    plot = svg.Plot("gains", "Gain against N", words, (0.5, most * 1.14 + 0.5), (low, high), "checkpoints merged, N", "gain")
    if low < 0:
        plot.box((0.5, low), (most * 1.14 + 0.5, 0.0), "harm", "merges that hurt")
    for i, spacing in enumerate(spacings):
        line = [choice for choice in table if choice.spacing == spacing]
        plot.line([(1.0, 0.0), *((choice.n, choice.gain) for choice in line)], f"path v{min(i, 3)}")
    for choice in measured:
        kind = f"{'dot' if choice.method == 'sma' else 'ring v'}{min(spacings.index(choice.spacing), 3)}"
        about = f"{choice.method} of {choice.n}, every {choice.spacing:.10g}: measured {choice.measured:+.4f}"
        plot.dot((choice.n, choice.measured or 0.0), kind, about, 4)
    for i, spacing in enumerate(spacings):
        last = [choice for choice in table if choice.spacing == spacing][-1]
        plot.text((last.n, last.gain), f"every {spacing:.10g}", dx=6, dy=4, kind=f"note w{min(i, 3)}")
    if top is not None:
        plot.diamond((top.n, top.gain), "best", f"proposed: {top.method} of {top.n}, predicted {top.gain:+.4f}")
    counts = [n for n in (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64) if any(choice.n == n for choice in forecast.choices)]
    rows = [
        (method, f"{spacing:.10g}", *(_cell(forecast.choices, method, spacing, n) for n in counts))
        for method in ("sma", "wma", "ema", "decay")
        for spacing in spacings
    ]
    return Panel(
        "Gain by number of checkpoints and spacing",
        plot.draw(),
        "Lines are the model's gain of a simple average, gain = a (1 - 1/N) - s V (N-1)/2, one for each spacing V in steps; dots"
        " are measured simple averages, rings other measured merges. The diamond is the proposed merge: the optimum is flat. In the"
        " table * marks a measured gain.",
        "Gains are over l(T): the newest checkpoint itself lies above or below it by chance. At spacings finer than the measured"
        " ones the noise is correlated, and gains are smaller.",
        ("method", "every", *(f"N={n}" for n in counts)),
        tuple(rows),
    )


def _cell(choices: Sequence[Choice], method: str, spacing: float, n: int) -> str:
    one = next((c for c in choices if (c.method, c.spacing, c.n) == (method, spacing, n)), None)
    if one is None:
        return ""
    return f"{one.gain:+.4f}" if one.measured is None else f"{one.measured:+.4f}*"


def _spreads(analysis: Analysis | None) -> Panel | None:
    """Spread of the checkpoints by layer and kind."""
    if analysis is None:
        return None
    groups = [each for each in analysis.groups if each.spread is not None]
    if not groups:
        return None
    kinds = [kind for kind in KINDS if any(each.kind == kind for each in groups)]
    layers = sorted({each.layer for each in groups}, key=lambda layer: -1 if layer is None else layer)
    by_place = {(each.layer, each.kind): each.spread for each in groups}
    values = [[by_place.get((layer, kind)) for kind in kinds] for layer in layers]
    known = [value for row in values for value in row if value is not None]
    names = ["outside" if layer is None else f"layer {layer}" for layer in layers]
    words = "relative distance of the checkpoints to their merge, by layer and kind of tensor"
    chart = svg.cells("spread", "Spread by layer and kind", words, names, kinds, values, svg.ramp(0.0, max(known)), show=True)
    rows = [_spread_row(each.kind, each) for each in analysis.kinds]
    return Panel(
        "Where the checkpoints differ",
        chart,
        "The root mean square distance of the checkpoints to their merge, over the norm of the newest, for the tensors of each kind"
        " in each layer: dark cells move most. The table is over all layers.",
        "A large spread is no loss and no gain: distances grow on long after the loss has stopped to depend on them.",
        ("kind", "weights", "spread", "merge to newest", "cos1", "straightness"),
        tuple(rows),
    )


def _spread_row(name: str, each: Spread) -> tuple[str, ...]:
    values = (each.spread, each.merge_to_newest, each.cos1, each.straightness)
    return (name, f"{each.num_elements:,}", *("" if value is None else f"{value:.4g}" for value in values))


def _loss_variogram(found: Evidence, forecast: Forecast) -> Panel | None:
    """Q/4 of pair merges against their lag: rises to a."""
    singles = {one.steps[0]: one for one in found.singles}
    points = []
    for one in found.merges:
        if len(one.steps) == 2 and all(step in singles for step in one.steps) and one.coefficients == (0.5, 0.5):
            older, newer = (singles[step] for step in one.steps)
            points.append((newer.steps[0] - older.steps[0], pair_noise(one, older, newer), found.row(one.key).name))
    if len(points) < 2:
        return None
    points.sort()
    y = [0.0, *(value for _, value, _ in points)]
    level = forecast.noises[0].a.value if forecast.noises else None
    if level is not None:
        y.append(level)
    words = "loss variogram from pair merges, by lag"
    x = (0.0, points[-1][0] * 1.08)
    plot = svg.Plot("loss-variogram", "Loss variogram", words, x, svg.padded(y), "steps between two checkpoints", "Q / 4")
    if level is not None:
        plot.line([(x[0], level), (x[1], level)], "fit")
        plot.text((x[1], level), "a", dx=-4, dy=-5, anchor="end")
    means = {lag: [value for other, value, _ in points if other == lag] for lag, _, _ in points}
    plot.line([(lag, math.fsum(values) / len(values)) for lag, values in means.items()], "path v1")
    for lag, value, name in points:
        plot.dot((lag, value), "dot1", f"{name}: {value:.4f}")
    return Panel(
        "How soon the noise is forgotten",
        plot.draw(),
        "Q / 4 = 2 [(l_i + l_j) / 2 - L(midpoint)] of pair merges. Where it has reached a, two checkpoints have independent noise.",
        "Where it goes on rising at long lags, the path is curved, and a from wide spacings is too large.",
        ("row", "lag", "Q / 4"),
        tuple((name, f"{lag:,.0f}", f"{value:.5f}") for lag, value, name in points),
    )


def _variogram(analysis: Analysis | None) -> Panel | None:
    if analysis is None or len(analysis.geometry.variogram) < 2:
        return None
    points = analysis.geometry.variogram
    lags = [point.lag for point in points]
    y = [0.0, *(point.gamma for point in points)]
    words = "half the mean squared distance between checkpoints, by lag"
    unit = "positions" if analysis.unit == "positions" else "steps"
    plot = svg.Plot(
        "variogram", "Variogram", words, (0.0, max(lags) * 1.05), svg.padded(y), f"{unit} between two checkpoints", "gamma"
    )
    plot.line([(point.lag, point.gamma) for point in points], "path v2")
    for point in points:
        plot.dot((point.lag, point.gamma), "dot2", f"lag {point.lag:,.10g}: {point.gamma:.4g} ({point.pairs} pairs)")
    exponent = analysis.geometry.exponent
    return Panel(
        "How far the weights move",
        plot.draw(),
        "Half the mean squared distance between checkpoints against their lag"
        + ("" if exponent is None else f"; it grows with the power {exponent:.2f} (1: random walk, 2: straight line, 0: none)")
        + ".",
        "Distance is not loss: it goes on growing where the loss variogram has saturated.",
        ("lag", "gamma", "pairs"),
        tuple((f"{point.lag:,.10g}", f"{point.gamma:.6g}", str(point.pairs)) for point in points),
    )


def _coefficients(forecast: Forecast) -> Panel | None:
    top = forecast.choice
    if top is None or forecast.newest is None:
        return None
    places = [forecast.newest - i * top.spacing for i in reversed(range(top.n))]
    chosen = coefficients(top.method, places)
    words = f"coefficients of the proposed merge, {top.method} of {top.n}"
    room = 0.6 * top.spacing
    x = (places[0] - room, places[-1] + room)
    plot = svg.Plot("coefficients", "Coefficients", words, x, (0.0, 1.1 * max(chosen.values)), "step", "coefficient", height=220)
    for place, value in zip(places, chosen.values, strict=True):
        plot.box((place - 0.36 * top.spacing, 0.0), (place + 0.36 * top.spacing, value), "bar", f"step {place:,.0f}: {value:.4f}")
    return Panel(
        "The proposed merge",
        plot.draw(),
        f"{top.method} of {top.n} checkpoints: it averages like {chosen.effective_sample_size:.1f} equally weighted ones, and lags"
        f" {chosen.lag(places):,.0f} steps behind the newest.",
        "Other shapes with the same age and effective number are as good within a few percent of the gain.",
        ("step", "coefficient"),
        tuple((f"{place:,.0f}", f"{value:.6f}") for place, value in zip(places, chosen.values, strict=True)),
    )


def _cosines(analysis: Analysis | None) -> Panel | None:
    if analysis is None or len(analysis.geometry.cosines) < 3:
        return None
    shape = analysis.geometry
    names = [member.name for member in analysis.members[1:]]
    values = [[value if i != j else None for j, value in enumerate(row)] for i, row in enumerate(shape.cosines)]
    most = max(abs(value) for row in values for value in row if value is not None)
    short = [str(member.step) if member.step is not None else member.name for member in analysis.members[1:]]
    words = "cosines between the moves from one checkpoint to the next"
    chart = svg.cells("cosines", "Cosines of increments", words, short, short, values, svg.diverging(math.ceil(10 * most) / 10))
    means = [("cos1", shape.cos1), ("cos2", shape.cos2), ("straightness", shape.straightness), ("shrink", shape.shrink)]
    return Panel(
        "Do the moves go on, or come back?",
        chart,
        f"Cosines between the moves that end at {names[0]} to {names[-1]}: blue goes on in the same direction, orange comes back,"
        " as noise around a path does.",
        "The sign at close spacing is set by the optimizer's momentum, and says nothing about merging.",
        ("statistic", "value"),
        tuple((name, "" if value is None else f"{value:.4f}") for name, value in means),
    )
