"""The queues of an accelerator: all that the reducers ask of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from merge_cli.engine.buffers import HostBuffer

UPLOAD, COMPUTE, DOWNLOAD = QUEUES = ("upload", "compute", "download")
Event = Any
"""Stands for the end of an operation; each kind of queues has its own."""


class Queues(Protocol):
    """The queues of a device. Operations of one queue run in order; between queues and against the
    host only events order them.
    """

    def host_buffer(self, num_bytes: int) -> HostBuffer:
        """Memory of the host that the device can copy from and to while the host goes on. May raise
        torch.OutOfMemoryError.
        """

    def memory(self, num_bytes: int) -> Tensor:
        """Memory of the device, uint8 [num_bytes]. May raise torch.OutOfMemoryError."""

    def submit(self, queue: str, operation: Callable[[], object], after: Sequence[Event] = ()) -> Event:
        """Have `operation` run on `queue` when all before it there, and `after`, is done; does not
        wait for it.

        May raise torch.OutOfMemoryError, when part of the operation may have run.
        """

    def wait(self, event: Event) -> None:
        """Wait on the host until the operation of `event` is done."""

    def wait_for_all(self) -> None:
        """Wait on the host until all queues are empty."""
