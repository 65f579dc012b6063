"""How many threads a plan gets, and chunks of what size, on machines of any number of cores."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from builders import write_trained
from fake_device import FakeDevice

from merge_cli import plan_average
from merge_cli.cli.workers import count_workers
from merge_cli.engine.budget import (
    ACCELERATOR_CHUNK_BYTES,
    BLOCK_ELEMENTS,
    BLOCKS_OF_MANY,
    DEFAULT_DEVICE_BYTES,
    FEW_THREADS,
    PYTHON_THREADS,
    STAGE_BYTES,
    fit_memory,
)
from merge_cli.engine.device import CPU
from merge_cli.engine.kernels import native
from merge_cli.planning.extent import Extent
from merge_cli.planning.plan import GRAM, MergePlan
from merge_cli.ranks.launcher import Rank

GIB = 1 << 30


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MergePlan:
    """An average of tensors that are larger than any chunk, on a machine of 32 cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(32)))
    for step in (1000, 2000):
        write_trained(tmp_path / f"run/checkpoint-{step}", step)
    merge = plan_average(tmp_path / "run", tmp_path / "out", device="cpu").merge
    files = [
        replace(file, extents=tuple(replace(each, num_elements=1 << 24) for each in file.extents if isinstance(each, Extent)))
        for file in merge.files
    ]
    return replace(merge, files=tuple(files))


@pytest.fixture
def no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.VARIABLE, "torch")


needs_kernel = pytest.mark.skipif(native.load() is None, reason="the native kernel was not built")


@needs_kernel
def test_the_kernel_uses_all_cores_and_torch_some(plan: MergePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fit_memory(plan, 8 * GIB, CPU).workers == 32
    assert fit_memory(plan, 8 * GIB, CPU, cores=5).workers == 5
    assert fit_memory(plan, 8 * GIB, CPU, threads=40).workers == 40
    assert fit_memory(plan, 8 * GIB, CPU, reducer=GRAM).workers == PYTHON_THREADS
    monkeypatch.setenv(native.VARIABLE, "torch")
    assert fit_memory(plan, 8 * GIB, CPU).workers == PYTHON_THREADS
    assert fit_memory(plan, 8 * GIB, CPU, threads=40).workers == 40


@pytest.mark.parametrize("threads", [1, 2, 3, 32])
def test_chunks_of_many_threads_are_longer(plan: MergePlan, threads: int) -> None:
    blocks = BLOCKS_OF_MANY if threads > 2 else 1
    assert fit_memory(plan, 8 * GIB, CPU, threads=threads).size.elements == blocks * BLOCK_ELEMENTS


@pytest.mark.parametrize("memory", [64 << 20, GIB, 8 * GIB])
def test_any_number_of_cores_keeps_to_the_memory(plan: MergePlan, memory: int) -> None:
    budget = fit_memory(plan, memory, CPU)
    assert budget.bytes <= memory
    assert budget.workers > 1


@needs_kernel
def test_many_cores_and_inputs_share_little_memory_by_fewer_threads(plan: MergePlan) -> None:
    """Reads stay large: a chunk is less than a block only where two threads have no more."""
    many = replace(plan, inputs=plan.inputs * 15)
    budget = fit_memory(many, GIB, CPU, cores=256)
    assert FEW_THREADS < budget.workers < 256 and budget.bytes <= GIB
    assert budget.size.elements >= BLOCK_ELEMENTS
    given = fit_memory(many, GIB, CPU, cores=256, chunk_bytes=4 << 20)
    assert FEW_THREADS <= given.workers < budget.workers and given.size.num_bytes == 4 << 20
    scarce = fit_memory(many, 64 << 20, CPU, cores=256)
    assert scarce.workers == FEW_THREADS and scarce.size.elements < BLOCK_ELEMENTS


@needs_kernel
def test_so_many_threads_as_asked_for_get_chunks_that_fit(plan: MergePlan) -> None:
    many = replace(plan, inputs=plan.inputs * 15)
    budget = fit_memory(many, GIB, CPU, threads=64)
    assert budget.workers == 64 and budget.bytes <= GIB and budget.size.elements < BLOCK_ELEMENTS


def test_an_accelerator_gets_large_chunks_and_all_inputs_at_once_where_memory_allows(plan: MergePlan) -> None:
    """First fewer inputs are sent at once, then chunks get smaller."""
    many = replace(plan, inputs=plan.inputs * 4)
    found = []
    for memory, device_memory in ((8 * GIB, None), (GIB, None), (8 * GIB, GIB), (GIB, GIB), (256 << 20, GIB), (8 * GIB, 128 << 20)):
        budget = fit_memory(many, memory, FakeDevice("fake"), 8, device_memory)
        assert budget.bytes <= memory and budget.device_bytes <= (device_memory or DEFAULT_DEVICE_BYTES)
        found.append((budget.size.num_bytes, budget.size.together))
    large = ACCELERATOR_CHUNK_BYTES
    assert found == [(large, 8), (large, 4), (large, 4), (large, 4), (large // 2, 1), (large // 4, 1)]
    hundred = replace(plan, inputs=plan.inputs * 50)
    assert fit_memory(hundred, 8 * GIB, FakeDevice("fake"), 1).size.together == STAGE_BYTES // ACCELERATOR_CHUNK_BYTES


@needs_kernel
def test_one_process_is_enough_for_the_kernel(plan: MergePlan) -> None:
    assert count_workers("auto", Rank()) == 1


@pytest.mark.usefixtures("no_kernel")
def test_torch_gets_a_process_for_every_eight_cores(plan: MergePlan) -> None:
    assert count_workers("auto", Rank()) == 4
