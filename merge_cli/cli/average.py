"""`pmerge average`: plan, show the plan, run it, say what was done."""

from __future__ import annotations

import math
import os
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from merge_cli.cli import console
from merge_cli.errors import PmergeError, UsageError, first_ten
from merge_cli.names import MANIFEST

if TYPE_CHECKING:
    from merge_cli.cli.workers import Workers
    from merge_cli.features.average import AveragePlan, AverageResult

_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([kMGT]?)(i?)B?\s*$", re.IGNORECASE)


def parse_size(text: str | None, option: str) -> int | None:
    """Bytes of "2GiB" (binary), "5GB" (decimal) or a plain number. Raises UsageError."""
    if text is None:
        return None
    match = _SIZE.match(text)
    if not match or (match[3] and not match[2]):
        raise UsageError(f"{option} cannot be {text!r}", details=["expected  a size such as 2GiB, 500MB or 1000000"])
    base = 1024 if match[3] else 1000
    size = int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))
    if size <= 0:
        raise UsageError(f"{option} must be more than 0 bytes")
    return size


def average_command(
    checkpoints: Annotated[
        list[str],
        typer.Argument(help="Checkpoint folders, .safetensors files, or one run folder; PATH:WEIGHT for weights."),
    ],
    output: Annotated[str | None, typer.Option("-o", "--output", metavar="PATH", help="Where the result goes.")] = None,
    method: Annotated[str | None, typer.Option(help="sma, wma, ema, decay, power or weights (default sma).")] = None,
    alpha: Annotated[float | None, typer.Option(help="ema: share of each newer checkpoint (0.2).")] = None,
    half_life: Annotated[float | None, typer.Option(help="ema: steps after which a weight has halved.")] = None,
    shape: Annotated[str | None, typer.Option(help="decay: linear, 1-sqrt, cosine, exponential or inverse-sqrt (1-sqrt).")] = None,
    floor: Annotated[float | None, typer.Option(help="decay: the share of the learning rate that remains (0).")] = None,
    sigma_rel: Annotated[float | None, typer.Option(help="power: relative width (0.1).")] = None,
    weights: Annotated[str | None, typer.Option(help="weights: numbers in the order given, as 0.2,0.3,0.5.")] = None,
    normalize: Annotated[bool, typer.Option("--normalize", help="weights: divide them by their sum.")] = False,
    order: Annotated[str, typer.Option(help="step, given (as typed, oldest first) or mtime.")] = "step",
    last: Annotated[int | None, typer.Option(help="Only the newest N.")] = None,
    every: Annotated[str | None, typer.Option(metavar="V", help="One every V steps (500, 2k), back from the newest.")] = None,
    from_step: Annotated[str | None, typer.Option("--from", metavar="STEP", help="From this step on.")] = None,
    to_step: Annotated[str | None, typer.Option("--to", metavar="STEP", help="Up to and including this step.")] = None,
    before: Annotated[str | None, typer.Option(metavar="STEP", help="Before this step (a loss spike).")] = None,
    tokens_per_step: Annotated[
        str | None,
        typer.Option(
            metavar="N", help="As 4M: amounts above with a suffix (--every 8B) are then tokens; plain numbers stay steps."
        ),
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="PATH", help="Whose layout and side files are kept (the last in order).")
    ] = None,
    dtype: Annotated[str, typer.Option(help="keep, bf16, fp16 or fp32.")] = "keep",
    accumulate: Annotated[str, typer.Option(help="auto, fp32 or fp64 (auto: fp32 where that is exact).")] = "auto",
    include: Annotated[list[str] | None, typer.Option(help="Average only tensors that match this glob.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Copy tensors that match this glob from the base.")] = None,
    int_policy: Annotated[str, typer.Option(help="Integers that differ: error, or newest.")] = "error",
    allow_nonfinite: Annotated[bool, typer.Option("--allow-nonfinite", help="Go on at NaN and Inf, and report.")] = False,
    shard_size: Annotated[str | None, typer.Option(help="Split anew, as 5GB (default: the base's shards).")] = None,
    requantize: Annotated[bool, typer.Option("--requantize", help="Quantise the result as the base is (default: bf16).")] = False,
    device: Annotated[str, typer.Option(help="auto (a GPU where it is measured to be faster), cpu, cuda or cuda:K.")] = "auto",
    memory: Annotated[str, typer.Option(help="Bound on the buffers.")] = "2GiB",
    device_memory: Annotated[str | None, typer.Option(help="Bound on a GPU's buffers (2GiB, at most 3/4 of what is free).")] = None,
    threads: Annotated[int | None, typer.Option(min=1, max=256, help="Worker threads (the cores, 2 to 8).")] = None,
    chunk_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="What is read at once, as 4MiB (chosen by the filesystem).")
    ] = None,
    direct: Annotated[str, typer.Option(help="Read past the page cache (O_DIRECT): auto, on or off.")] = "auto",
    workers: Annotated[str, typer.Option(metavar="N", help="Processes on this machine: a number, or auto.")] = "1",
    rank: Annotated[int | None, typer.Option(metavar="R", help="This process's number among several that make one result.")] = None,
    world_size: Annotated[int | None, typer.Option(metavar="W", help="How many they are (both: from the launcher).")] = None,
    storage_bandwidth: Annotated[
        str | None, typer.Option(help="Bytes per second, as 5GB, for the time that --dry-run estimates (measured).")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and what would stop it; write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing result, at the end.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Throw away what an unfinished run left.")] = False,
    verify_resume: Annotated[bool, typer.Option("--verify-resume", help="Read finished files again before trusting them.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only errors on stderr.")] = False,
) -> None:
    """Average checkpoints into a new one, whose path is printed.

    Example:  pmerge average ckpt_*/ --method ema
    """
    from merge_cli.cli.workers import Workers, end_with_parent, parse_workers
    from merge_cli.features.average import plan_average
    from merge_cli.ranks.launcher import ARRAY, WORKER, Rank, find_rank

    me = find_rank(os.environ, rank, world_size)
    num_workers = parse_workers(workers, me)
    if me.source == WORKER:
        end_with_parent()
    elif num_workers > 1:
        me = Rank(0, num_workers, 0, num_workers, WORKER)
    muted = quiet
    if me.rank and me.source != ARRAY:  # one rank talks for all; each task of an array has a log of its own
        console.speak_as(f"worker {me.rank}: " if me.source == WORKER else f"{me}: ")
        quiet = True
    paths, typed = _weighted_paths(checkpoints)
    if weights is not None:
        if typed is not None:
            raise UsageError("weights are given twice: by --weights and by PATH:WEIGHT", hint="use one of them")
        typed = _parse_weights(weights)
    if typed is not None and method not in (None, "weights"):
        raise UsageError(f"--method {method} does not take weights", hint="leave --method out, or say --method weights")
    bandwidth = parse_size(storage_bandwidth, "--storage-bandwidth")
    if bandwidth is not None and not dry_run:
        raise UsageError("--storage-bandwidth is for the estimate of --dry-run", hint="add --dry-run")
    is_first = me.source == WORKER and not me.rank and not dry_run
    with Workers(me.world_size if is_first else 1) as others:  # they start while this process plans
        try:
            plan = plan_average(
                paths,
                output,
                method=method or ("weights" if typed is not None else "sma"),
                alpha=alpha,
                half_life=half_life,
                shape=shape,
                floor=floor,
                sigma_rel=sigma_rel,
                weights=typed,
                normalize=normalize or None,
                order=order,
                last=last,
                every=every,
                from_step=from_step,
                to_step=to_step,
                before=before,
                tokens_per_step=parse_count(tokens_per_step),
                base=base,
                dtype=dtype,
                accumulate=accumulate,
                include=include or (),
                exclude=exclude or (),
                int_policy=int_policy,
                allow_nonfinite=allow_nonfinite,
                shard_size=parse_size(shard_size, "--shard-size"),
                requantize=requantize,
                device=device,
                memory=parse_size(memory, "--memory"),
                device_memory=parse_size(device_memory, "--device-memory"),
                threads=threads,
                chunk_size=parse_size(chunk_size, "--chunk-size"),
                direct=direct,
                overwrite=overwrite,
                restart=restart,
                verify_resume=verify_resume,
                rank=me,
            )
        except PmergeError as error:
            if me.source == WORKER and me.rank:
                raise typer.Exit(error.exit_code) from error  # the first worker meets the same error, and says it
            raise
        if not quiet:
            _show_plan(plan)
        if dry_run:
            if me.rank:
                console.say(f"the plan is shown by rank 0 (this is from {me.source}); to be alone:  --world-size 1")
            else:
                _finish_dry_run(plan, as_json, quiet, bandwidth)
            return
        result = _run(plan, quiet, others)
        if not quiet:
            _show_result(plan, result)
        elif plan.rank.rank and not muted and getattr(result, "has_published", False):
            console.say(f"came last and has published {plan.output}")
            _warn_of_nonfinite(result)
        elif plan.rank.rank and plan.rank.source != WORKER and not muted and getattr(result, "stood", False):
            console.say("the result stands already; its path is on the stdout of rank 0. To be alone:  --world-size 1")
        if not _is_to_tell(plan, result):
            return
        if as_json:
            console.out_json({**_as_json(plan), **_result_as_json(result)})
        else:
            console.out(result.output)


