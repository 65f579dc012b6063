"""The plan of a sweep: which outputs, from which checkpoints with which coefficients, in which
groups. Reads headers only, writes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_cli.errors import OutputError, PmergeError, UsageError
from merge_cli.formats.checkpoint import Checkpoint
from merge_cli.formats.opening import Seen, open_checkpoint
from merge_cli.formats.twins import twin_warnings
from merge_cli.names import SWEEP_REPORT
from merge_cli.output.schema import check_schema
from merge_cli.planning.groups import candidates_used, plan_groups
from merge_cli.planning.plan import MergePlan
from merge_cli.ranks.launcher import Rank
from merge_cli.request.amounts import parse_amount
from merge_cli.request.coefficients import Coefficients
from merge_cli.request.combinations import Chosen, choose_all
from merge_cli.request.destination import default_destination, default_destinations, destination_of
from merge_cli.request.discovery import Found, find_candidates
from merge_cli.request.grid import SELECTION, Combination, entry, grid, unique
from merge_cli.request.labels import Candidate
from merge_cli.request.methods import PARAMETERS
from merge_cli.request.screening import offering_to_skip
from merge_cli.request.selection import check_tokens_per_step, order_candidates
from merge_cli.request.spec import MergeSpec, RunConfig, Selection, read_options
from merge_cli.request.tokens import with_tokens_of_names
from merge_cli.stores.store import StrPath, is_local, resolve
from merge_cli.system.files import read_json
from merge_cli.system.still import wait_until_still

if TYPE_CHECKING:
    from merge_cli.engine.budget import Budget
    from merge_cli.engine.device import Device


@dataclass(frozen=True)
class SweepOutput:
    """One output: `merge` is the plan that `average` would make for it, without runs. `is_done`:
    it is published already.
    """

    combination: Combination
    path: Path
    candidates: tuple[Candidate, ...]
    merge: MergePlan
    is_done: bool = False

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
    """A planned sweep. `found` are the checkpoints that the outputs could choose from; `same_as`
    names for a combination the output that it equals, `skipped` why there is none.
    """

    output: Path
    found: tuple[str, ...]
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
    seen = Seen(run.max_header)
    selection, (candidates, notes, left_out) = _find(paths, wanted, selection, seen)
    begun = None
    if typed and not run.restart:
        from merge_cli.output.resumed import keep_of_sweep

        folders = default_destinations("sweep") if folder is None else [folder]
        begun, candidates, newer = keep_of_sweep(candidates, folders, [each.name for each in wanted], typed)
        notes += newer
    folder = folder or begun or default_destination("sweep", order_candidates(candidates, "step", needs_order=False))
    chosen, same_as, skipped, warnings = choose_all(wanted, candidates, selection)
    used = candidates_used(chosen)
    wait_until_still(sorted(path for path in used if is_local(path)), run.settle)
    with offering_to_skip(candidates, seen):
        opened = {path: open_checkpoint(path, seen=seen, training_state=spec.training_state) for path in used}
    merges = plan_groups(spec, chosen, opened)
    notes += [note for checkpoint in opened.values() for note in checkpoint.notes]
    for merge, _ in merges:
        notes += [note for note in merge.notes if note not in notes]
        warnings += [line for line in merge.warnings if line not in warnings]
    outputs = [_outputs(folder, merge, members, spec) for merge, members in merges]
    largest = max((merge for merge, _ in merges), key=lambda merge: merge.bytes_to_read)
    from merge_cli.features.preparation import prepare

    plans = {each.path: each.merge for each in _as_asked(outputs, wanted)}
    done, findings, tuning = prepare(plans, largest, run, rank, _check_report(folder / SWEEP_REPORT))
    outputs = [[replace(each, is_done=each.path in done) for each in members] for members in outputs]
    return SweepPlan(
        output=folder,
        found=tuple(resolve(each.path) for each in candidates),
        outputs=tuple(_as_asked(outputs, wanted)),
        groups=tuple(_groups(outputs, [merge for merge, _ in merges], tuning.fit)),
        same_as=tuple(same_as),
        skipped=tuple(skipped),
        inputs=tuple(opened.values()),
        notes=(*notes, *tuning.notes),
        warnings=(*left_out, *twin_warnings(list(opened.values())), *warnings),
        device=tuning.device,
        kernel=tuning.kernel,
        run=run,
        rank=rank,
        findings=findings,
    )


def _find(
    paths: StrPath | Sequence[StrPath], wanted: Sequence[Combination], selection: Selection, seen: Seen
) -> tuple[Selection, Found]:
    """The checkpoints at `paths`, and `selection` with the tokens of a step, where an amount of
    `wanted` is in tokens.
    """
    amounts = [item for each in wanted for item in replace(selection, **each.selection).amounts.items()]
    check_tokens_per_step(selection.tokens_per_step, [amount for _, amount in amounts])
    found = find_candidates(paths, selection, seen)
    selection, told, doubts = with_tokens_of_names(selection, [amount for _, amount in amounts], found.candidates)
    for flag, amount in amounts:
        parse_amount(amount, selection.tokens_per_step, option=flag)
    return selection, Found(found.candidates, [*told, *found.notes], [*found.warnings, *doubts])


def _outputs(folder: Path, merge: MergePlan, members: Sequence[Chosen], spec: MergeSpec) -> list[SweepOutput]:
    """Output k of `merge` as a result of its own in `folder`."""
    found = []
    for k, each in enumerate(members):
        own = replace(spec, method=each.combination.method, parameters=each.combination.parameters)
        found.append(SweepOutput(each.combination, folder / each.combination.name, each.candidates, merge.single_output(k, own)))
    return found


def _as_asked(groups: Sequence[Sequence[SweepOutput]], wanted: Sequence[Combination]) -> list[SweepOutput]:
    return sorted(chain(*groups), key=lambda each: wanted.index(each.combination))


def _groups(
    outputs: Sequence[Sequence[SweepOutput]], merges: Sequence[MergePlan], fit: Callable[[MergePlan], Budget]
) -> Iterator[SweepGroup]:
    """The groups with something left to do, without the outputs that are done."""
    for members, merge in zip(outputs, merges, strict=True):
        todo = [k for k, each in enumerate(members) if not each.is_done]
        if todo:
            rest = replace(merge, outputs=tuple(merge.outputs[k] for k in todo))
            yield SweepGroup(rest, tuple(members[k] for k in todo), fit(rest))


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
