"""The analysis of a window of checkpoints: geometry, spread by layer and kind, a verdict with its
formula, and findings.

The verdict has three values and rests on the age rule: at a constant learning rate the loss falls
as a power of the steps, so a merge that lags by a small share of the run gains more than it loses,
whatever the run. The rule gives the sign only. It prints no gain and no best N: weights alone
cannot give them (see `gram.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from merge_cli.errors import UsageError
from merge_cli.request.coefficients import AGE_HELPS, AGE_HURTS, Coefficients
from merge_cli.trajectory.findings import Finding, findings_of, router_findings
from merge_cli.trajectory.gram import Geometry, Gram, geometry, total
from merge_cli.trajectory.groups import KINDS, Group
from merge_cli.trajectory.log import LogRow, schedule_of, tokens_at

SCHEMA = 1
HELPS, HURTS, MEASURE = "likely to help", "may hurt", "measure it"


@dataclass(frozen=True)
class Member:
    """A checkpoint of the window: its name, its step where it is known, and its coefficient in the
    merge that is judged.
    """

    name: str
    step: int | None
    coefficient: float


@dataclass(frozen=True)
class Verdict:
    """One of three values, the share of the age it rests on (None without steps), and the formula
    with its numbers.
    """

    value: str
    age_share: float | None
    formula: str
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Spread:
    """The weights of a layer or kind: `spread` is the root mean square distance of the checkpoints
    to the merge, over the norm of the newest; `merge_to_newest` is the distance of the merge to the
    newest, over the same norm.
    """

    layer: int | None
    kind: str
    num_elements: int
    spread: float | None
    merge_to_newest: float | None
    cos1: float | None
    straightness: float | None


@dataclass(frozen=True)
class Analysis:
    """What the weights of a window of checkpoints show. `groups` are by layer and kind, `kinds` by
    kind over all layers.

    `unit` is steps, tokens or positions, of the ages; `constant_since` is the step at which the
    learning rate became that of the newest checkpoint (None: no log).
    """

    schema: int
    members: tuple[Member, ...]
    method: str
    effective_sample_size: float
    mean_age: float | None
    steps_so_far: float | None
    unit: str
    constant_since: float | None
    verdict: Verdict
    findings: tuple[Finding, ...]
    whole: Spread
    geometry: Geometry
    kinds: tuple[Spread, ...]
    groups: tuple[Spread, ...]


def analyze_grams(
    names: Sequence[str],
    steps: Sequence[int | None],
    chosen: Coefficients,
    grams: Mapping[Group, Gram],
    *,
    method: str = "sma",
    log: Sequence[LogRow] = (),
) -> Analysis:
    """The analysis of checkpoints, oldest to newest, merged with the coefficients `chosen`, from
    the Gram matrix of each group.

    With a `log` the schedule is known, and the tokens of the steps where it counts them. Raises
    UsageError for fewer than two.
    """
    if len(names) < 2:
        raise UsageError("an analysis needs at least two checkpoints", hint="pmerge analyze RUN_FOLDER")
    known = [float(step) for step in steps if step is not None]
    has_steps = len(known) == len(steps) and all(older < newer for older, newer in pairwise(known))
    places = known if has_steps else [float(i) for i in range(len(names))]
    everything = total(grams.values())
    shape = geometry(everything, places)
    findings = list(findings_of(shape, names, places))
    since = None
    if has_steps and log:
        schedule = schedule_of(log, places[0], places[-1])
        since = schedule.constant_since
        if since is not None:  # the log says when the learning rate changes: increments need not be asked
            findings = [each for each in findings if each.name != "learning rate"]
        findings = [*schedule.findings, *findings]
    by_kind = {kind: [gram for group, gram in grams.items() if group.kind == kind] for kind in KINDS}
    biases = {str(group): gram for group, gram in grams.items() if group.kind == "router bias"}
    findings += router_findings(biases, names, places)
    tokens = tokens_at(log, places) if has_steps else None
    ages = tokens or (places if has_steps else None)
    begin = (tokens_at(log, [since]) or [0.0])[0] if tokens and since else since or 0.0
    unit = "tokens" if tokens else "steps" if has_steps else "positions"
    mean_age = None if ages is None else chosen.lag(ages)
    so_far = None if ages is None else ages[-1] - begin
    values = chosen.values
    return Analysis(
        schema=SCHEMA,
        members=tuple(Member(name, step, value) for name, step, value in zip(names, steps, values, strict=True)),
        method=method,
        effective_sample_size=chosen.effective_sample_size,
        mean_age=mean_age,
        steps_so_far=so_far,
        unit=unit,
        constant_since=since,
        verdict=judge(mean_age, so_far, unit, findings, begin),
        findings=tuple(findings),
        whole=_spread(Group(None, "all"), everything, values),
        geometry=shape,
        kinds=tuple(_spread(Group(None, kind), total(found), values) for kind, found in by_kind.items() if found),
        groups=tuple(_spread(group, gram, values) for group, gram in sorted(grams.items(), key=_order)),
    )


def judge(mean_age: float | None, so_far: float | None, unit: str, findings: Sequence[Finding], begin: float = 0.0) -> Verdict:
    """The verdict by the age rule: mean age over steps (or tokens) so far, counted from where the
    learning rate became constant.
    """
    if mean_age is None or so_far is None or so_far <= 0:
        return Verdict(MEASURE, None, f"mean age / {unit} so far", ("no steps are known, so the age rule cannot be used",))
    share = mean_age / so_far
    under = f"(T_last - {begin:.10g})" if begin else "T_last"
    formula = (
        f"mean age / {unit} so far = sum c_i (T_last - T_i) / {under} = {mean_age:.10g} / {so_far:.10g} = {share:.3f};"
        f" below {AGE_HELPS:g} likely to help, above {AGE_HURTS:g} may hurt"
    )
    stopping = tuple(each.text for each in findings if each.stops_forecast)
    if share > AGE_HURTS:
        return Verdict(HURTS, share, formula, stopping)
    if share < AGE_HELPS and not stopping:
        return Verdict(HELPS, share, formula, ())
    return Verdict(MEASURE, share, formula, stopping or ("between the two bounds only an evaluation decides",))


def _spread(group: Group, gram: Gram, coefficients: Sequence[float]) -> Spread:
    norm = math.sqrt(gram.norm2)
    n = gram.size
    squares = [gram.increment(i, i) for i in range(n - 1)]
    lengths = [math.sqrt(max(0.0, square)) for square in squares]
    cosines = [
        gram.increment(i, i + 1) / (lengths[i] * lengths[i + 1]) for i in range(n - 2) if lengths[i] > 0 and lengths[i + 1] > 0
    ]
    path = math.fsum(squares)
    return Spread(
        layer=group.layer,
        kind=group.kind,
        num_elements=gram.num_elements,
        spread=math.sqrt(max(0.0, gram.spread2(coefficients))) / norm if norm else None,
        merge_to_newest=math.sqrt(gram.merge_to_newest2(coefficients)) / norm if norm else None,
        cos1=math.fsum(cosines) / len(cosines) if cosines else None,
        straightness=gram.distance2(0, n - 1) / path if path else None,
    )


def _order(item: tuple[Group, Gram]) -> tuple[float, int]:
    layer, kind = item[0]
    return (-1.0 if layer is None else float(layer), KINDS.index(kind) if kind in KINDS else len(KINDS))
