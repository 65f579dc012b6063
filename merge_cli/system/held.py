"""A folder that is held open: the names in it are used through its descriptor.

Whatever happens meanwhile to the folder's own name (removed, made anew by another run, exchanged
for a link), nothing but this very folder is read, written or removed. Below it no link is followed.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from merge_cli.system.durable import NOT_SUPPORTED, foreign, fsync_file, open_own, output_error, rename_to_new, write_all
from merge_cli.system.files import sha256_of_open, unless_gone
from merge_cli.system.process import start_time

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
GROWING = "partial"  # the folder in it for files that are not complete
_ESCAPED_BYTES = 160  # of a file's name in the name of a record, which adds up to 50
_NAME_BYTES = 120  # of a file's name in the name of a temporary one
_REMOVALS = 100  # tries to remove a folder that others put files into


class HeldFolder:
    """The folder `path`, between `hold` and `release`.

    A name may have folders in it, as "chat_templates/tool.jinja". All methods raise OSError,
    FileNotFoundError once the folder was removed, and OutputError where a name is a link or no
    file of pmerge's own.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = -1

    def hold(self, within: HeldFolder | None = None) -> None:
        """Open the folder: links above it are followed, and with `within`, the folder above, none."""
        if within is None:
            self.fd = os.open(self.path, _FOLDER)
        else:
            self.fd = _open_folder(self.path.name, within.fd, self.path)

    def release(self) -> None:
        """Close the folder."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def is_same(self) -> bool:
        """Whether the folder that is held is the one that has its name."""
        try:
            return os.path.samestat(os.fstat(self.fd), os.lstat(self.path))
        except OSError:
            return False

    def is_on_same_mount(self, other: HeldFolder) -> bool:
        """Whether names can be moved from here to the other folder, also where both are one device
        mounted twice: the kernel looks at that before it looks for the name.
        """
        name = own_name("").rpartition("/")[2]
        try:
            os.rename(name, name, src_dir_fd=self.fd, dst_dir_fd=other.fd)
        except FileNotFoundError:
            return True
        except OSError as error:
            if error.errno not in (*NOT_SUPPORTED, errno.EXDEV, errno.EPERM, errno.EACCES):
                raise
            return error.errno != errno.EXDEV
        return True

    def stat(self, name: str) -> os.stat_result:
        """The status of a name; that of a link, not of its target."""
        with self._place(name) as (fd, last):
            return os.stat(last, dir_fd=fd, follow_symlinks=False)

    def exists(self, name: str) -> bool:
        """Whether something has this name."""
        try:
            self.stat(name)
        except FileNotFoundError:
            return False
        return True

    def names(self, name: str) -> list[str]:
        """The names in a folder."""
        with self._folder(name) as folder, os.scandir(folder) as entries:
            return [entry.name for entry in entries]

    def make_folder(self, name: str) -> None:
        """Make a folder unless it is there; its name is durable."""
        with self._place(f"{name}/.", make_after=0):
            pass

    def open(self, name: str, flags: int) -> int:
        """Open a file of pmerge's own for writing, see `open_own`; O_CREAT creates it."""
        with self._place(name) as (fd, last):
            return open_own(self.path / name, flags, at=(fd, last))

    def sha256(self, name: str) -> str:
        """The sha256 of a file, "" if it cannot be read."""
        try:
            with self._place(name) as (fd, last):
                file = os.open(last, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=fd)
            try:
                return sha256_of_open(file)
            finally:
                os.close(file)
        except OSError:
            return ""

    def rename(self, name: str, new: str, *, to: HeldFolder | None = None, make_after: int = 1) -> None:
        """Give a file or a folder another name, also in the folder `to`. An older file of that name
        is replaced. Of the folders in the new name, those after the first `make_after` are made.
        """
        with self._place(name) as (fd, last), (to or self)._place(new, make_after=make_after) as (new_fd, new_last):
            os.rename(last, new_last, src_dir_fd=fd, dst_dir_fd=new_fd)

    def rename_to_new(self, name: str, to: HeldFolder, new: str) -> None:
        """The same in one step, and never onto something: raises FileExistsError."""
        rename_to_new((self.fd, name), (to.fd, new))

    def sync(self, name: str = ".") -> None:
        """Make the names in a folder durable."""
        with self._folder(name) as folder:
            fsync_file(folder)

    def sync_tree(self, name: str) -> None:
        """Make the names in a folder and in every folder below it durable."""
        with self._folder(name) as top:
            for _, _, _, folder in os.fwalk(".", topdown=False, dir_fd=top, onerror=unless_gone):
                fsync_file(folder)

    def remove(self, name: str) -> None:
        """Remove a file, a link itself, or a folder with all that is in it; nothing if it is not
        there.
        """
        try:
            with self._place(name) as (fd, last):
                if stat.S_ISDIR(os.stat(last, dir_fd=fd, follow_symlinks=False).st_mode):
                    _remove_tree(fd, last)
                else:
                    os.unlink(last, dir_fd=fd)
        except FileNotFoundError:
            pass

    def remove_empty_folders(self, name: str) -> None:
        """Remove the folders below `name` that have nothing in them."""
        with self._folder(name) as top:
            for _, folders, _, parent in os.fwalk(".", topdown=False, dir_fd=top, onerror=unless_gone):
                for folder in folders:
                    _remove_if_empty(folder, parent)

    def remove_if_empty(self, name: str) -> bool:
        """Remove a folder unless something is in it; whether it is gone."""
        with self._place(name) as (fd, last):
            return _remove_if_empty(last, fd)

    def walk(self, name: str = ".") -> Iterator[tuple[str, os.stat_result]]:
        """Everything below a folder, by its name there, with its status; links are not followed."""
        with self._folder(name) as top:
            for parent, folders, files, folder in os.fwalk(".", dir_fd=top, onerror=unless_gone):
                for each in (*folders, *files):
                    with suppress(FileNotFoundError):  # another process is at work
                        yield os.path.normpath(f"{parent}/{each}"), os.stat(each, dir_fd=folder, follow_symlinks=False)

    def files(self, name: str) -> dict[str, os.stat_result]:
        """Everything below a folder that is no folder; nothing if it is not there."""
        try:
            return {each: status for each, status in self.walk(name) if not stat.S_ISDIR(status.st_mode)}
        except FileNotFoundError:
            return {}

    def write_file(self, name: str, data: bytes, *, durable: bool = True) -> None:
        """Write a small file so that it is there whole (and durable), or not at all. It grows under
        a name of this process in `partial/`. Raises OutputError.
        """
        fd, temporary = -1, own_name(name)
        try:
            fd = self.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            write_all(fd, memoryview(data), 0, self.path / name)
            if durable:
                fsync_file(fd)
            self.rename(temporary, name)
            if durable:
                self.sync(str(Path(name).parent))
        except OSError as error:
            raise output_error(error, f"cannot write {self.path / name}", self.path / name, len(data)) from error
        finally:
            if fd >= 0:
                os.close(fd)

    @contextmanager
    def _folder(self, name: str) -> Iterator[int]:
        """The descriptor of a folder."""
        with self._place(f"{name}/.") as (fd, _):
            yield fd

    @contextmanager
    def _place(self, name: str, *, make_after: int | None = None) -> Iterator[tuple[int, str]]:
        """The descriptor of the folder that a name lies in, and the last part of the name."""
        *folders, last = name.split("/")
        if "" in folders or ".." in (*folders, last):
            raise foreign(self.path / name)
        fd, opened = self.fd, -1
        try:
            for number, folder in enumerate(folders):
                above = "/".join(folders[:number])
                if make_after is not None and number >= make_after:
                    _make(folder, fd)
                following = _open_folder(folder, fd, self.path / above / folder)
                if opened >= 0:
                    os.close(opened)
                fd = opened = following
            yield fd, last
        except OSError as error:
            if error.errno != errno.ESTALE:  # NFS: another host has removed the folder
                raise
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.path / name)) from error
        finally:
            if opened >= 0:
                os.close(opened)


