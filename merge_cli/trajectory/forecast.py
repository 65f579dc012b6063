"""What a ledger foretells: the annealed loss now and ahead, which merge to make, and everything
that forbids to say so.

    now     the loss at equal tokens of a run that had decayed over its last 10 to 25 %, ending at the newest step T:  l(T) - a
    ahead   the loss after a decay that starts at T and ends at T + W:  l extrapolated in the logarithm of the step, minus a

l is the line through single checkpoints of the last tenth of the run (ahead: of the last 40 %), a
the noise loss (see `model.py`). The band around a value is the range seen in 21 real annealing runs
of two miniatures (0.5M and 26M parameters), 15 % of a now and 35 % ahead, combined with the
standard errors of l, s and a. No confidence level is claimed, and the length of the decay is not
modeled.

A forecast that cannot be made is refused by name, and measured values are all that is left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from merge_cli.trajectory.analysis import Analysis
from merge_cli.trajectory.choices import Choice, best, choices, flat_range
from merge_cli.trajectory.compare import difference, sampling_error
from merge_cli.trajectory.evidence import Evidence, Named, collect
from merge_cli.trajectory.ledger import Row
from merge_cli.trajectory.model import SPACINGS_DIFFER, Estimate, Line, Noise, best_count, distinct, fit_error, fit_line, noise_of
from merge_cli.trajectory.plans import SINGLES
from merge_cli.trajectory.results import is_loss, lower_is_better

SCHEMA = 1
BAND_NOW, BAND_AHEAD = 0.15, 0.35  # of a: the largest errors of 21 forks
STEEP = 0.05  # s V / a: early in a run forecasts missed by more
LONG, SHORT = 0.4, 0.2  # of the run: the singles behind the forecast ahead, and the least that is not warned of
NOW = "the loss at equal tokens of a run that had decayed over its last 10 to 25 %, ending at step {newest:.10g}: l(T) - a"
AHEAD = "the loss after a decay that starts at step {newest:.10g} and ends {width:.10g} steps later: l extrapolated - a"
CONDITIONS = (
    "the decay goes to zero, on the same mix of data: with other data, or a floor above zero, this is another number",
    "the held-out text is no part of the training data",
    "the length of the decay is not modeled: the drop was .86 to 1.13 of a in 19 real annealing runs",
    "the band is the range of errors in 21 real annealing runs of miniatures with 0.5M and 26M parameters, combined with standard"
    " errors; it has no confidence level",
    "it is a loss on this text, not a benchmark, and not the quality of a model that is fine-tuned afterwards",
)


class Quantity(NamedTuple):
    """A number, its standard error by the scatter of checkpoints around the line, and that by the
    sampling of the text.

    `rows` holds the weight of each row's loss, by key: the value is the weighted sum.
    """

    value: float
    error: float | None
    sampling: float | None
    sampling_source: str
    rows: Mapping[str, float]

    @property
    def total_error(self) -> float | None:
        """Both errors together, as far as they are known."""
        known = [error for error in (self.error, self.sampling) if error is not None]
        return math.hypot(*known) if known else None


class NoiseAt(NamedTuple):
    """The noise loss a, from merges whose checkpoints are `spacing` steps apart."""

    spacing: float
    merges: int
    a: Quantity


@dataclass(frozen=True)
class Band:
    """A forecast: `value` between `low` and `high` at a step, its definition, and the parts of the
    half width.
    """

    value: float
    low: float
    high: float
    step: float
    definition: str
    parts: Mapping[str, float]
    quantity: Quantity


@dataclass(frozen=True)
class Calibration:
    """A real annealing in the ledger: its loss, the drop it made over a, and the forecast `now`
    with that factor in place of 1.
    """

    name: str
    step: float
    loss: float
    drop_over_a: float
    value: float


class Result(NamedTuple):
    """A measured row: its gain over the newest checkpoint (positive: better), and whether that may
    be chance.

    `is_annealed`: the end of a real annealing, which is no choice.
    """

    key: str
    name: str
    value: float
    error: float | None
    gain: float | None
    gain_error: float | None
    error_source: str
    is_tie: bool
    is_annealed: bool = False


@dataclass(frozen=True)
class Forecast:
    """Everything that a ledger supports. A part that is refused is None, and `refusals` give the
    reasons.

    `best_sma` and `best_wma` are N* at the finest spacing (None: as many as there are); `flat` is
    the range of N within 5 % of the best gain; `helps` is whether any merge is predicted to gain.
    """

    metric: str
    evaluator: str
    lower_is_better: bool
    results: tuple[Result, ...]
    refusals: tuple[Named, ...]
    warnings: tuple[Named, ...]
    newest: float | None = None
    level: Quantity | None = None
    slope: Quantity | None = None
    noises: tuple[NoiseAt, ...] = ()
    drift_ratio: float | None = None
    now: Band | None = None
    ahead: Band | None = None
    calibration: Calibration | None = None
    best_sma: float | None = None
    best_wma: float | None = None
    choices: tuple[Choice, ...] = ()
    choice: Choice | None = None
    flat: tuple[int, ...] = ()
    helps: bool | None = None
    conditions: tuple[str, ...] = CONDITIONS
    schema: int = SCHEMA


def forecast_rows(
    rows: Sequence[Row],
    *,
    metric: str | None = None,
    assume_loss: bool = False,
    analysis: Analysis | None = None,
    steps: Sequence[float] = (),
    anneal: float | None = None,
) -> Forecast:
    """The forecast of the rows of one evaluator; of several, that of the latest row.

    `steps` are those of all checkpoints of the run, for the table of choices; `anneal` is the
    length of a decay ahead. With `assume_loss` the metric counts as a loss, whatever its name.
    Raises UsageError where there is no row, or none with `metric`.
    """
    found = collect(rows, metric, analysis)
    is_a_loss = assume_loss or is_loss(found.metric)
    lower = is_a_loss or lower_is_better(found.metric)
    if not is_a_loss:
        text = f"{found.metric} is no loss by its name: measured values only, since the model of gains is one of losses (--is-loss)"
        found.refusals = [Named("benchmark", text)]
    measured = Forecast(
        metric=found.metric,
        evaluator=found.rows[-1].evaluator,
        lower_is_better=lower,
        newest=found.newest.steps[0] if found.newest is not None else None,
        results=tuple(_results(found, lower)),
        refusals=tuple(found.refusals),
        warnings=tuple(found.warnings),
    )
    return measured if found.refusals else _predict(found, measured, sorted({*steps, *found.steps}), anneal)


def _predict(found: Evidence, measured: Forecast, steps: Sequence[float], anneal: float | None) -> Forecast:
    line = fit_line(found.near)
    newest = found.singles[-1].steps[0]
    noises = noise_of(found.used, line, found.singles)
    finest = noises[0]
    level, fall, a = line.at(newest), line.fall(), finest.a.value
    shown = replace(
        measured,
        level=_quantity(found, level, line),
        slope=_quantity(found, fall, line),
        noises=tuple(NoiseAt(each.spacing, each.merges, _quantity(found, each.a, line)) for each in noises),
    )
    refusal = _refuse_noise(shown.noises[0].a)
    if refusal is not None:
        return replace(shown, refusals=(refusal,))
    warnings = list(found.warnings)
    if steps[-1] > newest:
        warnings.append(Named("newer checkpoints", f"the run has reached step {steps[-1]:.10g}, the evaluations {newest:.10g}"))
    slope = max(fall.value, 0.0)
    error = shown.slope.total_error if shown.slope is not None else None
    if error is not None and slope < 2 * error:
        text = f"s = {fall.value:.3g} is below two of its standard errors ({error:.2g}): the best N is uncertain"
        warnings.append(Named("slope not measured", text))
    ratio = slope * finest.spacing / a
    widen = _widen(line, ratio, warnings)
    spanned = _spanned(noises, warnings)
    now = _band(found, line.at(newest), spanned, line, BAND_NOW * widen, newest, NOW.format(newest=newest))
    best_merge = min(one.loss for one in found.merges)
    if now.value > best_merge:
        text = f"the best merge ({best_merge:.4f}) is below l(T) - a ({now.value:.4f}) already: a is too small"
        warnings.append(Named("merge below forecast", text))
    done = [(one, level.value - one.loss) for one in found.merges if one.steps[-1] == newest]
    table = choices(distinct(noises), slope, [step for step in steps if step <= newest], found.since, done)
    top = best(table)
    optimum = best_count(a, slope, finest.spacing)
    return replace(
        shown,
        drift_ratio=ratio,
        now=now,
        ahead=None if anneal is None else _ahead(found, spanned, anneal, widen, warnings),
        calibration=_calibration(found, now, a),
        best_sma=optimum if math.isfinite(optimum) else None,
        best_wma=math.sqrt(2) * optimum if math.isfinite(optimum) else None,
        choices=tuple(table),
        choice=top,
        flat=flat_range(table, top) if top is not None else (),
        helps=top is not None,
        warnings=tuple(warnings),
    )


def _refuse_noise(a: Quantity) -> Named | None:
    if a.value <= 0:
        text = (
            f"a = {a.value:.4g}: there is no noise to average away. Weights of a schedule-free optimizer or of an EMA are averages"
            " already, and a run that has decayed has lost its noise"
        )
        return Named("no noise", text)
    error = a.total_error
    if error is not None and a.value < 2 * error:
        text = f"a = {a.value:.4g} is below two of its standard errors ({error:.2g}): evaluate more merges, or more text"
        return Named("noise not measured", text)
    return None


def _widen(line: Line, ratio: float, warnings: list[Named]) -> float:
    """How much wider than usual a band has to be."""
    factor = 1.0
    if len(line.points) < 3:
        warnings.append(Named("few checkpoints", "two single checkpoints give the line no error: the band is doubled"))
        factor *= 2
    if ratio > STEEP:
        warnings.append(Named("early", f"s V / a = {ratio:.3f} is above {STEEP:g}, as early in a run: the band is doubled"))
        factor *= 2
    return factor


def _spanned(noises: Sequence[Noise], warnings: list[Named]) -> list[Estimate]:
    """a at the finest spacing, and also that at about twice the spacing where the two differ."""
    finest = noises[0]
    twice = next((noise for noise in noises[1:] if 1.5 <= noise.spacing / finest.spacing <= 3), None)
    if twice is None:
        warnings.append(Named("one spacing", "a was measured at one spacing: how much it depends on that is not known"))
        return [finest.a]
    if abs(twice.a.value / finest.a.value - 1) <= SPACINGS_DIFFER:
        return [finest.a]
    text = (
        f"a is {finest.a.value:.4g} from checkpoints {finest.spacing:.10g} steps apart and {twice.a.value:.4g} from"
        f" {twice.spacing:.10g}: too close together it is too small, too far apart too large; the band spans both, and more"
        " spacings (--plan grid) make the proposal surer"
    )
    warnings.append(Named("spacings differ", text))
    return [finest.a, twice.a]


def _band(
    found: Evidence, level: Estimate, noises: Sequence[Estimate], line: Line, share: float, step: float, definition: str
) -> Band:
    quantity = _quantity(found, level.plus(noises[0], -1.0), line)
    parts = {"range of real annealing runs": share * noises[0].value}
    if quantity.error is not None:
        parts["standard error"] = quantity.error
    if quantity.sampling is not None:
        parts[f"sampling of the text ({quantity.sampling_source})"] = quantity.sampling
    half = math.hypot(*parts.values())
    low = level.value - max(noise.value for noise in noises) - half
    high = level.value - min(noise.value for noise in noises) + half
    return Band(quantity.value, low, high, step, definition, parts, quantity)


def _ahead(found: Evidence, noises: Sequence[Estimate], anneal: float, widen: float, warnings: list[Named]) -> Band | None:
    newest = found.singles[-1].steps[0]
    so_far = newest - found.since
    if anneal > so_far:
        text = f"a decay of {anneal:.10g} steps is longer than the run so far ({so_far:.10g}): no forecast"
        warnings.append(Named("too far ahead", text))
        return None
    long = [one for one in found.singles if one.steps[0] >= newest - LONG * so_far and one.steps[0] > 0]
    if newest - long[0].steps[0] < SHORT * so_far:
        text = (
            f"the loss ahead is extrapolated from the last {100 * (newest - long[0].steps[0]) / so_far:.0f} % of the run:"
            " evaluate older checkpoints too (--plan rolling)"
        )
        warnings.append(Named("short reach", text))
    line = fit_line(long, math.log)
    definition = AHEAD.format(newest=newest, width=anneal)
    return _band(found, line.at(newest + anneal), noises, line, BAND_AHEAD * widen, newest + anneal, definition)


def _calibration(found: Evidence, now: Band, a: float) -> Calibration | None:
    """The latest real annealing that ended between evaluated checkpoints."""
    for row in reversed(found.annealed):
        step, loss = row.parts[0].step, row.metrics[found.metric]
        if step is not None and found.singles[0].steps[0] <= step <= found.singles[-1].steps[0]:
            near = sorted(found.singles, key=lambda one: abs(one.steps[0] - step))[:SINGLES]
            factor = (fit_line(near).at(step).value - loss) / a
            return Calibration(row.name, step, loss, factor, now.value + a - factor * a)
    return None


def _quantity(found: Evidence, estimate: Estimate, line: Line) -> Quantity:
    error = fit_error(estimate, found.everything, line.deviation)
    sampling, source = sampling_error(found.rows, estimate.weights, found.metric) or (None, "")
    return Quantity(estimate.value, error, sampling, source, estimate.weights)


def _results(found: Evidence, lower: bool) -> list[Result]:
    """All rows, the best first, real annealing runs last."""
    sign = 1.0 if lower else -1.0
    newest = found.row(found.newest.key) if found.newest is not None else None
    results = []
    for row in found.rows:
        value, error = row.metrics[found.metric], row.errors.get(found.metric)
        if newest is None:
            results.append(Result(row.key, row.name, value, error, None, None, "", False, row.annealed_from is not None))
            continue
        apart = difference(newest, row, found.metric)
        is_tie = row is not newest and apart.is_tie
        is_annealed = row.annealed_from is not None
        results.append(Result(row.key, row.name, value, error, sign * apart.value, apart.error, apart.source, is_tie, is_annealed))
    return sorted(results, key=lambda each: (each.is_annealed, sign * each.value, each.name))
