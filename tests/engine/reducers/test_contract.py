"""The promises of `Reducer` (merge_cli/engine/chunk.py), which every reducer keeps: one class of
tests, run on each of them.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import training_run, write_run
from fake_device import FakeDevice, World
from schemes import quantized_run

from merge_cli import average, plan_average
from merge_cli.engine.chunk import Chunk, ChunkSize, Reduced, Reducer
from merge_cli.engine.device import CPU, Device
from merge_cli.engine.kernels.native import VARIABLE
from merge_cli.engine.reader import InputFiles
from merge_cli.engine.reads import Reads, StoppedError
from merge_cli.engine.reducers.copying import CopyingReducer
from merge_cli.engine.reducers.cpu import CpuReducer
from merge_cli.engine.reducers.fallback import WithCpu
from merge_cli.engine.reducers.gram import GramReducer, GramTotals
from merge_cli.engine.reducers.kinds import COPIES, DECODED, QUANTIZED, SUMS, kind_of
from merge_cli.engine.reducers.native import NativeReducer
from merge_cli.engine.reducers.native_quantized import NativeQuantizedReducer
from merge_cli.engine.reducers.quantized import QuantizedReducer
from merge_cli.engine.schedule import chunk_step
from merge_cli.errors import NonFiniteError
from merge_cli.planning.plan import AVERAGE, GRAM, MergePlan, WorkItem

SMALL = ChunkSize(4096, 4096 * 8, 4096)
SIZES = [SMALL, ChunkSize(20_480, 20_480 * 8, 16_384, together=2), ChunkSize(1 << 17, 8 << 17, 1 << 17, together=3)]
NUM_INPUTS = 3


@dataclass
class Case:
    """A reducer with the work that is for it: the extents of `kinds` in a run of that name."""

    reducer: type[Any]
    run: str
    kinds: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    device: Device = CPU
    name: str = AVERAGE

    def chunks(self, plan: MergePlan, size: ChunkSize) -> Iterator[Chunk]:
        count = 0
        for file in plan.files:
            item = WorkItem.whole(file, tuple(range(len(plan.outputs))), self.name)
            for extent in file.extents:
                kind = kind_of(extent, self.name)
                end = extent.num_rows if extent.kind == "coded" else extent.num_elements
                for first in range(0, end, chunk_step(extent, size, self.name)) if kind in self.kinds else ():
                    yield Chunk((0, count), item, extent, first, min(first + chunk_step(extent, size, self.name), end), kind)
                    count += 1


CODED = (QUANTIZED, DECODED)
CASES = {
    "cpu": Case(CpuReducer, "plain", (SUMS,)),
    "cpu, several terms": Case(CpuReducer, "plain", (SUMS,), {"method": "ema"}),
    "native": Case(NativeReducer, "plain", (SUMS,)),
    "native, several terms": Case(NativeReducer, "plain", (SUMS,), {"method": "ema"}),
    "pipeline": Case(WithCpu, "plain", (SUMS,), device=FakeDevice("fake", World(1))),
    "pipeline, eager device": Case(WithCpu, "plain", (SUMS,), {"method": "ema"}, FakeDevice("fake", World(2, eagerness=0.9))),
    "copying": Case(CopyingReducer, "plain", (COPIES,), {"exclude": ["*.b"]}),
    "quantized": Case(QuantizedReducer, "DeepSeek-V3", CODED),
    "quantized, encoded again": Case(QuantizedReducer, "nvfp4", CODED, {"requantize": True}),
    "quantized, native": Case(NativeQuantizedReducer, "DeepSeek-V3", (DECODED,)),
    "gram": Case(GramReducer, "plain", (GRAM,), name=GRAM),
    "gram, quantized": Case(GramReducer, "DeepSeek-V3", (GRAM,), name=GRAM),
}


def write_inputs(folder: Path, run: str) -> list[Path]:
    if run != "plain":
        return quantized_run(folder, run, NUM_INPUTS)[0]
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "layers.a": torch.randn(50_001, generator=generator).bfloat16(),
        "layers.b": torch.randn(9, 5_001, generator=generator),
        "layers.c": torch.randn(30_003, generator=generator).half(),
        "count": torch.arange(9_000),
    }
    return write_run(folder, training_run(tensors, NUM_INPUTS), shards=2)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reducers")


@cache
def planned(place: Path, case: str) -> tuple[MergePlan, Path]:
    """The plan of a case, and the result that the whole tool makes of it with torch alone."""
    found = CASES[case]
    folder = place / case
    paths = write_inputs(folder / "run", found.run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, "torch")
        result = average(paths, folder / "out", device="cpu", **found.options).output
    return plan_average(paths, folder / "new", device="cpu", **found.options).merge, result


def outcomes(case: Case, plan: MergePlan, size: ChunkSize, stopped: threading.Event | None = None) -> Iterator[Reduced]:
    """Drive a reducer as a worker does; each outcome is checked to be of the chunk whose turn it
    is.
    """
    with InputFiles() as inputs:
        reads = Reads(inputs, stopped)
        reducer: Reducer = case.reducer(plan, size, case.device, reads)
        started: deque[Chunk] = deque()

        def finish() -> Iterator[Reduced]:
            chunk = started.popleft()
            for outcome in reducer.finish():
                assert outcome.chunk is chunk
                yield outcome

        try:
            for chunk in case.chunks(plan, size):
                reducer.start(chunk)
                started.append(chunk)
                while len(started) > reducer.depth:
                    yield from finish()
            while started:
                yield from finish()
            assert reads.counts.num_bytes > 0
        finally:
            reducer.close()


def bytes_of(case: Case, plan: MergePlan, size: ChunkSize) -> dict[str, dict[int, bytes]]:
    """File -> offset -> bytes of everything that is written; no byte is written twice."""
    found: dict[str, dict[int, bytes]] = {}
    for outcome in outcomes(case, plan, size):
        for k, writes in outcome.writes.items():
            assert k in outcome.chunk.item.outputs
            for offset, data in writes:
                if len(data):
                    assert offset not in found.setdefault(outcome.chunk.item.file.name, {})
                    found[outcome.chunk.item.file.name][offset] = bytes(data)
    return found


@pytest.mark.parametrize("name", CASES)
class TestReducer:
    @pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size.elements} elements")
    def test_it_gives_each_byte_of_its_work_once_and_no_other(self, name: str, size: ChunkSize, place: Path) -> None:
        case, (plan, result) = CASES[name], planned(place, name)
        if case.name == GRAM:
            assert not any(outcome.writes for outcome in outcomes(case, plan, size))
            return
        found = bytes_of(case, plan, size)
        wanted = sum(chunk.extent.bytes_written(chunk.first, chunk.end) for chunk in case.chunks(plan, size))
        assert sum(len(data) for writes in found.values() for data in writes.values()) == wanted > 0
        for file, writes in found.items():
            whole = (result / file).read_bytes()
            for offset, data in writes.items():
                is_equal = whole[offset : offset + len(data)] == data  # pytest would take minutes to show how they differ
                assert is_equal, f"{file} at byte {offset}"

    def test_values_do_not_depend_on_the_size_of_chunks(self, name: str, place: Path) -> None:
        case, (plan, _) = CASES[name], planned(place, name)
        totals = []
        for size in SIZES:
            sink = GramTotals()
            for outcome in outcomes(case, plan, size):
                if outcome.values is not None:
                    sink.take(outcome.chunk, outcome.values)
            totals.append(sink.totals())
        assert totals[0] == totals[1] == totals[2]
        assert bool(totals[0]) == (case.name == GRAM)

    def test_it_ends_between_two_reads_when_the_run_is_to_stop(self, name: str, place: Path) -> None:
        stopped = threading.Event()
        stopped.set()
        with pytest.raises(StoppedError):
            list(outcomes(CASES[name], planned(place, name)[0], SMALL, stopped))

    def test_it_can_be_closed_with_chunks_in_flight(self, name: str, place: Path) -> None:
        case, (plan, _) = CASES[name], planned(place, name)
        with InputFiles() as inputs:
            reducer = case.reducer(plan, SMALL, case.device, Reads(inputs))
            chunks = case.chunks(plan, SMALL)
            for _ in range(reducer.depth + 1):
                if (chunk := next(chunks, None)) is not None:
                    reducer.start(chunk)
            reducer.close()
        if isinstance(case.device, FakeDevice):
            assert case.device.world.pending() == 0

    def test_it_takes_the_memory_that_it_states(self, name: str, place: Path) -> None:
        case, (plan, _) = CASES[name], planned(place, name)
        memories = [case.reducer.memory(plan, size, case.device) for size in SIZES]
        assert [each.host for each in memories] == sorted(each.host for each in memories) and memories[0].host > 0
        assert all(bool(each.device) == case.device.is_accelerator for each in memories)
        if isinstance(case.device, FakeDevice):
            for size, memory in zip(SIZES, memories, strict=True):
                case.device.release_freed()
                with InputFiles() as inputs:
                    case.reducer(plan, size, case.device, Reads(inputs)).close()
                assert 0 < case.device.world.allocated <= memory.device
                assert case.device.world.host_allocated <= memory.host


LOOKED_AT = [name for name, case in CASES.items() if case.run == "plain" and COPIES not in case.kinds]


@pytest.mark.parametrize("name", LOOKED_AT)
def test_nan_is_an_error_that_names_the_tensor(name: str, tmp_path: Path) -> None:
    """Not for copies, nor for codes: most schemes have none that is NaN."""
    case = CASES[name]
    tensors = [{"layers.a": torch.ones(5_000), "layers.b": torch.ones(5_000)} for _ in range(NUM_INPUTS)]
    tensors[1]["layers.b"][4_321] = torch.nan
    plan = plan_average(write_run(tmp_path / "run", tensors), tmp_path / "out", device="cpu", **case.options).merge
    sink = GramTotals()
    with pytest.raises(NonFiniteError, match=r"`layers\.b` has NaN"):
        for outcome in outcomes(case, plan, SMALL):
            if outcome.values is not None:
                sink.take(outcome.chunk, outcome.values)
