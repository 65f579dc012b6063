"""Records of the files and pieces that are finished: an unfinished run does not write them again.

`done/NAME.json` belongs to a whole file, `done/NAME@BEGIN-END.json` to a piece of one, "/" in a
name being "%2F". A record counts if it was made for the same request, and if its file is still the
one: a whole file has the recorded size, and the recorded modification time or else the recorded
sha256; pieces lie in the file with the recorded inode.

Not guaranteed: that a file with the recorded time still has its bytes, unless it is hashed.
"""

from __future__ import annotations

import json
import stat
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merge_cli.engine.writer import CHECKPOINT, final_name, pieces_name
from merge_cli.errors import OutputError, first_ten
from merge_cli.output.schema import SCHEMA, is_newer
from merge_cli.planning.plan import OutputFile, WorkItem
from merge_cli.system.durable import output_error
from merge_cli.system.files import read_json
from merge_cli.system.held import GROWING, HeldFolder, escaped

DONE = "done"  # the folder in the staging folder that has the records


@dataclass(frozen=True)
class FileRecord:
    """A finished file: its size in bytes, its sha256, the number of elements that were NaN or Inf,
    by tensor, and its modification time, 0 if that is not known.
    """

    file_bytes: int
    sha256: str
    nonfinite: Mapping[str, int] = field(default_factory=dict)
    mtime_ns: int = 0


