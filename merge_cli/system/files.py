"""Small helpers on files: JSON that may be torn, hashes, all files of a folder, the kind of a
filesystem.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from merge_cli.system.json_text import parse_json

TMPFS = 0x01021994  # linux/magic.h
_READ_BYTES = 4 << 20
_MAX_RECORD_BYTES = 256 << 20
_LIBC = ctypes.CDLL(None, use_errno=True)


def files_in(folder: Path, *, strict: bool = False) -> Iterator[Path]:
    """All files below `folder`; none if it does not exist. With `strict` a folder that cannot be
    read raises OSError; else it counts as empty.
    """
    for parent, _, names in os.walk(folder, onerror=unless_gone if strict else None):
        for name in names:
            yield Path(parent, name)


def unless_gone(error: OSError) -> None:
    """For os.walk and os.fwalk, which would pass over folders that they cannot read."""
    if not isinstance(error, FileNotFoundError):
        raise error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} if the file cannot be read or holds anything else."""
    try:
        value = parse_json(read_regular(path, _MAX_RECORD_BYTES), is_own=True)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def read_regular(path: Path, max_bytes: int) -> bytes:
    """The content of a small file. Raises OSError, also for a FIFO or a device, which might never
    end, and for a larger file.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "is not a regular file", str(path))
        if status.st_size > max_bytes:
            raise OSError(errno.EFBIG, f"is larger than {max_bytes} bytes", str(path))
        return read_up_to(fd, status.st_size, 0)
    finally:
        os.close(fd)


def sha256_of(path: Path) -> str:
    """The sha256 of a file, "" if it cannot be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would wait for a writer
        try:
            return sha256_of_open(fd) if stat.S_ISREG(os.fstat(fd).st_mode) else ""
        finally:
            os.close(fd)
    except OSError:
        return ""


def sha256_of_open(fd: int) -> str:
    """The sha256 of an open file. Raises OSError."""
    digest = hashlib.sha256()
    for piece in pieces_of(fd, 0, os.fstat(fd).st_size):
        digest.update(piece)
    return digest.hexdigest()


def read_up_to(fd: int, length: int, offset: int) -> bytes:
    """`length` bytes from `offset`; fewer only at the end of the file. Raises OSError."""
    pieces = []
    while length > 0 and (piece := os.pread(fd, length, offset)):
        pieces.append(piece)
        offset += len(piece)
        length -= len(piece)
    return b"".join(pieces)


def pieces_of(fd: int, begin: int, end: int) -> Iterator[memoryview]:
    """Bytes `begin` to `end` of an open file, a few MiB at a time, in one buffer. Raises OSError,
    EIO if the file is shorter.
    """
    buffer = memoryview(bytearray(min(_READ_BYTES, max(end - begin, 0))))
    while begin < end:
        count = os.preadv(fd, [buffer[: end - begin]], begin)
        if not count:
            raise OSError(errno.EIO, "the file ended early")
        yield buffer[:count]
        begin += count


def filesystem_type(where: Path | int) -> int:
    """The magic number (linux/magic.h) of the filesystem of a path or an open file; 0 if it is not
    known.
    """
    status = ctypes.create_string_buffer(256)  # struct statfs, which begins with the type as a long
    failed = _LIBC.fstatfs(where, status) if isinstance(where, int) else _LIBC.statfs(os.fsencode(where), status)
    return 0 if failed else ctypes.c_long.from_buffer(status).value
