"""Distributed checkpoints through the whole of pmerge: the mean of each tensor, in folders that
torch's own loader reads.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import tensor_bytes
from dcp_checkpoints import grid, load_dcp, load_state, save_dcp, write_clone
from forging import record_again
from safetensors.torch import load_file
from torch import Tensor

from merge_cli import average, open_checkpoint, plan_average, run_average, sweep, verify
from merge_cli.errors import InputError, MismatchError, UsageError
from merge_cli.features.inspect import inspect_checkpoints
from merge_cli.formats.dcp.folder import open_folder
from merge_cli.ranks.launcher import Rank
from merge_cli.ranks.shares import cut

CUTS = {"model.w": grid((40, 30), (4, 1)), "model.v": grid((6, 50), (2, 3)), "optimizer.state.w.exp_avg": grid((40, 30), (2, 1))}
STEPS = (10, 20, 30)


def state(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "model": {
            "w": normal(40, 30), "v": normal(6, 50).bfloat16(), "t": normal(12, 20).t(), "scale": normal(1)[0],
            "none": normal(0, 3), "table": torch.arange(7), "w._extra_state": b"scales",
        },
        "optimizer": {
            "state": {"w": {"exp_avg": normal(40, 30), "exp_avg_sq": normal(40, 30).square(), "step": torch.tensor(float(step))}},
            "param_groups": [{"lr": 1e-3 / step, "betas": (0.9, 0.95)}],
        },
        "train_state": {"step": torch.tensor(step), "ntokens": 100 * step},
    }  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torchtitan") / "checkpoint"
    for step in STEPS:
        save_dcp(folder / f"step-{step}", state(step), CUTS, files=3)
    return folder


def mean(run: Path, name: str, steps: tuple[int, ...] = STEPS) -> bytes:
    tensors = [load_dcp(run / f"step-{step}")[name] for step in steps]
    if not tensors[0].is_floating_point():
        return tensor_bytes(tensors[-1])
    return tensor_bytes(torch.stack([tensor.double() for tensor in tensors]).mean(0).to(tensors[-1].dtype))


MODEL = {"model.w", "model.v", "model.t", "model.scale", "model.none", "model.table"}
MOMENTS = {"optimizer.state.w.exp_avg", "optimizer.state.w.exp_avg_sq"}


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def weights(folder: Path) -> dict[str, bytes]:
    return {name: raw for name, raw in content(folder).items() if name != "pmerge.json"}


@pytest.mark.parametrize("training_state", ["drop", "base", "average"])
def test_the_mean_of_a_run_is_what_torch_loads(run: Path, tmp_path: Path, training_state: str) -> None:
    average(run, tmp_path / "out", training_state=training_state, threads=2, chunk_size=512)
    newest, found = load_dcp(run / "step-30"), load_dcp(tmp_path / "out")
    assert set(found) == (MODEL if training_state == "drop" else set(newest))
    for name, tensor in found.items():
        averaged = name in MODEL or (name in MOMENTS and training_state == "average")
        assert tensor_bytes(tensor) == (mean(run, name) if averaged else tensor_bytes(newest[name])), name
    assert load_state(tmp_path / "out", {"model.w._extra_state": b""})["model.w._extra_state"] == b"scales"
    manifest = json.loads((tmp_path / "out" / "pmerge.json").read_bytes())
    assert manifest.get("training_state", "drop") == training_state and ".metadata" in manifest["side_files"]
    assert verify(tmp_path / "out", against_inputs=True, sample=None).problems == ()
    with pytest.raises(InputError, match="larger than 10 bytes"):
        verify(tmp_path / "out", max_header=10)
    assert "step-30" not in (tmp_path / "out" / ".metadata").read_bytes().decode("latin-1")


def test_the_files_are_those_of_the_base_around_other_values(run: Path, tmp_path: Path) -> None:
    average([run / "step-30"], tmp_path / "out", training_state="base")
    write_clone(open_folder(run / "step-30"), tmp_path / "clone", "base", lambda _, values: values)
    assert weights(tmp_path / "out") == content(tmp_path / "clone")


def test_threads_chunks_and_ranks_make_the_same_bytes(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    average(run, tmp_path / "one", training_state="base", threads=1)
    expected = weights(tmp_path / "one")
    average(run, tmp_path / "many", training_state="base", threads=4, chunk_size=64)
    assert weights(tmp_path / "many") == expected
    monkeypatch.setattr("merge_cli.ranks.shares.MIN_PIECE_BYTES", 512)  # files are cut: their gaps are written at the end
    for rank in range(8):  # each after the other: the last one finds all done and publishes
        plan = plan_average(run, tmp_path / "ranks", training_state="base", rank=Rank(rank, 8, source="--rank"), threads=1)
        assert any(not piece.is_whole for piece in cut(plan.merge.files, 8))
        run_average(plan)
    assert weights(tmp_path / "ranks") == expected


def test_a_sweep_writes_each_as_if_alone(run: Path, tmp_path: Path) -> None:
    sweep([run], tmp_path / "sweep", methods=["sma", "ema:alpha=0.5"], last=[2, 3])
    found = sorted(path.parent for path in (tmp_path / "sweep").rglob("pmerge.json"))
    assert len(found) == 4
    for path in found:
        manifest = json.loads((path / "pmerge.json").read_bytes())
        average(run, tmp_path / path.name, method=manifest["method"], last=len(manifest["inputs"]), **manifest["parameters"])
        assert weights(tmp_path / path.name) == weights(path)
        assert verify(path, against_inputs=True).problems == ()


def test_inspect_names_layout_and_training_state(run: Path) -> None:
    report = inspect_checkpoints([run])
    assert [(each.step, each.layout, each.num_tensors) for each in report.checkpoints] == [(step, "dcp", 6) for step in STEPS]
    notes = report.checkpoints[-1].notes
    assert "torch distributed checkpoint: 6 tensors in 14 chunks" in notes
    assert any("kept by --training-state base" in note and "optimizer" in note for note in notes)
    assert report.differences == []


def test_olmo_core_and_megatron_keep_the_files_that_their_loaders_want(tmp_path: Path) -> None:
    for step in STEPS:
        olmo, megatron = tmp_path / "olmo" / f"step{step}", tmp_path / "megatron" / f"iter_{step:07d}"
        save_dcp(olmo / "model_and_optim", {"model": {"w": torch.full((4, 4), float(step))}, "optim": {"x": torch.ones(2)}})
        (olmo / "train").mkdir()
        (olmo / "train" / "rank0.pt").write_bytes(b"pickle")
        (olmo / ".metadata.json").write_text("{}")
        save_dcp(megatron, {"decoder.w": torch.full((4, 4), float(step))})
        (megatron / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
        (megatron / "common.pt").write_bytes(b"pickle %d" % step)
    average(tmp_path / "olmo", tmp_path / "o")
    assert set(content(tmp_path / "o")) == {
        ".metadata.json",
        "model_and_optim/.metadata",
        "model_and_optim/__0_0.distcp",
        "pmerge.json",
    }
    assert set(load_dcp(tmp_path / "o" / "model_and_optim")) == {"model.w"}
    average(tmp_path / "olmo", tmp_path / "o-base", training_state="base")
    assert content(tmp_path / "o-base")["train/rank0.pt"] == b"pickle"
    average(tmp_path / "megatron", tmp_path / "m", last=2)
    assert content(tmp_path / "m")["common.pt"] == b"pickle 30" and "metadata.json" in content(tmp_path / "m")
    assert load_dcp(tmp_path / "m")["decoder.w"][0, 0] == 25
    for path in ("o", "o-base", "m"):
        assert verify(tmp_path / path, against_inputs=True).problems == ()


def test_a_save_under_way_is_left_out_and_reported(run: Path, tmp_path: Path) -> None:
    for step in STEPS:
        (tmp_path / f"step-{step}").symlink_to(run / f"step-{step}")
    save_dcp(tmp_path / "step-40", state(40))
    (tmp_path / "step-40" / ".metadata").unlink()
    plan = plan_average(tmp_path, tmp_path / "out")
    assert [candidate.step for candidate in plan.candidates] == list(STEPS)
    assert any("step-40 is left out as incomplete" in line and "has no .metadata" in line for line in plan.warnings)
    with pytest.raises(InputError, match=r"has no \.metadata"):
        plan_average([tmp_path / "step-40", tmp_path / "step-30"], tmp_path / "out")


OTHER_CUTS = {**CUTS, "model.w": grid((40, 30), (1, 3)), "model.v": grid((6, 50), (4, 1))}


@pytest.fixture(scope="module")
def resharded(run: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A run that changed its parallelism, and the layout of one tensor in memory, after step 20."""
    folder = tmp_path_factory.mktemp("resharded")
    changed = state(40)
    changed["model"]["t"] = changed["model"]["t"].contiguous()
    return [run / "step-10", run / "step-20", save_dcp(folder / "step-40", changed, OTHER_CUTS, files=2)]


