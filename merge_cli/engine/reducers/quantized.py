"""Reduce tensors that are quantised in an input or in the output: decode, average, round or encode, some rows at a time.

One input after the other is read, decoded to float32 and added, so memory does not depend on their number: `BYTES_PER_VALUE` and 8
for each output, times the values of a chunk. The arithmetic is that of `arithmetic.py`, the codecs are in `formats/quantization`.

On an accelerator all but the reading runs on a stream of the worker's own: parts are read into one of two pinned buffers while the
device decodes what came before.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from merge_cli.engine.arithmetic import WeightedSum, accumulator_dtype, add_term, divide, is_clean, store, torch_dtype
from merge_cli.engine.buffers import HostBuffer
from merge_cli.engine.device import CPU, Device
from merge_cli.engine.reader import InputFiles
from merge_cli.errors import NonFiniteError
from merge_cli.formats.quantization.error import combine_totals, error_totals
from merge_cli.formats.safetensors import DTYPES
from merge_cli.planning.plan import Location, PartLocation, QuantizedExtent, QuantizedSource
from merge_cli.stores.local import DIRECT_BLOCK_BYTES

BYTES_PER_VALUE = 56  # bytes read, those of the base, float32, what decode or encode needs beside, a temporary in float64
TARGET_VALUES = 1 << 18
ACCELERATOR_VALUES = 1 << 21  # a kernel takes some microseconds to start, whatever its size
_PINNED_BYTES_PER_VALUE = 32  # two buffers for up to 8 bytes a value, rounded up to a power of two
_STATS_VALUES = 1 << 16
_MOST_SLACKS = 12  # eight parts are read into whole blocks of the storage, and are aligned to one
_COPY = WeightedSum((0,), (1.0,), None, True)
Parts = dict[str, Tensor]


def bytes_for(values: int, num_outputs: int, slack_bytes: int = 0) -> int:
    """Peak memory of a chunk of `values` values, where each read needs `slack_bytes` more."""
    return values * (BYTES_PER_VALUE + 8 * num_outputs) + _MOST_SLACKS * slack_bytes


def host_bytes_for(values: int, num_outputs: int, slack_bytes: int = 0) -> int:
    """Peak memory on the host of a chunk of `values` values that is worked on by an accelerator."""
    return values * (_PINNED_BYTES_PER_VALUE + 8 * num_outputs) + _MOST_SLACKS * slack_bytes


@dataclass
class Merged:
    """Bytes of some rows, for each output: (offset in the file, bytes) pairs."""

    writes: list[list[tuple[int, memoryview]]]
    bytes_read: int = 0
    seconds_reading: float = 0.0


class QuantizedSums:
    """What one worker needs to reduce coded runs. May raise torch.OutOfMemoryError, after which the same can be asked again.

    Buffers have `slack_bytes` more than is read, for whole blocks of the storage.
    """

    def __init__(self, device: Device, inputs: InputFiles, accumulate: str, slack_bytes: int = 0) -> None:
        self._device = device
        self._inputs = inputs
        self._accumulate = accumulate
        self._slack_bytes = slack_bytes
        self._stream = device.stream()
        self._bytes_read = 0
        self._seconds_reading = 0.0
        self._totals: Tensor | None = None
        self.nonfinite: dict[str, int] = {}

    def stats(
        self, extent: QuantizedExtent, chunks: Iterable[tuple[int, int]], operations: Sequence[WeightedSum]
    ) -> list[Tensor | None]:
        """What `encode` must know of the whole tensor, for each operation; None where it needs nothing."""
        found: list[Tensor | None] = [None] * len(operations)
        if extent.codec is None or not extent.codec.needs_stats:
            return found
        with self._active():
            for r0, r1 in chunks:
                sums, base = self._sums(extent, r0, r1, operations)
                for k, values in enumerate(self._finite(extent, sums, r0, r1)):
                    here = extent.codec.stats(values, extent.shape, r0, r1, base=base).cpu()
                    earlier = found[k]
                    found[k] = here if earlier is None else torch.maximum(earlier, here)
        return found

    def reduce(
        self,
        extent: QuantizedExtent,
        r0: int,
        r1: int,
        operations: Sequence[WeightedSum],
        stats: Sequence[Tensor | None],
        allow_nonfinite: bool,
    ) -> Merged:
        """Rows r0..r1 of the output of every operation, as bytes to be written. Raises NonFiniteError."""
        before = self._totals
        merged = Merged([])
        try:
            with self._active():
                sums, base = self._sums(extent, r0, r1, operations)
                if extent.codec is None:
                    for operation, total in zip(operations, sums, strict=True):
                        rounded = self._rounded(extent, operation, total, r0, r1)
                        merged.writes.append([self._plain(extent, rounded, r0, r1, allow_nonfinite)])
                else:
                    for values, stat in zip(self._finite(extent, sums, r0, r1), stats, strict=True):
                        merged.writes.append(self._encoded(extent, values, r0, r1, stat, base))
        except torch.OutOfMemoryError:
            self._totals, self._bytes_read, self._seconds_reading = before, 0, 0.0
            self.nonfinite.clear()
            raise
        merged.bytes_read, self._bytes_read = self._bytes_read, 0
        merged.seconds_reading, self._seconds_reading = self._seconds_reading, 0.0
        return merged

    def totals(self) -> Tensor | None:
        """The errors that quantising again has added, summed up (see `error.py`), on the CPU."""
        with self._active():
            return None if self._totals is None else self._totals.cpu()

    def _active(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else self._stream.active()

    def _sums(
        self, extent: QuantizedExtent, r0: int, r1: int, operations: Sequence[WeightedSum], accumulate: str = ""
    ) -> tuple[list[Tensor], Parts | None]:
        """The weighted sums [values], one an operation, and the base's own parts where the output is quantised like it."""
        accumulate = accumulate or self._accumulate
        operations = [_COPY] * len(operations) if extent.is_copy else operations
        names = ["F32" if isinstance(source, QuantizedSource) else source.dtype for source in extent.sources]
        dtypes = [
            accumulator_dtype(accumulate, op, [names[i] for i in op.inputs], extent.dtype if extent.codec is None else "BF16")
            for op in operations
        ]
        count = (r1 - r0) * extent.shape[-1]
        sums = [torch.empty(count, dtype=dtype, device=self._device.torch) for dtype in dtypes]
        base: Parts | None = None
        for index, source in enumerate(extent.sources):
            used = [k for k, operation in enumerate(operations) if index in operation.inputs]
            is_base = extent.codec is not None and index == extent.base
            if not used and not is_base:
                continue
            values, parts = self._load(source, extent.shape, r0, r1)
            base = parts if is_base else base
            wide = {dtype: values.to(dtype) for dtype in {dtypes[k] for k in used}}
            for k in used:
                add_term(operations[k], operations[k].inputs.index(index), wide[dtypes[k]], sums[k])
        for operation, total in zip(operations, sums, strict=True):
            divide(operation, total)
        return sums, base

    def _load(self, source: Location | QuantizedSource, shape: tuple[int, ...], r0: int, r1: int) -> tuple[Tensor, Parts]:
        """The values [count] of rows r0..r1 of one input, in float32 or as stored, and the parts they were decoded from."""
        if isinstance(source, Location):
            item_bytes = DTYPES[source.dtype].bits // 8
            row_bytes = item_bytes * shape[-1]
            data = self._read(source, r0 * row_bytes, r1 * row_bytes, item_bytes)
            return data.view(torch_dtype(source.dtype)), {}
        parts = {part.role: self._read(part, *source.codec.part_range(part.role, shape, r0, r1)) for part in source.parts}
        return source.codec.decode(parts, shape, r0, r1).reshape(-1), parts

    def _read(self, place: Location | PartLocation, begin: int, end: int, item_bytes: int = 1) -> Tensor:
        """Bytes `begin` to `end` of a tensor; on the CPU they begin at a multiple of `item_bytes` in memory (codecs need none)."""
        size = end - begin

        def fill(buffer: HostBuffer) -> None:
            started = time.perf_counter()
            buffer.fill(self._inputs, place.file, place.offset + begin, size, item_bytes)
            self._bytes_read += size
            self._seconds_reading += time.perf_counter() - started

        if self._stream is not None:
            return self._stream.upload(size, self._slack_bytes, fill)
        buffer = _buffer_for(size, self._slack_bytes)
        fill(buffer)
        return buffer.tensor[buffer.begin : buffer.begin + size]

    def _rounded(self, extent: QuantizedExtent, operation: WeightedSum, total: Tensor, r0: int, r1: int) -> Tensor:
        """`total` in the dtype of the output; elements whose sum is too large for float32 from a sum in float64 (see `Lane`)."""
        rounded = torch.empty(total.shape, dtype=torch_dtype(extent.dtype), device=total.device)
        store(total, rounded)
        if self._accumulate == "auto" and total.dtype == torch.float32 and not bool(is_clean(rounded)):
            ((wide,), _) = self._sums(extent, r0, r1, [operation], "fp64")
            redone = torch.empty_like(rounded)
            store(wide, redone)
            rounded = torch.where(rounded.isfinite(), rounded, redone)
        return rounded

    def _plain(self, extent: QuantizedExtent, rounded: Tensor, r0: int, r1: int, allow_nonfinite: bool) -> tuple[int, memoryview]:
        if not bool(is_clean(rounded)):
            if not allow_nonfinite:
                raise self._nonfinite(extent, r0, r1)
            rounded.masked_fill_(rounded.isnan(), float("nan"))
            self.nonfinite[extent.key] = self.nonfinite.get(extent.key, 0) + int((~rounded.isfinite()).sum())
        return extent.sinks[0].offset + r0 * extent.shape[-1] * rounded.itemsize, memory_of(rounded.cpu())

    def _finite(self, extent: QuantizedExtent, sums: Sequence[Tensor], r0: int, r1: int) -> list[Tensor]:
        """The sums as float32 [rows, columns]; raises NonFiniteError, since codes cannot hold NaN or Inf."""
        values = [total.float().view(r1 - r0, extent.shape[-1]) for total in sums]
        if not all(bool(is_clean(each)) for each in values if each.numel()):
            raise self._nonfinite(extent, r0, r1)
        return values

    def _encoded(
        self, extent: QuantizedExtent, values: Tensor, r0: int, r1: int, stats: Tensor | None, base: Parts | None
    ) -> list[tuple[int, memoryview]]:
        codec = extent.codec
        assert codec is not None
        stats = None if stats is None else stats.to(values.device)
        parts = codec.encode(values, extent.shape, r0, r1, stats=stats, base=base or None)
        totals = error_totals(values, codec.decode(parts, extent.shape, r0, r1))
        self._totals = totals if self._totals is None else combine_totals(self._totals, totals)
        writes = []
        for role, offset in extent.sinks:
            if r0 == 0 or role not in codec.whole:
                begin, end = codec.part_range(role, extent.shape, r0, r1)
                data = parts[role].contiguous().cpu()
                assert data.numel() == end - begin
                writes.append((offset + begin, memory_of(data)))
        return writes

    def _nonfinite(self, extent: QuantizedExtent, r0: int, r1: int) -> NonFiniteError:
        """Which inputs have NaN or Inf in rows r0..r1, or that the result overflows."""
        details = []
        for source in extent.sources:
            bad = int((~self._load(source, extent.shape, r0, r1)[0].isfinite()).sum())
            file = source.parts[0].file if isinstance(source, QuantizedSource) else source.file
            if bad:
                details.append(f"{file.path}  {bad} elements in the chunk that was read")
        if details:
            hint = "leave that checkpoint out" + (
                "" if extent.codec else ", or continue and have them reported:  --allow-nonfinite"
            )
            return NonFiniteError(f"`{extent.key}` has NaN or Inf in an input", details=details, hint=hint)
        return NonFiniteError(f"`{extent.key}` overflows {extent.dtype or 'float32'}", hint="write a wider dtype:  --dtype fp32")


