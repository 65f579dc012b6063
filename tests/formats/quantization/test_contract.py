"""Every codec keeps the contract of `merge_cli/formats/quantization/codec.py`."""

from __future__ import annotations

import pytest
import torch
from one_device import OneDevice
from quantizing import CASES, FLOATS, Case, cuts, decoded, encoded, nasty_values, random_parts, roles, same, taken

from merge_cli.formats.quantization import bits
from merge_cli.formats.quantization.fp8 import Fp8
from merge_cli.formats.quantization.integer import Integer
from merge_cli.formats.quantization.layout import num_rows
from merge_cli.formats.quantization.mxfp4 import MxFp4, MxFp4Transposed
from merge_cli.formats.quantization.nvfp4 import NvFp4


@pytest.fixture(params=CASES, name="case")
def _case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def test_the_ranges_of_chunks_tile_every_part(case: Case) -> None:
    codec, shape = case
    rows = num_rows(shape)
    for role in roles(codec):
        total = codec.part_range(role, shape, 0, rows)
        assert total[0] == 0
        if role in codec.per_tensor_roles:
            assert all(codec.part_range(role, shape, r0, r1) == total for r0, r1 in cuts(codec, shape, 1))
            continue
        ranges = [codec.part_range(role, shape, r0, r1) for r0, r1 in cuts(codec, shape, 1)]
        assert [begin for begin, _ in ranges] == [0, *(end for _, end in ranges)][: len(ranges)]
        assert not ranges or ranges[-1][1] == total[1]


def test_decoding_does_not_depend_on_the_chunks(case: Case) -> None:
    codec, shape = case
    parts = random_parts(codec, shape)
    whole = decoded(codec, parts, shape)
    assert whole.dtype == torch.float32
    assert whole.shape == (num_rows(shape), shape[-1])
    for steps in (1, 2, 3):
        for r0, r1 in cuts(codec, shape, steps):
            chunk = codec.decode(taken(codec, parts, shape, r0, r1), shape, r0, r1)
            assert torch.equal(chunk.view(torch.int32), whole[r0:r1].view(torch.int32))


def test_encoding_does_not_depend_on_the_chunks(case: Case) -> None:
    codec, shape = case
    base = random_parts(codec, shape)
    values = nasty_values(shape)
    for before in (None, base):
        first = encoded(codec, values, shape, before, 1)
        same(first, encoded(codec, values, shape, before, 2))
        same(first, encoded(codec, values, shape, before, 1000))


def test_requantizing_what_was_decoded_gives_the_same_bytes(case: Case) -> None:
    codec, shape = case
    parts = random_parts(codec, shape)
    values = decoded(codec, parts, shape)
    same(parts, encoded(codec, values, shape, parts, 1))


@pytest.mark.parametrize("num_inputs", [2, 3, 7, 16])
def test_averaging_a_checkpoint_with_itself_gives_the_same_bytes(case: Case, num_inputs: int) -> None:
    codec, shape = case
    parts = random_parts(codec, shape, seed=2)
    values = decoded(codec, parts, shape)
    total = values.clone()
    for _ in range(num_inputs - 1):
        total = total + values
    same(parts, encoded(codec, total / torch.full_like(total, num_inputs), shape, parts, 1))


def test_requantizing_twice_changes_nothing(case: Case) -> None:
    codec, shape = case
    once = encoded(codec, nasty_values(shape), shape, None, 1)
    values = decoded(codec, once, shape)
    assert bool(values.isfinite().all())
    same(once, encoded(codec, values, shape, once, 1))


def test_requantizing_ordinary_values_stays_within_a_step(case: Case) -> None:
    """Half a step of the coarsest code, relative to the block's largest value (all blocks share it
    here).
    """
    codec, shape = case
    values = torch.randn(num_rows(shape), shape[-1], generator=torch.Generator().manual_seed(3))
    values = values.clamp_(-2, 2)
    error = (decoded(codec, encoded(codec, values, shape, None, 1), shape) - values).abs()
    num_bits = getattr(codec, "num_bits", 4 if isinstance(codec, MxFp4 | MxFp4Transposed | NvFp4) else 8)
    step = 2.0 / (2 ** (num_bits - 1) - 0.5) if isinstance(codec, Integer) else {8: 2 / 14, 4: 2 / 3}[num_bits]
    assert not error.numel() or float(error.max()) <= step * 1.01


def test_all_zero_blocks_have_a_usable_scale(case: Case) -> None:
    codec, shape = case
    parts = encoded(codec, torch.zeros(num_rows(shape), shape[-1]), shape, None, 1)
    assert not decoded(codec, parts, shape).any()


def test_nan_codes_and_scales_surface_as_nan(case: Case) -> None:
    codec, shape = case
    if not num_rows(shape) * shape[-1]:
        return
    if isinstance(codec, Fp8):
        parts = random_parts(codec, shape)
        parts["codes"][0], parts["codes"][-1] = 0x7F, 0xFF
        assert decoded(codec, parts, shape).isnan().sum() == 2
    parts = random_parts(codec, shape)
    dtype = "F8_E4M3" if isinstance(codec, NvFp4) else getattr(codec, "scale_dtype", "U8")
    nan = torch.tensor([float("nan")], dtype=FLOATS[dtype]).view(torch.uint8) if dtype in FLOATS else None
    parts["scale"][-(1 if nan is None else nan.numel()) :] = (0x7F if dtype == "F8_E4M3" else 255) if nan is None else nan
    assert decoded(codec, parts, shape).view(-1)[-1].isnan()


def test_unaligned_bytes_are_read(case: Case) -> None:
    codec, shape = case
    parts = random_parts(codec, shape)
    shifted = {}
    for role, data in parts.items():
        buffer = torch.zeros(data.numel() + 1, dtype=torch.uint8)
        buffer[1:] = data
        shifted[role] = buffer[1:]
    assert torch.equal(decoded(codec, shifted, shape), decoded(codec, parts, shape))


def test_codecs_are_hashable_values_with_a_printable_scheme(case: Case) -> None:
    codec, _ = case
    assert len({codec, codec}) == 1
    assert codec.scheme[0].islower()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_the_same_bits(case: Case) -> None:
    codec, shape = case
    base = random_parts(codec, shape)
    rows = num_rows(shape)
    on_gpu = {role: data.cuda() for role, data in base.items()}
    assert torch.equal(codec.decode(on_gpu, shape, 0, rows).cpu(), decoded(codec, base, shape))
    values = nasty_values(shape)
    for before, before_gpu in ((None, None), (base, on_gpu)):
        cpu = codec.encode(values, shape, 0, rows, base=before)
        gpu = codec.encode(values.cuda(), shape, 0, rows, base=before_gpu)
        same(cpu, {role: data.cpu() for role, data in gpu.items()})


def test_all_of_it_runs_where_the_bytes_are(case: Case) -> None:
    """On a device without values: whatever mixed it with the CPU, or looked at a number (but the
    stored shape), would fail.
    """
    codec, shape = case
    rows = num_rows(shape)
    base = {role: data if role == "shape" else data.to("meta") for role, data in random_parts(codec, shape).items()}
    values = nasty_values(shape).to("meta")
    bits._table.cache_clear()
    with OneDevice():
        assert codec.decode(base, shape, 0, rows).is_meta
        for before in (None, base):
            assert codec.stats(values, shape, 0, rows, base=before).is_meta
            assert all(data.is_meta for data in codec.encode(values, shape, 0, rows, base=before).values())
    bits._table.cache_clear()
