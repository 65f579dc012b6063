"""The system calls that decide what is on a disk after a crash, and what their failures mean to the
person at the keyboard.

A failed fsync is an error that is never retried: the kernel may have dropped the pages and report
success the next time. Whoever calls these functions throws the file away instead. Filesystems that
cannot sync (EINVAL and its like, as on some FUSE mounts) promise nothing about power loss, and
pmerge then promises no more than they do.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shlex
import stat
from contextlib import suppress
from pathlib import Path

from merge_cli.errors import OutputError
from merge_cli.system.descriptors import open_files_hint
from merge_cli.system.files import TMPFS, filesystem_type

NOT_SUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_NO_REPLACE, _EXCHANGE = 1, 2  # linux/fcntl.h, linux/fs.h
_HERE = -100  # AT_FDCWD of linux/fcntl.h: names are paths
_LIBC = ctypes.CDLL(None, use_errno=True)


def write_all(fd: int, data: memoryview, offset: int, path: Path) -> None:
    """Write `data` at `offset`, short writes continued. Raises OutputError with the path and what
    is needed.
    """
    done = 0
    while done < len(data):
        try:
            count = os.pwrite(fd, data[done:], offset + done)
            if count == 0:
                raise OSError(errno.EIO, "the storage took no byte")
        except OSError as error:
            raise output_error(error, f"cannot write {path} at byte {offset + done}", path, len(data) - done) from error
        done += count


def reserve(fd: int, size: int, path: Path) -> None:
    """Give the file `size` bytes, its blocks reserved where the filesystem does so by itself.
    Raises OutputError.

    This is fallocate(2), not posix_fallocate(3), which would write zeros where the filesystem
    cannot. tmpfs can only by writing zeros to memory, so nothing is reserved there.
    """
    try:
        if size and hasattr(_LIBC, "fallocate") and filesystem_type(fd) != TMPFS:
            _call(_LIBC.fallocate, fd, 0, ctypes.c_int64(0), ctypes.c_int64(size))
        else:
            os.ftruncate(fd, size)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise output_error(error, f"cannot reserve {size} bytes for {path}", path, size) from error
        try:
            os.ftruncate(fd, size)
        except OSError as error:
            raise output_error(error, f"cannot give {path} its {size} bytes", path, size) from error


def close_after_error(fd: int) -> None:
    """Close a file whose content does not matter any more. On NFS even that may report that bytes
    could not be written.
    """
    with suppress(OSError):
        os.close(fd)


def fsync_file(fd: int) -> None:
    """Make the content of an open file durable. Raises OSError: what was written is then lost,
    whatever a second try says.
    """
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable. Raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fsync_file(fd)
    finally:
        os.close(fd)


def make_folder(folder: Path) -> None:
    """Make `folder` and what is missing above it, each name durable. Raises OSError."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    try:
        folder.mkdir()
    except FileExistsError:
        if not folder.is_dir():
            raise
    fsync_folder(folder.parent)


