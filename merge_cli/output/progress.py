"""The progress of a run, for people: that of this process, or on rank 0 that of all ranks together.

Ranks count finished files and pieces by their records. Bytes that are written and not yet recorded
are in a file of each rank, `ranks/RANK-of-WORLD_SIZE.json`, in the staging folder of the first
destination that is not published.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from merge_cli.errors import OutputError
from merge_cli.output.destination import Destination
from merge_cli.ranks.launcher import Rank
from merge_cli.system.files import read_json

if TYPE_CHECKING:
    from merge_cli.engine.chunk import Statistics

_SHARE_EVERY_S = 2.0
_FRESH_S = 60.0


@dataclass(frozen=True)
class Progress:
    """The state of a run: bytes done and in all, and the seconds since reading began."""

    bytes_read: int
    bytes_to_read: int
    bytes_written: int
    bytes_to_write: int
    seconds: float


class RunProgress:
    """Reports to `on_progress`, and to other ranks. `rank` is None for a process that is alone."""

    def __init__(
        self,
        destinations: Sequence[Destination],
        bytes_to_read: int,
        rank: Rank | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self._destinations = destinations
        self._to_read = bytes_to_read
        self._to_write = sum(each.merge.bytes_to_write for each in destinations)
        self._rank = rank
        self._on_progress = on_progress
        self._began = time.perf_counter()
        self._lock = threading.Lock()
        self._read_before = self._written_before = self._written = self._recorded = 0
        self._shared = self._asked = -_SHARE_EVERY_S
        self._share_of_all = 0.0

    def begin_round(self, done: Statistics) -> None:
        """Count from the statistics of earlier rounds on."""
        self._read_before, self._written_before = done.bytes_read, done.bytes_written

    def report(self, statistics: Statistics) -> None:
        """Take the statistics of this round, from one thread at a time."""
        read, written = self._read_before + statistics.bytes_read, self._written_before + statistics.bytes_written
        if self._rank is not None:
            self._share(written)
            part = self._part_of_all() if self._rank.rank == 0 else written / max(self._to_write, 1)
            read, written = int(part * self._to_read), int(part * self._to_write)
        if self._on_progress is not None:
            seconds = time.perf_counter() - self._began
            self._on_progress(Progress(read, self._to_read, written, self._to_write, seconds))

    def recorded(self) -> None:
        """Note that an item was recorded, and with it about all bytes that were reported up to now."""
        with self._lock:
            self._recorded = self._written

    def close(self) -> None:
        """Remove this rank's file."""
        if self._rank is not None:
            for each in self._destinations:
                with suppress(OSError, OutputError):
                    each.folder.held.remove(f"ranks/{self._name}")

    @property
    def _name(self) -> str:
        return f"{self._rank.rank}-of-{self._rank.world_size}.json" if self._rank is not None else ""

    def _share(self, written: int) -> None:
        """Write down now and then how many bytes are not yet recorded."""
        with self._lock:
            self._written = written
            if time.perf_counter() - self._shared < _SHARE_EVERY_S:
                return
            self._shared = time.perf_counter()
            about = {"unrecorded": written - self._recorded, "host": socket.gethostname(), "pid": os.getpid()}
        unpublished = [each for each in self._destinations if not each.is_published]
        staging = (unpublished or self._destinations)[0].folder.held
        with suppress(OSError, OutputError):  # for people only: a run does not fail for it
            staging.write_file(f"ranks/{self._name}", json.dumps(about).encode(), durable=False)

    def _part_of_all(self) -> float:
        """The part of the outputs that all ranks have written, as known at most a moment ago."""
        if time.perf_counter() - self._asked > _SHARE_EVERY_S:
            self._asked = time.perf_counter()
            self._share_of_all = min(1.0, sum(map(_bytes_written, self._destinations)) / max(self._to_write, 1))
        return self._share_of_all


def _bytes_written(destination: Destination) -> int:
    """The bytes of a destination that all ranks have written, as far as is known."""
    folder, merge = destination.folder, destination.merge
    if destination.is_published or not folder.path.exists():
        return merge.bytes_to_write
    total = folder.records.num_bytes(merge.files)
    for path in folder.ranks.glob("*.json"):
        with suppress(OSError):
            if abs(time.time() - path.stat().st_mtime) < _FRESH_S:
                total += int(read_json(path).get("unrecorded", 0))
    return total