def mean_of(paths: list[Path], name: str) -> bytes:
    tensors = [load_dcp(path)[name] for path in paths]
    if not tensors[0].is_floating_point():
        return tensor_bytes(tensors[-1])
    return tensor_bytes(torch.stack([tensor.double() for tensor in tensors]).mean(0).to(tensors[-1].dtype))


@pytest.mark.parametrize("training_state", ["drop", "average"])
def test_other_chunks_are_gathered_into_those_of_the_base(resharded: list[Path], tmp_path: Path, training_state: str) -> None:
    average(resharded, tmp_path / "out", training_state=training_state, threads=2, chunk_size=100)
    found, layout = load_dcp(tmp_path / "out"), open_folder(tmp_path / "out").metadata.tensors
    for name in MODEL | (MOMENTS if training_state == "average" else set()):
        assert tensor_bytes(found[name]) == mean_of(resharded, name), name
    assert [chunk.sizes for chunk in layout["model.w"].chunks] == [(40, 10)] * 3
    assert verify(tmp_path / "out", against_inputs=True, sample=None).problems == ()
    average(resharded, tmp_path / "again", training_state=training_state, threads=1)
    assert weights(tmp_path / "again") == weights(tmp_path / "out")


def test_any_of_the_layouts_may_be_the_base(resharded: list[Path], tmp_path: Path) -> None:
    """But for a tensor that the base stores permuted, and another checkpoint does not."""
    with pytest.raises(MismatchError, match=r"model\.t strides \(1, 20\)"):
        plan_average(resharded, tmp_path / "out", base=resharded[0])
    average(resharded, tmp_path / "out", base=resharded[0], exclude=["model.t"])
    found = load_dcp(tmp_path / "out")
    for name in MODEL - {"model.t"}:
        assert tensor_bytes(found[name]) == mean_of(resharded, name), name
    assert tensor_bytes(found["model.t"]) == tensor_bytes(load_dcp(resharded[0])["model.t"])


