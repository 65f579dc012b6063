"""The training runs whose averages are frozen in golden.json: the same bytes on every machine and
with every version of torch.

Every byte comes from SHAKE-128 over the name of its tensor, and a table then moves the exponent
into a range, so that no value is NaN or infinite. No generator of torch or numpy and no
floating-point operation takes part.

Not guaranteed: that the values look like a trained model. They fill all mantissas, which is harder
on a sum.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from builders import DTYPE_NAMES, split, write_checkpoint
from torch import Tensor

STEPS = (100, 200, 300, 400)
EXPERTS = "model.layers.0.mlp.experts"
CONFIG = {"model_type": "tiny", "hidden_size": 8, "torch_dtype": "bfloat16"}

Tensors = dict[str, Tensor]
Make = Callable[[Path], list[Path]]

_TORCH = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_NO_SPECIAL = {0x7F: 0x7E, 0xFF: 0xFE}
_TABLES = {  # of the highest byte of an element: sign and most of the exponent
    "BF16": bytes((b & 0x80) | 0x38 | (b & 7) for b in range(256)),  # magnitudes 2^-15 to 2
    "F32": bytes((b & 0x80) | 0x38 | (b & 7) for b in range(256)),
    "F16": bytes((b & 0x80) | (0x10 + b % 48) for b in range(256)),  # 2^-11 to 2
    "F64": bytes((b & 0x80) | 0x3F for b in range(256)),  # 2^-15 to 2
    "F8_E4M3": bytes(_NO_SPECIAL.get(b, b) for b in range(256)),
    "F8_E8M0": bytes(118 + b % 10 for b in range(256)),  # 2^-9 to 1
    "BOOL": bytes(b & 1 for b in range(256)),
    "any": bytes(b & 0xFE if b & 0x7F == 0x7F else b for b in range(256)),  # BF16, F32: every exponent but that of infinity
    "positive": bytes(0x3A | (b & 1) for b in range(256)),  # BF16, F32: 2^-11 to 2^-7
    "positive F8_E4M3": bytes(_NO_SPECIAL.get(b & 0x7F, b & 0x7F) for b in range(256)),
    "exponent": bytes(118 + b % 10 for b in range(256)),
}


def random_tensor(name: str, dtype: str, shape: tuple[int, ...], table: str = "") -> Tensor:
    """A tensor of the safetensors dtype `dtype` whose bytes follow from `name`; `table` names the
    range of its values.
    """
    width, count = _TORCH[dtype].itemsize, math.prod(shape)
    if not count:
        return torch.empty(shape, dtype=_TORCH[dtype])
    data = bytearray(hashlib.shake_128(f"{name} {dtype} {table}".encode()).digest(width * count))
    if limits := _TABLES.get(table or dtype):
        data[width - 1 :: width] = data[width - 1 :: width].translate(limits)
    return torch.frombuffer(data, dtype=torch.uint8).view(_TORCH[dtype]).view(shape)


def from_bits(dtype: str, *bits: int) -> Tensor:
    """The 1-D tensor of these bit patterns."""
    width = _TORCH[dtype].itemsize
    data = bytearray(b"".join(each.to_bytes(width, "little") for each in bits))
    return torch.frombuffer(data, dtype=torch.uint8).view(_TORCH[dtype])


def _dense(step: int) -> Tensors:
    """A small Llama; its head is tied to its embedding, and both are stored."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (67, 61)}
    for layer in ("model.layers.0", "model.layers.1", "model.layers.10"):
        shapes |= {
            f"{layer}.input_layernorm.weight": (61,),
            f"{layer}.self_attn.q_proj.weight": (61, 61),
            f"{layer}.mlp.up_proj.weight": (131, 61),
        }
    tensors = {name: random_tensor(f"{step} {name}", "BF16", shape) for name, shape in shapes.items()}
    return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}