def _run(plan: AveragePlan, quiet: bool, others: Workers) -> AverageResult:
    """Do the work: alone, or as one rank of several; the first of several workers waits for the others."""
    from merge_cli.features.average import run_average
    from merge_cli.features.share import run_share

    with console.ProgressLine(quiet) as progress:
        if plan.rank.is_alone:
            return run_average(plan, on_progress=progress.update, command=sys.argv)
        result = run_share(plan, on_progress=progress.update, command=sys.argv)
        if failed := others.wait():  # what they had begun is free again
            result = run_share(replace(plan, restart=False), on_progress=progress.update, command=sys.argv)
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


def _weighted_paths(arguments: list[str]) -> tuple[list[str], list[float] | None]:
    """Split PATH:WEIGHT arguments; weights are None when no argument has one."""
    pairs = [argument.rpartition(":") for argument in arguments]
    weighted = [
        bool(path) and _is_float(weight) and not Path(a).exists() for a, (path, _, weight) in zip(arguments, pairs, strict=True)
    ]
    for argument, (path, _, weight), is_weighted in zip(arguments, pairs, weighted, strict=True):
        if path and not is_weighted and not Path(argument).exists() and Path(path).exists():
            raise UsageError(f"{argument}: {weight!r} is not a weight", details=["expected  PATH:WEIGHT"], hint=f"{path}:0.5")
    if not any(weighted):
        return arguments, None
    if not all(weighted):
        missing = arguments[weighted.index(False)]
        raise UsageError(f"{missing} has no weight, others have", hint=f"{missing}:0.5")
    return [path for path, _, _ in pairs], [float(weight) for _, _, weight in pairs]


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _parse_weights(text: str) -> list[float]:
    parts = text.split(",")
    if not all(_is_float(part) for part in parts):
        raise UsageError(f"--weights cannot be {text!r}", details=["expected  numbers with commas: 0.2,0.3,0.5"])
    return [float(part) for part in parts]


