"""Shards with odd names: published under just these, alone and by ranks, or refused when planned."""

import json
import os
from pathlib import Path

import pytest
import torch
from builders import training_run, write_safetensors

from merge_cli import Rank, average, plan_average, run_average, verify
from merge_cli.errors import OutputError

ODD = {
    "record of another": ("a/b.safetensors", "a%2Fb.safetensors"),
    "243 bytes": ("x" * 231 + ".safetensors", "b.safetensors"),
    "255 bytes": ("x" * 243 + ".safetensors", "y" * 243 + ".safetensors"),
    "a piece": ("m@0-100.safetensors", "m.safetensors"),
}
TENSORS = [{f"{part}.weight": torch.arange(500.0)} for part in ("one", "two")]


def write_run(folder: Path, names: tuple[str, str]) -> list[Path]:
    """Two checkpoints of two shards with these names, and an index of them."""
    found = []
    runs = [training_run(tensors, 2) for tensors in TENSORS]
    for step in (0, 1):
        checkpoint = folder / f"checkpoint-{step + 1}00"
        weight_map: dict[str, str] = {}
        for name, run in zip(names, runs, strict=True):
            (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
            write_safetensors(checkpoint / name, run[step])
            weight_map |= dict.fromkeys(run[step], name)
        (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        found.append(checkpoint)
    return found


@pytest.mark.parametrize("names", ODD.values(), ids=ODD)
def test_odd_names_are_published_alone_and_by_ranks(
    names: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("merge_cli.ranks.shares.MIN_PIECE_BYTES", 512)
    run = write_run(tmp_path / "run", names)
    alone = average(run, tmp_path / "alone").output
    results = [run_average(plan_average(run, tmp_path / "ranks", rank=Rank(n, 2, source="--rank"))) for n in (0, 1)]
    assert any(result.has_published for result in results)
    for name in names:
        assert (alone / name).read_bytes() == (tmp_path / "ranks" / name).read_bytes()
    assert verify(alone, against_inputs=True, sample=None).problems == ()


def test_a_name_that_the_filesystem_cannot_hold_is_refused_when_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", ("x" * 150 + ".safetensors", "b.safetensors"))
    monkeypatch.setattr(os, "pathconf", lambda *_: 143)  # as eCryptfs
    (finding,) = plan_average(run, tmp_path / "out").findings
    assert isinstance(finding, OutputError) and "cannot hold a file with a name of 162 bytes: xxx" in finding.message
    assert not (tmp_path / "out.pmerge-partial").exists()
