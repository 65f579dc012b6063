"""One run at a time on a destination, also when the one before was killed.

The lock is flock(2) on a file in the staging folder: the kernel gives it back when its holder dies. The file says who holds it, for
the person who is refused. Where a filesystem has no flock, a file that only one run can create stands for it; what a dead run of
this machine left is taken over, a run on another machine cannot be looked at, so its file has to be removed by hand.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from merge_cli.engine.durable import NOT_SUPPORTED, make_folder, output_error
from merge_cli.errors import OutputError

_NO_FLOCK = (*NOT_SUPPORTED, errno.ENOLCK)


class Lock:
    """The exclusive lock of `destination`: `path` in its staging folder, which is made when it is missing."""

    def __init__(self, path: Path, destination: Path) -> None:
        self.path = path
        self._owner = path.with_name("lock.owner")
        self._destination = destination
        self._fd = -1
        self._owns_file = False

    def acquire(self) -> None:
        """Take the lock. Raises OutputError, naming the holder, where another run has it."""
        while not self._try():
            pass  # a run that finished removed the folder between our opening the file and locking it

    def release(self) -> None:
        """Give the lock back; what its files said about the holder goes first."""
        if self._fd >= 0:
            with suppress(OSError):
                os.ftruncate(self._fd, 0)
            if self._owns_file:
                self._owner.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1

    def remove_files(self) -> None:
        """Remove the lock's files while it is held: the next run makes its own. Raises OSError."""
        self.path.unlink()
        if self._owns_file:
            self._owner.unlink()
            self._owns_file = False

    def _try(self) -> bool:
        try:
            make_folder(self.path.parent)
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise output_error(error, f"cannot create {self.path.parent}", self.path) from error
        try:
            if self._flock(fd):
                if not self._is_still_there(fd):
                    return False
                if self._owner.exists():  # a run that could not flock, where we can
                    self._check_dead(self._owner)
                    self._owner.unlink()
            else:
                self._take_file(fd)
            record = json.dumps(identity()).encode()
            os.ftruncate(fd, 0)
            os.pwrite(fd, record, 0)
            self._fd, fd = fd, -1
            return True
        except OSError as error:
            raise output_error(error, f"cannot lock {self.path}", self.path) from error
        finally:
            if fd >= 0:
                os.close(fd)

    def _flock(self, fd: int) -> bool:
        """True: locked. False: this filesystem has no locks. Raises OutputError where another run has it."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_FLOCK:
                return False
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise self._held(_read(self.path), "wait for it, stop it, or write somewhere else:  -o PATH") from error
        return True

    def _is_still_there(self, fd: int) -> bool:
        try:
            mine, there = os.fstat(fd), self.path.stat()
        except FileNotFoundError:
            return False
        return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)

    def _take_file(self, fd: int) -> None:
        """Without flock: create the owner file, or take over that of a dead run of this machine."""
        holder = _read(self.path)
        if holder and not is_dead(holder):  # a run that could flock, where we cannot
            raise self._held(holder, f"if that run is no more:  rm {shlex.quote(str(self.path))}")
        if not _create(self._owner):
            self._take_over()
        self._owns_file = True

    def _take_over(self) -> None:
        """Replace the owner file of a dead run; only one run at a time may do that."""
        self._check_dead(self._owner)
        takeover = self._owner.with_name("lock.takeover")
        if not _create(takeover):
            raise self._held(_read(takeover), f"if that run is no more:  rm {shlex.quote(str(takeover))}")
        try:
            self._check_dead(self._owner)
            self._owner.unlink()
            if not _create(self._owner):
                raise self._held(_read(self._owner), "wait for it, stop it, or write somewhere else:  -o PATH")
        finally:
            takeover.unlink()

    def _check_dead(self, path: Path) -> None:
        holder = _read(path)
        if not is_dead(holder):
            raise self._held(holder, f"if that run is no more:  rm {shlex.quote(str(path))}")

    def _held(self, holder: dict[str, Any], hint: str) -> OutputError:
        lines = [f"{name:8}  {holder[name]}" for name in ("host", "pid", "since", "command") if name in holder]
        return OutputError(
            f"another run is writing {self._destination}",
            details=lines or ["held by   a run that did not write down who it is"],
            hint=hint,
        )


def identity() -> dict[str, Any]:
    """Who this process is, so that another one can say so, and can tell whether it still lives."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": shlex.join(sys.argv),
        "boot": _text("/proc/sys/kernel/random/boot_id"),
        "namespace": _link("/proc/self/ns/pid"),
        "started": _start_time(os.getpid()),
    }


def is_dead(holder: dict[str, Any]) -> bool:
    """Whether the process of this `identity` is known to be gone; False where that cannot be known from here."""
    if not holder or holder.get("host") != socket.gethostname():
        return False
    if holder.get("boot") != _text("/proc/sys/kernel/random/boot_id"):
        return bool(holder.get("boot"))
    if holder.get("namespace") != _link("/proc/self/ns/pid"):
        return False
    return holder.get("started") != _start_time(holder.get("pid"))


def _start_time(pid: object) -> str:
    """The start time of a process in clock ticks since boot, "" where there is no such process."""
    fields = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 else ""


def _create(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except FileExistsError:
        return False
    try:
        os.write(fd, json.dumps(identity()).encode())
    finally:
        os.close(fd)
    return True


def _read(path: Path) -> dict[str, Any]:
    try:
        holder = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _text(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return str(Path(path).readlink())
    except OSError:
        return ""
