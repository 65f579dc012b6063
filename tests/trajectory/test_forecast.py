"""The loss model against closed forms, and the forecast against real annealing runs of a pilot."""

import json
import math
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import numpy as np
import pytest
from paths import TESTS

from merge_cli.errors import UsageError
from merge_cli.request.methods import coefficients
from merge_cli.trajectory.analysis import Analysis, analyze_grams
from merge_cli.trajectory.findings import Finding
from merge_cli.trajectory.forecast import CONDITIONS, Forecast, forecast_rows
from merge_cli.trajectory.gram import Gram
from merge_cli.trajectory.groups import Group
from merge_cli.trajectory.ledger import Document, Part, Row, key_of
from merge_cli.trajectory.log import LogRow
from merge_cli.trajectory.model import Measured, fit_line, noise_of, pair_noise
from merge_cli.trajectory.records import decode, encode

CLOCK = count()
Loss = Callable[[Sequence[int], Sequence[float]], float]


def row(steps: Sequence[int | None], values: Sequence[float], loss: float, metric: str = "loss", **more: object) -> Row:
    parts = tuple(Part(f"ckpt_{step}", step, "v", value) for step, value in zip(steps, values, strict=True))
    key = key_of(parts, "keep", f"evaluate {more.get('annealed_from')}")
    name = f"step-{steps[0]}" if len(steps) == 1 else f"merge-of-{len(steps)}-at-{steps[-1]}"
    return Row(key, name, parts, "keep", "evaluate", {metric: loss}, time=float(next(CLOCK)), **more)  # type: ignore[arg-type]


def rows_of(
    loss: Loss, newest: int, spacing: int, *, singles: Sequence[int], merges: Sequence[tuple[int, int]] = ((8, 1), (8, 2))
) -> list[Row]:
    """The rows of a plan like `auto`: singles at these distances from the newest, merges (N,
    multiple of the spacing).
    """
    rows = [row([newest - d], [1.0], loss([newest - d], [1.0])) for d in singles]
    for n, multiple in merges:
        steps = [newest - multiple * spacing * i for i in reversed(range(n))]
        rows.append(row(steps, [1 / n] * n, loss(steps, [1 / n] * n)))
    return rows


def white(a: float, s: float, level: float = 2.0, newest: int = 10_000) -> Loss:
    """White noise between checkpoints and a straight path, exactly."""

    def loss(steps: Sequence[int], values: Sequence[float]) -> float:
        return level + a * sum(c * c for c in values) + s * sum(c * (newest - t) for c, t in zip(values, steps, strict=True))

    return loss


SINGLES = (900, 600, 300, 0)


def test_white_noise_and_drift_are_recovered_exactly() -> None:
    a, s, spacing = 0.13, 4e-5, 50
    found = forecast_rows(rows_of(white(a, s), 10_000, spacing, singles=SINGLES), steps=range(0, 10_001, spacing), anneal=1000)
    assert found.refusals == ()
    assert found.noises[0].a.value == pytest.approx(a) and found.slope.value == pytest.approx(s)
    assert found.now.value == pytest.approx(2.0) and found.now.step == 10_000
    assert found.now.low == pytest.approx(2.0 - 0.15 * a) and found.now.high == pytest.approx(2.0 + 0.15 * a)
    assert found.best_sma == pytest.approx(math.sqrt(a / (s * spacing / 2)))
    for choice in found.choices:
        places = [10_000 - round(i * choice.spacing) for i in reversed(range(choice.n))]
        values = coefficients(choice.method, places).values
        assert choice.gain == pytest.approx(white(a, s)([10_000], [1.0]) - white(a, s)(places, values))
    assert found.choice.method == "wma" and found.helps
    n_best = max((c for c in found.choices if c.method == "sma" and c.spacing == spacing), key=lambda c: c.gain).n
    assert found.best_sma is not None and abs(n_best - found.best_sma) <= 1
    wma = max((c for c in found.choices if c.method == "wma" and c.spacing == spacing), key=lambda c: c.gain)
    assert (
        found.best_wma is not None
        and abs(wma.n - found.best_wma) <= 1
        and wma.gain > (math.sqrt(a) - math.sqrt(s * spacing / 2)) ** 2
    )
    assert found.flat[0] < found.choice.n < found.flat[1]


