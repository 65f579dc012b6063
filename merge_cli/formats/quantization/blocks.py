"""Scales meet values: vectorised over the blocks of a `Grid`, without a padded copy of the values
(torch).

`values` are float32 [rows, columns], the rows of a `RowRange`. Per block: [rows of blocks, blocks
beside each other]; per row: the same, repeated for each row of values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from merge_cli.formats.quantization.bits import look_up, pack, to_fp4
from merge_cli.formats.quantization.layout import RowRange, matrix

SAME = 2.0**-18
"""Relative difference up to which a value lies on a grid: what rounding the float32 mean of many
inputs may do.
"""

_OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mul": Tensor.mul_,
    "div": Tensor.div_,
    "add": Tensor.add_,
    "sub": Tensor.sub_,
}


def row_numbers(cut: RowRange, device: torch.device) -> Tensor:
    """int64 [rows]: the number of each row within its matrix."""
    return torch.arange(cut.r0, cut.r1, device=device) % matrix(cut.shape)[0]


def per_row(per_block: Tensor, cut: RowRange) -> Tensor:
    """[rows, blocks] from [rows of blocks, blocks]; unchanged where a row has its own, or one is
    for all.
    """
    height = cut.grid.block(cut.shape)[0]
    if cut.grid.whole or height == 1:
        return per_block
    matrices = torch.arange(cut.r0, cut.r1, device=per_block.device) // matrix(cut.shape)[0]
    block_row = matrices * cut.grid.blocks(cut.shape)[0] + row_numbers(cut, per_block.device) // height
    return per_block.index_select(0, block_row - cut.grid.block_rows_of(cut.shape, cut.r0, cut.r1)[0])


def pick_last(fields: Tensor, place: Tensor) -> Tensor:
    """[rows, n] from [rows, n, places]: for each row the field at its `place`, int64 [rows]."""
    return fields.gather(2, place[:, None, None].expand(-1, fields.shape[1], 1)).squeeze(2)


def combine_(values: Tensor, operation: Literal["mul", "div", "add", "sub"], per_block: Tensor, cut: RowRange) -> Tensor:
    """`values` after `operation`, in place, with what `per_block` holds for each value's block."""
    combine = _OPERATIONS[operation]
    rowwise = per_row(per_block, cut)
    width = max(1, cut.cols) if cut.grid.whole else cut.grid.block(cut.shape)[1]
    full, rest = divmod(cut.cols, width)
    if full:
        combine(values[:, : full * width].view(-1, full, width), rowwise[:, :full, None])
    if rest:
        combine(values[:, full * width :], rowwise[:, full:])
    return values


def block_max(values: Tensor, cut: RowRange) -> Tensor:
    """The largest of 0 and the values in each block; NaN if one is NaN."""
    if not values.numel():
        return values.new_zeros(cut.num_block_rows, cut.num_block_cols)
    if cut.grid.whole:
        return values.amax().clamp_(min=0).view(1, 1)
    height, width = cut.grid.block(cut.shape)
    full, rest = divmod(cut.cols, width)
    columns = [values[:, : full * width].view(-1, full, width).amax(2)] if full else []
    if rest:
        columns.append(values[:, full * width :].amax(1, keepdim=True))
    across = torch.cat(columns, 1).clamp_(min=0)
    if height == 1:
        return across
    together = matrix(cut.shape)[0] if cut.grid.ragged(cut.shape) else cut.r1 - cut.r0
    stacked = across.view(-1, together, cut.num_block_cols)
    if missing := -together % height:
        stacked = torch.nn.functional.pad(stacked, (0, 0, 0, missing))
    return stacked.reshape(-1, height, cut.num_block_cols).amax(1)


def on_grid(values: Tensor, decoded: Tensor, cut: RowRange) -> Tensor:
    """bool per block: whether `decoded` equals `values` up to rounding everywhere. Overwrites
    `decoded`.
    """
    excess = decoded.sub_(values).abs_().sub_(values.abs().mul_(SAME))
    return block_max(excess, cut) == 0


def tensor_stats(values: Tensor, off_grid: Tensor | None = None) -> Tensor:
    """float32 [3]: largest value, largest negated value (both at least 0), 1 if a block is off the
    base's grid.
    """
    stats = values.new_zeros(3)
    if values.numel():
        low, high = torch.aminmax(values)
        stats[0], stats[1] = high.clamp(min=0), low.neg().clamp(min=0)
        stats[2] = 1.0 if off_grid is None else off_grid.any().to(torch.float32)
    return stats


def fp4_codes(values: Tensor, scales: Tensor, cut: RowRange) -> Tensor:
    """Bytes of the E2M1 codes of `values` / `scales`, two a byte."""
    return pack(to_fp4(combine_(values.clone(), "div", scales, cut)), 4).flatten()


def fp4_values(codes: Tensor, scales: Tensor, cut: RowRange) -> Tensor:
    """float32 [rows, columns]: the E2M1 `codes` times `scales`."""
    return combine_(look_up(codes, "fp4").view(cut.r1 - cut.r0, cut.cols), "mul", scales, cut)
