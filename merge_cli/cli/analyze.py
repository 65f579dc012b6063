"""`pmerge analyze`: the weights of a run's checkpoints, without an evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from merge_cli.cli import console
from merge_cli.cli.options import Checkpoints, DryRun, Given, Json, Quiet, flags, takes
from merge_cli.request.spec import MergeSpec, RunConfig, Selection

if TYPE_CHECKING:
    from merge_cli.features.analyze import AnalysisPlan
    from merge_cli.trajectory.analysis import Analysis, Spread

_MOST_LAGS = 8


@takes(
    *flags(Selection, skip=["at", "base"]),
    *flags(MergeSpec, only=["method", "include", "exclude"]),
    *flags(RunConfig, only=["memory", "threads", "chunk_size", "direct", "max_header"]),
)
def analyze_command(
    checkpoints: Checkpoints,
    output: Annotated[
        str | None, typer.Option("-o", "--output", metavar="PATH", help="Folder of analysis.json (RUN.pmerge).")
    ] = None,
    *,
    given: Given,
    log: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Training log with learning rates, CSV or trainer_state.json. [default: the newest's]"),
    ] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Judge by weights and steps alone whether merging helps: distances, spread by layer, warnings.
    One read of all checkpoints, on the CPU.

    Example:  pmerge analyze run/ --last 16
    """
    from merge_cli.features.analyze import plan_analysis, run_analysis
    from merge_cli.trajectory.records import encode

    plan = plan_analysis(checkpoints, output=output, log=log, **given)
    if not quiet:
        _show_plan(plan)
    if dry_run:
        return
    with console.ProgressLine(quiet) as progress:
        analysis = run_analysis(plan, on_progress=progress.update)
    if as_json:
        console.out_json(encode(analysis))
        return
    for line in _lines(analysis):
        console.out_text(line)
    if not quiet:
        console.err(f"analysis: {plan.folder};  next:  pmerge evaluate {checkpoints[0]} --text held_out.txt")


def _show_plan(plan: AnalysisPlan) -> None:
    console.err(
        f"analysis of {len(plan.candidates)} checkpoints: read {console.human_bytes(plan.bytes_to_read)},"
        f" buffers {console.human_bytes(plan.budget.bytes)} ({plan.budget.workers} threads)"
    )
    for note in plan.notes:
        console.err(f"note: {note}")
    for warning in plan.warnings:
        console.err(f"warning: {warning}")


def _lines(analysis: Analysis) -> list[str]:
    shape, whole = analysis.geometry, analysis.whole
    lines = [
        f"merging {len(analysis.members)} checkpoints by {analysis.method}: {analysis.verdict.value}",
        f"  {analysis.verdict.formula}",
    ]
    lines += [f"  {reason}" for reason in analysis.verdict.reasons if reason not in [each.text for each in analysis.findings]]
    lines += [f"{each.name}: {each.text}" for each in analysis.findings]
    numbers = [
        ("straightness", shape.straightness, f"1: random walk, {len(analysis.members) - 1}: straight line, below 1: oscillation"),
        ("cos1, cos2", (shape.cos1, shape.cos2), "mean cosine of moves one and two apart"),
        ("shrink", shape.shrink, "last move over first: falls with the learning rate"),
        ("exponent", shape.exponent, "growth of the distances below with the lag: 1 random walk, 2 straight line, 0 saturated"),
        ("|merge - last|", whole.merge_to_newest, "over the norm of the newest"),
        ("spread", whole.spread, "of the checkpoints around the merge, over the same norm"),
        ("effective", analysis.effective_sample_size, "checkpoints' worth of averaging"),
    ]
    lines += ["geometry:", *console.table(("", "", ""), [(name, _number(value), about) for name, value, about in numbers])[1:]]
    lags = shape.variogram[:: max(1, -(-len(shape.variogram) // _MOST_LAGS))]
    unit = "checkpoints" if analysis.unit == "positions" else "steps"
    lines += [f"half the mean squared distance, by lag in {unit}:"]
    lines += console.table(("lag", "gamma", "pairs"), [(f"{each.lag:,.10g}", f"{each.gamma:.5g}", each.pairs) for each in lags])
    lines += ["spread by kind:", *console.table(("kind", "weights", "spread", "|merge - last|"), map(_kind, analysis.kinds))]
    return [*lines, "none of this is a gain or a best N: distances cannot give them;  pmerge evaluate does"]


def _kind(each: Spread) -> tuple[str, str, str, str]:
    return each.kind, f"{each.num_elements:,}", _number(each.spread), _number(each.merge_to_newest)


def _number(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(_number, value))
    return f"{value:.4g}" if isinstance(value, float) else "-"
