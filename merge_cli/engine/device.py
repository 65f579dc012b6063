"""Where the arithmetic happens: the CPU, or an accelerator. Both give the same bytes.

On the CPU a worker thread owns one `Lane`: buffers that files are read into and written from, and scratch memory. A chunk is
reduced in blocks that stay in the L2 cache, straight from those buffers: a copy to a stage first, as a device needs it
(`pipeline.py`), would cost as much as the sum.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

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

    def scratch_bytes(self, chunk_elements: int, num_outputs: int) -> int:
        """What a lane needs beside its buffers: accumulators in float64, an input in float32 and float64, rounding."""
        return self.block_elements(chunk_elements) * (44 + 8 * num_outputs)

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

    def __init__(self, num_bytes: int, pinned: bool) -> None:
        num_bytes = max(num_bytes, 1)
        self.begin = 0
        if pinned:
            self.tensor = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
            array = (ctypes.c_char * num_bytes).from_address(self.tensor.data_ptr())
            self.memory = memoryview(array).cast("B")
        else:
            self._map = mmap.mmap(-1, num_bytes)
            self.memory = memoryview(self._map)
            self.tensor = torch.frombuffer(self._map, dtype=torch.uint8)
        self.views = Views(self.tensor)

    def fill(self, inputs: InputFiles, file: WeightFile, offset: int, size: int, item_bytes: int) -> None:
        """Read `size` bytes from byte `offset` of an input."""
        self.begin = inputs.read_block(file, offset, size, item_bytes, self.memory)

    def data(self, size: int) -> memoryview:
        """The first `size` bytes of the data."""
        return self.memory[self.begin : self.begin + size]


class Lane:
    """One worker's buffers on the CPU: `num_inputs` chunks in, `num_outputs` chunks out, `chunk_bytes` each.

    Inputs have `slack_bytes` more, for reading whole blocks of the storage.
    """

    def __init__(self, num_inputs: int, num_outputs: int, chunk_elements: int, chunk_bytes: int, slack_bytes: int = 0) -> None:
        self.inputs = [HostBuffer(chunk_bytes + slack_bytes, pinned=False) for _ in range(num_inputs)]
        self.outputs = [HostBuffer(chunk_bytes, pinned=False) for _ in range(num_outputs)]
        self._block = CPU.block_elements(chunk_elements)
        self._scratch = Scratch(self._block, num_outputs, CPU.torch)

    def reduce(
        self, run: Run, count: int, operations: Mapping[int, WeightedSum], setting: str, load: Callable[[int], None]
    ) -> bool:
        """Reduce the first `count` elements of the input buffers: operation k into output buffer k.

        `load(i)` fills input buffer i. It is called just before that input is added, while what it reads is in the nearest cache.
        False when a result is NaN, infinite or too large for the output's dtype. A sum may be too large for float32 where the
        average is not (masks are full of the smallest bfloat16): such elements, and only they, are summed again in float64.
        """
        if self._reduce(run, count, operations, setting, load):
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
