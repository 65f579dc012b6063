"""Which checkpoints of a run that is still training count now: complete, and unchanged for a while.

A broken checkpoint that still changes holds back those after it, for their windows may need it; one
that has not changed for ten times the settling time is left out.

Complete is what `formats/completeness.py` takes for it; and `trainer_state.json`, which
transformers' Trainer writes after the weights, has to be there where the checkpoint before has it.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from merge_cli.errors import InputError
from merge_cli.formats.completeness import incomplete_reason
from merge_cli.request.candidates import read_candidate
from merge_cli.request.discovery import EMPTY, list_candidates
from merge_cli.request.labels import Candidate
from merge_cli.request.selection import order_candidates
from merge_cli.request.spec import Selection
from merge_cli.stores.store import is_glob, is_local, join, name_of, open_store

_PATIENCE = 10
_MARKER = "trainer_state.json"


class Change(NamedTuple):
    """The state of a checkpoint's files: `newest_ns` is when one of them changed last, `files`
    their names, sizes and times.
    """

    newest_ns: int
    files: tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class Seen:
    """A checkpoint as it is now: `reason` is why it does not count, None if it does."""

    candidate: Candidate
    reason: str | None
    is_changing: bool

    @property
    def step(self) -> int:
        return self.candidate.step or 0


class Arrivals:
    """The checkpoints of `run`, looked at again and again; one that has not changed for `settle_s`
    seconds has settled.
    """

    def __init__(self, run: str, settle_s: float) -> None:
        self._run = run
        self._settle_s = settle_s
        self._complete: dict[str, Change] = {}
        self._first_seen: dict[str, tuple[Change, float]] = {}

    def listed(self) -> tuple[list[Candidate], list[str]]:
        """All checkpoints with a step, oldest first, complete or not; and a line for each thing
        that is left out. None where there is none yet.

        Raises InputError where the run has gone, MismatchError where two have one step.
        """
        try:
            notes: list[str] = []
            empty: list[str] = []
            found = list_candidates(self._run, Selection(), notes.append, empty.append)
            found = [each for each in found if each.step is not None]
            begun = _begun(empty, found)
        except InputError as error:
            if not is_glob(self._run) and open_store(self._run).stat(self._run) is None:
                raise
            return [], [error.message]
        notes += [f"{path} is left out: it {EMPTY}" for path in empty if path not in {each.path for each in begun}]
        return order_candidates([*found, *begun], "step", needs_order=True), notes

    def newest_complete(self, listed: Sequence[Candidate]) -> int:
        """The step of the newest checkpoint that counts now, 0 if there is none."""
        for i in reversed(range(len(listed))):
            newest = self.look_at(listed[max(0, i - 1) : i + 1])[-1]
            if newest.reason is None:
                return newest.step
        return 0

    def look_at(self, listed: Sequence[Candidate]) -> list[Seen]:
        """The state of each of `listed`, which follow each other in the run."""
        seen: list[Seen] = []
        has_marker = False
        for candidate in listed:
            try:
                seen.append(self._state_of(candidate, has_marker))
                has_marker = _has_marker(candidate.path)
            except (InputError, OSError) as error:  # the trainer removes or renames it right now
                seen.append(Seen(candidate, str(error), True))
        return seen

    def _state_of(self, candidate: Candidate, needs_marker: bool) -> Seen:
        path, settle_s = candidate.path, self._settle_s
        change = last_change(path)
        if self._complete.get(path) == change:
            return Seen(candidate, None, False)
        if path not in self._first_seen or self._first_seen[path][0] != change:
            self._first_seen[path] = (change, time.monotonic())
        # By the clock of the files, or by ours while we look on: a file server may be ahead of us.
        quiet_s = max(time.time() - change.newest_ns / 1e9, time.monotonic() - self._first_seen[path][1])
        reason = _why_incomplete(path, needs_marker)
        if reason is not None:
            return Seen(candidate, reason, quiet_s < _PATIENCE * settle_s)
        if quiet_s < settle_s:
            return Seen(candidate, f"it has changed in the last {settle_s:g} seconds", True)
        if last_change(path) != change:
            return Seen(candidate, "it changed while it was looked at", True)
        self._complete[path] = change
        return Seen(candidate, None, False)


def _begun(empty: Sequence[str], found: Sequence[Candidate]) -> list[Candidate]:
    """Those of the folders without weights that are checkpoints about to be written: named as one
    that was `found`, with another step. A folder of logs, which changes all the time, is none.
    """
    names = {_pattern(each.path) for each in found}
    steps = {each.step for each in found}
    begun = [read_candidate(path) for path in empty if _pattern(path) in names]
    return list({each.step: each for each in begun if each.step is not None and each.step not in steps}.values())


def _pattern(path: str) -> str:
    return re.sub(r"[0-9]+", "#", name_of(path))


def _why_incomplete(path: str, needs_marker: bool) -> str | None:
    try:
        reason = incomplete_reason(path)
    except InputError as error:  # broken in another way: for now, perhaps
        return error.message
    if reason is None and needs_marker and not _has_marker(path):
        return f"{path} has no {_MARKER}, which the checkpoint before it has"
    return reason


def _has_marker(path: str) -> bool:
    found = open_store(path).stat(join(path, _MARKER))
    return found is not None and found.kind == "file"


def last_change(path: str) -> Change:
    """When and how the files of the checkpoint at `path` changed last. Raises InputError or OSError
    where they go away meanwhile.

    On this machine the time of the inode counts too: `cp -p` and `rsync -t` set only the other one
    back.
    """
    files = tuple(sorted(_local(path) if is_local(path) else _remote(path, "")))
    return Change(max((time_ns for _, _, time_ns in files), default=0), files)


def _local(path: str) -> Iterator[tuple[str, int, int]]:
    names = [path] if Path(path).is_file() else [path, *(str(each) for each in Path(path).rglob("*"))]
    for name in names:
        status = os.lstat(name)
        yield os.path.relpath(name, path), status.st_size, max(status.st_mtime_ns, status.st_ctime_ns)


def _remote(path: str, inside: str) -> Iterator[tuple[str, int, int]]:
    store = open_store(path)
    for entry in store.list(join(path, inside) if inside else path):
        name = f"{inside}/{entry.name}" if inside else entry.name
        if entry.kind == "folder":
            yield from _remote(path, name)
        elif (found := store.stat(join(path, name))) is not None:
            yield name, found.num_bytes, found.mtime_ns
