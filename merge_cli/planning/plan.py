"""The plan of a merge: immutable data made from headers and coefficients alone, before a weight is
read.

The plan fixes which output files there will be, every byte offset in them, and which bytes of which
inputs each of those bytes comes from. All that can be wrong with a set of checkpoints surfaces
here, in seconds: a missing tensor, another shape, a format that cannot be averaged. It does not say
how the work is done (device, memory, threads): output bytes depend on the plan alone.

The unit of the plan is the `Extent`: adjacent tensors of one output file that are also adjacent in
every input and are treated alike. A checkpoint with 100,000 small tensors has a few hundred runs,
so the work per tensor stays small. The engine cuts runs into chunks of whatever size fits its
memory. A tensor that is quantized, in an input or in the output, has a `QuantizedExtent` of its
own.
"""

from __future__ import annotations

import bisect
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple, TypeVar, overload

from merge_cli.formats.checkpoint import Checkpoint
from merge_cli.formats.quantization import Codec
from merge_cli.formats.safetensors import DTYPES
from merge_cli.formats.weight_file import Files, WeightFile
from merge_cli.planning.sums import WeightedSum, weighted_sum
from merge_cli.request.coefficients import IDENTITY, Coefficients
from merge_cli.request.spec import MergeSpec

ALGORITHM = 1
"""Raised whenever the same request would give other bytes; part of the fingerprint, so that a
resumed run never mixes two.
"""
T = TypeVar("T")
AVERAGE, GRAM = "average", "gram"
"""The reducers that a work item can name: weighted sums that are written, inner products that are
handed to the sink.
"""


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


@dataclass(frozen=True)
class Gap:
    """Bytes of a file between its values: `num_bytes` from `offset` on. Values end where it begins,
    or nothing does.

    First `trailer(crc)`, by the CRC-32 of all bytes since the last gap or the header, if there is
    one; then `rest`.
    """

    offset: int
    num_bytes: int
    trailer: Callable[[int], bytes] | None
    rest: bytes

    @property
    def end(self) -> int:
        return self.offset + self.num_bytes

    def make(self, crc: int) -> bytes:
        """The bytes, behind values of this CRC-32."""
        return self.rest if self.trailer is None else self.trailer(crc) + self.rest


@dataclass(frozen=True)
class OutputFile:
    """One file to be written: its header's bytes, its final size, and the extents that fill it.

    In a distributed checkpoint there are `gaps` between the values, by ascending offset; no extent
    reaches into one.
    """

    name: str
    header: bytes
    file_bytes: int
    extents: tuple[Extent | QuantizedExtent, ...]
    names: tuple[str, ...]
    gaps: tuple[Gap, ...] = ()

    @property
    def value_bytes(self) -> int:
        """The bytes that the extents fill."""
        return self.file_bytes - len(self.header) - sum(gap.num_bytes for gap in self.gaps)

    def frame_sha256(self) -> str:
        """The sha256 of all other bytes, as they would be around values of CRC-32 zero."""
        found = hashlib.sha256(self.header)
        for gap in self.gaps:
            found.update(b"%d:" % gap.offset + gap.make(0))
        return found.hexdigest()


class WorkItem(NamedTuple):
    """Bytes `begin` to `end` of one output file, for some of the plan's outputs: the unit that is
    claimed, opened and recorded.

    `reducer` names the one of `engine/reducers` that its extents are given to.
    """

    file: OutputFile
    outputs: tuple[int, ...]
    begin: int
    end: int
    reducer: str = AVERAGE

    @classmethod
    def whole(cls, file: OutputFile, outputs: tuple[int, ...] = (0,), reducer: str = AVERAGE) -> WorkItem:
        """All bytes of `file`."""
        return cls(file, outputs, 0, file.file_bytes, reducer)

    @property
    def is_whole(self) -> bool:
        """Whether this is all of the file."""
        return (self.begin, self.end) == (0, self.file.file_bytes)

    @property
    def name(self) -> str:
        """A name that no other byte range of any file has."""
        return self.file.name if self.is_whole else f"{self.file.name}@{self.begin}-{self.end}"

    def parts(self) -> Iterator[tuple[Extent | QuantizedExtent, int, int]]:
        """The runs in it, each with its first element (row, for quantized tensors) and its end."""
        for extent in self.file.extents:
            first, last = extent.between(self.begin, self.end)
            if last > first or (self.is_whole and isinstance(extent, QuantizedExtent)):
                yield extent, first, last

    @property
    def bytes_to_write(self) -> int:
        """The bytes of its data for one output."""
        return sum(extent.bytes_written(first, last) for extent, first, last in self.parts())


@dataclass(frozen=True)
class Output:
    """One merged checkpoint: the coefficient of each of its inputs, by ascending position in the
    plan's inputs.

    `base` is the position of the input that integers, config and side files come from.
    """

    inputs: tuple[int, ...]
    coefficients: Coefficients
    base: int


