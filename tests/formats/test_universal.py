"""Universal checkpoints of DeepSpeed, laid out as its `ds_to_universal.py` does: whole parameters
in float32, one folder each.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from builders import tensor_bytes
from safetensors.torch import load_file, save_file
from torch import Tensor

from merge_cli import average, open_checkpoint, plan_average, verify
from merge_cli.errors import IncompleteError, InputError, UnsupportedError
from merge_cli.formats.completeness import incomplete_reason
from merge_cli.request.candidates import read_candidate


def weights(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "1.word_embeddings.weight": torch.randn(20, 8, generator=generator),
        "2.attention.dense.bias": torch.randn(8, generator=generator),
        "2.mlp.dense.weight": torch.randn(8, 32, generator=generator),
    }


def save(folder: Path, step: int) -> Path:
    for name, tensor in weights(step).items():
        place = folder / "zero" / name
        place.mkdir(parents=True)
        more = {"cat_dim": 0, "vocab_tensor": True} if "embed" in name else {}
        for state, values in (("fp32", tensor), ("exp_avg", torch.zeros_like(tensor)), ("exp_avg_sq", torch.ones_like(tensor))):
            torch.save({"param": values, **more}, place / f"{state}.pt")
        torch.save(step, place / "step.pt")
    for rank in range(2):
        torch.save({"module": None}, folder / f"mp_rank_{rank:02d}_model_states.pt")
    torch.save({}, folder / "zero" / "optimizer_state.pt")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (1000, 2000):
        save(tmp_path / "run" / f"global_step{step}_universal", step)
    (tmp_path / "run" / "latest_universal").write_text("global_step2000_universal")
    (tmp_path / "run" / "global_step2000").mkdir()
    return tmp_path / "run"


def check_mean(out: Path) -> None:
    found = load_file(out / "model.safetensors")
    assert found.keys() == weights(0).keys()
    for name, tensor in found.items():
        expected = ((weights(1000)[name].double() + weights(2000)[name].double()) / 2).float()
        assert tensor_bytes(tensor) == tensor_bytes(expected), name


def test_a_run_is_averaged_into_safetensors(run: Path, tmp_path: Path) -> None:
    assert [each.step for each in plan_average(run).candidates] == [1000, 2000]
    average(run, tmp_path / "out")
    check_mean(tmp_path / "out")
    assert verify(tmp_path / "out", against_inputs=True, sample=None).problems == ()
    average([run / "global_step1000_universal", run / "global_step2000_universal"], tmp_path / "named")
    check_mean(tmp_path / "named")


def test_the_time_is_that_of_the_newest_parameter(run: Path) -> None:
    folders = [run / f"global_step{step}_universal" for step in (2000, 1000)]
    for seconds, folder in enumerate(folders, 1):
        for file in folder.rglob("*"):
            os.utime(file, (100, 100))
        os.utime(folder / "zero" / "2.mlp.dense.weight" / "fp32.pt", (100 + seconds, 100 + seconds))
        os.utime(folder / "zero" / "2.mlp.dense.weight" / "exp_avg.pt", (900, 900))
    assert [read_candidate(folder, with_time=True).mtime_ns // 10**9 for folder in folders] == [101, 102]
    assert [each.step for each in plan_average(run, method="ema", order="mtime").candidates] == [2000, 1000]
    (folders[0] / "zero" / "2.mlp.dense.weight" / "fp32.pt").unlink()
    assert read_candidate(folders[0], with_time=True).mtime_ns // 10**9 == 100


def test_the_folder_that_names_the_latest_is_a_checkpoint(tmp_path: Path) -> None:
    for step in (1000, 2000):
        save(tmp_path / "run" / f"step-{step}" / f"global_step{step}", step)
        (tmp_path / "run" / f"step-{step}" / "latest_universal").write_text(f"global_step{step}\n")
    average(tmp_path / "run", tmp_path / "out")
    check_mean(tmp_path / "out")
    (tmp_path / "run" / "step-2000" / "latest_universal").write_text("../step-1000/global_step1000")
    with pytest.raises(InputError):
        open_checkpoint(tmp_path / "run" / "step-2000")


@pytest.mark.parametrize("other", ["model.safetensors", "mp_rank_00/model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("inside", ["", "global_step1000"])
def test_other_weights_in_the_folder_count_before_it(inside: str, other: str, tmp_path: Path) -> None:
    """Only these have the buffers."""
    paths = [tmp_path / "run" / f"step-{step}" for step in (1000, 2000)]
    for path in paths:
        save(path / inside, 1000)
        if inside:
            (path / "latest_universal").write_text(inside)
        (path / other).parent.mkdir(exist_ok=True)
        tensors = {"weight": torch.ones(4), "buffer": torch.arange(4.0)}
        torch.save(tensors, path / other) if other.endswith(".bin") else save_file(tensors, str(path / other))
    opened = open_checkpoint(paths[0])
    assert [file.name for file in opened.files] == [other]
    assert (f"{inside or 'zero'}/") in opened.side_files.skipped
    average(paths, tmp_path / "out")
    written = sorted(path.name for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert written == ["model.safetensors", "pmerge.json"]


def test_what_is_missing_or_more_than_a_parameter_is_refused(run: Path) -> None:
    newest = run / "global_step2000_universal"
    bias = newest / "zero" / "2.attention.dense.bias" / "fp32.pt"
    raw = bias.read_bytes()
    bias.write_bytes(raw[: len(raw) // 2])
    assert str(bias) in (incomplete_reason(newest) or "")
    torch.save({"param": torch.zeros(8), "padding": torch.zeros(1)}, bias)
    with pytest.raises(UnsupportedError, match="not one parameter"):
        open_checkpoint(newest)
    torch.save({"param": torch.zeros(8), "sub_param_shape": print}, bias)
    with pytest.raises(InputError, match=r"__builtin__\.print, which is no part"):
        open_checkpoint(newest)
    bias.unlink()
    with pytest.raises(IncompleteError, match=r"1 of 3 parameters have no fp32\.pt"):
        open_checkpoint(newest)
