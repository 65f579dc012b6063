"""The report as one HTML file: no network, no library, nothing to run; the numbers behind it are
embedded as JSON.

The same rows and the same analysis give the same bytes: there is no clock and no chance in it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from html import escape
from itertools import chain

from merge_cli.system.json_text import parse_json
from merge_cli.trajectory.analysis import Analysis
from merge_cli.trajectory.evidence import Evidence
from merge_cli.trajectory.folder import Run
from merge_cli.trajectory.forecast import Band, Forecast, Quantity
from merge_cli.trajectory.ledger import Row
from merge_cli.trajectory.panels import Panel, panels
from merge_cli.trajectory.plane import plane
from merge_cli.trajectory.records import encode
from merge_cli.trajectory.style import STYLE
from merge_cli.version import __version__


def page(
    run: Run,
    found: Evidence,
    forecast: Forecast,
    analysis: Analysis | None,
    rows: Sequence[Row],
    sources: Mapping[str, bytes],
    command: str,
) -> str:
    """The report of a run. `sources` are the files that it was made from, `command` makes the
    proposed merge ("" for none).
    """
    shown = [*panels(found, forecast, analysis), *filter(None, [plane(found)])]
    title = f"Merging {run.path.rstrip('/').rpartition('/')[2] or run.path}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{escape(run.path)}: {len(run.checkpoints)} checkpoints. {escape(_evaluated(found, forecast))}</p>',
        *_cards(found, forecast, analysis),
        *_proposal(forecast, command),
        *(f'<p class="warn"><b>No forecast, {escape(each.name)}:</b> {escape(each.text)}</p>' for each in forecast.refusals),
        *(f'<p class="warn"><b>{escape(each.name).capitalize()}:</b> {escape(each.text)}</p>' for each in forecast.warnings),
        '<div class="panels">',
        *(_figure(panel) for panel in shown),
        "</div>",
        *_measured(found, forecast),
        *_derived(found, forecast),
        *_verdict(analysis),
        *_conditions(forecast),
        *_sources(sources),
    ]
    data = {
        "pmerge": __version__,
        "run": encode(run),
        "forecast": encode(forecast),
        "analysis": encode(analysis),
        "rows": [{key: value for key, value in encode(row).items() if key != "documents"} for row in rows],
    }
    embedded = json.dumps(data, separators=(",", ":"), sort_keys=True).replace("<", "\\u003c")
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            '<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE}</style></head>",
            "<body>",
            *body,
            f'<script type="application/json" id="pmerge-data">{embedded}</script>',
            "</body>",
            "</html>",
            "",
        ]
    )


def label_of(evaluator: str) -> str:
    """An evaluator in words: the user's command, or the text of the built-in one."""
    try:
        described = parse_json(evaluator)
    except ValueError:
        return evaluator
    return f"the built-in evaluator on {described['text']}" if isinstance(described, dict) and "text" in described else evaluator


def _evaluated(found: Evidence, forecast: Forecast) -> str:
    return f"{len(found.rows)} evaluations of {forecast.metric} by {label_of(forecast.evaluator)}."


def _cards(found: Evidence, forecast: Forecast, analysis: Analysis | None) -> list[str]:
    cards = []
    newest = found.newest
    if newest is not None:
        cards.append((f"{newest.loss:.4f}", f"newest checkpoint, step {newest.steps[0]:,.0f}"))
    best = forecast.results[0] if forecast.results else None
    choices = sum(not each.is_annealed for each in forecast.results)
    if best is not None and best.gain:
        error = f" ± {best.gain_error:.4f}" if best.gain_error is not None else ""
        tie = ", a tie" if best.is_tie else ""
        text = f"best of {choices} measured: {best.name}, gain over the newest {best.gain:+.4f}{error}{tie}"
        cards.append((f"{best.value:.4f}", text))
    for name, band in (("annealed, at equal tokens", forecast.now), ("annealed from now on", forecast.ahead)):
        if band is not None:
            cards.append((f"{band.value:.4f}", f"forecast, {name}: {_range(band)}"))
    if forecast.choice is not None:
        top = forecast.choice
        text = f"predicted gain over the fitted l(T), of {top.method} of {top.n}, one every {top.spacing:,.10g} steps"
        cards.append((f"{top.gain:+.4f}", text))
    if analysis is not None:
        cards.append((analysis.verdict.value, "by the weights alone, before any evaluation"))
    return [
        '<div class="cards">',
        *(f'<div class="card"><b>{escape(big)}</b><span>{escape(small)}</span></div>' for big, small in cards),
        "</div>",
    ]


def _range(band: Band) -> str:
    return f"{band.low:.4f} to {band.high:.4f}, step {band.step:,.0f}"


def _proposal(forecast: Forecast, command: str) -> list[str]:
    if forecast.helps is False:
        return ["<p>Merging is predicted to hurt: the newest checkpoint is the best.</p>"]
    if not command or not forecast.flat:
        return []
    low, high = forecast.flat
    return [
        f"<p>The merge to make, {low} to {high} checkpoints being within 5 % of its gain:</p>",
        f"<p><code>{' '.join(f'<span>{escape(word)}</span>' for word in command.split(' '))}</code></p>",
    ]


