"""One checkpoint under two names is noticed by a few blocks; near copies are not taken for it."""

import shutil
from pathlib import Path

import pytest
import torch
from builders import write_checkpoint

from merge_cli.features.average import plan_average
from merge_cli.formats.opening import open_checkpoint
from merge_cli.formats.twins import SAMPLES, twin_warnings
from merge_cli.stores.local import LocalSource


def tensors(value: float) -> dict[str, torch.Tensor]:
    frozen = {f"frozen.{i}": torch.zeros(64, 64) for i in range(6)}
    return {**frozen, "w": torch.full((64, 64), value), "small": torch.ones(3)}


def warnings(*folders: Path) -> list[str]:
    return twin_warnings([open_checkpoint(folder) for folder in folders])


def test_a_copy_is_named_and_checkpoints_of_one_run_are_not(tmp_path: Path) -> None:
    run = [write_checkpoint(tmp_path / f"step_{n}", tensors(n), shards=2) for n in (1, 2, 3)]
    assert warnings(*run) == []
    shutil.copytree(run[1], tmp_path / "step_4")
    (line,) = warnings(*run, tmp_path / "step_4")
    assert f"{run[1]} and {tmp_path / 'step_4'} seem to be one checkpoint" in line and f"{SAMPLES} blocks" in line
    (tmp_path / "step_4" / "config.json").write_text("{}")
    assert any("seem to be one checkpoint" in line for line in plan_average(tmp_path, tmp_path / "out").warnings)


def test_empty_and_tiny_checkpoints_are_compared_whole(tmp_path: Path) -> None:
    one, two, three = ({"a": torch.tensor(float(n)), "none": torch.zeros(0)} for n in (1, 2, 1))
    run = [write_checkpoint(tmp_path / name, each) for name, each in zip("abc", (one, two, three), strict=True)]
    (line,) = warnings(*run)
    assert line.startswith(f"{run[0]} and {run[2]} ")


def test_most_checkpoints_are_read_in_one_block_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = [write_checkpoint(tmp_path / f"step_{n}", {"w": torch.full((64, 64), float(n))}) for n in range(4)]
    opened = [open_checkpoint(folder) for folder in run]
    reads: list[str] = []
    read = LocalSource.read_into

    def read_into(source: LocalSource, offset: int, buffer: memoryview) -> None:
        reads.append(source.path)
        read(source, offset, buffer)

    monkeypatch.setattr(LocalSource, "read_into", read_into)
    assert twin_warnings(opened) == []
    assert len(reads) == len(set(reads)) == len(run)
