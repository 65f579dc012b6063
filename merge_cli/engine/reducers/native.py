"""Weighted sums of plain tensors on the CPU by the native kernel: one call for a chunk, without
torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from merge_cli.engine.buffers import HostBuffer, page_aligned
from merge_cli.engine.chunk import Chunk, ChunkSize, Memory, Reduced
from merge_cli.engine.device import Device
from merge_cli.engine.kernels.native import Job, Kernel, load
from merge_cli.engine.nonfinite import count_nonfinite, describe_nonfinite
from merge_cli.engine.reads import Reads
from merge_cli.formats.safetensors import DTYPES
from merge_cli.planning.extent import Extent
from merge_cli.planning.plan import MergePlan

_MOST_JOBS = 64


class NativeReducer:
    """One worker's reducer of plain tensors: a buffer for each input and each output."""

    depth = 0

    def __init__(self, plan: MergePlan, size: ChunkSize, device: Device, reads: Reads) -> None:
        kernel = load()
        assert kernel is not None
        self._plan = plan
        self._reads = reads
        self._kernel: Kernel = kernel
        self._inputs = [page_aligned(size.num_bytes + size.slack_bytes) for _ in plan.inputs]
        self._outputs = [page_aligned(size.num_bytes) for _ in plan.outputs]
        self._jobs: dict[object, Job] = {}
        self._chunk: Chunk | None = None

    def start(self, chunk: Chunk) -> None:
        self._chunk = chunk

    def finish(self) -> Iterator[Reduced]:
        chunk = self._chunk
        assert chunk is not None and isinstance(chunk.extent, Extent)
        extent, outputs, first, end = chunk.extent, chunk.item.outputs, chunk.first, chunk.end
        job = self._job(extent, outputs)
        for i in job.inputs:
            self._reads.elements(extent.sources[i], first, end, self._inputs[i])
        inputs = [buffer.address + buffer.begin for buffer in self._inputs]
        bad = job.run(inputs, [self._outputs[k].address for k in outputs], end - first)
        nonfinite = self._nonfinite(extent, first, end, [outputs[i] for i in bad]) if bad else {}
        offset, size = extent.byte_at(first), extent.bytes_written(first, end)
        yield Reduced(chunk, {k: [(offset, self._outputs[k].data(size))] for k in outputs}, nonfinite)

    def _job(self, extent: Extent, outputs: tuple[int, ...]) -> Job:
        """The sums of these outputs, prepared once for all extents of the same dtypes."""
        key = (extent.value_dtypes, extent.dtype, outputs)
        job = self._jobs.get(key)
        if job is None:
            if len(self._jobs) >= _MOST_JOBS:
                self._jobs.clear()
            operations = [self._plan.operation(extent, k) for k in outputs]
            dtypes = [extent.dtype] * len(outputs)
            job = self._jobs[key] = self._kernel.prepare(extent.value_dtypes, operations, dtypes)
        return job

    def _nonfinite(self, extent: Extent, first: int, end: int, outputs: Sequence[int]) -> Mapping[int, Mapping[str, int]]:
        """Raise NonFiniteError, or count the elements; the kernel gives every NaN the same bits."""
        if not self._plan.spec.allow_nonfinite:
            operations = {k: self._plan.operation(extent, k) for k in outputs}
            raise describe_nonfinite(self._inputs, self._outputs, extent, first, end, operations, self._find)
        return {k: count_nonfinite(self._outputs[k], extent, first, end, self._find) for k in outputs}

    def _find(self, buffer: HostBuffer, dtype: str, first: int, end: int) -> list[int]:
        address = buffer.address + buffer.begin + DTYPES[dtype].num_bytes(first)
        _, positions = self._kernel.find_nonfinite(dtype, address, end - first, end - first)
        return [first + position for position in positions]

    def close(self) -> None:
        pass

    @classmethod
    def memory(cls, plan: MergePlan, size: ChunkSize, device: Device) -> Memory:
        """A buffer for each input and output."""
        return Memory((len(plan.inputs) + len(plan.outputs)) * size.num_bytes + len(plan.inputs) * size.slack_bytes)
