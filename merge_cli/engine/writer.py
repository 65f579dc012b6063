"""Write one output file at planned offsets, from several threads, and know its sha256 at the end.

The file grows in `partial/` of the staging folder and its header is written last, so that a torn
file can never be read as a checkpoint. A whole file has a name of its process there, so two
processes that write the same file, because a lock failed, cannot disturb each other: the second to
finish replaces the file by the same bytes. The sha256 follows the contiguous front of what has been
written: a chunk that extends the front is hashed from memory, chunks that came early are read back
when the front reaches them. Bytes between values that depend on the CRC-32 of those before them
(see `Gap`) are written as the front passes.

Several processes, also on several hosts, may write pieces of one file, at the same name; whoever
finds all of them durable reads the file once, for its sha256, and completes it. Two that write one
piece write the same bytes at the same place.
"""

from __future__ import annotations

import hashlib
import os
import threading
import zlib
from collections import deque
from contextlib import suppress
from pathlib import Path

from merge_cli.planning.plan import OutputFile, WorkItem
from merge_cli.system.durable import close_after_error, fsync_file, output_error, reserve, write_all
from merge_cli.system.files import pieces_of
from merge_cli.system.held import GROWING, HeldFolder, escaped, own_name

CHECKPOINT = "checkpoint"  # the folder in the staging folder that has the complete files


class ShardWriter:
    """One output file while it is being written. Threads call `write`; the call that completes the
    file returns True.
    """

    def __init__(self, file: OutputFile, staging: HeldFolder) -> None:
        self.file = file
        self.path = final_path(staging, file)
        self._staging = staging
        self._own = own_name(file.name)
        self._lock = threading.Lock()
        self._remaining = file.value_bytes
        self._front = len(file.header)
        self._written: dict[int, int] = {}  # start -> end of ranges beyond the front
        self._hashing = False
        self._hash = _FrontHash(file)
        try:
            self._fd = staging.open(self._own, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        except OSError as error:
            raise output_error(error, f"cannot create {self.path}", self.path, file.file_bytes) from error
        try:
            reserve(self._fd, file.file_bytes, self.path)
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
        write_all(self._fd, data, offset, self.path)
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
            front = self._hash.fill_gaps(front, self._fd, self.path)
            with self._lock:
                self._front = start = front
                end = self._written.get(start)
                if end is None:
                    self._hashing = False
                    return self._remaining == 0 and not self._written
            _hash_range(self._fd, start, end, self._hash, self.path)

    def finish(self) -> str:
        """Write the header, fsync, rename to the final name, fsync the folder; the file's sha256."""
        fd, self._fd = self._fd, -1
        try:
            _complete(fd, self.file, self._staging, self._own)
        except BaseException:
            self._remove()
            raise
        return self._hash.sha256.hexdigest()

    def abandon(self) -> None:
        """Close the file and remove it: nobody else could go on with it."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            close_after_error(fd)
            self._remove()

    def _remove(self) -> None:
        with suppress(OSError):
            self._staging.remove(self._own)


class PieceWriter:
    """A piece of an output file that other processes write too: `num_bytes` of it, wherever the
    plan says.
    """

    def __init__(self, file: OutputFile, staging: HeldFolder, num_bytes: int) -> None:
        self.path = final_path(staging, file)
        self._staging = staging
        self._lock = threading.Lock()
        self._remaining = num_bytes
        try:
            self._fd = staging.open(pieces_name(file), os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise output_error(error, f"cannot create {self.path}", self.path, file.file_bytes) from error
        try:
            reserve(self._fd, file.file_bytes, self.path)
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
        write_all(self._fd, data, offset, self.path)
        with self._lock:
            self._remaining -= len(data)
            return self._remaining == 0

    def finish(self) -> str:
        """Sync the piece and the name of its file; its inode, as that name may be another file's by
        now.
        """
        fd, self._fd = self._fd, -1
        try:
            try:
                inode = os.fstat(fd).st_ino
                fsync_file(fd)
                self._staging.sync(GROWING)
            finally:
                os.close(fd)
        except OSError as error:
            raise output_error(error, f"cannot make a piece of {self.path} durable", self.path) from error
        return str(inode)

    def abandon(self) -> None:
        """Close the file, leaving it where it is."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            close_after_error(fd)


def assemble(file: OutputFile, staging: HeldFolder) -> str:
    """Complete a file of which every piece is durable; the file's sha256. Raises OutputError."""
    path, pieces, whole = final_path(staging, file), pieces_name(file), final_name(file)
    found = _FrontHash(file)
    try:
        if not staging.exists(pieces) and staging.exists(whole):
            staging.rename(whole, pieces)  # whoever completed it died before the sha256 was recorded
        fd = staging.open(pieces, os.O_RDWR)
    except OSError as error:
        raise output_error(error, f"cannot open the pieces of {path}", path) from error
    try:
        start = len(file.header)
        for end in (*(gap.offset for gap in file.gaps), file.file_bytes):
            _hash_range(fd, start, end, found, path)
            start = found.fill_gaps(end, fd, path)
    except BaseException:
        close_after_error(fd)
        raise
    _complete(fd, file, staging, pieces)
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


def final_name(file: OutputFile) -> str:
    """A complete file's name in the staging folder."""
    return f"{CHECKPOINT}/{file.name}"


def final_path(staging: HeldFolder, file: OutputFile) -> Path:
    """The same as a path, for messages."""
    return staging.path / CHECKPOINT / file.name


def pieces_name(file: OutputFile) -> str:
    """The name in the staging folder that a file has while several processes write pieces of it."""
    return f"{GROWING}/{escaped(file.name)}.partial"


def _hash_range(fd: int, start: int, end: int, found: _FrontHash, path: Path) -> None:
    try:
        for piece in pieces_of(fd, start, end):
            found.update(piece)
            start += len(piece)
    except OSError as error:
        raise output_error(error, f"cannot read back {path} at byte {start}", path) from error


def _complete(fd: int, file: OutputFile, staging: HeldFolder, growing: str) -> None:
    """Write the header, fsync and close `fd`, give the file its final name, fsync the folder."""
    path = final_path(staging, file)
    try:
        try:
            write_all(fd, memoryview(file.header), 0, path)
            fsync_file(fd)
        finally:
            os.close(fd)
        staging.rename(growing, final_name(file))
        staging.sync(str(Path(final_name(file)).parent))
    except OSError as error:
        raise output_error(error, f"cannot complete {path}", path, file.file_bytes) from error


def shard_writer(item: WorkItem, staging: HeldFolder) -> ShardWriter | PieceWriter:
    """The writer of a work item into the staging folder."""
    return ShardWriter(item.file, staging) if item.is_whole else PieceWriter(item.file, staging, item.bytes_to_write)
