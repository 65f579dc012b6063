"""--allow-nonfinite counts the NaN and Inf of each result, whatever is stored how and however many
inputs made them.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import CONFIG, write_checkpoint

from merge_cli import average, sweep
from merge_cli.engine.kernels import native

FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}}


@pytest.fixture(params=["torch", *native.kernels()])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(native.VARIABLE, request.param)
    return str(request.param)


def run(folder: Path) -> list[Path]:
    """Three checkpoints; the NaN of the oldest two lie at one place."""
    paths = []
    for step in (1000, 2000, 3000):
        plain = torch.ones(40, 7)
        codes = torch.full((130, 140), 1.5)
        if step < 3000:
            plain[3, 4] = codes[5, 6] = torch.nan
        tensors = {"plain": plain, "x.weight": codes.to(torch.float8_e4m3fn), "x.weight_scale_inv": torch.ones(2, 2)}
        paths.append(write_checkpoint(folder / f"checkpoint-{step}", tensors, config={**CONFIG, **FP8}))
    return paths


def counted(result: Path) -> Any:
    return json.loads((result / "pmerge.json").read_text())["nonfinite"]


def test_elements_of_the_result_are_counted(tmp_path: Path, kernel: str) -> None:
    result = average(run(tmp_path / "run"), tmp_path / "out", allow_nonfinite=True, device="cpu")
    assert result.nonfinite == counted(result.output) == {"plain": 1, "x.weight": 1}


def test_each_output_has_its_own_counts(tmp_path: Path, kernel: str) -> None:
    paths = run(tmp_path / "run")
    sweep(paths, tmp_path / "out", methods=["sma"], last=[1, 2, 3], allow_nonfinite=True, device="cpu")
    found = {path.name: counted(path) for path in (tmp_path / "out").iterdir() if path.is_dir()}
    assert sorted(map(str, found.values())) == sorted(map(str, [{}, *[{"plain": 1, "x.weight": 1}] * 2]))
