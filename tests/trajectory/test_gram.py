"""Statistics of a Gram matrix against numpy on the weights themselves, and against closed forms."""

import json

import numpy as np
import pytest

from merge_cli.errors import InputError, UsageError
from merge_cli.request.methods import coefficients
from merge_cli.trajectory.analysis import Analysis, analyze_grams
from merge_cli.trajectory.findings import STOPS_FORECAST
from merge_cli.trajectory.gram import Gram, geometry, total
from merge_cli.trajectory.groups import Group
from merge_cli.trajectory.log import LogRow
from merge_cli.trajectory.records import decode, encode

STEPS = [1000 * i for i in range(101, 109)]


def gram_of(weights: np.ndarray) -> Gram:
    """The Gram matrix of rows, oldest to newest."""
    deviations = weights - weights[-1]
    return Gram((deviations @ deviations.T).tolist(), float(weights[-1] @ weights[-1]), weights.shape[1])


def ou(n: int, retention: float, variance: float, drift: float) -> Gram:
    """The expected Gram matrix of an isotropic Ornstein-Uhlenbeck process with a drift of squared
    length `drift` an interval.
    """
    last = n - 1
    products = [
        [
            variance * (retention ** abs(i - j) - retention ** (last - i) - retention ** (last - j) + 1)
            + drift * (last - i) * (last - j)
            for j in range(n)
        ]
        for i in range(n)
    ]
    return Gram(products, 100.0, 10**6)


@pytest.fixture
def weights() -> np.ndarray:
    return np.random.default_rng(3).normal(size=(8, 1000)).cumsum(axis=0) * 0.1 + 5


def test_geometry_is_that_of_the_weights(weights: np.ndarray) -> None:
    gram, shape = gram_of(weights), geometry(gram_of(weights), STEPS)
    moves = np.diff(weights, axis=0)
    assert np.allclose(shape.distances, np.linalg.norm(weights[:, None] - weights[None], axis=2))
    assert np.allclose(shape.increments, np.linalg.norm(moves, axis=1))
    unit = moves / np.linalg.norm(moves, axis=1, keepdims=True)
    assert np.allclose(shape.cosines, unit @ unit.T)
    assert shape.cos1 == pytest.approx(np.mean(np.sum(unit[1:] * unit[:-1], axis=1)))
    assert shape.straightness == pytest.approx(np.sum((weights[-1] - weights[0]) ** 2) / np.sum(moves**2))
    assert shape.shrink == pytest.approx(np.linalg.norm(moves[-1]) / np.linalg.norm(moves[0]))
    assert [point.lag for point in shape.variogram] == [1000.0 * k for k in range(1, 8)]
    assert shape.variogram[1].gamma == pytest.approx(np.mean([np.sum((weights[i] - weights[i + 2]) ** 2) / 2 for i in range(6)]))
    values = coefficients("wma", STEPS).values
    merge = np.array(values) @ weights
    assert gram.spread2(values) == pytest.approx(np.array(values) @ np.sum((weights - merge) ** 2, axis=1))
    assert gram.merge_to_newest2(values) == pytest.approx(np.sum((merge - weights[-1]) ** 2))


def test_the_total_is_that_of_all_weights_whatever_the_order(weights: np.ndarray) -> None:
    parts = [gram_of(weights[:, a : a + 100]) for a in range(0, 1000, 100)]
    whole, turned = total(parts), total(reversed(parts))
    assert whole.products == turned.products and whole.norm2 == turned.norm2
    assert np.allclose(whole.products, gram_of(weights).products)
    assert whole.num_elements == 1000


@pytest.mark.parametrize(
    ("r", "variance", "drift"), [(0.0, 4.0, 0.0), (0.5, 4.0, 0.0), (0.9, 4.0, 0.0), (0.3, 4.0, 0.5), (0.9, 1.0, 5.0)]
)
def test_ornstein_uhlenbeck_with_drift_has_the_closed_forms(r: float, variance: float, drift: float) -> None:
    n = 16
    gram = ou(n, r, variance, drift)
    shape = geometry(gram, list(range(n)))
    assert shape.cos1 == pytest.approx((drift - (1 - r) ** 2 * variance) / (drift + 2 * (1 - r) * variance))
    for point in shape.variogram:
        assert point.gamma == pytest.approx(variance * (1 - r**point.lag) + drift * point.lag**2 / 2)
    c = np.ones(n) / n
    lag = np.abs(np.arange(n)[:, None] - np.arange(n))
    between = 2 * variance * (1 - r**lag) + drift * lag**2
    assert gram.spread2(list(c)) == pytest.approx(c @ between @ c / 2)
    assert gram.merge_to_newest2(list(c)) == pytest.approx(c @ between[:, -1] - c @ between @ c / 2)


def test_a_simulated_walk_comes_within_half_a_percent() -> None:
    rng = np.random.default_rng(0)
    n, size, r, variance, drift = 16, 200_000, 0.3, 4.0, 0.5
    x = rng.normal(size=size) * np.sqrt(variance / size)
    d = rng.normal(size=size)
    d *= np.sqrt(drift) / np.linalg.norm(d)
    rows = []
    for i in range(n):
        rows.append(x + i * d)
        x = r * x + np.sqrt(1 - r * r) * rng.normal(size=size) * np.sqrt(variance / size)
    shape = geometry(gram_of(np.array(rows)), list(range(n)))
    expected = geometry(ou(n, r, variance, drift), list(range(n)))
    assert shape.variogram[0].gamma == pytest.approx(expected.variogram[0].gamma, rel=0.005)
    assert shape.cos1 == pytest.approx(expected.cos1, abs=0.005)


