"""Host memory that files are read into and written from; tensors of it are made only when asked
for.
"""

from __future__ import annotations

import ctypes
import mmap
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from merge_cli.engine.arithmetic import Views


class HostBuffer:
    """Writable `memory` that files are read into and written from.

    The data begins at byte `begin`, which is 0 unless whole blocks of the storage were read.
    """

    def __init__(self, memory: memoryview) -> None:
        self.begin = 0
        self.memory = memory

    @classmethod
    def of(cls, tensor: torch.Tensor) -> HostBuffer:
        """The memory of a contiguous uint8 tensor on the host."""
        array = (ctypes.c_char * tensor.numel()).from_address(tensor.data_ptr())
        buffer = cls(memoryview(array).cast("B"))
        buffer.tensor = tensor  # keeps the memory alive
        return buffer

    @cached_property
    def tensor(self) -> torch.Tensor:
        """The memory as a tensor, uint8 [bytes]."""
        import torch

        return torch.frombuffer(self.memory, dtype=torch.uint8)

    @cached_property
    def views(self) -> Views:
        """Parts of the memory as tensors of other dtypes."""
        from merge_cli.engine.arithmetic import Views

        return Views(self.tensor)

    @cached_property
    def address(self) -> int:
        """The address of the first byte of the memory."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self.memory))

    def data(self, size: int) -> memoryview:
        """The first `size` bytes of the data."""
        return self.memory[self.begin : self.begin + size]


def page_aligned(num_bytes: int) -> HostBuffer:
    """A buffer of `num_bytes` (at least one) that begins at a page."""
    return HostBuffer(memoryview(mmap.mmap(-1, max(num_bytes, 1))))


def pinned_buffer(num_bytes: int) -> HostBuffer:
    """A buffer that an accelerator copies from and to by itself."""
    import torch

    return HostBuffer.of(torch.empty(max(num_bytes, 1), dtype=torch.uint8, pin_memory=True))


def elements(buffer: HostBuffer, dtype: torch.dtype, start: int, length: int) -> torch.Tensor:
    """Elements `start` to `start + length` of a buffer that holds `dtype`, as a view [length]."""
    return buffer.views.of(dtype, buffer.begin + start * dtype.itemsize, length)


def keep_freed_memory() -> None:
    """Ask glibc to keep freed memory for the next chunk: giving it back and faulting it in costs as
    much as the arithmetic.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl and macOS have none
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
