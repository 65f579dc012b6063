"""`pmerge sweep`: plan many averages of one run, show the plan, make them all, list them."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from merge_cli.cli import console
from merge_cli.cli.lists import read_list, split_list
from merge_cli.cli.options import Checkpoints, DryRun, Given, Json, Quiet, flags, takes
from merge_cli.errors import UsageError, first_ten
from merge_cli.request.amounts import parse_whole
from merge_cli.request.methods import DEFAULT
from merge_cli.request.spec import MergeSpec, Processes, RunConfig, Selection, lay_over

if TYPE_CHECKING:
    from merge_cli.cli.workers import Workers
    from merge_cli.features.sweep import SweepResult
    from merge_cli.features.sweep_plan import SweepPlan


@takes(
    *flags(Selection, only=["tokens_per_step", "incomplete", "allow_merged"]),
    *flags(MergeSpec, only=["dtype", "accumulate", "training_state"]),
    *flags(RunConfig),
    *flags(Processes),
)
def sweep_command(
    checkpoints: Checkpoints,
    output: Annotated[
        str | None, typer.Option("-o", "--output", metavar="PATH", help="Folder in which each result gets its own.")
    ] = None,
    *,
    method: Annotated[
        str | None, typer.Option(metavar="LIST", help="As sma,wma,ema:0.1,decay:1-sqrt,power:0.2. [default: sma]")
    ] = None,
    last: Annotated[str | None, typer.Option(metavar="LIST", help="Only the newest N, for each N of 3,6,10.")] = None,
    every: Annotated[str | None, typer.Option(metavar="LIST", help="One every V steps, for each V of 1000,2k.")] = None,
    at: Annotated[str | None, typer.Option(metavar="LIST", help="Ending at the checkpoint of each step of 8000,10000.")] = None,
    list_file: Annotated[
        str | None, typer.Option("--list", metavar="FILE", help="A JSON array of objects with options of average.")
    ] = None,
    given: Given,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make many averages of one run from one read of it; their paths are printed, and listed in
    sweep.json.

    Example:  pmerge sweep run/ -o sweep --method sma,ema:0.1,ema:0.2 --last 3,6,10
    """
    from merge_cli.cli.workers import Workers, errors_reported_once, is_to_print, prefix_lines_of, this_process
    from merge_cli.features.sweep import as_dict
    from merge_cli.features.sweep_plan import plan_sweep
    from merge_cli.ranks.launcher import WORKER

    me = this_process(lay_over(Processes(), given))
    muted, quiet = quiet, prefix_lines_of(me, quiet)
    if list_file is None:
        method = method or DEFAULT
    elif method is None and (last or every or at):
        raise UsageError(
            "with --list, --last, --every and --at are axes of a grid that needs --method", hint="--method sma,ema:0.1"
        )
    is_first = me.source == WORKER and not me.rank and not dry_run
    with Workers(me.world_size if is_first else 1) as others:  # they start while this process plans
        with errors_reported_once(me), console.doing("reading headers", quiet):
            plan = plan_sweep(
                checkpoints,
                output,
                methods=split_list("--method", method),
                last=[parse_whole(each, "--last") for each in split_list("--last", last)],
                every=split_list("--every", every),
                at=split_list("--at", at),
                combinations=read_list(list_file) if list_file is not None else (),
                rank=me,
                typed=sys.argv[1:],
                **given,
            )
            if plan.findings and not dry_run:
                raise plan.findings[0]
        if not quiet:
            _show_plan(plan)
        if dry_run:
            if me.rank:
                console.err(f"the plan is shown by rank 0 (this is from {me.source}); to be alone:  --world-size 1")
            else:
                _finish_dry_run(plan, as_json, quiet)
            raise typer.Exit(max((finding.exit_code for finding in plan.findings[:1]), default=0))
        result, is_for_others = _run(plan, quiet, others)
    complete = [path for path in result.outputs if path not in result.missing]
    paths = [path for path in complete if is_for_others or is_to_print(me, path, path in result.published, True)]
    if not quiet:
        _show_result(plan, result)
    elif not muted and result.published:
        console.err(f"has published {console.names(list(map(str, result.published)))}")
    elif not muted and me.source != WORKER and not result.missing:
        console.err("the results exist already; their paths are on the stdout of rank 0. To be alone:  --world-size 1")
    if not as_json:
        for path in paths:
            console.out(path)
    elif paths and not result.missing:
        console.out_json({**as_dict(plan), **_costs(plan), "seconds": result.seconds, "files_reused": result.reused})


