"""Which device "auto" takes, and what it says; without a GPU the device is a fake one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import digests, training_run, write_run
from fake_device import Failure, FakeDevice, World

from merge_cli import average, plan_average
from merge_cli.engine.budget import Budget, fit_memory
from merge_cli.engine.device import CPU, choose_device
from merge_cli.errors import PmergeError
from merge_cli.tuning import backend as choice
from merge_cli.tuning.backend import Rate, compare, sample


def path(log: list[str], name: str, *rates: float) -> Callable[[], Rate]:
    """Runs at 10 TB/s to begin with, which is not to count, and then at `rates` GB/s."""
    left = iter([10_000.0, *rates])

    def run() -> Rate:
        log.append(name)
        return Rate(128_000_000, 0.128 / next(left))

    return run


@pytest.mark.parametrize(
    ("cpu", "gpu", "is_faster", "note"),
    [
        (4.1, 11.2, True, "device cuda:0: 11.2 GB/s against 4.1 GB/s on the CPU, measured on the first 128 MB"),
        (4.1, 2.0, False, "device cpu: 4.1 GB/s against 2.0 GB/s on cuda:0, measured on the first 128 MB"),
        (4.0, 4.3, False, "device cpu: 4.0 GB/s against 4.3 GB/s on cuda:0, measured on the first 128 MB"),
    ],
)
def test_the_faster_path_is_taken_and_it_says_why(cpu: float, gpu: float, is_faster: bool, note: str) -> None:
    log: list[str] = []
    assert compare(path(log, "cpu", cpu), path(log, "gpu", gpu), "cuda:0") == (is_faster, note)
    assert log == ["cpu", "gpu"] * 2


@pytest.fixture
def run(tmp_path: Path) -> list[Path]:
    start = {"w": torch.randn(600_000).bfloat16(), "n": torch.arange(5), "v": torch.randn(300_000)}
    return write_run(tmp_path / "run", training_run(start, 3), shards=2)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    """A machine with a fake accelerator."""
    world = World(1)
    monkeypatch.setattr(choice, "choose_device", lambda name, _: CPU if name == "cpu" else FakeDevice("fake:0", world))
    return world


def rates(monkeypatch: pytest.MonkeyPatch, cpu: float, accelerator: float) -> list[str]:
    """Have jobs of any size measured, and measure this; the devices that were."""
    measured: list[str] = []

    def sample(plan: Any, budget: Budget) -> Rate:
        measured.append(budget.device.name)
        return Rate(10**9, 1 / (accelerator if budget.device.is_accelerator else cpu))

    monkeypatch.setattr(choice, "SMALL_JOB_BYTES", 0)
    monkeypatch.setattr(choice, "sample", sample)
    return measured


def test_auto_takes_what_was_faster(run: list[Path], world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for cpu, accelerator, taken in ((1.0, 3.0, "fake:0"), (3.0, 1.0, "cpu")):
        measured = rates(monkeypatch, cpu, accelerator)
        plan = plan_average(run)
        assert plan.device.name == taken and plan.notes[-1].startswith(f"device {taken}: 3.0 GB/s against 1.0 GB/s")
        assert measured == ["cpu", "fake:0"] * 2
        assert (plan.budget.device_bytes > 0) == (taken != "cpu")


def test_what_is_named_is_never_overruled(run: list[Path], world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = rates(monkeypatch, 3.0, 1.0)
    for name, taken in (("cuda", "fake:0"), ("cpu", "cpu")):
        plan = plan_average(run, device=name)
        assert plan.device.name == taken and not any("device" in note for note in plan.notes)
    assert not measured


def test_small_jobs_take_the_cpu_and_say_so(run: list[Path], world: World) -> None:
    plan = plan_average(run)
    assert plan.device == CPU and plan.notes[-1] == "device cpu: reads less than 2 GB, for which starting fake:0 takes too long"
    assert world.submitted == 0


def test_what_cannot_be_measured_takes_the_cpu(
    run: list[Path], world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(choice, "SMALL_JOB_BYTES", 0)
    expected = digests(average(run, tmp_path / "cpu", device="cpu").output)
    world.failure = Failure(3, PmergeError("it broke"), late=True)
    plan = plan_average(run)
    assert plan.device == CPU and "fake:0 could not be measured (it broke)" in plan.notes[-1]
    world.failure, world.seems = None, 1000
    plan = plan_average(run)
    assert plan.device == CPU and "the free memory of fake:0 is too small" in plan.notes[-1]
    assert digests(average(run, tmp_path / "out").output) == expected


@pytest.mark.parametrize("accelerated", [False, True])
def test_a_sample_is_real_work_that_ends_early_and_leaves_nothing(accelerated: bool, run: list[Path], tmp_path: Path) -> None:
    device = FakeDevice("fake:0", World(1)) if accelerated else CPU
    plan = plan_average(run, tmp_path / "out", device="cpu").merge
    budget = fit_memory(plan, 4 << 20, device, 2)
    before = sorted(tmp_path.rglob("*"))
    whole = sample(plan, budget, seconds=60)
    total = 3 * (2 * 600_000 + 4 * 300_000)
    assert 0.8 * total < whole.num_bytes < total and whole.seconds > 0  # less the first chunk of each worker
    part = sample(plan, budget, num_bytes=1 << 20, seconds=60)
    assert 1 << 20 <= part.num_bytes < whole.num_bytes
    assert 0 < sample(plan, budget, seconds=0.0).num_bytes < whole.num_bytes
    assert sorted(tmp_path.rglob("*")) == before


def test_a_sample_minds_no_nan(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run", [{"w": torch.full((5000,), torch.nan)}] * 2)
    plan = plan_average(paths, device="cpu")
    assert sample(plan.merge, plan.budget).num_bytes == 40_000


def test_a_rank_takes_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("merge_cli.engine.device.num_cuda_devices", lambda: 4)
    assert [choose_device("cuda", rank).name for rank in (0, 3, 4, 7)] == ["cuda:0", "cuda:3", "cuda:0", "cuda:3"]
    assert choose_device("auto", 2).name == "cuda:2" and choose_device("cuda:1", 2).name == "cuda:1"
    assert choose_device("cpu", 2) == CPU
