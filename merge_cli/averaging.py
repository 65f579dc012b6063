"""Average the checkpoints of one run: the feature behind `pmerge average`, as a library.

    plan_average   which checkpoints, which coefficients, which bytes: reads headers only, writes nothing
    average        the same, then reads, reduces, writes and publishes

Nothing is printed: progress goes to a callback, warnings are in the plan, errors are the exceptions of `merge_cli.errors`.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_cli.cluster import WORKER, Rank
from merge_cli.errors import InputError, OutputError, PmergeError, UsageError, first_ten
from merge_cli.formats.checkpoint import open_checkpoint
from merge_cli.formats.safetensors import Header
from merge_cli.methods import METHODS, Coefficients, coefficients, needs_step_numbers, warnings_for
from merge_cli.plan import MergePlan, MergeSpec, Output
from merge_cli.planner import OUTPUT_DTYPES, build_plan
from merge_cli.selection import (
    Candidate,
    Selection,
    check_doubts,
    discover,
    is_in_tokens,
    order_candidates,
    parse_amount,
    read_candidate,
    select,
)

if TYPE_CHECKING:
    from merge_cli.engine.budget import Budget
    from merge_cli.engine.device import Device
    from merge_cli.engine.stream import Statistics
    from merge_cli.output.staging import Done

StrPath = str | os.PathLike[str]


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
    process where several make one average (`merge_cli.sharing`). Without `output` the result goes to
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
    found, skipped = find_candidates(paths)
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
    from merge_cli.engine.choice import settle  # torch is imported only once the checkpoints are known to fit together
    from merge_cli.engine.storage import choose_direct
    from merge_cli.output.manifest import stands_for
    from merge_cli.output.staging import check_destinations

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
    from merge_cli.engine.stream import Statistics, Todo, check_inputs_unchanged, stream
    from merge_cli.output.manifest import MANIFEST, count_nonfinite, request_state
    from merge_cli.output.staging import Done, Staging

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

        def finished(_: int, written: Todo, sha256: str, nonfinite: Mapping[str, int]) -> None:
            staging.record(written.file, sha256, nonfinite)
            done[written.file.name] = Done(written.file.file_bytes, sha256, nonfinite)

        todo = [Todo(file, (0,)) for file in merge.files if file.name not in done]
        statistics = stream(merge, todo, [staging.checkpoint], plan.budget, plan.device, report, finished)
        complete(merge, staging.checkpoint, done, command)
        check_inputs_unchanged(merge)
        staging.publish()
    return AverageResult(plan.output, time.perf_counter() - began, statistics, reused, count_nonfinite(done))


def complete(merge: MergePlan, folder: Path, done: Mapping[str, Done], command: Sequence[str]) -> None:
    """Write what a checkpoint in `folder` holds beside its weights, which are `done`: side files, pmerge.json, the index."""
    from merge_cli.engine.durable import write_file
    from merge_cli.output.manifest import MANIFEST, digest, index_of, manifest, seal, write_side_files

    beside = write_side_files(merge.inputs[merge.base], folder, merge.spec.dtype, merge.dequantized)
    index = index_of(merge)
    if index is not None:
        beside[index[0]] = digest(index[1])
    content = manifest(merge, merge.outputs[0], done, list(command or sys.argv), beside)
    write_file(folder / MANIFEST, seal(content))
    if index is not None:
        write_file(folder / index[0], index[1])
    _check_complete(merge, folder)


def _check_complete(merge: MergePlan, folder: Path) -> None:
    """Read back every header: each planned tensor must be in its file, or nothing is published."""
    from merge_cli.formats.safetensors import read_header

    for file in merge.files:
        try:
            header = read_header(folder / file.name)
        except InputError as error:
            raise OutputError(f"cannot read back what was written: {error.message}", details=error.details) from error
        if tuple(header.tensors) != file.names and set(header.tensors) != set(file.names):
            raise OutputError(f"{folder / file.name} does not hold the tensors that were planned")


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


def find_candidates(paths: Sequence[StrPath]) -> tuple[list[Candidate], list[str]]:
    """The checkpoints that `paths` mean, and a line for each thing there that is left out. Raises InputError or UsageError."""
    if not paths:
        raise UsageError("no checkpoint to average", hint="pmerge average RUN_FOLDER")
    skipped: list[str] = []
    return [read_candidate(path) for path in discover(paths, skipped.append)], skipped


def check_tokens_per_step(tokens_per_step: int | None, amounts: Iterable[int | str | None]) -> None:
    """Raise UsageError when the tokens of a step are given and none of `amounts` is in tokens."""
    if tokens_per_step is not None and not any(map(is_in_tokens, amounts)):
        raise UsageError(
            "--tokens-per-step is given, and no amount is in tokens",
            hint="amounts in tokens have a suffix (--every 8B); plain numbers are steps, and do not need --tokens-per-step",
        )


def choose(
    candidates: Sequence[Candidate],
    method: str,
    parameters: Mapping[str, Any],
    *,
    order: str = "step",
    last: int | None = None,
    every: int | str | None = None,
    from_step: int | str | None = None,
    to_step: int | str | None = None,
    before: int | str | None = None,
    tokens_per_step: int | None = None,
) -> Selection:
    """Which of `candidates` a request means, oldest to newest; options as of `plan_average`.

    Raises UsageError or MismatchError where they do not give that selection, InputError for a doubtful step.
    """
    if parameters.get("weights") is not None and order == "step" and method == "weights":
        order = "given"  # weights belong to the checkpoints as they were typed

    def steps(option: str, amount: int | str | None, rounding: Callable[[Fraction], int]) -> int | None:
        return None if amount is None else parse_amount(amount, tokens_per_step, option=option, rounding=rounding)

    ordered = order_candidates(candidates, order, METHODS[method].needs_steps or last is not None)
    selection = select(
        ordered,
        last=last,
        every=steps("--every", every, round),
        from_step=steps("--from", from_step, math.ceil),
        to_step=steps("--to", to_step, math.floor),
        before=steps("--before", before, math.ceil),
    )
    notes, warnings = check_doubts(ordered, selection.candidates)
    chosen = selection.candidates
    unknown = sum(candidate.step is None for candidate in chosen)
    if order == "step" and unknown and len(chosen) > 1:
        about = f"no step is known for {unknown} of {len(chosen)} checkpoints: their order is the one given"
        (notes if unknown == len(chosen) else warnings).append(f"{about}, {chosen[-1].path} last")
    steps_known = [candidate.step for candidate in chosen if candidate.step is not None]
    if order == "given" and steps_known != sorted(steps_known):
        notes.append(f"the order given is not that of the steps; the last one, {chosen[-1].path}, counts as the newest")
    merged = [str(candidate.path) for candidate in chosen if (candidate.path / "pmerge.json").exists()]
    if merged:
        warnings.append(f"results of pmerge are averaged again: {', '.join(first_ten(merged))}")
    if len(chosen) == 1:
        warnings.append(f"only one checkpoint is selected, {chosen[0].path}: nothing is averaged")
    return Selection(chosen, (*selection.notes, *notes), tuple(warnings))


def weigh(
    candidates: Sequence[Candidate], method: str, parameters: Mapping[str, Any], order: str = "step"
) -> tuple[Coefficients, list[str]]:
    """The coefficients of `candidates`, oldest to newest, and what is known to hurt about them. Raises UsageError."""
    steps = [candidate.step for candidate in candidates]
    places = _places(candidates, needs_step_numbers(method, **parameters))
    chosen = coefficients(method, places, **parameters)
    return chosen, warnings_for(chosen, places if order == "step" and steps == places else None)


def _places(candidates: Sequence[Candidate], must_be_steps: bool) -> list[float]:
    """The steps, or the positions 0, 1, 2 ... where they are not known or not in order."""
    steps = [candidate.step for candidate in candidates]
    known = [float(step) for step in steps if step is not None]
    if len(known) == len(steps) and all(a < b for a, b in pairwise(known)):
        return known
    if must_be_steps:
        raise UsageError(
            "this method is defined over steps, and the checkpoints have none (or not ascending)",
            details=[f"{candidate.path}  step {candidate.step}" for candidate in candidates[:10]],
            hint="name the folders by step (ckpt_1000), or use a method that only needs the order: --method wma",
        )
    return [float(position) for position in range(len(candidates))]


def _find_base(candidates: Sequence[Candidate], base: StrPath | None) -> int:
    if base is None:
        return len(candidates) - 1  # the last in the order: the newest by step, the last one typed by --order given
    wanted = Path(base).resolve()
    for position, candidate in enumerate(candidates):
        if candidate.path.resolve() == wanted:
            return position
    raise UsageError(
        f"--base {base} is not one of the checkpoints that are averaged",
        details=[str(candidate.path) for candidate in candidates[:10]],
        hint=f"--base {candidates[-1].path}",
    )


def _default_name(method: str, candidates: Sequence[Candidate]) -> str:
    ends = [candidates[0], candidates[-1]]
    labels = [str(c.step) if c.step is not None else c.path.name.removesuffix(".safetensors") for c in ends]
    return f"merged-{method}-{labels[0]}-{labels[1]}"
