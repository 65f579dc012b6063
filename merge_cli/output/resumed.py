"""The checkpoints that an earlier start of the same command selected, when its run has grown since.

A job that is requeued, or a rank that comes late, has the same command line, and finds more
checkpoints. Its work so far is that of the old selection, which the staging folder records (and
`pmerge.json`, if all was published before); so it goes on with the old one. The staging folders of
a sweep are those of the groups begun so far, so it records all that it found beside its report.

Commands are the same if their words are, but for those that only decide how the work is carried
out. A requeued job (`SLURM_RESTART_COUNT`) may also name more checkpoints than before, as
`run/ckpt_*/` does by itself.
"""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from merge_cli.names import SWEEP_BEGUN
from merge_cli.output.existing import is_published_since_start, read_manifest
from merge_cli.output.folder import staging_path
from merge_cli.request.labels import Candidate
from merge_cli.request.option import options_of
from merge_cli.request.spec import Processes, RunConfig
from merge_cli.stores.store import resolve
from merge_cli.system.files import read_json

_SWITCHES = {"--quiet", "-q", "--json", *(each.flag for each in options_of(RunConfig) if each.is_switch)}
_WITH_VALUE = {each.flag for kind in (RunConfig, Processes) for each in options_of(kind) if not each.is_switch}


def is_requeued(environment: Mapping[str, str]) -> bool:
    """Whether Slurm has started this job before."""
    return environment.get("SLURM_RESTART_COUNT", "0") not in ("", "0")


def keep_selected(
    found: Sequence[Candidate], destinations: Iterable[Path], typed: Sequence[str]
) -> tuple[list[Candidate], list[str]]:
    """The candidates that the records of `destinations` name, and a note on newer ones; all of them
    if no record is of the command `typed`, if none is newer, or if some are gone.

    Records are those of unfinished runs; of finished ones too in a job that was requeued, or if
    another rank published while this one started.
    """
    selected: set[str] = set()
    for path in destinations:
        state = read_json(staging_path(path) / "state.json")
        if _is_same(state.get("command"), typed, _may_be_new(found)):
            selected |= _inputs(state.get("state"))
        selected |= _inputs_of_published(path, found, typed)
    return _kept(found, selected)


def keep_of_sweep(
    found: Sequence[Candidate], folders: Iterable[Path], names: Sequence[str], typed: Sequence[str]
) -> tuple[Path | None, list[Candidate], list[str]]:
    """As `keep_selected`, for the sweep `typed` into one of `folders`, with results called `names`;
    also the folder of an unfinished one.
    """
    published: set[str] = set()
    for folder in folders:
        record = read_json(folder / SWEEP_BEGUN)
        begun = record.get("found")
        if isinstance(begun, list) and _is_same(record.get("command"), typed, _may_be_new(found)):
            return (folder, *_kept(found, {str(path) for path in begun}))
        for name in names:
            published |= _inputs_of_published(folder / name, found, typed)
    return (None, *_kept(found, published))


def _kept(found: Sequence[Candidate], selected: set[str]) -> tuple[list[Candidate], list[str]]:
    places = {resolve(each.path): each for each in found}
    if not selected or not selected <= places.keys():
        return list(found), []
    kept = [each for place, each in places.items() if place in selected]
    newest = max(each.step or 0 for each in kept)
    newer = [each for place, each in places.items() if place not in selected and (each.step is None or each.step > newest)]
    if not newer:
        return list(found), []
    count = f"{len(newer)} checkpoint{'' if len(newer) == 1 else 's'}"
    return kept, [f"{count} newer than the start of this command left out; to throw its work away and select anew:  --restart"]


def _inputs_of_published(path: Path, found: Sequence[Candidate], typed: Sequence[str]) -> set[str]:
    """The inputs of the result at `path`, if this start of the command may have made it."""
    manifest = read_manifest(path)
    if not manifest or not (is_requeued(os.environ) or is_published_since_start(path)):
        return set()
    return _inputs(manifest) if _is_same(manifest.get("command"), typed, _may_be_new(found)) else set()


def _inputs(record: Any) -> set[str]:
    inputs = record.get("inputs") if isinstance(record, dict) else None
    if isinstance(inputs, dict):
        return {str(path) for path in inputs}
    return {str(each.get("path")) for each in inputs if isinstance(each, dict)} if isinstance(inputs, list) else set()


def _may_be_new(found: Sequence[Candidate]) -> list[str]:
    """The words that the command may have more than it had: the checkpoints, in a requeued job."""
    return [each.path for each in found] if is_requeued(os.environ) else []


def _is_same(command: Any, typed: Sequence[str], extra: Sequence[str]) -> bool:
    """Whether a recorded command has the words of `typed`, but for those of `extra` that came
    since.
    """
    try:
        words = shlex.split(command) if isinstance(command, str) else [str(word) for word in command]
    except (TypeError, ValueError):
        return False
    was, now = Counter(_request_words(words[1:])), Counter(_request_words(typed))
    return not was - now and all(word.rstrip("/") in extra for word in now - was)


def _request_words(words: Sequence[str]) -> list[str]:
    found, skip = [], False
    for word in words:
        flag = word.split("=")[0]
        if not skip and word not in _SWITCHES and flag not in _WITH_VALUE:
            found.append(word)
        skip = not skip and word in _WITH_VALUE
    return found
