"""The training log: learning rate, loss and tokens by step, and whether the run did anything that a
merge must not span.

Read from `log_history` of a `trainer_state.json` (transformers), or from a CSV file with a header
line. Only rows with a step count; without learning rates in the log the schedule is simply not
known.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from merge_cli.errors import InputError, UsageError
from merge_cli.stores.store import read_file
from merge_cli.system.json_text import parse_json
from merge_cli.trajectory.findings import Finding

MAX_LOG_BYTES = 256 << 20
_SAME = 0.01  # two learning rates, or tokens of a step, that differ by less are the same
_PLATEAU = 0.1  # of the logged steps at the peak: with less, the whole schedule is a decay
_COLUMNS = {
    "step": ("step", "global_step", "iteration", "iter", "_step"),
    "learning_rate": ("learning_rate", "lr", "learning-rate"),
    "tokens": ("tokens", "num_input_tokens_seen", "consumed_tokens", "tokens_seen", "total_tokens"),
}


class LogRow(NamedTuple):
    """One line of a training log; `tokens` counts from the start of the run."""

    step: float
    learning_rate: float | None
    tokens: float | None


@dataclass(frozen=True)
class Schedule:
    """What the log says of a window of steps: what it touches, and since which step the learning
    rate is that of the newest.

    `constant_since` is None where the log has no learning rates.
    """

    findings: tuple[Finding, ...]
    constant_since: float | None
    learning_rate: float | None


def read_log(path: Path) -> list[LogRow]:
    """The rows of a `trainer_state.json` or a CSV file, as they are ordered there. Raises
    InputError or UsageError.
    """
    text = read_file(str(path), MAX_LOG_BYTES).decode("utf-8", "replace")
    if path.suffix == ".json":
        try:
            state = parse_json(text)
        except ValueError as error:
            raise InputError(f"{path} is not valid JSON: {error}") from error
        history = state.get("log_history", []) if isinstance(state, dict) else state
        rows = [row for row in history if isinstance(row, dict)] if isinstance(history, list) else []
    else:
        rows = list(csv.DictReader(io.StringIO(text)))
    found = [LogRow(step, *(_number(row, name) for name in ("learning_rate", "tokens"))) for step, row in _steps(rows)]
    if not found and path.suffix != ".json":
        raise UsageError(
            f"{path} has no steps",
            details=["expected  a CSV file whose first line names the columns, as  step,learning_rate,tokens"],
        )
    return found


def schedule_of(rows: Sequence[LogRow], first: float, last: float) -> Schedule:
    """What the log says of the window from step `first` to `last`, the newest checkpoint."""
    findings = [*_restarts(rows), *_ramp(rows, first, last)]
    rated = [(row.step, row.learning_rate) for row in rows if row.learning_rate is not None and row.step <= last]
    if not rated:
        return Schedule(tuple(findings), None, None)
    rated.sort()
    newest = rated[-1][1]
    since = rated[-1][0]
    for step, rate in reversed(rated):
        if not _same(rate, newest):
            break
        since = step
    first_rated = rated[0][0]
    if since <= first_rated:
        since = 0.0  # constant as far back as the log goes
    elif first < since:
        findings.append(_change(rated, first, since, last))
    return Schedule(tuple(findings), since, newest)


def tokens_at(rows: Sequence[LogRow], steps: Sequence[float]) -> list[float] | None:
    """The tokens seen at `steps`, interpolated; None where the log does not reach that far or
    counts none.
    """
    known = sorted({(row.step, row.tokens) for row in rows if row.tokens is not None})
    if len(known) < 2 or any(b[1] < a[1] or b[0] == a[0] for a, b in pairwise(known)):
        return None
    found = []
    for step in steps:
        after = next((i for i, (place, _) in enumerate(known) if place >= step), None)
        if after is None or (after == 0 and known[0][0] != step):
            return None
        if known[after][0] == step:
            found.append(known[after][1])
            continue
        (x0, y0), (x1, y1) = known[after - 1], known[after]
        found.append(y0 + (y1 - y0) * (step - x0) / (x1 - x0))
    return found


def _change(rated: Sequence[tuple[float, float]], first: float, since: float, last: float) -> Finding:
    """How the learning rate came to be that of the newest checkpoint, inside the window."""
    newest = rated[-1][1]
    peak = max(rate for _, rate in rated)
    inside = [rate for step, rate in rated if first <= step <= since] or [rate for _, rate in rated[-2:]]
    at_peak = [step for step, rate in rated if _same(rate, peak)]
    flat = (at_peak[-1] - at_peak[0]) / max(rated[-1][0] - rated[0][0], 1e-300)
    span = f"between steps {first:.10g} and {since:.10g}"
    if newest < (1 - _SAME) * peak and flat < _PLATEAU:
        return Finding("schedule", "the learning rate falls over the whole run, as of a cosine or 1/sqrt schedule", first, last)
    if since < last and all(_same(rate, inside[0]) or _same(rate, newest) for rate in inside) and inside[0] > 0:
        return Finding("stages", f"the learning rate changes from {inside[0]:.3g} to {newest:.3g} {span}", first, since)
    if inside[0] < newest:
        return Finding("warm-up", f"the learning rate rises from {inside[0]:.3g} to {newest:.3g} {span}", first, since)
    return Finding("decay", f"the learning rate falls from {inside[0]:.3g} to {newest:.3g} {span}", at_peak[-1], last)


def _restarts(rows: Sequence[LogRow]) -> Iterator[Finding]:
    for older, newer in pairwise(rows):
        if newer.step < older.step:
            text = f"the step counter of the log falls from {older.step:.10g} to {newer.step:.10g}: a restart"
            yield Finding("restart", text, newer.step, older.step)


def _ramp(rows: Sequence[LogRow], first: float, last: float) -> Iterator[Finding]:
    """A batch size or a sequence length that grows inside the window: tokens a step are not
    constant.
    """
    counted = [(row.step, row.tokens) for row in rows if row.tokens is not None and first <= row.step <= last]
    rates = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(counted) if b[0] > a[0]]
    if rates and min(rates) > 0 and not _same(min(rates), max(rates), 0.05):
        text = f"a step has {min(rates):.4g} to {max(rates):.4g} tokens: a ramp of the batch size or the sequence length"
        yield Finding("ramp", text, counted[0][0], counted[-1][0])


def _same(one: float, other: float, tolerance: float = _SAME) -> bool:
    return abs(one - other) <= tolerance * max(abs(one), abs(other))


def _steps(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[float, Mapping[str, Any]]]:
    for row in rows:
        step = _number(row, "step")
        if step is not None:
            yield step, row


def _number(row: Mapping[str, Any], name: str) -> float | None:
    for column in _COLUMNS[name]:
        value = row.get(column)
        if value is None or isinstance(value, bool) or value == "":
            continue
        try:
            number = float(value)
        except (TypeError, ValueError):
            continue
        return number if math.isfinite(number) else None
    return None