@pytest.mark.parametrize(("spacing", "off"), [(10, 4), (40, 1), (160, 1)])
def test_optimal_n_of_autoregressive_noise_with_a_river_is_that_of_brute_force(spacing: int, off: int) -> None:
    """AR(1) modes of 8 curvatures that forget within a few dozen steps, and a steady descent; N*
    against all N.

    Checkpoints 10 steps apart are still correlated: N* is then too small, which costs next to
    nothing.
    """
    h = np.geomspace(3, 30, 8)
    rate, slope = 0.02, 2e-5
    rho = 1 - rate * h
    power = rate**2 * 0.25 / (1 - rho**2)

    def loss(steps: Sequence[int], values: Sequence[float]) -> float:
        lag = np.abs(np.subtract.outer(steps, steps))
        c = np.array(values)
        noise = sum(hh * p * (c @ r**lag @ c) for hh, p, r in zip(h, power, rho, strict=True)) / 2
        return float(2 + noise + slope * (c @ (100_000 - np.array(steps))))

    found = forecast_rows(rows_of(loss, 100_000, spacing, singles=SINGLES), steps=range(0, 100_001, spacing))
    brute = {n: loss([100_000 - spacing * i for i in reversed(range(n))], [1 / n] * n) for n in range(1, 41)}
    n_star = min(brute, key=lambda n: brute[n])
    assert 3 <= n_star < 40
    table = [choice for choice in found.choices if (choice.method, choice.spacing) == ("sma", spacing)]
    top = max(table, key=lambda choice: choice.gain)
    assert abs(top.n - n_star) <= off
    assert brute[top.n] - brute[n_star] < 0.01 * (brute[1] - brute[n_star])
    assert top.gain == pytest.approx(brute[1] - brute[n_star], rel=0.05)


def test_drift_only_has_no_noise_and_noise_only_takes_all() -> None:
    drift = forecast_rows(rows_of(white(0.0, 1e-4), 10_000, 50, singles=SINGLES), steps=range(0, 10_001, 50))
    assert [each.name for each in drift.refusals] in (["no noise"], ["noise not measured"])
    assert drift.now is None and drift.choices == () and drift.results
    noise = forecast_rows(rows_of(white(0.1, 0.0), 10_000, 50, singles=SINGLES), steps=range(9000, 10_001, 50))
    assert noise.best_sma is None and noise.choice.n == 21


def test_a_quadratic_loss_is_predicted_exactly_where_its_checkpoints_are_measured() -> None:
    """F1: L(merge) = sum c l - 1/2 sum c c Q; with the l_i measured, d is half the spread and no
    line enters.
    """
    rng = np.random.default_rng(2)
    root = rng.normal(size=(6, 6))
    hessian = root @ root.T
    points = {step: rng.normal(size=6) for step in range(9300, 10_001, 100)}

    def loss(steps: Sequence[int], values: Sequence[float]) -> float:
        x = sum(c * points[t] for c, t in zip(values, steps, strict=True))
        return float(1.0 + x @ hessian @ x / 2)

    singles = [Measured(str(t), (float(t),), (1.0,), loss([t], [1.0])) for t in points]
    steps = list(points)
    merge = Measured("m", tuple(map(float, steps)), tuple([1 / 8] * 8), loss(steps, [1 / 8] * 8))
    (noise,) = noise_of([merge], fit_line(singles[-4:]), singles)
    q = [[(points[i] - points[j]) @ hessian @ (points[i] - points[j]) for j in steps] for i in steps]
    assert noise.a.value * merge.removes == pytest.approx(np.sum(q) / 4 / 64)
    pair = Measured("p", (9300.0, 9400.0), (0.5, 0.5), loss([9300, 9400], [0.5, 0.5]))
    assert pair_noise(pair, singles[0], singles[1]) == pytest.approx(q[0][1] / 4)


