"""One destination written by several processes, also on several hosts that share its filesystem.

The staging folder is that of a single run (`folder.py`), its lock shared by all ranks, and beside it there are

    control     locked for a moment by the rank that sets the folder up, and by the one that publishes
    claims/     a file for each piece (see `ranks/shares.py`), locked by the rank that works on it
    ranks/      a file for each rank with the bytes that it has written and not yet recorded, for the progress of all

A rank tries to claim each piece of its share in turn, and then what others have not begun. The kernel gives the claim of a dead
rank back, so its pieces are taken over by those that still run, or by the next ones. A finished piece is recorded in done/ like a
finished file; the rank that finds all pieces of a file recorded completes the file, and the one that finds all files complete
publishes: whoever comes last sees everything, since it looks after it has written its own record.

Not guaranteed: that ranks take over from each other where the filesystem has no flock; each then does its own share, and those of
dead ranks wait for the same ranks to be run again. Where flock is local to each host (NFS with local_lock, Lustre with localflock),
two hosts may do a piece twice, with the same bytes.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from merge_cli.engine.writer import assemble, partial_path
from merge_cli.errors import OutputError, first_ten
from merge_cli.output.folder import Done, Staging, already_there, differences
from merge_cli.output.lock import Lock, flock
from merge_cli.output.manifest import stands_for
from merge_cli.output.schema import SCHEMA, is_newer
from merge_cli.planning.plan import MergePlan, OutputFile, WorkItem
from merge_cli.ranks.launcher import Rank
from merge_cli.system.durable import fsync_folder, output_error, write_file
from merge_cli.system.files import read_json

_CONTROL_WAIT_S = 300.0
_SHARED_WAIT_S = 2.0
_TELL_EVERY_S = 2.0
_FRESH_S = 60.0


class JointStaging(Staging):
    """The staging folder of a destination as one rank of several sees it; None for somebody who only publishes.

    `is_published` becomes true when the result of this plan is found to stand.
    """

    def __init__(self, destination: Path, merge: MergePlan, rank: Rank | None, overwrite: bool = False) -> None:
        super().__init__(destination, overwrite)
        self._merge = merge
        self._rank = rank
        self._lock = Lock(self.folder / "lock", destination, shared=True, wait_s=_SHARED_WAIT_S)
        self._control = Lock(self.folder / "control", destination, wait_s=_CONTROL_WAIT_S)
        self._claims: dict[str, int] = {}
        self._told = 0.0
        self._written = self._recorded = 0  # bytes that this rank has written, and had when it last recorded a piece
        self._whole = {self._record_file(file.name).name: file for file in merge.files}

    def __enter__(self) -> JointStaging:
        self._control.acquire()
        try:
            self._lock.acquire()
        except BaseException:
            self._control.release()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        for fd in self._claims.values():
            os.close(fd)
        if self._rank is not None:
            with suppress(OSError):
                self._progress_file(self._rank).unlink(missing_ok=True)
        self._lock.release()
        self._control.release()
        self._remove_empty_folder()

    # --- the folder

    def join(self, state: Mapping[str, Any], *, restart: bool = False) -> None:
        """Get ready as one of several. `restart` throws away the work of another request. `missing` tells what is left to do.

        Records are looked into only by a rank that is alone: what live ranks have recorded is durable. So the time that hundreds of
        ranks need, one after the other, does not grow with the number of files.

        Raises OutputError where the destination holds something else, or the folder holds the work of another request that is to be
        kept or is still going on.
        """
        self._set_state(state)
        try:
            if self._stands():
                return
            if os.path.lexists(self.destination) and not self.overwrite:
                raise already_there(self.destination)
            self._settle(restart)
            self._write_state()
            for folder in (self._done, self.checkpoint, *self._more_folders):
                folder.mkdir(exist_ok=True)
            self._agree_on_world_size()
            if not self._lock.has_flock or self._lock.is_alone():
                self._drop_stale_records()
        except OSError as error:
            raise output_error(error, f"cannot work in {self.folder}", self._state_file) from error
        finally:
            self._control.release()

    def _stands(self) -> bool:
        """Whether the result of this plan is published; what the publishing rank could not clean away goes.

        The folder that holds the result is opened because an NFS client then asks the server what is in it. Else it may say for up
        to a minute that there is no result, as it was when this rank began.
        """
        with suppress(OSError):
            os.close(os.open(self.destination.parent, os.O_RDONLY | os.O_DIRECTORY))
        self.is_published = self._recover() or stands_for(self.destination, self._merge, self.overwrite)
        if self.is_published:
            self.clean()
        return self.is_published

    def _settle(self, restart: bool) -> None:
        """Keep what belongs to this request; throw away, with `restart` or where nothing is finished, that of another.

        The first of several ranks with `restart` throws away what was there before them. Without flock nobody knows who is still at
        work, so nothing is ever thrown away.
        """
        if not (restart and self._lock.is_alone()):
            self._check_schema()
        was = self._recorded_state()
        if not self._lock.has_flock and self._state_file.exists() and (restart or was != self._state):
            raise OutputError(
                f"{self.folder} holds unfinished work, and without flock nobody knows whose",
                details=first_ten(differences(was, self._state), "more differences"),
                hint=f"when no rank is at work any more:  rm -r {shlex.quote(str(self.folder))}",
            )
        if was == self._state and not (restart and self._lock.is_alone()):
            return
        if self._state_file.exists() and was != self._state and not self._lock.is_alone():
            raise OutputError(
                f"other ranks are writing {self.destination}, and not by the same request",
                details=first_ten(differences(was, self._state), "more differences"),
                hint="give all ranks the same command, or write somewhere else:  -o PATH",
            )
        if not restart:
            self._check_same_request()
        self._discard()

    def _agree_on_world_size(self) -> None:
        """Raise OutputError while ranks of another world size are at work: their pieces are other ones."""
        if self._rank is None:
            return
        path, size = self.folder / "ranks" / "world_size", self._rank.world_size
        other = read_json(path).get("world_size", size)
        if other != size and not self._lock.is_alone():
            raise OutputError(
                f"other ranks are writing {self.destination}",
                details=[f"found     rank {self._rank.rank} of {size}", f"expected  one of {other} ranks"],
                hint=f"wait for them, or stop them; what they have finished is kept. Without flock:  --world-size {other}",
            )
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"world_size": size}))
        partial.rename(path)

    def _drop_stale_records(self) -> None:
        """Remove the records whose files are gone or others than they say, so that from here on a record's name is enough."""
        there = self._records()
        done = self._finished_files(verify=False)
        stale = {record for record, file in self._whole.items() if record in there and file.name not in done}
        for record, names in _pieces_by_file(there).items():
            inode = self._inode(self._whole[record]) if record in self._whole else None
            stale |= {name for name in names if not self._speaks_of(read_json(self._done / name), inode)}
        for name in stale:
            (self._done / name).unlink(missing_ok=True)
        if stale:
            fsync_folder(self._done)

    def missing(self) -> list[str]:
        """The names of the files that no record says are complete."""
        there = self._records()
        return [file.name for record, file in self._whole.items() if record not in there]

    def take_turn(self) -> dict[str, Done]:
        """Begin to publish, as the only rank that does; all files, by name, or none where another rank has published."""
        self._control.acquire()
        if self._stands():
            return {}
        done = self._finished_files(verify=False)
        if torn := [file.name for file in self._merge.files if file.name not in done]:
            raise OutputError(
                f"{len(torn)} finished files of {self.checkpoint} are gone or have changed",
                details=first_ten(torn),
                hint="run the same command again: they are written again",
            )
        return done

    def clean(self) -> None:
        """Remove the staging folder after the result was published. The lock goes first: by that other ranks know."""
        self._is_cleaned = True
        with suppress(OSError):
            self._lock.remove_files()
        with suppress(OSError):
            self._remove_content()
            (self.folder / "control.owner").unlink(missing_ok=True)
            self.folder.rmdir()

    # --- pieces

    @property
    def has_flock(self) -> bool:
        """Whether claims are kept by the kernel, so that ranks can take over from each other, and share a file."""
        return self._lock.has_flock

    def claim(self, piece: WorkItem, own: bool) -> bool:
        """Whether this rank is to write `piece` now: it is not done, and no other rank is at it."""
        if not own and self._record_file(piece.name).exists():
            return False
        if not self._take(piece, own):
            return False
        if piece.is_whole:
            self._forget_pieces(piece.file)
        return True

    def _take(self, piece: WorkItem, own: bool) -> bool:
        path = self.folder / "claims" / _escaped(piece.name)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            return False  # published, and cleaned away
        except OSError as error:
            raise output_error(error, f"cannot create {path}", path) from error
        try:
            if (flock(fd) or own) and not self._is_recorded(piece) and self._lock.is_current:  # in this order, see `clean`
                self._claims[piece.name], fd = fd, -1
                return True
        except BlockingIOError:
            pass  # another rank is at it
        finally:
            if fd >= 0:
                os.close(fd)
        return False

    def record_piece(self, piece: WorkItem, sha256: str, nonfinite: Mapping[str, int]) -> None:
        """Note that a piece is durable, and let go of it. A piece that is a whole file is recorded as a single run does it."""
        try:
            if piece.is_whole:
                self.record(piece.file, sha256, nonfinite)
            else:
                inode = partial_path(self.checkpoint / piece.file.name).stat().st_ino
                place = {"begin": piece.begin, "end": piece.end, "inode": inode}
                entry = {"schema": SCHEMA, **place, "nonfinite": dict(nonfinite), "request": self._request}
                write_file(self._record_file(piece.name), json.dumps(entry).encode())
        except OutputError:
            if self._lock.is_current:
                raise
            # another rank saw the record as soon as it had its name, published, and cleaned the folder away
        self._recorded = self._written
        os.close(self._claims.pop(piece.name))

    def assemble_files(self) -> None:
        """Complete every file of which all pieces are recorded, unless another rank is at it."""
        there = self._records()
        cut = _pieces_by_file(there).keys() - there
        for file in (file for record, file in self._whole.items() if record in cut):
            self.assemble_file(file)

    def assemble_file(self, file: OutputFile) -> None:
        """Complete a file if all its pieces are recorded and no other rank is at it."""
        whole, records = WorkItem.whole(file), self._piece_records(file)
        if _covers(records, whole) and self._take(whole, own=True):
            counts = Counter[str]()
            for record in records:
                counts.update(record["nonfinite"])
            self.record_piece(whole, assemble(file, self.checkpoint), counts)

    def _is_recorded(self, piece: WorkItem) -> bool:
        """Whether the piece, or all of its file, is recorded, and there as the record says."""
        if self._finished_files(verify=False, only=piece.file.name):
            return True
        return not piece.is_whole and _covers(self._piece_records(piece.file), piece)

    def _piece_records(self, file: OutputFile) -> list[dict[str, Any]]:
        """The records of pieces of a file, as far as they speak of the file that is there."""
        names, inode = _pieces_by_file(self._records()).get(self._record_file(file.name).name, []), self._inode(file)
        return [record for name in names if self._speaks_of(record := read_json(self._done / name), inode)]

    def _speaks_of(self, record: Mapping[str, Any], inode: int | None) -> bool:
        same = (record.get("inode"), record.get("request")) == (inode, self._request)
        return inode is not None and same and not is_newer(record)

    def _inode(self, file: OutputFile) -> int | None:
        """Of the file that its pieces are written into; it has its final name if a rank died before it could record that."""
        for path in (partial_path(self.checkpoint / file.name), self.checkpoint / file.name):
            with suppress(FileNotFoundError):
                return path.stat().st_ino
        return None

    def _forget_pieces(self, file: OutputFile) -> None:
        """Before a file is written as a whole: no record of its pieces may vouch for what the partial file then holds."""
        names = _pieces_by_file(self._records()).get(self._record_file(file.name).name, [])
        for name in names:
            (self._done / name).unlink(missing_ok=True)
        if names:
            fsync_folder(self._done)

    def _records(self) -> set[str]:
        """The names of all records, without a look into them: there may be thousands, and as many ranks that ask."""
        try:
            return {path.name for path in self._done.iterdir() if path.suffix == ".json"}
        except FileNotFoundError:
            return set()

    # --- how far all ranks are

    def tell(self, bytes_written: int) -> None:
        """Let the others know, now and then, how many bytes this rank has written in all."""
        self._written = bytes_written
        if self._rank is None or time.monotonic() - self._told < _TELL_EVERY_S:
            return
        self._told = time.monotonic()
        about = {"unrecorded": bytes_written - self._recorded, "host": socket.gethostname(), "pid": os.getpid()}
        path = self._progress_file(self._rank)
        with suppress(OSError):  # for people only: a run does not fail for it
            path.with_suffix(".partial").write_text(json.dumps(about))
            path.with_suffix(".partial").rename(path)

    def bytes_of_all(self) -> int:
        """The bytes of the output that all ranks have written, as far as is known."""
        there = self._records()
        total = sum(self._whole[name].file_bytes for name in there & self._whole.keys())
        for record, names in _pieces_by_file(there).items():
            places = [name.removesuffix(".json").rpartition("@")[2].split("-") for name in names if record not in there]
            total += sum(int(end) - int(begin) for begin, end in places)
        for path in (self.folder / "ranks").glob("*.json"):
            with suppress(OSError):
                if abs(time.time() - path.stat().st_mtime) < _FRESH_S:
                    total += int(read_json(path).get("unrecorded", 0))
        return total

    def _progress_file(self, rank: Rank) -> Path:
        return self.folder / "ranks" / f"{rank.rank}-of-{rank.world_size}.json"


def _pieces_by_file(records: set[str]) -> dict[str, list[str]]:
    """The record of a whole file -> the records of its pieces, which need not be those of this world size."""
    found: dict[str, list[str]] = {}
    for name in sorted(records):
        stem, at, place = name.removesuffix(".json").rpartition("@")
        if at and all(number.isdecimal() for number in place.split("-")):
            found.setdefault(f"{stem}.json", []).append(name)
    return found


def _escaped(name: str) -> str:
    return name.replace("/", "%2F")


def _covers(records: Sequence[Mapping[str, Any]], piece: WorkItem) -> bool:
    """Whether the byte ranges of `records` together cover the piece."""
    begin = piece.begin
    for record in sorted(records, key=lambda record: int(record["begin"])):
        if record["begin"] <= begin < record["end"]:
            begin = record["end"]
    return begin >= piece.end
