"""Run a command to its end and say what it took: wall time, CPU time, memory.

Times and `ru_maxrss` come from `os.wait4`, so they cost nothing while the command runs. They have
limits worth knowing: CPU time covers the child and the descendants that it waited for, and
`ru_maxrss` is that of the LARGEST process, not of all together; it also counts the pages of mapped
files. So one round, the warm-up, can be watched as well: a thread then reads /proc every few
milliseconds and keeps the highest sum over all processes. Pages that processes share are counted
once (PSS); `private` leaves out what is mapped from files and shared memory.

The kernel carries the peak of a parent over to the child that it starts. Keep the process that
measures small: no torch here.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

WATCH_EVERY_S = 0.02


@dataclass(frozen=True)
class Measured:
    wall_s: float
    cpu_s: float
    largest_process_bytes: int
    stdout: str
    together_bytes: int = 0  # zero unless watched
    private_bytes: int = 0


class CommandFailed(Exception):
    """The command ended with a status other than 0; the text ends with what it wrote to stderr."""


def measure(command: list[str], environment: dict[str, str] | None = None, watch: bool = False) -> Measured:
    """Run `command`, with `environment` added to ours. Raises CommandFailed."""
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        started = time.perf_counter()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env=os.environ | (environment or {}),
            process_group=0,  # so that an interrupted benchmark can end its workers too
        )
        watcher = Watcher(process.pid) if watch else None
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        wall_s = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        together, private = watcher.stop() if watcher else (0, 0)
        stdout.seek(0)
        stderr.seek(0)
        if process.returncode:
            tail = stderr.read().decode(errors="replace").strip()[-2000:]
            raise CommandFailed(f"exit status {process.returncode}: {' '.join(command)[:500]}\n{tail}")
        return Measured(
            wall_s=wall_s,
            cpu_s=usage.ru_utime + usage.ru_stime,
            largest_process_bytes=usage.ru_maxrss * 1024,
            stdout=stdout.read().decode(errors="replace"),
            together_bytes=together,
            private_bytes=private,
        )


class Watcher:
    """A thread that keeps the highest memory of a process and all its descendants."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.together = self.private = 0
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    def stop(self) -> tuple[int, int]:
        self.ended.set()
        self.thread.join()
        return self.together, self.private

    def watch(self) -> None:
        while not self.ended.wait(WATCH_EVERY_S):
            sizes = [memory(pid) for pid in family(self.pid)]
            self.together = max(self.together, sum(size for size, _ in sizes))
            self.private = max(self.private, sum(size for _, size in sizes))


def family(pid: int) -> list[int]:
    """`pid` and all its living descendants."""
    children: list[int] = []
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            children += [int(child) for child in (task / "children").read_text().split()]
    except OSError:  # it has just ended
        return []
    return [pid, *(member for child in children for member in family(child))]


def memory(pid: int) -> tuple[int, int]:
    """Resident bytes of one process: its share of all its pages, and of those that come from no
    file.
    """
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0, 0
    sizes = {}
    for line in text.splitlines()[1:]:
        key, kilobytes, *_ = line.split()
        sizes[key] = int(kilobytes) * 1024
    return sizes.get("Pss:", 0), sizes.get("Pss_Anon:", 0)
