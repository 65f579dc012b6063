"""FP8 weights (E4M3): one byte a value, a scale for each block, channel, group or tensor.

value = code * scale, whatever the scale is called (`weight_scale_inv` too). Read and written:

- DeepSeek-V3, Kimi-K2, Qwen, GLM: `X.weight` with `X.weight_scale_inv` F32 or BF16, blocks of 128 x
  128, the last ones smaller; `scale_fmt: ue8m0` makes the scales powers of two, stored as F32, as
  U8 exponents, or (DeepSeek-V4, `X.scale`) as F8_E8M0. Fused experts: `gate_up_proj` with
  `gate_up_proj_scale_inv`, a stack of matrices.
- compressed-tensors float-quantized and naive-quantized, ModelOpt FP8, FBGEMM: `weight_scale` per
  tensor, channel, group or block. mxfp8-quantized: groups of 32 with U8 exponents.

New scales: amax / 448 of the block, rounded to the scale's dtype before the codes are made ("amax";
the scale of an all-zero block is 1); rounded up to a power of two ("ceil": DeepSeek's ue8m0); or
compressed-tensors' MX exponent ("mx"). Codes: value / scale, clamped to +-448, rounded to nearest
even.

Requantizing what was just decoded gives the same codes, and with `base` the same scales. Without
`base`: the same scales where the block's largest code is +-448 (ue8m0: above 224) and the scale has
at most 21 significant bits (BF16, powers of two); F32 scales may then differ in the last bit, and a
block whose largest code is not 448 gets another scale, hence other values (up to 1/16 relative).

Sources: DeepSeek-V3 `inference/kernel.py`, transformers `integrations/finegrained_fp8.py`,
compressed-tensors `quantization/utils/helpers.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from merge_cli.formats.quantization.layout import SCALE_BYTES, Grid, RowRange, Shape

if TYPE_CHECKING:
    from torch import Tensor

    from merge_cli.formats.quantization.codec import Parts


@dataclass(frozen=True, slots=True)
class Fp8:
    """E4M3 codes with scales of dtype `scale_dtype` on `grid`; parts: codes, scale."""

    grid: Grid
    scale_dtype: str = "F32"
    rule: Literal["amax", "ceil", "mx"] = "amax"

    @property
    def scheme(self) -> str:
        """`fp8 block 128x128`."""
        return f"fp8 {self.grid}" + {"amax": "", "ceil": " ue8m0", "mx": " mx"}[self.rule]

    @property
    def needs_stats(self) -> bool:
        """True for one scale per tensor."""
        return self.grid.whole

    @property
    def per_tensor_roles(self) -> frozenset[str]:
        """The scale, where there is only one."""
        return frozenset({"scale"} if self.grid.whole else ())

    def row_step(self, shape: Shape) -> int:
        """Height of a block."""
        return self.grid.row_step(shape)

    def part_range(self, role: str, shape: Shape, r0: int, r1: int) -> tuple[int, int]:
        """Bytes of the codes or of the scales of rows r0..r1."""
        if role == "codes":
            return r0 * shape[-1], r1 * shape[-1]
        return self.grid.byte_range(shape, r0, r1, SCALE_BYTES[self.scale_dtype])

    def decode(self, parts: Parts, shape: Shape, r0: int, r1: int) -> Tensor:
        """code * scale, one rounding."""
        cut = RowRange(self.grid, shape, r0, r1)
        return self._values(parts["codes"], self._scales(parts, cut), cut)

    def stats(self, values: Tensor, shape: Shape, r0: int, r1: int, *, base: Parts | None = None) -> Tensor:
        """Largest magnitudes, and whether `values` leave the grid of the base's scale."""
        from merge_cli.formats.quantization.blocks import tensor_stats

        cut = RowRange(self.grid, shape, r0, r1)
        return tensor_stats(values, None if base is None else ~self._fits(values, self._scales(base, cut), cut))

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
        """Codes and scales of rows r0..r1; `base` needs the role scale only."""
        from merge_cli.formats.quantization import bits, blocks

        cut = RowRange(self.grid, shape, r0, r1)
        if not self.grid.whole:
            stats, amax = None, blocks.block_max(values.abs(), cut)
        else:
            stats = self.stats(values, shape, r0, r1, base=base) if stats is None else stats
            amax = stats[:2].amax().view(1, 1)
        scales = self._new_scales(amax)
        if base is not None:
            old = self._scales(base, cut)
            keep = self._fits(values, old, cut) if stats is None else stats[2] == 0
            scales = old.where(keep, scales)
        return {"codes": self._codes(values, scales, cut), "scale": bits.write_floats(scales, self.scale_dtype)}

    def _scales(self, parts: Parts, cut: RowRange) -> Tensor:
        from merge_cli.formats.quantization.bits import read_floats

        return read_floats(parts["scale"], self.scale_dtype).view(cut.num_block_rows, cut.num_block_cols)

    def _new_scales(self, amax: Tensor) -> Tensor:
        from merge_cli.formats.quantization import bits

        if self.rule == "mx":
            return bits.shared_exponent(amax, 8, round_up=True)
        scales = bits.divide(amax, bits.FP8_MAX)
        if self.rule == "ceil":
            scales = bits.power_of_two_at_least(scales)
        return bits.as_stored(scales, self.scale_dtype)

    def _codes(self, values: Tensor, scales: Tensor, cut: RowRange) -> Tensor:
        """E4M3 bytes."""
        from merge_cli.formats.quantization import bits, blocks

        return bits.to_fp8(blocks.combine_(values.clone(), "div", scales, cut)).flatten()

    def _values(self, codes: Tensor, scales: Tensor, cut: RowRange) -> Tensor:
        from merge_cli.formats.quantization import bits, blocks

        return blocks.combine_(bits.look_up(codes, "e4m3").view(cut.r1 - cut.r0, cut.cols), "mul", scales, cut)

    def _fits(self, values: Tensor, scales: Tensor, cut: RowRange) -> Tensor:
        """bool per block: whether the values are codes times `scales`."""
        from merge_cli.formats.quantization.blocks import on_grid

        return on_grid(values, self._values(self._codes(values, scales, cut), scales, cut), cut)
