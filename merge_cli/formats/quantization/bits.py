"""Bytes to float32 and back for the number formats inside quantized checkpoints (torch).

Only table look-ups, integer operations and IEEE 754 single operations, so that CPU and CUDA give
the same bits: divisions are tensor by tensor (CUDA multiplies by the reciprocal where the divisor
is a Python number), powers of two are made from their bit patterns.

Formats: E4M3 (OCP FP8, torch.float8_e4m3fn: largest 448, 0x7F and 0xFF are NaN), E8M0 (OCP MX:
2^(byte - 127), 255 is NaN), E2M1 (FP4: 0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives; two in a
byte, low nibble first), integers of 2, 4 or 8 bits stored with an offset of 2^(bits - 1), lowest
bits first, in little-endian words.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

FP8_MAX = 448.0
FP4_MAX = 6.0
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F8_E4M3": torch.float8_e4m3fn}


@functools.cache
def _table(kind: str, device: torch.device) -> Tensor:
    """What each of the 256 bytes means: int32 [256] or int64 [256] bit patterns, or float32 [256,
    4].
    """
    byte = torch.arange(256, dtype=torch.int32)
    if kind == "e4m3":
        values = byte.to(torch.uint8).view(torch.float8_e4m3fn).to(torch.float32)
        return values.view(torch.int32).to(device)
    if kind == "fp4":
        nibbles = torch.stack((byte & 15, byte >> 4), dim=1)
        values = torch.tensor(FP4_VALUES)[nibbles]
    else:
        num_bits = int(kind.removeprefix("int"))
        shifts = torch.arange(0, 8, num_bits, dtype=torch.int32)
        fields = (byte[:, None] >> shifts) & ((1 << num_bits) - 1)
        values = (fields - (1 << (num_bits - 1))).to(torch.float32)
    if values.shape[1] == 4:
        return values.to(device)
    return values.view(torch.int32 if values.shape[1] == 1 else torch.int64).flatten().to(device)


def look_up(codes: Tensor, kind: str) -> Tensor:
    """float32 values of uint8 `codes` (1-D), in order; `kind` is e4m3, fp4 (two a byte), int2
    (four), int4, int8.
    """
    found = torch.index_select(_table(kind, codes.device), 0, codes.to(torch.int32))
    return found.view(torch.float32).flatten()


def read_floats(data: Tensor, dtype: str) -> Tensor:
    """float32 [n] from the bytes (1-D uint8) of n scales of safetensors dtype `dtype`; U8 means
    E8M0.
    """
    if dtype in ("F8_E8M0", "U8"):
        byte = data.to(torch.int32)
        bits = torch.where(byte == 0, 0x00400000, byte << 23)
        return torch.where(byte == 255, 0x7FC00000, bits).view(torch.float32)
    if dtype == "I8":
        return data.view(torch.int8).to(torch.float32)
    if dtype == "F8_E4M3":
        return look_up(data, "e4m3")
    kind = _FLOATS[dtype]
    if data.storage_offset() % kind.itemsize:
        data = data.clone()
    return data.view(kind).to(torch.float32)


def write_floats(values: Tensor, dtype: str) -> Tensor:
    """Bytes (1-D uint8) of float32 `values` in safetensors dtype `dtype`, rounded to nearest even.

    E8M0 (F8_E8M0, U8) takes powers of two from 2^-127 on; E4M3 takes values of at most 448.
    """
    if dtype in ("F8_E8M0", "U8"):
        return ((values.contiguous().view(torch.int32) >> 23) & 255).to(torch.uint8).flatten()
    if dtype == "I8":
        return values.to(torch.int8).view(torch.uint8).flatten()
    flat = values.to(_FLOATS[dtype]).flatten()
    if flat.stride(0) != 1:  # a single element may keep any stride, and then has no view as bytes
        flat = flat.clone(memory_format=torch.contiguous_format).as_strided(flat.shape, (1,))
    return flat.view(torch.uint8)


def write_integers(values: Sequence[int], dtype: str, device: torch.device) -> Tensor:
    """Bytes of `values` as I64 or I32."""
    kind = torch.int64 if dtype == "I64" else torch.int32
    return torch.tensor(values, dtype=kind, device=device).view(torch.uint8)


def as_stored(values: Tensor, dtype: str) -> Tensor:
    """Scales `values` as they will be read back from `dtype`; 0 (all-zero block, underflow) becomes
    1.
    """
    stored = read_floats(write_floats(torch.where(values == 0, 1.0, values), dtype), dtype).view(values.shape)
    return torch.where(stored == 0, 1.0, stored)


def divide(values: Tensor, by: float) -> Tensor:
    """`values / by`, correctly rounded on every device."""
    return values / torch.full_like(values, by)


def power_of_two_at_least(values: Tensor) -> Tensor:
    """The smallest power of two >= each positive float32 value, at least 2^-126; 0 stays 0."""
    return ((values.view(torch.int32) + 0x007FFFFF) & 0x7F800000).view(torch.float32)


def shared_exponent(amax: Tensor, element_exponent: int, *, round_up: bool = False) -> Tensor:
    """The MX scale 2^(floor(log2 amax) - element_exponent) of blocks with largest magnitude `amax`,
    as float32.

    OCP Microscaling Formats 1.0, section 6.3, with `element_exponent` 2 for E2M1 and 8 for E4M3.
    `round_up`: amax of 1.75 * 2^n and more counts as 2^(n + 1), which is what compressed-tensors
    does. At least 2^-127.
    """
    bits = amax.contiguous().view(torch.int32) + (1 << 21 if round_up else 0)
    byte = ((bits >> 23) - element_exponent).clamp_(0, 254)
    return torch.where(byte == 0, 0x00400000, byte << 23).view(torch.float32)


def to_fp8(values: Tensor) -> Tensor:
    """E4M3 codes (uint8) of float32 `values`: clamped to +-448, since the cast makes NaN of what is
    too large.

    Overwrites `values`.
    """
    return values.clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)


def to_fp4(values: Tensor) -> Tensor:
    """E2M1 codes (uint8, 0..15) of float32 `values`: clamped to +-6, rounded to nearest, ties to
    the even code.

    The code of a magnitude is the least of round(2x), round(x) + 2 and round(x / 2) + 4: the three
    step widths. Overwrites `values`.
    """
    negative = torch.signbit(values)
    x = values.abs_().clamp_(max=FP4_MAX)
    code = (x * 2).round_()
    code = torch.minimum(code, x.round().add_(2), out=code)
    code = torch.minimum(code, x.mul_(0.5).round_().add_(4), out=code).to(torch.uint8)
    return code.add_(negative, alpha=8)


def pack(fields: Tensor, num_bits: int) -> Tensor:
    """Bytes of uint8 `fields` of `num_bits` bits, lowest bits first; the last dimension shrinks by
    8 / num_bits.
    """
    packed = fields[..., 0 :: 8 // num_bits].clone()
    for place in range(1, 8 // num_bits):
        packed |= fields[..., place :: 8 // num_bits] << (place * num_bits)
    return packed


def to_fields(codes: Tensor, num_bits: int) -> Tensor:
    """uint8 fields code + 2^(bits - 1) of whole float32 `codes`. Overwrites `codes`."""
    return codes.add_(1 << (num_bits - 1)).to(torch.uint8)


def pad_last(fields: Tensor, missing: int) -> Tensor:
    """`fields` with `missing` zeros at the end of the last dimension."""
    return torch.nn.functional.pad(fields, (0, missing)) if missing else fields
