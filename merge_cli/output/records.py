"""Records of the files and pieces that are finished: an unfinished run does not write them again.

`done/NAME.json` belongs to a whole file, `done/NAME@BEGIN-END.json` to a piece of one, "/" in a
name being "%2F". A record counts if it was made for the same request, and if its file is still the
one: a whole file has the recorded size and modification time; pieces lie in the file with the
recorded inode.

Not guaranteed: that a recorded file still has its bytes, unless it is hashed.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merge_cli.engine.writer import partial_path
from merge_cli.output.schema import SCHEMA, is_newer
from merge_cli.planning.plan import OutputFile, WorkItem
from merge_cli.system.durable import fsync_folder, write_file
from merge_cli.system.files import files_in, read_json, sha256_of


@dataclass(frozen=True)
class FileRecord:
    """A finished file: its size in bytes, its sha256, and the number of elements that were NaN or
    Inf, by tensor.
    """

    file_bytes: int
    sha256: str
    nonfinite: Mapping[str, int] = field(default_factory=dict)


class Records:
    """The records in `folder` of files in `checkpoint`, made for the request with the hash
    `request`.
    """

    def __init__(self, folder: Path, checkpoint: Path, request: str) -> None:
        self.folder = folder
        self._checkpoint = checkpoint
        self.request = request

    def path(self, name: str) -> Path:
        """The record of a file or a piece."""
        return self.folder / f"{escaped(name)}.json"

    def add(self, item: WorkItem, sha256: str, nonfinite: Mapping[str, int]) -> None:
        """Record that `item` is complete and durable. Raises OutputError."""
        entry: dict[str, Any] = {"schema": SCHEMA, "request": self.request, "nonfinite": dict(nonfinite)}
        path = self._checkpoint / item.file.name
        if item.is_whole:
            mtime_ns = path.stat().st_mtime_ns
            entry |= {"name": item.file.name, "file_bytes": item.file.file_bytes, "mtime_ns": mtime_ns, "sha256": sha256}
        else:
            entry |= {"begin": item.begin, "end": item.end, "inode": partial_path(path).stat().st_ino}
        write_file(self.path(item.name), json.dumps(entry).encode())

    def names(self) -> set[str]:
        """The file names of all records, without a look into them: there may be thousands, and as
        many ranks that ask.
        """
        try:
            return {path.name for path in self.folder.iterdir() if path.suffix == ".json"}
        except FileNotFoundError:
            return set()

    def missing(self, files: Sequence[OutputFile]) -> list[str]:
        """The names of the files that have no record."""
        there = self.names()
        return [file.name for file in files if self.path(file.name).name not in there]

    def finished(self, only: str | None = None, *, hashed: bool = False) -> dict[str, FileRecord]:
        """The files whose records count, by name; `hashed` reads them and leaves out those with
        another sha256.
        """
        found = {}
        for path in sorted(self.folder.glob("*.json")) if only is None else [self.path(only)]:
            entry = read_json(path)
            try:
                file, record = self._checkpoint / entry["name"], _record(entry)
                status = file.stat()
                now = (status.st_size, status.st_mtime_ns, self.request)
                if is_newer(entry) or now != (record.file_bytes, entry["mtime_ns"], entry["request"]):
                    continue
            except (OSError, KeyError, TypeError, ValueError):
                continue  # a torn record, or its file is gone: that file is written again
            if not hashed or sha256_of(file) == record.sha256:
                found[str(entry["name"])] = record
        return found

    def covers(self, item: WorkItem) -> bool:
        """Whether records that count cover `item`, or all of its file."""
        if self.finished(item.file.name):
            return True
        return not item.is_whole and self._cover(self._pieces(item.file), item)

    def assembled(self, file: OutputFile) -> Mapping[str, int] | None:
        """The NaN and Inf of all pieces together if they cover the file, else None."""
        records = self._pieces(file)
        if not self._cover(records, WorkItem.whole(file)):
            return None
        counts = Counter[str]()
        for record in records:
            counts.update(record["nonfinite"])
        return counts

    def cut(self, files: Sequence[OutputFile]) -> list[OutputFile]:
        """The files that have records of pieces and none of the whole."""
        there = self.names()
        pieces = _pieces_by_file(there).keys() - there
        return [file for file in files if self.path(file.name).name in pieces]

    def forget_pieces(self, file: OutputFile) -> None:
        """Before a file is written as a whole: no record of a piece may count for the partial file
        that then has its name.
        """
        self._remove(_pieces_by_file(self.names()).get(self.path(file.name).name, []))

    def drop_stale(self, files: Sequence[OutputFile]) -> None:
        """Remove the records that do not count, so that from here on the name of a record is
        enough.
        """
        there, done = self.names(), self.finished()
        whole = {self.path(file.name).name: file for file in files}
        stale = {record for record, file in whole.items() if record in there and file.name not in done}
        for record, names in _pieces_by_file(there).items():
            inode = self._inode(whole[record]) if record in whole else None
            stale |= {name for name in names if not self._matches(read_json(self.folder / name), inode)}
        self._remove(sorted(stale))

    def keep_only(self, done: Mapping[str, FileRecord]) -> None:
        """Remove every record, and every file of the checkpoint, but those of `done`: parts of
        files, old side files.
        """
        kept = {self._checkpoint / name for name in done} | {self.path(name) for name in done}
        for path in (*files_in(self._checkpoint), *files_in(self.folder)):
            if path not in kept:
                path.unlink()
        for folder, _, _ in os.walk(self._checkpoint, topdown=False):
            with suppress(OSError):  # not empty
                if Path(folder) != self._checkpoint:
                    Path(folder).rmdir()
        fsync_folder(self.folder)  # no record may come back after a power cut and count for later bytes

    def num_bytes(self, files: Sequence[OutputFile]) -> int:
        """The bytes of the finished files and pieces, as far as the names of records tell."""
        there = self.names()
        total = sum(file.file_bytes for file in files if self.path(file.name).name in there)
        for record, names in _pieces_by_file(there).items():
            ranges = [name.removesuffix(".json").rpartition("@")[2].split("-") for name in names if record not in there]
            total += sum(int(end) - int(begin) for begin, end in ranges)
        return total

    def _pieces(self, file: OutputFile) -> list[dict[str, Any]]:
        """The records of pieces of a file that count."""
        names, inode = _pieces_by_file(self.names()).get(self.path(file.name).name, []), self._inode(file)
        return [record for name in names if self._matches(record := read_json(self.folder / name), inode)]

    def _matches(self, record: Mapping[str, Any], inode: int | None) -> bool:
        same = (record.get("inode"), record.get("request")) == (inode, self.request)
        return inode is not None and same and not is_newer(record)

    def _inode(self, file: OutputFile) -> int | None:
        """Of the file that its pieces are written into; it has its final name if a rank died before
        it could record that.
        """
        for path in (partial_path(self._checkpoint / file.name), self._checkpoint / file.name):
            with suppress(FileNotFoundError):
                return path.stat().st_ino
        return None

    @staticmethod
    def _cover(records: Sequence[Mapping[str, Any]], item: WorkItem) -> bool:
        """Whether the byte ranges of `records` together cover the item."""
        begin = item.begin
        for record in sorted(records, key=lambda record: int(record["begin"])):
            if record["begin"] <= begin < record["end"]:
                begin = record["end"]
        return begin >= item.end

    def _remove(self, names: Sequence[str]) -> None:
        for name in names:
            (self.folder / name).unlink(missing_ok=True)
        if names:
            fsync_folder(self.folder)


def escaped(name: str) -> str:
    """The name of a file or a piece as the name of one file."""
    return name.replace("/", "%2F")


def _record(entry: Mapping[str, Any]) -> FileRecord:
    return FileRecord(entry["file_bytes"], entry["sha256"], dict(entry["nonfinite"]))


def _pieces_by_file(records: set[str]) -> dict[str, list[str]]:
    """The record of a whole file -> the records of its pieces, which need not be those of this
    world size.
    """
    found: dict[str, list[str]] = {}
    for name in sorted(records):
        stem, at, place = name.removesuffix(".json").rpartition("@")
        if at and all(number.isdecimal() for number in place.split("-")):
            found.setdefault(f"{stem}.json", []).append(name)
    return found
