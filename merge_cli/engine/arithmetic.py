"""The arithmetic: weighted sums of blocks of elements, and one rounding at the end.

Every element has the bits that these IEEE 754 operations in this order give, whatever the block
size, thread or device: widen, multiply, add (never a fused multiply-add, which rounds differently
in a vector's body and in its tail), inputs from oldest to newest. Rational methods sum integer
multiples and divide once by a tensor (CUDA turns a division by a Python number into a
multiplication by its reciprocal), so a bf16 mean is the exact mean rounded once as long as the
integer sum fits the 24 bits of a float32. The first term is copied, not added to zero, which keeps
negative zeros.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch

from merge_cli.formats.safetensors import DTYPES
from merge_cli.planning.sums import WeightedSum

_ROW = 64
_INT32_MIN = -(1 << 31)


def torch_dtype(name: str) -> torch.dtype:
    """The torch type of a safetensors dtype."""
    dtype = getattr(torch, DTYPES[name].torch)
    assert isinstance(dtype, torch.dtype)
    return dtype


class Term(NamedTuple):
    """The use of an input: as which term of which output."""

    k: int
    operation: WeightedSum
    position: int


def terms_by_input(operations: Mapping[int, WeightedSum]) -> dict[int, list[Term]]:
    """The uses of each input, by ascending input."""
    terms: dict[int, list[Term]] = {}
    for k, operation in operations.items():
        for position, i in enumerate(operation.inputs):
            terms.setdefault(i, []).append(Term(k, operation, position))
    return dict(sorted(terms.items()))


class Views:
    """Parts of a buffer (uint8) as tensors of a dtype. The last few are kept: making one takes as
    long as a small sum.
    """

    _MOST = 64

    def __init__(self, buffer: torch.Tensor) -> None:
        self._buffer = buffer
        self._views: dict[tuple[torch.dtype, int, int], torch.Tensor] = {}

    def of(self, dtype: torch.dtype, begin: int, length: int) -> torch.Tensor:
        """The `length` elements of `dtype` that begin at byte `begin`."""
        key = (dtype, begin, length)
        found = self._views.get(key)
        if found is None:
            if len(self._views) >= self._MOST:
                self._views.clear()
            found = self._views[key] = self._buffer[begin : begin + length * dtype.itemsize].view(dtype)
        return found


class Scratch:
    """Accumulators and temporaries of `elements` each, made once and reused for every block."""

    def __init__(self, elements: int, num_outputs: int) -> None:
        self._accumulators = [Views(torch.empty(elements * 8, dtype=torch.uint8)) for _ in range(num_outputs)]
        self._wide = Views(torch.empty(elements * 12, dtype=torch.uint8))
        self._elements = elements

    def accumulator(self, k: int, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """The accumulator of output `k` as a tensor [elements] of `dtype`."""
        return self._accumulators[k].of(dtype, 0, elements)

    def wide(self, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """Room for an input as a tensor [elements] of `dtype`, float32 or float64; the two do not
        overlap.
        """
        return self._wide.of(dtype, 0 if dtype == torch.float64 else self._elements * 8, elements)


def add_term(
    operation: WeightedSum, position: int, source: torch.Tensor, accumulator: torch.Tensor, product: torch.Tensor | None = None
) -> None:
    """Add the term at `position` of the sum: `source`, in the accumulator's dtype, times its
    factor.

    Terms must come in order, from position 0. `product` is room for one, where memory is to be made
    in advance.
    """
    factor = operation.factors[position]
    if position == 0:
        torch.mul(source, factor, out=accumulator)
    elif factor == 1.0:
        accumulator.add_(source)
    elif not accumulator.is_cuda and multiplies_then_adds():
        accumulator.addcmul_(source, _cpu_scalar(1.0, dtype=source.dtype), value=factor)
    else:
        accumulator.add_(torch.mul(source, factor, out=product))


@functools.cache
def multiplies_then_adds() -> bool:
    """Whether `a.addcmul_(x, 1, value=f)` rounds `f * x` before it adds, on this CPU with this
    torch.

    It computes `a + f * x * 1` from left to right: should the second product be fused with the sum,
    it is exact anyway. That takes one pass over the memory, separate operations take two. It is
    looked at here rather than relied upon.
    """
    for dtype in (torch.float32, torch.float64):
        x = torch.linspace(1, 2, 1003, dtype=dtype)
        for part in (x, x[1:], x[:7]):
            factor = 1.0 / 3.0
            rest = -(part * factor) * (1 + torch.finfo(dtype).eps)
            if not torch.equal(rest.clone().addcmul_(part, torch.ones((), dtype=dtype), value=factor), rest + part * factor):
                return False
    return True


def divide(operation: WeightedSum, accumulator: torch.Tensor) -> None:
    """Finish the sum."""
    if operation.divisor is not None:
        scalar = _cpu_scalar if not accumulator.is_cuda else functools.partial(torch.full, (), device=accumulator.device)
        accumulator.div_(scalar(operation.divisor, dtype=accumulator.dtype))


@functools.lru_cache(maxsize=64)
def _cpu_scalar(value: float, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((), value, dtype=dtype)


def store(accumulator: torch.Tensor, output: torch.Tensor) -> None:
    """Round `accumulator` once, to nearest even, into `output`; both [elements].

    torch goes from float64 to 16 bits by way of float32 and so rounds twice. The second rounding
    goes wrong only where the first landed on a tie, so those few elements (for float16, whose
    subnormals move the tie, all) are first rounded to odd.
    """
    if accumulator.dtype != torch.float64 or output.dtype not in (torch.bfloat16, torch.float16):
        output.copy_(accumulator)
    elif output.dtype == torch.float16:
        output.copy_(round_to_odd(accumulator))
    else:
        nearest = accumulator.to(torch.float32)
        ties = _ties(nearest)
        if ties.numel():
            nearest[ties] = round_to_odd(accumulator[ties])
        output.copy_(nearest)


def _ties(values: torch.Tensor) -> torch.Tensor:
    """The positions of float32 values halfway between two bfloat16 ones: the lower half of their
    bits is 0x8000.

    Shifted up, that is the smallest integer there is, so rows with a tie are found by their
    minimum, which is four times as fast as comparing every element.
    """
    lower = torch.bitwise_left_shift(values.view(torch.int32), 16)
    whole = lower.numel() // _ROW * _ROW
    rows = (lower[:whole].view(-1, _ROW).amin(1) == _INT32_MIN).nonzero()
    inside = (lower[:whole].view(-1, _ROW)[rows.flatten()] == _INT32_MIN).nonzero()
    rest = (lower[whole:] == _INT32_MIN).nonzero().flatten() + whole
    return torch.cat([rows[inside[:, 0], 0] * _ROW + inside[:, 1], rest])


def round_to_odd(values: torch.Tensor) -> torch.Tensor:
    """float64 [elements] (kept) to float32, inexact results rounded to the neighbor with an odd
    last bit.
    """
    count, make = values.numel(), functools.partial(torch.empty, device=values.device)
    nearest, back = make(count, dtype=torch.float32), make(count, dtype=torch.float64)
    return round_to_odd_(values.clone(), nearest, back, make((2, count), dtype=torch.int32))


def round_to_odd_(values: torch.Tensor, nearest: torch.Tensor, back: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """The same in given memory: `values` and `back` are overwritten, as is `steps` (int32 [2,
    elements]); the result is `nearest` (float32).

    Rounding it to 16 bits gives what rounding the float64 directly would: torch itself goes by way
    of float32 and rounds twice. The difference to the nearest float32 is exact, and its sign says
    on which side `values` lies. Nothing is read back to the host, and no element is picked by a
    condition.
    """
    back.copy_(nearest.copy_(values))
    away = values.sub_(back).sign_()  # 1 where a value is larger than its nearest float32
    away.mul_(torch.copysign(torch.ones((), dtype=back.dtype, device=back.device), back, out=back))  # in magnitude
    away.nan_to_num_(0.0)  # an infinite value has no other side
    step, even = steps
    step.copy_(away)
    bits = nearest.view(torch.int32)
    torch.bitwise_and(bits, 1, out=even).bitwise_xor_(1)
    bits.add_(step.mul_(even))
    return nearest


def is_clean(output: torch.Tensor) -> torch.Tensor:
    """A bool tensor []: whether every element of a result is finite."""
    low, high = torch.aminmax(output)  # NaN in, NaN out
    return low.isfinite() & high.isfinite()


def is_finite(output: torch.Tensor) -> bool:
    """The same for results on the CPU, where asking two numbers is cheaper than five operations on
    tensors of one.
    """
    low, high = torch.aminmax(output)
    return math.isfinite(low.item()) and math.isfinite(high.item())
