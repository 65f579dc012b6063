"""The model of what a merge takes: the slowest part decides, and each part is what its figures say."""

from pathlib import Path

import pytest
import torch
from builders import write_checkpoint

from merge_cli.engine.device import Device
from merge_cli.features.average import plan_average
from merge_cli.tuning.estimate import READ_S_PER_BYTE, WRITE_S_PER_BYTE, estimate, parts_of


def test_parts_are_bytes_over_bandwidth() -> None:
    parts = parts_of(16e12, 2e12, 800.0, storage_bandwidth=10e9, cores=8, pcie_bandwidth=50e9, memory_bandwidth=200e9)
    assert parts == {
        "storage": 1800,
        "computing": (800 + 2e12 * WRITE_S_PER_BYTE) / 8,
        "PCIe": 320,
        "memory": (16e12 * 4 + 2e12 * 5) / 200e9,
    }


def test_a_gpu_takes_the_sums_and_adds_its_link(tmp_path: Path) -> None:
    for step in (1, 2):
        write_checkpoint(tmp_path / "run" / f"step_{step}", {"w": torch.ones(1 << 20).bfloat16()})
    merge = plan_average([tmp_path / "run"], tmp_path / "out").merge
    read, written = merge.bytes_to_read, merge.bytes_to_write
    cpu = estimate(merge, 1e15, cores=1)
    gpu = estimate(merge, 1e15, cores=1, device=Device("cuda:0"), pcie_bandwidth=1e6)
    assert cpu.seconds == pytest.approx(read * READ_S_PER_BYTE["F32"] + written * WRITE_S_PER_BYTE)
    assert gpu.parts["computing"] == pytest.approx(read * READ_S_PER_BYTE["copy"] + written * WRITE_S_PER_BYTE)
    assert (cpu.bottleneck, gpu.bottleneck) == ("computing", "PCIe")
    assert gpu.seconds == pytest.approx(read / 1e6)
