"""Many averages of one run from one read of it: the feature behind `pmerge sweep`, as a library.

    plan_sweep   which outputs, from which checkpoints (sweep_plan.py): reads headers only, writes nothing
    sweep        the same, then makes them all

Every output is what `average` makes with the same options, bit for bit, and has a staging folder of
its own, so it is absent or complete and can be continued, whatever else is in the sweep. Outputs
whose newest checkpoints have the same layout form a group: every chunk of the group's inputs is
read once for all outputs that use it. Groups run one after the other.

Not guaranteed: that an output is made when another of its group fails (NaN in an input, integers
that differ); a failure stops all.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_cli.errors import NonFiniteError
from merge_cli.features.sweep_plan import SweepGroup, SweepPlan, plan_sweep
from merge_cli.names import SWEEP_BEGUN, SWEEP_REPORT
from merge_cli.output.schema import SCHEMA
from merge_cli.planning.plan import ALGORITHM
from merge_cli.planning.record import fingerprint
from merge_cli.request.grid import Combination
from merge_cli.stores.store import StrPath
from merge_cli.version import __version__

if TYPE_CHECKING:
    from merge_cli.engine.chunk import Statistics
    from merge_cli.job import JobResult, OutputResult
    from merge_cli.output.progress import Progress


@dataclass(frozen=True)
class SweepResult:
    """A finished sweep: the folders of all outputs, and the report. `reused` counts files that were
    finished before.

    `published` are the outputs that this process published; `missing` counts, by output, files that
    are with other ranks, the last of which publishes.
    """

    outputs: tuple[Path, ...]
    report: Path
    seconds: float
    statistics: Statistics
    reused: int
    published: tuple[Path, ...] = ()
    missing: Mapping[Path, int] = field(default_factory=dict)


def sweep(
    paths: StrPath | Sequence[StrPath],
    output: StrPath | None = None,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    command: Sequence[str] = (),
    **options: Any,
) -> SweepResult:
    """Make many averages of the checkpoints at `paths` in the folder `output`; the options are
    those of `plan_sweep`.

    Raises what `plan_sweep` and `run_average` raise. Whatever happens, each output is absent or
    complete.
    """
    return run_sweep(plan_sweep(paths, output, **options), on_progress=on_progress, command=command)


def run_sweep(
    plan: SweepPlan, *, on_progress: Callable[[Progress], None] | None = None, command: Sequence[str] = ()
) -> SweepResult:
    """Carry out a plan, or the part of it that `plan.rank` has, group after group.

    The first of the plan's findings, if any, is raised before anything is read or written. The
    process that finds all outputs published, and has a part in it, writes the report.
    """
    from merge_cli.engine.chunk import Statistics
    from merge_cli.output.solo import remove_stale_staging

    if plan.findings:
        raise plan.findings[0]
    began = time.perf_counter()
    total = Statistics()
    done = [each for each in plan.outputs if each.is_done]
    for each in done:
        remove_stale_staging(each.path)
    reused = sum(len(each.merge.files) for each in done)
    results: dict[Path, OutputResult] = {}
    groups = list(plan.groups)
    if groups:
        _write(plan.output / SWEEP_BEGUN, {"found": plan.found}, command)
    while groups:  # again as long as that helps: a rank that was at work on a group may have died
        claimed = 0
        for group in groups:
            made = _carry_out(plan, group, _following(total, plan, began, on_progress), command)
            total, claimed = total.plus(made.statistics), claimed + made.claimed
            reused += sum(each.reused for each in made.outputs if each.path not in results)
            results |= {each.path: each for each in made.outputs}
        groups = [rest for group in groups if (rest := _unfinished(group, results)).outputs]
        if not claimed:
            break
    paths = tuple(each.path for each in plan.outputs)
    published = tuple(path for path in paths if path in results and results[path].has_published)
    missing = {each.path: len(each.missing) for each in results.values() if each.missing}
    report = plan.output / SWEEP_REPORT
    if not missing and (published or plan.rank.rank == 0):
        _write(report, as_dict(plan), command)
        _clean_up(plan.output)
    return SweepResult(paths, report, time.perf_counter() - began, total, reused, published, missing)


def _carry_out(
    plan: SweepPlan, group: SweepGroup, on_progress: Callable[[Progress], None] | None, command: Sequence[str]
) -> JobResult:
    from merge_cli.job import Job, carry_out

    destinations = tuple((each.path, each.merge) for each in group.outputs)
    job = Job(group.merge, destinations, plan.run, plan.rank, group.budget, group.bytes_to_read, command)
    try:
        return carry_out(job, on_progress)
    except NonFiniteError as error:
        hint = "leave that checkpoint out of the sweep; pmerge average --allow-nonfinite makes and counts what needs it"
        raise NonFiniteError(error.message, details=error.details, hint=hint) from error


def _following(
    total: Statistics, plan: SweepPlan, began: float, on_progress: Callable[[Progress], None] | None
) -> Callable[[Progress], None] | None:
    """Progress of a group as progress of the sweep, after what `total` counts."""
    from merge_cli.output.progress import Progress

    if on_progress is None:
        return None

    def report(now: Progress) -> None:
        read, written = total.bytes_read + now.bytes_read, total.bytes_written + now.bytes_written
        on_progress(Progress(read, plan.bytes_to_read, written, plan.bytes_to_write, time.perf_counter() - began))

    return report


def _unfinished(group: SweepGroup, results: Mapping[Path, OutputResult]) -> SweepGroup:
    """The outputs of a group of which files are missing."""
    left = [k for k, each in enumerate(group.outputs) if results[each.path].missing]
    merge = replace(group.merge, outputs=tuple(group.merge.outputs[k] for k in left))
    return SweepGroup(merge, tuple(group.outputs[k] for k in left), group.budget)


def _write(path: Path, record: Mapping[str, Any], command: Sequence[str]) -> None:
    """Write a record of the sweep. Two ranks may do so at the same time."""
    from merge_cli.system.durable import write_file
    from merge_cli.system.held import own_name

    made_by = {"pmerge": __version__, "schema": SCHEMA, "algorithm": ALGORITHM, "command": list(command or sys.argv)}
    data = json.dumps({**made_by, **record}, indent=2, default=str).encode() + b"\n"
    write_file(path, data, partial_name=Path(own_name(path.name)).name)


def _clean_up(folder: Path) -> None:
    """Remove the record that a finished sweep no longer needs, and torn ones of dead processes."""
    from merge_cli.system.held import is_of_dead

    with suppress(OSError):
        (folder / SWEEP_BEGUN).unlink(missing_ok=True)
        for path in folder.glob(f"{SWEEP_REPORT}.*"):
            if is_of_dead(path.name):
                path.unlink(missing_ok=True)


def as_dict(plan: SweepPlan) -> dict[str, Any]:
    """What `sweep.json` says: every output with its inputs and coefficients, and what was not made
    and why.
    """

    def asked(each: Combination) -> dict[str, Any]:
        return {"name": each.name, "method": each.method, "parameters": each.parameters, "selection": each.selection}

    return {
        "outputs": [
            {
                **asked(each.combination),
                "path": str(each.path),
                "inputs": [
                    {"path": candidate.path, "step": candidate.step, "coefficient": value}
                    for candidate, value in zip(each.candidates, each.coefficients.values, strict=True)
                ],
                "base": each.candidates[-1].path,
                "effective_sample_size": each.coefficients.effective_sample_size,
                "mean_age": each.coefficients.mean_age(),
                "plan": fingerprint(each.merge),
            }
            for each in plan.outputs
        ],
        "duplicates": [{**asked(each), "same_as": name} for each, name in plan.same_as],
        "skipped": [{**asked(each), "reason": reason} for each, reason in plan.skipped],
    }
