"""The reducers of one worker thread, made for all workers before any of them starts."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace

from merge_cli.engine.budget import Budget, fit_memory
from merge_cli.engine.chunk import Chunk, Reduced, Reducer
from merge_cli.engine.reads import Reads
from merge_cli.engine.reducers import kinds
from merge_cli.errors import PmergeError, UsageError
from merge_cli.planning.plan import AVERAGE, MergePlan, WorkItem


class Reducers:
    """One worker's reducers, by kind of work. `at` is the number of the chunk that is worked on,
    for errors.
    """

    def __init__(self, reducers: dict[str, Reducer]) -> None:
        self.at = (-1, -1)
        self._reducers = reducers
        self._in_flight: dict[str, deque[Chunk]] = {kind: deque() for kind in reducers}

    def reduce(self, chunk: Chunk) -> Iterator[Reduced]:
        """Start a chunk; the outcomes of those that have to be finished now."""
        kind = chunk.kind
        reducer, in_flight = self._reducers[kind], self._in_flight[kind]
        self.at = chunk.number
        reducer.start(chunk)
        in_flight.append(chunk)
        while len(in_flight) > reducer.depth:
            yield from self._finish(kind)

    def drain(self) -> Iterator[Reduced]:
        """The outcomes of all chunks that are in flight."""
        for kind, in_flight in self._in_flight.items():
            while in_flight:
                yield from self._finish(kind)

    def close(self) -> None:
        """Wait until no device uses memory of the reducers any more."""
        for reducer in self._reducers.values():
            reducer.close()

    @property
    def notes(self) -> list[str]:
        """Deviations from the plan, for people."""
        return [note for reducer in self._reducers.values() for note in getattr(reducer, "notes", ())]

    def _finish(self, kind: str) -> Iterator[Reduced]:
        self.at = self._in_flight[kind].popleft().number
        yield from self._reducers[kind].finish()


def make_reducers(
    plan: MergePlan, work: Sequence[WorkItem], budget: Budget, reads: Sequence[Reads]
) -> tuple[list[Reducers], Budget, list[str]]:
    """The reducers of each worker, the budget that they keep to, and notes.

    Where the device has no memory for them, they are made again with less, down to the smallest
    chunk. Raises PmergeError when not even that fits.
    """
    planned, device = budget, budget.device
    if not device.is_accelerator:
        return [_make(plan, work, budget, each) for each in reads[: budget.workers]], budget, []
    import torch

    notes: list[str] = []
    while True:
        try:
            return [_make(plan, work, budget, each) for each in reads[: budget.workers]], budget, notes
        except torch.OutOfMemoryError:
            pass  # what was made is freed only now that its traceback is gone
        device.release_freed()
        try:
            half, direct = budget.device_bytes // 2, budget.size.slack_bytes > 0
            reducer = work[0].reducer if work else AVERAGE
            smaller = fit_memory(plan, budget.bytes, device, budget.workers, half, budget.size.num_bytes, direct, reducer=reducer)
        except UsageError as error:
            raise PmergeError(
                f"{device.name} has too little free memory",
                details=[f"expected  at least {budget.device_bytes} bytes"],
                hint="--device cpu  gives the same bytes",
            ) from error
        budget = replace(smaller, bytes=budget.bytes)
        notes = [
            f"{device.name} was out of memory: {budget.workers} threads with chunks of {budget.size.num_bytes}"
            f" bytes instead of {planned.workers} with {planned.size.num_bytes}"
        ]


def _make(plan: MergePlan, work: Sequence[WorkItem], budget: Budget, reads: Reads) -> Reducers:
    device = budget.device
    found = {kind: kinds.class_of(kind, device)(plan, budget.size, device, reads) for kind in kinds.kinds_in(plan, work)}
    return Reducers(found)
