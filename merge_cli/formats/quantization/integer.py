"""Integer weights of compressed-tensors: int8 in bytes, or 2, 4 and 8 bits packed into int32 words.

value = (code - zero point) * scale. Parts: `weight` I8 (int-quantized, naive-quantized) or
`weight_packed` I32 with `weight_shape` (pack-quantized); `weight_scale`; for asymmetric schemes
`weight_zero_point`, which pack-quantized packs too, down the rows. Kimi-K2-Thinking and later are
pack-quantized, 4 bits, groups of 32.

Packed: code + 2^(bits - 1), lowest bits first, each row padded to whole words with zero bits. Other
widths than 2, 4 and 8 are refused when pairing: versions of compressed-tensors disagree on their
layout.

New scales: amax over half of the code range, (2^bits - 1) / 2 (7.5 for 4 bits, 127.5 for 8), as
compressed-tensors computes it; asymmetric: (max - min) / (2^bits - 1) and zero point lowest code -
min / scale, rounded, where 0 always lies between min and max. The scale of an all-zero block is 1.
Codes: value / scale + zero point, clamped, rounded to nearest even. `lowest` -7 stands for the
symmetric range that Kimi's training used: amax / 7, codes -7..7.

Requantizing what was just decoded is the identity with `base`. Without it: for `lowest` = -7 if a
code of the group is +-7; else not, since amax / 7.5 of a group whose largest code is 7 is a smaller
scale (same codes, values times 14/15).

Sources: compressed-tensors `compressors/pack_quantized`, `quantization/utils/helpers.py`
(`calculate_qparams`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from merge_cli.errors import InputError
from merge_cli.formats.quantization.layout import SCALE_BYTES, Grid, RowRange, Shape, ceil_div, matrix

if TYPE_CHECKING:
    from torch import Tensor

    from merge_cli.formats.quantization.codec import Parts


@dataclass(frozen=True, slots=True)
class Integer:
    """Integer codes on `grid`; parts: codes, scale, zero (if `zero`), shape (if `shape_dtype`, I64
    or I32).
    """

    grid: Grid
    scale_dtype: str
    num_bits: int = 8
    packed: bool = False
    lowest: int = -128
    zero: Literal["", "I8", "packed"] = ""
    shape_dtype: str = ""

    @property
    def scheme(self) -> str:
        """`int4 group 32, packed`."""
        zero = ", asymmetric" if self.zero else ""
        return f"int{self.num_bits} {self.grid}{', packed' if self.packed else ''}{zero}"

    @property
    def needs_stats(self) -> bool:
        """True for one scale per tensor."""
        return self.grid.whole

    @property
    def per_tensor_roles(self) -> frozenset[str]:
        """The stored shape; scale and zero point where there is only one."""
        return frozenset({"shape", "scale", "zero"} if self.grid.whole else {"shape"})

    def row_step(self, shape: Shape) -> int:
        """Height of a block, and the rows whose zero points share a word."""
        step = self.grid.row_step(shape)
        if self.zero != "packed":
            return step
        rows, together = matrix(shape)[0], math.lcm(step, self._in_word)
        return together if rows % together == 0 or len(shape) < 3 else rows

    def part_range(self, role: str, shape: Shape, r0: int, r1: int) -> tuple[int, int]:
        """Bytes of rows r0..r1 in a part."""
        if role == "shape":
            return 0, len(shape) * (8 if self.shape_dtype == "I64" else 4)
        if role == "codes":
            return r0 * self._row_bytes(shape), r1 * self._row_bytes(shape)
        if role == "scale":
            return self.grid.byte_range(shape, r0, r1, SCALE_BYTES[self.scale_dtype])
        if self.zero == "I8":
            return self.grid.byte_range(shape, r0, r1, 1)
        return self._zero_words.byte_range(self._zero_shape(shape), r0, r1, 4)

    def decode(self, parts: Parts, shape: Shape, r0: int, r1: int) -> Tensor:
        """(code - zero point) * scale; raises InputError if the stored shape is not the one that
        was planned for.
        """
        if self.shape_dtype:
            self.check_stored_shape(bytes(parts["shape"].tolist()), shape)
        cut = RowRange(self.grid, shape, r0, r1)
        return self._values(parts["codes"], *self._scales_and_zeros(parts, cut), cut)

    def check_stored_shape(self, stored: bytes, shape: Shape) -> None:
        """Raise InputError unless the part "shape" is `shape`, the one that was planned for."""
        width = 8 if self.shape_dtype == "I64" else 4
        found = [int.from_bytes(stored[i : i + width], "little", signed=True) for i in range(0, len(stored), width)]
        if found != list(shape):
            raise InputError(
                "weight_shape contradicts the packed weight",
                details=[f"stored weight_shape {found}", f"from headers {list(shape)}"],
            )

    def stats(self, values: Tensor, shape: Shape, r0: int, r1: int, *, base: Parts | None = None) -> Tensor:
        """Largest value, largest negated value, and whether `values` leave the grid of the base's
        scale.
        """
        from merge_cli.formats.quantization.blocks import tensor_stats

        cut = RowRange(self.grid, shape, r0, r1)
        return tensor_stats(values, None if base is None else ~self._fits(values, *self._scales_and_zeros(base, cut), cut))

    def encode(
        self,
        values: Tensor,
        shape: Shape,
        r0: int,
        r1: int,
        *,
        stats: Tensor | None = None,
        base: Parts | None = None,
    ) -> dict[str, Tensor]:
        """Codes, scales and zero points of rows r0..r1, and the shape; `base` needs scale and zero
        only.
        """
        from merge_cli.formats.quantization import bits, blocks

        cut = RowRange(self.grid, shape, r0, r1)
        if self.grid.whole:
            stats = self.stats(values, shape, r0, r1, base=base) if stats is None else stats
            high, low = stats[0].view(1, 1), stats[1].view(1, 1)
        elif self.zero:
            stats = None
            high, low = blocks.block_max(values, cut), blocks.block_max(values.neg(), cut)
        else:
            stats = None
            high = low = blocks.block_max(values.abs(), cut)
        scales, zeros = self._new_scales(high, low)
        if base is not None:
            old_scales, old_zeros = self._scales_and_zeros(base, cut)
            keep = self._fits(values, old_scales, old_zeros, cut) if stats is None else stats[2] == 0
            scales = old_scales.where(keep, scales)
            if zeros is not None and old_zeros is not None:
                zeros = old_zeros.where(keep, zeros)
        parts = {
            "codes": self._codes(values, scales, zeros, cut),
            "scale": bits.write_floats(scales, self.scale_dtype),
        }
        if zeros is not None:
            packed = self.zero == "packed"
            parts["zero"] = self._write_zeros(zeros, shape) if packed else bits.write_floats(zeros, "I8")
        if self.shape_dtype:
            parts["shape"] = bits.write_integers(shape, self.shape_dtype, values.device)
        return parts

    @property
    def _highest(self) -> int:
        return (1 << (self.num_bits - 1)) - 1

    @property
    def _in_word(self) -> int:
        return 32 // self.num_bits

    @property
    def _zero_words(self) -> Grid:
        """The words of packed zero points: one for `_in_word` rows of each column of groups."""
        return Grid(self._in_word, 1)

    def _zero_shape(self, shape: Shape) -> Shape:
        return (*shape[:-1], self.grid.blocks(shape)[1])

    def _row_bytes(self, shape: Shape) -> int:
        return ceil_div(shape[-1] * self.num_bits, 32) * 4 if self.packed else shape[-1]

    def _stored_cols(self, shape: Shape) -> int:
        """Columns with the padding of the last word."""
        return self._row_bytes(shape) * 8 // self.num_bits if self.packed else shape[-1]

    def _new_scales(self, high: Tensor, low: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scales and zero points per block from its largest value and largest negated value (both
        at least 0).
        """
        from merge_cli.formats.quantization.bits import as_stored, divide

        if not self.zero:
            amax = high.maximum(low)
            return as_stored(divide(amax, (self._highest - self.lowest) / 2), self.scale_dtype), None
        scales = as_stored(divide(high + low, self._highest - self.lowest), self.scale_dtype)
        return scales, (low / scales).add_(self.lowest).clamp_(self.lowest, self._highest).round_()

    def _codes(self, values: Tensor, scales: Tensor, zeros: Tensor | None, cut: RowRange) -> Tensor:
        """Bytes of the codes, packed if the scheme packs them."""
        from merge_cli.formats.quantization import bits, blocks

        codes = blocks.combine_(values.clone(), "div", scales, cut)
        if zeros is not None:
            blocks.combine_(codes, "add", zeros, cut)
        codes.clamp_(self.lowest, self._highest).round_()
        if not self.packed:
            return bits.write_floats(codes, "I8")
        fields = bits.to_fields(codes, self.num_bits)
        return bits.pack(bits.pad_last(fields, self._stored_cols(cut.shape) - cut.cols), self.num_bits).flatten()

    def _values(self, codes: Tensor, scales: Tensor, zeros: Tensor | None, cut: RowRange) -> Tensor:
        from merge_cli.formats.quantization import bits, blocks

        values = bits.look_up(codes, f"int{self.num_bits}") if self.packed else bits.read_floats(codes, "I8")
        values = values.view(cut.r1 - cut.r0, self._stored_cols(cut.shape))[:, : cut.cols].contiguous()
        if zeros is not None:
            blocks.combine_(values, "sub", zeros, cut)
        return blocks.combine_(values, "mul", scales, cut)

    def _fits(self, values: Tensor, scales: Tensor, zeros: Tensor | None, cut: RowRange) -> Tensor:
        """bool per block: whether the values are codes on the grid of `scales` and `zeros`."""
        from merge_cli.formats.quantization.blocks import on_grid

        return on_grid(values, self._values(self._codes(values, scales, zeros, cut), scales, zeros, cut), cut)

    def _scales_and_zeros(self, parts: Parts, cut: RowRange) -> tuple[Tensor, Tensor | None]:
        from merge_cli.formats.quantization.bits import read_floats

        scales = read_floats(parts["scale"], self.scale_dtype).view(cut.num_block_rows, cut.num_block_cols)
        if not self.zero:
            return scales, None
        if self.zero == "I8":
            return scales, read_floats(parts["zero"], "I8").view(cut.num_block_rows, cut.num_block_cols)
        return scales, self._read_zeros(parts["zero"], cut)

    def _read_zeros(self, data: Tensor, cut: RowRange) -> Tensor:
        """float32 [rows, groups] from words that each hold the zero points of `_in_word` rows of
        one group.
        """
        from merge_cli.formats.quantization import bits, blocks

        words = RowRange(self._zero_words, self._zero_shape(cut.shape), cut.r0, cut.r1)
        fields = bits.look_up(data, f"int{self.num_bits}").view(words.num_block_rows, cut.num_block_cols, self._in_word)
        rowwise = blocks.per_row(fields.flatten(1), words).view(cut.r1 - cut.r0, cut.num_block_cols, self._in_word)
        return blocks.pick_last(rowwise, blocks.row_numbers(words, data.device) % self._in_word)

    def _write_zeros(self, zeros: Tensor, shape: Shape) -> Tensor:
        """Bytes of the packed words; rows that end inside a word are padded with zero bits."""
        from merge_cli.formats.quantization import bits

        beside = zeros.shape[1]
        rows = matrix(shape)[0]
        together = rows if len(shape) > 2 and rows % self._in_word else zeros.shape[0]
        down = bits.to_fields(zeros, self.num_bits).view(-1, together, beside).transpose(1, 2)
        padded = bits.pad_last(down, -together % self._in_word)
        words = padded.reshape(padded.shape[0], beside, -1, self._in_word).transpose(1, 2)
        return bits.pack(words, self.num_bits).flatten()
