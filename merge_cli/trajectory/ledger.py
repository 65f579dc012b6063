"""The ledger: every claim about a run is a row, coefficients over named checkpoints -> measured
numbers.

One JSON line a row, appended and synced, so a row is there whole or not at all. Each rank appends
to a file of its own (`ledger.jsonl`, `ledger-1.jsonl`, ...) and reads all of them. A row is found
by its key: the versions of the checkpoints, the coefficients, the dtype and the evaluator. Rows are
never changed; a later one with the same key replaces the earlier one.

Not promised: that a row is right when weights change without a new size, modification time or
header.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from merge_cli.errors import InputError
from merge_cli.system.durable import fsync_file, fsync_folder, make_folder, output_error
from merge_cli.system.files import read_regular
from merge_cli.system.json_text import parse_json
from merge_cli.trajectory.records import decode, encode

SCHEMA = 1
_MAX_LEDGER_BYTES = 1 << 30


class Part(NamedTuple):
    """One checkpoint of a claim: its name, its step where known, the version of its files, its
    coefficient.
    """

    name: str
    step: int | None
    version: str
    coefficient: float


class Document(NamedTuple):
    """The loss of one held-out document: summed nats, and the tokens and bytes that they are for."""

    nats: float
    tokens: int
    bytes: int


@dataclass(frozen=True)
class Row:
    """A claim: the merge of `parts`, oldest to newest, written as `dtype`, has these `metrics` by
    `evaluator`.

    `errors` are standard errors of metrics of the same name, as the evaluator reports them.
    `documents` hold the loss by document, always the same ones for one evaluator, so that
    differences can be paired. `annealed_from` is set for a checkpoint of a real annealing that
    began at this step. `weights` are the sha256 of the weight files by name, where they are known.
    """

    key: str
    name: str
    parts: tuple[Part, ...]
    dtype: str
    evaluator: str
    metrics: Mapping[str, float]
    errors: Mapping[str, float] = field(default_factory=dict)
    documents: tuple[Document, ...] = ()
    annealed_from: int | None = None
    weights: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    time: float = field(default_factory=time.time)
    host: str = field(default_factory=platform.node)
    schema: int = SCHEMA

    @property
    def is_single(self) -> bool:
        """Whether the row is about one checkpoint as it is."""
        return len(self.parts) == 1

    @property
    def steps(self) -> list[float] | None:
        """The steps of the parts, None unless all are known and rise."""
        known = [float(part.step) for part in self.parts if part.step is not None]
        return known if len(known) == len(self.parts) and known == sorted(set(known)) else None

    @property
    def subject(self) -> object:
        """What the row is about, whatever the version of the weights: two rows of one subject are
        about older and newer ones.
        """
        parts = tuple((part.name, part.step, part.coefficient) for part in self.parts)
        return parts, self.dtype, self.evaluator, self.annealed_from

    @property
    def coefficients(self) -> list[float]:
        return [part.coefficient for part in self.parts]


def key_of(parts: Sequence[Part], dtype: str, evaluator: str) -> str:
    """The sha256 of everything that decides a result, as far as it can be seen without reading the
    weights.
    """
    described = [[[part.name, part.step, part.version, part.coefficient.hex()] for part in parts], dtype, evaluator]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def current(rows: Sequence[Row]) -> list[Row]:
    """The latest row about each subject: earlier ones are about weights that have been replaced
    since.
    """
    latest = {row.subject: row for row in rows}
    return [row for row in rows if latest[row.subject] is row]


class Ledger:
    """The rows in `folder`, and the file to which this rank appends."""

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.folder = folder
        self.path = folder / ("ledger.jsonl" if rank == 0 else f"ledger-{rank}.jsonl")

    def rows(self) -> list[Row]:
        """All rows of all ranks, the latest of each key, in the order in which they were made.
        Raises InputError.
        """
        latest: dict[str, Row] = {}
        for path in sorted(self.folder.glob("ledger*.jsonl")):
            for row in _read(path):
                if row.key not in latest or row.time >= latest[row.key].time:
                    latest[row.key] = row
        return sorted(latest.values(), key=lambda row: (row.time, row.key))

    def append(self, row: Row) -> None:
        """Add a row and make it durable. Raises OutputError; the file then ends where it ended
        before.
        """
        line = json.dumps(encode(row), separators=(",", ":"), allow_nan=False).encode() + b"\n"
        fd = -1
        try:
            make_folder(self.folder)
            is_new = not self.path.exists()
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            with suppress(OSError):  # a filesystem without locks: two processes of one rank then must not run at once
                fcntl.flock(fd, fcntl.LOCK_EX)
            end = _whole_lines(fd)
            try:
                os.ftruncate(fd, end)
                _write_all(fd, line, end)
                fsync_file(fd)
            except OSError:
                os.ftruncate(fd, end)
                raise
            if is_new:
                fsync_folder(self.folder)
        except OSError as error:
            raise output_error(error, f"cannot add to {self.path}", self.path, len(line)) from error
        finally:
            if fd >= 0:
                os.close(fd)


def _read(path: Path) -> Iterator[Row]:
    """The rows of one file. A last line without its end was being written when its process died,
    and is no row.
    """
    try:
        lines = read_regular(path, _MAX_LEDGER_BYTES).split(b"\n")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    for number, line in enumerate(lines[:-1], 1):
        where = f"{path}, line {number}"
        try:
            value = parse_json(line)
        except ValueError as error:
            raise InputError(f"{where} is not JSON: {error}", hint=f"sed -i {number}d {path}  removes it") from error
        if isinstance(value, dict) and isinstance(value.get("schema"), int) and value["schema"] > SCHEMA:
            raise InputError(f"{where} was written by a newer pmerge (schema {value['schema']})", hint="pip install -U pmerge")
        yield decode(Row, value, where)


def _whole_lines(fd: int) -> int:
    """Where the last whole line of an open file ends."""
    end = os.fstat(fd).st_size
    while end:
        begin = max(0, end - 65536)
        newline = os.pread(fd, end - begin, begin).rfind(b"\n")
        if newline >= 0:
            return begin + newline + 1
        end = begin
    return 0


def _write_all(fd: int, data: bytes, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)
