"""The arithmetic of every method: the published vectors, and the properties that hold for any
input.
"""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_cli.errors import UsageError
from merge_cli.request.coefficients import IDENTITY, Coefficients, warnings_for
from merge_cli.request.methods import DECAY_SHAPES, METHODS, coefficients, gamma_of, needs_step_values, relative_width

EVEN = list(range(1000, 11000, 1000))

# Vector at N=10, effective sample size and mean age, to the printed digits. By hand, the sixth
# weight of 1-sqrt is sqrt(.6) - sqrt(.5) = .06749 and the middle of cosine is cos(.4 pi) / 2 =
# .15451.
TABLE = [
    ("sma", {}, ".1 .1 .1 .1 .1 .1 .1 .1 .1 .1", "10.0", "4.50"),
    ("wma", {}, ".018 .036 .055 .073 .091 .109 .127 .145 .164 .182", "7.86", "3.00"),
    ("ema", {"alpha": 0.1}, ".387 .043 .048 .053 .059 .066 .073 .081 .090 .100", "5.13", "5.51"),
    ("ema", {"alpha": 0.2}, ".134 .034 .042 .052 .066 .082 .102 .128 .160 .200", "7.87", "3.46"),
    ("decay", {"shape": "1-sqrt"}, ".316 .131 .101 .085 .075 .067 .062 .058 .054 .051", "6.36", "6.11"),
    ("decay", {"shape": "cosine"}, ".024 .071 .111 .139 .155 .155 .139 .111 .071 .024", "8.17", "4.50"),
]

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("sma", {}),
    ("wma", {}),
    ("ema", {}),
    ("ema", {"alpha": 1.0}),
    ("ema", {"half_life": 700.0}),
    *(("decay", {"shape": shape, "floor": floor}) for shape in DECAY_SHAPES for floor in (0.0, 0.1)),
    ("power", {}),
    ("power", {"sigma_rel": 0.28}),
    ("power", {"sigma_rel": 1e-9}),
    ("power", {"sigma_rel": 5e-324}),
]

uneven_steps = st.lists(st.integers(0, 10**7), min_size=1, max_size=30, unique=True).map(sorted)
even_steps = st.builds(
    lambda start, gap, n: [start + gap * i for i in range(n)],
    st.integers(0, 10**7),
    st.integers(1, 10**5),
    st.integers(1, 60),
)
variants = st.sampled_from(VARIANTS)


def printed(value: float, text: str) -> bool:
    return f"{value:.{len(text.split('.')[1])}f}" == (text if text[0] != "." else "0" + text)


@pytest.mark.parametrize(("method", "parameters", "vector", "ess", "age"), TABLE)
def test_published_table(method: str, parameters: dict[str, Any], vector: str, ess: str, age: str) -> None:
    coeffs = coefficients(method, EVEN, **parameters)
    assert [text for v, text in zip(coeffs.values, vector.split(), strict=True) if not printed(v, text)] == []
    assert printed(coeffs.effective_sample_size, ess)
    assert printed(coeffs.mean_age(), age)
    assert coeffs.mean_age(EVEN) == pytest.approx(coeffs.mean_age(), rel=1e-14)


@pytest.mark.parametrize(("alpha", "wrong_sum"), [(0.1, 0.651), (0.2, 0.893)])
def test_ema_is_equation_4_and_not_section_4_2(alpha: float, wrong_sum: float) -> None:
    n = 10
    section_4_2 = [alpha * (1 - alpha) ** (n - i) for i in range(1, n + 1)]
    assert round(math.fsum(section_4_2), 3) == wrong_sum
    values = coefficients("ema", EVEN, alpha=alpha).values
    assert math.fsum(values) == pytest.approx(1, abs=1e-15)
    assert values[0] == pytest.approx((1 - alpha) ** 9, rel=1e-14)
    assert values[1:] == pytest.approx(section_4_2[1:], rel=1e-14)


def test_defaults_are_those_that_the_method_states() -> None:
    for name, method in METHODS.items():
        assert method.name == name
        defaults = {key: p.default for key, p in method.parameters.items() if p.default is not None}
        if name != "weights":
            assert coefficients(name, EVEN) == coefficients(name, EVEN, **defaults)
    assert coefficients("ema", EVEN, half_life=None) == coefficients("ema", EVEN, alpha=0.2)


@given(variants, uneven_steps)
def test_sums_to_one(variant: tuple[str, dict[str, Any]], steps: list[int]) -> None:
    coeffs = coefficients(variant[0], steps, **variant[1])
    assert len(coeffs.values) == len(steps)
    assert abs(coeffs.total - 1) < 1e-12
    assert all(math.isfinite(value) and value >= 0 for value in coeffs.values)
    if coeffs.numerators is not None and coeffs.denominator is not None:
        assert sum(coeffs.numerators) == coeffs.denominator
        assert coeffs.values == tuple(n / coeffs.denominator for n in coeffs.numerators)