def test_every_number_is_a_weighted_sum_of_rows() -> None:
    rows = rows_of(white(0.13, 4e-5), 10_000, 50, singles=SINGLES)
    found = forecast_rows(rows, anneal=500)
    losses = {each.key: each.metrics["loss"] for each in rows}
    quantities: list[Any] = [
        found.level,
        found.slope,
        found.noises[0].a,
        found.noises[1].a,
        found.now.quantity,
        found.ahead.quantity,
    ]
    for quantity in quantities:
        assert quantity.value == pytest.approx(sum(weight * losses[key] for key, weight in quantity.rows.items()))


PILOT = json.loads((TESTS / "data" / "pilot_26M.json").read_text())
LOSSES = {int(step): loss for step, loss in PILOT["checkpoints"].items()}


def pilot(newest: int, singles: Sequence[int], merges: Sequence[tuple[int, int]] = ((8, 28), (8, 56))) -> list[Row]:
    rows = [row([newest - d], [1.0], LOSSES[newest - d]) for d in singles]
    for n, spacing in merges:
        loss = next(m[4] for m in PILOT["merges"] if m[:4] == ["sma", n, spacing, newest])
        rows.append(row([newest - spacing * i for i in reversed(range(n))], [1 / n] * n, loss))
    return rows


@pytest.mark.parametrize(("start", "newest"), [(2240, 2800), (1680, 2240)])
def test_real_annealing_lies_in_the_band_and_gains_are_predicted(start: int, newest: int) -> None:
    real = PILOT["annealed"][f"{start}-{newest}"]
    found = forecast_rows(pilot(newest, (196, 140, 84, 0)), steps=[s for s in LOSSES if s <= newest])
    drop = found.level.value - real
    assert found.now.low < real < found.now.high
    assert abs(found.now.value - real) < 0.15 * drop
    measured = [(m, LOSSES[newest] - m[4]) for m in PILOT["merges"] if m[3] == newest]
    errors = []
    for (method, n, spacing, _, _), gained in measured:
        places = [newest - spacing * i for i in reversed(range(n))]
        one = Measured("", tuple(map(float, places)), coefficients(method, places).values, 0.0)
        errors.append(abs(found.noises[0].a.value * one.removes - found.slope.value * one.age - gained))
    assert len(errors) > 40 and sum(errors) / len(errors) < 0.006
    best = max(gained for _, gained in measured)
    assert found.choice.method == "wma" and found.choice.spacing == 28
    near = min((abs(m[1] - found.choice.n), gained) for m, gained in measured if m[0] == "wma" and m[2] == 28)
    assert best - near[1] < 0.05 * best  # the regret of the proposed merge, at the nearest N that was evaluated


def test_the_forecast_ahead_covers_the_real_annealing() -> None:
    found = forecast_rows(pilot(2240, range(0, 896, 28)), anneal=560)
    assert found.ahead.low < PILOT["annealed"]["2240-2800"] < found.ahead.high
    assert found.ahead.high - found.ahead.low > 2 * (found.now.high - found.now.low)


def test_a_real_annealing_in_the_ledger_calibrates() -> None:
    real = PILOT["annealed"]["2240-2800"]
    annealed = row([2800], [1.0], real, annealed_from=2240)
    found = forecast_rows([*pilot(2800, (280, 196, 84, 0)), annealed])
    assert found.calibration.drop_over_a == pytest.approx((found.level.value - real) / found.noises[0].a.value)
    assert found.calibration.value == pytest.approx(real)
    assert found.now.value == pytest.approx(forecast_rows(pilot(2800, (280, 196, 84, 0))).now.value)  # it enters nothing else


def names(found: Forecast) -> tuple[list[str], list[str]]:
    return [each.name for each in found.refusals], [each.name for each in found.warnings]


GOOD = white(0.13, 4e-5)


def analysis(*findings: Finding, log: Sequence[LogRow] = ()) -> Analysis:
    from dataclasses import replace

    steps = list(range(9000, 10_001, 100))
    gram = Gram((np.eye(11) + 1).tolist(), 10.0, 5)
    found = analyze_grams([f"c{s}" for s in steps], steps, coefficients("sma", steps), {Group(0, "MLP"): gram}, log=log)
    return replace(found, findings=findings) if not log else replace(found, findings=())


