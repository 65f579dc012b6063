"""Stream a plan: read, reduce, write, within a fixed memory budget.

A few worker threads each take the next chunk of the plan, read its bytes from every input, reduce them and write the result at its
planned offset. Chunks are taken in file order, so every file is read sequentially; while one worker waits for the disk another
computes, which is all the overlap that is needed on the CPU. torch and the system calls release the interpreter lock. With an
accelerator a worker also goes on to read the next chunk while the device is busy with the one before, see `pipeline.py`.

Memory: `workers * ((N + K) * chunk_bytes + scratch)`, whatever the size of the model or of one tensor; with an accelerator what a
`Ring` takes, on either side. `fit_memory` solves this for the chunk and refuses when not even a small chunk fits. Quantised tensors
are worked through in rows, see `reducers/quantized.py`.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from merge_cli.engine.arithmetic import WeightedSum, torch_dtype, weighted_sum
from merge_cli.engine.budget import REDONE_ELEMENTS, Budget, fit_memory
from merge_cli.engine.buffers import HostBuffer, elements
from merge_cli.engine.device import Device
from merge_cli.engine.nonfinite import describe_nonfinite
from merge_cli.engine.reader import InputFiles, check_unchanged
from merge_cli.engine.reducers.cpu import Lane
from merge_cli.engine.reducers.pipeline import DEPTH, Ring, Slot
from merge_cli.engine.reducers.quantized import QuantizedReducers, keep_freed_memory, rows_of
from merge_cli.engine.storage import is_larger_than_cache
from merge_cli.engine.writer import PieceWriter, ShardWriter, Writer
from merge_cli.errors import MismatchError, NonFiniteError, PmergeError, UsageError, first_ten
from merge_cli.formats.quantization.error import combine_totals, relative_errors
from merge_cli.formats.safetensors import DTYPES
from merge_cli.planning.plan import Extent, MergePlan, QuantizedExtent, WorkItem


@dataclass
class Statistics:
    """Seconds are summed over the worker threads.

    `requantization_error`: the largest and the mean error that quantising the averages again has added, relative to the largest and
    the mean magnitude. `notes`: what went otherwise than planned, for people.
    """

    seconds_reading: float = 0.0
    seconds_computing: float = 0.0
    seconds_writing: float = 0.0
    bytes_read: int = 0
    bytes_written: int = 0
    requantization_error: tuple[float, float] | None = None
    notes: list[str] = field(default_factory=list)

    def plus(self, other: Statistics) -> Statistics:
        """Both together; of errors the larger ones."""
        errors = [each for each in (self.requantization_error, other.requantization_error) if each is not None]
        return Statistics(
            self.seconds_reading + other.seconds_reading,
            self.seconds_computing + other.seconds_computing,
            self.seconds_writing + other.seconds_writing,
            self.bytes_read + other.bytes_read,
            self.bytes_written + other.bytes_written,
            max(errors, default=None),
            [*self.notes, *other.notes],
        )


def shard_writer(todo: WorkItem, folder: Path) -> Writer:
    """What writes a file, or a piece of one, into `folder`."""
    return ShardWriter(todo.file, folder) if todo.is_whole else PieceWriter(todo.file, folder, todo.bytes_to_write)


def stream(
    plan: MergePlan,
    todo: Sequence[WorkItem],
    folders: Sequence[Path],
    budget: Budget,
    device: Device,
    on_progress: Callable[[Statistics], None],
    on_file: Callable[[int, WorkItem, str, Mapping[str, int]], None],
    writer: Callable[[WorkItem, Path], Writer] = shard_writer,
    claim: Callable[[WorkItem], bool] = lambda todo: True,
    after: Callable[[WorkItem], object] = lambda todo: None,
) -> Statistics:
    """Write what is `todo` of the plan: the files of output k into `folders[k]`. Only inputs that these outputs use are read.

    `on_file(k, todo, sha256, nonfinite)` is called from a worker thread after a file is durable under its name (a piece of a file:
    under the file's partial name, and `sha256` is empty); `nonfinite` counts the elements that are NaN or Inf, by tensor (only with
    allow_nonfinite). An error stops all workers; of several, the one that comes first in the plan is raised. Partial files stay.
    `writer(todo, folder)` makes what takes the bytes; `claim(todo)` is asked when its turn comes, and False leaves it to others.
    `after(todo)` is called after `on_file`, and may take its time: it does not keep the other workers.
    """
    if any(isinstance(run, QuantizedExtent) for each in todo for run in each.file.extents):
        keep_freed_memory()
    with InputFiles(keep_cached=not is_larger_than_cache(plan), direct=budget.slack_bytes > 0) as inputs:
        check_equal_integers(plan, todo, inputs)
        job = _Job(plan, todo, folders, budget, device, inputs, on_progress, on_file, writer, claim, after)
        return job.run()


class _OpenFile:
    """An output file in progress: for each output its operation and its writer."""

    def __init__(self, todo: WorkItem, operations: Mapping[int, WeightedSum], writers: Mapping[int, Writer]) -> None:
        self.todo = todo
        self.operations = operations
        self.used = sorted({i for operation in operations.values() for i in operation.inputs})
        self.writers = writers
        self.nonfinite: Counter[str] = Counter()


class _Stopped(Exception):
    """The run is to end: another worker failed, or a signal came."""


@dataclass
class _Started:
    """A chunk that an accelerator is working on."""

    number: int
    open_file: _OpenFile
    run: Extent
    start: int
    count: int
    slot: Slot
    results: dict[int, HostBuffer] = field(default_factory=dict)
    bytes_read: int = 0
    seconds_reading: float = 0.0
    seconds_computing: float = 0.0


class _Job:
    """The state that the worker threads share."""

    def __init__(
        self,
        plan: MergePlan,
        todo: Sequence[WorkItem],
        folders: Sequence[Path],
        budget: Budget,
        device: Device,
        inputs: InputFiles,
        on_progress: Callable[[Statistics], None],
        on_file: Callable[[int, WorkItem, str, Mapping[str, int]], None],
        writer: Callable[[WorkItem, Path], Writer],
        claim: Callable[[WorkItem], bool],
        after: Callable[[WorkItem], object],
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
        self._claim = claim
        self._after = after
        self._operations = [weighted_sum(output.inputs, output.coefficients) for output in plan.outputs]
        self._work = enumerate(self._chunks(todo))
        self._open: set[_OpenFile] = set()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._finished = threading.Semaphore(0)
        self._error: tuple[int, BaseException] | None = None
        self._totals: torch.Tensor | None = None

    def run(self) -> Statistics:
        rings: Sequence[Ring | None] = self._rings() if self.device.is_accelerator else [None] * self.budget.workers
        threads = [threading.Thread(target=self._worker, args=(ring,), daemon=True) for ring in rings]
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

    def _rings(self) -> list[Ring]:
        """A ring for each worker, all made before any of them starts; of smaller chunks where the device has no memory for them."""
        planned = self.budget
        while True:
            budget = self.budget
            try:
                return [
                    Ring(
                        self.device.queues(),
                        len(self.plan.outputs),
                        budget.chunk_elements,
                        budget.chunk_bytes,
                        budget.slack_bytes,
                    )
                    for _ in range(budget.workers)
                ]
            except torch.OutOfMemoryError:
                pass  # what was made is freed only now that its traceback is gone
            self.device.release_freed()
            try:
                half, direct = budget.device_bytes // 2, budget.slack_bytes > 0
                self.budget = fit_memory(self.plan, budget.bytes, self.device, budget.workers, half, budget.chunk_bytes, direct)
            except UsageError as error:
                raise PmergeError(
                    f"{self.device.name} has too little free memory",
                    details=[f"expected  at least {budget.device_bytes} bytes"],
                    hint="--device cpu  gives the same bytes",
                ) from error
            self.statistics.notes = [
                f"{self.device.name} was out of memory: {self.budget.workers} threads with chunks of {self.budget.chunk_bytes}"
                f" bytes instead of {planned.workers} with {planned.chunk_bytes}"
            ]

    def _chunks(self, todo: Sequence[WorkItem]) -> Iterator[tuple[_OpenFile, Extent | QuantizedExtent | None, int, int]]:
        """Every chunk of the work, in file order: (file, run, start, count); run None for an empty file.

        Elements are counted, or rows for quantised tensors; those whose codec must see all values first are one chunk.
        """
        for each in todo:
            if not self._claim(each):
                continue
            writers = {k: self._writer(each, self._folders[k]) for k in each.outputs}
            open_file = _OpenFile(each, {k: self._operations[k] for k in each.outputs}, writers)
            self._open.add(open_file)
            parts = list(each.parts())
            if not parts:
                yield open_file, None, 0, 0
            for run, first, end in parts:
                if isinstance(run, QuantizedExtent):
                    whole = run.codec is not None and run.codec.needs_stats
                    chunks = [(first, end)] if whole else rows_of(run, self.budget.quantized_values, first, end)
                    yield from ((open_file, run, r0, r1 - r0) for r0, r1 in chunks)
                    continue
                for start in range(first, end, self.budget.chunk_elements):
                    yield open_file, run, start, min(self.budget.chunk_elements, end - start)

    def _worker(self, ring: Ring | None) -> None:
        number = -1
        started: deque[_Started] = deque()
        try:
            torch.set_num_threads(1)
            num_elements = self.budget.chunk_elements if ring is None else min(REDONE_ELEMENTS, self.budget.chunk_elements)
            chunk_bytes = num_elements * (self.budget.chunk_bytes // self.budget.chunk_elements)
            lane = Lane(len(self.plan.inputs), len(self.plan.outputs), num_elements, chunk_bytes, self.budget.slack_bytes)
            coded = QuantizedReducers(self.device, self.inputs, self.plan.spec.accumulate, self.budget.slack_bytes)
            while not self._stopped.is_set():
                with self._lock:
                    chunk = next(self._work, None)
                if chunk is None:
                    break
                number, (open_file, run, start, count) = chunk
                if isinstance(run, QuantizedExtent):
                    self._process_coded(coded, open_file, run, start, start + count)
                elif ring is None or run is None:
                    self._process(lane, open_file, run, start, count)
                else:
                    if len(started) == DEPTH and not self._finish(ring, lane, started.popleft()):
                        break
                    started.append(self._start(ring, number, open_file, run, start, count))
            self._add_up(coded)
        except _Stopped:
            pass
        except BaseException as error:  # handed to the main thread, which raises it
            self._fail(number, error)
        try:
            while started and ring is not None and self._finish(ring, lane, started.popleft()):
                pass  # what was read is written, or tells of an error that comes before others
            if ring is not None:
                ring.close()
        except BaseException as error:
            self._fail(number, error)
        finally:
            self._finished.release()

    def _fail(self, number: int, error: BaseException) -> None:
        """Stop the workers because of chunk `number`."""
        if isinstance(error, torch.OutOfMemoryError):
            error = PmergeError(f"{self.device.name} is out of memory", hint="--device cpu  gives the same bytes")
        with self._lock:  # chunks are taken in order: those before this one are done or in flight, and tell for themselves
            if self._error is None or number < self._error[0]:
                self._error = (number, error)
        self._stopped.set()

    def _process(self, lane: Lane, open_file: _OpenFile, run: Extent | None, start: int, count: int) -> None:
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
        self._write(open_file, run, start, count, results)
        writing = time.perf_counter() - computed
        self._count(reading, computed - began - reading, writing, bytes_read, run, count, open_file)

    def _read(self, run: Extent, i: int, start: int, count: int, buffer: HostBuffer) -> int:
        """Read elements of one input into `buffer`; how many bytes."""
        source = run.sources[i]
        bits = DTYPES[source.dtype].bits
        size = count * bits // 8
        buffer.fill(self.inputs, source.file, source.offset + start * bits // 8, size, max(1, bits // 8))
        return size

    def _write(self, open_file: _OpenFile, run: Extent, start: int, count: int, results: Mapping[int, HostBuffer]) -> None:
        """Write elements of a run from `results`, one buffer an output."""
        bits = DTYPES[run.dtype].bits
        offset, size = run.offset + start * bits // 8, count * bits // 8
        for k, writer in open_file.writers.items():
            if writer.write(offset, results[k].data(size)):
                self._complete(open_file, k)

    def _count(
        self, reading: float, computing: float, writing: float, bytes_read: int, run: Extent, count: int, open_file: _OpenFile
    ) -> None:
        with self._lock:
            statistics = self.statistics
            statistics.seconds_reading += reading
            statistics.seconds_computing += computing
            statistics.seconds_writing += writing
            statistics.bytes_read += bytes_read
            statistics.bytes_written += count * DTYPES[run.dtype].bits // 8 * len(open_file.writers)
            self._on_progress(statistics)

    def _start(self, ring: Ring, number: int, open_file: _OpenFile, run: Extent, start: int, count: int) -> _Started:
        """Read a chunk and have the accelerator reduce it. Raises _Stopped when the run is to end."""
        began = time.perf_counter()
        slot = ring.take()
        started = _Started(number, open_file, run, start, count, slot)

        def read(i: int, buffer: HostBuffer) -> None:
            if self._stopped.is_set():
                raise _Stopped
            before = time.perf_counter()
            started.bytes_read += self._read(run, i, start, count, buffer)
            started.seconds_reading += time.perf_counter() - before

        if run.kind == "average":
            ring.start(slot, run, count, open_file.operations, self.plan.spec.accumulate, read)
            started.results = {k: slot.outputs[k] for k in open_file.writers}
        else:
            bases = {k: 0 if run.is_copy else self.plan.outputs[k].base for k in open_file.writers}
            first = {i: slot.outputs[k] for k, i in reversed(bases.items())}
            for i, buffer in first.items():
                read(i, buffer)
            started.results = {k: first[i] for k, i in bases.items()}
        started.seconds_computing = time.perf_counter() - began - started.seconds_reading
        return started

    def _finish(self, ring: Ring, lane: Lane, chunk: _Started) -> bool:
        """Write the results of a started chunk once they are there. False where that failed, which is told."""
        try:
            began = time.perf_counter()
            if not ring.finish(chunk.slot):
                self._redo(lane, chunk)
            computed = time.perf_counter()
            self._write(chunk.open_file, chunk.run, chunk.start, chunk.count, chunk.results)
            ring.give_back(chunk.slot)
            computing = chunk.seconds_computing + computed - began
            writing = time.perf_counter() - computed
            self._count(chunk.seconds_reading, computing, writing, chunk.bytes_read, chunk.run, chunk.count, chunk.open_file)
        except BaseException as error:  # handed to the main thread, which raises it
            self._fail(chunk.number, error)
            return False
        return True

    def _redo(self, lane: Lane, chunk: _Started) -> None:
        """Reduce a chunk again on the CPU, in pieces: its results are not all finite, or the device had no memory for it."""
        open_file, run = chunk.open_file, chunk.run
        if chunk.slot.ran_out_of_memory:
            self._note_done_on_cpu()
        width = DTYPES[run.dtype].bits // 8
        for start in range(chunk.start, chunk.start + chunk.count, REDONE_ELEMENTS):
            count = min(REDONE_ELEMENTS, chunk.start + chunk.count - start)

            def load(i: int, start: int = start, count: int = count) -> None:
                self._read(run, i, start, count, lane.inputs[i])

            if not lane.reduce(run, count, open_file.operations, self.plan.spec.accumulate, load):
                self._handle_nonfinite(lane, open_file, run, start, count)
            begin, end = (start - chunk.start) * width, (start - chunk.start + count) * width
            for k in open_file.operations:
                chunk.results[k].memory[begin:end] = lane.outputs[k].memory[: count * width]

    def _note_done_on_cpu(self) -> None:
        note = f"{self.device.name} was out of memory: the CPU did some of the work, with the same result"
        with self._lock:
            if note not in self.statistics.notes:
                self.statistics.notes.append(note)

    def _process_coded(self, reducer: QuantizedReducers, open_file: _OpenFile, run: QuantizedExtent, first: int, end: int) -> None:
        began = time.perf_counter()
        whole = run.codec is not None and run.codec.needs_stats
        chunks = list(rows_of(run, self.budget.quantized_values)) if whole else [(first, end)]
        operations = list(open_file.operations.values())
        stats = reducer.stats(run, chunks, operations)
        for r0, r1 in chunks:
            if self._stopped.is_set():
                return
            for merged in reducer.reduce(run, r0, r1, operations, stats, self.plan.spec.allow_nonfinite):
                with self._lock:
                    open_file.nonfinite.update(reducer.take_nonfinite())
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

    def _add_up(self, reducer: QuantizedReducers) -> None:
        """Take over what a worker has counted."""
        if reducer.done_on_cpu:
            self._note_done_on_cpu()
        with self._lock:
            for totals in reducer.totals():
                self._totals = totals if self._totals is None else combine_totals(self._totals, totals)

    def _complete(self, open_file: _OpenFile, k: int) -> None:
        sha256 = open_file.writers[k].finish()
        with self._lock:
            if all(writer.is_finished for writer in open_file.writers.values()):
                self._open.discard(open_file)
            self._on_file(k, open_file.todo, sha256, dict(open_file.nonfinite))
        self._after(open_file.todo)

    def _handle_nonfinite(self, lane: Lane, open_file: _OpenFile, run: Extent, start: int, count: int) -> None:
        """Raise NonFiniteError, or count the elements and give every NaN the same bits, which devices do not agree on."""
        found = describe_nonfinite(lane, run, start, count, open_file.operations)
        if not self.plan.spec.allow_nonfinite:
            raise NonFiniteError(f"`{found.key}` {found.what}", details=found.details, hint=found.hint)
        for k in open_file.operations:
            values = elements(lane.outputs[k], torch_dtype(run.dtype), 0, count)
            values.masked_fill_(values.isnan(), float("nan"))
        with self._lock:
            open_file.nonfinite.update(found.counts)


def check_equal_integers(plan: MergePlan, todo: Sequence[WorkItem], inputs: InputFiles, block_bytes: int = 1 << 20) -> None:
    """Raise MismatchError, naming tensors and checkpoints, unless integer tensors are equal in all inputs of each output."""
    block = memoryview(bytearray(block_bytes))
    different: dict[str, set[str]] = {}
    equal = [(run, each) for each in todo for run in each.file.extents if isinstance(run, Extent) and run.kind == "equal"]
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
