"""Small checkpoints for the tests: tensors like those of a training run, and the files that hold
them.

`write_safetensors` writes at the level of the header, so that a test decides the physical order,
the padding and the whitespace; `write_checkpoint` makes a whole folder with it. `nasty_run` makes
the checkpoints that the engine must survive: a 0-d scalar, an empty tensor, integer and bool
buffers, odd shapes, four float dtypes in one checkpoint, a non-ASCII name, negative zeros, and
subnormals. All is seeded.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPE_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e5m2: "F8_E5M2",
}
INDEX = "model.safetensors.index.json"
FORMAT_PT = {"format": "pt"}
CONFIG = {"model_type": "tiny", "hidden_size": 8, "torch_dtype": "bfloat16"}


def tensor_bytes(tensor: Tensor) -> bytes:
    """The bytes of `tensor` as a safetensors file holds them: little endian, C order."""
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    metadata: Mapping[str, str] | None = FORMAT_PT,
    header_order: Sequence[str] | None = None,
    before: str = "",
    after: str = "",
    multiple: int = 8,
) -> None:
    """Write a safetensors file: the data in the order of `tensors`, the header's entries in
    `header_order`.

    `before` and `after` are put around the header's JSON; the whole is padded with spaces to a
    `multiple` of bytes, which 1 turns off (the length of the header may then be odd).
    """
    entries: dict[str, Any] = {}
    data = []
    end = 0
    for name, tensor in tensors.items():
        data.append(tensor_bytes(tensor))
        start, end = end, end + len(data[-1])
        shape = list(tensor.shape)
        entries[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": shape, "data_offsets": [start, end]}
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    header |= {name: entries[name] for name in header_order or entries}
    encoded = (before + json.dumps(header, ensure_ascii=False, separators=(",", ":")) + after).encode()
    encoded += b" " * (-len(encoded) % multiple)
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + b"".join(data))


def shard_name(number: int, count: int) -> str:
    """`model-00002-of-00003.safetensors` for the second shard of three."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def split(names: Iterable[str], count: int) -> list[list[str]]:
    """`names` in `count` runs of nearly equal length, in order."""
    names = list(names)
    bounds = [len(names) * i // count for i in range(count + 1)]
    return [names[a:b] for a, b in itertools.pairwise(bounds)]


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    shards: int | Sequence[Sequence[str]] = 1,
    index: bool = True,
    config: Mapping[str, Any] | None = CONFIG,
    side_files: bool = True,
    **file_options: Any,
) -> Path:
    """Make the checkpoint folder `folder` and return it.

    `shards` is a number of shards, or the names of the tensors of each shard in physical order.
    Without `index` there is one `model.safetensors`. `side_files` adds what a checkpoint of the hub
    carries beside weights and `config`. `file_options` go to `write_safetensors`.
    """
    folder.mkdir(parents=True)
    parts = split(tensors, shards) if isinstance(shards, int) else [list(part) for part in shards]
    assert sorted(name for part in parts for name in part) == sorted(tensors)
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        file = shard_name(number, len(parts)) if index else "model.safetensors"
        weight_map |= dict.fromkeys(part, file)
        write_safetensors(folder / file, {name: tensors[name] for name in part}, **file_options)
    if index:
        total_size = sum(tensor.nbytes for tensor in tensors.values())
        content = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / INDEX).write_text(text, encoding="utf-8")
    else:
        assert len(parts) == 1
    if config is not None:
        (folder / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")
    if side_files:
        (folder / "generation_config.json").write_text('{"eos_token_id": 2}\n')
        (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {}}\n')
        (folder / "tokenizer_config.json").write_text('{"model_max_length": 128}\n')
        (folder / "chat_template.jinja").write_text("{{ messages }}\n")
        (folder / "modeling_tiny.py").write_text("# custom code that goes with the weights\n")
    return folder


def write_trained(folder: Path, step: int, *, rows: int = 40, turned: bool = False) -> None:
    """A checkpoint in two shards as a trainer leaves it: with its state, an optimizer, and 3
    tensors drawn from `step`. `turned`: the shards have changed places.
    """
    generator = torch.Generator().manual_seed(step)
    tensors = {
        "model.embed.weight": torch.randn(rows, 7, generator=generator).bfloat16(),
        "model.norm.weight": torch.randn(13, generator=generator),
        "model.count": torch.tensor(3),
    }
    shards = (["model.embed.weight"], ["model.norm.weight", "model.count"])[:: -1 if turned else 1]
    write_checkpoint(folder, tensors, shards=shards, config={"model_type": "llama", "dtype": "bfloat16"}, side_files=False)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "optimizer.pt").write_bytes(b"x")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))


