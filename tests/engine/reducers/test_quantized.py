"""Quantized checkpoints through the whole tool: every scheme, dequantized or quantized again,
mixed, sharded, streamed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import INDEX, digests, read_layout
from checks import interval, outside, units_apart
from quantizing import decoded
from reference import exact_mean, load
from safetensors.torch import load_file
from schemes import FP8, PLAIN, READ, quantized_run, stored_parts, write_quantized

from merge_cli import average, plan_average
from merge_cli.engine.buffers import HostBuffer, page_aligned
from merge_cli.engine.chunk import ChunkSize
from merge_cli.engine.kernels import native
from merge_cli.engine.reader import InputFiles
from merge_cli.engine.reads import Reads
from merge_cli.engine.reducers.native_quantized import DecodedSums, decoded_bytes
from merge_cli.errors import MismatchError, NonFiniteError, PmergeError, UsageError
from merge_cli.features.inspect import inspect_checkpoints
from merge_cli.formats.quantization import Stored, find_quantized
from merge_cli.planning.extent import QuantizedExtent


@pytest.mark.parametrize("case", READ)
def test_dequantized_average_of_every_scheme(case: str, tmp_path: Path) -> None:
    paths, values, name, _ = quantized_run(tmp_path / "run", case)
    result = average(paths, tmp_path / "out")
    merged = load(result.output)
    assert set(merged) == {name, *PLAIN}
    assert merged[name].dtype == torch.bfloat16 and merged[name].shape == values[0].shape
    assert not outside(merged[name], interval(values, "sma", {}, [1, 2, 3], torch.bfloat16)).numel()
    assert torch.equal(merged["lm_head.weight"], PLAIN["lm_head.weight"])
    layout = read_layout(result.output)
    assert [entry[0] for entry in layout["model-00001-of-00002.safetensors"]] == ["lm_head.weight", name]
    assert [entry[0] for entry in layout["model-00002-of-00002.safetensors"]] == ["model.norm.weight"]
    config = json.loads((result.output / "config.json").read_text())
    assert "quantization_config" not in json.dumps(config) and config["torch_dtype"] == "bfloat16"
    index = json.loads((result.output / INDEX).read_text())
    assert set(index["weight_map"]) == set(merged)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in merged.values())


@pytest.mark.parametrize("case", READ)
def test_requantized_copies_come_back_bit_for_bit(case: str, tmp_path: Path) -> None:
    """Merging a checkpoint with itself gives every byte of every weight file back, whatever the
    rule that made its scales.
    """
    parts = {**PLAIN, **stored_parts(case, 5)}
    names = list(parts)
    paths = [write_quantized(tmp_path / f"step_{n}", parts, READ[case][1], [names[:3], names[3:]]) for n in (1, 2)]
    result = average(paths, tmp_path / "out", method="wma", requantize=True)
    for file, content in read_layout(paths[1]).items():
        assert read_layout(result.output)[file] == content
    stored, found = load(paths[1]), load(result.output)
    for name, tensor in stored.items():
        assert torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (tensor, found[name]))), name
    largest, mean = result.statistics.requantization_error or (1.0, 1.0)
    assert largest < 1e-6 and mean < 1e-6  # (v + 2 v) / 3 in float32 is v but for the last bit
    assert json.loads((result.output / "config.json").read_text()) == json.loads((paths[1] / "config.json").read_text())


@pytest.mark.parametrize("case", READ)
def test_requantized_average_of_every_scheme(case: str, tmp_path: Path) -> None:
    paths, values, name, codec = quantized_run(tmp_path / "run", case)
    result = average(paths, tmp_path / "out", requantize=True)
    assert read_layout(result.output) == read_layout(paths[-1])
    _, config, shape, _ = READ[case]
    merged = load(result.output)
    stored = {key: Stored(*READ[case][0][key]) for key in READ[case][0]}
    quantized = find_quantized(stored, config).tensors[name]
    raw = {role: merged[part].reshape(-1).view(torch.uint8) for role, part in quantized.parts}
    after = decoded(codec, raw, shape).view(shape)
    mean = torch.stack(values).double().mean(0).float()
    largest, average_error = result.statistics.requantization_error or (1.0, 1.0)
    assert 0 < average_error < 0.3 and largest <= 0.5
    assert float((after - mean).abs().max() / mean.abs().max()) == pytest.approx(largest, rel=1e-3)


@pytest.mark.parametrize("case", ["DeepSeek-V3", "nvfp4", "gpt-oss", "packed int4, asymmetric", "per tensor"])
@pytest.mark.parametrize("requantize", [False, True])
def test_same_bytes_however_it_runs(case: str, requantize: bool, tmp_path: Path) -> None:
    paths, *_ = quantized_run(tmp_path / "run", case)
    options: dict[str, Any] = {"requantize": requantize, "method": "ema"}
    plain = digests(average(paths, tmp_path / "plain", **options).output)
    for number, (memory, threads) in enumerate([(9 << 20, 1), (30 << 20, 3), (1 << 30, 5)]):
        assert digests(average(paths, tmp_path / str(number), memory=memory, threads=threads, **options).output) == plain


def test_quantized_and_plain_checkpoints_of_a_run_mix(tmp_path: Path) -> None:
    case = "DeepSeek-V3"
    paths, values, name, _ = quantized_run(tmp_path / "run", case, 2)
    plain = write_quantized(tmp_path / "run" / "step_3", {name: values[0].bfloat16(), **PLAIN}, {})
    expected = exact_mean([values[0], values[1], values[0].bfloat16().float()], [1, 1, 1], torch.bfloat16)
    merged = average([*paths, plain], tmp_path / "out")
    assert "quantization_config" not in json.loads((merged.output / "config.json").read_text())
    assert units_apart(load(merged.output)[name], expected).max() <= 1
    other = average([*paths, plain], tmp_path / "other", base=paths[0])
    assert torch.equal(load(other.output)[name], load(merged.output)[name])
    again = average([*paths, plain], tmp_path / "again", base=paths[0], requantize=True)
    assert read_layout(again.output) == read_layout(paths[0])
    with pytest.raises(UsageError, match="not quantized"):
        plan_average([*paths, plain], requantize=True)


def test_excluded_quantized_tensors_are_copied(tmp_path: Path) -> None:
    paths, values, name, _ = quantized_run(tmp_path / "run", "DeepSeek-V3")
    merged = load(average(paths, tmp_path / "out", exclude=["a.*"], method="ema").output)
    assert torch.equal(merged[name], values[-1].bfloat16())
    again = load(average(paths, tmp_path / "again", exclude=["a.*"], requantize=True).output)
    for key, tensor in load(paths[-1]).items():
        assert torch.equal(again[key].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), key


def test_nan_codes_are_found(tmp_path: Path) -> None:
    paths, _, name, _ = quantized_run(tmp_path / "run", "DeepSeek-V3", 1)
    parts = stored_parts("DeepSeek-V3", 9)
    parts["a.weight"].view(torch.uint8)[7, 5] = 0x7F
    bad = write_quantized(tmp_path / "run" / "step_9", {**PLAIN, **parts}, FP8)
    for requantize in (False, True):
        with pytest.raises(NonFiniteError, match=r"`a\.weight`") as raised:
            average([*paths, bad], tmp_path / "out", requantize=requantize)
        assert str(bad) in str(raised.value.details)
    result = average([*paths, bad], tmp_path / "out", allow_nonfinite=True)
    assert result.nonfinite == {name: 1}


def test_activation_scales_are_dropped_or_must_agree(tmp_path: Path) -> None:
    paths = []
    for step in (1, 2, 3):
        tensors = {**PLAIN, **stored_parts("per tensor", step)}
        module = next(iter(stored_parts("per tensor", 0))).removesuffix(".weight")
        tensors[f"{module}.input_scale"] = torch.tensor([0.5 if step < 3 else 0.75])
        paths.append(write_quantized(tmp_path / f"step_{step}", tensors, READ["per tensor"][1]))
    assert not any("input_scale" in name for name in load(average(paths, tmp_path / "out").output))
    kept = load(average(paths[:2], tmp_path / "kept", requantize=True).output)
    assert kept[f"{module}.input_scale"] == 0.5
    with pytest.raises(MismatchError, match="activation scales"):
        average(paths, tmp_path / "no", requantize=True)


def test_one_file_per_rank(tmp_path: Path) -> None:
    """Every rank's file holds tensors of the same names, quantized each for itself."""
    paths = []
    for step in (1, 2):
        folder = tmp_path / f"step_{step}"
        folder.mkdir()
        for rank in (0, 1):
            one = write_quantized(tmp_path / f"{step}{rank}", {**PLAIN, **stored_parts("DeepSeek-V3", rank)}, FP8)
            (one / "model-00001-of-00001.safetensors").rename(folder / f"model_rank_{rank}.safetensors")
        (folder / "config.json").write_text(json.dumps(FP8))
        paths.append(folder)
    out = average(paths, tmp_path / "out", requantize=True).output
    for rank in (0, 1):
        merged, stored = (load_file(folder / f"model_rank_{rank}.safetensors") for folder in (out, paths[1]))
        for name, tensor in stored.items():
            assert torch.equal(merged[name].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))
    plain = average(paths, tmp_path / "plain").output
    assert load_file(plain / "model_rank_0.safetensors").keys() == {*PLAIN, "a.weight"}


