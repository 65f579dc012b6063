"""Files of this machine, mounts included: the only code that opens an input by its path.

Nothing is trusted here: a name may be a pipe that never answers, a device that never ends, or a
link to a file that is nobody's business. The one link that may leave a checkpoint is that of a Hub
cache, whose snapshots point into the cache's own blobs.

A file is the same as long as its size and modification time are: its inode is not looked at, for
network and FUSE mounts give another one to another host, after a remount, or at every look. Only of
a file that is held open is more known: when it has lost its name, it was replaced or removed. Files
are opened read-only and never mapped: a fault on a network mount would kill the process.

Not noticed: data rewritten in place, or a file replaced while it is not open, by something that
sets the modification time back.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Sequence
from pathlib import Path

from merge_cli.errors import ChangedError, InputError, StoreError
from merge_cli.stores.store import Entry, Kind, Stat
from merge_cli.system.descriptors import open_files_hint
from merge_cli.system.durable import NOT_SUPPORTED

DIRECT_BLOCK_BYTES = 4096
MAX_BYTES_PER_READ = 0x7FFFF000  # Linux reads no more at once
MAX_BYTES_PER_DIRECT_READ = 1 << 30
_OPEN = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # never wait at a pipe
_NOTHING_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
_AGAIN = "nothing was published; start again when the checkpoint is complete"


class LocalSource:
    """A file of this machine, held open between its reads, and opened again after `close`."""

    def __init__(self, path: str) -> None:
        """Open the regular file `path`. Raises InputError."""
        self.path = path
        self._lock = threading.Lock()
        self._is_gone = self._has_no_direct = False
        try:
            fd = os.open(path, _OPEN)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                raise _too_few_descriptors(path, error) from error
            raise InputError(f"cannot open {path}: {getattr(error, 'strerror', error)}") from error
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(fd)
            raise InputError(f"not a regular file: {path}")
        self.num_bytes = status.st_size
        self._mtime_ns = status.st_mtime_ns
        self._had_name = status.st_nlink > 0  # some FUSE mounts count no names
        self._descriptors = {0: fd}

    @property
    def version(self) -> str:
        return version_of_time(self._mtime_ns)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `offset`. Raises ChangedError or StoreError."""
        fd = self.descriptor()
        done, wanted = 0, len(buffer)
        while done < wanted:
            part = buffer[done : done + MAX_BYTES_PER_READ] if done or wanted > MAX_BYTES_PER_READ else buffer
            try:
                count = os.preadv(fd, [part], offset + done)
            except OSError as error:
                raise StoreError(
                    f"cannot read {self.path} at byte {offset + done}: {error.strerror}",
                    hint="run the same command again once the storage answers",
                    offset=offset + done,
                ) from error
            if count == 0:
                raise ChangedError(
                    f"{self.path} ended at byte {offset + done} while it was being read",
                    details=[f"expected  {self.num_bytes} bytes, as when the run began"],
                    hint="something truncated or replaced it; start again when the checkpoint is complete",
                    offset=offset + done,
                )
            done += count

    def read_direct(self, first: int, wanted: int, block: memoryview) -> bool:
        """Read past the page cache: whether at least `wanted` bytes from `first`, a multiple of the
        block, are in `block`.

        `block` is aligned to DIRECT_BLOCK_BYTES. False where it has no room for whole blocks, where
        the filesystem has no O_DIRECT, or where a read fails: `read_into` then finds the reason.
        Raises ChangedError or StoreError.
        """
        end = -(-wanted // DIRECT_BLOCK_BYTES) * DIRECT_BLOCK_BYTES
        if end > len(block) or self._has_no_direct:
            return False
        done = 0
        try:
            fd = self.descriptor(os.O_DIRECT)
            while done < wanted and done % DIRECT_BLOCK_BYTES == 0:  # an odd count is the end of the file
                count = os.preadv(fd, [block[done : min(end, done + MAX_BYTES_PER_DIRECT_READ)]], first + done)
                if count == 0:
                    break
                done += count
        except OSError as error:
            self._has_no_direct = self._has_no_direct or error.errno in NOT_SUPPORTED
            return False
        return done >= wanted

    def drop_cached(self, offset: int, num_bytes: int) -> None:
        """Let the page cache forget these bytes."""
        os.posix_fadvise(self.descriptor(), offset, num_bytes, os.POSIX_FADV_DONTNEED)

    def descriptor(self, flags: int = 0) -> int:
        """The open file, until `close`. Raises ChangedError, StoreError; OSError where the
        filesystem does not know `flags`.
        """
        with self._lock:
            if flags not in self._descriptors:
                self._descriptors[flags] = self._open_again(flags)
            return self._descriptors[flags]

    def close(self) -> None:
        with self._lock:
            for fd in self._descriptors.values():
                self._is_gone = self._is_gone or (self._had_name and os.fstat(fd).st_nlink == 0)
                os.close(fd)
            self._descriptors.clear()

    def _open_again(self, flags: int) -> int:
        if self._is_gone:
            raise ChangedError(f"{self.path} was replaced or removed during the run", hint=_AGAIN)
        try:
            fd = os.open(self.path, _OPEN | flags)
        except OSError as error:
            if flags and error.errno in NOT_SUPPORTED:
                raise
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise _too_few_descriptors(self.path, error) from error
            if error.errno == errno.ENOENT:
                raise ChangedError(f"{self.path} disappeared during the run", hint=_AGAIN) from error
            raise StoreError(f"cannot open {self.path}: {error.strerror}") from error
        try:
            status = os.fstat(fd)
            if (status.st_size, status.st_mtime_ns) != (self.num_bytes, self._mtime_ns):
                raise ChangedError(
                    f"{self.path} changed during the run",
                    details=[
                        f"expected  {self.num_bytes} bytes, mtime {self._mtime_ns} ns, as when the run began",
                        f"found     {status.st_size} bytes, mtime {status.st_mtime_ns} ns",
                    ],
                    hint=_AGAIN,
                )
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        except BaseException:
            os.close(fd)
            raise
        return fd


def version_of_time(mtime_ns: int) -> str:
    """The version of a file that was modified at that time."""
    return f"mtime_ns {mtime_ns}"


class LocalStore:
    """The folders and files of this machine."""

    requests_at_once = 1

    def expand(self, path: str) -> Sequence[str]:
        return [path]  # patterns are the shell's

    def list(self, path: str) -> Sequence[Entry]:
        try:
            with os.scandir(path) as entries:
                return sorted(Entry(entry.name, _kind(entry)) for entry in entries)
        except (OSError, ValueError) as error:
            raise InputError(f"cannot list {path}: {getattr(error, 'strerror', error)}", hint=f"ls -ld {path}") from error

    def stat(self, path: str) -> Stat | None:
        try:
            status = Path(path).stat()
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno not in _NOTHING_THERE:
                raise InputError(f"cannot look at {path}: {error.strerror}", hint=f"ls -ld {path}") from error
            return Stat("broken link", 0, 0) if Path(path).is_symlink() else None
        return Stat(_kind_of_mode(status.st_mode), status.st_size, status.st_mtime_ns)

    def open(self, path: str) -> LocalSource:
        return LocalSource(path)

    def resolve(self, path: str) -> str:
        return os.path.realpath(path)

    def check_inside(self, root: str, path: str) -> None:
        link = Path(path)
        if link.is_symlink() and not link.exists():
            raise InputError(f"{path} is a link to {link.readlink()}, which is not there", hint="copy the file, or remove the link")
        if not _stays_inside(Path(root), link):
            raise InputError(
                f"{path} is a link that leads outside the checkpoint",
                details=[f"found     {path} -> {link.readlink()}"] if link.is_symlink() else [],
                hint="copy the file into the checkpoint, or name the folder that it really lies in",
            )


STORE = LocalStore()


def _kind(entry: os.DirEntry[str]) -> Kind:
    """Without a look at the file, unless it is a link: a folder of a thousand shards is listed with
    one call.
    """
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        return "broken link" if entry.is_symlink() and not Path(entry.path).exists() else "other"
    except OSError:
        return "broken link"  # links in a circle


def _kind_of_mode(mode: int) -> Kind:
    return "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "other"


def _stays_inside(root: Path, path: Path) -> bool:
    """Whether `path`, links followed, lies in `root`, or is a link of a Hub cache snapshot into the
    same cache's blobs.
    """
    try:
        real, real_root = path.resolve(), root.resolve()
        if real.is_relative_to(real_root):
            return True
        snapshots = [folder for folder in (real_root, *real_root.parents) if folder.parent.name == "snapshots"]
        return any(real.parent == (folder.parent.parent / "blobs").resolve() for folder in snapshots)
    except (OSError, RuntimeError, ValueError):  # a name that is too long, links in a circle
        return False


def _too_few_descriptors(path: str, error: OSError) -> StoreError:
    return StoreError(f"cannot open {path}: {error.strerror}", hint=open_files_hint())
