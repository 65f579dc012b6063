"""The processes of this host that may write to files: they hold one open for writing, or mapped.

Stores through a mapping change neither size nor modification time, so that nothing else shows them.
As far as /proc can be read: the processes of this user (all of them for root), by the names that
files have in it. Other hosts are not looked at.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_PROC = Path("/proc")


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
    folder = _PROC / str(pid)
    with suppress(OSError):  # not ours, or gone
        for name in os.listdir(folder / "fd"):  # noqa: PTH208
            with suppress(OSError):
                path = os.readlink(folder / "fd" / name)  # noqa: PTH115  # its text alone: a stat may hang
                if path in wanted and _is_for_writing(folder / "fdinfo" / name):
                    yield path, False
    with suppress(OSError):
        for line in (folder / "maps").read_bytes().splitlines():
            fields = line.split(maxsplit=5)
            if (
                len(fields) == 6
                and fields[1][1:2] == b"w"
                and fields[1][3:4] == b"s"
                and (path := os.fsdecode(fields[5])) in wanted
            ):
                yield path, True


def _is_for_writing(about: Path) -> bool:
    flags = next((line.split()[1] for line in about.read_text().splitlines() if line.startswith("flags:")), "0")
    return int(flags, 8) & os.O_ACCMODE != os.O_RDONLY


def _command(pid: int) -> str:
    try:
        words = (_PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").split()
        return " ".join(words)[:200]
    except OSError:
        return ""
