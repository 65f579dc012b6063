"""How a plan fits into memory: how many threads, and chunks of what size."""

from __future__ import annotations

import os
from dataclasses import dataclass

from merge_cli.engine.device import CPU_BLOCK_ELEMENTS, Device
from merge_cli.engine.reducers.pipeline import ring_device_bytes, ring_host_bytes
from merge_cli.engine.reducers.quantized import ACCELERATOR_VALUES, TARGET_VALUES, bytes_for, host_bytes_for, largest_chunk
from merge_cli.engine.storage import LARGE_REQUEST_BYTES, are_local
from merge_cli.errors import UsageError
from merge_cli.formats.safetensors import DTYPES
from merge_cli.planning.plan import Extent, MergePlan, QuantizedExtent
from merge_cli.stores.local import DIRECT_BLOCK_BYTES

DEFAULT_MEMORY_BYTES = 2 << 30
DEFAULT_DEVICE_BYTES = 2 << 30
MIN_CHUNK_ELEMENTS = 4096
REDONE_ELEMENTS = 1 << 16
"""At once, on the CPU, of a chunk that an accelerator could not do."""
_CHUNK_MULTIPLE = 4096
_FREE_SHARE = 0.75  # of an accelerator's free memory, at most, where nothing is said


@dataclass(frozen=True)
class Budget:
    """How the memory is used: `bytes` in all, by `workers` threads with chunks of `chunk_elements` (at most `chunk_bytes`).

    Quantised tensors are taken in chunks of about `quantized_values` values. `device_bytes` are what an accelerator holds. With
    `slack_bytes` more in every input's buffer inputs are read with O_DIRECT, which takes whole blocks of the storage.
    """

    workers: int
    chunk_elements: int
    chunk_bytes: int
    bytes: int
    quantized_values: int = TARGET_VALUES
    device_bytes: int = 0
    slack_bytes: int = 0


def fit_memory(
    plan: MergePlan,
    memory_bytes: int,
    device: Device,
    threads: int | None = None,
    device_memory: int | None = None,
    chunk_bytes: int | None = None,
    direct: bool = False,
    processes: int = 1,
) -> Budget:
    """The largest chunk (up to `chunk_bytes`, or a good size for reading) with which the plan keeps to `memory_bytes`.

    So many `processes` divide `memory_bytes`. An accelerator keeps to `device_memory` bytes (default: 2 GiB, and at most three
    quarters of what is free).
    Raises UsageError, with need and have, when not even a small chunk fits.
    """
    plain = [extent for file in plan.files for extent in file.extents if isinstance(extent, Extent)]
    coded = [extent for file in plan.files for extent in file.extents if isinstance(extent, QuantizedExtent)]
    dtypes = {dtype for extent in plain for dtype in (extent.dtype, *(source.dtype for source in extent.sources))}
    item_bytes = max((DTYPES[dtype].bits for dtype in dtypes), default=16) // 8
    buffers = len(plan.inputs) + len(plan.outputs)
    longest = max((extent.num_elements for extent in plain), default=1)
    wanted = chunk_bytes or _good_chunk_bytes(plan, device, item_bytes, direct)
    target = max(1, min(wanted // item_bytes // _CHUNK_MULTIPLE, -(-longest // _CHUNK_MULTIPLE))) * _CHUNK_MULTIPLE
    slack_bytes = 2 * DIRECT_BLOCK_BYTES if direct else 0
    is_given = device_memory is not None
    if device.is_accelerator and device_memory is None:
        device_memory = min(DEFAULT_DEVICE_BYTES, int(device.free_bytes() * _FREE_SHARE))

    def need(workers: int, chunk_elements: int, quantized_values: int) -> int:
        bytes_of_rows = host_bytes_for if device.is_accelerator else bytes_for
        rows = bytes_of_rows(largest_chunk(coded, quantized_values), len(plan.outputs), slack_bytes if coded else 0)
        lane_elements = min(REDONE_ELEMENTS, chunk_elements) if device.is_accelerator else chunk_elements
        lane = buffers * lane_elements * item_bytes + device.scratch_bytes(lane_elements, len(plan.inputs), len(plan.outputs))
        lane += len(plan.inputs) * slack_bytes
        ring = ring_host_bytes(len(plan.outputs), chunk_elements * item_bytes, slack_bytes) if device.is_accelerator else 0
        return workers * (lane + ring + rows)

    def need_of_device(workers: int, chunk_elements: int, quantized_values: int) -> int:
        rows = bytes_for(largest_chunk(coded, quantized_values), len(plan.outputs))
        return workers * (ring_device_bytes(len(plan.outputs), chunk_elements, chunk_elements * item_bytes) + rows)

    def fits(*size: int) -> bool:
        return need(*size) * processes <= memory_bytes and (device_memory is None or need_of_device(*size) <= device_memory)

    for workers in range(threads or max(2, min(8, len(os.sched_getaffinity(0)))), 0, -1):
        chunk, values = target, ACCELERATOR_VALUES if device.is_accelerator else TARGET_VALUES
        while not fits(workers, chunk, values) and (chunk > MIN_CHUNK_ELEMENTS or values > MIN_CHUNK_ELEMENTS):
            chunk = max(MIN_CHUNK_ELEMENTS, chunk // 2 // _CHUNK_MULTIPLE * _CHUNK_MULTIPLE)
            values = max(MIN_CHUNK_ELEMENTS, values // 2)
        if fits(workers, chunk, values):
            on_device = need_of_device(workers, chunk, values) if device.is_accelerator else 0
            return Budget(workers, chunk, chunk * item_bytes, need(workers, chunk, values), values, on_device, slack_bytes)
    least = (1, MIN_CHUNK_ELEMENTS, MIN_CHUNK_ELEMENTS)
    too_small, found, expected, hint = "--memory", memory_bytes, need(*least) * processes, ""
    if device_memory is not None and expected <= memory_bytes:
        too_small, found, expected, hint = "--device-memory", device_memory, need_of_device(*least), ", or --device cpu"
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


def _good_chunk_bytes(plan: MergePlan, device: Device, item_bytes: int, direct: bool) -> int:
    """A block of the sums where the data is local, so that it is still in the cache when it is added up; else a large request.

    From memory, 4 x 1.7 GB in bf16, that takes a tenth less CPU time than large chunks (docs/benchmarks.md).
    """
    if direct or device.is_accelerator or not are_local(plan):
        return LARGE_REQUEST_BYTES
    return CPU_BLOCK_ELEMENTS * item_bytes
