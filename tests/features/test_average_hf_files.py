"""Files of DCP's safetensors writer, made by torch's own: averaged file by file where meshes are
equal, gathered into whole tensors where they are not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import tensor_bytes
from dcp_checkpoints import Box, grid, load_hf_files, save_dcp, save_hf_files
from safetensors.torch import load_file, save_file
from torch import Tensor

from merge_cli import average, plan_average, verify
from merge_cli.errors import InputError, MismatchError
from merge_cli.formats.checkpoint import open_safetensors
from merge_cli.formats.dcp.gather import whole

Cuts = Mapping[str, Sequence[Box]]
ROWS: Cuts = {"w": grid((8, 6), (4, 1)), "v": grid((5, 3, 4), (2, 1, 1))}
COLUMNS: Cuts = {"w": grid((8, 6), (1, 2)), "v": grid((5, 3, 4), (1, 3, 1))}
BLOCKS: Cuts = {"w": grid((8, 6), (2, 3)), "v": grid((5, 3, 4), (2, 1, 2)), "b": grid((7,), (3,))}


def state(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "w": normal(8, 6), "v": normal(5, 3, 4).bfloat16(), "b": normal(7).double(), "scale": normal(1)[0], "table": torch.arange(3)
    }  # fmt: skip


def mean(steps: Sequence[int]) -> dict[str, Tensor]:
    states = [state(step) for step in steps]
    return {
        name: torch.stack([each[name].double() for each in states]).mean(0).to(first.dtype) if first.is_floating_point() else first
        for name, first in states[0].items()
    }


def check(folder: Path, expected: Mapping[str, Tensor]) -> None:
    found: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape and tensor_bytes(found[name]) == tensor_bytes(tensor), name


def test_one_mesh_is_averaged_file_by_file(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save_hf_files(tmp_path / "run" / f"step-{step}", state(step), BLOCKS)
    out = average([tmp_path / "run"], tmp_path / "out").output
    assert sorted(path.name for path in out.glob("*.safetensors"))[0] == "shard-00001-model-00001-of-00001.safetensors"
    found = load_hf_files(out, state(0))
    assert {name: tensor_bytes(each) for name, each in found.items()} == {
        name: tensor_bytes(each) for name, each in mean((10, 20, 30)).items()
    }


def test_the_plan_says_that_whole_shapes_are_not_recorded(tmp_path: Path) -> None:
    for step in (10, 20):
        save_hf_files(tmp_path / "run" / f"step-{step}", state(step), ROWS)
    either: list[dict[str, Any]] = [{}, {"format": "safetensors"}]
    for options in either:
        notes = plan_average([tmp_path / "run"], tmp_path / "out", **options).merge.notes
        assert "files of ranks record no whole shapes" in "\n".join(notes)


@pytest.mark.parametrize("options", [{}, {"shard_size": 150}, {"chunk_size": 8, "threads": 2}], ids=str)
def test_other_meshes_are_gathered_into_whole_tensors(options: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step, cuts in ((10, ROWS), (20, COLUMNS), (30, BLOCKS)):
        save_hf_files(run / f"step-{step}", state(step), cuts)
    (run / "step-40").mkdir()
    save_file(state(40), run / "step-40" / "model.safetensors")
    save_dcp(run / "step-50", state(50), {"w": grid((8, 6), (3, 1))}, files=2)
    with pytest.raises(MismatchError, match="saved by other meshes") as caught:
        plan_average([run], last=3, at=30)
    assert "--format safetensors" in caught.value.hint
    out = average([run], tmp_path / "out", format="safetensors", **options).output
    check(out, mean((10, 20, 30, 40, 50)))
    assert all("DCP_SHARDING_INFO" not in open_safetensors(path).files[0].header.metadata for path in out.glob("*.safetensors"))
    assert (out / "model.safetensors.index.json").exists() == ("shard_size" in options)
    assert verify(out, against_inputs=True, sample=None).problems == ()


def test_one_mesh_under_other_file_names_is_gathered_too(tmp_path: Path) -> None:
    for step in (10, 20):
        save_hf_files(tmp_path / "run" / f"step-{step}", state(step), ROWS)
    for path in (tmp_path / "run" / "step-10").iterdir():
        path.rename(path.with_name(path.name.replace("shard-0000", "shard-0001")))
    with pytest.raises(MismatchError, match="saved by other meshes"):
        plan_average([tmp_path / "run"])
    check(average([tmp_path / "run"], tmp_path / "out", format="safetensors").output, mean((10, 20)))


def rewrite(path: Path, info: Mapping[str, Any] | str) -> None:
    tensors = load_file(path)
    save_file(tensors, path, metadata={"DCP_SHARDING_INFO": info if isinstance(info, str) else json.dumps(info)})


@pytest.mark.parametrize(
    ("info", "words"),
    [
        ({"w": {"saved_offsets": [0, 0]}}, "do not cover"),
        ({"w": {"saved_offsets": [5, 0]}}, "do not cover"),
        ({"w": {"saved_offsets": [4]}}, "not as torch writes it"),
        ({"w": {"saved_offsets": [-4, 0]}}, "not as torch writes it"),
        ({"w": {"saved_offsets": [True, 0]}}, "not as torch writes it"),
        ({"w": {"saved_offsets": [10**30, 0]}}, "not as torch writes it"),
        ({}, "not as torch writes it"),
        ("{", "not as torch writes it"),
        ("[" * 100_000, "not as torch writes it"),
        ('{"w":{"saved_offsets":[4,0]},"w":{"saved_offsets":[4,0]}}', "not as torch writes it"),
        ('{"w":{"saved_offsets":[4,0]}} more', "not as torch writes it"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_offsets_that_are_wrong_are_refused(info: Any, words: str, tmp_path: Path) -> None:
    save_hf_files(tmp_path / "step-10", {"w": torch.ones(8, 6)}, {"w": grid((8, 6), (2, 1))})
    rewrite(tmp_path / "step-10" / "shard-00002-model-00001-of-00001.safetensors", info)
    with pytest.raises(InputError, match=words):
        whole(open_safetensors(tmp_path / "step-10"))


def test_a_missing_rank_in_the_middle_is_noticed(tmp_path: Path) -> None:
    save_hf_files(tmp_path / "step-10", {"w": torch.ones(8, 6)}, {"w": grid((8, 6), (4, 1))})
    (tmp_path / "step-10" / "shard-00002-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(InputError, match="do not cover"):
        whole(open_safetensors(tmp_path / "step-10"))
