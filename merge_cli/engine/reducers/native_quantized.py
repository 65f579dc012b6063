"""Averages of quantized tensors, written as plain values, by the native kernel: decoded inside its
tile, without torch.

One chunk is whole rows. Of each quantized input only the bytes of its parts are held, so memory
grows with the number of inputs, but by the width of codes rather than of values.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping, Sequence

from merge_cli.engine.buffers import HostBuffer, page_aligned
from merge_cli.engine.chunk import Chunk, ChunkSize, Memory, Reduced
from merge_cli.engine.device import Device
from merge_cli.engine.kernels.layouts import DECODED, Layout, layout_of
from merge_cli.engine.kernels.native import Job, Kernel, Parts, load
from merge_cli.engine.nonfinite import nonfinite_error
from merge_cli.engine.reads import Reads
from merge_cli.formats.quantization.integer import Integer
from merge_cli.formats.safetensors import DTYPES
from merge_cli.planning.plan import Location, MergePlan, PartLocation, QuantizedExtent, QuantizedSource

_ROLES = ("codes", "scale", "zero", "global_scale")
"""Of `Parts`, in their order."""
_VALUES = ""


def can_decode(extent: QuantizedExtent) -> bool:
    """Whether the kernel can make all of this extent: every input decoded, the output plain."""
    if extent.codec is not None or 0 in extent.shape:
        return False
    return all(isinstance(source, Location) or isinstance(source.codec, DECODED) for source in extent.sources.firsts)


class NativeQuantizedReducer:
    """One worker's reducer of quantized tensors whose averages are plain values."""

    depth = 0

    def __init__(self, plan: MergePlan, size: ChunkSize, device: Device, reads: Reads) -> None:
        kernel = load()
        assert kernel is not None
        self._plan = plan
        self._reads = reads
        self._slack_bytes = size.slack_bytes
        self._kernel: Kernel = kernel
        self._buffers: dict[object, HostBuffer] = {}
        self._prepared_for: tuple[QuantizedExtent, tuple[int, ...], list[str | Layout], Job] | None = None
        self._chunk: Chunk | None = None

    def start(self, chunk: Chunk) -> None:
        self._chunk = chunk

    def finish(self) -> Iterator[Reduced]:
        chunk = self._chunk
        assert chunk is not None and isinstance(chunk.extent, QuantizedExtent)
        extent, outputs = chunk.extent, chunk.item.outputs
        count, dtype = (chunk.end - chunk.first) * extent.shape[-1], DTYPES[extent.dtype]
        layouts, job = self._prepared(extent, outputs)
        given = {i: self._read(i, extent.sources[i], extent.shape, chunk.first, chunk.end) for i in job.inputs}
        results = [self._buffer(("output", k), dtype.num_bytes(count)) for k in outputs]
        bad = job.run([given.get(i, 0) for i in range(len(layouts))], [buffer.address for buffer in results], count)
        nonfinite = {outputs[i]: {extent.key: self._count(extent, layouts, given, results[i], count)} for i in bad}
        offset = extent.sinks[0].offset + dtype.num_bytes(chunk.first * extent.shape[-1])
        size = dtype.num_bytes(count)
        yield Reduced(chunk, {k: [(offset, results[i].data(size))] for i, k in enumerate(outputs)}, nonfinite)

    def _prepared(self, extent: QuantizedExtent, outputs: tuple[int, ...]) -> tuple[list[str | Layout], Job]:
        """How each input is stored, and the sums of these outputs; kept for the next chunk of the
        same tensor.
        """
        if self._prepared_for is None or self._prepared_for[0] is not extent or self._prepared_for[1] != outputs:
            layouts = [
                source.dtype if isinstance(source, Location) else layout_of(source.codec, extent.shape) or ""
                for source in extent.sources
            ]
            operations = [self._plan.operation(extent, k) for k in outputs]
            job = self._kernel.prepare(layouts, operations, [extent.dtype] * len(outputs))
            self._prepared_for = (extent, outputs, layouts, job)
        return self._prepared_for[2:]

    def _read(self, i: int, source: Location | QuantizedSource, shape: tuple[int, ...], first: int, end: int) -> int | Parts:
        """The address of the values of one input, or of its parts."""
        if isinstance(source, Location):
            dtype = DTYPES[source.dtype]
            begin, stop = dtype.num_bytes(first * shape[-1]), dtype.num_bytes(end * shape[-1])
            return self._fill((i, _VALUES), source, begin, stop, dtype.item_bytes)
        found = {
            part.role: self._fill((i, part.role), part, *source.codec.part_range(part.role, shape, first, end))
            for part in source.parts
        }
        if "shape" in found and isinstance(source.codec, Integer):
            begin, stop = source.codec.part_range("shape", shape, first, end)
            source.codec.check_stored_shape(bytes(self._buffers[i, "shape"].data(stop - begin)), shape)
        codes, scale, zero, global_scale = (found.get(role, 0) for role in _ROLES)
        return Parts(codes, scale, zero, global_scale, first)

    def _fill(self, key: object, place: Location | PartLocation, begin: int, end: int, item_bytes: int = 1) -> int:
        buffer = self._buffer(key, end - begin + self._slack_bytes)
        self._reads.part(place, begin, end, buffer, item_bytes)
        return buffer.address + buffer.begin

    def _buffer(self, key: object, num_bytes: int) -> HostBuffer:
        """A buffer that is kept, and made anew when it is too small."""
        buffer = self._buffers.get(key)
        if buffer is None or len(buffer.memory) < num_bytes:
            buffer = self._buffers[key] = page_aligned(num_bytes)
        return buffer

    def _count(
        self,
        extent: QuantizedExtent,
        layouts: Sequence[str | Layout],
        given: Mapping[int, int | Parts],
        result: HostBuffer,
        count: int,
    ) -> int:
        """The elements of a result that are NaN or infinite. Raises NonFiniteError unless that is
        allowed.
        """
        if self._plan.spec.allow_nonfinite:
            return self._kernel.find_nonfinite(extent.dtype, result.address, count)[0]
        by_file = {}
        for i, source in enumerate(extent.sources):
            file = source.parts[0].file if isinstance(source, QuantizedSource) else source.file
            bad = self._kernel.find_nonfinite(layouts[i], given[i], count)[0] if i in given else 0
            if bad:
                by_file[file.path] = bad
        raise nonfinite_error(extent.key, extent.dtype, by_file)

    def close(self) -> None:
        pass

    @classmethod
    def memory(cls, plan: MergePlan, size: ChunkSize, device: Device) -> Memory:
        """The parts of every input, or values of 8 bytes at most, and the outputs, of the largest
        chunk.
        """
        largest = 0
        seen: set[object] = set()
        for file in plan.files:
            for extent in file.extents:
                if not isinstance(extent, QuantizedExtent) or extent.codec is not None or extent.shape in seen:
                    continue
                seen.add(extent.shape)
                rows = extent.rows_at_once(size.values)
                share = rows / max(extent.num_rows, 1)
                read = sum(extent.source_bytes) * share
                largest = max(largest, int(read) + len(plan.outputs) * DTYPES[extent.dtype].num_bytes(rows * extent.shape[-1]))
        buffers = len(plan.inputs) * len(_ROLES) * (size.slack_bytes + mmap.PAGESIZE)
        return Memory(largest + buffers)