def _long(step: int) -> Tensors:
    """One tensor that is longer than a block of the sums (2^18 elements), a scalar and an empty
    one.
    """
    return {
        "long.weight": random_tensor(f"{step} long", "BF16", (257, 1031)),
        "scalar": random_tensor(f"{step} scalar", "F32", ()),
        "empty": random_tensor("empty", "BF16", (0, 7)),
    }


def _mixed(step: int) -> Tensors:
    """Every dtype, integers that are equal in all checkpoints, and the corners of 16 bits."""
    corners = (0x0000, 0x8000, 0x3F80, 0xBF80, 0x0001, 0x8001, 0x007F, 0x0080, 0x3DCD, 0x7F7F if step < 400 else 0x7F7E)
    halves = (0x0000, 0x8000, 0x0001, 0x03FF, 0x0400, 0x3C00, 0xBC00, 0x7BFF)
    return {
        "model.layers.1.mlp.up_proj.weight": random_tensor(f"{step} up", "BF16", (131, 67)),
        "model.step": random_tensor("step", "I64", ()),
        "model.layers.0.norm.weight": random_tensor(f"{step} norm", "F32", (61,)),
        "mask": random_tensor("mask", "BOOL", (5,)),
        "logit_scale": random_tensor(f"{step} scale", "F32", ()),
        "größe.重み": random_tensor(f"{step} größe", "BF16", (3, 1, 5)),
        "vision.conv.weight": random_tensor(f"{step} conv", "F16", (7, 3, 11, 1, 3)),
        "ema.bias": random_tensor(f"{step} bias", "F64", (19,)),
        "lookup": random_tensor("lookup", "I32", (3, 5)),
        "codes": random_tensor("codes", "U8", (251,)),
        "empty": random_tensor("empty", "BF16", (0, 7)),
        "corners": from_bits("BF16", *corners),
        "corners.fp16": from_bits("F16", *halves),
        "attention.mask": from_bits("BF16", *[0xFF7F] * 6, *[0] * 3),  # the smallest bfloat16: its sum overflows float32
        "any.weight": random_tensor(f"{step} any", "BF16", (997,), "any"),
        "any.fp32": random_tensor(f"{step} any", "F32", (499,), "any"),
        "model.layers.0.mlp.gate.e_score_correction_bias": random_tensor(f"{step} router", "F32", (8,)),
    }


def _experts(step: int, fused: bool) -> Tensors:
    """A Qwen3-MoE block with four experts, each of the same bytes in either layout."""
    tensors = {"model.norm.weight": random_tensor(f"{step} norm", "BF16", (24,))}
    for name, projections, shape in (
        ("gate_up_proj", ("gate_proj", "up_proj"), (12, 24)),
        ("down_proj", ("down_proj",), (24, 12)),
    ):
        parts = {
            f"{EXPERTS}.{e}.{projection}.weight": random_tensor(f"{step} {e} {projection}", "BF16", shape)
            for e in range(4)
            for projection in projections
        }
        if fused:
            rows = len(projections) * shape[0]
            parts = {f"{EXPERTS}.{name}": torch.cat(list(parts.values())).view(4, rows, shape[1])}
        tensors |= parts
    return tensors


def _write(folder: Path, step: int, tensors: Mapping[str, Tensor], **options: Any) -> Path:
    return write_checkpoint(folder / f"checkpoint-{step}", tensors, config=CONFIG, **{"side_files": False, **options})


def _sharded(folder: Path) -> list[Path]:
    return [_write(folder, step, _dense(step), shards=3, side_files=True) for step in STEPS]


def _single(folder: Path) -> list[Path]:
    return [_write(folder, step, _long(step), index=False) for step in STEPS]


def _mixed_layouts(folder: Path) -> list[Path]:
    """Shards, their order and the length of the header differ between the checkpoints, and one is a
    single file.
    """
    paths = []
    for number, step in enumerate(STEPS, 1):
        names = sorted(_mixed(step), key=lambda name: hashlib.sha256(f"{step} {name}".encode()).digest())
        options: dict[str, Any] = {"shards": split(names, number), "multiple": 1, "after": " " * number}
        paths.append(_write(folder, step, _mixed(step), **(options if number != 2 else {"index": False})))
    return paths


