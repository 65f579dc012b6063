"""The sink of a run that publishes: one or many destinations, each claimed, written, and recorded
by itself.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Protocol, Self

from merge_cli.engine.sink import NoSink, Writer
from merge_cli.output.folder import StagingFolder
from merge_cli.output.records import FileRecord
from merge_cli.planning.plan import MergePlan, WorkItem

if TYPE_CHECKING:
    from merge_cli.engine.chunk import Statistics
    from merge_cli.output.progress import RunProgress


class Claim(Enum):
    """The answer to a claim."""

    TAKEN = "this process makes it now"
    RECORDED = "it is finished"
    HELD = "another process is at it"


class Destination(Protocol):
    """A transaction on one destination, which becomes complete or stays as it is. `merge` has this
    one output.

    1. `with destination:`               lock; finish or undo the publishing of a dead run; throw away or keep its files
    2. `claim(item)`, `open(item)`       for each file or piece that is to be written, from several threads
    3. `done(item, sha256, nonfinite)`   after the writer has made it durable: it is recorded, and the claim released
    4. `begin_to_publish()`              the records of all files, if this process is the one to publish
    5. `clean()`                         by `publish`, after the rename

    Leaving the context without the last two leaves a staging folder from which the same request
    continues.
    """

    merge: MergePlan
    folder: StagingFolder
    overwrite: bool
    is_published: bool
    reused: int

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...

    def missing(self) -> list[str]:
        """The names of the files that are not recorded; none once it is published."""

    def claim(self, item: WorkItem) -> Claim: ...

    def release(self, item: WorkItem) -> None:
        """Give a claim back without a record."""

    def open(self, item: WorkItem) -> Writer: ...

    def done(self, item: WorkItem, sha256: str, nonfinite: Mapping[str, int]) -> None: ...

    def begin_to_publish(self) -> dict[str, FileRecord]: ...

    def clean(self) -> None: ...


class PublishingSink(NoSink):
    """Takes the outputs of a plan: output k goes to `destinations[k]`."""

    def __init__(self, destinations: Sequence[Destination], progress: RunProgress) -> None:
        self.claimed = 0
        self._destinations = destinations
        self._progress = progress
        self._lock = threading.Lock()
        self._recorded: set[tuple[int, str]] = set()

    def claim(self, item: WorkItem) -> bool:
        """Claim the item for all of its outputs that need it, or for none."""
        taken: list[int] = []
        for k in item.outputs:  # in ascending order by all ranks
            answer = self._destinations[k].claim(item)
            if answer is Claim.TAKEN:
                taken.append(k)
            elif answer is Claim.RECORDED:
                with self._lock:
                    self._recorded.add((k, item.name))
            else:
                for claimed in taken:
                    self._destinations[claimed].release(item)
                return False
        with self._lock:
            self.claimed += bool(taken)
        return bool(taken)

    def open(self, item: WorkItem, k: int) -> Writer:
        """A writer for output k of a claimed item. An output that turned out to be recorded gets
        one that discards.
        """
        return Discard() if self._is_recorded(item, k) else self._destinations[k].open(item)

    def done(self, item: WorkItem, k: int, sha256: str, nonfinite: Mapping[str, int]) -> None:
        """Record output k of the item."""
        if not self._is_recorded(item, k):
            self._destinations[k].done(item, sha256, nonfinite)
            self._progress.recorded()

    def progress(self, statistics: Statistics) -> None:
        """Report how far the run is."""
        self._progress.report(statistics)

    def _is_recorded(self, item: WorkItem, k: int) -> bool:
        with self._lock:
            return (k, item.name) in self._recorded


class Discard:
    """A writer for bytes that nobody needs: another rank recorded them in the moment before they
    were claimed.
    """

    is_finished = False

    def write(self, offset: int, data: memoryview) -> bool:
        return False

    def finish(self) -> str:
        return ""

    def abandon(self) -> None:
        pass
