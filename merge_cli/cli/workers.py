"""`--workers`: the same command in several processes on this machine. This one is rank 0, and shows the progress of all."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys

from merge_cli.errors import UsageError
from merge_cli.ranks.launcher import WORKER, Rank

THREADS_OF_ONE = 8
_VARIABLES = ("PMERGE_WORKER", "PMERGE_WORKERS", "PMERGE_WORKER_OF")


def count_workers(workers: int | str, rank: Rank) -> int:
    """The number of processes that `--workers` asks for. Raises UsageError.

    "auto" is one for every eight cores: up to there the threads of one process keep the cores as busy as processes
    do (see docs/benchmarks.md), and need no time to start.
    """
    if workers == "auto":
        return max(1, len(os.sched_getaffinity(0)) // THREADS_OF_ONE) if rank.is_alone else 1
    count = int(workers)
    if count > 1 and not rank.is_alone and rank.source != WORKER:
        raise UsageError(
            f"--workers is for a run without a launcher, and this is {rank} (from {rank.source})",
            hint="start more ranks with the launcher instead, and leave --workers out",
        )
    return count


class Workers:
    """The processes beside this one: ranks 1 to `count` - 1. They write their errors themselves. None outlives the context."""

    def __init__(self, count: int) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._count = count

    def __enter__(self) -> Workers:
        for number in range(1, self._count):
            values = dict(zip(_VARIABLES, (str(number), str(self._count), str(os.getpid())), strict=True))
            command = [sys.executable, "-m", "merge_cli", *sys.argv[1:]]
            self._processes.append(subprocess.Popen(command, env=os.environ | values, stdin=subprocess.DEVNULL))
        return self

    def __exit__(self, *exc: object) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.terminate()
        for process in self._processes:
            try:
                process.wait(timeout=3)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def wait(self) -> list[str]:
        """Wait until all have ended; a line for each that failed."""
        failed = [(number, code) for number, process in enumerate(self._processes, 1) if (code := process.wait())]
        return [f"worker {number} ended with exit code {code}" for number, code in failed]


def end_with_parent() -> None:
    """In a worker: be ended when the process that started it dies, so that a killed run has ended as a whole."""
    parent = os.environ.get(_VARIABLES[2])
    if parent is None:
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != int(parent):
        os._exit(1)
