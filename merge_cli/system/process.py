"""The identity of a process: enough to name it to a person, and to know on the same machine whether
it still lives.
"""

from __future__ import annotations

import os
import shlex
import socket
import sys
import time
from pathlib import Path
from typing import Any


def identity() -> dict[str, Any]:
    """Host, process id and start of this process, by which another one can name it and see whether
    it still lives.
    """
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": shlex.join(sys.argv),
        "boot": _text("/proc/sys/kernel/random/boot_id"),
        "namespace": _link("/proc/self/ns/pid"),
        "started": start_time(os.getpid()),
    }


def is_dead(holder: dict[str, Any]) -> bool:
    """Whether the process of this `identity` is known to be gone; False where that cannot be known
    from here.
    """
    if not holder or holder.get("host") != socket.gethostname():
        return False
    if holder.get("boot") != _text("/proc/sys/kernel/random/boot_id"):
        return bool(holder.get("boot"))
    if holder.get("namespace") != _link("/proc/self/ns/pid"):
        return False
    return holder.get("started") != start_time(holder.get("pid"))


def process_start() -> float:
    """When this process was started, in seconds since the epoch."""
    ticks = int(start_time(os.getpid()) or 0)
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))


def start_time(pid: object) -> str:
    """The start time of a process in clock ticks since boot, "" where there is no such process."""
    fields = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 else ""


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
