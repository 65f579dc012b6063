"""Folders that people really have: each written as its tool writes it, and the right answer for it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import write_run
from safetensors.torch import load_file, save_file
from torch import Tensor

from merge_cli import average, plan_average, verify
from merge_cli.errors import InputError, MismatchError, NonFiniteError, PmergeError, UnsupportedError, UsageError

STEPS = (10, 20)


def write(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None, name: str = "model") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / f"{name}.safetensors", metadata={"format": "pt"})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def weights(step: int, **more: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {"layers.0.w": torch.randn(8, 4, generator=generator).bfloat16(), **more}


def mean(tensors: Sequence[Tensor]) -> Tensor:
    return (sum(tensor.double() for tensor in tensors) / len(tensors)).to(tensors[0].dtype)


KV = {
    "quant_method": "compressed-tensors",
    "format": "dense",
    "config_groups": {},
    "kv_cache_scheme": {"num_bits": 8, "type": "float"},
}
SCALES = {f"layers.0.self_attn.{name}": torch.tensor([0.01]).bfloat16() for name in ("k_scale", "v_scale")}


@pytest.mark.parametrize("declared", [(0, 1), (0,), (1,), ()])
def test_scales_of_caches_beside_plain_weights_are_tensors_like_others(declared: Sequence[int], tmp_path: Path) -> None:
    for number, step in enumerate(STEPS):
        config = {"quantization_config": KV} if number in declared else {}
        write(tmp_path / f"checkpoint-{step}", {**weights(step), **SCALES}, config)
    out = average([tmp_path], tmp_path / "out").output
    merged = load_file(out / "model.safetensors")
    assert merged.keys() == {"layers.0.w", *SCALES}
    assert all(torch.equal(merged[name], value) for name, value in SCALES.items())
    assert ("quantization_config" in json.loads((out / "config.json").read_text())) == (1 in declared)
    assert not verify(out, against_inputs=True).problems


@pytest.mark.parametrize(
    "section",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "bitnet", "quantization_mode": "online"},
        {"quant_method": "fp8"},
    ],
    ids=lambda section: section["quant_method"],
)
def test_a_leftover_quantization_config_on_plain_weights_is_a_warning(section: dict[str, Any], tmp_path: Path) -> None:
    for step in STEPS:
        write(tmp_path / f"checkpoint-{step}", weights(step), {"quantization_config": section})
    plan = plan_average([tmp_path], tmp_path / "out")
    (warning,) = [line for line in plan.warnings if "remove `quantization_config`" in line]
    assert warning.startswith(f"config.json of {tmp_path}/checkpoint-{STEPS[0]} (and of 1 more) declares a quantization")
    assert torch.equal(
        load_file(average([tmp_path], tmp_path / "out").output / "model.safetensors")["layers.0.w"],
        mean([weights(step)["layers.0.w"] for step in STEPS]),
    )


def test_the_same_config_with_codes_is_still_refused(tmp_path: Path) -> None:
    codes = {"layers.0.w.weight": torch.ones(4, 4, dtype=torch.int8), "layers.0.w.SCB": torch.ones(4)}
    for step in STEPS:
        write(tmp_path / f"checkpoint-{step}", codes, {"quantization_config": {"quant_method": "bitsandbytes"}})
    with pytest.raises(UnsupportedError):
        plan_average([tmp_path])


@pytest.mark.parametrize("kind", ["other length", "only in the newest", "only in the oldest"])
def test_excluded_tensors_need_not_agree(kind: str, tmp_path: Path) -> None:
    states = {}
    for number, step in enumerate(STEPS):
        state = torch.full((100 + (number if kind == "other length" else 0),), step, dtype=torch.uint8)
        has = kind == "other length" or number == (1 if kind == "only in the newest" else 0)
        states[step] = {"layers.0._extra_state": state} if has else {}
        write(tmp_path / f"iter_{step:07d}", weights(step, **states[step]))
    with pytest.raises(MismatchError) as refused:
        plan_average([tmp_path])
    assert "--exclude" in refused.value.hint
    merged = load_file(average([tmp_path], tmp_path / "out", exclude=["*_extra_state"]).output / "model.safetensors")
    assert torch.equal(merged["layers.0.w"], mean([weights(step)["layers.0.w"] for step in STEPS]))
    assert merged.keys() - {"layers.0.w"} == states[20].keys()
    assert all(torch.equal(merged[name], value) for name, value in states[20].items())
    if kind != "only in the oldest":
        other = load_file(average([tmp_path], tmp_path / "newest", int_policy="newest").output / "model.safetensors")
        assert all(torch.equal(other[name], value) for name, value in states[20].items())


def test_a_vocabulary_that_was_resized_is_copied_from_the_base(tmp_path: Path) -> None:
    for step, rows in zip(STEPS, (30, 32), strict=True):
        write(tmp_path / f"checkpoint-{step}", weights(step, **{"embed.weight": torch.full((rows, 4), float(step))}))
    with pytest.raises(MismatchError, match="shape") as refused:
        plan_average([tmp_path])
    assert "--exclude 'embed.weight'" in refused.value.hint
    merged = load_file(average([tmp_path], tmp_path / "out", exclude=["embed.weight"]).output / "model.safetensors")
    assert torch.equal(merged["embed.weight"], torch.full((32, 4), 20.0))


def test_buffers_that_are_infinite_by_design_are_copied_as_the_hint_has_it(tmp_path: Path) -> None:
    mask = torch.full((2, 2), -torch.inf).triu(1)
    for step in STEPS:
        write(tmp_path / "run" / f"checkpoint-{step}", weights(step, mask=mask))
    with pytest.raises(NonFiniteError, match="`mask`") as refused:
        average([tmp_path / "run"], tmp_path / "out")
    assert "--exclude mask" in refused.value.hint and "--allow-nonfinite" in refused.value.hint
    for name, options in (("copied", {"exclude": ["mask"]}), ("allowed", {"allow_nonfinite": True})):
        result = load_file(average([tmp_path / "run"], tmp_path / name, **options).output / "model.safetensors")
        assert torch.equal(result["mask"], mask)


@pytest.mark.parametrize("stem", ["adapter_model", "diffusion_pytorch_model", "consolidated", "model"])
def test_a_new_shard_size_keeps_the_name_that_the_loader_looks_for(stem: str, tmp_path: Path) -> None:
    tensors = {f"layers.{number}.w": torch.randn(64, 64) for number in range(4)}
    for step in STEPS:
        write(tmp_path / f"checkpoint-{step}", tensors, {}, stem)
    out = average([tmp_path], tmp_path / "one", shard_size=10**9).output
    assert [path.name for path in out.glob("*.safetensors")] == [f"{stem}.safetensors"]
    if stem in ("adapter_model", "consolidated"):
        with pytest.raises(UsageError, match="one file only"):
            plan_average([tmp_path], tmp_path / "many", shard_size=40_000)
        return
    out = average([tmp_path], tmp_path / "many", shard_size=40_000).output
    assert sorted(path.name for path in out.glob("*.safetensors")) == [f"{stem}-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert (out / f"{stem}.safetensors.index.json").is_file()
    assert not verify(out).problems


def test_nothing_of_these_ends_in_another_error(tmp_path: Path) -> None:
    write(tmp_path / "checkpoint-10", weights(10))
    with pytest.raises(PmergeError):
        plan_average([tmp_path / "checkpoint-10"], exclude=["nothing*"])


@pytest.mark.parametrize(
    "name, numbers",
    [
        ("model-{:05d}-of-000003", (1, 3)),
        ("model-{:05d}-of-00003", (0, 2)),
        ("model-{:04d}-of-0003", (1, 3)),
        ("model-{:05d}-of-00003", (1, 3)),
        ("model_{:05d}-of-00003", (1, 3)),
        ("model_{:05d}", (1, 3)),
        ("model_{:05d}", (2,)),
        ("model_{:05d}", (0, 2)),
    ],
)
def test_a_missing_shard_is_noticed_whatever_the_numbering(name: str, numbers: Sequence[int], tmp_path: Path) -> None:
    for step in STEPS:
        for number in numbers:
            write(tmp_path / f"checkpoint-{step}", {f"layers.{number}.w": torch.ones(2)}, {}, name.format(number))
    with pytest.raises(InputError, match="shards are missing"):
        plan_average([tmp_path])


@pytest.mark.parametrize(
    "name", ["model-{:05d}-of-000002", "model-{:04d}-of-0002", "model_{:05d}", "shard-{0:05d}-model-{0:05d}-of-00002"]
)
@pytest.mark.parametrize("first", [0, 1])
def test_complete_sets_of_any_numbering_are_averaged(name: str, first: int, tmp_path: Path) -> None:
    for step in STEPS:
        for number in (first, first + 1):
            write(tmp_path / f"checkpoint-{step}", {f"layers.{number}.w": torch.full((2,), float(step))}, {}, name.format(number))
    out = average([tmp_path], tmp_path / "out").output
    for number in (first, first + 1):
        (value,) = load_file(out / f"{name.format(number)}.safetensors").values()
        assert value.tolist() == [15.0, 15.0]


def test_one_such_shard_given_alone_is_refused(tmp_path: Path) -> None:
    write(tmp_path, weights(10), None, "model-00001-of-000003")
    with pytest.raises(InputError, match="one of several shards"):
        plan_average([tmp_path / "model-00001-of-000003.safetensors"])


def test_shards_of_two_saves_are_no_ranks(tmp_path: Path) -> None:
    for step in STEPS:
        for count in (2, 3):
            for number in range(1, count + 1):
                name = f"model-0000{number}-of-0000{count}"
                write(tmp_path / f"checkpoint-{step}", {f"layers.{number}.w": torch.ones(2)}, {}, name)
    with pytest.raises(InputError, match="shards of 2 saves"):
        plan_average([tmp_path])


def write_index(folder: Path, weight_map: Mapping[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": dict(weight_map)}))


@pytest.mark.parametrize("extra", ["model-00002-of-00002", "model-mtp", "projector"])
def test_weights_that_the_index_forgot_are_never_lost(extra: str, tmp_path: Path) -> None:
    for step in STEPS:
        folder = tmp_path / f"checkpoint-{step}"
        write(folder, {"a": torch.full((2,), float(step))}, {}, "model-00001-of-00002")
        write(folder, {"b": torch.full((2,), float(step))}, {}, extra)
        write_index(folder, {"a": "model-00001-of-00002.safetensors"})
    if extra == "model-00002-of-00002":
        with pytest.raises(InputError, match="does not name 1 shards"):
            plan_average([tmp_path])
        return
    out = average([tmp_path], tmp_path / "out").output
    assert load_file(out / f"{extra}.safetensors")["b"].tolist() == [15.0, 15.0]
    assert json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]["b"] == f"{extra}.safetensors"


def test_a_second_complete_set_is_an_error(tmp_path: Path) -> None:
    for step in STEPS:
        folder = tmp_path / f"checkpoint-{step}"
        write(folder, {"a": torch.ones(2)}, {}, "model-00001-of-00001")
        write(folder, {"a": torch.full((2,), 5.0)})
        write_index(folder, {"a": "model-00001-of-00001.safetensors"})
    with pytest.raises(InputError, match="two sets of weights") as refused:
        plan_average([tmp_path])
    assert "transformers takes model.safetensors" in str(refused.value)


def test_modules_that_modules_json_names_are_kept(tmp_path: Path) -> None:
    for step in STEPS:
        folder = write(tmp_path / f"checkpoint-{step}", weights(step), {})
        write(folder / "2_Dense", {"linear.weight": torch.full((2,), float(step))}, {})
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text("{}")
        (folder / "modules.json").write_text(json.dumps([{"path": path} for path in ("", "1_Pooling", "2_Dense", "../x")]))
        (folder / "runs").mkdir()
    plan = plan_average([tmp_path], tmp_path / "out")
    assert any("2_Dense/model.safetensors" in line and "not averaged" in line for line in plan.warnings)
    out = average([tmp_path], tmp_path / "out").output
    assert (out / "1_Pooling" / "config.json").is_file()
    assert load_file(out / "2_Dense" / "model.safetensors")["linear.weight"].tolist() == [20.0, 20.0]
    assert not (out / "runs").exists() and not verify(out).problems


def test_code_and_its_data_are_kept_and_training_state_is_not(tmp_path: Path) -> None:
    code = ("modeling_x.py", "optimized_attention.py", "scheduler_utils.py", "dataloader_x.py")
    state = ("optimizer.pt", "scheduler.pt", "zero_to_fp32.py")
    for step in STEPS:
        folder = write(tmp_path / f"checkpoint-{step}", weights(step), {})
        for name in (*code, *state, "mel_filters.npz"):
            (folder / name).write_bytes(b"x")
    out = average([tmp_path], tmp_path / "out").output
    assert {path.name for path in out.iterdir()} >= {*code, "mel_filters.npz"}
    assert not any((out / name).exists() for name in state)


def test_params_json_no_longer_declares_codes(tmp_path: Path) -> None:
    for step in STEPS:
        folder = tmp_path / f"checkpoint-{step}"
        codes = torch.ones(16, 16).to(torch.float8_e4m3fn)
        scale = torch.tensor(0.5).bfloat16()
        name = "layers.0.attention.wq."
        tensors = {name + "weight": codes, name + "qscale_weight": scale, name + "qscale_act": scale.clone()}
        write(folder, {**tensors, "norm.weight": torch.ones(16).bfloat16()}, None, "consolidated")
        (folder / "params.json").write_text(json.dumps({"dim": 16, "quantization": {"qformat_weight": "fp8_e4m3"}}))
    out = average([tmp_path], tmp_path / "out").output
    assert json.loads((out / "params.json").read_text()) == {"dim": 16}


def test_epochs_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in range(12):
        write(tmp_path / "run" / f"epoch_{number}", {"w": torch.full((2,), float(number))}, {})
    assert load_file(average([tmp_path / "run"], tmp_path / "out", last=3).output / "model.safetensors")["w"].tolist() == [
        10.0,
        10.0,
    ]
    with pytest.raises(UsageError, match="named one by one"):
        plan_average([tmp_path / "run"], order="given", last=3)
    assert plan_average([tmp_path / "run"]).candidates[-1].path.endswith("epoch_11")


def test_the_step_may_be_in_a_folder_above(tmp_path: Path) -> None:
    paths = []
    for step in (80, 90, 100):
        paths.append(write(tmp_path / f"global_step_{step}" / "actor" / "huggingface", {"w": torch.full((2,), float(step))}, {}))
    plan = plan_average(paths, last=2)
    assert [each.step for each in plan.candidates] == [90, 100]


@pytest.mark.parametrize("inner", ["pretrained_model", "actor/huggingface"])
def test_checkpoints_inside_the_folders_of_their_steps_are_named_by_a_pattern(inner: str, tmp_path: Path) -> None:
    for step in STEPS:
        write(tmp_path / "run" / f"{step:06d}" / inner, weights(step))
        (tmp_path / "run" / f"{step:06d}" / "training_state").mkdir()
    with pytest.raises(InputError) as refused:
        plan_average(tmp_path / "run", tmp_path / "out")
    pattern = refused.value.hint.rpartition("pmerge average ")[2]
    assert pattern == f"{tmp_path}/run/*/{inner}" and "holds its checkpoint" in refused.value.hint
    found = sorted((tmp_path / "run").glob(f"*/{inner}"))
    assert [each.step for each in plan_average(found, tmp_path / "out").candidates] == list(STEPS)


def test_the_parts_of_a_pipeline_are_named_as_models_of_their_own(tmp_path: Path) -> None:
    for step in STEPS:
        for part in ("unet", "vae"):
            write(tmp_path / f"checkpoint-{step}" / part, weights(step), {}, "diffusion_pytorch_model")
    with pytest.raises(InputError) as refused:
        plan_average(tmp_path, tmp_path / "out")
    assert "hold several models (unet, vae)" in refused.value.hint and refused.value.hint.endswith("/*/unet")


def test_runs_further_down_are_found_and_trees_of_parameters_are_no_runs(tmp_path: Path) -> None:
    for seed in (1, 2):
        write(tmp_path / "exp" / f"seed{seed}" / "checkpoints" / "step_10", weights(10))
    with pytest.raises(InputError) as refused:
        plan_average(tmp_path / "exp", tmp_path / "out")
    assert refused.value.hint.endswith(f"pmerge average {tmp_path}/exp/seed1/checkpoints")
    for step in STEPS:
        for name in ("token_embedding", "decoder/0/norm"):
            write(tmp_path / "run" / str(step) / "model" / "model" / name, weights(step), name="model_weight")
    for path in (tmp_path / "run", tmp_path / "run" / str(STEPS[0])):
        with pytest.raises(InputError) as refused:
            plan_average(path, tmp_path / "out")
        assert "nanotron" in refused.value.hint


def test_an_optimizer_in_safetensors_is_training_state(tmp_path: Path) -> None:
    for step in STEPS:
        folder = write(tmp_path / "run" / f"checkpoint-{step}", weights(step), {})
        save_file({"exp_avg": torch.ones(3)}, folder / "optimizer.safetensors")
    plan = plan_average(tmp_path / "run", tmp_path / "out")
    assert plan.merge.inputs[0].side_files.skipped == ("optimizer.safetensors",)
    assert list(load_file(average([tmp_path / "run"], tmp_path / "out").output / "model.safetensors")) == ["layers.0.w"]
    assert not (tmp_path / "out" / "optimizer.safetensors").exists()


def test_the_order_of_a_run_folder_without_steps_is_nobodys_order(tmp_path: Path) -> None:
    for name in ("best", "final"):
        write(tmp_path / name, weights(len(name)), {})
    (note,) = [line for line in plan_average(tmp_path, tmp_path / "out").notes if "order" in line]
    assert note.endswith(f"their order is that of their names, {tmp_path}/final last")


def test_configs_that_differ_in_the_same_field_are_one_warning(tmp_path: Path) -> None:
    for epoch in range(4):
        write(tmp_path / f"epoch_{epoch}", weights(epoch), {"epoch": epoch})
    (warning,) = [line for line in plan_average(tmp_path, tmp_path / "out").warnings if "config.json" in line]
    assert warning.startswith(f"config.json of {tmp_path}/epoch_0 (and of 2 more) differs from {tmp_path}/epoch_3")


def test_names_that_changed_are_shown_on_both_sides(tmp_path: Path) -> None:
    for step, prefix in zip(STEPS, ("model.", "model.language_model."), strict=True):
        write(tmp_path / f"checkpoint-{step}", {f"{prefix}layers.{n}.w": torch.ones(2) for n in range(20)})
    with pytest.raises(MismatchError) as refused:
        plan_average(tmp_path, tmp_path / "out")
    sides = ["missing in" in line for line in refused.value.details[:10]]
    assert sides == [True] * 5 + [False] * 5


def test_side_files_with_steps_in_their_names_make_no_run(tmp_path: Path) -> None:
    paths = []
    for step in (5000, 10000):
        folder = write(tmp_path / f"{step:06d}" / "pretrained_model", {"w": torch.full((2,), float(step))}, {})
        for name in ("policy_preprocessor_step_5_normalizer", "policy_postprocessor_step_0_unnormalizer"):
            write(folder, {"mean": torch.zeros(2)}, None, name)
        paths.append(folder)
    out = average(paths, tmp_path / "out").output
    assert load_file(out / "model.safetensors")["w"].tolist() == [7500.0, 7500.0]
    assert (out / "policy_preprocessor_step_5_normalizer.safetensors").is_file()


@pytest.mark.parametrize("same", [True, False])
def test_files_that_hold_other_rows_are_not_taken_for_alike(same: bool, tmp_path: Path) -> None:
    for number, step in enumerate(STEPS):
        folder = tmp_path / f"step-{step}"
        folder.mkdir()
        for rank in (1, 2):
            offset = 4 * (rank - 1) if same or not number else 2 * (rank - 1)
            places = json.dumps({"w": {"saved_offsets": [offset, 0]}})
            name = folder / f"shard-0000{rank}-model-00001-of-00001.safetensors"
            save_file({"w": torch.full((4, 2), float(step))}, name, metadata={"DCP_SHARDING_INFO": places})
    if same:
        average([tmp_path], tmp_path / "out")
    else:
        with pytest.raises(MismatchError, match="other parts of the tensors"):
            plan_average([tmp_path])


def test_side_files_whose_names_are_not_utf_8_are_kept_and_verified(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run", [{"w": torch.full((4,), float(n))} for n in range(2)])
    odd = b"note-\xcb\xb5\xc3\xf7.md"
    for path in paths:
        (path / os.fsdecode(odd)).write_text("odd")
    out = average(paths, tmp_path / "out").output
    assert (out / os.fsdecode(odd)).read_text() == "odd"
    assert verify(out, against_inputs=True).problems == ()
    assert plan_average(paths, out).is_done, "its own record is read again"
