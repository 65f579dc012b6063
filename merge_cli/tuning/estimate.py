"""How long a merge will take: the slowest of what its bytes pass through.

    storage   (bytes read + bytes written) / R, both sharing one link
    work      (bytes read x COPY + values read x SUM + bytes written x WRITE) / cores; no SUM on a GPU
    PCIe      bytes read / P, on a GPU; results come back in the other direction
    memory    (bytes read x 4 + bytes written x 5) / M: into the page cache, out of it (two), to the sum; or as many and the sha256

R is measured by reading a little, or given; P is measured. M counts only where given (`parts_of`):
no short measurement by one thread shows what the memory of a machine can do. The costs are those of
one core (docs/benchmarks.md has their source): copying a byte out of the page cache, widening or
decoding a value and adding it to a sum, hashing a byte and copying it to the page cache. What a GPU
itself does takes a tenth of PCIe's time or less, and is left out; so is encoding.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from merge_cli.engine.device import Device
from merge_cli.engine.reader import InputFiles
from merge_cli.engine.reducers import kinds
from merge_cli.planning.plan import AVERAGE, MergePlan
from merge_cli.planning.sums import weighted_sum

COPY_S_PER_BYTE = 0.24e-9
WRITE_S_PER_BYTE = 1.07e-9
SUM_S_PER_VALUE = {
    "torch": {"F32": 0.73e-9, "F64": 3.23e-9, "quantized": 3.83e-9},
    "base": {"F32": 0.38e-9, "F64": 0.75e-9, "quantized": 1.60e-9},
    "v3": {"F32": 0.20e-9, "F64": 0.41e-9, "quantized": 0.81e-9},
    "v4": {"F32": 0.15e-9, "F64": 0.26e-9, "quantized": 0.48e-9},
}
"""By kernel: bf16 summed in a dtype, and values decoded from blocks of FP8."""
MEMORY_PASSES = {"read": 4, "written": 5}
SAMPLE_BYTES = 64 << 20


@dataclass(frozen=True)
class Estimate:
    """Seconds, the part that decides them, the storage bandwidth (bytes/s) that they rest on, and
    the seconds of all parts.
    """

    seconds: float
    bottleneck: str
    storage_bandwidth: float
    parts: Mapping[str, float]


def parts_of(
    bytes_read: float,
    bytes_written: float,
    read_s: float,
    *,
    storage_bandwidth: float,
    cores: int,
    pcie_bandwidth: float | None = None,
    memory_bandwidth: float | None = None,
) -> dict[str, float]:
    """The seconds that each part needs by itself; `read_s` is the work of one core on all that is
    read, bandwidths in bytes/s.
    """
    parts = {
        "storage": (bytes_read + bytes_written) / storage_bandwidth,
        "computing": (read_s + bytes_written * WRITE_S_PER_BYTE) / cores,
    }
    if pcie_bandwidth:
        parts["PCIe"] = bytes_read / pcie_bandwidth
    if memory_bandwidth:
        passes = bytes_read * MEMORY_PASSES["read"] + bytes_written * MEMORY_PASSES["written"]
        parts["memory"] = passes / memory_bandwidth
    return parts


def estimate(
    plan: MergePlan,
    storage_bandwidth: float | None = None,
    cores: int | None = None,
    device: Device = Device("cpu"),  # noqa: B008 (it is frozen)
    pcie_bandwidth: float | None = None,
) -> Estimate:
    """Estimate the time of `plan`; without `storage_bandwidth` (bytes/s) the first bytes of the
    newest input are timed.

    What is in the page cache already is read faster than the rest will be: give the bandwidth where
    you know it.
    """
    bandwidth = storage_bandwidth or measure_bandwidth(plan)
    read_s = plan.bytes_to_read * COPY_S_PER_BYTE
    if device.is_accelerator:
        pcie_bandwidth = pcie_bandwidth or measure_pcie(device)
    else:
        read_s += summing_s(plan, device)
    parts = parts_of(
        plan.bytes_to_read,
        plan.bytes_to_write,
        read_s,
        storage_bandwidth=bandwidth,
        cores=cores or len(os.sched_getaffinity(0)),
        pcie_bandwidth=pcie_bandwidth if device.is_accelerator else None,
    )
    bottleneck = max(parts, key=lambda name: parts[name])
    return Estimate(parts[bottleneck], bottleneck, bandwidth, parts)


def summing_s(plan: MergePlan, device: Device) -> float:
    """The seconds in which one core adds up all values of `plan`."""
    values: Counter[str] = Counter()
    for extent in (extent for file in plan.files for extent in file.extents):
        values[kinds.kind_of(extent, AVERAGE)] += extent.num_elements * len(extent.sources)
    del values[kinds.COPIES]
    seconds = 0.0
    for kind, count in values.items():
        costs = SUM_S_PER_VALUE[kinds.kernel_of(device) if kinds.is_native(kind, device) else "torch"]
        for output in plan.outputs:
            dtype = weighted_sum(output.inputs, output.coefficients, plan.spec.accumulate, ["BF16"], "BF16").dtype
            seconds += count * costs[dtype if kind == kinds.SUMS else "quantized"] * len(output.inputs) / len(plan.inputs)
    return seconds


def measure_pcie(device: Device) -> float:
    """Bytes per second from pinned memory to a CUDA device."""
    import torch

    host = torch.empty(SAMPLE_BYTES, dtype=torch.uint8, pin_memory=True)
    there = host.to(device.torch)
    torch.cuda.synchronize(device.torch)
    began = time.perf_counter()
    there.copy_(host, non_blocking=True)
    torch.cuda.synchronize(device.torch)
    return SAMPLE_BYTES / max(time.perf_counter() - began, 1e-9)


def measure_bandwidth(plan: MergePlan) -> float:
    """Bytes per second of reading the beginning of the largest file of the newest input."""
    file = max(plan.inputs[-1].files, key=lambda file: file.file_bytes)
    buffer = memoryview(bytearray(4 << 20))
    with InputFiles() as inputs:
        began, done = time.perf_counter(), 0
        while done < min(file.file_bytes, SAMPLE_BYTES):
            part = buffer[: min(len(buffer), file.file_bytes - done)]
            inputs.read_into(file, done, part)
            done += len(part)
    return max(done, 1) / max(time.perf_counter() - began, 1e-9)