def open_own(path: Path, flags: int, at: tuple[int, str] | None = None) -> int:
    """Open a file of pmerge's own for writing; `flags` may hold O_CREAT, O_EXCL and O_TRUNC. Raises
    OSError or OutputError.

    `at`: the open folder that the file lies in, and its name there; `path` is then for messages.

    Strangers may plant names on shared scratch: a link is not followed, and a second name of
    another file, a pipe or a device is refused before a byte of it changes.
    """
    safe = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    folder, name = at or (None, path)
    try:
        fd = os.open(name, safe | (flags & ~os.O_TRUNC), 0o666, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise foreign(path) from error
        raise
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            raise foreign(path)
        if flags & os.O_TRUNC and status.st_size:
            os.ftruncate(fd, 0)
    except BaseException:
        os.close(fd)
        raise
    return fd


def foreign(path: Path) -> OutputError:
    """The error for a name in pmerge's own folder that is a link, or no file or folder of the
    expected kind.
    """
    return OutputError(
        f"{path} is a link, a second name of another file, or no regular file: pmerge did not make it",
        hint=f"look who put it there:  ls -l {shlex.quote(str(path))}",
    )


def write_file(path: Path, data: bytes, *, partial_name: str = "") -> None:
    """Write a small file so that it is there whole and durable, or not at all; its mode follows the
    umask.

    It grows as `NAME.partial`, or as `partial_name` if several processes may write it at the same
    time. Raises OutputError.
    """
    partial = path.with_name(partial_name or path.name + ".partial")
    fd = -1
    try:
        make_folder(path.parent)
        fd = open_own(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        write_all(fd, memoryview(data), 0, partial)
        fsync_file(fd)
        partial.rename(path)
        fsync_folder(path.parent)
    except OSError as error:
        raise output_error(error, f"cannot write {path}", path, len(data)) from error
    finally:
        if fd >= 0:
            os.close(fd)


def rename_in_one_step(source: Path, destination: Path) -> None:
    """Rename, and never onto something. Raises FileExistsError, an OSError of NOT_SUPPORTED where
    the filesystem has no such call, and others.
    """
    _rename2((_HERE, str(source)), (_HERE, str(destination)), _NO_REPLACE)


def rename_to_new(source: tuple[int, str], destination: tuple[int, str]) -> None:
    """Rename in one step, never onto something; each is an open folder and a name in it. Raises
    FileExistsError and other OSErrors.

    Where the system has no such call, the name is looked up first; a file or a folder with
    something in it that appears in between is still never replaced, only an empty folder.
    """
    try:
        _rename2(source, destination, _NO_REPLACE)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
        folder, name = destination
        with suppress(FileNotFoundError):
            os.stat(name, dir_fd=folder, follow_symlinks=False)
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name) from None
        os.rename(source[1], name, src_dir_fd=source[0], dst_dir_fd=folder)


def exchange(one: tuple[int, str], other: tuple[int, str]) -> bool:
    """Let two names, each in an open folder, change places in one step; False where the filesystem
    cannot. Raises other OSErrors.
    """
    try:
        _rename2(one, other, _EXCHANGE)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
        return False
    return True


def _rename2(source: tuple[int, str], destination: tuple[int, str], flags: int) -> None:
    if not hasattr(_LIBC, "renameat2"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    _call(_LIBC.renameat2, source[0], os.fsencode(source[1]), destination[0], os.fsencode(destination[1]), flags)


def _call(function: ctypes._NamedFuncPointer, *arguments: object) -> None:
    while function(*arguments) != 0:
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def output_error(error: OSError, what: str, path: Path, need: int = 0) -> OutputError:
    """`what` failed at `path` for lack of something: an OutputError that says what is needed.
    `need` is in bytes.
    """
    details, hint = [], "mend the storage, then run the same command again: what is finished is kept"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        details = [f"need  {need} bytes and a free inode", *_space(path)]
        room = "ask for a larger quota" if error.errno == errno.EDQUOT else "make room"
        hint = f"{room}, then run the same command again: what is finished is kept"
    elif error.errno == errno.EFBIG:
        details = ["the file would be larger than the limit of this shell (ulimit -f) or of the filesystem"]
        hint = "ulimit -f unlimited, then the same command again; or smaller files:  --shard-size 1GB"
    elif error.errno in (errno.EMFILE, errno.ENFILE):
        details, hint = ["too few open files are allowed"], open_files_hint()
    elif error.errno == errno.EROFS:
        hint = "the filesystem is read-only: remount it, or choose another place:  -o PATH"
    elif error.errno in (errno.EACCES, errno.EPERM):
        hint = "get permission to write there, or choose another place:  -o PATH"
    return OutputError(f"{what}: {error.strerror}", details=details, hint=hint)


def _space(path: Path) -> list[str]:
    try:
        status = os.statvfs(path.parent)
    except OSError:
        return []
    return [f"have  {status.f_bavail * status.f_frsize} bytes and {status.f_favail} inodes free in {path.parent}"]
