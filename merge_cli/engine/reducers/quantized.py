"""Tensors that are quantized in an input or in the output: decode, average, round or encode, some
rows at a time.

One input after the other is read, decoded to float32 and added, so memory does not depend on their
number: `BYTES_PER_VALUE` and 8 for each output, times the values of a chunk. The arithmetic is that
of `arithmetic.py`, the codecs are in `formats/quantization`.

On an accelerator all but the reading runs on a stream of the worker's own: parts are read into one
of two pinned buffers while the device decodes the one before. Rows for which the device has no
memory are halved, and halved again, before the CPU does them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from merge_cli.engine.arithmetic import add_term, divide, is_clean, store, torch_dtype
from merge_cli.engine.buffers import HostBuffer, elements, keep_freed_memory
from merge_cli.engine.chunk import Chunk, ChunkSize, Memory, Reduced
from merge_cli.engine.device import CPU, Device
from merge_cli.engine.kernels.native import load
from merge_cli.engine.nonfinite import nonfinite_error
from merge_cli.engine.reads import Reads
from merge_cli.engine.reducers.fallback import note_on_memory
from merge_cli.engine.reducers.native_quantized import DecodedSums, Operations, can_sum, decoded_bytes
from merge_cli.errors import NonFiniteError
from merge_cli.formats.quantization.error import Totals, combine_totals, error_totals
from merge_cli.formats.safetensors import DTYPES
from merge_cli.planning.extent import Location, PartLocation, QuantizedExtent, QuantizedSource
from merge_cli.planning.plan import MergePlan
from merge_cli.planning.sums import WeightedSum
from merge_cli.stores.local import DIRECT_BLOCK_BYTES

BYTES_PER_VALUE = 56  # bytes read, those of the base, float32, room for decode or encode, a temporary in float64
_PINNED_BYTES_PER_VALUE = 32  # two buffers for up to 8 bytes a value, rounded up to a power of two
_STATS_VALUES = 1 << 16
_MOST_SLACKS = 12  # eight parts are read into whole blocks of the storage, and are aligned to one

Parts = dict[str, Tensor]
Writes = dict[int, list[tuple[int, memoryview]]]


@dataclass
class Rows:
    """The outcome of some rows: as `Reduced`."""

    writes: Writes = field(default_factory=dict)
    nonfinite: dict[int, dict[str, int]] = field(default_factory=dict)
    errors: Totals | None = None


class QuantizedReducer:
    """One worker's reducer of quantized tensors. `notes` say so where the CPU did work of the
    device.
    """

    depth = 0

    def __init__(self, plan: MergePlan, size: ChunkSize, device: Device, reads: Reads) -> None:
        keep_freed_memory()
        self._plan = plan
        self._values = size.values
        self._device = device
        allow = plan.spec.allow_nonfinite
        self._first = QuantizedSums(device, reads, size.slack_bytes, allow)
        self._cpu = QuantizedSums(CPU, reads, size.slack_bytes, allow) if device.is_accelerator else self._first
        self._chunk: Chunk | None = None
        self.notes: list[str] = []

    def start(self, chunk: Chunk) -> None:
        self._chunk = chunk

    def finish(self) -> Iterator[Reduced]:
        chunk = self._chunk
        assert chunk is not None and isinstance(chunk.extent, QuantizedExtent)
        extent = chunk.extent
        operations = {k: self._plan.operation(extent, k) for k in chunk.item.outputs}
        stats = self._stats(extent, operations) if extent.needs_two_passes else {}
        for first, end in rows_of(extent, self._values, chunk.first, chunk.end) or [(chunk.first, chunk.end)]:
            for rows in self._rows(extent, first, end, operations, stats):
                yield Reduced(chunk, rows.writes, rows.nonfinite, errors=rows.errors)

    def _stats(self, extent: QuantizedExtent, operations: Operations) -> dict[int, Tensor]:
        try:
            return self._first.stats(extent, rows_of(extent, self._values), operations)
        except torch.OutOfMemoryError:
            self._note()
        return self._cpu.stats(extent, rows_of(extent, _STATS_VALUES), operations)

    def _rows(
        self, extent: QuantizedExtent, first: int, end: int, operations: Operations, stats: Mapping[int, Tensor]
    ) -> Iterator[Rows]:
        """Rows `first` to `end` in one part, or in halves of halves where the device is out of
        memory.
        """
        try:
            rows = self._first.reduce(extent, first, end, operations, stats)
        except torch.OutOfMemoryError:
            rows = None
        if rows is not None:
            yield rows
        elif end - first > extent.row_step:
            middle = first + max(1, (end - first) // 2 // extent.row_step) * extent.row_step
            yield from self._rows(extent, first, middle, operations, stats)
            yield from self._rows(extent, middle, end, operations, stats)
        else:
            self._note()
            yield self._cpu.reduce(extent, first, end, operations, stats)

    def _note(self) -> None:
        self.notes = [note_on_memory(self._device)]

    def close(self) -> None:
        pass

    @classmethod
    def memory(cls, plan: MergePlan, size: ChunkSize, device: Device) -> Memory:
        extents = [extent for file in plan.files for extent in file.extents if isinstance(extent, QuantizedExtent)]
        values, num_outputs = largest_chunk(extents, size.values), len(plan.outputs)
        work = values * (BYTES_PER_VALUE + 8 * num_outputs)
        if not device.is_accelerator:
            summed = [extent for extent in extents if extent.codec is not None and can_sum(extent)] if load() else []
            return Memory(work + _MOST_SLACKS * size.slack_bytes + decoded_bytes(summed, size, 4 * num_outputs))
        return Memory(values * (_PINNED_BYTES_PER_VALUE + 8 * num_outputs) + _MOST_SLACKS * size.slack_bytes, work)


class QuantizedSums:
    """Sums of rows of quantized tensors on one device. May raise torch.OutOfMemoryError; the same
    can be asked again.
    """

    def __init__(self, device: Device, reads: Reads, slack_bytes: int = 0, allow_nonfinite: bool = False) -> None:
        self._device = device
        self._reads = reads
        self._slack_bytes = slack_bytes
        self._allow_nonfinite = allow_nonfinite
        self._stream = device.stream()
        self._native = None if device.is_accelerator or load() is None else DecodedSums(reads, slack_bytes)

    def stats(self, extent: QuantizedExtent, chunks: Iterable[tuple[int, int]], operations: Operations) -> dict[int, Tensor]:
        """The facts about the whole tensor that its codec needs before it encodes any value, for
        each operation.
        """
        found: dict[int, Tensor] = {}
        assert extent.codec is not None
        with self._active():
            for first, end in chunks:
                sums, base = self._to_encode(extent, first, end, operations)
                for k, values in sums.items():
                    here = extent.codec.stats(values, extent.shape, first, end, base=base)
                    if here is not None:
                        found[k] = torch.maximum(found[k], here.cpu()) if k in found else here.cpu()
        return found

    def reduce(self, extent: QuantizedExtent, first: int, end: int, operations: Operations, stats: Mapping[int, Tensor]) -> Rows:
        """Rows `first` to `end` of every operation's output. Raises NonFiniteError."""
        rows = Rows()
        with self._active():
            if extent.codec is None:
                sums, _ = self._sums(extent, first, end, operations)
                for k, total in sums.items():
                    rounded = self._rounded(extent, operations[k], total, first, end)
                    rows.writes[k] = [self._plain(rows, k, extent, rounded, first, end)]
            else:
                sums, base = self._to_encode(extent, first, end, operations)
                for k, values in sums.items():
                    rows.writes[k] = self._encoded(rows, extent, values, first, end, stats.get(k), base)
        return rows

    def values(self, source: Location | QuantizedSource, shape: tuple[int, ...], first: int, end: int) -> tuple[Tensor, Parts]:
        """The values [count] of rows of one input, in float32 or as stored, and the parts they were
        decoded from.
        """
        if isinstance(source, Location):
            item_bytes = DTYPES[source.dtype].item_bytes
            row_bytes = item_bytes * shape[-1]
            data = self._read(source, first * row_bytes, end * row_bytes, item_bytes)
            return data.view(torch_dtype(source.dtype)), {}
        parts = {part.role: self._read(part, *source.codec.part_range(part.role, shape, first, end)) for part in source.parts}
        return source.codec.decode(parts, shape, first, end).reshape(-1), parts

    def _active(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else self._stream.active()

    def _sums(
        self, extent: QuantizedExtent, first: int, end: int, operations: Operations
    ) -> tuple[dict[int, Tensor], Parts | None]:
        """The weighted sums [values], and the base's own parts where the output is quantized like
        it.
        """
        count = (end - first) * extent.shape[-1]
        device = self._device.torch
        sums = {k: torch.empty(count, dtype=torch_dtype(each.dtype), device=device) for k, each in operations.items()}
        base: Parts | None = None
        for i, source in enumerate(extent.sources):
            users = {k: each for k, each in operations.items() if i in each.inputs}
            is_base = extent.codec is not None and i == extent.base
            if not users and not is_base:
                continue
            values, parts = self.values(source, extent.shape, first, end)
            base = parts if is_base else base
            wide = {dtype: values.to(torch_dtype(dtype)) for dtype in {each.dtype for each in users.values()}}
            for k, each in users.items():
                add_term(each, each.inputs.index(i), wide[each.dtype], sums[k])
        for k, each in operations.items():
            divide(each, sums[k])
        return sums, base

    def _read(self, place: Location | PartLocation, begin: int, end: int, item_bytes: int = 1) -> Tensor:
        """Bytes `begin` to `end` of a tensor; on the CPU they begin at a multiple of `item_bytes`
        in memory (codecs need none).
        """
        size = end - begin
        if self._stream is not None:
            return self._stream.upload(
                size, self._slack_bytes, lambda buffer: self._reads.part(place, begin, end, buffer, item_bytes)
            )
        buffer = _buffer_for(size, self._slack_bytes)
        self._reads.part(place, begin, end, buffer, item_bytes)
        return buffer.tensor[buffer.begin : buffer.begin + size]

    def _rounded(self, extent: QuantizedExtent, operation: WeightedSum, total: Tensor, first: int, end: int) -> Tensor:
        """`total` in the dtype of the output; elements whose sum is too large for float32 from a
        sum in float64 (see `CpuWorkspace`).
        """
        rounded = torch.empty(total.shape, dtype=torch_dtype(extent.dtype), device=total.device)
        store(total, rounded)
        if operation.retry and not bool(is_clean(rounded)):
            sums, _ = self._sums(extent, first, end, {0: operation.again_in_float64()})
            redone = torch.empty_like(rounded)
            store(sums[0], redone)
            rounded = torch.where(rounded.isfinite(), rounded, redone)
        return rounded

    def _plain(self, rows: Rows, k: int, extent: QuantizedExtent, rounded: Tensor, first: int, end: int) -> tuple[int, memoryview]:
        if not bool(is_clean(rounded)):
            if not self._allow_nonfinite:
                raise self._nonfinite(extent, first, end)
            rounded.masked_fill_(rounded.isnan(), float("nan"))
            rows.nonfinite[k] = {extent.key: int((~rounded.isfinite()).sum())}
        return extent.sinks[0].offset + first * extent.shape[-1] * rounded.itemsize, memory_of(rounded.cpu())

    def _to_encode(
        self, extent: QuantizedExtent, first: int, end: int, operations: Operations
    ) -> tuple[dict[int, Tensor], Parts | None]:
        """The sums as float32 [rows, columns], and the base's parts; by the native kernel where it
        decodes all inputs.

        Raises NonFiniteError, since codes cannot hold NaN or Inf.
        """
        if self._native is None or not can_sum(extent):
            sums, base = self._sums(extent, first, end, operations)
            return self._finite(extent, sums, first, end), base
        rows, once = end - first, {k: each._replace(retry=False) for k, each in operations.items()}
        results, bad = self._native.reduce(extent, once, "F32", first, end)
        if bad:
            raise self._native.error(extent, rows * extent.shape[-1])
        found = {k: elements(result, torch.float32, 0, rows * extent.shape[-1]) for k, result in results.items()}
        parts = self._native.parts(extent, extent.base, first, end)
        base = {role: buffer.tensor[buffer.begin : buffer.begin + size] for role, (buffer, size) in parts.items()}
        return {k: values.view(rows, extent.shape[-1]) for k, values in found.items()}, base

    def _finite(self, extent: QuantizedExtent, sums: Mapping[int, Tensor], first: int, end: int) -> dict[int, Tensor]:
        """The sums as float32 [rows, columns]; raises NonFiniteError, since codes cannot hold NaN
        or Inf.
        """
        values = {k: total.float().view(end - first, extent.shape[-1]) for k, total in sums.items()}
        if not all(bool(is_clean(each)) for each in values.values() if each.numel()):
            raise self._nonfinite(extent, first, end)
        return values

    def _encoded(
        self,
        rows: Rows,
        extent: QuantizedExtent,
        values: Tensor,
        first: int,
        end: int,
        stats: Tensor | None,
        base: Parts | None,
    ) -> list[tuple[int, memoryview]]:
        codec = extent.codec
        assert codec is not None
        stats = None if stats is None else stats.to(values.device)
        parts = codec.encode(values, extent.shape, first, end, stats=stats, base=base or None)
        rows.errors = combine_totals(rows.errors, error_totals(values, codec.decode(parts, extent.shape, first, end)))
        writes = []
        for role, offset in extent.sinks:
            if first == 0 or role not in codec.per_tensor_roles:
                begin, stop = codec.part_range(role, extent.shape, first, end)
                data = parts[role].contiguous().cpu()
                assert data.numel() == stop - begin
                writes.append((offset + begin, memory_of(data)))
        return writes

    def _nonfinite(self, extent: QuantizedExtent, first: int, end: int) -> NonFiniteError:
        """Which inputs have NaN or Inf in rows `first` to `end`, or that the result overflows."""
        by_file = {}
        for source in extent.sources:
            bad = int((~self.values(source, extent.shape, first, end)[0].isfinite()).sum())
            file = source.parts[0].file if isinstance(source, QuantizedSource) else source.file
            if bad:
                by_file[file.path] = bad
        return nonfinite_error(extent.key, extent.dtype or "float32", by_file, may_continue=extent.codec is None)


def _buffer_for(size: int, slack_bytes: int) -> HostBuffer:
    """Memory for a read of `size` bytes; with slack it is aligned as O_DIRECT needs it."""
    room = torch.empty(max(size, 1) + slack_bytes + (DIRECT_BLOCK_BYTES if slack_bytes else 0), dtype=torch.uint8)
    return HostBuffer.of(room[-room.data_ptr() % DIRECT_BLOCK_BYTES :] if slack_bytes else room)


def memory_of(data: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, shared with it."""
    count = data.numel() * data.itemsize
    if not count:
        return memoryview(b"")
    view = (ctypes.c_char * count).from_address(data.data_ptr())
    view._tensor = data  # type: ignore[attr-defined]  # keeps the memory alive
    return memoryview(view).cast("B")


def rows_of(extent: QuantizedExtent, values: int, first: int = 0, end: int | None = None) -> list[tuple[int, int]]:
    """The chunks (first row, end) of rows `first` to `end` of an extent, of about `values` values
    each.
    """
    step, end = extent.rows_at_once(values), extent.num_rows if end is None else end
    return [(row, min(row + step, end)) for row in range(first, end, step)]


def largest_chunk(runs: Iterable[QuantizedExtent], values: int) -> int:
    """The values of the largest chunk when chunks are to have about `values`."""
    sizes: Mapping[object, int] = {
        (extent.shape, extent.row_step): extent.rows_at_once(values) * extent.shape[-1] for extent in _one_of_each(runs)
    }
    return max(sizes.values(), default=0)


def _one_of_each(runs: Iterable[QuantizedExtent]) -> Iterable[QuantizedExtent]:
    seen: dict[object, QuantizedExtent] = {}
    for extent in runs:
        codecs = tuple(source.codec if isinstance(source, QuantizedSource) else None for source in extent.sources)
        seen.setdefault((extent.shape, codecs, extent.codec), extent)
    return seen.values()
