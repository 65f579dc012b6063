"""How a plan fits into memory: how many threads, and chunks of what size. Reducers state their
memory; this adds it up.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from merge_cli.engine.chunk import ChunkSize, Memory
from merge_cli.engine.reducers import kinds
from merge_cli.engine.storage import LARGE_REQUEST_BYTES, are_local
from merge_cli.errors import UsageError
from merge_cli.formats.safetensors import DTYPES
from merge_cli.planning.extent import Extent
from merge_cli.planning.plan import AVERAGE, MergePlan, WorkItem
from merge_cli.stores.local import DIRECT_BLOCK_BYTES

if TYPE_CHECKING:
    from merge_cli.engine.device import Device

DEFAULT_DEVICE_BYTES = 4 << 30
ACCELERATOR_CHUNK_BYTES = 8 << 20
"""Of one input: Python's part of a chunk is then below its upload, which is as fast as in any size."""
STAGE_BYTES = 64 << 20
"""Of the inputs that an accelerator is sent at once, at most."""
MIN_CHUNK_ELEMENTS = 4096
BLOCK_ELEMENTS = 1 << 18
"""A chunk that is still in the cache of a core when it is added up."""
BLOCKS_OF_MANY = 4
"""Blocks in a chunk of more than two threads: Python's part, some 70 microseconds a chunk in which
no other thread runs Python, is then 1 % of its time (docs/log.md).
"""
FEW_THREADS = 2
"""Threads of which one computes while another reads: only these get chunks of less than a block."""
PYTHON_THREADS = 8
"""The threads that one process keeps busy where a chunk is many calls from Python, as with torch.
"""
QUANTIZED_VALUES = 1 << 18
ACCELERATOR_VALUES = 1 << 21  # a kernel takes some microseconds to start, whatever its size
_CHUNK_MULTIPLE = 4096
_FREE_SHARE = 0.75  # of an accelerator's free memory, at most, unless a limit is given


@dataclass(frozen=True)
class Budget:
    """The device, and how memory is used there: `bytes` of the host in all, by `workers` threads
    with chunks of `size`.

    `device_bytes` is the memory of an accelerator.
    """

    device: Device
    workers: int
    size: ChunkSize
    bytes: int
    device_bytes: int = 0


def fit_memory(
    plan: MergePlan,
    memory_bytes: int,
    device: Device,
    threads: int | None = None,
    device_memory: int | None = None,
    chunk_bytes: int | None = None,
    direct: bool = False,
    processes: int = 1,
    reducer: str = AVERAGE,
    cores: int | None = None,
) -> Budget:
    """The largest chunk (up to `chunk_bytes`, or a good size for reading) with which the plan keeps
    to `memory_bytes`.

    By `threads`, or as many as `cores` (default: those of the process) are worth: fewer, down to
    `FEW_THREADS`, before a chunk is less than a block (or `chunk_bytes`). So many
    `processes` divide `memory_bytes`. An accelerator keeps to `device_memory` bytes
    (default: 4 GiB, and at most three quarters of its free memory). Raises UsageError, with need
    and have, when not even a small chunk fits.
    """
    work = [WorkItem.whole(file, reducer=reducer) for file in plan.files]
    found_kinds = kinds.kinds_in(plan, work) or [kinds.SUMS]
    most = threads or default_threads(cores, all(kinds.is_native(kind, device) for kind in found_kinds))
    room = _Room(plan, device, found_kinds, memory_bytes, processes, device_memory)
    blocks = BLOCKS_OF_MANY if most > 2 and not device.is_accelerator else 1
    target = _good_size(plan, device, blocks, chunk_bytes, direct)
    block = target.elements if chunk_bytes else min(target.elements, BLOCK_ELEMENTS)
    for workers in range(most, 0, -1):
        fewest = (MIN_CHUNK_ELEMENTS,) * 2 if threads or workers <= FEW_THREADS else (block, QUANTIZED_VALUES)
        size = room.shrink(target, workers, *fewest)
        memory = room.need(workers, size)
        if room.has(memory):
            return Budget(device, workers, size, memory.host, memory.device)
    raise room.too_small(_resized(target, MIN_CHUNK_ELEMENTS, MIN_CHUNK_ELEMENTS), device_memory is not None)


