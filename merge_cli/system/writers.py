"""The processes of this host that may write to files: they hold one open for writing, or mapped.

Stores through a mapping change neither size nor modification time, so that nothing else shows them.
As far as /proc can be read: the processes of this user (all of them for root), by the names that
files have in it. Other hosts are not looked at.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_PROC = "/proc"
_SHARED_FOR_WRITING = re.compile(rb"^\S+ .w.s \S+ \S+ \S+ +(.+)$", re.MULTILINE)
"""A line of /proc/PID/maps: address, permissions, offset, device, inode, path."""


class OpenForWriting(NamedTuple):
    """A process that may write to `path`."""

    path: str
    pid: int
    command: str
    is_mapped: bool


def find_writer(paths: Collection[str]) -> OpenForWriting | None:
    """The first process but this one that may write to one of `paths`, which are absolute and free
    of links; None if there is none, or none can be seen.
    """
    wanted = frozenset(paths)
    with suppress(OSError):
        for pid in sorted(int(name) for name in os.listdir(_PROC) if name.isdecimal()):  # noqa: PTH208  # names alone
            if pid != os.getpid():
                for path, is_mapped in _held_by(pid, wanted):
                    return OpenForWriting(path, pid, _command(pid), is_mapped)
    return None


def _held_by(pid: int, wanted: frozenset[str]) -> Iterator[tuple[str, bool]]:
    """The files in `wanted` that a process may write to, and whether by a mapping."""
    folder = f"{_PROC}/{pid}"
    with suppress(OSError):  # not ours, or gone
        for name in os.listdir(f"{folder}/fd"):  # noqa: PTH208
            with suppress(OSError):
                path = os.readlink(f"{folder}/fd/{name}")  # noqa: PTH115  # its text alone: a stat may hang
                if path in wanted and _is_for_writing(Path(f"{folder}/fdinfo/{name}")):
                    yield path, False
    with suppress(OSError):
        for line in _SHARED_FOR_WRITING.finditer(Path(f"{folder}/maps").read_bytes()):
            if (path := os.fsdecode(line[1])) in wanted:
                yield path, True


def _is_for_writing(about: Path) -> bool:
    flags = next((line.split()[1] for line in about.read_text().splitlines() if line.startswith("flags:")), "0")
    return int(flags, 8) & os.O_ACCMODE != os.O_RDONLY


def _command(pid: int) -> str:
    try:
        words = Path(f"{_PROC}/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").split()
        return " ".join(words)[:200]
    except OSError:
        return ""
