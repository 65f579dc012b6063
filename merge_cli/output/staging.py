"""A destination is either absent or complete.

Everything is first written to `OUT.pmerge-partial/` beside the destination, on the same filesystem:

    state.json      what is being made: the plan's fingerprint, the inputs' fingerprints, the command
    lock            held (flock) by the run that works on it
    done/           one record per finished file: its size and sha256
    checkpoint/     the result as it grows: shards, then side files and pmerge.json, the index last

`publish` makes `checkpoint/` durable and renames it to the destination in one step. A run that dies leaves the staging folder;
the same command continues with the files that are not done. Another request for the same destination starts afresh.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merge_cli.engine.writer import fsync_folder, write_all
from merge_cli.errors import OutputError, UsageError
from merge_cli.plan import MergePlan, OutputFile

SUFFIX = ".pmerge-partial"
_OLD = ".pmerge-old"


@dataclass(frozen=True)
class Done:
    """A finished file: its size in bytes, its sha256, and how many elements were NaN or Inf, by tensor."""

    file_bytes: int
    sha256: str
    nonfinite: Mapping[str, int] = field(default_factory=dict)


class Staging:
    """The staging folder of one destination, locked while the context is open."""

    def __init__(self, destination: Path) -> None:
        self.destination = destination
        self.folder = destination.with_name(destination.name + SUFFIX)
        self.checkpoint = self.folder / "checkpoint"
        self._done = self.folder / "done"
        self._lock_fd = -1

    def __enter__(self) -> Staging:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock_fd = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise OutputError(f"cannot create {self.folder}: {error.strerror}", hint="choose another place:  -o PATH") from error
        self._take_lock()
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._lock_fd)

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                return  # a filesystem without locks: two runs at once are then up to the user
            holder = os.pread(self._lock_fd, 200, 0).decode(errors="replace").strip()
            os.close(self._lock_fd)
            raise OutputError(
                f"another run is writing {self.destination}",
                details=[f"held by  {holder or 'an unknown process'}"],
                hint="wait for it, stop it, or write somewhere else:  -o PATH",
            ) from error
        os.ftruncate(self._lock_fd, 0)
        os.pwrite(self._lock_fd, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def prepare(self, state: Mapping[str, Any]) -> dict[str, Done]:
        """Get ready to write what `state` describes; the files that an earlier run of the same finished, by name."""
        state_file = self.folder / "state.json"
        try:
            same = json.loads(state_file.read_text()) == json.loads(json.dumps(state))
        except (OSError, ValueError):
            same = False
        if not same:
            for part in (self._done, self.checkpoint):
                shutil.rmtree(part, ignore_errors=True)
        try:
            self._done.mkdir(exist_ok=True)
            self.checkpoint.mkdir(exist_ok=True)
            write_file(state_file, json.dumps(state, indent=2).encode())
        except OSError as error:
            raise OutputError(f"cannot write in {self.folder}: {error.strerror}") from error
        return self._finished_files()

    def _finished_files(self) -> dict[str, Done]:
        found = {}
        for record in sorted(self._done.iterdir()):
            try:
                entry = json.loads(record.read_text())
                done = Done(entry["file_bytes"], entry["sha256"], dict(entry["nonfinite"]))
                if (self.checkpoint / entry["name"]).stat().st_size == done.file_bytes:
                    found[str(entry["name"])] = done
            except (OSError, ValueError, KeyError, TypeError):
                continue  # a torn record: that file is written again
        return found

    def record(self, file: OutputFile, sha256: str, nonfinite: Mapping[str, int]) -> None:
        """Note that `file` stands complete and durable in the staging folder."""
        entry = {"name": file.name, "file_bytes": file.file_bytes, "sha256": sha256, "nonfinite": dict(nonfinite)}
        write_file(self._done / f"{file.name.replace('/', '%2F')}.json", json.dumps(entry).encode())

    def publish(self, overwrite: bool) -> None:
        """Make the checkpoint durable and give it its final name; with `overwrite` an older one is replaced only now."""
        old = self.destination.with_name(self.destination.name + _OLD)
        try:
            fsync_folder(self.checkpoint)
            if overwrite and self.destination.exists():
                if old.exists():
                    shutil.rmtree(old)
                self.destination.rename(old)
            elif self.destination.exists():
                raise already_there(self.destination)
            self.checkpoint.rename(self.destination)
            fsync_folder(self.destination.parent)
        except OSError as error:
            raise OutputError(f"cannot publish {self.destination}: {error.strerror}") from error
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def write_file(path: Path, data: bytes) -> None:
    """Write a small file so that it is there whole and durable, or not at all; its mode follows the umask."""
    partial = path.with_name(path.name + ".partial")
    fd = -1
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        write_all(fd, memoryview(data), 0, partial)
        os.fsync(fd)
        partial.rename(path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error
    finally:
        if fd >= 0:
            os.close(fd)


def already_there(destination: Path) -> OutputError:
    return OutputError(
        f"{destination} exists already",
        hint="choose another place with -o PATH, or replace it with --overwrite",
    )


def check_destination(destination: Path, plan: MergePlan, overwrite: bool) -> list[UsageError | OutputError]:
    """What would stop the run at its destination, found before any weight is read."""
    problems: list[UsageError | OutputError] = []
    real = destination.resolve()
    for checkpoint in plan.inputs:
        source = checkpoint.path.resolve()
        if real == source or real.is_relative_to(source) or (checkpoint.root and source.is_relative_to(real)):
            problems.append(
                UsageError(
                    f"the output {destination} is or contains the input {checkpoint.path}, or lies in it",
                    hint="inputs are never written to; choose another place:  -o PATH",
                )
            )
            break
    if destination.is_symlink() or destination.exists():
        if not overwrite:
            problems.append(already_there(destination))
        elif destination.is_symlink() or not _is_merged(destination):
            problems.append(
                OutputError(
                    f"--overwrite replaces results of pmerge only, and {destination} has no pmerge.json",
                    hint="remove it yourself, or choose another place:  -o PATH",
                )
            )
    parent = real.parent
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK | os.X_OK):
        problems.append(OutputError(f"no permission to write in {parent}", hint="choose another place:  -o PATH"))
    problems += _check_space(destination, parent, plan.bytes_to_write)
    return problems


def _check_space(destination: Path, parent: Path, need: int) -> Sequence[OutputError]:
    status = os.statvfs(parent)
    free = status.f_bavail * status.f_frsize
    staged = destination.with_name(destination.name + SUFFIX) / "checkpoint"
    if staged.is_dir():
        free += sum(f.stat().st_blocks * 512 for f in staged.rglob("*") if f.is_file())
    if free >= need:
        return []
    return [
        OutputError(
            f"not enough space for {destination}",
            details=[f"need  {need} bytes", f"have  {free} bytes free in {parent}"],
            hint="make room, or write to another filesystem:  -o PATH",
        )
    ]


def _is_merged(folder: Path) -> bool:
    return (folder / "pmerge.json").is_file()
