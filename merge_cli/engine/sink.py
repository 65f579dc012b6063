"""The other end of the loop: whoever takes the results of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from merge_cli.engine.chunk import Chunk, Statistics
from merge_cli.planning.plan import WorkItem


class Writer(Protocol):
    """Takes the bytes of one work item for one output, from several threads."""

    @property
    def is_finished(self) -> bool:
        """Whether the file is closed: complete, or failed in the attempt."""

    def write(self, offset: int, data: memoryview) -> bool:
        """Write `data` at byte `offset` of the file; True for the one call after which all bytes
        are there.
        """

    def finish(self) -> str:
        """Make the bytes durable under their name; the result for the record: the sha256 of a whole
        file, the inode number of the file for a piece of one.
        """

    def abandon(self) -> None:
        """Close the file and leave it as it is, after an error."""


class Sink(Protocol):
    """The calls that `stream` makes for each work item, outside its locks and from any of its
    threads:

    1. `claim(item)`                        whether to make it now; False leaves it to others
    2. `open(item, k)`                      once for each output k, before any of its bytes
    3. `take(chunk, values)`                for reducers that give values; in no fixed order
    4. `done(item, k, sha256, nonfinite)`   after output k of the item was finished
    `progress(statistics)` comes again and again, from one thread at a time; False ends the run
    early.
    """

    def claim(self, item: WorkItem) -> bool: ...

    def open(self, item: WorkItem, k: int) -> Writer: ...

    def take(self, chunk: Chunk, values: Any) -> None: ...

    def done(self, item: WorkItem, k: int, sha256: str, nonfinite: Mapping[str, int]) -> None: ...

    def progress(self, statistics: Statistics) -> bool | None: ...


class NoSink:
    """A sink for items without outputs: claims everything, keeps nothing. A base for sinks that
    want only some of the calls.
    """

    def claim(self, item: WorkItem) -> bool:
        return True

    def open(self, item: WorkItem, k: int) -> Writer:
        raise AssertionError("this sink has no outputs")

    def take(self, chunk: Chunk, values: Any) -> None:
        pass

    def done(self, item: WorkItem, k: int, sha256: str, nonfinite: Mapping[str, int]) -> None:
        pass

    def progress(self, statistics: Statistics) -> bool | None:
        return True
