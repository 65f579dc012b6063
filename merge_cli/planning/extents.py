"""From entries to extents: which bytes of which inputs make each byte of an output file.

Inputs whose headers are equal are looked up once, and have one record a tensor (`Sources`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from merge_cli.errors import UnsupportedError
from merge_cli.formats.alike import original_of
from merge_cli.formats.checkpoint import Stored
from merge_cli.formats.logical import Coded, Logical, Stacked, View, dtype_of, file_of, shape_of
from merge_cli.formats.safetensors import DTYPES, Header, lay_out
from merge_cli.planning.extent import Alike, Location, PartLocation, PartOffset, QuantizedExtent, QuantizedSource, Sources
from merge_cli.planning.extent_builder import ExtentBuilder
from merge_cli.planning.plan import OutputFile


class Entry(NamedTuple):
    """A tensor of the output: `name` in its file, and how it comes about.

    `kind` is one of those of `Extent`, or "quantize": one part, by `role`, of the tensor `key`.
    `sources` are the inputs to read.
    """

    key: str
    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    kind: str
    sources: tuple[int, ...]
    role: str = ""


@dataclass(frozen=True)
class Inputs:
    """The inputs of a merge, oldest to newest: `tensors[i]` are those of `views[i]` under the names
    of the base, which is at position `base`.
    """

    views: Sequence[View]
    tensors: Sequence[Mapping[str, Logical]]
    base: int

    def alike(self, sources: Sequence[int]) -> Alike:
        """Which of the inputs `sources` have equal headers."""
        return self._all if len(sources) == len(self.views) else self._group(sources)

    @cached_property
    def _all(self) -> Alike:
        return self._group(range(len(self.views)))

    def _group(self, sources: Sequence[int]) -> Alike:
        kinds: dict[int, int] = {}  # of equal tensors: its number
        firsts: list[int] = []
        of = []
        for i in sources:
            kind = kinds.setdefault(id(original_of(self.tensors[i])), len(kinds))
            if kind == len(firsts):
                firsts.append(i)
            there, here = (self.views[j].checkpoint.files for j in (firsts[kind], i))
            of.append((kind, dict(zip(there, here, strict=True))))
        return Alike(tuple(firsts), tuple(of))


def plan_file(
    name: str,
    metadata: Mapping[str, str],
    entries: Sequence[Entry],
    inputs: Inputs,
) -> OutputFile:
    raw, header = lay_out([(entry.name, entry.dtype, entry.shape) for entry in entries], metadata)
    builder = ExtentBuilder()
    quantized: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.kind == "quantize":
            quantized.setdefault(entry.key, []).append(entry)
    for entry in entries:
        offset = header.data_start + header.tensors[entry.name].start
        if entry.kind == "quantize":
            if parts := quantized.pop(entry.key, None):
                builder.add_quantized(_quantized_extent(parts, header, inputs))
        else:
            add_entry(builder, entry, offset, inputs)
    return OutputFile(name, raw, header.file_bytes, builder.finish(), tuple(entry.name for entry in entries))


def add_entry(
    builder: ExtentBuilder,
    entry: Entry,
    offset: int,
    inputs: Inputs,
) -> None:
    """Add a tensor that is stored as plain values, or taken over as it is."""
    alike = inputs.alike(entry.sources)
    if entry.kind == "average":
        found = [inputs.tensors[i][entry.key] for i in alike.firsts]
        _add_average(builder, entry, offset, found, alike, inputs.base)
    else:
        stored = [_as_stored(entry, inputs.views[i].checkpoint.tensors, inputs.tensors[i]) for i in alike.firsts]
        _add(builder, entry, offset, stored, alike)


def _as_stored(entry: Entry, stored: Mapping[str, Stored], tensors: Mapping[str, Logical]) -> Stored:
    """The stored tensor that `entry` takes over: the one it means, or a part of a quantized one
    that goes by its own name.
    """
    tensor = tensors.get(entry.key)
    if isinstance(tensor, Coded):
        return dict(tensor.parts)[entry.role]
    found = tensor if isinstance(tensor, Stored) else stored.get(entry.key)
    if found is None or found.info.dtype != entry.dtype or found.info.shape != entry.shape:
        raise UnsupportedError(
            f"`{entry.name}` cannot be taken over: another checkpoint does not hold it, or holds it in another form",
            details=[f"expected  {entry.dtype} {list(entry.shape)}"],
            hint="average without it being written:  leave --requantize out",
        )
    return found


def _add(builder: ExtentBuilder, entry: Entry, offset: int, found: Sequence[Stored], alike: Alike) -> None:
    count = math.prod(entry.shape)
    sources = [(Location(s.file, s.file.header.data_start + s.info.start, s.info.dtype), s.info.end - s.info.start) for s in found]
    builder.add(entry.key, entry.kind, entry.dtype, offset, offset + DTYPES[entry.dtype].num_bytes(count), count, sources, alike)


def _add_average(builder: ExtentBuilder, entry: Entry, offset: int, found: Sequence[Logical], alike: Alike, base: int) -> None:
    """A tensor of plain values; where an input holds it in pieces, each piece by itself."""
    stacked = next((tensor for tensor in found if isinstance(tensor, Stacked)), None)
    if stacked is not None:
        begin = 0
        for number, piece in enumerate(stacked.pieces):
            rows, columns = shape_of(piece)
            size = DTYPES[entry.dtype].num_bytes(rows * columns)
            part = entry._replace(shape=(rows, columns))
            here = [t.pieces[number] if isinstance(t, Stacked) else _rows_of(t, begin, rows, columns) for t in found]
            _add_average(builder, part, offset, here, alike, base)
            begin, offset = begin + rows, offset + size
        return
    plain = [tensor for tensor in found if isinstance(tensor, Stored)]
    if len(plain) == len(found):
        _add(builder, entry, offset, plain, alike)
    elif math.prod(entry.shape):
        is_copy = len(entry.sources) == 1 and entry.sources == (base,)
        builder.add_quantized(_extent(entry, found, alike, is_copy, None, base, [PartOffset("", offset)]))


def _rows_of(tensor: Logical, begin: int, rows: int, columns: int) -> Stored:
    """Rows of the 2-D view of a plain tensor as a tensor of their own."""
    if not isinstance(tensor, Stored):
        raise UnsupportedError(
            f"fused quantized experts ({dtype_of(tensor)}, {file_of(tensor)}) cannot be read together with single experts",
            hint="leave one of the two kinds of checkpoints out",
        )
    dtype = DTYPES[tensor.info.dtype]
    start = tensor.info.start + dtype.num_bytes(begin * columns)
    end = start + dtype.num_bytes(rows * columns)
    return tensor._replace(info=tensor.info._replace(shape=(rows, columns), start=start, end=end))


def _quantized_extent(parts: Sequence[Entry], header: Header, inputs: Inputs) -> QuantizedExtent:
    """The extent that fills those parts of a requantized tensor that lie in this file."""
    entry = parts[0]
    tensor = inputs.tensors[inputs.base][entry.key]
    assert isinstance(tensor, Coded)
    sinks = [PartOffset(part.role, header.data_start + header.tensors[part.name].start) for part in parts]
    alike = inputs.alike(entry.sources)
    found = [inputs.tensors[i][entry.key] for i in alike.firsts]
    return _extent(entry._replace(shape=tensor.shape), found, alike, False, tensor, inputs.base, sinks)


def _extent(
    entry: Entry,
    found: Sequence[Logical],
    alike: Alike,
    is_copy: bool,
    like: Coded | None,
    base: int,
    sinks: Sequence[PartOffset],
) -> QuantizedExtent:
    sources: list[Location | QuantizedSource] = []
    for tensor in found:
        if isinstance(tensor, Coded):
            parts = tuple(
                PartLocation(role, part.file, part.offset, part.info.end - part.info.start) for role, part in tensor.parts
            )
            sources.append(QuantizedSource(tensor.codec, parts))
        elif isinstance(tensor, Stored):
            sources.append(Location(tensor.file, tensor.offset, tensor.info.dtype))
        else:
            raise UnsupportedError(
                f"`{entry.key}` is quantized and fused in one checkpoint, {file_of(tensor)} holds single experts",
                hint="leave one of the two kinds of checkpoints out",
            )
    codec = None if like is None else like.codec
    dtype = "" if like is not None else entry.dtype
    return QuantizedExtent(entry.key, tuple(entry.shape), Sources(tuple(sources), alike), is_copy, dtype, codec, base, tuple(sinks))
