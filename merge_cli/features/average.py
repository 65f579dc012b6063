"""Average the checkpoints of one run: the feature behind `pmerge average`, as a library.

    plan_average   which checkpoints, which coefficients, which bytes: reads headers only, writes nothing
    average        the same, then reads, reduces, writes and publishes

Nothing is printed: progress goes to a callback, warnings are in the plan, errors are the exceptions
of `merge_cli.errors`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_cli.errors import PmergeError, UsageError
from merge_cli.formats.opening import Seen, open_checkpoint
from merge_cli.formats.twins import twin_warnings
from merge_cli.planning.plan import MergePlan, Output
from merge_cli.planning.planner import build_plan
from merge_cli.ranks.launcher import Rank
from merge_cli.request.destination import default_destination, default_destinations, destination_of
from merge_cli.request.discovery import find_candidates
from merge_cli.request.labels import Candidate
from merge_cli.request.screening import offering_to_skip
from merge_cli.request.selection import check_tokens_per_step, coefficients_of, select_checkpoints
from merge_cli.request.spec import MergeSpec, RunConfig, Selection, read_options
from merge_cli.stores.store import StrPath, as_path, is_local, resolve
from merge_cli.system.still import wait_until_still

if TYPE_CHECKING:
    from merge_cli.engine.budget import Budget
    from merge_cli.engine.chunk import Statistics
    from merge_cli.engine.device import Device
    from merge_cli.output.progress import Progress


@dataclass(frozen=True)
class AveragePlan:
    """A planned average: the merge, its destination, how it is carried out, and `findings` that
    would stop it.

    `notes` inform (checkpoints left out), `warnings` name reasons why the result may not be the one
    meant. `is_done`: the destination has the complete result of this very request already.
    """

    merge: MergePlan
    output: Path
    candidates: tuple[Candidate, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    device: Device
    kernel: str
    budget: Budget
    run: RunConfig
    findings: tuple[PmergeError, ...]
    rank: Rank
    is_done: bool = False


@dataclass(frozen=True)
class AverageResult:
    """A finished run. `reused` counts files that were finished before, `nonfinite` counts elements
    by tensor.

    `has_published`: by this process; `already_published`: the result existed when it came, or
    another rank published it; `missing` counts files that are with other ranks, the last of which
    publishes.
    """

    output: Path
    seconds: float
    statistics: Statistics
    reused: int = 0
    nonfinite: Mapping[str, int] = field(default_factory=dict)
    has_published: bool = False
    already_published: bool = False
    missing: int = 0


def plan_average(
    paths: StrPath | Sequence[StrPath],
    output: StrPath | None = None,
    *,
    selection: Selection | None = None,
    spec: MergeSpec | None = None,
    run: RunConfig | None = None,
    rank: Rank | None = None,
    typed: Sequence[str] = (),
    **options: Any,
) -> AveragePlan:
    """Plan the average of the checkpoints at `paths` (folders, files, or one run folder) into the
    folder `output`.

    `selection`, `spec` and `run` hold the options; a keyword of theirs (`last=6`, `method="ema"`,
    `alpha=0.1`, `memory="4GiB"`) is laid over them. `rank` is this process if several make one
    average, `typed` its words on the command line: a command that began before the run had grown
    keeps its checkpoints. Without `output` the result goes to `./merged-<method>-<oldest
    step>-<newest step>`.

    Raises UsageError, InputError, MismatchError or UnsupportedError. Problems that would only stop
    the writing (an existing destination, too little space) are in `findings` instead, so that a
    plan can always be shown.
    """
    selection, spec, run = read_options(options, selection, spec, run)
    destination = None if output is None else destination_of(output)
    rank = rank or Rank()
    if run.verify_resume and not rank.is_alone:
        raise UsageError("--verify-resume is for one process", hint="pmerge verify checks the result")
    seen = Seen(run.max_header)
    found, skipped, left_out = find_candidates(paths, selection, seen)
    if typed and not run.restart:
        from merge_cli.output.resumed import keep_selected

        found, newer = keep_selected(found, [destination] if destination else default_destinations(f"merged-{spec.method}"), typed)
        skipped += newer
    check_tokens_per_step(selection.tokens_per_step, selection.amounts.values())
    selected = select_checkpoints(found, selection, spec.method)
    candidates = selected.candidates
    coefficients, doubts = coefficients_of(candidates, spec, selection.order)
    wait_until_still([candidate.path for candidate in candidates if is_local(candidate.path)], run.settle)
    with offering_to_skip(found, seen):
        inputs = [open_checkpoint(candidate.path, seen=seen, training_state=spec.training_state) for candidate in candidates]
    base = _find_base(candidates, selection.base)
    steps = [candidate.step for candidate in candidates]
    merge = build_plan(spec, inputs, steps, base, [Output(tuple(range(len(inputs))), coefficients, base)])
    destination = destination or default_destination(f"merged-{spec.method}", candidates)
    from merge_cli.features.preparation import prepare

    done, findings, tuning = prepare({destination: merge}, merge, run, rank)
    return AveragePlan(
        merge=merge,
        output=destination,
        candidates=candidates,
        notes=(*skipped, *selected.notes, *(note for each in inputs for note in each.notes), *merge.notes, *tuning.notes),
        warnings=(*left_out, *selected.warnings, *twin_warnings(inputs), *doubts, *merge.warnings),
        device=tuning.device,
        kernel=tuning.kernel,
        budget=tuning.fit(merge),
        run=run,
        findings=findings,
        rank=rank,
        is_done=destination in done,
    )


def average(
    paths: StrPath | Sequence[StrPath],
    output: StrPath | None = None,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    command: Sequence[str] = (),
    **options: Any,
) -> AverageResult:
    """Average the checkpoints at `paths` into the folder `output`; the options are those of
    `plan_average`.

    The destination appears only when it is complete. Raises what `plan_average` raises, and
    NonFiniteError, ChangedError, MismatchError (integers that differ) or OutputError while working.
    """
    return run_average(plan_average(paths, output, **options), on_progress=on_progress, command=command)


def run_average(
    plan: AveragePlan, *, on_progress: Callable[[Progress], None] | None = None, command: Sequence[str] = ()
) -> AverageResult:
    """Carry out a plan, or the part of it that `plan.rank` has. Rank 0 reports the progress of all
    ranks, others their own.

    The first of the plan's findings, if any, is raised before anything is read or written.
    """
    from merge_cli.engine.chunk import Statistics
    from merge_cli.job import Job, carry_out
    from merge_cli.output.existing import read_manifest
    from merge_cli.output.solo import remove_stale_staging

    if plan.findings:
        raise plan.findings[0]
    merge = plan.merge
    if plan.is_done:
        remove_stale_staging(plan.output)
        nonfinite = read_manifest(plan.output).get("nonfinite", {})
        return AverageResult(plan.output, 0.0, Statistics(), len(merge.files), nonfinite, already_published=True)
    destinations = ((plan.output, merge),)
    job = Job(merge, destinations, plan.run, plan.rank, plan.budget, merge.bytes_to_read, command)
    result = carry_out(job, on_progress)
    (made,) = result.outputs
    return AverageResult(
        made.path,
        result.seconds,
        result.statistics,
        made.reused,
        made.nonfinite,
        made.has_published,
        made.already_published,
        len(made.missing),
    )


def _find_base(candidates: Sequence[Candidate], base: StrPath | None) -> int:
    if base is None:
        return len(candidates) - 1  # the last in the order: the newest by step, the last one typed by --order given
    wanted = resolve(as_path(base))
    for position, candidate in enumerate(candidates):
        if resolve(candidate.path) == wanted:
            return position
    raise UsageError(
        f"--base {base} is not one of the checkpoints that are averaged",
        details=[candidate.path for candidate in candidates[:10]],
        hint=f"--base {candidates[-1].path}",
    )
