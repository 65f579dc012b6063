"""Weighted sums on the CPU with torch, in buffers that files are read into and written from.

A worker thread owns one `CpuWorkspace`. A chunk is reduced in blocks that stay in the L2 cache,
straight from its buffers: a copy to a stage first, as a device needs it, would cost as much as the
sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

from merge_cli.engine.arithmetic import Scratch, add_term, divide, is_finite, store, terms_by_input, torch_dtype
from merge_cli.engine.buffers import HostBuffer, elements, page_aligned
from merge_cli.engine.chunk import Chunk, ChunkSize, Memory, Reduced
from merge_cli.engine.device import Device
from merge_cli.engine.nonfinite import count_nonfinite, describe_nonfinite
from merge_cli.engine.reads import Reads
from merge_cli.planning.extent import Extent
from merge_cli.planning.plan import MergePlan
from merge_cli.planning.sums import WeightedSum

BLOCK_ELEMENTS = 1 << 18


class CpuReducer:
    """Weighted sums of plain tensors. Chunks larger than its buffers are done in parts."""

    depth = 0

    def __init__(self, plan: MergePlan, size: ChunkSize, device: Device, reads: Reads) -> None:
        self._plan = plan
        self._reads = reads
        self._elements = size.elements
        self._lane = CpuWorkspace(len(plan.inputs), len(plan.outputs), size.elements, size.num_bytes, size.slack_bytes)
        self._chunk: Chunk | None = None

    def start(self, chunk: Chunk) -> None:
        self._chunk = chunk

    def finish(self) -> Iterator[Reduced]:
        chunk = self._chunk
        assert chunk is not None
        for first in range(chunk.first, chunk.end, self._elements):
            yield self._reduce(chunk, first, min(first + self._elements, chunk.end))

    def _reduce(self, chunk: Chunk, first: int, end: int) -> Reduced:
        extent, lane = chunk.extent, self._lane
        assert isinstance(extent, Extent)
        operations = {k: self._plan.operation(extent, k) for k in chunk.item.outputs}

        def load(i: int) -> None:
            self._reads.elements(extent.sources[i], first, end, lane.inputs[i])

        nonfinite: Mapping[int, Mapping[str, int]] = {}
        if not lane.reduce(extent, end - first, operations, load):
            nonfinite = self._nonfinite(extent, first, end, operations)
        offset, size = extent.byte_at(first), extent.bytes_written(first, end)
        return Reduced(chunk, {k: [(offset, lane.outputs[k].data(size))] for k in operations}, nonfinite)

    def _nonfinite(
        self, extent: Extent, first: int, end: int, operations: Mapping[int, WeightedSum]
    ) -> Mapping[int, Mapping[str, int]]:
        """Raise NonFiniteError, or count the elements and give every NaN the same bits, which
        devices do not agree on.
        """
        outputs, find = self._lane.outputs, positions_of_nonfinite
        if not self._plan.spec.allow_nonfinite:
            raise describe_nonfinite(self._lane.inputs, outputs, extent, first, end, operations, find)
        for k in operations:
            values = elements(outputs[k], torch_dtype(extent.dtype), 0, end - first)
            values.masked_fill_(values.isnan(), float("nan"))
        return {k: count_nonfinite(outputs[k], extent, first, end, find) for k in operations}

    def close(self) -> None:
        pass

    @classmethod
    def memory(cls, plan: MergePlan, size: ChunkSize, device: Device) -> Memory:
        """Buffers; accumulators in float64, an input in float32 and float64, rounding."""
        num_inputs, num_outputs = len(plan.inputs), len(plan.outputs)
        buffers = (num_inputs + num_outputs) * size.num_bytes + num_inputs * size.slack_bytes
        sums = min(BLOCK_ELEMENTS, size.elements) * (44 + 8 * num_outputs)
        return Memory(buffers + sums)


class CpuWorkspace:
    """One worker's buffers on the CPU: `num_inputs` chunks in, `num_outputs` chunks out,
    `chunk_bytes` each.

    Inputs have `slack_bytes` more, for reading whole blocks of the storage.
    """

    def __init__(self, num_inputs: int, num_outputs: int, chunk_elements: int, chunk_bytes: int, slack_bytes: int = 0) -> None:
        self.inputs = [page_aligned(chunk_bytes + slack_bytes) for _ in range(num_inputs)]
        self.outputs = [page_aligned(chunk_bytes) for _ in range(num_outputs)]
        self._block = min(BLOCK_ELEMENTS, chunk_elements)
        self._scratch = Scratch(self._block, num_outputs)

    def reduce(self, extent: Extent, count: int, operations: Mapping[int, WeightedSum], load: Callable[[int], None]) -> bool:
        """Reduce the first `count` elements of the input buffers: operation k into output buffer k.

        `load(i)` fills input buffer i. It is called just before that input is added, while its
        bytes are in the nearest cache. False when a result is NaN, infinite or too large for the
        output's dtype. A sum may be too large for float32 where the average is not (masks are full
        of the smallest bfloat16): such elements, and only they, are summed again in float64, unless
        the dtype of sums was asked for.
        """
        clean = self._reduce(extent, count, operations, load)
        again = {k: each.again_in_float64() for k, each in operations.items() if not clean[k] and each.retry}
        clean |= self._reduce(extent, count, again, retry_nonfinite=True)
        return all(clean.values())

    def _reduce(
        self,
        extent: Extent,
        count: int,
        operations: Mapping[int, WeightedSum],
        load: Callable[[int], None] | None = None,
        retry_nonfinite: bool = False,
    ) -> dict[int, bool]:
        """Which outputs are finite."""
        terms = terms_by_input(operations)
        clean = dict.fromkeys(operations, True)
        out_dtype = torch_dtype(extent.dtype)
        for start in range(0, count, self._block):
            length = min(self._block, count - start)
            sums = {k: self._scratch.accumulator(k, length, torch_dtype(each.dtype)) for k, each in operations.items()}
            for i, uses in terms.items():
                if load is not None and start == 0:
                    load(i)
                source = elements(self.inputs[i], torch_dtype(extent.sources[i].dtype), start, length)
                wide: dict[str, torch.Tensor] = {}
                for k, operation, position in uses:
                    if position == 0 and operation.factors[0] == 1.0:
                        sums[k].copy_(source)  # what multiplying by 1 gives, in one pass
                        continue
                    if operation.dtype not in wide:
                        wide[operation.dtype] = self._widen(source, torch_dtype(operation.dtype))
                    add_term(operation, position, wide[operation.dtype], sums[k])
            for k, operation in operations.items():
                divide(operation, sums[k])
                clean[k] &= _store(sums[k], elements(self.outputs[k], out_dtype, start, length), retry_nonfinite)
        return clean

    def _widen(self, source: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return source if source.dtype == dtype else self._scratch.wide(source.numel(), dtype).copy_(source)


def _store(accumulator: torch.Tensor, output: torch.Tensor, retry_nonfinite: bool) -> bool:
    """Round into `output` (with `retry_nonfinite`: only where that is not finite); whether all is
    finite.
    """
    if not retry_nonfinite:
        store(accumulator, output)
        return is_finite(output)
    rounded = torch.empty_like(output)
    store(accumulator, rounded)
    output.copy_(torch.where(output.isfinite(), output, rounded))
    return is_finite(output)


def positions_of_nonfinite(buffer: HostBuffer, dtype: str, first: int, end: int) -> list[int]:
    """The positions of NaN and Inf among elements `first` to `end` of a buffer."""
    bad = (~elements(buffer, torch_dtype(dtype), first, end - first).isfinite()).nonzero()
    return [first + position for position in bad.flatten().tolist()]