@pytest.mark.parametrize("name", ["decay", "warm-up", "stages", "restart", "ramp", "spike", "schedule", "learning rate"])
def test_a_window_that_touches_one_of_these_is_refused(name: str) -> None:
    rows = rows_of(GOOD, 10_000, 50, singles=SINGLES)
    assert names(forecast_rows(rows, analysis=analysis(Finding(name, "because", 9500, 9600))))[0] == [name]
    assert names(forecast_rows(rows, analysis=analysis(Finding(name, "because", 8000, 9000))))[0] == []


def test_other_refusals_and_warnings_by_name() -> None:
    rows = rows_of(GOOD, 10_000, 50, singles=SINGLES)
    assert names(forecast_rows(rows)) == ([], ["no analysis"])
    assert names(forecast_rows(rows, analysis=analysis(Finding("equal", "e", 9500, 9600)))) == ([], ["equal"])
    assert names(forecast_rows(rows[:4]))[0] == ["no merge"]
    assert names(forecast_rows(rows[3:]))[0] == ["too few checkpoints"]
    assert names(forecast_rows(rows[2:]))[1] == ["no analysis", "few checkpoints"]
    assert names(forecast_rows(rows[:5]))[1] == ["no analysis", "one spacing"]
    assert names(forecast_rows(rows, steps=[10_050]))[1] == ["no analysis", "newer checkpoints"]
    assert names(forecast_rows(rows, anneal=20_000))[1] == ["no analysis", "too far ahead"]
    assert names(forecast_rows(rows, anneal=500))[1] == ["no analysis", "short reach"]
    unknown = row([None, None], [0.5, 0.5], 2.0)
    assert names(forecast_rows([*rows, unknown]))[1] == ["unknown steps", "no analysis"]
    assert names(forecast_rows([unknown]))[0] == ["unknown steps"]
    lagging = rows_of(GOOD, 10_000, 50, singles=SINGLES, merges=((8, 1), (8, 16)))
    assert names(forecast_rows(lagging))[1] == ["age", "no analysis", "one spacing"]
    above = rows_of(white(-0.01, 4e-5), 10_000, 50, singles=SINGLES)
    assert names(forecast_rows(above))[0] == ["no noise"]
    steep = rows_of(white(0.13, 2e-4), 10_000, 50, singles=SINGLES)
    assert "early" in names(forecast_rows(steep))[1]


def test_steps_count_from_where_the_learning_rate_became_constant() -> None:
    rows = rows_of(GOOD, 10_000, 50, singles=SINGLES)
    log = [LogRow(step, 1e-3 if step < 9200 else 3e-4, None) for step in range(0, 10_001, 50)]
    found = forecast_rows(rows, analysis=analysis(log=log))
    assert "age" in names(found)[1] and len(found.noises) == 1  # the merge at 2V lags 350 of 800 steps


def test_a_benchmark_shows_measured_values_only() -> None:
    rows = [row([step], [1.0], value, "hellaswag.acc,none") for step, value in ((9900, 0.3), (10_000, 0.35))]
    found = forecast_rows(rows)
    assert names(found)[0] == ["benchmark"] and found.now is None and not found.lower_is_better
    assert [(each.name, each.value, each.gain) for each in found.results] == [
        ("step-10000", 0.35, 0.0),
        ("step-9900", 0.3, pytest.approx(-0.05)),
    ]
    numbers = [row([step], [1.0], value, "value") for step, value in ((9900, 2.0), (10_000, 1.9))]
    assert names(forecast_rows(numbers))[0] == ["benchmark"]
    assert names(forecast_rows(numbers, assume_loss=True))[0] == ["no merge"]
    with pytest.raises(UsageError, match="no row has the metric loss"):
        forecast_rows(numbers, metric="loss")
    with pytest.raises(UsageError, match="no rows"):
        forecast_rows([])


def test_the_band_spans_both_values_of_a_where_spacings_differ() -> None:
    def loss(steps: Sequence[int], values: Sequence[float]) -> float:
        lag = np.abs(np.subtract.outer(steps, steps))
        return float(2 + 0.13 * np.array(values) @ 0.99**lag @ np.array(values))

    found = forecast_rows(rows_of(loss, 10_000, 50, singles=SINGLES))
    (fine, wide) = (each.a.value for each in found.noises)
    assert fine < 0.85 * wide < 0.13 and "spacings differ" in names(found)[1]
    assert found.now.low == pytest.approx(2.13 - wide - 0.15 * fine)
    assert found.now.high == pytest.approx(2.13 - fine + 0.15 * fine)
    assert "merge below forecast" in names(found)[1]  # the merge at 2V: a from close checkpoints is too small