@given(variants, st.integers(0, 10**9))
def test_one_checkpoint_is_the_identity(variant: tuple[str, dict[str, Any]], step: int) -> None:
    assert coefficients(variant[0], [step], **variant[1]) == IDENTITY == Coefficients((1.0,), (1,), 1)
    assert coefficients("weights", [step], weights=[7.0], normalize=True) == IDENTITY
    assert IDENTITY.mean_age([step]) == 0


@given(even_steps)
def test_linear_decay_is_sma(steps: list[int]) -> None:
    linear = coefficients("decay", steps, shape="linear")
    assert linear == coefficients("sma", steps)
    almost = coefficients("decay", [float(step) for step in steps], shape="linear", floor=1e-300)
    assert almost.values == pytest.approx(linear.values, abs=1e-15)


@given(even_steps, st.sampled_from(list(DECAY_SHAPES)))
def test_decay_on_an_even_grid_is_the_difference_of_f(steps: list[int], shape: str) -> None:
    n, f = len(steps), DECAY_SHAPES[shape]
    w = [f(i / n) for i in range(n)] + [0.0]
    expected = [w[i] - w[i + 1] for i in range(n)]
    assert coefficients("decay", steps, shape=shape).values == pytest.approx(expected, abs=1e-15)


@given(uneven_steps, st.sampled_from(list(DECAY_SHAPES)), st.floats(0, 0.999))
def test_reverse_cumulative_sum_of_decay_is_its_profile(steps: list[int], shape: str, floor: float) -> None:
    coeffs = coefficients("decay", steps, shape=shape, floor=floor)
    w = list(accumulate(reversed(coeffs.values)))[::-1]
    n = len(steps)
    window = steps[-1] - steps[0] + (steps[-1] - steps[0]) / (n - 1) if n > 1 else 1
    t = [(step - steps[0]) / window for step in steps]
    assert w == pytest.approx([floor + (1 - floor) * DECAY_SHAPES[shape](x) for x in t], abs=1e-13)


def test_decay_shapes_start_at_one_and_never_rise() -> None:
    for f in DECAY_SHAPES.values():
        values = [f(i / 1000) for i in range(1000)]
        assert values[0] == 1 and values == sorted(values, reverse=True) and values[-1] >= 0
    assert coefficients("decay", EVEN, shape="inverse-sqrt").values[-1] == pytest.approx(1 / math.sqrt(9.1))


@given(uneven_steps, st.floats(0.01, 1), st.lists(st.floats(-1, 1), min_size=30, max_size=30))
def test_ema_vector_is_the_recurrence(steps: list[int], alpha: float, xs: list[float]) -> None:
    average = xs[0]
    for x in xs[1 : len(steps)]:
        average = alpha * x + (1 - alpha) * average
    values = coefficients("ema", steps, alpha=alpha).values
    assert math.fsum(c * x for c, x in zip(values, xs, strict=False)) == pytest.approx(average, abs=1e-13)


@given(uneven_steps, st.floats(0.1, 1e8), st.lists(st.floats(-1, 1), min_size=30, max_size=30))
def test_ema_half_life_follows_the_gaps(steps: list[int], half_life: float, xs: list[float]) -> None:
    average = xs[0]
    for i in range(1, len(steps)):
        alpha = 1 - 2 ** (-(steps[i] - steps[i - 1]) / half_life)
        average = alpha * xs[i] + (1 - alpha) * average
    values = coefficients("ema", steps, half_life=half_life).values
    assert math.fsum(c * x for c, x in zip(values, xs, strict=False)) == pytest.approx(average, abs=1e-12)


def test_a_half_life_of_one_interval_is_alpha_one_half() -> None:
    by_half_life = coefficients("ema", EVEN, half_life=1000).values
    assert by_half_life == pytest.approx(coefficients("ema", EVEN, alpha=0.5).values, rel=1e-14)


def test_published_gammas() -> None:
    assert [round(gamma_of(s), 2) for s in (0.05, 0.10, 0.15, 0.20)] == [16.97, 6.94, 3.56, 1.83]


@given(st.floats(1e-12, 1 / math.sqrt(12), exclude_max=True))
def test_gamma_inverts_the_relative_width_and_solves_the_cubic(s: float) -> None:
    g = gamma_of(s)
    assert g >= 0
    assert relative_width(g) == pytest.approx(s, rel=1e-14)
    terms = [g**3, 7 * g**2, 16 * g, -g / s**2, 12.0, -1 / s**2]
    assert abs(math.fsum(terms)) <= 1e-12 * math.fsum(map(abs, terms))


