"""What requantizing keeps without a base, where it cannot, what it reports, and what memory it
takes.
"""

from __future__ import annotations

import math

import pytest
import torch
from quantizing import encoded, random_parts, same
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from merge_cli.formats.quantization.codec import DECODE_SCRATCH_BYTES, ENCODE_SCRATCH_BYTES, Codec
from merge_cli.formats.quantization.error import combine_totals, error_totals, relative_errors
from merge_cli.formats.quantization.fp8 import Fp8
from merge_cli.formats.quantization.integer import Integer
from merge_cli.formats.quantization.layout import Grid
from merge_cli.formats.quantization.mxfp4 import MxFp4, MxFp4Transposed
from merge_cli.formats.quantization.nvfp4 import NvFp4

SHAPE = (256, 256)


def with_largest(code: int, scale: Tensor, scale_dtype: str, rule: str = "amax") -> tuple[Fp8, dict[str, Tensor]]:
    """Blocks whose largest code is `code`, each with its scale of `scale` [2, 2]."""
    codec = Fp8(Grid(128, 128), scale_dtype, rule)  # type: ignore[arg-type]
    codes = torch.randint(0, code + 1, SHAPE, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    codes |= torch.randint(0, 2, SHAPE, generator=torch.Generator().manual_seed(1)).to(torch.uint8) << 7
    codes[::128, ::128] = code
    return codec, {"codes": codes.flatten(), "scale": scale.flatten().view(torch.uint8)}


def again(codec: Codec, parts: dict[str, Tensor], shape: tuple[int, ...]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The parts requantized without a base, the values before, the values after."""
    rows = math.prod(shape[:-1])
    before = codec.decode(parts, shape, 0, rows)
    coded = encoded(codec, before, shape, None, 1)
    return coded, before, codec.decode(coded, shape, 0, rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e8m0fnu])
def test_fp8_blocks_that_use_code_448_come_back_whole(dtype: torch.dtype) -> None:
    scale = torch.tensor([[0.01, 0.002], [3e-5, 7.0]]).to(dtype)
    name, rule = ("BF16", "amax") if dtype == torch.bfloat16 else ("F8_E8M0", "ceil")
    codec, parts = with_largest(0x7E, scale, name, rule)
    same(parts, again(codec, parts, SHAPE)[0])


def test_fp8_with_f32_scales_keeps_the_codes_and_the_scales_to_the_last_bit() -> None:
    codec, parts = with_largest(0x7E, torch.rand(2, 2, generator=torch.Generator().manual_seed(3)), "F32")
    coded, _, _ = again(codec, parts, SHAPE)
    assert torch.equal(coded["codes"], parts["codes"])
    bits = [data["scale"].view(torch.float32).view(torch.int32) for data in (coded, parts)]
    assert int((bits[0] - bits[1]).abs().max()) <= 1


def test_fp8_blocks_whose_largest_code_is_not_448_move_by_at_most_a_sixteenth_without_a_base() -> None:
    codec, parts = with_largest(0x7D, torch.full((2, 2), 0.01), "F32")  # 416
    coded, before, after = again(codec, parts, SHAPE)
    assert not torch.equal(coded["scale"], parts["scale"])
    ordinary = before.abs() > 1e-3 * before.abs().max()
    moved = ((after - before).abs() / before.abs())[ordinary].max()
    assert 0.01 < float(moved) <= 1 / 16
    same(parts, encoded(codec, before, SHAPE, parts, 1))


def test_int4_shrinks_without_a_base_but_not_with_kimis_rule() -> None:
    codes = torch.tensor([7, -6, 3, 1] * 8).repeat(4, 1)
    packed = torch.zeros(4, 16, dtype=torch.uint8)
    packed += (codes[:, 0::2] + 8).to(torch.uint8) + ((codes[:, 1::2] + 8) << 4).to(torch.uint8)
    scale = torch.tensor([0.5, 0.25, 1.0, 3.0]).bfloat16()
    parts = {"codes": packed.flatten(), "scale": scale.view(torch.uint8)}
    kimi = Integer(Grid(1, 32), "BF16", 4, packed=True, lowest=-7)
    same(parts, again(kimi, parts, (4, 32))[0])
    published = Integer(Grid(1, 32), "BF16", 4, packed=True, lowest=-8)
    coded, before, after = again(published, parts, (4, 32))
    assert torch.equal(coded["codes"], parts["codes"])
    assert torch.allclose(after, before * 14 / 15, rtol=2**-8)
    same(parts, encoded(published, before, (4, 32), parts, 1))


@pytest.mark.parametrize("rule", ["floor", "round", "ceil"])
def test_mxfp4_keeps_every_value_by_any_rule_without_a_base(rule: str) -> None:
    codec = MxFp4("U8", rule)  # type: ignore[arg-type]
    parts = random_parts(codec, (64, 96))
    _, before, after = again(codec, parts, (64, 96))
    assert torch.equal(before, after)


def test_nvfp4_keeps_the_global_scale_while_it_covers_the_tensor() -> None:
    codec = NvFp4()
    parts = random_parts(codec, (64, 64))
    values = codec.decode(parts, (64, 64), 0, 64)
    covered = encoded(codec, values * 0.9, (64, 64), parts, 1)
    assert torch.equal(covered["global_scale"], parts["global_scale"])
    beyond = encoded(codec, values * 100, (64, 64), parts, 1)
    expected = torch.tensor([448.0 * 6]) / (values * 100).abs().max()
    assert torch.equal(beyond["global_scale"].view(torch.float32), expected)


def test_one_changed_value_changes_only_its_block() -> None:
    codec, parts = with_largest(0x7D, torch.full((2, 2), 0.01), "F32")
    values = codec.decode(parts, SHAPE, 0, 256)
    values[200, 10] = values[200, 10] * 1.01 + 1e-3
    coded = encoded(codec, values, SHAPE, parts, 1)
    kept = coded["scale"].view(torch.float32) == parts["scale"].view(torch.float32)
    assert kept.tolist() == [True, True, False, True]
    unsigned = Integer(Grid(1, 32), "F32", zero="I8")
    parts = random_parts(unsigned, SHAPE)
    values = unsigned.decode(parts, SHAPE, 0, 256)
    values[200, 10] += 0.3
    coded = encoded(unsigned, values, SHAPE, parts, 1)
    kept = (coded["zero"] == parts["zero"]) & (coded["codes"] == parts["codes"]).view(-1, 32).all(1)
    assert kept.sum() >= kept.numel() - 1


def test_errors_are_reported_relative_to_the_tensor() -> None:
    values = torch.tensor([1.0, -4.0, 0.0, 3.0])
    decoded = torch.tensor([1.0, -4.5, 0.0, 3.5])
    totals = error_totals(values, decoded)
    assert relative_errors(totals) == (0.5 / 4, 1.0 / 8)
    halves = combine_totals(error_totals(values[:2], decoded[:2]), error_totals(values[2:], decoded[2:]))
    assert halves == totals
    assert relative_errors(error_totals(values[:0], values[:0])) == (0.0, 0.0)


@pytest.mark.parametrize(
    "codec",
    [
        Fp8(Grid(128, 128)),
        Fp8(Grid(whole=True)),
        Fp8(Grid(0, 1)),
        Integer(Grid(1, 32), "BF16", 4, True, -8, "packed", "I64"),
        Integer(Grid(1, 16), "F32", zero="I8"),
        MxFp4(),
        MxFp4Transposed(),
        NvFp4(),
    ],
    ids=lambda codec: codec.scheme,
)
def test_scratch_stays_within_what_the_contract_says(codec: Codec) -> None:
    shape = (2, 256, 512)
    rows, num_values = 512, 2 * 256 * 512
    parts = random_parts(codec, shape)
    values = codec.decode(parts, shape, 0, rows)
    slack = 64 * 1024
    decode = peak_bytes(lambda: codec.decode(parts, shape, 0, rows))
    assert decode <= (DECODE_SCRATCH_BYTES + 4) * num_values + slack
    encode = peak_bytes(lambda: codec.encode(values, shape, 0, rows, base=parts))
    stats = peak_bytes(lambda: codec.stats(values, shape, 0, rows, base=parts))
    assert max(encode, stats) <= ENCODE_SCRATCH_BYTES * num_values + slack


def peak_bytes(work) -> int:  # type: ignore[no-untyped-def]
    """Most bytes of tensors that `work` held at once, its result included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    held = most = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    del result
    return most
