"""One run at a time on a destination, also when the one before was killed.

The lock is flock(2) on a file in the staging folder: the kernel gives it back when its holder dies.
The file says who holds it, for the person who is refused. Where a filesystem has no flock, a file
that only one run can create stands for it; what a dead run of this machine left is taken over, a
run on another machine cannot be looked at, so its file has to be removed by hand.
"""

from __future__ import annotations

import _thread
import errno
import fcntl
import json
import os
import secrets
import shlex
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from merge_cli.errors import OutputError
from merge_cli.output.trust import PROBE, check_made_by_us
from merge_cli.system.durable import NOT_SUPPORTED, close_after_error, make_folder, open_own, output_error, rename_in_one_step
from merge_cli.system.files import read_json
from merge_cli.system.held import HeldFolder
from merge_cli.system.process import identity, is_dead

_NO_FLOCK = (*NOT_SUPPORTED, errno.ENOLCK)
_LOOK_EVERY_S = 0.5
_SILENT_S = 5.0
_BEAT_EVERY_S = 10.0
_STALE_TRIES = 100


class HeldError(OutputError):
    """Another run has the lock."""


class Lock:
    """The lock of `destination`: `path` in its staging folder, which is made when it is missing.

    Processes that write one result together hold it `shared`: they keep out those who do not belong
    to them. Where a filesystem has no flock, that cannot be kept up, and a shared lock only looks
    whether somebody has it for himself. With `wait_s` it is waited for as long as another process
    has it that gives a sign of life within this time: a new holder does, and one whose lock has
    `beats` touches the file every ten seconds, however long its work takes. `on_wait` is called
    once after five seconds, with the error that it will be. `owners` are the uids of other users
    who may own the folder.
    """

    def __init__(
        self,
        path: Path,
        destination: Path,
        *,
        shared: bool = False,
        wait_s: float = 0.0,
        beats: bool = False,
        on_wait: Callable[[OutputError], None] | None = None,
        owners: Collection[int] = (),
    ) -> None:
        self.path = path
        self._owner = path.with_name(path.name + ".owner")
        self._destination = destination
        self._shared = shared
        self._wait_s = wait_s
        self._heartbeat = _Heartbeat() if beats else None
        self._on_wait = on_wait
        self._owners = owners
        self._fd = -1
        self._locked = False
        self._owns_file = False

    def __enter__(self) -> Lock:
        self.acquire()
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the lock. Raises OutputError, naming the holder, where another run has it."""
        began, pause_s, on_wait = time.monotonic(), 0.01, self._on_wait
        alive_at, seen = began, self._signs_of_life()
        for attempt in count():
            try:
                if self._try(may_be_stale=attempt < _STALE_TRIES):
                    return  # else a run that finished removed the folder between our opening the file and locking it
            except HeldError as error:
                now = time.monotonic()
                if (found := self._signs_of_life()) != seen:
                    alive_at, seen = now, found
                if now - alive_at >= self._wait_s:
                    raise
                if on_wait is not None and now - began >= _SILENT_S:
                    on_wait(error)
                    on_wait = None
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _LOOK_EVERY_S)

    @property
    def is_held(self) -> bool:
        """Whether this process has the lock."""
        return self._fd >= 0

    @property
    def has_flock(self) -> bool:
        """Whether the lock that is held is one of the kernel, which ends with its holder."""
        return self._locked

    @property
    def is_current(self) -> bool:
        """Whether the file that is locked is still the one that has the name."""
        return self._is_still_there(self._fd)

    def is_in(self, folder: HeldFolder) -> bool:
        """Whether the file that is locked is the one in this folder. Raises OSError."""
        return os.path.samestat(os.fstat(self._fd), folder.stat(self.path.name))

    def is_alone(self) -> bool:
        """Whether this process is the only holder. Upgrades to exclusive for a moment, in which
        another `acquire` may fail.
        """
        try:
            return flock(self._fd, shared=False)
        except BlockingIOError:
            return False
        finally:  # a refused upgrade has given the shared lock up, and a single run may have come in between
            try:
                flock(self._fd, shared=True)
            except BlockingIOError as error:
                raise self._held(read_json(self.path), "wait for it, stop it, or write somewhere else:  -o PATH") from error

    def _signs_of_life(self) -> tuple[int, int]:
        """Another value whenever the lock has a new holder, or its holder has touched the file.
        Times are compared with each other, and with no clock.
        """
        try:
            status = self.path.stat()
        except OSError:
            return 0, 0
        return status.st_ino, status.st_mtime_ns

    def release(self) -> None:
        """Give the lock back; what its files said about the holder goes first."""
        if self._fd >= 0:
            if self._heartbeat is not None:
                self._heartbeat.stop()
            if not self._shared:
                with suppress(OSError):
                    os.ftruncate(self._fd, 0)
            if self._owns_file:
                self._owner.unlink(missing_ok=True)
            fd, self._fd = self._fd, -1
            close_after_error(fd)

    def remove_files(self) -> None:
        """Remove the lock's files while it is held: the next run makes its own. Raises OSError."""
        self.path.unlink()
        if self._owns_file:
            self._owner.unlink()
            self._owns_file = False

    def _try(self, *, may_be_stale: bool) -> bool:
        """Whether the lock is held now; False for once more, as its folder was removed meanwhile,
        which an NFS client sees as a stale handle if another host did it.
        """
        try:
            make_folder(self.path.parent)
            check_made_by_us(self.path.parent, thoroughly=False, owners=self._owners)
            fd = open_own(self.path, os.O_RDWR | os.O_CREAT)
        except FileNotFoundError:
            return False
        except OSError as error:
            if error.errno == errno.ESTALE and may_be_stale:
                time.sleep(0.01)
                return False
            raise output_error(error, f"cannot create {self.path.parent}", self.path) from error
        try:
            self._locked = self._flock(fd)
            if self._locked:
                if not self._is_still_there(fd):
                    return False
                if self._owner.exists():  # a run that could not flock, where we can
                    self._check_dead(self._owner)
                    self._owner.unlink()
            elif self._shared:
                if self._owner.exists():
                    self._check_dead(self._owner)
            else:
                self._take_file(fd)
            record = json.dumps(identity()).encode()
            os.ftruncate(fd, 0)
            os.pwrite(fd, record, 0)
            self._fd, fd = fd, -1
            if self._heartbeat is not None:
                self._heartbeat.start(self._fd)
            return True
        except OSError as error:
            raise output_error(error, f"cannot lock {self.path}", self.path) from error
        finally:
            if fd >= 0:
                os.close(fd)

    def _flock(self, fd: int) -> bool:
        """True: locked. False: this filesystem has no locks. Raises HeldError where another run has
        it.
        """
        try:
            return flock(fd, shared=self._shared)
        except BlockingIOError as error:
            raise self._held(read_json(self.path), "wait for it, stop it, or write somewhere else:  -o PATH") from error

    def _is_still_there(self, fd: int) -> bool:
        try:
            mine, there = os.fstat(fd), self.path.stat()
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                raise
            return False
        return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)

    def _take_file(self, fd: int) -> None:
        """Without flock: create the owner file, or take over that of a dead run of this machine."""
        holder = read_json(self.path)
        if holder and not is_dead(holder):  # a run that could flock, where we cannot
            raise self._held(holder, f"if that run is no more:  rm {shlex.quote(str(self.path))}")
        if not _create(self._owner):
            self._take_over()
        self._owns_file = True

    def _take_over(self) -> None:
        """Replace the owner file of a dead run; only one run at a time may do that."""
        self._check_dead(self._owner)
        takeover = self.path.with_name(self.path.name + ".takeover")
        if not _create(takeover):
            raise self._held(read_json(takeover), f"if that run is no more:  rm {shlex.quote(str(takeover))}")
        try:
            self._check_dead(self._owner)
            self._owner.unlink()
            if not _create(self._owner):
                raise self._held(read_json(self._owner), "wait for it, stop it, or write somewhere else:  -o PATH")
        finally:
            takeover.unlink()

    def _check_dead(self, path: Path) -> None:
        holder = read_json(path)
        if not is_dead(holder):
            raise self._held(holder, f"if that run is no more:  rm {shlex.quote(str(path))}")

    def _held(self, holder: dict[str, Any], hint: str) -> HeldError:
        lines = [f"{name:8}  {holder[name]}" for name in ("host", "pid", "since", "command") if name in holder]
        return HeldError(
            f"another run is writing {self._destination}",
            details=lines or ["held by   a run that did not write down who it is"],
            hint=hint,
        )


