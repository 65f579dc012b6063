"""The CUDA path on a GPU, against the bytes of the CPU; without one, the lines of cuda.py against a
stub of torch.cuda.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import digests, nasty_tensors, training_run, write_run
from fake_device import FakeDevice, World
from schemes import READ, quantized_run

from merge_cli import average, plan_average
from merge_cli.engine import cuda
from merge_cli.engine.buffers import page_aligned
from merge_cli.engine.cuda import CudaQueues, CudaStream
from merge_cli.engine.device import Device
from merge_cli.engine.reducers.quantized import QuantizedSums
from merge_cli.errors import NonFiniteError, PmergeError
from merge_cli.features.sweep import run_sweep
from merge_cli.features.sweep_plan import plan_sweep
from merge_cli.tuning import backend as choice

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
SLACK = 4 << 20  # what torch allocates in passing: divisors, flags, room for reductions


def on_gpu(function: Any) -> Any:
    for mark in gpu:
        function = mark(function)
    return function


@pytest.fixture
def run(tmp_path: Path) -> list[Path]:
    start = {
        "a": torch.randn(3_000_001).bfloat16(),
        **nasty_tensors(0),
        "z": torch.randn(900_001),
        "y": torch.randn(9, 50_001).half(),
    }
    return write_run(tmp_path / "run", training_run(start, 4, 1), shards=3)


@on_gpu
@pytest.mark.parametrize("method", ["sma", "wma", "ema", "decay"])
@pytest.mark.parametrize("threads", [1, 4])
def test_same_bytes_in_many_small_chunks(method: str, threads: int, run: list[Path], tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": method, "accumulate": "auto"}
    expected = digests(average(run, tmp_path / "cpu", device="cpu", **options).output)
    for device_memory in (2 << 20, 64 << 20):
        few = {"device": "cuda", "device_memory": device_memory, "threads": threads, **options}
        assert digests(average(run, tmp_path / str(device_memory), **few).output) == expected


@on_gpu
@pytest.mark.parametrize("requantize", [False, True])
@pytest.mark.parametrize("case", READ)
def test_same_bytes_of_every_scheme(case: str, requantize: bool, tmp_path: Path) -> None:
    paths, *_ = quantized_run(tmp_path / "run", case)
    options: dict[str, Any] = {"requantize": requantize, "method": "ema"}
    on_cpu = average(paths, tmp_path / "cpu", device="cpu", **options)
    there = average(paths, tmp_path / "cuda", device="cuda", **options)
    assert digests(there.output) == digests(on_cpu.output)
    assert there.statistics.requantization_error == pytest.approx(on_cpu.statistics.requantization_error)


@on_gpu
def test_many_outputs_from_one_read(run: list[Path], tmp_path: Path) -> None:
    options: dict[str, Any] = {"methods": ["sma", "wma", "ema:0.1"], "last": [2, 4]}
    for device in ("cpu", "cuda"):
        run_sweep(plan_sweep(run, tmp_path / device, device=device, **options))
    for folder in (tmp_path / "cpu").iterdir():
        if folder.is_dir():
            assert digests(tmp_path / "cuda" / folder.name) == digests(folder)


@on_gpu
def test_device_memory_is_a_bound(run: list[Path], tmp_path: Path) -> None:
    for device_memory in (2 << 20, 16 << 20, 256 << 20):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        plan = plan_average(run, device="cuda", device_memory=device_memory)
        assert plan.budget.device_bytes <= device_memory
        average(run, tmp_path / str(device_memory), device="cuda", device_memory=device_memory)
        assert torch.cuda.max_memory_allocated() - before <= plan.budget.device_bytes + SLACK
        assert torch.cuda.memory_allocated() - before <= SLACK


@on_gpu
@pytest.mark.parametrize("left", [8 << 20, 64 << 20])
def test_a_full_gpu_gets_smaller_chunks_or_none(left: int, run: list[Path], tmp_path: Path) -> None:
    expected = digests(average(run, tmp_path / "cpu", device="cpu").output)
    torch.cuda.empty_cache()
    hog = torch.empty(torch.cuda.mem_get_info()[0] - left, dtype=torch.uint8, device="cuda")
    try:
        out = average(run, tmp_path / "cuda", device="cuda", device_memory=1 << 30).output
        assert digests(out) == expected
    except PmergeError as error:
        assert "--device cpu" in error.hint
    finally:
        del hog
        torch.cuda.empty_cache()


@on_gpu
def test_masks_and_nan(tmp_path: Path) -> None:
    lowest = torch.finfo(torch.bfloat16).min
    tensors = training_run({"w": torch.randn(300_001).bfloat16()}, 3)
    for each in tensors:
        each["w"][7] = lowest
    paths = write_run(tmp_path / "masks", tensors)
    outs = [average(paths, tmp_path / device, device=device).output for device in ("cpu", "cuda")]
    assert digests(outs[0]) == digests(outs[1])
    tensors[1]["w"][200_000] = torch.nan
    paths = write_run(tmp_path / "nan", tensors)
    with pytest.raises(NonFiniteError, match="`w`"):
        average(paths, tmp_path / "no", device="cuda")
    results = [average(paths, tmp_path / f"nan-{device}", device=device, allow_nonfinite=True) for device in ("cpu", "cuda")]
    assert digests(results[0].output) == digests(results[1].output) and results[0].nonfinite == results[1].nonfinite == {"w": 1}


@on_gpu
def test_auto_measures_and_says_why(run: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = digests(average(run, tmp_path / "cpu", device="cpu").output)
    monkeypatch.setattr(choice, "SMALL_JOB_BYTES", 0)
    plan = plan_average(run)
    assert plan.notes[-1].startswith(f"device {plan.device.name}: ") and "GB/s against" in plan.notes[-1]
    assert digests(average(run, tmp_path / "auto").output) == expected


# -- without a GPU
# ----------------------------------------------------------------------------------------------------------------


class Stream:
    """A stream on which everything is done at once."""

    def __init__(self, device: torch.device) -> None:
        self.waited_for: list[Event] = []
        self.ran: int = 0

    def wait_event(self, event: Event) -> None:
        assert event.recorded_on is not None, "nothing was recorded for what is waited for"
        self.waited_for.append(event)

    def synchronize(self) -> None:
        pass


class Event:
    def __init__(self, blocking: bool = False) -> None:
        assert blocking, "waiting would take a core"
        self.recorded_on: Stream | None = None

    def record(self, stream: Stream) -> None:
        self.recorded_on = stream

    def synchronize(self) -> None:
        pass


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Stream]]:
    """torch.cuda without a GPU; the streams that are current, innermost last."""
    current: list[Stream] = []

    @contextmanager
    def active(stream: Stream) -> Iterator[None]:
        current.append(stream)
        stream.ran += 1
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", active)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (123 << 20, 456 << 20))
    monkeypatch.setattr(cuda, "pinned_buffer", lambda num_bytes: page_aligned(num_bytes))
    yield current
    assert current == []


class Stubbed(FakeDevice):
    """CUDA's code with the memory of the CPU."""

    def queues(self) -> CudaQueues:  # type: ignore[override]
        return CudaQueues(self.torch)

    def stream(self) -> CudaStream:  # type: ignore[override]
        return CudaStream(self.torch)

    def free_bytes(self) -> int:
        return Device.free_bytes(self)


