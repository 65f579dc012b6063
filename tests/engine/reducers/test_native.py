"""The native kernel in the loop: the same bytes with every kernel as with torch, and no torch where
it is used.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import digests, nasty_tensors, training_run, write_run
from schemes import quantized_run

from merge_cli import average, sweep
from merge_cli.engine.kernels.native import VARIABLE, kernels
from merge_cli.errors import InputError, NonFiniteError

EVERY = [*kernels(), "torch"]
WITHOUT_TORCH = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "numpy"):
            raise ImportError(f"{name} is refused")

sys.meta_path.insert(0, Refuse())
from merge_cli.__main__ import main
sys.exit(main())
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    tensors = {"a": torch.randn(300_001).bfloat16(), **nasty_tensors(0)}
    return write_run(tmp_path_factory.mktemp("run"), training_run(tensors, 4, 1), shards=2)


@pytest.mark.parametrize(
    "options", [{"method": "sma"}, {"method": "ema"}, {"method": "wma", "dtype": "fp16", "allow_nonfinite": True}]
)
def test_every_kernel_writes_the_bytes_of_torch(
    options: dict[str, Any], run: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = []
    for name in EVERY:
        monkeypatch.setenv(VARIABLE, name)
        found.append(digests(average(run, tmp_path / name, device="cpu", threads=2, **options).output))
    assert len(found) > 1 and all(each == found[0] for each in found)


@pytest.mark.parametrize("case", ["DeepSeek-V3", "nvfp4", "packed int4, asymmetric", "gpt-oss"])
def test_quantized_inputs_too(case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    paths, *_ = quantized_run(tmp_path / "run", case)
    found = []
    for name in EVERY:
        monkeypatch.setenv(VARIABLE, name)
        found.append(digests(average(paths, tmp_path / name, device="cpu", method="ema").output))
    assert all(each == found[0] for each in found)


def test_a_stored_shape_that_contradicts_the_headers_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    paths, *_ = quantized_run(tmp_path / "run", "packed int4")
    for file in paths[1].glob("*.safetensors"):
        size = int.from_bytes(file.read_bytes()[:8], "little")
        for name, entry in json.loads(file.read_bytes()[8 : 8 + size]).items():
            if name.endswith("weight_shape"):
                data = bytearray(file.read_bytes())
                data[8 + size + entry["data_offsets"][0]] += 1
                file.write_bytes(data)
    for name in EVERY:
        monkeypatch.setenv(VARIABLE, name)
        with pytest.raises(InputError, match="weight_shape contradicts"):
            average(paths, tmp_path / "out", device="cpu")


def test_many_outputs_at_once(run: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = []
    for name in EVERY:
        monkeypatch.setenv(VARIABLE, name)
        result = sweep(run, tmp_path / name, methods=["sma", "ema", "wma", "decay:linear"], last=[2, 4])
        found.append([digests(each) for each in result.outputs])
    assert all(each == found[0] for each in found)


def test_nan_is_found_and_counted_alike(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tensors = training_run({"v": torch.randn(50_001).bfloat16(), "w": torch.randn(70_001).bfloat16()}, 3)
    tensors[0]["w"][60_000], tensors[1]["w"][3], tensors[2]["v"][49_999] = torch.nan, torch.inf, -torch.inf
    paths = write_run(tmp_path / "nan", tensors)
    found = []
    for name in EVERY:
        monkeypatch.setenv(VARIABLE, name)
        with pytest.raises(NonFiniteError, match="`v`") as refused:
            average(paths, tmp_path / "no", device="cpu")
        result = average(paths, tmp_path / name, device="cpu", allow_nonfinite=True)
        found.append((str(refused.value), result.nonfinite, digests(result.output)))
    assert all(each == found[0] for each in found) and found[0][1] == {"v": 1, "w": 2}


@pytest.mark.skipif(not kernels(), reason="no native kernel was built")
def test_the_main_job_needs_no_torch(run: list[Path], tmp_path: Path) -> None:
    """A process, because this one has imported torch."""
    commands = [
        ["average", *map(str, run), "-o", "out", "--method", "ema"],
        ["verify", "out", "--against-inputs"],
        ["average", *map(str, run), "--dry-run"],
        ["sweep", *map(str, run), "-o", "sweep", "--method", "sma,ema", "--last", "2,3"],
        ["inspect", str(run[0])],
    ]
    for command in commands:
        done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *command], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
