"""How much requantising changed: the report that goes with a requantised output (torch).

Errors are relative to the tensor's magnitudes, not value by value: a weight that rounds to 0 is wrong by 100 % of
itself, which would make every report read 100 %. For reporting only: the sums depend on the chunking in their last
digits.
"""

from __future__ import annotations

import torch
from torch import Tensor


def error_totals(values: Tensor, decoded: Tensor) -> Tensor:
    """float64 [4] of a chunk: largest |decoded - value|, largest |value|, sum of |decoded - value|, sum of |value|."""
    wrong = (decoded - values).abs_()
    right = values.abs()
    if not values.numel():
        return torch.zeros(4, dtype=torch.float64, device=values.device)
    sums = [part.sum(dtype=torch.float64) for part in (wrong, right)]
    return torch.stack([wrong.amax().double(), right.amax().double(), *sums])


def combine_totals(first: Tensor, second: Tensor) -> Tensor:
    """The totals of two chunks, or of two tensors, together."""
    return torch.cat([torch.maximum(first[:2], second[:2]), first[2:] + second[2:]])


def relative_errors(totals: Tensor) -> tuple[float, float]:
    """Largest error relative to the largest magnitude, and mean error relative to the mean magnitude."""
    largest, magnitude, wrong, right = totals.tolist()
    return (largest / magnitude if magnitude else 0.0), (wrong / right if right else 0.0)