def parse_count(text: str | None) -> int | None:
    from merge_cli.request.amounts import parse_amount

    return None if text is None else parse_amount(text, 1, option="--tokens-per-step")


def _show_plan(plan: AveragePlan) -> None:
    merge = plan.merge
    chosen = merge.outputs[0].coefficients
    rows = [
        (
            candidate.path,
            "-" if candidate.step is None else candidate.step,
            f"{value:.4f}",
            "base" if i == merge.base else "",
        )
        for i, (candidate, value) in enumerate(zip(plan.candidates, chosen.values, strict=True))
    ]
    parameters = "".join(f" {k}={v}" for k, v in merge.spec.parameters.items() if k != "weights")
    count = f"{len(rows)} checkpoint" + ("s" if len(rows) > 1 else "")
    console.say(f"average of {count} by {merge.spec.method}{parameters} -> {plan.output}")
    if not plan.rank.is_alone:
        _show_shares(plan)
    for line in console.table(("checkpoint", "step", "coefficient", ""), rows):
        console.say(line)
    console.say(f"  effective sample size {chosen.effective_sample_size:.2f}, mean age {chosen.mean_age():.2f} intervals")
    console.say(
        f"  read {console.human_bytes(merge.bytes_to_read)}, write {console.human_bytes(merge.bytes_to_write)}"
        f" in {len(merge.files)} file{'s' if len(merge.files) > 1 else ''}, buffers {console.human_bytes(plan.budget.bytes)}"
        f" ({plan.budget.workers} threads), device {plan.device.name}"
        + (f" ({console.human_bytes(plan.budget.device_bytes)} of its memory)" if plan.device.is_accelerator else "")
    )
    side = merge.inputs[merge.base].side_files
    if side.kept or side.skipped:
        console.say(f"  kept from the base: {console.names(side.kept) or 'nothing'}")
        console.say(f"  left out: {console.names(side.skipped) or 'nothing'}")
    copied = sorted({key for file in merge.files for run in file.extents if run.is_copy for key in run.keys})
    if copied:
        console.say(f"  copied, not averaged: {len(copied)} tensors ({console.names(copied, 3)})")
    if merge.spec.dtype != "keep":
        from merge_cli.output.manifest import with_dtype

        config = merge.inputs[merge.base].config
        says_so = "; config.json says so" if with_dtype(config, "bf16") != with_dtype(config, "fp32") else ""
        console.say(f"  floats are written as {merge.spec.dtype}{says_so}")
    for note in plan.notes:
        console.say(f"note: {note}")
    for warning in plan.warnings:
        console.say(f"warning: {warning}")


