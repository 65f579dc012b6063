"""Folders that people really have: each written as its tool writes it, and the right answer for it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from merge_cli import average, plan_average, verify
from merge_cli.errors import MismatchError, PmergeError, UnsupportedError, UsageError

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
def test_a_leftover_quantization_config_on_plain_weights_is_a_note(section: dict[str, Any], tmp_path: Path) -> None:
    for step in STEPS:
        write(tmp_path / f"checkpoint-{step}", weights(step), {"quantization_config": section})
    plan = plan_average([tmp_path], tmp_path / "out")
    assert sum("remove `quantization_config`" in note for note in plan.notes) == 2
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
