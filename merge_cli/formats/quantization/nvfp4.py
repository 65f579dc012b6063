"""NVFP4 weights: two E2M1 codes a byte, an E4M3 scale for each group of 16, one float32 scale for
the tensor.

- compressed-tensors nvfp4-pack-quantized: `weight_packed` U8 [M, K/2], `weight_scale` F8_E4M3 [M,
  K/16], `weight_global_scale` F32 [1]; value = E2M1 * (scale / global scale).
- ModelOpt: `weight` U8, `weight_scale` F8_E4M3, `weight_scale_2` F32; value = E2M1 * (scale *
  scale_2).

New scales: global = 448 * 6 / amax of the tensor (ModelOpt: its inverse), which takes a first pass;
group scale = amax / 6 of the group, times the global scale, clamped to 448 and rounded to E4M3;
where that is 0 it becomes 0.125 (ModelOpt 1). Codes: value / (scale / global), clamped to +-6,
nearest, ties to the even code.

With `base`, the base's global scale stays as long as it covers the merged tensor. Engines read the
layers that they fuse (q, k, v; gate, up) with one global scale, so checkpoints are written with
equal ones, and averaging must not tell them apart. Requantizing what was just decoded is then the
identity. Without `base` it is not: the global scale is recomputed from a rounded maximum, which can
move group scales by one step of E4M3.

Sources: compressed-tensors `compressors/nvfp4`, `quantization/utils/helpers.py` (`generate_gparam`)
and `entrypoints/convert/converters/modelopt_nvfp4.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from merge_cli.formats.quantization.layout import Grid, RowRange, Shape

if TYPE_CHECKING:
    from torch import Tensor

    from merge_cli.formats.quantization.codec import Parts

GROUP = 16
COVERED = 448 * (1 + 2.0**-10)


@dataclass(frozen=True, slots=True)
class NvFp4:
    """Parts: codes, scale, global_scale. `inverse`: the global scale multiplies (ModelOpt) instead
    of dividing.
    """

    inverse: bool = False

    @property
    def scheme(self) -> str:
        """`nvfp4 group 16`."""
        return f"nvfp4 {self._grid}" + (" (ModelOpt)" if self.inverse else "")

    @property
    def needs_stats(self) -> bool:
        """True: the global scale depends on the whole tensor."""
        return True

    @property
    def per_tensor_roles(self) -> frozenset[str]:
        """The global scale."""
        return frozenset({"global_scale"})

    def row_step(self, shape: Shape) -> int:
        """1: groups lie within a row."""
        return 1

    def part_range(self, role: str, shape: Shape, r0: int, r1: int) -> tuple[int, int]:
        """Bytes of rows r0..r1 in a part; the number of columns is even."""
        if role == "global_scale":
            return 0, 4
        if role == "codes":
            return r0 * shape[-1] // 2, r1 * shape[-1] // 2
        return self._grid.byte_range(shape, r0, r1, 1)

    def decode(self, parts: Parts, shape: Shape, r0: int, r1: int) -> Tensor:
        """E2M1 times the group's scale, two roundings; NaN where the E4M3 scale is."""
        from merge_cli.formats.quantization.blocks import fp4_values

        cut = RowRange(self._grid, shape, r0, r1)
        return fp4_values(parts["codes"], self._joined(*self._scales(parts, cut)), cut)

    def stats(self, values: Tensor, shape: Shape, r0: int, r1: int, *, base: Parts | None = None) -> Tensor:
        """Largest value and largest negated value."""
        from merge_cli.formats.quantization.blocks import tensor_stats

        return tensor_stats(values)

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
        """Codes and scales of rows r0..r1; `base` needs the roles scale and global_scale only."""
        from merge_cli.formats.quantization import bits, blocks

        cut = RowRange(self._grid, shape, r0, r1)
        stats = self.stats(values, shape, r0, r1) if stats is None else stats
        amax = stats[:2].amax().view(1, 1)
        wide = self._new_global(amax)
        group_amax = blocks.block_max(values.abs(), cut)
        if base is None:
            local = self._new_local(group_amax, wide)
        else:
            old_local, old_wide = self._scales(base, cut)
            covers = self._times_global(bits.divide(amax, bits.FP4_MAX), old_wide) <= COVERED
            wide = old_wide.where(covers, wide)
            old = self._joined(old_local, old_wide)
            decoded = blocks.fp4_values(blocks.fp4_codes(values, old, cut), old, cut)
            keep = blocks.on_grid(values, decoded, cut).logical_and_(covers)
            local = old_local.where(keep, self._new_local(group_amax, wide))
        return {
            "codes": blocks.fp4_codes(values, self._joined(local, wide), cut),
            "scale": bits.write_floats(local, "F8_E4M3"),
            "global_scale": bits.write_floats(wide, "F32"),
        }

    @property
    def _grid(self) -> Grid:
        return Grid(1, GROUP)

    def _scales(self, parts: Parts, cut: RowRange) -> tuple[Tensor, Tensor]:
        """float32 group scales [rows, groups] and global scale [1, 1]."""
        from merge_cli.formats.quantization.bits import read_floats

        local = read_floats(parts["scale"], "F8_E4M3").view(cut.num_block_rows, cut.num_block_cols)
        return local, read_floats(parts["global_scale"], "F32").view(1, 1)

    def _joined(self, local: Tensor, wide: Tensor) -> Tensor:
        return local * wide if self.inverse else local / wide

    def _times_global(self, scales: Tensor, wide: Tensor) -> Tensor:
        """What `scales` are before they are rounded to E4M3."""
        return scales / wide if self.inverse else scales * wide

    def _new_global(self, amax: Tensor) -> Tensor:
        from merge_cli.formats.quantization import bits

        wide = bits.divide(amax, bits.FP8_MAX * bits.FP4_MAX)
        if not self.inverse:
            wide = amax.new_full(amax.shape, bits.FP8_MAX * bits.FP4_MAX) / amax
        return wide.new_ones(wide.shape).where((wide == 0) | wide.isinf(), wide)

    def _new_local(self, amax: Tensor, wide: Tensor) -> Tensor:
        from merge_cli.formats.quantization import bits

        exact = self._times_global(bits.divide(amax, bits.FP4_MAX), wide).clamp_(max=bits.FP8_MAX)
        local = bits.read_floats(bits.write_floats(exact, "F8_E4M3"), "F8_E4M3").view(exact.shape)
        return local.masked_fill_(local == 0, 1.0 if self.inverse else 0.125)
