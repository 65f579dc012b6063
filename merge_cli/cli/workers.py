"""Several processes that make one result: started here by `--workers`, or by a launcher. Which of
them prints, and which runs what.

With `--workers` this process is rank 0, starts the others with the same command, and shows the
progress of all.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import typer

from merge_cli.cli import console
from merge_cli.errors import PmergeError, UsageError
from merge_cli.ranks.launcher import ARRAY, WORKER, Rank, find_rank
from merge_cli.request.spec import Processes

T = TypeVar("T")
_VARIABLES = ("PMERGE_WORKER", "PMERGE_WORKERS", "PMERGE_WORKER_OF")


def this_process(processes: Processes) -> Rank:
    """The rank of this process, as its options or its launcher give it. Raises UsageError."""
    me = find_rank(os.environ, processes.rank, processes.world_size)
    count = count_workers(processes.workers, me)
    if me.source == WORKER:
        end_with_parent()
    return Rank(0, count, 0, count, WORKER) if me.source != WORKER and count > 1 else me


def prefix_lines_of(me: Rank, quiet: bool) -> bool:
    """Name this process in its lines; whether it is to be quiet: one rank talks for all, each task
    of an array has its own log.
    """
    if not me.rank or me.source == ARRAY:
        return quiet
    console.prefix_lines(f"worker {me.rank}: " if me.source == WORKER else f"{me}: ")
    return True


@contextmanager
def errors_reported_once(me: Rank) -> Iterator[None]:
    """While planning: every worker meets the same error, and the first one reports it."""
    try:
        yield
    except PmergeError as error:
        if me.source == WORKER and me.rank:
            raise typer.Exit(error.exit_code) from error
        raise


def run_with(others: Workers, run: Callable[[bool], T]) -> tuple[T, bool]:
    """The outcome of `run(False)`; of `run(True)`, which does the work of workers that died, if
    there are any, and True.
    """
    result = run(False)
    failed = others.wait()  # their claims are free again
    if not failed:
        return result, False
    result = run(True)
    for line in failed:
        console.err(f"warning: {line}; this one did its work")
    return result, True


def is_to_print(me: Rank, path: Path, has_published: bool, already_published: bool) -> bool:
    """Whether the path of an output belongs on this process's stdout: on that of one rank, so that
    a script reads one line.

    It is the rank that published; for a result from before this launch it is rank 0, or each task
    of an array.
    """
    from merge_cli.output.existing import is_published_since_start

    if me.is_alone or has_published:
        return True
    return already_published and (me.rank == 0 or me.source == ARRAY) and not is_published_since_start(path)


def count_workers(workers: int | str, rank: Rank) -> int:
    """The number of processes that `--workers` asks for. Raises UsageError.

    "auto" is one with the native kernel, whose threads keep all cores busy, and with torch one for
    as many cores as its threads do.
    """
    if workers == "auto":
        from merge_cli.engine.budget import PYTHON_THREADS
        from merge_cli.engine.kernels.native import load

        return max(1, len(os.sched_getaffinity(0)) // PYTHON_THREADS) if rank.is_alone and load() is None else 1
    count = int(workers)
    if count > 1 and not rank.is_alone and rank.source != WORKER:
        raise UsageError(
            f"--workers is for a run without a launcher, and this is {rank} (from {rank.source})",
            hint="start more ranks with the launcher instead, and leave --workers out",
        )
    return count


class Workers:
    """The other processes, ranks 1 to `count` - 1. They print their own errors. None outlives the
    context.
    """

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
    """In a worker: die with the process that started it, so that a killed run ends as a whole."""
    parent = os.environ.get(_VARIABLES[2])
    if parent is None:
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != int(parent):
        os._exit(1)
