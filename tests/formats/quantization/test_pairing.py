"""Headers and config.json to quantized tensors: what is paired, what is plain, what is refused and
how.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import pytest
from schemes import FP8, INT4, READ, Tensors, compressed

from merge_cli.errors import InputError, UnsupportedError
from merge_cli.formats.quantization import Codec, Found, Stored, find_quantized, without_quantization

PLAIN = {"model.norm.weight": ("BF16", (8,)), "lm_head.weight": ("BF16", (32, 8))}


def find(tensors: Tensors, config: dict[str, Any] | None = None) -> Found:
    return find_quantized({name: Stored(*stored) for name, stored in tensors.items()}, config or {})


def only(tensors: Tensors, config: dict[str, Any] | None = None) -> tuple[str, tuple[int, ...], Codec]:
    """The one quantized tensor of a checkpoint that also holds plain ones; every other stored
    tensor is its part.
    """
    found = find({**PLAIN, **tensors}, config)
    ((name, tensor),) = found.tensors.items()
    assert tensor.name == name
    assert tensor.parts[0][0] == "codes"
    assert set(found.owner) == set(tensors)
    assert set(found.owner.values()) == {name}
    return name, tensor.shape, tensor.codec


@pytest.mark.parametrize("case", READ)
def test_codes_and_scales_are_paired(case: str) -> None:
    tensors, config, shape, codec = READ[case]
    name, found_shape, found_codec = only(tensors, config)
    assert name in {"a.weight", "m.a.weight", "e.w1.weight"} or name.startswith("experts.")
    assert found_shape == shape
    assert found_codec == codec
    backwards = dict(reversed(tensors.items()))
    assert only(backwards, config) == (name, shape, codec)


@pytest.mark.parametrize("case", READ)
def test_codes_without_a_scale_and_scales_without_codes_are_refused(case: str) -> None:
    tensors, config, _, _ = READ[case]
    names = list(tensors)
    for missing in names:
        if missing.endswith("_shape"):
            continue
        with pytest.raises(UnsupportedError) as raised:
            find({name: stored for name, stored in {**PLAIN, **tensors}.items() if name != missing}, config)
        assert any(name in str(raised.value) for name in names if name != missing) or "a.weight" in str(raised.value)
        assert raised.value.hint


def test_an_ordinary_checkpoint_is_plain_whatever_its_names() -> None:
    tensors: Tensors = {
        **PLAIN,
        "logit_scale": ("BF16", ()),
        "attn.scale": ("BF16", (4,)),
        "attn.k_scale": ("F32", ()),
        "layer_scale.weight": ("BF16", (4,)),
        "conv.weight": ("BF16", (4, 4)),
        "conv.weight_scale": ("BF16", (4, 1)),
        "attn.W_q": ("BF16", (4, 4)),
        "vq.codebooks": ("F32", (4, 4)),
        "vq.scales": ("F32", (4,)),
        "vq.weight": ("F32", (4,)),
        "counter_scale": ("F32", ()),
        "counter": ("I8", (4,)),
        "bucket_shape": ("I64", (2,)),
        "residual_blocks": ("F32", (4, 4)),
        "mask": ("U8", (4, 4)),
        "mask_scale": ("F32", ()),
        "embed.input_scale": ("F32", ()),
    }
    assert find(tensors) == Found()
    assert find(tensors, {"model_type": "llama"}) == Found()


def test_a_learned_scale_beside_quantized_tensors_stays_plain() -> None:
    tensors, _, _, _ = READ["DeepSeek-V3"]
    found = find({**tensors, "q_l2_clip.scale": ("F32", (4,)), "attn.k_scale": ("F32", ())}, FP8)
    assert set(found.owner) == set(tensors)
    assert not found.activation_scales


def test_activation_scales_are_listed() -> None:
    tensors, _, _, _ = READ["per tensor"]
    config: dict[str, Any] = {"quantization_config": {"quant_method": "fp8", "kv_cache_scheme": {"num_bits": 8}}}
    scales: Tensors = {"a.input_scale": ("F32", ()), "attn.k_scale": ("F32", ()), "attn.v_scale": ("F32", (4,))}
    found = find({**tensors, **scales, **PLAIN}, config)
    assert found.activation_scales == tuple(scales)
    assert set(found.owner) == set(tensors)
    fused, fused_config, _, _ = READ["fused experts"]
    found = find({**fused, "experts.gate_up_proj_activation_scale": ("F32", (4,))}, fused_config)
    assert found.activation_scales == ("experts.gate_up_proj_activation_scale",)


REFUSED: dict[str, tuple[Tensors, dict[str, Any], str]] = {
    "GPTQ": ({"a.qweight": ("I32", (4, 8)), "a.scales": ("F16", (1, 8))}, {}, "GPTQ or AWQ"),
    "bitsandbytes int8": ({"a.weight": ("I8", (4, 8)), "a.SCB": ("F32", (4,))}, {}, "bitsandbytes int8"),
    "bitsandbytes 4-bit": ({"a.weight": ("U8", (16, 1)), "a.weight.absmax": ("F32", (1,))}, {}, "bitsandbytes 4-bit"),
    "HQQ": ({"a.W_q": ("U8", (4, 8))}, {}, "HQQ"),
    "quanto": ({"a.weight._data": ("I8", (4, 8)), "a.weight._scale": ("F32", (4, 1))}, {}, "quanto"),
    "MLX": (
        {"a.weight": ("U32", (4, 8)), "a.scales": ("BF16", (4, 1)), "a.biases": ("BF16", (4, 1))}, {}, "MLX",
    ),
    "activation ordering": (
        {**READ["packed int4"][0], "a.weight_g_idx": ("I32", (96,))}, compressed(dict(INT4)), "weight_g_idx",
    ),
    "AWQ of ModelOpt": ({**READ["nvfp4"][0], "a.pre_quant_scale": ("BF16", (96,))}, {}, "pre_quant_scale"),
    "three bits": (
        {"a.weight_packed": ("I32", (9, 9)), "a.weight_scale": ("BF16", (9, 3)), "a.weight_shape": ("I64", (2,))},
        compressed({**INT4, "num_bits": 3}), "3 bits",
    ),
    "packed, no config": (READ["packed int4"][0], {}, "config group"),
    "E5M2": ({"a.weight": ("F8_E5M2", (4, 8)), "a.weight_scale": ("F32", ())}, {}, "F8_E5M2"),
    "FP6": ({"a.weight": ("F6_E2M3", (4, 8)), "a.weight_scale": ("U8", (4, 1))}, {}, "F6_E2M3"),
    "scales of another grid": (
        {"a.weight": ("F8_E4M3", (384, 256)), "a.weight_scale_inv": ("F32", (4, 2))}, FP8, "[4, 2]",
    ),
    "two scales": ({**READ["DeepSeek-V3"][0], "a.weight_scale": ("F32", ())}, FP8, "more than one scale"),
    "a bitnet weight": (
        {"a.weight": ("U8", (4, 8)), "a.weight_scale": ("BF16", (1,))},
        {"quantization_config": {"quant_method": "bitnet"}}, "bitnet",
    ),
    "an unknown packed weight": (
        {"a.weight": ("U8", (4, 8)), "a.weight_scale": ("BF16", (1,))}, {}, "format that is not read",
    ),
    "both plain and quantized": (
        {**READ["nvfp4"][0], "a.weight": ("BF16", (9, 96))}, {}, "both plain and quantized",
    ),
    "exponents that nobody announced": (
        {"a.weight": ("F8_E4M3", (9, 64)), "a.weight_scale": ("U8", (9, 2))}, {}, "dtype U8",
    ),
    "rotated": (
        READ["packed int4"][0], compressed(dict(INT4), transform_config={"config_groups": {"u": {}}}), "rotated",
    ),
    "marlin": (READ["packed int4"][0], compressed(dict(INT4), format="marlin-24"), "marlin-24"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(case: str) -> None:
    tensors, config, says = REFUSED[case]
    with pytest.raises(UnsupportedError, match="cannot") as raised:
        find({**PLAIN, **tensors}, config)
    assert says in str(raised.value)
    assert "BF16" in raised.value.hint


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "gguf", "hqq", "torchao", "quark", "never heard of"])
def test_a_config_of_another_method_is_a_leftover_beside_plain_tensors_and_refused_beside_codes(method: str) -> None:
    config = {"quantization_config": {"quant_method": method}}
    assert find(PLAIN, config) == Found(leftover_config=True)
    with pytest.raises(UnsupportedError, match=method):
        find({**PLAIN, "layers.0.codes": ("U8", (4, 4))}, config)


def test_a_config_without_quantized_tensors_is_no_mistake() -> None:
    assert find(PLAIN, FP8) == Found(leftover_config=True)


def test_without_quantization_removes_it_at_any_depth_and_copies() -> None:
    config = {
        "model_type": "kimi_k25",
        "quantization_config": {"quant_method": "fp8"},
        "text_config": {"hidden_size": 8, "quantization_config": {}, "layers": [{"compression_config": {}}]},
    }
    before = json.dumps(config)
    cleaned = without_quantization(config)
    assert cleaned == {"model_type": "kimi_k25", "text_config": {"hidden_size": 8, "layers": [{}]}}
    cleaned["text_config"]["hidden_size"] = 9
    assert json.dumps(config) == before


def test_a_stored_shape_that_contradicts_the_headers_is_found_when_read() -> None:
    torch = pytest.importorskip("torch")
    tensors, config, shape, codec = READ["packed int4"]
    assert find(tensors, config)
    parts = {
        "codes": torch.zeros(9 * 48, dtype=torch.uint8),
        "scale": torch.zeros(9 * 6, dtype=torch.uint8),
        "shape": torch.tensor([9, 90]).view(torch.uint8),
    }
    with pytest.raises(InputError, match="weight_shape"):
        codec.decode(parts, shape, 0, 9)


def test_pairing_imports_no_torch() -> None:
    code = "import sys, merge_cli.formats.quantization; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_checkpoint_of_150_000_tensors_is_paired_in_seconds() -> None:
    stored = {}
    for number in range(75_000):
        stored[f"model.layers.0.mlp.experts.{number}.up_proj.weight"] = Stored("F8_E4M3", (2048, 7168))
        stored[f"model.layers.0.mlp.experts.{number}.up_proj.weight_scale_inv"] = Stored("F32", (16, 56))
    begin = time.perf_counter()
    found = find_quantized(stored, FP8)
    assert len(found.tensors) == 75_000
    assert time.perf_counter() - begin < 10
    assert len({id(tensor.codec) for tensor in found.tensors.values()}) == 1
