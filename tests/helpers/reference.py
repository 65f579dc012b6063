"""The oracle that pmerge is held against: all in memory, float64 or exact, one rounding, no care
for speed.

`exact_mean` is the true answer for integer numerators (sma, wma): the rational mean of the stored
values, rounded once to nearest even. The integer sum is taken in float64 with an error-free check
of every addition, the quotient is compared with the midpoint of two neighbors without rounding, and
elements that fail the check are redone with `fractions`. (Multiplying by a rounded 1/N, even in
float64, breaks exact ties: up to 3 % of the elements of a bf16 mean of six.) `weighted_sum` is for
real coefficients: a float64 sum, rounded once and directly, not by way of float32.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

FORMATS = {  # dtype: significant bits, exponent of the smallest normal number
    torch.bfloat16: (8, -126),
    torch.float16: (11, -14),
    torch.float32: (24, -126),
    torch.float64: (53, -1022),
}


def load(checkpoint: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder, by safetensors' own loader; only files that the index
    names.
    """
    index = checkpoint / "model.safetensors.index.json"
    if not index.exists():
        return load_file(checkpoint / "model.safetensors")
    weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    files = {file: load_file(checkpoint / file) for file in set(weight_map.values())}
    return {name: files[file][name] for name, file in weight_map.items()}


def round_quotient(total: Tensor, divisor: int, dtype: torch.dtype) -> Tensor:
    """The exact `total / divisor` (float64 over a small integer) rounded once to `dtype`, to
    nearest even.
    """
    quotient = total / divisor
    if dtype == torch.float64:
        return quotient
    precision, min_exponent = FORMATS[dtype]
    exponent = (torch.frexp(quotient).exponent - 1).clamp(min=min_exponent).long() - (precision - 1)
    unit = ((exponent + 1023) << 52).view(torch.float64)  # 2^exponent: the gap between neighbors
    low = (quotient / unit).floor()
    midpoint_2 = (2 * low + 1) * unit * divisor  # twice the midpoint, times the divisor: exact in float64
    up = (2 * total > midpoint_2) | ((2 * total == midpoint_2) & (low % 2 == 1))
    rounded = torch.where(up, low + 1, low) * unit
    return torch.where(quotient.isfinite(), rounded.copysign(quotient), quotient).to(dtype)


def round_fraction(value: Fraction, dtype: torch.dtype) -> float:
    """`value` rounded once to `dtype`, to nearest even; slow, and simple enough to believe."""
    precision, min_exponent = FORMATS[dtype]
    exponent = abs(value.numerator).bit_length() - value.denominator.bit_length()
    exponent -= abs(value) < Fraction(2) ** exponent  # now 2^exponent <= |value| < 2^(exponent + 1)
    unit = Fraction(2) ** (max(exponent, min_exponent) - (precision - 1))
    return float(round(value / unit) * unit)


def exact_sum(tensors: Sequence[Tensor], numerators: Sequence[int]) -> tuple[Tensor, Tensor]:
    """`sum(numerators[i] * tensors[i])` in float64, oldest first, and where every step of it is
    exact.
    """
    total = numerators[0] * tensors[0].double()
    exact = torch.full(total.shape, tensors[0].dtype != torch.float64 or numerators[0] == 1)
    for numerator, tensor in zip(numerators[1:], tensors[1:], strict=True):
        term = numerator * tensor.double()  # exact, unless 53 bits are multiplied
        following = total + term
        part = following - total  # TwoSum (Knuth): the addition was exact if and only if its error is zero
        exact &= (total - (following - part)) + (term - part) == 0
        exact &= tensor.dtype != torch.float64 or numerator == 1
        total = following
    return total, exact


def exact_mean(tensors: Sequence[Tensor], numerators: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`sum(numerators[i] * tensors[i]) / sum(numerators)` as a rational number, rounded once to
    `dtype`.
    """
    total, exact = exact_sum(tensors, numerators)
    mean = round_quotient(total, sum(numerators), dtype)
    redo = ~exact & total.isfinite()
    rows = zip(*(tensor.double()[redo].tolist() for tensor in tensors), strict=True)
    sums = [sum(n * Fraction(x) for n, x in zip(numerators, row, strict=True)) for row in rows]
    redone = torch.tensor([round_fraction(s / sum(numerators), dtype) if s else 0.0 for s in sums], dtype=torch.float64)
    # A result of zero keeps the sign that IEEE addition gave it.
    mean[redo] = torch.where(redone == 0, redone.copysign(total[redo]), redone).to(dtype)
    return mean


def weighted_sum(tensors: Sequence[Tensor], coefficients: Sequence[float], dtype: torch.dtype) -> Tensor:
    """`sum(coefficients[i] * tensors[i])` in float64, oldest first, rounded once to `dtype`."""
    total = coefficients[0] * tensors[0].double()
    for coefficient, tensor in zip(coefficients[1:], tensors[1:], strict=True):
        total = total + coefficient * tensor.double()
    return round_quotient(total, 1, dtype)


def coefficients(method: str, steps: Sequence[float], **options: Any) -> list[float]:
    """The coefficients of `method`, oldest first, from the definitions rather than from closed
    forms.
    """
    n = len(steps)
    unit = [[float(i == j) for i in range(n)] for j in range(n)]
    gaps = [after - before for before, after in pairwise(steps)]
    if method == "sma":
        return [1 / n] * n
    if method == "wma":
        return [(i + 1) / (n * (n + 1) / 2) for i in range(n)]
    if method == "ema":  # the recurrence itself, on the unit vectors
        average = unit[0]
        for newest, gap in zip(unit[1:], gaps, strict=True):
            half_life = options.get("half_life")
            a = 1 - 2 ** (-gap / half_life) if half_life else options.get("alpha", 0.2)
            average = [a * new + (1 - a) * old for new, old in zip(newest, average, strict=True)]
        return average
    if method == "decay":
        shape, floor = options.get("shape", "1-sqrt"), options.get("floor", 0.0)
        window = (steps[-1] - steps[0]) * n / (n - 1)
        rates = [floor + (1 - floor) * DECAY[shape]((step - steps[0]) / window) for step in steps]
        return [rate - after for rate, after in pairwise([*rates, 0.0])]
    if method == "power":
        inverse = options.get("sigma_rel", 0.1) ** -2
        low, high = 0.0, 1e4  # bisection for the largest root; the cubic falls before it and rises after
        for _ in range(200):
            g = (low + high) / 2
            low, high = (g, high) if ((g + 7) * g + 16 - inverse) * g + 12 - inverse < 0 else (low, g)
        inner = [(a + b) / 2 for a, b in pairwise(steps)]
        edges = [max(0.0, steps[0] - gaps[0] / 2), *inner, steps[-1] + gaps[-1] / 2]
        masses = [(b / edges[-1]) ** (g + 1) - (a / edges[-1]) ** (g + 1) for a, b in pairwise(edges)]
        return [mass / sum(masses) for mass in masses]
    assert method == "weights"
    return list(options["weights"])


DECAY = {
    "linear": lambda t: 1 - t,
    "1-sqrt": lambda t: 1 - math.sqrt(t),
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
    "exponential": lambda t: 0.1**t,
    "inverse-sqrt": lambda t: 1 / math.sqrt(1 + 9 * t),
}