def test_a_tensor_of_another_shape_is_still_an_error(run: Path, tmp_path: Path) -> None:
    changed = state(40)
    changed["model"]["w"] = torch.zeros(41, 30)
    save_dcp(tmp_path / "step-40", changed, {"model.w": grid((41, 30), (2, 1))}, files=1)
    with pytest.raises(MismatchError, match="disagree on which tensors") as caught:
        plan_average([run / "step-30", tmp_path / "step-40"], tmp_path / "out")
    assert "model.w[0:20, 0:30]" in str(caught.value) or "model.w[0:10, 0:30]" in str(caught.value)


@pytest.mark.parametrize(
    "options", [{}, {"shard_size": 3000}, {"dtype": "bf16", "chunk_size": 100}, {"shard_size": 700, "last": 2}], ids=str
)
def test_whole_tensors_are_written_as_safetensors(resharded: list[Path], tmp_path: Path, options: dict[str, Any]) -> None:
    average(resharded, tmp_path / "out", format="safetensors", **options)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert (files == ["model.safetensors"]) == ("shard_size" not in options)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() == ("shard_size" in options)
    found: dict[str, Tensor] = {}
    for name in files:
        found |= load_file(tmp_path / "out" / name)
    assert set(found) == MODEL and not list((tmp_path / "out").glob("*.distcp"))
    for name, tensor in found.items():
        tensors = [load_dcp(path)[name] for path in resharded[-options.get("last", 3) :]]
        expected = tensors[-1]
        if expected.is_floating_point():
            dtype = torch.bfloat16 if "dtype" in options else expected.dtype
            expected = torch.stack([each.double() for each in tensors]).mean(0).float().to(dtype)
        assert tensor.shape == expected.shape and tensor_bytes(tensor) == tensor_bytes(expected), name
    assert verify(tmp_path / "out", against_inputs=True, sample=None).problems == ()
    assert open_checkpoint(tmp_path / "out").dcp is None