class QuantizedReducers:
    """A worker's reducer, and one on the CPU for what finds no memory on the device even in smaller chunks."""

    def __init__(self, device: Device, inputs: InputFiles, accumulate: str, slack_bytes: int) -> None:
        self._first = QuantizedSums(device, inputs, accumulate, slack_bytes)
        self._cpu = QuantizedSums(CPU, inputs, accumulate, slack_bytes) if device.is_accelerator else self._first
        self.done_on_cpu = 0

    def stats(
        self, extent: QuantizedExtent, chunks: Sequence[tuple[int, int]], operations: Sequence[WeightedSum]
    ) -> list[Tensor | None]:
        """As that of `QuantizedSums`."""
        try:
            return self._first.stats(extent, chunks, operations)
        except torch.OutOfMemoryError:
            self.done_on_cpu += 1
        return self._cpu.stats(extent, list(rows_of(extent, _STATS_VALUES)), operations)

    def reduce(
        self,
        extent: QuantizedExtent,
        r0: int,
        r1: int,
        operations: Sequence[WeightedSum],
        stats: Sequence[Tensor | None],
        allow_nonfinite: bool,
    ) -> Iterator[Merged]:
        """Rows r0..r1 in one piece, or in halves of halves where the device is out of memory."""
        try:
            merged = self._first.reduce(extent, r0, r1, operations, stats, allow_nonfinite)
        except torch.OutOfMemoryError:
            merged = None
        if merged is not None:
            yield merged
        elif r1 - r0 > extent.row_step:
            middle = r0 + max(1, (r1 - r0) // 2 // extent.row_step) * extent.row_step
            yield from self.reduce(extent, r0, middle, operations, stats, allow_nonfinite)
            yield from self.reduce(extent, middle, r1, operations, stats, allow_nonfinite)
        else:
            self.done_on_cpu += 1
            yield self._cpu.reduce(extent, r0, r1, operations, stats, allow_nonfinite)

    def take_nonfinite(self) -> dict[str, int]:
        """The elements that were NaN or Inf since this was asked last, by tensor."""
        found: dict[str, int] = {}
        for reducer in {self._first, self._cpu}:
            for key, count in reducer.nonfinite.items():
                found[key] = found.get(key, 0) + count
            reducer.nonfinite.clear()
        return found

    def totals(self) -> list[Tensor]:
        """The errors that quantising again has added, on either device."""
        return [totals for reducer in {self._first, self._cpu} if (totals := reducer.totals()) is not None]


def _buffer_for(size: int, slack_bytes: int) -> HostBuffer:
    """Memory for a read of `size` bytes; with slack it is aligned as O_DIRECT needs it."""
    room = torch.empty(max(size, 1) + slack_bytes + (DIRECT_BLOCK_BYTES if slack_bytes else 0), dtype=torch.uint8)
    return HostBuffer(room[-room.data_ptr() % DIRECT_BLOCK_BYTES :] if slack_bytes else room)


def memory_of(data: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, shared with it."""
    count = data.numel() * data.itemsize
    if not count:
        return memoryview(b"")
    view = (ctypes.c_char * count).from_address(data.data_ptr())
    view._tensor = data  # type: ignore[attr-defined]  # keeps the memory alive
    return memoryview(view).cast("B")


def keep_freed_memory() -> None:
    """Ask glibc to keep what is freed for the next chunk: giving it back and faulting it in costs as much as the arithmetic."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl and macOS have none
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD


def rows_of(extent: QuantizedExtent, values: int, first: int = 0, end: int | None = None) -> Iterable[tuple[int, int]]:
    """The chunks (first row, end) of rows `first` to `end` of a extent, of about `values` values each."""
    step, end = extent.rows_at_once(values), extent.num_rows if end is None else end
    return ((r0, min(r0 + step, end)) for r0 in range(first, end, step))


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
