"""The arithmetic: weighted sums of blocks of elements, and one rounding at the end.

Every element is computed by the same IEEE 754 operations in the same order, whatever the block size, thread or device: widen,
multiply, add (never a fused multiply-add, which rounds differently in a vector's body and in its tail), inputs from oldest to
newest. Rational methods sum integer multiples and divide once by a tensor (CUDA turns a division by a Python number into a
multiplication by its reciprocal), so a bf16 mean is the exact mean rounded once as long as the integer sum fits the 24 bits of a
float32. The first term is copied, not added to zero, which keeps negative zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from merge_cli.formats.safetensors import DTYPES
from merge_cli.methods import Coefficients

_ROW = 64
_INT32_MIN = -(1 << 31)


@dataclass(frozen=True)
class WeightedSum:
    """One output as an operation: `factors[i]` multiplies input `inputs[i]`, `divisor` (if any) divides the sum."""

    inputs: tuple[int, ...]
    factors: tuple[float, ...]
    divisor: float | None
    is_rational: bool


def weighted_sum(inputs: tuple[int, ...], coefficients: Coefficients) -> WeightedSum:
    """The operation for `coefficients`: integer numerators and one division where the method is rational."""
    if coefficients.numerators is not None and coefficients.denominator is not None:
        divisor = float(coefficients.denominator)
        factors = tuple(map(float, coefficients.numerators))
        return WeightedSum(inputs, factors, None if divisor == 1.0 else divisor, True)
    return WeightedSum(inputs, coefficients.values, None, False)


def torch_dtype(name: str) -> torch.dtype:
    """The torch type of a safetensors dtype."""
    dtype = getattr(torch, DTYPES[name].torch)
    assert isinstance(dtype, torch.dtype)
    return dtype


def accumulator_dtype(accumulate: str, operation: WeightedSum, source_dtypes: Sequence[str], output_dtype: str) -> torch.dtype:
    """float32 for integer-weighted sums of 16-bit inputs into 16 bits, otherwise float64, unless `accumulate` is "fp32" or "fp64".

    Coefficients that are no small integers are themselves rounded to float32 there: with ema and alpha 0.2 that misrounds
    1.6e-4 of the bf16 results (N = 4), because sums of k/125 often lie on a tie.
    """
    if "F64" in source_dtypes or accumulate == "fp64":
        return torch.float64
    if accumulate == "fp32":
        return torch.float32
    narrow = all(dtype in ("BF16", "F16") for dtype in (*source_dtypes, output_dtype))
    return torch.float32 if operation.is_rational and narrow else torch.float64


class Scratch:
    """An accumulator and a temporary of `elements` each, made once and reused for every block."""

    def __init__(self, elements: int, device: torch.device) -> None:
        self._accumulator = torch.empty(elements * 8, dtype=torch.uint8, device=device)
        self._temporary = torch.empty(elements * 8, dtype=torch.uint8, device=device)

    def pair(self, elements: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The accumulator and the temporary as tensors [elements] of `dtype`."""
        length = elements * dtype.itemsize
        return self._accumulator[:length].view(dtype), self._temporary[:length].view(dtype)


def accumulate(
    operation: WeightedSum,
    sources: Mapping[int, torch.Tensor],
    accumulator: torch.Tensor,
    temporary: torch.Tensor,
) -> None:
    """`accumulator = sum_i factors[i] * sources[inputs[i]] / divisor`; all tensors [elements], `temporary` is overwritten."""
    for position, index in enumerate(operation.inputs):
        add_term(operation, position, sources[index], accumulator, temporary)
    divide(operation, accumulator)


def add_term(
    operation: WeightedSum, position: int, source: torch.Tensor, accumulator: torch.Tensor, temporary: torch.Tensor
) -> None:
    """Add the term at `position` of the sum: `source` times its factor. Terms must come in order, from position 0."""
    term = accumulator if position == 0 else temporary
    term.copy_(source)
    if operation.factors[position] != 1.0:
        term.mul_(operation.factors[position])
    if position:
        accumulator.add_(temporary)


def divide(operation: WeightedSum, accumulator: torch.Tensor) -> None:
    """Finish the sum."""
    if operation.divisor is not None:
        accumulator.div_(torch.full((), operation.divisor, dtype=accumulator.dtype, device=accumulator.device))


def store(accumulator: torch.Tensor, output: torch.Tensor) -> None:
    """Round `accumulator` once, to nearest even, into `output`; both [elements].

    torch goes from float64 to 16 bits by way of float32 and so rounds twice. The second rounding goes wrong only where the first
    landed on a tie, so those few elements (for float16, whose subnormals move the tie, all) are first rounded to odd.
    """
    if accumulator.dtype != torch.float64 or output.dtype not in (torch.bfloat16, torch.float16):
        output.copy_(accumulator)
    elif output.dtype == torch.float16:
        output.copy_(_round_to_odd(accumulator))
    else:
        nearest = accumulator.to(torch.float32)
        ties = _ties(nearest)
        if ties.numel():
            nearest[ties] = _round_to_odd(accumulator[ties])
        output.copy_(nearest)


def _ties(values: torch.Tensor) -> torch.Tensor:
    """The positions of float32 values halfway between two bfloat16 ones: the lower half of their bits is 0x8000.

    Shifted up, that is the smallest integer there is, so rows with a tie are found by their minimum, which is four times as fast as
    comparing every element.
    """
    lower = torch.bitwise_left_shift(values.view(torch.int32), 16)
    whole = lower.numel() // _ROW * _ROW
    rows = (lower[:whole].view(-1, _ROW).amin(1) == _INT32_MIN).nonzero()
    inside = (lower[:whole].view(-1, _ROW)[rows.flatten()] == _INT32_MIN).nonzero()
    rest = (lower[whole:] == _INT32_MIN).nonzero().flatten() + whole
    return torch.cat([rows[inside[:, 0], 0] * _ROW + inside[:, 1], rest])


def _round_to_odd(values: torch.Tensor) -> torch.Tensor:
    """float64 to float32, inexact results rounded to the neighbour with an odd last bit.

    Rounding that to 16 bits gives what rounding the float64 directly would: torch itself goes by way of float32 and rounds twice.
    """
    nearest = values.to(torch.float32)
    bits = nearest.view(torch.int32)
    error = values.abs() - nearest.to(torch.float64).abs()
    fix = (error != 0) & (bits & 1 == 0) & nearest.isfinite()
    bits += torch.where(fix, torch.sign(error), 0.0).to(torch.int32)
    return nearest


def is_clean(output: torch.Tensor) -> torch.Tensor:
    """A bool tensor []: whether every element of a result is finite."""
    low, high = torch.aminmax(output)  # NaN in, NaN out
    return low.isfinite() & high.isfinite()
