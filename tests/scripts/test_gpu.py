"""scripts/gpu: its steps run, one that fails is reported, and time ends it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from paths import LIB

SCRIPT = LIB.parent / "gpu"


def gpu(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """A process, as the script is one; it asks torch for a device."""
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([SCRIPT, folder, *options], env=environment, capture_output=True, text=True, check=False)


def test_a_step_leaves_its_output_and_those_without_time_are_failures(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = gpu(out, "--device", "cpu", "--only", "kernel")
    assert done.returncode == 0, done.stderr
    assert (out / "summary.txt").read_text().startswith("kernel: done in ")
    assert sorted(path.name for path in out.iterdir()) == ["kernel.txt", "summary.txt"]
    late = gpu(out, "--device", "cpu", "--only", "sma,sweep-cpu", "--seconds", "1")
    assert late.returncode == 1
    assert late.stdout.splitlines() == ["sma: not run, no time was left", "sweep-cpu: not run, no time was left"]


def test_without_a_gpu_it_says_so_before_any_step(tmp_path: Path) -> None:
    refused = gpu(tmp_path / "out")
    assert refused.returncode == 2 and "--device cpu" in refused.stderr
    assert (tmp_path / "out/summary.txt").read_text() == ""
