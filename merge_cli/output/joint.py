"""One destination written by several processes, also on several hosts that share its filesystem.

The staging folder is that of a single run (`folder.py`), its lock shared by all ranks, and beside
it there are

    control     locked for a moment by the rank that sets the folder up, and by the one that publishes
    claims/     a file for each piece, locked by the rank that works on it, see `claims.py`
    ranks/      see `progress.py`

A rank tries to claim each piece of its share in turn, and then those that others have not begun.
The kernel releases the claim of a dead rank, so its pieces are taken over by those that still run,
or by the next ones. A finished piece is recorded in done/ like a finished file; the rank that finds
all pieces of a file recorded completes the file, and the one that finds all files complete
publishes: whoever comes last sees everything, since it looks after it has written its own record.

Not guaranteed: that ranks take over from each other where the filesystem has no flock; each then
does its own share, and those of dead ranks wait for the same ranks to be run again. Where a lock is
local to each host two ranks may do a piece or a file twice, with the same bytes: nothing depends on
a claim but the time. A rank that finds the result published is through.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shlex
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

from merge_cli.engine.sink import Writer
from merge_cli.engine.writer import assemble
from merge_cli.errors import OutputError
from merge_cli.output.claims import CLAIMS, Claims, SharedWriter
from merge_cli.output.destination import Claim
from merge_cli.output.existing import already_there, is_in_the_way, is_published
from merge_cli.output.folder import StagingFolder
from merge_cli.output.lock import Lock
from merge_cli.output.publish import recover
from merge_cli.output.records import FileRecord
from merge_cli.output.sink import Discard
from merge_cli.output.solo import complete_records
from merge_cli.output.trust import uids_of
from merge_cli.planning.plan import MergePlan, OutputFile, WorkItem
from merge_cli.planning.record import describe
from merge_cli.ranks.launcher import Rank
from merge_cli.request.spec import RunConfig
from merge_cli.system.durable import output_error
from merge_cli.system.files import read_json

log = logging.getLogger(__name__)  # without a handler of the caller's, warnings go to stderr
_CONTROL_WAIT_S = 300.0  # without a sign of life from the rank that sets up or publishes
_SHARED_WAIT_S = 2.0


class JointDestination:
    """A `Destination` (see `destination.py`) that one rank of several shares; `rank` None belongs
    to somebody who only publishes.

    `own` are the names of the items in this rank's share. Records are looked into only by a rank
    that is alone: a record of a live rank is durable. So the time that hundreds of ranks need to
    enter, one after the other, does not grow with the number of files.

    Entering raises OutputError if the destination is another result, or if the folder has the work
    of another request that is to be kept or still goes on.
    """

    def __init__(self, destination: Path, merge: MergePlan, run: RunConfig, rank: Rank | None) -> None:
        self.merge = merge
        owners = uids_of(run.trust_owner)
        self.folder = StagingFolder(destination, describe(merge), owners)
        self.overwrite = run.overwrite
        self.is_published = False
        self.reused = 0
        self.own: Collection[str] = ()
        self._run = run
        self._rank = rank
        self._lock = Lock(self.folder.path / "lock", destination, shared=True, wait_s=_SHARED_WAIT_S, owners=owners)
        self._control = Lock(
            self.folder.path / "control", destination, wait_s=_CONTROL_WAIT_S, beats=True, on_wait=self._waits, owners=owners
        )
        self._claims = Claims(self.folder, self._is_gone)
        self._has_joined = False
        self._is_cleaned = False

    def __enter__(self) -> JointDestination:
        try:
            self._enter()
        except OutputError:
            if not (self._lock.is_held and self.is_over()):
                self.__exit__()
                raise
            self.reused = len(self.merge.files)  # where a lock failed, another rank has published meanwhile
        except BaseException:
            self.__exit__()
            raise
        return self

    def _enter(self) -> None:
        try:
            with self._control:
                self._lock.acquire()
                self.folder.hold(self._lock, self._control)
                self._join()
                self._has_joined = True
        except OSError as error:
            raise output_error(error, f"cannot work in {self.folder.path}", self.folder.state_file) from error

    def __exit__(self, *exc: object) -> None:
        self._claims.close()
        is_exchanged = not self.is_published and self.folder.is_exchanged()
        self._lock.release()
        self._control.release()
        self.folder.release()
        if self._is_cleaned:
            self.folder.remove_if_empty()  # after the release: NFS keeps an open file that is removed under another name
        elif is_exchanged and any(isinstance(each, OutputError) for each in exc):
            raise self.folder.exchanged()

    def _waits(self, error: OutputError) -> None:
        who = "pmerge finalize" if self._rank is None else str(self._rank)
        until = f"until that is through or gives no sign of life for {_CONTROL_WAIT_S:.0f} s"
        log.warning("%s waits for another rank, %s: %s; %s", who, until, error.message, ", ".join(error.details))

    # --- the folder

    def _join(self) -> None:
        folder = self.folder
        is_alone = self._lock.has_flock and self._lock.is_alone()
        folder.check_made_by_us(thoroughly=is_alone or not self._lock.has_flock)
        if self._find_published(hashed=self.overwrite or self._run.verify_existing):
            self.reused = len(self.merge.files)
            return
        if is_in_the_way(folder.destination) and not self.overwrite:
            raise already_there(folder.destination, self.merge)
        self._keep_or_discard()
        folder.make(CLAIMS, "ranks")
        self._agree_on_world_size()
        if is_alone or not self._lock.has_flock:
            folder.records.drop_stale(self.merge.files)
        if is_alone:
            folder.remove_left_by_dead()
        self.reused = len(self.merge.files) - len(self.missing())

    def _find_published(self, *, hashed: bool) -> bool:
        """Whether the result of this plan is published; leftovers of the rank that published it are
        removed.
        """
        folder = self.folder
        self._look_anew()
        is_being_replaced = self.overwrite and folder.recorded_state() == folder.state
        self.is_published = recover(folder) or (
            not is_being_replaced and is_published(folder.destination, self.merge, hashed=hashed)
        )
        if self.is_published and folder.recorded_state() in ({}, folder.state):
            self.clean()
        return self.is_published

    def _look_anew(self) -> None:
        """Open the folder that holds the result, whereupon an NFS client asks the server for its
        content. Else the client may go on for up to a minute with the content from when this rank
        began.
        """
        with suppress(OSError):
            os.close(os.open(self.folder.destination.parent, os.O_RDONLY | os.O_DIRECTORY))

    def _keep_or_discard(self) -> None:
        """Keep the work of this request; discard, with `restart` or if nothing is finished, that of
        another.

        The first of several ranks with `restart` discards the work that was there before them.
        Without flock nobody knows who is still at work, so nothing is ever discarded.
        """
        folder, restart = self.folder, self._run.restart
        if not (restart and self._lock.is_alone()):
            folder.check_schema()
        was, exists = folder.recorded_state(), folder.state_file.exists()
        if not self._lock.has_flock and exists and (restart or was != folder.state):
            raise OutputError(
                f"{folder.path} holds unfinished work, and without flock nobody knows whose",
                details=folder.differences(),
                hint=f"when no rank is at work any more:  rm -r {shlex.quote(str(folder.path))}",
            )
        if was == folder.state and not (restart and self._lock.is_alone()):
            return
        if exists and was != folder.state and not self._lock.is_alone():
            raise OutputError(
                f"other ranks are writing {folder.destination}, and not by the same request",
                details=folder.differences(),
                hint="give all ranks the same command, or write somewhere else:  -o PATH",
            )
        if not restart:
            folder.check_same_request()
        folder.discard()

    def _agree_on_world_size(self) -> None:
        """Raise OutputError while ranks of another world size are at work: their pieces are other
        ones.
        """
        if self._rank is None:
            return
        path, size = self.folder.ranks / "world_size", self._rank.world_size
        other = read_json(path).get("world_size", size)
        if other != size and not self._lock.is_alone():
            raise OutputError(
                f"other ranks are writing {self.folder.destination}",
                details=[f"found     rank {self._rank.rank} of {size}", f"expected  one of {other} ranks"],
                hint=f"wait for them, or stop them; what they have finished is kept. Without flock:  --world-size {other}",
            )
        self.folder.held.write_file("ranks/world_size", json.dumps({"world_size": size}).encode(), durable=False)

    def missing(self) -> list[str]:
        """The names of the files that no record says are complete; none once it is published, also
        by another rank.
        """
        if self.is_published:
            return []
        names = self.folder.records.missing(self.merge.files)
        if names and self._is_gone() and not self.is_published:
            raise self.folder.exchanged()
        return [] if self.is_published else names

    def _is_gone(self) -> bool:
        """Whether the staging folder is no longer in use: another rank has published the result,
        which is then noted, or somebody has removed the folder.
        """
        if self._lock.is_current and not (self._has_joined and self._is_being_cleaned()):
            return False
        self._look_anew()
        self.is_published = is_published(self.folder.destination, self.merge, is_cleaning=True)
        return True

    def _is_being_cleaned(self) -> bool:
        """Whether state.json is gone, see `clean`. It is opened, so that an NFS client asks the
        server.
        """
        try:
            os.close(os.open(self.folder.state_file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK))
        except OSError as error:
            return error.errno in (errno.ENOENT, errno.ESTALE)
        return False

    def begin_to_publish(self) -> dict[str, FileRecord]:
        """Become the one rank that publishes; the records of all files, or none if another rank has
        published.
        """
        self._control.acquire()
        if not self._lock.is_current:
            self._is_gone()
            with suppress(OSError):  # the control that is locked lies in a folder that was made for it
                self._control.remove_files()
                self.folder.path.rmdir()
            if not self.is_published:
                raise self.folder.exchanged()
            return {}
        return {} if self._find_published(hashed=False) else complete_records(self.folder, self.merge)

    def clean(self) -> None:
        """Remove the staging folder. state.json goes first: its absence shows other ranks that the
        folder is no longer in use, before a record is missing. The lock goes when all else is gone,
        so that no other run begins here meanwhile.
        """
        self._is_cleaned = True
        with suppress(OSError):  # the result is published: leftovers are harmless
            self.folder.remove_state()
            self.folder.remove_content()
            self._lock.remove_files()
            self._control.remove_files()
            self.folder.path.rmdir()

    # --- items

    @property
    def has_flock(self) -> bool:
        """Whether claims are kept by the kernel, so that ranks can take over from each other, and
        share a file.
        """
        return self._lock.has_flock

    def claim(self, item: WorkItem) -> Claim:
        """Whether this rank is to write the item now."""
        is_own = item.name in self.own
        if self.is_published or (not is_own and self.folder.records.path(item.name).exists()):
            return Claim.RECORDED
        answer = self._claims.take(item, is_own)
        if answer is Claim.TAKEN and item.is_whole:
            self.folder.records.forget_pieces(item.file)
        return answer

    def release(self, item: WorkItem) -> None:
        """Give a claim back."""
        self._claims.release(item)

    def open(self, item: WorkItem) -> Writer:
        """A writer of the file or the piece in the staging folder."""
        try:
            writer = self.folder.writer(item)
        except OutputError:
            if not self.is_over():
                raise
            return Discard()
        records = self.folder.records
        return SharedWriter(writer, lambda: records.covers(item), lambda error: self.is_done_by_another(item, error))

    def is_over(self) -> bool:
        """Whether another rank has published, so that an error of this one's own work is none."""
        return not self._is_cleaned and self._is_gone() and self.is_published

    def done(self, item: WorkItem, result: str, nonfinite: Mapping[str, int]) -> None:
        """Record an item that is durable, and give its claim back. After the last piece of a file,
        complete the file. An item without a result was recorded by another rank.
        """
        try:
            if result:
                self.folder.records.add(item, result, nonfinite)
        except OutputError as error:  # another rank may publish as soon as the record has its name
            if not self.is_done_by_another(item, error):
                raise
        self.release(item)
        if not item.is_whole:
            self._assemble(item.file)

    def is_done_by_another(self, item: WorkItem, error: OutputError) -> bool:
        """Whether an error of this rank's work on an item is none: its file has gone to its final
        name and is recorded, or all is published.
        """
        is_renamed = isinstance(error.__cause__, FileNotFoundError) and self.folder.records.covers(item)
        return is_renamed or self.is_over()

    def assemble_files(self) -> None:
        """Complete every file all of whose pieces are recorded, unless another rank is at it."""
        for file in self.folder.records.cut(self.merge.files):
            self._assemble(file)

    def _assemble(self, file: OutputFile) -> None:
        nonfinite, whole = self.folder.records.assembled(file), WorkItem.whole(file)
        if nonfinite is None or self._claims.take(whole, is_own=True) is not Claim.TAKEN:
            return
        try:
            sha256 = assemble(file, self.folder.held)
        except OutputError as error:
            self.release(whole)
            if not self.is_done_by_another(whole, error):
                raise
            return
        self.done(whole, sha256, nonfinite)
