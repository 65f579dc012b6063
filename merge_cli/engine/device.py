"""Where the arithmetic happens: the CPU, or a CUDA device. Both run the same operations and give the same bytes.

A worker thread owns one `Lane`: host buffers that files are read into and written from, and the scratch memory of its device. On
the CPU a chunk is reduced in blocks that stay in the L2 cache; on CUDA the host buffers are pinned, a chunk is copied, reduced and
copied back on the lane's own stream, so that the lanes' reading, copying and computing overlap.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from merge_cli.engine.reader import InputFiles
from merge_cli.engine.reduce import (
    Scratch,
    Views,
    WeightedSum,
    accumulator_dtype,
    add_term,
    divide,
    is_clean,
    is_finite,
    store,
    torch_dtype,
)
from merge_cli.errors import UsageError
from merge_cli.formats.checkpoint import WeightFile
from merge_cli.plan import Run

CPU_BLOCK_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class Device:
    """A torch device by name, and how many elements are reduced at once (0: a whole chunk)."""

    name: str

    @property
    def torch(self) -> torch.device:
        return torch.device(self.name)

    @property
    def is_cuda(self) -> bool:
        return self.name != "cpu"

    def block_elements(self, chunk_elements: int) -> int:
        return chunk_elements if self.is_cuda else min(CPU_BLOCK_ELEMENTS, chunk_elements)

    def scratch_bytes(self, chunk_elements: int, num_outputs: int) -> int:
        """What a lane needs beside its buffers: accumulators in float64, an input in float32 and float64, rounding."""
        return self.block_elements(chunk_elements) * (44 + 8 * num_outputs)


def choose_device(name: str) -> Device:
    """The device called "auto", "cpu", "cuda" or "cuda:K". Raises UsageError for one that is not there."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return Device("cpu")
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return Device("cuda:0")
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
    """One worker's buffers and device memory: `num_inputs` chunks in, `num_outputs` chunks out, `chunk_bytes` each.

    Inputs have `slack_bytes` more, for reading whole blocks of the storage.
    """

    def __init__(
        self, device: Device, num_inputs: int, num_outputs: int, chunk_elements: int, chunk_bytes: int, slack_bytes: int = 0
    ) -> None:
        self._device = device
        self.inputs = [HostBuffer(chunk_bytes + slack_bytes, device.is_cuda) for _ in range(num_inputs)]
        self.outputs = [HostBuffer(chunk_bytes, device.is_cuda) for _ in range(num_outputs)]
        self._block = device.block_elements(chunk_elements)
        self._scratch = Scratch(self._block, num_outputs, device.torch)
        self._stream = torch.cuda.Stream(device.torch) if device.is_cuda else None  # type: ignore[no-untyped-call]

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
        clean: list[torch.Tensor | bool] = []
        out_dtype = torch_dtype(run.dtype)
        with self._active():
            for start in range(0, count, self._block):
                length = min(self._block, count - start)
                sums = {k: self._scratch.accumulator(k, length, dtype) for k, dtype in dtypes.items()}
                for i in sorted(users):
                    if load is not None and start == 0:
                        load(i)
                    source = self._upload(elements(self.inputs[i], torch_dtype(run.sources[i].dtype), start, length))
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
                    clean.append(self._store(sums[k], elements(self.outputs[k], out_dtype, start, length), mend))
            if self._stream is None:
                return all(clean)
            return bool(torch.stack(clean).all().item())  # type: ignore[arg-type]  # waits for the stream

    def _widen(self, source: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return source if source.dtype == dtype else self._scratch.wide(source.numel(), dtype).copy_(source)

    def _active(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _upload(self, host: torch.Tensor) -> torch.Tensor:
        return host if self._stream is None else host.to(self._device.torch, non_blocking=True)

    def _store(self, accumulator: torch.Tensor, host: torch.Tensor, mend: bool) -> torch.Tensor | bool:
        """Round into `host` (with `mend`: only where that is not finite); whether all is finite (on CUDA a bool tensor [])."""
        if self._stream is None and not mend:
            store(accumulator, host)
            return is_finite(host)
        rounded = torch.empty(host.shape, dtype=host.dtype, device=accumulator.device)
        store(accumulator, rounded)
        if mend:
            before = self._upload(host)
            rounded = torch.where(before.isfinite(), before, rounded)
        host.copy_(rounded, non_blocking=True)
        return is_finite(rounded) if self._stream is None else is_clean(rounded)


def elements(buffer: HostBuffer, dtype: torch.dtype, start: int, length: int) -> torch.Tensor:
    """Elements `start` to `start + length` of a buffer that holds `dtype`, as a view [length]."""
    return buffer.views.of(dtype, buffer.begin + start * dtype.itemsize, length)
