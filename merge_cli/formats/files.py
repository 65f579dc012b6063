"""Read the small files of a checkpoint that others wrote: regular files only, of bounded size, inside the checkpoint.

Nothing is trusted here: a name may be a pipe that never answers, a device that never ends, or a link to a file that is nobody's
business. The one link that may leave a checkpoint is that of a Hub cache, whose snapshots point into the cache's own blobs.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from merge_cli.errors import InputError


def read_regular_file(path: Path, max_bytes: int) -> bytes:
    """The bytes of the regular file `path`. Raises InputError where it is missing, something else or larger than `max_bytes`."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', error)}") from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"not a regular file: {path}")
        if status.st_size > max_bytes:
            raise InputError(
                f"{path} is too large to be what its name says",
                details=[f"found     {status.st_size} bytes", f"expected  at most {max_bytes} bytes"],
            )
        data = read_exactly(fd, status.st_size, 0)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    finally:
        os.close(fd)
    if len(data) < status.st_size:
        raise InputError(f"the file ended while it was read: {path}")
    return data


def read_exactly(fd: int, length: int, offset: int) -> bytes:
    """`length` bytes from `offset`; fewer only at the end of the file."""
    pieces = []
    while length > 0:
        piece = os.pread(fd, length, offset)
        if not piece:
            break
        pieces.append(piece)
        offset += len(piece)
        length -= len(piece)
    return b"".join(pieces)


def list_folder(folder: Path) -> list[os.DirEntry[str]]:
    """The entries of `folder` by name. Raises InputError where it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"cannot list {folder}: {error.strerror}", hint=f"ls -ld {folder}") from error


def stays_inside(root: Path, path: Path) -> bool:
    """Whether `path`, links followed, lies in `root`, or is a link of a Hub cache snapshot into the same cache's blobs."""
    try:
        real, real_root = path.resolve(), root.resolve()
    except (OSError, RuntimeError):  # a name that is too long, links in a circle
        return False
    if real.is_relative_to(real_root):
        return True
    snapshots = real_root.parent
    return snapshots.name == "snapshots" and real.parent == snapshots.parent / "blobs"


def check_stays_inside(root: Path, path: Path) -> None:
    """Raise InputError where `path` is a link that is broken or leaves the checkpoint `root`."""
    if path.is_symlink() and not path.exists():
        raise InputError(f"{path} is a link to {path.readlink()}, which is not there", hint="copy the file, or remove the link")
    if not stays_inside(root, path):
        raise InputError(
            f"{path} is a link that leads outside the checkpoint",
            details=[f"found     {path} -> {path.readlink()}"] if path.is_symlink() else [],
            hint="copy the file into the checkpoint, or name the folder that it really lies in",
        )
