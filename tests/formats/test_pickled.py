"""Files of torch.save as inputs: the mean of what torch loads, written as safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from builders import tensor_bytes
from safetensors.torch import load_file, save_file
from torch import Tensor

from merge_cli import average, open_checkpoint, plan_average, verify
from merge_cli.errors import InputError, UnsupportedError
from merge_cli.formats.completeness import incomplete_reason


def weights(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    embed = torch.randn(20, 8, generator=generator).bfloat16()
    return {
        "embed.weight": embed, "layer.weight": torch.randn(8, 8, generator=generator), "count": torch.tensor(3),
        "norm.weight": torch.randn(8, generator=generator).half(), "lm_head.weight": embed,
    }  # fmt: skip


def save(folder: Path, state: Mapping[str, Tensor], shards: int = 1) -> Path:
    """As transformers saves without safetensors, with the index of several shards."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    names = list(state)
    files = ["pytorch_model.bin"] if shards == 1 else [f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin" for i in range(shards)]
    for number, file in enumerate(files):
        torch.save({name: state[name] for name in names[number::shards]}, folder / file)
    if shards > 1:
        weight_map = {name: files[i % shards] for i, name in enumerate(names)}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    torch.save({"state": {}}, folder / "optimizer.pt")
    torch.save(object, folder / "training_args.bin")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step, shards in ((10, 1), (20, 2), (30, 3)):
        save(tmp_path / "run" / f"checkpoint-{step}", weights(step), shards)
    return tmp_path / "run"


def check_mean(found: Mapping[str, Tensor], steps: tuple[int, ...] = (10, 20, 30)) -> None:
    assert set(found) == set(weights(0))
    for name, tensor in found.items():
        tensors = [weights(step)[name] for step in steps]
        expected = tensors[-1]
        if expected.is_floating_point():
            expected = torch.stack([each.double() for each in tensors]).mean(0).to(expected.dtype)
        assert tensor_bytes(tensor) == tensor_bytes(expected), name


def test_a_run_is_averaged_into_safetensors(run: Path, tmp_path: Path) -> None:
    average(run, tmp_path / "out", threads=2, chunk_size=100)
    check_mean(load_file(tmp_path / "out" / "model.safetensors"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors", "pmerge.json"]
    assert verify(tmp_path / "out", against_inputs=True, sample=None).problems == ()


def test_shards_of_the_result_have_an_index(run: Path, tmp_path: Path) -> None:
    average(run, tmp_path / "out", shard_size=400)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1 and set(index.values()) == set(files) and set(index) == set(weights(0))
    check_mean({name: load_file(tmp_path / "out" / file)[name] for name, file in index.items()})


def test_safetensors_win_and_both_kinds_mix(run: Path, tmp_path: Path) -> None:
    newest = run / "checkpoint-40"
    newest.mkdir()
    save_file({name: tensor.clone() for name, tensor in weights(40).items()}, newest / "model.safetensors", {"format": "pt"})
    torch.save({"other": torch.zeros(1)}, newest / "pytorch_model.bin")
    average(run, tmp_path / "out")
    check_mean(load_file(tmp_path / "out" / "model.safetensors"), (10, 20, 30, 40))


def test_single_files_are_checkpoints(tmp_path: Path) -> None:
    for step in (10, 20):
        torch.save({"model": weights(step), "step": step}, tmp_path / f"step_{step}.pt")
    average([tmp_path / "step_10.pt", tmp_path / "step_20.pt"], tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    check_mean({name.removeprefix("model."): tensor for name, tensor in found.items()}, (10, 20))


def test_what_is_missing_or_no_plain_weights_is_refused(run: Path, tmp_path: Path) -> None:
    (run / "checkpoint-30" / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(InputError, match="1 of 3 shards are missing"):
        open_checkpoint(run / "checkpoint-30")
    assert "shards are missing" in (incomplete_reason(run / "checkpoint-30") or "")
    with pytest.raises(InputError, match="one of several shards"):
        plan_average([run / "checkpoint-20" / "pytorch_model-00001-of-00002.bin"], tmp_path / "out")
    for view in (
        torch.zeros(4, 3).t(),
        torch.zeros(3, 1).expand(3, 4),
        torch.zeros(4).expand(3, 4),
        torch.zeros(9)[::2],
        torch.zeros(4, 8)[:, 2],
    ):
        torch.save({"w": view}, tmp_path / "view.pt")
        with pytest.raises(UnsupportedError, match="stored as a view"):
            open_checkpoint(tmp_path / "view.pt")
    torch.save({"w": torch.zeros(1), "code": print}, tmp_path / "code.pt")
    with pytest.raises(InputError, match=r"__builtin__\.print, which is no part"):
        open_checkpoint(tmp_path / "code.pt")
    torch.save(weights(1), run / "checkpoint-20" / "pytorch_model.bin")
    with pytest.raises(InputError, match="several sets of weights"):
        open_checkpoint(run / "checkpoint-20")


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_the_newest_that_is_being_written_is_left_out_with_a_warning(share: float, run: Path, tmp_path: Path) -> None:
    file = run / "checkpoint-30" / "pytorch_model-00003-of-00003.bin"
    raw = file.read_bytes()
    file.write_bytes(raw[: int(share * len(raw))])
    reason = incomplete_reason(run / "checkpoint-30")
    assert reason is not None and str(file) in reason
    plan = plan_average(run, tmp_path / "out")
    assert [Path(each.path).name for each in plan.candidates] == ["checkpoint-10", "checkpoint-20"]
    assert any(str(file) in warning for warning in plan.warnings)


@pytest.mark.parametrize("name", ["ckpt_{}.pt", "model-step{}.pth", "{}.pt", "checkpoint-{}.bin"])
def test_files_named_by_step_are_a_run(name: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for step in (900, 1000, 1100):
        torch.save({"w": torch.full((3,), float(step))}, tmp_path / "run" / name.format(step))
        torch.save({"state": {}}, tmp_path / "run" / f"optimizer_step_{step}.pt")
    (tmp_path / "run" / name.format(1100)).write_bytes(b"PK\3\4")
    plan = plan_average(tmp_path / "run", tmp_path / "out")
    assert [each.step for each in plan.candidates] == [900, 1000]
    assert any(name.format(1100) in warning and "incomplete" in warning for warning in plan.warnings)
    average(tmp_path / "run", tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")["w"].tolist() == [950.0] * 3


def test_files_beside_the_weights_are_no_run(tmp_path: Path) -> None:
    for step in (10, 20):
        save(tmp_path / "run" / f"checkpoint-{step}", weights(step))
        (tmp_path / "run" / f"rng_state_step_{step}.pt").touch()
        for rank in range(2):
            (tmp_path / "run" / f"checkpoint-{step}" / f"step_{rank}.pt").touch()
    found = plan_average(tmp_path / "run", tmp_path / "out").candidates
    assert [Path(each.path).name for each in found] == ["checkpoint-10", "checkpoint-20"]


def views(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    large = torch.randn(12, 5, 16, generator=generator)
    half = torch.randn(6, 32, generator=generator).bfloat16()
    return {
        "rows": large[3:7], "left": half[:, :8], "right": half[1:5, 8:], "middle": large[2:9:3, 1:4, 5:9],
        "planes": large.transpose(0, 1), "scalar": half[2, 7], "tied": half,
    }  # fmt: skip


def test_views_whose_rows_are_in_one_piece_are_read_row_by_row(tmp_path: Path) -> None:
    for step in (10, 20):
        torch.save(views(step), tmp_path / f"step_{step}.pt")
    average([tmp_path / "step_10.pt", tmp_path / "step_20.pt"], tmp_path / "out", chunk_size=40, threads=2)
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, first in views(10).items():
        expected = ((first.double() + views(20)[name].double()) / 2).to(first.dtype)
        assert found[name].shape == expected.shape and tensor_bytes(found[name]) == tensor_bytes(expected), name
    assert verify(tmp_path / "out", against_inputs=True, sample=None).problems == ()
