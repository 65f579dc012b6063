"""The chunks of a run, handed out to several threads in file order, so that every file is read
sequentially.

Items are claimed and opened by the thread that needs the next chunk, one at a time and outside the
lock: others go on with the chunks that are there, and report their results meanwhile.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

from merge_cli.engine.chunk import GRAM_BLOCK_ELEMENTS, Chunk, ChunkSize, Reduced
from merge_cli.engine.reducers.kinds import kind_of
from merge_cli.engine.sink import Sink, Writer
from merge_cli.planning.extent import Extent, QuantizedExtent
from merge_cli.planning.plan import GRAM, WorkItem


class OpenItem:
    """A work item in progress: a writer for each of its outputs."""

    def __init__(self, item: WorkItem, writers: Mapping[int, Writer]) -> None:
        self.item = item
        self.writers = writers
        self.nonfinite: defaultdict[int, Counter[str]] = defaultdict(Counter)


class ScheduleError(Exception):
    """Claiming or opening an item failed, or completing an empty one; the cause is attached.
    `number`: as of its first chunk.
    """

    def __init__(self, number: tuple[int, int]) -> None:
        self.number = number


class Schedule:
    """Work items as chunks. Safe to use from several threads."""

    def __init__(self, work: Sequence[WorkItem], size: ChunkSize, sink: Sink) -> None:
        self._work = work
        self._size = size
        self._sink = sink
        self._condition = threading.Condition()
        self._next_item = 0
        self._opening = False
        self._stopped = False
        self._chunks: Iterator[Chunk] = iter(())
        self._open: dict[int, OpenItem] = {}

    def next(self) -> Chunk | None:
        """The next chunk; None when there is none left, or after `stop`. Raises ScheduleError."""
        while True:
            with self._condition:
                while True:
                    if self._stopped:
                        return None
                    chunk = next(self._chunks, None)
                    if chunk is not None:
                        return chunk
                    if not self._opening:
                        break
                    self._condition.wait()
                if self._next_item == len(self._work):
                    return None
                number, self._next_item, self._opening = self._next_item, self._next_item + 1, True
            chunks: Iterator[Chunk] = iter(())
            try:
                chunks = self._opened(number)
            except Exception as error:
                raise ScheduleError((number, -1)) from error
            finally:
                with self._condition:
                    self._chunks, self._opening = chunks, False
                    self._condition.notify_all()

    def write(self, reduced: Reduced) -> int:
        """Write an outcome to all its outputs, and complete those that it was the last one for; the
        bytes written.
        """
        with self._condition:
            open_item = self._open[reduced.chunk.number[0]]
            for k, counts in reduced.nonfinite.items():
                open_item.nonfinite[k].update(counts)
        written = 0
        for k, writes in reduced.writes.items():
            for offset, data in writes:
                written += len(data)
                if len(data) and open_item.writers[k].write(offset, data):
                    self._complete(reduced.chunk.number[0], k)
        if reduced.values is not None:
            self._sink.take(reduced.chunk, reduced.values)
        return written

    def stop(self) -> None:
        """Hand out no more chunks."""
        with self._condition:
            self._stopped = True
            self._condition.notify_all()

    def abandon(self) -> None:
        """Close whatever is open, after an error."""
        for open_item in self._open.values():
            for writer in open_item.writers.values():
                writer.abandon()

    def _opened(self, number: int) -> Iterator[Chunk]:
        """Claim and open an item; its chunks."""
        item = self._work[number]
        if not self._sink.claim(item):
            return iter(())
        writers: dict[int, Writer] = {}
        self._open[number] = OpenItem(item, writers)
        for k in item.outputs:
            writers[k] = self._sink.open(item, k)
        parts = list(item.parts())
        if not parts:
            for k in item.outputs:
                self._complete(number, k)
        return self._cut(number, item, parts)

    def _cut(self, number: int, item: WorkItem, parts: Sequence[tuple[Extent | QuantizedExtent, int, int]]) -> Iterator[Chunk]:
        count = 0
        for extent, first, end in parts:
            step, kind = chunk_step(extent, self._size, item.reducer), kind_of(extent, item.reducer)
            for start in range(first, end, step) if end > first else [first]:
                yield Chunk((number, count), item, extent, start, min(start + step, end), kind)
                count += 1

    def _complete(self, number: int, k: int) -> None:
        open_item = self._open[number]
        sha256 = open_item.writers[k].finish()
        with self._condition:
            nonfinite = dict(open_item.nonfinite[k])
            if all(writer.is_finished for writer in open_item.writers.values()):
                self._open.pop(number, None)
        self._sink.done(open_item.item, k, sha256, nonfinite)


def chunk_step(extent: Extent | QuantizedExtent, size: ChunkSize, reducer: str) -> int:
    """The elements (rows of a quantized tensor) of a chunk of `extent`; all of them where they are
    gone through twice.
    """
    if isinstance(extent, QuantizedExtent):
        if reducer == GRAM:
            return extent.rows_at_once(GRAM_BLOCK_ELEMENTS)
        return max(extent.num_rows, 1) if extent.needs_two_passes else extent.rows_at_once(size.values)
    if reducer == GRAM:
        return max(1, size.elements // GRAM_BLOCK_ELEMENTS) * GRAM_BLOCK_ELEMENTS
    return size.elements
