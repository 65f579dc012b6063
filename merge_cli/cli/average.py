"""`pmerge average`: plan, show the plan, run it, show the result."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from merge_cli.cli import console
from merge_cli.cli.options import DryRun, Given, Json, Quiet, flags, takes
from merge_cli.errors import UsageError
from merge_cli.request.amounts import parse_size
from merge_cli.request.spec import MergeSpec, Processes, RunConfig, Selection, lay_over

if TYPE_CHECKING:
    from merge_cli.cli.workers import Workers
    from merge_cli.features.average import AveragePlan, AverageResult


@takes(*flags(Selection, skip=["at"]), *flags(MergeSpec), *flags(RunConfig), *flags(Processes))
def average_command(
    checkpoints: Annotated[
        list[str], typer.Argument(help="One run folder, or checkpoint folders and .safetensors files; PATH:WEIGHT for weights.")
    ],
    output: Annotated[str | None, typer.Option("-o", "--output", metavar="PATH", help="Folder of the result.")] = None,
    *,
    given: Given,
    storage_bandwidth: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Bytes per second, as 5GB, for the time that --dry-run estimates. [default: measured]"),
    ] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Average checkpoints into a new one, whose path is printed.

    Example:  pmerge average ckpt_*/ --method ema
    """
    from merge_cli.cli.show import finish_dry_run, plan_as_json, result_as_json, show_plan, show_result, warn_of_nonfinite
    from merge_cli.cli.weights import split_weights
    from merge_cli.cli.workers import Workers, errors_reported_once, is_to_print, prefix_lines_of, this_process
    from merge_cli.features.average import plan_average
    from merge_cli.ranks.launcher import WORKER

    me = this_process(lay_over(Processes(), given))
    muted, quiet = quiet, prefix_lines_of(me, quiet)
    paths, weights = split_weights(checkpoints)
    if weights is not None:
        if "weights" in given:
            raise UsageError("weights are given twice: by --weights and by PATH:WEIGHT", hint="use one of them")
        given["weights"] = weights
    bandwidth = None if storage_bandwidth is None else parse_size(storage_bandwidth, "--storage-bandwidth")
    if bandwidth is not None and not dry_run:
        raise UsageError("--storage-bandwidth is for the estimate of --dry-run", hint="for the estimate alone:  --dry-run")
    is_first = me.source == WORKER and not me.rank and not dry_run
    with Workers(me.world_size if is_first else 1) as others:  # they start while this process plans
        with errors_reported_once(me), console.doing("reading headers", quiet):
            plan = plan_average(paths, output, rank=me, typed=sys.argv[1:], **given)
            if plan.findings and not dry_run:
                raise plan.findings[0]
        if not quiet:
            show_plan(plan)
        if dry_run:
            if me.rank:
                console.err(f"the plan is shown by rank 0 (rank from {me.source}); to run alone:  --world-size 1")
            else:
                finish_dry_run(plan, as_json, quiet, bandwidth)
            raise typer.Exit(max((finding.exit_code for finding in plan.findings[:1]), default=0))
        result = _run(plan, quiet, others)
        if not quiet:
            show_result(plan, result)
        elif plan.rank.rank and not muted and result.has_published:
            console.err(f"finished last and published {plan.output}")
            warn_of_nonfinite(result)
        elif plan.rank.rank and plan.rank.source != WORKER and not muted and result.already_published:
            console.err("the result exists already; its path is on the stdout of rank 0. To run alone:  --world-size 1")
        if not is_to_print(me, plan.output, result.has_published, result.already_published):
            return
        if as_json:
            console.out_json({**plan_as_json(plan), **result_as_json(result)})
        else:
            console.out(result.output)


def _run(plan: AveragePlan, quiet: bool, others: Workers) -> AverageResult:
    """Do the work: alone, or as one rank of several; the first of several workers waits for the
    others.
    """
    from merge_cli.cli.workers import run_with
    from merge_cli.features.average import run_average

    with console.ProgressLine(quiet) as progress:

        def run(again: bool) -> AverageResult:
            now = replace(plan, run=replace(plan.run, restart=plan.run.restart and not again))
            return run_average(now, on_progress=progress.update, command=sys.argv)

        result, is_for_others = run_with(others, run)
    if is_for_others:  # the dead one may not have printed the path
        result = replace(result, has_published=result.has_published or result.already_published)
    return result
