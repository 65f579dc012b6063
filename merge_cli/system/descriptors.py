"""The limit on how many files a process may hold open: `ulimit -n`."""

from __future__ import annotations

import resource
from contextlib import suppress

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


def open_files_hint() -> str:
    """The command that allows more open files than this process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    more = max(1024, 4 * soft)
    by = "" if hard == resource.RLIM_INFINITY or more <= hard else " (of root, or of the administrator: the hard limit is lower)"
    return f"ulimit -n {more}{by}, then the same command again"
