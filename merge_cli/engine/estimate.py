"""How long a merge will take: the slower of moving its bytes to and from storage and of working on them.

    storage   (bytes read + bytes written) / R, both sharing one link
    work      (bytes read x READ + bytes written x WRITE) / cores

R is measured by reading a little, or given. The costs of a byte are measured figures of one core (docs/benchmarks.md): copying it
from the page cache and adding it up; hashing it and copying it to the page cache.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from merge_cli.engine.reader import InputFiles
from merge_cli.engine.reduce import accumulator_dtype, weighted_sum
from merge_cli.plan import CodedRun, MergePlan

READ_S_PER_BYTE = {"float32": 0.17e-9, "float64": 0.33e-9, "coded": 1.9e-9}
WRITE_S_PER_BYTE = 1.0e-9
SAMPLE_BYTES = 64 << 20


@dataclass(frozen=True)
class Estimate:
    """Seconds, what decides them ("storage" or "computing"), and the storage bandwidth (bytes/s) they rest on."""

    seconds: float
    bottleneck: str
    storage_bandwidth: float


def estimate(plan: MergePlan, storage_bandwidth: float | None = None, cores: int | None = None) -> Estimate:
    """Estimate the time of `plan` on the CPU; without `storage_bandwidth` (bytes/s) the first bytes of the newest input are timed.

    What is in the page cache already is read faster than the rest will be: give the bandwidth where you know it.
    """
    bandwidth = storage_bandwidth or measure_bandwidth(plan)
    cores = cores or len(os.sched_getaffinity(0))
    coded = sum(run.bytes_read for file in plan.files for run in file.runs if isinstance(run, CodedRun))
    operations = [weighted_sum(output.inputs, output.coefficients) for output in plan.outputs]
    plain = plan.bytes_to_read - coded
    work = plan.bytes_to_write * WRITE_S_PER_BYTE + coded * READ_S_PER_BYTE["coded"]
    for operation in operations:
        dtype = str(accumulator_dtype(plan.spec.accumulate, operation, ["BF16"], "BF16")).removeprefix("torch.")
        work += plain * READ_S_PER_BYTE[dtype]
    seconds = {"storage": (plan.bytes_to_read + plan.bytes_to_write) / bandwidth, "computing": work / cores}
    bottleneck = max(seconds, key=lambda name: seconds[name])
    return Estimate(seconds[bottleneck], bottleneck, bandwidth)


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
