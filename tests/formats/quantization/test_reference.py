"""The codecs against the libraries that wrote the formats: transformers and compressed-tensors, as
installed.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest
import torch
from quantizing import encoded, nasty_values
from torch import Tensor

from merge_cli.formats.quantization import Stored, find_quantized, without_quantization
from merge_cli.formats.quantization.codec import QuantizedTensor
from merge_cli.formats.quantization.fp8 import Fp8
from merge_cli.formats.quantization.layout import Grid

pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

DTYPE_NAMES = {
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
}


def raw(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).flatten().view(torch.uint8)


def pair(tensors: dict[str, Tensor], config: dict[str, object]) -> dict[str, QuantizedTensor]:
    stored = {name: Stored(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    return find_quantized(stored, config).tensors


def read(found: QuantizedTensor, tensors: dict[str, Tensor]) -> Tensor:
    """The logical tensor in float32, decoded in one piece."""
    parts = {role: raw(tensors[name]) for role, name in found.parts}
    return found.codec.decode(parts, found.shape, 0, math.prod(found.shape[:-1])).view(found.shape)


def written(found: QuantizedTensor, values: Tensor) -> dict[str, Tensor]:
    """The stored bytes of `values` by stored name, encoded without a base."""
    coded = encoded(found.codec, values.view(-1, found.shape[-1]), found.shape, None, 1)
    return {name: coded[role] for role, name in found.parts}


def weights(rows: int, cols: int, seed: int = 0) -> Tensor:
    values = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * 0.05
    values[:, -1] = 0.75
    return values


# transformers


def fp8_config(**more: object) -> dict[str, object]:
    return {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], **more}}


def all_codes(*shape: int) -> Tensor:
    """E4M3 codes, every finite one many times over."""
    codes = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(4)).to(torch.uint8)
    codes[(codes & 127) == 127] = 8
    return codes.view(torch.float8_e4m3fn)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
@pytest.mark.parametrize("lead", [(), (3,)])
def test_block_fp8_decodes_as_transformers_does(scale_dtype: torch.dtype, lead: tuple[int, ...]) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight = all_codes(*lead, 256, 384)
    scale = (torch.rand(*lead, 2, 3) * 0.01 + 1e-5).to(scale_dtype)
    prefix = "m.experts.gate_up_proj" if lead else "m.up_proj.weight"
    tensors = {prefix: weight, f"{prefix}_scale_inv": scale}
    found = pair(tensors, fp8_config())[prefix]
    assert isinstance(found.codec, Fp8)
    expected = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32)
    assert torch.equal(read(found, tensors), expected)


def test_block_fp8_with_ragged_edges_decodes_as_compressed_tensors_does() -> None:
    from compressed_tensors.entrypoints.convert.converters.fp8block_dequantizer import FP8BlockDequantizer

    tensors = {"a.weight": all_codes(300, 200), "a.weight_scale_inv": torch.rand(3, 2) * 0.01}
    expected = FP8BlockDequantizer(dtype=torch.float32)._create_dequantized_weight(*tensors.values())
    assert torch.equal(read(pair(tensors, fp8_config())["a.weight"], tensors), expected)


def test_block_fp8_encodes_as_transformers_does_but_for_its_two_roundings() -> None:
    """transformers rounds twice (448 / amax, then its reciprocal), which may move a scale by an ulp
    and a tie.
    """
    values = nasty_values((256, 384))
    expected = quantized_by_transformers(values)
    found = pair(expected, fp8_config())["a.weight"]
    mine = written(found, values)
    scale = mine["a.weight_scale_inv"].view(torch.float32).view(2, 3)
    assert torch.allclose(scale, expected["a.weight_scale_inv"], rtol=3e-7, atol=0)
    differing = mine["a.weight"] != raw(expected["a.weight"])
    assert differing.float().mean() < 1e-4


def test_ue8m0_encodes_as_transformers_does() -> None:
    values = weights(256, 384) * torch.logspace(-6, 3, 384)
    expected = quantized_by_transformers(values, scale_fmt="ue8m0")
    found = pair(expected, fp8_config(scale_fmt="ue8m0"))["a.weight"]
    for name, data in written(found, values).items():
        assert torch.equal(data, raw(expected[name])), name


def quantized_by_transformers(values: Tensor, **more: object) -> dict[str, Tensor]:
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    class Quantizer:
        quantization_config = FineGrainedFP8Config(weight_block_size=(128, 128), **more)

    result: dict[str, Tensor] = Fp8Quantize(Quantizer())._quantize_one("a.weight", values)
    return result


@pytest.mark.parametrize("scale_dtype", [torch.float8_e8m0fnu, torch.uint8])
def test_deepseek_fp4_decodes_as_transformers_does(scale_dtype: torch.dtype) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight = torch.randint(-128, 128, (64, 48)).to(torch.int8)
    scale = torch.randint(90, 140, (64, 3)).to(torch.uint8).view(scale_dtype)
    tensors = {"e.w1.weight": weight, "e.w1.scale": scale}
    expected = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32)
    assert torch.equal(read(pair(tensors, fp8_config(scale_fmt="ue8m0"))["e.w1.weight"], tensors), expected)


# gpt-oss


def gpt_oss_tensors(num_experts: int, rows: int, cols: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (num_experts, rows, cols // 32, 16), generator=generator).to(torch.uint8)
    scales = torch.randint(115, 122, (num_experts, rows, cols // 32), generator=generator).to(torch.uint8)
    return {"blocks": blocks, "scales": scales}


def test_gpt_oss_decodes_as_transformers_does() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    stored = gpt_oss_tensors(3, 300, 64, 5)
    tensors = {f"m.experts.gate_up_proj_{kind}": tensor for kind, tensor in stored.items()}
    found = pair(tensors, {"quantization_config": {"quant_method": "mxfp4"}})["m.experts.gate_up_proj"]
    assert found.shape == (3, 64, 300)
    for dtype in (torch.float32, torch.bfloat16):
        expected = convert_moe_packed_tensors(stored["blocks"], stored["scales"], dtype=dtype)
        assert torch.equal(read(found, tensors).to(dtype), expected)


def test_a_dequantized_gpt_oss_checkpoint_loads_in_transformers(tmp_path: Path) -> None:
    """A tiny real model: quantized by our codec, read by transformers; dequantized by our codec,
    read likewise.
    """
    from safetensors.torch import load_file, save_file
    from transformers import GptOssConfig, GptOssForCausalLM, Mxfp4Config
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    config = GptOssConfig(
        num_hidden_layers=2, num_local_experts=2, num_experts_per_tok=1, hidden_size=64, intermediate_size=32,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, vocab_size=128, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    model = GptOssForCausalLM(config).to(torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "plain")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    quantized, dequantized = {}, {}
    for name, tensor in plain.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            quantized[name] = dequantized[name] = tensor
            continue
        num_experts, cols, rows = tensor.shape
        parts = {f"{name}_{kind}": part for kind, part in gpt_oss_tensors(num_experts, rows, cols, 0).items()}
        found = pair(parts, {})[name]
        assert found.shape == tensor.shape
        parts = {key: data.view(parts[key].shape) for key, data in written(found, tensor.float()).items()}
        quantized |= parts
        dequantized[name] = read(found, parts).to(torch.bfloat16)
        by_transformers = convert_moe_packed_tensors(parts[f"{name}_blocks"], parts[f"{name}_scales"])
        assert torch.equal(dequantized[name], by_transformers)
    quantized_config = {**config.to_dict(), "quantization_config": Mxfp4Config().to_dict()}
    folder = tmp_path / "dequantized"
    folder.mkdir()
    save_file(dequantized, folder / "model.safetensors", metadata={"format": "pt"})
    GptOssConfig(**without_quantization(quantized_config)).save_pretrained(folder)
    loaded, report = GptOssForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.bfloat16)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    state = loaded.state_dict()
    for name, tensor in dequantized.items():
        assert torch.equal(state[name], tensor), name


# compressed-tensors: its own presets, its own scales, its own bytes

PRESETS = {
    "FP8": ("float-quantized", "tensor"),
    "FP8_DYNAMIC": ("float-quantized", "channel"),
    "FP8_BLOCK": ("float-quantized", "block"),
    "W8A8": ("int-quantized", "channel"),
    "W4A16": ("pack-quantized", "group"),
    "W4A16_ASYM": ("pack-quantized", "group"),
    "W8A16": ("pack-quantized", "group"),
    "W2A16": ("pack-quantized", "group"),
    "NVFP4A16": ("nvfp4-pack-quantized", "group"),
    "MXFP4A16": ("mxfp4-pack-quantized", "group"),
    "MXFP8A16": ("mxfp8-quantized", "group"),
}


def compressed(preset: str, values: Tensor) -> tuple[dict[str, Tensor], dict[str, object], object]:
    """What compressed-tensors stores for `values` [M, K], the config that goes with it, and the
    scheme.
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    scheme = preset_name_to_scheme(preset, ["Linear"])
    args = scheme.weights
    format_name, kind = PRESETS[preset]
    rows, cols = values.shape
    if kind == "tensor":
        low, high = torch.aminmax(values)
    elif kind == "channel":
        low, high = torch.aminmax(values, dim=1, keepdim=True)
    elif kind == "block":
        padded = torch.nn.functional.pad(values, (0, -cols % 128, 0, -rows % 128))
        blocks = padded.unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
        low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    else:
        low, high = torch.aminmax(values.unflatten(1, (-1, args.group_size)), dim=2)
    state = {"weight": values.clone()}
    wide = None
    if preset.startswith("NVFP4"):
        wide = generate_gparam(*torch.aminmax(values))
        state["weight_global_scale"] = wide
    scale, zero = calculate_qparams(low, high, args, global_scale=wide)
    state["weight_scale"] = scale
    state["weight_zero_point"] = zero
    stored = BaseCompressor.get_value_from_registry(format_name).compress(state, scheme)
    groups = {"group_0": {"weights": args.model_dump(mode="json"), "targets": ["Linear"]}}
    section = {"quant_method": "compressed-tensors", "format": format_name, "config_groups": groups}
    return {f"a.{name}": tensor for name, tensor in stored.items()}, {"quantization_config": section}, scheme


