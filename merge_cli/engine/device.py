"""The device that does the arithmetic: the CPU, or an accelerator. Both give the same bytes."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from merge_cli.errors import UsageError

if TYPE_CHECKING:
    import torch

    from merge_cli.engine.cuda import CudaStream
    from merge_cli.engine.queues import Queues


@dataclass(frozen=True)
class Device:
    """A device by name. What the reducers need of an accelerator is made here, so that tests can
    make another.
    """

    name: str

    @property
    def torch(self) -> torch.device:
        import torch

        return torch.device(self.name)

    @property
    def is_accelerator(self) -> bool:
        return self.name != "cpu"

    def queues(self) -> Queues:
        """New queues of an accelerator, for one worker. May raise torch.OutOfMemoryError."""
        from merge_cli.engine.cuda import CudaQueues

        return CudaQueues(self.torch)

    def stream(self) -> CudaStream | None:
        """A new stream for the quantized tensors of one worker; None on the CPU."""
        from merge_cli.engine.cuda import CudaStream

        return CudaStream(self.torch) if self.is_accelerator else None

    def free_bytes(self) -> int:
        """The memory that an accelerator has free now."""
        from merge_cli.engine.cuda import free_bytes

        return free_bytes(self.torch)

    def release_freed(self) -> None:
        """Give memory that is no longer used, pinned memory too, back."""
        import torch

        torch.cuda.empty_cache()
        empty_pinned = getattr(torch._C, "_host_emptyCache", None)  # otherwise it stays with torch for buffers of the same size
        if empty_pinned is not None:
            empty_pinned()


CPU = Device("cpu")


def choose_device(name: str, local_rank: int = 0) -> Device:
    """The device called "auto", "cpu", "cuda" or "cuda:K". Raises UsageError for one that is not
    there.

    "auto" and "cuda" are the CUDA device of this process's `local_rank` among those of its machine;
    "auto" may be the CPU. torch is asked (which takes seconds) only on a machine with a device file
    of a GPU.
    """
    if name == "cpu":
        return CPU
    count = num_cuda_devices()
    if name == "auto" and not count:
        return CPU
    if name in ("auto", "cuda") and count:
        return Device(f"cuda:{local_rank % count}")
    number = name.removeprefix("cuda:")
    if number.isdecimal() and int(number) < count:
        return Device(name)
    found = ", ".join(["cpu", *(f"cuda:{i}" for i in range(count))])
    raise UsageError(f"there is no device {name!r}", details=[f"found     {found}"], hint="--device cpu")


def _has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def num_cuda_devices() -> int:
    """The number of CUDA devices that torch can use. Without a device file or a driver it is 0, and
    torch is not imported.
    """
    if not any(any(Path("/dev").glob(pattern)) for pattern in ("nvidia[0-9]*", "dxg", "nvgpu", "nvhost-gpu")) or not _has_driver():
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
