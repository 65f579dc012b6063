"""CUDA under the reducers: streams, events, pinned buffers.

Memory is made once and kept until the device is idle (`Ring.close`), so tensors that several
streams use need no `record_stream`. The few numbers that an operation allocates in passing belong
to its own stream. Events block rather than spin: the cores are needed for reading and hashing. The
ordering is tested against a fake device; all tests of version 0.1.0 passed on an H100.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from merge_cli.engine.buffers import HostBuffer, pinned_buffer
from merge_cli.engine.queues import COMPUTE, QUEUES
from merge_cli.errors import PmergeError


@contextmanager
def failures_of(device: torch.device) -> Iterator[None]:
    """Turn what CUDA reports into torch.OutOfMemoryError (pinned memory too), or into a PmergeError
    that says what to do.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if "out of memory" in str(error):
            raise torch.OutOfMemoryError(str(error)) from error
        raise PmergeError(
            f"{device} failed: {str(error).partition(chr(10))[0]}",
            hint="run the same command again with --device cpu: it continues what is done, with the same bytes",
        ) from error


class CudaQueues:
    """A stream for each queue of one worker."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with failures_of(device):
            torch.cuda.synchronize(device)  # memory that is given out again now is no longer in use on any stream
            self._streams = {queue: torch.cuda.Stream(device) for queue in QUEUES}  # type: ignore[no-untyped-call]

    def host_buffer(self, num_bytes: int) -> HostBuffer:
        with failures_of(self._device), torch.cuda.stream(self._streams[COMPUTE]):  # pinning starts CUDA on the current device
            return pinned_buffer(num_bytes)

    def memory(self, num_bytes: int) -> Tensor:
        with failures_of(self._device), torch.cuda.stream(self._streams[COMPUTE]):
            return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def submit(self, queue: str, operation: Callable[[], object], after: Sequence[Any] = ()) -> Any:
        stream = self._streams[queue]
        with failures_of(self._device), torch.cuda.stream(stream):
            for event in after:
                stream.wait_event(event)
            operation()
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            done.record(stream)
            return done

    def wait(self, event: Any) -> None:
        with failures_of(self._device):
            event.synchronize()

    def wait_for_all(self) -> None:
        with failures_of(self._device):
            for stream in self._streams.values():
                stream.synchronize()


class CudaStream:
    """One stream for a worker's quantized tensors, which are decoded and encoded on it, and two
    pinned buffers to read into.

    While the device decodes one part the next is read; the other workers have streams of their own.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: list[HostBuffer | None] = [None, None]
        with failures_of(device):
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._uploaded = [torch.cuda.Event(blocking=True) for _ in self._buffers]  # type: ignore[no-untyped-call]
        self._next = 0

    @contextmanager
    def active(self) -> Iterator[None]:
        """What is computed inside runs on this stream."""
        with failures_of(self._device), torch.cuda.stream(self._stream):
            yield

    def upload(self, num_bytes: int, slack_bytes: int, fill: Callable[[HostBuffer], None]) -> Tensor:
        """The bytes that `fill` reads into a buffer, on the device as uint8 [num_bytes]. Inside
        `active`.

        The buffer has room for `slack_bytes` more, which may be before and behind them.
        """
        place, self._next = self._next, 1 - self._next
        self._uploaded[place].synchronize()  # at once where nothing was recorded
        buffer = self._buffers[place]
        if buffer is None or len(buffer.memory) < num_bytes + slack_bytes:
            self._buffers[place] = buffer = pinned_buffer(num_bytes + slack_bytes)
        fill(buffer)
        data = buffer.tensor[buffer.begin : buffer.begin + num_bytes].to(self._device, non_blocking=True)
        self._uploaded[place].record(self._stream)
        return data


def free_bytes(device: torch.device) -> int:
    """The memory that the device has free now; none where there is not even room to start CUDA."""
    try:
        with failures_of(device):
            return torch.cuda.mem_get_info(device)[0]
    except torch.OutOfMemoryError:
        return 0
