"""From the steps of checkpoints to the coefficients of their average: every method is one vector.

`out = sum_i c_i x_i`, always oldest to newest: `c_0` belongs to the oldest checkpoint, `c_{N-1}` to the
newest. A method is a pure function from the steps and a few parameters to the c_i, so a new method is one
function and one entry in `METHODS`. Sources: PMA = arXiv 2505.12082, WSM = arXiv 2507.17634, post-hoc EMA =
arXiv 2312.02696.

Rational methods also give integer numerators and one denominator: dividing the integer-weighted sum once
keeps exact ties exact, which multiplying by a rounded 1/3 does not. All other values are float64 and sum to 1
within 1e-12; only explicit weights may be as far off as 1e-6, and are then used as they are (`warnings_for`
states their sum).

Nothing here says that an average is any good: `warnings_for` names what is known to hurt, the rest takes an
evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from numbers import Real
from typing import Any

from merge_cli.errors import UsageError, first_ten

SUM_TOLERANCE = 1e-6  # how far the sum of explicit weights may be from 1: six typed digits
AGE_HELPS, AGE_HURTS = 0.15, 0.25  # of `age_share`: below the one every merge of the pilots helped, above the other each hurt


@dataclass(frozen=True)
class Coefficients:
    """The weights of one average, oldest to newest; rational ones also as exact numerators / denominator."""

    values: tuple[float, ...]
    numerators: tuple[int, ...] | None = None
    denominator: int | None = None

    @property
    def total(self) -> float:
        """The sum of the coefficients, correctly rounded: 1 but for explicit weights."""
        return math.fsum(self.values)

    @property
    def effective_sample_size(self) -> float:
        """`1 / sum c^2`: how many equally weighted checkpoints would average away as much noise."""
        return 1.0 / math.fsum(value * value for value in self.values)

    def mean_age(self, steps: Sequence[float] | None = None) -> float:
        """`sum c_i (N-1-i)`: how far the average lags behind the newest checkpoint, in intervals.

        With `steps`, which may be uneven: `sum c_i (T_{N-1} - T_i)` in mean intervals.
        """
        n = len(self.values)
        if n == 1:
            return 0.0
        if steps is None:
            return math.fsum(value * (n - 1 - i) for i, value in enumerate(self.values))
        return self.lag(steps) / ((steps[-1] - steps[0]) / (n - 1))

    def lag(self, steps: Sequence[float]) -> float:
        """`sum c_i (T_{N-1} - T_i)`: the mean age in the unit of `steps`."""
        return math.fsum(value * (steps[-1] - step) for value, step in zip(self.values, steps, strict=True))

    def age_share(self, steps: Sequence[float]) -> float | None:
        """The mean age over the steps so far, T_{N-1}; None unless those are above 0.

        At a constant learning rate this alone separates merges that help from merges that hurt: the loss falls as a power of
        the steps, so a merge that lags by this share of the run has lost a fixed share of the progress.
        """
        return self.lag(steps) / steps[-1] if steps[-1] > 0 else None


IDENTITY = Coefficients((1.0,), (1,), 1)  # of a single checkpoint, whatever the method


@dataclass(frozen=True)
class Parameter:
    """What a method can be told: default (None: unset), kind (float, str, bool or tuple), a line of help."""

    default: float | str | bool | None
    kind: type
    help: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Method:
    """One averaging method. `needs_steps`: order matters, so the checkpoints need steps or an order given."""

    name: str
    summary: str
    formula: str
    source: str
    needs_steps: bool
    function: Callable[..., Coefficients]
    parameters: dict[str, Parameter] = field(default_factory=dict)


def coefficients(method: str, steps: Sequence[float], **parameters: Any) -> Coefficients:
    """The coefficients of averaging checkpoints at `steps`, oldest to newest, by a method of `METHODS`.

    `steps` may be in any unit (optimizer steps, tokens) and may be mere positions, unless
    `needs_step_numbers`. A parameter that is None counts as not given. One checkpoint gives (1.0,), whatever
    the method.

    Raises UsageError: unknown method or parameter, value out of range, no checkpoint, steps not increasing.
    """
    chosen = METHODS.get(method)
    if chosen is None:
        raise UsageError(
            f"unknown method `{method}`",
            details=[f"expected  {', '.join(METHODS)}"],
            hint="choose one: --method sma",
        )
    given = {name: value for name, value in parameters.items() if value is not None}
    for name, value in given.items():
        _check_kind(chosen, name, value)
    if len(steps) == 0:
        raise UsageError("no checkpoint to average", hint="pmerge average RUN_FOLDER")
    if chosen.needs_steps:
        _check_increasing(chosen.name, steps)
    return chosen.function(tuple(steps), **given)


def needs_step_numbers(method: str, **parameters: Any) -> bool:
    """Whether positions 0..N-1 in place of true steps would be wrong: a parameter is measured in steps."""
    return method == "power" or (method == "ema" and parameters.get("half_life") is not None)


def sma(steps: Sequence[float]) -> Coefficients:
    """Simple average, `c_i = 1/N` (PMA Eq. 3)."""
    return _rational([1] * len(steps))


def wma(steps: Sequence[float]) -> Coefficients:
    """Linearly weighted average, `c_i = (i+1) / (N(N+1)/2)`: the newest weighs most (PMA Eq. 5)."""
    return _rational(range(1, len(steps) + 1))


def ema(steps: Sequence[float], alpha: float | None = None, half_life: float | None = None) -> Coefficients:
    """Exponential moving average `M <- a x_i + (1-a) M`, started at the oldest checkpoint (PMA Eq. 4).

    Closed form for one a: `c_0 = (1-a)^(N-1)`, `c_i = a (1-a)^(N-1-i)`. It sums to 1; the weights printed in
    section 4.2 of the paper, `a (1-a)^(N-i)` for every i, do not. With `alpha` (default 0.2) one a per
    checkpoint, whatever the spacing; with `half_life`, in the unit of `steps`, `a_i = 1 - 2^(-(T_i - T_{i-1})
    / half_life)`.

    Raises UsageError unless 0 < alpha <= 1 and 0 < half_life, or if both are given.
    """
    if alpha is not None and half_life is not None:
        raise UsageError("--alpha and --half-life contradict each other", hint="give one of them")
    if half_life is not None and half_life <= 0:
        raise _out_of_range("half_life", half_life, "a number of steps above 0")
    alpha = 0.2 if alpha is None else alpha
    if not 0 < alpha <= 1:
        raise _out_of_range("alpha", alpha, "a number above 0 and at most 1")
    values, kept = [], 1.0  # newest first; kept: what the later checkpoints leave of the earlier ones
    for older, newer in reversed(list(pairwise(steps))):
        if half_life is None:
            new_share, old_share = alpha, 1.0 - alpha
        else:
            half_lives = (newer - older) / half_life
            new_share, old_share = -math.expm1(-half_lives * math.log(2)), math.exp2(-half_lives)
        values.append(kept * new_share)
        kept *= old_share
    return _inexact([kept, *reversed(values)])


DECAY_SHAPES: dict[str, Callable[[float], float]] = {  # f(t), 0 <= t < 1, f(0) = 1, never rising
    "linear": lambda t: 1.0 - t,
    "1-sqrt": lambda t: 1.0 - math.sqrt(t),
    "cosine": lambda t: (1.0 + math.cos(math.pi * t)) / 2.0,
    "exponential": lambda t: 0.1**t,
    "inverse-sqrt": lambda t: 1.0 / math.sqrt(1.0 + 9.0 * t),
}


def decay(steps: Sequence[float], shape: str = "1-sqrt", floor: float = 0.0) -> Coefficients:
    """Average as if the learning rate had decayed by `shape` to the share `floor` over the window (WSM).

    `w_i = floor + (1-floor) f(t_i)`, `c_i = w_i - w_{i+1}`, `c_{N-1} = w_{N-1}`: `w` is the reverse
    cumulative sum of `c`. `t_i = (T_i - T_0) / (T_{N-1} - T_0 + mean gap)`, which is i/N for even spacing;
    linear without a floor is then sma and returned as such, exactly. Otherwise float64, none negative.

    Raises UsageError: unknown shape, floor outside 0 <= floor < 1.
    """
    if shape not in DECAY_SHAPES:
        raise _out_of_range("shape", shape, "one of " + ", ".join(DECAY_SHAPES))
    if not 0 <= floor < 1:
        raise _out_of_range("floor", floor, "a share of at least 0 and below 1")
    if len(steps) == 1:
        return IDENTITY
    gaps = {newer - older for older, newer in pairwise(steps)}
    if shape == "linear" and floor == 0 and len(gaps) == 1:
        return sma(steps)
    span = steps[-1] - steps[0]
    window = span + span / (len(steps) - 1)
    profile = [DECAY_SHAPES[shape]((step - steps[0]) / window) for step in steps]
    values = [(1.0 - floor) * (here - after) for here, after in pairwise([*profile, 0.0])]
    return _inexact([*values[:-1], values[-1] + floor])


def relative_width(gamma: float) -> float:
    """sigma_rel of the profile `t^g` on [0, T], a share of T: `sqrt((g+1) / (g+3)) / (g+2)` (2312.02696)."""
    return math.sqrt((gamma + 1.0) / (gamma + 3.0)) / (gamma + 2.0)


def gamma_of(width: float) -> float:
    """The gamma >= 0 of a relative width s: the largest root of `g^3 + 7g^2 + (16 - s^-2) g + (12 - s^-2)`.

    Bisection on the width itself, which falls for g >= 0: no overflow, no choice of root, full precision.

    Raises UsageError unless 0 < width <= 1/sqrt(12), the width of the flat profile.
    """
    if not 0 < width <= relative_width(0.0):
        raise _out_of_range("sigma_rel", width, f"a number above 0 and at most {relative_width(0.0):.4f} (a flat profile)")
    low, high = 0.0, min(1.0 / width, 1e308)  # relative_width(g) < 1 / (g + 2): the root is below 1/width
    while low < (middle := low + (high - low) / 2) < high:
        low, high = (middle, high) if relative_width(middle) >= width else (low, middle)
    return low


def power(steps: Sequence[float], sigma_rel: float = 0.1) -> Coefficients:
    """Power-function EMA: weigh training time t by `t^g`, of relative width `sigma_rel` (2312.02696).

    Each checkpoint stands for the time between the midpoints a_i, b_i to its neighbours, so c_i is in
    proportion to `b_i^(g+1) - a_i^(g+1)`. The first and the last cell reach as far outwards as inwards (not
    below 0). So a flat profile with even spacing is sma, and the time before the window is left out rather
    than heaped onto the oldest checkpoint, which would mostly undo averaging; the price is that the average
    is narrower than `sigma_rel` of the run when the window is.

    `steps` counts from the start of training.

    Raises UsageError: a step below 0, sigma_rel outside 0 < s <= 1/sqrt(12).
    """
    exponent = gamma_of(sigma_rel) + 1.0
    if steps[0] < 0:
        raise UsageError(f"power needs steps counted from the start of training, found step {steps[0]:.10g}")
    if len(steps) == 1:
        return IDENTITY
    inner = [older + (newer - older) / 2 for older, newer in pairwise(steps)]
    edges = [max(0.0, 2 * steps[0] - inner[0]), *inner, 2 * steps[-1] - inner[-1]]
    masses = []  # relative to the last edge; by log1p and expm1, so that narrow cells keep their digits
    for low, high in pairwise(edges):
        share = -math.expm1(exponent * math.log1p((low - high) / high)) if low > 0 else 1.0
        masses.append(share * math.exp(exponent * math.log(high / edges[-1])))
    total = math.fsum(masses)
    return _inexact([mass / total for mass in masses])


def explicit(steps: Sequence[float], weights: Sequence[float] = (), normalize: bool = False) -> Coefficients:
    """The `weights` as given, one per checkpoint; `normalize` divides them by their sum.

    Without it they must sum to 1 within 1e-6 and are not touched: what was typed is what is used. Negative
    ones are allowed.

    Raises UsageError: not one weight per checkpoint, NaN or Inf, a sum that is not 1 (or 0 to normalize).
    """
    if len(weights) != len(steps):
        raise UsageError(
            "--weights needs one weight per checkpoint",
            details=[f"found     {len(weights)} weights", f"expected  {len(steps)}, one per checkpoint"],
            hint="pmerge average ckpt_1 ckpt_2 --weights 0.4,0.6",
        )
    for position, weight in enumerate(weights):
        if not _is_finite_number(weight):
            raise _out_of_range(f"weights, number {position + 1}", weight, "a finite number")
    try:
        total = math.fsum(weights)
    except OverflowError:
        total = math.inf
    if normalize and (not math.isfinite(total) or total == 0 or not math.isfinite(max(map(abs, weights)) / total)):
        raise UsageError(f"--weights sum to {total!r}, which cannot be normalized")
    if not normalize and not abs(total - 1.0) <= SUM_TOLERANCE * (1 + 1e-9):  # 0.333333 three times passes
        raise UsageError(
            "--weights must sum to 1",
            details=[f"found     {total!r}", f"expected  1 within {SUM_TOLERANCE:g}"],
            hint="correct them, or divide them by their sum with --normalize",
        )
    return _inexact([weight / total if normalize else float(weight) for weight in weights])


METHODS: dict[str, Method] = {
    "sma": Method(
        name="sma",
        summary="simple average: all checkpoints weigh the same",
        formula="c_i = 1/N",
        source="PMA, arXiv 2505.12082, Eq. 3",
        needs_steps=False,
        function=sma,
    ),
    "wma": Method(
        name="wma",
        summary="weights rise linearly: the newest checkpoint weighs most",
        formula="c_i = (i+1) / (N(N+1)/2)",
        source="PMA, arXiv 2505.12082, Eq. 5",
        needs_steps=True,
        function=wma,
    ),
    "ema": Method(
        name="ema",
        summary="exponential moving average over the checkpoints, started at the oldest",
        formula="c_0 = (1-a)^(N-1), c_i = a (1-a)^(N-1-i)",
        source="PMA, arXiv 2505.12082, Eq. 4",
        needs_steps=True,
        function=ema,
        parameters={
            "alpha": Parameter(0.2, float, "share of each newer checkpoint, 0 < alpha <= 1"),
            "half_life": Parameter(None, float, "instead of alpha: steps after which a weight has halved"),
        },
    ),
    "decay": Method(
        name="decay",
        summary="as if the learning rate had decayed over the window",
        formula="w_i = floor + (1-floor) f(t_i), c_i = w_i - w_{i+1}, c_{N-1} = w_{N-1}; t_i = i/N, or if unevenly spaced "
        "(T_i-T_0)/(T_{N-1}-T_0+mean gap), so that a checkpoint before a large gap weighs much",
        source="WSM, arXiv 2507.17634",
        needs_steps=True,
        function=decay,
        parameters={
            "shape": Parameter("1-sqrt", str, "the shape f of the decay", choices=tuple(DECAY_SHAPES)),
            "floor": Parameter(0.0, float, "share of the learning rate that remains, 0 <= floor < 1"),
        },
    ),
    "power": Method(
        name="power",
        summary="power-function EMA: training time t weighs t^g, so the width grows with the run",
        formula="c_i ~ b_i^(g+1) - a_i^(g+1), a_i and b_i the midpoints to the neighbours",
        source="post-hoc EMA, arXiv 2312.02696",
        needs_steps=True,
        function=power,
        parameters={"sigma_rel": Parameter(0.1, float, "width of t^g relative to the run, 0 < s <= 0.2886")},
    ),
    "weights": Method(
        name="weights",
        summary="explicit weights, one per checkpoint in the order given",
        formula="c_i as given, sum c_i = 1",
        source="you",
        needs_steps=False,
        function=explicit,
        parameters={
            "weights": Parameter(None, tuple, "one number per checkpoint"),
            "normalize": Parameter(False, bool, "divide the weights by their sum"),
        },
    ),
}


def warnings_for(coeffs: Coefficients, steps: Sequence[float] | None = None) -> list[str]:
    """A line for each thing about an average that is known to hurt; window and spacing need true `steps`."""
    lines = []
    n = len(coeffs.values)
    if abs(coeffs.total - 1.0) > 1e-12:
        lines.append(f"the coefficients sum to {coeffs.total!r}, not 1, and are used as given")
    negative = [f"checkpoint {i + 1} of {n}: {value:g}" for i, value in enumerate(coeffs.values) if value < 0]
    if negative:
        lines.append("negative coefficients: " + "; ".join(first_ten(negative)))
    if n > 1 and coeffs.effective_sample_size < 3 - 1e-9:
        lines.append(f"only {coeffs.effective_sample_size:.2f} effective checkpoints: little noise is averaged away")
    if n == 1 or steps is None:
        return lines
    share = coeffs.age_share(steps)
    if share is not None and share > AGE_HURTS:
        lines.append(
            f"the average lags {coeffs.lag(steps):.10g} steps behind, {100 * share:.0f} % of the steps so far:"
            f" above {100 * AGE_HURTS:.0f} % merges hurt, below {100 * AGE_HELPS:.0f} % they helped"
        )
    span = steps[-1] - steps[0]
    gaps = [newer - older for older, newer in pairwise(steps)]
    mean_gap = span / (n - 1)
    jitter = max(abs(gap - mean_gap) for gap in gaps)
    if jitter > 0.1 * abs(mean_gap) * (1 + 1e-9):
        lines.append(f"the checkpoints are unevenly spaced: {min(gaps):.10g} to {max(gaps):.10g} steps apart, mean {mean_gap:.10g}")
    return lines


def _rational(numerators: Sequence[int]) -> Coefficients:
    denominator = sum(numerators)
    return Coefficients(tuple(n / denominator for n in numerators), tuple(numerators), denominator)


def _inexact(values: Sequence[float]) -> Coefficients:
    return Coefficients(tuple(values)) if len(values) > 1 else IDENTITY


def _is_finite_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _out_of_range(name: str, found: object, expected: str) -> UsageError:
    return UsageError(
        f"{_option(name)} is out of range",
        details=[f"found     {found}", f"expected  {expected}"],
        hint="pmerge average --help lists the methods and their parameters",
    )


def _check_kind(method: Method, name: str, value: object) -> None:
    parameter = method.parameters.get(name)
    if parameter is None:
        raise UsageError(
            f"method {method.name} does not take {_option(name)}",
            details=[f"expected  {', '.join(map(_option, method.parameters)) or 'no parameters'}"],
            hint="leave it out, or choose the method that has it: "
            + (", ".join(m.name for m in METHODS.values() if name in m.parameters) or "none does"),
        )
    accepted = {
        float: _is_finite_number(value),
        tuple: isinstance(value, Sequence) and not isinstance(value, str | bytes),
    }
    if not accepted.get(parameter.kind, isinstance(value, parameter.kind)):
        expected = {float: "a finite number", str: "a word", bool: "yes or no", tuple: "a list of numbers"}
        raise _out_of_range(name, value, expected[parameter.kind])


def _check_increasing(method: str, steps: Sequence[float]) -> None:
    for step in steps:
        if not _is_finite_number(step):
            raise UsageError(f"a step is no finite number: {step}")
    wrong = [f"{older:.10g} is followed by {newer:.10g}" for older, newer in pairwise(steps) if not newer > older]
    if wrong:
        raise UsageError(
            f"method {method} needs checkpoints from oldest to newest, each with its own step",
            details=first_ten(wrong),
            hint="let pmerge sort them: --order step",
        )
