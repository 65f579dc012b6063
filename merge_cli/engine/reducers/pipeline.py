"""Keep an accelerator busy: read, upload, add, round, copy back and write at the same time, in
memory that is made once.

    worker thread   reads inputs into a stage . . . . . . . . . . . . . . . . . . . .  waits for a slot's results, writes them
    upload queue         host stage -> device stage
    compute queue             widen, multiply, add, input by input; after the last one divide and round
    download queue                                                 device slot -> host slot

A `Ring` belongs to one worker. `STAGES` buffers carry bytes to the device, each as many inputs of a
chunk as it has room for: all of them where memory allows (`ChunkSize.together`), at least one. So
Python runs a few times a chunk, and pinned memory does not grow with the number of checkpoints
beyond a bound. `DEPTH` slots carry results back, so that one chunk is read while the one before is
finished. The sums are one set: the compute queue runs in order. What may not be overwritten before
it was used:

    host stage      by the next read    until its upload is done               the worker waits
    device stage    by the next upload  until it was added                     the upload queue waits
    device stage    is added            only after it was uploaded             the compute queue waits
    device slot     is copied back      only after the chunk was rounded       the download queue waits
    host slot       is written          only after it was copied back          the worker waits
    both slots      by a later chunk    until the results were written         `take` refuses

Every wait has a test that fails without it (tests/engine/reducers/test_pipeline.py). Chunks with a
non-finite result or an out-of-memory error are reported (NotReducedError); the CPU does them again,
because the inputs are gone.

`Queues` is all that is asked of a device. Not promised: that it is faster than the CPU (see
`tuning/backend.py`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from merge_cli.engine.arithmetic import Term, terms_by_input, torch_dtype
from merge_cli.engine.buffers import HostBuffer
from merge_cli.engine.chunk import Chunk, ChunkSize, Memory, Reduced
from merge_cli.engine.device import Device
from merge_cli.engine.queues import COMPUTE, DOWNLOAD, UPLOAD, Event, Queues
from merge_cli.engine.reads import Reads
from merge_cli.engine.reducers.accumulator import Accumulator, accumulator_bytes
from merge_cli.planning.extent import Extent
from merge_cli.planning.plan import MergePlan
from merge_cli.planning.sums import WeightedSum
from merge_cli.stores.local import DIRECT_BLOCK_BYTES

STAGES = 2  # one is read while the other is uploaded; of those on the device one is added meanwhile
DEPTH = 2


class Slot:
    """Room for the results of a chunk: `outputs[k]` on the host, and whether they are finite."""

    def __init__(self, queues: Queues, num_outputs: int, chunk_bytes: int) -> None:
        self.outputs = [queues.host_buffer(chunk_bytes) for _ in range(num_outputs)]
        self.device_outputs = [queues.memory(chunk_bytes) for _ in range(num_outputs)]
        self.clean = queues.host_buffer(num_outputs).tensor.view(torch.bool)
        self.device_clean = queues.memory(num_outputs).view(torch.bool)
        self.operations: tuple[int, ...] = ()
        self.copied_back: Event | None = None
        self.is_taken = False
        self.ran_out_of_memory = False


class _Stage:
    """Room for some inputs of one chunk, on the host and on the device."""

    def __init__(self, queues: Queues, num_bytes: int) -> None:
        self.host = queues.host_buffer(num_bytes)
        self.device = queues.memory(num_bytes)
        self.uploaded: Event | None = None
        self.added: Event | None = None


class Ring:
    """What one worker needs to reduce chunks of up to `size` on a device.

    Chunks are started and finished in the same order: `take`, `start`, then later `finish` and
    `give_back`.
    """

    def __init__(self, queues: Queues, num_outputs: int, size: ChunkSize) -> None:
        self._queues = queues
        self._size = size
        self._accumulator = Accumulator(queues.memory, size.elements, num_outputs)
        self._stages = [_Stage(queues, stage_bytes(size)) for _ in range(STAGES)]
        self._slots = [Slot(queues, num_outputs, size.num_bytes) for _ in range(DEPTH)]
        self._next_stage = self._next_slot = 0

    def take(self) -> Slot:
        """The slot for the next chunk. The chunk that was in it must have been given back."""
        slot = self._slots[self._next_slot]
        assert not slot.is_taken
        self._next_slot = (self._next_slot + 1) % DEPTH
        slot.is_taken, slot.operations, slot.copied_back, slot.ran_out_of_memory = True, (), None, False
        return slot

    def give_back(self, slot: Slot) -> None:
        """The slot's results have been written."""
        slot.is_taken = False

    def start(
        self,
        slot: Slot,
        extent: Extent,
        count: int,
        operations: Mapping[int, WeightedSum],
        read: Callable[[int, HostBuffer], None],
    ) -> None:
        """Read `count` elements of every input that the operations use, by `read(i, buffer)`, and
        have the device reduce them.
        """
        slot.operations = tuple(operations)
        terms = terms_by_input(operations)
        sizes = {i: count * torch_dtype(extent.sources[i].dtype).itemsize for i in terms}
        room = -(-max(sizes.values()) // DIRECT_BLOCK_BYTES) * DIRECT_BLOCK_BYTES + self._size.slack_bytes
        most = stage_bytes(self._size) // room
        try:
            for first in range(0, len(terms), most):
                inputs = list(terms)[first : first + most]
                stage, begins = self._read([partial(read, i) for i in inputs], room, sizes[inputs[-1]])
                sources = [
                    stage.device[begin : begin + sizes[i]].view(torch_dtype(extent.sources[i].dtype))
                    for i, begin in zip(inputs, begins, strict=True)
                ]
                add_all = partial(self._add, sources, [terms[i] for i in inputs])
                stage.added = self._queues.submit(COMPUTE, add_all, [stage.uploaded])
            self._finish(slot, count, torch_dtype(extent.dtype), operations)
        except torch.OutOfMemoryError:
            self._give_up(slot)

    def finish(self, slot: Slot) -> bool:
        """Wait for the results of a chunk. False where the CPU must make them: not finite, or the
        device was out of memory.
        """
        if slot.copied_back is not None:
            self._queues.wait(slot.copied_back)
        return not slot.ran_out_of_memory and all(bool(slot.clean[k]) for k in slot.operations)

    def close(self) -> None:
        """Wait until the device uses none of the buffers any more."""
        self._queues.wait_for_all()

    def _read(self, reads: Sequence[Callable[[HostBuffer], None]], room: int, last_bytes: int) -> tuple[_Stage, list[int]]:
        """Read inputs, `room` bytes apart, into the next stage, and have it uploaded at once.

        `last_bytes`: the bytes of the last one. The stage, and where in it each input begins.
        """
        stage = self._stages[self._next_stage]
        self._next_stage = (self._next_stage + 1) % STAGES
        if stage.uploaded is not None:
            self._queues.wait(stage.uploaded)
        begins = []
        for start, read in zip(range(0, len(reads) * room, room), reads, strict=True):
            buffer = HostBuffer(stage.host.memory[start : start + room])
            read(buffer)
            begins.append(start + buffer.begin)
        first, end = begins[0], begins[-1] + last_bytes
        upload = partial(_copy, stage.host.tensor[first:end], stage.device[first:end])
        stage.uploaded = self._queues.submit(UPLOAD, upload, [] if stage.added is None else [stage.added])
        return stage, begins

    def _add(self, sources: Sequence[Tensor], terms: Sequence[Sequence[Term]]) -> None:
        """Add inputs, oldest first."""
        for source, own in zip(sources, terms, strict=True):
            self._accumulator.add(source, own)

    def _finish(self, slot: Slot, count: int, dtype: torch.dtype, operations: Mapping[int, WeightedSum]) -> None:
        """Have the sums rounded and copied back."""
        size = count * dtype.itemsize

        def round_all() -> None:
            for k, operation in operations.items():
                output = slot.device_outputs[k][:size].view(dtype)
                self._accumulator.finish(k, operation, output, slot.device_clean[k])

        def copy_back() -> None:
            for k in operations:
                _copy(slot.device_outputs[k][:size], slot.outputs[k].tensor[:size])
            _copy(slot.device_clean, slot.clean)

        rounded = self._queues.submit(COMPUTE, round_all)
        slot.copied_back = self._queues.submit(DOWNLOAD, copy_back, [rounded])

    def _give_up(self, slot: Slot) -> None:
        """Part of the operation may already be queued, with no event to wait on."""
        slot.ran_out_of_memory, slot.copied_back = True, None
        self._queues.wait_for_all()


def stage_bytes(size: ChunkSize) -> int:
    """The bytes of a stage: `size.together` inputs, each with the slack of its reads."""
    return size.together * (size.num_bytes + size.slack_bytes)


def ring_host_bytes(num_outputs: int, size: ChunkSize) -> int:
    """The pinned memory of a `Ring`; torch rounds every buffer up to a power of two."""
    slots = DEPTH * (num_outputs * _power_of_two(size.num_bytes) + _power_of_two(num_outputs))
    return STAGES * _power_of_two(stage_bytes(size)) + slots


def ring_device_bytes(num_outputs: int, size: ChunkSize) -> int:
    """The device memory of a `Ring`."""
    slots = DEPTH * num_outputs * (size.num_bytes + 1)
    return STAGES * stage_bytes(size) + slots + accumulator_bytes(size.elements, num_outputs)


def _power_of_two(num_bytes: int) -> int:
    return 1 << (num_bytes - 1).bit_length()


def _copy(source: Tensor, target: Tensor) -> None:
    target.copy_(source, non_blocking=True)


class NotReducedError(Exception):
    """The device could not do `chunk`: it had no memory, or a result is not finite."""

    def __init__(self, chunk: Chunk, is_out_of_memory: bool) -> None:
        self.chunk = chunk
        self.is_out_of_memory = is_out_of_memory


class PipelineReducer:
    """Weighted sums of plain tensors on an accelerator, one chunk ahead.

    `finish` raises NotReducedError for a chunk that the CPU has to do.
    """

    depth = DEPTH - 1

    def __init__(self, plan: MergePlan, size: ChunkSize, device: Device, reads: Reads) -> None:
        self._plan = plan
        self._reads = reads
        self._ring = Ring(device.queues(), len(plan.outputs), size)
        self._started: deque[tuple[Chunk, Slot]] = deque()

    def start(self, chunk: Chunk) -> None:
        extent, slot = chunk.extent, self._ring.take()
        assert isinstance(extent, Extent)
        operations = {k: self._plan.operation(extent, k) for k in chunk.item.outputs}

        def read(i: int, buffer: HostBuffer) -> None:
            self._reads.elements(extent.sources[i], chunk.first, chunk.end, buffer)

        self._ring.start(slot, extent, chunk.end - chunk.first, operations, read)
        self._started.append((chunk, slot))

    def finish(self) -> Iterator[Reduced]:
        chunk, slot = self._started.popleft()
        extent = chunk.extent
        assert isinstance(extent, Extent)
        is_reduced = self._ring.finish(slot)
        if is_reduced:
            offset, size = extent.byte_at(chunk.first), extent.bytes_written(chunk.first, chunk.end)
            yield Reduced(chunk, {k: [(offset, slot.outputs[k].data(size))] for k in chunk.item.outputs})
        self._ring.give_back(slot)
        if not is_reduced:
            raise NotReducedError(chunk, slot.ran_out_of_memory)

    def close(self) -> None:
        self._ring.close()

    @classmethod
    def memory(cls, plan: MergePlan, size: ChunkSize, device: Device) -> Memory:
        return Memory(ring_host_bytes(len(plan.outputs), size), ring_device_bytes(len(plan.outputs), size))