def test_a_straight_line_of_integers_is_exact_and_has_no_noise() -> None:
    weights = np.outer(np.arange(6), np.arange(1, 50)).astype(float)
    shape = geometry(gram_of(weights), list(range(6)))
    assert shape.straightness == 5.0 and shape.cos1 == pytest.approx(1.0, abs=1e-12) and shape.exponent == pytest.approx(2.0)
    found = analysis(gram_of(weights), n=6)
    assert [each.name for each in found.findings] == ["no noise"]


def test_uneven_steps_have_a_variogram_by_difference() -> None:
    weights = np.random.default_rng(1).normal(size=(4, 50))
    shape = geometry(gram_of(weights), [0, 10, 30, 70])
    assert [(point.lag, point.pairs) for point in shape.variogram] == [(10, 1), (20, 1), (30, 1), (40, 1), (60, 1), (70, 1)]


def analysis(gram: Gram, n: int = 8, *, first: int = 101, steps: bool = True, **options: object) -> Analysis:
    numbers = [1000 * (first + i) for i in range(n)]
    known = list(numbers) if steps else [None] * n
    chosen = coefficients("sma", numbers)
    return analyze_grams([f"ckpt_{s}" for s in numbers], known, chosen, {Group(0, "MLP"): gram}, **options)  # type: ignore[arg-type]


def test_the_verdict_follows_the_age_rule() -> None:
    gram = ou(8, 0.2, 4.0, 0.01)
    late = analysis(gram)
    assert late.verdict.value == "likely to help"
    assert "3500 / 108000 = 0.032" in late.verdict.formula
    early = analysis(gram, first=1)
    assert early.verdict.value == "may hurt" and early.verdict.age_share == pytest.approx(3500 / 8000)
    between = analysis(gram, first=10)
    assert between.verdict.value == "measure it" and 0.15 < (between.verdict.age_share or 0) < 0.25
    unknown = analysis(gram, steps=False)
    assert unknown.verdict.value == "measure it" and unknown.mean_age is None and "no steps are known" in unknown.verdict.reasons[0]


def test_steps_count_from_where_the_learning_rate_became_constant() -> None:
    log = [LogRow(step, 1e-3 if step < 90_000 else 2e-4, None) for step in range(0, 110_000, 500)]
    found = analysis(ou(8, 0.2, 4.0, 0.01), log=log)
    assert found.steps_so_far == 18_000 and found.verdict.value == "measure it"
    assert "(T_last - 90000)" in found.verdict.formula


def test_the_age_is_in_tokens_where_the_log_counts_them() -> None:
    log = [LogRow(step, 1e-3, step * 4.0) for step in range(0, 110_000, 500)]
    found = analysis(ou(8, 0.2, 4.0, 0.01), log=log)
    assert found.unit == "tokens" and found.mean_age == 14_000 and found.verdict.value == "likely to help"


def findings(*deviations: np.ndarray, kind: str = "MLP") -> list[str]:
    weights = np.array(deviations) + 3.0
    names = [f"ckpt_{i}" for i in range(len(weights))]
    steps = [1000 * (100 + i) for i in range(len(weights))]
    found = analyze_grams(names, steps, coefficients("sma", steps), {Group(0, kind): gram_of(weights)})
    assert all(each.name in STOPS_FORECAST for each in found.findings)
    return [each.name for each in found.findings]


def test_findings_by_name() -> None:
    rng = np.random.default_rng(5)
    noise = [rng.normal(size=4000) for _ in range(8)]
    assert findings(*noise) == []
    assert findings(*noise[:3], noise[2], *noise[3:]) == ["equal"]
    far = rng.normal(size=4000) * 6
    assert findings(*noise[:4], *(each + far for each in noise[4:])) == ["spike"]
    falling = np.cumsum([each * 0.9**i for i, each in enumerate(noise)], axis=0)
    assert findings(*falling) == ["learning rate"]
    line = np.outer(np.arange(8), rng.normal(size=4000))
    assert findings(*(one + 0.1 * other for one, other in zip(line, noise, strict=True)), kind="router bias") == [
        "no noise",
        "router bias",
    ]


def test_a_log_with_a_constant_rate_overrules_shrinking_increments() -> None:
    rng = np.random.default_rng(5)
    falling = np.cumsum([rng.normal(size=4000) * 0.9**i for i in range(8)], axis=0)
    log = [LogRow(step, 1e-3, None) for step in range(0, 110_000, 500)]
    assert [each.name for each in analysis(gram_of(falling)).findings] == ["learning rate"]
    assert analysis(gram_of(falling), log=log).findings == ()


def test_an_analysis_survives_json() -> None:
    found = analysis(ou(8, 0.2, 4.0, 0.01), log=[LogRow(0, 1e-3, None), LogRow(104_000, 2e-3, None), LogRow(108_000, 2e-3, None)])
    assert found.findings
    text = json.dumps(encode(found), allow_nan=False)
    assert decode(Analysis, json.loads(text), "analysis.json") == found


def test_a_broken_analysis_is_named_by_field() -> None:
    whole = encode(analysis(ou(8, 0.2, 4.0, 0.01)))
    whole["members"][2]["step"] = "many"
    with pytest.raises(InputError, match=r"analysis.json.members\[2\].step is 'many'"):
        decode(Analysis, whole, "analysis.json")
    del whole["members"]
    with pytest.raises(InputError, match="has no members"):
        decode(Analysis, whole, "analysis.json")


def test_one_checkpoint_is_too_few() -> None:
    with pytest.raises(UsageError, match="at least two"):
        analysis(ou(1, 0.2, 4.0, 0.01), n=1)