@pytest.mark.parametrize(("excess", "spacing"), [(0.10, 50), (0.30, 100)])
def test_an_a_that_agrees_at_two_spacings_is_one_number(excess: float, spacing: int) -> None:
    """What a is larger by at 2V decides between the spacings only where it differs."""
    exact = white(0.13, 3e-5)

    def loss(steps: Sequence[int], values: Sequence[float]) -> float:
        wide = len(steps) > 1 and steps[1] - steps[0] == 100
        return exact(steps, values) - (excess * 0.13 * (1 - sum(c * c for c in values)) if wide else 0.0)

    found = forecast_rows(rows_of(loss, 10_000, 50, singles=SINGLES))
    assert found.noises[1].a.value == pytest.approx((1 + excess) * 0.13)
    assert found.choice is not None and found.choice.spacing == spacing
    assert ("spacings differ" in names(found)[1]) == (excess > 0.15)


def test_each_spacing_is_judged_by_its_own_noise() -> None:
    """Noise that is correlated over a hundred steps: at one spacing for all, close checkpoints
    would look as good as far ones.
    """

    def loss(steps: Sequence[int], values: Sequence[float]) -> float:
        lag = np.abs(np.subtract.outer(steps, steps))
        c = np.array(values)
        return float(2 + 0.13 * c @ 0.99**lag @ c + 2e-6 * (c @ (10_000 - np.array(steps))))

    found = forecast_rows(rows_of(loss, 10_000, 50, singles=SINGLES), steps=range(0, 10_001, 50))
    assert found.choice.spacing >= 100
    places = [10_000 - round(found.choice.spacing * i) for i in reversed(range(found.choice.n))]
    gained = loss([10_000], [1.0]) - loss(places, coefficients(found.choice.method, places).values)
    fine = [10_000 - 50 * i for i in reversed(range(found.choice.n))]
    assert gained > loss([10_000], [1.0]) - loss(fine, coefficients(found.choice.method, fine).values)


def test_noise_below_two_standard_errors_gives_no_forecast() -> None:
    rows = rows_of(white(0.001, 4e-5), 10_000, 50, singles=SINGLES)
    jitter = [each.metrics["loss"] + 0.01 * (-1) ** i for i, each in enumerate(rows[:4])]
    rows[:4] = [row([each.parts[0].step], [1.0], loss) for each, loss in zip(rows[:4], jitter, strict=True)]
    found = forecast_rows(rows)
    assert names(found)[0] in (["noise not measured"], ["no noise"]) and found.now is None


def test_sampling_of_the_text_enters_the_band_paired() -> None:
    rng = np.random.default_rng(0)
    hard = rng.normal(size=50) * 3
    rows = []
    for each in rows_of(GOOD, 10_000, 50, singles=SINGLES):
        nats = 10 * (each.metrics["loss"] + hard - hard.mean() + 0.01 * rng.normal(size=50))
        documents = tuple(Document(float(x), 10, 40) for x in nats)
        loss = math.fsum(x.nats for x in documents) / 500
        rows.append(Row(**{**each.__dict__, "metrics": {"loss": loss}, "documents": documents}))
    found = forecast_rows(rows)
    difference, level = found.noises[0].a.sampling, found.level.sampling
    assert difference is not None and level is not None and difference < 0.01 < level  # hard documents cancel in a difference
    assert found.now.quantity.sampling_source == "paired by document"


def test_a_forecast_survives_json_and_names_its_conditions() -> None:
    found = forecast_rows(rows_of(GOOD, 10_000, 50, singles=SINGLES), steps=range(9000, 10_001, 50), anneal=500)
    text = json.dumps(encode(found), allow_nan=False)
    assert decode(Forecast, json.loads(text), "forecast") == found
    assert found.conditions == CONDITIONS and "equivalent" not in text
