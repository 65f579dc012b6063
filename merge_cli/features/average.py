"""Average the checkpoints of one run: the feature behind `pmerge average`, as a library.

    plan_average   which checkpoints, which coefficients, which bytes: reads headers only, writes nothing
    average        the same, then reads, reduces, writes and publishes

Nothing is printed: progress goes to a callback, warnings are in the plan, errors are the exceptions of `merge_cli.errors`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_cli.errors import PmergeError, UsageError
from merge_cli.formats.checkpoint import open_checkpoint
from merge_cli.formats.safetensors import Header
from merge_cli.names import MANIFEST
from merge_cli.output.manifest import complete
from merge_cli.planning.plan import MergePlan, Output, WorkItem
from merge_cli.planning.planner import OUTPUT_DTYPES, build_plan
from merge_cli.ranks.launcher import WORKER, Rank
from merge_cli.request.discovery import find_candidates
from merge_cli.request.labels import Candidate
from merge_cli.request.methods import METHODS
from merge_cli.request.selection import check_tokens_per_step, choose, weigh
from merge_cli.request.spec import MergeSpec, StrPath
from merge_cli.stores.store import as_path, name_of, resolve

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
    """A planned run: the merge, where it goes, how it will be done (`device`, `budget`), and what would stop it (`findings`).

    `notes` inform (what was left out), `warnings` name what may make the result other than the user thinks.
    """

    merge: MergePlan
    output: Path
    candidates: tuple[Candidate, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    device: Device
    budget: Budget
    overwrite: bool
    restart: bool
    verify_resume: bool
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
    paths: Sequence[StrPath],
    output: StrPath | None = None,
    *,
    method: str = "sma",
    alpha: float | None = None,
    half_life: float | None = None,
    shape: str | None = None,
    floor: float | None = None,
    sigma_rel: float | None = None,
    weights: Sequence[float] | None = None,
    normalize: bool | None = None,
    order: str = "step",
    last: int | None = None,
    every: int | str | None = None,
    from_step: int | str | None = None,
    to_step: int | str | None = None,
    before: int | str | None = None,
    tokens_per_step: int | None = None,
    base: StrPath | None = None,
    dtype: str = "keep",
    accumulate: str = "auto",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    int_policy: str = "error",
    allow_nonfinite: bool = False,
    shard_size: int | None = None,
    requantize: bool = False,
    device: str = "auto",
    memory: int | None = None,
    device_memory: int | None = None,
    threads: int | None = None,
    chunk_size: int | None = None,
    direct: str = "auto",
    overwrite: bool = False,
    restart: bool = False,
    verify_resume: bool = False,
    rank: Rank | None = None,
) -> AveragePlan:
    """Plan the average of the checkpoints at `paths` (folders, files, or one run folder) into the folder `output`.

    Options are those of the command: `every`, `from_step`, `to_step` and `before` in steps (or, with `tokens_per_step`, a string
    such as "8B" in tokens), `memory`, `device_memory`, `chunk_size` and `shard_size` in bytes. `restart` throws away what an
    unfinished run to this output left, `verify_resume` reads its finished files again before they are trusted. `rank` is this
    process where several make one average (`merge_cli.features.share`). Without `output` the result goes to
    `./merged-<method>-<oldest step>-<newest step>`.

    Raises UsageError, InputError, MismatchError or UnsupportedError. What would only stop the writing (an existing destination,
    too little space) is in `findings` instead, so that a plan can always be looked at.
    """
    check_choices(dtype, accumulate, int_policy, order, method)
    parameters: dict[str, Any] = {
        "alpha": alpha,
        "half_life": half_life,
        "shape": shape,
        "floor": floor,
        "sigma_rel": sigma_rel,
        "weights": weights,
        "normalize": normalize,
    }
    given = {name: value for name, value in parameters.items() if value is not None}
    found, skipped = find_candidates(paths, order)
    check_tokens_per_step(tokens_per_step, (every, from_step, to_step, before))
    selection = choose(
        found,
        method,
        given,
        order=order,
        last=last,
        every=every,
        from_step=from_step,
        to_step=to_step,
        before=before,
        tokens_per_step=tokens_per_step,
    )
    candidates = selection.candidates
    chosen, doubts = weigh(candidates, method, given, order)
    seen: dict[str, Header] = {}
    inputs = [open_checkpoint(candidate.path, seen=seen) for candidate in candidates]
    base_index = _find_base(candidates, base)
    spec = MergeSpec(
        method=method,
        parameters=given,
        dtype=dtype,
        accumulate=accumulate,
        include=tuple(include),
        exclude=tuple(exclude),
        int_policy=int_policy,
        allow_nonfinite=allow_nonfinite,
        shard_bytes=shard_size,
        requantize=requantize,
    )
    steps = [candidate.step for candidate in candidates]
    merge = build_plan(spec, inputs, steps, base_index, [Output(tuple(range(len(inputs))), chosen, base_index)])
    notes = (*skipped, *selection.notes, *(note for checkpoint in inputs for note in checkpoint.notes), *merge.notes)
    warnings = (*selection.warnings, *doubts, *merge.warnings)
    if output is not None and not os.fspath(output):
        raise UsageError("-o is empty", hint="name the folder of the result:  -o merged")
    if output is not None and any(ord(character) < 32 for character in os.fspath(output)):
        raise UsageError("-o holds a line break or another control character", hint="name the folder of the result:  -o merged")
    destination = Path(output) if output is not None else Path(_default_name(method, candidates))
    if destination.suffix == ".safetensors":
        raise UsageError(
            f"the result is a folder, and {destination} looks like a file",
            hint=f"-o {destination.with_suffix('')}",
        )
    if destination.name in ("", ".."):
        destination = destination.resolve()
        if not destination.name:
            raise UsageError(f"the result cannot be {destination}", hint="name the folder of the result:  -o merged")
    from merge_cli.engine.budget import DEFAULT_MEMORY_BYTES, fit_memory
    from merge_cli.output.manifest import stands_for
    from merge_cli.output.preflight import check_destinations
    from merge_cli.tuning.backend import settle
    from merge_cli.tuning.direct import choose_direct

    if requantize and dtype != "keep":
        raise UsageError("--requantize keeps the base's dtypes, and --dtype changes them", hint="use one of them")
    rank = rank or Rank()
    if verify_resume and not rank.is_alone:
        raise UsageError("--verify-resume is for one process", hint="pmerge verify checks the result")
    memory_bytes = memory or DEFAULT_MEMORY_BYTES
    processes = rank.world_size if rank.source == WORKER else 1
    threads = threads or rank.threads(len(os.sched_getaffinity(0)))
    direct_reads = choose_direct(merge, direct)

    def fit(where: Device) -> Budget:
        return fit_memory(merge, memory_bytes, where, threads, device_memory, chunk_size, direct_reads.use, processes)

    where, budget, reasons = settle(device, merge, fit, rank.local_rank)
    notes = (*notes, *filter(None, [direct_reads.note]), *reasons)
    late = not rank.is_alone and stands_for(destination, merge, overwrite or rank.source == WORKER)
    findings = [] if late else check_destinations({destination: merge}, overwrite)
    return AveragePlan(
        merge, destination, candidates, notes, warnings, where, budget, overwrite, restart, verify_resume, tuple(findings), rank
    )


def average(
    paths: Sequence[StrPath],
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
    from merge_cli.output.manifest import count_nonfinite, request_state

    if plan.findings:
        raise plan.findings[0]
    began = time.perf_counter()
    merge = plan.merge
    total_read, total_write = merge.bytes_to_read, merge.bytes_to_write

    def report(statistics: Statistics) -> None:
        if on_progress is not None:
            seconds = time.perf_counter() - began
            on_progress(Progress(statistics.bytes_read, total_read, statistics.bytes_written, total_write, seconds))

    with Staging(plan.output, plan.overwrite) as staging:
        done = staging.prepare(request_state(merge), restart=plan.restart, verify=plan.verify_resume)
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


def check_choices(dtype: str, accumulate: str, int_policy: str, order: str, method: str) -> None:
    """Raise UsageError for an option that is none of its choices."""
    choices = {
        "--dtype": (dtype, ("keep", *OUTPUT_DTYPES)),
        "--accumulate": (accumulate, ("auto", "fp32", "fp64")),
        "--int-policy": (int_policy, ("error", "newest")),
        "--order": (order, ("step", "given", "mtime")),
        "--method": (method, tuple(METHODS)),
    }
    for option, (value, allowed) in choices.items():
        if value not in allowed:
            raise UsageError(
                f"{option} cannot be {value!r}",
                details=[f"expected  {', '.join(allowed)}"],
                hint=f"{option} {allowed[0]}",
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


def _default_name(method: str, candidates: Sequence[Candidate]) -> str:
    ends = [candidates[0], candidates[-1]]
    labels = [str(c.step) if c.step is not None else name_of(c.path).removesuffix(".safetensors") for c in ends]
    return f"merged-{method}-{labels[0]}-{labels[1]}"
