"""The folder in which everything about a run is kept, and what lies in it: ledger, analysis, the
list of checkpoints.

    RUN.pmerge/ledger.jsonl     rows of this rank; ledger-N.jsonl those of rank N
    RUN.pmerge/run.json         the run's path, names and steps of its checkpoints
    RUN.pmerge/analysis.json    what `pmerge analyze` found
    RUN.pmerge/outputs/         what evaluations printed and wrote
    RUN.pmerge/merges/          merges that are kept

It is made in the current folder, or beside the run when the current folder lies in it: a run is
never written to.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from merge_cli.errors import InputError, UsageError
from merge_cli.stores.store import folder_of as folder_above
from merge_cli.stores.store import is_glob, is_local, name_of, read_file
from merge_cli.system.durable import write_file
from merge_cli.system.json_text import parse_json
from merge_cli.trajectory.analysis import Analysis
from merge_cli.trajectory.records import decode, encode

SUFFIX = ".pmerge"
ANALYSIS, RUN, OUTPUTS, MERGES = "analysis.json", "run.json", "outputs", "merges"
MAX_FILE_BYTES = 256 << 20
T = TypeVar("T")


class Stop(NamedTuple):
    """A checkpoint of the run."""

    name: str
    step: int | None


@dataclass(frozen=True)
class Run:
    """The run that a folder is about, as it was last seen."""

    path: str
    checkpoints: tuple[Stop, ...]
    schema: int = 1

    @property
    def steps(self) -> list[float]:
        """The known steps, ascending."""
        return sorted(float(each.step) for each in self.checkpoints if each.step is not None)


def folder_of(paths: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """The folder for the run at `paths` (one run folder, or the checkpoints of one). Raises
    UsageError for an `output` that is empty or elsewhere.
    """
    if output is not None:
        if not str(output):
            raise UsageError("-o is empty", hint="name the folder of the results:  -o evals")
        if not is_local(str(output)):
            raise UsageError(f"{output} is no folder of this machine", hint="name one:  -o evals")
        return Path(output)
    here = Path.cwd()
    if not is_local(str(paths[0])):
        return here / (name_of(run_of(paths)) + SUFFIX)
    run = Path(os.path.realpath(paths[0]))
    if len(paths) > 1 or run.is_file():
        run = run.parent
    beside = run.parent if here == run or run in here.parents else here
    return beside / (run.name + SUFFIX)


def run_of(paths: Sequence[str | Path]) -> str:
    """The one name of the run: its folder; of revisions on the Hub their repository."""
    first = str(paths[0])
    if is_local(first):
        return str((Path(first) if len(paths) == 1 else Path(paths[-1]).absolute().parent).absolute())
    if "@" in name_of(first):
        return first.rpartition("@")[0]
    return folder_above(first) if len(paths) > 1 or is_glob(name_of(first)) else first


def write_run(folder: Path, run: Run) -> None:
    """Note which run the folder is about. Raises OutputError."""
    write_file(folder / RUN, json.dumps(encode(run), indent=1).encode() + b"\n")


def read_run(folder: Path) -> Run | None:
    """The run that the folder is about, if it is noted. Raises InputError."""
    return _read(folder / RUN, Run)


def write_analysis(folder: Path, analysis: Analysis) -> None:
    """Keep an analysis. Raises OutputError."""
    write_file(folder / ANALYSIS, json.dumps(encode(analysis), indent=1).encode() + b"\n")


def read_analysis(folder: Path) -> Analysis | None:
    """The analysis of the run, if there is one. Raises InputError."""
    return _read(folder / ANALYSIS, Analysis)


def _read(path: Path, kind: type[T]) -> T | None:
    if not path.exists():
        return None
    try:
        value = parse_json(read_file(str(path), MAX_FILE_BYTES))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}", hint=f"rm {path}, and make it again") from error
    return decode(kind, value, str(path))
