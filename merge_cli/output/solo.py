"""One destination, made by this process alone."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from merge_cli.engine.sink import Writer
from merge_cli.errors import OutputError
from merge_cli.output.destination import Claim
from merge_cli.output.existing import already_there, is_in_the_way, is_published
from merge_cli.output.folder import StagingFolder
from merge_cli.output.lock import Lock
from merge_cli.output.publish import recover
from merge_cli.output.records import FileRecord, files_have_changed
from merge_cli.output.trust import uids_of
from merge_cli.planning.plan import MergePlan, WorkItem
from merge_cli.planning.record import describe
from merge_cli.request.spec import RunConfig
from merge_cli.system.durable import output_error


class SoloDestination:
    """A `Destination` (see `destination.py`) whose staging folder nobody else may touch meanwhile.

    Entering raises OutputError if another run holds the lock, if the destination is another result,
    or if the staging folder belongs to another request.
    """

    def __init__(self, destination: Path, merge: MergePlan, run: RunConfig) -> None:
        self.merge = merge
        owners = uids_of(run.trust_owner)
        self.folder = StagingFolder(destination, describe(merge), owners)
        self.overwrite = run.overwrite
        self.is_published = False
        self.reused = 0
        self._run = run
        self._lock = Lock(self.folder.path / "lock", destination, owners=owners)
        self._is_cleaned = False

    def __enter__(self) -> SoloDestination:
        try:
            self._lock.acquire()
            self.folder.hold(self._lock)
            self._prepare()
        except OSError as error:
            self.__exit__()
            raise output_error(error, f"cannot work in {self.folder.path}", self.folder.state_file) from error
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        is_exchanged = not self.is_published and self.folder.is_exchanged()
        self._lock.release()
        self.folder.release()
        if self._is_cleaned:
            self.folder.remove_if_empty()  # after the release: NFS keeps an open file that is removed under another name
        elif is_exchanged and any(isinstance(each, OutputError) for each in exc):
            raise self.folder.exchanged()

    def _prepare(self) -> None:
        folder, destination = self.folder, self.folder.destination
        hashed = self.overwrite or self._run.verify_existing
        folder.check_made_by_us()
        if recover(folder) or is_published(destination, self.merge, hashed=hashed):
            self.is_published = True
            self.reused = len(self.merge.files)
            if folder.recorded_state() in ({}, folder.state):
                self.clean()
            return
        if is_in_the_way(destination) and not self.overwrite:
            raise already_there(destination, self.merge)
        if self._run.restart:
            folder.discard()
        else:
            folder.check_same_request()
        folder.make()
        done = folder.records.finished(hashed=self._run.verify_resume)
        folder.records.keep_only(done)
        self.reused = len(done)

    def missing(self) -> list[str]:
        """The names of the files that are not recorded; none once it is published."""
        return [] if self.is_published else self.folder.records.missing(self.merge.files)

    def claim(self, item: WorkItem) -> Claim:
        """Every item is this process's own."""
        return Claim.TAKEN

    def release(self, item: WorkItem) -> None:
        """Nothing: nobody waits for it."""

    def open(self, item: WorkItem) -> Writer:
        """A writer of the file in the staging folder."""
        return self.folder.writer(item)

    def done(self, item: WorkItem, result: str, nonfinite: Mapping[str, int]) -> None:
        """Record a file that is complete and durable."""
        self.folder.records.add(item, result, nonfinite)

    def begin_to_publish(self) -> dict[str, FileRecord]:
        """The records of all files."""
        return complete_records(self.folder, self.merge)

    def clean(self) -> None:
        """Remove the staging folder; anything that another has put into it stays."""
        self._is_cleaned = True
        _remove(self.folder, self._lock)


def complete_records(folder: StagingFolder, merge: MergePlan) -> dict[str, FileRecord]:
    """The records of all files of the plan. Raises OutputError if a file is gone or has changed
    since it was recorded.
    """
    records = folder.records.finished()
    if torn := [file.name for file in merge.files if file.name not in records]:
        raise files_have_changed(folder.checkpoint, torn)
    return records


def remove_stale_staging(destination: Path) -> None:
    """Remove the rest of the staging folder of a published result whose run was killed while it
    cleaned up.
    """
    folder = StagingFolder(destination, {})
    if folder.path.is_dir() and not folder.state_file.exists() and not folder.publish_file.exists():
        with suppress(OutputError, OSError), Lock(folder.path / "lock", destination) as lock:
            folder.hold(lock)
            _remove(folder, lock)
        folder.release()
        folder.remove_if_empty()


def _remove(folder: StagingFolder, lock: Lock) -> None:
    with suppress(OSError):  # the result is published: leftovers are harmless
        folder.remove_content()
        folder.held.remove("control")
        lock.remove_files()
        folder.path.rmdir()
