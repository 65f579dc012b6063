"""Where the arithmetic happens: the CPU, or an accelerator. Both give the same bytes.

On the CPU a worker thread owns one `Lane`: buffers that files are read into and written from, and scratch memory. A chunk is
reduced in blocks that stay in the L2 cache, straight from those buffers: a copy to a stage first, as a device needs it
(`pipeline.py`), would cost as much as the sum.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from merge_cli.engine.filtered import FilteredSums, filter_bytes
from merge_cli.engine.reader import InputFiles
from merge_cli.engine.reduce import (
    Scratch,
    Views,
    WeightedSum,
    accumulator_dtype,
    add_term,
    divide,
    is_finite,
    store,
    torch_dtype,
)
from merge_cli.errors import UsageError
from merge_cli.formats.checkpoint import WeightFile
from merge_cli.plan import Run

if TYPE_CHECKING:
    from merge_cli.engine.cuda import CudaStream
    from merge_cli.engine.pipeline import Queues

CPU_BLOCK_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class Device:
    """A device by name. What `pipeline.py` and `coded.py` need of an accelerator is made here, so that tests can make another."""

    name: str

    @property
    def torch(self) -> torch.device:
        return torch.device(self.name)

    @property
    def is_accelerator(self) -> bool:
        return self.name != "cpu"

    def block_elements(self, chunk_elements: int) -> int:
        """How many elements a `Lane` reduces at once."""
        return min(CPU_BLOCK_ELEMENTS, chunk_elements)

    def scratch_bytes(self, chunk_elements: int, num_inputs: int, num_outputs: int) -> int:
        """What a lane needs beside its buffers: accumulators in float64, an input in float32 and float64, rounding; the filter."""
        sums = self.block_elements(chunk_elements) * (44 + 8 * num_outputs)
        return sums + filter_bytes(chunk_elements, num_inputs, num_outputs)

    def queues(self) -> Queues:
        """New queues of an accelerator, for one worker. May raise torch.OutOfMemoryError."""
        from merge_cli.engine.cuda import CudaQueues

        return CudaQueues(self.torch)

    def stream(self) -> CudaStream | None:
        """A new stream for the quantised tensors of one worker; None on the CPU."""
        from merge_cli.engine.cuda import CudaStream

        return CudaStream(self.torch) if self.is_accelerator else None

    def free_bytes(self) -> int:
        """The memory that an accelerator has free now."""
        from merge_cli.engine.cuda import free_bytes

        return free_bytes(self.torch)

    def release_freed(self) -> None:
        """Give memory that is no longer used, pinned memory too, back."""
        torch.cuda.empty_cache()
        empty_pinned = getattr(torch._C, "_host_emptyCache", None)  # otherwise it stays with torch for buffers of the same size
        if empty_pinned is not None:
            empty_pinned()


CPU = Device("cpu")


def choose_device(name: str, local_rank: int = 0) -> Device:
    """The device called "auto", "cpu", "cuda" or "cuda:K". Raises UsageError for one that is not there.

    "auto" and "cuda" are the CUDA device of this process's `local_rank` among those of its machine; "auto" may be the CPU.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return CPU
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return Device(f"cuda:{local_rank % torch.cuda.device_count()}")
    number = name.removeprefix("cuda:")
    if number.isdecimal() and torch.cuda.is_available() and int(number) < torch.cuda.device_count():
        return Device(name)
    there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    raise UsageError(f"there is no device {name!r}", details=[f"found     {', '.join(there)}"], hint="--device cpu")


