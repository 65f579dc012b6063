"""MXFP4 weights: two E2M1 codes a byte, an E8M0 exponent for each group of 32 along a row.

value = E2M1(nibble) * 2^(exponent - 127), low nibble first; every such value is exact in float32.

- compressed-tensors mxfp4-pack-quantized: `weight_packed` U8 [M, K/2], `weight_scale` U8 [M, K/32].
- DeepSeek-V4 experts: `weight` I8 [M, K/2], `scale` (or `weight_scale_inv`) F8_E8M0 [M, K/32]; also
  fused, 3-D.
- gpt-oss: `gate_up_proj_blocks` U8 [E, 2I, H/32, 16] and `_scales` [E, 2I, H/32]; likewise
  `down_proj`. The model holds the transposed matrices, `gate_up_proj` [E, H, 2I], and that is what
  a BF16 checkpoint must contain, so `MxFp4Transposed` decodes to it. A row of the result needs
  bytes from every stored row of its expert: the step is an expert, worked through in slabs of
  stored rows.

New exponents, by `rule`: "floor" floor(log2 amax) - 2 (OCP Microscaling Formats 1.0; values above 6
times the scale are clamped), "round" the same with amax of 1.75 * 2^n rounded up to the next power
of two (compressed-tensors), "ceil" the smallest with amax <= 6 times the scale (DeepSeek). Codes:
nearest, ties to the even code.

Requantizing what was just decoded gives the same values by any of the rules, with `base` also the
same bytes; without `base` a group whose largest code is below 4 gets a smaller exponent and larger
codes for the same values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from merge_cli.formats.quantization.layout import Grid, RowRange, Shape

if TYPE_CHECKING:
    from torch import Tensor

    from merge_cli.formats.quantization.codec import Parts

GROUP = 32
SLAB_ROWS = 256


@dataclass(frozen=True, slots=True)
class MxFp4:
    """Rows stored as they are; parts: codes, scale (`scale_dtype` U8 or F8_E8M0, the same bytes)."""

    scale_dtype: str = "U8"
    rule: Literal["floor", "round", "ceil"] = "floor"

    @property
    def scheme(self) -> str:
        """`mxfp4 group 32`."""
        return f"mxfp4 {self._grid}"

    @property
    def needs_stats(self) -> bool:
        """False: groups lie within a row."""
        return False

    @property
    def per_tensor_roles(self) -> frozenset[str]:
        """Nothing."""
        return frozenset()

    def row_step(self, shape: Shape) -> int:
        """1: groups lie within a row."""
        return 1

    def part_range(self, role: str, shape: Shape, r0: int, r1: int) -> tuple[int, int]:
        """Bytes of rows r0..r1 in a part; the number of columns is even."""
        if role == "codes":
            return r0 * shape[-1] // 2, r1 * shape[-1] // 2
        return self._grid.byte_range(shape, r0, r1, 1)

    def decode(self, parts: Parts, shape: Shape, r0: int, r1: int) -> Tensor:
        """E2M1 * 2^exponent, exact; NaN where the exponent is 255."""
        from merge_cli.formats.quantization.blocks import fp4_values

        cut = RowRange(self._grid, shape, r0, r1)
        return fp4_values(parts["codes"], self._scales(parts, cut), cut)

    def stats(self, values: Tensor, shape: Shape, r0: int, r1: int, *, base: Parts | None = None) -> Tensor:
        """Not needed by `encode`."""
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
        """Codes and exponents of rows r0..r1; `base` needs the role scale only."""
        from merge_cli.formats.quantization import bits, blocks

        cut = RowRange(self._grid, shape, r0, r1)
        scales = self._new_scales(blocks.block_max(values.abs(), cut))
        if base is not None:
            old = self._scales(base, cut)
            decoded = blocks.fp4_values(blocks.fp4_codes(values, old, cut), old, cut)
            scales = old.where(blocks.on_grid(values, decoded, cut), scales)
        return {"codes": blocks.fp4_codes(values, scales, cut), "scale": bits.write_floats(scales, "U8")}

    @property
    def _grid(self) -> Grid:
        return Grid(1, GROUP)

    def _scales(self, parts: Parts, cut: RowRange) -> Tensor:
        from merge_cli.formats.quantization.bits import read_floats

        return read_floats(parts["scale"], "U8").view(cut.num_block_rows, cut.num_block_cols)

    def _new_scales(self, amax: Tensor) -> Tensor:
        from merge_cli.formats.quantization import bits

        if self.rule == "ceil":
            return bits.as_stored(bits.power_of_two_at_least(bits.divide(amax, bits.FP4_MAX)), "U8")
        return bits.shared_exponent(amax, 2, round_up=self.rule == "round")


@dataclass(frozen=True, slots=True)
class MxFp4Transposed:
    """gpt-oss experts: logical [E, K, M], stored as MXFP4 rows [E, M, K]; parts: codes, scale."""

    inner: MxFp4 = MxFp4()

    @property
    def scheme(self) -> str:
        """`mxfp4 group 32, transposed`."""
        return f"{self.inner.scheme}, transposed"

    @property
    def needs_stats(self) -> bool:
        """False: groups lie within a stored row."""
        return False

    @property
    def per_tensor_roles(self) -> frozenset[str]:
        """Nothing."""
        return frozenset()

    def row_step(self, shape: Shape) -> int:
        """K, the rows of an expert."""
        return shape[-2]

    def part_range(self, role: str, shape: Shape, r0: int, r1: int) -> tuple[int, int]:
        """Bytes of the experts that rows r0..r1 are."""
        return self.inner.part_range(role, _stored(shape), *_stored_rows(shape, r0, r1))

    def decode(self, parts: Parts, shape: Shape, r0: int, r1: int) -> Tensor:
        """float32 [r1 - r0, M], each expert transposed."""
        import torch

        _, num_k, num_m = shape
        experts = torch.empty((r1 - r0) // max(1, num_k), num_k, num_m, device=parts["codes"].device)
        for expert, begin, end, piece in self._slabs(parts, shape, r0, r1):
            experts[expert, :, begin:end] = self.inner.decode(piece, _stored(shape), 0, end - begin).T
        return experts.view(r1 - r0, num_m)

    def stats(self, values: Tensor, shape: Shape, r0: int, r1: int, *, base: Parts | None = None) -> Tensor:
        """Not needed by `encode`."""
        return self.inner.stats(values, shape, r0, r1)

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
        """Codes and exponents of the experts that rows r0..r1 are; `base` needs the role scale
        only.
        """
        import torch

        sizes = {role: self.part_range(role, shape, r0, r1) for role in ("codes", "scale")}
        out = {role: torch.empty(end - begin, dtype=torch.uint8, device=values.device) for role, (begin, end) in sizes.items()}
        old = {} if base is None else {"scale": base["scale"]}
        experts = values.view(-1, *shape[-2:])
        for (expert, begin, end, piece), (_, _, _, before) in zip(
            self._slabs(out, shape, r0, r1), self._slabs(old, shape, r0, r1), strict=True
        ):
            slab = experts[expert, :, begin:end].T.contiguous()
            coded = self.inner.encode(slab, _stored(shape), 0, end - begin, base=before or None)
            for role, target in piece.items():
                target.copy_(coded[role])
        return out

    def _slabs(self, parts: Parts, shape: Shape, r0: int, r1: int) -> list[tuple[int, int, int, dict[str, Tensor]]]:
        """(expert, first stored row, end, views of the parts' bytes) for slabs of at most
        `SLAB_ROWS` stored rows.
        """
        num_m = shape[-1]
        stored = _stored(shape)
        slabs = []
        for expert in range((r1 - r0) // max(1, shape[-2])):
            for begin in range(0, num_m, SLAB_ROWS):
                end = min(num_m, begin + SLAB_ROWS)
                views = {}
                for role, data in parts.items():
                    first, last = self.inner.part_range(role, stored, expert * num_m + begin, expert * num_m + end)
                    views[role] = data[first:last]
                slabs.append((expert, begin, end, views))
        return slabs


def _stored(shape: Shape) -> Shape:
    """[E, M, K] of logical [E, K, M]."""
    return (*shape[:-2], shape[-1], shape[-2])


def _stored_rows(shape: Shape, r0: int, r1: int) -> tuple[int, int]:
    """Stored rows (of M an expert) of the logical rows r0..r1 (K an expert)."""
    num_k, num_m = max(1, shape[-2]), shape[-1]
    return r0 // num_k * num_m, r1 // num_k * num_m
