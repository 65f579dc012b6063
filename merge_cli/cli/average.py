"""`pmerge average`: plan, show the plan, run it, show the result."""

from __future__ import annotations

import math
import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from merge_cli.cli import console
from merge_cli.cli.options import DryRun, Given, Json, Quiet, flags, takes
from merge_cli.errors import PmergeError, UsageError
from merge_cli.names import MANIFEST
from merge_cli.request.amounts import parse_size
from merge_cli.request.spec import MergeSpec, Processes, RunConfig, Selection, lay_over

if TYPE_CHECKING:
    from merge_cli.cli.workers import Workers
    from merge_cli.features.average import AveragePlan, AverageResult
    from merge_cli.ranks.launcher import Rank


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
    from merge_cli.cli.workers import Workers, end_with_parent
    from merge_cli.features.average import plan_average
    from merge_cli.ranks.launcher import ARRAY, WORKER

    me = _rank(lay_over(Processes(), given))
    if me.source == WORKER and me.rank:
        end_with_parent()
    muted = quiet
    if me.rank and me.source != ARRAY:  # one rank reports for all; each task of an array has a log of its own
        console.speak_as(f"worker {me.rank}: " if me.source == WORKER else f"{me}: ")
        quiet = True
    paths, weights = split_weights(checkpoints)
    if weights is not None:
        if "weights" in given:
            raise UsageError("weights are given twice: by --weights and by PATH:WEIGHT", hint="use one of them")
        given["weights"] = weights
    bandwidth = None if storage_bandwidth is None else parse_size(storage_bandwidth, "--storage-bandwidth")
    if bandwidth is not None and not dry_run:
        raise UsageError("--storage-bandwidth is for the estimate of --dry-run", hint="add --dry-run")
    is_first = me.source == WORKER and not me.rank and not dry_run
    with Workers(me.world_size if is_first else 1) as others:  # they start while this process plans
        try:
            plan = plan_average(paths, output, rank=me, **given)
        except PmergeError as error:
            if me.source == WORKER and me.rank:
                raise typer.Exit(error.exit_code) from error  # the first worker meets the same error, and reports it
            raise
        if not quiet:
            show_plan(plan)
        if dry_run:
            if me.rank:
                console.say(f"the plan is shown by rank 0 (this is from {me.source}); to be alone:  --world-size 1")
            else:
                finish_dry_run(plan, as_json, quiet, bandwidth)
            return
        result = _run(plan, quiet, others)
        if not quiet:
            show_result(plan, result)
        elif plan.rank.rank and not muted and getattr(result, "has_published", False):
            console.say(f"came last and has published {plan.output}")
            warn_of_nonfinite(result)
        elif plan.rank.rank and plan.rank.source != WORKER and not muted and getattr(result, "stood", False):
            console.say("the result stands already; its path is on the stdout of rank 0. To be alone:  --world-size 1")
        if not _is_to_tell(plan, result):
            return
        if as_json:
            console.out_json({**plan_as_json(plan), **result_as_json(result)})
        else:
            console.out(result.output)


def _rank(processes: Processes) -> Rank:
    """This process, as its launcher or the options describe it."""
    from merge_cli.cli.workers import count_workers
    from merge_cli.ranks.launcher import WORKER, Rank, find_rank

    me = find_rank(os.environ, processes.rank, processes.world_size)
    count = count_workers(processes.workers, me)
    return Rank(0, count, 0, count, WORKER) if count > 1 and me.source != WORKER else me


def _run(plan: AveragePlan, quiet: bool, others: Workers) -> AverageResult:
    """Do the work: alone, or as one rank of several; the first of several workers waits for the others."""
    from merge_cli.features.average import run_average
    from merge_cli.features.share import run_share

    with console.ProgressLine(quiet) as progress:
        if plan.rank.is_alone:
            return run_average(plan, on_progress=progress.update, command=sys.argv)
        result = run_share(plan, on_progress=progress.update, command=sys.argv)
        if failed := others.wait():  # what they had begun is free again
            result = run_share(replace(plan, run=replace(plan.run, restart=False)), on_progress=progress.update, command=sys.argv)
            result = replace(result, has_published=result.has_published or result.stood)  # the dead one may not have told the path
            for line in failed:
                console.say(f"warning: {line}; its work was done by this one")
        return result


def _is_to_tell(plan: AveragePlan, result: AverageResult) -> bool:
    """Whether the path belongs on this process's stdout: on that of one rank only, so that a script reads one line.

    It is the rank that published; where the result stood before they were started, it is rank 0, or each task of an array.
    """
    from merge_cli.features.share import ShareResult
    from merge_cli.ranks.launcher import ARRAY
    from merge_cli.system.process import process_start

    if not isinstance(result, ShareResult) or result.has_published:
        return True
    published = (plan.output / MANIFEST).stat().st_mtime if result.stood else math.inf
    return (plan.rank.rank == 0 or plan.rank.source == ARRAY) and published < process_start()
