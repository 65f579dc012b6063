"""Positional reads from the inputs, with a bounded number of open files.

Files are opened read-only and never mapped. Each time a file is opened its size, modification time and inode are compared with
what the plan saw, so a checkpoint that is replaced during the run is noticed rather than mixed in; at the end all are compared
again, and their headers hashed. Not noticed: data rewritten in place by something that also sets the modification time back.
"""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from merge_cli.errors import ChangedError, PmergeError
from merge_cli.formats.checkpoint import WeightFile
from merge_cli.formats.files import read_exactly

MAX_BYTES_PER_READ = 0x7FFFF000  # Linux reads no more at once


class InputFiles:
    """A cache of open inputs, safe to use from several threads. At most `max_open` stay open while nobody reads from them.

    Without `keep_cached` the page cache is told that what was read is not needed again, so that reading terabytes does not push out
    what others on the machine have cached.
    """

    def __init__(self, max_open: int | None = None, keep_cached: bool = True) -> None:
        self._max_open = max_open or min(64, descriptors_left() // 2)
        self._keep_cached = keep_cached
        self._lock = threading.Lock()
        self._open: OrderedDict[WeightFile, int] = OrderedDict()
        self._users: dict[WeightFile, int] = {}

    def __enter__(self) -> InputFiles:
        return self

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            for fd in self._open.values():
                os.close(fd)
            self._open.clear()

    def read_into(self, file: WeightFile, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `offset` of `file`. Raises ChangedError where the file ends early, PmergeError on I/O errors."""
        with self._borrow(file) as fd:
            done, wanted = 0, len(buffer)
            while done < wanted:
                try:
                    count = os.preadv(fd, [buffer[done : done + MAX_BYTES_PER_READ]], offset + done)
                except OSError as error:
                    raise PmergeError(
                        f"cannot read {file.path} at byte {offset + done}: {error.strerror}",
                        details=[f"tensor  `{tensor_at(file, offset + done)}`"],
                        hint="run the same command again once the storage answers",
                    ) from error
                if count == 0:
                    raise ChangedError(
                        f"{file.path} ended at byte {offset + done} while it was being read",
                        details=[
                            f"expected  {file.file_bytes} bytes, as when the run began",
                            f"tensor    `{tensor_at(file, offset + done)}`",
                        ],
                        hint="something truncated or replaced it; start again when the checkpoint is complete",
                    )
                done += count
            if not self._keep_cached:
                os.posix_fadvise(fd, offset, wanted, os.POSIX_FADV_DONTNEED)

    @contextmanager
    def _borrow(self, file: WeightFile) -> Iterator[int]:
        with self._lock:
            fd = self._open.get(file)
            if fd is None:
                self._close_idle()
                fd = _open_unchanged(file)
                self._open[file] = fd
            self._open.move_to_end(file)
            self._users[file] = self._users.get(file, 0) + 1
        try:
            yield fd
        finally:
            with self._lock:
                self._users[file] -= 1

    def _close_idle(self) -> None:
        idle = [file for file in self._open if not self._users.get(file)]
        for file in idle[: max(0, len(self._open) + 1 - self._max_open)]:
            os.close(self._open.pop(file))


def _open_unchanged(file: WeightFile) -> int:
    try:
        fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # never wait at a pipe
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise PmergeError(
                f"cannot open {file.path}: {error.strerror}",
                hint="allow more open files:  ulimit -n 1024, then run the same command again",
            ) from error
        raise ChangedError(f"cannot open {file.path}: {error.strerror}") from error
    try:
        check_unchanged(file, os.fstat(fd))
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    except BaseException:
        os.close(fd)
        raise
    return fd


def descriptors_left() -> int:
    """How many more files this process may open."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(0, limit - sum(1 for _ in Path("/proc/self/fd").iterdir()))


def tensor_at(file: WeightFile, offset: int) -> str:
    """The name of the tensor that byte `offset` of `file` belongs to."""
    position = offset - file.header.data_start
    return next((name for name, info in file.header.tensors.items() if info.start <= position < info.end), "none")


def check_header_unchanged(file: WeightFile) -> None:
    """Raise ChangedError unless the header of `file` has the bytes that the plan was made from."""
    try:
        fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            header = read_exactly(fd, file.header.data_start, 0)
        finally:
            os.close(fd)
    except OSError as error:
        raise ChangedError(f"cannot read the header of {file.path} again: {error.strerror}") from error
    if hashlib.sha256(header).hexdigest() != file.header.sha256:
        raise ChangedError(
            f"the header of {file.path} changed during the run",
            hint="nothing was published; start again when the checkpoint is complete",
        )


def check_unchanged(file: WeightFile, status: os.stat_result | None = None) -> None:
    """Raise ChangedError unless `file` still has the size, modification time and inode that the plan saw."""
    try:
        status = status or file.path.stat()
    except OSError as error:
        raise ChangedError(f"{file.path} disappeared during the run: {error.strerror}") from error
    if (status.st_size, status.st_mtime_ns, status.st_ino) != (file.file_bytes, file.mtime_ns, file.inode):
        raise ChangedError(
            f"{file.path} changed during the run",
            details=[
                f"expected  {file.file_bytes} bytes, mtime {file.mtime_ns} ns, inode {file.inode}, as when the run began",
                f"found     {status.st_size} bytes, mtime {status.st_mtime_ns} ns, inode {status.st_ino}",
            ],
            hint="nothing was published; start again when the checkpoint is complete",
        )
