"""Wait until files have not changed for a while: for writers on other hosts, which no /proc shows."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

_LONGEST_LOOK_S = 5.0


def wait_until_still(paths: Sequence[str], seconds: float) -> float:
    """Wait until no file at or below `paths` has changed for `seconds`; the seconds waited.

    A change is another size, modification or inode time, or name. The first look counts by those
    times if they are in the past; from then on this host's clock counts. Without end while a writer
    is at work. Raises OSError where a file cannot be looked at.
    """
    began = time.monotonic()
    if seconds <= 0:
        return 0.0
    state = _state(paths)
    newest = max((each[2] for each in state), default=0) / 1e9
    changed = began - max(0.0, time.time() - newest)
    while (left := changed + seconds - time.monotonic()) > 0:
        time.sleep(min(left, _LONGEST_LOOK_S))
        if (now := _state(paths)) != state:
            state, changed = now, time.monotonic()
    return time.monotonic() - began


def _state(paths: Sequence[str]) -> list[tuple[str, int, int]]:
    """Each file with its size and the later of its times, in ns."""
    found = []
    for path in paths:
        names = [path] if Path(path).is_file() else sorted(str(each) for each in Path(path).rglob("*"))
        for name in names:
            try:
                status = os.stat(name)  # noqa: PTH116
            except FileNotFoundError:
                continue  # a link to nowhere, or removed meanwhile: another state next time
            found.append((name, status.st_size, _changed_ns(status)))
    return found


def _changed_ns(status: os.stat_result) -> int:
    """`cp -p` and `rsync -t` set only the first of the two back."""
    return max(status.st_mtime_ns, status.st_ctime_ns)
