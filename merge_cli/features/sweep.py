"""Many averages of one run from one read of it: the feature behind `pmerge sweep`, as a library.

    plan_sweep   which outputs, from which checkpoints with which coefficients: reads headers only, writes nothing
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
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_cli.errors import MismatchError, NonFiniteError, OutputError, PmergeError, UsageError, first_ten
from merge_cli.formats.checkpoint import Checkpoint
from merge_cli.formats.opening import Seen, open_checkpoint
from merge_cli.formats.twins import twin_warnings
from merge_cli.names import SWEEP_REPORT
from merge_cli.output.schema import SCHEMA, check_schema
from merge_cli.planning.plan import ALGORITHM, MergePlan, Output
from merge_cli.planning.planner import build_plan
from merge_cli.planning.record import fingerprint
from merge_cli.ranks.launcher import Rank
from merge_cli.request.amounts import parse_amount
from merge_cli.request.coefficients import Coefficients
from merge_cli.request.destination import default_destination, default_destinations, destination_of
from merge_cli.request.discovery import find_candidates
from merge_cli.request.grid import SELECTION, Combination, entry, grid, unique
from merge_cli.request.labels import Candidate
from merge_cli.request.methods import PARAMETERS
from merge_cli.request.selection import check_tokens_per_step, coefficients_of, order_candidates, select_checkpoints
from merge_cli.request.spec import MergeSpec, RunConfig, Selection, read_options
from merge_cli.request.tokens import with_tokens_of_names
from merge_cli.stores.store import StrPath, is_local
from merge_cli.system.files import read_json
from merge_cli.system.still import wait_until_still
from merge_cli.version import __version__

if TYPE_CHECKING:
    from merge_cli.engine.budget import Budget
    from merge_cli.engine.chunk import Statistics
    from merge_cli.engine.device import Device
    from merge_cli.job import JobResult, OutputResult
    from merge_cli.output.progress import Progress


@dataclass(frozen=True)
class SweepOutput:
    """One output: `merge` is the plan that `average` would make for it, without runs. `is_done`:
    it is published already.
    """

    combination: Combination
    path: Path
    candidates: tuple[Candidate, ...]
    merge: MergePlan
    is_done: bool

    @property
    def coefficients(self) -> Coefficients:
        return self.merge.outputs[0].coefficients


@dataclass(frozen=True)
class SweepGroup:
    """Outputs that are still to be made and share a layout: output k of `merge` is `outputs[k]`."""

    merge: MergePlan
    outputs: tuple[SweepOutput, ...]
    budget: Budget

    @property
    def bytes_to_read(self) -> int:
        """The bytes of the inputs that any of the outputs uses."""
        sizes = self.merge.bytes_of_inputs()
        return sum(sizes[i] for i in {i for output in self.merge.outputs for i in output.inputs})

    @property
    def bytes_read_separately(self) -> int:
        """The bytes that one run an output would read."""
        sizes = self.merge.bytes_of_inputs()
        return sum(sizes[i] for output in self.merge.outputs for i in output.inputs)


@dataclass(frozen=True)
class SweepPlan:
    """A planned sweep. `same_as` names for a combination the output that it equals, `skipped` why
    there is none.
    """

    output: Path
    outputs: tuple[SweepOutput, ...]
    groups: tuple[SweepGroup, ...]
    same_as: tuple[tuple[Combination, str], ...]
    skipped: tuple[tuple[Combination, str], ...]
    inputs: tuple[Checkpoint, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    device: Device
    kernel: str
    run: RunConfig
    rank: Rank
    findings: tuple[PmergeError, ...]

    @property
    def bytes_to_read(self) -> int:
        return sum(group.bytes_to_read for group in self.groups)

    @property
    def bytes_to_write(self) -> int:
        return sum(group.merge.bytes_to_write for group in self.groups)


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


def plan_sweep(
    paths: StrPath | Sequence[StrPath],
    output: StrPath | None = None,
    *,
    methods: Sequence[str] = (),
    last: Sequence[int] = (),
    every: Sequence[int | str] = (),
    at: Sequence[int | str] = (),
    combinations: Sequence[Mapping[str, Any]] = (),
    tokens_per_step: int | str | None = None,
    spec: MergeSpec | None = None,
    run: RunConfig | None = None,
    rank: Rank | None = None,
    typed: Sequence[str] = (),
    **options: Any,
) -> SweepPlan:
    """Plan the averages of the checkpoints at `paths` into folders inside the folder `output`, by
    default `./sweep-<oldest step>-<newest step>`.

    The outputs are a grid (`request/grid.py`), `combinations` (objects with options of `average`),
    or both. `at` is the step of the newest checkpoint; in tokens, of the last one up to there. A
    combination without its checkpoints is skipped; of several with equal inputs and coefficients
    the first is made. `spec` and `run` hold the options of all outputs; a keyword of theirs
    (`dtype="fp32"`, `memory="4GiB"`) is laid over them. `rank` is this process if several make one
    sweep, `typed` as in `plan_average`.

    Raises UsageError (also if no combination is left), InputError, MismatchError or
    UnsupportedError. Problems that would only stop the writing are in `findings`.
    """
    for name in options:
        if name == "method" or name in (SELECTION | PARAMETERS):
            raise TypeError(f"{name} belongs to each output of a sweep: methods=[...], or combinations=[{{...}}]")
    selection, spec, run = read_options({**options, "tokens_per_step": tokens_per_step}, None, spec, run)
    folder = None if output is None else destination_of(output, "sweep")
    rank = rank or Rank()
    if run.verify_resume and not rank.is_alone:
        raise UsageError("--verify-resume is for one process", hint="pmerge verify checks the results")
    wanted = unique([*grid(methods, last, every, at), *map(entry, combinations)])
    if not wanted:
        raise UsageError("a sweep of nothing", hint="--method sma,ema:0.1 --last 6,10, or a list:  --list FILE")
    asked = [replace(selection, **each.selection) for each in wanted]
    amounts = [(flag, amount) for each in asked for flag, amount in each.amounts.items()]
    check_tokens_per_step(selection.tokens_per_step, [amount for _, amount in amounts])
    candidates, notes, left_out = find_candidates(paths, selection)
    selection, told, doubts = with_tokens_of_names(selection, [amount for _, amount in amounts], candidates)
    for flag, amount in dict(amounts).items():
        parse_amount(amount, selection.tokens_per_step, option=flag)
    if typed and not run.restart:
        from merge_cli.output.resumed import keep_selected

        folders = default_destinations("sweep") if folder is None else [folder]
        candidates, newer = keep_selected(candidates, [each / name.name for each in folders for name in wanted], typed)
        notes += newer
    folder = folder or default_destination("sweep", order_candidates(candidates, "step", needs_order=False))
    chosen, same_as, skipped, warnings = _choose_all(wanted, candidates, selection)
    wait_until_still(sorted({each.path for one in chosen for each in one.candidates if is_local(each.path)}), run.settle)
    inputs, merges = _plan_groups(spec, chosen, run.max_header)
    for checkpoint in inputs:
        notes += checkpoint.notes
    for merge, _ in merges:
        notes += [note for note in merge.notes if note not in notes]
        warnings += [line for line in merge.warnings if line not in warnings]
    from merge_cli.output.existing import is_published
    from merge_cli.output.preflight import check_destinations
    from merge_cli.tuning.tune import tune

    tuning = tune(max((merge for merge, _ in merges), key=lambda merge: merge.bytes_to_read), run, rank)
    outputs: list[SweepOutput] = []
    groups: list[SweepGroup] = []
    for merge, members in merges:
        here = []
        for k, each in enumerate(members):
            own = replace(spec, method=each.combination.method, parameters=each.combination.parameters)
            path, alone = folder / each.combination.name, merge.single_output(k, own)
            is_done = is_published(path, alone, hashed=run.overwrite or run.verify_existing)
            here.append(SweepOutput(each.combination, path, each.candidates, alone, is_done))
        outputs += here
        todo = [k for k, each in enumerate(here) if not each.is_done]
        if todo:
            merge = replace(merge, outputs=tuple(merge.outputs[k] for k in todo))
            groups.append(SweepGroup(merge, tuple(here[k] for k in todo), tuning.fit(merge)))
    outputs.sort(key=lambda each: wanted.index(each.combination))
    findings = check_destinations({each.path: each.merge for each in outputs if not each.is_done}, run, rank.world_size)
    return SweepPlan(
        output=folder,
        outputs=tuple(outputs),
        groups=tuple(groups),
        same_as=tuple(same_as),
        skipped=tuple(skipped),
        inputs=tuple(inputs),
        notes=(*told, *notes, *tuning.notes),
        warnings=(*left_out, *doubts, *twin_warnings(inputs), *warnings),
        device=tuning.device,
        kernel=tuning.kernel,
        run=run,
        rank=rank,
        findings=(*findings, *_check_report(folder / SWEEP_REPORT)),
    )


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
        _write_report(plan, report, command)
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


def _write_report(plan: SweepPlan, path: Path, command: Sequence[str]) -> None:
    """Write sweep.json. Two ranks that publish the last outputs at the same time may both do so."""
    from merge_cli.system.durable import write_file

    made_by = {"pmerge": __version__, "schema": SCHEMA, "algorithm": ALGORITHM, "command": list(command or sys.argv)}
    data = json.dumps({**made_by, **as_dict(plan)}, indent=2, default=str).encode() + b"\n"
    write_file(path, data, partial_name=f"{path.name}.{socket.gethostname()}.{os.getpid()}.partial")


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


@dataclass(frozen=True)
class _Chosen:
    combination: Combination
    candidates: tuple[Candidate, ...]
    coefficients: Coefficients


def _choose_all(
    wanted: Sequence[Combination], candidates: Sequence[Candidate], selection: Selection
) -> tuple[list[_Chosen], list[tuple[Combination, str]], list[tuple[Combination, str]], list[str]]:
    """The combinations that can be made, those that equal another, those that cannot, and warnings.
    Raises UsageError for none.
    """
    made: dict[object, _Chosen] = {}
    same_as: list[tuple[Combination, str]] = []
    skipped: list[tuple[Combination, str]] = []
    warnings: dict[str, tuple[str, list[str]]] = {}
    for each in wanted:
        try:
            asked = replace(selection, **each.selection)
            selected = select_checkpoints(candidates, asked, each.method)
        except (UsageError, MismatchError) as error:
            skipped.append((each, "; ".join([error.message, *(" ".join(line.split()) for line in error.details[:1])])))
            continue
        own = MergeSpec(method=each.method, parameters=each.parameters)
        found, more = coefficients_of(selected.candidates, own, selection.order)
        key = (tuple(candidate.path for candidate in selected.candidates), found)
        first = made.setdefault(key, _Chosen(each, selected.candidates, found))
        if first.combination is not each:
            same_as.append((each, first.combination.name))
            continue
        for line in (*selected.warnings, *more):  # of several that differ in numbers only, the first is shown
            warnings.setdefault(re.sub(r"[0-9][0-9.]*", "#", line), (line, []))[1].append(each.name)
    if not made:
        reasons = [f"{each.name}  {reason}" for each, reason in skipped]
        raise UsageError("no combination of the sweep can be made", details=first_ten(reasons), hint="pmerge inspect RUN_FOLDER")
    lines = [f"{_few(names)}: {line}" for line, names in warnings.values()]
    return list(made.values()), same_as, skipped, lines


def _few(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more output{'s' if len(names) > 2 else ''}"


def _plan_groups(
    spec: MergeSpec, chosen: Sequence[_Chosen], max_header: int
) -> tuple[list[Checkpoint], list[tuple[MergePlan, list[_Chosen]]]]:
    """Open every checkpoint once, and plan together the outputs whose bases, the newest of their
    inputs, have one layout.
    """
    seen = Seen(max_header)
    used = {candidate.path: candidate for each in chosen for candidate in each.candidates}
    if all(candidate.step is not None for candidate in used.values()):
        used = dict(sorted(used.items(), key=lambda item: item[1].step or 0))
    opened = {path: open_checkpoint(path, seen=seen, training_state=spec.training_state) for path in used}
    groups: dict[tuple[object, tuple[str, ...] | None], list[_Chosen]] = {}
    for each in chosen:
        own = [candidate.path for candidate in each.candidates]
        order = None if own == [path for path in used if path in own] else tuple(own)  # weights, in the order given
        groups.setdefault((_layout(opened[own[-1]], spec), order), []).append(each)
    plans = []
    for (_, order), members in groups.items():
        inside = {candidate.path for each in members for candidate in each.candidates}
        paths = order or [path for path in used if path in inside]
        place = {path: i for i, path in enumerate(paths)}
        outputs = []
        for each in members:
            inputs = tuple(place[candidate.path] for candidate in each.candidates)
            outputs.append(Output(inputs, each.coefficients, inputs[-1]))
        base = max(output.base for output in outputs)
        merge = build_plan(spec, [opened[path] for path in paths], [used[path].step for path in paths], base, outputs)
        plans.append((merge, members))
    return list(opened.values()), plans


def _layout(base: Checkpoint, spec: MergeSpec) -> object:
    """Equal for checkpoints that give, as the base, the same files: with the same headers, and
    with nothing in them that is taken over from this very one.
    """
    if spec.copies_from_base or not all(file.header.data_start for file in base.files):  # only safetensors has headers
        return base.path
    quantization = json.dumps(base.config.get("quantization_config"), sort_keys=True, default=str)
    files = tuple((file.name, file.header.sha256) for file in base.files)
    places = tuple((stored.file.name, stored.name) for stored in base.tensors.values())
    return base.layout, base.root is None, files, hash(places), quantization


def _check_report(path: Path) -> list[OutputError]:
    """What would be wrong about writing the report: a file that another program wrote, or a newer
    version of this one.
    """
    elsewhere = "move it away, or choose another place:  -o PATH"
    if not os.path.lexists(path):
        return []
    record = read_json(path)
    if "pmerge" not in record:
        return [OutputError(f"{path} exists, and no sweep wrote it", hint=elsewhere)]
    try:
        check_schema(record, path, elsewhere, OutputError)
    except OutputError as error:
        return [error]
    return []
