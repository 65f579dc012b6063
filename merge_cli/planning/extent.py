"""Extents: which bytes of which inputs make some bytes of an output file, all treated alike."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar, overload

from merge_cli.formats.quantization import Codec
from merge_cli.formats.safetensors import DTYPES
from merge_cli.formats.weight_file import Files, WeightFile

T = TypeVar("T")


class Location(NamedTuple):
    """Where the elements of a run lie in one input: `offset` is the first byte in the file."""

    file: WeightFile
    offset: int
    dtype: str

    def moved(self, files: Files) -> Location:
        """The same place in another file."""
        return Location(self.file.moved(files), self.offset, self.dtype)


@dataclass(frozen=True)
class Extent:
    """Adjacent tensors of one output file, adjacent in every input too, all treated alike.

    `kind` is "average" (floats: weighted sum), "equal" (integers: copied from an output's base
    after its inputs were found equal) or "copy" (from the base, unchanged). `sources` has one entry
    an input, in the plan's order; only the base's for "copy". `keys[i]` begins at element
    `starts[i]` of the extent.
    """

    kind: str
    dtype: str
    offset: int
    num_elements: int
    sources: tuple[Location, ...]
    keys: tuple[str, ...]
    starts: tuple[int, ...]

    @property
    def is_copy(self) -> bool:
        """Whether the base's tensors are taken over as they are."""
        return self.kind == "copy"

    def key_at(self, element: int) -> str:
        """The tensor that element number `element` of the run belongs to."""
        return self.keys[bisect.bisect_right(self.starts, element) - 1]

    def tensors_between(self, first: int, end: int) -> Iterator[tuple[str, int, int]]:
        """The tensors that have elements from `first` to `end`, each with those elements."""
        begin = bisect.bisect_right(self.starts, first) - 1
        for number in range(begin, len(self.keys)):
            start = max(first, self.starts[number])
            if start >= end:
                return
            following = self.starts[number + 1] if number + 1 < len(self.keys) else self.num_elements
            yield self.keys[number], start, min(end, following)

    def between(self, begin: int, end: int) -> tuple[int, int]:
        """The elements (first, end) whose first byte lies between these bytes of the output file."""
        bits = DTYPES[self.dtype].bits
        first, last = (-(-8 * (byte - self.offset) // bits) for byte in (begin, end))
        return min(max(first, 0), self.num_elements), min(max(last, 0), self.num_elements)

    def bytes_written(self, first: int, end: int) -> int:
        """The bytes of elements `first` to `end` of the output."""
        return DTYPES[self.dtype].num_bytes(end - first)

    @property
    def value_dtypes(self) -> tuple[str, ...]:
        """The dtype in which each input gives its values."""
        return tuple(source.dtype for source in self.sources)

    @property
    def written_dtype(self) -> str:
        """The dtype that a sum is rounded to."""
        return self.dtype

    def byte_at(self, element: int) -> int:
        """The first byte of an element in the output file."""
        return self.offset + DTYPES[self.dtype].num_bytes(element)

    def places(self) -> list[tuple[str, int, int]]:
        """The tensors, and where their bytes begin and end in the output file."""
        ends = (*self.starts[1:], self.num_elements)
        return [(k, self.byte_at(a), self.byte_at(b)) for k, a, b in zip(self.keys, self.starts, ends, strict=True)]

    @property
    def source_bytes(self) -> tuple[int, ...]:
        """The bytes that are read for this run from each of its sources."""
        return tuple(DTYPES[source.dtype].num_bytes(self.num_elements) for source in self.sources)

    @property
    def bytes_read(self) -> int:
        """The bytes that are read from all inputs for this extent."""
        return sum(self.source_bytes)


class PartLocation(NamedTuple):
    """Where one part (codes, scales ...) of a quantized tensor lies in an input."""

    role: str
    file: WeightFile
    offset: int
    num_bytes: int

    def moved(self, files: Files) -> PartLocation:
        """The same place in another file."""
        return self._replace(file=self.file.moved(files))


class QuantizedSource(NamedTuple):
    """A quantized tensor in one input: `parts` are read, `codec` makes float32 of them."""

    codec: Codec
    parts: tuple[PartLocation, ...]

    def moved(self, files: Files) -> QuantizedSource:
        """The same tensor in other files."""
        return QuantizedSource(self.codec, tuple(part.moved(files) for part in self.parts))


@dataclass(frozen=True, eq=False)
class Alike:
    """Which inputs have equal headers. `firsts` are the positions of the first of each kind;
    `of[i]` is the number of the kind of input `i`, and its files by those of the first.
    """

    firsts: tuple[int, ...]
    of: tuple[tuple[int, Files], ...]


class Sources(Sequence[Location | QuantizedSource]):
    """The sources of a tensor, one an input. Only those of the first input of each kind are held,
    as a large plan has some hundred thousand: the others differ in their files alone.
    """

    __slots__ = ("alike", "firsts")

    def __init__(self, firsts: tuple[Location | QuantizedSource, ...], alike: Alike) -> None:
        self.firsts = firsts
        self.alike = alike

    def __len__(self) -> int:
        return len(self.alike.of)

    @overload
    def __getitem__(self, i: int) -> Location | QuantizedSource: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[Location | QuantizedSource]: ...
    def __getitem__(self, i: int | slice) -> Location | QuantizedSource | Sequence[Location | QuantizedSource]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        kind, files = self.alike.of[i]
        return self.firsts[kind].moved(files)

    def spread(self, facts: Sequence[T]) -> tuple[T, ...]:
        """For each input that of `facts`, on `firsts`, which is true of it."""
        return tuple(facts[kind] for kind, _ in self.alike.of)


class PartOffset(NamedTuple):
    """Where a tensor, or one part of a quantized one, begins in the output file; `role` is empty
    for plain values.
    """

    role: str
    offset: int


@dataclass(frozen=True)
class QuantizedExtent:
    """One tensor, quantized in an input or in the output: `shape` of its values, one source an
    input (only the base's for a copy).

    Plain values of `dtype` are written to the one sink, or, where `codec` is given, the parts that
    `encode` makes, each to the sink of its role. A part that belongs into another output file is
    not written here: that file has this run too.
    """

    key: str
    shape: tuple[int, ...]
    sources: Sources
    is_copy: bool
    dtype: str
    codec: Codec | None
    base: int
    sinks: tuple[PartOffset, ...]

    kind = "coded"

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def value_dtypes(self) -> tuple[str, ...]:
        """The dtype in which each input gives its values: codes are decoded to float32."""
        firsts = self.sources.firsts
        return self.sources.spread(["F32" if isinstance(source, QuantizedSource) else source.dtype for source in firsts])

    @property
    def written_dtype(self) -> str:
        """The dtype that a sum is rounded to; codes are about as wide as bfloat16, or narrower."""
        return self.dtype if self.codec is None else "BF16"

    @property
    def needs_two_passes(self) -> bool:
        """Whether all values must be seen before any is encoded."""
        return self.codec is not None and self.codec.needs_stats

    @property
    def num_rows(self) -> int:
        """Rows of the 2-D view, the last dimension being the columns."""
        return math.prod(self.shape[:-1])

    @property
    def row_step(self) -> int:
        """Rows that no codec of this run can split."""
        codecs = [source.codec for source in self.sources.firsts if isinstance(source, QuantizedSource)]
        return math.lcm(*(codec.row_step(self.shape) for codec in [*codecs, *([self.codec] if self.codec else [])]))

    def rows_at_once(self, values: int) -> int:
        """About `values` values in rows: a multiple of the row step, at least one step, at most all
        rows.
        """
        step = self.row_step
        return min(max(self.num_rows, 1), max(step, values // max(self.shape[-1], 1) // step * step))

    def between(self, begin: int, end: int) -> tuple[int, int]:
        """The rows (first, end) whose first part begins between these bytes of the output file; all
        or none where the codec must see all values.
        """
        role, offset = self.sinks[0]
        size, step = self._part_bytes(role, 0, self.num_rows), self.row_step
        if not size or self.needs_two_passes or (self.codec is not None and role in self.codec.per_tensor_roles):
            return (0, self.num_rows) if begin <= offset < end else (0, 0)
        first, last = (-(-(byte - offset) * self.num_rows // (size * step)) * step for byte in (begin, end))
        return min(max(first, 0), self.num_rows), min(max(last, 0), self.num_rows)

    def bytes_written(self, first: int, end: int) -> int:
        """The bytes that rows `first` to `end` give to all sinks."""
        whole = () if self.codec is None else self.codec.per_tensor_roles
        return sum(self._part_bytes(role, first, end) for role, _ in self.sinks if end > first and (not first or role not in whole))

    def _part_bytes(self, role: str, first: int, end: int) -> int:
        if self.codec is None:
            return DTYPES[self.dtype].num_bytes((end - first) * self.shape[-1])
        begin, stop = self.codec.part_range(role, self.shape, first, end)
        return stop - begin

    @property
    def source_bytes(self) -> tuple[int, ...]:
        """The bytes that are read from each source, twice where the codec must see all values
        before it encodes any.
        """
        times = 2 if self.needs_two_passes else 1
        sizes = [
            sum(part.num_bytes for part in source.parts)
            if isinstance(source, QuantizedSource)
            else DTYPES[source.dtype].num_bytes(self.num_elements)
            for source in self.sources.firsts
        ]
        return self.sources.spread([times * size for size in sizes])

    @property
    def bytes_read(self) -> int:
        """The bytes that are read from all inputs for this extent."""
        return sum(self.source_bytes)