def _dtypes_change(folder: Path) -> list[Path]:
    """Two checkpoints in float32, then two in bfloat16 and float16."""
    names = ("a.weight", "b.weight", "c.weight")
    dtypes = {100: ("F32",) * 3, 200: ("F32", "F64", "F16"), 300: ("BF16",) * 3, 400: ("BF16", "F16", "F32")}
    return [
        _write(
            folder,
            step,
            {name: random_tensor(f"{step} {name}", dtype, (37, 41)) for name, dtype in zip(names, dtypes[step], strict=True)},
            shards=2,
        )
        for step in STEPS
    ]


def _expert_layouts(fused_steps: tuple[int, ...]) -> Make:
    def make(folder: Path) -> list[Path]:
        return [_write(folder, step, _experts(step, step in fused_steps), shards=2) for step in STEPS]

    return make


def _rank_folders(folder: Path) -> list[Path]:
    """A folder for each of two ranks, whose files hold tensors of the same names."""
    for step in STEPS:
        for rank in range(2):
            names = {"layer.weight": (31, 17), "layer.bias": (31,)}
            tensors = {name: random_tensor(f"{step} {rank} {name}", "BF16", shape) for name, shape in names.items()}
            place = folder / f"checkpoint-{step}" / f"mp_rank_{rank:02d}"
            write_checkpoint(place, tensors, index=False, config=None, side_files=False)
    return [folder / f"checkpoint-{step}" for step in STEPS]


# --- quantized ------------------------------------------------------------------------------------


def _compressed(**weights: Any) -> dict[str, Any]:
    form = weights.pop("format", None)
    groups = {"group_0": {"weights": weights, "targets": []}}
    more = {"format": form} if form else {}
    return {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": groups, **more}}


_FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
_INT4 = {"num_bits": 4, "type": "int", "group_size": 32, "strategy": "group"}
_SHAPE = struct.pack("<2q", 9, 96)

# scheme -> config, then name, dtype, shape and range of values of every stored part
SCHEMES: dict[str, tuple[dict[str, Any], list[tuple[str, str, tuple[int, ...], str]]]] = {
    "fp8-block": (
        _FP8,
        [("a.weight", "F8_E4M3", (300, 200), ""), ("a.weight_scale_inv", "F32", (3, 2), "positive")],
    ),
    "fp8-ue8m0": (_FP8, [("a.weight", "F8_E4M3", (256, 200), ""), ("a.scale", "F8_E8M0", (2, 2), "")]),
    "fp8-tensor": (
        {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}},
        [("a.weight", "F8_E4M3", (41, 37), ""), ("a.weight_scale", "F32", (), "positive")],
    ),
    "fp8-channel": (
        _compressed(num_bits=8, type="float", strategy="channel", format="float-quantized"),
        [("a.weight", "F8_E4M3", (41, 37), ""), ("a.weight_scale", "BF16", (41, 1), "positive")],
    ),
    "mxfp8": (
        _compressed(num_bits=8, type="float", group_size=32, format="mxfp8-quantized"),
        [("a.weight", "F8_E4M3", (9, 64), ""), ("a.weight_scale", "U8", (9, 2), "exponent")],
    ),
    "int8": (
        _compressed(num_bits=8, type="int", strategy="channel", format="int-quantized"),
        [("a.weight", "I8", (41, 37), ""), ("a.weight_scale", "BF16", (41, 1), "positive")],
    ),
    "int4": (
        _compressed(**_INT4, symmetric=True),
        [
            ("a.weight_packed", "I32", (9, 12), ""),
            ("a.weight_scale", "BF16", (9, 3), "positive"),
            ("a.weight_shape", "I64", (2,), "shape"),
        ],
    ),
    "int4-asymmetric": (
        _compressed(**_INT4, symmetric=False),
        [
            ("a.weight_packed", "I32", (9, 12), ""),
            ("a.weight_scale", "BF16", (9, 3), "positive"),
            ("a.weight_zero_point", "I32", (2, 3), ""),
            ("a.weight_shape", "I64", (2,), "shape"),
        ],
    ),
    "mxfp4": (
        _compressed(num_bits=4, type="float", group_size=32),
        [("a.weight_packed", "U8", (9, 48), ""), ("a.weight_scale", "U8", (9, 3), "exponent")],
    ),
    "gpt-oss": (
        {"quantization_config": {"quant_method": "mxfp4"}},
        [
            ("experts.gate_up_proj_blocks", "U8", (4, 10, 3, 16), ""),
            ("experts.gate_up_proj_scales", "U8", (4, 10, 3), "exponent"),
        ],
    ),
    "nvfp4": (
        _compressed(num_bits=4, type="float", group_size=16),
        [
            ("a.weight_packed", "U8", (9, 48), ""),
            ("a.weight_scale", "F8_E4M3", (9, 6), "positive F8_E4M3"),
            ("a.weight_global_scale", "F32", (1,), "positive"),
        ],
    ),
    "nvfp4-modelopt": (
        {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}},
        [
            ("a.weight", "U8", (9, 48), ""),
            ("a.weight_scale", "F8_E4M3", (9, 6), "positive F8_E4M3"),
            ("a.weight_scale_2", "F32", (), "positive"),
        ],
    ),
}


