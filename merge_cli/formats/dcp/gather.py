"""Boxes of a tensor gathered from whatever chunks a checkpoint holds: for a run that changed its
parallelism, and for whole tensors.

    as_chunks_of   a checkpoint's tensors in the chunks of another one
    whole          a checkpoint's tensors each as one

A gathered box is a `Stored` tensor like any other, whose file is made up: reading bytes of it reads
the pieces that they consist of (`Gathered.gather`), so plan and engine need not know. A piece lies
in the box and in its chunk as rows of equal distance. Rows that are close together in the chunk are
read together, up to 1 MiB at once; others one by one.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from merge_cli.errors import UnsupportedError
from merge_cli.formats.checkpoint import Checkpoint, Stored
from merge_cli.formats.dcp.checkpoint import chunk_key
from merge_cli.formats.dcp.clone import DcpParts
from merge_cli.formats.dcp.metadata import Chunk, Tensor
from merge_cli.formats.safetensors import DTYPES, Header, TensorInfo
from merge_cli.formats.side_files import list_side_files
from merge_cli.formats.weight_file import Files, WeightFile
from merge_cli.stores.store import join

READ_BYTES = 1 << 20
_CLOSE_BYTES = 4096  # rows no further apart are read together, whatever lies between them
_CLOSE_ROWS = 4
_LARGEST_PERMUTED = 64 << 20
_FORMATS: Mapping[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}

ReadInto = Callable[[WeightFile, int, memoryview], None]


class Axis(NamedTuple):
    """A dimension of a piece: `num` steps of `to` bytes in the box, of `source` bytes in the
    file.
    """

    num: int
    to: int
    source: int


class Piece(NamedTuple):
    """A part of a box that lies in one chunk: rows of `row_bytes` bytes, one for each position on
    `axes`. The first begins at byte `to` of the box and byte `source` of `file`.

    The items of a row are `item_step` bytes apart in the file: their size, unless the chunk is
    stored permuted.
    """

    file: WeightFile
    to: int
    source: int
    axes: tuple[Axis, ...]
    row_bytes: int
    item_step: int

    def rows(self, begin: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """Rows that have bytes between `begin` and `end` of the box, as (to, source, count, step of
        the source): `count` rows whose distances are those of the last axis.
        """
        *outer, last = self.axes or (Axis(1, self.row_bytes, 0),)
        spans = [self.row_bytes + sum((each.num - 1) * each.to for each in self.axes[i:]) for i in range(len(self.axes) + 1)]

        def walk(depth: int, to: int, source: int) -> Iterator[tuple[int, int, int, int]]:
            axis = outer[depth] if depth < len(outer) else last
            inside = spans[depth + 1] if self.axes else self.row_bytes
            first = max(0, -((to + inside - 1 - begin) // axis.to))
            stop = min(axis.num, -((to - end) // axis.to))
            if depth == len(outer):
                if stop > first:
                    yield to + first * axis.to, source + first * axis.source, stop - first, axis.source
                return
            for i in range(first, stop):
                yield from walk(depth + 1, to + i * axis.to, source + i * axis.source)

        return walk(0, self.to, self.source)


@dataclass(frozen=True, eq=False)
class Gathered(WeightFile):
    """A file that does not exist: the bytes of one box in C order, out of `pieces`; items have
    `item_bytes`.
    """

    pieces: tuple[Piece, ...] = ()
    item_bytes: int = 1
    place: str = ""

    @property
    def path(self) -> str:
        return self.place

    def moved(self, files: Files) -> WeightFile:
        if not self.pieces or files[self.pieces[0].file] is self.pieces[0].file:
            return self  # asked by the checkpoint itself, once a chunk
        return replace(self, pieces=tuple(piece._replace(file=files[piece.file]) for piece in self.pieces))

    def gather(self, read_into: ReadInto, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `offset` of the box; `read_into` reads files that exist."""
        if offset % self.item_bytes or len(buffer) % self.item_bytes:
            first = offset // self.item_bytes * self.item_bytes
            items = bytearray(-(-(offset + len(buffer) - first) // self.item_bytes) * self.item_bytes)
            self.gather(read_into, first, memoryview(items))
            buffer[:] = items[offset - first : offset - first + len(buffer)]
            return
        end = offset + len(buffer)
        for piece in self.pieces:
            for to, source, count, step in piece.rows(offset, end):
                self._copy_rows(read_into, piece, (to - offset, source, count, step), buffer)

    def _copy_rows(self, read_into: ReadInto, piece: Piece, rows: tuple[int, int, int, int], buffer: memoryview) -> None:
        to, source, count, step = rows
        to_step = piece.axes[-1].to if piece.axes else 0
        reach = (piece.row_bytes // self.item_bytes - 1) * piece.item_step + self.item_bytes
        together = step > 0 and (piece.item_step != self.item_bytes or step <= max(_CLOSE_BYTES, _CLOSE_ROWS * piece.row_bytes))
        at_once = max(1, (READ_BYTES - reach) // step + 1) if together else 1
        for row in range(0, count, at_once):
            number = min(at_once, count - row)
            here, there = to + row * to_step, source + row * step
            if number == 1 and piece.item_step == self.item_bytes:
                skip = max(0, -here)
                length = min(piece.row_bytes, len(buffer) - here) - skip
                read_into(piece.file, there + skip, buffer[here + skip : here + skip + length])
                continue
            block = memoryview(bytearray((number - 1) * step + reach))
            read_into(piece.file, there, block)
            for i in range(number):
                self._copy_row(piece, block[i * step : i * step + reach], buffer, here + i * to_step)

    def _copy_row(self, piece: Piece, row: memoryview, buffer: memoryview, to: int) -> None:
        """Copy a row that was read to byte `to` of `buffer`, as far as it lies in there."""
        skip = max(0, -to)
        stop = min(piece.row_bytes, len(buffer) - to)
        if piece.item_step == self.item_bytes:
            buffer[to + skip : to + stop] = row[skip:stop]
            return
        kind, size = _FORMATS[self.item_bytes], self.item_bytes
        items = row[: len(row) // size * size].cast(kind)[:: piece.item_step // size]
        buffer[to + skip : to + stop].cast(kind)[:] = items[skip // size : stop // size]


def as_chunks_of(base: Checkpoint, other: Checkpoint) -> tuple[Mapping[str, Stored], int]:
    """The tensors of `other`, in the chunks of `base` wherever both hold a tensor of one shape in
    different chunks; and how many tensors those are. Both are distributed checkpoints.
    """
    assert base.dcp is not None and other.dcp is not None
    result, gatherer = dict(other.tensors), _Gatherer(other)
    gathered = 0
    for fqn, wanted in _merged(base.dcp):
        found = other.dcp.folder.metadata.tensors.get(fqn)
        if found is None or other.dcp.kept.get(fqn) != "merge" or found.shape != wanted.shape:
            continue
        own = {_key(other.dcp, fqn, found, chunk): chunk for chunk in found.chunks}
        keys = {_key(base.dcp, fqn, wanted, chunk): chunk for chunk in wanted.chunks}
        if own.keys() == keys.keys() or any(" strides " in key for key in keys):
            continue
        for key in own:
            del result[key]
        for key, chunk in keys.items():
            result[key] = gatherer.box(key, fqn, found, chunk.offsets, chunk.sizes)
        gathered += 1
    in_order = [*(key for key in base.tensors if key in result), *(key for key in result if key not in base.tensors)]
    return {key: result[key] for key in in_order}, gathered


def whole(checkpoint: Checkpoint) -> Checkpoint:
    """A distributed checkpoint as one of whole tensors without a layout of its own; others as they
    are. What its trainer's loader needs beside it is left out.
    """
    parts = checkpoint.dcp
    if parts is None:
        return checkpoint
    tensors: dict[str, Stored] = {}
    gatherer = _Gatherer(checkpoint)
    for fqn, tensor in _merged(parts):
        keys = [_key(parts, fqn, tensor, chunk) for chunk in tensor.chunks]
        tensors[fqn] = (
            checkpoint.tensors[keys[0]]._replace(name=fqn)
            if keys == [fqn]
            else gatherer.box(fqn, fqn, tensor, (0,) * len(tensor.shape), tensor.shape)
        )
    inside = parts.place.inside
    own = {join(inside, name) if inside else name for name in (".metadata", *parts.folder.files)}
    side = list_side_files(parts.place.path, own)
    trainers = {".metadata", ".metadata.json", "metadata.json", "common.pt"}
    kept = tuple(name for name in side.kept if name not in trainers)
    side = replace(side, kept=kept, skipped=(*side.skipped, *(name for name in side.kept if name in trainers)))
    return replace(checkpoint, layout="whole", tensors=tensors, side_files=side, dcp=None)


def _merged(parts: DcpParts) -> Iterator[tuple[str, Tensor]]:
    for fqn, tensor in parts.folder.metadata.tensors.items():
        if parts.kept.get(fqn) == "merge":
            yield fqn, tensor


def _key(parts: DcpParts, fqn: str, tensor: Tensor, chunk: Chunk) -> str:
    return chunk_key(fqn, tensor, chunk, parts.payloads[chunk.item].strides)


class _Gatherer:
    """Makes boxes of the tensors of one checkpoint."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        assert checkpoint.dcp is not None
        self._parts = checkpoint.dcp
        self._source = checkpoint.files[0].source
        self._files = {file.name: file for file in checkpoint.files}
        self._sorted: dict[str, tuple[list[Chunk], list[int], int]] = {}

    def box(self, key: str, fqn: str, tensor: Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> Stored:
        """The box of `sizes` from `offsets` on, gathered from the chunks of `tensor`. Raises
        UnsupportedError.
        """
        place = self._parts.place
        item = DTYPES[tensor.dtype].item_bytes
        pieces = []
        for chunk in self._near(fqn, tensor, offsets, sizes):
            payload = self._parts.payloads[chunk.item]
            file = self._files[join(place.inside, payload.file) if place.inside else payload.file]
            piece = _piece(file, payload.offset, payload.strides, chunk, offsets, sizes, item)
            if piece is None:
                continue
            if piece.item_step != item and payload.num_bytes > _LARGEST_PERMUTED:
                raise UnsupportedError(
                    f"`{fqn}` in {place.folder} is stored permuted (strides {payload.strides}) and too large to be gathered",
                    details=[f"found     {payload.num_bytes} bytes", f"expected  at most {_LARGEST_PERMUTED} bytes"],
                    hint=f"copy it from the base:  --exclude {fqn!r}",
                )
            pieces.append(piece)
        size = math.prod(sizes) * item
        info = TensorInfo(tensor.dtype, tuple(sizes), 0, size)
        header = Header({key: info}, {}, 0, size, "")
        return Stored(Gathered(self._source, key, header, tuple(pieces), item, place.folder), key, info)

    def _near(self, fqn: str, tensor: Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> Sequence[Chunk]:
        """The chunks that may share elements with a box, by their rows: a tensor on hundreds of
        ranks has hundreds of chunks and boxes.
        """
        if not tensor.shape:
            return tensor.chunks
        if fqn not in self._sorted:
            chunks = sorted(tensor.chunks, key=lambda chunk: chunk.offsets)
            self._sorted[fqn] = chunks, [chunk.offsets[0] for chunk in chunks], max(chunk.sizes[0] for chunk in chunks)
        chunks, starts, longest = self._sorted[fqn]
        return chunks[bisect.bisect_right(starts, offsets[0] - longest) : bisect.bisect_left(starts, offsets[0] + sizes[0])]


def _piece(
    file: WeightFile, begin: int, strides: Sequence[int], chunk: Chunk, offsets: Sequence[int], sizes: Sequence[int], item: int
) -> Piece | None:
    """The part of a box that lies in `chunk`, None if there is none."""
    starts = [max(at, c) for at, c in zip(offsets, chunk.offsets, strict=True)]
    counts = [
        min(at + n, c + m) - start for at, n, c, m, start in zip(offsets, sizes, chunk.offsets, chunk.sizes, starts, strict=True)
    ]
    if any(count <= 0 for count in counts):
        return None
    steps = [item, *itertools.accumulate(reversed(sizes[1:]), lambda step, n: step * n, initial=item)]
    to_steps = list(reversed(steps[1:])) if sizes else []
    to = sum((start - at) * step for start, at, step in zip(starts, offsets, to_steps, strict=True))
    source = begin + sum((start - c) * stride * item for start, c, stride in zip(starts, chunk.offsets, strides, strict=True))
    axes = [Axis(n, step, stride * item) for n, step, stride in zip(counts, to_steps, strides, strict=True) if n > 1]
    row_bytes = item_step = item
    if axes and axes[-1].to == item:
        last = axes.pop()
        row_bytes, item_step = last.num * item, last.source
    while axes and item_step == item and axes[-1].to == axes[-1].source == row_bytes:
        row_bytes *= axes.pop().num
    return Piece(file, to, source, tuple(axes), row_bytes, item_step)
