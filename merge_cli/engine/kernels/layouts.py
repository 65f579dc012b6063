"""Which quantized tensors the native kernel decodes, and how it finds their parts (no torch)."""

from __future__ import annotations

from typing import NamedTuple

from merge_cli.formats.quantization.codec import Codec
from merge_cli.formats.quantization.fp8 import Fp8
from merge_cli.formats.quantization.integer import Integer
from merge_cli.formats.quantization.layout import Grid, Shape, matrix
from merge_cli.formats.quantization.mxfp4 import GROUP as MX_GROUP
from merge_cli.formats.quantization.mxfp4 import MxFp4, MxFp4Transposed
from merge_cli.formats.quantization.nvfp4 import GROUP as NV_GROUP
from merge_cli.formats.quantization.nvfp4 import NvFp4

DECODED = (Fp8, Integer, MxFp4, MxFp4Transposed, NvFp4)
"""The codecs of which `layout_of` gives a layout."""
_ANY = (1 << 62) - 1  # rows or columns


class Layout(NamedTuple):
    """How a tensor is quantized, as rows of its last dimension.

    `codes`: E4M3, E2M1, I8, the bits of packed integers with an offset, or "E2M1 transposed", whose
    stored rows are the columns. `below` and `beside` count the blocks of a matrix. `zeros`: "",
    "I8" or "packed". `global_scale`: "", "multiplies", "divides".
    """

    codes: str
    columns: int
    row_bytes: int
    matrix_rows: int
    block_rows: int
    block_columns: int
    below: int
    beside: int
    scale_dtype: str
    zeros: str = ""
    global_scale: str = ""


def layout_of(codec: Codec, shape: Shape) -> Layout | None:
    """The layout of a tensor of `shape`, none of whose dimensions is 0; None where torch has to
    decode it.
    """
    cols = shape[-1]
    if isinstance(codec, Fp8):
        return _on_grid(codec.grid, shape, "E4M3", cols, codec.scale_dtype)
    if isinstance(codec, MxFp4):
        return _on_grid(Grid(1, MX_GROUP), shape, "E2M1", cols // 2, codec.scale_dtype)
    if isinstance(codec, MxFp4Transposed):
        rows = shape[-2]
        return Layout("E2M1 transposed", cols, rows // 2, rows, 1, MX_GROUP, rows, -(-rows // MX_GROUP), "F8_E8M0")
    if isinstance(codec, NvFp4):
        layout = _on_grid(Grid(1, NV_GROUP), shape, "E2M1", cols // 2, "F8_E4M3")
        return layout._replace(global_scale="multiplies" if codec.inverse else "divides")
    if isinstance(codec, Integer):
        begin, end = codec.part_range("codes", shape, 0, 1)
        kind = str(codec.num_bits) if codec.packed else "I8"
        return _on_grid(codec.grid, shape, kind, end - begin, codec.scale_dtype)._replace(zeros=codec.zero)
    return None


def _on_grid(grid: Grid, shape: Shape, codes: str, row_bytes: int, scale_dtype: str) -> Layout:
    if grid.whole:
        return Layout(codes, shape[-1], row_bytes, _ANY, _ANY, _ANY, 1, 1, scale_dtype)
    return Layout(codes, shape[-1], row_bytes, matrix(shape)[0], *grid.block(shape), *grid.blocks(shape), scale_dtype)