def _show_shares(plan: AveragePlan) -> None:
    from merge_cli.ranks.shares import cut, shares

    pieces = cut(plan.merge.files, plan.rank.world_size)
    loads = [sum(piece.end - piece.begin for piece in share) for share in shares(pieces, plan.rank.world_size)]
    largest = max(loads) * len(loads) / max(sum(loads), 1)
    many = sum(not piece.is_whole for piece in pieces)
    console.say(
        f"  {plan.rank} (from {plan.rank.source}): {len(pieces)} pieces{f', {many} of them parts of files' if many else ''};"
        f" the largest share is {largest:.2f} x the mean"
    )


def _finish_dry_run(plan: AveragePlan, as_json: bool, quiet: bool, storage_bandwidth: int | None) -> None:
    from merge_cli.tuning.estimate import estimate

    if not (as_json and quiet):
        for finding in plan.findings:
            console.print_error(finding, "finding")
    expected = estimate(plan.merge, storage_bandwidth, device=plan.device)
    rate = console.human_bytes(expected.storage_bandwidth)
    if not quiet:
        console.say(
            f"  about {console.human_seconds(expected.seconds)}, decided by {expected.bottleneck}, at {rate}/s"
            f" {'as given' if storage_bandwidth else 'measured on the first bytes'}"
        )
        fine = "" if plan.findings else "; nothing that headers show would stop this run (values were not read)"
        console.say(f"dry run: nothing was written{fine}")
    if as_json:
        console.out_json({**_as_json(plan), "estimate": asdict(expected)})
    else:
        console.out(plan.output)


def _show_result(plan: AveragePlan, result: AverageResult) -> None:
    from merge_cli.features.share import ShareResult
    from merge_cli.ranks.launcher import WORKER

    if isinstance(result, ShareResult) and not result.has_published:
        if result.stood:
            console.say("the result stands already, complete: nothing was left to do")
        elif plan.rank.source == WORKER:
            console.say("done by all workers")
        else:
            left = f"{result.missing} of {len(plan.merge.files)} files are with other ranks, the last of which publishes"
            console.say(f"{plan.rank} has done what was there for it in {result.seconds:.1f} s; {left}")
        return
    statistics = result.statistics
    parts = {
        "reading": statistics.seconds_reading,
        "computing": statistics.seconds_computing,
        "writing": statistics.seconds_writing,
    }
    moved = statistics.bytes_read + statistics.bytes_written
    shares = ", ".join(f"{name} {100 * seconds / max(sum(parts.values()), 1e-9):.0f} %" for name, seconds in parts.items())
    console.say(
        f"done in {result.seconds:.1f} s, {moved / max(result.seconds, 1e-9) / 1e9:.2f} GB/s; most time went into"
        f" {max(parts, key=lambda name: parts[name])} ({shares})"
    )
    if statistics.requantization_error is not None:
        largest, mean = statistics.requantization_error
        console.say(f"quantising again added an error of {largest:.2%} at most, {mean:.2%} on average (relative to the magnitudes)")
    for note in statistics.notes:
        console.say(f"note: {note}")
    if result.reused:
        console.say(f"{result.reused} files had been finished by an earlier run and were kept")
    _warn_of_nonfinite(result)


def _warn_of_nonfinite(result: AverageResult) -> None:
    for line in first_ten([f"`{key}` has {count} NaN or Inf elements" for key, count in result.nonfinite.items()], "such tensors"):
        console.say(f"warning: {line}")


def _as_json(plan: AveragePlan) -> dict[str, Any]:
    merge = plan.merge
    chosen = merge.outputs[0].coefficients
    return {
        "output": str(plan.output),
        "method": merge.spec.method,
        "parameters": dict(merge.spec.parameters),
        "inputs": [
            {"path": c.path, "step": c.step, "coefficient": value} for c, value in zip(plan.candidates, chosen.values, strict=True)
        ],
        "base": plan.candidates[merge.base].path,
        "effective_sample_size": chosen.effective_sample_size,
        "mean_age": chosen.mean_age(),
        "bytes_to_read": merge.bytes_to_read,
        "bytes_to_write": merge.bytes_to_write,
        "files": len(merge.files),
        "memory_bytes": plan.budget.bytes,
        "device": plan.device.name,
        "rank": None if plan.rank.is_alone else str(plan.rank),
        "device_memory_bytes": plan.budget.device_bytes,
        "notes": list(plan.notes),
        "warnings": list(plan.warnings),
        "findings": [str(finding) for finding in plan.findings],
    }


def _result_as_json(result: AverageResult) -> dict[str, Any]:
    statistics = result.statistics
    return {
        "seconds": result.seconds,
        "seconds_reading": statistics.seconds_reading,
        "seconds_computing": statistics.seconds_computing,
        "seconds_writing": statistics.seconds_writing,
        "bytes_read": statistics.bytes_read,
        "bytes_written": statistics.bytes_written,
        "files_reused": result.reused,
        "nonfinite": result.nonfinite,
        "requantization_error": statistics.requantization_error,
        "run_notes": statistics.notes,
    }
