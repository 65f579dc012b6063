"""The sink of a run that publishes: one or many destinations, each claimed, written, and recorded
by itself.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from merge_cli.engine.sink import NoSink, Writer
from merge_cli.output.destination import Claim, Destination
from merge_cli.planning.plan import WorkItem

if TYPE_CHECKING:
    from merge_cli.engine.chunk import Statistics
    from merge_cli.output.progress import RunProgress


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