def _figure(panel: Panel) -> str:
    return "\n".join(
        [
            "<figure>",
            f"<h2>{escape(panel.title)}</h2>",
            panel.chart,
            f"<figcaption><p>{escape(panel.shows)}</p><p><b>Not shown:</b> {escape(panel.shows_not)}</p></figcaption>",
            "<details><summary>The numbers</summary>",
            _table(panel.header, panel.rows),
            "</details></figure>",
        ]
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    numeric = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(header))]
    lines = ["".join(f"<th>{escape(name)}</th>" for name in header)]
    for row in rows:
        lines.append(
            "".join(
                f'<td class="n">{escape(cell)}</td>' if right else f"<td>{escape(cell)}</td>"
                for cell, right in zip(row, numeric, strict=True)
            )
        )
    return '<div class="scroll"><table>' + "".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>"


def _is_number(cell: str) -> bool:
    return cell == "" or cell.lstrip("+-").rstrip("*").replace(",", "").replace(".", "", 1).replace("e-", "", 1).isdigit()


def _measured(found: Evidence, forecast: Forecast) -> list[str]:
    by_key = {row.key: row for row in found.rows}
    rows = []
    for each in forecast.results:
        row = by_key[each.key]
        steps = row.steps
        where = "" if steps is None else f"{steps[0]:,.0f}" if len(steps) == 1 else f"{steps[0]:,.0f} to {steps[-1]:,.0f}"
        gain = "" if each.gain is None else f"{each.gain:+.5f}"
        error = "" if each.gain_error is None or row.key == (found.newest.key if found.newest else "") else f"{each.gain_error:.5f}"
        rows.append(
            (each.name, str(len(row.parts)), where, f"{each.value:.5f}", gain, error, "tie" if each.is_tie else "", each.key[:12])
        )
    choices = sum(not each.is_annealed for each in forecast.results)
    sources = sorted({each.error_source for each in forecast.results if each.gain_error})
    about = f" Errors of gains are {' and '.join(sources)}." if sources else ""
    return [
        "<h3>All rows of the ledger</h3>",
        f"<p>The first is the best of {choices} on the text that chose it, which flatters it a little.{escape(about)}</p>",
        _table(("row", "N", "steps", forecast.metric, "gain over newest", "error", "", "key"), rows),
    ]


def _derived(found: Evidence, forecast: Forecast) -> list[str]:
    """Every derived number with its errors, and the weights of the rows that it is the sum of."""
    named = [("l(T)", forecast.level), ("s, per step", forecast.slope)]
    named += [(f"a, {each.spacing:,.10g} steps apart", each.a) for each in forecast.noises]
    named += [(f"forecast {name}", band.quantity) for name, band in (("now", forecast.now), ("ahead", forecast.ahead)) if band]
    known = [(name, quantity) for name, quantity in named if quantity is not None]
    if not known:
        return []
    keys = list(dict.fromkeys(chain.from_iterable(quantity.rows for _, quantity in known)))
    numbers = [(name, f"{q.value:.6g}", _optional(q.error), _optional(q.sampling), q.sampling_source) for name, q in known]
    weights = [(found.row(key).name, *(_weight(quantity, key) for _, quantity in known)) for key in keys]
    return [
        "<h3>Derived numbers</h3>",
        _table(("number", "value", "error (scatter)", "error (text)", ""), numbers),
        "<p>Each is a sum of measured losses with these weights:</p>",
        _table(("row", *(name for name, _ in known)), weights),
    ]


def _weight(quantity: Quantity, key: str) -> str:
    return f"{quantity.rows[key]:.4g}" if key in quantity.rows else ""


def _optional(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _verdict(analysis: Analysis | None) -> list[str]:
    if analysis is None:
        return []
    reasons = [*analysis.verdict.reasons, *(each.text for each in analysis.findings)]
    return [
        "<h3>By the weights alone</h3>",
        f"<p><b>{escape(analysis.verdict.value.capitalize())}.</b> {escape(analysis.verdict.formula)}</p>",
        *(f"<p>{escape(reason)}</p>" for reason in dict.fromkeys(reasons)),
    ]


def _conditions(forecast: Forecast) -> list[str]:
    if forecast.now is None:
        return []
    bands = [band.definition for band in (forecast.now, forecast.ahead) if band is not None]
    return [
        "<h3>What the forecast is, and what it rests on</h3>",
        "<ul>",
        *(f"<li>{escape(line)}</li>" for line in [*bands, *forecast.conditions]),
        "</ul>",
    ]


def _sources(sources: Mapping[str, bytes]) -> list[str]:
    rows = [(name, f"{len(content):,}", hashlib.sha256(content).hexdigest()) for name, content in sources.items()]
    return [
        "<h3>Made from</h3>",
        _table(("file", "bytes", "sha256"), rows),
        f'<p class="soft">pmerge {__version__}. The numbers are embedded in this file as JSON, under the id pmerge-data.</p>',
    ]
