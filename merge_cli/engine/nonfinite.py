"""Find out which tensor of which checkpoint made a result NaN or infinite. Runs only after
something did.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from merge_cli.engine.buffers import HostBuffer
from merge_cli.errors import NonFiniteError
from merge_cli.planning.extent import Extent
from merge_cli.planning.sums import WeightedSum

_SLICE_ELEMENTS = 1 << 16
Find = Callable[[HostBuffer, str, int, int], list[int]]
"""The positions of NaN and Inf among elements `first` to `end` of a buffer of `dtype`."""


def nonfinite_error(
    key: str, dtype: str, by_file: Mapping[str, int], results: int = 0, *, may_continue: bool = True
) -> NonFiniteError:
    """The error of a tensor `key`: so many elements of the chunk are NaN or Inf in each input file,
    or none is, and a result overflows `dtype`. `may_continue`: whether --allow-nonfinite helps.
    """
    if not by_file:
        details = [f"{results} results are too large for {dtype}"] if results else []
        return NonFiniteError(f"`{key}` overflows {dtype}", details=details, hint="write a wider dtype:  --dtype fp32")
    details = [f"{path}  {number} elements in the chunk that was read" for path, number in by_file.items()]
    hint = f"leave that checkpoint out, or copy the tensor from the base, as a mask or a bound:  --exclude {shlex.quote(key)}"
    if may_continue:
        hint += "  or continue, and have the NaN and Inf of every tensor counted:  --allow-nonfinite"
    return NonFiniteError(f"`{key}` has NaN or Inf in an input", details=details, hint=hint)


def describe_nonfinite(
    inputs: Sequence[HostBuffer],
    outputs: Sequence[HostBuffer],
    extent: Extent,
    start: int,
    end: int,
    operations: Mapping[int, WeightedSum],
    find: Find,
) -> NonFiniteError:
    """The error of the first tensor concerned among elements `start` to `end` of `extent`, which
    lie in the buffers that `operations` read and write.
    """
    count = end - start
    by_file: dict[str, Counter[str]] = {}
    first = count
    for i in sorted({i for operation in operations.values() for i in operation.inputs}):
        source = extent.sources[i]
        for position in _in_slices(find, inputs[i], source.dtype, count):
            first = min(first, position)
            by_file.setdefault(extent.key_at(start + position), Counter())[str(source.file.path)] += 1
    if by_file:
        key = extent.key_at(start + first)
        return nonfinite_error(key, extent.dtype, by_file[key])
    found = (count_nonfinite(outputs[k], extent, start, end, find) for k in operations)
    overflowed = next(filter(None, found), {extent.key_at(start): 0})
    key = next(iter(overflowed))
    return nonfinite_error(key, extent.dtype, {}, overflowed[key])


def count_nonfinite(output: HostBuffer, extent: Extent, start: int, end: int, find: Find) -> dict[str, int]:
    """How many of elements `start` to `end` of a result are NaN or infinite, by tensor."""
    positions = _in_slices(find, output, extent.dtype, end - start)
    return dict(Counter(extent.key_at(start + position) for position in positions))


def _in_slices(find: Find, buffer: HostBuffer, dtype: str, count: int) -> list[int]:
    """The positions of NaN and Inf, looked for slice by slice to keep the memory small."""
    starts = range(0, count, _SLICE_ELEMENTS)
    return [position for first in starts for position in find(buffer, dtype, first, min(first + _SLICE_ELEMENTS, count))]
