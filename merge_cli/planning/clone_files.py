"""The files of a distributed checkpoint to be written: extents for the values and the copies, gaps
for the bytes between them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from merge_cli.errors import UsageError
from merge_cli.formats.checkpoint import Checkpoint
from merge_cli.formats.dcp.checkpoint import chunk_key
from merge_cli.formats.dcp.clone import CloneFile, Copied, DcpParts
from merge_cli.formats.dcp.entries import AVERAGE, BASE
from merge_cli.formats.dcp.item import Envelope
from merge_cli.formats.weight_file import WeightFile
from merge_cli.planning.extent import Location
from merge_cli.planning.extent_builder import ExtentBuilder
from merge_cli.planning.extents import Entry
from merge_cli.planning.plan import Gap, Output, OutputFile
from merge_cli.request.spec import MergeSpec
from merge_cli.stores.store import join

Add = Callable[[ExtentBuilder, Entry, int], None]
"""`add(builder, entry, offset)`: add the extent that makes `entry` from byte `offset` on."""


def check_clone(spec: MergeSpec, base: Checkpoint, outputs: Sequence[Output]) -> None:
    """Raise UsageError for options that the layout of a distributed checkpoint does not allow."""
    for given, flag, why in (
        (spec.dtype != "keep", "--dtype", "keeps the dtypes of its items"),
        (spec.shard_bytes is not None, "--shard-size", "keeps its own files"),
    ):
        if given:
            raise UsageError(
                f"{flag} cannot be used with {base.path}: a distributed checkpoint {why}",
                hint=f"leave {flag} out, or write whole tensors:  --format safetensors",
            )
    if spec.training_state == AVERAGE and any(c < 0 for output in outputs for c in output.coefficients.values):
        raise UsageError(
            f"--training-state average cannot be used with {spec.method}: it has negative coefficients, and second moments"
            " must not become negative",
            hint=f"--training-state {BASE}",
        )


def clone_files(base: Checkpoint, entries: Sequence[Entry], add: Add) -> tuple[OutputFile, ...]:
    """The files of a result in the layout of `base`, a distributed checkpoint; `entries` are its
    chunks.
    """
    assert base.dcp is not None
    by_name = {entry.name: entry for entry in entries}
    weights = {file.name: file for file in base.files}
    return tuple(_clone_file(base.dcp, file, by_name, weights, add) for file in base.dcp.clone.files)


def _clone_file(
    parts: DcpParts, file: CloneFile, entries: Mapping[str, Entry], weights: Mapping[str, WeightFile], add: Add
) -> OutputFile:
    name = join(parts.place.inside, file.name) if parts.place.inside else file.name
    builder, frame = ExtentBuilder(), _Frame()
    names: list[str] = []
    for part in file.parts:
        if isinstance(part, Copied):
            frame.close()
            end = part.offset + part.item.length
            source = Location(weights[name], part.item.offset, "U8")
            builder.add(part.fqn, "copy", "U8", part.offset, end, part.item.length, [(source, part.item.length)])
            continue
        envelope = part.payload.envelope
        key = chunk_key(part.fqn, parts.folder.metadata.tensors[part.fqn], part.chunk, part.payload.strides)
        names.append(key)
        frame.add(part.begin, envelope.head)
        if part.payload.num_bytes:
            frame.close()
            add(builder, entries[key], part.offset)
            frame.begin_behind(part.end, envelope)
        else:
            frame.add(part.end, envelope.trailer(0))
    frame.close()
    return OutputFile(name, frame.header, file.num_bytes, builder.finish(), tuple(names), tuple(frame.gaps))


class _Frame:
    """The bytes between values, joined: those at the beginning are the `header`, the others `gaps`."""

    def __init__(self) -> None:
        self.header = b""
        self.gaps: list[Gap] = []
        self._begin = 0
        self._behind: Envelope | None = None
        self._rest: list[bytes] = []

    def add(self, offset: int, data: bytes) -> None:
        if self._behind is None and not self._rest:
            self._begin = offset
        self._rest.append(data)

    def begin_behind(self, offset: int, envelope: Envelope) -> None:
        """Go on behind values that end at `offset`."""
        self._begin, self._behind = offset, envelope

    def close(self) -> None:
        """What follows is values."""
        rest = self._rest[0] if len(self._rest) == 1 else b"".join(self._rest)  # mostly the one head that many items share
        if self._behind is not None:
            self.gaps.append(Gap(self._begin, self._behind.tail_bytes + len(rest), self._behind.trailer, rest))
        elif rest and self._begin == 0:
            self.header = rest
        elif rest:
            self.gaps.append(Gap(self._begin, len(rest), None, rest))
        self._behind, self._rest = None, []
