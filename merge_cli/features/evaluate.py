"""Measure checkpoints and merges of a run, and keep the numbers: the feature behind `pmerge
evaluate`, as a library.

    plan_evaluation   which checkpoints and merges, and which of them the ledger knows already: reads headers, writes nothing
    evaluate          the same, then measures what is missing

Checkpoints are measured where they lie. Merges are made as `sweep` makes them, a few at a time, and
removed once measured, so the disk holds at most `batch` of them. A row is in the ledger as soon as
its number is known, so a killed evaluation goes on where it was. Of several ranks each measures its
share of the plan.

Not guaranteed: that the numbers are right. What can be seen is looked for: a cache that is keyed by
names, the same numbers from different weights, weights that change while they are measured.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merge_cli.errors import ChangedError, PmergeError, UsageError, first_ten
from merge_cli.features.sweep import run_sweep
from merge_cli.features.sweep_plan import SweepOutput, SweepPlan, plan_sweep
from merge_cli.formats.opening import open_checkpoint
from merge_cli.output.lock import Lock
from merge_cli.ranks.launcher import Rank
from merge_cli.request.candidates import read_candidate
from merge_cli.request.discovery import find_candidates
from merge_cli.request.grid import Combination
from merge_cli.request.labels import Candidate
from merge_cli.request.selection import order_candidates
from merge_cli.request.spec import Selection
from merge_cli.stores.store import StrPath, as_path, is_local, name_of
from merge_cli.trajectory.evaluators import EvaluationError, Evaluator, Subject
from merge_cli.trajectory.folder import MERGES, Run, Stop, folder_of, read_analysis, read_run, run_of, write_run
from merge_cli.trajectory.ledger import Ledger, Part, Row, key_of
from merge_cli.trajectory.measuring import Measuring, version_of
from merge_cli.trajectory.plans import Entry, make_plan

BATCH = 4


@dataclass(frozen=True)
class Target:
    """Something to measure: a `claim` without numbers yet; `path` of a checkpoint as it is, or the
    options that make a merge.
    """

    claim: Row
    path: Path | None
    entry: Entry | None


@dataclass(frozen=True)
class EvaluationPlan:
    """A planned evaluation: `targets` are this rank's, `known` the rows that the ledger has for
    some of them, by key.
    """

    run: Run
    paths: tuple[str, ...]
    folder: Path
    targets: tuple[Target, ...]
    known: Mapping[str, Row]
    evaluator: Evaluator
    rank: Rank
    dtype: str
    batch: int
    keep: bool
    allow_equal: bool
    merge_bytes: int
    notes: tuple[str, ...]

    @property
    def missing(self) -> list[Target]:
        """The targets that have to be measured."""
        return [each for each in self.targets if each.claim.key not in self.known]

    @property
    def disk_bytes(self) -> int:
        """The most that merges take on the disk at any time."""
        merges = sum(each.entry is not None for each in self.missing)
        return self.merge_bytes * (merges if self.keep else min(merges, self.batch))


@dataclass(frozen=True)
class EvaluationResult:
    """The rows of all targets in the order of the plan, those measured now, and the errors of those
    that failed, by name.
    """

    folder: Path
    rows: tuple[Row, ...]
    measured: tuple[Row, ...]
    failures: Mapping[str, PmergeError] = field(default_factory=dict)

    @property
    def error(self) -> EvaluationError | None:
        """The error that the failures amount to."""
        if not self.failures:
            return None
        lines = [f"{name}: {error.message}" for name, error in self.failures.items()]
        hint = "the same command measures what is missing"
        return EvaluationError(f"{len(lines)} evaluations failed", details=first_ten(lines), hint=hint)


def plan_evaluation(
    paths: StrPath | Sequence[StrPath],
    evaluator: Evaluator,
    *,
    plan: str | Sequence[Mapping[str, Any]] = "auto",
    annealed: Mapping[str, int] | None = None,
    output: StrPath | None = None,
    dtype: str = "keep",
    selection: Selection | None = None,
    batch: int = BATCH,
    keep: bool = False,
    redo: bool = False,
    allow_equal: bool = False,
    rank: Rank | None = None,
) -> EvaluationPlan:
    """Plan the evaluation of the run at `paths` (a run folder, or its checkpoints) by `evaluator`.

    `plan` is a name of `merge_cli.trajectory.plans`, or a list of objects with the options of
    `average` (with `last` 1: a checkpoint as it is). `annealed` are checkpoints of real annealing
    runs, with the step at which the decay began. `selection` is as in `average`, `dtype` that of
    the merges, `batch` how many of them lie on the disk at once, `keep` leaves them there, `redo`
    measures what is known, `allow_equal` believes equal numbers of different weights.

    Raises UsageError, InputError or MismatchError.
    """
    given = [as_path(path) for path in ([paths] if isinstance(paths, str) or not isinstance(paths, Sequence) else paths)]
    rank = rank or Rank()
    if batch < 1:
        raise UsageError(f"--batch must be at least 1, not {batch}")
    folder = folder_of(given, None if output is None else str(output))
    found, notes, left_out = find_candidates(given, selection)
    candidates = order_candidates(found, "step", needs_order=True)
    if isinstance(plan, str):
        analysis = read_analysis(folder)
        since = (analysis.constant_since if analysis is not None else None) or 0.0
        plan = make_plan(plan, [candidate.step for candidate in candidates if candidate.step is not None], since)
    work = _Planning(candidates, folder, dtype, evaluator.identity)
    targets = [*work.singles(plan), *work.merges(plan), *(work.annealed(*each) for each in (annealed or {}).items())]
    share = targets[rank.rank :: rank.world_size]
    rows = {} if redo else {row.key: row for row in Ledger(folder, rank.rank).rows()}
    return EvaluationPlan(
        run=Run(run_of(given), tuple(Stop(name_of(each.path), each.step) for each in candidates)),
        paths=tuple(candidate.path for candidate in candidates),
        folder=folder,
        targets=tuple(share),
        known={each.claim.key: rows[each.claim.key] for each in share if each.claim.key in rows},
        evaluator=evaluator,
        rank=rank,
        dtype=dtype,
        batch=max(batch, evaluator.at_once),
        keep=keep,
        allow_equal=allow_equal,
        merge_bytes=work.merge_bytes,
        notes=(*left_out, *notes, *work.notes),
    )


def evaluate(
    paths: StrPath | Sequence[StrPath],
    evaluator: Evaluator,
    *,
    on_row: Callable[[Row, int, int], None] | None = None,
    command: Sequence[str] = (),
    **options: Any,
) -> EvaluationResult:
    """Measure checkpoints and merges of the run at `paths` by `evaluator`; the options are those of
    `plan_evaluation`.
    """
    return run_evaluation(plan_evaluation(paths, evaluator, **options), on_row=on_row, command=command)


def run_evaluation(
    plan: EvaluationPlan, *, on_row: Callable[[Row, int, int], None] | None = None, command: Sequence[str] = ()
) -> EvaluationResult:
    """Measure what is missing; `on_row` gets each row as it is known, how many are done, and how
    many there are.

    An evaluation that fails does not stop the others, unless it is the first one ever. Raises
    EvaluationError then, and where different weights give the same numbers; OutputError, and what
    making the merges raises.
    """
    missing = plan.missing
    ledger = Ledger(plan.folder, plan.rank.rank)
    work = Measuring(plan.folder, plan.evaluator, ledger, len(missing), plan.allow_equal, on_row)
    lock = Lock(plan.folder / f"evaluate-{plan.rank.rank}.lock", plan.folder)
    lock.acquire()
    try:
        if plan.rank.rank == 0 and read_run(plan.folder) != plan.run:
            write_run(plan.folder, plan.run)
        work.measure([(each.claim, _subject(each.claim, each.path)) for each in missing if each.path is not None])
        merges = [each for each in missing if each.entry is not None]
        for first in range(0, len(merges), plan.batch):
            with _made(plan, merges[first : first + plan.batch], command) as made:
                work.measure(made)
    finally:
        lock.remove_files()
        lock.release()
    rows = {**plan.known, **{row.key: row for row in work.measured}}
    keys = [each.claim.key for each in plan.targets]
    return EvaluationResult(plan.folder, tuple(rows[key] for key in keys if key in rows), tuple(work.measured), work.failures)


class _Planning:
    """From entries of a plan to targets. `notes` name what cannot be made, `merge_bytes` is the
    size of a merge.

    An evaluator needs a folder of this machine, so a checkpoint that lies elsewhere is made here
    like a merge, of one.
    """

    def __init__(self, candidates: Sequence[Candidate], folder: Path, dtype: str, evaluator: str) -> None:
        self._candidates = candidates
        self._folder = folder
        self._dtype = dtype
        self._evaluator = evaluator
        self._are_here = all(is_local(candidate.path) for candidate in candidates)
        self.notes: list[str] = []
        self.merge_bytes = 0

    def singles(self, plan: Sequence[Mapping[str, Any]]) -> Iterator[Target]:
        by_step = {candidate.step: candidate for candidate in self._candidates}
        for entry in plan:
            if entry.get("last") == 1 and self._are_here:
                step = entry.get("at", self._candidates[-1].step)
                if step not in by_step:
                    raise UsageError(f"there is no checkpoint at step {step}", hint="pmerge inspect RUN_FOLDER")
                yield self._single(by_step[step], entry.get("name") or f"step-{step}")

    def merges(self, plan: Sequence[Mapping[str, Any]]) -> Iterator[Target]:
        entries = [entry for entry in map(self._named, plan) if entry.get("last") != 1 or not self._are_here]
        if not entries:
            return
        paths = [candidate.path for candidate in self._candidates]
        swept = plan_sweep(paths, self._folder / MERGES, combinations=entries, dtype=self._dtype, device="cpu", allow_merged=True)
        self.notes += [f"{combination.name} is skipped: {reason}" for combination, reason in swept.skipped]
        self.notes += [f"{combination.name} is the same as {name}" for combination, name in swept.same_as]
        versions = _versions(swept)
        for each in swept.outputs:
            self.merge_bytes = max(self.merge_bytes, each.merge.bytes_to_write)
            claim = self._claim(each.combination.name, _parts(each, versions), self._dtype)
            yield Target(claim, None, _entry(each.combination))

    def _named(self, entry: Mapping[str, Any]) -> Mapping[str, Any]:
        """A single checkpoint gets the name that it has where nothing is made of it."""
        if entry.get("last") != 1:
            return entry
        return {"name": f"step-{entry.get('at', self._candidates[-1].step)}", **entry}

    def annealed(self, given: str, start: int) -> Target:
        candidate = read_candidate(Path(given))
        if candidate.step is None or candidate.step <= start:
            raise UsageError(
                f"{given} is no checkpoint of an annealing that began at step {start}",
                details=[f"found     step {candidate.step}"],
                hint="--annealed PATH:STEP, the step at which the decay began",
            )
        return self._single(candidate, f"annealed-{start}-{candidate.step}", start)

    def _single(self, candidate: Candidate, name: str, annealed_from: int | None = None) -> Target:
        part = Part(name_of(candidate.path), candidate.step, version_of(open_checkpoint(candidate.path)), 1.0)
        return Target(self._claim(name, (part,), "keep", annealed_from), Path(candidate.path), None)

    def _claim(self, name: str, parts: tuple[Part, ...], dtype: str, annealed_from: int | None = None) -> Row:
        evaluator = self._evaluator
        key = key_of(parts, dtype, evaluator if annealed_from is None else f"annealed from {annealed_from}: {evaluator}")
        return Row(key, name, parts, dtype, evaluator, {}, annealed_from=annealed_from)


@contextmanager
def _made(plan: EvaluationPlan, targets: Sequence[Target], command: Sequence[str]) -> Iterator[list[tuple[Row, Subject]]]:
    """Make the merges of `targets`; they are removed afterwards unless they are to be kept."""
    folder = plan.folder / (MERGES if plan.keep else f"{MERGES}-{plan.rank.rank}.tmp")
    try:
        entries = [each.entry for each in targets if each.entry is not None]
        swept = plan_sweep(plan.paths, folder, combinations=entries, dtype=plan.dtype, overwrite=True, allow_merged=True)
        versions = _versions(swept)
        made = {each.combination.name: each for each in swept.outputs}
        for each in targets:
            if each.claim.name not in made or _parts(made[each.claim.name], versions) != each.claim.parts:
                raise ChangedError(f"the checkpoints of {each.claim.name} have changed", hint="run the same command again")
        run_sweep(swept, command=command)
        yield [(each.claim, _subject(each.claim, made[each.claim.name].path)) for each in targets]
    finally:
        if not plan.keep:
            shutil.rmtree(folder, ignore_errors=True)


def _versions(swept: SweepPlan) -> dict[str, str]:
    return {checkpoint.path: version_of(checkpoint) for checkpoint in swept.inputs}


def _parts(output: SweepOutput, versions: Mapping[str, str]) -> tuple[Part, ...]:
    return tuple(
        Part(name_of(candidate.path), candidate.step, versions[candidate.path], value)
        for candidate, value in zip(output.candidates, output.coefficients.values, strict=True)
    )


def _entry(combination: Combination) -> Entry:
    return {"name": combination.name, "method": combination.method, **combination.parameters, **combination.selection}


def _subject(claim: Row, path: Path | None) -> Subject:
    step = claim.parts[-1].step
    return Subject(claim.name, path or Path(), "" if step is None else str(step))