def _parts(scheme: str, step: int) -> Tensors:
    tensors = {}
    for name, dtype, shape, table in SCHEMES[scheme][1]:
        if table == "shape":
            tensors[name] = torch.frombuffer(bytearray(_SHAPE), dtype=torch.int64)
        else:
            tensors[name] = random_tensor(f"{step} {scheme} {name}", dtype, shape, table)
    return tensors


def _plain(step: int) -> Tensors:
    return {
        "model.norm.weight": random_tensor(f"{step} norm", "BF16", (61,)),
        "lm_head.weight": random_tensor(f"{step} head", "BF16", (9, 7)),
    }


def _write_quantized(folder: Path, scheme: str, step: int) -> Path:
    """A checkpoint whose codes and scales lie in different shards."""
    parts = _parts(scheme, step)
    first, *others = parts
    shards = [["lm_head.weight", first], [*reversed(others), "model.norm.weight"]]
    config = {**CONFIG, **SCHEMES[scheme][0]}
    tensors = {**_plain(step), **parts}
    return write_checkpoint(folder / f"checkpoint-{step}", tensors, shards=shards, config=config, side_files=False)


def _quantized(scheme: str) -> Make:
    def make(folder: Path) -> list[Path]:
        return [_write_quantized(folder, scheme, step) for step in STEPS[:3]]

    return make


def _quantized_then_plain(folder: Path) -> list[Path]:
    """Two checkpoints in block FP8, then two in bfloat16."""
    plain = [
        _write(folder, step, {**_plain(step), "a.weight": random_tensor(f"{step} a", "BF16", (300, 200))}, shards=2)
        for step in STEPS[2:]
    ]
    return [*(_write_quantized(folder, "fp8-block", step) for step in STEPS[:2]), *plain]


RUNS: dict[str, Make] = {
    "sharded": _sharded,
    "single": _single,
    "mixed": _mixed_layouts,
    "dtypes": _dtypes_change,
    "per-expert": _expert_layouts(()),
    "fused": _expert_layouts(STEPS),
    "experts-mixed": _expert_layouts((200, 300)),
    "ranks": _rank_folders,
    "fp8-then-bf16": _quantized_then_plain,
    **{scheme: _quantized(scheme) for scheme in SCHEMES},
}


def write_all(folder: Path) -> dict[str, list[Path]]:
    """Write every run into a folder of its own name; the checkpoints of each, oldest first."""
    return {name: make(folder / name) for name, make in RUNS.items()}