class HostBuffer:
    """`num_bytes` of page-aligned memory: `memory` for reading and writing files, `tensor` (uint8) for computing.

    The data begins at byte `begin`, which is 0 but for what was read in whole blocks of the storage.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.begin = 0
        self.tensor = tensor
        array = (ctypes.c_char * tensor.numel()).from_address(tensor.data_ptr())
        self.memory = memoryview(array).cast("B")
        self.views = Views(tensor)

    def fill(self, inputs: InputFiles, file: WeightFile, offset: int, size: int, item_bytes: int) -> None:
        """Read `size` bytes from byte `offset` of an input."""
        self.begin = inputs.read_block(file, offset, size, item_bytes, self.memory)

    def data(self, size: int) -> memoryview:
        """The first `size` bytes of the data."""
        return self.memory[self.begin : self.begin + size]


def pinned_buffer(num_bytes: int) -> HostBuffer:
    """A buffer that an accelerator copies from and to by itself."""
    return HostBuffer(torch.empty(max(num_bytes, 1), dtype=torch.uint8, pin_memory=True))


class HostRows:
    """Buffers of `num_bytes` each, at equal distances in memory, so that several can be one tensor."""

    def __init__(self, num_rows: int, num_bytes: int) -> None:
        width = max(-(-num_bytes // mmap.PAGESIZE), 1) * mmap.PAGESIZE
        self._rows = torch.frombuffer(mmap.mmap(-1, num_rows * width), dtype=torch.uint8).view(num_rows, width)
        self.buffers = [HostBuffer(row[: max(num_bytes, 1)]) for row in self._rows]

    def together(self, which: Sequence[int], dtypes: Sequence[torch.dtype], count: int) -> torch.Tensor | list[torch.Tensor]:
        """The first `count` elements of some buffers: a view [buffers, count] where they are alike, else one [count] for each."""
        begins = {self.buffers[i].begin for i in which}
        if len(begins) == len(set(dtypes)) == 1 and list(which) == list(range(which[0], which[-1] + 1)):
            begin, dtype = begins.pop(), dtypes[0]
            return self._rows[which[0] : which[-1] + 1, begin : begin + count * dtype.itemsize].view(dtype)
        return [elements(self.buffers[i], dtype, 0, count) for i, dtype in zip(which, dtypes, strict=True)]


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
        self, run: Run, count: int, operations: Mapping[int, WeightedSum], setting: str, load: Callable[[int], None]
    ) -> bool:
        """Reduce the first `count` elements of the input buffers: operation k into output buffer k.

        `load(i)` fills input buffer i. It is called just before that input is added, while what it reads is in the nearest cache;
        many sums in float64 are made by `filtered.py`, from all inputs together.
        False when a result is NaN, infinite or too large for the output's dtype. A sum may be too large for float32 where the
        average is not (masks are full of the smallest bfloat16): such elements, and only they, are summed again in float64.
        """
        product = self._filtered.choose(run, operations, setting)
        if product is not None:
            for i in sorted({i for operation in operations.values() for i in operation.inputs}):
                load(i)
            sources = self._rows_in.together(product.inputs, [torch_dtype(run.sources[i].dtype) for i in product.inputs], count)
            outputs = self._rows_out.together(product.keys, [torch_dtype(run.dtype)] * len(product.keys), count)
            done = self._filtered.reduce(product, sources, outputs)
            operations = {k: operation for k, operation in operations.items() if k not in done}
        if self._reduce(run, count, operations, setting, load if product is None else None):
            return True
        return setting == "auto" and self._reduce(run, count, operations, "fp64", mend=True)

    def _reduce(
        self,
        run: Run,
        count: int,
        operations: Mapping[int, WeightedSum],
        setting: str,
        load: Callable[[int], None] | None = None,
        mend: bool = False,
    ) -> bool:
        users: dict[int, list[tuple[int, int]]] = {}  # of each input: which operations, and as which term
        dtypes = {}
        for k, operation in operations.items():
            dtypes[k] = accumulator_dtype(setting, operation, [run.sources[i].dtype for i in operation.inputs], run.dtype)
            for position, i in enumerate(operation.inputs):
                users.setdefault(i, []).append((k, position))
        clean: list[bool] = []
        out_dtype = torch_dtype(run.dtype)
        for start in range(0, count, self._block):
            length = min(self._block, count - start)
            sums = {k: self._scratch.accumulator(k, length, dtype) for k, dtype in dtypes.items()}
            for i in sorted(users):
                if load is not None and start == 0:
                    load(i)
                source = elements(self.inputs[i], torch_dtype(run.sources[i].dtype), start, length)
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


def elements(buffer: HostBuffer, dtype: torch.dtype, start: int, length: int) -> torch.Tensor:
    """Elements `start` to `start + length` of a buffer that holds `dtype`, as a view [length]."""
    return buffer.views.of(dtype, buffer.begin + start * dtype.itemsize, length)
