"""Find out which tensor of which checkpoint made a result NaN or infinite. Runs only after something did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from merge_cli.engine.arithmetic import torch_dtype
from merge_cli.engine.buffers import HostBuffer, elements
from merge_cli.planning.plan import Extent
from merge_cli.planning.sums import WeightedSum

_SLICE_ELEMENTS = 1 << 16


@dataclass(frozen=True)
class Nonfinite:
    """The first tensor concerned, a line saying what happened to it, and the number of elements by tensor."""

    key: str
    what: str
    details: tuple[str, ...]
    hint: str
    counts: dict[str, int]


def describe_nonfinite(
    inputs: Sequence[HostBuffer],
    outputs: Sequence[HostBuffer],
    extent: Extent,
    start: int,
    end: int,
    operations: Mapping[int, WeightedSum],
) -> Nonfinite:
    """Look through elements `start` to `end` of `extent` in the buffers that `operations` read and write."""
    count = end - start
    counts: Counter[str] = Counter()
    by_file: dict[str, Counter[str]] = {}
    first = count
    for i in sorted({i for operation in operations.values() for i in operation.inputs}):
        source = extent.sources[i]
        for position in _bad_positions(elements(inputs[i], torch_dtype(source.dtype), 0, count)):
            first = min(first, position)
            key = extent.key_at(start + position)
            by_file.setdefault(key, Counter())[str(source.file.path)] += 1
            counts[key] += 1
    if counts:
        culprit = extent.key_at(start + first)
        details = tuple(f"{path}  {number} elements in the chunk that was read" for path, number in by_file[culprit].items())
        hint = "leave that checkpoint out; or continue, and have the NaN and Inf of every tensor counted:  --allow-nonfinite"
        return Nonfinite(culprit, "has NaN or Inf in an input", details, hint, dict(counts))
    values = (elements(outputs[k], torch_dtype(extent.dtype), 0, count) for k in operations)
    overflowed = next(filter(None, map(_bad_positions, values)), [])
    counts.update(extent.key_at(start + position) for position in overflowed)
    key = next(iter(counts), extent.key_at(start))
    details = (f"{counts[key] or 'some'} results are too large for {extent.dtype}",)
    return Nonfinite(key, f"overflows {extent.dtype}", details, "write a wider dtype:  --dtype fp32", dict(counts))


def _bad_positions(values: torch.Tensor) -> list[int]:
    """The positions of NaN and Inf, looked for slice by slice to keep the memory small."""
    found: list[int] = []
    for begin in range(0, values.numel(), _SLICE_ELEMENTS):
        bad = (~values[begin : begin + _SLICE_ELEMENTS].isfinite()).nonzero()
        found += [begin + position for position in bad.flatten().tolist()]
    return found
