"""All sums of a chunk by one matrix product in float32, wherever that provably rounds to what the reference gives.

Adding term after term in float64, as the reference (`arithmetic.py`) does for most methods, costs a
pass over memory for every input of every output. One product of coefficients [K, N] and inputs [N, elements]
does all of them several times as fast, but BLAS adds in
whatever order, and may fuse. So its sum s counts only where that cannot matter: where bfloat16(s - e) and bfloat16(s + e) have the
same bits, and e bounds the distance of s to the reference's sum r, r rounds to those bits as well. The other elements, one in a
thousand or so, are summed again as the reference does. This is Ziv's rounding test (ACM TOMS 17, 1991), which geometry knows as a
floating-point filter.

The bound, with u = 2^-24, N terms, B = sum |c_i|, M = max |x_i| of the element (Higham, Accuracy and Stability of Numerical
Algorithms, section 3.1, holds for any order, with and without fusing):

    rounding the coefficients to float32    u B M
    the product, of N + 1 terms             (N + 1) u B M
    adding 2 e to s - e                     u B M
    the reference, in float64               (N + 2) 2^-53 B M

which is less than (N + 4) u B M with what is of second order. N counts the operation's own inputs: the product also adds those of
the others, times 0, which is exact. 2^-60 is added to M: with B at least 2^-10, e is then far above what flushing subnormal
inputs, products and coefficients to zero can amount to. Zeros therefore never pass, and their signs are the reference's.

This is not for the sums that the reference makes in float32: they are as fast, and often on a tie (every tenth mean of ten
bfloat16 values of one size).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from merge_cli.engine.arithmetic import round_to_odd
from merge_cli.planning.plan import Extent
from merge_cli.planning.sums import WeightedSum

Rows = Tensor | Sequence[Tensor]
"""A tensor [rows, count], or one [count] for each row."""
FILTER_ELEMENTS = 1 << 16
"""At once: fewer, and starting torch's operations takes longer than they do; more, and the caches are too small."""
_EXACT_IN_FLOAT32 = ("BF16", "F16", "F32")
_MOST_INPUTS = 512  # with more, too many elements fail
_LEAST_WEIGHT, _MOST_WEIGHT = 2.0**-10, 2.0**20
_LEAST_MAGNITUDE, _MOST_MAGNITUDE = 2.0**-60, 2.0**100
_SECOND_ORDER = 1.01
_REDONE_SHARE = 32  # where more than one element in so many fails, the reference is faster ...
_PAUSE = 15  # ... and is taken for so many chunks
_REDONE_AT_ONCE = 1 << 14
_MOST_PRODUCTS = 64
_PROBED_COLUMNS = 512
_FEWEST_OUTPUTS = 3  # one or two sums are faster by the reference