@given(even_steps.filter(lambda steps: len(steps) == 1 or steps[0] >= steps[1] - steps[0]))
def test_power_with_a_flat_profile_is_sma(steps: list[int]) -> None:
    flat = coefficients("power", steps, sigma_rel=relative_width(0.0)).values
    assert flat == pytest.approx(coefficients("sma", steps).values, rel=1e-9)


def test_power_with_a_vanishing_width_is_the_newest() -> None:
    assert coefficients("power", EVEN, sigma_rel=5e-324).values == (0.0,) * 9 + (1.0,)


@given(uneven_steps.filter(lambda steps: len(steps) > 1), st.sampled_from([0.05, 0.1, 0.2]))
def test_power_weights_are_the_cells_of_the_profile(steps: list[int], s: float) -> None:
    exact = [Fraction(step) for step in steps]
    inner = [(a + b) / 2 for a, b in pairwise(exact)]
    edges = [max(Fraction(0), 2 * exact[0] - inner[0]), *inner, 2 * exact[-1] - inner[-1]]
    powers = [float(edge / edges[-1]) ** (gamma_of(s) + 1) for edge in edges]
    cells = [b - a for a, b in pairwise(powers)]
    expected = [cell / math.fsum(cells) for cell in cells]
    assert coefficients("power", steps, sigma_rel=s).values == pytest.approx(expected, rel=1e-6, abs=1e-9)


@given(st.integers(1, 6), st.integers(1, 6))
def test_sma_of_equal_sized_smas_is_sma_of_all(groups: int, size: int) -> None:
    def exact(n: int) -> list[Fraction]:
        coeffs = coefficients("sma", range(n))
        assert coeffs.numerators is not None and coeffs.denominator is not None
        return [Fraction(x, coeffs.denominator) for x in coeffs.numerators]

    assert [outer * inner for outer in exact(groups) for inner in exact(size)] == exact(groups * size)


def test_explicit_weights_are_used_as_given() -> None:
    thirds = coefficients("weights", [3, 1, 2], weights=[0.333333] * 3)
    assert thirds.values == (0.333333,) * 3
    assert thirds.total == 0.999999
    assert any("0.999999" in line for line in warnings_for(thirds))
    assert coefficients("weights", [1, 2], weights=(1.5, -0.5)).values == (1.5, -0.5)
    assert coefficients("weights", [1, 2], weights=[1, 3], normalize=True).values == (0.25, 0.75)


def test_explicit_weights_are_rational_as_their_decimals() -> None:
    def rational(weights: list[Any], normalize: bool = False) -> tuple[tuple[int, ...] | None, int | None]:
        found = coefficients("weights", range(len(weights)), weights=weights, normalize=normalize)
        return found.numerators, found.denominator

    assert rational([0.7, 0.3]) == ((7, 3), 10)
    assert rational([1, 1, 1], normalize=True) == ((1, 1, 1), 3)
    assert rational([0.2, 0.4], normalize=True) == ((1, 2), 3)
    assert rational([1.5, -0.5]) == ((3, -1), 2)
    assert rational([-1, -3], normalize=True) == ((1, 3), 4)
    assert rational([Fraction(1, 3), Fraction(2, 3)]) == ((1, 2), 3)
    assert rational([1e-05, 0.99999]) == ((1, 99999), 100000)
    assert rational([0.0, 1.0]) == ((0, 1), 1)
    assert rational([0.1234567890123456, 0.8765432109876544]) == (None, None)  # more digits than a sum has bits
    assert rational([5e-324, 1.0]) == (None, None)
    assert rational([1e300, 1.0], normalize=True) == (None, None)


@pytest.mark.parametrize(
    "weights",
    [
        [0.5],
        [0.5, 0.6],
        [0.5, math.nan],
        [math.inf, 0.5],
        ["a", 0.5],
        [True, 0.0],
        [1e308, 1e308],
        [-1.0, 1.0],
        [5e-324, 0.0],
    ],
)
@pytest.mark.parametrize("normalize", [False, True])
def test_explicit_weights_that_are_refused(weights: list[Any], normalize: bool) -> None:
    if normalize and weights in ([0.5, 0.6], [5e-324, 0.0]):
        values = coefficients("weights", [1, 2], weights=weights, normalize=True).values
        assert math.fsum(values) == pytest.approx(1, abs=1e-15)
        return
    with pytest.raises(UsageError):
        coefficients("weights", [1, 2], weights=weights, normalize=normalize)


