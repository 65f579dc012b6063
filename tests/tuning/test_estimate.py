"""The model of what a merge takes: the slowest part decides, and each part is what its figures say."""

from pathlib import Path

import pytest
import torch
from builders import write_checkpoint
from schemes import quantized_run

from merge_cli.engine.device import CPU, Device
from merge_cli.engine.kernels import native
from merge_cli.engine.reducers.kinds import kernel_of
from merge_cli.features.average import plan_average
from merge_cli.tuning.estimate import COPY_S_PER_BYTE, SUM_S_PER_VALUE, WRITE_S_PER_BYTE, estimate, parts_of, summing_s


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
    moving = read * COPY_S_PER_BYTE + written * WRITE_S_PER_BYTE
    assert cpu.seconds == pytest.approx(moving + summing_s(merge, CPU))
    assert gpu.parts["computing"] == pytest.approx(moving)
    assert (cpu.bottleneck, gpu.bottleneck) == ("computing", "PCIe")
    assert gpu.seconds == pytest.approx(read / 1e6)


@pytest.mark.parametrize("kernel", [*native.kernels(), "torch"])
def test_sums_cost_what_the_kernel_takes(kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.VARIABLE, kernel)
    for step in (1, 2, 3):
        write_checkpoint(
            tmp_path / "run" / f"step_{step}", {"w": torch.ones(1000).bfloat16(), "i": torch.ones(9, dtype=torch.long)}
        )
    costs = SUM_S_PER_VALUE[kernel]
    for method, dtype in (("sma", "F32"), ("ema", "F64")):
        plan = plan_average([tmp_path / "run"], tmp_path / "out", method=method, device="cpu").merge
        assert summing_s(plan, CPU) == pytest.approx(3 * 1000 * costs[dtype])


@pytest.mark.parametrize("requantize", [False, True])
def test_quantized_values_cost_their_decoding_and_torch_where_they_are_encoded(requantize: bool, tmp_path: Path) -> None:
    paths = quantized_run(tmp_path / "run", "DeepSeek-V3", 2)[0]
    plan = plan_average(paths, tmp_path / "out", requantize=requantize, device="cpu").merge
    coded = [extent for file in plan.files for extent in file.extents if extent.kind == "coded"]
    plain = [extent for file in plan.files for extent in file.extents if extent.kind == "average"]
    kernel = kernel_of(CPU)
    expected = 2 * sum(each.num_elements for each in plain) * SUM_S_PER_VALUE[kernel]["F32"]
    expected += 2 * sum(each.num_elements for each in coded) * SUM_S_PER_VALUE["torch" if requantize else kernel]["quantized"]
    assert summing_s(plan, CPU) == pytest.approx(expected)
