"""Inner products of the inputs: the Gram matrix of their deviations from the newest one, tensor by
tensor.

For an extent with N inputs x_i, `G[i, j] = sum (x_i - x_last)(x_j - x_last)` and `|x_last|^2` in
float64, over blocks of `GRAM_BLOCK_ELEMENTS` elements counted from the beginning of the extent and
cut at tensors. Blocks do not depend on chunks, memory or threads, and the sink adds them exactly
(`GramTotals`), so totals are bit-equal however the work was divided; sums of integers below 2^53
are exact. It runs on the CPU, whatever the device.

Not guaranteed: equal last bits on another processor, whose matrix product may add in another order.
"""

from __future__ import annotations

import math
import operator
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from merge_cli.engine.arithmetic import torch_dtype
from merge_cli.engine.buffers import elements, page_aligned
from merge_cli.engine.chunk import GRAM_BLOCK_ELEMENTS, Chunk, ChunkSize, Memory, Reduced
from merge_cli.engine.device import CPU, Device
from merge_cli.engine.reads import Reads
from merge_cli.engine.reducers.quantized import BYTES_PER_VALUE, QuantizedSums
from merge_cli.engine.sink import NoSink
from merge_cli.errors import NonFiniteError
from merge_cli.planning.extent import Extent, QuantizedExtent
from merge_cli.planning.plan import MergePlan

_UNIT = 1 << 1127


class Block(NamedTuple):
    """The inner products [N][N] of some elements of one tensor, the squared norm of the newest, and
    how many they are.
    """

    key: str
    products: list[list[float]]
    norm2: float
    num_elements: int


class GramReducer:
    """Inner products of plain and quantized tensors, one block of all inputs at a time."""

    depth = 0

    def __init__(self, plan: MergePlan, size: ChunkSize, device: Device, reads: Reads) -> None:
        self._reads = reads
        self._buffer = page_aligned(GRAM_BLOCK_ELEMENTS * 8 + size.slack_bytes)
        self._rows = torch.empty(len(plan.inputs) * GRAM_BLOCK_ELEMENTS, dtype=torch.float64)
        self._quantized = QuantizedSums(CPU, reads, size.slack_bytes)
        self._chunk: Chunk | None = None

    def start(self, chunk: Chunk) -> None:
        self._chunk = chunk

    def finish(self) -> Iterator[Reduced]:
        chunk = self._chunk
        assert chunk is not None
        extent = chunk.extent
        if isinstance(extent, QuantizedExtent):
            values = [self._quantized.values(source, extent.shape, chunk.first, chunk.end)[0].double() for source in extent.sources]
            yield Reduced(chunk, values=[_block(extent.key, torch.stack(values))])
            return
        blocks: list[Block] = []
        for first in range(chunk.first, chunk.end, GRAM_BLOCK_ELEMENTS):
            blocks += self._blocks(extent, first, min(first + GRAM_BLOCK_ELEMENTS, chunk.end))
        yield Reduced(chunk, values=blocks)

    def _blocks(self, extent: Extent, first: int, end: int) -> Iterator[Block]:
        count = end - first
        rows = self._rows[: len(extent.sources) * count].view(len(extent.sources), count)
        for row, source in zip(rows, extent.sources, strict=True):
            self._reads.elements(source, first, end, self._buffer)
            row.copy_(elements(self._buffer, torch_dtype(source.dtype), 0, count))
        for key, begin, stop in extent.tensors_between(first, end):
            yield _block(key, rows[:, begin - first : stop - first])

    def close(self) -> None:
        pass

    @classmethod
    def memory(cls, plan: MergePlan, size: ChunkSize, device: Device) -> Memory:
        values = GRAM_BLOCK_ELEMENTS
        for file in plan.files:
            for extent in file.extents:
                if isinstance(extent, QuantizedExtent):
                    values = max(values, extent.rows_at_once(GRAM_BLOCK_ELEMENTS) * extent.shape[-1])
        return Memory(values * (len(plan.inputs) * 16 + BYTES_PER_VALUE + 8) + size.slack_bytes)


class Total(NamedTuple):
    """The symmetric inner products [N][N] of a tensor or group, the squared norm of the newest, and
    the number of elements.
    """

    products: list[list[float]]
    norm2: float
    num_elements: int


class GramTotals(NoSink):
    """A sink that adds up blocks tensor by tensor, exactly: so their order, which threads decide,
    does not matter.

    Memory: N (N + 1) / 2 integers of some 1,200 bits for each tensor (or group: `group(key)` names
    it).
    """

    def __init__(self, group: Callable[[str], str] = lambda key: key) -> None:
        self._group = group
        self._sums: dict[str, list[list[int]]] = {}  # the triangle row by row, then [|x_last|^2, number of elements]
        self._lock = threading.Lock()

    def take(self, chunk: Chunk, values: Any) -> None:
        for key, products, norm2, num_elements in values:
            if not (math.isfinite(norm2) and all(math.isfinite(row[i]) for i, row in enumerate(products))):
                raise NonFiniteError(f"`{key}` has NaN or Inf elements, or larger ones than inner products can hold")
            exact = [[_exact(product) for product in row[: i + 1]] for i, row in enumerate(products)]
            exact.append([_exact(norm2), num_elements])
            with self._lock:
                sums = self._sums.setdefault(self._group(key), [[0] * len(row) for row in exact])
                for row, more in zip(sums, exact, strict=True):
                    row[:] = map(operator.add, row, more)

    def totals(self) -> dict[str, Total]:
        """The total of each tensor or group, every sum rounded once."""
        found = {}
        for key, (*sums, (norm2, num_elements)) in self._sums.items():
            n = len(sums)
            products = [[sums[max(i, j)][min(i, j)] / _UNIT for j in range(n)] for i in range(n)]
            found[key] = Total(products, norm2 / _UNIT, num_elements)
        return found


def _exact(value: float) -> int:
    """`value` in units of 2^-1127, an integer for every finite float64."""
    mantissa, exponent = math.frexp(value)
    return int(mantissa * 2.0**53) << (exponent + 1074)


def _block(key: str, rows: Tensor) -> Block:
    """The inner products of the deviations of `rows` [N, count] from the last one. Overwrites
    `rows`.
    """
    newest = rows[-1].clone()
    rows.sub_(newest)
    return Block(key, (rows @ rows.T).tolist(), float(newest @ newest), len(newest))
