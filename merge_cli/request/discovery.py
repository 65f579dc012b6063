"""Discovery: from the paths that were typed to checkpoints with their steps.

    folders.py      what a folder is: a checkpoint, a run, or neither
    candidates.py   a checkpoint with its step
    misses.py       the errors where there is none
    screening.py    what is found and not averaged: earlier results, saves under way

Lists folders and reads `trainer_state.json`, through a store; never a weight.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from merge_cli.errors import IncompleteError, InputError, UsageError, first_ten
from merge_cli.formats.numbering import SHARD_NUMBER
from merge_cli.formats.opening import Seen
from merge_cli.formats.pickled import ENDINGS, is_shard
from merge_cli.request.candidates import read_candidate, with_steps_from_above
from merge_cli.request.folders import UNFINISHED, checkpoints_in, few, is_checkpoint, is_named_by_step, label_of
from merge_cli.request.labels import Candidate
from merge_cli.request.misses import no_such_checkpoint, nothing_found
from merge_cli.request.screening import check_none_is_merged, find_incomplete, offering_to_skip
from merge_cli.request.spec import Selection
from merge_cli.stores.store import (
    StrPath,
    as_path,
    folder_of,
    is_glob,
    is_local,
    name_of,
    open_store,
    resolve,
)

EMPTY = "holds no weights that pmerge reads"


def discover(
    paths: StrPath | Sequence[StrPath],
    on_skip: Callable[[str], None] | None = None,
    on_empty: Callable[[str], None] | None = None,
) -> list[str]:
    """The checkpoints at `paths` (or one path): themselves, and those inside every run folder, by
    number.

    A folder given alone is a run if it holds at least two checkpoints named by step, even with a
    final model saved beside them; a folder given with others is a checkpoint, if it can be. Hidden
    folders of a run are left out, as are, with a line each to `on_skip`, results of pmerge, folders
    whose name marks them as unfinished, links to a neighbor (`latest`), and checkpoints without a
    step (`final`, `best`) if others have one; folders named by step without weights go to
    `on_empty`, or without it are such a line too.

    Raises InputError if no checkpoint is found or one shard of several is given alone, UsageError
    if one checkpoint is named twice.
    """
    on_skip = on_skip or (lambda line: None)
    on_empty = on_empty or (lambda path: on_skip(f"{path} is left out: it {EMPTY}"))
    if isinstance(paths, str | os.PathLike):
        paths = [paths]
    found: list[str] = []
    expanded = [(path, given) for given in paths for path in _expand(given, on_skip)]
    for path, given in expanded:
        if not is_local(path) and is_glob(os.fspath(given)):
            found.append(path)  # to look into each would be a request each, and most are not selected
            continue
        status = open_store(path).stat(path)
        if status is None or status.kind == "broken link":
            raise no_such_checkpoint(path)
        if status.kind == "file":
            _check_whole_file(path)
            found.append(path)
            continue
        inside, empty, skipped = checkpoints_in(path)
        by_step = [entry for entry in inside if is_named_by_step(entry)]
        if is_checkpoint(path) and not (len(expanded) == 1 and len(by_step) >= 2):
            found.append(path)
        elif inside:
            found += by_step or inside
            skipped += [f"{entry} is left out: its name has no step" for entry in inside if by_step and entry not in by_step]
            for line in skipped:
                on_skip(line)
            for folder in empty:
                on_empty(folder)
        else:
            raise nothing_found(path)
    places: dict[str, str] = {}
    for path in found:
        other = places.setdefault(resolve(path), path)
        if other is not path:
            raise UsageError(f"the same checkpoint is named twice: {other} and {path}", hint="name it once")
    return found


def _expand(given: StrPath, on_skip: Callable[[str], None]) -> list[str]:
    """The paths that a pattern means, oldest first, without those that have no step, or are
    another's, where others have one.
    """
    if not os.fspath(given):
        raise UsageError("a checkpoint's path is empty", hint="is a variable of the shell unset?")
    path = as_path(given)
    store = open_store(path)
    matching = list(store.expand(path))
    if is_local(path) or not is_glob(path):
        return matching
    unfinished = [each for each in matching if UNFINISHED.search(name_of(each))]
    for each in unfinished:
        on_skip(f"{each} is left out: its name says that it is unfinished")
    matching = [each for each in matching if each not in unfinished]
    named = sorted((each for each in matching if label_of(each).step is not None), key=lambda each: (label_of(each).step, each))
    if not named:
        return matching
    for each in matching:
        if each not in named:
            on_skip(f"{each} is left out: its name has no step")
    first: dict[str, str] = {}
    for each in named:
        other = first.setdefault(store.resolve(each), each)
        if other is not each:
            on_skip(f"{each} is left out: it is the same as {other}")
    return list(first.values())


def _check_whole_file(path: str) -> None:
    """Raise InputError for a file that is no checkpoint by itself."""
    if not path.endswith((".safetensors", *ENDINGS)):
        above = folder_of(path)
        hint = (
            f"name its folder:  {above}"
            if is_local(path) and is_checkpoint(above)
            else "pmerge reads safetensors; convert other formats first"
        )
        raise InputError(f"not a file of weights that pmerge reads: {path}", hint=hint)
    shard = SHARD_NUMBER.match(name_of(path))
    if (shard and int(shard["count"]) > 1) or is_shard(name_of(path)):
        raise InputError(f"{path} is one of several shards of a checkpoint", hint=f"name its folder:  {folder_of(path)}")


class Found(NamedTuple):
    """The checkpoints that were found, and lines on what is left out: notes, and warnings where it
    may surprise.
    """

    candidates: list[Candidate]
    notes: list[str]
    warnings: list[str]


def find_candidates(paths: StrPath | Sequence[StrPath], asked: Selection | None = None, seen: Seen | None = None) -> Found:
    """The checkpoints at `paths`. Raises InputError or UsageError.

    Of those in a run folder the newest is left out if it is incomplete, with a warning; all that
    are incomplete if `incomplete` is "skip"; none, so that opening it is an error, if "error", or
    if fewer than two would be left. Folders named by step without weights are left out with a
    warning, and are an error if `incomplete` is "error". `seen` as in `open_checkpoint`.
    """
    asked = asked or Selection()
    skipped: list[str] = []
    empty: list[str] = []
    candidates = list_candidates(paths, asked, skipped.append, empty.append)
    warnings = [f"{few(empty)} left out as incomplete: {'it' if len(empty) == 1 else 'each'} {EMPTY}"] if empty else []
    named = {as_path(path) for path in _typed(paths)}
    if any(is_glob(path) and not is_local(path) for path in named):
        return Found(candidates, skipped, warnings)  # revisions of the Hub are complete
    candidates = [replace(each, in_run=each.path not in named) for each in candidates]
    if empty and asked.incomplete == "error":
        with offering_to_skip(candidates, seen):
            raise IncompleteError(f"{empty[0]} {EMPTY}", details=[f"as does  {path}" for path in first_ten(empty[1:])])
    in_runs = [each for each in candidates if each.in_run]
    left_out = find_incomplete(in_runs, asked.incomplete, seen)
    if len(candidates) - len(left_out) < 2:
        left_out = {}  # an average of one is none: opening it is the error that names it
    warnings += [f"{path} is left out as incomplete: {reason}" for path, reason in left_out.items()]
    return Found([each for each in candidates if each.path not in left_out], skipped, warnings)


def list_candidates(
    paths: StrPath | Sequence[StrPath],
    asked: Selection,
    on_skip: Callable[[str], None] | None = None,
    on_empty: Callable[[str], None] | None = None,
) -> list[Candidate]:
    """All checkpoints at `paths`, complete or not, with their steps; the other parameters as in
    `discover`.

    An earlier result of pmerge is an error unless `allow_merged` is set. Modification times are
    read only if `order` is "mtime". Raises InputError or UsageError.
    """
    typed = _typed(paths)
    if not typed:
        raise UsageError("no checkpoint to average", hint="pmerge average RUN_FOLDER")
    found = discover(typed, on_skip, on_empty)
    if asked.order == "given" and len(found) > len(typed):
        raise UsageError(
            "--order given is for checkpoints that are named one by one, and a run folder stands for several",
            details=[f"found     {', '.join(found[:3])} ..."],
            hint=f"name them in their order:  pmerge average {_all_or_first(found)} --order given",
        )
    if not asked.allow_merged:
        check_none_is_merged(found)
    return with_steps_from_above([read_candidate(path, with_time=asked.order == "mtime") for path in found])


def _all_or_first(paths: Sequence[str], most: int = 12) -> str:
    return shlex.join(paths) if len(paths) <= most else f"{shlex.join(paths[:3])} ... {shlex.quote(paths[-1])}"


def _typed(paths: StrPath | Sequence[StrPath]) -> list[StrPath]:
    return [paths] if isinstance(paths, str | os.PathLike) else list(paths)
