"""How much requantizing changed: the report that goes with a requantized output.

Errors are relative to the tensor's magnitudes, not value by value: a weight that rounds to 0 is
wrong by 100 % of itself, which would make every report read 100 %. For reporting only: the sums
depend on the chunking in their last digits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Totals = tuple[float, float, float, float]
"""Of some values: largest |decoded - value|, largest |value|, sum of |decoded - value|, sum of
|value|.
"""


def error_totals(values: Tensor, decoded: Tensor) -> Totals:
    """The totals of a chunk; both of one shape."""
    if not values.numel():
        return (0.0, 0.0, 0.0, 0.0)
    import torch

    wrong = (decoded - values).abs_()
    right = values.abs()
    largest, magnitude = wrong.amax().item(), right.amax().item()
    return (largest, magnitude, wrong.sum(dtype=torch.float64).item(), right.sum(dtype=torch.float64).item())


def combine_totals(first: Totals | None, second: Totals | None) -> Totals | None:
    """The totals of two chunks, or of two tensors, together."""
    if first is None or second is None:
        return first or second
    return (max(first[0], second[0]), max(first[1], second[1]), first[2] + second[2], first[3] + second[3])


def relative_errors(totals: Totals) -> tuple[float, float]:
    """Largest error relative to the largest magnitude, and mean error relative to the mean
    magnitude.
    """
    largest, magnitude, wrong, right = totals
    return (largest / magnitude if magnitude else 0.0), (wrong / right if right else 0.0)