def perturbed(tensors: Mapping[str, Tensor], seed: int, noise: float = 0.02) -> dict[str, Tensor]:
    """`tensors` some steps of training later: floats change a little, integers and zeros do not."""
    generator = torch.Generator().manual_seed(seed)

    def moved(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.clone()
        change = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        scale = noise * tensor.double().abs().median() if tensor.numel() else 0.0
        return torch.where(tensor == 0, tensor.double(), tensor.double() + change * scale).to(tensor.dtype)

    return {name: moved(tensor) for name, tensor in tensors.items()}


def training_run(tensors: Mapping[str, Tensor], count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """`count` checkpoints of a run that starts near `tensors`: neighbors are close to each other."""
    run = [perturbed(tensors, seed)]
    while len(run) < count:
        run.append(perturbed(run[-1], seed + len(run)))
    return run


def write_run(folder: Path, run: Sequence[Mapping[str, Tensor]], *, spacing: int = 100, **options: Any) -> list[Path]:
    """Write each checkpoint of `run` as `checkpoint-<step>`, `spacing` steps apart; paths, oldest
    first.
    """
    return [
        write_checkpoint(folder / f"checkpoint-{spacing * number}", tensors, **options) for number, tensors in enumerate(run, 1)
    ]


def random_bits(dtype: torch.dtype, count: int, seed: int) -> Tensor:
    """Finite values of `dtype` drawn evenly from its bit patterns: all exponents, subnormals
    included.
    """
    generator = torch.Generator().manual_seed(seed)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    raw = torch.randint(-(2**15), 2**15, (count, dtype.itemsize // 2), generator=generator).to(torch.int16)
    values = raw.view(integer).reshape(count).view(dtype)
    return torch.where(values.isfinite(), values, torch.zeros((), dtype=dtype))


def nasty_tensors(seed: int = 0) -> dict[str, Tensor]:
    """One checkpoint of what goes wrong in mergers, in an order that is neither sorted nor by
    dtype.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 0.02) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    corners = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0**-133, 65280.0, 2.0**-24, 0.1, 1e-30, -3e-39])
    return {
        "model.layers.1.mlp.up_proj.weight": normal(131, 67),
        "model.step": torch.tensor(12345, dtype=torch.int64),
        "model.layers.0.norm.weight": 1 + normal(61, dtype=torch.float32),
        "model.embed_tokens.weight": normal(67, 1031),  # more than one block of 64 Ki elements
        "empty": torch.empty((0, 7), dtype=torch.bfloat16),
        "mask": torch.tensor([True, False, True, True, False]),
        "logit_scale": torch.tensor(2.6592, dtype=torch.float32),
        "temperature": torch.tensor(0.07, dtype=torch.bfloat16),
        "größe.重み": normal(3, 1, 5),
        "vision.conv.weight": normal(7, 3, 11, 1, 3, dtype=torch.float16),
        "ema.bias": normal(19, dtype=torch.float64),
        "inv_freq": normal(1, dtype=torch.float64),
        "lookup": torch.arange(-7, 8, dtype=torch.int64).reshape(3, 5),
        "codes": torch.arange(251, dtype=torch.uint8),
        "corners": corners.to(torch.bfloat16),
        "corners.fp32": corners,
        "corners.fp16": corners.to(torch.float16),
        "subnormal": normal(33, scale=1e-39),
        "subnormal.fp32": normal(33, dtype=torch.float32, scale=1e-40),
        "subnormal.fp16": normal(33, dtype=torch.float16, scale=1e-6),
        "zeros": torch.zeros(9, dtype=torch.bfloat16),
        "negative_zeros": -torch.zeros(9, dtype=torch.bfloat16),
        "model.layers.0.mlp.router.weight": normal(5, 67, dtype=torch.float32),
        "empty.fp32": torch.empty(0, dtype=torch.float32),
        "model.layers.10.norm.weight": 1 + normal(67),
    }


def nasty_run(folder: Path, count: int = 4, *, layout: str = "mixed", seed: int = 0) -> list[Path]:
    """`count` nasty checkpoints, oldest first, in one of three layouts.

    "single": one `model.safetensors` each. "sharded": the same three shards each. "mixed": shards,
    physical order and the length of the header differ from checkpoint to checkpoint, and one is a
    single file.
    """
    run = training_run(nasty_tensors(seed), count, seed + 1)
    paths = []
    for number, tensors in enumerate(run, 1):
        options: dict[str, Any] = {"index": False}
        if layout == "sharded":
            options = {"shards": 3}
        elif layout == "mixed" and number != 2:
            names = list(tensors)
            order = torch.randperm(len(names), generator=torch.Generator().manual_seed(number)).tolist()
            names = [names[i] for i in order]
            options = {"shards": split(names, 1 + number), "multiple": 1, "after": " " * number}
        paths.append(write_checkpoint(folder / f"checkpoint-{100 * number}", tensors, **options))
    return paths


def read_layout(folder: Path) -> dict[str, list[tuple[str, str, tuple[int, ...]]]]:
    """Weight file -> (name, dtype, shape) of its tensors in physical order, for the files that
    count.
    """
    index = folder / INDEX
    files = ["model.safetensors"]
    if index.exists():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    layout = {}
    for file in files:
        with (folder / file).open("rb") as stream:
            (header_bytes,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(header_bytes))
        header.pop("__metadata__", None)
        entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        layout[file] = [(name, entry["dtype"], tuple(entry["shape"])) for name, entry in entries]
    return layout


def digests(folder: Path) -> dict[str, str]:
    """The sha256 of every weight file that counts: equal digests are equal bytes, headers included."""
    return {file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in read_layout(folder)}