def _run(plan: SweepPlan, quiet: bool, others: Workers) -> tuple[SweepResult, bool]:
    """Do the work: alone, or as one rank of several; the first of several workers waits for the
    others.
    """
    from merge_cli.cli.workers import run_with
    from merge_cli.features.sweep import run_sweep

    with console.ProgressLine(quiet) as progress:

        def run(again: bool) -> SweepResult:
            now = replace(plan, run=replace(plan.run, restart=plan.run.restart and not again))
            return run_sweep(now, on_progress=progress.update, command=sys.argv)

        return run_with(others, run)


def _show_plan(plan: SweepPlan) -> None:
    done = {each.combination.name for each in plan.outputs if each.is_done}
    made, used = console.count(len(plan.outputs), "output"), console.count(len(plan.inputs), "checkpoint")
    console.err(f"sweep of {made} from {used} -> {plan.output}")
    if not plan.rank.is_alone:
        console.err(f"  {plan.rank} (from {plan.rank.source}): they share the pieces of all outputs")
    rows = []
    for each in plan.outputs:
        steps = ["-" if candidate.step is None else str(candidate.step) for candidate in each.candidates]
        values = [f"{value:.4f}" for value in each.coefficients.values]
        rows.append(
            (
                each.combination.name,
                len(steps),
                steps[0] if len(steps) == 1 else f"{steps[0]}..{steps[-1]}",
                f"{each.coefficients.effective_sample_size:.2f}",
                f"{each.coefficients.mean_age():.2f}",
                " ".join(values if len(values) <= 6 else [*values[:2], "...", *values[-3:]]),
                "done already" if each.combination.name in done else "",
            )
        )
    header = ("output", "N", "steps", "effective", "mean age", "coefficients", "")
    console.err_table(header, rows, optional=("coefficients", "steps"))
    console.err("  effective: a plain average of so many has as little noise; mean age: checkpoints behind the newest, on average")
    for same, name in plan.same_as:
        console.err(f"  {same.name} is the same as {name}, and is not written")
    for line in first_ten([f"{skipped.name} is skipped: {reason}" for skipped, reason in plan.skipped], "such combinations"):
        console.err(f"  {line}")
    for number, group in enumerate(plan.groups, 1):
        first = f"group {number} of {len(plan.groups)} (another layout): " if len(plan.groups) > 1 else ""
        console.err(
            f"  {first}{console.count(len(group.outputs), 'output')} from {console.count(len(group.merge.inputs), 'checkpoint')}:"
            f" read {console.human_bytes(group.bytes_to_read)} (separate runs: {console.human_bytes(group.bytes_read_separately)}),"
            f" write {console.human_bytes(group.merge.bytes_to_write)}, buffers {console.human_bytes(group.budget.bytes)}"
            f" ({console.count(group.budget.workers, 'thread')}), device {plan.device.name},"
            f" kernel {plan.kernel}"
        )
    for note in plan.notes:
        console.err(f"note: {note}")
    for warning in plan.warnings:
        console.err(f"warning: {warning}")


def _finish_dry_run(plan: SweepPlan, as_json: bool, quiet: bool) -> None:
    from merge_cli.features.sweep import as_dict

    if not (as_json and quiet):
        for finding in plan.findings:
            console.print_error(finding, "would fail")
    if not quiet:
        console.dry_run_ended(plan.findings)
    if as_json:
        console.out_json({**as_dict(plan), **_costs(plan)})
    else:
        for each in plan.outputs:
            console.out(each.path)


def _show_result(plan: SweepPlan, result: SweepResult) -> None:
    moved = result.statistics.bytes_read + result.statistics.bytes_written
    done = f"done in {result.seconds:.1f} s, {moved / max(result.seconds, 1e-9) / 1e9:.2f} GB/s"
    if result.missing:
        left = f"{sum(result.missing.values())} files of {len(result.missing)} outputs are with other ranks"
        console.err(f"{done}; {plan.rank} has finished its part; {left}, the last of which publishes")
    else:
        console.err(f"{done}; {console.count(len(result.outputs), 'output')} listed in {result.report}")
    for note in result.statistics.notes:
        console.err(f"note: {note}")
    if result.reused:
        console.err(f"{console.count(result.reused, 'file')} of an earlier run kept")


def _costs(plan: SweepPlan) -> dict[str, Any]:
    return {
        "bytes_to_read": plan.bytes_to_read,
        "bytes_read_separately": sum(group.bytes_read_separately for group in plan.groups),
        "bytes_to_write": plan.bytes_to_write,
        "groups": [[each.combination.name for each in group.outputs] for group in plan.groups],
        "memory_bytes": max((group.budget.bytes for group in plan.groups), default=0),
        "device": plan.device.name,
        "kernel": plan.kernel,
        "device_memory_bytes": max((group.budget.device_bytes for group in plan.groups), default=0),
        "notes": list(plan.notes),
        "warnings": list(plan.warnings),
        "findings": [str(finding) for finding in plan.findings],
    }
