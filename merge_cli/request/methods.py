"""Methods: from the steps of checkpoints to the coefficients of their average. Every method is one
vector.

`out = sum_i c_i x_i`, always oldest to newest: `c_0` belongs to the oldest checkpoint, `c_{N-1}` to
the newest. A method is a pure function from the steps and a few parameters to the c_i, so a new
method is one function and one entry in `METHODS`. Sources: PMA = arXiv 2505.12082, WSM = arXiv
2507.17634, post-hoc EMA = arXiv 2312.02696.

Rational methods also give integer numerators and one denominator: dividing the integer-weighted sum
once keeps exact ties exact, which multiplying by a rounded 1/3 does not. Explicit weights are
rational too, as decimals, unless they have very many digits. All other values are float64 and sum
to 1 within 1e-12; only explicit weights may be as far off as 1e-6, and are then used as they are
(`warnings_for` states their sum).

No method guarantees a better model: `warnings_for` lists the known reasons why an average hurts,
and only an evaluation decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from numbers import Rational, Real
from typing import Any

from merge_cli.errors import UsageError, first_ten
from merge_cli.request.coefficients import IDENTITY, Coefficients
from merge_cli.request.option import Option, not_a_choice

MOST_NUMERATORS = 1 << 37
"""Of explicit weights, all together: more than this, times any float, is no exact sum in float64
(see `planning/sums.py`).
"""
SUM_TOLERANCE = 1e-6  # how far the sum of explicit weights may be from 1: six typed digits


@dataclass(frozen=True)
class Parameter(Option):
    """A parameter of a method.

    `in_steps`: its unit is the step, so the checkpoints need true steps; `instead_of`: the
    parameter that it replaces, so that only one of the two may be given.
    """

    in_steps: bool = False
    instead_of: str = ""


@dataclass(frozen=True)
class Method:
    """One averaging method; `function` takes the steps and every parameter.

    `needs_order`: the checkpoints need steps, or an order given; `needs_step_values`: positions in
    place of true steps would be wrong; `is_explicit`: the user types one coefficient per
    checkpoint.
    """

    name: str
    summary: str
    formula: str
    source: str
    function: Callable[..., Coefficients]
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    needs_order: bool = True
    needs_step_values: bool = False
    is_explicit: bool = False


def coefficients(method: str, steps: Sequence[float], **parameters: Any) -> Coefficients:
    """The coefficients of averaging checkpoints at `steps`, oldest to newest, by a method of
    `METHODS`.

    `steps` may be in any unit (optimizer steps, tokens) and may be mere positions, unless
    `needs_step_values`. A parameter that is None counts as not given. One checkpoint gives (1.0,),
    whatever the method.

    Raises UsageError: unknown method or parameter, value out of range, no checkpoint, steps not
    increasing.
    """
    given = check_parameters(method, parameters)
    if len(steps) == 0:
        raise UsageError("no checkpoint to average", hint="pmerge average RUN_FOLDER")
    chosen = METHODS[method]
    if chosen.needs_order:
        _check_increasing(chosen.name, steps)
    defaults = {name: parameter.default for name, parameter in chosen.parameters.items()}
    return chosen.function(tuple(steps), **{**defaults, **given})


def check_parameters(method: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The given parameters of a method, read from text where they are text; None counts as not
    given.

    Raises UsageError: unknown method or parameter, a value of the wrong kind, two that exclude each
    other.
    """
    chosen = METHODS.get(method)
    if chosen is None:
        raise not_a_choice("--method", method, tuple(METHODS), METHOD_SYNONYMS)
    given: dict[str, Any] = {}
    for name, value in parameters.items():
        if value is None:
            continue
        parameter = chosen.parameters.get(name)
        if parameter is None:
            raise _unknown_parameter(chosen, name)
        if parameters.get(parameter.instead_of) is not None:
            other = chosen.parameters[parameter.instead_of]
            raise UsageError(
                f"{other.flag} and {parameter.flag} contradict each other", hint=f"leave one of them out, as {parameter.flag}"
            )
        given[name] = parameter.check(value)
    return given


def needs_step_values(method: str, **parameters: Any) -> bool:
    """Whether positions 0..N-1 in place of true steps would be wrong, for instance for a half-life
    in steps.
    """
    chosen = METHODS[method]
    in_steps = [name for name, parameter in chosen.parameters.items() if parameter.in_steps]
    return chosen.needs_step_values or any(parameters.get(name) is not None for name in in_steps)


def implied_method(parameters: Mapping[str, Any], otherwise: str) -> str:
    """The method when none is named: the explicit one if weights are given."""
    return EXPLICIT if parameters.get(next(iter(METHODS[EXPLICIT].parameters))) is not None else otherwise


def sma(steps: Sequence[float]) -> Coefficients:
    """Simple average, `c_i = 1/N` (PMA Eq. 3)."""
    return _rational([1] * len(steps))


def wma(steps: Sequence[float]) -> Coefficients:
    """Linearly weighted average, `c_i = (i+1) / (N(N+1)/2)`: the newest weighs most (PMA Eq. 5)."""
    return _rational(range(1, len(steps) + 1))


