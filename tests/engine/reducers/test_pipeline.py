"""The order of reading, uploading, computing, copying back and writing, on a device that runs
everything late and out of order.

Checked by mutation: with any one of these taken out of pipeline.py or stream.py, tests below fail.

    _read      the worker's wait for `stage.uploaded` before it reads        a stage is read over before it is uploaded
    _read      `stage.added` as `after` of the upload                        a stage is uploaded over before it is added
    _read      where in the stage an input begins                            slack of a read is added
    _add       the order of the inputs                                       sums are rounded in another order
    start      `stage.uploaded` as `after` of the addition                   what is not there yet is added
    _finish    `rounded` as `after` of copying back                          results are copied before they are rounded
    finish     the wait for `slot.copied_back`                               results are written before they are copied back
    _worker    `_finish` when DEPTH chunks are in flight                     `take` refuses
    _worker    `_finish` of what is in flight at the end                     the last chunks are missing
    _give_up   `wait_for_all`                                                what was half submitted spoils what the CPU makes
    _worker    `ring.close`                                                  operations are left when the buffers are freed
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import digests, nasty_tensors, training_run, write_run
from fake_device import Failure, FakeDevice, FakeQueues, World
from reference import load
from torch import Tensor

from merge_cli import average
from merge_cli.engine.chunk import ChunkSize
from merge_cli.engine.reader import InputFiles
from merge_cli.engine.reducers.pipeline import DEPTH, STAGES, Ring, ring_device_bytes, ring_host_bytes
from merge_cli.errors import NonFiniteError, OutputError, PmergeError, UsageError
from merge_cli.features.average import AverageResult
from merge_cli.planning.extent import Extent, Location
from merge_cli.planning.sums import WeightedSum

METHODS: dict[str, dict[str, Any]] = {"sma": {}, "ema": {"alpha": 0.1}, "weights": {"weights": [0.7, 0.5, -0.3, 0.1]}}
CHUNK_BYTES = 1 << 15
On = Callable[..., AverageResult]


def large_tensors() -> dict[str, Tensor]:
    """Tensors of several chunks, of all dtypes, with what is copied between them."""
    tensors = {"a": torch.randn(70_001).bfloat16(), **nasty_tensors(0)}
    return {**tensors, "z": torch.randn(30_001), "y": torch.randn(9, 5_001).half(), "x": torch.randn(9_001).double()}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_run(tmp_path_factory.mktemp("run"), training_run(large_tensors(), 4, 1), shards=3)


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> On:
    """`average` on a fake device, in small chunks. Nothing may be left in its queues."""

    def run_on(world: World, *arguments: Any, chunk_bytes: int = CHUNK_BYTES, together: int = 4, **options: Any) -> AverageResult:
        with monkeypatch.context() as patched:
            patched.setattr("merge_cli.tuning.backend.choose_device", lambda *_: FakeDevice("fake", world))
            patched.setattr("merge_cli.engine.budget.ACCELERATOR_CHUNK_BYTES", chunk_bytes)
            patched.setattr("merge_cli.engine.budget.STAGE_BYTES", together * chunk_bytes)
            patched.setattr("merge_cli.engine.reducers.fallback.REDONE_ELEMENTS", 1000)
            try:
                return average(*arguments, device="fake", **options)
            finally:
                assert world.pending() == 0

    return run_on


@pytest.fixture(scope="module")
def expected(run: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """What the CPU makes, by method."""
    folder = tmp_path_factory.mktemp("cpu")
    return {m: digests(average(run, folder / m, device="cpu", method=m, **options).output) for m, options in METHODS.items()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(9))
def test_same_bytes_in_whatever_order_the_device_runs(
    seed: int, method: str, run: list[Path], expected: dict[str, dict[str, str]], on: On, tmp_path: Path
) -> None:
    """Uploading one input at a time, two, three (so the last by itself), or all four."""
    world, together = World(seed), 1 + seed % 4
    result = on(world, run, tmp_path / "out", threads=1 + seed % 3, together=together, method=method, **METHODS[method])
    assert digests(result.output) == expected[method]
    assert result.statistics.notes == [] and world.submitted > 100
    assert result.statistics.bytes_read > 0 and result.statistics.seconds_computing > 0


@pytest.mark.parametrize("together", [1, 3, 4])
def test_same_bytes_where_data_begins_inside_blocks_of_the_storage(
    together: int, run: list[Path], expected: dict[str, dict[str, str]], on: On, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As O_DIRECT reads it, whose buffers have slack."""
    begins = set()

    def read_block(self: InputFiles, file: Any, offset: int, size: int, item_bytes: int, block: memoryview) -> int:
        begin = offset % 4096 // item_bytes * item_bytes
        block[:] = b"\x3f" * len(block)  # numbers: NaN would have the CPU do it
        self.read_into(file, offset, block[begin : begin + size])
        begins.add(begin)
        return begin

    monkeypatch.setattr(InputFiles, "read_block", read_block)
    out = on(World(together), run, tmp_path / "out", threads=2, together=together, direct="on", method="ema", alpha=0.1).output
    assert digests(out) == expected["ema"] and len(begins) > 3


