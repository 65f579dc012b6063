"""Weighted sums as facts of the plan: the factors of an output, and the dtype in which it is
summed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from merge_cli.errors import first_ten
from merge_cli.request.coefficients import Coefficients


class WeightedSum(NamedTuple):
    """One output of an extent as an operation, oldest input to newest.

    `factors[i]` multiplies input `inputs[i]`; `divisor` (if any) divides the sum. `dtype` is "F32"
    or "F64", in which it is summed. `retry`: elements whose sum overflows F32 are summed again in
    F64.
    """

    inputs: tuple[int, ...]
    factors: tuple[float, ...]
    divisor: float | None = None
    dtype: str = "F64"
    retry: bool = False

    def again_in_float64(self) -> WeightedSum:
        """The same sum in float64, for elements that are too large for float32."""
        return self._replace(dtype="F64", retry=False)


_SIGNIFICANT_BITS = {"BF16": 8, "F16": 11, "F32": 24, "F64": 53}
_SPREAD_BITS = 8
"""Integer sums are to be exact where the values of an element differ by a factor of up to 2^8."""


def weighted_sum(
    inputs: tuple[int, ...], coefficients: Coefficients, accumulate: str, source_dtypes: Sequence[str], output_dtype: str
) -> WeightedSum:
    """The operation for `coefficients`, from inputs of `source_dtypes` into `output_dtype`.

    Integer numerators and one division where the integer sum is exact: then a result is the
    rational average, rounded once. F32 where `accumulate` is "fp32", or for 16-bit inputs and
    outputs whose numerators are as small as those of sma and wma; otherwise F64.

    Other coefficients are themselves rounded to float32 there: with ema and alpha 0.2 that
    misrounds 1.6e-4 of the bf16 results (N = 4), because sums of k/125 often lie on a tie.
    """
    narrow = all(dtype in ("BF16", "F16") for dtype in (*source_dtypes, output_dtype))
    if "F64" in source_dtypes or accumulate == "fp64":
        dtype = "F64"
    elif accumulate == "fp32" or (narrow and has_small_numerators(coefficients)):
        dtype = "F32"
    else:
        dtype = "F64"
    retry = accumulate == "auto" and dtype == "F32"
    if not sums_integers(coefficients, dtype, source_dtypes):
        return WeightedSum(inputs, coefficients.values, None, dtype, retry)
    assert coefficients.numerators is not None and coefficients.denominator is not None
    divisor = float(coefficients.denominator)
    return WeightedSum(inputs, tuple(map(float, coefficients.numerators)), None if divisor == 1.0 else divisor, dtype, retry)


def has_small_numerators(coefficients: Coefficients) -> bool:
    """Whether the numerators are as small as those of sma and wma: at most the number of inputs."""
    return coefficients.numerators is not None and max(map(abs, coefficients.numerators)) <= len(coefficients.numerators)


def sums_integers(coefficients: Coefficients, dtype: str, source_dtypes: Sequence[str]) -> bool:
    """Whether the numerators are summed rather than the values: whether a sum of `dtype` has the
    bits for them.

    Those are the bits of all numerators together, of a value, and of the spread of the exponents.
    Small numerators are summed in any case: a rounded 1/3 is never better.
    """
    if coefficients.numerators is None or has_small_numerators(coefficients):
        return coefficients.numerators is not None
    bits = sum(map(abs, coefficients.numerators)).bit_length() + max(_SIGNIFICANT_BITS[source] for source in source_dtypes)
    return bits + _SPREAD_BITS <= _SIGNIFICANT_BITS[dtype]


def notes_on_weights(coefficients: Coefficients, accumulate: str, kinds: Iterable[tuple[Sequence[str], str]]) -> list[str]:
    """Lines on how explicit weights are summed, for sums of `kinds`: dtypes of the inputs, dtype of
    the output.
    """
    exact, rounded = False, set()
    for sources, output in kinds:
        dtype = weighted_sum((), coefficients, accumulate, sources, output).dtype
        if sums_integers(coefficients, dtype, sources):
            exact = True
        else:
            rounded |= set(sources)
    lines = []
    if exact:
        shares = " ".join(map(str, first_ten([str(each) for each in coefficients.numerators or ()])))
        lines.append(f"the weights are exact, {shares} over {coefficients.denominator}: averages are rounded once")
    if rounded:
        dtypes = ", ".join(sorted(rounded))
        lines.append(f"the weights have too many digits for exact sums of {dtypes}: every product is rounded")
    return lines
