"""Every codec with a shape, random bytes as it stores them, and encoding as the engine does it."""

from __future__ import annotations

import torch
from torch import Tensor

from merge_cli.formats.quantization.codec import Codec, Shape
from merge_cli.formats.quantization.fp8 import Fp8
from merge_cli.formats.quantization.integer import Integer
from merge_cli.formats.quantization.layout import Grid, num_rows
from merge_cli.formats.quantization.mxfp4 import MxFp4, MxFp4Transposed
from merge_cli.formats.quantization.nvfp4 import NvFp4

Case = tuple[Codec, Shape]
CASES: dict[str, Case] = {
    "fp8 block": (Fp8(Grid(128, 128)), (256, 384)),
    "fp8 block, ragged": (Fp8(Grid(128, 128)), (300, 200)),
    "fp8 block, smaller than one": (Fp8(Grid(128, 128), "BF16"), (5, 7)),
    "fp8 block, one row": (Fp8(Grid(128, 128)), (1, 130)),
    "fp8 block, no rows": (Fp8(Grid(128, 128)), (0, 16)),
    "fp8 block, no columns": (Fp8(Grid(128, 128)), (16, 0)),
    "fp8 fused experts": (Fp8(Grid(16, 32)), (3, 32, 64)),
    "fp8 fused experts, ragged": (Fp8(Grid(16, 32)), (3, 24, 40)),
    "fp8 ue8m0": (Fp8(Grid(128, 128), "F8_E8M0", "ceil"), (130, 257)),
    "fp8 ue8m0 in F32": (Fp8(Grid(128, 128), "F32", "ceil"), (130, 257)),
    "fp8 mx": (Fp8(Grid(1, 32), "U8", "mx"), (9, 96)),
    "fp8 tensor": (Fp8(Grid(whole=True)), (17, 33)),
    "fp8 tensor, fused": (Fp8(Grid(whole=True), "BF16"), (2, 5, 9)),
    "fp8 channel": (Fp8(Grid(1)), (17, 33)),
    "fp8 channel, vector": (Fp8(Grid(1)), (33,)),
    "fp8 matrix": (Fp8(Grid()), (3, 6, 10)),
    "fp8 column": (Fp8(Grid(0, 1)), (3, 6, 10)),
    "fp8 group": (Fp8(Grid(1, 16), "F16"), (6, 40)),
    "int8 channel": (Integer(Grid(1), "F32"), (17, 33)),
    "int8 tensor": (Integer(Grid(whole=True), "BF16"), (17, 33)),
    "int8 tensor, asymmetric": (Integer(Grid(whole=True), "F32", zero="I8"), (17, 33)),
    "int8 group, asymmetric": (Integer(Grid(1, 16), "BF16", zero="I8"), (9, 64)),
    "int4 in bytes": (Integer(Grid(1, 16), "BF16", 4, lowest=-8), (9, 64)),
    "int4 packed": (Integer(Grid(1, 32), "BF16", 4, True, -8, "", "I64"), (10, 96)),
    "int4 packed, Kimi": (Integer(Grid(1, 32), "BF16", 4, True, -7, "", "I32"), (10, 96)),
    "int4 packed, ragged": (Integer(Grid(1, 32), "F32", 4, True, -8, "", "I64"), (7, 50)),
    "int4 packed, fused": (Integer(Grid(1, 32), "F32", 4, True, -8, "", "I64"), (2, 7, 64)),
    "int4 packed, asymmetric": (Integer(Grid(1, 32), "F32", 4, True, -8, "packed", "I64"), (27, 64)),
    "int4 packed, asymmetric, fused": (Integer(Grid(1, 32), "F32", 4, True, -8, "packed", "I64"), (3, 12, 64)),
    "int4 packed, asymmetric, aligned": (Integer(Grid(1, 32), "F32", 4, True, -8, "packed", "I64"), (3, 16, 64)),
    "int8 packed": (Integer(Grid(1, 32), "F16", 8, True, -128, "packed", "I64"), (9, 64)),
    "int2 packed": (Integer(Grid(1), "F32", 2, True, -2, "packed", "I64"), (33, 48)),
    "mxfp4": (MxFp4("U8", "round"), (9, 96)),
    "mxfp4, ragged": (MxFp4("F8_E8M0", "ceil"), (9, 50)),
    "mxfp4, fused": (MxFp4("F8_E8M0", "ceil"), (2, 9, 64)),
    "gpt-oss": (MxFp4Transposed(), (3, 64, 10)),
    "gpt-oss, many slabs": (MxFp4Transposed(), (2, 32, 600)),
    "nvfp4": (NvFp4(), (9, 64)),
    "nvfp4, ragged": (NvFp4(), (9, 40)),
    "nvfp4, ModelOpt": (NvFp4(inverse=True), (9, 64)),
}
ROLES = ("codes", "scale", "zero", "global_scale", "shape")
FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def roles(codec: Codec) -> tuple[str, ...]:
    if isinstance(codec, Integer):
        return ("codes", "scale", *(["zero"] if codec.zero else []), *(["shape"] if codec.shape_dtype else []))
    return ("codes", "scale", "global_scale") if isinstance(codec, NvFp4) else ("codes", "scale")


