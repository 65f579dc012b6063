"""The codec for stored codes and their companions: what dtypes, shapes and the config together mean
(no torch).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from merge_cli.errors import UnsupportedError
from merge_cli.formats.quantization.codec import Codec, Shape, StoredLike
from merge_cli.formats.quantization.config import TO_BF16, Group, Settings
from merge_cli.formats.quantization.fp8 import Fp8
from merge_cli.formats.quantization.integer import Integer
from merge_cli.formats.quantization.layout import Grid, ceil_div, matrix
from merge_cli.formats.quantization.mxfp4 import GROUP as MX_GROUP
from merge_cli.formats.quantization.mxfp4 import MxFp4, MxFp4Transposed
from merge_cli.formats.quantization.nvfp4 import GROUP as NV_GROUP
from merge_cli.formats.quantization.nvfp4 import NvFp4

_FLOAT_SCALES = ("F32", "BF16", "F16")

Match = tuple[Shape, Codec, tuple[str, ...]]
"""Logical shape, codec, and the roles of its parts besides the codes."""

_PackedLayout = tuple[Shape, int, Grid]
"""Logical shape, bits and grid of packed integers."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """Codes of the tensor `logical` under the stored name `codes`, and stored names of companions
    by role.
    """

    logical: str
    codes: str
    companions: Mapping[str, str]
    tensors: Mapping[str, StoredLike]
    transposed: bool = False

    @property
    def what(self) -> str:
        """The scheme as far as the codes show it, for messages."""
        dtype = self.tensors[self.codes].dtype
        return "MXFP4" if self.transposed else {"F8_E4M3": "FP8", "I8": "int8"}.get(dtype, f"packed {dtype}")

    def signature(self) -> tuple[object, ...]:
        """All that decides the codec besides the config: roles, dtypes, shapes, and which global
        scale it is.
        """
        stored = self.tensors[self.codes]
        described: list[object] = [self.transposed, stored.dtype, tuple(stored.shape)]
        for role, name in self.companions.items():
            companion = self.tensors[name]
            described += (role, companion.dtype, tuple(companion.shape), name.endswith("_scale_2"))
        return tuple(described)

    def shape(self, role: str = "codes") -> Shape:
        """Shape in the header of the tensor with that role."""
        return tuple(self.tensors[self.codes if role == "codes" else self.companions[role]].shape)

    def dtype(self, role: str = "codes") -> str:
        """safetensors dtype of the tensor with that role, or empty if there is none."""
        name = self.codes if role == "codes" else self.companions.get(role)
        return "" if name is None else self.tensors[name].dtype

    def refused(self, why: str, *details: str) -> UnsupportedError:
        """The error that names this tensor and what is stored for it."""
        stored = [self.codes, *self.companions.values()]
        shown = [f"{name}  {self.tensors[name].dtype} {list(self.tensors[name].shape)}" for name in stored]
        message = f"cannot read the {self.what} tensor `{self.logical}`: {why}"
        return UnsupportedError(message, details=[*shown, *details], hint=TO_BF16)


def codec_of(candidate: Candidate, settings: Settings) -> Match:
    """How to read `candidate`, which has at least codes and a scale; raises UnsupportedError if it
    cannot be read.
    """
    dtype = candidate.dtype()
    if not candidate.shape():
        raise candidate.refused("codes without dimensions")
    if candidate.transposed:
        return _gpt_oss(candidate)
    if dtype == "F8_E4M3":
        return _fp8(candidate, settings)
    if dtype == "I32":
        return _packed_integer(candidate, settings)
    if dtype == "I8" and candidate.dtype("scale") in _FLOAT_SCALES:
        return _int8(candidate, settings)
    return _fp4(candidate, settings)


def _fp8(candidate: Candidate, settings: Settings) -> Match:
    shape, scale = candidate.shape(), candidate.dtype("scale")
    _allow_only(candidate, "scale")
    exponents = scale == "F8_E8M0" or (scale == "U8" and (settings.ue8m0 or settings.groups))
    if scale not in _FLOAT_SCALES and not exponents:
        raise candidate.refused(f"scales of dtype {scale}")
    grid = _scale_grid(shape, candidate.shape("scale"), settings, num_bits=8, is_float=True)
    if grid is None:
        raise candidate.refused("the shape of its scale does not fit", *_sizes(settings))
    rule: Literal["amax", "ceil", "mx"] = "ceil" if exponents or settings.ue8m0 else "amax"
    if scale == "U8" and settings.groups:
        rule = "mx"
    return shape, Fp8(grid, scale, rule), ("scale",)


def _int8(candidate: Candidate, settings: Settings) -> Match:
    shape = candidate.shape()
    zero = _allow_only(candidate, "scale", "zero", zero_dtypes=("I8",))
    groups = [group for group in settings.groups if not group.is_float]
    if groups and not zero and not any(group.symmetric for group in groups):
        raise candidate.refused("its zero point is missing")
    widths = {group.num_bits for group in groups} or {8}
    if len(widths) > 1 or not 2 <= max(widths) <= 8:
        raise candidate.refused(f"integers of {' or '.join(map(str, sorted(widths)))} bits in bytes")
    (num_bits,) = widths
    grid = _scale_grid(shape, candidate.shape("scale"), settings, num_bits=num_bits, is_float=False)
    if grid is None or (zero and math.prod(candidate.shape("zero")) != math.prod(candidate.shape("scale"))):
        raise candidate.refused("the shape of its scale or zero point does not fit", *_sizes(settings))
    lowest = -(1 << (num_bits - 1))
    codec = Integer(grid, candidate.dtype("scale"), num_bits, lowest=lowest, zero="I8" if zero else "")
    return shape, codec, ("scale", "zero") if zero else ("scale",)


def _packed_integer(candidate: Candidate, settings: Settings) -> Match:
    zero = _allow_only(candidate, "scale", "zero", "shape", zero_dtypes=("I8", "I32"))
    if candidate.dtype("scale") not in _FLOAT_SCALES:
        raise candidate.refused(f"scales of dtype {candidate.dtype('scale')}")
    if candidate.dtype("shape") not in ("I64", "I32", ""):
        raise candidate.refused(f"weight_shape of dtype {candidate.dtype('shape')}")
    shape, num_bits, grid = _only_packed_layout(candidate, settings)
    is_zero_packed = zero and _is_zero_packed(candidate, shape, num_bits, grid)
    if "shape" in candidate.companions and candidate.shape("shape") != (len(shape),):
        raise candidate.refused("the shape of its weight_shape does not fit")
    codec = Integer(
        grid,
        candidate.dtype("scale"),
        num_bits,
        packed=True,
        lowest=-7 if settings.restricted_int4 and num_bits == 4 and not zero else -(1 << (num_bits - 1)),
        zero=("packed" if is_zero_packed else "I8") if zero else "",
        shape_dtype=candidate.dtype("shape"),
    )
    return shape, codec, tuple(role for role in ("scale", "zero", "shape") if role in candidate.companions)


def _only_packed_layout(candidate: Candidate, settings: Settings) -> _PackedLayout:
    """The layout that the config groups agree on; where they do not, those that name the tensor."""
    groups = [group for group in settings.groups if not group.is_float]
    if not groups:
        raise candidate.refused("config.json has no config group that says how wide its integers are")
    layouts = {layout for group in groups if (layout := _packed_layout(candidate, group))}
    if len(layouts) > 1:
        named = [group for group in groups if _targets(candidate.logical, group)]
        layouts = {layout for group in named if (layout := _packed_layout(candidate, group))}
    if len(layouts) != 1:
        raise candidate.refused("its shapes fit no config group, or several", *_sizes(settings))
    (layout,) = layouts
    if layout[1] not in (2, 4, 8):
        raise candidate.refused(f"integers of {layout[1]} bits (2, 4 and 8 are read)")
    return layout


def _is_zero_packed(candidate: Candidate, shape: Shape, num_bits: int, grid: Grid) -> bool:
    """Whether the zero points are packed as the codes are, down the rows; else they are bytes."""
    if candidate.dtype("zero") != "I32":
        if math.prod(candidate.shape("zero")) != math.prod(candidate.shape("scale")):
            raise candidate.refused("the shape of its zero point does not fit")
        return False
    expected = (*shape[:-2], ceil_div(matrix(shape)[0] * num_bits, 32), grid.blocks(shape)[1])
    if grid.whole or grid.block_rows != 1 or candidate.shape("zero") != expected:
        raise candidate.refused("the shape of its zero point does not fit", f"expected {list(expected)}")
    return True


def _packed_layout(candidate: Candidate, group: Group) -> _PackedLayout | None:
    """Logical shape, bits and grid if the packed codes and scales have the shapes that `group`
    gives them.
    """
    *lead, words = candidate.shape()
    scale = candidate.shape("scale")
    if group.symmetric == ("zero" in candidate.companions) or not 1 <= group.num_bits <= 8:
        return None
    cols = words * 32 // group.num_bits
    if group.group_size is None:
        shape = (*lead, cols)
        if math.prod(scale) == 1:
            return shape, group.num_bits, Grid(whole=True)
        return (shape, group.num_bits, Grid(1)) if scale in ((*lead, 1), tuple(lead)) else None
    if len(scale) != len(lead) + 1 or list(scale[:-1]) != lead:
        return None
    grouped = scale[-1] * group.group_size
    if ceil_div(grouped * group.num_bits, 32) == words:
        cols = grouped
    elif ceil_div(cols, group.group_size) != scale[-1]:
        return None
    return (*lead, cols), group.num_bits, Grid(1, group.group_size)


def _fp4(candidate: Candidate, settings: Settings) -> Match:
    """MXFP4 and NVFP4: two codes a byte (U8, I8), or dtype F4, whose header counts codes."""
    *lead, width = candidate.shape()
    cols = width if candidate.dtype() == "F4" else width * 2
    shape, scale, scale_shape = (*lead, cols), candidate.dtype("scale"), candidate.shape("scale")
    if cols % 2:
        raise candidate.refused("an odd number of columns")
    if scale == "F8_E4M3" and "global_scale" in candidate.companions:
        _allow_only(candidate, "scale", "global_scale")
        wide = candidate.companions["global_scale"]
        if scale_shape != (*lead, ceil_div(cols, NV_GROUP)) or math.prod(candidate.shape("global_scale")) != 1:
            raise candidate.refused("the shape of its scales does not fit NVFP4")
        if candidate.dtype("global_scale") != "F32":
            raise candidate.refused("a global scale that is not F32")
        return shape, NvFp4(inverse=wide.endswith("_scale_2")), ("scale", "global_scale")
    exponents = scale == "F8_E8M0" or (scale == "U8" and (settings.groups or settings.ue8m0))
    if exponents and scale_shape == (*lead, ceil_div(cols, MX_GROUP)):
        _allow_only(candidate, "scale")
        return shape, MxFp4(scale, "round" if settings.groups else "ceil"), ("scale",)
    raise candidate.refused("a format that is not read")


def _gpt_oss(candidate: Candidate) -> Match:
    blocks, scales = candidate.shape(), candidate.shape("scale")
    if len(blocks) != 4 or blocks[-1] * 2 != MX_GROUP or scales != blocks[:-1] or candidate.dtype("scale") != "U8":
        raise candidate.refused("expected blocks U8 [E, M, K/32, 16] and scales U8 [E, M, K/32]")
    experts, rows, groups, _ = blocks
    return (experts, groups * MX_GROUP, rows), MxFp4Transposed(), ("scale",)


def _scale_grid(shape: Shape, scale: Shape, settings: Settings, *, num_bits: int, is_float: bool) -> Grid | None:
    """The grid that scales of shape `scale` form over a tensor of shape `shape`; None if there is
    none for sure.
    """
    lead, (rows, cols) = shape[:-2], matrix(shape)
    tall = shape[:-1]
    if settings.block is not None and len(shape) > 1:
        grid = Grid(*settings.block)
        height, width = settings.block
        if scale == (*lead, ceil_div(rows, height), ceil_div(cols, width)):
            return grid
    if math.prod(scale) == 1:
        return Grid(whole=True)
    if scale in ((*tall, 1), tall):
        return Grid(1)
    sizes = {
        group.group_size
        for group in settings.groups
        if group.group_size and group.num_bits == num_bits and group.is_float == is_float
    }
    fitting = {size for size in sizes or {32} if scale == (*tall, ceil_div(cols, size))}
    if len(fitting) == 1:
        return Grid(1, fitting.pop())
    if lead and scale in ((*lead, 1, 1), lead):
        return Grid()
    if lead and scale == (*lead, 1, cols):
        return Grid(0, 1)
    if settings.block is None and len(shape) > 1 and scale == (*lead, ceil_div(rows, 128), ceil_div(cols, 128)):
        return Grid(128, 128)
    return None


def _allow_only(candidate: Candidate, *roles: str, zero_dtypes: tuple[str, ...] = ()) -> bool:
    """Whether there is a zero point; raises UnsupportedError for a companion that the scheme does
    not have.
    """
    for role, name in candidate.companions.items():
        if role not in roles:
            raise candidate.refused(f"`{name}` is not part of a scheme that is read")
    zero = candidate.dtype("zero")
    if zero and zero not in zero_dtypes:
        raise candidate.refused(f"zero points of dtype {zero}")
    return bool(zero)


def _targets(name: str, group: Group) -> bool:
    """Whether a config group names this tensor's module (`re:` patterns match from its beginning)."""
    import re

    module = name.rpartition(".")[0]
    return any(
        re.match(target.removeprefix("re:"), module) is not None if target.startswith("re:") else target == module
        for target in group.targets
    )


def _sizes(settings: Settings) -> list[str]:
    """What the config says, for messages."""
    lines = [f"weight_block_size {list(settings.block)}"] if settings.block else []
    return lines + [f"config group: {g.num_bits} bits, group size {g.group_size}" for g in settings.groups]
