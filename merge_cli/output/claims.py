"""The claims of ranks on the files and pieces of one destination: who makes an item.

The file of a claim lies in claims/ of the staging folder and is locked while a rank works on the
item; the kernel releases the claim of a dead rank. Where the filesystem has no flock, a rank has no
other claims than its own share.

Not guaranteed: that two ranks never make one item, for a lock may be local to each host, or its
lease expire. The bytes are the same then, and a `SharedWriter` throws its file away if it comes
second.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from merge_cli.engine.sink import Writer
from merge_cli.errors import OutputError
from merge_cli.output.destination import Claim
from merge_cli.output.folder import StagingFolder
from merge_cli.output.lock import flock
from merge_cli.planning.plan import WorkItem
from merge_cli.system.durable import close_after_error, output_error
from merge_cli.system.held import escaped

CLAIMS = "claims"  # the folder in the staging folder


class Claims:
    """The claims that this process has. `is_gone` is asked whether the staging folder is no longer
    in use.
    """

    def __init__(self, folder: StagingFolder, is_gone: Callable[[], bool]) -> None:
        self._folder = folder
        self._is_gone = is_gone
        self._held: dict[str, int] = {}
        self._threads = threading.Lock()

    def take(self, item: WorkItem, is_own: bool) -> Claim:
        """Lock the claim of an item, against other processes and other threads of this one."""
        with self._threads:
            if item.name in self._held:
                return Claim.HELD
            self._held[item.name] = -1
        answer = Claim.HELD
        try:
            fd = self._held[item.name] = self._open(item)
            answer = Claim.RECORDED if fd < 0 else self._lock(fd, item, is_own)
        finally:
            if answer is not Claim.TAKEN:
                self.release(item)
        return answer

    def release(self, item: WorkItem) -> None:
        """Give a claim back."""
        with self._threads:
            fd = self._held.pop(item.name)
        if fd >= 0:
            close_after_error(fd)

    def close(self) -> None:
        """Give all claims back, after an error."""
        for fd in self._held.values():
            if fd >= 0:
                close_after_error(fd)
        self._held.clear()

    def _open(self, item: WorkItem) -> int:
        """The open file of a claim; -1 if it cannot exist, because the result was published and the
        folder cleaned away.
        """
        name = f"{CLAIMS}/{escaped(item.name)}"
        try:
            return self._folder.held.open(name, os.O_RDWR | os.O_CREAT)
        except FileNotFoundError:
            return -1
        except OSError as error:
            raise output_error(error, f"cannot create {self._folder.path / name}", self._folder.path / name) from error

    def _lock(self, fd: int, item: WorkItem, is_own: bool) -> Claim:
        try:
            if not flock(fd) and not is_own:
                return Claim.HELD
        except BlockingIOError:
            return Claim.HELD
        is_recorded = self._folder.records.covers(item) or self._is_gone()  # in this order, see `JointDestination.clean`
        return Claim.RECORDED if is_recorded else Claim.TAKEN


class SharedWriter:
    """A writer that throws its file away if another rank has recorded the same one meanwhile; an
    error counts for nothing if `is_no_error` says so.
    """

    def __init__(self, writer: Writer, is_recorded: Callable[[], bool], is_no_error: Callable[[OutputError], bool]) -> None:
        self._writer = writer
        self._is_recorded = is_recorded
        self._is_no_error = is_no_error

    @property
    def is_finished(self) -> bool:
        return self._writer.is_finished

    def write(self, offset: int, data: memoryview) -> bool:
        return self._writer.write(offset, data)

    def finish(self) -> str:
        try:
            if not self._is_recorded():
                return self._writer.finish()
            self._writer.abandon()
        except OutputError as error:
            if not self._is_no_error(error):
                raise
        return ""

    def abandon(self) -> None:
        self._writer.abandon()