def filter_bytes(chunk_elements: int, num_inputs: int, num_outputs: int) -> int:
    """The memory of `FilteredSums`, with what is made on the way; 0 where there are too few outputs for it, or too many inputs."""
    if num_outputs < _FEWEST_OUTPUTS or num_inputs > _MOST_INPUTS:
        return 0  # its buffers are never written, so the system never gives them memory
    block = min(FILTER_ELEMENTS, chunk_elements)
    failed = chunk_elements // _REDONE_SHARE * num_outputs * 4 * 32  # four elements of one quad, as positions, twice
    return block * (4 * (num_inputs + 2) + 8 * num_outputs + 16) + failed + min(_REDONE_AT_ONCE, failed // 32) * 80


class Product:
    """Operations that the reference sums in float64, as one product.

    `inputs` are all that any of them uses, ascending. `coefficients`: float32 [K, N + 1], the last column takes the bound off;
    `bounds`: float32 [K]. For the reference's arithmetic: `factors` float64 [N, K], `divisors` float64 [K], and `has_term`
    bool [N, K], or None where every operation has all inputs.
    """

    def __init__(self, operations: Mapping[int, WeightedSum]) -> None:
        self.keys = tuple(operations)
        self.inputs = tuple(sorted({i for operation in operations.values() for i in operation.inputs}))
        size = (len(self.inputs), len(operations))
        self.factors = torch.zeros(size, dtype=torch.float64)
        has_term = torch.zeros(size, dtype=torch.bool)
        self.divisors = torch.tensor([operation.divisor or 1.0 for operation in operations.values()], dtype=torch.float64)
        for column, operation in enumerate(operations.values()):
            rows = [self.inputs.index(i) for i in operation.inputs]
            self.factors[rows, column] = torch.tensor(operation.factors, dtype=torch.float64)
            has_term[rows, column] = True
        self.has_term = None if has_term.all() else has_term
        values = (self.factors / self.divisors).T
        weights = values.abs().sum(1)
        self.bounds = ((has_term.sum(0) + 4) * weights * _SECOND_ORDER * 2.0**-24).to(torch.float32)
        self.coefficients = torch.cat([values.to(torch.float32), -self.bounds[:, None]], 1)
        in_range = bool(((weights >= _LEAST_WEIGHT) & (weights <= _MOST_WEIGHT)).all())
        self.is_usable = in_range and len(self.inputs) <= _MOST_INPUTS


class FilteredSums:
    """One thread's filter, for chunks of up to `chunk_elements` of up to `num_inputs` inputs and `num_outputs` outputs."""

    def __init__(self, chunk_elements: int, num_inputs: int, num_outputs: int) -> None:
        self._block = min(FILTER_ELEMENTS, chunk_elements)
        self._terms = torch.empty((num_inputs + 1) * self._block, dtype=torch.float32)
        self._least = torch.empty(self._block, dtype=torch.float32)
        self._sums = torch.empty(num_outputs * self._block, dtype=torch.float32)
        self._upper = torch.empty(num_outputs * (self._block + 3), dtype=torch.bfloat16)
        self._products: dict[object, Product | None] = {}
        self._pauses: dict[int, int] = {}

    def choose(self, extent: Extent, operations: Mapping[int, WeightedSum]) -> Product | None:
        """The product for those of `operations` that this is likely to be faster for, if any."""
        self._pauses = {k: pause - 1 for k, pause in self._pauses.items() if pause}
        tried = {k: operation for k, operation in operations.items() if k not in self._pauses}
        key = (tuple(tried.items()), extent.dtype, extent.value_dtypes)
        if key not in self._products:
            if len(self._products) >= _MOST_PRODUCTS:
                self._products.clear()
            product = _product(extent, tried)
            self._products[key] = product if product is not None and self.is_precise(product) else None
        return self._products[key]

    def is_precise(self, product: Product) -> bool:
        """Whether this product keeps to its bound here: a BLAS can be told to round operands to bfloat16, or sums.

        Operands are tried with one term a column, which must come out as multiplied alone, sums with terms of one size in all.
        """
        num_outputs, num_terms = product.coefficients.shape
        terms = self._terms[: num_terms * self._block].view(num_terms, self._block)
        sums = self._sums[: num_outputs * self._block].view(num_outputs, self._block)
        values = self._least.uniform_(1, 2, generator=torch.Generator().manual_seed(0))
        rows = torch.arange(self._block) % num_terms
        terms.zero_().scatter_(0, rows[None], values[None])
        torch.mm(product.coefficients, terms, out=sums)
        if not all(torch.equal(found, each[rows] * values) for found, each in zip(sums, product.coefficients, strict=True)):
            return False
        terms.copy_(values).mul_(terms.new_tensor([1.0, -0.7])[torch.arange(num_terms) % 2, None])
        torch.mm(product.coefficients, terms, out=sums)
        few, factors = terms[:, :_PROBED_COLUMNS].double(), product.coefficients.double()
        error = (sums[:, :_PROBED_COLUMNS] - factors @ few).abs()
        return bool((error <= num_terms * 2.0**-24 * (factors.abs() @ few.abs())).all())

    def reduce(self, product: Product, sources: Rows, outputs: Rows) -> set[int]:
        """Sum `sources` (a row [count] for each of the product's inputs) into `outputs` (bfloat16, a row [count] for each key).

        Returns the keys of the operations that are done. The others are for the reference: too many of their elements would have to
        be summed again (where coefficients are multiples of 1/4, every fourth is on a tie), or some are not finite. These will not
        be tried for some time.
        """
        left: set[int] = set()
        failed: list[tuple[Tensor, Tensor]] = []
        for start in range(0, len(sources[0]), self._block):
            part = slice(start, min(start + self._block, len(sources[0])))
            rows, positions, many = self._reduce(product, _columns(sources, part), _columns(outputs, part))
            left |= many
            if len(left) == len(outputs):
                break
            failed.append((rows, positions.add_(start)))
        else:
            rows, positions = (torch.cat(parts) for parts in zip(*failed, strict=True))
            for begin in range(0, len(rows), _REDONE_AT_ONCE):
                some = slice(begin, begin + _REDONE_AT_ONCE)
                _redo(product, sources, outputs, rows[some], positions[some])
        if len(sources[0]) >= self._block:  # a small tensor says little about others
            self._pauses.update({product.keys[row]: _PAUSE for row in left})
        return {k for row, k in enumerate(product.keys) if row not in left}

    def _reduce(self, product: Product, sources: Rows, outputs: Rows) -> tuple[Tensor, Tensor, set[int]]:
        """One block: where the test fails, as rows and positions, and the rows where that is too often to be among those."""
        num_outputs, num_inputs, count = len(outputs), len(sources), len(outputs[0])
        terms = self._terms[: (num_inputs + 1) * count].view(num_inputs + 1, count)
        inputs, magnitude = terms[:num_inputs], terms[num_inputs]
        _copy(sources, inputs)
        torch.amax(inputs, 0, out=magnitude)
        torch.maximum(magnitude, torch.amin(inputs, 0, out=self._least[:count]).neg_(), out=magnitude)
        if not magnitude.max().item() < _MOST_MAGNITUDE:  # NaN fails too
            nowhere = torch.empty(0, dtype=torch.int64)
            return nowhere, nowhere.clone(), set(range(num_outputs))
        magnitude.add_(_LEAST_MAGNITUDE)
        sums = self._sums[: num_outputs * count].view(num_outputs, count)
        torch.mm(product.coefficients, terms, out=sums)
        _copy(sums, outputs)
        width = -(-count // 4) * 4
        upper = self._upper[: num_outputs * width].view(num_outputs, width)
        upper[:, :count].copy_(sums.addr_(product.bounds, magnitude, alpha=2.0))
        different = upper.view(torch.int16)
        different[:, count:] = 0
        for row, output in zip(different, outputs, strict=True):
            row[:count].bitwise_xor_(output.view(torch.int16))
        return _nonzero(different, count // _REDONE_SHARE)


def _product(extent: Extent, operations: Mapping[int, WeightedSum]) -> Product | None:
    if extent.dtype != "BF16":
        return None
    chosen: dict[int, WeightedSum] = {}
    for k, operation in operations.items():
        if operation.dtype == "F64" and all(extent.sources[i].dtype in _EXACT_IN_FLOAT32 for i in operation.inputs):
            chosen[k] = operation
    product = Product(chosen) if len(chosen) >= _FEWEST_OUTPUTS else None
    return product if product is not None and product.is_usable else None


def _columns(rows: Rows, part: slice) -> Rows:
    return rows[:, part] if isinstance(rows, Tensor) else [row[part] for row in rows]


def _copy(sources: Rows, targets: Rows) -> None:
    if isinstance(sources, Tensor) and isinstance(targets, Tensor):
        targets.copy_(sources)
        return
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)


def _nonzero(values: Tensor, most: int) -> tuple[Tensor, Tensor, set[int]]:
    """Where `values` (int16 [rows, a multiple of 4]) are not zero, as rows and columns; the third result are rows that are left out
    because more than `most` of their quads are not zero.

    Four at a time are looked at, since most are zero.
    """
    num_rows, width = values.shape
    quads = values.view(torch.int64).view(-1).nonzero().view(-1)
    ends = torch.searchsorted(quads, torch.arange(1, num_rows + 1) * (width // 4)).tolist()
    parts = [quads[begin:end] for begin, end in pairwise([0, *ends])]
    many = {row for row, part in enumerate(parts) if len(part) > most}
    if many:
        quads = torch.cat([quads[:0], *(part for row, part in enumerate(parts) if row not in many)])
    inside = values.view(-1, 4).index_select(0, quads).nonzero()
    found = quads.index_select(0, inside[:, 0]).mul_(4).add_(inside[:, 1])
    rows = found.div(width, rounding_mode="floor")
    return rows, found.sub_(rows, alpha=width), many


def _redo(product: Product, sources: Rows, outputs: Rows, rows: Tensor, positions: Tensor) -> None:
    """Sum the element at `positions[j]` of row `rows[j]` as the reference does, for all j; all are finite."""
    total = torch.full(rows.shape, -0.0, dtype=torch.float64)  # what changes nothing when it is added to
    for i, source in enumerate(sources):
        term = source.index_select(0, positions).to(torch.float64).mul_(product.factors[i].index_select(0, rows))
        if product.has_term is not None:
            term = torch.where(product.has_term[i].index_select(0, rows), term, -0.0)
        total.add_(term)
    rounded = round_to_odd(total.div_(product.divisors.index_select(0, rows))).to(torch.bfloat16)
    if isinstance(outputs, Tensor):
        outputs.index_put_((rows, positions), rounded)
    else:
        for row, output in enumerate(outputs):
            output[positions[rows == row]] = rounded[rows == row]
