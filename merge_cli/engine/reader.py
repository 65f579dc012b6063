"""Positional reads from the inputs, with a bounded number of open files.

A source of an input is the version that the plan was made from: when it is opened again and is
another, it raises. At the end all are opened once more, and their headers hashed. See
`stores/local.py` for the changes that are not noticed.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import closing, contextmanager

from merge_cli.errors import ChangedError, StoreError
from merge_cli.formats.gathered import Gathered
from merge_cli.formats.weight_file import WeightFile
from merge_cli.stores.local import DIRECT_BLOCK_BYTES, LocalSource
from merge_cli.stores.store import Source, read_bytes
from merge_cli.system.descriptors import descriptors_left


class InputFiles:
    """A cache of open inputs, safe to use from several threads. At most `max_open` stay open while
    nobody reads from them.

    Without `keep_cached` the kernel is advised that cached pages are not needed again, so that
    reading terabytes does not push out what others on the machine have cached. With `direct`,
    `read_block` reads past it (O_DIRECT) what is aligned for that. Both are for files of this
    machine.
    """

    def __init__(self, max_open: int | None = None, keep_cached: bool = True, direct: bool = False) -> None:
        self._max_open = max_open or min(64, descriptors_left() // 4)  # each by up to two descriptors
        self._keep_cached = keep_cached
        self._direct = direct
        self._lock = threading.Lock()
        self._open: OrderedDict[Source, int] = OrderedDict()  # how many threads read from it; the longest unused first

    def __enter__(self) -> InputFiles:
        return self

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            for source in self._open:
                source.close()
            self._open.clear()

    def read_into(self, file: WeightFile, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `offset` of `file`. Raises ChangedError where it is another now,
        StoreError on I/O errors.
        """
        if isinstance(file, Gathered):
            file.gather(self.read_into, offset, buffer)
            return
        with self._in_use(file) as source:
            source.read_into(offset, buffer)
            if not self._keep_cached and isinstance(source, LocalSource):
                source.drop_cached(offset, len(buffer))

    def read_block(self, file: WeightFile, offset: int, size: int, item_bytes: int, block: memoryview) -> int:
        """Read `size` bytes from byte `offset` of `file` into `block`; where in it they begin, a
        multiple of `item_bytes`.

        `block` is aligned to DIRECT_BLOCK_BYTES and has room for `size` bytes and, for O_DIRECT,
        two such blocks more: those that enclose the data are read. What is smaller than a block, or
        what O_DIRECT cannot read, comes through the page cache. Raises what `read_into` raises.
        """
        begin = offset % DIRECT_BLOCK_BYTES
        if self._direct and size >= DIRECT_BLOCK_BYTES and begin % item_bytes == 0 and not isinstance(file, Gathered):
            with self._in_use(file) as source:
                if isinstance(source, LocalSource) and source.read_direct(offset - begin, begin + size, block):
                    return begin
        self.read_into(file, offset, block[:size])
        return 0

    @contextmanager
    def _in_use(self, file: WeightFile) -> Iterator[Source]:
        """The source of `file`, which stays open meanwhile. Errors of reading name the tensor."""
        source = file.source
        with self._lock:
            if source not in self._open:
                self._close_idle()
            self._open[source] = self._open.get(source, 0) + 1
            self._open.move_to_end(source)
        try:
            yield source
        except (ChangedError, StoreError) as error:
            if error.offset is not None:
                error.details += (f"tensor    `{tensor_at(file, error.offset)}`",)
            raise
        finally:
            with self._lock:
                self._open[source] -= 1

    def _close_idle(self) -> None:
        idle = [source for source, users in self._open.items() if not users]
        for source in idle[: max(0, len(self._open) + 1 - self._max_open)]:
            del self._open[source]
            source.close()


def tensor_at(file: WeightFile, offset: int) -> str:
    """The name of the tensor that byte `offset` of `file` belongs to."""
    position = offset - file.header.data_start
    return next((name for name, info in file.header.tensors.items() if info.start <= position < info.end), "none")


def check_unchanged(file: WeightFile) -> None:
    """Open `file` again. Raises ChangedError unless it is the version, with the header, that the
    plan was made from.
    """
    file.source.close()
    with closing(file.source) as source:
        header = read_bytes(source, 0, file.header.data_start)
    if hashlib.sha256(header).hexdigest() != file.header.sha256:
        raise ChangedError(
            f"the header of {file.path} changed during the run",
            hint="nothing was published; start again when the checkpoint is complete",
        )
