"""The whole job reads through the seam: from a store that is a dictionary come the same bytes as
from files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import memory_store
import pytest
import torch
from dcp_checkpoints import save_dcp
from golden_inputs import RUNS

from merge_cli import Rank, average, finalize, plan_average, run_average, sweep, verify
from merge_cli.errors import ChangedError, InputError, UsageError
from merge_cli.features.inspect import inspect_checkpoints
from merge_cli.features.watch import Event, watch
from merge_cli.features.watch_plan import plan_watch
from merge_cli.request.candidates import read_candidate
from merge_cli.request.grid import grid
from merge_cli.stores import store as stores


@pytest.fixture
def local(tmp_path: Path) -> list[Path]:
    return RUNS["sharded"](tmp_path / "inputs")


@pytest.fixture
def far(local: list[Path], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The same run as `memory://` paths; the files themselves are gone."""
    monkeypatch.setitem(stores.STORES, "memory", "memory_store")
    monkeypatch.setattr(memory_store, "FILES", {})
    paths = [f"memory://runs/one/{path.name}" for path in local]
    for path, name in zip(local, paths, strict=True):
        memory_store.load(path, name)
    return paths


def content(folder: Path) -> dict[str, Any]:
    """All files of a result; of its record what does not depend on the place of the inputs."""
    found = {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    record = json.loads(found.pop("pmerge.json"))
    return {**found, "coefficients": [each["coefficient"] for each in record["inputs"]], "files": record["files"]}


@pytest.mark.parametrize("options", [{}, {"method": "ema", "chunk_size": 8192, "direct": "on"}], ids=["sma", "ema"])
def test_average_of_far_checkpoints(options: dict[str, Any], local: list[Path], far: list[str], tmp_path: Path) -> None:
    expected = content(average(local, tmp_path / "near", device="cpu", **options).output)
    assert content(average(far, tmp_path / "far", device="cpu", **options).output) == expected
    run = average(["memory://runs/one/"], tmp_path / "run", device="cpu", **options)
    assert content(run.output) == expected
    record = json.loads((run.output / "pmerge.json").read_bytes())
    assert [entry["path"] for entry in record["inputs"]] == far and record["base"] == far[-1]
    found = verify(run.output, against_inputs=True, device="cpu")
    assert found.ok and found.recomputed > 0


def test_a_run_in_a_store_is_watched(local: list[Path], far: list[str], tmp_path: Path) -> None:
    """Whose objects have no times: they settle while they are looked at."""
    shard = next(name for name in memory_store.FILES if name.startswith(far[-1]) and name.endswith(".safetensors"))
    last = memory_store.FILES.pop(shard)
    plan = plan_watch("memory://runs/one", grid(["sma"], [2]), output=tmp_path / "out", settle_s=0)
    for found in ([f"sma-last2-at{read_candidate(far[-2]).step}"], [], [f"sma-last2-at{read_candidate(far[-1]).step}"], []):
        events: list[Event] = []
        assert watch(plan, events.append, once=True) == 0
        assert [event.name for event in events if event.kind == "merged"] == found
        if not found:
            memory_store.FILES[shard] = last
    average(local[-2:], tmp_path / "near")
    made = tmp_path / "out" / "merges" / f"sma-last2-at{read_candidate(far[-1]).step}"
    assert content(made) == content(tmp_path / "near")


def test_sweeps_ranks_and_inspect(local: list[Path], far: list[str], tmp_path: Path) -> None:
    expected = content(average(local, tmp_path / "near", device="cpu").output)
    made = sweep(far, tmp_path / "sweep", methods=["sma", "ema"], device="cpu")
    assert content(made.outputs[0]) == expected
    for rank in (0, 1):
        run_average(plan_average(far, tmp_path / "ranks", device="cpu", rank=Rank(rank, 2)))
    assert content(finalize(tmp_path / "ranks")) == expected
    report = inspect_checkpoints(["memory://runs/one"])
    assert [each.path for each in report.checkpoints] == far and not report.broken


def test_distributed_checkpoints_are_read_through_the_seam_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(stores.STORES, "memory", "memory_store")
    monkeypatch.setattr(memory_store, "FILES", {})
    for step in (1, 2):
        path = save_dcp(tmp_path / f"step-{step}", {"w": torch.full((64, 64), float(step)), "b": torch.arange(10.0) * step})
        memory_store.load(path, f"memory://run/step-{step}")
    near = average([tmp_path / "step-1", tmp_path / "step-2"], tmp_path / "near", device="cpu").output
    far = average(["memory://run"], tmp_path / "far", device="cpu").output
    for name in (".metadata", "__0_0.distcp"):
        assert (far / name).read_bytes() == (near / name).read_bytes()


def test_a_far_file_that_changes_is_noticed(far: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_average(far, tmp_path / "out", device="cpu")
    victim = plan.merge.inputs[0].files[0].path
    memory_store.FILES[victim] = memory_store.FILES[victim][:-1] + b"\x00"
    from merge_cli import run_average

    with pytest.raises(ChangedError, match=victim):
        run_average(plan)
    assert not (tmp_path / "out").exists()
    record = average(far, tmp_path / "again", device="cpu").output
    memory_store.FILES[victim] = memory_store.FILES[victim][:-1] + b"\x01"
    assert any("has changed since" in line for line in verify(record, against_inputs=True, device="cpu").problems)


def test_what_is_missing_is_named(far: list[str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such checkpoint: memory://runs/two"):
        average(["memory://runs/two"], tmp_path / "out")
    with pytest.raises(UsageError, match="named twice"):
        average([far[0], far[0] + "/"], tmp_path / "out")
    index = far[0] + "/model.safetensors.index.json"
    shard = next(path for path in memory_store.FILES if path.startswith(far[0]) and path.endswith(".safetensors"))
    del memory_store.FILES[shard]
    with pytest.raises(InputError, match="weight files are missing in " + far[0]):
        average(far, tmp_path / "out")
    memory_store.FILES[index] = b"{"
    with pytest.raises(InputError, match=f"{index} is not valid JSON"):
        average(far, tmp_path / "out")
