"""Weighted sums on the CPU with torch, in buffers that files are read into and written from.

A worker thread owns one `Lane`. A chunk is reduced in blocks that stay in the L2 cache, straight
from its buffers: a copy to a stage first, as a device needs it, would cost as much as the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from merge_cli.engine.arithmetic import (
    Scratch,
    WeightedSum,
    accumulator_dtype,
    add_term,
    divide,
    is_finite,
    store,
    torch_dtype,
)
from merge_cli.engine.buffers import HostRows, elements
from merge_cli.engine.device import CPU
from merge_cli.engine.matmul_sums import FilteredSums
from merge_cli.planning.plan import Extent


class Lane:
    """One worker's buffers on the CPU: `num_inputs` chunks in, `num_outputs` chunks out, `chunk_bytes` each.

    Inputs have `slack_bytes` more, for reading whole blocks of the storage.
    """

    def __init__(self, num_inputs: int, num_outputs: int, chunk_elements: int, chunk_bytes: int, slack_bytes: int = 0) -> None:
        self._rows_in = HostRows(num_inputs, chunk_bytes + slack_bytes)
        self._rows_out = HostRows(num_outputs, chunk_bytes)
        self.inputs, self.outputs = self._rows_in.buffers, self._rows_out.buffers
        self._block = CPU.block_elements(chunk_elements)
        self._scratch = Scratch(self._block, num_outputs, CPU.torch)
        self._filtered = FilteredSums(chunk_elements, num_inputs, num_outputs)

    def reduce(
        self, extent: Extent, count: int, operations: Mapping[int, WeightedSum], setting: str, load: Callable[[int], None]
    ) -> bool:
        """Reduce the first `count` elements of the input buffers: operation k into output buffer k.

        `load(i)` fills input buffer i. It is called just before that input is added, while what it reads is in the nearest cache;
        many sums in float64 are made by `matmul_sums.py`, from all inputs together.
        False when a result is NaN, infinite or too large for the output's dtype. A sum may be too large for float32 where the
        average is not (masks are full of the smallest bfloat16): such elements, and only they, are summed again in float64.
        """
        product = self._filtered.choose(extent, operations, setting)
        if product is not None:
            for i in sorted({i for operation in operations.values() for i in operation.inputs}):
                load(i)
            sources = self._rows_in.together(product.inputs, [torch_dtype(extent.sources[i].dtype) for i in product.inputs], count)
            outputs = self._rows_out.together(product.keys, [torch_dtype(extent.dtype)] * len(product.keys), count)
            done = self._filtered.reduce(product, sources, outputs)
            operations = {k: operation for k, operation in operations.items() if k not in done}
        if self._reduce(extent, count, operations, setting, load if product is None else None):
            return True
        return setting == "auto" and self._reduce(extent, count, operations, "fp64", mend=True)

    def _reduce(
        self,
        extent: Extent,
        count: int,
        operations: Mapping[int, WeightedSum],
        setting: str,
        load: Callable[[int], None] | None = None,
        mend: bool = False,
    ) -> bool:
        users: dict[int, list[tuple[int, int]]] = {}  # of each input: which operations, and as which term
        dtypes = {}
        for k, operation in operations.items():
            dtypes[k] = accumulator_dtype(setting, operation, [extent.sources[i].dtype for i in operation.inputs], extent.dtype)
            for position, i in enumerate(operation.inputs):
                users.setdefault(i, []).append((k, position))
        clean: list[bool] = []
        out_dtype = torch_dtype(extent.dtype)
        for start in range(0, count, self._block):
            length = min(self._block, count - start)
            sums = {k: self._scratch.accumulator(k, length, dtype) for k, dtype in dtypes.items()}
            for i in sorted(users):
                if load is not None and start == 0:
                    load(i)
                source = elements(self.inputs[i], torch_dtype(extent.sources[i].dtype), start, length)
                wide: dict[torch.dtype, torch.Tensor] = {}
                for k, position in users[i]:
                    dtype = dtypes[k]
                    if position == 0 and operations[k].factors[0] == 1.0:
                        sums[k].copy_(source)  # what multiplying by 1 gives, in one pass
                        continue
                    if dtype not in wide:
                        wide[dtype] = self._widen(source, dtype)
                    add_term(operations[k], position, wide[dtype], sums[k])
            for k, operation in operations.items():
                divide(operation, sums[k])
                clean.append(_store(sums[k], elements(self.outputs[k], out_dtype, start, length), mend))
        return all(clean)

    def _widen(self, source: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return source if source.dtype == dtype else self._scratch.wide(source.numel(), dtype).copy_(source)


def _store(accumulator: torch.Tensor, output: torch.Tensor, mend: bool) -> bool:
    """Round into `output` (with `mend`: only where that is not finite); whether all is finite."""
    if not mend:
        store(accumulator, output)
        return is_finite(output)
    rounded = torch.empty_like(output)
    store(accumulator, rounded)
    output.copy_(torch.where(output.isfinite(), output, rounded))
    return is_finite(output)