def test_integers_and_excluded_tensors_go_around_the_device(run: list[Path], on: On, tmp_path: Path) -> None:
    options: dict[str, Any] = {"exclude": ["a", "y", "*norm*"], "threads": 1}
    cpu = average(run, tmp_path / "cpu", device="cpu", **options)
    assert digests(on(World(3), run, tmp_path / "out", **options).output) == digests(cpu.output)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("together", [1, 2])
def test_memory_is_what_was_planned_and_does_not_grow_with_the_checkpoints(
    threads: int, together: int, run: list[Path], on: On, tmp_path: Path
) -> None:
    allocated = set()
    for number, paths in enumerate((run[:2], run)):
        world = World(1)
        on(world, paths, tmp_path / str(number), threads=threads, together=together)
        allocated.add((world.allocated, world.host_allocated))
    size = ChunkSize(CHUNK_BYTES // 8, CHUNK_BYTES, 0, together=together)  # the widest dtype has 8 bytes
    assert allocated == {(threads * ring_device_bytes(1, size), threads * ring_host_bytes(1, size))}


def test_what_waits_in_the_queues_is_bounded(run: list[Path], on: On, tmp_path: Path) -> None:
    """Back-pressure: however late the device, a worker is no further ahead than its buffers."""
    for together in (1, 4):
        world = World(2, eagerness=0.0)
        on(world, run, tmp_path / str(together), threads=1, together=together)
        assert world.longest <= 3 * STAGES + 2 * DEPTH  # an upload and two additions a stage, rounding and copying back a slot


def test_python_runs_four_times_a_chunk_where_all_inputs_have_room(on: On, tmp_path: Path) -> None:
    """An upload, an addition of all inputs, rounding, copying back."""
    paths = write_run(tmp_path / "run", training_run({"a": torch.randn(4 * CHUNK_BYTES // 2).bfloat16()}, 4))
    submitted = {}
    for together in (1, 2, 3, 4):
        world = World(1)
        on(world, paths, tmp_path / str(together), threads=1, together=together)
        submitted[together] = world.submitted
    assert submitted == {1: 4 * (2 * 4 + 2), 2: 4 * (2 * 2 + 2), 3: 4 * (2 * 2 + 2), 4: 4 * 4}


def test_device_memory_is_a_bound(run: list[Path], expected: dict[str, dict[str, str]], on: On, tmp_path: Path) -> None:
    for number, device_memory in enumerate((400_000, 3_000_000)):
        world = World(5)
        result = on(world, run, tmp_path / str(number), device_memory=device_memory, chunk_bytes=1 << 19)
        assert device_memory // 4 < world.allocated <= device_memory
        assert digests(result.output) == expected["sma"]
    with pytest.raises(UsageError, match="--device-memory is too small") as refused:
        on(World(), run, tmp_path / "no", device_memory=100_000)
    assert "found     100000 bytes" in str(refused.value) and "expected" in str(refused.value)
    with pytest.raises(UsageError, match="--memory is too small"):
        on(World(), run, tmp_path / "no", memory=100_000)


@pytest.mark.parametrize("share", [0.9, 0.3, 0.1])
def test_smaller_chunks_where_the_device_has_less_than_it_seemed(
    share: float, run: list[Path], expected: dict[str, dict[str, str]], on: On, tmp_path: Path
) -> None:
    chunk_bytes = 16 * CHUNK_BYTES
    world = World(6)
    on(world, run, tmp_path / "first", threads=2, chunk_bytes=chunk_bytes)
    less = World(6, capacity=int(share * world.allocated), seems=1 << 40)
    result = on(less, run, tmp_path / "out", threads=2, chunk_bytes=chunk_bytes)
    assert digests(result.output) == expected["sma"]
    (note,) = result.statistics.notes
    assert "out of memory" in note and f"instead of 2 with {chunk_bytes}" in note
    with pytest.raises(PmergeError, match="too little free memory") as refused:
        on(World(6, capacity=50_000, seems=1 << 40), run, tmp_path / "none")
    assert "--device cpu" in refused.value.hint


@pytest.mark.parametrize("at", [0, 1, 6, 7, 8, 9, 10, 30, 31, 32, 33])
def test_a_device_that_runs_out_of_memory_at_any_stage(
    at: int, run: list[Path], expected: dict[str, dict[str, str]], on: On, tmp_path: Path
) -> None:
    for seed in range(3):
        world = World(seed, failure=Failure(at, torch.OutOfMemoryError("fake")))
        result = on(world, run, tmp_path / str(seed), threads=1, method="ema", alpha=0.1)
        assert digests(result.output) == expected["ema"]
        assert len(result.statistics.notes) == 1 and "the CPU did some" in result.statistics.notes[0]


@pytest.mark.parametrize(("together", "at"), [*((1, at) for at in range(6)), *((2, at) for at in range(4))])
def test_nothing_is_left_on_the_device_of_a_chunk_that_is_given_up(together: int, at: int) -> None:
    """Results that are copied back late would overwrite those of the CPU."""
    queues = FakeQueues(World(eagerness=0.0, failure=Failure(at, torch.OutOfMemoryError("fake"))))
    ring = Ring(queues, 1, ChunkSize(4096, 1 << 14, 0, together=together))
    run = Extent("average", "F32", 0, 4096, (Location(None, 0, "F32"),) * 2, ("w",), (0,))  # type: ignore[arg-type]  # no file is read
    slot = ring.take()
    ring.start(slot, run, 4096, {0: WeightedSum((0, 1), (1.0, 1.0), 2.0)}, lambda i, buffer: None)
    assert slot.ran_out_of_memory and queues.pending() == 0
    assert not ring.finish(slot)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("at", [0, 1, 8, 9, 25, 26, 27, 28, 60])
def test_a_device_that_fails_at_any_stage_ends_the_run_and_it_can_be_continued(
    at: int, late: bool, run: list[Path], expected: dict[str, dict[str, str]], on: On, tmp_path: Path
) -> None:
    for threads in (1, 3):
        out = tmp_path / str(threads)
        with pytest.raises(PmergeError, match="it broke"):
            on(World(at, failure=Failure(at, PmergeError("it broke"), late)), run, out, threads=threads, together=threads)
        assert not out.exists()
        assert digests(average(run, out, device="cpu").output) == expected["sma"]


@pytest.mark.parametrize("failing", range(1, 40, 3))
def test_reading_fails_at_any_chunk(failing: int, run: list[Path], on: On, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    plainly = InputFiles.read_into

    def read_into(self: InputFiles, file: Any, offset: int, buffer: memoryview) -> None:
        nonlocal calls
        calls += 1
        if calls >= failing + 10:  # the first ones compare integers
            raise PmergeError("the disk broke")
        plainly(self, file, offset, buffer)

    monkeypatch.setattr(InputFiles, "read_into", read_into)
    for threads in (1, 3):
        calls = 0
        with pytest.raises(PmergeError, match="the disk broke"):
            on(World(failing), run, tmp_path / "out", threads=threads)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("failing", range(1, 30, 4))
def test_writing_fails_at_any_chunk(failing: int, run: list[Path], on: On, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def write_all(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls >= failing:
            raise OutputError("no space")

    monkeypatch.setattr("merge_cli.engine.writer.write_all", write_all)
    with pytest.raises(OutputError, match="no space"):
        on(World(failing), run, tmp_path / "out", threads=2)
    assert not (tmp_path / "out").exists()


def test_sums_that_overflow_and_nan_are_the_cpus(run: list[Path], on: On, tmp_path: Path) -> None:
    """Results that are not finite are made again from the files: the same bytes, counts and errors
    as on the CPU.
    """
    lowest = torch.finfo(torch.bfloat16).min
    tensors = training_run({"v": torch.randn(50_001).bfloat16(), "w": torch.randn(70_001).bfloat16()}, 3)
    for each in tensors:
        each["w"][7], each["w"][40_000] = lowest, -lowest
    paths = write_run(tmp_path / "masks", tensors)
    on_cpu = average(paths, tmp_path / "cpu", device="cpu").output
    merged = on(World(1), paths, tmp_path / "out").output
    assert load(merged)["w"][40_000] == -lowest and digests(merged) == digests(on_cpu)
    tensors[0]["w"][60_000], tensors[1]["w"][3], tensors[2]["v"][49_999] = torch.nan, torch.inf, -torch.inf
    paths = write_run(tmp_path / "nan", tensors)
    with pytest.raises(NonFiniteError, match="`v`") as refused:
        on(World(2), paths, tmp_path / "no", threads=1)
    assert "checkpoint-300" in str(refused.value)
    allowed = average(paths, tmp_path / "cpu-nan", device="cpu", allow_nonfinite=True)
    for seed in range(3):
        result = on(World(seed), paths, tmp_path / f"nan{seed}", allow_nonfinite=True, threads=1 + seed)
        assert result.nonfinite == allowed.nonfinite == {"v": 1, "w": 2}
        assert digests(result.output) == digests(allowed.output)


def test_the_first_nan_in_the_plan_is_named_though_a_later_read_fails(
    on: On, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chunk with the NaN is still on the device when the worker meets the other error."""
    tensors = [{"a": torch.full((2000,), torch.nan), "b": torch.ones(2000, dtype=torch.float64)}] * 2
    paths = write_run(tmp_path / "run", tensors)
    plainly = InputFiles.read_into

    def read_into(self: InputFiles, file: Any, offset: int, buffer: memoryview) -> None:
        if len(buffer) == 16_000:
            raise PmergeError("the disk broke")
        plainly(self, file, offset, buffer)

    monkeypatch.setattr(InputFiles, "read_into", read_into)
    with pytest.raises(NonFiniteError, match="`a`"):
        on(World(0, eagerness=0.0), paths, tmp_path / "out", threads=1)