@pytest.mark.parametrize(
    ("method", "parameters", "said"),
    [
        ("slerp", {}, "sma, wma, ema, decay, power, weights"),
        ("sma", {"alpha": 0.1}, "method sma does not take --alpha"),
        ("ema", {"alpha": 0.0}, "--alpha"),
        ("ema", {"alpha": 1.1}, "--alpha"),
        ("ema", {"alpha": math.nan}, "--alpha"),
        ("ema", {"alpha": "much"}, "--alpha"),
        ("ema", {"alpha": True}, "--alpha"),
        ("ema", {"half_life": 0.0}, "--half-life"),
        ("ema", {"half_life": -3}, "--half-life"),
        ("ema", {"half_life": 3.0, "alpha": 0.1}, "contradict"),
        ("decay", {"shape": "sqrt"}, "1-sqrt"),
        ("decay", {"floor": 1.0}, "--floor"),
        ("decay", {"floor": -0.1}, "--floor"),
        ("power", {"sigma_rel": 0.0}, "--sigma-rel"),
        ("power", {"sigma_rel": 0.3}, "0.2887"),
        ("weights", {}, "one weight per checkpoint"),
        ("weights", {"weights": "half,half"}, "--weights"),
        ("weights", {"weights": 0.5}, "0.2,0.3,0.5"),
    ],
)
@pytest.mark.parametrize("steps", [[500], [500, 1000]])
def test_wrong_parameters_are_named(method: str, parameters: dict[str, Any], said: str, steps: list[int]) -> None:
    with pytest.raises(UsageError) as error:
        coefficients(method, steps, **parameters)
    assert said in str(error.value)


@pytest.mark.parametrize("method", ["wma", "ema", "decay", "power"])
@pytest.mark.parametrize("steps", [[2, 1], [1, 1], [1, math.nan], [1, math.inf]])
def test_steps_must_increase_where_order_matters(method: str, steps: list[float]) -> None:
    with pytest.raises(UsageError):
        coefficients(method, steps)
    assert coefficients("sma", steps).values == (0.5, 0.5)


def test_no_checkpoint_and_negative_steps_are_refused() -> None:
    for method in METHODS:
        with pytest.raises(UsageError):
            coefficients(method, [])
    with pytest.raises(UsageError):
        coefficients("power", [-1, 1])


def test_which_methods_need_true_steps() -> None:
    assert [name for name in METHODS if needs_step_values(name)] == ["power"]
    assert needs_step_values("ema", half_life=5) and not needs_step_values("ema", half_life=None)
    assert [name for name, method in METHODS.items() if not method.needs_order] == ["sma", "weights"]


def test_decay_over_uneven_steps_weighs_the_checkpoint_before_a_gap() -> None:
    assert "before a large gap" in METHODS["decay"].formula
    values = coefficients("decay", [1, 2, 3, 10, 11]).values
    assert max(values) == values[2]


def test_warnings() -> None:
    late = [100_000 + step for step in EVEN]
    sma = coefficients("sma", late)
    assert warnings_for(sma, late) == []
    assert warnings_for(sma) == []
    assert warnings_for(IDENTITY, [5]) == []
    (age,) = warnings_for(sma, EVEN)
    assert "lags 4500 steps behind, 45 % of the steps so far" in age
    (jitter,) = warnings_for(coefficients("sma", range(3)), [10_000_000, 10_000_100, 10_000_225])
    assert "100 to 125 steps apart, mean 112.5" in jitter
    assert warnings_for(coefficients("sma", range(3)), [10_000_000, 10_000_090, 10_000_200]) == []
    assert "unevenly" in warnings_for(coefficients("sma", range(4)), [1_234_567, 1_234_667, 1_234_900, 1_235_000])[0]
    assert "2.00 effective" in warnings_for(coefficients("sma", range(2)))[0]
    assert warnings_for(coefficients("sma", range(3))) == []
    negative = coefficients("weights", range(4), weights=[0.5, 0.5, 0.5, -0.5])
    assert any("checkpoint 4 of 4: -0.5" in line for line in warnings_for(negative))
    assert warnings_for(coefficients("sma", range(3)), [-2, -1, 0]) == []


@pytest.mark.parametrize(("spacing", "share", "warned"), [(4, 0.088, 0), (8, 0.176, 0), (16, 0.353, 1), (32, 0.392, 1)])
def test_the_age_warning_separates_the_ablation_of_pma_at_204_billion_tokens(spacing: int, share: float, warned: int) -> None:
    """PMA, figure 5, N = 10 (6 at 32B): the spacings of 4B and 8B helped, those of 16B and 32B
    hurt.
    """
    steps = [204 - spacing * i for i in reversed(range(6 if spacing == 32 else 10))]
    sma = coefficients("sma", steps)
    assert sma.age_share(steps) == pytest.approx(share, abs=1e-3)
    assert len(warnings_for(sma, steps)) == warned
