"""The native kernels against the codecs of `formats/quantization`: the same bits from any bytes.

Every check forces each kernel that this processor can run in turn.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from merge_cli.engine.kernels import native
from merge_cli.engine.kernels.layouts import layout_of
from merge_cli.engine.kernels.native import Kernel, Parts
from merge_cli.formats.quantization.codec import Codec, Shape
from merge_cli.formats.quantization.fp8 import Fp8
from merge_cli.formats.quantization.integer import Integer
from merge_cli.formats.quantization.layout import Grid, num_rows
from merge_cli.formats.quantization.mxfp4 import MxFp4, MxFp4Transposed
from merge_cli.formats.quantization.nvfp4 import NvFp4
from merge_cli.planning.sums import WeightedSum

KERNELS = native.kernels()
if not KERNELS and shutil.which("cc") is None:
    pytest.skip("no C compiler here", allow_module_level=True)
assert KERNELS, f"{native.why_none()}: run scripts/setup"

FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
CASES: dict[str, tuple[Codec, Shape]] = {
    "fp8 block": (Fp8(Grid(128, 128)), (256, 384)),
    "fp8 block, long rows": (Fp8(Grid(8, 128), "BF16"), (16, 1500)),
    "fp8 block, ragged": (Fp8(Grid(128, 128), "BF16"), (300, 200)),
    "fp8 block, smaller than one": (Fp8(Grid(128, 128), "F16"), (5, 7)),
    "fp8 fused experts": (Fp8(Grid(16, 32)), (3, 32, 64)),
    "fp8 fused experts, ragged": (Fp8(Grid(16, 32), "F8_E8M0"), (3, 24, 40)),
    "fp8 mx": (Fp8(Grid(1, 32), "U8", "mx"), (9, 96)),
    "fp8 tensor": (Fp8(Grid(whole=True)), (3, 17, 33)),
    "fp8 channel": (Fp8(Grid(1)), (17, 33)),
    "fp8 channel, vector": (Fp8(Grid(1)), (33,)),
    "fp8 matrix": (Fp8(Grid()), (3, 6, 10)),
    "fp8 column": (Fp8(Grid(0, 1)), (3, 6, 10)),
    "int8 channel": (Integer(Grid(1), "F32"), (17, 33)),
    "int8 tensor, asymmetric": (Integer(Grid(whole=True), "F32", zero="I8"), (17, 33)),
    "int8 group, asymmetric": (Integer(Grid(1, 16), "BF16", zero="I8"), (9, 64)),
    "int8 block, asymmetric, fused": (Integer(Grid(4, 16), "BF16", zero="I8"), (3, 8, 64)),
    "int4 packed": (Integer(Grid(1, 32), "BF16", 4, True, -8), (10, 96)),
    "int4 packed, ragged": (Integer(Grid(1, 32), "F32", 4, True, -8), (7, 51)),
    "int4 packed, long rows": (Integer(Grid(1, 32), "BF16", 4, True, -8), (4, 1600)),
    "int4 packed, tensor": (Integer(Grid(whole=True), "BF16", 4, True, -8), (7, 51)),
    "int4 packed, asymmetric": (Integer(Grid(1, 32), "F32", 4, True, -8, "packed"), (27, 64)),
    "int4 packed, asymmetric, fused": (Integer(Grid(1, 32), "F32", 4, True, -8, "packed"), (3, 12, 64)),
    "int4 packed, asymmetric, aligned": (Integer(Grid(1, 32), "F32", 4, True, -8, "packed"), (3, 16, 64)),
    "int4 packed, asymmetric by bytes": (Integer(Grid(1, 32), "F16", 4, True, -8, "I8"), (9, 64)),
    "int8 packed": (Integer(Grid(1, 32), "F16", 8, True, -128, "packed"), (9, 64)),
    "int2 packed": (Integer(Grid(1), "F32", 2, True, -2, "packed"), (33, 47)),
    "mxfp4": (MxFp4("U8", "round"), (9, 96)),
    "mxfp4, ragged": (MxFp4("F8_E8M0", "ceil"), (9, 50)),
    "mxfp4, fused": (MxFp4("F8_E8M0", "ceil"), (2, 9, 64)),
    "gpt-oss": (MxFp4Transposed(), (3, 64, 10)),
    "gpt-oss, long rows": (MxFp4Transposed(), (2, 32, 1100)),
    "nvfp4": (NvFp4(), (9, 64)),
    "nvfp4, long rows": (NvFp4(), (2, 1520)),
    "nvfp4, ragged, ModelOpt": (NvFp4(inverse=True), (9, 40)),
}


def random_parts(codec: Codec, shape: Shape, seed: int) -> dict[str, Tensor]:
    """Any bytes: codes and scales that are NaN, infinite, zero, subnormal too. Every other seed has
    scales near 1.
    """
    generator = torch.Generator().manual_seed(seed)
    names = [
        "codes",
        "scale",
        *(["zero"] if getattr(codec, "zero", "") else []),
        *(["global_scale"] if isinstance(codec, NvFp4) else []),
    ]
    sizes = {name: codec.part_range(name, shape, 0, num_rows(shape))[1] for name in names}
    parts = {name: torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8) for name, size in sizes.items()}
    kind = FLOATS.get(getattr(codec, "scale_dtype", ""))
    if seed % 2 and kind is not None:
        parts["scale"] = (torch.rand(sizes["scale"] // kind.itemsize, generator=generator) + 0.5).to(kind).view(torch.uint8)
    if seed % 2 and isinstance(codec, NvFp4):
        parts["global_scale"] = torch.tensor([321.5]).view(torch.uint8)
    return parts


def cut(codec: Codec, shape: Shape, parts: Mapping[str, Tensor], r0: int, r1: int) -> dict[str, Tensor]:
    """The bytes of rows r0..r1, each part in memory of its own."""
    ranges = {name: codec.part_range(name, shape, r0, r1) for name in parts}
    return {name: parts[name][begin:end].clone() for name, (begin, end) in ranges.items()}


def addresses(parts: Mapping[str, Tensor], first_row: int) -> Parts:
    def of(name: str) -> int:
        return parts[name].data_ptr() if name in parts else 0

    return Parts(of("codes"), of("scale"), of("zero"), of("global_scale"), first_row)


def bits(values: Tensor) -> Tensor:
    return torch.where(values.isnan(), 0x7FC00000, values.contiguous().view(torch.int32))


def check(kernel: Kernel, codec: Codec, shape: Shape, parts: Mapping[str, Tensor], r0: int, r1: int) -> None:
    """Rows r0..r1 by the kernel are those of the codec."""
    layout = layout_of(codec, shape)
    assert layout is not None
    expected = codec.decode(parts, shape, r0, r1).reshape(-1)
    found = torch.empty_like(expected)
    bad = kernel.prepare([layout], [WeightedSum((0,), (1.0,), None, "F32")], ["F32"]).run(
        [addresses(parts, r0)], [found.data_ptr()], len(found)
    )
    assert bad == ([] if expected.isfinite().all() else [0])
    positions = (~expected.isfinite()).nonzero().flatten().tolist()
    assert kernel.find_nonfinite(layout, addresses(parts, r0), len(found), len(found)) == (len(positions), positions)
    wrong = (bits(expected) != bits(found)).nonzero().flatten()[:5]
    assert not len(wrong), (kernel.name, r0, r1, wrong, expected[wrong], found[wrong])


@pytest.mark.parametrize("name", CASES)
def test_decoding_has_the_bits_of_the_codec(name: str) -> None:
    codec, shape = CASES[name]
    step, rows = codec.row_step(shape), num_rows(shape)
    cuts = {(0, rows), (0, min(step, rows)), (min(step, rows - 1) // step * step, rows), (rows // 2 // step * step, rows)}
    for kernel, seed, (r0, r1) in itertools.product(KERNELS.values(), range(4), sorted(cuts)):
        check(kernel, codec, shape, cut(codec, shape, random_parts(codec, shape, seed), r0, r1), r0, r1)


@pytest.mark.parametrize("dtype", ["F8_E8M0", "BF16", "F16"])
def test_every_code_with_many_scales(dtype: str) -> None:
    """All 256 codes of FP8 with all exponents, and with scales of every exponent in BF16 and F16."""
    width = 1 if dtype == "F8_E8M0" else 2
    scales = torch.arange(256, dtype=torch.uint8) if width == 1 else torch.arange(0, 1 << 16, 61, dtype=torch.int32).to(torch.int16)
    shape = (len(scales), 256)
    parts = {"codes": torch.arange(256, dtype=torch.uint8).repeat(len(scales)), "scale": scales.view(torch.uint8)}
    for kernel in KERNELS.values():
        check(kernel, Fp8(Grid(1), dtype), shape, parts, 0, len(scales))


def test_every_code_of_four_bits_with_every_scale() -> None:
    scales = torch.arange(256, dtype=torch.uint8)
    for codec in (MxFp4(), NvFp4(), NvFp4(inverse=True)):
        group = 32 if isinstance(codec, MxFp4) else 16
        every = torch.arange(256, dtype=torch.uint8)[torch.randperm(256, generator=torch.Generator().manual_seed(1))]
        codes = every.repeat(group // 2)
        parts = {"codes": codes, "scale": scales, "global_scale": torch.tensor([0.3]).view(torch.uint8)}
        if isinstance(codec, MxFp4):
            parts.pop("global_scale")
        for kernel in KERNELS.values():
            check(kernel, codec, (256, group), parts, 0, 256)


@st.composite
def jobs(draw: st.DrawFn) -> tuple[list[tuple[Codec | str, Shape]], int, int, int]:
    """Inputs of one shape, quantized in any way or plain, rows of it, and a seed."""
    rows, cols = draw(st.sampled_from([1, 8, 32])), 2 * draw(st.integers(1, 400))
    codecs = st.sampled_from(
        [
            Fp8(Grid(4, 128)),
            Fp8(Grid(1), "BF16"),
            MxFp4(),
            NvFp4(),
            Integer(Grid(1, 32), "BF16", 4, True, -8, "packed"),
            "BF16",
            "F32",
        ]
    )
    shape = (rows, cols)
    inputs: list[tuple[Any, Shape]] = [(codec, shape) for codec in draw(st.lists(codecs, min_size=1, max_size=6))]
    steps = [codec.row_step(shape) for codec, _ in inputs if not isinstance(codec, str)]
    r0 = draw(st.integers(0, (rows - 1) // max([*steps, 1]))) * max([*steps, 1])
    return inputs, r0, rows, draw(st.integers(0, 99))


@settings(max_examples=60, deadline=None)
@given(jobs())
def test_sums_of_any_inputs(job: tuple[list[tuple[Codec | str, Shape]], int, int, int]) -> None:
    """Values decoded beside plain ones, for one output and for several."""
    inputs, r0, r1, seed = job
    values, kept = [], []
    dtypes: list[Any] = []
    places: list[Any] = []
    for i, (codec, shape) in enumerate(inputs):
        if isinstance(codec, str):
            kind = torch.bfloat16 if codec == "BF16" else torch.float32
            plain = torch.randn((r1 - r0) * shape[1], generator=torch.Generator().manual_seed(seed + i)).to(kind)
            values.append(plain)
            dtypes.append(codec)
            places.append(plain.data_ptr())
            continue
        parts = cut(codec, shape, random_parts(codec, shape, seed + i), r0, r1)
        values.append(codec.decode(parts, shape, r0, r1).reshape(-1))
        dtypes.append(layout_of(codec, shape))
        places.append(addresses(parts, r0))
        kept.append(parts)
    every = tuple(range(len(inputs)))
    factors = tuple(0.3 + i for i in every)
    sums = [
        WeightedSum(every, factors),
        WeightedSum(every[-2:], factors[-2:], 3.0, "F32"),
        WeightedSum(every[:1], (2.0,), None, "F32", retry=True),
    ]
    rounded = ["BF16", "F32", "BF16"]
    plain_names = ["BF16" if value.dtype == torch.bfloat16 else "F32" for value in values]
    for kernel, some in itertools.product(KERNELS.values(), (sums, sums[:1])):
        found = []
        for names, at in [(dtypes, places), (plain_names, [value.data_ptr() for value in values])]:
            outputs = [torch.empty(len(values[0]), dtype=FLOATS[dtype]) for dtype in rounded[: len(some)]]
            job_of_kernel = kernel.prepare(names, some, rounded[: len(some)])
            job_of_kernel.run(at, [output.data_ptr() for output in outputs], len(values[0]))
            found.append(outputs)
        for a, b in zip(*found, strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), kernel.name
