"""Folders of trainers: each is recognized by its own files, its step is read, and the files that
its loader needs are named.
"""

import json
from pathlib import Path

import pytest
import torch
from dcp_checkpoints import save_dcp

from merge_cli.formats.dcp.folder import open_folder
from merge_cli.formats.dcp.trainers import files_beside, find_dcp, is_dcp, is_unfinished, latest_iteration, recorded_step
from merge_cli.request.labels import parse_label

STATE = {"w": torch.ones(3)}


def written(path: Path, **files: str) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(text)


def found(path: Path) -> tuple[str, str]:
    place = find_dcp(path)
    assert place is not None and is_dcp(path) and not is_unfinished(path) and Path(place.folder, ".metadata").is_file()
    return place.trainer, place.inside


def beside(path: Path, training_state: str) -> list[str]:
    place = find_dcp(path)
    assert place is not None
    return files_beside(place, training_state)


def test_torchtitan(tmp_path: Path) -> None:
    path = save_dcp(tmp_path / "step-1000", STATE | {"train_state": {"step": torch.tensor(1000)}})
    assert found(path) == ("torch", "")
    assert beside(path, "drop") == beside(path, "base") == []
    assert recorded_step(open_folder(path)) == 1000 == parse_label(path.name).step
    assert recorded_step(open_folder(save_dcp(tmp_path / "a", STATE | {"train_state": {"step": 7}}))) is None
    assert recorded_step(open_folder(save_dcp(tmp_path / "b", STATE | {"train_state": {"step": torch.ones(2)}}))) is None


def test_olmo_core(tmp_path: Path) -> None:
    path = tmp_path / "step1000"
    save_dcp(path / "model_and_optim", STATE)
    written(path, __metadata__json='{"version": "v2.0"}', config__json="{}")
    written(path / "train", rank0__pt="a pickle", notes="")
    assert found(path) == ("olmo-core", "model_and_optim")
    assert beside(path, "drop") == [".metadata.json", "config.json"]
    assert beside(path, "base") == [".metadata.json", "config.json", "train/rank0.pt"]
    assert parse_label(path.name).step == 1000


def test_megatron(tmp_path: Path) -> None:
    path = tmp_path / "run" / "iter_0001000"
    save_dcp(path, STATE)
    assert found(path) == ("torch", "")
    written(path, metadata__json=json.dumps({"sharded_backend": "torch_dist"}), common__pt="a pickle")
    written(tmp_path / "run", latest_checkpointed_iteration__txt="1000\n")
    assert found(path) == ("megatron", "")
    assert beside(path, "drop") == beside(path, "base") == ["metadata.json", "common.pt"]
    assert latest_iteration(tmp_path / "run") == 1000 == parse_label(path.name).step
    assert latest_iteration(path) is None
    written(tmp_path / "run", latest_checkpointed_iteration__txt="release")
    assert latest_iteration(tmp_path / "run") is None


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"sharded_backend": "zarr"}', "[" * 5000])
def test_other_metadata_is_not_megatrons(content: str, tmp_path: Path) -> None:
    written(save_dcp(tmp_path / "a", STATE), metadata__json=content)
    assert found(tmp_path / "a") == ("torch", "")


def test_nemo(tmp_path: Path) -> None:
    path = tmp_path / "step=100"
    save_dcp(path / "weights", STATE)
    written(path / "weights", metadata__json="{}", common__pt="a pickle")
    written(path / "context" / "tokenizer", vocab="")
    assert found(path) == ("nemo", "weights")
    assert beside(path, "drop") == ["weights/metadata.json", "weights/common.pt", "context/tokenizer/vocab"]


def test_a_save_that_broke_off_is_unfinished(tmp_path: Path) -> None:
    path = tmp_path / "step-7"
    save_dcp(path, STATE)
    (path / ".metadata").unlink()
    assert is_unfinished(path) and not is_dcp(path)
    (tmp_path / "step8" / "model_and_optim").mkdir(parents=True)
    assert not is_unfinished(tmp_path / "step8")
    (path / "__0_0.distcp").rename(tmp_path / "step8" / "model_and_optim" / "__0_0.distcp")
    assert is_unfinished(tmp_path / "step8") and not is_unfinished(path) and not is_unfinished(tmp_path / "none")
