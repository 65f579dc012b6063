"""An accelerator's reducer with the CPU behind it, for chunks that the accelerator could not do."""

from __future__ import annotations

from collections.abc import Iterator

from merge_cli.engine.chunk import Chunk, ChunkSize, Memory, Reduced
from merge_cli.engine.device import CPU, Device
from merge_cli.engine.reads import Reads
from merge_cli.engine.reducers.cpu import CpuReducer
from merge_cli.engine.reducers.pipeline import NotReducedError, PipelineReducer
from merge_cli.planning.plan import MergePlan

REDONE_ELEMENTS = 1 << 16
"""At once, on the CPU, of a chunk that an accelerator could not do."""


class WithCpu:
    """Weighted sums on an accelerator.

    A chunk whose results are not finite, or for which the device had no memory, goes to the CPU.
    `notes` say so if memory was the reason: the result is the same.
    """

    def __init__(self, plan: MergePlan, size: ChunkSize, device: Device, reads: Reads) -> None:
        self._device = device
        self._first = PipelineReducer(plan, size, device, reads)
        self._cpu = CpuReducer(plan, _smaller(size), CPU, reads.despite_stop())
        self.depth = self._first.depth
        self.notes: list[str] = []

    def start(self, chunk: Chunk) -> None:
        self._first.start(chunk)

    def finish(self) -> Iterator[Reduced]:
        try:
            yield from self._first.finish()
        except NotReducedError as failed:
            if failed.is_out_of_memory:
                self.notes = [note_on_memory(self._device)]
            self._cpu.start(failed.chunk)
            yield from self._cpu.finish()

    def close(self) -> None:
        self._first.close()

    @classmethod
    def memory(cls, plan: MergePlan, size: ChunkSize, device: Device) -> Memory:
        return PipelineReducer.memory(plan, size, device).plus(CpuReducer.memory(plan, _smaller(size), device))


def note_on_memory(device: Device) -> str:
    """A line for people: memory ran out, and the result is the same."""
    return f"{device.name} was out of memory: the CPU did some of the work, with the same result"


def _smaller(size: ChunkSize) -> ChunkSize:
    elements = min(REDONE_ELEMENTS, size.elements)
    return size._replace(elements=elements, num_bytes=elements * size.item_bytes)