def random_parts(codec: Codec, shape: Shape, seed: int = 0) -> dict[str, Tensor]:
    """Stored bytes with every finite code, block after block of zeros, and scales of a few
    magnitudes.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = num_rows(shape)
    parts = {}
    for role in roles(codec):
        size = codec.part_range(role, shape, 0, rows)[1]
        data = torch.randint(0, 256, (size,), generator=generator).to(torch.uint8)
        if role == "codes":
            if isinstance(codec, Fp8):
                data[(data & 127) == 127] = 126
            if isinstance(codec, Integer) and not codec.packed:
                data = (data.view(torch.int8) >> (8 - codec.num_bits)).view(torch.uint8)
            if not isinstance(codec, Integer):
                data[: size // 3] = 0
        elif role == "shape":
            data = torch.tensor(shape, dtype=torch.int64 if codec.shape_dtype == "I64" else torch.int32)  # type: ignore[attr-defined]
            data = data.view(torch.uint8)
        elif role == "global_scale":
            data = torch.tensor([321.5]).view(torch.uint8)
        elif role == "scale":
            data = random_scales(codec, size, generator)
        parts[role] = data
    return clean(codec, shape, parts)


def random_scales(codec: Codec, size: int, generator: torch.Generator) -> Tensor:
    dtype = getattr(codec, "scale_dtype", "U8")
    if isinstance(codec, NvFp4):
        return torch.randint(1, 127, (size,), generator=generator).to(torch.uint8)
    if dtype in FLOATS:
        count = size // FLOATS[dtype].itemsize
        values = torch.rand(count, generator=generator) * 0.1 + 0.001
        if dtype == "F32" and getattr(codec, "rule", "") == "ceil":
            values = torch.exp2(torch.log2(values).floor())
        return values.to(FLOATS[dtype]).view(torch.uint8)
    return torch.randint(100, 140, (size,), generator=generator).to(torch.uint8)


def clean(codec: Codec, shape: Shape, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Padding bits as a writer leaves them (zero), and for Kimi no code -8: both are lost in
    decoding.
    """
    if isinstance(codec, Integer) and codec.packed:
        per_byte = 8 // codec.num_bits
        row_bytes = parts["codes"].numel() // max(1, num_rows(shape))
        fields = torch.stack(
            [(parts["codes"] >> (i * codec.num_bits)) & ((1 << codec.num_bits) - 1) for i in range(per_byte)], 1
        ).view(-1, row_bytes * per_byte)
        fields[:, shape[-1] :] = 0
        if codec.lowest == -7:
            fields[fields == 0] = 1
        fields = fields.view(-1, per_byte)
        parts["codes"] = sum((fields[:, i] << (i * codec.num_bits) for i in range(per_byte)), start=fields[:, 0] * 0)
        if codec.zero == "packed":
            rows = num_rows(shape)
            values = codec._read_zeros(parts["zero"], _cut(codec, shape, rows))
            parts["zero"] = codec._write_zeros(values, shape)
    return parts


def _cut(codec: Integer, shape: Shape, rows: int):  # type: ignore[no-untyped-def]
    from merge_cli.formats.quantization.layout import RowRange

    return RowRange(codec.grid, shape, 0, rows)


def cuts(codec: Codec, shape: Shape, steps: int) -> list[tuple[int, int]]:
    rows = num_rows(shape)
    size = codec.row_step(shape) * steps
    return [(r0, min(rows, r0 + size)) for r0 in range(0, rows, size)]


def taken(codec: Codec, parts: dict[str, Tensor], shape: Shape, r0: int, r1: int) -> dict[str, Tensor]:
    return {role: data[slice(*codec.part_range(role, shape, r0, r1))] for role, data in parts.items()}


def decoded(codec: Codec, parts: dict[str, Tensor], shape: Shape) -> Tensor:
    return codec.decode(parts, shape, 0, num_rows(shape))


def encoded(codec: Codec, values: Tensor, shape: Shape, base: dict[str, Tensor] | None, steps: int) -> dict[str, Tensor]:
    """Encoded as the engine does it: statistics first, then chunk by chunk into place."""
    stats = None
    for r0, r1 in cuts(codec, shape, steps):
        before = None if base is None else taken(codec, base, shape, r0, r1)
        chunk = codec.stats(values[r0:r1], shape, r0, r1, base=before)
        stats = chunk if stats is None else torch.maximum(stats, chunk)
    rows = num_rows(shape)
    out = {role: torch.zeros(codec.part_range(role, shape, 0, rows)[1], dtype=torch.uint8) for role in roles(codec)}
    for r0, r1 in cuts(codec, shape, steps):
        before = None if base is None else taken(codec, base, shape, r0, r1)
        coded = codec.encode(values[r0:r1], shape, r0, r1, stats=stats, base=before)
        assert set(coded) == set(out)
        for role, data in coded.items():
            begin, end = codec.part_range(role, shape, r0, r1)
            assert data.dtype == torch.uint8
            assert data.shape == (end - begin,)
            out[role][begin:end] = data
    return out


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert set(first) == set(second)
    for role, data in first.items():
        assert torch.equal(data, second[role]), role


def nasty_values(shape: Shape) -> Tensor:
    """Ordinary weights, with zeros, a run of zeros, subnormals, outliers and exact ties."""
    values = torch.randn(num_rows(shape), shape[-1], generator=torch.Generator().manual_seed(1)) * 0.02
    flat = values.view(-1)
    flat[: flat.numel() // 4] = 0
    for place, value in enumerate((1e-45, -1e-40, 3.0, -2.5, 0.25, -0.0)):
        if flat.numel() > place * 7:
            flat[place * 7] = value
    return values
