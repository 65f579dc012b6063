"""What the engine may answer: for every element the smallest and the largest value that a correct
run can give.

Most of these intervals are a single value. sma and wma: the exact mean, rounded once, wherever the
integer sum is exact in the accumulator. Other coefficients: the float64 sum, rounded once, unless
it lies so close to the midpoint of two neighbors that the rounding errors of the accumulator
decide. Outside these cases an interval follows from the usual bound on a sum's error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from reference import coefficients, exact_mean, exact_sum, round_quotient
from torch import Tensor

Interval = tuple[Tensor, Tensor]


def ordered(values: Tensor) -> Tensor:
    """Integers [elements] in the order of the floats, neighbors one apart, -0 just below +0."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.dtype.itemsize]
    bits = values.flatten().view(integer).long()
    return torch.where(bits < 0, ~(bits & torch.iinfo(integer).max), bits)


def units_apart(found: Tensor, expected: Tensor) -> Tensor:
    """How many representable values lie between the elements, as int64 [elements]."""
    return (ordered(found) - ordered(expected)).abs()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and every bit."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))


def numerators(method: str, count: int, options: Mapping[str, Any]) -> list[int] | None:
    """The integer numerators of a rational method (checkpoints evenly spaced), None for the others."""
    if method == "sma" or (method == "decay" and options == {"shape": "linear"}):
        return [1] * count
    return list(range(1, count + 1)) if method == "wma" else None


def accumulator(rational: bool, tensors: Sequence[Tensor], dtype: torch.dtype, accumulate: str) -> torch.dtype:
    """The dtype in which the engine promises to sum."""
    if accumulate == "fp64" or any(tensor.dtype == torch.float64 for tensor in tensors):
        return torch.float64
    narrow = all(each.itemsize == 2 for each in (dtype, *(tensor.dtype for tensor in tensors)))
    return torch.float32 if accumulate == "fp32" or (rational and narrow) else torch.float64


def interval(
    tensors: Sequence[Tensor],
    method: str,
    options: Mapping[str, Any],
    steps: Sequence[float],
    dtype: torch.dtype,
    accumulate: str = "auto",
) -> Interval:
    """The smallest and the largest average of `tensors` (one tensor's values, oldest first) that a
    correct engine can give.
    """
    count = len(tensors)
    integers = numerators(method, count, options)
    weights = coefficients(method, steps, **options) if count > 1 else [1.0]
    summed_in = accumulator(integers is not None, tensors, dtype, accumulate)
    total = sum((w * t.double() for w, t in zip(weights[1:], tensors[1:], strict=True)), weights[0] * tensors[0].double())
    magnitude = sum((abs(w) * t.double().abs() for w, t in zip(weights, tensors, strict=True)), torch.zeros_like(total))
    relative, absolute = (2.0**-24, 2.0**-149) if summed_in == torch.float32 else (2.0**-53, 2.0**-1074)
    error = torch.where(magnitude > 0, (4 * count + 4) * relative * magnitude + 2 * count * absolute, 0.0)
    low = round_quotient(torch.where(error > 0, total - error, total), 1, dtype)
    high = round_quotient(torch.where(error > 0, total + error, total), 1, dtype)
    if integers is not None:
        mean = exact_mean(tensors, integers, dtype)
        certain = sum_is_exact(tensors, integers, summed_in).reshape(mean.shape)
        assert ((ordered(low) <= ordered(mean)) & (ordered(mean) <= ordered(high))).all(), "the oracle contradicts itself"
        low, high = torch.where(certain, mean, low), torch.where(certain, mean, high)
    return low, high


def sum_is_exact(tensors: Sequence[Tensor], integers: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Where `sum(integers[i] * tensors[i])`, added from oldest to newest in `dtype`, is exact at
    every step.
    """
    total, exact = exact_sum(tensors, integers)
    if dtype == torch.float64:
        return exact
    running = torch.zeros_like(total, dtype=torch.float32)
    wide = torch.zeros_like(total)
    for factor, tensor in zip(integers, tensors, strict=True):
        term = factor * tensor.float()
        running, wide = running + term, wide + factor * tensor.double()
        exact = exact & (term.double() == factor * tensor.double()) & (running.double() == wide)
    return exact & ((total == 0) | (total.abs() > 2.0**-100))  # a quotient may be subnormal, hence rounded twice


def outside(found: Tensor, allowed: Interval) -> Tensor:
    """The positions of elements of `found` outside their interval; the sign of zero counts."""
    low, high = allowed
    assert (found.dtype, found.shape) == (low.dtype, low.shape)
    return ((ordered(found) < ordered(low)) | (ordered(found) > ordered(high))).nonzero().flatten()


def assert_within(found: Mapping[str, Tensor], expected: Mapping[str, Interval | Tensor]) -> None:
    """Every tensor of `found` lies in its interval, or equals, bit for bit, the tensor that is
    expected in its place.
    """
    assert found.keys() == expected.keys()
    for name, allowed in expected.items():
        if isinstance(allowed, Tensor):
            assert same_bits(found[name], allowed), name
            continue
        wrong = outside(found[name], allowed)
        if wrong.numel():
            i = int(wrong[0])
            values = [tensor.flatten()[i].item() for tensor in (found[name], *allowed)]
            raise AssertionError(
                f"{name}: {wrong.numel()} of {found[name].numel()} elements are wrong; "
                f"the first, at {i}, is {values[0]!r} instead of {values[1]!r} to {values[2]!r}"
            )


def expect(
    inputs: Sequence[Mapping[str, Tensor]],
    method: str,
    options: Mapping[str, Any],
    steps: Sequence[float],
    dtype: torch.dtype | None = None,
    accumulate: str = "auto",
) -> dict[str, Interval | Tensor]:
    """What the average of whole checkpoints must be: intervals for floats, the tensor itself for
    integers.

    `dtype` None keeps the dtypes of the newest checkpoint.
    """
    expected: dict[str, Interval | Tensor] = {}
    for name, newest in inputs[-1].items():
        if newest.is_floating_point():
            tensors = [checkpoint[name] for checkpoint in inputs]
            expected[name] = interval(tensors, method, options, steps, dtype or newest.dtype, accumulate)
        else:
            expected[name] = newest
    return expected
