"""`pmerge forecast`: what the ledger's numbers foretell, and which merge to make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from merge_cli.cli import console
from merge_cli.cli.options import Checkpoints, Json, Quiet

if TYPE_CHECKING:
    from merge_cli.trajectory.forecast import Band, Forecast, Quantity

_COUNTS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_MOST_RESULTS = 20


def forecast_command(
    checkpoints: Checkpoints,
    metric: Annotated[str | None, typer.Option(metavar="PATH", help="Which metric of the ledger (its first loss).")] = None,
    is_loss: Annotated[bool, typer.Option("--is-loss", help="The metric is a loss, whatever its name.")] = False,
    anneal: Annotated[
        int | None, typer.Option(metavar="STEPS", help="Also the loss after a decay over so many steps from now.")
    ] = None,
    output: Annotated[str | None, typer.Option("-o", "--output", metavar="PATH", help="The ledger's folder (RUN.pmerge).")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Forecast the annealed loss and the best merge from measured losses. Reads the ledger only;
    exit code 1 for no forecast.

    Example:  pmerge forecast run/ --anneal 2000
    """
    from merge_cli.features.forecast import forecast
    from merge_cli.trajectory.records import encode

    found = forecast(checkpoints, output=output, metric=metric, assume_loss=is_loss, anneal=anneal)
    if as_json:
        console.out_json(encode(found))
    else:
        for line in [*_model(found), *_future(found), *_which(found, checkpoints), *_results(found), *_conditions(found)]:
            console.out_text(line)
    if not quiet:
        for warning in found.warnings:
            console.err(f"warning: {warning.name}: {warning.text}")
    for refusal in found.refusals:
        console.err(f"no forecast: {refusal.name}: {refusal.text}")
    if found.refusals:
        raise typer.Exit(1)


def _model(found: Forecast) -> list[str]:
    if found.level is None or found.slope is None:
        return []
    rows = [
        ("l(T)", _value(found.level), f"the line through the checkpoints of the last tenth of the run, at step {found.newest:.0f}"),
        ("s", _value(found.slope), "its fall per step"),
    ]
    for noise in found.noises:
        merges = f"{noise.merges} merge{'s' if noise.merges > 1 else ''}"
        rows.append(("a", _value(noise.a), f"the noise loss, from {merges} of checkpoints {noise.spacing:.10g} steps apart"))
    if found.drift_ratio is not None:
        rows.append(("s V / a", f"{found.drift_ratio:.3f}", "the fall over a spacing V, against the noise: small late in a run"))
    return [f"model of {found.metric}:  gain = a (1 - sum c^2) - s x age", *console.table(("", "", ""), rows)[1:]]


def _future(found: Forecast) -> list[str]:
    lines = []
    for name, band in (("now", found.now), ("ahead", found.ahead)):
        if band is not None:
            lines += [f"  {name:5}  {_band(band)}", f"         {band.definition}"]
    if found.calibration is not None:
        one = found.calibration
        lines += [
            f"  calibrated  {one.value:.4f}",
            f"         by {one.name}: its loss was {one.loss:.4f}, its drop {one.drop_over_a:.2f} of a",
        ]
    return ["forecast:", *lines] if lines else []


def _which(found: Forecast, checkpoints: Sequence[str]) -> list[str]:
    from merge_cli.trajectory.propose import command_of

    if found.helps is None:
        return []
    if found.choice is None:
        return ["merging is predicted to hurt: the newest checkpoint is the best"]
    top, (low, high) = found.choice, found.flat
    lines = [
        f"best merge: {top.method} of {top.n}, one every {top.spacing:.10g} steps, predicted gain over l(T) {top.gain:.4f};"
        f" {low} to {high} checkpoints are within 5 % of it",
        f"  {command_of(found, checkpoints)}",
        "predicted gain over l(T) by N (* measured):",
    ]
    spacings = sorted({choice.spacing for choice in found.choices})
    counts = [n for n in _COUNTS if any(choice.n == n for choice in found.choices)]
    rows = []
    for method in ("sma", "wma"):
        for spacing in spacings:
            cells = {c.n: c for c in found.choices if (c.method, c.spacing) == (method, spacing)}
            rows.append((method, f"{spacing:.10g}", *(_cell(cells[n]) if n in cells else "" for n in counts)))
    return [*lines, *console.table(("method", "every", *map(str, counts)), rows)]


def _cell(choice: object) -> str:
    measured, gain = getattr(choice, "measured", None), getattr(choice, "gain", 0.0)
    return f"{gain:+.4f}" if measured is None else f"{measured:+.4f}*"


def _results(found: Forecast) -> list[str]:
    shown = found.results[:_MOST_RESULTS]
    rows = []
    for each in shown:
        value = f"{each.value:.5f}" + (f" +- {each.error:.2g}" if each.error is not None else "")
        gain = "" if each.gain is None else f"{each.gain:+.4f}"
        error = "" if each.gain_error is None or each.gain == 0 else f"+- {each.gain_error:.4f}"
        rows.append((each.name, value, gain, error, "tied with the newest" if each.is_tie else ""))
    more = [f"  ... and {len(found.results) - len(shown)} more"] if len(found.results) > len(shown) else []
    sources = sorted({each.error_source for each in found.results if each.gain_error is not None and each.gain != 0})
    about = f"; errors of gains: {', '.join(sources)}" if sources else ""
    choices = sum(not each.is_annealed for each in found.results)
    header = f"measured; the first is the best of {choices} on the text that chose it{about}:"
    return [header, *console.table(("", found.metric, "gain over newest", "", ""), rows), *more]


def _conditions(found: Forecast) -> list[str]:
    if found.now is None:
        return []
    return ["holds only if:", *(f"  - {condition}" for condition in found.conditions)]


def _value(quantity: Quantity) -> str:
    error = quantity.total_error
    return f"{quantity.value:.4g}" + (f" +- {error:.2g}" if error is not None else "")


def _band(band: Band) -> str:
    return f"{band.value:.4f}  ({band.low:.4f} to {band.high:.4f}) at step {band.step:.10g}"
