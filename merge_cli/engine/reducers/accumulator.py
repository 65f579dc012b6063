"""The sums of a whole chunk on an accelerator, in memory that is made once.

The operations are those of `arithmetic.py`, in the same order; only what a CPU does better another
way differs. Nothing here waits for the device: no value is looked at on the host, no element is
picked by a condition. So rounding treats all elements alike, where the CPU looks for those on a
tie. Both give the one correctly rounded result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from merge_cli.engine.arithmetic import Term, add_term, divide, is_clean, round_to_odd_, torch_dtype
from merge_cli.planning.sums import WeightedSum

_FIXED_BYTES = 20  # for each element: an input in float32 and in float64, a product
_SUM_BYTES = 8


def accumulator_bytes(elements: int, num_outputs: int) -> int:
    """The memory of an `Accumulator`."""
    return elements * (_FIXED_BYTES + _SUM_BYTES * num_outputs)


class Accumulator:
    """Sums of up to `elements` elements for `num_outputs` outputs. `memory(n)` gives n bytes of the
    device as uint8 [n].
    """

    def __init__(self, memory: Callable[[int], Tensor], elements: int, num_outputs: int) -> None:
        self._elements = elements
        self._sums = [memory(elements * _SUM_BYTES) for _ in range(num_outputs)]
        self._room = memory(elements * _FIXED_BYTES)

    def add(self, source: Tensor, terms: Sequence[Term]) -> None:
        """Add one input [count], as stored, to every sum that has it as a term."""
        count = source.numel()
        for name in {term.operation.dtype for term in terms}:
            dtype = torch_dtype(name)
            wide = source if source.dtype == dtype else self._wide(count, dtype).copy_(source)
            for term in terms:
                if term.operation.dtype == name:
                    add_term(term.operation, term.position, wide, self._sum(term.k, count, dtype), self._product(count, dtype))

    def finish(self, k: int, operation: WeightedSum, output: Tensor, clean: Tensor) -> None:
        """Divide and round sum `k` into `output` [count]; `clean` (bool []) becomes whether all of
        it is finite.

        Afterwards the sum is no longer there.
        """
        dtype = torch_dtype(operation.dtype)
        total = self._sum(k, output.numel(), dtype)
        divide(operation, total)
        if dtype == torch.float64 and output.dtype in (torch.bfloat16, torch.float16):
            count = total.numel()
            nearest, back = self._wide(count, torch.float32), self._wide(count, torch.float64)
            output.copy_(round_to_odd_(total, nearest, back, self._product(2 * count, torch.int32).view(2, count)))
        else:
            output.copy_(total)
        clean.copy_(is_clean(output))

    def _sum(self, k: int, count: int, dtype: torch.dtype) -> Tensor:
        return self._sums[k][: count * dtype.itemsize].view(dtype)

    def _wide(self, count: int, dtype: torch.dtype) -> Tensor:
        return self._part(0 if dtype == torch.float64 else 16, count, dtype)

    def _product(self, count: int, dtype: torch.dtype) -> Tensor:
        return self._part(8, count, dtype)

    def _part(self, place: int, count: int, dtype: torch.dtype) -> Tensor:
        """Room for `count` numbers, beginning at `place` bytes for each element there can be."""
        begin = place * self._elements
        return self._room[begin : begin + count * dtype.itemsize].view(dtype)
