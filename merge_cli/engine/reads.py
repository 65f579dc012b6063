"""The reads of one worker thread: counted in one place, and ended between two of them when the run
is to stop.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from merge_cli.engine.buffers import HostBuffer
from merge_cli.engine.reader import InputFiles
from merge_cli.formats.safetensors import DTYPES
from merge_cli.planning.extent import Location, PartLocation


class StoppedError(Exception):
    """The run is to end: another worker failed, or a signal came."""


@dataclass
class ReadCounts:
    """Bytes and seconds of the reads of one worker."""

    num_bytes: int = 0
    seconds: float = 0.0


class Reads:
    """Reads for one worker; `counts` counts all of them."""

    def __init__(self, inputs: InputFiles, stopped: threading.Event | None = None, counts: ReadCounts | None = None) -> None:
        self.counts = counts or ReadCounts()
        self._inputs = inputs
        self._stopped = stopped or threading.Event()

    def despite_stop(self) -> Reads:
        """The same reads for a chunk that is in flight: it is finished, and may report an error
        that comes before others.
        """
        return Reads(self._inputs, None, self.counts)

    def elements(self, source: Location, first: int, end: int, buffer: HostBuffer) -> int:
        """Read elements `first` to `end` of one input of an extent into `buffer`; their bytes."""
        dtype = DTYPES[source.dtype]
        begin, size = dtype.num_bytes(first), dtype.num_bytes(end - first)
        self.part(source, begin, begin + size, buffer, dtype.item_bytes)
        return size

    def part(self, place: Location | PartLocation, begin: int, end: int, buffer: HostBuffer, item_bytes: int = 1) -> None:
        """Read bytes `begin` to `end` from `place`; they begin at a multiple of `item_bytes` in
        memory.

        Raises StoppedError when the run is to end, ChangedError or PmergeError as the input files
        do.
        """
        if self._stopped.is_set():
            raise StoppedError
        began = time.perf_counter()
        buffer.begin = self._inputs.read_block(place.file, place.offset + begin, end - begin, item_bytes, buffer.memory)
        self.counts.seconds += time.perf_counter() - began
        self.counts.num_bytes += end - begin
