"""Write one output file at planned offsets, from several threads, and know its sha256 at the end.

The file grows under a `.partial` name and its header is written last, so that a torn file can never
be read as a checkpoint. The sha256 follows the contiguous front of what has been written: a chunk
that extends the front is hashed from memory, chunks that came early are read back when the front
reaches them. Bytes between values that depend on the CRC-32 of those before them (see `Gap`) are
written as the front passes.

Several processes, also on several hosts, may write pieces of one file; whoever finds all of them
durable reads the file once, for its sha256, and completes it.
"""

from __future__ import annotations

import hashlib
import os
import threading
import zlib
from collections import deque
from pathlib import Path

from merge_cli.planning.plan import OutputFile, WorkItem
from merge_cli.system.durable import fsync_file, fsync_folder, make_folder, open_own, output_error, reserve, write_all
from merge_cli.system.files import pieces_of


class ShardWriter:
    """One output file while it is being written. Threads call `write`; the call that completes the
    file returns True.
    """

    def __init__(self, file: OutputFile, folder: Path) -> None:
        self.file = file
        self.path = folder / file.name
        self.partial = partial_path(self.path)
        self._lock = threading.Lock()
        self._remaining = file.value_bytes
        self._front = len(file.header)
        self._written: dict[int, int] = {}  # start -> end of ranges beyond the front
        self._hashing = False
        self._hash = _FrontHash(file)
        try:
            make_folder(self.path.parent)
            self._fd = open_own(self.partial, os.O_RDWR | os.O_TRUNC)
        except OSError as error:
            raise output_error(error, f"cannot create {self.partial}", self.partial, file.file_bytes) from error
        try:
            reserve(self._fd, file.file_bytes, self.partial)
        except BaseException:
            self.abandon()
            raise

    @property
    def is_finished(self) -> bool:
        """Whether the file is closed: complete, or failed in the attempt."""
        return self._fd < 0

    def write(self, offset: int, data: memoryview) -> bool:
        """Write `data` at byte `offset`; True for the one call after which all data is written and
        hashed.
        """
        write_all(self._fd, data, offset, self.partial)
        with self._lock:
            self._remaining -= len(data)
            self._written[offset] = offset + len(data)
            if self._hashing or offset != self._front:
                return False
            self._hashing = True
        self._hash.update(data)
        return self._advance(offset)

    def _advance(self, start: int) -> bool:
        """Move the front over the range at `start`, which is hashed, and over what was written
        behind it.
        """
        while True:
            with self._lock:
                front = self._written.pop(start)
            front = self._hash.fill_gaps(front, self._fd, self.partial)
            with self._lock:
                self._front = start = front
                end = self._written.get(start)
                if end is None:
                    self._hashing = False
                    return self._remaining == 0 and not self._written
            _hash_range(self._fd, start, end, self._hash, self.partial)

    def finish(self) -> str:
        """Write the header, fsync, rename to the final name, fsync the folder; the file's sha256."""
        fd, self._fd = self._fd, -1
        _complete(fd, self.file, self.path)
        return self._hash.sha256.hexdigest()

    def abandon(self) -> None:
        """Close the file, leaving the partial one where it is."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class PieceWriter:
    """A piece of an output file that other processes write too: `num_bytes` of it, wherever the
    plan says.
    """

    def __init__(self, file: OutputFile, folder: Path, num_bytes: int) -> None:
        self.partial = partial_path(folder / file.name)
        self._lock = threading.Lock()
        self._remaining = num_bytes
        try:
            make_folder(self.partial.parent)
            self._fd = open_own(self.partial, os.O_RDWR)
        except OSError as error:
            raise output_error(error, f"cannot create {self.partial}", self.partial, file.file_bytes) from error
        try:
            reserve(self._fd, file.file_bytes, self.partial)
        except BaseException:
            self.abandon()
            raise

    @property
    def is_finished(self) -> bool:
        """Whether the file is closed: the piece is durable, or failed in the attempt."""
        return self._fd < 0

    def write(self, offset: int, data: memoryview) -> bool:
        """Write `data` at byte `offset`; True for the one call after which all of the piece is
        written.
        """
        write_all(self._fd, data, offset, self.partial)
        with self._lock:
            self._remaining -= len(data)
            return self._remaining == 0

    def finish(self) -> str:
        """Sync the piece and the name of its file; there is no sha256 yet."""
        fd, self._fd = self._fd, -1
        try:
            fsync_file(fd)
            fsync_folder(self.partial.parent)
        except OSError as error:
            raise output_error(error, f"cannot make a piece of {self.partial} durable", self.partial) from error
        finally:
            os.close(fd)
        return ""

    def abandon(self) -> None:
        """Close the file, leaving it where it is."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def assemble(file: OutputFile, folder: Path) -> str:
    """Complete a file of which every piece is durable under its partial name; the file's sha256.
    Raises OutputError.
    """
    path = folder / file.name
    found = _FrontHash(file)
    try:
        if path.exists() and not partial_path(path).exists():
            path.rename(partial_path(path))  # whoever completed it died before the sha256 was recorded
        fd = os.open(partial_path(path), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise output_error(error, f"cannot open {partial_path(path)}", path) from error
    try:
        start = len(file.header)
        for end in (*(gap.offset for gap in file.gaps), file.file_bytes):
            _hash_range(fd, start, end, found, partial_path(path))
            start = found.fill_gaps(end, fd, partial_path(path))
    except BaseException:
        os.close(fd)
        raise
    _complete(fd, file, path)
    return found.sha256.hexdigest()


class _FrontHash:
    """The sha256 of a file from its beginning on, and the gaps between its values, which are made
    as the front reaches them.
    """

    def __init__(self, file: OutputFile) -> None:
        self.sha256 = hashlib.sha256(file.header)
        self._gaps = deque(file.gaps)
        self._crc = 0

    def update(self, data: memoryview | bytes) -> None:
        """Values that lie at the front."""
        self.sha256.update(data)
        if self._gaps:
            self._crc = zlib.crc32(data, self._crc)

    def fill_gaps(self, front: int, fd: int, path: Path) -> int:
        """Write the gap at byte `front`, if there is one; the new front. Raises OutputError."""
        while self._gaps and self._gaps[0].offset == front:
            data = self._gaps.popleft().make(self._crc)
            write_all(fd, memoryview(data), front, path)
            self.sha256.update(data)
            self._crc, front = 0, front + len(data)
        return front


def partial_path(path: Path) -> Path:
    """Where a file grows before it is complete."""
    return path.with_name(path.name + ".partial")


def _hash_range(fd: int, start: int, end: int, found: _FrontHash, path: Path) -> None:
    try:
        for piece in pieces_of(fd, start, end):
            found.update(piece)
            start += len(piece)
    except OSError as error:
        raise output_error(error, f"cannot read back {path} at byte {start}", path) from error


def _complete(fd: int, file: OutputFile, path: Path) -> None:
    """Write the header, fsync and close `fd`, give the file its final name, fsync the folder."""
    try:
        write_all(fd, memoryview(file.header), 0, partial_path(path))
        fsync_file(fd)
    except OSError as error:
        raise output_error(error, f"cannot complete {path}", path, file.file_bytes) from error
    finally:
        os.close(fd)
    try:
        partial_path(path).rename(path)
        fsync_folder(path.parent)
    except OSError as error:
        raise output_error(error, f"cannot complete {path}", path, file.file_bytes) from error


def shard_writer(item: WorkItem, folder: Path) -> ShardWriter | PieceWriter:
    """The writer of a work item into `folder`."""
    return ShardWriter(item.file, folder) if item.is_whole else PieceWriter(item.file, folder, item.bytes_to_write)
