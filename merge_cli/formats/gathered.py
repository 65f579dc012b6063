"""A box of a tensor out of the ranges of files that hold its values.

A gathered box is a `Stored` tensor like any other, whose file is made up: reading bytes of it reads
the pieces that they consist of (`Gathered.gather`), so plan and engine need not know. A piece lies
in the box and in its file as rows of equal distance. Rows that are close together in the file are
read together, up to 1 MiB at once; others one by one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from merge_cli.formats.checkpoint import Stored
from merge_cli.formats.safetensors import DTYPES, Header, TensorInfo
from merge_cli.formats.weight_file import Files, WeightFile
from merge_cli.stores.store import Source

READ_BYTES = 1 << 20
_CLOSE_BYTES = 4096  # rows no further apart are read together, whatever lies between them
_CLOSE_ROWS = 4
_FORMATS: Mapping[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}

ReadInto = Callable[[WeightFile, int, memoryview], None]


class Box(NamedTuple):
    """A part of a tensor: from `offsets` on, of `sizes`, in elements."""

    offsets: Sequence[int]
    sizes: Sequence[int]


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


def gathered(source: Source, place: str, key: str, dtype: str, shape: Sequence[int], pieces: Iterable[Piece | None]) -> Stored:
    """The tensor `key` of the checkpoint at `place`, out of the pieces that there are; `source` is
    any file of it.
    """
    num_bytes = DTYPES[dtype].num_bytes(math.prod(shape))
    info = TensorInfo(dtype, tuple(shape), 0, num_bytes)
    header = Header({key: info}, {}, 0, num_bytes, "")
    found = tuple(piece for piece in pieces if piece is not None)
    return Stored(Gathered(source, key, header, found, DTYPES[dtype].item_bytes, place), key, info)


def row_major(sizes: Sequence[int]) -> tuple[int, ...]:
    """The strides, in elements, of a tensor of `sizes` in C order."""
    return tuple(itertools.accumulate(reversed(sizes[1:]), lambda stride, n: stride * n, initial=1))[::-1] if sizes else ()


def piece_of(file: WeightFile, begin: int, strides: Sequence[int], part: Box, box: Box, item: int) -> Piece | None:
    """The piece of `box` that lies in `part`, whose first element of `item` bytes is at byte
    `begin` of `file`, with `strides` in elements; None if there is none.
    """
    (offsets, sizes), (part_offsets, part_sizes) = box, part
    starts = [max(at, c) for at, c in zip(offsets, part_offsets, strict=True)]
    counts = [
        min(at + n, c + m) - start for at, n, c, m, start in zip(offsets, sizes, part_offsets, part_sizes, starts, strict=True)
    ]
    if any(count <= 0 for count in counts):
        return None
    to_steps = [stride * item for stride in row_major(sizes)]
    to = sum((start - at) * step for start, at, step in zip(starts, offsets, to_steps, strict=True))
    source = begin + sum((start - c) * stride * item for start, c, stride in zip(starts, part_offsets, strides, strict=True))
    axes = [Axis(n, step, stride * item) for n, step, stride in zip(counts, to_steps, strides, strict=True) if n > 1]
    row_bytes = item_step = item
    if axes and axes[-1].to == item:
        last = axes.pop()
        row_bytes, item_step = last.num * item, last.source
    while axes and item_step == item and axes[-1].to == axes[-1].source == row_bytes:
        row_bytes *= axes.pop().num
    return Piece(file, to, source, tuple(axes), row_bytes, item_step)
