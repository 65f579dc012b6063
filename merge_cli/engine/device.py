"""The device that does the arithmetic: the CPU, or an accelerator. Both give the same bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from merge_cli.errors import UsageError

if TYPE_CHECKING:
    from merge_cli.engine.cuda import CudaStream
    from merge_cli.engine.queues import Queues


@dataclass(frozen=True)
class Device:
    """A device by name. What the reducers need of an accelerator is made here, so that tests can make another."""

    name: str

    @property
    def torch(self) -> torch.device:
        return torch.device(self.name)

    @property
    def is_accelerator(self) -> bool:
        return self.name != "cpu"

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
