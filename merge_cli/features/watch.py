"""Merge a run while it trains: the feature behind `pmerge watch`, as a library.

Whenever a checkpoint is complete, the rolling merges that end at it are made, measured where an
evaluator is given, handed to a command, and removed again once newer ones have taken their place.

    RUN.pmerge/watch.json       what is remembered (`trajectory/watched.py`)
    RUN.pmerge/merges/NAME      the merges; ledger and outputs lie beside them as those of `evaluate` do

A process that is killed at any moment is started again with the same options and goes on: merges
are staged and published as all results are, rows of the ledger are synced, and only what the record
says is done is not looked at again. The command after a merge runs at least once: again, if watch
is killed between its end and the record of it.

Not guaranteed: that a checkpoint counts which is removed before it has settled, or saved anew under
a step that is done; that a merge is made again when a checkpoint in its window is completed long
after (ten times the settling time) its last change.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from merge_cli.errors import Interrupted, MismatchError, PmergeError, UsageError
from merge_cli.features.evaluate import plan_evaluation, run_evaluation
from merge_cli.features.forecast import forecast
from merge_cli.features.report import report
from merge_cli.features.sweep import run_sweep
from merge_cli.features.sweep_plan import plan_sweep
from merge_cli.features.watch_plan import WatchPlan, ending_at
from merge_cli.names import MANIFEST
from merge_cli.output.lock import Lock
from merge_cli.request.grid import Combination
from merge_cli.request.labels import Candidate
from merge_cli.request.selection import select_checkpoints
from merge_cli.request.spec import Selection
from merge_cli.system.files import sha256_of
from merge_cli.system.tether import Tether
from merge_cli.trajectory.arrivals import Arrivals, Seen
from merge_cli.trajectory.command import fill, variables
from merge_cli.trajectory.evaluators import EvaluationError, Evaluator, empty_folder
from merge_cli.trajectory.folder import MERGES, OUTPUTS
from merge_cli.trajectory.ledger import Row
from merge_cli.trajectory.plans import single
from merge_cli.trajectory.results import main_metric
from merge_cli.trajectory.watched import Watched, WatchedMerges

_LONGEST_LOOK_S = 30.0
_LONGEST_RETRY_S = 3600.0
_CLOSED = ("done", "removing", "removed")


@dataclass(frozen=True)
class Event:
    """Something that happened: `kind` is one word, `text` the rest of the line."""

    kind: str
    text: str
    step: int | None = None
    name: str = ""
    path: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)


def watch(plan: WatchPlan, on_event: Callable[[Event], None] = lambda event: None, *, once: bool = False) -> int:
    """Look at the run again and again, or `once`; the number of steps whose work failed.

    Raises OutputError where another process watches into the same folder, or the record cannot be
    written, InputError where it cannot be read.
    """
    with Lock(plan.folder / "watch.lock", plan.folder) as lock:
        watcher = _Watcher(plan, on_event)
        watcher.finish_removals()
        while True:
            watcher.look()
            if once:
                lock.remove_files()
                return len(watcher.failed)
            time.sleep(min(_LONGEST_LOOK_S, max(0.1, plan.settle_s / 2)))


class _Watcher:
    """The state of one process; all that another one needs is in the record."""

    def __init__(self, plan: WatchPlan, on_event: Callable[[Event], None]) -> None:
        self._plan = plan
        self._on_event = on_event
        self._merges = WatchedMerges(plan.folder)
        self._evaluator: Evaluator | None = None
        self._arrivals = Arrivals(plan.run, plan.settle_s)
        self._emitted: set[tuple[str, str, str]] = set()
        self.failed: dict[int, tuple[float, float]] = {}  # step -> when to try again, and how long was waited for that

    def look(self) -> None:
        """Do all that can be done now."""
        with self._reporting(-1):
            listed, notes = self._arrivals.listed()
            for note in notes:
                self._once("note", note, note)
            self._begin_new_kinds(listed)
            self._finish_without(listed)
            todo = [each for each in listed if self._open_kinds(each, listed)]
            if not todo:
                self._once("idle", self._plan.run, "nothing to do")
                return
            seen = self._arrivals.look_at(listed[: listed.index(todo[-1]) + 1])
            for each in todo:
                self._try(each, listed, seen)

    def finish_removals(self) -> None:
        """Remove what a killed process had begun to remove."""
        for name, merge in self._merges.record.merges.items():
            if merge.state == "removing":
                self._remove(name)

    def _begin_new_kinds(self, listed: Sequence[Candidate]) -> None:
        """Kinds that are new begin at the newest checkpoint that is complete, or at `since`."""
        plan, since = self._plan, dict(self._merges.record.since)
        new = [kind.name for kind in plan.kinds if kind.name not in since]
        if new:
            since |= dict.fromkeys(new, self._arrivals.newest_complete(listed))
        if plan.since is not None:
            since |= {kind.name: min(since[kind.name], plan.since) for kind in plan.kinds}
        if since != self._merges.record.since:
            self._merges.begin(since)

    def _finish_without(self, listed: Sequence[Candidate]) -> None:
        """Close what was begun at checkpoints that have been removed since."""
        steps = {each.step for each in listed}
        for name, merge in self._merges.record.merges.items():
            if merge.step in steps or merge.state not in ("making", "made"):
                continue
            with self._reporting(merge.step):
                if merge.state == "made" and (self._merges.path(name)).is_dir():
                    self._hand_over(name, merge.step)
                else:
                    self._emit(Event("skipped", f"{name}: its checkpoints are gone", merge.step, name))
                    self._merges.note(name, replace(merge, state="skipped", reason="its checkpoints are gone"))

    def _open_kinds(self, candidate: Candidate, listed: Sequence[Candidate]) -> list[Combination]:
        """The merges at a checkpoint that are neither finished nor passed over."""
        step = candidate.step or 0
        count = sum((each.step or 0) <= step for each in listed)
        found = []
        for kind in self._plan.kinds:
            merge = self._merges.record.merges.get(f"{kind.name}-at{step}")
            closed = merge is not None and (merge.state in _CLOSED or (merge.state == "skipped" and merge.checkpoints == count))
            if self._merges.record.since[kind.name] <= step and not closed:
                found.append(kind)
        return found

    def _try(self, candidate: Candidate, listed: Sequence[Candidate], seen: Sequence[Seen]) -> None:
        """Do the work at one checkpoint if it is complete, no earlier one is being written, and it
        did not just fail.
        """
        step = candidate.step or 0
        before = [each for each in seen if each.step <= step]
        if before[-1].reason is not None:
            self._once("waiting", candidate.path, before[-1].reason, step)
            return
        for each in before:
            if each.is_changing:
                self._once("waiting", candidate.path, f"for {each.candidate.path}, an earlier one", step)
                return
            if each.reason is not None:
                self._once("left out", each.candidate.path, each.reason, each.step)
        if step not in self.failed or time.monotonic() >= self.failed[step][0]:
            with self._reporting(step):
                complete = [each.candidate for each in before if each.reason is None]
                self._work(step, complete, self._open_kinds(candidate, listed), len(before))

    @contextmanager
    def _reporting(self, step: int) -> Iterator[None]:
        """Errors become events, and the step is tried again later; signals end the process."""
        try:
            yield
            self.failed.pop(step, None)
        except Interrupted:
            raise
        except (PmergeError, OSError) as error:
            _, waited = self.failed.get(step, (0.0, 0.0))
            wait = min(_LONGEST_RETRY_S, max(1.0, self._plan.settle_s, 2 * waited))
            self.failed[step] = (time.monotonic() + wait, wait)
            lines = str(error).splitlines()
            self._emit(Event("failed", "; ".join(" ".join(line.split()) for line in lines), None if step < 0 else step))

    def _work(self, step: int, complete: Sequence[Candidate], kinds: Sequence[Combination], listed: int) -> None:
        """Everything at one checkpoint: make, measure, report, hand over, note, remove older ones."""
        self._once("complete", complete[-1].path, "its files and sizes are there, and settled", step)
        ready: list[Combination] = []
        skipped: dict[str, Watched] = {}
        for kind in kinds:
            wanted = ending_at(kind, step)
            try:
                select_checkpoints(complete, replace(Selection(), **wanted.selection), kind.method)
                ready.append(wanted)
            except (UsageError, MismatchError) as error:
                why = "; ".join([error.message, *(" ".join(line.split()) for line in error.details[:1])])
                skipped[wanted.name] = Watched(kind.name, step, "skipped", reason=why)
        made = self._make(step, complete, ready, skipped)
        if self._plan.evaluator is not None:
            self._measure(step, complete, made)
        for name in made:
            self._hand_over(name, step)
        for name, merge in skipped.items():
            self._emit(Event("skipped", f"{name}: {merge.reason}", step, name))
            self._merges.note(name, replace(merge, checkpoints=listed))
        self._remove_older()

    def _make(
        self, step: int, complete: Sequence[Candidate], ready: Sequence[Combination], skipped: dict[str, Watched]
    ) -> dict[str, Combination]:
        if not ready:
            return {}
        folder = self._plan.folder / MERGES
        entries = [_entry(each) for each in ready]
        planned = plan_sweep(
            [each.path for each in complete], folder, combinations=entries, dtype=self._plan.dtype, run=self._plan.config
        )
        skipped |= {
            each.name: Watched(_kind(each), step, "skipped", reason=f"the same as {name}") for each, name in planned.same_as
        }
        for each in planned.outputs:
            if each.combination.name not in self._merges.record.merges:
                is_own = not os.path.lexists(each.path)
                self._merges.note(each.combination.name, Watched(_kind(each.combination), step, "making", is_own))
        for warning in planned.warnings:
            self._once("warning", warning, warning, step)
        result = run_sweep(planned, command=sys.argv)
        for each in planned.outputs:
            name, path = each.combination.name, str(each.path)
            merge = self._merges.record.merges[name]
            if merge.state != "made":
                about = f"{len(each.candidates)} checkpoints in {result.seconds:.1f} s"
                self._emit(Event("merged", f"{path}  {about}", step, name, path))
            self._merges.note(name, replace(merge, state="made", manifest=sha256_of(each.path / MANIFEST), reason=""))
        return {each.combination.name: each.combination for each in planned.outputs}

    def _measure(self, step: int, complete: Sequence[Candidate], made: Mapping[str, Combination]) -> None:
        plan = self._plan
        if self._evaluator is None and plan.evaluator is not None:
            self._evaluator = plan.evaluator(Path(complete[-1].path))
            for warning in self._evaluator.warnings:
                self._emit(Event("warning", warning, step))
        assert self._evaluator is not None
        entries = [single(step), *map(_entry, made.values())]
        planned = plan_evaluation(
            [each.path for each in complete],
            self._evaluator,
            plan=entries,
            output=plan.folder,
            dtype=plan.dtype,
            keep=True,
            allow_equal=plan.allow_equal,
        )
        result = run_evaluation(planned, on_row=lambda row, done, total: self._emit(_measured(row, plan.metric)), command=sys.argv)
        if result.error is not None:
            raise result.error
        if plan.report is not None:
            self._foretell(step)

    def _foretell(self, step: int) -> None:
        plan = self._plan
        assert plan.report is not None
        found = forecast(plan.run, output=plan.folder, metric=plan.metric)
        if found.now is not None:
            now = found.now
            text = f"annealed loss now {now.value:.4f} ({now.low:.4f} to {now.high:.4f})"
            self._emit(Event("forecast", text, step, metrics={"value": now.value, "low": now.low, "high": now.high}))
        else:
            self._emit(Event("forecast", "none yet: " + "; ".join(each.text for each in found.refusals), step))
        path = report(plan.run, plan.report, ledger=plan.folder, metric=plan.metric)
        self._emit(Event("report", str(path), step, path=str(path)))

    def _hand_over(self, name: str, step: int) -> None:
        """Run the command after a merge, and note the merge as finished."""
        path = self._merges.path(name)
        if self._plan.then is not None:
            folder = self._plan.folder / OUTPUTS / f"then-{name}"
            empty_folder(folder)
            (folder / "out").mkdir()
            values = {"path": str(path.absolute()), "name": name, "step": str(step), "out": str((folder / "out").absolute())}
            environment = {**os.environ, **variables(values, (folder / "result.json").absolute())}
            tether = Tether(fill(self._plan.then, values), environment, folder / "stdout", folder / "stderr")
            try:
                code = tether.wait()
            finally:
                tether.cut()
            if code != 0:
                raise EvaluationError(f"--then ended with exit code {code} for {name}", hint=f"its output is in {folder}")
            self._emit(Event("then", f"ended with 0 for {name}", step, name, str(path)))
        self._merges.note(name, replace(self._merges.record.merges[name], state="done"))
        self._emit(Event("done", str(path), step, name, str(path)))

    def _remove_older(self) -> None:
        """Of each kind, keep the newest merges; only folders that are recorded as made here go."""
        if self._plan.keep is None:
            return
        for kind in self._plan.kinds:
            merges = [(merge.step, name) for name, merge in self._merges.record.merges.items() if merge.kind == kind.name]
            done = sorted(each for each in merges if self._merges.record.merges[each[1]].state == "done")
            for _, name in done[: -self._plan.keep]:
                if self._merges.record.merges[name].is_own:
                    self._remove(name)

    def _remove(self, name: str) -> None:
        step, path = self._merges.record.merges[name].step, str(self._merges.path(name))
        kept = self._merges.remove(name)
        self._emit(Event("kept", f"{path}: {kept}", step, name, path) if kept else Event("removed", path, step, name, path))

    def _once(self, kind: str, about: str, text: str, step: int | None = None) -> None:
        """An event that is not repeated while nothing changes."""
        if (kind, about, text) not in self._emitted:
            self._emitted.add((kind, about, text))
            self._emit(Event(kind, text if text == about else f"{about}: {text}", step, path=about))

    def _emit(self, event: Event) -> None:
        self._on_event(event)


def _kind(made: Combination) -> str:
    return made.name.rpartition("-at")[0]


def _entry(each: Combination) -> dict[str, Any]:
    return {"name": each.name, "method": each.method, **each.parameters, **each.selection}


def _measured(row: Row, metric: str | None) -> Event:
    name = metric if metric is not None and metric in row.metrics else main_metric(list(row.metrics))
    text = f"{row.name}  {name} {row.metrics[name]:.6g}  in {row.seconds:.1f} s"
    return Event("measured", text, row.parts[-1].step, row.name, metrics=row.metrics)
