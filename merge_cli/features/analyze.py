"""What the weights of a run's checkpoints show: the feature behind `pmerge analyze`, as a library.

    plan_analysis   which checkpoints, merged with which coefficients: reads headers only, writes nothing
    analyze         the same, then one streamed read of all of them, in bounded memory

Only inner products of deviations are kept, layer by layer and kind by kind; everything else is
algebra on them (`merge_cli.trajectory`). The numbers are bit-equal for any chunk size, memory and
number of threads. Tensors that are not averaged (integers, tensors copied from the base) are left
out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_cli.errors import InputError, UsageError
from merge_cli.formats.opening import Seen, open_checkpoint
from merge_cli.formats.twins import twin_warnings
from merge_cli.output.progress import Progress
from merge_cli.planning.extent import Extent, QuantizedExtent
from merge_cli.planning.plan import GRAM, MergePlan, Output, WorkItem
from merge_cli.planning.planner import build_plan
from merge_cli.request.discovery import find_candidates
from merge_cli.request.labels import Candidate
from merge_cli.request.screening import offering_to_skip
from merge_cli.request.selection import check_tokens_per_step, coefficients_of, select_checkpoints
from merge_cli.request.spec import MergeSpec, RunConfig, Selection, read_options
from merge_cli.stores.store import StrPath, join, name_of
from merge_cli.trajectory.analysis import Analysis, analyze_grams
from merge_cli.trajectory.folder import folder_of, write_analysis
from merge_cli.trajectory.gram import Gram
from merge_cli.trajectory.groups import Group, group_of
from merge_cli.trajectory.log import LogRow, read_log

if TYPE_CHECKING:
    from merge_cli.engine.budget import Budget
    from merge_cli.engine.chunk import Statistics


@dataclass(frozen=True)
class AnalysisPlan:
    """A planned analysis: `merge` is the average that is judged, `work` the tensors that are read,
    `log` the training log.
    """

    merge: MergePlan
    work: tuple[WorkItem, ...]
    candidates: tuple[Candidate, ...]
    log: tuple[LogRow, ...]
    folder: Path
    budget: Budget
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def bytes_to_read(self) -> int:
        """The bytes of weights that are read from all checkpoints."""
        return sum(extent.bytes_read for item in self.work for extent in item.file.extents)


def plan_analysis(
    paths: StrPath | Sequence[StrPath],
    *,
    output: StrPath | None = None,
    log: StrPath | None = None,
    selection: Selection | None = None,
    spec: MergeSpec | None = None,
    run: RunConfig | None = None,
    **options: Any,
) -> AnalysisPlan:
    """Plan the analysis of the checkpoints at `paths`; the options are those of `plan_average` that
    choose and weigh checkpoints.

    `log` is a CSV file or a trainer_state.json with the learning rates (default: the newest
    checkpoint's trainer_state.json). `output` is the folder for analysis.json (`RUN.pmerge/`).

    Raises UsageError, InputError, MismatchError or UnsupportedError.
    """
    selection, spec, run = read_options(options, selection, spec, run)
    given = [paths] if isinstance(paths, str) or not isinstance(paths, Sequence) else list(paths)
    seen = Seen(run.max_header)
    found, skipped, left_out = find_candidates(paths, selection, seen)
    check_tokens_per_step(selection.tokens_per_step, selection.amounts.values())
    selected = select_checkpoints(found, selection, spec.method)
    candidates = selected.candidates
    if len(candidates) < 2:
        raise UsageError("an analysis needs at least two checkpoints", hint="pmerge inspect RUN_FOLDER")
    coefficients, _ = coefficients_of(candidates, spec, selection.order)
    with offering_to_skip(found, seen):
        inputs = [open_checkpoint(candidate.path, seen=seen) for candidate in candidates]
    newest = len(inputs) - 1
    steps = [candidate.step for candidate in candidates]
    merge = build_plan(spec, inputs, steps, newest, [Output(tuple(range(len(inputs))), coefficients, newest)])
    work = _work(merge)
    if not work:
        raise InputError("the checkpoints have no tensors that are averaged", hint="pmerge inspect RUN_FOLDER")
    from merge_cli.engine.budget import fit_memory
    from merge_cli.engine.device import CPU

    budget = fit_memory(merge, run.memory, CPU, run.threads, chunk_bytes=run.chunk_size, direct=run.direct == "on", reducer=GRAM)
    rows, notes = _read_log(log, candidates[-1])
    return AnalysisPlan(
        merge=merge,
        work=work,
        candidates=candidates,
        log=tuple(rows),
        folder=folder_of([str(path) for path in given], None if output is None else str(output)),
        budget=budget,
        notes=(*skipped, *selected.notes, *notes, *(note for each in inputs for note in each.notes)),
        warnings=(*left_out, *selected.warnings, *twin_warnings(inputs)),
    )


def analyze(
    paths: StrPath | Sequence[StrPath], *, on_progress: Callable[[Progress], None] | None = None, **options: Any
) -> Analysis:
    """Analyze the checkpoints at `paths`, and keep the analysis in `RUN.pmerge/`; the options are
    those of `plan_analysis`.
    """
    return run_analysis(plan_analysis(paths, **options), on_progress=on_progress)


def run_analysis(plan: AnalysisPlan, *, on_progress: Callable[[Progress], None] | None = None) -> Analysis:
    """Read the weights of a plan, analyze them, and write analysis.json.

    Raises NonFiniteError (NaN or Inf in a tensor), ChangedError, OutputError.
    """
    from merge_cli.engine.input_checks import check_inputs_unchanged
    from merge_cli.engine.reducers.gram import GramTotals
    from merge_cli.engine.stream import stream

    began = time.perf_counter()
    groups: dict[str, Group] = {}

    def named(key: str) -> str:
        group = group_of(key)
        groups[str(group)] = group
        return str(group)

    class Totals(GramTotals):
        def progress(self, statistics: Statistics) -> bool | None:
            if on_progress is not None:
                on_progress(Progress(statistics.bytes_read, plan.bytes_to_read, 0, 0, time.perf_counter() - began))
            return True

    totals = Totals(named)
    stream(plan.merge, plan.work, totals, plan.budget)
    check_inputs_unchanged(plan.merge)
    analysis = analyze_grams(
        [name_of(candidate.path) for candidate in plan.candidates],
        [candidate.step for candidate in plan.candidates],
        plan.merge.outputs[0].coefficients,
        {groups[name]: Gram(*total) for name, total in totals.totals().items()},
        method=plan.merge.spec.method,
        log=plan.log,
    )
    write_analysis(plan.folder, analysis)
    return analysis


def _work(merge: MergePlan) -> tuple[WorkItem, ...]:
    """The work items of all tensors that are averaged."""
    files = [replace(file, extents=tuple(each for each in file.extents if _is_averaged(each))) for file in merge.files]
    return tuple(WorkItem.whole(file, (), GRAM) for file in files if file.extents)


def _is_averaged(extent: Extent | QuantizedExtent) -> bool:
    return not extent.is_copy if isinstance(extent, QuantizedExtent) else extent.kind == "average"


def _read_log(log: StrPath | None, newest: Candidate) -> tuple[list[LogRow], list[str]]:
    """The training log that was given, else that of the newest checkpoint, and a note on a log that
    is left out.
    """
    if log is not None:
        return read_log(Path(log)), []
    path = Path(join(newest.path, "trainer_state.json"))
    if not path.is_file():
        return [], ["no training log was found: the learning rate is judged by the weights alone; with one:  --log FILE.csv"]
    try:
        return read_log(path), []
    except InputError as error:
        return [], [f"the training log is left out: {error.message}"]