@pytest.mark.parametrize("option", [{"dtype": "fp32"}])
def test_contradictions_are_refused(option: dict[str, Any], tmp_path: Path) -> None:
    paths, *_ = quantized_run(tmp_path / "run", "DeepSeek-V3", 2)
    with pytest.raises(PmergeError, match="--requantize"):
        plan_average(paths, requantize=True, **option)
    wide = average(paths, tmp_path / "out", dtype="fp32").output
    assert load(wide)["a.weight"].dtype == torch.float32


def test_inspect_counts_what_codes_stand_for(tmp_path: Path) -> None:
    paths, values, *_ = quantized_run(tmp_path / "run", "packed int4", 1)
    unknown = {**PLAIN, "a.qweight": torch.ones(4, 4, dtype=torch.int32)}
    write_quantized(tmp_path / "run" / "step_7", unknown, {"quantization_config": {"quant_method": "gptq"}})
    known, refused = inspect_checkpoints([tmp_path / "run"]).checkpoints
    assert known.path == str(paths[0]) and known.unreadable == ""
    assert known.num_parameters == values[0].numel() + sum(tensor.numel() for tensor in PLAIN.values())
    assert list(known.quantization.values()) == [1]
    assert refused.quantization == {} and "gptq" in refused.unreadable


@pytest.mark.parametrize("kernel", native.kernels())
@pytest.mark.parametrize("case", READ)
def test_every_kernel_gives_the_encoder_the_sums_of_torch(
    case: str, kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = quantized_run(tmp_path / "run", case)[0]
    outs = []
    for name in ("torch", kernel):
        monkeypatch.setenv(native.VARIABLE, name)
        outs.append(digests(average(paths, tmp_path / name, method="ema", requantize=True, device="cpu").output))
    assert outs[0] == outs[1]


@pytest.mark.skipif(native.load() is None, reason="the native kernel was not built")
@pytest.mark.parametrize("case", ["DeepSeek-V3", "nvfp4", "gpt-oss"])
def test_the_buffers_of_native_sums_are_no_larger_than_stated(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def buffer(num_bytes: int) -> HostBuffer:
        made.append(num_bytes)
        return page_aligned(num_bytes)

    monkeypatch.setattr("merge_cli.engine.reducers.native_quantized.page_aligned", buffer)
    plan = plan_average(quantized_run(tmp_path / "run", case)[0], tmp_path / "out", requantize=True, device="cpu").merge
    extent = next(each for file in plan.files for each in file.extents if isinstance(each, QuantizedExtent))
    size = ChunkSize(4096, 8 * 4096, 4096)
    with InputFiles() as inputs:
        sums = DecodedSums(Reads(inputs), 0)
        for first in range(0, extent.num_rows, extent.rows_at_once(size.values)):
            end = min(extent.num_rows, first + extent.rows_at_once(size.values))
            sums.reduce(extent, {0: plan.operation(extent, 0)}, "F32", first, end)
    assert 0 < sum(made) <= decoded_bytes([extent], size, 4)
