"""Average the checkpoints of one run: the feature behind `pmerge average`, as a library.

    plan_average   which checkpoints, which coefficients, which bytes: reads headers only, writes nothing
    average        the same, then reads, reduces, writes and publishes

Nothing is printed: progress goes to a callback, warnings are in the plan, errors are the exceptions of `merge_cli.errors`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_cli.errors import PmergeError, UsageError
from merge_cli.formats.opening import Seen, open_checkpoint
from merge_cli.names import MANIFEST
from merge_cli.output.manifest import complete
from merge_cli.planning.plan import MergePlan, Output, WorkItem
from merge_cli.planning.planner import build_plan
from merge_cli.planning.record import describe
from merge_cli.ranks.launcher import WORKER, Rank
from merge_cli.request.destination import default_destination, destination_of
from merge_cli.request.discovery import find_candidates
from merge_cli.request.labels import Candidate
from merge_cli.request.selection import check_tokens_per_step, coefficients_of, select_checkpoints
from merge_cli.request.spec import MergeSpec, RunConfig, Selection, read_options
from merge_cli.stores.store import StrPath, as_path, resolve

if TYPE_CHECKING:
    from merge_cli.engine.budget import Budget
    from merge_cli.engine.chunk import Statistics
    from merge_cli.engine.device import Device


@dataclass(frozen=True)
class Progress:
    """How far a run is: bytes done and in all, and the seconds since reading began."""

    bytes_read: int
    bytes_to_read: int
    bytes_written: int
    bytes_to_write: int
    seconds: float


@dataclass(frozen=True)
class AveragePlan:
    """A planned average: the merge, its destination, how it is carried out, and `findings` that would stop it.

    `notes` inform (checkpoints left out), `warnings` name reasons why the result may not be the one meant.
    """

    merge: MergePlan
    output: Path
    candidates: tuple[Candidate, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    device: Device
    budget: Budget
    run: RunConfig
    findings: tuple[PmergeError, ...]
    rank: Rank


@dataclass(frozen=True)
class AverageResult:
    """A finished run. `reused` counts files of an earlier, interrupted run; `nonfinite` counts elements by tensor."""

    output: Path
    seconds: float
    statistics: Statistics
    reused: int = 0
    nonfinite: dict[str, int] = field(default_factory=dict)


def plan_average(
    paths: StrPath | Sequence[StrPath],
    output: StrPath | None = None,
    *,
    selection: Selection | None = None,
    spec: MergeSpec | None = None,
    run: RunConfig | None = None,
    rank: Rank | None = None,
    **options: Any,
) -> AveragePlan:
    """Plan the average of the checkpoints at `paths` (folders, files, or one run folder) into the folder `output`.

    `selection`, `spec` and `run` hold the options; a keyword of theirs (`last=6`, `method="ema"`, `alpha=0.1`,
    `memory="4GiB"`) is laid over them. `rank` is this process if several make one average
    (`merge_cli.features.share`). Without `output` the result goes to `./merged-<method>-<oldest step>-<newest step>`.

    Raises UsageError, InputError, MismatchError or UnsupportedError. Problems that would only stop the writing (an
    existing destination, too little space) are in `findings` instead, so that a plan can always be shown.
    """
    selection, spec, run = read_options(options, selection, spec, run)
    destination = None if output is None else destination_of(output)
    rank = rank or Rank()
    if run.verify_resume and not rank.is_alone:
        raise UsageError("--verify-resume is for one process", hint="pmerge verify checks the result")
    found, skipped = find_candidates(paths, selection.order)
    check_tokens_per_step(selection.tokens_per_step, selection.amounts.values())
    selected = select_checkpoints(found, selection, spec.method)
    candidates = selected.candidates
    coefficients, doubts = coefficients_of(candidates, spec, selection.order)
    seen = Seen()
    inputs = [open_checkpoint(candidate.path, seen=seen, training_state=spec.training_state) for candidate in candidates]
    base = _find_base(candidates, selection.base)
    steps = [candidate.step for candidate in candidates]
    merge = build_plan(spec, inputs, steps, base, [Output(tuple(range(len(inputs))), coefficients, base)])
    destination = destination or default_destination(spec.method, candidates)
    from merge_cli.output.manifest import stands_for
    from merge_cli.output.preflight import check_destinations
    from merge_cli.tuning.tune import tune

    tuning = tune(merge, run, rank)
    late = not rank.is_alone and stands_for(destination, merge, run.overwrite or rank.source == WORKER)
    findings = [] if late else check_destinations({destination: merge}, run.overwrite)
    return AveragePlan(
        merge=merge,
        output=destination,
        candidates=candidates,
        notes=(*skipped, *selected.notes, *(note for each in inputs for note in each.notes), *merge.notes, *tuning.notes),
        warnings=(*selected.warnings, *doubts, *merge.warnings),
        device=tuning.device,
        budget=tuning.fit(merge),
        run=run,
        findings=tuple(findings),
        rank=rank,
    )


def average(
    paths: StrPath | Sequence[StrPath],
    output: StrPath | None = None,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    command: Sequence[str] = (),
    **options: Any,
) -> AverageResult:
    """Average the checkpoints at `paths` into the folder `output`; the options are those of `plan_average`.

    The destination appears only when it is complete. Raises what `plan_average` raises, and NonFiniteError, ChangedError,
    MismatchError (integers that differ) or OutputError while working.
    """
    return run_average(plan_average(paths, output, **options), on_progress=on_progress, command=command)


def run_average(
    plan: AveragePlan, *, on_progress: Callable[[Progress], None] | None = None, command: Sequence[str] = ()
) -> AverageResult:
    """Carry out a plan. The first of its findings, if any, is raised before anything is read or written."""
    from merge_cli.engine.chunk import Statistics
    from merge_cli.engine.input_checks import check_inputs_unchanged
    from merge_cli.engine.sink import FolderSink
    from merge_cli.engine.stream import stream
    from merge_cli.output.folder import Done, Staging
    from merge_cli.output.manifest import count_nonfinite

    if plan.findings:
        raise plan.findings[0]
    began = time.perf_counter()
    merge = plan.merge
    total_read, total_write = merge.bytes_to_read, merge.bytes_to_write

    def report(statistics: Statistics) -> None:
        if on_progress is not None:
            seconds = time.perf_counter() - began
            on_progress(Progress(statistics.bytes_read, total_read, statistics.bytes_written, total_write, seconds))

    with Staging(plan.output, plan.run.overwrite) as staging:
        done = staging.prepare(describe(merge), restart=plan.run.restart, verify=plan.run.verify_resume)
        if staging.is_published:  # by an earlier run of this request, which died before it could say so
            staging.clean()
            nonfinite = json.loads((plan.output / MANIFEST).read_bytes())["nonfinite"]
            return AverageResult(plan.output, time.perf_counter() - began, Statistics(), len(merge.files), nonfinite)
        reused = len(done)

        def finished(_: int, written: WorkItem, sha256: str, nonfinite: Mapping[str, int]) -> None:
            staging.record(written.file, sha256, nonfinite)
            done[written.file.name] = Done(written.file.file_bytes, sha256, nonfinite)

        todo = [WorkItem.whole(file) for file in merge.files if file.name not in done]
        statistics = stream(merge, todo, FolderSink([staging.checkpoint], report, finished), plan.budget)
        complete(merge, staging.checkpoint, done, command)
        check_inputs_unchanged(merge)
        staging.publish()
    return AverageResult(plan.output, time.perf_counter() - began, statistics, reused, count_nonfinite(done))


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
