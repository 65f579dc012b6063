"""Which rows of a ledger a forecast rests on, and the reasons why there can be none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from merge_cli.errors import UsageError
from merge_cli.request.coefficients import AGE_HURTS
from merge_cli.trajectory.analysis import Analysis
from merge_cli.trajectory.ledger import Row, current
from merge_cli.trajectory.model import Measured
from merge_cli.trajectory.plans import RECENT, SINGLES
from merge_cli.trajectory.results import main_metric


class Named(NamedTuple):
    """A refusal or a warning: its name, and the sentence."""

    name: str
    text: str


@dataclass
class Evidence:
    """Rows of one evaluator, sorted: `singles` by step, `merges` as they were made, `annealed`
    checkpoints of real annealings.

    `near` are the singles of the last tenth of the run (since the step `since`), through which the
    line goes; `used` the merges that end there. With `refusals` there is no forecast.
    """

    rows: list[Row]
    metric: str
    since: float
    singles: list[Measured]
    merges: list[Measured]
    annealed: list[Row]
    near: list[Measured]
    used: list[Measured]
    refusals: list[Named]
    warnings: list[Named]

    @property
    def newest(self) -> Measured | None:
        """The newest single checkpoint that was evaluated."""
        return self.singles[-1] if self.singles else None

    @property
    def everything(self) -> dict[str, Measured]:
        """All rows with steps, by key."""
        return {one.key: one for one in [*self.singles, *self.merges]}

    @property
    def steps(self) -> list[float]:
        """The steps of all checkpoints that any row names."""
        return sorted({step for one in self.everything.values() for step in one.steps})

    def row(self, key: str) -> Row:
        return next(row for row in self.rows if row.key == key)


def choose_rows(rows: Sequence[Row], metric: str | None) -> tuple[list[Row], str, list[Named]]:
    """The rows of the latest evaluator that have `metric` (or its main one), that metric, and
    warnings. Raises UsageError.
    """
    if not rows:
        raise UsageError("the ledger has no rows", hint="pmerge evaluate RUN_FOLDER --text FILE")
    latest = rows[-1].evaluator
    others = {row.evaluator for row in rows} - {latest}
    wanted = metric or main_metric(list(rows[-1].metrics))
    found = current([row for row in rows if row.evaluator == latest and wanted in row.metrics])
    if not found:
        raise UsageError(f"no row has the metric {wanted}", details=[f"found     {', '.join(list(rows[-1].metrics)[:20])}"])
    warnings = []
    if others:
        warnings.append(Named("evaluators", f"rows of {len(others)} other evaluators are left out; the latest one is used"))
    return found, wanted, warnings


def collect(rows: Sequence[Row], metric: str | None = None, analysis: Analysis | None = None) -> Evidence:
    """The evidence in `rows`, and what the `analysis` of the run says against using it. Raises
    UsageError for no row at all.
    """
    chosen, metric, warnings = choose_rows(rows, metric)
    usable = [(row, row.steps) for row in chosen if row.annealed_from is None]
    everything = [Measured(row.key, tuple(known), tuple(row.coefficients), row.metrics[metric]) for row, known in usable if known]
    unknown = [row.name for row, known in usable if known is None]
    if unknown and everything:
        warnings.append(Named("unknown steps", f"{len(unknown)} rows without steps are left out, as {unknown[0]}"))
    found = Evidence(
        rows=chosen,
        metric=metric,
        since=(analysis.constant_since or 0.0) if analysis is not None else 0.0,
        singles=_by_step(one for one in everything if len(one.steps) == 1),
        merges=[one for one in everything if len(one.steps) > 1],
        annealed=[row for row in chosen if row.annealed_from is not None and row.is_single],
        near=[],
        used=[],
        refusals=[],
        warnings=warnings,
    )
    found.refusals += _choose_window(found)
    if not found.refusals:
        found.refusals += _against(found, analysis)
    return found


def _choose_window(found: Evidence) -> list[Named]:
    """Fill `near` and `used`; the reasons why that cannot be done."""
    if not found.steps:
        return [Named("unknown steps", "no row has steps: name the checkpoints by step (ckpt_1000)")]
    newest = found.newest
    if newest is None or len(found.singles) < 2:
        return [Named("too few checkpoints", f"{len(found.singles)} single checkpoints are evaluated, at least 2 are needed")]
    end = newest.steps[0]
    so_far = end - found.since
    recent = [one for one in found.singles if one.steps[0] >= end - RECENT * so_far]
    found.near = recent if len(recent) >= SINGLES - 1 else found.singles[-SINGLES:]
    ending = [one for one in found.merges if end - RECENT * so_far <= one.steps[-1] <= end and min(one.coefficients) >= 0]
    found.used = [one for one in ending if one.age <= AGE_HURTS * so_far]
    old = [found.row(one.key).name for one in ending if one.age > AGE_HURTS * so_far]
    if old:
        text = f"merges that lag more than {100 * AGE_HURTS:.0f} % of the run are not used: {', '.join(old[:5])}"
        found.warnings.append(Named("age", text + (f" and {len(old) - 5} more" if len(old) > 5 else "")))
    return [] if found.used else [Named("no merge", f"no merge that ends near step {end:.10g} is evaluated")]


def _against(found: Evidence, analysis: Analysis | None) -> list[Named]:
    """What the analysis found in the window that is used: reasons to refuse; what only informs
    becomes a warning.
    """
    if analysis is None:
        found.warnings.append(Named("no analysis", "decays, warm-ups and spikes were not looked for:  pmerge analyze RUN"))
        return []
    used = [*found.near, *found.used]
    first, last = min(one.steps[0] for one in used), max(one.steps[-1] for one in used)
    refusals = []
    for each in analysis.findings:
        inside = analysis.unit == "positions" or ((each.first or 0.0) < last and (each.last is None or each.last > first))
        if inside and each.stops_forecast:
            refusals.append(Named(each.name, each.text))
        elif inside:
            found.warnings.append(Named(each.name, each.text))
    return refusals


def _by_step(singles: Iterable[Measured]) -> list[Measured]:
    """Single checkpoints by step, the last of those with the same step."""
    latest = {one.steps[0]: one for one in singles}
    return [latest[step] for step in sorted(latest)]
