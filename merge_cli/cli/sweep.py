"""`pmerge sweep`: plan many averages of one run, show the plan, make them all, list them."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from merge_cli.cli import console
from merge_cli.cli.options import Checkpoints, DryRun, Given, Json, Quiet, flags, takes
from merge_cli.errors import InputError, UsageError, first_ten
from merge_cli.request.amounts import parse_whole
from merge_cli.request.spec import MergeSpec, RunConfig, Selection
from merge_cli.stores.store import as_path

if TYPE_CHECKING:
    from merge_cli.features.sweep import SweepPlan, SweepResult


@takes(
    *flags(Selection, only=["tokens_per_step"]),
    *flags(MergeSpec, only=["dtype", "accumulate", "training_state"]),
    *flags(RunConfig),
)
def sweep_command(
    checkpoints: Checkpoints,
    output: Annotated[str, typer.Option("-o", "--output", metavar="PATH", help="Folder in which each result gets its own.")],
    *,
    method: Annotated[str | None, typer.Option(metavar="LIST", help="As sma,wma,ema:0.1,decay:1-sqrt,power:0.2.")] = None,
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
    """Make many averages of one run from one read of it; their paths are printed, and listed in sweep.json.

    Example:  pmerge sweep run/ -o sweep --method sma,ema:0.1,ema:0.2 --last 3,6,10
    """
    from merge_cli.features.sweep import as_dict, plan_sweep, run_sweep
    from merge_cli.ranks.launcher import ARRAY, find_rank

    me = find_rank(os.environ)
    if not me.is_alone and me.source != ARRAY:  # the tasks of an array may each make a sweep of their own
        unset = ["env", *(part for name in me.variables() for part in ("-u", name))]
        raise UsageError(
            f"a sweep is made by one process, and this is {me} (from {me.source})",
            hint=f"start one; where no launcher did:  {shlex.join([*unset, 'pmerge', *sys.argv[1:]])}",
        )
    if list_file is None and method is None:
        raise UsageError("a sweep needs --method or --list", hint="--method sma,wma,ema:0.1,ema:0.2 --last 6,10")
    if method is None and (last or every or at):
        raise UsageError("--last, --every and --at are axes of a grid, which needs --method", hint="--method sma,ema:0.1")
    plan = plan_sweep(
        checkpoints,
        output,
        methods=_split("--method", method),
        last=[parse_whole(each, "--last") for each in _split("--last", last)],
        every=_split("--every", every),
        at=_split("--at", at),
        combinations=_read_list(list_file) if list_file is not None else (),
        **given,
    )
    if not quiet:
        _show_plan(plan)
    if dry_run:
        _finish_dry_run(plan, as_json, quiet)
        return
    with console.ProgressLine(quiet) as progress:
        result = run_sweep(plan, on_progress=progress.update, command=sys.argv)
    if not quiet:
        _show_result(plan, result)
    if as_json:
        console.out_json({**as_dict(plan), **_costs(plan), "seconds": result.seconds, "files_reused": result.reused})
    else:
        for path in result.outputs:
            console.out(path)


def _split(option: str, text: str | None) -> list[str]:
    parts = [part.strip() for part in text.split(",")] if text is not None else []
    if not all(parts):
        raise UsageError(f"{option} cannot be {text!r}", details=["expected  values with commas between them"])
    return parts


def _read_list(path: str) -> list[Any]:
    try:
        entries = json.loads(Path(as_path(path)).read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", hint=f"ls -l {path}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(entries, list) or not entries:
        example = '[{"method": "ema", "alpha": 0.1, "last": 6}, {"method": "sma", "last": 10, "at": 8000}]'
        raise UsageError(f"{path} does not hold a JSON array of objects", hint=f"as  {example}")
    return entries


def _show_plan(plan: SweepPlan) -> None:
    done = {each.combination.name for each in plan.outputs if each.is_done}
    console.say(f"sweep of {len(plan.outputs)} outputs from {len(plan.inputs)} checkpoints -> {plan.output}")
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
    for line in console.table(header, rows):
        console.say(line)
    for same, name in plan.same_as:
        console.say(f"  {same.name} is the same as {name}, and is not written")
    for line in first_ten([f"{skipped.name} is skipped: {reason}" for skipped, reason in plan.skipped], "such combinations"):
        console.say(f"  {line}")
    for number, group in enumerate(plan.groups, 1):
        first = f"group {number} of {len(plan.groups)} (another layout): " if len(plan.groups) > 1 else ""
        console.say(
            f"  {first}K = {len(group.outputs)} outputs from N = {len(group.merge.inputs)} checkpoints:"
            f" read {console.human_bytes(group.bytes_to_read)} (separate runs: {console.human_bytes(group.bytes_read_separately)}),"
            f" write {console.human_bytes(group.merge.bytes_to_write)}, buffers {console.human_bytes(group.budget.bytes)}"
            f" ({group.budget.workers} threads), device {plan.device.name}"
        )
    for note in plan.notes:
        console.say(f"note: {note}")
    for warning in plan.warnings:
        console.say(f"warning: {warning}")


def _finish_dry_run(plan: SweepPlan, as_json: bool, quiet: bool) -> None:
    from merge_cli.features.sweep import as_dict

    if not (as_json and quiet):
        for finding in plan.findings:
            console.print_error(finding, "finding")
    if not quiet:
        fine = "" if plan.findings else "; nothing that headers show would stop this run (values were not read)"
        console.say(f"dry run: nothing was written{fine}")
    if as_json:
        console.out_json({**as_dict(plan), **_costs(plan)})
    else:
        for each in plan.outputs:
            console.out(each.path)


def _show_result(plan: SweepPlan, result: SweepResult) -> None:
    moved = result.statistics.bytes_read + result.statistics.bytes_written
    console.say(
        f"done in {result.seconds:.1f} s, {moved / max(result.seconds, 1e-9) / 1e9:.2f} GB/s;"
        f" {len(result.outputs)} outputs are listed in {result.report}"
    )
    for note in result.statistics.notes:
        console.say(f"note: {note}")
    if result.reused:
        console.say(f"{result.reused} files had been finished by an earlier run and were kept")


def _costs(plan: SweepPlan) -> dict[str, Any]:
    return {
        "bytes_to_read": plan.bytes_to_read,
        "bytes_read_separately": sum(group.bytes_read_separately for group in plan.groups),
        "bytes_to_write": plan.bytes_to_write,
        "groups": [[each.combination.name for each in group.outputs] for group in plan.groups],
        "memory_bytes": max((group.budget.bytes for group in plan.groups), default=0),
        "device": plan.device.name,
        "device_memory_bytes": max((group.budget.device_bytes for group in plan.groups), default=0),
        "notes": list(plan.notes),
        "warnings": list(plan.warnings),
        "findings": [str(finding) for finding in plan.findings],
    }
