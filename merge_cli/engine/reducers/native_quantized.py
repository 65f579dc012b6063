"""Sums of quantized tensors by the native kernel, decoded inside its tile, without torch; written
as plain values, or encoded again by `quantized.py`.

One chunk is whole rows. Of each quantized input only the bytes of its parts are held, so memory
grows with the number of inputs, but by the width of codes rather than of values.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator, Mapping

from merge_cli.engine.buffers import HostBuffer, page_aligned
from merge_cli.engine.chunk import Chunk, ChunkSize, Memory, Reduced
from merge_cli.engine.device import Device
from merge_cli.engine.kernels.layouts import DECODED, Layout, layout_of
from merge_cli.engine.kernels.native import Job, Kernel, Parts, load
from merge_cli.engine.nonfinite import nonfinite_error
from merge_cli.engine.reads import Reads
from merge_cli.errors import NonFiniteError
from merge_cli.formats.quantization.integer import Integer
from merge_cli.formats.safetensors import DTYPES
from merge_cli.planning.extent import Location, PartLocation, QuantizedExtent, QuantizedSource
from merge_cli.planning.plan import MergePlan
from merge_cli.planning.sums import WeightedSum

_ROLES = ("codes", "scale", "zero", "global_scale")
"""Of `Parts`, in their order."""
_VALUES = ""

Operations = Mapping[int, WeightedSum]


def can_decode(extent: QuantizedExtent) -> bool:
    """Whether the kernel can make all of this extent: every input decoded, the output plain."""
    return extent.codec is None and can_sum(extent)


def can_sum(extent: QuantizedExtent) -> bool:
    """Whether the kernel decodes every input of this extent."""
    sources = extent.sources.firsts
    return 0 not in extent.shape and all(isinstance(each, Location) or isinstance(each.codec, DECODED) for each in sources)


class DecodedSums:
    """Sums of rows of tensors that the kernel decodes, in buffers of its own that the next rows use
    again.

    After `reduce`, `given` has the address of the values of each input, or of its parts.
    """

    def __init__(self, reads: Reads, slack_bytes: int) -> None:
        kernel = load()
        assert kernel is not None
        self._kernel: Kernel = kernel
        self._reads = reads
        self._slack_bytes = slack_bytes
        self._buffers: dict[object, HostBuffer] = {}
        self._prepared_for: tuple[QuantizedExtent, Operations, str, list[str | Layout], Job] | None = None
        self.given: dict[int, int | Parts] = {}

    def reduce(
        self, extent: QuantizedExtent, operations: Operations, dtype: str, first: int, end: int
    ) -> tuple[dict[int, HostBuffer], list[int]]:
        """The sums of rows `first` to `end` rounded to `dtype`, and those of which a value is NaN
        or infinite.
        """
        count = (end - first) * extent.shape[-1]
        layouts, job = self._prepared(extent, operations, dtype)
        self.given = {i: self._read(i, extent.sources[i], extent.shape, first, end) for i in job.inputs}
        results = {k: self._buffer(("output", k), DTYPES[dtype].num_bytes(count)) for k in operations}
        given = [self.given.get(i, 0) for i in range(len(layouts))]
        bad = job.run(given, [buffer.address for buffer in results.values()], count)
        return results, [list(operations)[i] for i in bad]

    def parts(self, extent: QuantizedExtent, i: int, first: int, end: int) -> dict[str, tuple[HostBuffer, int]]:
        """The parts of input `i`, read unless `reduce` has read them: buffers, and bytes in them."""
        source = extent.sources[i]
        if isinstance(source, Location):
            return {}
        if i not in self.given:
            self._read(i, source, extent.shape, first, end)
        ranges = {part.role: source.codec.part_range(part.role, extent.shape, first, end) for part in source.parts}
        return {role: (self._buffers[i, role], stop - begin) for role, (begin, stop) in ranges.items()}

    def count_nonfinite(self, dtype: str, result: HostBuffer, count: int) -> int:
        """The elements of a result that are NaN or infinite."""
        return self._kernel.find_nonfinite(dtype, result.address, count)[0]

    def error(self, extent: QuantizedExtent, count: int) -> NonFiniteError:
        """Which inputs of the last rows have NaN or Inf, or that the result overflows."""
        assert self._prepared_for is not None
        by_file = {}
        for i, given in self.given.items():
            source = extent.sources[i]
            file = source.parts[0].file if isinstance(source, QuantizedSource) else source.file
            bad = self._kernel.find_nonfinite(self._prepared_for[3][i], given, count)[0]
            if bad:
                by_file[file.path] = bad
        return nonfinite_error(extent.key, extent.dtype or "float32", by_file, may_continue=extent.codec is None)

    def _prepared(self, extent: QuantizedExtent, operations: Operations, dtype: str) -> tuple[list[str | Layout], Job]:
        """How each input is stored, and the job of these sums; kept for the next rows of the same
        tensor.
        """
        if self._prepared_for is None or self._prepared_for[0] is not extent or self._prepared_for[1:3] != (operations, dtype):
            layouts = [
                source.dtype if isinstance(source, Location) else layout_of(source.codec, extent.shape) or ""
                for source in extent.sources
            ]
            job = self._kernel.prepare(layouts, list(operations.values()), [dtype] * len(operations))
            self._prepared_for = (extent, operations, dtype, layouts, job)
        return self._prepared_for[3:]

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


def decoded_bytes(extents: Iterable[QuantizedExtent], size: ChunkSize, output_bytes: int) -> int:
    """The memory of a `DecodedSums` for these extents: the parts of every input, or values of 8
    bytes at most, and `output_bytes` a value for the outputs, of the largest chunk.
    """
    largest = most = 0
    seen: set[object] = set()
    for extent in extents:
        if extent.shape in seen:
            continue
        seen.add(extent.shape)
        rows = extent.rows_at_once(size.values)
        read = sum(extent.source_bytes) * rows / max(extent.num_rows, 1)
        largest = max(largest, int(read) + rows * extent.shape[-1] * output_bytes)
        most = max(most, len(extent.sources))
    return largest + most * len(_ROLES) * (size.slack_bytes + mmap.PAGESIZE)


class NativeQuantizedReducer:
    """One worker's reducer of quantized tensors whose averages are plain values."""

    depth = 0

    def __init__(self, plan: MergePlan, size: ChunkSize, device: Device, reads: Reads) -> None:
        self._plan = plan
        self._sums = DecodedSums(reads, size.slack_bytes)
        self._chunk: Chunk | None = None

    def start(self, chunk: Chunk) -> None:
        self._chunk = chunk

    def finish(self) -> Iterator[Reduced]:
        chunk = self._chunk
        assert chunk is not None and isinstance(chunk.extent, QuantizedExtent)
        extent, dtype = chunk.extent, DTYPES[chunk.extent.dtype]
        count = (chunk.end - chunk.first) * extent.shape[-1]
        operations = {k: self._plan.operation(extent, k) for k in chunk.item.outputs}
        results, bad = self._sums.reduce(extent, operations, extent.dtype, chunk.first, chunk.end)
        if bad and not self._plan.spec.allow_nonfinite:
            raise self._sums.error(extent, count)
        nonfinite = {k: {extent.key: self._sums.count_nonfinite(extent.dtype, results[k], count)} for k in bad}
        offset, size = extent.sinks[0].offset + dtype.num_bytes(chunk.first * extent.shape[-1]), dtype.num_bytes(count)
        yield Reduced(chunk, {k: [(offset, result.data(size))] for k, result in results.items()}, nonfinite)

    def close(self) -> None:
        pass

    @classmethod
    def memory(cls, plan: MergePlan, size: ChunkSize, device: Device) -> Memory:
        quantized = (extent for file in plan.files for extent in file.extents if isinstance(extent, QuantizedExtent))
        plain = [extent for extent in quantized if extent.codec is None]
        output_bytes = max((DTYPES[extent.dtype].item_bytes for extent in plain), default=0)
        return Memory(decoded_bytes(plain, size, len(plan.outputs) * output_bytes))
