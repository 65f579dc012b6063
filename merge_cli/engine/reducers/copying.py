"""Tensors whose bytes are taken over as they are: copies, and integers that are equal in all
inputs.
"""

from __future__ import annotations

from collections.abc import Iterator

from merge_cli.engine.buffers import page_aligned
from merge_cli.engine.chunk import Chunk, ChunkSize, Memory, Reduced
from merge_cli.engine.device import Device
from merge_cli.engine.reads import Reads
from merge_cli.planning.extent import Extent
from merge_cli.planning.plan import MergePlan


class CopyingReducer:
    """Reads the bytes of each output's base, and gives them on. One buffer, whatever the number of
    bases.
    """

    depth = 0

    def __init__(self, plan: MergePlan, size: ChunkSize, device: Device, reads: Reads) -> None:
        self._plan = plan
        self._reads = reads
        self._buffer = page_aligned(size.num_bytes + size.slack_bytes)
        self._chunk: Chunk | None = None

    def start(self, chunk: Chunk) -> None:
        self._chunk = chunk

    def finish(self) -> Iterator[Reduced]:
        chunk = self._chunk
        assert chunk is not None and isinstance(chunk.extent, Extent)
        takers: dict[int, list[int]] = {}
        for k in chunk.item.outputs:
            takers.setdefault(self._plan.base_of(chunk.extent, k), []).append(k)
        for base, outputs in takers.items():
            size = self._reads.elements(chunk.extent.sources[base], chunk.first, chunk.end, self._buffer)
            written = [(chunk.extent.byte_at(chunk.first), self._buffer.data(size))]
            yield Reduced(chunk, {k: written for k in outputs})

    def close(self) -> None:
        pass

    @classmethod
    def memory(cls, plan: MergePlan, size: ChunkSize, device: Device) -> Memory:
        return Memory(size.num_bytes + size.slack_bytes)
