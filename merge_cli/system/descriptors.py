"""The limit on how many files a process may hold open: `ulimit -n`."""

from __future__ import annotations

import resource
from contextlib import suppress
from pathlib import Path

_ENOUGH = 1 << 20  # no process may have more, unless fs.nr_open was raised


def allow_open_files() -> None:
    """Raise the limit to the hard one. A sweep holds three files open for each result, and many
    shells start with 1024.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _ENOUGH if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH)
    if soft < most:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def descriptors_left() -> int:
    """How many more files this process may open, by /proc; without it, half of the limit."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        return max(0, limit - sum(1 for _ in Path("/proc/self/fd").iterdir()))
    except FileNotFoundError:
        return limit // 2


def open_files_hint(least: int = 0) -> str:
    """The command that allows more open files than this process may have, and no fewer than
    `least`.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    more = max(1024, 4 * soft, 2 * least)
    by = "" if hard == resource.RLIM_INFINITY or more <= hard else " (of root, or of the administrator: the hard limit is lower)"
    return f"ulimit -n {more}{by}, then the same command again"
