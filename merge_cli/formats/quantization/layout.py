"""Which scale belongs to which value, and where its bytes are: plain integers, no torch.

A `Grid` lays blocks of `block_rows` x `block_cols` over each matrix of a tensor (the last two
dimensions; leading ones, such as experts, are a stack of matrices). The last block of a row or
column may be smaller. Scales are stored as [..., ceil(M / block_rows), ceil(K / block_cols)],
row-major.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

Shape = tuple[int, ...]

SCALE_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E8M0": 1, "U8": 1, "I8": 1}


def ceil_div(value: int, divisor: int) -> int:
    """`value / divisor`, rounded up."""
    return -(-value // divisor)


def matrix(shape: Shape) -> tuple[int, int]:
    """Rows and columns of one matrix of the stack; a vector is one row."""
    return (shape[-2] if len(shape) > 1 else 1), shape[-1]


def num_rows(shape: Shape) -> int:
    """Rows of the 2-D view: the product of all dimensions but the last."""
    return math.prod(shape[:-1])


@dataclass(frozen=True, slots=True)
class Grid:
    """Blocks that share a scale. 0 rows or columns: all of the matrix. `whole`: one scale for the
    whole tensor.
    """

    block_rows: int = 0
    block_cols: int = 0
    whole: bool = False

    def __str__(self) -> str:
        if self.whole:
            return "per tensor"
        if not self.block_rows:
            return "per matrix" if not self.block_cols else "per column"
        if self.block_rows > 1:
            return f"block {self.block_rows}x{self.block_cols}"
        return f"group {self.block_cols}" if self.block_cols else "per channel"

    def block(self, shape: Shape) -> tuple[int, int]:
        """Rows and columns of a full block, never more than a matrix has (and at least 1)."""
        rows, cols = matrix(shape)
        return max(1, min(self.block_rows or rows, rows)), max(1, min(self.block_cols or cols, cols))

    def blocks(self, shape: Shape) -> tuple[int, int]:
        """Blocks below and beside each other in one matrix (1, 1 if there is one scale for all)."""
        if self.whole:
            return 1, 1
        rows, cols = matrix(shape)
        block_rows, block_cols = self.block(shape)
        return ceil_div(rows, block_rows), ceil_div(cols, block_cols)

    def ragged(self, shape: Shape) -> bool:
        """Whether blocks end early inside a stack, so that only whole matrices can be cut out of
        it.
        """
        rows, _ = matrix(shape)
        return not self.whole and num_rows(shape) > rows and rows % self.block(shape)[0] != 0

    def row_step(self, shape: Shape) -> int:
        """Rows of the 2-D view that share a row of scales and so stay together."""
        if self.whole:
            return 1
        return matrix(shape)[0] if self.ragged(shape) else self.block(shape)[0]

    def block_row(self, shape: Shape, row: int) -> int:
        """The row of scales that row `row` of the 2-D view uses."""
        rows, _ = matrix(shape)
        return row // rows * self.blocks(shape)[0] + row % rows // self.block(shape)[0]

    def block_rows_of(self, shape: Shape, r0: int, r1: int) -> tuple[int, int]:
        """Rows of scales [first, last + 1) that rows r0..r1 use."""
        if self.whole:
            return 0, 1
        first = self.block_row(shape, r0) if r0 < r1 else 0
        return first, (self.block_row(shape, r1 - 1) + 1 if r0 < r1 else first)

    def byte_range(self, shape: Shape, r0: int, r1: int, itemsize: int) -> tuple[int, int]:
        """Bytes of the scales (or zero points) of rows r0..r1."""
        first, end = self.block_rows_of(shape, r0, r1)
        row_bytes = self.blocks(shape)[1] * itemsize
        return first * row_bytes, end * row_bytes


@dataclass(frozen=True, slots=True)
class RowRange:
    """Rows r0..r1 of the 2-D view of a tensor of shape `shape` under `grid`, cut at multiples of
    its row step.
    """

    grid: Grid
    shape: Shape
    r0: int
    r1: int

    @property
    def cols(self) -> int:
        """Columns of the 2-D view."""
        return self.shape[-1]

    @property
    def num_block_rows(self) -> int:
        """Rows of blocks."""
        first, end = self.grid.block_rows_of(self.shape, self.r0, self.r1)
        return end - first

    @property
    def num_block_cols(self) -> int:
        """The number of blocks side by side in a row."""
        return self.grid.blocks(self.shape)[1]