def own_name(name: str) -> str:
    """A name that no other process uses, also on no other host, for the file `name` as it grows."""
    short = escaped(name).encode(errors="surrogateescape")[:_NAME_BYTES].decode(errors="ignore")
    pid = os.getpid()
    return f"{GROWING}/{short}.{_host()}.{pid}.{start_time(pid)}.{secrets.token_hex(4)}"


def is_of_dead(own: str) -> bool:
    """Whether a name in `partial/` is that of a process of this host that is gone."""
    *_, host, pid, started, _ = ["", "", "", *own.rsplit(".", 4)]
    return host == _host() and pid.isdecimal() and started != start_time(pid)


def _host() -> str:
    """The name of this host, short, with the hash of all that distinguishes it from others."""
    name = socket.gethostname()
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    except OSError:
        boot = b""
    return f"{name.replace('.', '_')[:20]}-{hashlib.sha256(os.fsencode(name) + boot).hexdigest()[:8]}"


def escaped(name: str) -> str:
    """A name with folders in it, also that of a piece ("NAME@BEGIN-END"), as the name of one file:
    no two names give the same, and something can be added to it, however long the name is.
    """
    head, at, place = name.rpartition("@")
    if not (at and all(number.isdecimal() for number in place.split("-"))):
        head, at, place = name, "", ""
    escaped_head = head.replace("%", "%25").replace("/", "%2F")
    raw = os.fsencode(escaped_head)
    if len(raw) > _ESCAPED_BYTES:
        digest = hashlib.sha256(os.fsencode(head)).hexdigest()[:32]
        escaped_head = f"{raw[: _ESCAPED_BYTES - 34].decode(errors='ignore')}%%{digest}"
    return escaped_head + at + place


def _remove_if_empty(name: str, fd: int) -> bool:
    try:
        os.rmdir(name, dir_fd=fd)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            return False
        raise
    return True


def _make(folder: str, fd: int) -> None:
    try:
        os.mkdir(folder, dir_fd=fd)
    except FileExistsError:
        return
    fsync_file(fd)


def _open_folder(name: str, fd: int, path: Path) -> int:
    """Open a folder and no link."""
    try:
        return os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=fd)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise foreign(path) from error
        raise


def _remove_tree(fd: int, name: str) -> None:
    """Remove the folder `name` of the folder `fd`; links in it are removed, not followed. (That of
    shutil asks whether os.stat is the one that it knows.) Once more when another process has made a
    file in a part of it that was empty a moment ago.
    """
    for tries_left in reversed(range(_REMOVALS)):
        try:
            return _remove_tree_once(fd, name)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not tries_left:
                raise


def _remove_tree_once(fd: int, name: str) -> None:
    for _, folders, files, inside in os.fwalk(name, topdown=False, dir_fd=fd, onerror=unless_gone):
        for each in files:
            with suppress(FileNotFoundError):  # another process removes it too
                os.unlink(each, dir_fd=inside)
        for each in folders:
            with suppress(FileNotFoundError):
                try:
                    os.rmdir(each, dir_fd=inside)
                except NotADirectoryError:
                    os.unlink(each, dir_fd=inside)  # a link to a folder
    os.rmdir(name, dir_fd=fd)


def is_held_by_nfs(name: str) -> bool:
    """Whether a name is that of a removed file which a process of this host still has open."""
    return name.rpartition("/")[2].startswith(".nfs")
