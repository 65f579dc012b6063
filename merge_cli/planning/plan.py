"""The plan of a merge: immutable data made from headers and coefficients alone, before a weight is
read.

The plan fixes which output files there will be, every byte offset in them, and which bytes of which
inputs each of those bytes comes from. All that can be wrong with a set of checkpoints surfaces
here, in seconds: a missing tensor, another shape, a format that cannot be averaged. It does not say
how the work is done (device, memory, threads): output bytes depend on the plan alone.

The unit of the plan is the `Extent`: adjacent tensors of one output file that are also adjacent in
every input and are treated alike. A checkpoint with 100,000 small tensors has a few hundred runs,
so the work per tensor stays small. The engine cuts runs into chunks of whatever size fits its
memory. A tensor that is quantized, in an input or in the output, has a `QuantizedExtent` of its
own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

from merge_cli.formats.checkpoint import Checkpoint
from merge_cli.planning.extent import Extent, QuantizedExtent
from merge_cli.planning.sums import WeightedSum, weighted_sum
from merge_cli.request.coefficients import IDENTITY, Coefficients
from merge_cli.request.spec import MergeSpec

ALGORITHM = 1
"""Raised whenever the same request would give other bytes; part of the fingerprint, so that a
resumed run never mixes two.
"""
AVERAGE, GRAM = "average", "gram"
"""The reducers that a work item can name: weighted sums that are written, inner products that are
handed to the sink.
"""


@dataclass(frozen=True)
class Gap:
    """Bytes of a file between its values: `num_bytes` from `offset` on. Values end where it begins,
    or nothing does.

    First `trailer(crc)`, by the CRC-32 of all bytes since the last gap or the header, if there is
    one; then `rest`.
    """

    offset: int
    num_bytes: int
    trailer: Callable[[int], bytes] | None
    rest: bytes

    @property
    def end(self) -> int:
        return self.offset + self.num_bytes

    def make(self, crc: int) -> bytes:
        """The bytes, behind values of this CRC-32."""
        return self.rest if self.trailer is None else self.trailer(crc) + self.rest


@dataclass(frozen=True)
class OutputFile:
    """One file to be written: its header's bytes, its final size, and the extents that fill it.

    In a distributed checkpoint there are `gaps` between the values, by ascending offset; no extent
    reaches into one.
    """

    name: str
    header: bytes
    file_bytes: int
    extents: tuple[Extent | QuantizedExtent, ...]
    names: tuple[str, ...]
    gaps: tuple[Gap, ...] = ()

    @property
    def value_bytes(self) -> int:
        """The bytes that the extents fill."""
        return self.file_bytes - len(self.header) - sum(gap.num_bytes for gap in self.gaps)

    def frame_sha256(self) -> str:
        """The sha256 of all other bytes, as they would be around values of CRC-32 zero."""
        found = hashlib.sha256(self.header)
        for gap in self.gaps:
            found.update(b"%d:" % gap.offset + gap.make(0))
        return found.hexdigest()


class WorkItem(NamedTuple):
    """Bytes `begin` to `end` of one output file, for some of the plan's outputs: the unit that is
    claimed, opened and recorded.

    `reducer` names the one of `engine/reducers` that its extents are given to.
    """

    file: OutputFile
    outputs: tuple[int, ...]
    begin: int
    end: int
    reducer: str = AVERAGE

    @classmethod
    def whole(cls, file: OutputFile, outputs: tuple[int, ...] = (0,), reducer: str = AVERAGE) -> WorkItem:
        """All bytes of `file`."""
        return cls(file, outputs, 0, file.file_bytes, reducer)

    @property
    def is_whole(self) -> bool:
        """Whether this is all of the file."""
        return (self.begin, self.end) == (0, self.file.file_bytes)

    @property
    def name(self) -> str:
        """A name that no other byte range of any file has."""
        return self.file.name if self.is_whole else f"{self.file.name}@{self.begin}-{self.end}"

    def parts(self) -> Iterator[tuple[Extent | QuantizedExtent, int, int]]:
        """The runs in it, each with its first element (row, for quantized tensors) and its end."""
        for extent in self.file.extents:
            first, last = extent.between(self.begin, self.end)
            if last > first or (self.is_whole and isinstance(extent, QuantizedExtent)):
                yield extent, first, last

    @property
    def bytes_to_write(self) -> int:
        """The bytes of its data for one output."""
        return sum(extent.bytes_written(first, last) for extent, first, last in self.parts())


@dataclass(frozen=True)
class Output:
    """One merged checkpoint: the coefficient of each of its inputs, by ascending position in the
    plan's inputs.

    `base` is the position of the input that integers, config and side files come from.
    """

    inputs: tuple[int, ...]
    coefficients: Coefficients
    base: int


@dataclass(frozen=True)
class MergePlan:
    """K outputs from N inputs that share one layout, the base's. `steps` and `inputs` run from
    oldest to newest.

    `dequantized`: the base is quantized and the output is not, so config.json and side files must
    not say that it is. `notes` describe tensors that are not simply averaged,
    `warnings` what may be wrong.
    """

    spec: MergeSpec
    inputs: tuple[Checkpoint, ...]
    steps: tuple[int | None, ...]
    base: int
    outputs: tuple[Output, ...]
    files: tuple[OutputFile, ...]
    warnings: tuple[str, ...] = field(default=())
    notes: tuple[str, ...] = field(default=())
    dequantized: bool = False

    def operation(self, extent: Extent | QuantizedExtent, k: int) -> WeightedSum:
        """The sum that makes output `k` of `extent`, with the dtype in which it is summed."""
        output = self.outputs[k]
        inputs, chosen = ((0,), IDENTITY) if extent.is_copy else (output.inputs, output.coefficients)
        dtypes = [extent.value_dtypes[i] for i in inputs]
        return weighted_sum(inputs, chosen, self.spec.accumulate, dtypes, extent.written_dtype)

    def base_of(self, extent: Extent, k: int) -> int:
        """The position among the sources of `extent` of the input whose bytes output `k` takes over
        unchanged.
        """
        return 0 if extent.is_copy else self.outputs[k].base

    @cached_property
    def bytes_to_read(self) -> int:
        """The bytes of weights that are read from all inputs together."""
        return sum(extent.bytes_read for file in self.files for extent in file.extents)

    def bytes_of_inputs(self) -> list[int]:
        """The bytes of weights that are read from each input. Not for plans with runs that are
        copies: those have one source.
        """
        totals = [0] * len(self.inputs)
        for extent in (extent for file in self.files for extent in file.extents):
            for i, size in enumerate(extent.source_bytes):
                totals[i] += size
        return totals

    def single_output(self, k: int, spec: MergeSpec) -> MergePlan:
        """Output `k` as the one output of a plan, enough for fingerprint, manifest and
        index: its files come without their extents.

        It has the fingerprint of the plan that is made for this output by itself.
        """
        output = self.outputs[k]
        count = len(output.inputs)
        return MergePlan(
            spec,
            tuple(self.inputs[i] for i in output.inputs),
            tuple(self.steps[i] for i in output.inputs),
            output.inputs.index(output.base),
            (Output(tuple(range(count)), output.coefficients, output.inputs.index(output.base)),),
            tuple(replace(file, extents=()) for file in self.files),
            dequantized=self.dequantized,
        )

    @property
    def bytes_to_write(self) -> int:
        """The bytes of all weight files of all outputs, headers included."""
        return len(self.outputs) * sum(file.file_bytes for file in self.files)
