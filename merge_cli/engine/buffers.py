"""Host memory that files are read into and written from, also as tensors."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence

import torch

from merge_cli.engine.arithmetic import (
    Views,
)
from merge_cli.engine.reader import InputFiles
from merge_cli.formats.checkpoint import WeightFile


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


def elements(buffer: HostBuffer, dtype: torch.dtype, start: int, length: int) -> torch.Tensor:
    """Elements `start` to `start + length` of a buffer that holds `dtype`, as a view [length]."""
    return buffer.views.of(dtype, buffer.begin + start * dtype.itemsize, length)


def keep_freed_memory() -> None:
    """Ask glibc to keep what is freed for the next chunk: giving it back and faulting it in costs as much as the arithmetic."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl and macOS have none
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD


def page_aligned(num_bytes: int) -> HostBuffer:
    """A buffer of `num_bytes` that begins at a page."""
    return HostRows(1, num_bytes).buffers[0]
