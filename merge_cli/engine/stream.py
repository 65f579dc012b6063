"""Stream a plan: read, reduce, write, within a fixed memory budget.

A few worker threads each take the next chunk of the plan, read its bytes from every input, reduce them and write the result at its
planned offset. Chunks are taken in file order, so every file is read sequentially; while one worker waits for the disk another
computes, which is all the overlap that is needed. torch and the system calls release the interpreter lock.

Memory: `workers * ((N + K) * chunk_bytes + scratch)`, whatever the size of the model or of one tensor. `fit_memory` solves this for
the chunk and refuses when not even a small chunk fits. Quantised tensors are worked through in rows, see `coded.py`.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from merge_cli.engine.coded import TARGET_VALUES, CodedReducer, bytes_for, keep_freed_memory, largest_chunk, rows_of
from merge_cli.engine.device import CPU_BLOCK_ELEMENTS, Device, HostBuffer, Lane, elements
from merge_cli.engine.nonfinite import describe_nonfinite
from merge_cli.engine.reader import InputFiles, check_header_unchanged, check_unchanged
from merge_cli.engine.reduce import WeightedSum, torch_dtype, weighted_sum
from merge_cli.engine.storage import DIRECT_BLOCK_BYTES, LARGE_REQUEST_BYTES, are_local, is_larger_than_cache
from merge_cli.engine.writer import ShardWriter, Writer
from merge_cli.errors import MismatchError, NonFiniteError, UsageError, first_ten
from merge_cli.formats.quantization.error import combine_totals, relative_errors
from merge_cli.formats.safetensors import DTYPES
from merge_cli.plan import CodedRun, MergePlan, OutputFile, Run

DEFAULT_MEMORY_BYTES = 2 << 30
MIN_CHUNK_ELEMENTS = 4096
_CHUNK_MULTIPLE = 4096


@dataclass(frozen=True)
class Budget:
    """How the memory is used: `bytes` in all, by `workers` threads with chunks of `chunk_elements` (at most `chunk_bytes`).

    Quantised tensors are taken in chunks of about `coded_values` values. With `slack_bytes` more in every input's buffer inputs are
    read with O_DIRECT, which takes whole blocks of the storage.
    """

    workers: int
    chunk_elements: int
    chunk_bytes: int
    bytes: int
    coded_values: int = TARGET_VALUES
    slack_bytes: int = 0


class Todo(NamedTuple):
    """A file to be written, and for which outputs of the plan."""

    file: OutputFile
    outputs: tuple[int, ...]


@dataclass
class Statistics:
    """Seconds are summed over the worker threads.

    `requantization_error`: the largest and the mean error that quantising the averages again has added, relative to the largest and
    the mean magnitude.
    """

    seconds_reading: float = 0.0
    seconds_computing: float = 0.0
    seconds_writing: float = 0.0
    bytes_read: int = 0
    bytes_written: int = 0
    requantization_error: tuple[float, float] | None = None


def fit_memory(
    plan: MergePlan,
    memory_bytes: int,
    device: Device,
    threads: int | None = None,
    chunk_bytes: int | None = None,
    direct: bool = False,
) -> Budget:
    """The largest chunk (up to `chunk_bytes`, or a good size for reading) with which the plan keeps to `memory_bytes`.

    Raises UsageError, with need and have, when not even a small chunk fits.
    """
    plain = [run for file in plan.files for run in file.runs if isinstance(run, Run)]
    coded = [run for file in plan.files for run in file.runs if isinstance(run, CodedRun)]
    dtypes = {dtype for run in plain for dtype in (run.dtype, *(source.dtype for source in run.sources))}
    item_bytes = max((DTYPES[dtype].bits for dtype in dtypes), default=16) // 8
    buffers = len(plan.inputs) + len(plan.outputs)
    longest = max((run.num_elements for run in plain), default=1)
    wanted = chunk_bytes or _good_chunk_bytes(plan, device, item_bytes, direct)
    target = max(1, min(wanted // item_bytes // _CHUNK_MULTIPLE, -(-longest // _CHUNK_MULTIPLE))) * _CHUNK_MULTIPLE
    slack_bytes = 2 * DIRECT_BLOCK_BYTES if direct else 0

    def need(workers: int, chunk_elements: int, coded_values: int) -> int:
        scratch = device.scratch_bytes(chunk_elements, len(plan.outputs))
        rows = bytes_for(largest_chunk(coded, coded_values), len(plan.outputs))
        slack = len(plan.inputs) * slack_bytes
        return workers * (buffers * chunk_elements * item_bytes + slack + scratch + rows)

    for workers in range(threads or max(2, min(8, len(os.sched_getaffinity(0)))), 0, -1):
        chunk, values = target, TARGET_VALUES
        while need(workers, chunk, values) > memory_bytes and (chunk > MIN_CHUNK_ELEMENTS or values > MIN_CHUNK_ELEMENTS):
            chunk = max(MIN_CHUNK_ELEMENTS, chunk // 2 // _CHUNK_MULTIPLE * _CHUNK_MULTIPLE)
            values = max(MIN_CHUNK_ELEMENTS, values // 2)
        if need(workers, chunk, values) <= memory_bytes:
            return Budget(workers, chunk, chunk * item_bytes, need(workers, chunk, values), values, slack_bytes)
    least = need(1, MIN_CHUNK_ELEMENTS, MIN_CHUNK_ELEMENTS)
    raise UsageError(
        f"--memory is too small to average {len(plan.inputs)} checkpoints",
        details=[
            f"found     {memory_bytes} bytes",
            f"expected  at least {least} bytes",
        ],
        hint=f"--memory {-(-least >> 20) + 1}MiB",
    )


def _good_chunk_bytes(plan: MergePlan, device: Device, item_bytes: int, direct: bool) -> int:
    """A block of the sums where the data is local, so that it is still in the cache when it is added up; else a large request.

    From memory, 4 x 1.7 GB in bf16, that takes a tenth less CPU time than large chunks (docs/benchmarks.md).
    """
    if direct or device.is_cuda or not are_local(plan):
        return LARGE_REQUEST_BYTES
    return CPU_BLOCK_ELEMENTS * item_bytes


def stream(
    plan: MergePlan,
    todo: Sequence[Todo],
    folders: Sequence[Path],
    budget: Budget,
    device: Device,
    on_progress: Callable[[Statistics], None],
    on_file: Callable[[int, OutputFile, str, Mapping[str, int]], None],
    writer: Callable[[OutputFile, Path], Writer] = ShardWriter,
) -> Statistics:
    """Write what is `todo` of the plan: the files of output k into `folders[k]`. Only inputs that these outputs use are read.

    `on_file(k, file, sha256, nonfinite)` is called from a worker thread after a file is durable under its name; `nonfinite` counts
    the elements that are NaN or Inf, by tensor (only with allow_nonfinite). An error stops all workers; of several, the one that
    comes first in the plan is raised. Partial files stay. `writer(file, folder)` makes what takes the bytes of a file.
    """
    if any(isinstance(run, CodedRun) for each in todo for run in each.file.runs):
        keep_freed_memory()
    with InputFiles(keep_cached=not is_larger_than_cache(plan), direct=budget.slack_bytes > 0) as inputs:
        check_equal_integers(plan, todo, inputs)
        job = _Job(plan, todo, folders, budget, device, inputs, on_progress, on_file, writer)
        return job.run()


class _OpenFile:
    """An output file in progress: for each output its operation and its writer."""

    def __init__(self, todo: Todo, operations: Mapping[int, WeightedSum], writers: Mapping[int, Writer]) -> None:
        self.file = todo.file
        self.operations = operations
        self.used = sorted({i for operation in operations.values() for i in operation.inputs})
        self.writers = writers
        self.nonfinite: Counter[str] = Counter()


class _Stopped(Exception):
    """The run is to end: another worker failed, or a signal came."""


class _Job:
    """The state that the worker threads share."""

    def __init__(
        self,
        plan: MergePlan,
        todo: Sequence[Todo],
        folders: Sequence[Path],
        budget: Budget,
        device: Device,
        inputs: InputFiles,
        on_progress: Callable[[Statistics], None],
        on_file: Callable[[int, OutputFile, str, Mapping[str, int]], None],
        writer: Callable[[OutputFile, Path], Writer],
    ) -> None:
        self.plan = plan
        self.budget = budget
        self.device = device
        self.inputs = inputs
        self.statistics = Statistics()
        self._folders = folders
        self._on_progress = on_progress
        self._on_file = on_file
        self._writer = writer
        self._operations = [weighted_sum(output.inputs, output.coefficients) for output in plan.outputs]
        self._work = enumerate(self._chunks(todo))
        self._open: set[_OpenFile] = set()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._finished = threading.Semaphore(0)
        self._error: tuple[int, BaseException] | None = None
        self._totals: torch.Tensor | None = None

    def run(self) -> Statistics:
        threads = [threading.Thread(target=self._worker, daemon=True) for _ in range(self.budget.workers)]
        for thread in threads:
            thread.start()
        try:
            for _ in threads:
                self._finished.acquire()
        except BaseException:
            self._stopped.set()  # a signal: let the workers reach the end of their chunk
            raise
        finally:
            for thread in threads:
                thread.join()
            for open_file in self._open:
                for writer in open_file.writers.values():
                    writer.abandon()
        if self._error is not None:
            raise self._error[1]
        if self._totals is not None:
            self.statistics.requantization_error = relative_errors(self._totals)
        return self.statistics

    def _chunks(self, todo: Sequence[Todo]) -> Iterator[tuple[_OpenFile, Run | CodedRun | None, int, int]]:
        """Every chunk of the work, in file order: (file, run, start, count); run None for an empty file.

        Elements are counted, or rows for quantised tensors; those whose codec must see all values first are one chunk.
        """
        for each in todo:
            writers = {k: self._writer(each.file, self._folders[k]) for k in each.outputs}
            open_file = _OpenFile(each, {k: self._operations[k] for k in each.outputs}, writers)
            self._open.add(open_file)
            if not each.file.runs:
                yield open_file, None, 0, 0
            for run in each.file.runs:
                if isinstance(run, CodedRun):
                    whole = run.codec is not None and run.codec.needs_stats
                    chunks = [(0, run.num_rows)] if whole else rows_of(run, self.budget.coded_values)
                    yield from ((open_file, run, r0, r1 - r0) for r0, r1 in chunks)
                    continue
                for start in range(0, run.num_elements, self.budget.chunk_elements):
                    yield open_file, run, start, min(self.budget.chunk_elements, run.num_elements - start)

    def _worker(self) -> None:
        number = -1
        try:
            torch.set_num_threads(1)
            lane = Lane(
                self.device,
                len(self.plan.inputs),
                len(self.plan.outputs),
                self.budget.chunk_elements,
                self.budget.chunk_bytes,
                self.budget.slack_bytes,
            )
            coded = CodedReducer(self.device, self.inputs, self.plan.spec.accumulate)
            while not self._stopped.is_set():
                with self._lock:
                    chunk = next(self._work, None)
                if chunk is None:
                    break
                number, (open_file, run, start, count) = chunk
                if isinstance(run, CodedRun):
                    self._process_coded(coded, open_file, run, start, start + count)
                else:
                    self._process(lane, open_file, run, start, count)
            self._add_up(coded)
        except _Stopped:
            pass
        except BaseException as error:  # handed to the main thread, which raises it
            with self._lock:  # chunks are taken in order: those before this one are done or in flight, and tell for themselves
                if self._error is None or number < self._error[0]:
                    self._error = (number, error)
            self._stopped.set()
        finally:
            self._finished.release()

    def _process(self, lane: Lane, open_file: _OpenFile, run: Run | None, start: int, count: int) -> None:
        if run is None:
            for k in open_file.writers:
                self._complete(open_file, k)
            return
        began = time.perf_counter()
        bytes_read, reading = 0, 0.0

        def load(i: int) -> None:
            nonlocal bytes_read, reading
            if self._stopped.is_set():
                raise _Stopped
            before = time.perf_counter()
            bytes_read += self._read(run, i, start, count, lane.inputs[i])
            reading += time.perf_counter() - before

        if run.kind == "average":
            if not lane.reduce(run, count, open_file.operations, self.plan.spec.accumulate, load):
                self._handle_nonfinite(lane, open_file, run, start, count)
            results = {k: lane.outputs[k] for k in open_file.writers}
        else:
            bases = {k: 0 if run.is_copy else self.plan.outputs[k].base for k in open_file.writers}
            for i in sorted(set(bases.values())):
                load(i)
            results = {k: lane.inputs[i] for k, i in bases.items()}
        computed = time.perf_counter()
        bits = DTYPES[run.dtype].bits
        offset, size = run.offset + start * bits // 8, count * bits // 8
        for k, writer in open_file.writers.items():
            if writer.write(offset, results[k].data(size)):
                self._complete(open_file, k)
        written = time.perf_counter()
        with self._lock:
            statistics = self.statistics
            statistics.seconds_reading += reading
            statistics.seconds_computing += computed - began - reading
            statistics.seconds_writing += written - computed
            statistics.bytes_read += bytes_read
            statistics.bytes_written += size * len(open_file.writers)
            self._on_progress(statistics)

    def _read(self, run: Run, i: int, start: int, count: int, buffer: HostBuffer) -> int:
        """Read elements of one input into `buffer`; how many bytes."""
        source = run.sources[i]
        bits = DTYPES[source.dtype].bits
        size = count * bits // 8
        buffer.fill(self.inputs, source.file, source.offset + start * bits // 8, size, max(1, bits // 8))
        return size

    def _process_coded(self, reducer: CodedReducer, open_file: _OpenFile, run: CodedRun, first: int, end: int) -> None:
        began = time.perf_counter()
        whole = run.codec is not None and run.codec.needs_stats
        chunks = list(rows_of(run, self.budget.coded_values)) if whole else [(first, end)]
        operations = list(open_file.operations.values())
        stats = reducer.stats(run, chunks, operations)
        for r0, r1 in chunks:
            if self._stopped.is_set():
                return
            merged = reducer.reduce(run, r0, r1, operations, stats, self.plan.spec.allow_nonfinite)
            with self._lock:
                open_file.nonfinite.update(reducer.nonfinite)
            reducer.nonfinite.clear()
            computed = time.perf_counter()
            written = 0
            for (k, writer), writes in zip(open_file.writers.items(), merged.writes, strict=True):
                for offset, data in writes:
                    written += len(data)
                    if len(data) and writer.write(offset, data):
                        self._complete(open_file, k)
            with self._lock:
                statistics = self.statistics
                statistics.seconds_reading += merged.seconds_reading
                statistics.seconds_computing += computed - began - merged.seconds_reading
                statistics.seconds_writing += time.perf_counter() - computed
                statistics.bytes_read += merged.bytes_read
                statistics.bytes_written += written
                self._on_progress(statistics)
            began = time.perf_counter()

    def _add_up(self, reducer: CodedReducer) -> None:
        """Take over what a worker has counted."""
        with self._lock:
            if reducer.totals is not None:
                self._totals = reducer.totals if self._totals is None else combine_totals(self._totals, reducer.totals)

    def _complete(self, open_file: _OpenFile, k: int) -> None:
        sha256 = open_file.writers[k].finish()
        with self._lock:
            if all(writer.is_finished for writer in open_file.writers.values()):
                self._open.discard(open_file)
            self._on_file(k, open_file.file, sha256, dict(open_file.nonfinite))

    def _handle_nonfinite(self, lane: Lane, open_file: _OpenFile, run: Run, start: int, count: int) -> None:
        """Raise NonFiniteError, or count the elements and give every NaN the same bits, which devices do not agree on."""
        found = describe_nonfinite(lane, run, start, count, open_file.operations)
        if not self.plan.spec.allow_nonfinite:
            raise NonFiniteError(f"`{found.key}` {found.what}", details=found.details, hint=found.hint)
        for k in open_file.operations:
            values = elements(lane.outputs[k], torch_dtype(run.dtype), 0, count)
            values.masked_fill_(values.isnan(), float("nan"))
        with self._lock:
            open_file.nonfinite.update(found.counts)


def check_equal_integers(plan: MergePlan, todo: Sequence[Todo], inputs: InputFiles, block_bytes: int = 1 << 20) -> None:
    """Raise MismatchError, naming tensors and checkpoints, unless integer tensors are equal in all inputs of each output."""
    block = memoryview(bytearray(block_bytes))
    different: dict[str, set[str]] = {}
    equal = [(run, each) for each in todo for run in each.file.runs if isinstance(run, Run) and run.kind == "equal"]
    for run, each in equal:
        outputs = [plan.outputs[k] for k in each.outputs]
        used = sorted({i for output in outputs for i in output.inputs})
        for key, begin, end in zip(run.keys, run.starts, (*run.starts[1:], run.num_elements), strict=True):
            bits = DTYPES[run.dtype].bits
            for start in range(begin * bits // 8, end * bits // 8, block_bytes):
                size = min(block_bytes, end * bits // 8 - start)
                found = {}
                for i in used:
                    inputs.read_into(run.sources[i].file, run.sources[i].offset + start, block[:size])
                    found[i] = hashlib.sha256(block[:size]).digest()
                for base, i in ((output.base, i) for output in outputs for i in output.inputs):
                    if found[i] != found[base]:
                        different.setdefault(key, set()).update(str(run.sources[j].file.path) for j in (base, i))
    if different:
        lines = [f"`{key}`  in {', '.join(sorted(paths))}" for key, paths in different.items()]
        raise MismatchError(
            f"{len(different)} tensors that are not averaged (integers, activation scales) differ between the checkpoints",
            details=first_ten(lines),
            hint="take them from the newest checkpoint:  --int-policy newest",
        )


def check_inputs_unchanged(plan: MergePlan) -> None:
    """Raise ChangedError when an input file is not what it was when the plan was made."""
    for checkpoint in plan.inputs:
        for file in checkpoint.files:
            check_unchanged(file)
            check_header_unchanged(file)