class Records:
    """The records in a staging folder, made for the request with the hash `request`."""

    def __init__(self, staging: HeldFolder, request: str) -> None:
        self.folder = staging.path / DONE
        self._staging = staging
        self.request = request

    def path(self, name: str) -> Path:
        """The record of a file or a piece."""
        return self.folder / f"{escaped(name)}.json"

    def add(self, item: WorkItem, result: str, nonfinite: Mapping[str, int]) -> None:
        """Record that `item` is complete and durable; `result` is that of its writer. Raises
        OutputError.
        """
        entry: dict[str, Any] = {"schema": SCHEMA, "request": self.request, "nonfinite": dict(nonfinite)}
        if item.is_whole:
            try:
                mtime_ns = self._staging.stat(final_name(item.file)).st_mtime_ns
            except OSError as error:
                raise output_error(error, f"cannot record {item.name}", self.path(item.name)) from error
            entry |= {"name": item.file.name, "file_bytes": item.file.file_bytes, "mtime_ns": mtime_ns, "sha256": result}
        else:
            entry |= {"begin": item.begin, "end": item.end, "inode": int(result)}
        self._staging.write_file(f"{DONE}/{self.path(item.name).name}", json.dumps(entry).encode())

    def names(self) -> set[str]:
        """The file names of all records, without a look into them: there may be thousands, and as
        many ranks that ask.
        """
        try:
            return {name for name in self._staging.names(DONE) if name.endswith(".json")}
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
        for path in [self.folder / name for name in sorted(self.names())] if only is None else [self.path(only)]:
            entry = read_json(path)
            try:
                name, record = str(entry["name"]), _record(entry)
                if is_newer(entry) or entry["request"] != self.request:
                    continue
            except (KeyError, TypeError, ValueError):
                continue  # a torn record: that file is written again
            if self.matches(name, record, hashed=hashed):
                found[name] = record
        return found

    def matches(self, name: str, record: FileRecord, *, hashed: bool = False) -> bool:
        """Whether a file of the checkpoint is still the recorded one. A file with another time is
        read: a process that wrote it too has replaced it by the same bytes.
        """
        try:
            status = self._staging.stat(f"{CHECKPOINT}/{name}")
        except OSError:
            return False
        if not stat.S_ISREG(status.st_mode) or status.st_size != record.file_bytes:
            return False
        if status.st_mtime_ns == record.mtime_ns and not hashed:
            return True
        return self._staging.sha256(f"{CHECKPOINT}/{name}") == record.sha256

    def covers(self, item: WorkItem) -> bool:
        """Whether records that count cover `item`, or all of its file."""
        if self.finished(item.file.name):
            return True
        return not item.is_whole and self._cover(self._pieces(item.file).values(), item)

    def assembled(self, file: OutputFile) -> Mapping[str, int] | None:
        """The NaN and Inf of all pieces together if they cover the file, else None."""
        records = self._pieces(file).values()
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
        """Remove every record and every file but those of `done`: torn files, those of dead
        processes, old side files.
        """
        kept = {f"{CHECKPOINT}/{name}" for name in done} | {f"{DONE}/{self.path(name).name}" for name in done}
        for part in (CHECKPOINT, GROWING, DONE):
            for name in self._staging.files(part):
                if f"{part}/{name}" not in kept:
                    self._staging.remove(f"{part}/{name}")
        self._staging.remove_empty_folders(CHECKPOINT)
        self._staging.sync(DONE)  # no record may come back after a power cut and count for later bytes

    def remove_side_files(self, files: Sequence[OutputFile]) -> None:
        """Remove everything in the checkpoint but the files of the plan, before side files are
        copied: those of an earlier try may be gone from the base.
        """
        planned = {file.name for file in files}
        for name in self._staging.files(CHECKPOINT):
            if name not in planned:
                self._staging.remove(f"{CHECKPOINT}/{name}")

    def num_bytes(self, files: Sequence[OutputFile]) -> int:
        """The bytes of the finished files and pieces, by the names of their records alone."""
        there = self.names()
        total = sum(file.file_bytes for file in files if self.path(file.name).name in there)
        for record, names in _pieces_by_file(there).items():
            ranges = [name.removesuffix(".json").rpartition("@")[2].split("-") for name in names if record not in there]
            total += sum(int(end) - int(begin) for begin, end in ranges)
        return total

    def _pieces(self, file: OutputFile) -> dict[str, dict[str, Any]]:
        """The records of pieces of a file that count, by their name."""
        names, inode = _pieces_by_file(self.names()).get(self.path(file.name).name, []), self._inode(file)
        return {name: record for name in names if self._matches(record := read_json(self.folder / name), inode)}

    def _matches(self, record: Mapping[str, Any], inode: int | None) -> bool:
        same = (record.get("inode"), record.get("request")) == (inode, self.request)
        has_shape = _are_numbers(record.get("begin"), record.get("end")) and _are_counts(record.get("nonfinite"))
        return inode is not None and same and has_shape and not is_newer(record)

    def _inode(self, file: OutputFile) -> int | None:
        """Of the file that its pieces are written into; it has its final name if a rank died before
        it could record that.
        """
        for name in (pieces_name(file), final_name(file)):
            with suppress(FileNotFoundError):
                return self._staging.stat(name).st_ino
        return None

    @staticmethod
    def _cover(records: Iterable[Mapping[str, Any]], item: WorkItem) -> bool:
        """Whether the byte ranges of `records` together cover the item."""
        begin = item.begin
        for record in sorted(records, key=lambda record: int(record["begin"])):
            if record["begin"] <= begin < record["end"]:
                begin = record["end"]
        return begin >= item.end

    def _remove(self, names: Sequence[str]) -> None:
        for name in names:
            self._staging.remove(f"{DONE}/{name}")
        if names:
            self._staging.sync(DONE)


def files_have_changed(checkpoint: Path, names: Sequence[str]) -> OutputError:
    """The error for finished files that are no longer as they were recorded."""
    return OutputError(
        f"{len(names)} finished files of {checkpoint} are gone or have changed",
        details=first_ten(names),
        hint="run the same command again: they are written again",
    )


def _are_numbers(*values: object) -> bool:
    return all(type(value) is int for value in values)


def _are_counts(nonfinite: object) -> bool:
    return isinstance(nonfinite, dict) and _are_numbers(*nonfinite.values())


def _record(entry: Mapping[str, Any]) -> FileRecord:
    """The record of a whole file. Raises KeyError or TypeError where it has another shape."""
    is_text = isinstance(entry["sha256"], str)
    if not (is_text and _are_counts(entry["nonfinite"]) and _are_numbers(entry["file_bytes"], entry["mtime_ns"])):
        raise TypeError("not the record of a file")
    return FileRecord(entry["file_bytes"], entry["sha256"], dict(entry["nonfinite"]), entry["mtime_ns"])


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