def ema(steps: Sequence[float], alpha: float, half_life: float | None) -> Coefficients:
    """Exponential moving average `M <- a x_i + (1-a) M`, started at the oldest checkpoint (PMA Eq.
    4).

    Closed form for one a: `c_0 = (1-a)^(N-1)`, `c_i = a (1-a)^(N-1-i)`. It sums to 1; the weights
    printed in section 4.2 of the paper, `a (1-a)^(N-i)` for every i, do not. With `alpha` one a per
    checkpoint, whatever the spacing; with `half_life`, in the unit of `steps`, `a_i = 1 - 2^(-(T_i
    - T_{i-1}) / half_life)`.

    Raises UsageError unless 0 < alpha <= 1 and 0 < half_life.
    """
    if half_life is not None and half_life <= 0:
        raise _out_of_range("half_life", half_life, "a number of steps above 0")
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


def decay(steps: Sequence[float], shape: str, floor: float) -> Coefficients:
    """Average as if the learning rate had decayed by `shape` to the share `floor` over the window
    (WSM).

    `w_i = floor + (1-floor) f(t_i)`, `c_i = w_i - w_{i+1}`, `c_{N-1} = w_{N-1}`: `w` is the reverse
    cumulative sum of `c`. `t_i = (T_i - T_0) / (T_{N-1} - T_0 + mean gap)`, which is i/N for even
    spacing; linear without a floor is then sma and returned as such, exactly. Otherwise float64,
    none negative.

    Raises UsageError unless 0 <= floor < 1.
    """
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
    """sigma_rel of the profile `t^g` on [0, T], a share of T: `sqrt((g+1) / (g+3)) / (g+2)`
    (2312.02696).
    """
    return math.sqrt((gamma + 1.0) / (gamma + 3.0)) / (gamma + 2.0)


def gamma_of(width: float) -> float:
    """The gamma >= 0 of a relative width s: the largest root of `g^3 + 7g^2 + (16 - s^-2) g + (12 -
    s^-2)`.

    Bisection on the width itself, which falls for g >= 0: no overflow, no choice of root, full
    precision.

    Raises UsageError unless 0 < width <= 1/sqrt(12), the width of the flat profile.
    """
    if not 0 < width <= relative_width(0.0):
        raise _out_of_range("sigma_rel", width, f"a number above 0 and at most {relative_width(0.0):.4f} (a flat profile)")
    low, high = 0.0, min(1.0 / width, 1e308)  # relative_width(g) < 1 / (g + 2): the root is below 1/width
    while low < (middle := low + (high - low) / 2) < high:
        low, high = (middle, high) if relative_width(middle) >= width else (low, middle)
    return low


