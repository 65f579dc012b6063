"""The loop: chunks of the plan are read, reduced and written, within a fixed memory budget.

A few worker threads each take the next chunk, give it to a reducer and write the outcome at its
planned offset. Chunks are taken in file order, so every file is read sequentially; while one worker
waits for the disk another computes, which is all the overlap that is needed on the CPU. Kernels and
system calls release the interpreter lock. With an accelerator a worker goes on to read the next
chunk while the device is busy with the one before.

Memory: what the reducers of a worker state, times the workers, whatever the size of the model or of
one tensor (see `budget.py`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from merge_cli.engine.budget import Budget
from merge_cli.engine.chunk import Chunk, Reduced, Statistics
from merge_cli.engine.input_checks import check_equal_integers
from merge_cli.engine.reader import InputFiles
from merge_cli.engine.reads import Reads, StoppedError
from merge_cli.engine.schedule import Schedule, ScheduleError
from merge_cli.engine.sink import Sink
from merge_cli.engine.storage import is_larger_than_cache
from merge_cli.engine.workers import Reducers, make_reducers
from merge_cli.formats.quantization.error import combine_totals, relative_errors
from merge_cli.planning.plan import MergePlan, WorkItem


def stream(plan: MergePlan, work: Sequence[WorkItem], sink: Sink, budget: Budget) -> Statistics:
    """Make the work items of `plan` and give the results to `sink`. Only inputs that their outputs
    use are read.

    An error stops all workers; of several, the one that comes first in the plan is raised. Files
    that are not finished stay as they are. Raises NonFiniteError, MismatchError (integers that
    differ), ChangedError, OutputError, PmergeError.
    """
    with InputFiles(keep_cached=not is_larger_than_cache(plan), direct=budget.size.slack_bytes > 0) as inputs:
        check_equal_integers(plan, work, inputs)
        return _Workers(plan, work, sink, budget, inputs).run()


class _Workers:
    """The worker threads of a run and their common state."""

    def __init__(self, plan: MergePlan, work: Sequence[WorkItem], sink: Sink, budget: Budget, inputs: InputFiles) -> None:
        self._sink = sink
        self._stopped = threading.Event()
        self._reads = [Reads(inputs, self._stopped) for _ in range(budget.workers)]
        self._reducers, budget, notes = make_reducers(plan, work, budget, self._reads)
        self._schedule = Schedule(work, budget.size, sink)
        self._statistics = Statistics(notes=notes)
        self._errors: tuple[float, float, float, float] | None = None
        self._failed: tuple[tuple[int, int], BaseException] | None = None
        self._lock = threading.Lock()
        self._reporting = threading.Lock()
        self._finished = threading.Semaphore(0)

    def run(self) -> Statistics:
        threads = self._start(list(zip(self._reads, self._reducers, strict=False)))  # fewer reducers where memory was short
        try:
            for _ in threads:
                self._finished.acquire()
        except BaseException:
            self._stop()  # a signal: workers reach the end of their chunk
            raise
        finally:
            for thread in threads:
                thread.join()
            self._schedule.abandon()
        if self._failed is not None:
            raise self._failed[1]
        for reducers in self._reducers:
            self._statistics = self._statistics.plus(Statistics(notes=reducers.notes))
        if self._errors is not None:
            self._statistics.requantization_error = relative_errors(self._errors)
        self._sink.progress(self._statistics)
        return self._statistics

    def _start(self, pairs: Sequence[tuple[Reads, Reducers]]) -> list[threading.Thread]:
        """Start a worker for each pair, or as many as the system allows; without any, do the work
        here.
        """
        threads: list[threading.Thread] = []
        for pair in pairs:
            thread = threading.Thread(target=self._work, args=pair, daemon=True)
            try:
                thread.start()
            except RuntimeError:  # a limit on threads or processes
                break
            threads.append(thread)
        if not threads:
            self._work(*pairs[0])
        for _, reducers in pairs[max(len(threads), 1) :]:
            reducers.close()
        return threads

    def _work(self, reads: Reads, reducers: Reducers) -> None:
        """One thread: chunks until there are none, then those that are still in flight, also after
        an error.
        """
        try:
            self._guard(reducers, lambda: self._take_chunks(reads, reducers))
            self._guard(reducers, lambda: self._write_all(reads, reducers.drain()))
            self._guard(reducers, reducers.close)
        finally:
            self._finished.release()

    def _take_chunks(self, reads: Reads, reducers: Reducers) -> None:
        while (chunk := self._schedule.next()) is not None:
            self._write_all(reads, reducers.reduce(chunk), chunk)

    def _write_all(self, reads: Reads, outcomes: Iterator[Reduced], chunk: Chunk | None = None) -> None:
        """Write outcomes as they come, and count."""
        began, before = time.perf_counter(), replace(reads.counts)
        writing, written, errors = 0.0, 0, None
        for reduced in outcomes:
            computed = time.perf_counter()
            written += self._schedule.write(reduced)
            writing += time.perf_counter() - computed
            errors = combine_totals(errors, reduced.errors)
        reading = reads.counts.seconds - before.seconds
        computing = max(0.0, time.perf_counter() - began - reading - writing)
        bytes_read = reads.counts.num_bytes - before.num_bytes
        here = Statistics(reading, computing, writing, bytes_read, written, int(chunk is not None))
        with self._lock:
            self._statistics = statistics = self._statistics.plus(here)
            self._errors = combine_totals(self._errors, errors)
        self._report(statistics)

    def _report(self, statistics: Statistics) -> None:
        if self._reporting.acquire(blocking=False):  # else another thread is at it, and more recent ones will follow
            try:
                if self._sink.progress(statistics) is False:
                    self._stop()
            finally:
                self._reporting.release()

    def _guard(self, reducers: Reducers, step: Callable[[], None]) -> None:
        """Run a step; an error stops all workers and is kept if it comes first in the plan."""
        try:
            step()
        except StoppedError:
            pass
        except ScheduleError as error:
            self._fail(error.number, error.__cause__ or error)
        except BaseException as error:  # handed to the main thread, which raises it
            self._fail(reducers.at, error)

    def _fail(self, number: tuple[int, int], error: BaseException) -> None:
        """Stop the workers because of chunk `number`. Earlier chunks are done or in flight, and
        report their own errors.
        """
        with self._lock:
            if self._failed is None or number < self._failed[0]:
                self._failed = (number, error)
        self._stop()

    def _stop(self) -> None:
        self._stopped.set()
        self._schedule.stop()
