"""The layouts that checkpoints come in, and the ways in which they are broken."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge_cli import average, open_checkpoint, plan_average, run_average
from merge_cli.errors import ChangedError, InputError, MismatchError, OutputError, PmergeError, UnsupportedError, UsageError
from merge_cli.output.lock import Lock


def tensors(step: int, names: str = "abc") -> dict[str, torch.Tensor]:
    return {f"{name}.weight": torch.full((3, 5), float(step + i)) for i, name in enumerate(names)}


def index(folder: Path, weight_map: Mapping[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def test_single_files_give_a_folder_with_one_model_file(tmp_path: Path) -> None:
    for step in (1, 3):
        save_file(tensors(step), tmp_path / f"model_step_{step}.safetensors")
    out = average([tmp_path / "model_step_3.safetensors", tmp_path / "model_step_1.safetensors"], tmp_path / "out").output
    assert sorted(path.name for path in out.iterdir()) == ["model.safetensors", "pmerge.json"]
    assert load_file(out / "model.safetensors")["c.weight"][0, 0] == 4.0
    assert plan_average([tmp_path]).candidates[0].step == 1  # the folder is a run of files


def test_one_model_safetensors_and_the_same_sharded_fit_together(tmp_path: Path) -> None:
    save_file(tensors(2), folder(tmp_path / "step_1") / "model.safetensors")
    sharded = folder(tmp_path / "step_2")
    save_file({"c.weight": tensors(4)["c.weight"]}, sharded / "x-1.safetensors")
    save_file({"b.weight": tensors(4)["b.weight"], "a.weight": tensors(4)["a.weight"]}, sharded / "x-2.safetensors")
    index(sharded, {"c.weight": "x-1.safetensors", "b.weight": "x-2.safetensors", "a.weight": "x-2.safetensors"})
    out = average([tmp_path / "step_1", tmp_path / "step_2"], tmp_path / "out").output
    merged = {**load_file(out / "x-1.safetensors"), **load_file(out / "x-2.safetensors")}
    assert {name: float(value[0, 0]) for name, value in merged.items()} == {"a.weight": 3, "b.weight": 4, "c.weight": 5}
    whole = average([tmp_path / "step_1", tmp_path / "step_2"], tmp_path / "whole", base=tmp_path / "step_1").output
    assert load_file(whole / "model.safetensors").keys() == merged.keys()


def test_files_without_an_index_keep_their_names_and_get_an_index(tmp_path: Path) -> None:
    for step in (1, 3):
        for name in "ab":
            save_file(tensors(step, name), folder_once(tmp_path / f"step_{step}") / f"part-{name}.safetensors")
    out = average([tmp_path], tmp_path / "out").output
    assert load_file(out / "part-b.safetensors")["b.weight"][0, 0] == 2.0
    assert json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]["b.weight"] == "part-b.safetensors"


def folder_once(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


@pytest.mark.parametrize("name", ["mp_rank_{:02d}/model.safetensors", "rank{}.safetensors", "tp{}_pp0/weights.safetensors"])
def test_names_that_repeat_between_ranks_merge_file_by_file(tmp_path: Path, name: str) -> None:
    for step in (1, 3):
        for rank in range(2):
            path = tmp_path / f"step_{step}" / name.format(rank)
            save_file(tensors(step + 10 * rank, "a"), folder_once(path.parent) / path.name)
    out = average([tmp_path], tmp_path / "out").output
    assert [float(load_file(out / name.format(rank))["a.weight"][0, 0]) for rank in range(2)] == [2.0, 12.0]
    (tmp_path / "step_1" / name.format(1)).unlink()
    with pytest.raises(MismatchError, match=r"disagree"):
        plan_average([tmp_path / "step_1", tmp_path / "step_3"])


def test_shard_size_follows_the_hub(tmp_path: Path) -> None:
    for step in (1, 3):
        save_file(tensors(step), folder(tmp_path / f"step_{step}") / "model.safetensors")
    out = average([tmp_path], tmp_path / "out", shard_size=120).output
    names = sorted(path.name for path in out.glob("*.safetensors"))
    assert names == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert open_checkpoint(out).tensors.keys() == tensors(1).keys()


def two(tmp_path: Path) -> tuple[Path, Path]:
    for step in (1, 3):
        here = folder(tmp_path / f"step_{step}")
        save_file(tensors(step), here / "x.safetensors")
        index(here, dict.fromkeys(tensors(step), "x.safetensors"))
    return tmp_path / "step_1", tmp_path / "step_3"


def test_hub_cache_links_are_followed_and_others_refused(tmp_path: Path) -> None:
    one, other = two(tmp_path)
    blobs, snapshot = folder(tmp_path / "models--a" / "blobs"), folder(tmp_path / "models--a" / "snapshots" / "abc123")
    for path in list(one.iterdir()):
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert average([snapshot, other], tmp_path / "out").output.exists()
    (other / "x.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (other / "x.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(InputError, match="outside the checkpoint"):
        open_checkpoint(other)


@pytest.mark.parametrize("target", ["../step_3/x.safetensors", "/etc/passwd", "", "a/../../x", 7, "x\0.safetensors"])
def test_an_index_cannot_reach_outside(tmp_path: Path, target: object) -> None:
    one, _ = two(tmp_path)
    index(one, {"a.weight": target})  # type: ignore[dict-item]
    with pytest.raises(InputError, match="weight_map"):
        open_checkpoint(one)


def test_incomplete_checkpoints_are_refused(tmp_path: Path) -> None:
    one, _ = two(tmp_path)
    index(one, {**dict.fromkeys(tensors(1), "x.safetensors"), "d.weight": "x.safetensors"})
    with pytest.raises(InputError, match="names 1 tensors that are not in their shards"):
        open_checkpoint(one)
    index(one, {**dict.fromkeys(tensors(1), "x.safetensors"), "d.weight": "y.safetensors"})
    with pytest.raises(InputError, match="1 of 2 weight files are missing"):
        open_checkpoint(one)
    numbered = folder(tmp_path / "numbered")
    save_file(tensors(1), numbered / "model-00001-of-00003.safetensors")
    with pytest.raises(InputError, match="2 of 3 shards are missing"):
        open_checkpoint(numbered)
    (numbered / "model-00001-of-00003.safetensors").rename(numbered / "model.ckpt")
    with pytest.raises(InputError, match="no safetensors"):
        open_checkpoint(numbered)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: data + b"x", lambda data: b"\xff" * 8 + data[8:], lambda data: data[:5]]
)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, damage: object) -> None:
    one, _ = two(tmp_path)
    path = one / "x.safetensors"
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(InputError, match=r"x\.safetensors"):
        open_checkpoint(one)


def test_quantized_codes_are_refused_by_name(tmp_path: Path) -> None:
    for step in (1, 2):
        codes = torch.ones(4, 4).to(torch.float8_e4m3fn)
        save_file({"q.weight": codes}, folder(tmp_path / f"step_{step}") / "model.safetensors")
    with pytest.raises(UnsupportedError, match=r"FP8 tensor `q\.weight`.*scale"):
        plan_average([tmp_path])


def test_an_input_that_changes_after_planning_is_noticed(tmp_path: Path) -> None:
    one, other = two(tmp_path)
    plan = plan_average([one, other], tmp_path / "out")
    os.utime(one / "x.safetensors", ns=(1, 1))
    with pytest.raises(ChangedError, match="changed"):
        run_average(plan)
    assert not (tmp_path / "out").exists()


def test_another_run_on_the_same_destination_is_told_who_holds_it(tmp_path: Path) -> None:
    with (
        Lock(tmp_path / "out.pmerge-partial" / "lock", tmp_path / "out"),
        pytest.raises(OutputError, match="another run") as refused,
    ):
        average(list(two(tmp_path)), tmp_path / "out")
    assert f"pid       {os.getpid()}" in str(refused.value)


def test_a_finished_file_is_kept_only_for_the_same_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = two(tmp_path)
    staged = tmp_path / "out.pmerge-partial"

    def stop(*_: object) -> None:
        raise OutputError("stopped")

    for method in ("sma", "wma"):
        with monkeypatch.context() as patch:
            patch.setattr("merge_cli.output.publish._give_final_name", stop)
            with pytest.raises(OutputError, match="stopped"):
                average(inputs, tmp_path / "out", method=method, restart=True)
        assert not (tmp_path / "out").exists()
        assert (staged / "done" / "x.safetensors.json").exists()
    with pytest.raises(OutputError, match="another request") as refused:
        average(inputs, tmp_path / "out", method="sma")
    assert "request, method  was wma, is sma" in str(refused.value)
    again = average(inputs, tmp_path / "out", method="wma")
    assert again.reused == 1
    assert load_file(tmp_path / "out" / "x.safetensors")["a.weight"][0, 0] == torch.tensor(7 / 3)
    assert not staged.exists()


def test_stages_steps_and_orders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    for name in ("stage1-step100", "stage2-step200", "a", "step_100"):
        save_file(tensors(1), folder(tmp_path / name) / "model.safetensors")
    for names, text in (
        (["stage1-step100", "stage2-step200"], "different stages"),
        (["stage1-step100", "step_100"], "stages"),
        (["a", "step_100"], "no step"),
    ):
        with pytest.raises(PmergeError, match=text):
            plan_average([tmp_path / name for name in names], method="ema")
        assert plan_average([tmp_path / name for name in names], method="ema", order="given").candidates[0].path.endswith(names[0])
    with pytest.raises(UsageError, match="is defined over steps"):
        plan_average([tmp_path / "a", tmp_path / "step_100"], method="power", order="given")
