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
from pathlib import Path

from merge_cli.engine.storage import DIRECT_BLOCK_BYTES
from merge_cli.errors import ChangedError, PmergeError
from merge_cli.formats.checkpoint import WeightFile
from merge_cli.formats.files import read_exactly
from merge_cli.system.durable import NOT_SUPPORTED

MAX_BYTES_PER_READ = 0x7FFFF000  # Linux reads no more at once
MAX_BYTES_PER_DIRECT_READ = 1 << 30


class InputFiles:
    """A cache of open inputs, safe to use from several threads. At most `max_open` stay open while nobody reads from them.

    Without `keep_cached` the page cache is told that what was read is not needed again, so that reading terabytes does not push out
    what others on the machine have cached. With `direct`, `read_block` reads past it (O_DIRECT) what is aligned for that.
    """

    def __init__(self, max_open: int | None = None, keep_cached: bool = True, direct: bool = False) -> None:
        self._max_open = max_open or min(64, descriptors_left() // 2)
        self._keep_cached = keep_cached
        self._direct = direct
        self._lock = threading.Lock()
        self._open: OrderedDict[tuple[WeightFile, int], int] = OrderedDict()
        self._users: dict[tuple[WeightFile, int], int] = {}

    def __enter__(self) -> InputFiles:
        return self

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            for fd in self._open.values():
                os.close(fd)
            self._open.clear()

    def read_into(self, file: WeightFile, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `offset` of `file`. Raises ChangedError where the file ends early, PmergeError on I/O errors."""
        fd = self._borrow(file)
        try:
            done, wanted = 0, len(buffer)
            while done < wanted:
                try:
                    part = buffer[done : done + MAX_BYTES_PER_READ] if done or wanted > MAX_BYTES_PER_READ else buffer
                    count = os.preadv(fd, [part], offset + done)
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
        finally:
            self._give_back(file)

    def read_block(self, file: WeightFile, offset: int, size: int, item_bytes: int, block: memoryview) -> int:
        """Read `size` bytes from byte `offset` of `file` into `block`; where in it they begin, a multiple of `item_bytes`.

        `block` is aligned to DIRECT_BLOCK_BYTES and has room for `size` bytes and, for O_DIRECT, two such blocks more: those that
        enclose the data are read. What is smaller than a block, or what O_DIRECT cannot read, comes through the page cache.
        Raises what `read_into` raises.
        """
        begin = offset % DIRECT_BLOCK_BYTES
        if (
            self._direct
            and size >= DIRECT_BLOCK_BYTES
            and begin % item_bytes == 0
            and self._read_direct(file, offset - begin, begin + size, block)
        ):
            return begin
        self.read_into(file, offset, block[:size])
        return 0

    def _read_direct(self, file: WeightFile, first: int, wanted: int, block: memoryview) -> bool:
        """Whether at least `wanted` bytes from `first`, a multiple of the block, came. What is odd is left to a buffered read."""
        end = -(-wanted // DIRECT_BLOCK_BYTES) * DIRECT_BLOCK_BYTES
        if end > len(block):
            return False
        try:
            fd = self._borrow(file, os.O_DIRECT)
        except OSError as error:
            if error.errno not in NOT_SUPPORTED:
                raise
            self._direct = False
            return False
        done = 0
        try:
            while done < wanted and done % DIRECT_BLOCK_BYTES == 0:  # an odd count is the end of the file
                count = os.preadv(fd, [block[done : min(end, done + MAX_BYTES_PER_DIRECT_READ)]], first + done)
                if count == 0:
                    break
                done += count
        except OSError as error:
            self._direct = self._direct and error.errno not in NOT_SUPPORTED
            return False
        finally:
            self._give_back(file, os.O_DIRECT)
        return done >= wanted

    def _borrow(self, file: WeightFile, flags: int = 0) -> int:
        """The open file, which stays open until it is given back."""
        key = (file, flags)
        with self._lock:
            fd = self._open.get(key)
            if fd is None:
                self._close_idle()
                fd = _open_unchanged(file, flags)
                self._open[key] = fd
            self._open.move_to_end(key)
            self._users[key] = self._users.get(key, 0) + 1
            return fd

    def _give_back(self, file: WeightFile, flags: int = 0) -> None:
        with self._lock:
            self._users[file, flags] -= 1

    def _close_idle(self) -> None:
        idle = [key for key in self._open if not self._users.get(key)]
        for key in idle[: max(0, len(self._open) + 1 - self._max_open)]:
            os.close(self._open.pop(key))


def _open_unchanged(file: WeightFile, flags: int = 0) -> int:
    """Open `file`. Raises ChangedError or PmergeError; the OSError itself where the filesystem does not know `flags`."""
    try:
        fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | flags)  # never wait at a pipe
    except OSError as error:
        if flags and error.errno in NOT_SUPPORTED:
            raise
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
