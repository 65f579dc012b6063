"""The tensors of a result computed again from its recorded inputs and coefficients.

By the engine and the plan that made them, with a comparison in place of every write: tensor by
tensor and bit for bit, in the bounded memory of any run.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from merge_cli.engine.chunk import Statistics
from merge_cli.engine.input_checks import check_inputs_unchanged
from merge_cli.engine.sink import NoSink
from merge_cli.engine.stream import stream
from merge_cli.errors import ChangedError, MismatchError, NonFiniteError
from merge_cli.formats.safetensors import DTYPES, parse_header
from merge_cli.names import MANIFEST
from merge_cli.planning.extent import Extent, Location, QuantizedExtent
from merge_cli.planning.plan import MergePlan, OutputFile, WorkItem
from merge_cli.request.spec import RunConfig
from merge_cli.system.files import read_up_to
from merge_cli.tuning.tune import tune


def tensors_of(plan: MergePlan) -> set[str]:
    """The tensors of the plan that have elements."""
    return {key for file in plan.files for extent in file.extents for key in extent.keys}


def restricted(plan: MergePlan, sample: int | None) -> MergePlan:
    """The same plan for `sample` tensors drawn at random, all of them for None."""
    keys = sorted(tensors_of(plan))
    chosen = set(keys) if sample is None or sample >= len(keys) else set(random.sample(keys, sample))
    files = [
        replace(f, extents=tuple(part for extent in f.extents for part in _restricted_extent(extent, chosen))) for f in plan.files
    ]
    return replace(plan, files=tuple(file for file in files if file.extents))


def _restricted_extent(extent: Extent | QuantizedExtent, chosen: set[str]) -> Iterator[Extent | QuantizedExtent]:
    if chosen.issuperset(extent.keys):
        yield extent
    elif isinstance(extent, Extent):
        for key, start, end in zip(extent.keys, extent.starts, (*extent.starts[1:], extent.num_elements), strict=True):
            if key in chosen:
                sources = tuple(Location(s.file, s.offset + DTYPES[s.dtype].num_bytes(start), s.dtype) for s in extent.sources)
                offset = extent.byte_at(start)
                yield replace(extent, offset=offset, num_elements=end - start, sources=sources, keys=(key,), starts=(0,))


def differing_tensors(
    todo: MergePlan, manifest: Mapping[str, Any], folder: Path, device: str, add_bytes: Callable[[int], None]
) -> list[str]:
    """Carry out the plan, with a comparison in place of every write: a line for each tensor that
    differs, and for each whose recorded count of NaN and Inf does. `add_bytes` is called with the
    bytes that were read.
    """
    sink = _Comparing(folder, add_bytes)
    try:
        budget = tune(todo, RunConfig(device=device, direct="off")).fit(todo)
        stream(todo, [WorkItem.whole(file) for file in todo.files], sink, budget)
        check_inputs_unchanged(todo)
    except (ChangedError, MismatchError, NonFiniteError) as error:
        return [f"the inputs cannot be averaged again: {error.message}"]
    found = [
        f"{folder / name}: `{key}` is not what its inputs and coefficients give"
        for name, keys in sorted(sink.different.items())
        for key in sorted(keys)
    ]
    counted = {key: count for _, counts in sorted(sink.nonfinite.items()) for key, count in counts.items()}
    recorded = manifest.get("nonfinite", counted)
    for key in sorted(tensors_of(todo)):
        if recorded.get(key, 0) != counted.get(key, 0):
            was = f"{recorded.get(key, 0)!r:.40}"
            found.append(f"{folder / MANIFEST}: `nonfinite` counts {was} in `{key}`, its inputs have {counted.get(key, 0)}")
    return found


class _Comparing(NoSink):
    """The sink of the loop: compares, and keeps the differences and the counts of NaN and Inf."""

    def __init__(self, folder: Path, add_bytes: Callable[[int], None]) -> None:
        self.different: dict[str, set[str]] = {}
        self.nonfinite: dict[str, Mapping[str, int]] = {}
        self._folder = folder
        self._add_bytes = add_bytes
        self._bytes_read = 0

    def open(self, item: WorkItem, k: int) -> _Comparer:
        return _Comparer(item, self._folder, self.different)

    def done(self, item: WorkItem, k: int, sha256: str, nonfinite: Mapping[str, int]) -> None:
        self.nonfinite[item.file.name] = nonfinite

    def progress(self, statistics: Statistics) -> None:
        self._add_bytes(statistics.bytes_read - self._bytes_read)
        self._bytes_read = statistics.bytes_read


class _Comparer:
    """Takes the place of a file's writer: what would be written is compared with what is there.

    A file that is missing is a problem of its own, and compared with nothing here.
    """

    is_finished = False

    def __init__(self, item: WorkItem, folder: Path, different: dict[str, set[str]]) -> None:
        self._name = item.file.name
        self._different = different
        self._tensors = _places(item.file)
        self._remaining = item.bytes_to_write
        self._lock = threading.Lock()
        try:
            self._fd = os.open(folder / self._name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            self._fd = -1

    def write(self, offset: int, data: memoryview) -> bool:
        if self._fd >= 0:
            there = memoryview(read_up_to(self._fd, len(data), offset))
            if there != data:
                end = offset + len(data)
                found = {
                    name
                    for name, start, stop in self._tensors
                    if start < end and offset < stop and _part(there, offset, start, stop) != _part(data, offset, start, stop)
                }
                self._different.setdefault(self._name, set()).update(found)
        with self._lock:
            self._remaining -= len(data)
            return self._remaining == 0

    def finish(self) -> str:
        self.abandon()
        return ""

    def abandon(self) -> None:
        self.is_finished = True
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _places(file: OutputFile) -> list[tuple[str, int, int]]:
    """The tensors of an output file and where their bytes begin and end in it."""
    if not file.name.endswith(".safetensors"):
        return [place for extent in file.extents if isinstance(extent, Extent) for place in extent.places()]
    header = parse_header(file.header[8:], file.file_bytes, file.name)
    return [(name, header.data_start + info.start, header.data_start + info.end) for name, info in header.tensors.items()]


def _part(data: memoryview, offset: int, start: int, stop: int) -> memoryview:
    """Of `data`, which begins at byte `offset` of a file, what lies in bytes `start` to `stop`."""
    return data[max(start - offset, 0) : max(stop - offset, 0)]