@dataclass(frozen=True)
class MergePlan:
    """K outputs from N inputs that share one layout, the base's. `steps` and `inputs` run from
    oldest to newest.

    `dequantized`: the base is quantized and the output is not, so config.json and side files must
    not say that it is. `notes` describe tensors that are not simply averaged,
    `warnings` what may be wrong.
    """

    spec: MergeSpec
    inputs: tuple[Checkpoint, ...]
    steps: tuple[int | None, ...]
    base: int
    outputs: tuple[Output, ...]
    files: tuple[OutputFile, ...]
    warnings: tuple[str, ...] = field(default=())
    notes: tuple[str, ...] = field(default=())
    dequantized: bool = False

    def operation(self, extent: Extent | QuantizedExtent, k: int) -> WeightedSum:
        """The sum that makes output `k` of `extent`, with the dtype in which it is summed."""
        output = self.outputs[k]
        inputs, chosen = ((0,), IDENTITY) if extent.is_copy else (output.inputs, output.coefficients)
        dtypes = [extent.value_dtypes[i] for i in inputs]
        return weighted_sum(inputs, chosen, self.spec.accumulate, dtypes, extent.written_dtype)

    def base_of(self, extent: Extent, k: int) -> int:
        """The position among the sources of `extent` of the input whose bytes output `k` takes over
        unchanged.
        """
        return 0 if extent.is_copy else self.outputs[k].base

    @cached_property
    def bytes_to_read(self) -> int:
        """The bytes of weights that are read from all inputs together."""
        return sum(extent.bytes_read for file in self.files for extent in file.extents)

    def bytes_of_inputs(self) -> list[int]:
        """The bytes of weights that are read from each input. Not for plans with runs that are
        copies: those have one source.
        """
        totals = [0] * len(self.inputs)
        for extent in (extent for file in self.files for extent in file.extents):
            for i, size in enumerate(extent.source_bytes):
                totals[i] += size
        return totals

    def single_output(self, k: int, spec: MergeSpec) -> MergePlan:
        """Output `k` as the one output of a plan, enough for fingerprint, manifest and
        index: its files come without their extents.

        It has the fingerprint of the plan that is made for this output by itself.
        """
        output = self.outputs[k]
        count = len(output.inputs)
        return MergePlan(
            spec,
            tuple(self.inputs[i] for i in output.inputs),
            tuple(self.steps[i] for i in output.inputs),
            output.inputs.index(output.base),
            (Output(tuple(range(count)), output.coefficients, output.inputs.index(output.base)),),
            tuple(replace(file, extents=()) for file in self.files),
            dequantized=self.dequantized,
        )

    @property
    def bytes_to_write(self) -> int:
        """The bytes of all weight files of all outputs, headers included."""
        return len(self.outputs) * sum(file.file_bytes for file in self.files)


class ExtentBuilder:
    """Joins the tensors of one output file into runs."""

    def __init__(self) -> None:
        self.extents: list[Extent | QuantizedExtent] = []
        self._alike: Alike | None = None
        self._kind = self._dtype = ""
        self._offset = self._count = self._end = 0
        self._sources: tuple[Location, ...] = ()
        self._next: list[tuple[WeightFile, int, str]] = []
        self._keys: list[str] = []
        self._starts: list[int] = []

    def add(
        self,
        key: str,
        kind: str,
        dtype: str,
        offset: int,
        end: int,
        count: int,
        sources: Iterable[tuple[Location, int]],
        alike: Alike | None = None,
    ) -> None:
        """Add a tensor of `count` elements for bytes `offset` to `end`; each source comes with its
        own size in bytes: all of them, or those of the first input of each kind in `alike`.
        """
        if not count:
            return
        pairs = list(sources)
        here = [(source.file, source.offset, source.dtype) for source, _ in pairs]
        if (kind, dtype, offset, alike) != (self._kind, self._dtype, self._end, self._alike) or here != self._next:
            self._close()
            self._kind, self._dtype, self._offset, self._alike = kind, dtype, offset, alike
            self._sources = tuple(source for source, _ in pairs)
        self._keys.append(key)
        self._starts.append(self._count)
        self._count += count
        self._end = end
        self._next = [(source.file, source.offset + size, source.dtype) for source, size in pairs]

    def add_quantized(self, extent: QuantizedExtent) -> None:
        """Add the run of a quantized tensor."""
        self._close()
        self.extents.append(extent)

    def finish(self) -> tuple[Extent | QuantizedExtent, ...]:
        self._close()
        return tuple(self.extents)

    def _close(self) -> None:
        if self._keys:
            self.extents.append(
                Extent(
                    self._kind,
                    self._dtype,
                    self._offset,
                    self._count,
                    self._all_sources(),
                    tuple(self._keys),
                    tuple(self._starts),
                )
            )
        self._keys, self._starts, self._count, self._next = [], [], 0, []

    def _all_sources(self) -> tuple[Location, ...]:
        alike = self._alike
        return self._sources if alike is None else tuple(self._sources[kind].moved(files) for kind, files in alike.of)