class _Room:
    """The memory that the reducers of a plan share."""

    def __init__(
        self, plan: MergePlan, device: Device, found: Sequence[str], memory_bytes: int, processes: int, device_memory: int | None
    ) -> None:
        if device.is_accelerator and device_memory is None:
            device_memory = min(DEFAULT_DEVICE_BYTES, int(device.free_bytes() * _FREE_SHARE))
        self._plan = plan
        self._device = device
        self._kinds = found
        self._bytes = memory_bytes
        self._processes = processes
        self._device_bytes = device_memory

    def need(self, workers: int, size: ChunkSize) -> Memory:
        """The memory of so many workers."""
        one = Memory(0)
        for kind in self._kinds:
            one = one.plus(kinds.class_of(kind, self._device).memory(self._plan, size, self._device))
        return Memory(workers * one.host, workers * one.device)

    def has(self, memory: Memory) -> bool:
        """Whether so much is there."""
        on_device = self._device_bytes is None or memory.device <= self._device_bytes
        return on_device and memory.host * self._processes <= self._bytes

    def shrink(self, size: ChunkSize, workers: int, fewest_elements: int, fewest_values: int) -> ChunkSize:
        """`size`, halved until `workers` of it fit or it is the smallest: first the inputs that are
        uploaded at once, then the chunk.
        """
        while not self.has(self.need(workers, size)):
            if size.together > 1:
                size = size._replace(together=size.together // 2)
            elif size.elements > fewest_elements or size.values > fewest_values:
                half = size.elements // 2 // _CHUNK_MULTIPLE * _CHUNK_MULTIPLE
                size = _resized(size, max(fewest_elements, half), max(fewest_values, size.values // 2))
            else:
                break
        return size

    def too_small(self, smallest: ChunkSize, is_given: bool) -> UsageError:
        """The error that not even one worker with chunks of `smallest` fits; `is_given`: by
        --device-memory.
        """
        least = self.need(1, smallest)
        option, found, expected, hint = "--memory", self._bytes, least.host * self._processes, ""
        if self._device_bytes is not None and expected <= self._bytes:
            option, found, expected, hint = "--device-memory", self._device_bytes, least.device, ", or --device cpu"
        hint = f"{option} {-(-expected >> 20) + 1}MiB{hint}"
        if option == "--device-memory" and not is_given:
            option, hint = f"the free memory of {self._device.name}", "--device cpu  gives the same bytes"
        return UsageError(
            f"{option} is too small to average {len(self._plan.inputs)} checkpoints",
            details=[f"found     {found} bytes", f"expected  at least {expected} bytes"],
            hint=hint,
        )


def _good_size(plan: MergePlan, device: Device, blocks: int, chunk_bytes: int | None, direct: bool) -> ChunkSize:
    """The size of chunks where memory does not matter, in `blocks` blocks on the CPU."""
    plain = [extent for file in plan.files for extent in file.extents if isinstance(extent, Extent)]
    dtypes = {dtype for extent in plain for dtype in (extent.dtype, *extent.value_dtypes)}
    item_bytes = max((DTYPES[dtype].bits for dtype in dtypes), default=16) // 8
    longest = max((extent.num_elements for extent in plain), default=1)
    wanted = chunk_bytes or _good_chunk_bytes(plan, device, blocks * BLOCK_ELEMENTS * item_bytes, direct)
    elements = max(1, min(wanted // item_bytes // _CHUNK_MULTIPLE, -(-longest // _CHUNK_MULTIPLE))) * _CHUNK_MULTIPLE
    slack_bytes = 2 * DIRECT_BLOCK_BYTES if direct else 0
    if not device.is_accelerator:
        return ChunkSize(elements, elements * item_bytes, blocks * QUANTIZED_VALUES, slack_bytes)
    together = min(len(plan.inputs), max(1, STAGE_BYTES // (elements * item_bytes + slack_bytes)))
    return ChunkSize(elements, elements * item_bytes, ACCELERATOR_VALUES, slack_bytes, together)


def _resized(size: ChunkSize, elements: int, values: int) -> ChunkSize:
    """A chunk of `elements` of the same width, whose inputs are uploaded one at a time."""
    return ChunkSize(elements, elements * size.item_bytes, values, size.slack_bytes)


def default_threads(cores: int | None, is_native: bool) -> int:
    """One a core, of `cores` or of those that the process may use; of these at least two, so that
    one may wait for the disk. At most `PYTHON_THREADS` unless chunks are calls of the kernel.
    """
    found = cores or max(2, len(os.sched_getaffinity(0)))
    return found if is_native else min(found, PYTHON_THREADS)


def _good_chunk_bytes(plan: MergePlan, device: Device, block_bytes: int, direct: bool) -> int:
    """`block_bytes` where the data is local, so that it is still in the cache when it is added up;
    else a large request, and a larger one for an accelerator.
    """
    if device.is_accelerator:
        return ACCELERATOR_CHUNK_BYTES
    return LARGE_REQUEST_BYTES if direct or not are_local(plan) else block_bytes
