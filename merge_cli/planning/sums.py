"""Weighted sums as facts of the plan: the factors of an output, and the dtype in which it is summed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from merge_cli.request.methods import Coefficients


class WeightedSum(NamedTuple):
    """One output of an extent as an operation, oldest input to newest.

    `factors[i]` multiplies input `inputs[i]`; `divisor` (if any) divides the sum. `dtype` is "F32" or
    "F64", in which it is summed. `retry`: elements whose sum overflows F32 are summed again in F64.
    """

    inputs: tuple[int, ...]
    factors: tuple[float, ...]
    divisor: float | None = None
    dtype: str = "F64"
    retry: bool = False

    def again_in_float64(self) -> WeightedSum:
        """The same sum in float64, for elements that are too large for float32."""
        return self._replace(dtype="F64", retry=False)


def weighted_sum(inputs: tuple[int, ...], coefficients: Coefficients, dtype: str = "F64", retry: bool = False) -> WeightedSum:
    """The operation for `coefficients`: integer numerators and one division where the method is rational."""
    if coefficients.numerators is not None and coefficients.denominator is not None:
        divisor = float(coefficients.denominator)
        factors = tuple(map(float, coefficients.numerators))
        return WeightedSum(inputs, factors, None if divisor == 1.0 else divisor, dtype, retry)
    return WeightedSum(inputs, coefficients.values, None, dtype, retry)


def sum_dtype(accumulate: str, is_rational: bool, source_dtypes: Sequence[str], output_dtype: str) -> str:
    """F32 for integer-weighted sums of 16-bit inputs into 16 bits, otherwise F64, unless `accumulate` is "fp32" or "fp64".

    Coefficients that are no small integers are themselves rounded to float32 there: with ema and alpha
    0.2 that misrounds 1.6e-4 of the bf16 results (N = 4), because sums of k/125 often lie on a tie.
    """
    if "F64" in source_dtypes or accumulate == "fp64":
        return "F64"
    if accumulate == "fp32":
        return "F32"
    narrow = all(dtype in ("BF16", "F16") for dtype in (*source_dtypes, output_dtype))
    return "F32" if is_rational and narrow else "F64"