class _Heartbeat:
    """A thread that touches an open file now and then. Where no thread can be started there is no
    heartbeat.
    """

    def __init__(self) -> None:
        self._over = threading.Event()
        self._touching = threading.Lock()

    def start(self, fd: int) -> None:
        """Begin to touch the file, which stays open until `stop`."""
        self._over = threading.Event()
        with suppress(RuntimeError):
            _thread.start_new_thread(self._beat, (fd, self._over))

    def stop(self) -> None:
        """Touch the file no more."""
        self._over.set()
        with self._touching:
            pass

    def _beat(self, fd: int, over: threading.Event) -> None:
        while not over.wait(_BEAT_EVERY_S):
            with self._touching, suppress(OSError):
                if not over.is_set():
                    os.utime(fd)


def flock(fd: int, *, shared: bool = False) -> bool:
    """Lock an open file without waiting; False where the filesystem has no locks.

    Raises BlockingIOError where another process has it, and other OSErrors.
    """
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_FLOCK:
            return False
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise BlockingIOError(error.errno, error.strerror) from error
        raise
    return True


def _create(path: Path) -> bool:
    """Make a file with the identity of this process; False if it is there. Where the filesystem can
    rename without replacing, the file has its name only with its content, whenever the process is
    killed.
    """
    new = path.with_name(f"{PROBE}{secrets.token_hex(8)}")
    if not _write_new(new):
        return False
    try:
        rename_in_one_step(new, path)
    except FileExistsError:
        new.unlink()
        return False
    except OSError as error:
        new.unlink()
        if error.errno not in NOT_SUPPORTED:
            raise
        return _write_new(path)
    return True


def _write_new(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except FileExistsError:
        return False
    try:
        os.write(fd, json.dumps(identity()).encode())
    finally:
        os.close(fd)
    return True