@pytest.mark.parametrize("preset", PRESETS)
def test_compressed_tensors_decode_alike(preset: str) -> None:
    from compressed_tensors.compressors import BaseCompressor

    tensors, config, scheme = compressed(preset, weights(160, 256))
    found = pair(tensors, config)["a.weight"]
    assert found.shape == (160, 256)
    assert {name for _, name in found.parts} == set(tensors)
    local: dict[str, Tensor | None] = {name.removeprefix("a."): tensor for name, tensor in tensors.items()}
    local["weight_zero_point"] = local.get("weight_zero_point")
    expected = BaseCompressor.get_value_from_registry(PRESETS[preset][0]).decompress(local, scheme)["weight"]
    mine = read(found, tensors)
    assert torch.equal(mine.to(expected.dtype), expected)


@pytest.mark.parametrize("preset", PRESETS)
def test_compressed_tensors_encode_alike(preset: str) -> None:
    """Bit for bit, from float32 weights: codes, scales, zero points, packing."""
    values = weights(160, 256, seed=8)
    tensors, config, _ = compressed(preset, values)
    for name, data in written(pair(tensors, config)["a.weight"], values).items():
        assert torch.equal(data, raw(tensors[name])), name


@pytest.mark.parametrize("shape", [(7, 50), (12, 33), (3, 8)])
def test_packing_pads_as_compressed_tensors_does(shape: tuple[int, int]) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    from merge_cli.formats.quantization.integer import Integer

    codec = Integer(Grid(1), "F32", 4, True, -8, "packed", "I64")
    codes = torch.randint(-8, 8, shape)
    zeros = torch.randint(-8, 8, (shape[0], 1))
    scale = torch.ones(shape[0], 1)
    parts = {
        "codes": raw(pack_to_int32(codes.to(torch.int8), 4)),
        "scale": raw(scale),
        "zero": raw(pack_to_int32(zeros.to(torch.int8), 4, packed_dim=0)),
        "shape": raw(torch.tensor(shape)),
    }
    assert torch.equal(codec.decode(parts, shape, 0, shape[0]), (codes - zeros).float())
    again = encoded(codec, (codes - zeros).float(), shape, parts, 1)
    assert all(torch.equal(again[role], parts[role]) for role in parts)


def test_modelopt_nvfp4_means_what_compressed_tensors_makes_of_it() -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.entrypoints.convert.converters.modelopt_nvfp4 import ModelOptNvfp4Converter
    from compressed_tensors.quantization import preset_name_to_scheme

    tensors = {
        "a.weight": torch.randint(0, 256, (32, 64)).to(torch.uint8),
        "a.weight_scale": (torch.rand(32, 8) * 400 + 1).to(torch.float8_e4m3fn),
        "a.weight_scale_2": torch.tensor(2.0**-11),
        "a.input_scale": torch.tensor(0.5),
    }
    stored = {name: Stored(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    found = find_quantized(stored, {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}})
    assert found.activation_scales == ("a.input_scale",)
    converted = ModelOptNvfp4Converter(targets=["re:.*"]).process(dict(tensors))
    local = {name.removeprefix("a."): tensor for name, tensor in converted.items()}
    compressor = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    expected = compressor.decompress(local, preset_name_to_scheme("NVFP4A16", ["Linear"]))["weight"]
    assert torch.equal(read(found.tensors["a.weight"], tensors).to(expected.dtype), expected)
