"""The units of the loop: a chunk to be reduced, the outcome, and what every reducer promises.

    plan -> chunks -> Reducer -> Sink

A chunk is part of one extent, small enough for memory. A reducer reads its bytes from every input
and gives the bytes of every output, or values for the sink. One reducer belongs to one worker
thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from merge_cli.engine.device import Device
from merge_cli.planning.extent import Extent, QuantizedExtent
from merge_cli.planning.plan import MergePlan, WorkItem

if TYPE_CHECKING:
    from merge_cli.engine.reads import Reads

GRAM_BLOCK_ELEMENTS = 1 << 14
"""Inner products are summed over blocks of so many elements, counted from the beginning of an
extent.
"""


class Chunk(NamedTuple):
    """Elements (rows of a quantized tensor) `first` to `end` of an extent of `item`.

    `number`: (position of the item in the work, of the chunk in the item), ascending in file order.
    `kind` of work: see `reducers/kinds.py`.
    """

    number: tuple[int, int]
    item: WorkItem
    extent: Extent | QuantizedExtent
    first: int
    end: int
    kind: str


@dataclass
class Reduced:
    """The outcome of a chunk, or of a part of one.

    `writes`: output -> (offset in its file, bytes) pairs; the bytes are valid until the next
    outcome is asked for. `nonfinite`: output -> the number of its elements that are NaN or Inf, by
    tensor. `values` are for the sink. `errors`: see `formats/quantization/error.py`.
    """

    chunk: Chunk
    writes: Mapping[int, Sequence[tuple[int, memoryview]]] = field(default_factory=dict)
    nonfinite: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    values: Any = None
    errors: tuple[float, float, float, float] | None = None


class Memory(NamedTuple):
    """Bytes that a reducer holds: of the host, and of an accelerator."""

    host: int
    device: int = 0

    def plus(self, other: Memory) -> Memory:
        return Memory(self.host + other.host, self.device + other.device)


class ChunkSize(NamedTuple):
    """The size of chunks: `elements` of plain tensors, `num_bytes` of them at most, `values` of
    quantized ones.

    Buffers of inputs have `slack_bytes` more, for reading whole blocks of the storage. Of plain
    tensors, `together` inputs are uploaded to an accelerator at once.
    """

    elements: int
    num_bytes: int
    values: int
    slack_bytes: int = 0
    together: int = 1

    @property
    def item_bytes(self) -> int:
        """The bytes of the widest element."""
        return self.num_bytes // self.elements


class Reducer(Protocol):
    """Turns chunks into outcomes. The worker calls `start`, and `finish` while more than `depth`
    chunks are started.

    `finish` gives the outcomes of the oldest started chunk, in one part or several. `close` comes
    after the last one, also after a failure. Errors: NonFiniteError, ChangedError, PmergeError.
    """

    depth: int

    def __init__(self, plan: MergePlan, size: ChunkSize, device: Device, reads: Reads) -> None: ...

    def start(self, chunk: Chunk) -> None: ...

    def finish(self) -> Iterator[Reduced]: ...

    def close(self) -> None: ...

    @classmethod
    def memory(cls, plan: MergePlan, size: ChunkSize, device: Device) -> Memory: ...


@dataclass
class Statistics:
    """Byte and time counters of a run. Times are summed over worker threads; waiting for a chunk
    does not count.

    `requantization_error`: the largest and the mean error that quantizing the averages again has
    added, relative to the largest and the mean magnitude. `notes`: deviations from the plan, for
    people.
    """

    seconds_reading: float = 0.0
    seconds_computing: float = 0.0
    seconds_writing: float = 0.0
    bytes_read: int = 0
    bytes_written: int = 0
    chunks: int = 0
    requantization_error: tuple[float, float] | None = None
    notes: list[str] = field(default_factory=list)

    def plus(self, other: Statistics) -> Statistics:
        """Both together; of errors the larger ones, and every note once."""
        errors = [each for each in (self.requantization_error, other.requantization_error) if each is not None]
        return Statistics(
            self.seconds_reading + other.seconds_reading,
            self.seconds_computing + other.seconds_computing,
            self.seconds_writing + other.seconds_writing,
            self.bytes_read + other.bytes_read,
            self.bytes_written + other.bytes_written,
            self.chunks + other.chunks,
            max(errors, default=None),
            list(dict.fromkeys([*self.notes, *other.notes])),
        )
