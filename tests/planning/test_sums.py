"""When numerators are summed as integers, and in which dtype."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from merge_cli.planning.sums import notes_on_weights, weighted_sum
from merge_cli.request.coefficients import Coefficients
from merge_cli.request.methods import coefficients


def explicit(weights: Sequence[float], normalize: bool = False) -> Coefficients:
    return coefficients("weights", range(len(weights)), weights=weights, normalize=normalize)


TENTHS, BILLIONTHS = explicit([0.7, 0.3]), explicit([0.123456789, 0.876543211])


@pytest.mark.parametrize("accumulate", ["auto", "fp32", "fp64"])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize(("method", "weights"), [("sma", [1] * 300), ("wma", list(range(1, 301)))])
def test_weights_that_are_those_of_a_method_are_summed_as_by_that_method(
    method: str, weights: list[float], dtype: str, accumulate: str
) -> None:
    sums = [
        weighted_sum(tuple(range(300)), chosen, accumulate, [dtype] * 300, "BF16")
        for chosen in (coefficients(method, range(300)), explicit(weights, normalize=True))
    ]
    assert sums[0] == sums[1]
    assert sums[0].factors == tuple(map(float, weights))
    narrow = dtype in ("BF16", "F16") and accumulate == "auto"
    assert sums[0].dtype == ("F32" if narrow or (accumulate == "fp32" and dtype != "F64") else "F64")


@pytest.mark.parametrize(
    ("chosen", "dtype", "accumulate", "summed_in", "integers"),
    [
        (TENTHS, "BF16", "auto", "F64", True),
        (TENTHS, "F32", "auto", "F64", True),
        (TENTHS, "F64", "auto", "F64", False),  # 4 bits and 53
        (TENTHS, "BF16", "fp32", "F32", True),  # 4 + 8 + 8 bits of 24
        (TENTHS, "F32", "fp32", "F32", False),
        (BILLIONTHS, "BF16", "auto", "F64", True),
        (BILLIONTHS, "F16", "auto", "F64", True),
        (BILLIONTHS, "F32", "auto", "F64", False),
        (BILLIONTHS, "BF16", "fp32", "F32", False),
        (explicit([0.1234567890123, 0.8765432109877]), "BF16", "auto", "F64", False),
        (explicit([0.5, 0.5]), "BF16", "auto", "F32", True),
        (explicit([1.5, -0.5]), "BF16", "auto", "F64", True),
    ],
)
def test_integers_are_summed_where_their_bits_fit(
    chosen: Coefficients, dtype: str, accumulate: str, summed_in: str, integers: bool
) -> None:
    found = weighted_sum((0, 1), chosen, accumulate, [dtype, "BF16"], "BF16")
    assert found.dtype == summed_in
    assert (found.factors, found.divisor) == (
        (tuple(map(float, chosen.numerators or ())), float(chosen.denominator or 0)) if integers else (chosen.values, None)
    )


def test_notes_name_the_dtypes_whose_sums_are_not_exact() -> None:
    kinds = [(("BF16", "BF16"), "BF16"), (("F32", "F32"), "F32")]
    (exact,) = notes_on_weights(TENTHS, "auto", kinds)
    assert "7 3 over 10" in exact
    exact, rounded = notes_on_weights(BILLIONTHS, "auto", kinds)
    assert "over 1000000000" in exact
    assert "F32" in rounded and "BF16" not in rounded
    (rounded,) = notes_on_weights(Coefficients((0.1234567890123, 0.8765432109877)), "auto", kinds)
    assert "BF16, F32" in rounded
