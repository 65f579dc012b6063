"""How a plan fits into memory: how many threads, and chunks of what size. Reducers state their
memory; this adds it up.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from merge_cli.engine.chunk import ChunkSize, Memory
from merge_cli.engine.reducers import kinds
from merge_cli.engine.storage import LARGE_REQUEST_BYTES, are_local
from merge_cli.errors import UsageError
from merge_cli.formats.safetensors import DTYPES
from merge_cli.planning.plan import AVERAGE, Extent, MergePlan, WorkItem
from merge_cli.stores.local import DIRECT_BLOCK_BYTES

if TYPE_CHECKING:
    from merge_cli.engine.device import Device

DEFAULT_DEVICE_BYTES = 2 << 30
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
    (default: 2 GiB, and at most three quarters of its free memory). Raises UsageError, with need
    and have, when not even a small chunk fits.
    """
    work = [WorkItem.whole(file, reducer=reducer) for file in plan.files]
    found_kinds = kinds.kinds_in(plan, work) or [kinds.SUMS]
    plain = [extent for file in plan.files for extent in file.extents if isinstance(extent, Extent)]
    dtypes = {dtype for extent in plain for dtype in (extent.dtype, *extent.value_dtypes)}
    item_bytes = max((DTYPES[dtype].bits for dtype in dtypes), default=16) // 8
    longest = max((extent.num_elements for extent in plain), default=1)
    most = threads or default_threads(cores, all(kinds.is_native(kind, device) for kind in found_kinds))
    blocks = BLOCKS_OF_MANY if most > 2 and not device.is_accelerator else 1
    wanted = chunk_bytes or _good_chunk_bytes(plan, device, blocks * BLOCK_ELEMENTS * item_bytes, direct)
    target = max(1, min(wanted // item_bytes // _CHUNK_MULTIPLE, -(-longest // _CHUNK_MULTIPLE))) * _CHUNK_MULTIPLE
    slack_bytes = 2 * DIRECT_BLOCK_BYTES if direct else 0
    is_given = device_memory is not None
    if device.is_accelerator and device_memory is None:
        device_memory = min(DEFAULT_DEVICE_BYTES, int(device.free_bytes() * _FREE_SHARE))

    def size_of(elements: int, values: int) -> ChunkSize:
        return ChunkSize(elements, elements * item_bytes, values, slack_bytes)

    def need(workers: int, size: ChunkSize) -> Memory:
        one = Memory(0)
        for kind in found_kinds:
            one = one.plus(kinds.class_of(kind, device).memory(plan, size, device))
        return Memory(workers * one.host, workers * one.device)

    def fits(memory: Memory) -> bool:
        return memory.host * processes <= memory_bytes and (device_memory is None or memory.device <= device_memory)

    block = (target if chunk_bytes else min(target, BLOCK_ELEMENTS), QUANTIZED_VALUES)
    for workers in range(most, 0, -1):
        fewest_elements, fewest_values = (MIN_CHUNK_ELEMENTS,) * 2 if threads or workers <= FEW_THREADS else block
        size = size_of(target, ACCELERATOR_VALUES if device.is_accelerator else blocks * QUANTIZED_VALUES)
        while not fits(need(workers, size)) and (size.elements > fewest_elements or size.values > fewest_values):
            half = size.elements // 2 // _CHUNK_MULTIPLE * _CHUNK_MULTIPLE
            size = size_of(max(fewest_elements, half), max(fewest_values, size.values // 2))
        memory = need(workers, size)
        if fits(memory):
            return Budget(device, workers, size, memory.host, memory.device)
    least = need(1, size_of(MIN_CHUNK_ELEMENTS, MIN_CHUNK_ELEMENTS))
    too_small, found, expected, hint = "--memory", memory_bytes, least.host * processes, ""
    if device_memory is not None and expected <= memory_bytes:
        too_small, found, expected, hint = "--device-memory", device_memory, least.device, ", or --device cpu"
    hint = f"{too_small} {-(-expected >> 20) + 1}MiB{hint}"
    if too_small == "--device-memory" and not is_given:
        too_small, hint = f"the free memory of {device.name}", "--device cpu  gives the same bytes"
    raise UsageError(
        f"{too_small} is too small to average {len(plan.inputs)} checkpoints",
        details=[
            f"found     {found} bytes",
            f"expected  at least {expected} bytes",
        ],
        hint=hint,
    )


def default_threads(cores: int | None, is_native: bool) -> int:
    """One a core, of `cores` or of those that the process may use; of these at least two, so that
    one may wait for the disk. At most `PYTHON_THREADS` unless chunks are calls of the kernel.
    """
    found = cores or max(2, len(os.sched_getaffinity(0)))
    return found if is_native else min(found, PYTHON_THREADS)


def _good_chunk_bytes(plan: MergePlan, device: Device, block_bytes: int, direct: bool) -> int:
    """`block_bytes` where the data is local, so that it is still in the cache when it is added up;
    else a large request.
    """
    if direct or device.is_accelerator or not are_local(plan):
        return LARGE_REQUEST_BYTES
    return block_bytes
