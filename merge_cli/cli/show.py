"""The plan and the result of an average: lines for the screen, and JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from merge_cli.cli import console, layout
from merge_cli.errors import first_ten

if TYPE_CHECKING:
    from merge_cli.features.average import AveragePlan, AverageResult


def show_plan(plan: AveragePlan) -> None:
    """The checkpoints with their coefficients, the amount of work, and the notes and warnings of
    the plan.
    """
    merge = plan.merge
    chosen = merge.outputs[0].coefficients
    folder = layout.common_folder([candidate.path for candidate in plan.candidates])
    rows = [
        (
            candidate.path.removeprefix(f"{folder}/"),
            "-" if candidate.step is None else candidate.step,
            f"{value:.4f}",
            console.bar(value, max(chosen.values)),
            "base" if i == merge.base else "",
        )
        for i, (candidate, value) in enumerate(zip(plan.candidates, chosen.values, strict=True))
    ]
    parameters = "".join(f" {k}={v}" for k, v in merge.spec.parameters.items() if not isinstance(v, list))
    console.err(f"average of {console.count(len(rows), 'checkpoint')} by {merge.spec.method}{parameters} -> {plan.output}")
    if not plan.rank.is_alone:
        _show_shares(plan)
    if folder:
        console.err(f"  checkpoints in {folder}:")
    console.err_table(("checkpoint", "step", "coefficient", " ", ""), rows, optional=(" ",))
    console.err(
        f"  as little noise as a plain average of {chosen.effective_sample_size:.1f} (effective sample size"
        f" {chosen.effective_sample_size:.2f} of {len(rows)}), on average {chosen.mean_age():.1f} checkpoints behind the newest"
    )
    console.err(
        f"  read {console.human_bytes(merge.bytes_to_read)}, write {console.human_bytes(merge.bytes_to_write)}"
        f" in {console.count(len(merge.files), 'file')}, buffers {console.human_bytes(plan.budget.bytes)}"
        f" ({console.count(plan.budget.workers, 'thread')}), device {plan.device.name},"
        f" kernel {plan.kernel}"
        + (f" ({console.human_bytes(plan.budget.device_bytes)} of its memory)" if plan.device.is_accelerator else "")
    )
    side = merge.inputs[merge.base].side_files
    if side.kept or side.skipped:
        console.err(f"  kept from the base: {console.names(side.kept) or 'nothing'}")
        console.err(f"  left out: {console.names(side.skipped) or 'nothing'}")
    copied = sorted({key for file in merge.files for run in file.extents if run.is_copy for key in run.keys})
    if copied:
        console.err(f"  copied, not averaged: {console.count(len(copied), 'tensor')} ({console.names(copied, 3)})")
    if merge.spec.dtype != "keep":
        from merge_cli.output.manifest import with_dtype

        config = merge.inputs[merge.base].config
        recorded = "; config.json says so" if with_dtype(config, "bf16") != with_dtype(config, "fp32") else ""
        console.err(f"  floats are written as {merge.spec.dtype}{recorded}")
    for note in plan.notes:
        console.err(f"note: {note}")
    for warning in plan.warnings:
        console.err(f"warning: {warning}")


def _show_shares(plan: AveragePlan) -> None:
    from merge_cli.ranks.shares import cut, shares

    pieces = cut(plan.merge.files, plan.rank.world_size)
    loads = [sum(piece.end - piece.begin for piece in share) for share in shares(pieces, plan.rank.world_size)]
    largest = max(loads) * len(loads) / max(sum(loads), 1)
    parts = sum(not piece.is_whole for piece in pieces)
    of_files = f", {parts} of them parts of files" if parts else ""
    console.err(
        f"  {plan.rank} (from {plan.rank.source}): {console.count(len(pieces), 'piece')}{of_files};"
        f" the largest share is {largest:.2f} x the mean"
    )


def finish_dry_run(plan: AveragePlan, as_json: bool, quiet: bool, storage_bandwidth: int | None) -> None:
    """The problems of the plan, the estimated time, and the plan or its path on stdout."""
    from merge_cli.tuning.estimate import estimate

    if not (as_json and quiet):
        for finding in plan.findings:
            console.print_error(finding, "would fail")
    expected = estimate(plan.merge, storage_bandwidth, device=plan.device)
    rate = console.human_bytes(expected.storage_bandwidth)
    if not quiet:
        console.err(
            f"  about {console.human_seconds(expected.seconds)}, limited by {expected.bottleneck}, at {rate}/s"
            f" {'as given' if storage_bandwidth else 'measured on the first bytes'}"
        )
        console.dry_run_ended(plan.findings)
    if as_json:
        console.out_json({**plan_as_json(plan), "estimate": asdict(expected)})
    else:
        console.out(plan.output)


def show_result(plan: AveragePlan, result: AverageResult) -> None:
    """The time and where it was spent, and the notes and warnings of the run."""
    from merge_cli.ranks.launcher import WORKER

    if not result.has_published:
        if result.already_published:
            console.err("the result exists already, complete: nothing was left to do")
        elif plan.rank.source == WORKER:
            console.err("done by all workers")
        else:
            left = f"{result.missing} of {len(plan.merge.files)} files are with other ranks, the last of which publishes"
            console.err(f"{plan.rank} has finished its part in {result.seconds:.1f} s; {left}")
        return
    statistics = result.statistics
    parts = {
        "reading": statistics.seconds_reading,
        "computing": statistics.seconds_computing,
        "writing": statistics.seconds_writing,
    }
    moved = statistics.bytes_read + statistics.bytes_written
    shares = ", ".join(f"{name} {100 * seconds / max(sum(parts.values()), 1e-9):.0f} %" for name, seconds in parts.items())
    console.err(
        f"done in {result.seconds:.1f} s, {moved / max(result.seconds, 1e-9) / 1e9:.2f} GB/s; most time went into"
        f" {max(parts, key=lambda name: parts[name])} ({shares})"
    )
    if statistics.requantization_error is not None:
        largest, mean = statistics.requantization_error
        console.err(f"quantizing again added an error of {largest:.2%} at most, {mean:.2%} on average (relative to the magnitudes)")
    for note in statistics.notes:
        console.err(f"note: {note}")
    if result.reused:
        console.err(f"{console.count(result.reused, 'file')} of an earlier run kept")
    warn_of_nonfinite(result)


def warn_of_nonfinite(result: AverageResult) -> None:
    """A line for each tensor with NaN or Inf."""
    for line in first_ten(
        [f"`{key}` has NaN or Inf in {console.count(count, 'element')}" for key, count in result.nonfinite.items()],
        "such tensors",
    ):
        console.err(f"warning: {line}")


def plan_as_json(plan: AveragePlan) -> dict[str, Any]:
    """The plan, for --json."""
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
        "kernel": plan.kernel,
        "rank": None if plan.rank.is_alone else str(plan.rank),
        "device_memory_bytes": plan.budget.device_bytes,
        "notes": list(plan.notes),
        "warnings": list(plan.warnings),
        "findings": [str(finding) for finding in plan.findings],
    }


def result_as_json(result: AverageResult) -> dict[str, Any]:
    """The result, for --json, beside the plan."""
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
