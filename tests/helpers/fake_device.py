"""A device whose operations run late and out of order, as far as the events that were declared
allow. For tests only.

Nothing that is submitted runs at once. At every call seeded random numbers decide which of the
operations that may run now do: those whose queue has come to them and whose `after` are done. A
wait runs no more than it must, in any order. So whatever forgets an event, or overwrites a buffer
too early, computes wrong bytes here, and the same wrong bytes for the same seed; with a thread that
sleeps such mistakes would show only sometimes.

Memory of the device is CPU memory, counted against `capacity`. `failure` raises at a chosen
submission: when it is submitted, and then the operation may run nevertheless, as a part of it would
on CUDA; or when it runs, and then every later wait fails.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from merge_cli.engine.buffers import HostBuffer, page_aligned
from merge_cli.engine.device import CPU, Device
from merge_cli.errors import PmergeError


@dataclass(eq=False)
class Operation:
    """Something submitted, which stands for its own end."""

    run: Callable[[], object]
    after: tuple[Operation, ...]
    is_done: bool = False


@dataclass
class Failure:
    """Raise `error` at submission number `at` (of all workers): at once, or `late`, when it runs."""

    at: int
    error: BaseException
    late: bool = False


@dataclass
class World:
    """What the queues of all workers share, and what tests look at. `seems`: the memory that is
    said to be free.

    `eagerness`: how likely operations run before they are waited for.
    """

    seed: int = 0
    capacity: int = 1 << 40
    seems: int = 1 << 40
    eagerness: float = 0.4
    failure: Failure | None = None
    allocated: int = 0
    host_allocated: int = 0
    submitted: int = 0
    longest: int = 0
    made: list[FakeQueues] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def next_failure(self) -> Failure | None:
        with self.lock:
            self.submitted += 1
            return self.failure if self.failure is not None and self.failure.at == self.submitted - 1 else None

    def pending(self) -> int:
        """The operations that were left in the queues."""
        return sum(queues.pending() for queues in self.made)


class FakeQueues:
    """The queues of one worker."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._random = random.Random(world.seed)
        self._queues: dict[str, deque[Operation]] = {}
        self._error: BaseException | None = None
        world.made.append(self)

    def pending(self) -> int:
        return sum(map(len, self._queues.values()))

    def host_buffer(self, num_bytes: int) -> HostBuffer:
        self._world.host_allocated += 1 << (num_bytes - 1).bit_length()
        return page_aligned(num_bytes)

    def memory(self, num_bytes: int) -> Tensor:
        world = self._world
        if world.allocated + num_bytes > world.capacity:
            raise torch.OutOfMemoryError("fake device out of memory")
        world.allocated += num_bytes
        return torch.full((num_bytes,), 0xFF, dtype=torch.uint8)  # NaN, so that what is read too early shows

    def submit(self, queue: str, operation: Callable[[], object], after: Sequence[Operation] = ()) -> Operation:
        failure = self._world.next_failure()
        submitted = Operation(operation if failure is None or not failure.late else failing(failure.error), tuple(after))
        self._queues.setdefault(queue, deque()).append(submitted)
        if failure is not None and not failure.late:
            raise failure.error
        self._world.longest = max(self._world.longest, self.pending())
        while self._random.random() < self._world.eagerness and self._step(set(self._queues)):
            pass
        return submitted

    def wait(self, event: Operation) -> None:
        while not event.is_done:
            assert self._step(self._needed(event)), "the events wait for each other"
        if self._error is not None:
            raise self._error

    def wait_for_all(self) -> None:
        while self._step(set(self._queues)):
            pass
        assert not any(self._queues.values())

    def _needed(self, event: Operation) -> set[str]:
        """The queues whose first operation has to run before `event` can."""
        needed: set[str] = set()
        wanted = [event]
        while wanted:
            each = wanted.pop()
            for name, queue in self._queues.items():
                if each in queue and name not in needed:
                    needed.add(name)
                    before = list(queue)[: queue.index(each) + 1]
                    wanted += [other for operation in before for other in operation.after if not other.is_done]
        return needed

    def _step(self, queues: set[str]) -> bool:
        """Run one operation at the head of one of `queues` that may run now. False where none may."""
        ready = [name for name in sorted(queues) if self._queues[name] and all(o.is_done for o in self._queues[name][0].after)]
        if not ready:
            return False
        operation = self._queues[self._random.choice(ready)].popleft()
        if self._error is None:
            try:
                operation.run()
            except PmergeError as error:
                self._error = error
        operation.is_done = True
        return True


def failing(error: BaseException) -> Callable[[], object]:
    """An operation that fails."""

    def run() -> None:
        raise error

    return run


@dataclass(frozen=True)
class FakeDevice(Device):
    """An accelerator for plain tensors; what is quantized is computed on the CPU."""

    world: World = field(default_factory=World)

    @property
    def torch(self) -> torch.device:
        return CPU.torch

    def queues(self) -> FakeQueues:
        return FakeQueues(self.world)

    def stream(self) -> None:
        return None

    def free_bytes(self) -> int:
        return self.world.seems

    def release_freed(self) -> None:
        self.world.allocated = self.world.host_allocated = 0
