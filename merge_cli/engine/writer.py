"""Write one output file at planned offsets, from several threads, and know its sha256 at the end.

The file grows under a `.partial` name and its header is written last, so that a torn file can never be read as a checkpoint. The
sha256 follows the contiguous front of what has been written: a chunk that extends the front is hashed from memory, chunks that
came early are read back when the front reaches them.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from pathlib import Path
from typing import Protocol

from merge_cli.engine.durable import fsync_file, fsync_folder, make_folder, output_error, reserve, write_all
from merge_cli.plan import OutputFile

_READ_BACK_BYTES = 4 << 20


class Writer(Protocol):
    """What takes the bytes of one output file, from several threads."""

    @property
    def is_finished(self) -> bool: ...

    def write(self, offset: int, data: memoryview) -> bool: ...

    def finish(self) -> str: ...

    def abandon(self) -> None: ...


class ShardWriter:
    """One output file while it is being written. Threads call `write`; the call that completes the file returns True."""

    def __init__(self, file: OutputFile, folder: Path) -> None:
        self.file = file
        self.path = folder / file.name
        self.partial = self.path.with_name(self.path.name + ".partial")
        self._lock = threading.Lock()
        self._remaining = file.file_bytes - len(file.header)
        self._front = len(file.header)
        self._written: dict[int, int] = {}  # start -> end of ranges beyond the front
        self._hashing = False
        self._sha256 = hashlib.sha256(file.header)
        try:
            make_folder(self.path.parent)
            self._fd = os.open(self.partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise output_error(error, f"cannot create {self.partial}", self.partial, file.file_bytes) from error
        try:
            reserve(self._fd, file.file_bytes, self.partial)
        except BaseException:
            self.abandon()
            raise

    @property
    def is_finished(self) -> bool:
        """Whether the file stands complete under its final name."""
        return self._fd < 0

    def write(self, offset: int, data: memoryview) -> bool:
        """Write `data` at byte `offset`; True for the one call after which all data is written and hashed."""
        write_all(self._fd, data, offset, self.partial)
        with self._lock:
            self._remaining -= len(data)
            self._written[offset] = offset + len(data)
            if self._hashing or offset != self._front:
                return False
            self._hashing = True
        self._sha256.update(data)
        return self._advance(offset)

    def _advance(self, start: int) -> bool:
        """Move the front over the range at `start`, which is hashed, and over what was written behind it."""
        while True:
            with self._lock:
                self._front = self._written.pop(start)
                start = self._front
                end = self._written.get(start)
                if end is None:
                    self._hashing = False
                    return self._remaining == 0 and not self._written
            self._hash_back(start, end)

    def _hash_back(self, start: int, end: int) -> None:
        while start < end:
            try:
                piece = os.pread(self._fd, min(_READ_BACK_BYTES, end - start), start)
                if not piece:
                    raise OSError(errno.EIO, "the file ended early")
            except OSError as error:
                raise output_error(error, f"cannot read back {self.partial} at byte {start}", self.partial) from error
            self._sha256.update(piece)
            start += len(piece)

    def finish(self) -> str:
        """Write the header, fsync, rename to the final name, fsync the folder; the file's sha256."""
        write_all(self._fd, memoryview(self.file.header), 0, self.partial)
        try:
            fsync_file(self._fd)
            fd, self._fd = self._fd, -1
            os.close(fd)
            self.partial.rename(self.path)
            fsync_folder(self.path.parent)
        except OSError as error:
            raise output_error(error, f"cannot complete {self.path}", self.path, self.file.file_bytes) from error
        return self._sha256.hexdigest()

    def abandon(self) -> None:
        """Close the file, leaving the partial one where it is."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