def test_the_code_for_cuda_runs_against_a_stub(
    run: list[Path], stub: list[Stream], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    del stub
    expected = digests(average(run, tmp_path / "cpu", device="cpu").output)
    paths, *_ = quantized_run(tmp_path / "quantized", "DeepSeek-V3")
    requantized = digests(average(paths, tmp_path / "cpu-8", device="cpu", requantize=True).output)
    monkeypatch.setattr(choice, "choose_device", lambda *_: Stubbed("cuda:0", World()))
    plan = plan_average(run, device="cuda")
    assert 0 < plan.budget.device_bytes <= 123 << 20
    assert digests(average(run, tmp_path / "out", device="cuda", threads=1).output) == expected
    result = average(paths, tmp_path / "out-8", device="cuda", requantize=True, threads=1)
    assert digests(result.output) == requantized and result.statistics.requantization_error is not None


def test_what_cuda_reports_is_an_error_with_a_hint(stub: list[Stream]) -> None:
    queues = CudaQueues(torch.device("cpu"))

    def fail(error: Exception) -> None:
        raise error

    stub.clear()
    with pytest.raises(PmergeError, match="cpu failed: CUDA error: an illegal memory access") as broken:
        queues.submit("compute", lambda: fail(RuntimeError("CUDA error: an illegal memory access\nmore lines")))
    assert "--device cpu" in broken.value.hint
    for error in (torch.OutOfMemoryError("tried to allocate"), RuntimeError("CUDA error: out of memory\n")):
        with pytest.raises(torch.OutOfMemoryError):
            queues.submit("compute", partial(fail, error))
    stub.clear()


@pytest.mark.parametrize("case", ["DeepSeek-V3", "nvfp4", "packed int4, asymmetric", "gpt-oss"])
@pytest.mark.parametrize("rows", [0, 8])
def test_codes_take_smaller_chunks_and_then_the_cpu_where_memory_lacks(
    rows: int, case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    paths, *_ = quantized_run(tmp_path / "run", case)
    options: dict[str, Any] = {"requantize": True, "method": "ema"}
    on_cpu = average(paths, tmp_path / "cpu", device="cpu", **options)
    plainly = QuantizedSums.values

    def load(self: QuantizedSums, source: Any, shape: Any, r0: int, r1: int) -> Any:
        if self._device.is_accelerator and r1 - r0 > rows:
            raise torch.OutOfMemoryError("fake")
        return plainly(self, source, shape, r0, r1)

    monkeypatch.setattr(QuantizedSums, "values", load)
    monkeypatch.setattr(choice, "choose_device", lambda *_: FakeDevice("fake", World()))
    result = average(paths, tmp_path / "out", device="fake", **options)
    assert digests(result.output) == digests(on_cpu.output)
    assert result.statistics.requantization_error == pytest.approx(on_cpu.statistics.requantization_error)
    assert not rows or result.statistics.bytes_read > 0
    if not rows:
        assert "the CPU did some of the work" in result.statistics.notes[0]