def power(steps: Sequence[float], sigma_rel: float) -> Coefficients:
    """Power-function EMA: weigh training time t by `t^g`, of relative width `sigma_rel`
    (2312.02696).

    Each checkpoint represents the time between the midpoints a_i, b_i to its neighbors, so c_i is
    in proportion to `b_i^(g+1) - a_i^(g+1)`. The first and the last cell reach as far outwards as
    inwards (not below 0). So a flat profile with even spacing is sma, and the time before the
    window is left out rather than heaped onto the oldest checkpoint, which would mostly undo
    averaging; the price is that the average is narrower than `sigma_rel` of the run when the window
    is.

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


def explicit(steps: Sequence[float], weights: Sequence[float] | None, normalize: bool) -> Coefficients:
    """The `weights` as given, one per checkpoint; `normalize` divides them by their sum.

    Without it they must sum to 1 within 1e-6 and are used exactly as typed. Negative ones are
    allowed. A float means its shortest decimal, so 0.7 is 7/10.

    Raises UsageError: not one weight per checkpoint, NaN or Inf, a sum that is not 1 (or 0 to
    normalize).
    """
    weights = weights or ()
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
            hint="correct them, or divide them by their sum:  --normalize",
        )
    if len(weights) == 1:
        return IDENTITY
    decimals = [Fraction(weight) if isinstance(weight, Rational) else Fraction(repr(float(weight))) for weight in weights]
    shares = [each / sum(decimals) for each in decimals] if normalize else decimals
    denominator = math.lcm(*(share.denominator for share in shares))
    numerators = tuple(int(share * denominator) for share in shares)
    if sum(map(abs, numerators)) > MOST_NUMERATORS:
        return Coefficients(tuple(map(float, shares)))
    return Coefficients(tuple(map(float, shares)), numerators, denominator)


def _number(value: Any, flag: str) -> float:
    """A finite number, or the text of one."""
    try:
        number: float = float(value) if isinstance(value, str) else value
    except ValueError:
        number = math.nan
    if not _is_finite_number(number):
        raise UsageError(f"{flag} cannot be {value!r}", details=["expected  a finite number"])
    return number


def _numbers(value: Any, flag: str) -> list[float]:
    """A list of numbers, or the text of one with commas. Whether they are finite is checked with
    their positions.
    """
    if isinstance(value, str):
        return [_number(part, flag) for part in value.split(",")]
    if not isinstance(value, Sequence):
        raise UsageError(f"{flag} cannot be {value!r}", details=["expected  numbers: 0.2,0.3,0.5"])
    return list(value)


def _method(name: str, *, parameters: Mapping[str, Parameter] | None = None, **rest: Any) -> Method:
    return Method(name, parameters={key: each.named(key) for key, each in (parameters or {}).items()}, **rest)


DEFAULT, EXPLICIT = "sma", "weights"
METHOD_SYNONYMS = {"mean": "sma", "average": "sma", "avg": "sma", "uniform": "sma", "linear": "wma", "exponential": "ema"}
_ALL = (
    _method(
        DEFAULT,
        summary="simple average: all checkpoints weigh the same",
        formula="c_i = 1/N",
        source="PMA, arXiv 2505.12082, Eq. 3",
        needs_order=False,
        function=sma,
    ),
    _method(
        "wma",
        summary="weights rise linearly: the newest checkpoint weighs most",
        formula="c_i = (i+1) / (N(N+1)/2)",
        source="PMA, arXiv 2505.12082, Eq. 5",
        function=wma,
    ),
    _method(
        "ema",
        summary="exponential moving average over the checkpoints, started at the oldest",
        formula="c_0 = (1-a)^(N-1), c_i = a (1-a)^(N-1-i)",
        source="PMA, arXiv 2505.12082, Eq. 4",
        function=ema,
        parameters={
            "alpha": Parameter("share of each newer checkpoint, 0 < alpha <= 1", 0.2, metavar="X", read=_number),
            "half_life": Parameter(
                "steps after which a weight has halved, instead of alpha",
                metavar="X",
                read=_number,
                in_steps=True,
                instead_of="alpha",
            ),
        },
    ),
    _method(
        "decay",
        summary="as if the learning rate had decayed over the window",
        formula="w_i = floor + (1-floor) f(t_i), c_i = w_i - w_{i+1}, c_{N-1} = w_{N-1}; t_i = i/N, or if unevenly spaced "
        "(T_i-T_0)/(T_{N-1}-T_0+mean gap), so that a checkpoint before a large gap weighs much",
        source="WSM, arXiv 2507.17634",
        function=decay,
        parameters={
            "shape": Parameter("the shape f of the decay", "1-sqrt", choices=tuple(DECAY_SHAPES)),
            "floor": Parameter("share of the learning rate that remains, 0 <= floor < 1", 0.0, metavar="X", read=_number),
        },
    ),
    _method(
        "power",
        summary="power-function EMA: training time t weighs t^g, so the width grows with the run",
        formula="c_i ~ b_i^(g+1) - a_i^(g+1), a_i and b_i the midpoints to the neighbors",
        source="post-hoc EMA, arXiv 2312.02696",
        needs_step_values=True,
        function=power,
        parameters={"sigma_rel": Parameter("width of t^g relative to the run, 0 < s <= 0.2886", 0.1, metavar="X", read=_number)},
    ),
    _method(
        EXPLICIT,
        summary="explicit weights, one per checkpoint in the order given",
        formula="c_i as given, sum c_i = 1",
        source="the user",
        needs_order=False,
        is_explicit=True,
        function=explicit,
        parameters={
            "weights": Parameter("one number per checkpoint, as 0.2,0.3,0.5", metavar="LIST", read=_numbers),
            "normalize": Parameter("divide the weights by their sum", False),
        },
    ),
)
METHODS: dict[str, Method] = {method.name: method for method in _ALL}
PARAMETERS = {name: parameter for method in _ALL for name, parameter in method.parameters.items()}


def _rational(numerators: Sequence[int]) -> Coefficients:
    denominator = sum(numerators)
    return Coefficients(tuple(n / denominator for n in numerators), tuple(numerators), denominator)


def _inexact(values: Sequence[float]) -> Coefficients:
    return Coefficients(tuple(values)) if len(values) > 1 else IDENTITY


def _is_finite_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _out_of_range(name: str, found: object, expected: str) -> UsageError:
    return UsageError(
        f"--{name.replace('_', '-')} is out of range",
        details=[f"found     {found}", f"expected  {expected}"],
        hint="pmerge methods  lists the methods with their parameters",
    )


def _unknown_parameter(method: Method, name: str) -> UsageError:
    owners = [each.name for each in METHODS.values() if name in each.parameters]
    flags = ", ".join(each.flag for each in method.parameters.values())
    return UsageError(
        f"method {method.name} does not take --{name.replace('_', '-')}",
        details=[f"expected  {flags or 'no parameters'}"],
        hint=f"leave it out, or choose a method that has it:  --method {owners[0]}" if owners else "leave it out",
    )


def _check_increasing(method: str, steps: Sequence[float]) -> None:
    for step in steps:
        if not _is_finite_number(step):
            raise UsageError(f"a step is no finite number: {step}")
    wrong = [f"{older:.10g} is followed by {newer:.10g}" for older, newer in pairwise(steps) if not newer > older]
    if wrong:
        raise UsageError(
            f"method {method} needs checkpoints from oldest to newest, each with its own step",
            details=first_ten(wrong),
            hint="let pmerge sort them:  --order step",
        )
