"""Coefficients: one number per checkpoint, oldest to newest, and the properties of the average that
they make.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from merge_cli.errors import first_ten

AGE_HELPS, AGE_HURTS = 0.15, 0.25
"""Of `age_share`: every merge of the pilot runs below the first helped, every one above the second
hurt.
"""


@dataclass(frozen=True)
class Coefficients:
    """The weights of one average, oldest to newest; rational ones also as exact numerators /
    denominator.
    """

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

        At a constant learning rate this alone separates merges that help from merges that hurt: the
        loss falls as a power of the steps, so a merge that lags by this share of the run has lost a
        fixed share of the progress.
        """
        return self.lag(steps) / steps[-1] if steps[-1] > 0 else None


IDENTITY = Coefficients((1.0,), (1,), 1)  # of a single checkpoint, whatever the method


def warnings_for(coeffs: Coefficients, steps: Sequence[float] | None = None) -> list[str]:
    """A line for each thing about an average that is known to hurt; window and spacing need true
    `steps`.
    """
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
            f"the average lags {round(coeffs.lag(steps), 1):.10g} steps behind, {100 * share:.0f} % of the steps so far:"
            f" above {100 * AGE_HURTS:.0f} % merges hurt, below {100 * AGE_HELPS:.0f} % they helped"
        )
    span = steps[-1] - steps[0]
    gaps = [newer - older for older, newer in pairwise(steps)]
    mean_gap = span / (n - 1)
    jitter = max(abs(gap - mean_gap) for gap in gaps)
    if jitter > 0.1 * abs(mean_gap) * (1 + 1e-9):
        lines.append(f"the checkpoints are unevenly spaced: {min(gaps):.10g} to {max(gaps):.10g} steps apart, mean {mean_gap:.10g}")
    return lines
