"""Headers and config.json of every quantization scheme that is read, and runs of such checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from builders import write_checkpoint
from quantizing import decoded, random_parts
from torch import Tensor

from merge_cli.formats.quantization import Codec, Stored, find_quantized
from merge_cli.formats.quantization.fp8 import Fp8
from merge_cli.formats.quantization.integer import Integer
from merge_cli.formats.quantization.layout import Grid
from merge_cli.formats.quantization.mxfp4 import MxFp4, MxFp4Transposed
from merge_cli.formats.quantization.nvfp4 import NvFp4
from merge_cli.formats.safetensors import DTYPES

Tensors = dict[str, tuple[str, tuple[int, ...]]]
FP8: dict[str, Any] = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}


def compressed(*weights: dict[str, Any], **more: Any) -> dict[str, Any]:
    groups = {f"group_{i}": {"weights": args, "targets": args.pop("targets", [])} for i, args in enumerate(weights)}
    return {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": groups, **more}}


INT4 = {"num_bits": 4, "type": "int", "group_size": 32, "strategy": "group", "symmetric": True}

READ: dict[str, tuple[Tensors, dict[str, Any], tuple[int, ...], Codec]] = {
    "DeepSeek-V3": (
        {"a.weight": ("F8_E4M3", (300, 200)), "a.weight_scale_inv": ("F32", (3, 2))},
        FP8, (300, 200), Fp8(Grid(128, 128)),
    ),
    "scales in BF16": (
        {"a.weight": ("F8_E4M3", (256, 128)), "a.weight_scale_inv": ("BF16", (2, 1))},
        FP8, (256, 128), Fp8(Grid(128, 128), "BF16"),
    ),
    "one block is not a scale for the tensor": (
        {"a.weight": ("F8_E4M3", (64, 64)), "a.weight_scale_inv": ("F32", (1, 1))},
        FP8, (64, 64), Fp8(Grid(128, 128)),
    ),
    "no config": (
        {"a.weight": ("F8_E4M3", (300, 200)), "a.weight_scale_inv": ("F32", (3, 2))},
        {}, (300, 200), Fp8(Grid(128, 128)),
    ),
    "config in text_config": (
        {"a.weight": ("F8_E4M3", (64, 96)), "a.weight_scale_inv": ("F32", (2, 2))},
        {"text_config": {"quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 64]}}},
        (64, 96), Fp8(Grid(32, 64)),
    ),
    "ue8m0 in F32": (
        {"a.weight": ("F8_E4M3", (128, 128)), "a.weight_scale_inv": ("F32", (1, 1))},
        {"quantization_config": {**FP8["quantization_config"], "scale_fmt": "ue8m0"}},
        (128, 128), Fp8(Grid(128, 128), "F32", "ceil"),
    ),
    "DeepSeek-V4": (
        {"a.weight": ("F8_E4M3", (256, 256)), "a.scale": ("F8_E8M0", (2, 2))},
        FP8, (256, 256), Fp8(Grid(128, 128), "F8_E8M0", "ceil"),
    ),
    "DeepSeek-V4 experts": (
        {"e.w1.weight": ("I8", (64, 48)), "e.w1.scale": ("F8_E8M0", (64, 3))},
        FP8, (64, 96), MxFp4("F8_E8M0", "ceil"),
    ),
    "fused experts": (
        {"experts.gate_up_proj": ("F8_E4M3", (4, 256, 384)), "experts.gate_up_proj_scale_inv": ("F32", (4, 2, 3))},
        FP8, (4, 256, 384), Fp8(Grid(128, 128)),
    ),
    "fused experts, a scale each": (
        {"experts.down_proj": ("F8_E4M3", (4, 256, 384)), "experts.down_proj_scale_inv": ("F32", (4, 1, 1))},
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": None}},
        (4, 256, 384), Fp8(Grid()),
    ),
    "fbgemm experts": (
        {"experts.gate_up_proj": ("F8_E4M3", (4, 8, 6)), "experts.gate_up_proj_scale": ("F32", (4, 1, 6))},
        {"quantization_config": {"quant_method": "fbgemm_fp8"}}, (4, 8, 6), Fp8(Grid(0, 1)),
    ),
    "per tensor": (
        {"a.weight": ("F8_E4M3", (9, 5)), "a.weight_scale": ("F32", ())},
        {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}, (9, 5), Fp8(Grid(whole=True)),
    ),
    "Mistral": (
        {"a.weight": ("F8_E4M3", (9, 5)), "a.qscale_weight": ("BF16", ())},
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": None}},
        (9, 5), Fp8(Grid(whole=True), "BF16"),
    ),
    "per channel": (
        {"a.weight": ("F8_E4M3", (9, 5)), "a.weight_scale": ("BF16", (9, 1))},
        compressed({"num_bits": 8, "type": "float", "strategy": "channel"}, format="float-quantized"),
        (9, 5), Fp8(Grid(1), "BF16"),
    ),
    "mxfp8": (
        {"a.weight": ("F8_E4M3", (9, 64)), "a.weight_scale": ("U8", (9, 2))},
        compressed({"num_bits": 8, "type": "float", "group_size": 32}, format="mxfp8-quantized"),
        (9, 64), Fp8(Grid(1, 32), "U8", "mx"),
    ),
    "int8": (
        {"a.weight": ("I8", (9, 5)), "a.weight_scale": ("BF16", (9, 1))},
        compressed({"num_bits": 8, "type": "int", "strategy": "channel"}, format="int-quantized"),
        (9, 5), Integer(Grid(1), "BF16"),
    ),
    "int8, asymmetric": (
        {"a.weight": ("I8", (9, 5)), "a.weight_scale": ("F32", (1,)), "a.weight_zero_point": ("I8", (1,))},
        compressed({"num_bits": 8, "type": "int", "symmetric": False}, format="int-quantized"),
        (9, 5), Integer(Grid(whole=True), "F32", zero="I8"),
    ),
    "packed int4": (
        {"a.weight_packed": ("I32", (9, 12)), "a.weight_scale": ("BF16", (9, 3)), "a.weight_shape": ("I64", (2,))},
        compressed(dict(INT4)), (9, 96), Integer(Grid(1, 32), "BF16", 4, True, -8, "", "I64"),
    ),
    "packed int4, half a group": (
        {"a.weight_packed": ("I32", (9, 10)), "a.weight_scale": ("BF16", (9, 3)), "a.weight_shape": ("I64", (2,))},
        compressed(dict(INT4)), (9, 80), Integer(Grid(1, 32), "BF16", 4, True, -8, "", "I64"),
    ),
    "packed int4, asymmetric": (
        {
            "a.weight_packed": ("I32", (9, 12)), "a.weight_scale": ("BF16", (9, 3)),
            "a.weight_zero_point": ("I32", (2, 3)), "a.weight_shape": ("I64", (2,)),
        },
        compressed({**INT4, "symmetric": False}), (9, 96), Integer(Grid(1, 32), "BF16", 4, True, -8, "packed", "I64"),
    ),
    "two widths, told apart by their shapes": (
        {"a.weight_packed": ("I32", (9, 16)), "a.weight_scale": ("BF16", (9, 1)), "a.weight_shape": ("I64", (2,))},
        compressed(dict(INT4), {**INT4, "num_bits": 8, "group_size": 64}),
        (9, 64), Integer(Grid(1, 64), "BF16", 8, True, -128, "", "I64"),
    ),
    "two widths, told apart by their targets": (
        {"m.a.weight_packed": ("I32", (9, 8)), "m.a.weight_scale": ("BF16", (9, 1)), "m.a.weight_shape": ("I64", (2,))},
        compressed(
            {**INT4, "group_size": 64, "targets": ["re:.*b$"]},
            {**INT4, "num_bits": 8, "group_size": 32, "targets": ["re:m\\.a"]},
        ),
        (9, 32), Integer(Grid(1, 32), "BF16", 8, True, -128, "", "I64"),
    ),
    "Kimi-K2-Thinking": (
        {"a.weight_packed": ("I32", (9, 12)), "a.weight_scale": ("BF16", (9, 3)), "a.weight_shape": ("I32", (2,))},
        {"model_type": "kimi_k2", **compressed(dict(INT4))},
        (9, 96), Integer(Grid(1, 32), "BF16", 4, True, -7, "", "I32"),
    ),
    "gpt-oss": (
        {"experts.gate_up_proj_blocks": ("U8", (4, 10, 3, 16)), "experts.gate_up_proj_scales": ("U8", (4, 10, 3))},
        {"quantization_config": {"quant_method": "mxfp4"}}, (4, 96, 10), MxFp4Transposed(),
    ),
    "mxfp4": (
        {"a.weight_packed": ("U8", (9, 48)), "a.weight_scale": ("U8", (9, 3))},
        compressed({"num_bits": 4, "type": "float", "group_size": 32}), (9, 96), MxFp4("U8", "round"),
    ),
    "nvfp4": (
        {
            "a.weight_packed": ("U8", (9, 48)), "a.weight_scale": ("F8_E4M3", (9, 6)),
            "a.weight_global_scale": ("F32", (1,)),
        },
        compressed({"num_bits": 4, "type": "float", "group_size": 16}), (9, 96), NvFp4(),
    ),
    "nvfp4, ModelOpt": (
        {"a.weight": ("U8", (9, 48)), "a.weight_scale": ("F8_E4M3", (9, 6)), "a.weight_scale_2": ("F32", ())},
        {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}, (9, 96), NvFp4(inverse=True),
    ),
}  # fmt: skip

PLAIN = {"model.norm.weight": torch.linspace(0.5, 1.5, 61).bfloat16(), "lm_head.weight": torch.randn(9, 7).bfloat16()}


def stored_parts(case: str, seed: int) -> dict[str, Tensor]:
    """Random codes and scales of a scheme, as the tensors of a checkpoint."""
    tensors, config, shape, codec = READ[case]
    ((_, quantized),) = find_quantized({name: Stored(*stored) for name, stored in tensors.items()}, config).tensors.items()
    parts = random_parts(codec, shape, seed)
    return {name: as_stored(parts[role], *tensors[name]) for role, name in quantized.parts}


def as_stored(data: Tensor, dtype: str, shape: tuple[int, ...]) -> Tensor:
    return data.contiguous().view(getattr(torch, DTYPES[dtype].torch)).view(shape)


def write_quantized(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], shards: Any = 1) -> Path:
    return write_checkpoint(folder, tensors, shards=shards, config={"model_type": "tiny", "torch_dtype": "bfloat16", **config})


def quantized_run(folder: Path, case: str, count: int = 3) -> tuple[list[Path], list[Tensor], str, Codec]:
    """Checkpoints with the scale in another shard than the codes; the decoded values of each, the
    tensor's name.
    """
    tensors, config, shape, codec = READ[case]
    paths, values = [], []
    for number in range(count):
        parts = stored_parts(case, number)
        names = list(parts)
        shards = [["lm_head.weight", names[0]], [*reversed(names[1:]), "model.norm.weight"]]
        paths.append(write_quantized(folder / f"step_{number + 1}", {**PLAIN, **parts}, config, shards))
        found = find_quantized({name: Stored(*stored) for name, stored in tensors.items()}, config).tensors
        ((name, quantized),) = found.items()
        raw = {role: parts[stored].reshape(-1).view(torch.uint8) for role, stored in quantized.parts}
        values.append(decoded(codec, raw, shape).view(shape))
    return paths, values, name, codec
