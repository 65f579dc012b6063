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

from merge_cli.engine.arithmetic import Term, add_term, divide, is_clean, torch_dtype
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
            output.copy_(self._rounded_to_odd(total))
        else:
            output.copy_(total)
        clean.copy_(is_clean(output))

    def _rounded_to_odd(self, total: Tensor) -> Tensor:
        """`total` (float64, overwritten) as float32, inexact results rounded to the neighbor with
        an odd last bit.

        See `arithmetic.store`. The difference to the nearest float32 is exact, and its sign says on
        which side `total` lies.
        """
        count = total.numel()
        nearest = self._wide(count, torch.float32).copy_(total)
        bits = nearest.view(torch.int32)
        back = self._wide(count, torch.float64).copy_(nearest)
        away = total.sub_(back).sign_()  # 1 where `total` is larger than `nearest`
        away.mul_(torch.copysign(torch.ones((), dtype=back.dtype, device=back.device), back, out=back))  # in magnitude
        away.nan_to_num_(0.0)  # an infinite total has no other side
        step, even = self._product(2 * count, torch.int32).view(2, count)
        step.copy_(away)
        torch.bitwise_and(bits, 1, out=even).bitwise_xor_(1)
        bits.add_(step.mul_(even))
        return nearest

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