def test_whole_tensors_leave_out_what_the_trainers_loader_wants(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "step100"
    save_dcp(folder / "model_and_optim", state(100), CUTS)
    (folder / ".metadata.json").write_text("{}")
    (folder / "config.json").write_text("{}")
    assert "its own conversion" in " ".join(plan_average([folder], tmp_path / "out", format="safetensors").notes)
    average([folder], tmp_path / "out", format="safetensors")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors", "pmerge.json"]
    with pytest.raises(UsageError, match="--training-state base keeps"):
        plan_average(run, tmp_path / "out2", format="safetensors", training_state="base")


def test_integers_that_differ_are_an_error(run: Path, tmp_path: Path) -> None:
    changed = state(40)
    changed["model"]["table"][3] += 1
    save_dcp(tmp_path / "step-40", changed, CUTS, files=3)
    paths = [run / "step-30", tmp_path / "step-40"]
    with pytest.raises(MismatchError, match=r"model\.table"):
        average(paths, tmp_path / "out")
    average(paths, tmp_path / "out", int_policy="newest", restart=True)
    assert load_dcp(tmp_path / "out")["model.table"][3] == 4


@pytest.mark.parametrize("options", [{"dtype": "bf16"}, {"shard_size": 1 << 20}, {"requantize": True}], ids=str)
def test_options_that_the_layout_does_not_allow(run: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        plan_average(run, tmp_path / "out", **options)


def test_moments_are_not_averaged_with_negative_coefficients(run: Path, tmp_path: Path) -> None:
    negative: dict[str, Any] = {"method": "weights", "weights": [-0.5, 0.5, 1.0]}
    with pytest.raises(UsageError, match="second moments must not become negative"):
        plan_average(run, tmp_path / "out", training_state="average", **negative)
    plan_average(run, tmp_path / "out", training_state="base", **negative)


def test_globs_match_tensors_whatever_their_chunks(run: Path, tmp_path: Path) -> None:
    average(run, tmp_path / "out", exclude=["model.w"])
    newest, found = load_dcp(run / "step-30"), load_dcp(tmp_path / "out")
    assert tensor_bytes(found["model.w"]) == tensor_bytes(newest["model.w"])
    assert tensor_bytes(found["model.v"]) == mean(run, "model.v")
    average(run, tmp_path / "only", include=["model.t"])
    found = load_dcp(tmp_path / "only")
    assert tensor_bytes(found["model.t"]) == mean(run, "model.t")
    assert tensor_bytes(found["model.v"]) == tensor_bytes(newest["model.v"])


def test_verify_finds_a_changed_byte_anywhere(run: Path, tmp_path: Path) -> None:
    """Also in the envelopes between values, and after the record was made to fit."""
    out = average(run, tmp_path / "out").output
    rng = random.Random(0)
    for name in (".metadata", "__0_0.distcp"):
        before = (out / name).read_bytes()
        for position in rng.sample(range(len(before)), 12):
            changed = bytearray(before)
            changed[position] ^= 1
            (out / name).write_bytes(changed)
            assert any(name in problem for problem in verify(out).problems)
            record_again(out)
            assert any(name in problem for problem in verify(out, against_inputs=True, sample=None).problems), position
            (out / name).write_bytes(before)
            record_again(out)
    assert verify(out, against_inputs=True, sample=None).problems == ()


def test_an_input_that_changes_is_noticed(run: Path, tmp_path: Path) -> None:
    from merge_cli import run_average
    from merge_cli.errors import ChangedError

    for step in STEPS:
        save_dcp(tmp_path / f"step-{step}", state(step), CUTS, files=3)
    plan = plan_average(tmp_path, tmp_path / "out")
    os.utime(tmp_path / "step-20" / ".metadata", (1, 1))
    with pytest.raises(ChangedError, match=r"step-20/\.metadata changed"):
        run_average(plan)
    assert not (tmp_path / "out").exists()


def test_a_killed_run_is_resumed_to_the_same_bytes(run: Path, tmp_path: Path) -> None:
    """In a process of its own, because it is killed."""
    average(run, tmp_path / "expected", training_state="base")
    command = [sys.executable, "-m", "merge_cli", "average", str(run), "-o", str(tmp_path / "out"), "--training-state", "base"]
    _kill_in_the_middle([*command, "--threads", "1", "--chunk-size", "64"], tmp_path)
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert weights(tmp_path / "out") == weights(tmp_path / "expected")


@pytest.mark.parametrize("format", ["keep", "safetensors"])
def test_a_killed_gathering_is_resumed_to_the_same_bytes(resharded: list[Path], tmp_path: Path, format: str) -> None:
    """In a process of its own, because it is killed."""
    average(resharded, tmp_path / "expected", format=format)
    command = [sys.executable, "-m", "merge_cli", "average", *map(str, resharded), "-o", str(tmp_path / "out"), "--format", format]
    _kill_in_the_middle([*command, "--threads", "1", "--chunk-size", "64"], tmp_path)
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert weights(tmp_path / "out") == weights(tmp_path / "expected")


def _kill_in_the_middle(slow: list[str], tmp_path: Path) -> None:
    process = subprocess.Popen(slow, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    staged = tmp_path / "out.pmerge-partial"
    deadline = time.monotonic() + 60
    while (
        not [path for end in ("distcp", "safetensors") for path in staged.rglob(f"*.{end}*")]
        and process.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "out").exists()


def test_the_step_of_a_folder_without_one_is_the_recorded_one(run: Path, tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(run / "step-10")
    save_dcp(tmp_path / "latest", state(30), CUTS, files=3)
    assert open_checkpoint(tmp_path / "latest").layout == "dcp"
    plan = plan_average([run / "step-10", tmp_path / "latest"], tmp_path / "out")
    assert [candidate.step for candidate in plan.candidates] == [10, 30]
